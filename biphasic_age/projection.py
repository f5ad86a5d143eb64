"""ProjectionNet: from class-aware noisy semantic layouts to soft latent maps.

The paper says that low-level structural semantics with a noise map are projected to "soft" latent maps; the
layers are our reconstruction.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from biphasic_age.ages import as_weights, mixture
from biphasic_age.layouts import one_hot

SIGMA_START = 0.5
"""Strength of the noise before training."""


class NoisyLayout(nn.Module):
    """Z_c = S_c + sigma[t, c] S_c N_c: every class's mask with noise inside its own region.

    sigma is a learned table (groups, classes), non-negative through softplus. As the regions are disjoint and
    N_c is only seen inside region c, one Gaussian map serves all classes: the distribution is that of a map
    each.
    """

    def __init__(self, classes: int, groups: int):
        super().__init__()
        start = math.log(math.expm1(SIGMA_START))  # softplus(start) = SIGMA_START
        self.raw_sigma = nn.Parameter(torch.full((groups, classes), start))

    def sigma(self) -> Tensor:
        """(groups, classes), standard deviation of the noise."""
        return F.softplus(self.raw_sigma)

    def forward(self, layout: Tensor, labels: Tensor, age: Tensor, noise: Tensor | None) -> Tensor:
        """layout one-hot (B, K, H, W), labels (B, H, W), age (B, groups), noise (B, 1, H, W), or (B, K, H, W)
        for a map each, or None for no noise -> Z (B, K, H, W)."""
        if noise is None:
            return layout
        if noise.shape[1] > 1:
            noise = noise.gather(1, labels[:, None])
        here = mixture(age, self.sigma()).gather(1, labels.flatten(1)).view_as(noise)
        return layout * (1 + here * noise)


class ProjectionNet(nn.Module):
    """P: noisy layout (B, K, H, W) and age -> soft latent maps (B, d, s, s) at sizes H, H/2, H/4.

    K classes, age groups, latent d. Every class first has filters of its own: no class sees another before
    the 1x1 convolution. The age scales what they give, and shifts it inside the class's own region.
    """

    def __init__(self, classes: int, groups: int, latent: int, per_class: int = 8):
        super().__init__()
        self.classes, self.groups, self.per_class = classes, groups, per_class
        self.noisy = NoisyLayout(classes, groups)
        own = classes * per_class
        self.own = nn.Conv2d(classes, own, 3, 1, 1, groups=classes)
        self.age = nn.Embedding(groups, 2 * own)
        self.mix = nn.Conv2d(own, latent, 1)
        self.smooth = nn.Conv2d(latent, latent, 3, 1, 1)
        self.down1 = nn.Conv2d(latent, latent, 4, 2, 1)
        self.down2 = nn.Conv2d(latent, latent, 4, 2, 1)
        self.recompute = True
        """Compute the widest layer (152 maps) again in the backward pass instead of keeping it."""

    def _classes(self, z: Tensor, layout: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.own(z).unflatten(1, (self.classes, self.per_class))  # (B, K, 8, H, W)
        scale, shift = (v.view(-1, self.classes, self.per_class, 1, 1) for v in (1 + scale, shift))
        # In the convolutions' type: the widest maps of all need not be in fp32 under autocast.
        h = (h * scale + (shift.to(h.dtype) * layout[:, :, None].to(h.dtype))).to(h.dtype)
        return self.mix(F.leaky_relu(h.flatten(1, 2), 0.2))

    def forward(self, labels: Tensor, age: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """labels (B, H, W) int64; age (B,) groups or (B, groups) weights; noise as for `NoisyLayout` -> maps
        from coarse (H/4) to fine (H)."""
        age = as_weights(age, self.groups)
        layout = one_hot(labels, self.classes)
        z = self.noisy(layout, labels, age, noise)
        scale, shift = mixture(age, self.age.weight).chunk(2, 1)
        if self.recompute and torch.is_grad_enabled():
            h = checkpoint(
                self._classes, z, layout, scale, shift, use_reentrant=False, preserve_rng_state=False
            )
        else:
            h = self._classes(z, layout, scale, shift)
        full = F.leaky_relu(self.smooth(F.leaky_relu(h, 0.2)), 0.2)
        half = F.leaky_relu(self.down1(full), 0.2)
        return [F.leaky_relu(self.down2(half), 0.2), half, full]


class HardLayout(nn.Module):
    """Ablation of ProjectionNet: the layout itself, resized and lifted to d channels by one 1x1 convolution
    per size. No noise, no age."""

    def __init__(self, classes: int, latent: int):
        super().__init__()
        self.classes = classes
        self.lift = nn.ModuleList(nn.Conv2d(classes, latent, 1) for _ in range(3))

    def forward(self, labels: Tensor, age: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """As `ProjectionNet`; age and noise are not looked at."""
        layout = one_hot(labels, self.classes)
        steps = (4, 2, 1)
        return [lift(layout[..., ::step, ::step]) for lift, step in zip(self.lift, steps, strict=True)]
