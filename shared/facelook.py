"""Colours, light and blending of procedural faces.

Colours are mixed in linear light (squares of the displayed values) and displayed as square roots at the end.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.faceparams import Params
from shared.faceshape import bell, smoothstep

CLASSES = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
LABEL = {name: i for i, name in enumerate(CLASSES)}

SKIN = ((0.98, 0.86, 0.78), (0.93, 0.75, 0.63), (0.81, 0.60, 0.46), (0.58, 0.39, 0.27), (0.36, 0.23, 0.16))
HAIR = (
    *((0.90, 0.80, 0.58), (0.78, 0.59, 0.34), (0.52, 0.36, 0.21), (0.33, 0.21, 0.13)),
    *((0.19, 0.125, 0.09), (0.105, 0.085, 0.085)),
)
RED_HAIR = (
    (0.88, 0.56, 0.28),
    (0.72, 0.35, 0.15),
    (0.50, 0.20, 0.10),
    (0.26, 0.11, 0.075),
    (0.13, 0.075, 0.07),
)
IRIS = (
    *((0.17, 0.095, 0.06), (0.34, 0.20, 0.10), (0.47, 0.36, 0.17), (0.34, 0.46, 0.27)),
    *((0.27, 0.47, 0.66), (0.50, 0.57, 0.63)),
)


def ramp(t: Tensor, colours: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Colour at t in [0, 1] on a list of displayed colours: (B, 1, 1, 1) -> linear (B, 3, 1, 1)."""
    table = torch.tensor(colours, device=t.device)
    position = t.flatten().clamp(0, 1) * (len(colours) - 1)
    low = position.long().clamp(max=len(colours) - 2)
    mixed = torch.lerp(table[low], table[low + 1], (position - low)[:, None])
    return mixed.square()[:, :, None, None]


def triple(params: Params, name: str) -> Tensor:
    """Linear colour of the columns name_r, name_g, name_b: (B, 3, 1, 1)."""
    return torch.stack([params[f"{name}_{c}"] for c in "rgb"], 1).square()[:, :, None, None].to(torch.float32)


def build_look(params: Params, s: SimpleNamespace) -> SimpleNamespace:
    """Colours and surface properties of B faces, (B, 3, 1, 1) or (B, 1, 1, 1), and the light."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1).to(torch.float32)

    c = SimpleNamespace()
    age = column("age")
    tone = column("skin_tone")
    warm = column("undertone") * 2 - 1
    cast = torch.cat([1 + 0.02 * warm, 1 + 0.015 * warm, 1 - 0.09 * warm], 1)
    c.skin = ramp(tone * 0.97, SKIN) * cast
    c.fair = (1 - tone * 1.15).clamp(min=0.1)
    c.flush = torch.cat([torch.full_like(tone, 0.02), -0.26 * c.fair - 0.07, -0.22 * c.fair - 0.05], 1)
    c.redness = 0.5 + 0.9 * column("redness")

    red = smoothstep((column("hair_warmth") - 0.72) / 0.16) * smoothstep((1.02 - column("hair_darkness")) * 4)
    hair = torch.lerp(ramp(column("hair_darkness"), HAIR), ramp(column("hair_darkness"), RED_HAIR), red)
    onset = 38 + 30 * column("greying")
    c.grey = smoothstep((age - onset) / 26)
    grey = torch.tensor([0.80, 0.80, 0.82], device=age.device).square().reshape(1, 3, 1, 1)
    blond_child = (s.child * 0.35).clamp(max=1)
    c.hair = torch.lerp(hair * (1 + blond_child), grey.expand_as(hair), c.grey * 0.92)
    c.brow = torch.lerp(c.hair * 0.62, c.skin * 0.35, 0.22)
    c.beard_colour = c.hair * 0.72
    c.iris = ramp(column("eye_hue"), IRIS) * (0.75 + 0.6 * column("eye_lightness"))

    lips = torch.lerp(
        c.skin * torch.tensor([0.80, 0.42, 0.42], device=age.device).reshape(1, 3, 1, 1), c.skin, 0.12
    )
    pink = torch.tensor([0.97, 0.70, 0.74], device=age.device).reshape(1, 3, 1, 1)
    lips = torch.lerp(lips, lips * pink * 1.08, column("lip_colour"))
    stick = ramp(column("lipstick_hue"), ((0.86, 0.42, 0.52), (0.74, 0.10, 0.15), (0.42, 0.07, 0.20)))
    c.lips = torch.lerp(lips, stick, 0.85 * column("lipstick"))
    c.gloss = 0.25 + 0.5 * column("lipstick")
    shadow = ((0.32, 0.22, 0.20), (0.45, 0.25, 0.42), (0.25, 0.33, 0.52), (0.22, 0.42, 0.38))
    c.eye_shadow, c.eye_shadow_colour = column("eye_shadow"), ramp(column("eye_shadow_hue"), shadow)
    c.blush = column("blush")
    c.beard = column("beard") * smoothstep((age - 14) / 6)
    c.moustache = column("moustache") * smoothstep((age - 14) / 6)
    c.stubble = (s.male * 0.5).clamp(min=0) * (1 - s.child)

    azimuth, elevation = torch.deg2rad(column("light_azimuth")), torch.deg2rad(column("light_elevation"))
    c.light = (azimuth.sin() * elevation.cos(), -elevation.sin(), azimuth.cos() * elevation.cos())
    half = (c.light[0], c.light[1], c.light[2] + 1)
    length = (half[0] ** 2 + half[1] ** 2 + half[2] ** 2).clamp(min=1e-6).rsqrt()
    c.half = tuple(h * length for h in half)
    strength, exposure, warmth = column("light_strength"), column("exposure"), column("light_warmth")
    key = torch.cat([1 + 0.13 * warmth, 1 + 0.01 * warmth, 1 - 0.16 * warmth], 1)
    fill = torch.cat([1 - 0.05 * warmth, 1 + 0.0 * warmth, 1 + 0.07 * warmth], 1)
    c.strength = strength
    c.key = key * exposure.square() * 1.45 * strength
    c.fill = fill * exposure.square() * (1.02 - 0.72 * strength)
    c.phase = 40 * params.identity[:, :8].sum(1).reshape(-1, 1, 1, 1) + 1.7  # of skin and hair textures
    return c


def cover(distance: Tensor, px: float | Tensor) -> Tensor:
    """Share of a pixel covered, from a signed distance (negative inside): a ramp of one pixel."""
    return (distance * (-1 / px)).add_(0.5).clamp_(0, 1)


def bump(x: Tensor, y: Tensor, sx: float | Tensor, sy: float | Tensor) -> Tensor:
    """exp(-(x/sx)^2 - (y/sy)^2)."""
    y = y * (1 / sy)
    return bell((x * (1 / sx)).square_().addcmul_(y, y))


def illuminate(c: SimpleNamespace, normal: tuple[Tensor, Tensor, Tensor], wrap: Tensor | float) -> Tensor:
    """Light arriving on a surface: (B, 3, H, W). wrap > 0 lets it reach round the edge, as under skin."""
    nx, ny, nz = normal
    direct = (nx * c.light[0]).addcmul_(ny, c.light[1]).addcmul_(nz, c.light[2])
    if isinstance(wrap, float):
        direct = direct.mul_(1 / (1 + wrap)).add_(wrap / (1 + wrap)).clamp_(min=0) * c.key
    else:
        direct = (direct * (c.key / (1 + wrap))).add_(c.key * wrap / (1 + wrap)).clamp_(min=0)
    return direct.addcmul_((ny * -0.14).add_(nz, alpha=0.16).add_(0.80), c.fill)


def over(image: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    """image (B, 3, H, W), overwritten, with a colour over it at alpha (B, 1, H, W)."""
    return image.lerp_(colour, alpha)


def stamp(labels: Tensor, where: Tensor, name: str) -> Tensor:
    """labels (B, 1, H, W), class indices as floats, overwritten with a class where the float mask is 1."""
    return labels.lerp_(torch.tensor(float(LABEL[name]), device=labels.device), where)
