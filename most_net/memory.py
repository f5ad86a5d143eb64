"""The dynamic memory: durable relations between photo features and sketch features.

Slot i remembers one alignment: where the photo's query looks like the key K_i, the sketch's feature looks
like the value V_i. Reading is attention over the slots. Writing needs no labels: photo and sketch of a pair
are aligned, so the same position of both shows what belongs together. Equations are a reconstruction (see
the README).
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.runtime import own_type

MemoryKind = Literal["none", "dynamic", "grad"]


class Memory(nn.Module):
    """N slots of keys (photo domain, unit length) and values (sketch domain), with age and usage.

    channels: C of queries and values. slots: N. tau: temperature of reading. momentum: share of the old
    content that survives a write. revive_after: steps without a hit after which a slot is given away.
    topk: read from the k best slots only, 0 from all. weighting: of the queries that hit a slot, `mean` or
    `mnad` (nearer queries count more, exp(score - best score), as MNAD does). learned: keys and values are
    parameters that gradient descent moves (ablation); otherwise they are buffers that only `write` moves.
    """

    REVIVED_PER_STEP = 8

    def __init__(
        self,
        channels: int,
        slots: int,
        tau: float = 0.07,
        momentum: float = 0.9,
        revive_after: int = 500,
        topk: int = 0,
        weighting: Literal["mean", "mnad"] = "mean",
        learned: bool = False,
    ):
        super().__init__()
        self.slots, self.tau, self.momentum, self.revive_after = slots, tau, momentum, revive_after
        self.topk, self.weighting, self.learned = topk, weighting, learned
        keys = F.normalize(torch.randn(slots, channels), dim=1)
        values = 0.1 * torch.randn(slots, channels)
        if learned:
            self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)
        else:
            self.register_buffer("keys", keys)
            self.register_buffer("values", values)
        self.register_buffer("age", torch.zeros(slots, dtype=torch.long))
        self.register_buffer("usage", torch.zeros(slots, dtype=torch.long))

    def scores(self, queries: Tensor) -> Tensor:
        """Cosine of every unit query (M, C) with every key: (M, N), float32."""
        keys = F.normalize(self.keys, dim=1) if self.learned else self.keys
        with own_type(queries):
            return queries.float() @ keys.T

    def attend(self, scores: Tensor) -> Tensor:
        """Attention a = softmax(scores / tau) over the slots, or over the best `topk`: (M, N)."""
        if self.topk:
            least = scores.topk(self.topk, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return (scores / self.tau).softmax(dim=1)

    def read(self, queries: Tensor, scores: Tensor | None = None) -> Tensor:
        """Retrieved values sum_i a_i V_i: (M, C). Gradients reach the queries, not the slots (unless
        learned).

        Without `scores` one fused attention call does it all; with them, nothing is computed twice.
        """
        with own_type(queries):
            if scores is None and not self.topk and not self.learned:
                q, k, v = (x.float()[None, None] for x in (queries, self.keys, self.values))
                return F.scaled_dot_product_attention(q, k, v, scale=1 / self.tau)[0, 0]
            scores = self.scores(queries) if scores is None else scores
            return self.attend(scores) @ self.values

    @torch.no_grad()
    def write(
        self,
        queries: Tensor,
        features: Tensor,
        scores: Tensor,
        generator: torch.Generator | None = None,
        revive: bool = True,
    ) -> None:
        """Move every slot towards what hit it, then give long unused slots to badly matched queries.

        queries, features: (M, C), photo query and sketch feature of the same positions; scores: (M, N).
        generator: a CPU generator for the choice of queries. Processes of a distributed run write the same.
        """
        queries, features = queries.float(), features.float()
        best, slot = scores.max(dim=1)
        if self.weighting == "mnad":
            weights = (best - _reduced(scores.amax(0), dist.ReduceOp.MAX)[slot]).exp()
        else:
            weights = torch.ones_like(best)
        mass = torch.zeros_like(scores[0]).index_add_(0, slot, weights)
        query_sum = torch.zeros_like(self.keys).index_add_(0, slot, queries * weights[:, None])
        feature_sum = torch.zeros_like(self.values).index_add_(0, slot, features * weights[:, None])
        # Not bincount, which waits for the device to know the largest slot.
        hits = torch.zeros_like(self.usage).index_add_(0, slot, torch.ones_like(slot))
        mass, query_sum, feature_sum, hits = (_reduced(x) for x in (mass, query_sum, feature_sum, hits))

        hit = (hits > 0)[:, None]
        mu = self.momentum
        keys = F.normalize(mu * self.keys + (1 - mu) * F.normalize(query_sum, dim=1), dim=1)
        values = mu * self.values + (1 - mu) * feature_sum / mass.clamp(min=1e-12)[:, None]
        self.keys.copy_(torch.where(hit, keys, self.keys))
        self.values.copy_(torch.where(hit, values, self.values))
        self.age.copy_(torch.where(hits > 0, 0, self.age + 1))
        self.usage += hits
        if revive:
            self._revive(queries, features, best, generator)

    def _revive(
        self, queries: Tensor, features: Tensor, best: Tensor, generator: torch.Generator | None
    ) -> None:
        count = min(self.REVIVED_PER_STEP, self.slots, len(queries))
        pool = best.topk(min(16 * count, len(best)), largest=False).indices
        chosen = pool[
            torch.randperm(len(pool), generator=generator)[:count].to(pool.device, non_blocking=True)
        ]
        age, oldest = self.age.topk(count)
        # A mask instead of a branch: the loop never waits for the device.
        old = (age > self.revive_after)[:, None]
        self.keys[oldest] = torch.where(old, _from_first(queries[chosen]), self.keys[oldest])
        self.values[oldest] = torch.where(old, _from_first(features[chosen]), self.values[oldest])
        self.age[oldest] = torch.where(old[:, 0], 0, age)

    @torch.no_grad()
    def fit(self, queries: Tensor, features: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Start from k-means of the queries (M, C) instead of random keys; values are cluster means."""
        pick = torch.randperm(len(queries), generator=generator)[: self.slots].to(queries.device)
        self.keys[: len(pick)] = _from_first(queries[pick].float())
        momentum, self.momentum = self.momentum, 0.0
        for _ in range(rounds):
            self.write(queries, features, self.scores(queries), revive=False)
        self.momentum = momentum
        self.usage.zero_()
        self.age.zero_()


def usage_perplexity(hits: Tensor) -> float:
    """exp of the entropy of slot hits (N,): how many slots are in use, between 1 and N."""
    share = hits.double() / hits.sum()
    return float(torch.special.entr(share).sum().exp())


def merge(first: Memory, second: Memory) -> Memory:
    """A memory that holds the slots of both: two artists' repertoires in one. Age and usage come along.
    Learned keys are normalised, as reading does with them: the merged ones are buffers."""
    both = Memory(
        first.keys.shape[1],
        first.slots + second.slots,
        first.tau,
        first.momentum,
        first.revive_after,
        first.topk,
        first.weighting,
    )
    states = [memory.state_dict() for memory in (first, second)]
    for memory, state in zip((first, second), states, strict=True):
        if memory.learned:
            state["keys"] = F.normalize(state["keys"], dim=1)
    both.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return both


def _reduced(x: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


def _from_first(x: Tensor) -> Tensor:
    if dist.is_initialized():
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x
