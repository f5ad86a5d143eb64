"""Defences to compare PIN with. Each maps (B, 1, H, W) in [-1, 1] to the same, in a batch and without loops
over images, except JPEG, whose codec takes one image at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pin.basis import Basis

Defense = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """No defence."""
    return x


def bit_reduction(x: Tensor, bits: int = 4) -> Tensor:
    """Round grey levels to 2^bits values."""
    levels = 2**bits - 1
    return ((x + 1) / 2 * levels).round() / levels * 2 - 1


def jpeg(x: Tensor, quality: int = 75) -> Tensor:
    """Through the JPEG codec."""
    grey = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    encoded = [cv2.imencode(".jpg", image[0], (cv2.IMWRITE_JPEG_QUALITY, quality))[1] for image in grey]
    decoded = np.stack([cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) for data in encoded])
    return torch.from_numpy(decoded).unsqueeze(1).to(x) / 127.5 - 1


def blur(x: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian filter."""
    from torchvision.transforms.functional import gaussian_blur  # takes seconds, and our defence does without

    return gaussian_blur(x, 2 * int(3 * sigma + 0.5) + 1, sigma)


def median(x: Tensor, width: int = 3) -> Tensor:
    """Median filter."""
    patches = F.unfold(F.pad(x, (width // 2,) * 4, mode="reflect"), width)  # (B, width^2, H W)
    return patches.median(1).values.view_as(x)


def random_resize_pad(x: Tensor, generator: torch.Generator | None = None, smallest: float = 0.85) -> Tensor:
    """A random shrinking of each image, zero padding around it (Xie et al. 2018, at constant output size)."""
    size, count = x.shape[-1], len(x)
    side = torch.randint(int(smallest * size), size, (count, 1), generator=generator)
    first = (torch.rand((count, 2), generator=generator) * (size - side + 1)).floor()  # left, top
    # The pixel at u of the result comes from (u - first) * size / side, here on grid_sample's scale [-1, 1].
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = place[:, 1, 1] = (size / side).squeeze(1)
    place[:, :, 2] = (size - side - 2 * first) / side
    grid = F.affine_grid(place.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def total_variation(
    x: Tensor,
    generator: torch.Generator | None = None,
    keep: float = 0.5,
    weight: float = 0.1,
    steps: int = 1000,
    rate: float = 0.01,
) -> Tensor:
    """Total-variation minimisation (Guo et al. 2018) with the first author's 2019 settings: squared
    differences, a Bernoulli mask of pixels that must be matched, plain gradient descent.

    The gradient of ||mask (z - x)||^2 + weight * sum of squared neighbour differences, written out.
    """
    mask = (torch.rand(x.shape[-2:], generator=generator) < keep).to(x)
    z = x.clone()
    for _ in range(steps):
        slope = 2 * mask * (z - x)
        down, right = z[..., 1:, :] - z[..., :-1, :], z[..., 1:] - z[..., :-1]
        slope[..., 1:, :] += 2 * weight * down
        slope[..., :-1, :] -= 2 * weight * down
        slope[..., 1:] += 2 * weight * right
        slope[..., :-1] -= 2 * weight * right
        z = z - rate * slope
    return z


@dataclass(frozen=True)
class Quilting:
    """Image quilting: every patch is replaced by its nearest one among clean faces; overlaps are averaged.

    patches: (M, width^2) from `quilting_patches`. The authors' settings at 112 x 112 are patch 11, step 9.
    """

    patches: Tensor
    width: int
    step: int

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        # Padding lets the last patches reach the border, which the authors' code leaves at 0.
        spare = (-(size - self.width)) % self.step
        padded = F.pad(x, (0, spare, 0, spare), mode="replicate")
        windows = F.unfold(padded, self.width, stride=self.step)  # (B, width^2, L)
        flat = windows.transpose(1, 2).reshape(-1, self.width**2)
        bank = self.patches.to(x)
        nearest = torch.cat(
            [(bank.square().sum(1) - 2 * part @ bank.T).argmin(1) for part in flat.split(8192)]
        )
        chosen = bank[nearest].view(len(x), -1, self.width**2).transpose(1, 2)
        side = padded.shape[-1]
        total = F.fold(chosen, (side, side), self.width, stride=self.step)
        times = F.fold(torch.ones_like(chosen), (side, side), self.width, stride=self.step)
        return (total / times)[..., :size, :size]


def quilting_patches(images: Tensor, width: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random patches (count, width^2) of clean images (N, 1, H, W)."""
    size = images.shape[-1] - width + 1
    image = torch.randint(0, len(images), (count,), generator=generator)
    top, left = (torch.randint(0, size, (count,), generator=generator) for _ in range(2))
    offsets = torch.arange(width)
    rows, columns = top[:, None, None] + offsets[:, None], left[:, None, None] + offsets
    return images[image[:, None, None], 0, rows, columns].flatten(1)


def fixed_components(x: Tensor, basis: Basis, kept: Tensor) -> Tensor:
    """Projection on a set of eigenfaces: kept of 0 and 1, (K,) for all images or (B, K) for each."""
    return basis.reconstruct(basis.coefficients(x) * kept, x.shape)


def top_components(basis: Basis, k: int) -> Defense:
    """The first k eigenfaces."""
    return partial(fixed_components, basis=basis, kept=_kept(basis, torch.arange(k)))


def last_components(basis: Basis, k: int) -> Defense:
    """The last k eigenfaces of the basis."""
    total = basis.size[1]
    return partial(fixed_components, basis=basis, kept=_kept(basis, torch.arange(total - k, total)))


def random_components(basis: Basis, k: int, generator: torch.Generator) -> Defense:
    """k eigenfaces drawn once."""
    chosen = torch.randperm(basis.size[1], generator=generator)[:k]
    return partial(fixed_components, basis=basis, kept=_kept(basis, chosen))


def large_components(x: Tensor, basis: Basis, price: float) -> Tensor:
    """Projection on the eigenfaces whose coefficients in the image pay the price lambda: c^2 > lambda D. The
    attack makes large ones of its own."""
    coefficients = basis.coefficients(x)
    pays = coefficients.square() > price * basis.size[0]
    return basis.reconstruct(coefficients * pays, x.shape)


def _kept(basis: Basis, chosen: Tensor) -> Tensor:
    kept = torch.zeros(basis.size[1], device=basis.eig_vec.device)
    kept[chosen] = 1.0
    return kept
