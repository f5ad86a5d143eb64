"""Plain networks for comparison, trained on batches in which the domains are mixed."""

from typing import Literal

import torch
from torch import Tensor, nn

from meta_reid.backbone import ARCHITECTURES, Architecture, Stem, add_blocks
from meta_reid.model import PIXEL_MEAN, PIXEL_STD, Head, gem
from meta_reid.norms import first_norm


class IBN(nn.Module):
    """IBN-a: instance normalisation on the first half of the channels, batch normalisation on the rest."""

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return torch.cat(
            [self.IN(x[:, : self.half].contiguous()), self.BN(x[:, self.half :].contiguous())], 1
        )


class Plain(Stem):
    """One network for all domains: residual backbone with last stride 1, GeM, BNNeck, one classifier.

    norm: "bn" (bag of tricks), "ibn" (IBN-a: in the first norm of every block of stages 1 to 3), or "in"
    (instance normalisation everywhere). Images are RGB in 0..255, (B, 3, H, W).
    """

    def __init__(
        self, classes: int, architecture: str | Architecture = "r50", norm: Literal["bn", "ibn", "in"] = "bn"
    ):
        super().__init__()
        arch = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture

        def norms(position: tuple[int, int], j: int, channels: int) -> list[nn.Module]:
            if norm == "in":
                return [nn.InstanceNorm2d(channels, affine=True)]
            if norm == "ibn" and j == 1 and 1 <= position[0] <= 3:
                return [IBN(channels)]
            return [nn.BatchNorm2d(channels)]

        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1))
        self.stem = self.add_stem(arch, norms, None)
        self.blocks = add_blocks(self, arch, arch.positions, arch.planes[0], norms)
        self.head = Head(arch.features, classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images -> last map, (B, C, H, W)."""
        x = self.stem.conv((images - self.pixel_mean) / self.pixel_std)
        x = self.pool(first_norm(self.stem, x).relu_())
        for block in self.blocks:
            x = block(x, first_norm)
        return x

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature after and before the BNNeck, (B, C) each."""
        pooled = gem(self.forward_features(images))
        return self.head.neck(pooled), pooled

    def embed(self, images: Tensor) -> Tensor:
        """Embedding after the BNNeck, (B, C)."""
        return self.parts(images)[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Training: pooled feature (B, C) and logits (B, classes). Evaluation: the embedding."""
        return self.head(self.forward_features(images)) if self.training else self.embed(images)
