"""Procedural walkers: 48x24 pictures of dressed figures, identities with several views, four camera sites.

An identity is its clothes and build, a site is a look (background, colour cast, gamma, contrast, noise),
and the same person seen at another site keeps the clothes. Sites A, B and C are sources, T is never trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT, WIDTH = 48, 24


@dataclass(frozen=True)
class Site:
    """How a site's cameras show the world; colours and gains are RGB."""

    background: tuple[float, float, float]
    texture: float
    gain: tuple[float, float, float]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gamma: float = 1.0
    contrast: float = 1.0
    noise: float = 0.03


SITES = {
    "A": Site((0.5, 0.5, 0.5), 0.05, (1.15, 1.0, 0.75)),
    "B": Site((0.3, 0.5, 0.3), 0.12, (0.7, 0.85, 1.15), gamma=1.3, contrast=0.9),
    "C": Site((0.45, 0.35, 0.25), 0.08, (0.6, 0.6, 0.6), (0.1, 0.1, 0.1), gamma=0.8, contrast=0.7),
    "T": Site((0.7, 0.7, 0.6), 0.08, (0.9, 0.65, 1.0), (0.1, 0.0, 0.0), gamma=1.6, contrast=0.8),
}


@dataclass(frozen=True)
class Walkers:
    """Drawn images of one site."""

    images: Tensor
    """(N, 3, 48, 24) uint8."""
    identities: Tensor
    """(N,) 0..people-1."""
    cameras: Tensor
    """(N,) 0 or 1."""


def draw(site: str, people: int, views: int, seed: int) -> Walkers:
    """`views` pictures each of `people` new identities at a site; a function of the arguments alone."""
    rng = torch.Generator().manual_seed(seed)
    n = people * views
    who = torch.arange(people).repeat_interleave(views)

    def uniform(count: int, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, *size, generator=rng) * (high - low) + low

    # What a person keeps: colours of hat, torso, second torso colour, legs, shoes, bag; pattern and build.
    colours = uniform(people, 6, 3)[who]
    pattern = torch.randint(4, (people,), generator=rng)[who, None, None]
    period = torch.randint(2, 5, (people,), generator=rng)[who, None, None]
    carries = (uniform(people) < 0.5)[who]
    build = uniform(people, low=0.8, high=1.2)[who]

    camera = torch.randint(2, (n,), generator=rng)
    shift = uniform(n, 2, low=-2, high=2)
    scale = uniform(n, low=0.9, high=1.1)
    mirrored = (camera == 1) & (uniform(n) < 0.7)

    y = ((torch.arange(HEIGHT) + 0.5)[None, :, None] - HEIGHT / 2 - shift[:, :1, None]) / scale[:, None, None]
    x = ((torch.arange(WIDTH) + 0.5)[None, None] - WIDTH / 2 - shift[:, 1:, None]) / scale[:, None, None]
    x = torch.where(mirrored[:, None, None], -x, x)

    def box(top: float, bottom: float, left: Tensor | float, right: Tensor | float) -> Tensor:
        """Antialiased rectangle in pixels from the figure's centre, (n, 48, 24)."""
        inside_y = (y - top + 0.5).clamp(0, 1) * (bottom - y + 0.5).clamp(0, 1)
        return inside_y * (x - left + 0.5).clamp(0, 1) * (right - x + 0.5).clamp(0, 1)

    half = (5 * build)[:, None, None]
    stripes = torch.stack(
        [
            torch.zeros(n, HEIGHT, WIDTH),
            (y // period % 2).expand(n, HEIGHT, WIDTH),
            (x // period % 2).expand(n, HEIGHT, WIDTH),
            (x > 0).float().expand(n, HEIGHT, WIDTH),
        ]
    )
    second = stripes.gather(0, pattern.expand(n, HEIGHT, WIDTH)[None])[0]
    look = SITES[site]
    canvas = torch.tensor(look.background).view(1, 3, 1, 1) + (camera * 0.16 - 0.08).view(-1, 1, 1, 1)
    canvas = canvas + look.texture * torch.randn(n, 1, HEIGHT, WIDTH, generator=rng)

    def paint(canvas: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
        return canvas + mask[:, None] * (colour[:, :, None, None] - canvas)

    skin = torch.tensor([0.8, 0.6, 0.5]).expand(n, 3)
    head = (3.5 - (x.square() + (y + 15).square()).sqrt()).clamp(0, 1)
    canvas = paint(canvas, head, skin)
    canvas = paint(canvas, box(-20, -16, -3.5, 3.5), colours[:, 0])
    torso = box(-11.5, 3, -half, half)
    canvas = paint(canvas, torso, colours[:, 1])
    canvas = paint(canvas, torso * second, colours[:, 2])
    legs = torch.maximum(box(3, 18, -half * 0.8, -0.5), box(3, 18, 0.5, half * 0.8))
    canvas = paint(canvas, legs, colours[:, 3])
    shoes = torch.maximum(box(18, 20.5, -half, -0.5), box(18, 20.5, 0.5, half))
    canvas = paint(canvas, shoes, colours[:, 4])
    side = torch.where(camera == 1, -1.0, 1.0)[:, None, None]
    bag = box(-2, 5, half * side - 2, half * side + 2) * carries[:, None, None]
    canvas = paint(canvas, bag, colours[:, 5])

    canvas = canvas * torch.where(camera == 1, 1.12, 0.9).view(-1, 1, 1, 1)
    canvas = canvas * torch.tensor(look.gain).view(1, 3, 1, 1) + torch.tensor(look.offset).view(1, 3, 1, 1)
    canvas = (canvas.clamp(0, 1) ** look.gamma - 0.5) * look.contrast + 0.5
    canvas = canvas + look.noise * torch.randn(canvas.shape, generator=rng)
    return Walkers((canvas.clamp(0, 1) * 255).round().byte(), who, camera)
