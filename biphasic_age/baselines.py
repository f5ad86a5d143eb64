"""What the method is compared with in the same harness: the unchanged input, facial prototypes, and a plain
conditional network that knows no layout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.ages import as_weights
from biphasic_age.constraint import Disentangled
from biphasic_age.model import Encoder, Noise, Output, ResidualBlock, Size, initialise


class PlainGenerator(nn.Module):
    """Whole-image ageing, the kind of network that the paper argues against (IPCGAN's form): encoder, the age
    as constant planes beside the features, residual blocks, decoder. Same encoder, training and output modes
    as the method, no layout.

    Called like `Generator`; layout and noise are not looked at.
    """

    constraint = None

    def __init__(self, size: Size, ages: int, output: Output = "direct"):
        super().__init__()
        if output == "gated":
            raise ValueError("the plain network has no gate")
        self.ages, self.output, width = ages, output, size.width
        self.encoder = Encoder(width, size.residuals)
        self.join = nn.Conv2d(4 * width + ages, 4 * width, 3, 1, 1)
        self.trunk = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(size.trunk)))
        self.up1 = nn.Conv2d(4 * width, 2 * width, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.up2 = nn.Conv2d(2 * width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 3, 7, 1, 3)
        initialise(self)

    def features(self, image: Tensor) -> Disentangled:
        features = self.encoder(image)
        return Disentangled(features, features, None, None)

    def maps(
        self,
        features: Disentangled,
        layout: Tensor,
        target: Tensor,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """The age as constant planes beside the features, (B, ages, h, w)."""
        planes = as_weights(target, self.ages)[:, :, None, None]
        return [planes.expand(-1, -1, *features.age.shape[-2:])]

    def paint(self, features: Disentangled, maps: list[Tensor], image: Tensor) -> Tensor:
        h = self.trunk(self.join(torch.cat((features.identity, maps[0].to(features.identity)), 1)))
        h = F.relu(self.norm1(self.up1(F.interpolate(h, scale_factor=2.0))))
        h = F.relu(self.norm2(self.up2(F.interpolate(h, scale_factor=2.0))))
        o = self.last(h)
        return (image + o).clamp(-1, 1) if self.output == "residual" else o.tanh()

    def forward(
        self,
        image: Tensor,
        layout: Tensor,
        target: Tensor,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        features = self.features(image)
        return self.paint(features, self.maps(features, layout, target), image)


def copy(image: Tensor, layout: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The input itself: perfect identity, no ageing."""
    return image


@dataclass(frozen=True)
class Prototypes:
    """Facial prototypes (Burt and Perrett, 1995) without warping: add the difference between the mean faces
    of the target's and the source's age group. means: (K, 3, H, W) in [-1, 1]."""

    means: Tensor

    @staticmethod
    def of(images: Tensor, groups: Tensor, count: int) -> "Prototypes":
        """From training pictures (N, 3, H, W) and their groups (N,)."""
        return Prototypes(torch.stack([images[groups == k].mean(0) for k in range(count)]))

    def __call__(self, image: Tensor, layout: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return (image + self.means[target] - self.means[source]).clamp(-1, 1)
