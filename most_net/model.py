"""MOST-Net: photo encoder, key head, memory, style transfer, decoder; sketch encoder and discriminator.

The paper had no public code. Layer sizes are a reconstruction; the README says what the paper states.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from most_net.memory import Memory, MemoryKind
from shared.norms import InstanceNorm
from shared.ranges import Count, Natural, Positive, Share, Weight
from shared.runtime import own_type


@dataclass(frozen=True)
class Architecture:
    """Sizes of the networks. The defaults are the full size, for 256x256."""

    base: Count = 64
    """Channels at full resolution."""
    downs: Natural = 2
    """Halvings of the resolution; features have base * 2**downs channels."""
    kernel: Count = 7
    """Kernel of the first and last convolution, odd."""
    dilations: tuple[Count, ...] = (1, 1, 1, 1)
    """Dilation of each residual block of an encoder."""
    decoder_blocks: Natural = 4
    """Residual blocks of the decoder."""
    transposed: bool = True
    """Double the resolution by transposed convolutions; otherwise by repetition and two 3x3 convolutions."""
    instance_norm: bool = True
    """Instance normalisation after the convolutions."""
    slope: Weight = 0.0
    """Negative slope of the rectifiers."""
    slots: Count = 512
    """Slots N of the memory."""
    tau: Positive = 0.07
    """Temperature of reading."""
    momentum: Share = 0.9
    """Share of a slot that survives a write."""
    revive_after: Natural = 500
    """Steps without a hit after which a slot is given to a badly matched query."""

    @property
    def channels(self) -> int:
        """Channels C of the features."""
        return self.base * 2**self.downs


FULL = Architecture()
TINY = Architecture(
    base=16,
    downs=1,
    kernel=3,
    dilations=(1, 2),
    decoder_blocks=1,
    transposed=False,
    instance_norm=False,
    slope=0.2,
    slots=64,
    revive_after=30,
)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders, added to the input: (B, C, h, w) -> same."""

    def __init__(self, channels: int, arch: Architecture, dilation: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, channels, 3, dilation),
            *_after(arch),
            _conv(channels, channels, 3, dilation),
            *_after(arch)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ReflectedConv(nn.Conv2d):
    """A convolution with reflected borders, padded in the type of its input: on a CPU autocast would widen
    all of the input to float32 for the padding, and narrow it again for the convolution."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = self.padding
        with own_type(x):
            x = F.pad(x, (width, width, height, height), mode=self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation)


class Encoder(nn.Module):
    """E_p (3 channels in) and E_s (1 channel in): (B, in, H, W) -> (B, C, h, w), h = H / 2**downs.

    The closing GroupNorm with one group bounds the scale and, unlike instance normalisation, keeps the
    statistics of the single channels, which carry the style.
    """

    def __init__(self, inputs: int, arch: Architecture):
        super().__init__()
        layers: list[nn.Module] = [_conv(inputs, arch.base, arch.kernel), *_after(arch)]
        for level in range(arch.downs):
            channels = arch.base * 2**level
            layers += [nn.Conv2d(channels, 2 * channels, 4, 2, 1), *_after(arch)]
        layers += [ResidualBlock(arch.channels, arch, dilation) for dilation in arch.dilations]
        self.body = nn.Sequential(*layers, nn.GroupNorm(1, arch.channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class KeyHead(nn.Module):
    """Photo features -> unit queries, (B, C, h, w) -> same.

    The instance normalisation centres them. Without it all queries point the same way, all slots become
    equal, the retrieved style has no variance and the network prints a constant.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)
        self.centre = InstanceNorm()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.centre(self.project(x)).float(), dim=1)


class Decoder(nn.Module):
    """Fused features (B, C, h, w) -> grey sketch (B, 1, H, W), about [-1, 1].

    Linear output, clamped at evaluation: sketches are mostly white paper, and a tanh that has saturated at
    white has no gradient left to learn the lines from.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(arch.channels, arch) for _ in range(arch.decoder_blocks)]
        for level in reversed(range(arch.downs)):
            channels = arch.base * 2**level
            layers += [*_double(2 * channels, channels, arch), *_after(arch)]
        self.body = nn.Sequential(*layers, _conv(arch.base, 1, arch.kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class MostNet(nn.Module):
    """Photo -> sketch, with the style retrieved from a memory.

    memory: `dynamic` (the method), `grad` (slots are parameters) or
    `none` (a 1x1 convolution of the photo features takes the place of what the memory gives; no AdaIN).
    styles: number of artists; each has a memory of its own, everything else is shared.
    topk, weighting: see `Memory`.
    """

    def __init__(
        self,
        arch: Architecture = FULL,
        memory: MemoryKind = "dynamic",
        styles: int = 1,
        topk: int = 0,
        weighting: str = "mean",
    ):
        super().__init__()
        self.arch, self.kind = arch, memory
        channels = arch.channels
        self.photo_encoder = Encoder(3, arch)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        self.decoder = Decoder(arch)
        if memory == "none":
            self.substitute = nn.Conv2d(channels, channels, 1)
        else:
            self.sketch_encoder = Encoder(1, arch)
            self.key_head = KeyHead(channels)
            self.memories = nn.ModuleList(
                Memory(
                    channels,
                    arch.slots,
                    arch.tau,
                    arch.momentum,
                    arch.revive_after,
                    topk,
                    weighting,
                    learned=memory == "grad",
                )
                for _ in range(styles)
            )

    def forward(
        self, photo: Tensor, sketch: Tensor | None = None, style: int = 0, strength: float = 1.0
    ) -> dict[str, Tensor]:
        """photo (B, 3, H, W) in [-1, 1], H and W multiples of 2**downs.

        Returns `sketch` (B, 1, H, W), and with a memory `retrieved` (B, C, h, w), `queries` (M, C),
        `scores` (M, N) and `slot` (B, h, w), where M = B * h * w. With the true `sketch` (B, 1, H, W),
        which training has, also `features` (B, C, h, w), those of E_s, and `recon` (B, 1, H, W), decoded
        from them. strength: of the style's statistics, 0 leaves the photo's own, 1 is the method.
        """
        f = self.photo_encoder(photo)
        if self.kind == "none":
            return {"sketch": self.decoder(self.fuse(torch.cat([f, self.substitute(f)], 1)))}
        memory = self.memories[style]
        queries = flatten(self.key_head(f))
        scores = memory.scores(queries)
        retrieved = unflatten(memory.read(queries, scores), f)
        out = {"retrieved": retrieved, "queries": queries, "scores": scores}
        out["slot"] = scores.argmax(1).unflatten(0, (f.shape[0], *f.shape[2:]))
        if sketch is None:
            return out | {"sketch": self.decode(f, retrieved, strength)}
        features = self.sketch_encoder(sketch)
        # One decoder call for both styles: retrieved -> sketch, true -> recon.
        both = self.decode(torch.cat([f, f]), torch.cat([retrieved.to(features.dtype), features]), strength)
        out["sketch"], out["recon"] = both.chunk(2)
        return out | {"features": features}

    def sketch(self, photo: Tensor, style: int = 0, strength: float = 1.0) -> Tensor:
        """The sketch alone, (B, 3, H, W) -> (B, 1, H, W) in [-1, 1], of any size: sides that the network
        cannot halve are padded with their border and cropped. Fused attention, no slot map."""
        height, width = photo.shape[-2:]
        multiple = 2**self.arch.downs
        padded = F.pad(photo, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        f = self.photo_encoder(padded)
        if self.kind == "none":
            out = self.decoder(self.fuse(torch.cat([f, self.substitute(f)], 1)))
        else:
            retrieved = unflatten(self.memories[style].read(flatten(self.key_head(f))), f)
            out = self.decode(f, retrieved.to(f.dtype), strength)
        return out[..., :height, :width].float().clamp(-1, 1)

    def decode(self, f: Tensor, style: Tensor, strength: float = 1.0) -> Tensor:
        """Photo features and style features (B, C, h, w) -> sketch (B, 1, H, W)."""
        return self.decoder(self.fuse(torch.cat([adain(f, style, strength), style], 1)))

    def write(self, out: dict[str, Tensor], style: int = 0, generator: torch.Generator | None = None) -> None:
        """Write a training step's pairs, as `forward` returned them, into the memory. Only `dynamic` does."""
        if self.kind == "dynamic" and self.training:
            features = flatten(out["features"])
            self.memories[style].write(out["queries"], features, out["scores"], generator)


class NormedConv(nn.Conv2d):
    """A convolution whose weight is normalised in float32 whatever the precision around it: in bf16 the power
    iteration would know the largest singular value to two or three digits."""

    def forward(self, x: Tensor) -> Tensor:
        with own_type(x):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Discriminator(nn.Module):
    """70x70 patches of (photo, sketch), (B, 3, H, W) and (B, 1, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self, base: int = 64):
        super().__init__()
        widths = (4, base, 2 * base, 4 * base, 8 * base)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], (2, 2, 2, 1), strict=False):
            layers += [spectral_norm(NormedConv(before, after, 4, stride, 1, bias=False)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, spectral_norm(NormedConv(widths[-1], 1, 4, 1, 1, bias=False)))

    def forward(self, photo: Tensor, sketch: Tensor) -> Tensor:
        return self.body(torch.cat([photo, sketch], 1))


def adain(f: Tensor, style: Tensor, strength: float = 1.0, eps: float = 1e-5) -> Tensor:
    """Give `f` the mean and deviation that `style` has over its positions, per sample and channel.

    Both (B, C, h, w). strength: 0 keeps the statistics of `f`, 1 takes those of `style`, between and beyond
    are interpolated (adaptive instance normalisation, Huang and Belongie, 2017).
    """
    deviation, mean = torch.std_mean(f.float(), dim=(2, 3), keepdim=True, correction=0)
    style_deviation, style_mean = torch.std_mean(style.float(), dim=(2, 3), keepdim=True, correction=0)
    scale = torch.lerp(deviation, style_deviation, strength) / (deviation.square() + eps).sqrt()
    return ((f - mean) * scale + torch.lerp(mean, style_mean, strength)).to(f.dtype)


def flatten(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B * h * w, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def unflatten(x: Tensor, like: Tensor) -> Tensor:
    """(B * h * w, C) -> (B, C, h, w) of the shape of `like`."""
    batch, _, height, width = like.shape
    return x.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


def initialise(module: nn.Module, gain: float = 0.02) -> nn.Module:
    """Xavier normal weights with a small gain and zero biases, as image translation commonly starts."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return ReflectedConv(inputs, outputs, kernel, padding=padding, dilation=dilation, padding_mode="reflect")


def _double(inputs: int, outputs: int, arch: Architecture) -> list[nn.Module]:
    if arch.transposed:
        return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)]
    return [
        nn.Upsample(scale_factor=2),
        _conv(inputs, outputs, 3),
        *_after(arch),
        _conv(outputs, outputs, 3),
    ]


def _after(arch: Architecture) -> list[nn.Module]:
    norm = [InstanceNorm()] if arch.instance_norm else []
    return [*norm, nn.LeakyReLU(arch.slope) if arch.slope else nn.ReLU()]
