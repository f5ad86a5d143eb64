"""The same network as a plain loop over its experts, the way the released code runs it.

A yardstick: the tests check the batched form against it, `bench.py` measures how much faster that is.
Every expert makes its own pass with autograd on, every pass probes every layer, and statistics are looked up
by name in a state dict collected anew in every pass.
"""

import torch
from torch import Tensor

from meta_reid.aggregation import mix, weights
from meta_reid.model import META, Description, Training
from meta_reid.norms import Unit, first_norm, step


class Sequential:
    """Plain-loop form of a META network; shares its parameters. lookup: scan the state dict as released."""

    def __init__(self, model: META, lookup: bool = True):
        self.model, self.lookup = model, lookup
        self.names = {id(module): name for name, module in model.backbone.named_modules()}

    def one_pass(self, images: Tensor, chosen: int, learn: bool) -> tuple[Tensor, list[Tensor]]:
        """Pass of one BN set: its map and the relevance of each probed layer, (B,) each."""
        trunk = self.model.backbone
        state = trunk.state_dict() if self.lookup else None
        distances = []

        def norm(unit: Unit, x: Tensor) -> Tensor:
            module = unit.norms[chosen].train(learn)
            if state is None:
                m, v = module.running_mean, module.running_var
            else:
                name = self.names[id(module)]
                m, v = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            probe = x.detach()
            mu, s = probe.mean((2, 3)), probe.var((2, 3))
            square = (m.repeat(len(x), 1) - mu).pow(2).sum(1) + (v.sqrt() - s.sqrt()).pow(2).sum(1)
            distances.append(square.sqrt())
            return module(x)

        stem = self.model.normalise(images)
        x = trunk.pool(norm(trunk.stem, stem).relu_())
        blocks = trunk.blocks if chosen < trunk.experts else trunk.blocks[: trunk.shared_blocks]
        for block in blocks:
            x = block(x, step(norm))
        return x, distances

    def tail(self, x: Tensor) -> Tensor:
        """The global branch after it leaves the trunk."""
        for block in self.model.backbone_agg.blocks:
            x = block(x, step(first_norm))
        return x

    def describe(self, images: Tensor) -> Description:
        """As `META.describe`, one pass after the other."""
        passes = [self.one_pass(images, k, learn=False) for k in range(self.model.K + 1)]
        universal = self.tail(passes.pop()[0])
        distances = torch.stack([torch.stack(r, 1) for _, r in passes], 1)
        return Description(torch.stack([x for x, _ in passes]), universal, distances)

    def embed(self, images: Tensor) -> Tensor:
        """As `META.embed` with the model's own aggregation."""
        return torch.cat(self.model.parts(self.describe(images)), 1)

    def train_step(self, images: Tensor, domain: int) -> Training:
        """As `META.forward` of a training batch after the warm-up, with autograd through all experts."""
        model = self.model
        maps, distances = [], []
        for k in range(model.K):
            x, r = self.one_pass(images, k, learn=k == domain)
            maps.append(x), distances.append(torch.stack(r, 1))
        universal = self.tail(self.one_pass(images, model.K, learn=True)[0])
        others = [k for k in range(model.K) if k != domain]
        r = torch.stack([distances[k] for k in others], 1)
        mixtures = {}
        for kind in model.scorings:
            w = weights(kind, r, model.scores(kind, r, others))
            mixtures[kind] = model.heads_F_finals.pool(
                mix(w, torch.stack([maps[k].detach() for k in others]))
            )
        e, e_logits = getattr(model, f"heads_Expert{domain + 1}")(maps[domain])
        u, u_logits = model.heads_agg(universal)
        return Training(e, e_logits, u, u_logits, mixtures)
