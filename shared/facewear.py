"""Neck, clothes and ears of a procedural face, and what it wears: jewellery, glasses, hats."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shared.facehair import fade
from shared.facelook import bump, cover, illuminate, over, stamp, triple
from shared.faceparams import Params
from shared.faceshape import CHEEK_ROW, Frame, Place, above, bell, root, smoothstep, upright
from shared.facewindow import Window, chosen, spans

PIVOT_EAR = 0.085  # row of the middle of the ears


def paint_body(image: Tensor, labels: Tensor, s: SimpleNamespace, c: SimpleNamespace, params: Params) -> None:
    """Neck, clothes and ears, each in a window around it."""
    height, width = image.shape[2:]

    def part(
        paint: Callable[..., None], u: Tensor | float, du: Tensor | float, v: tuple, *about: Any
    ) -> None:
        """Paints the places within du of column u and between two rows of the upright face."""
        middle, reach = (u, 0.5 * (v[0] + v[1])), (du, 0.5 * (v[1] - v[0]))
        window = Window(height, width, spans(s, height, width, middle, reach))
        cut = [window.take(t) for t in (image, labels)]
        place = Place(px, *upright(s, window.rows, window.columns, height, width))
        paint(*cut, place, s, c, params, *about)
        window.put(image, cut[0])
        window.put(labels, cut[1])

    px = 2 / height
    # the lowest row of the face that the picture shows
    corner = (1 - s.shift_y) * s.cos_roll + (width / height + s.shift_x.abs()) * s.sin_roll.abs()
    bottom = (corner / s.scale).clamp(min=0.7)
    part(paint_neck, 0.0, 0.46 + 1.6 * (bottom - 0.68).square(), (0.2, bottom))
    part(paint_clothes, 0.0, 1.02, (0.68, bottom))
    # each ear stands at the side of the head, a little behind its middle; turned to the viewer it is seen
    # broader
    margin = 2 * px / s.scale
    rings = (0.09 * (params["earrings"] > 0)).reshape(-1, 1, 1, 1)
    for turn in (-1, 1):
        place = s.width * s.cos_yaw - 0.06 * turn * s.sin_yaw + 0.6 * s.ear_out
        broad = s.ear_out + 0.035 + 0.07 * (-turn * s.sin_yaw).clamp(min=0)
        middle = PIVOT_EAR + 0.05 * s.sin_pitch
        rows = (middle - 0.15 * s.ear - margin, middle + 0.15 * s.ear + rings + margin)
        part(paint_ear, turn * place, 1.35 * broad + margin, rows, turn, place, broad)


def paint_neck(
    image: Tensor, labels: Tensor, f: Place, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> None:
    """A cylinder behind the chin, and a necklace."""
    px = f.px / s.scale
    u = f.u - 0.10 * s.sin_yaw
    v, width = f.v, u.abs()
    rise = s.chin - 0.60
    half = 0.235 + 0.035 * s.male - 0.055 * s.child + 0.5 * (s.width - 0.47)
    half = (v - (0.74 + rise)).clamp_(min=0).square_().mul_(1.6).add_(half)
    inside = width - half
    neck = cover(torch.maximum(inside, 0.1 - v), px)
    inverse = half.reciprocal()
    side = (u * inverse).mul_(1 / 1.06).clamp_(-1, 1)
    nz = (1 - side * side).clamp_(min=0.05).sqrt_()
    light = illuminate(c, (side, torch.full_like(u, 0.15), nz), 0.25)
    # shadow of the chin, tendons of the neck, folds of age
    shade = chin_shadow(f, s, c).mul_(-0.62).add_(1)
    tendon = bell((width + 0.22 * (v - 0.6)).sub_(0.13).mul_(1 / 0.03).square_()).mul_(0.10)
    folds = (u * u).mul_(9).add_(v, alpha=70).cos_().mul_(0.05).add_(0.05).mul_(s.old)
    folds.mul_(smoothstep((0.24 - width).mul_(1 / 0.1)))
    shade.mul_((1 - tendon).sub_(folds))
    over(image, (light * (c.skin * (1 - 0.04 * s.old))).mul_(shade), neck)
    stamp(labels, above(neck, 0.5), "neck")
    hung = (params["necklace"] > 0).nonzero()[:, 0]
    if len(hung):
        fields = (image, labels, u, v, light, inverse, inside, rise, px)
        image[hung], labels[hung] = paint_necklace(f.px, *(chosen(field, hung) for field in fields))


def paint_necklace(
    pixel: float,
    image: Tensor,
    labels: Tensor,
    u: Tensor,
    v: Tensor,
    light: Tensor,
    inverse: Tensor,
    inside: Tensor,
    rise: Tensor,
    px: Tensor,
) -> tuple[Tensor, Tensor]:
    """A chain with a pendant; inverse: one over half the width of the neck, inside: distance to its edge."""
    row = v - (0.80 + rise)
    chain = row.sub_((u * inverse).square_().mul_(-0.05).add_(0.05)).abs_().sub_(0.011)
    pendant = root(u.square().add_((v - (0.875 + rise)).square_())).sub_(0.022)
    chain = cover(torch.minimum(torch.maximum(chain, inside), pendant), px)
    beads = (u * 120).sin_().mul_(0.25 * fade(pixel, 60)).add_(0.75)
    gold = torch.tensor([0.72, 0.52, 0.20], device=u.device).reshape(1, 3, 1, 1)
    return over(image, light.mul_(gold).mul_(beads), chain), stamp(labels, above(chain, 0.5), "neck_l")


def chin_shadow(f: Place, s: SimpleNamespace, c: SimpleNamespace) -> Tensor:
    """Shadow of the chin on neck and clothes, 0 .. 1."""
    edge = s.chin_open - s.jut * s.sin_pitch + 0.17
    across = (f.u + 0.12 * c.light[0]).square_()
    return smoothstep(across.mul_(0.45).sub_(f.v).add_(edge).mul_(1 / 0.17))


def paint_clothes(
    image: Tensor, labels: Tensor, f: Place, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> None:
    """Shoulders with a collar."""
    px = f.px / s.scale
    u, v = f.u - 0.10 * s.sin_yaw, f.v
    width = u.abs()
    rise = s.chin - 0.60
    wide = 0.86 - 0.16 * s.child + 0.05 * s.male
    shoulder = width * (1 / wide)
    shoulder = (shoulder * shoulder).mul_(shoulder).mul_(0.20).add_(0.83 + rise)
    collar = 0.10 * params["collar"].reshape(-1, 1, 1, 1)
    neckline = (u * (1 / 0.36)).square_().mul_(-0.09).add_(0.88 + rise + collar)
    neckline.addcmul_(width, collar, value=-1 / 0.3)
    neckline = shoulder.lerp(neckline, above(-width, -0.33))
    top = shoulder.addcmul_(bell((width - 0.30).mul_(1 / 0.10).square_()), torch.full_like(wide, -0.055))
    below = neckline.sub_(v)
    cloth = cover(torch.maximum(torch.maximum(top.sub_(v), below), width - wide), px)
    fold = (v * 7).add_(c.phase).sin_().mul_(2).add_(u, alpha=11).add_(v, alpha=6).sin_().mul_(0.09)
    normal = ((u * 0.9).clamp_(-0.8, 0.8), torch.full_like(u, -0.25), torch.full_like(u, 0.8))
    light = illuminate(c, normal, 0.1)
    hem = bell(below.add_(0.025).mul_(1 / 0.008).square_()).mul_(above(-width, -0.4))
    shade = fold.add_(hem, alpha=-0.25).add_(1).mul_(chin_shadow(f, s, c).mul_(-0.25).add_(1))
    over(image, light.mul_(triple(params, "cloth")).mul_(shade), cloth)
    stamp(labels, above(cloth, 0.5), "cloth")


def paint_ear(
    image: Tensor,
    labels: Tensor,
    f: Place,
    s: SimpleNamespace,
    c: SimpleNamespace,
    params: Params,
    turn: int,
    place: Tensor,
    broad: Tensor,
) -> None:
    """The ear on one side of the picture (turn -1: left), at a distance from the head's middle."""
    px = f.px / s.scale
    ex = (f.u * turn).sub_(place)
    ey = (f.v - (PIVOT_EAR + 0.05 * s.sin_pitch)).mul_(1 / s.ear)
    taper = (ey * (1 / 0.15)).clamp_(-1, 1).mul_(-0.35).add_(1)
    r = (ex / taper.mul_(broad)).square_().add_((ey * (1 / 0.150)).square_()).clamp_(min=1e-4).sqrt_()
    ear = cover((r - 1).mul_(broad), px)
    inner = bump(ex - 0.1 * broad, ey - 0.005, 0.55 * broad, 0.075)
    rim = bell(r.sub_(0.72).mul_(1 / 0.14).square_())
    lobe = bump(ex, ey - 0.115, 0.05, 0.04)
    nx = (ex * (0.3 * turn / broad)).add_(0.55 * turn)
    light = illuminate(c, (nx, ey * 1.5, torch.full_like(ex, 0.75)), 0.35)
    blood = lobe.mul_(0.5).add_(rim, alpha=0.3).add_(0.45)
    colour = (blood * (c.flush * c.redness)).add_(1).mul_(c.skin).mul_(light)
    over(image, colour.mul_(rim.mul_(-0.6).add_(1).mul_(inner).mul_(-0.48).add_(1)), ear)
    stamp(labels, above(ear, 0.5), "l_ear" if turn < 0 else "r_ear")
    worn = (params["earrings"] > 0).nonzero()[:, 0]
    if len(worn):
        size = params["earrings"][worn].reshape(-1, 1, 1, 1)
        row = chosen(f.v, worn) - (PIVOT_EAR + 0.150 * s.ear[worn])
        fields = (chosen(t, worn) for t in (image, labels, ex, light, px))
        image[worn], labels[worn] = paint_earring(size, row, *fields)


def paint_earring(
    size: Tensor, row: Tensor, image: Tensor, labels: Tensor, ex: Tensor, light: Tensor, px: Tensor
) -> tuple[Tensor, Tensor]:
    """A small disc, or a hoop where size > 0.6; row and ex: from the lower end of the ear."""
    radius = 0.014 + 0.030 * size
    row = row.sub_(radius * 0.8)
    disc = ex.square().add_(row.square()).clamp_(min=1e-6).sqrt_().sub_(radius * 0.8)
    hoop = cover(torch.where(size > 0.6, disc.abs() - 0.010, disc), px)
    gold = torch.tensor([0.80, 0.60, 0.26], device=ex.device).reshape(1, 3, 1, 1)
    sparkle = 0.7 + 0.6 * bump(ex + 0.3 * radius, row + 0.4 * radius, 0.6 * radius, 0.6 * radius)
    return over(image, light.mul_(gold).mul_(sparkle), hoop), stamp(labels, above(hoop, 0.5), "ear_r")


def paint_glasses(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Thin or thick frames or sunglasses; the label covers lenses and frame."""
    kind = params["glasses"].reshape(-1, 1, 1, 1).round()
    thick, sun = (kind > 1.5).float(), (kind > 2.5).float()
    px = f.px / s.scale
    x, y = f.x.abs(), f.y - (s.eye_y + 0.022)
    gx, gy = x - (s.eye_x + 0.006), y
    rx, ry = 0.158 + 0.008 * sun, 0.112 + 0.016 * sun - 0.012 * thick
    qx, qy = (gx * (1 / rx)).square_(), (gy * (1 / ry)).square_()
    r = (qx * qx).addcmul_(qy, qy).addcmul_(qx, qy, value=0.9).clamp_(min=1e-6).sqrt_().sqrt_()
    lens = r.sub_(1).mul_(ry)
    rim = 0.0085 + 0.0105 * thick + 0.004 * sun
    ring = lens.abs() - rim
    bridge = (y + 0.035).sub_((0.06 - x).clamp_(min=0), alpha=0.10).abs_().sub_(rim)
    bridge = torch.maximum(bridge, x - 0.058)
    temple = torch.maximum((y + 0.040).abs_().sub_(rim), s.eye_x + 0.006 + rx * 0.93 - x)
    temple = torch.maximum(temple, f.distance)
    # Beyond the silhouette of a turned head the surface coordinates stand still: nothing is drawn there.
    edge = f.distance - 0.015
    drawn = torch.maximum(torch.minimum(torch.minimum(ring, bridge), temple), edge)
    frame_ = cover(drawn, px.clamp(min=0.008))
    glass = cover(torch.maximum(lens, edge), px)
    dark = torch.tensor([0.012, 0.012, 0.016], device=x.device).reshape(1, 3, 1, 1)
    tint = (smoothstep((gy * -5).add_(0.4)) * (0.04 * c.fill)).add_(dark)
    streak = (gy * 0.8).add_(gx).add_(0.02).abs_().sub_(0.018)
    streak = smoothstep(streak.mul_(-1 / 0.012).add_(1)).mul_(above(-gy, -0.05))
    image.mul_((glass * -0.06).add_(1))
    over(image, tint, glass * (0.93 * sun))
    image.add_(streak.mul_(glass) * (c.key * (0.035 + 0.05 * sun)))
    # soft shadow of the frame, then the frame
    soft = cover(lens.sub_(0.03), 0.06).mul_(1 - glass).mul_(cover(f.distance, px))
    image.mul_(soft.mul_(-0.16).add_(1))
    tone = c.phase.sin() * 0.5 + 0.5
    colour = torch.cat([0.03 + 0.10 * tone, 0.025 + 0.05 * tone, 0.025 + 0.02 * tone], 1) + 0.10 * (1 - thick)
    gleam = smoothstep(gy * -8).mul_(0.5).add_(0.6)
    over(image, gleam * (colour * (0.4 + c.key * 0.6)), frame_)
    return image, stamp(labels, above(torch.maximum(frame_, glass), 0.5), "eye_g")


def paint_hat(
    image: Tensor,
    labels: Tensor,
    f: Frame,
    s: SimpleNamespace,
    h: SimpleNamespace,
    c: SimpleNamespace,
    params: Params,
    n: SimpleNamespace,
) -> tuple[Tensor, Tensor]:
    """Beanie, or hat with a brim."""
    kind = params["hat"].reshape(-1, 1, 1, 1).round()
    brimmed = (kind > 1.5).float()
    px = f.px / s.scale
    base, y = n.base, f.y
    top = s.top - 0.10 - 0.05 * brimmed
    wide = s.width + 0.055 + 0.6 * h.sides
    edge = -0.335 + 0.035 * brimmed - 0.02 * s.child
    t = (y - CHEEK_ROW).mul_(1 / (top - CHEEK_ROW)).clamp_(0, 1.2)
    t2 = t * t
    square = base * base
    area = (t2 * t2).neg_().add_(1).mul_(wide.square())
    slope = t2.mul_(t).mul_(4 * wide.square())
    dome = (square - area).mul_((square * 4).addcmul_(slope, slope).add_(0.08).rsqrt_())
    lower = (y - edge).sub_(square * (0.06 * (1 - brimmed) / wide.square()))
    crown = torch.maximum(dome, lower)
    brim_y = (square * 0.05).add_(y).sub_(edge - 0.01)
    brim = (brim_y * (1 / 0.065)).square_().add_(square.mul_(1 / (wide * 1.55).square()))
    brim = brim.clamp_(min=1e-5).sqrt_().sub_(1).mul_(0.065).add_(1 - brimmed)
    shadow = smoothstep((lower * (-1 / 0.14)).add_(1)).mul_(above(lower, 0)).mul_(cover(f.distance, px))
    image.mul_(shadow.mul_(-(0.30 + 0.25 * brimmed)).add_(1))
    light = illuminate(c, (n.nx, n.ny - 0.1, n.nz), 0.1)
    band = smoothstep(lower.add_(0.10).mul_(1 / 0.015))
    knit = (f.x * 85).sin_().mul_((0.10 * fade(f.px, 45)) * (1 - brimmed))
    knit.add_((y * 70).sin_().mul_(1 - band), alpha=0.05).add_(band.mul_(0.18 - 0.65 * brimmed)).add_(1)
    light.mul_(triple(params, "hat"))
    alpha = cover(crown, px)
    over(image, light * knit, alpha)
    brim_alpha = cover(brim, px)
    over(image, light.mul_(brim_y.mul_(-3.0).add_(0.85).clamp_(0.5, 1.3)), brim_alpha)
    return image, stamp(labels, above(torch.maximum(alpha, brim_alpha), 0.5), "hat")
