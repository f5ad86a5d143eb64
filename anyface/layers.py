"""Layers of StyleGAN2 in rosinality's names: modulated convolution, filters, noise, activation.

The modulated convolution scales activations instead of weights, so that one ordinary convolution serves the
whole batch, and the [1, 3, 3, 1] filter runs as `Blur` says. `form="grouped"` keeps the
original forms, weights for each sample and the filter over single channels, which compute the same.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Modulation = Literal["scaled", "grouped"]


class PixelNorm(nn.Module):
    """Scale (B, C) so that the mean square over C is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate.

    The weight is stored as N(0, 1) / lr_mul and used times lr_mul / sqrt(in), the bias times lr_mul.
    activate: followed by sqrt(2) * leaky ReLU with slope 0.2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
        activate: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(in_dim), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the input is cheaper than scaling the weight, and the same.
        out = F.linear(x * self.scale, self.weight, self.bias * self.lr_mul)
        return F.leaky_relu(out, 0.2) * math.sqrt(2) if self.activate else out


def fir_kernel(gain: float) -> Tensor:
    """(4, 4): outer product of [1, 3, 3, 1] with sum `gain`."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(row, row) / 64 * gain


class Blur(nn.Module):
    """Zeros of width `pad` around, then the filter `kernel`: on a GPU one direction after the other, on a CPU
    in one pass over channels that lie last, which is two to three times as fast there.

    form "grouped": the original's way without custom CUDA, all channels as pictures of their own.
    """

    def __init__(self, gain: float, pad: int, form: Modulation = "scaled"):
        super().__init__()
        self.register_buffer("kernel", fir_kernel(gain))
        self.pad, self.form = pad, form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "grouped":
            single = F.pad(x.reshape(-1, 1, *x.shape[-2:]), [self.pad] * 4)
            out = F.conv2d(single, self.kernel.flip(0, 1)[None, None].to(x.dtype))
            return out.view(*x.shape[:2], *out.shape[-2:])
        return self.two_passes(x) if x.is_cuda else self.one_pass(x)

    def one_pass(self, x: Tensor) -> Tensor:
        """The kernel on every channel at once; it is symmetric, so that nothing is turned."""
        channels = int(x.shape[1])  # a plain number also where the network is traced
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, padding=self.pad, groups=channels)

    def two_passes(self, x: Tensor) -> Tensor:
        """Across, then down: a symmetric separable kernel is the outer product of its row sums, up to its
        total."""
        channels = int(x.shape[1])
        taps = (self.kernel.sum(0) / self.kernel.sum().sqrt()).to(x.dtype)
        across = taps.view(1, 1, 1, 4).expand(channels, 1, 1, 4)
        down = taps.view(1, 1, 4, 1).expand(channels, 1, 4, 1)
        x = F.conv2d(x, across, padding=(0, self.pad), groups=channels)
        return F.conv2d(x, down, padding=(self.pad, 0), groups=channels)


class Upsample(nn.Module):
    """Twice the side: zeros between the pixels, then the filter with gain 4; one transposed convolution."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", fir_kernel(4.0))

    def forward(self, x: Tensor) -> Tensor:
        channels = int(x.shape[1])
        weight = self.kernel.to(x.dtype).flip(0, 1).expand(channels, 1, 4, 4)
        return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=channels)


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style and whose output channels are normalised again.

    Input (B, in, H, W) and latent (B, style_dim), or with `styled` the style (B, in) itself; output
    (B, out, H, W), with upsample (B, out, 2H, 2W).
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        upsample: bool = False,
        form: Modulation = "scaled",
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel, bias_init=1)
        if upsample:
            self.blur = Blur(4.0, 1, form)
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.demodulate, self.upsample, self.form = demodulate, upsample, form
        self.padding = kernel_size // 2

    def forward(self, x: Tensor, style: Tensor, styled: bool = False) -> Tensor:
        if self.form == "grouped":
            return self._grouped(x, style if styled else self.modulation(style))
        out, factor = self.parts(x, style, styled)
        return out if factor is None else out * factor

    def parts(self, x: Tensor, style: Tensor, styled: bool = False) -> tuple[Tensor, Tensor | None]:
        """The convolution before its demodulation (B, out, H, W), and the factor (B, out, 1, 1) that is still
        to be multiplied in, None without demodulation. What follows can take the factor along in its own
        pass over the picture."""
        style = style if styled else self.modulation(style)
        weight = self.weight[0] * self.scale  # (out, in, k, k)
        if weight.shape[-1] == 1 and not self.demodulate:
            # To RGB: three output channels, so the small weights are scaled and not the many activations.
            scaled = weight[:, :, 0, 0] * style[:, None]  # (B, out, in)
            out = x.permute(0, 2, 3, 1).flatten(1, 2) @ scaled.transpose(1, 2).to(x.dtype)
            return out.transpose(1, 2).unflatten(2, x.shape[-2:]), None
        # Channels last: convolutions and above all the filter of single channels run faster in it.
        x = (x * style[:, :, None, None].to(x.dtype)).contiguous(memory_format=torch.channels_last)
        if self.upsample:
            kernel = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            out = self.blur(F.conv_transpose2d(x, kernel, stride=2))
        else:
            kernel = weight.contiguous(memory_format=torch.channels_last)
            out = F.conv2d(x, kernel, padding=self.padding)
        if not self.demodulate:
            return out, None
        # sum over (in, k, k) of (W s)^2, without forming W s for each sample.
        energy = style.square() @ weight.square().sum((2, 3)).T
        return out, torch.rsqrt(energy + 1e-8)[:, :, None, None].to(out.dtype)

    def _grouped(self, x: Tensor, style: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = self.scale * self.weight * style[:, None, :, None, None]  # (B, out, in, k, k)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * channels, height, width)
        if self.upsample:
            weight = weight.transpose(1, 2).flatten(0, 1)
            out = F.conv_transpose2d(x, weight, stride=2, groups=batch)
        else:
            out = F.conv2d(x, weight.flatten(0, 1), padding=self.padding, groups=batch)
        out = out.view(batch, -1, *out.shape[-2:])
        return self.blur(out) if self.upsample else out


class NoiseInjection(nn.Module):
    """Add noise (1 or B, 1, H, W) times one learned strength."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        return image + (self.weight * noise).to(image.dtype)


class FusedLeakyReLU(nn.Module):
    """sqrt(2) * leaky ReLU(x + bias) with slope 0.2, for (B, C, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.view(1, -1, *[1] * (x.ndim - 2)).to(x.dtype)
        return F.leaky_relu(x + bias, 0.2) * math.sqrt(2)


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, activation."""

    def __init__(self, in_channel: int, out_channel: int, style_dim: int, upsample: bool, form: Modulation):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, out_channel, 3, style_dim, upsample=upsample, form=form)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor, styled: bool = False) -> Tensor:
        if self.conv.form == "grouped":
            return self.activate(self.noise(self.conv(x, style, styled), noise))
        # Demodulation, noise, bias and sqrt(2) in one pass: leaky ReLU commutes with positive factors.
        out, factor = self.conv.parts(x, style, styled)
        gain = math.sqrt(2)
        # (1 or B, H, W, C), the order in memory of `out`: one operand in another order makes the pass several
        # times as slow, and what comes of it has to be turned back for the next convolution.
        shift = gain * self.noise.weight * noise.permute(0, 2, 3, 1) + gain * self.activate.bias
        out = torch.addcmul(shift.to(out.dtype).permute(0, 3, 1, 2), out, gain * factor)
        return F.leaky_relu_(out, 0.2)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB, plus the coarser RGB enlarged."""

    def __init__(self, in_channel: int, style_dim: int, upsample: bool, form: Modulation):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if upsample:
            self.upsample = Upsample()
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim, demodulate=False, form=form)

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None = None, styled: bool = False) -> Tensor:
        out = self.conv(x, style, styled) + self.bias.to(x.dtype)
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learned 4x4 constant that synthesis starts from."""

    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, batch: int) -> Tensor:
        return self.input.expand(batch, -1, -1, -1)
