"""Relevance of an image to each source domain, and the weights that mix the experts.

K experts, L probed layers, B images. Relevance is (B, K, L); a small value means that the image looks like
what the expert was trained on.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Aggregation = Literal["shared", "learned", "nearest", "uniform", "official"]
MODES: tuple[Aggregation, ...] = get_args(Aggregation)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial mean and unbiased variance of every image and channel, (..., C, H, W) -> two (..., C).

    Accumulated in float32 whatever the precision of x (float64 stays). Two plain sums, because a fused
    variance is many times slower on a CPU. A 1x1 map has variance 0.
    """
    n = x.shape[-2] * x.shape[-1]
    kind = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((-2, -1), dtype=kind)
    power = x.to(kind).square().sum((-2, -1))
    return mean, ((power - n * mean.square()) / max(n - 1, 1)).clamp_min(0)


@torch.no_grad()
def relevance(
    domain_mean: Tensor, domain_var: Tensor, image_mean: Tensor, image_var: Tensor, channels: list[int]
) -> Tensor:
    """2-Wasserstein distance of diagonal Gaussians, layer by layer.

    r_{k,l}(x) = sqrt( sum_c (m_c - mu_c)^2 + sum_c (sqrt(v_c) - sqrt(s_c))^2 ), where (m, v) are the running
    statistics of expert k's BN and (mu, s) those of image x measured in expert k's own pass.

    domain_*: (K, C), image_*: (K, B, C), the layers' channels concatenated; channels: how many each layer
    has. Returns (B, K, L).
    """
    squared = (domain_mean[:, None] - image_mean).square()
    squared += (domain_var.sqrt()[:, None] - image_var.sqrt()).square()  # (K, B, C)
    layers = [part.sum(-1) for part in squared.split(channels, dim=-1)]
    return torch.stack(layers, -1).sqrt().transpose(0, 1)


def scoring_layers(length: int, small: bool) -> tuple[nn.Linear, nn.Linear]:
    """The released scoring network: two linear layers, L -> 512 -> 1, nothing between them.

    small: start near uniform weights (last layer x 0.01) instead of the release's saturated softmax.
    """
    first, last = nn.Linear(length, 512), nn.Linear(512, 1)
    for layer in (first, last):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        nn.init.zeros_(layer.bias)
    if small:
        with torch.no_grad():
            last.weight.mul_(0.01)
    return first, last


def weights(
    mode: Aggregation, relevance: Tensor, scores: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Weights of the experts for each image, (B, K), rows sum to 1.

    shared, learned: softmax of the scores, (B, K), of the shared or the per-expert scoring networks.
    nearest: softmax(-sum_l r). uniform: 1/K. official: softmax(+sum_l r), as the released code evaluates,
    which gives nearly all weight to the most distant expert.
    temperature: divides what enters the softmax. Raises ValueError on another mode or missing scores.
    """
    if mode in ("shared", "learned"):
        if scores is None:
            raise ValueError(f"aggregation '{mode}' needs the scores of its scoring network")
        logits = scores
    elif mode == "uniform":
        logits = torch.zeros_like(relevance[..., 0])
    elif mode in ("nearest", "official"):
        logits = relevance.sum(-1) * (1 if mode == "official" else -1)
    else:
        raise ValueError(f"aggregation '{mode}' is none of {', '.join(MODES)}")
    return (logits / temperature).softmax(-1)


def mix(weights: Tensor, maps: Tensor) -> Tensor:
    """F = sum_k w_k f_k: weights (B, K), maps (K, B, C, H, W) -> (B, C, H, W), in the maps' precision."""
    return torch.einsum("bk,kbchw->bchw", weights.to(maps.dtype), maps)
