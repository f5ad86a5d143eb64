"""Post-processing of a swap, as the official test code does it, and the feathered blend into the photo.

All pictures are crops of one size S (the official one is 256), (B, ., S, S); masks have 1 = background, hulls
1 = outside.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HAIR, HAT = 17, 18
LIFT = (10, 40)
"""Pixels of a 256 picture by which the upper brow points are moved outwards and up to enclose the
forehead."""
SCARCE, ENOUGH = 0.4, 1000
"""The source's forehead counts as covered below this share of the target's, which must have so many
pixels of a 256 picture, each counted twice as in the official code."""
STEPS, THRESHOLD = 7, 0.9
"""Of the soft erosion."""

# --- official ---------------------------------------------------------------------------------------


def outside_hull(points: Tensor, size: int) -> Tensor:
    """98 points (B, 98, 2) in pixels -> (B, 1, size, size): 0 inside contour and lifted brows, 1 outside."""
    scale = size / 256
    moved = points.detach().float().cpu().clone()
    moved[:, 42:47] += torch.tensor([LIFT[0], -LIFT[1]]) * scale
    moved[:, 33:38] += torch.tensor([-LIFT[0], -LIFT[1]]) * scale
    order = [*range(33), *range(46, 41, -1), *range(37, 32, -1)]
    hulls = np.zeros((len(points), size, size), np.uint8)
    for hull, polygon in zip(hulls, moved[:, order].numpy().astype(np.int32), strict=True):
        cv2.fillPoly(hull, [polygon], 255)
        cv2.GaussianBlur(hull, (3, 3), 0, dst=hull)
    return torch.from_numpy(hulls == 0).float()[:, None].to(points.device)


def forehead(points: Tensor, mask: Tensor) -> Tensor:
    """The part of the mask's face that lies outside the hull of the landmarks.

    points (B, 98, 2), mask (B, 1, S, S) -> (B, 1, S, S) in [0, 1]: clamp(outside - mask).
    """
    return (outside_hull(points, mask.shape[-1]) - mask).clamp(0, 1)


def keep_map(
    labels: Tensor, forehead_source: Tensor, forehead_target: Tensor, kept: Sequence[int] = (HAIR,)
) -> Tensor:
    """Where the swap is used, before softening: (B, 1, S, S), 0 = the target's pixel.

    labels (B, S, S) of the target in BiSeNet's order; foreheads (B or 1, 1, S, S). The target's hair stays;
    its forehead too when the source's is covered by hair or a hat. kept: labels that stay, officially hair
    alone; add `HAT` for hats.
    """
    size = labels.shape[-1]
    hair = torch.isin(labels, torch.tensor(kept, device=labels.device, dtype=labels.dtype))[:, None].float()
    n_s, n_t = (
        2 * f.ne(0).flatten(1).sum(1).float() * (256 / size) ** 2 for f in (forehead_source, forehead_target)
    )
    covered = (n_s / (n_t + 1e-4) < SCARCE) & (n_t >= ENOUGH)
    return 1 - (hair + forehead_target * covered.view(-1, 1, 1, 1)).clamp(max=1)


def cone(size: int, device: torch.device | None = None) -> Tensor:
    """The erosion's kernel (1, 1, k, k), k = 17 at 256: largest distance minus distance, summing to 1."""
    radius = max(1, round(8 * size / 256))
    axis = torch.arange(-radius, radius + 1, device=device).float()
    distance = (axis.view(-1, 1).square() + axis.square()).sqrt()
    kernel = distance.max() - distance
    return (kernel / kernel.sum())[None, None]


def soft_erosion(x: Tensor, whole_batch: bool = False) -> Tensor:
    """Keep map (B, 1, S, S) -> the same, eroded with a soft rim.

    Six times the smaller of x and its blur, once the blur; 1 where that reaches 0.9, below divided by the
    largest value below 0.9. whole_batch: take that maximum over the batch as the official code does, where a
    result depends on its neighbours; otherwise of each picture. Outside the picture counts as 0.
    """
    kernel = cone(x.shape[-1], x.device)
    padding = kernel.shape[-1] // 2
    for _ in range(STEPS - 1):
        x = torch.minimum(x, F.conv2d(x, kernel, padding=padding))
    x = F.conv2d(x, kernel, padding=padding)
    low = x * (x < THRESHOLD)
    largest = low.amax() if whole_batch else low.amax((1, 2, 3), keepdim=True)
    return torch.where(x >= THRESHOLD, 1.0, x / largest.clamp_min(1e-12))


def fuse(swap: Tensor, target: Tensor, keep: Tensor, whole_batch: bool = False) -> Tensor:
    """Official result: swap * k + target * (1 - k), k the soft erosion of the keep map."""
    return torch.lerp(target, swap, soft_erosion(keep, whole_batch))


# --- into the photo (decided here; the official code returns crops) ---------------------------------


def feather(mask: Tensor, width: float = 1 / 24) -> Tensor:
    """Mask (B, 1, S, S), 1 = background -> how much of the swap is used, (B, 1, S, S): 1 well inside the
    face, falling to 0 at its edge and at the crop's border. width: of the rim relative to S."""
    radius = max(1, round(mask.shape[-1] * width / 2))
    face = F.pad(1 - mask[..., 1:-1, 1:-1], (1, 1, 1, 1))
    inside = -F.max_pool2d(-face, 2 * radius + 1, 1, radius)
    window = torch.hann_window(2 * radius + 3, periodic=False, device=mask.device)[1:-1]
    window = window / window.sum()
    blurred = F.conv2d(inside, window.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(blurred, window.view(1, 1, 1, -1), padding=(0, radius)).clamp(0, 1)


def colour_transfer(swap: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The swap with the target's mean and deviation of every channel inside the face.

    swap, target (B, 3, S, S) in [0, 1]; weight (B, 1, S, S), e.g. of `feather`. It brings light and white
    balance of the scene along, and the target's skin tone with them.
    """
    total = weight.sum((2, 3), keepdim=True).clamp_min(1e-6)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x * weight).sum((2, 3), keepdim=True) / total
        return mean, (((x - mean).square() * weight).sum((2, 3), keepdim=True) / total).sqrt()

    (mean_s, std_s), (mean_t, std_t) = moments(swap), moments(target)
    gain = (std_t / std_s.clamp_min(1e-3)).clamp(0.5, 2.0)
    return (swap - mean_s) * gain + mean_t
