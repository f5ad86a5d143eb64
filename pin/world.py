"""The demo's simple world: soft-edged grey cartoon faces with known identities, drawn thousands per
second."""

import math

import torch
from torch import Tensor

PERSON = {
    "half_width": (0.52, 0.72),
    "half_height": (0.72, 0.92),
    "skin": (0.45, 0.85),
    "eye_spacing": (0.20, 0.36),
    "eye_row": (-0.28, -0.05),
    "eye_width": (0.06, 0.12),
    "eye_height": (0.04, 0.09),
    "brow_thickness": (0.02, 0.06),
    "brow_gap": (0.12, 0.22),
    "brow_slope": (-0.5, 0.5),
    "brow_darkness": (0.1, 0.6),
    "nose_length": (0.15, 0.35),
    "nose_width": (0.05, 0.14),
    "mouth_row": (0.35, 0.58),
    "mouth_width": (0.16, 0.34),
    "mouth_thickness": (0.03, 0.09),
    "hair_line": (-0.75, -0.4),
    "hair_tone": (0.0, 0.6),
    "beard": (0.0, 0.35),
    "mole_x": (-0.35, 0.35),
    "mole_y": (-0.3, 0.5),
}
"""What makes a person, uniform in these ranges (the face lies in [-1, 1]^2, grey levels in [0, 1])."""

PICTURE = {
    "rotation": (-0.12, 0.12),
    "scale": (0.94, 1.06),
    "shift_x": (-0.07, 0.07),
    "shift_y": (-0.07, 0.07),
    "eye_opening": (0.5, 1.0),
    "mouth_opening": (0.0, 1.0),
    "background": (0.2, 0.8),
    "light": (0.0, 0.3),
    "light_angle": (0.0, 2 * math.pi),
    "gain": (0.85, 1.15),
    "offset": (-0.05, 0.05),
}
"""What changes from picture to picture of a person."""


def draw_people(
    people: int,
    per_person: int,
    size: int,
    generator: torch.Generator,
    transposed: float = 0.0,
    noise: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Images (people * per_person, 1, size, size) in [-1, 1] and their person numbers.

    transposed: share of people shown with rows and columns exchanged, so that two populations need two sets
    of eigenfaces.
    """
    person = _uniform(PERSON, people, generator)
    person["beard"] *= torch.rand(people, generator=generator) < 0.4
    turned = torch.arange(people) < round(transposed * people)
    labels = torch.arange(people).repeat_interleave(per_person)
    picture = _uniform(PICTURE, len(labels), generator)
    images = torch.cat(
        [
            _draw({name: value[part] for name, value in (person_of(person, labels) | picture).items()}, size)
            for part in torch.arange(len(labels)).split(256)
        ]
    )
    images = images + noise * torch.randn(images.shape, generator=generator)
    images = torch.where(turned[labels].view(-1, 1, 1), images.transpose(1, 2), images)
    return images.clamp(0, 1).mul(2).sub(1).unsqueeze(1), labels


def person_of(person: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """One row of person parameters for each picture."""
    return {name: value[labels] for name, value in person.items()}


def _uniform(
    ranges: dict[str, tuple[float, float]], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    return {
        name: low + (high - low) * torch.rand(count, generator=generator)
        for name, (low, high) in ranges.items()
    }


def _draw(parameters: dict[str, Tensor], size: int) -> Tensor:
    """(N, size, size) in about [0, 1], from parameters of shape (N,)."""
    f = {name: value.view(-1, 1, 1) for name, value in parameters.items()}
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    u, v = u - f["shift_x"], v - f["shift_y"]
    cos, sin = f["rotation"].cos() / f["scale"], f["rotation"].sin() / f["scale"]
    x, y = cos * u + sin * v, cos * v - sin * u  # the face's own coordinates
    softness = 1.2 / size

    def inside(distance: Tensor) -> Tensor:
        return torch.sigmoid(-distance / softness)

    def ellipse(dx: Tensor, dy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
        return inside(((dx / rx).square() + (dy / ry).square()).sqrt().sub(1) * torch.minimum(rx, ry))

    def paint(image: Tensor, mask: Tensor, tone: Tensor) -> Tensor:
        return image + mask * (tone - image)

    face = ellipse(x, y, f["half_width"], f["half_height"])
    hair = ellipse(x, y + 0.06, 1.12 * f["half_width"], 1.08 * f["half_height"]) * inside(y - f["hair_line"])
    image = f["background"].expand_as(x)
    image = paint(image, face, f["skin"])
    image = paint(image, face * inside(f["mouth_row"] - 0.12 - y), f["skin"] - f["beard"])
    image = paint(image, hair, f["hair_tone"])

    side = x.abs() - f["eye_spacing"]
    row = y - f["eye_row"]
    height = f["eye_height"] * f["eye_opening"]
    image = paint(image, ellipse(side, row, f["eye_width"], height), torch.full_like(f["skin"], 0.95))
    image = paint(image, ellipse(side, row, 0.5 * height, 0.8 * height), torch.full_like(f["skin"], 0.05))
    brow = (row + f["brow_gap"] + 0.5 * f["brow_slope"] * side).abs() - f["brow_thickness"]
    brow = inside(brow) * inside(side.abs() - 1.3 * f["eye_width"])
    image = paint(image, brow, f["skin"] - f["brow_darkness"])

    tip = f["eye_row"] + f["nose_length"]
    flank = (x.abs() - f["nose_width"] * ((y - f["eye_row"]) / f["nose_length"]).clamp(0, 1)).abs() - 0.015
    image = paint(image, 0.5 * inside(flank) * inside(f["eye_row"] - y) * inside(y - tip), f["skin"] - 0.25)
    thickness = f["mouth_thickness"] * (0.4 + 0.6 * f["mouth_opening"])
    mouth = ellipse(x, y - f["mouth_row"], f["mouth_width"], thickness)
    image = paint(image, mouth, f["skin"] - 0.35)
    mole = ellipse(x - f["mole_x"], y - f["mole_y"], *(torch.full_like(f["skin"], 0.035),) * 2)
    image = paint(image, mole * face, f["skin"] - 0.4)

    ramp = f["light"] * (u * f["light_angle"].cos() + v * f["light_angle"].sin()) / 2
    return (image + ramp) * f["gain"] + f["offset"]
