"""Probe and norm of several experts in one pass over the memory of a GPU.

Needs Triton, which comes with PyTorch's builds for CUDA; `norms.fused` says whether it is to be had.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Positions and channels that a program works on at a time."""


def probe_and_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x (S*B, C, H, W), channels last, becomes scale * x + shift in place; scale, shift (S, C), of each set.

    Returns `aggregation.moments` of x as it was, (S, B, C) each. Sums and norm are in float32.
    """
    images, channels, height, width = x.shape
    positions, sets = height * width, len(scale)
    mean, power = torch.empty(2, images, channels, device=x.device)
    grid = (images, triton.cdiv(channels, COLUMNS))
    affine = scale.contiguous(), shift.contiguous()
    _kernel[grid](x, *affine, mean, power, positions, channels, images // sets, ROWS, COLUMNS)
    variance = ((power - positions * mean.square()) / max(positions - 1, 1)).clamp_min(0)
    return mean.unflatten(0, (sets, -1)), variance.unflatten(0, (sets, -1))


@triton.jit
def _kernel(
    x, scales, shifts, means, powers, positions, channels, batch, rows: tl.constexpr, columns: tl.constexpr
):
    image = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < channels
    place = (image // batch) * channels + column
    scale = tl.load(scales + place, mask=inside, other=0.0)[None, :]
    shift = tl.load(shifts + place, mask=inside, other=0.0)[None, :]
    first = x + image.to(tl.int64) * positions * channels
    total = tl.zeros([rows, columns], tl.float32)
    power = tl.zeros([rows, columns], tl.float32)
    for start in range(0, positions, rows):
        row = start + tl.arange(0, rows)
        here = (row < positions)[:, None] & inside[None, :]
        at = first + row[:, None] * channels + column[None, :]
        value = tl.load(at, mask=here, other=0.0).to(tl.float32)
        total += value
        power += value * value
        tl.store(at, (value * scale + shift).to(x.dtype.element_ty), mask=here)
    place = image * channels + column
    tl.store(means + place, tl.sum(total, 0) / positions, mask=inside)
    tl.store(powers + place, tl.sum(power, 0), mask=inside)
