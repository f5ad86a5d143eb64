"""Plain networks for comparison, trained on batches in which the domains are mixed."""

from typing import Literal

import torch
from torch import Tensor, nn

from meta_reid.backbone import Architecture, Stem, add_blocks, register_pixels
from meta_reid.model import Head
from meta_reid.norms import first_norm, step
from meta_reid.vit import VitArchitecture, VitTrunk, architecture_of
from shared.runtime import UserError


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
    (instance normalisation everywhere). A ViT has its layer norms, and its last map is pooled by the mean.
    size, pixels: as for `META`. Images are RGB in 0..255, (B, 3, H, W). Raises UserError for IBN-a or IN in a
    ViT.
    """

    def __init__(
        self,
        classes: int,
        architecture: str | Architecture | VitArchitecture = "r50",
        norm: Literal["bn", "ibn", "in"] = "bn",
        size: tuple[int, int] = (256, 128),
        pixels: str | None = None,
    ):
        super().__init__()
        arch = architecture_of(architecture)
        register_pixels(self, pixels or arch.pixels)
        self.vit = None
        if isinstance(arch, VitArchitecture):
            if norm != "bn":
                raise UserError(f"--norm {norm}: a plain ViT has layer norms alone")
            self.vit = VitTrunk(arch, 1, size, universal=False)
        else:
            self.add_residual(arch, norm)
        self.head = Head(arch.features, classes, signed=arch.signed)

    def add_residual(self, arch: Architecture, norm: str) -> None:
        """Register stem and blocks of a residual backbone."""

        def norms(position: tuple[int, int], j: int, channels: int) -> list[nn.Module]:
            if norm == "in":
                return [nn.InstanceNorm2d(channels, affine=True)]
            if norm == "ibn" and j == 1 and 1 <= position[0] <= 3:
                return [IBN(channels)]
            return [nn.BatchNorm2d(channels)]

        self.stem = self.add_stem(arch, norms, None)
        self.blocks = add_blocks(self, arch, arch.positions, arch.planes[0], norms)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images -> last map, (B, C, H, W)."""
        pixels = (images - self.pixel_mean) / self.pixel_std
        if self.vit is not None:
            return self.vit.live(self.vit.first(pixels), 0, learn=False)
        x = self.pool(first_norm(self.stem, self.stem.conv(pixels)).relu_())
        for block in self.blocks:
            x = block(x, step(first_norm))
        return x

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature after and before the BNNeck, (B, C) each."""
        pooled = self.head.pool(self.forward_features(images))
        return self.head.neck(pooled), pooled

    def embed(self, images: Tensor) -> Tensor:
        """Embedding after the BNNeck, (B, C)."""
        return self.parts(images)[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Training: pooled feature (B, C) and logits (B, classes). Evaluation: the embedding."""
        return self.head(self.forward_features(images)) if self.training else self.embed(images)
