"""Scoot, structure co-occurrence texture measure of sketches (Fan et al., ICCV 2019), batched."""

import torch
from torch import Tensor

GRID, LEVELS = 4, 6
OFFSETS = ((0, 1), (-1, 1), (-1, 0), (-1, -1))
"""(rows, columns) to the neighbour: right, up-right, up, up-left."""


def scoot(first: Tensor, second: Tensor) -> Tensor:
    """Scoot of grey images (B, 1, H, W) on 0..255: (B,), 1 when the textures are equal. Symmetric."""
    return scoot_of_features(features(first), features(second))


def scoot_of_features(first: Tensor, second: Tensor) -> Tensor:
    """1 / (1 + |difference|) of two results of `features`: (B,)."""
    return 1 / (1 + (first - second).norm(dim=1))


def features(images: Tensor) -> Tensor:
    """Contrast and energy of the grey-level co-occurrence in 4x4 blocks, (B, 1, H, W) on 0..255 -> (B, 32).

    All images, blocks and directions are counted by one bincount over (image, block, level, level).
    """
    batch, _, height, width = images.shape
    level = (LEVELS * images[:, 0].double() / 255 + 1).floor().clamp(1, LEVELS).long() - 1
    block = GRID * _cells(height, images.device)[:, None] + _cells(width, images.device)
    image = torch.arange(batch, device=images.device)[:, None, None]
    code = (image * GRID**2 + block) * LEVELS**2
    counts = torch.zeros(batch * GRID**2 * LEVELS**2, dtype=torch.long, device=images.device)
    for dy, dx in OFFSETS:
        rows = slice(-dy, height)
        columns = slice(max(0, -dx), width - max(0, dx))
        there = (slice(0, height + dy), slice(max(0, dx), width + min(0, dx)))
        inside = block[rows, columns] == block[there]  # pairs do not cross blocks
        pairs = code[:, rows, columns] + LEVELS * level[:, rows, columns] + level[:, *there]
        counts += torch.bincount(pairs[:, inside].flatten(), minlength=len(counts))
    mean = (counts.double() / len(OFFSETS) + 0.5).floor()  # rounded, halves up
    mean = mean.view(batch, GRID**2, LEVELS, LEVELS)
    share = mean / mean.sum((2, 3), keepdim=True)
    grey = torch.arange(LEVELS, dtype=torch.float64, device=images.device)
    contrast = (share * (grey[:, None] - grey).square()).sum((2, 3))
    energy = share.square().sum((2, 3))
    return torch.cat([contrast, energy], 1)


def _cells(length: int, device: torch.device) -> Tensor:
    """Block number of every row or column; block v ends before floor(length * (v + 1) / 4)."""
    ends = torch.tensor([length * v // GRID for v in range(1, GRID)], device=device)
    return torch.bucketize(torch.arange(length, device=device), ends, right=True)
