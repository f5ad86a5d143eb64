"""The simple world: flat drawn faces whose hidden parts can be told from the visible ones.

Eyes and brows come in pairs, hair has one stripe texture, light falls from one side: what a hole hides is
written elsewhere in the face. Labels are exact.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

PARTS = ("background", "skin", "hair", "eyes and brows", "nose", "mouth")

HAIR = torch.tensor([(0.10, 0.07, 0.05), (0.45, 0.26, 0.12), (0.85, 0.68, 0.32), (0.55, 0.16, 0.08)])
SKIN = torch.tensor([(0.96, 0.80, 0.69), (0.85, 0.64, 0.48), (0.65, 0.45, 0.31), (0.42, 0.27, 0.18)])
IRIS = torch.tensor([(0.16, 0.42, 0.75), (0.20, 0.52, 0.25), (0.38, 0.22, 0.10), (0.50, 0.52, 0.55)])
LIPS = torch.tensor([(0.78, 0.25, 0.28), (0.60, 0.18, 0.38), (0.82, 0.45, 0.40)])


def draw_simple_faces(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """`count` faces: images (n, 3, size, size) in [0, 1] and parts (n, size, size) uint8, indices into
    `PARTS`.

    Drawn at twice the size and averaged down. A pure function of (count, seed, size).
    """
    rng, n = torch.Generator().manual_seed(seed), count

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(n, generator=rng) * (high - low) + low).view(n, 1, 1)

    def pick(table: Tensor) -> Tensor:
        """One colour of the table for each face, (n, 3, 1, 1), a little off."""
        chosen = table[torch.randint(len(table), (n,), generator=rng)]
        return (chosen + 0.02 * torch.randn(n, 3, generator=rng)).view(n, 3, 1, 1)

    axis = (torch.arange(2 * size) + 0.5) / size - 1
    scale = uniform(0.9, 1.1)
    x = (axis.view(1, 1, -1) - uniform(-0.16, 0.16)) / scale  # face coordinates, (n, 2 size, 2 size)
    y = (axis.view(1, -1, 1) - uniform(-0.16, 0.16)) / scale
    image = torch.empty(n, 3, 2 * size, 2 * size)
    parts = torch.zeros(n, 2 * size, 2 * size, dtype=torch.long)

    def paint(where: Tensor, colour: Tensor, part: int) -> None:
        nonlocal image, parts
        image = torch.where(where.unsqueeze(1), colour, image)
        parts = torch.where(where, part, parts)

    def ellipse(cx: float, cy: float, rx: float, ry: float | Tensor) -> Tensor:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1

    left, right = (torch.rand(n, 3, 1, 1, generator=rng) for _ in range(2))
    image[:] = left + (right - left) * (axis.view(1, 1, 1, -1) + 1) / 2

    hair = pick(HAIR)
    frequency = torch.tensor((9.0, 15.0))[torch.randint(2, (n,), generator=rng)].view(n, 1, 1)
    angle = (torch.randint(4, (n,), generator=rng) * math.pi / 4).view(n, 1, 1)
    stripes = (frequency * (x * angle.cos() + y * angle.sin())).sin().unsqueeze(1)
    paint(ellipse(0, -0.12, 0.72, 0.82), hair * (1 + 0.35 * stripes), 2)
    shade = 1 + uniform(-0.25, 0.25).unsqueeze(1) * (x / 0.55).unsqueeze(1)
    paint(ellipse(0, 0.06, 0.54, 0.70), pick(SKIN) * shade, 1)
    iris = pick(IRIS)
    for side in (-1, 1):
        paint(((x - side * 0.24).abs() < 0.14) & ((y + 0.20).abs() < 0.035), hair, 3)
        paint(ellipse(side * 0.24, -0.05, 0.13, 0.085), torch.full((1, 3, 1, 1), 0.95), 3)
        paint(ellipse(side * 0.24, -0.05, 0.075, 0.075), iris, 3)
        paint(ellipse(side * 0.24, -0.05, 0.03, 0.03), torch.zeros(1, 3, 1, 1), 3)
    wedge = (y > -0.02) & (y < 0.24) & (x.abs() < 0.02 + 0.35 * (y + 0.02).clamp(min=0))
    paint(wedge, pick(SKIN * 0.72), 4)
    opening = uniform(0.0, 0.09)
    paint(ellipse(0, 0.42, 0.24, 0.06 + opening), pick(LIPS), 5)
    paint(ellipse(0, 0.42, 0.17, opening.clamp(min=1e-3)), torch.full((1, 3, 1, 1), 0.12), 5)

    image = F.avg_pool2d(image.clamp(0, 1), 2)
    share = F.avg_pool2d(F.one_hot(parts, len(PARTS)).movedim(-1, 1).float(), 2)
    return image, share.argmax(1).to(torch.uint8)
