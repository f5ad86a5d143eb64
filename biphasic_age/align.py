"""From a photo to the aligned crop that a generator was trained on, and back into the photo at full size.

Alignment puts the centres of both eyes where the training pictures have them; the eyes come from the face
parser's layout, so no landmark network is needed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from biphasic_age.layouts import CLASSES

L_EYE, R_EYE = CLASSES.index("l_eye"), CLASSES.index("r_eye")
Point = tuple[float, float]
Eyes = tuple[Point, Point]
EYES: Eyes = ((0.405, 0.536), (0.594, 0.536))
"""Where `parse.py --align` puts the eyes, as shares of the side: `frozen.ArcFace` cuts its own crop, in which
eyes have fixed places, out of such pictures, and hair and chin stay in them."""


class Similarity(NamedTuple):
    """p' = scale * R(angle) p + shift for points p = (x, y) in pixels, as complex numbers p' = a p + b."""

    a: complex
    b: complex

    def inverse(self) -> "Similarity":
        return Similarity(1 / self.a, -self.b / self.a)

    def theta(self) -> Tensor:
        """(2, 3) matrix for column vectors (x, y, 1)."""
        a, b = self.a, self.b
        return torch.tensor([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def find_eyes(labels: Tensor) -> Eyes | None:
    """Centres (x, y) in pixels of both eyes of a label map (H, W) in BiSeNet's order, the one on the
    picture's left first; None when one is not seen."""
    centres = []
    for label in (L_EYE, R_EYE):
        rows, columns = (labels == label).nonzero(as_tuple=True)
        if not len(rows):
            return None
        centres.append((columns.float().mean().item(), rows.float().mean().item()))
    left, right = sorted(centres)
    return left, right


def mean_eyes(labels: Tensor) -> Eyes | None:
    """Mean eye centres of label maps (N, H, W), as fractions of width and height; None when no map shows both
    eyes."""
    height, width = labels.shape[-2:]
    found = [eyes for eyes in map(find_eyes, labels) if eyes is not None]
    if not found:
        return None
    means = torch.tensor(found).mean(0)
    (lx, ly), (rx, ry) = (((x + 0.5) / width, (y + 0.5) / height) for x, y in means.tolist())
    return (lx, ly), (rx, ry)


def similarity(source: Eyes, target: Eyes) -> Similarity:
    """The similarity that moves the source's eyes onto the target's, both in pixels. ValueError when the
    source's eyes coincide."""
    (s1, s2), (t1, t2) = ([complex(*p) for p in eyes] for eyes in (source, target))
    if s1 == s2:
        raise ValueError("both eyes are at the same place")
    a = (t2 - t1) / (s2 - s1)
    return Similarity(a, t1 - a * s1)


def to_pixels(eyes: Eyes, size: int) -> Eyes:
    """Eyes as fractions of the side -> pixels of a square picture, (0, 0) the centre of the first pixel."""
    (lx, ly), (rx, ry) = eyes
    return (lx * size - 0.5, ly * size - 0.5), (rx * size - 0.5, ry * size - 0.5)


def warp(image: Tensor, move: Similarity, size: tuple[int, int], padding: str = "border") -> Tensor:
    """(C, H, W) moved by a similarity from its pixels to the pixels of a picture of (height, width) = size.

    When the similarity makes it smaller, the picture is first averaged down, so that nothing aliases.
    """
    scale = abs(move.a)
    if scale < 0.5:
        small = (max(1, round(image.shape[-2] * scale)), max(1, round(image.shape[-1] * scale)))
        smaller = F.interpolate(image[None], small, mode="bilinear", antialias=True, align_corners=False)[0]
        # The pixels of `smaller` in those of `image`: p = f (q + 0.5) - 0.5. Both sides shrink by nearly the
        # same factor; the mean of the two is used.
        factor = math.sqrt(image.shape[-2] * image.shape[-1] / (small[0] * small[1]))
        half = complex(0.5, 0.5)
        return warp(
            smaller, Similarity(move.a * factor, move.a * (factor * half - half) + move.b), size, padding
        )
    height, width = size
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    points = torch.stack((columns, rows, torch.ones_like(rows)), -1)
    back = points @ move.inverse().theta().double().T
    limits = torch.tensor([image.shape[-1], image.shape[-2]], dtype=torch.float64)
    grid = ((2 * back + 1) / limits - 1).to(image)
    return F.grid_sample(image[None], grid[None], "bilinear", padding, align_corners=False)[0]


def soft_square(size: int, border: float = 0.1) -> Tensor:
    """(1, size, size): 1 inside, falling smoothly to 0 over the outer `border` of each side."""
    position = (torch.arange(size) + 0.5) / size
    ramp = (torch.minimum(position, 1 - position) / border).clamp(0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    return (ramp[:, None] * ramp[None])[None]


def guided(guide: Tensor, value: Tensor, radius: int, epsilon: float = 1e-3) -> Tensor:
    """Guided filter (He et al., ECCV 2010): value (C, H, W) becomes locally linear in guide (1, H, W), so
    that its edges fall on those of the guide."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]

    of_guide, of_value = mean(guide), mean(value)
    slope = (mean(guide * value) - of_guide * of_value) / (mean(guide * guide) - of_guide**2 + epsilon)
    return mean(slope) * guide + mean(of_value - slope * of_guide)


def paste(photo: Tensor, before: Tensor, after: Tensor, move: Similarity) -> Tensor:
    """The change of the crop put into the photo at full size: photo + soft edge * (after - before).

    photo (3, H, W) and the crops before and after the translation (3, S, S), all in [0, 1]; move: photo ->
    crop. Only the difference is enlarged, so that the photo keeps its own detail, and where the photo is
    finer than the crop its edges guide the enlargement.
    """
    change = (after - before) * soft_square(after.shape[-1]).to(after)
    back = move.inverse()
    size = (photo.shape[-2], photo.shape[-1])
    change = warp(change, back, size, padding="zeros")
    if abs(back.a) > 1.5:
        grey = (photo * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        inside = warp(torch.ones_like(after[:1]), back, size, padding="zeros")
        change = guided(grey, change, radius=round(abs(back.a))) * inside
    return (photo + change).clamp(0, 1)
