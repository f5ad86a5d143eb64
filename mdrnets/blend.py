"""Pasting a completion back into a large picture without a seam, and scaling pictures that have holes."""

import torch
from torch import Tensor
from torch.nn import functional as F

RIM = 4
"""Kept pixels around a hole's extent that the membrane looks at."""


def shrink_known(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Image (C, H, W) and mask (1, H, W) at a smaller size; nothing of the hole bleeds into what is kept.

    A small pixel is corrupted when any pixel below it is; the others are averages of kept pixels alone.
    """
    if tuple(image.shape[-2:]) == size:
        return image, mask
    small_mask = F.interpolate(mask[None], size, mode="nearest-exact")
    if size[0] <= mask.shape[-2] and size[1] <= mask.shape[-1]:
        small_mask = F.adaptive_max_pool2d(mask[None], size)
    kept = 1 - mask
    both = torch.cat((image * kept, kept))[None]
    both = F.interpolate(both, size, mode="bilinear", antialias=True, align_corners=False)
    return (both[0, :-1] / both[0, -1:].clamp_min(1e-3)).clamp(0, 1), small_mask[0]


def membrane(difference: Tensor, hole: Tensor, sweeps: int = 60) -> Tensor:
    """Harmonic extension: `difference` (C, H, W) outside the hole (1, H, W), inside it the smooth surface
    that meets it at the rim (Laplace's equation, mirrored at the picture's edge). Solved from coarse to fine.

    With nothing known the result is zero. This is the guidance-free form of Poisson blending.
    """
    hole = hole > 0.5
    if bool(hole.all()):
        return torch.zeros_like(difference)
    surface = torch.where(hole, _coarse_guess(difference, hole), difference)
    for _ in range(sweeps):
        padded = F.pad(surface[None], (1, 1, 1, 1), mode="replicate")[0]
        around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        surface = torch.where(hole, around / 4, difference)
    return surface


def _coarse_guess(difference: Tensor, hole: Tensor) -> Tensor:
    """The membrane of the picture at half the size, enlarged."""
    height, width = difference.shape[-2:]
    known = (~hole).float()
    if min(height, width) < 4:
        return ((difference * known).sum((1, 2)) / known.sum()).view(-1, 1, 1).expand_as(difference)
    half = ((height + 1) // 2, (width + 1) // 2)
    weight = F.adaptive_avg_pool2d(known[None], half)
    mean = F.adaptive_avg_pool2d((difference * known)[None], half) / weight.clamp_min(1e-6)
    surface = membrane(torch.where(weight > 0, mean, 0.0)[0], (weight[0] == 0).float())
    return F.interpolate(surface[None], (height, width), mode="bilinear", align_corners=False)[0]


def extent(mask: Tensor) -> tuple[int, int, int, int]:
    """First row, row after the last, first column and column after the last of a mask's hole (1, H, W)."""
    rows, columns = (mask[0] > 0.5).any(1).nonzero(), (mask[0] > 0.5).any(0).nonzero()
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def paste(image: Tensor, mask: Tensor, filled: Tensor, seamless: bool = True) -> Tensor:
    """Fill the hole of `image` (3, H, W) in [0, 1] with `filled` (3, H, W), a completion of the whole
    picture.

    seamless: shift its colours inside the hole smoothly so that it meets the kept pixels at the rim. Kept
    pixels are returned bit for bit.
    """
    if seamless and bool((mask > 0.5).any()):
        # Of what is kept the rim alone matters: a hole in a large photo costs what the hole does.
        top, bottom, left, right = extent(mask)
        view = (slice(None), slice(max(top - RIM, 0), bottom + RIM), slice(max(left - RIM, 0), right + RIM))
        shift = membrane(((image - filled) * (1 - mask))[view], mask[view])
        filled = filled.clone()
        filled[view] += shift
    return torch.where(mask > 0.5, filled.clamp(0, 1), image)
