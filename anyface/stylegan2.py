"""StyleGAN2 (Karras et al., CVPR 2020): generator and discriminator, in rosinality's names.

No custom CUDA; `modulation` chooses between two forms of the same function, see `anyface.layers`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.layers import (
    Blur,
    ConstantInput,
    EqualLinear,
    FusedLeakyReLU,
    Modulation,
    PixelNorm,
    StyledConv,
    ToRGB,
)


def channel_table(multiplier: int = 2) -> dict[int, int]:
    """Channels of each resolution up to 1024 in the official networks; multiplier 2 is config-f."""
    wide = {resolution: 512 for resolution in (4, 8, 16, 32)}
    return wide | {64 * 2**i: 256 // 2**i * multiplier for i in range(5)}


class Generator(nn.Module):
    """StyleGAN2 generator: z -> w (mapping), W+ codes -> picture (synthesis).

    size: side of the pictures, a power of two from 8. channels: resolution -> width, instead of the official
    table. 2 log2(size) - 2 codes of `style_dim` steer one picture. modulation: see `anyface.layers`.
    """

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        n_mlp: int = 8,
        channel_multiplier: int = 2,
        lr_mlp: float = 0.01,
        channels: dict[int, int] | None = None,
        modulation: Modulation = "scaled",
    ):
        super().__init__()
        channels = channels or channel_table(channel_multiplier)
        log_size = int(math.log2(size))
        if 2**log_size != size:
            raise ValueError(f"a generator of {size} px: give a power of two")
        self.size, self.style_dim, self.n_latent = size, style_dim, 2 * log_size - 2
        self.sizes = {
            "size": size,
            "style_dim": style_dim,
            "n_mlp": n_mlp,
            "lr_mlp": lr_mlp,
            "channels": {2**i: channels[2**i] for i in range(2, log_size + 1)},
        }
        layers = [EqualLinear(style_dim, style_dim, lr_mul=lr_mlp, activate=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        self.input = ConstantInput(channels[4])
        self.conv1 = StyledConv(channels[4], channels[4], style_dim, False, modulation)
        self.to_rgb1 = ToRGB(channels[4], style_dim, False, modulation)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for i in range(3, log_size + 1):
            resolution, before, width = 2**i, channels[2 ** (i - 1)], channels[2**i]
            self.convs.append(StyledConv(before, width, style_dim, True, modulation))
            self.convs.append(StyledConv(width, width, style_dim, False, modulation))
            self.to_rgbs.append(ToRGB(width, style_dim, True, modulation))
            for j in (0, 1):
                noise = torch.randn(1, 1, resolution, resolution)
                self.noises.register_buffer(f"noise_{2 * i - 5 + j}", noise)

    def mapping(self, z: Tensor) -> Tensor:
        """Normal noise (B, style_dim) -> latent w (B, style_dim)."""
        return self.style(z)

    def mean_latent(self, count: int = 4096, generator: torch.Generator | None = None) -> Tensor:
        """(1, style_dim): mean w of `count` draws."""
        z = torch.randn(count, self.style_dim, generator=generator)
        return self.mapping(z.to(self.input.input.device)).mean(0, keepdim=True)

    def stored_noise(self) -> list[Tensor]:
        """The noise buffers, one (1, 1, H, W) per styled convolution."""
        return [getattr(self.noises, f"noise_{i}") for i in range(self.n_latent - 1)]

    def fresh_noise(self, batch: int) -> list[Tensor]:
        """New standard normal noise (batch, 1, H, W) for every styled convolution."""
        return [torch.randn_like(noise.expand(batch, -1, -1, -1)) for noise in self.stored_noise()]

    def synthesis(self, codes: Tensor, noise: list[Tensor] | Literal["random"] | None = None) -> Tensor:
        """W+ codes (B, n_latent, style_dim) -> RGB (B, 3, size, size), about [-1, 1].

        noise: None uses the stored buffers. Raises ValueError on another number of codes.
        """
        if codes.ndim != 3 or codes.shape[1:] != (self.n_latent, self.style_dim):
            raise ValueError(
                f"a {self.size} px generator takes codes (B, {self.n_latent}, {self.style_dim}), "
                f"not {tuple(codes.shape)}"
            )
        # The to-RGB layer of a block shares its code with the first convolution of the next block.
        rows = [0, 1]
        for i in range(1, self.n_latent - 1, 2):
            rows += [i, i + 1, i + 2]
        return self._render([codes[:, i] for i in rows], noise, False)

    def from_stylespace(self, styles: list[Tensor], noise: list[Tensor] | None = None) -> Tensor:
        """Channel scales of each layer (conv1, to_rgb1, then conv, conv, to_rgb per block) -> RGB."""
        if len(styles) != 2 + 3 * len(self.to_rgbs):
            raise ValueError(f"style space has {2 + 3 * len(self.to_rgbs)} layers, not {len(styles)}")
        return self._render(styles, noise, True)

    def stylespace(self, codes: Tensor) -> list[Tensor]:
        """W+ codes -> per-layer channel scales, in the order that `from_stylespace` takes."""
        layers = [(self.conv1, 0), (self.to_rgb1, 1)]
        for block, rgb in enumerate(self.to_rgbs):
            i = 1 + 2 * block
            layers += [(self.convs[2 * block], i), (self.convs[2 * block + 1], i + 1), (rgb, i + 2)]
        return [layer.conv.modulation(codes[:, i]) for layer, i in layers]

    def _render(self, styles: list[Tensor], noise: list[Tensor] | str | None, styled: bool) -> Tensor:
        batch = styles[0].shape[0]
        noise = self.fresh_noise(batch) if noise == "random" else noise or self.stored_noise()
        x = self.conv1(self.input(batch), styles[0], noise[0], styled)
        rgb = self.to_rgb1(x, styles[1], styled=styled)
        for block, to_rgb in enumerate(self.to_rgbs):
            first, second, colour = styles[2 + 3 * block : 5 + 3 * block]
            x = self.convs[2 * block](x, first, noise[1 + 2 * block], styled)
            x = self.convs[2 * block + 1](x, second, noise[2 + 2 * block], styled)
            rgb = to_rgb(x, colour, rgb, styled)
        return rgb

    def forward(
        self,
        styles: list[Tensor],
        input_is_latent: bool = False,
        inject_index: int | None = None,
        truncation: float = 1.0,
        truncation_latent: Tensor | None = None,
        noise: list[Tensor] | Literal["random"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One or two z (B, style_dim), or with input_is_latent w or W+, -> picture and the W+ codes used.

        Two entries are mixed: the first steers layers below `inject_index`. truncation: towards
        `truncation_latent`, by this factor. Raises ValueError for truncation without that.
        """
        if truncation < 1 and truncation_latent is None:
            raise ValueError("truncation needs the latent that it goes towards")
        styles = styles if input_is_latent else [self.mapping(z) for z in styles]
        if truncation < 1:
            styles = [truncation_latent + truncation * (w - truncation_latent) for w in styles]
        spread = [w if w.ndim == 3 else w[:, None].expand(-1, self.n_latent, -1) for w in styles]
        if len(spread) == 1:
            codes = spread[0]
        else:
            if inject_index is None:
                inject_index = int(torch.randint(1, self.n_latent, ()))
            codes = torch.cat((spread[0][:, :inject_index], spread[1][:, inject_index:]), 1)
        return self.synthesis(codes, noise), codes


class EqualConv2d(nn.Module):
    """Convolution with equalised learning rate."""

    def __init__(
        self, in_channel: int, out_channel: int, kernel_size: int, stride: int, padding: int, bias: bool
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channel, in_channel, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channel)) if bias else None
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


def conv_layer(
    in_channel: int, out_channel: int, kernel_size: int, downsample: bool = False, activate: bool = True
) -> nn.Sequential:
    """[blur,] convolution[, activation]; the activation holds the bias."""
    layers: list[nn.Module] = []
    if downsample:
        layers.append(Blur(1.0, (kernel_size + 1) // 2))
    stride, padding = (2, 0) if downsample else (1, kernel_size // 2)
    layers.append(EqualConv2d(in_channel, out_channel, kernel_size, stride, padding, bias=False))
    if activate:
        layers.append(FusedLeakyReLU(out_channel))
    return nn.Sequential(*layers)


class ResBlock(nn.Module):
    """Half the side: two convolutions beside a 1x1 skip; sum / sqrt(2)."""

    def __init__(self, in_channel: int, out_channel: int):
        super().__init__()
        self.conv1 = conv_layer(in_channel, in_channel, 3)
        self.conv2 = conv_layer(in_channel, out_channel, 3, downsample=True)
        self.skip = conv_layer(in_channel, out_channel, 1, downsample=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    """Residual StyleGAN2 discriminator: RGB (B, 3, size, size) -> logit (B, 1).

    Needed only to train a generator of one's own. The batch divides by min(B, 4) for the standard-deviation
    feature.
    """

    def __init__(self, size: int, channel_multiplier: int = 2, channels: dict[int, int] | None = None):
        super().__init__()
        channels = channels or channel_table(channel_multiplier)
        blocks: list[nn.Module] = [conv_layer(3, channels[size], 1)]
        for i in range(int(math.log2(size)), 2, -1):
            blocks.append(ResBlock(channels[2**i], channels[2 ** (i - 1)]))
        self.convs = nn.Sequential(*blocks)
        self.final_conv = conv_layer(channels[4] + 1, channels[4], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(channels[4] * 16, channels[4], activate=True), EqualLinear(channels[4], 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.convs(image)
        batch, channels, height, width = x.shape
        group = min(batch, 4)
        deviation = x.view(group, -1, channels, height, width).var(0, unbiased=False).add(1e-8).sqrt()
        feature = deviation.mean((1, 2, 3)).repeat(group)[:, None, None, None]
        x = torch.cat((x, feature.expand(-1, 1, height, width)), 1)
        return self.final_linear(self.final_conv(x).flatten(1))
