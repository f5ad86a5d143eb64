"""The simple world: flat soft-edged ellipse faces, the spec's own trial, in which its margins were set.

A person is 12 numbers, everything else of a picture 11, all uniform in [0, 1]. Eyes and lips are drawn from
the latter alone, so that landmark picture and mask say nothing of the person. Lengths are in half-widths of
the picture, x to the right, y down, (0, 0) in its middle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.runtime import step_generator

IDENTITY = (
    "skin_r", "skin_g", "skin_b", "iris_r", "iris_g", "iris_b", "brow_and_frequency", "nose_width",
    "texture_strength", "texture_r", "texture_g", "texture_b",
)  # fmt: skip
"""A person. One number is both how thick the brows and how fine the texture of the skin are."""
ATTRIBUTES = (
    "shift_x", "shift_y", "mouth", "eye", "back_r", "back_g", "back_b", "hair_r", "hair_g", "hair_b", "light",
)  # fmt: skip
"""Everything else: place of the face, openings, colours of background and hair, brightness."""
REACH = (0.15, 0.10)
"""How far the face is shifted, across and down."""
FACE, HAIR = (0.58, 0.72), (0.74, 0.84)
"""Half-axes."""
EYES = ((-0.23, -0.17), (0.23, -0.17))
BROWS = ((-0.23, -0.42), (0.23, -0.42))
NOSE, MOUTH, CROWN = (0.0, 0.08), (0.0, 0.38), (0.0, -0.14)
"""Centres of the parts, from the face's."""
EYE_WIDTH, NOSE_HEIGHT, LIPS = 0.18, 0.16, (0.25, 0.17)
"""Half-axes that no number changes: of eyes and brows across, of the nose down, of both lips across."""
SOFT = 0.0625
"""Width of every edge: a pixel of 32."""


@dataclass(frozen=True)
class SimpleParams:
    """What determines B faces: identity (B, 12), attributes (B, 11) in [0, 1]."""

    identity: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.identity)

    def __getitem__(self, key: str | slice | Tensor) -> "Tensor | SimpleParams":
        """A column (B,) by its name, or the chosen faces."""
        if not isinstance(key, str):
            return SimpleParams(self.identity[key], self.attributes[key])
        if key in IDENTITY:
            return self.identity[:, IDENTITY.index(key)]
        return self.attributes[:, ATTRIBUTES.index(key)]

    def colour(self, part: str) -> Tensor:
        """Red, green and blue of a part, (B, 3, 1, 1)."""
        return torch.stack([self[f"{part}_{c}"] for c in "rgb"], 1)[..., None, None]


def simple_world(people: int, per_person: int, seed: int) -> tuple[SimpleParams, Tensor]:
    """Parameters of people x per_person pictures, person by person, and the person of each (N,) int64. A pure
    function of its arguments."""
    person = torch.arange(people).repeat_interleave(per_person)
    identity = torch.rand(people, len(IDENTITY), generator=step_generator(seed, 0, stream=12))
    attributes = torch.rand(len(person), len(ATTRIBUTES), generator=step_generator(seed, 0, stream=13))
    return SimpleParams(identity[person], attributes), person


def draw_simple(params: SimpleParams, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, size, size) in [0, 1], their 98 points (B, 98, 2) in pixels, (0, 0) the centre of the
    first one, and where the face is (B, size, size) bool: every pixel that the person can change."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    middle = _middle(params)
    # from the middle of the face, (B, 1, size, size)
    x = axis.view(1, 1, 1, -1) - middle[:, 0].view(-1, 1, 1, 1)
    y = axis.view(1, 1, -1, 1) - middle[:, 1].view(-1, 1, 1, 1)

    def ellipse(centre: tuple[float, float], across: Tensor | float, down: Tensor | float) -> Tensor:
        """How much of each pixel an ellipse covers."""
        far = torch.hypot((x - centre[0]) / across, (y - centre[1]) / down)
        least = torch.minimum(torch.as_tensor(across), torch.as_tensor(down))
        return (0.5 + (1 - far) * least / SOFT).clamp(0, 1)

    def over(below: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
        return below + cover * (colour - below)

    eye_height, mouth_outer, mouth_inner = (value.view(-1, 1, 1, 1) for value in _heights(params))
    skin = 0.35 + 0.5 * params.colour("skin")
    fine, strength, nose = (
        params[name].view(-1, 1, 1, 1) for name in ("brow_and_frequency", "texture_strength", "nose_width")
    )
    waves = (8 + 8 * fine) * x, (8 + 8 * fine) * y
    texture = 0.5 * strength * (params.colour("texture") - 0.5) * waves[0].sin() * waves[1].sin()
    face = over(skin + texture, 0.75 * skin, ellipse(NOSE, 0.05 + 0.09 * nose, NOSE_HEIGHT))
    for eye, brow in zip(EYES, BROWS, strict=True):
        white = ellipse(eye, EYE_WIDTH, eye_height)
        face = over(face, torch.tensor(0.95), white)
        face = over(face, params.colour("iris"), white * ellipse(eye, 0.10, 0.10))
        face = over(face, torch.tensor(0.15), ellipse(brow, EYE_WIDTH, 0.02 + 0.06 * fine))
    red, dark = (torch.tensor(c).view(1, 3, 1, 1) for c in ((0.70, 0.25, 0.25), (0.20, 0.05, 0.05)))
    face = over(face, red, ellipse(MOUTH, LIPS[0], mouth_outer))
    face = over(face, dark, ellipse(MOUTH, LIPS[1], mouth_inner))
    picture = (0.1 + 0.8 * params.colour("back")) * (0.8 - 0.2 * axis.view(1, 1, -1, 1))
    picture = over(picture.expand(-1, -1, -1, size), 0.8 * params.colour("hair"), ellipse(CROWN, *HAIR))
    shown = ellipse((0.0, 0.0), *FACE)
    picture = over(picture, face, shown) * (0.75 + 0.5 * params["light"].view(-1, 1, 1, 1))
    return picture.clamp(0, 1), (_points(params, middle) + 1) * size / 2 - 0.5, shown[:, 0] > 0


def _middle(params: SimpleParams) -> Tensor:
    """Middle of the face, (B, 2)."""
    shift = torch.stack((params["shift_x"], params["shift_y"]), 1)
    return (2 * shift - 1) * torch.tensor(REACH) + torch.tensor((0.0, 0.05))


def _heights(params: SimpleParams) -> tuple[Tensor, Tensor, Tensor]:
    """Half the height of eyes, outer lip and inner lip, (B,)."""
    return 0.05 + 0.10 * params["eye"], 0.06 + 0.11 * params["mouth"], 0.02 + 0.10 * params["mouth"]


def _ring(count: int, start: float = 0.0, turn: float = 2 * math.pi) -> Tensor:
    """Points (count, 2) of a circle, from the left over the top."""
    angle = start + turn * torch.arange(count) / count
    return torch.stack((-angle.cos(), -angle.sin()), 1)


def _points(params: SimpleParams, middle: Tensor) -> Tensor:
    """98 WFLW points (B, 98, 2): jaw, brows, nose, eyes, lips, pupils."""

    def curve(shape: Tensor, centre: Sequence[float], across: float, down: Tensor | float) -> Tensor:
        down = torch.as_tensor(down).expand(len(params))
        scale = torch.stack((torch.full_like(down, across), down), 1)
        return shape * scale[:, None] + torch.tensor(centre)

    eye, outer, inner = _heights(params)
    line = torch.linspace(-1, 1, 9)[:, None]
    parts = [curve(_ring(33, 0.0, -math.pi * 33 / 32), (0.0, 0.0), *FACE)]
    parts += [curve(line * torch.tensor((1.0, 0.0)), brow, EYE_WIDTH, 0.0) for brow in BROWS]
    parts += [curve(line * torch.tensor((0.0, 1.0)), NOSE, 0.0, NOSE_HEIGHT)]
    parts += [curve(_ring(8), centre, EYE_WIDTH, eye) for centre in EYES]
    parts += [curve(_ring(12), MOUTH, LIPS[0], outer), curve(_ring(8), MOUTH, LIPS[1], inner)]
    parts += [curve(torch.zeros(1, 2), centre, 0.0, 0.0) for centre in EYES]
    return torch.cat(parts, 1) + middle[:, None]
