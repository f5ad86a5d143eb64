"""Networks and objective of the authors' follow-up, "Artificial Immune System" (IJCV 2024), whose weights
are public.

Beside PIN: no DAE, batch normalisation in the trunk, and a memory of prototypes in the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.processes import total


class AISBlock(nn.Module):
    """PIN's encoder block with batch normalisation after each convolution, the shortcut's included."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.shortcut_layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.nolinear1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.nolinear2 = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.nolinear1(self.bn1(self.conv1(x)))
        return self.nolinear2(self.bn2(self.conv2(y))) + self.shortcut_layer(x)


class AISEncoder(nn.Module):
    """Trunk: (B, 1, H, W) -> (B, widths[-1], H / 2^n, W / 2^n)."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.in_layer = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.PReLU(widths[0]))
        self.depth = 2 * len(widths)
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            self.add_module(f"block{2 * i + 1}", AISBlock(before, width, 2))
            self.add_module(f"block{2 * i + 2}", AISBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_layer(x)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"block{i}")(x)
        return x


class Memory(nn.Module):
    """Prototypes M (items, width): a vector is replaced by the softmax-weighted sum of the items.

    In training the items first follow the vectors by an exponential moving average. The official update also
    shrinks items that no vector chose; `decay_unused=True` keeps that.
    """

    def __init__(
        self, items: int = 128, width: int = 512, momentum: float = 0.999, decay_unused: bool = False
    ):
        super().__init__()
        self.units = nn.Linear(width, items, bias=False)
        self.units.requires_grad_(False)
        self.momentum, self.decay_unused = momentum, decay_unused

    def forward(self, z: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        if self.training:
            self._follow(z.detach())
        items = self.units.weight
        weights = (F.normalize(z) @ F.normalize(items).T).softmax(1)  # (B, items), raw cosines
        return weights @ items

    @torch.no_grad()
    def _follow(self, z: Tensor) -> None:
        items = self.units.weight
        nearest = (F.normalize(z) @ F.normalize(items).T).argmax(1)
        chosen = F.one_hot(nearest, len(items)).to(z.dtype)  # (B, items)
        sums, count = total(torch.cat([chosen.T @ z, chosen.sum(0).unsqueeze(1)], 1)).tensor_split([-1], 1)
        means = sums / count.clamp_min(1)
        moved = self.momentum * items + (1 - self.momentum) * means
        items.copy_(moved if self.decay_unused else torch.where(count > 0, moved, items))


class AISSelection(nn.Module):
    """Head: trunk features -> keep-probabilities (B, K), through the memory."""

    def __init__(
        self,
        features: int = 25088,
        hidden: int = 512,
        components: int = 1500,
        items: int = 128,
        decay_unused: bool = False,
    ):
        super().__init__()
        self.fc1 = nn.Sequential(
            nn.Flatten(), nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.PReLU(hidden)
        )
        self.memory = Memory(items, hidden, decay_unused=decay_unused)
        self.fc2 = nn.Sequential(nn.Linear(hidden, components), nn.BatchNorm1d(components), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        logits, norm, sigmoid = self.fc2
        return sigmoid(norm(logits(self.memory(self.fc1(features)))).float())
