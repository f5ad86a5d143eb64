"""PIN's objective: the cost of a mask, its best mask, and the ways to train the selection network on it.

With U orthonormal, c = U^T (x - m) and n = U^T (x_n - x), Parseval turns the pixel cost of a mask q

    L(q) = (1/D) ||U diag(q) U^T (x_n - m) - (x - m)||^2 + lambda |q|_0

into a function that is linear in q,

    L(q) = base - sum_k q_k w_k,    base = ||x - m||^2 / D,    w_k = (c_k^2 - n_k^2) / D - lambda,

so neither a masked basis nor a reconstructed image is ever formed. w is called the worth of an eigenface.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pin.basis import Basis
from shared.processes import drawn, mean, total, world

EPSILON = 1e-6


@dataclass(frozen=True)
class MaskCost:
    """L(q) for every image of a batch. base: (B,). worth: (B, K)."""

    base: Tensor
    worth: Tensor

    def __call__(self, q: Tensor) -> Tensor:
        """L of masks or keep-probabilities q, (..., B, K) -> (..., B). Of p it is the expectation of L."""
        return self.base - (q * self.worth).sum(-1)

    def oracle(self) -> Tensor:
        """The best mask (B, K): keep what is worth its price. Its cost bounds every selection network's."""
        return (self.worth > 0).float()


def mask_cost(basis: Basis, x: Tensor, noisy: Tensor, lamb: float) -> MaskCost:
    """Cost of masks for clean x and noisy x_n, both (B, 1, H, W); lamb: price of one kept eigenface."""
    centered = basis.center(x)
    clean = centered @ basis.eig_vec  # (B, K)
    noise = basis.coefficients(noisy) - clean
    pixels = centered.shape[1]
    return MaskCost(centered.square().sum(1) / pixels, (clean.square() - noise.square()) / pixels - lamb)


def add_noise(
    x: Tensor,
    scale: float,
    generator: torch.Generator,
    norm: Literal["batch", "image"] = "batch",
    alone: bool = False,
) -> Tensor:
    """x_n = x + scale * z * ||x|| / ||z||, z Gaussian; not clamped.

    norm: "batch" takes both norms over the whole batch (official, so an image's noise depends on its
    neighbours), "image" over each image. alone: x is no process's share of a batch but all of it.
    """
    shape, draw = x.shape, partial(torch.randn, generator=generator, device=generator.device)
    z = (draw(shape) if alone else drawn(draw, shape)).to(x.device)
    if norm == "batch":
        return x + scale * z * (x.norm() / z.norm() if alone else whole_norm(x) / whole_norm(z))
    lengths = (x.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    return x + scale * z * lengths


def whole_norm(x: Tensor) -> Tensor:
    """Length of the rows of all processes, as one vector."""
    return x.norm() if world() == 1 else total(x.norm().square()).sqrt()


def calibrate_lambda(clean: Tensor, noise: Tensor, pixels: int, keep: int) -> float:
    """lambda for which about `keep` eigenfaces pay: mean over images of (c_K^2 - n_K^2) / D at K = keep.

    clean, noise: coefficients (N, K). The official 0.015 is meant for another scale of the cost: with the
    mean over pixels it leaves a handful. Our decision; raises ValueError when `keep` is out of range.
    """
    if not 1 <= keep <= clean.shape[1]:
        raise ValueError(f"keep must lie in 1..{clean.shape[1]}, not {keep}")
    k = keep - 1
    return max(((clean[:, k].square() - noise[:, k].square()).mean() / pixels).item(), 0.0)


def reinforce(
    p: Tensor,
    cost: MaskCost,
    samples: int = 30,
    baseline: Literal["batch", "image"] = "batch",
    generator: torch.Generator | None = None,
    extra: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Policy gradient of the official code: mean over images of sum_s (L(q^s) - b) log P(q^s | p).

    p: (B, K). baseline b: mean of L over samples and images (official), or over each image's samples (the
    follow-up's). extra: further costs of masks, (S, B, K) -> (S, B). Returns (loss, mean cost).
    The expected gradient is (S - 1/B) times that of the mean over images of E[L] with the batch baseline,
    and (S - 1) times with the image baseline.

    The masks enter only through two sums over the samples, so the graph holds (B, K) and not (S, B, K).
    """
    with torch.no_grad():
        device = generator.device if generator is not None else p.device
        draw = partial(torch.rand, generator=generator, device=device)
        uniform = drawn(draw, (samples, *p.shape), dim=1).to(p.device)
        masks = (p > uniform).float()  # (S, B, K)
        costs = cost.base - torch.einsum("sbk,bk->sb", masks, cost.worth)
        if extra is not None:
            costs = costs + extra(masks)
        b = mean(costs.mean()) if baseline == "batch" else costs.mean(0)
        advantage = costs - b  # (S, B)
        kept = torch.einsum("sb,sbk->bk", advantage, masks)
        dropped = advantage.sum(0).unsqueeze(1) - kept
    p = p.clamp(EPSILON, 1 - EPSILON)
    loss = (kept * p.log() + dropped * (1 - p).log()).sum(1).mean()
    return loss, costs.mean()


def exact(p: Tensor, cost: MaskCost, samples: int = 30) -> tuple[Tensor, Tensor]:
    """E[L] in closed form, no sampling and no variance; times S, for the step size of S samples.

    Returns (loss, mean expected cost).
    """
    expected = cost(p).mean()
    return samples * expected, expected.detach()


def distill(p: Tensor, cost: MaskCost) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy to the oracle's mask: an extension, stabler than a policy gradient.

    Returns (loss, mean expected cost).
    """
    p = p.clamp(EPSILON, 1 - EPSILON)
    return F.binary_cross_entropy(p, cost.oracle()), cost(p).mean().detach()


def mask_entropy(p: Tensor) -> Tensor:
    """Mean entropy of the masks in nats per eigenface; as a bonus it slows the saturation of p."""
    p = p.clamp(EPSILON, 1 - EPSILON)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def cosine_logits(
    features: Tensor, kernel: Tensor, labels: Tensor, scale: float = 16.0, margin: float = 0.2
) -> Tensor:
    """Additive-margin softmax logits for the demo's recogniser. features (B, d) unit, kernel (d, classes)."""
    cosines = features @ F.normalize(kernel, dim=0)
    return scale * (cosines - margin * F.one_hot(labels, kernel.shape[1]))


def arcface_logits(
    features: Tensor, kernel: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.5
) -> Tensor:
    """ArcFace training logits: s cos(theta + m) for the true class, s cos(theta) for the others.

    features (B, d) unit, kernel (d, classes). Past theta = pi - m the penalty goes on linearly as
    cos(theta) - m sin(m), as in the official head.
    """
    cosines = (features @ F.normalize(kernel, dim=0)).clamp(-1, 1)
    margin = torch.tensor(margin, device=features.device)
    true = cosines.gather(1, labels[:, None])
    moved = true * margin.cos() - (1 - true.square()).clamp_min(0).sqrt() * margin.sin()
    moved = torch.where(true > -margin.cos(), moved, true - margin * margin.sin())
    return scale * cosines.scatter(1, labels[:, None], moved)
