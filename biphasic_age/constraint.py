"""ConstraintNet: attention splits the face's features into age and identity, and the age part constrains the
soft latent maps.

The paper says that high-level spatial features are disentangled with an attention mechanism and give the soft
latent maps age-related context; the layers are our reconstruction (attention in the form of CBAM).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.ages import as_weights, mixture


class Disentangled(NamedTuple):
    """Features of a face, all (B, C, h, w)."""

    age: Tensor
    """F_age = A * F."""
    identity: Tensor
    """F_id = (1 - A) * F; the only features that enter the decoder's trunk."""
    attention: Tensor | None
    """A in (0, 1); None without attention."""
    logits: Tensor | None
    """Age logits (B, groups) of F_age; None without ConstraintNet."""


class Attention(nn.Module):
    """A = channel attention x spatial attention: (B, C, h, w) -> (B, C, h, w) in (0, 1)."""

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.spatial = nn.Conv2d(2, 1, 7, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        channel = (self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))).sigmoid()
        spatial = self.spatial(torch.cat((x.mean(1, True), x.amax(1, True)), 1)).sigmoid()
        return channel[:, :, None, None] * spatial


class ConstraintNet(nn.Module):
    """C: features F (B, C, h, w) -> gates and biases of the soft latent maps at h, 2h, 4h.

    channels C, latent d. attention=False is an ablation: F_age = F_id = F.
    """

    def __init__(self, channels: int, groups: int, latent: int, attention: bool = True):
        super().__init__()
        self.groups = groups
        self.attention = Attention(channels) if attention else None
        self.classify = nn.Linear(channels, groups)
        self.age = nn.Embedding(groups, 2 * channels)
        self.context = nn.Conv2d(channels, channels, 3, 1, 1)
        self.gates = nn.ModuleList(nn.Conv2d(channels, 2 * latent, 3, 1, 1) for _ in range(3))

    def disentangle(self, features: Tensor) -> Disentangled:
        """F (B, C, h, w) -> its age and identity parts, the attention, and the age logits."""
        if self.attention is None:
            return Disentangled(features, features, None, self.classify(features.mean((2, 3))))
        attention = self.attention(features)
        of_age = attention * features
        return Disentangled(of_age, features - of_age, attention, self.classify(of_age.mean((2, 3))))

    def forward(self, of_age: Tensor, age: Tensor, soft: list[Tensor]) -> list[Tensor]:
        """F_age, target age (B,) or (B, groups), soft maps L_s -> constrained maps
        M_s = L_s * sigmoid(gate_s) + bias_s."""
        scale, shift = mixture(as_weights(age, self.groups), self.age.weight)[:, :, None, None].chunk(2, 1)
        context = F.leaky_relu(self.context(torch.addcmul(shift, of_age, 1 + scale)), 0.2)
        maps = []
        for gates, latent in zip(self.gates, soft, strict=True):
            both = gates(context)  # before the enlargement: 16 times fewer pixels than after it
            if both.shape[-2:] != latent.shape[-2:]:
                both = F.interpolate(both, latent.shape[-2:], mode="bilinear", align_corners=False)
                both = both.to(latent.dtype)  # autocast enlarges in fp32
            gate, bias = both.chunk(2, 1)
            maps.append(torch.addcmul(bias, latent, gate.sigmoid()))
        return maps
