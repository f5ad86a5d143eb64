"""DMM, the disentangled memory module: one block of memory slots per facial part.

Notation: P positions of a feature map, C channels, K blocks of N slots, M (K, N, C) with unit rows. The
paper's abstract names the module and its purpose; the equations are our reconstruction, with the two update
rules of related work: slots learned by gradient (MemAE) or written from clean features (MNAD).
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

Update = Literal["grad", "ema"]
Routing = Literal["soft", "hard"]
Addressing = Literal["dense", "shrink"]

TILE = 128
"""Positions of one class that are multiplied with their block at once under hard routing."""


class DMM(nn.Module):
    """Disentangled memory.

    F (B, C, h, w), parsing p (B, K, h, w) -> F' = F + fuse([F ; r]) with
    q = normalize(query(F)), w_k = softmax_i(<q, M_ki> / tau) inside block k, r = sum_k p_k sum_i w_ki M_ki.

    blocks=1 is the shared memory of the ablation: one softmax over all slots, no semantics.
    update: "grad" learns M by back-propagation; "ema" writes clean features into it (`write`), without
    gradient. routing: "soft" mixes the blocks by p, "hard" reads the block of the most probable part alone.
    addressing: "shrink" removes weights below `shrink` and renormalises (MemAE's sparse addressing).
    """

    def __init__(
        self,
        channels: int,
        blocks: int,
        slots: int,
        tau: float = 0.1,
        update: Update = "grad",
        routing: Routing = "soft",
        addressing: Addressing = "dense",
        shrink: float = 0.0025,
        decay: float = 0.98,
        revive_after: int = 1000,
        weighted_write: bool = False,
    ):
        super().__init__()
        self.blocks, self.slots, self.tau = blocks, slots, tau
        self.update, self.routing, self.addressing, self.shrink = update, routing, addressing, shrink
        self.decay, self.revive_after, self.weighted_write = decay, revive_after, weighted_write
        self.query = nn.Conv2d(channels, channels, 1)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        memory = F.normalize(torch.randn(blocks, slots, channels), dim=-1)
        if update == "grad":
            self.memory = nn.Parameter(memory)
        else:
            self.register_buffer("memory", memory)
            self.register_buffer("age", torch.zeros(blocks, slots, dtype=torch.long))
        self.register_buffer("usage", torch.zeros(blocks, slots))
        self._reads: Tensor | None = None

    def slots_normalised(self) -> Tensor:
        """M with unit rows, (K, N, C), fp32."""
        return F.normalize(self.memory.float(), dim=-1)

    def queries(self, features: Tensor) -> Tensor:
        """F (B, C, h, w) -> unit queries (B, P, C), fp32."""
        return F.normalize(self.query(features).flatten(2).transpose(1, 2).float(), dim=-1)

    def forward(self, features: Tensor, parsing: Tensor, read: bool = True) -> Tensor:
        """F' of the class docstring. read=False returns F (the write-only warm-up of `ema`)."""
        if not read:
            return features
        q = self.queries(features)
        p = parsing.flatten(2).transpose(1, 2)  # (B, P, K)
        if self.routing == "hard" and self.blocks > 1:
            r = self._read_own_block(q.flatten(0, 1), p.argmax(-1).flatten()).view_as(q)
        else:
            w = self.weights(q, p)  # (B, P, K, N)
            if self.training:
                self._reads = w.detach().sum((0, 1))
            r = w.flatten(2) @ self.slots_normalised().flatten(0, 1)
        r = r.transpose(1, 2).view_as(features).to(features.dtype)
        return features + self.fuse(torch.cat((features, r), 1))

    def shares(self, parsing: Tensor) -> Tensor:
        """What each position takes of each block: parsing (B, K, h, w) -> (B, P, K), p itself or, under hard
        routing, 1 for the most probable part."""
        p = parsing.flatten(2).transpose(1, 2)
        hard = self.routing == "hard" and self.blocks > 1
        return F.one_hot(p.argmax(-1), self.blocks).to(p) if hard else p

    def weights(self, q: Tensor, p: Tensor) -> Tensor:
        """Weights of all slots: q (B, P, C), p (B, P, K) -> p_k w_ki (B, P, K, N); one matrix product."""
        scores = q @ self.slots_normalised().flatten(0, 1).T
        w = self._address(scores.view(*q.shape[:2], self.blocks, self.slots) / self.tau)
        return w if self.blocks == 1 else w * p.unsqueeze(-1)

    def _address(self, scores: Tensor) -> Tensor:
        w = scores.float().softmax(-1)
        if self.addressing == "shrink":
            w = F.relu(w - self.shrink) * w / ((w - self.shrink).abs() + 1e-12)
            w = F.normalize(w, p=1, dim=-1)
        return w

    def _read_own_block(self, q: Tensor, block: Tensor) -> Tensor:
        """q (n, C), block (n,) -> r (n, C): sorted by block and cut into tiles, so that one batched product
        reads N slots per position instead of K N."""
        tiles, where, order, block_of_tile = self._tile(q, block)
        memory = self.slots_normalised()[block_of_tile]  # (T, N, C)
        w = self._address(tiles @ memory.transpose(1, 2) / self.tau)
        if self.training:
            # Padding rows of a tile are zero queries: they read evenly and must not count.
            real = torch.zeros(w.shape[0] * TILE, device=w.device).index_fill_(0, where, 1.0)
            reads = (w.detach() * real.view(-1, TILE, 1)).sum(1)
            self._reads = torch.zeros_like(self.usage).index_add_(0, block_of_tile, reads)
        r = (w @ memory).flatten(0, 1)[where]
        return torch.empty_like(r).index_copy(0, order, r)

    def _tile(self, q: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> tiles (T, TILE, C) of one block each, place of every sorted position in them, the order, and the
        block of each tile. T is a bound that needs no look at the data: n / TILE + K."""
        n = len(q)
        order = block.argsort(stable=True)
        counts = _counts(block, self.blocks)
        tiles_of_block = (counts + TILE - 1) // TILE
        last = tiles_of_block.cumsum(0)
        start, first = counts.cumsum(0) - counts, (last - tiles_of_block) * TILE
        ordered = block[order]
        where = first[ordered] + torch.arange(n, device=q.device) - start[ordered]
        total = (n + TILE - 1) // TILE + self.blocks
        tiles = q.new_zeros(total * TILE, q.shape[1]).index_copy(0, where, q[order])
        numbers = torch.arange(total, device=q.device)
        block_of_tile = torch.searchsorted(last, numbers, right=True).clamp(max=self.blocks - 1)
        return tiles.view(total, TILE, -1), where, order, block_of_tile

    def nearest_slot(self, q: Tensor, block: Tensor) -> Tensor:
        """Slot of its own block that each query is nearest to: q (n, C), block (n,) -> (n,)."""
        tiles, where, order, block_of_tile = self._tile(q, block)
        near = (tiles @ self.slots_normalised()[block_of_tile].transpose(1, 2)).argmax(-1).flatten()[where]
        return torch.empty_like(near).index_copy(0, order, near)

    @torch.no_grad()
    def count_reads(self) -> None:
        """After a training step: fold the step's reads into `usage`, a running share of each block's
        reads."""
        if self._reads is None:
            return
        reads = _reduced(self._reads)
        share = reads / reads.sum(1, keepdim=True).clamp_min(1e-8)
        self.usage.lerp_(share, 0.01)
        self._reads = None

    @torch.no_grad()
    def write(self, q: Tensor, block: Tensor, generator: torch.Generator | None = None) -> None:
        """`ema`: write clean queries q (n, C) of the parts `block` (n,) into their nearest slots.

        M_ki <- normalize(mu M_ki + (1 - mu) normalize(sum of alpha q over the positions of slot ki)); alpha
        is 1, or with `weighted_write` MNAD's softmax over positions divided by its largest value. A slot
        unused for more than `revive_after` writes becomes a random clean query of its part. Under several
        processes the sums are added before the update, so that all keep the same memory.
        """
        if self.blocks == 1:
            block = torch.zeros_like(block)
        q = q.float()
        memory = self.slots_normalised().flatten(0, 1)
        slot = block * self.slots + self.nearest_slot(q, block)
        alpha = torch.ones_like(q[:, 0])
        if self.weighted_write:
            similarity = (q * memory[slot]).sum(1)
            largest = torch.full_like(memory[:, 0], -2.0).scatter_reduce(0, slot, similarity, "amax")
            largest = _reduced(largest, dist.ReduceOp.MAX)
            alpha = (similarity - largest[slot]).exp()
        sums = _reduced(torch.zeros_like(memory).index_add_(0, slot, alpha[:, None] * q))
        counts = _reduced(_counts(slot, len(memory)).float())
        used = counts > 0
        moved = F.normalize(self.decay * memory + (1 - self.decay) * F.normalize(sums, dim=-1), dim=-1)
        memory = torch.where(used[:, None], moved, self.memory.flatten(0, 1))
        age = torch.where(used, 0, self.age.flatten() + 1)
        candidates, exists = self._random_query_of_each_block(q, block, generator)
        owner = torch.arange(len(memory), device=q.device) // self.slots
        revived = (age > self.revive_after) & exists[owner]
        memory = torch.where(revived[:, None], candidates, memory)
        self.memory.copy_(memory.view_as(self.memory))
        self.age.copy_(torch.where(revived, 0, age).view_as(self.age))

    def _random_query_of_each_block(
        self, q: Tensor, block: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """For every slot one random query of its part (K N, C), and for every part whether there is any
        (K,)."""
        order = block.argsort(stable=True)
        counts = _counts(block, self.blocks)
        start = (counts.cumsum(0) - counts).repeat_interleave(self.slots)
        random = torch.rand(self.blocks * self.slots, generator=generator).to(q.device, non_blocking=True)
        pick = (random * counts.repeat_interleave(self.slots)).long() + start
        candidates = q[order[pick.clamp(max=len(q) - 1)]]
        exists = counts > 0
        if dist.is_initialized():
            # All processes must take the same candidates: those of the first one.
            dist.broadcast(candidates, 0)
            exists = exists.long()
            dist.broadcast(exists, 0)
            exists = exists.bool()
        return candidates, exists


def _counts(index: Tensor, length: int) -> Tensor:
    """How often each of 0 .. length - 1 occurs in `index`, int64. A GPU's bincount waits for the data."""
    return index.new_zeros(length).index_add_(0, index, torch.ones_like(index))


def _reduced(value: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or what `operation` says) over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value, operation)
    return value


def perplexity(usage: Tensor) -> Tensor:
    """Effective number of used slots per block: usage (K, N), shares or counts -> (K,) in [1, N], 0 if
    unused."""
    share = usage / usage.sum(1, keepdim=True).clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(1)
    return torch.where(usage.sum(1) > 0, entropy.exp(), 0.0)
