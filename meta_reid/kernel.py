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
    """x (S*B, C, H, W), channels last, becomes scale * x + shift in place; scale, shift (S, C), of each set,
    the channels of a set one after another in memory.

    Returns `aggregation.moments` of x as it was, (S, B, C) each. Sums and norm are in float32.
    """
    images, channels, height, width = x.shape
    positions, sets = height * width, len(scale)
    mean, variance = torch.empty(2, images, channels, device=x.device)
    grid = (images, triton.cdiv(channels, COLUMNS))
    sizes = positions, max(positions - 1, 1), channels, images // sets
    rows_apart = scale.stride(0), shift.stride(0)
    _kernel[grid](x, scale, shift, mean, variance, *sizes, *rows_apart, ROWS, COLUMNS)
    return mean.unflatten(0, (sets, -1)), variance.unflatten(0, (sets, -1))


@triton.jit
def _kernel(
    x, scales, shifts, means, variances,
    positions, freedom, channels, batch, scales_apart, shifts_apart,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < channels
    of_set = image // batch
    scale = tl.load(scales + of_set * scales_apart + column, mask=inside, other=0.0)[None, :]
    shift = tl.load(shifts + of_set * shifts_apart + column, mask=inside, other=0.0)[None, :]
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
    mean = tl.sum(total, 0) / positions
    variance = (tl.sum(power, 0) - positions * mean * mean) / freedom
    tl.store(means + place, mean, mask=inside)
    tl.store(variances + place, tl.maximum(variance, 0.0), mask=inside)
