"""IR-SE50 (the identity network) and the e4e encoder on its body, in the names of the public weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.layers import EqualLinear
from shared.irse import IRSE, IRSE50_BLOCKS, Trunk


class IRSE50(IRSE):
    """The identity network: aligned face (B, 3, size, size) in [-1, 1] -> embedding (B, 512) of length 1."""

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


class E4E(Trunk):
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
        super().__init__(blocks)
        self.n_latent, self.size, self.offsets = n_latent, size, offsets
        coarse = size // 16
        sides = [coarse] * 3 + [2 * coarse] * 4 + [4 * coarse] * (n_latent - 7)
        self.styles = nn.ModuleList(StyleHead(blocks[3][0], style_dim, side) for side in sides[:n_latent])
        self.latlayer1 = nn.Conv2d(blocks[2][0], blocks[3][0], 1)
        self.latlayer2 = nn.Conv2d(blocks[1][0], blocks[3][0], 1)

    def forward(self, image: Tensor) -> Tensor:
        _, fine, middle, coarse = self.levels(image)
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
