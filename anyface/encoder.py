"""IR-SE50 (the identity network) and the e4e encoder on its body, in the names of the public weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.layers import EqualLinear

IRSE50_BLOCKS = ((64, 3), (128, 4), (256, 14), (512, 3))


class SEModule(nn.Module):
    """Squeeze and excitation: channels scaled by a gate read from their means."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Bottleneck(nn.Module):
    """BN, convolution, PReLU, strided convolution, BN, SE; the shortcut is pooled or a 1x1 convolution."""

    def __init__(self, channels: int, depth: int, stride: int):
        super().__init__()
        if channels == depth:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels, depth, 1, stride, bias=False), nn.BatchNorm2d(depth)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, depth, 3, 1, 1, bias=False),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, 3, stride, 1, bias=False),
            nn.BatchNorm2d(depth),
            SEModule(depth),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


def _body(blocks: Sequence[tuple[int, int]]) -> nn.Sequential:
    layers, before = [], blocks[0][0]
    for depth, count in blocks:
        for i in range(count):
            layers.append(Bottleneck(before, depth, 1 if i else 2))
            before = depth
    return nn.Sequential(*layers)


def _input(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))


class IRSE50(nn.Module):
    """Face picture (B, 3, size, size) in [-1, 1] -> identity embedding (B, embedding) of length 1.

    blocks: (width, count) of each group of bottlenecks, each group halving the side.
    """

    def __init__(
        self, size: int = 112, blocks: Sequence[tuple[int, int]] = IRSE50_BLOCKS, embedding: int = 512
    ):
        super().__init__()
        self.size, width, side = size, blocks[-1][0], math.ceil(size / 2 ** len(blocks))
        self.input_layer = _input(blocks[0][0])
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(width * side * side, embedding),
            nn.BatchNorm1d(embedding),
        )
        self.body = _body(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.output_layer(self.body(self.input_layer(x))), dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """Aligned faces (B, 3, S, S) in [-1, 1] -> embeddings: pool to 256, crop the face, pool to 112.

        Smaller pictures keep the crop's proportions.
        """
        if image.shape[-1] > 256:
            image = F.adaptive_avg_pool2d(image, 256)
        side = image.shape[-1] / 256
        top, bottom, left, right = (round(edge * side) for edge in (35, 223, 32, 220))
        return self(F.adaptive_avg_pool2d(image[..., top:bottom, left:right], self.size))


class StyleHead(nn.Module):
    """A feature map (B, width, S, S) -> one code (B, style_dim), by halving the side until it is 1."""

    def __init__(self, width: int, style_dim: int, side: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(int(math.log2(side))):
            layers += [nn.Conv2d(style_dim if i else width, style_dim, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(style_dim, style_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class E4E(nn.Module):
    """Face picture (B, 3, size, size) in [-1, 1] -> W+ codes (B, n_latent, style_dim) less the mean.

    Codes are one base code and an offset from it for every further layer; `offsets=False` gives pSp, where
    each code stands alone. The first 3 read the coarse feature map, the next 4 the middle one, the others the
    fine one.
    """

    def __init__(
        self,
        n_latent: int = 18,
        style_dim: int = 512,
        size: int = 256,
        blocks: Sequence[tuple[int, int]] = IRSE50_BLOCKS,
        offsets: bool = True,
    ):
        super().__init__()
        self.n_latent, self.size, self.offsets = n_latent, size, offsets
        self.taps = tuple(sum(count for _, count in blocks[:i]) - 1 for i in (2, 3, 4))
        coarse = size // 16
        self.input_layer = _input(blocks[0][0])
        self.body = _body(blocks)
        sides = [coarse] * 3 + [2 * coarse] * 4 + [4 * coarse] * (n_latent - 7)
        self.styles = nn.ModuleList(StyleHead(blocks[3][0], style_dim, side) for side in sides[:n_latent])
        self.latlayer1 = nn.Conv2d(blocks[2][0], blocks[3][0], 1)
        self.latlayer2 = nn.Conv2d(blocks[1][0], blocks[3][0], 1)

    def forward(self, image: Tensor) -> Tensor:
        x, maps = self.input_layer(image), []
        for i, layer in enumerate(self.body):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        fine, middle, coarse = maps
        middle = self._add(coarse, self.latlayer1(middle))
        fine = self._add(middle, self.latlayer2(fine))
        read = [coarse] * 3 + [middle] * 4 + [fine] * (self.n_latent - 7)
        codes = [head(source) for head, source in zip(self.styles, read, strict=False)]
        if self.offsets:
            codes = [codes[0], *(codes[0] + delta for delta in codes[1:])]
        return torch.stack(codes, 1)

    @staticmethod
    def _add(small: Tensor, large: Tensor) -> Tensor:
        return F.interpolate(small, large.shape[-2:], mode="bilinear", align_corners=True) + large
