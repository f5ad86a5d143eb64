"""Hair of a procedural face, and the background."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.facelook import cover, illuminate, over, stamp, triple
from shared.faceparams import Params
from shared.faceshape import CHEEK_ROW, PIVOT, Frame, above, bell, smoothstep
from shared.facestyle import hair_lengths
from shared.facewindow import chosen


def fade(px: float, frequency: float) -> float:
    """1 where a sine of this frequency is well resolved, 0 where it would alias."""
    return min(max(2.0 - px * frequency, 0.0), 1.0)


def paint_background(params: Params, height: int, width: int) -> Tensor:
    """Gradient between the two background colours, with a soft pattern: linear (B, 3, H, W)."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1)

    device = params.identity.device
    y = ((torch.arange(height, device=device) + 0.5) * (2 / height) - 1).reshape(1, 1, -1, 1)
    x = ((torch.arange(width, device=device) + 0.5) * (2 / height) - width / height).reshape(1, 1, 1, -1)
    angle = torch.deg2rad(column("background_angle"))
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    t = along * 0.36 + 0.5
    pattern = column("background_pattern")
    patterned = pattern.flatten().nonzero()[:, 0]
    if len(patterned):
        p, q, turn, strength = (chosen(field, patterned) for field in (along, across, angle, pattern))
        blobs = (q * 2.3).sin_().mul_(1.5).add_(p, alpha=5.0).add_(turn).sin_()
        blobs = blobs.mul_((q.mul_(4.1).add_(2 * turn)).sin_())
        t.index_add_(0, patterned, smoothstep(blobs.mul_(1.6).add_(0.5)).mul_(0.45 * strength))
    first = triple(params, "background")
    return (t.clamp_(0, 1) * (triple(params, "background2") - first)).add_(first)


def hair_shape(params: Params, s: SimpleNamespace, c: SimpleNamespace) -> SimpleNamespace:
    """Numbers of the hair style, (B, 1, 1, 1)."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1)

    h = SimpleNamespace()
    age = column("age")
    male = column("masculinity")
    style = {name: value.reshape(-1, 1, 1, 1) for name, value in hair_lengths(params).items()}
    h.bald = loss = style["bald"]
    baby = smoothstep((4 - age) / 3)
    h.length = 0.10 + style["length"]
    h.long = smoothstep((h.length - 0.20) / 0.17)
    h.curl = smoothstep((column("hair_curl") - 0.55) / 0.35)
    volume = column("hair_volume") * (1 - 0.5 * s.old) * (1 - 0.8 * baby)
    h.top = (0.045 + 0.10 * volume + 0.06 * h.curl) * (1 - loss)
    h.sides = 0.022 + 0.035 * volume + 0.05 * h.curl + 0.035 * h.long
    h.line = -0.395 - 0.07 * (column("hairline") * 2 - 1) + 0.02 * male + 0.03 * s.child
    h.line = h.line - 0.05 * s.old * male - 0.62 * loss
    h.peak = 0.05 * (column("widow_peak") - 0.45).clamp(min=0) * (1 - loss)
    h.recede = 0.10 * (0.25 + column("hairline")) * male * smoothstep((age - 20) / 30)
    h.fringe = 0.25 * style["fringe_seen"]
    h.part = (column("parting") * 2 - 1) * 0.26
    h.sweep = 0.10 * smoothstep((0.60 - column("fringe")) * 5) * (1 - loss)
    h.burn = 0.02 + 0.10 * male + 1.6 * h.long  # lower end of the sideburns
    h.open = s.width * (0.90 + 0.02 * male)
    return h


def head_box(
    s: SimpleNamespace, h: SimpleNamespace, params: Params, px: float
) -> tuple[tuple[float, Tensor], tuple[Tensor, Tensor]]:
    """Rectangle of the upright face around head, hair and hat: its middle (u, v) and half its sides.

    px: size of a pixel in half heights.
    """
    hat = params["hat"].reshape(-1, 1, 1, 1).round()
    worn, brimmed = (hat > 0.5).float(), (hat > 1.5).float()
    wide = 1.05 * (s.width + h.sides + (0.010 + 0.03 * h.curl) * h.long + 0.016 * h.curl)
    brim = 1 + brimmed * (0.55 + px / s.scale / 0.08)  # its soft edge is broad at the sides
    wide = torch.maximum(wide, worn * (s.width + 0.055 + 0.6 * h.sides) * brim)
    # rows of the head, seen from above or below (heights over the plane of the picture from 0 to 0.4)
    top = PIVOT + (s.top - torch.maximum(h.top, 0.15 * worn) - PIVOT) * s.cos_pitch
    top = top - 0.15 * s.sin_pitch.clamp(min=0)
    low = PIVOT + (torch.maximum(h.length + 0.03, s.chin_open) - PIVOT) * s.cos_pitch
    low = low + 0.4 * (-s.sin_pitch).clamp(min=0)
    return (0.0, 0.5 * (top + low)), (wide + 0.1 * s.sin_yaw.abs() + 0.02, 0.5 * (low - top) + 0.03)


def strands(
    f: Frame, s: SimpleNamespace, h: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor
) -> Tensor:
    """Light and dark of strands that fan out from the parting, about -1 .. 1."""
    fan = (x - h.part * 0.8).div_((y - s.top).clamp_(0, 0.9).mul_(0.75).add_(0.42))
    wave = (y * 15).add_(fan, alpha=7).add_(c.phase).sin_().mul_(h.curl * 0.11)
    wave.add_((y * 7).add_(c.phase).sin_(), alpha=0.012)
    p = fan + wave

    def wavy(p_: float, amount: float, y_: float, phase: Tensor) -> Tensor:
        return (y * y_).add_(phase).sin_().mul_(amount).add_(p, alpha=p_)

    out = wavy(23, 2, 3.1, c.phase).add_(c.phase).sin_().mul_(0.42)
    for size, frequency, p_, amount, y_, phase in (
        (0.36, 30, 51, 2.6, 4.7, 2),
        (0.34, 70, 117, 3.3, 6.1, 3),
        (0.30, 160, 263, 4.0, 9.3, 1),
    ):
        seen = fade(f.px, frequency)
        if seen > 0:
            out.add_(wavy(p_, amount, y_, phase * c.phase).sin_(), alpha=size * seen)
    curly = h.curl.flatten().nonzero()[:, 0]
    if len(curly):
        fan, wave, y = (chosen(field, curly) for field in (fan, wave, y))
        curls = (fan * 25).add_(wave, alpha=27).sin_().mul_(y.mul_(24).add_(fan, alpha=5).sin_())
        out.index_add_(0, curly, curls.mul_(h.curl[curly] * 0.5))
    return out


def hair_field(f: Frame, s: SimpleNamespace, h: SimpleNamespace, c: SimpleNamespace) -> SimpleNamespace:
    """Distances of the outline of the hair and of its opening for the face, texture, colour and normals."""
    base = f.u * (1 / s.rho)
    y = f.y
    # outline: skull plus volume above the cheek row; below it hanging sides
    wide = (y * 19).add_(c.phase).add_(base.sign(), alpha=3).sin_().mul_((0.010 + 0.03 * h.curl) * h.long)
    wide.add_((f.u * 26).add_(y, alpha=21).add_(c.phase).sin_().mul_(h.curl * 0.016)).add_(s.width + h.sides)
    wide2 = wide.square_()
    low = above(y, CHEEK_ROW)
    high = 1 - low
    inverse = 1 / (s.top - h.top - CHEEK_ROW)
    hang = y - CHEEK_ROW
    t = hang * inverse
    t2 = (t * t).mul_(high)
    hang.mul_(low)
    # 1 + (0.20 long - 0.9 (1 - long)) hang - 0.22 long hang^2
    flare = (hang * (-0.22 * h.long)).add_(1.10 * h.long - 0.9).mul_(hang).add_(1)
    area = (t2 * 0.42).add_(1).mul_(1 - t2).mul_(wide2).mul_(flare.clamp_(min=0.1).square_())
    slope = t.mul_(wide2).mul_(high).mul_(-2.5 * inverse.abs())
    level = base.square().sub_(area)
    steep = (base * 2).square_().addcmul_(slope, slope).add_(1e-3).rsqrt_()
    tips = (f.u * 31).add_(c.phase).sin_().mul_((f.u * 17).sin_()).mul_(0.030 * h.long).add_(h.length)
    outline = torch.maximum(level.mul_(steep), y - tips)
    # opening for the face, on the surface of the head
    beyond = base.abs().sub_(area.clamp_(min=1e-4).sqrt_()).add_(h.sides + 0.01).clamp_(min=0)
    beyond.mul_(1 - t2)
    ax = f.x.abs().add_(beyond)
    q = (ax * (1 / h.open)).square_()
    q3 = (q * q).mul_(q)
    line = bell(((f.x - h.part) * (1 / 0.24)).square_()).mul_(-h.sweep).add_(0.6 * h.sweep + h.line)
    line.add_((f.x * 9).add_(c.phase).sin_().mul_(0.28 * h.fringe)).add_(0.72 * h.fringe)
    jag = 0.014 + 0.03 * h.fringe
    rough = (f.x * 11).add_(c.phase).sin_().mul_(6).add_(f.x, alpha=57).sin_()
    line.add_(rough.mul_(jag * (fade(f.px, 30) * (1 - 0.5 * h.bald))))
    line.add_(bell((f.x * (1 / 0.07)).square_()).mul_(h.peak))
    line.sub_(bell((ax - 0.27).mul_(1 / 0.10).square_()).mul_(h.recede * (1 - 2 * h.fringe)))
    drop = 0.55 - line
    steep = (drop * q3).div_(ax.clamp_(min=0.05)).mul_(6).square_().add_(1).rsqrt_()
    opening = (y - line).sub_(drop.mul_(q3)).mul_(steep)
    opening = torch.maximum(opening, (y - h.burn).mul_(0.8))
    texture = strands(f, s, h, c, beyond.mul_(f.x.sign()).add_(f.x), y)
    nx = (base * (1 / (s.width + h.sides))).clamp_(-1, 1)
    ny = (y + 0.12).mul_(1 / 0.72).clamp_(-1, 1).mul_(0.85)
    nz = (1 - nx * nx).sub_(ny * ny).clamp_(min=0.02).sqrt_()
    n = SimpleNamespace(nx=nx, ny=ny, nz=nz, base=base)
    colour = shade_hair(c, texture, n)
    return SimpleNamespace(outline=outline, opening=opening, texture=texture, colour=colour, n=n)


def shade_hair(c: SimpleNamespace, texture: Tensor, n: SimpleNamespace) -> Tensor:
    light = illuminate(c, (n.nx, n.ny, n.nz), 0.2)
    band = (n.ny + 0.42).add_(texture, alpha=0.05)
    ring = bell(band.mul_(1 / 0.20).square_()).mul_(n.nz)
    shine = (texture * 0.55).add_(0.45).clamp_(min=0).mul_(ring)
    gloss = (0.11 + 0.55 * c.hair) * c.key * 0.35
    dark = (texture * 0.42).add_(0.80).clamp_(min=0.12)
    return light.mul_(c.hair).mul_(dark).addcmul_(shine, gloss)


def paint_back_hair(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, hair: SimpleNamespace
) -> tuple[Tensor, Tensor]:
    """Hair behind the head."""
    back = cover(hair.outline + 0.02, f.px / s.scale)
    return over(image, hair.colour * 0.42, back), stamp(labels, above(back, 0.5), "hair")


def paint_hair(
    image: Tensor,
    labels: Tensor,
    f: Frame,
    s: SimpleNamespace,
    h: SimpleNamespace,
    c: SimpleNamespace,
    hair: SimpleNamespace,
) -> tuple[Tensor, Tensor]:
    """Hair in front of the head, with its shadow on the forehead."""
    opening = hair.opening
    ragged = opening.add(hair.texture, alpha=0.010 * (0.4 + fade(f.px, 40)))
    front = cover(torch.maximum(hair.outline, ragged), (f.px / s.scale).clamp(min=0.010))
    shadow = smoothstep((opening * (-1 / (0.05 + 0.05 * c.strength))).add_(1))
    shadow.mul_(above(-f.distance, 0)).mul_(above(opening, -0.02)).mul_(-0.30 * (1 - h.bald)).add_(1)
    return over(image.mul_(shadow), hair.colour, front), stamp(labels, above(front, 0.5), "hair")
