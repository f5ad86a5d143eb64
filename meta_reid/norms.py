"""How norms are computed: those of several experts at once, and without waste on the machine at hand."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_reid.aggregation import moments


@dataclass(eq=False)
class Unit:
    """A convolution and the norms that may follow it: one per expert, then, where shared, the global one."""

    conv: nn.Conv2d
    norms: list[nn.Module]


@dataclass(frozen=True)
class Stacked:
    """Statistics and parameters of S sets of BN, each (S, sum of C over the units)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    def affine(self, channels: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale and shift of each unit, (S, 1, C, 1, 1)."""
        scale = self.weight * (self.var + self.eps).rsqrt()
        shift = self.bias - self.mean * scale
        for pair in zip(scale.split(channels, 1), shift.split(channels, 1), strict=True):
            yield tuple(tensor[:, None, :, None, None] for tensor in pair)


@torch.no_grad()
def stacked(units: Sequence[Unit], sets: Sequence[int]) -> Stacked:
    """Collect the chosen sets of all units with one concatenation per kind of tensor."""

    def gather(name: str) -> Tensor:
        return torch.cat([getattr(unit.norms[s], name) for s in sets for unit in units]).view(len(sets), -1)

    eps = units[0].norms[0].eps
    return Stacked(gather("weight"), gather("bias"), gather("running_mean"), gather("running_var"), eps)


def fused(x: Tensor) -> bool:
    """Whether `kernel.py` probes and norms these maps, (N, C, H, W): on CUDA, channels last, no gradient."""
    fits = x.is_cuda and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last)
    return fits and not torch.compiler.is_compiling() and kernels()


@cache
def kernels() -> bool:
    """Whether the kernel runs here, by trying it. Warns with the reason when it does not."""
    try:
        from meta_reid.kernel import probe_and_norm

        one = torch.ones(1, 16, device="cuda")
        probe_and_norm(one.clone()[..., None, None], one, one)
    # Triton, a C compiler, Python's headers, the driver: each fails in its own way.
    except Exception as error:
        warnings.warn(f"the experts' norms are slower, their kernel does not run: {error!r}", stacklevel=2)
        return False
    return True


IMAGE = 2**17
"""Bytes of an image's map from which on a CPU probes and normalises images one by one: each then comes from
memory once and not for each operation."""


def in_parts(x: Tensor) -> bool:
    """Whether a CPU probes and norms these maps, (..., C, H, W), image by image: they are large, and no graph
    is made of it."""
    graph = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not graph and x[0, 0].numel() * x.element_size() >= IMAGE


def moments_of_one(image: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` of one map, (1, C, H, W), where it can by PyTorch's own statistics of a batch norm: of a map
    in channels last they need no squares in memory. In half precision they would be in half precision too."""
    if image.dtype not in (torch.float32, torch.float64):
        return tuple(part[0] for part in moments(image))
    positions = image.shape[-2] * image.shape[-1]
    mean, variance = torch.batch_norm_update_stats(image, None, None, 0.0)
    return mean, variance * (positions / max(positions - 1, 1))


def probe_and_norm_in_parts(
    x: Tensor, scale: Tensor, shift: Tensor, probed: int, plus: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """x (S, B, C, H, W) becomes `ended` of scale * x + shift in place, one image at a time. plus: of the same
    shape. Returns the moments of the first `probed` sets as they were, (probed, B, C) each."""
    found = []
    for number, maps in enumerate(x):
        for place, image in enumerate(maps.split(1)):
            if number < probed:
                found.append(moments_of_one(image))
            torch.addcmul(shift[number], image, scale[number], out=image)
            ended(image, None if plus is None else plus[number, place], relu)
    return tuple(torch.stack(which).unflatten(0, (probed, -1)) for which in zip(*found, strict=True))


def ended(y: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
    """What follows a norm in a block, in place: no norm needs its own output to go back."""
    if plus is not None:
        y.add_(plus)
    return y.relu_() if relu else y


Norm = Callable[[Unit, Tensor], Tensor]
"""Normalises the output of a unit's convolution."""
Step = Callable[[Unit, Tensor, Tensor | None, bool], Tensor]
"""The same, then `ended`."""


def step(norm: Norm) -> Step:
    """A norm and what follows it."""
    return lambda unit, x, plus, relu: ended(norm(unit, x), plus, relu)


def first_norm(unit: Unit, x: Tensor) -> Tensor:
    """The norm of a unit that has one set only."""
    return unit.norms[0](x)


def image_by_image(unit: Unit, x: Tensor) -> Tensor:
    """`first_norm`. In training on a CPU the instance norm of large maps is the batch norm of each image: as
    such it stays channels last, where PyTorch's own form copies to another layout and back, for the rest of
    the branch and in the backward pass too."""
    norm = unit.norms[0]
    if not (isinstance(norm, nn.InstanceNorm2d) and x.requires_grad and x.device.type == "cpu"):
        return norm(x)
    if torch.compiler.is_compiling() or x[0].numel() * x.element_size() < IMAGE:
        return norm(x)
    each = (
        F.batch_norm(image, None, None, norm.weight, norm.bias, True, eps=norm.eps) for image in x.split(1)
    )
    return torch.cat(list(each))
