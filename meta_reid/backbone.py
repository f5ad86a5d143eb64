"""The shared trunk with one set of batch normalisations per source domain, and the global branch's tail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_reid.aggregation import moments
from meta_reid.norms import (
    Step,
    Unit,
    ended,
    fused,
    image_by_image,
    in_parts,
    probe_and_norm_in_parts,
    stacked,
    step,
)

PIXELS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5,) * 3, (127.5,) * 3),
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321375, 70.32316305)),
}
"""Mean and deviation of RGB pixels in 0..255, by which images are normalised: ImageNet's, those of timm's
ViTs pretrained on ImageNet-21k, and CLIP's."""


def register_pixels(module: nn.Module, name: str) -> None:
    """Buffers `pixel_mean` and `pixel_std` of a network, (1, 3, 1, 1) each: an entry of `PIXELS`."""
    for which, values in zip(("mean", "std"), PIXELS[name], strict=True):
        module.register_buffer(f"pixel_{which}", torch.tensor(values).view(1, 3, 1, 1))


@dataclass(frozen=True)
class Architecture:
    """A residual network, its last stage at the stride of the third."""

    bottleneck: bool
    """Bottleneck blocks (1x1, 3x3, 1x1) or basic ones (3x3, 3x3)."""
    blocks: tuple[int, int, int, int]
    """Blocks of the four stages."""
    planes: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Inner width of the four stages."""
    strides: tuple[int, int, int, int] = (1, 2, 2, 1)
    """Stride of the first block of the four stages."""
    stem: int = 7
    """Kernel of the first convolution, stride 2."""
    pool: bool = True
    """Max-pool after the stem."""

    pixels: str = "imagenet"
    """Pixel statistics, a name in `PIXELS`."""
    signed: bool = False
    """Whether the last map has values below zero; here a ReLU ends it."""

    @property
    def positions(self) -> list[tuple[int, int]]:
        """(stage, block) in order, stages from 1."""
        return [(stage + 1, block) for stage, count in enumerate(self.blocks) for block in range(count)]

    @property
    def features(self) -> int:
        """Channels of the last map."""
        return self.planes[3] * self.expansion

    @property
    def expansion(self) -> int:
        """Output width of a block over its inner width."""
        return 4 if self.bottleneck else 1

    def is_shared(self, position: tuple[int, int]) -> bool:
        """Whether the global branch uses this block of the trunk: up to the first block of stage 3."""
        return position <= (3, 0)


ARCHITECTURES = {
    "r18": Architecture(False, (2, 2, 2, 2)),
    "r34": Architecture(False, (3, 4, 6, 3)),
    "r50": Architecture(True, (3, 4, 6, 3)),
    "r101": Architecture(True, (3, 4, 23, 3)),
    "r152": Architecture(True, (3, 8, 36, 3)),
    # For pictures of 48x24: the last map is 12x6, so that statistics over its positions mean something.
    "mini": Architecture(
        False, (1, 1, 1, 1), planes=(12, 24, 48, 96), strides=(1, 2, 1, 1), stem=3, pool=False
    ),
}


MakeNorms = Callable[[tuple[int, int], int, int], list[nn.Module]]
"""(position, number of the convolution in its block or 0 for a downsample, channels) -> norms."""


class Probe(nn.Module):
    """Stands where the release keeps the last batch's statistics: buffers `mean_in`, `var_in`, (rows, C).

    They are scratch: nothing here writes them, and loading ignores them.
    """

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.register_buffer("mean_in", torch.zeros(rows, channels))
        self.register_buffer("var_in", torch.zeros(rows, channels))


class Block(nn.Module):
    """A residual block whose norms are chosen at each call.

    probe_rows: None leaves no place for probes; 0 leaves their place in the downsample's numbering; more
    registers the release's buffers too.
    """

    def __init__(
        self,
        architecture: Architecture,
        inputs: int,
        position: tuple[int, int],
        make_norms: MakeNorms,
        probe_rows: int | None,
    ):
        super().__init__()
        stage, number = position
        planes = architecture.planes[stage - 1]
        stride = architecture.strides[stage - 1] if number == 0 else 1
        outputs = planes * architecture.expansion
        if architecture.bottleneck:
            shapes = [(inputs, planes, 1, 1), (planes, planes, 3, stride), (planes, outputs, 1, 1)]
        else:
            shapes = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
        self.units: list[Unit] = []
        for j, shape in enumerate(shapes, 1):
            self.units.append(Unit(conv(*shape), make_norms(position, j, shape[1])))
            register(self, self.units[-1], j, probe_rows)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            unit = Unit(conv(inputs, outputs, 1, stride), make_norms(position, 0, outputs))
            self.downsample = nn.Module()
            self.downsample.add_module("0", unit.conv)
            if probe_rows:
                self.downsample.add_module("1", Probe(probe_rows, outputs))
            for k, norm in enumerate(unit.norms, 1 if probe_rows is None else 2):
                self.downsample.add_module(str(k), norm)
            self.shortcut = unit

    def all_units(self) -> list[Unit]:
        """Units in the order in which their probes are counted: the downsample last."""
        return self.units + ([self.shortcut] if self.shortcut else [])

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'); step: the norms of this pass and what follows them."""
        y = x
        for unit in self.units[:-1]:
            y = step(unit, unit.conv(y), None, True)
        last = self.units[-1]
        if not self.shortcut:
            return step(last, last.conv(y), x, True)
        y = step(last, last.conv(y), None, False)
        return step(self.shortcut, self.shortcut.conv(x), y, True)


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Convolution without bias, initialised as in ResNet."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def register(module: nn.Module, unit: Unit, j: int, probe_rows: int | None) -> None:
    """Give unit number j its released names: conv{j}, in{j} and bn{j}{k} for norm k = 1, 2, ..."""
    module.add_module(f"conv{j}", unit.conv)
    if probe_rows:
        module.add_module(f"in{j}", Probe(probe_rows, unit.conv.out_channels))
    for k, norm in enumerate(unit.norms, 1):
        module.add_module(f"bn{j}{k}", norm)


def add_blocks(
    module: nn.Module,
    architecture: Architecture,
    positions: list[tuple[int, int]],
    inputs: int,
    make_norms: MakeNorms,
    probe_rows: int | None = None,
) -> list[Block]:
    """Register blocks layer{stage}{number} on a module; returns them in order."""
    blocks = []
    for position in positions:
        block = Block(architecture, inputs, position, make_norms, probe_rows)
        module.add_module(f"layer{position[0]}{position[1]}", block)
        inputs = architecture.planes[position[0] - 1] * architecture.expansion
        blocks.append(block)
    return blocks


class Stem(nn.Module):
    """First convolution of a backbone under its released names, and the max-pool after it."""

    def add_stem(self, architecture: Architecture, make_norms: MakeNorms, probe_rows: int | None) -> Unit:
        """Register conv1, in1 and bn1{k} on this module."""
        channels = architecture.planes[0]
        unit = Unit(conv(3, channels, architecture.stem, 2), make_norms((0, 0), 1, channels))
        register(self, unit, 1, probe_rows)
        # No padding and a ceiling, unlike torchvision: 128x64 becomes 64x32 without a border of zeros.
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True) if architecture.pool else nn.Identity()
        return unit


@dataclass(frozen=True)
class FrozenPass:
    """What several experts say about one batch."""

    maps: Tensor
    """(K, B, C, H, W): last map of each expert."""
    shared: Tensor | None
    """What the global branch goes on from where it leaves the trunk, when asked for: (B, C', H', W')."""
    domain_mean: Tensor
    """(K, sum of C over the layers): running means of the experts' norms; `domain_var` the variances."""
    domain_var: Tensor
    image_mean: Tensor
    """(K, B, sum of C): means over each image's positions before each norm; `image_var` the variances."""
    image_var: Tensor


class Trunk(Stem):
    """Convolutions shared by K experts and, up to the first block of stage 3, by the global branch.

    A set of norms is chosen by its number: 0..K-1 the experts, K the global branch.
    probe_rows: first dimension of the release's probe buffers; 0 for none.
    """

    def __init__(self, architecture: Architecture, experts: int, probe_rows: int = 0):
        super().__init__()
        self.experts = experts

        def batch_norms(position: tuple[int, int], _: int, channels: int) -> list[nn.Module]:
            sets = experts + architecture.is_shared(position)
            return [nn.BatchNorm2d(channels) for _ in range(sets)]

        self.stem = self.add_stem(architecture, batch_norms, probe_rows)
        positions = architecture.positions
        self.blocks = add_blocks(
            self, architecture, positions, architecture.planes[0], batch_norms, probe_rows
        )
        self.shared_blocks = sum(map(architecture.is_shared, positions))
        self.units = [self.stem] + [unit for block in self.blocks for unit in block.all_units()]
        self.shared_units = sum(len(unit.norms) > experts for unit in self.units)
        self.channels = [unit.conv.out_channels for unit in self.units]

    def set_warm(self, warm: bool) -> None:
        """Freeze (True) or release the shared convolutions and the global set."""
        for unit in self.units:
            unit.conv.requires_grad_(not warm)
            if len(unit.norms) > self.experts:
                unit.norms[self.experts].requires_grad_(not warm)

    def first(self, pixels: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> output of `conv1`, which all sets have in common."""
        return self.conv1(pixels)

    def live(self, stem: Tensor, chosen: int, learn: bool) -> Tensor:
        """One set with gradients; learn: normalise by the batch and update the running statistics.

        stem: (B, C, H, W), from `first`. The global set stops where its branch leaves the trunk.
        """

        def norm(unit: Unit, x: Tensor) -> Tensor:
            n = unit.norms[chosen]
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, learn, n.momentum, n.eps)

        blocks = self.blocks if chosen < self.experts else self.blocks[: self.shared_blocks]
        x = self.pool(norm(self.stem, stem).relu_())
        for block in blocks:
            x = block(x, step(norm))
        return x

    def frozen(self, stem: Tensor, experts: Sequence[int], universal: bool = False) -> FrozenPass:
        """Several experts, and the global set if asked for, with their running statistics, as one batch.

        Each shared convolution runs once, on S*B images; the BN of the S sets are one stacked affine. What
        the norms hold is a constant here: gradients, if enabled, reach only the convolutions.
        """
        k = len(experts)
        sets = [*experts, self.experts] if universal else list(experts)
        cut = self.shared_units
        front, back = stacked(self.units[:cut], sets), stacked(self.units[cut:], experts)
        affine = chain(front.affine(self.channels[:cut]), back.affine(self.channels[cut:]))
        probed: list[tuple[Tensor, Tensor]] = []

        def norm(unit: Unit, x: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
            scale, shift = next(affine)
            if fused(x):
                from meta_reid.kernel import probe_and_norm

                mean, variance = probe_and_norm(x, scale.flatten(1), shift.flatten(1))
                probed.append((mean[:k], variance[:k]))
                return ended(x, plus, relu)
            apart = x.unflatten(0, (len(scale), -1))  # (S, B, C, H, W)
            different = 1 if unit is self.stem else k  # the stem's output is the same for all
            if in_parts(apart):
                added = None if plus is None else plus.view_as(apart)
                found = probe_and_norm_in_parts(apart, scale, shift, different, added, relu)
            else:
                found = moments(apart[:different])
                x = ended(apart.mul_(scale).add_(shift).flatten(0, 1), plus, relu)
            probed.append(tuple(m.expand(k, -1, -1) for m in found))
            return x

        x = self.pool(norm(self.stem, torch.cat([stem] * len(sets)), None, True))
        for block in self.blocks[: self.shared_blocks]:
            x = block(x, norm)
        x = x.unflatten(0, (len(sets), -1))
        shared = x[k] if universal else None
        x = x[:k].flatten(0, 1)
        for block in self.blocks[self.shared_blocks :]:
            x = block(x, norm)
        return FrozenPass(
            x.unflatten(0, (k, -1)),
            shared,
            torch.cat([front.mean[:k], back.mean], 1),
            torch.cat([front.var[:k], back.var], 1),
            torch.cat([mean for mean, _ in probed], -1),
            torch.cat([variance for _, variance in probed], -1),
        )


class GlobalTail(nn.Module):
    """The global branch after it leaves the trunk: BN in the rest of stage 3, IN in stage 4.

    instance_norm: False is the ablation with BN there too.
    """

    def __init__(self, architecture: Architecture, instance_norm: bool = True):
        super().__init__()

        def norms(position: tuple[int, int], _: int, channels: int) -> list[nn.Module]:
            if position[0] == 4 and instance_norm:
                return [nn.InstanceNorm2d(channels, affine=True)]
            return [nn.BatchNorm2d(channels)]

        positions = [p for p in architecture.positions if not architecture.is_shared(p)]
        inputs = architecture.planes[2] * architecture.expansion
        self.blocks = add_blocks(self, architecture, positions, inputs, norms)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H', W') where the branch leaves the trunk -> (B, C, H', W')."""
        for block in self.blocks:
            x = block(x, step(image_by_image))
        return x
