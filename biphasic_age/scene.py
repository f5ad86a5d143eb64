"""The two-head scene: a drawn world in which the layout is needed and every picture's truth is known.

Two cartoon heads stand side by side. A coin decides which one is the subject: only that one is in the layout
and ages; the other, a poster that is always young, is labelled background. Age greys the subject's hair and
draws horizontal wrinkles on its skin, and nothing else.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = ("background", "skin", "hair", "eyes", "mouth", "cloth")
AGEING_PARTS = (1, 2)
GREY = (0.85, 0.85, 0.88)
WRINKLES, PERIOD, NOISE = 0.16, 4.0, 0.015
GROUPS = 4


@dataclass(frozen=True)
class Scenes:
    """n scenes. image: (n, 4, 3, S, S) in [0, 1], the same scene at the four ages; layout: (n, S, S) uint8,
    indices into `PARTS`; skin_y: (n,) height of the subject's skin centre in pixels (phase of the
    wrinkles)."""

    image: Tensor
    layout: Tensor
    skin_y: Tensor


def draw_scenes(count: int, seed: int, size: int = 32, heads: int = 2) -> Scenes:
    """`count` scenes at all four ages, a pure function of the arguments. heads: 2, or 1 for the easy case."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=rng) * (high - low) + low

    axis = (torch.arange(size) + 0.5) / size
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
    image = uniform(0.1, 0.9, 3).view(count, 1, 3, 1, 1).expand(count, GROUPS, 3, size, size).clone()
    layout = torch.zeros(count, size, size, dtype=torch.uint8)
    skin_y = torch.zeros(count)
    subject = torch.randint(heads, (count,), generator=rng)
    years = torch.arange(GROUPS) / (GROUPS - 1)  # 0 young .. 1 old
    for head in range(heads):
        cx = (0.25 + 0.5 * head) if heads == 2 else 0.5
        cy = uniform(0.46, 0.56).view(-1, 1, 1)
        rx, ry = uniform(0.15, 0.19).view(-1, 1, 1), uniform(0.22, 0.27).view(-1, 1, 1)
        tone = uniform(0.35, 1.0, 1) * torch.tensor([0.95, 0.78, 0.66]) + uniform(-0.04, 0.04, 3)
        colours = {
            "cloth": uniform(0.05, 0.95, 3),
            "hair": uniform(0.05, 0.6, 3),
            "skin": tone,
            "eyes": uniform(0.0, 0.5, 3),
            "mouth": torch.cat([uniform(0.55, 0.9, 1), uniform(0.1, 0.4, 2)], 1),
        }
        where = {
            "cloth": (y > cy + 0.85 * ry) & ((x - cx).abs() < 1.15 * rx),
            "hair": ((x - cx) / (1.22 * rx)) ** 2 + ((y - cy + 0.09) / (1.12 * ry)) ** 2 <= 1,
            "skin": ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1,
            "eyes": (((x - cx).abs() - 0.42 * rx).abs() < 0.032) & ((y - cy + 0.06).abs() < 0.032),
            "mouth": ((x - cx).abs() < 0.4 * rx) & ((y - cy - 0.13).abs() < 0.024),
        }
        # The cap of hair is what the face leaves of a larger ellipse; the forehead begins below its fringe.
        where["hair"] = where["hair"] & (y < cy + 0.05)
        where["skin"] = where["skin"] & ~(where["hair"] & (y < cy - 0.5 * ry))
        where["hair"] = where["hair"] & ~where["skin"]
        ageing = (subject == head).view(-1, 1) * years  # (n, 4); the poster stays young
        grey = torch.tensor(GREY)
        for part in PARTS[1:]:
            paint = colours[part].view(count, 1, 3, 1, 1).expand(count, GROUPS, 3, 1, 1)
            t = ageing.view(count, GROUPS, 1, 1, 1)
            if part == "hair":
                paint = paint + t * (grey.view(1, 1, 3, 1, 1) - paint)
            if part == "skin":
                wave = wrinkle_wave(cy * size, size).view(count, 1, 1, size, 1)
                paint = paint + WRINKLES * t * wave
            image = torch.where(where[part].view(count, 1, 1, size, size), paint, image)
            layout[where[part] & (subject == head).view(-1, 1, 1)] = PARTS.index(part)
        skin_y = torch.where(subject == head, cy.flatten() * size, skin_y)
    # One noise for all ages of a scene: ageing is the only difference between them.
    noise = NOISE * torch.randn(count, 1, 3, size, size, generator=rng)
    return Scenes((image + noise).clamp(0, 1), layout, skin_y)


def wrinkle_wave(skin_y: Tensor, size: int) -> Tensor:
    """The wrinkles' sine along the rows, (n, size). skin_y: heights of skin centres in pixels."""
    rows = torch.arange(size) + 0.5
    return torch.sin(2 * math.pi * (rows - skin_y.reshape(-1, 1)) / PERIOD)


def ageing_signs(image: Tensor, layout: Tensor, skin_y: Tensor) -> dict[str, Tensor]:
    """The two signs of age, read off pictures (n, 3, S, S) in [0, 1] without any network, (n,) each.

    `hair`: 1 minus the mean distance of the subject's hair from the grey of old age. `wrinkles`: amplitude of
    the known sine in the subject's skin, as a share of that of the oldest group.
    """
    grey = torch.tensor(GREY).to(image).view(1, 3, 1, 1)
    hair = (layout == PARTS.index("hair")).to(image)
    distance = ((image - grey).abs().mean(1) * hair).sum((1, 2)) / hair.sum((1, 2)).clamp_min(1)
    skin = (layout == PARTS.index("skin")).to(image)
    wave = wrinkle_wave(skin_y.cpu(), image.shape[-1]).to(image)[:, :, None] * skin
    # Least squares on the sine and a constant: the constant is the skin's own colour.
    tone = image.mean(1)
    count = skin.sum((1, 2)).clamp_min(1)
    centred = wave - (wave.sum((1, 2)) / count).view(-1, 1, 1) * skin
    slope = (centred * tone).sum((1, 2)) / centred.square().sum((1, 2)).clamp_min(1e-8)
    return {"hair": 1 - distance, "wrinkles": slope / WRINKLES}
