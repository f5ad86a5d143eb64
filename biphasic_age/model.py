"""The generator.

Of the paper only the abstract could be read: ProjectionNet and ConstraintNet, noisy semantic layouts, soft
latent maps injected part by part, attention and the two learning strategies are the paper's. Layers and sizes
are our reconstruction: the encoder follows PFA-GAN, the injection SPADE.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.constraint import ConstraintNet, Disentangled
from biphasic_age.layouts import CLASSES, to_labels
from biphasic_age.projection import HardLayout, ProjectionNet
from shared.processes import drawn
from shared.runtime import own_type

SizeName = Literal["paper", "fast", "tiny", "keen", "unit"]
Output = Literal["direct", "residual", "gated"]
Noise = Tensor | float | None
GATE_START = -1.0
"""Bias of the gate of `gated` output before training: a quarter of what is painted."""


@dataclass(frozen=True)
class Size:
    """Widths and depths of both networks."""

    width: int
    """Channels after the first convolution; twice and four times as many follow."""
    latent: int
    """Channels d of the soft latent maps."""
    trunk: int
    """Injection blocks at a quarter of the size."""
    critic_width: int
    """Channels of the discriminator's first layer."""
    critic_stages: int
    """Its convolutions before the scores; all but the last of them have stride 2."""
    residuals: int = 2
    """Residual blocks of the encoder."""
    per_class: int = 8
    """ProjectionNet's filters for every class."""
    gain: float | None = None
    """How strongly ProjectionNet, ConstraintNet and the discriminator start (`strengthen`); None: like
    everything else."""


SIZES: dict[SizeName, Size] = {
    "paper": Size(64, 64, 4, 64, 4),
    "fast": Size(32, 32, 4, 64, 4),
    "tiny": Size(16, 16, 2, 16, 3),
    "keen": Size(16, 16, 2, 32, 3, per_class=4, gain=1.0),
    "unit": Size(4, 4, 1, 4, 2, residuals=1, per_class=2),
}
"""`paper`: 256x256, 13.06 M parameters. `fast`: 3.28 M. `tiny`: the demo's 32x32 to 64x64; `keen`: as
large, with a stronger start and discriminator. `unit`: tests."""


@dataclass(frozen=True)
class Switches:
    """Parts of the generator that can be taken out, for the ablation table."""

    layout: bool = True
    """False: every pixel belongs to one class, so nothing says where the parts of the face are."""
    projection: bool = True
    """False: the hard layout at every size instead of ProjectionNet's soft latent maps."""
    constraint: bool = True
    """False: M = L, and all features enter the trunk."""
    attention: bool = True
    """False: ConstraintNet without the split into age and identity features."""
    noise: bool = True
    """False: layouts without noise."""


class ResidualBlock(nn.Module):
    """x + BN(conv(ReLU(BN(conv x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))


class Encoder(nn.Module):
    """E: image (B, 3, H, W) in [-1, 1] -> F (B, 4 width, H/4, W/4)."""

    def __init__(self, width: int, residuals: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, (kernel, stride, pad) in (
            (3, width, (7, 1, 3)),
            (width, 2 * width, (4, 2, 1)),
            (2 * width, 4 * width, (4, 2, 1)),
        ):
            layers += [
                nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers, *(ResidualBlock(4 * width) for _ in range(residuals)))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def enlarged(x: Tensor) -> Tensor:
    """Twice the size by repeating pixels, in the type of x: autocast would make it fp32, and everything that
    meets it."""
    with own_type(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Injection(nn.Module):
    """Inj(x, M) = BN(x) * gamma(M) + beta(M), BN without learned parameters (SPADE's form).

    gamma's bias starts at 1 instead of adding 1 to its output. `up`: x is enlarged twice, after the norm
    rather than before it (repeating pixels does not change its statistics).
    """

    def __init__(self, channels: int, latent: int, up: bool = False):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma = nn.Conv2d(latent, channels, 3, 1, 1)
        self.beta = nn.Conv2d(latent, channels, 3, 1, 1)
        self.up = up

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        x = self.norm(x)
        if self.up:
            x = enlarged(x)
        return torch.addcmul(self.beta(maps), x, self.gamma(maps))


class InjectionBlock(nn.Module):
    """IB(ci, co): Inj, LeakyReLU, conv ci->cm, Inj, LeakyReLU, conv cm->co, cm = min(ci, co), plus the skip.

    up=True: the input is first enlarged twice.
    """

    def __init__(self, inputs: int, outputs: int, latent: int, up: bool = False):
        super().__init__()
        middle = min(inputs, outputs)
        self.up = up
        self.inject1 = Injection(inputs, latent, up)
        self.conv1 = nn.Conv2d(inputs, middle, 3, 1, 1)
        self.inject2 = Injection(middle, latent)
        self.conv2 = nn.Conv2d(middle, outputs, 3, 1, 1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.inject1(x, maps), 0.2, inplace=True))
        h = self.conv2(F.leaky_relu(self.inject2(h, maps), 0.2, inplace=True))
        skip = self.skip(x)  # a 1x1 convolution commutes with the enlargement
        return h + (enlarged(skip) if self.up else skip)


class Decoder(nn.Module):
    """F_id (B, 4 width, H/4, W/4), constrained maps at H/4, H/2, H and the input image -> image (B, 3, H, W).

    output: `direct` y = tanh(o); `residual` y = clamp(x + o, -1, 1); `gated` y = x + m (tanh(o) - x), where m
    in (0, 1) comes from the finest map.
    """

    def __init__(self, width: int, latent: int, trunk: int, output: Output):
        super().__init__()
        self.output = output
        self.trunk = nn.ModuleList(InjectionBlock(4 * width, 4 * width, latent) for _ in range(trunk))
        self.up1 = InjectionBlock(4 * width, 2 * width, latent, up=True)
        self.up2 = InjectionBlock(2 * width, width, latent, up=True)
        self.last = nn.Conv2d(width, 3, 7, 1, 3)
        self.gate = nn.Conv2d(latent, 1, 3, 1, 1) if output == "gated" else None

    def forward(self, h: Tensor, maps: list[Tensor], image: Tensor) -> Tensor:
        coarse, middle, fine = maps
        for block in self.trunk:
            h = block(h, coarse)
        h = self.up2(self.up1(h, middle), fine)
        o = self.last(F.leaky_relu(h, 0.2, inplace=True)).float()
        if self.output == "residual":
            return (image + o).clamp(-1, 1)
        if self.gate is not None:
            return image + self.gate(fine).sigmoid() * (o.tanh() - image)
        return o.tanh()


class Explained(NamedTuple):
    """A translation and what led to it."""

    image: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    features: Disentangled
    """Attention and age logits of the input."""
    soft: list[Tensor]
    """Soft latent maps L (B, d, s, s) at H/4, H/2, H."""
    maps: list[Tensor]
    """Constrained maps M of the same shapes."""


class Generator(nn.Module):
    """G(x, S, t): the face x with layout S at age t.

    size: widths. classes, groups (of age): how many. output: see `Decoder`. H and W must be multiples of 4.
    The parts can be called alone: `features` (once per image), `maps` (once per target age), `paint`.
    """

    def __init__(
        self,
        size: Size = SIZES["paper"],
        classes: int = len(CLASSES),
        groups: int = 4,
        output: Output = "direct",
        switches: Switches = Switches(),  # noqa: B008 - frozen
    ):
        super().__init__()
        self.classes, self.groups, self.switches = classes, groups, switches
        self.encoder = Encoder(size.width, size.residuals)
        self.projection = (
            ProjectionNet(classes, groups, size.latent, size.per_class)
            if switches.projection
            else HardLayout(classes, size.latent)
        )
        self.constraint = (
            ConstraintNet(4 * size.width, groups, size.latent, switches.attention)
            if switches.constraint
            else None
        )
        self.decoder = Decoder(size.width, size.latent, size.trunk, output)
        initialise(self)
        if size.gain is not None:
            for part in (self.projection, self.constraint):
                if part is not None:
                    strengthen(part, size.gain)

    def features(self, image: Tensor) -> Disentangled:
        """Image (B, 3, H, W) in [-1, 1] -> its features, which no target age enters."""
        features = self.encoder(image)
        if self.constraint is None:
            return Disentangled(features, features, None, None)
        return self.constraint.disentangle(features)

    def soft_maps(
        self, layout: Tensor, target: Tensor, noise: Noise = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Soft latent maps L (B, d, s, s) of a layout at an age; arguments as for `forward`."""
        labels = to_labels(layout, self.classes)
        if not self.switches.layout:
            labels = torch.zeros_like(labels)
        return self.projection(labels, target, self._noise(labels, noise, generator))

    def maps(
        self,
        features: Disentangled,
        layout: Tensor,
        target: Tensor,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Constrained maps M (B, d, s, s) at H/4, H/2, H; arguments as for `forward`."""
        return self.constrain(features, target, self.soft_maps(layout, target, noise, generator))

    def constrain(self, features: Disentangled, target: Tensor, soft: list[Tensor]) -> list[Tensor]:
        """Soft latent maps L -> constrained maps M."""
        return soft if self.constraint is None else self.constraint(features.age, target, soft)

    def paint(self, features: Disentangled, maps: list[Tensor], image: Tensor) -> Tensor:
        """Features and constrained maps of `image` -> image (B, 3, H, W) in [-1, 1]."""
        return self.decoder(features.identity, maps, image)

    def forward(
        self,
        image: Tensor,
        layout: Tensor,
        target: Tensor,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """image (B, 3, H, W) in [-1, 1]; layout (B, H, W) integer labels or one-hot (B, classes, H, W);
        target (B,) age groups or (B, groups) weights of a mixture; noise: None draws it (from `generator`, or
        the global one), 0 leaves it out (the deterministic output), a tensor (B, 1, H, W) or
        (B, classes, H, W) is used -> image (B, 3, H, W) in [-1, 1]."""
        features = self.features(image)
        return self.paint(features, self.maps(features, layout, target, noise, generator), image)

    def explain(
        self,
        image: Tensor,
        layout: Tensor,
        target: Tensor,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> Explained:
        """As `forward`, with the soft latent maps, the attention and the age logits."""
        features = self.features(image)
        soft = self.soft_maps(layout, target, noise, generator)
        maps = self.constrain(features, target, soft)
        return Explained(self.paint(features, maps, image), features, soft, maps)

    def _noise(self, labels: Tensor, noise: Noise, generator: torch.Generator | None) -> Tensor | None:
        if not self.switches.noise or not self.switches.projection:
            return None
        if noise is None:
            shape = (len(labels), 1, *labels.shape[1:])
            source = labels.device if generator is None else generator.device
            return drawn(partial(torch.randn, generator=generator, device=source), shape).to(labels.device)
        if isinstance(noise, Tensor):
            return noise
        if noise != 0:
            raise ValueError(f"noise must be None, 0 or a tensor, got {noise!r}")
        return None


def initialise(network: nn.Module) -> None:
    """Weights of convolutions and embeddings normal(0, 0.02), biases 0 (PFA-GAN's), gamma's bias 1, the
    gate's `GATE_START`."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Embedding, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Injection):
            nn.init.ones_(module.gamma.bias)
        if isinstance(module, Decoder) and module.gate is not None:
            nn.init.constant_(module.gate.bias, GATE_START)


def strengthen(network: nn.Module, gain: float) -> None:
    """Weights of convolutions normal(0, gain / sqrt(inputs)), of embeddings normal(0, gain).

    Where no norm stands between layers, narrow networks that start with 0.02 pass on a thousandth of what
    comes in: for hundreds of steps neither layout nor age says much, and all scores are alike.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, gain / module.weight[0].numel() ** 0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0, gain)
