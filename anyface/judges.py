"""Judges of the simple world: a small classifier that reads the traits from a picture.

It is taught on drawn pictures that no other network sees, and is used only to measure.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.world import TRAITS


class Judge(nn.Module):
    """Three strided convolutions and a head for each trait: picture (B, 3, S, S) in [-1, 1] -> logits
    (B, 18), the heads one after the other. Pictures of another size than `size` are resized."""

    num_features = 256

    def __init__(self, size: int = 32):
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96 * (size // 8) ** 2, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, sum(len(trait.shares) for trait in TRAITS))

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 256): what the heads read."""
        if pictures.shape[-1] != self.size:
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


def split_heads(logits: Tensor) -> tuple[Tensor, ...]:
    """(B, 18) -> one (B, values) for each trait."""
    return logits.split([len(trait.shares) for trait in TRAITS], 1)


def judge_loss(logits: Tensor, values: Tensor) -> Tensor:
    """Sum of the heads' cross entropies; values (B, 7)."""
    return sum(F.cross_entropy(head, values[:, t]) for t, head in enumerate(split_heads(logits)))


@torch.inference_mode()
def read(judge: Judge, pictures: Tensor) -> Tensor:
    """What the judge sees: values (B, 7)."""
    return read_heads(judge(pictures.clamp(-1, 1)))


def read_heads(logits: Tensor) -> Tensor:
    """Logits (B, 18) -> the likeliest value of every trait (B, 7)."""
    return torch.stack([head.argmax(1) for head in split_heads(logits)], 1)


def accuracy(seen: Tensor, values: Tensor) -> float:
    """Share of all traits (B, 7) seen as they should be."""
    return (seen == values).float().mean().item()
