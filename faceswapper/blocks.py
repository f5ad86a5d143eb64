"""Building blocks of FaceSwapper: residual blocks and the masked, landmark-guided modulation.

Two identities save more than half of the arithmetic of the blocks that change resolution, without changing
what they compute: a 3x3 convolution followed by 2x2 averaging is one 4x4 convolution of stride 2, and nearest
neighbours x2 followed by a 3x3 convolution is one transposed 4x4 convolution of stride 2. The parameters stay
those of the 3x3 convolution; `tests/test_faceswapper_model.py` compares with the plain forms.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.2
"""Of every leaky ReLU."""
EPS = 1e-5


def spread(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (O, I, 4, 4): the sum of the kernel at the four shifts of a 2x2 window."""
    rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


def down_kernel(conv: nn.Conv2d) -> Tensor:
    """The 4x4 kernel of `conv_down`."""
    return spread(conv.weight) / 4


def up_kernel(conv: nn.Conv2d) -> Tensor:
    """The 4x4 kernel of `up_conv`, as a transposed convolution takes it."""
    return spread(conv.weight).transpose(0, 1).flip(2, 3).contiguous()


def conv_down(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`avg_pool2d(conv(x), 2)` for a padded 3x3 convolution: (B, I, 2h, 2w) -> (B, O, h, w)."""
    kernel = down_kernel(conv) if not hasattr(conv, "folded") else conv.folded
    return F.conv2d(x, kernel, conv.bias, stride=2, padding=1)


def up_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(nearest x2 of x)` for a padded 3x3 convolution: (B, I, h, w) -> (B, O, 2h, 2w)."""
    kernel = up_kernel(conv) if not hasattr(conv, "folded") else conv.folded
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """Keep the 4x4 kernels of a network that learns no more, instead of making them at every call.

    They are no part of the state dict. Load weights before, not after.
    """
    for block in module.modules():
        if isinstance(block, ResBlk) and block.down:
            block.conv1.register_buffer("folded", down_kernel(block.conv1), persistent=False)
        elif isinstance(block, AdainResBlk) and block.up:
            block.conv1.register_buffer("folded", up_kernel(block.conv1), persistent=False)
    return module.requires_grad_(False)


def instance_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Instance norm of (B, C, h, w) with biased variance, then a scale and shift for each sample and channel.

    scale, shift: (C,), (1, C) or (B, C). One fused batch norm over B x C channels does all of it, with
    statistics in fp32 also where x is of half precision.
    """
    batch, channels = x.shape[:2]
    if torch.onnx.is_in_onnx_export():  # which knows no batch norm with statistics of the batch
        scale, shift = (p.reshape(-1, channels, 1, 1) for p in (scale, shift))
        return F.instance_norm(x, eps=EPS) * scale + shift
    scale, shift = (p.expand(batch, channels).reshape(-1) for p in (scale, shift))
    # One picture is what it is already; a view of it, with strides that fit either order in memory, gets a
    # wrong gradient on a CPU (PyTorch 2.15) when the gradient comes in the other order.
    flat = x if batch == 1 else x.reshape(1, batch * channels, *x.shape[2:])
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.batch_norm(flat, None, None, scale.to(wide), shift.to(wide), training=True, eps=EPS)
    if batch == 1:
        return out
    # The order in memory of x, which what comes next meets again; `reshape` made it NCHW.
    form = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
    return out.reshape(x.shape).contiguous(memory_format=form or torch.contiguous_format)


class AffineInstanceNorm(nn.InstanceNorm2d):
    """Instance norm with learned scale and shift and no running statistics."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias)


class ResBlk(nn.Module):
    """Pre-activation residual block, (B, cin, h, w) -> (B, cout, h, w), or half the size with `down`.

    residual: [norm] - leaky ReLU - 3x3 cin - [average 2x2] - [norm] - leaky ReLU - 3x3 cout; shortcut:
    [1x1 without bias, if the channels differ] - [average 2x2]; the sum is divided by sqrt(2).
    """

    def __init__(self, cin: int, cout: int, norm: bool = False, down: bool = False):
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(cin, cin, 3, 1, 1)
        self.conv2 = nn.Conv2d(cin, cout, 3, 1, 1)
        self.norm1 = AffineInstanceNorm(cin) if norm else None
        self.norm2 = AffineInstanceNorm(cin) if norm else None
        self.conv1x1 = nn.Conv2d(cin, cout, 1, bias=False) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(x if self.norm1 is None else self.norm1(x), SLOPE)
        y = conv_down(y, self.conv1) if self.down else self.conv1(y)
        y = F.leaky_relu(y if self.norm2 is None else self.norm2(y), SLOPE)
        y = self.conv2(y)
        shortcut = F.avg_pool2d(x, 2) if self.down else x  # averaging first: the 1x1 is linear
        if self.conv1x1 is not None:
            shortcut = self.conv1x1(shortcut)
        return (y + shortcut) * (1 / math.sqrt(2))


class Guide(NamedTuple):
    """What tells the decoder where and how to write, at one resolution r."""

    mask: Tensor
    """(B, 1, r, r), 1 = background."""
    landmarks: Tensor
    """Landmark picture (B, 3, r, r)."""
    shares: dict["MaskedModulation", tuple[Tensor, Tensor]]
    """What modulations made of the landmark picture already: several decodings of one picture in one training
    step share it. Make new guides after the parameters changed."""


def mix_down(x: Tensor, pictures: int) -> Tensor:
    """(K * B, C, h, w) -> (K, B, C, h, w): K identities for each of B = `pictures` targets."""
    return x.unflatten(0, (-1, pictures))


class MaskedModulation(nn.Module):
    """The semantic-guided injection of identity and landmarks: parameters `fc`, `conv_weight`, `conv_bias`.

    With mask M (1 = background), code s and landmark picture L, for features x with C channels:

        (gamma, beta) = fc(s);  y = (1 + gamma) IN((1 - M) x) + beta
        y <- y (1 + conv_weight(L)) + conv_bias(L);  out = M x + (1 - M) y

    The statistics of IN are those of all positions, zeros included; the background passes as it is.
    """

    def __init__(self, id_dim: int, channels: int):
        super().__init__()
        self.fc = nn.Linear(id_dim, 2 * channels)
        self.conv_weight = nn.Conv2d(3, channels, 3, 1, 1)
        self.conv_bias = nn.Conv2d(3, channels, 3, 1, 1)

    def landmark_share(self, guide: Guide) -> tuple[Tensor, Tensor]:
        """1 + conv_weight(L) and conv_bias(L), (B, C, r, r) each, in one convolution."""
        if self not in guide.shares:
            kernel = torch.cat((self.conv_weight.weight, self.conv_bias.weight))
            offset = torch.cat((self.conv_weight.bias + 1, self.conv_bias.bias))
            guide.shares[self] = F.conv2d(guide.landmarks, kernel, offset, padding=1).chunk(2, 1)
        return guide.shares[self]

    def forward(self, x: Tensor, code: Tensor, guide: Guide) -> Tensor:
        """x (K * B, C, r, r), code (K * B, id_dim) or (1, id_dim), guide of B pictures -> as x."""
        gamma, beta = self.fc(code).float().chunk(2, 1)  # 1 + gamma in bf16 would lose a small gamma
        pictures = len(guide.mask)
        weight, bias = self.landmark_share(guide)
        mask = guide.mask.to(x.dtype)
        several = len(x) != pictures
        if several:  # the landmarks' share is computed once for all identities
            x = mix_down(x, pictures)
        face = x * (1 - mask)
        normal = instance_norm(face.flatten(0, 1) if several else face, 1 + gamma, beta).to(x.dtype)
        if several:
            normal = mix_down(normal, pictures)
        written = torch.addcmul(bias.to(x.dtype), normal, weight.to(x.dtype))
        out = torch.lerp(written, x, mask)
        return out.flatten(0, 1) if several else out


class AdainResBlk(nn.Module):
    """Block of the decoder: modulation - leaky ReLU - [x2] - 3x3 - modulation - leaky ReLU - 3x3.

    No shortcut. `conv1x1` exists in the released weights and is never used; it is kept for their names.
    """

    def __init__(self, cin: int, cout: int, id_dim: int, up: bool = False):
        super().__init__()
        self.up = up
        self.conv1 = nn.Conv2d(cin, cout, 3, 1, 1)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        self.norm1 = MaskedModulation(id_dim, cin)
        self.norm2 = MaskedModulation(id_dim, cout)
        if cin != cout:
            self.conv1x1 = nn.Conv2d(cin, cout, 1, bias=False)

    def forward(self, x: Tensor, code: Tensor, guides: dict[int, Guide]) -> Tensor:
        """x (K * B, cin, r, r) -> (K * B, cout, r or 2r, ...); guides: one for each resolution met."""
        x = F.leaky_relu(self.norm1(x, code, guides[int(x.shape[-1])]), SLOPE, inplace=True)
        x = up_conv(x, self.conv1) if self.up else self.conv1(x)
        x = F.leaky_relu(self.norm2(x, code, guides[int(x.shape[-1])]), SLOPE, inplace=True)
        return self.conv2(x)
