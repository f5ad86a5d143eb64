"""Attacks that only ask: Square reads the scores, the evolutionary attack reads nothing but decisions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pin.attacks import Goal, into_ball


@torch.no_grad()
def square(
    recognizer: Callable[[Tensor], Tensor],
    x: Tensor,
    goal: Goal,
    eps: float = 0.04,
    queries: int = 1000,
    p: float = 0.8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Square attack in the max norm (Andriushchenko et al. 2020): +-eps squares at random places, kept when
    the score rises; their area shrinks from the share p of the image.

    Returns (images, queries that each image took until the threshold was crossed or the budget spent).
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    count, _, height, width = x.shape

    def signs(*shape: int) -> Tensor:
        return (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(x)

    stripes = into_ball(x + eps * signs(count, 1, 1, width), x, eps)
    margin, clean_margin = goal.margin(recognizer(stripes)), goal.margin(recognizer(x))
    best = torch.where((margin > clean_margin).view(-1, 1, 1, 1), stripes, x)
    margin = torch.maximum(margin, clean_margin)
    used = torch.ones(count, dtype=torch.long, device=x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    for query in range(1, queries):
        active = (margin <= 0).nonzero().squeeze(1)
        if len(active) == 0:
            break
        side = max(round((_area(p, query / queries) * height * width) ** 0.5), 1)
        top = torch.randint(0, height - side + 1, (len(active), 1), generator=generator).to(x.device)
        left = torch.randint(0, width - side + 1, (len(active), 1), generator=generator).to(x.device)
        inside = ((rows >= top) & (rows < top + side)).unsqueeze(2) & (
            (columns >= left) & (columns < left + side)
        ).unsqueeze(1)  # (A, H, W)
        clean = x[active]
        painted = clean + eps * signs(len(active), 1, 1, 1)
        candidate = into_ball(torch.where(inside.unsqueeze(1), painted, best[active]), clean, eps)
        score = goal.part(active).margin(recognizer(candidate))
        risen = score > margin[active]
        best[active[risen]], margin[active[risen]] = candidate[risen], score[risen]
        used[active] += 1
    return best, used


def _area(p: float, progress: float) -> float:
    """The published schedule: the area halves at fixed shares of the budget."""
    steps = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    return p / 2 ** sum(progress > step for step in steps)


@torch.no_grad()
def evolutionary(
    recognizer: Callable[[Tensor], Tensor],
    x: Tensor,
    goal: Goal,
    other: Tensor,
    queries: int = 10_000,
    grid: float = 45 / 112,
    coordinates: int = 100,
    sigma: float = 0.1,
    mu: float = 0.05,
    path_rate: float = 0.01,
    covariance_rate: float = 0.001,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Decision-based evolutionary attack on face recognition (Dong et al. 2019), all pairs side by side.

    Each image walks from a point that already fools the verifier (`other`, the pair's second image, for
    impersonation; uniform noise for dodging) towards x, along random directions on a coarse grid whose
    variances follow the successes. sigma: step in units of the RMS distance. No ball: the change shrinks
    with the queries. Returns (images, success); an image without a fooling start comes back unchanged.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    count, _, height, width = x.shape
    shape = (count, 1, max(round(grid * height), 1), max(round(grid * width), 1))
    size = shape[2] * shape[3]
    chosen = min(coordinates, size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(x)

    noise = 2 * torch.rand(x.shape, generator=generator).to(x) - 1
    current = torch.where((goal.direction > 0).view(-1, 1, 1, 1), other, noise)
    fooled = goal.margin(recognizer(current)) > 0
    variance = torch.ones(count, size, device=x.device)
    path = torch.zeros(count, size, device=x.device)
    pull = torch.full((count,), mu, device=x.device)
    recent: list[Tensor] = []
    for _ in range(queries - 1):
        gap = x - current
        scale = sigma * gap.square().mean((1, 2, 3)).sqrt()
        # The Gumbel trick draws `chosen` coordinates without repetition, by the softmax of their variances.
        gumbel = -torch.log(-torch.log(torch.rand(count, size, generator=generator).clamp(1e-9, 1 - 1e-7)))
        picked = (variance + gumbel.to(x)).topk(chosen, dim=1).indices
        z = torch.zeros_like(variance).scatter_(1, picked, 1.0) * variance.sqrt() * normal(count, size)
        step = F.interpolate(z.view(shape), (height, width), mode="bilinear", align_corners=False)
        move = scale.view(-1, 1, 1, 1) * step + pull.view(-1, 1, 1, 1) * gap
        candidate = (current + move).clamp(-1, 1)
        closer = (x - candidate).square().sum((1, 2, 3)) < gap.square().sum((1, 2, 3))
        success = fooled & closer & (goal.margin(recognizer(candidate)) > 0)
        current = torch.where(success.view(-1, 1, 1, 1), candidate, current)
        follow = (1 - path_rate) * path + (path_rate * (2 - path_rate)) ** 0.5 * z
        path = torch.where(success.unsqueeze(1), follow, path)
        grown = (1 - covariance_rate) * variance + covariance_rate * path.square()
        variance = torch.where(success.unsqueeze(1), grown, variance)
        recent.append(success)
        if len(recent) == 5:  # mu follows the success rate of the last five queries
            pull = pull * torch.exp(torch.stack(recent).float().mean(0) - 0.2)
            recent.clear()
    return torch.where(fooled.view(-1, 1, 1, 1), current, x), fooled
