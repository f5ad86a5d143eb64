"""The winner's training transform on a face crop (H, W, 3) uint8 RGB, and blending outside of the contest's
rules.

The two random filters are albumentations 1.x's, whose parameters later versions changed, written as
transforms of the installed version.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for newer versions otherwise

import albumentations
import cv2
import numpy as np


class Noise(albumentations.ImageOnlyTransform):
    """Gaussian noise, variance uniform in [10, 50] on the 0..255 scale, independent per pixel and channel;
    the sum is clipped and truncated to bytes, which lowers the mean by half a level.
    """

    def get_params(self) -> dict[str, float]:
        return {"deviation": self.py_random.uniform(10, 50) ** 0.5}

    def apply(self, img: np.ndarray, deviation: float, **params: object) -> np.ndarray:
        noise = self.random_generator.standard_normal(img.shape, np.float32) * deviation
        return np.clip(img + noise, 0, 255).astype(np.uint8)


class Blur(albumentations.ImageOnlyTransform):
    """Gaussian blur, kernel 3, 5 or 7 with probability 0.2, 0.4, 0.4, sigma 0.3 ((k - 1) / 2 - 1) + 0.8,
    border reflected without repeating the edge.
    """

    def get_params(self) -> dict[str, int]:
        # An even draw is raised to the next odd size, as albumentations 1.x did.
        return {"kernel": self.py_random.randint(3, 7) | 1}

    def apply(self, img: np.ndarray, kernel: int, **params: object) -> np.ndarray:
        return cv2.GaussianBlur(img, (kernel, kernel), 0)


def train_transform(size: int, flips_only: bool = False) -> albumentations.Compose:
    """Flip p 0.5, noise p 0.1, blur p 0.1, resize to size x size (bilinear, aspect ratio ignored), in this
    order.

    flips_only: without noise and blur. Normalisation and channel order follow on the device.
    """
    filters = [] if flips_only else [Noise(p=0.1), Blur(p=0.1)]
    return albumentations.Compose([albumentations.HorizontalFlip(p=0.5), *filters, _resize(size)])


def test_transform(size: int) -> albumentations.Compose:
    """Resize alone."""
    return albumentations.Compose([_resize(size)])


def _resize(size: int) -> albumentations.Resize:
    return albumentations.Resize(size, size, interpolation=cv2.INTER_LINEAR)


def self_blend(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fake made of a real crop alone: the crop, its colours, place and sharpness changed, blended into
    itself through a soft ellipse (in the manner of Face X-ray and self-blended images). Forbidden in the
    contest.
    """
    height, width = crop.shape[:2]
    scale, angle = rng.uniform(0.95, 1.05), rng.uniform(-3, 3)
    move = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    move[:, 2] += rng.uniform(-0.02, 0.02, 2) * (width, height)
    other = cv2.warpAffine(crop, move, (width, height), borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)
    if rng.random() < 0.5:
        blurred = cv2.GaussianBlur(other, (0, 0), rng.uniform(0.5, 2.0))
        other = blurred if rng.random() < 0.5 else 2 * other - blurred
    other = other * rng.uniform(0.9, 1.1) + rng.uniform(-15, 15, 3)
    mask = np.zeros((height, width), np.float32)
    axes = (int(width * rng.uniform(0.25, 0.4)), int(height * rng.uniform(0.25, 0.4)))
    cv2.ellipse(mask, (width // 2, height // 2), axes, 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.01, 0.06) * width)[..., None] * rng.uniform(0.5, 1.0)
    return np.clip(crop * (1 - mask) + other * mask, 0, 255).astype(np.uint8)
