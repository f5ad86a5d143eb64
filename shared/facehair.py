"""Hair, hats and what surrounds the head of a procedural face: background, neck, clothes, ears, glasses,
jewellery."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.facelook import LABEL, bump, cover, illuminate, over, triple
from shared.faceparams import Params
from shared.faceshape import CHEEK_ROW, Frame, bell, smoothstep
from shared.facestyle import hair_lengths
from shared.facewindow import Window


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
    t = 0.5 + 0.36 * along
    blobs = torch.sin(5.0 * along + angle + 1.5 * torch.sin(2.3 * across)) * torch.sin(
        4.1 * across + 2 * angle
    )
    t = (t + 0.45 * column("background_pattern") * smoothstep(0.5 + 1.6 * blobs)).clamp(0, 1)
    return torch.lerp(triple(params, "background"), triple(params, "background2"), t)


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


def strands(
    f: Frame, s: SimpleNamespace, h: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor
) -> Tensor:
    """Light and dark of strands that fan out from the parting, about -1 .. 1."""
    fan = (x - h.part * 0.8) / (0.42 + (y - s.top).clamp(0, 0.9) * 0.75)
    wave = h.curl * 0.11 * torch.sin(15 * y + 7 * fan + c.phase) + 0.012 * torch.sin(7 * y + c.phase)
    p = fan + wave
    out = 0.42 * torch.sin(23 * p + 2 * torch.sin(3.1 * y + c.phase) + c.phase)
    out = out + 0.36 * fade(f.px, 30) * torch.sin(51 * p + 2.6 * torch.sin(4.7 * y + 2 * c.phase))
    if f.px < 2 / 70:
        out = out + 0.34 * fade(f.px, 70) * torch.sin(117 * p + 3.3 * torch.sin(6.1 * y + 3 * c.phase))
    if f.px < 1 / 64:
        out = out + 0.30 * fade(f.px, 160) * torch.sin(263 * p + 4 * torch.sin(9.3 * y + c.phase))
    return out + h.curl * 0.5 * torch.sin(25 * fan + 3 * wave * 9) * torch.sin(24 * y + 5 * fan)


def hair_field(f: Frame, s: SimpleNamespace, h: SimpleNamespace, c: SimpleNamespace) -> SimpleNamespace:
    """Distances of the outline of the hair and of its opening for the face, texture, colour and normals."""
    zc = 0.0
    base = (f.u - zc) / s.rho
    y = f.y
    # outline: skull plus volume above the cheek row; below it hanging sides
    ripple = (0.010 + 0.03 * h.curl) * torch.sin(19 * y + c.phase + 3 * torch.sign(base)) * h.long
    ripple = ripple + h.curl * 0.016 * torch.sin(26 * f.u + 21 * y + c.phase)
    wide = s.width + h.sides + ripple
    low = (y > CHEEK_ROW).to(y.dtype)
    t = (y - CHEEK_ROW) / (s.top - h.top - CHEEK_ROW)
    t2 = t * t * (1 - low)
    hang = (y - CHEEK_ROW) * low
    flare = 1 + (0.20 * h.long - 0.9 * (1 - h.long)) * hang - 0.22 * h.long * hang * hang
    area = wide.square() * (1 - t2) * (1 + 0.42 * t2) * flare.clamp(min=0.1).square()
    slope = -2 * t * wide.square() * (1 - low) * 1.25 / (s.top - h.top - CHEEK_ROW).abs()
    level = base.square() - area
    outline = level / ((2 * base).square() + slope.square() + 1e-3).sqrt()
    tips = 0.030 * torch.sin(31 * f.u + c.phase) * torch.sin(17 * f.u) * h.long
    outline = torch.maximum(outline, y - h.length - tips)
    # opening for the face, on the surface of the head
    beyond = (base.abs() - area.clamp(min=1e-4).sqrt() + h.sides + 0.01).clamp(min=0) * (1 - t2)
    ax = f.x.abs() + beyond
    q = (ax / h.open).square()
    q3 = q * q * q
    from_part = f.x - h.part
    swept = h.sweep * (1 - bell((from_part / 0.24).square())) - 0.4 * h.sweep
    combed = h.fringe * (0.72 + 0.28 * torch.sin(9 * f.x + c.phase))
    jag = (0.014 + 0.03 * h.fringe) * torch.sin(57 * f.x + 6 * torch.sin(11 * f.x + c.phase)) * fade(f.px, 30)
    line = h.line + swept + combed + jag * (1 - 0.5 * h.bald)
    line = line + h.peak * bell((f.x / 0.07).square())
    line = line - h.recede * bell(((ax - 0.27) / 0.10).square()) * (1 - 2 * h.fringe)
    drop = 0.55 - line
    steep = 1 + (6 * drop * q3 / ax.clamp(min=0.05)).square()
    opening = (y - line - drop * q3) / steep.sqrt()
    opening = torch.maximum(opening, (y - h.burn) * 0.8)
    texture = strands(f, s, h, c, f.x + beyond * f.x.sign(), y)
    nx = (base / (s.width + h.sides)).clamp(-1, 1)
    ny = ((y + 0.12) / 0.72).clamp(-1, 1) * 0.85
    nz = (1 - nx * nx - ny * ny).clamp(min=0.02).sqrt()
    n = SimpleNamespace(nx=nx, ny=ny, nz=nz, base=base)
    colour = shade_hair(c, texture, n)
    return SimpleNamespace(outline=outline, opening=opening, texture=texture, colour=colour, n=n)


def shade_hair(c: SimpleNamespace, texture: Tensor, n: SimpleNamespace) -> Tensor:
    light = illuminate(c, (n.nx, n.ny, n.nz), 0.2)
    band = n.ny + 0.42 + 0.05 * texture
    ring = bell((band / 0.20).square()) * n.nz.clamp(min=0)
    shine = ring * (0.45 + 0.55 * texture).clamp(min=0)
    gloss = (0.11 + 0.55 * c.hair) * c.key * 0.35
    return light.mul_(c.hair).mul_((0.80 + 0.42 * texture).clamp(min=0.12)).addcmul_(shine, gloss)


def paint_behind(
    image: Tensor,
    labels: Tensor,
    f: Frame,
    s: SimpleNamespace,
    h: SimpleNamespace,
    c: SimpleNamespace,
    hair: SimpleNamespace,
    params: Params,
) -> tuple[Tensor, Tensor]:
    """Hair behind the head, neck, clothes and ears."""
    px = f.px / s.scale
    back = cover(hair.outline + 0.02, px)
    image = over(image, hair.colour * 0.42, back)
    labels.masked_fill_(back > 0.5, LABEL["hair"])
    width = f.u.abs()
    for paint, place in (
        (paint_neck, (f.v > 0.2) & (width < 0.46 + 1.6 * (f.v - 0.68).clamp_(min=0).square_())),
        (paint_clothes, (f.v > 0.68) & (width < 1.02)),
        (paint_ears, (f.v - PIVOT_EAR).abs().lt(0.34) & (width > 0.2) & (width < 0.75)),
    ):
        window = Window(place)
        part = paint(window.take(image), window.take(labels), window.view(f), s, c, params)
        window.put(image, part[0])
        window.put(labels, part[1])
    return image, labels


def paint_neck(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """A cylinder behind the chin, and a necklace."""
    px = f.px / s.scale
    u = f.u - 0.10 * s.sin_yaw
    v = f.v
    rise = s.chin - 0.60
    half = 0.235 + 0.035 * s.male - 0.055 * s.child + 0.5 * (s.width - 0.47)
    widen = (v - 0.74 - rise).clamp(min=0)
    half = half + 1.6 * widen * widen
    neck = cover(torch.maximum(u.abs() - half, 0.1 - v), px)
    side = (u / (half * 1.06)).clamp(-1, 1)
    nz = (1 - side * side).clamp(min=0.05).sqrt()
    light = illuminate(c, (side, 0.15, nz), 0.25)
    # shadow of the chin, tendons of the neck, folds of age
    shade = chin_shadow(f, s, c)
    tendon = bell(((u.abs() - 0.13 + 0.22 * (v - 0.6)) / 0.03).square()) * 0.10
    folds = 0.10 * s.old * (0.5 + 0.5 * torch.cos(v * 70 + 9 * u * u)) * smoothstep((0.24 - u.abs()) / 0.1)
    skin = c.skin * (1 - 0.04 * s.old)
    image = over(image, skin * light * ((1 - 0.62 * shade) * (1 - tendon - folds)), neck)
    labels = labels.masked_fill(neck > 0.5, LABEL["neck"])
    # necklace: a chain hanging on the neck
    chain_y = 0.80 + rise + 0.05 * (1 - (u / half).square())
    beads = 0.75 + 0.25 * torch.sin(u * 120) * fade(f.px, 60)
    chain = torch.maximum((v - chain_y).abs() - 0.011, u.abs() - half)
    pendant = (u.square() + (v - 0.875 - rise).square()).sqrt() - 0.022
    chain = cover(torch.minimum(chain, pendant), px) * (params["necklace"] > 0).float().reshape(-1, 1, 1, 1)
    gold = torch.tensor([0.72, 0.52, 0.20], device=u.device).reshape(1, 3, 1, 1)
    image = over(image, gold * light * beads, chain)
    labels = labels.masked_fill(chain > 0.5, LABEL["neck_l"])

    return image, labels


def chin_shadow(f: Frame, s: SimpleNamespace, c: SimpleNamespace) -> Tensor:
    """Shadow of the chin on neck and clothes, 0 .. 1."""
    edge = s.chin_open - s.jut * s.sin_pitch
    return smoothstep((edge + 0.17 - f.v + 0.45 * (f.u + 0.12 * c.light[0]).square()) / 0.17)


def paint_clothes(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Shoulders with a collar."""
    px = f.px / s.scale
    u, v = f.u - 0.10 * s.sin_yaw, f.v
    rise = s.chin - 0.60
    wide = 0.86 - 0.16 * s.child + 0.05 * s.male
    shoulder = 0.83 + rise + 0.20 * (u.abs() / wide).square() * (u.abs() / wide)
    neckline = (
        0.79
        + rise
        + params["collar"].reshape(-1, 1, 1, 1) * 0.10 * (1 - u.abs() / 0.3)
        + 0.09 * (1 - (u / 0.36).square())
    )
    neckline = torch.where(u.abs() < 0.33, neckline, shoulder)
    top = torch.maximum(shoulder - 0.055 * bell(((u.abs() - 0.30) / 0.10).square()) - v, neckline - v)
    cloth = cover(torch.maximum(top, u.abs() - wide), px)
    fold = torch.sin(11 * u + 6 * v + 2 * torch.sin(7 * v + c.phase)) * 0.09
    light = illuminate(
        c, ((u * 0.9).clamp(-0.8, 0.8), torch.full_like(u, -0.25), torch.full_like(u, 0.8)), 0.1
    )
    hem = bell(((v - neckline - 0.025) / 0.008).square()) * (u.abs() < 0.4).float() * 0.25
    colour = triple(params, "cloth") * (1 + fold - hem)
    image = over(image, colour * light * (1 - 0.25 * chin_shadow(f, s, c)), cloth)
    return image, labels.masked_fill(cloth > 0.5, LABEL["cloth"])


def paint_ears(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    px = f.px / s.scale
    turn = torch.sign(f.u)
    # each ear stands at the side of the head, a little behind its middle; turned to the viewer it is seen
    # broader
    place = s.width * s.cos_yaw + 0.06 * turn * s.sin_yaw * -1
    ex = f.u.abs() - place - s.ear_out * 0.6
    ey = (f.v - PIVOT_EAR - 0.05 * s.sin_pitch) / s.ear
    broad = (s.ear_out + 0.035) * (1 + 0.0 * s.sin_yaw) + 0.07 * (-turn * s.sin_yaw).clamp(min=0)
    taper = 1 - 0.35 * (ey / 0.15).clamp(-1, 1)
    r = ((ex / (broad * taper)).square() + (ey / 0.150).square()).clamp(min=1e-4).sqrt()
    ear = cover((r - 1) * broad, px)
    inner = bump(ex - 0.1 * broad, ey - 0.005, 0.55 * broad, 0.075)
    rim = bell(((r - 0.72) / 0.14).square())
    lobe = bump(ex, ey - 0.115, 0.05, 0.04)
    nx = turn * 0.55 + 0.3 * ex / broad * turn
    light = illuminate(c, (nx, ey * 1.5, torch.full_like(ex, 0.75)), 0.35)
    colour = c.skin * (1 + c.flush * (0.45 + 0.5 * lobe + 0.3 * rim) * c.redness)
    image = over(image, colour * light * (1 - 0.48 * inner * (1 - 0.6 * rim)), ear)
    labels = labels.masked_fill((ear > 0.5) & (f.u < 0), LABEL["l_ear"])
    labels = labels.masked_fill((ear > 0.5) & (f.u >= 0), LABEL["r_ear"])
    size = params["earrings"].reshape(-1, 1, 1, 1)
    worn = (size > 0).float()
    radius = 0.014 + 0.030 * size
    ring_y = f.v - PIVOT_EAR - 0.150 * s.ear - radius * 0.8
    distance = (ex.square() + ring_y.square()).clamp(min=1e-6).sqrt()
    hoop = torch.where(size > 0.6, (distance - radius * 0.8).abs() - 0.010, distance - radius * 0.8)
    hoop = cover(hoop, px) * worn
    gold = torch.tensor([0.80, 0.60, 0.26], device=ex.device).reshape(1, 3, 1, 1)
    sparkle = 0.7 + 0.6 * bump(ex + 0.3 * radius, ring_y + 0.4 * radius, 0.6 * radius, 0.6 * radius)
    image = over(image, gold * light * sparkle, hoop)
    return image, labels.masked_fill(hoop > 0.5, LABEL["ear_r"])


PIVOT_EAR = 0.085  # row of the middle of the ears


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
    px = f.px / s.scale
    outline, opening = hair.outline, hair.opening
    ragged = opening + 0.010 * hair.texture * (0.4 + fade(f.px, 40))
    soft = px.clamp(min=0.010)
    front = cover(torch.maximum(outline, ragged), soft)
    shadow = (
        smoothstep(1 - opening / (0.05 + 0.05 * c.strength)) * (f.distance < 0).float() * (opening > -0.02)
    )
    image = image * (1 - 0.30 * shadow * (1 - h.bald))
    image = over(image, hair.colour, front)
    return image, labels.masked_fill(front > 0.5, LABEL["hair"])


def paint_glasses(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Thin or thick frames or sunglasses; the label covers lenses and frame."""
    kind = params["glasses"].reshape(-1, 1, 1, 1).round()
    thick, sun = (kind > 1.5).float(), (kind > 2.5).float()
    px = f.px / s.scale
    x, y = f.x.abs(), f.y - s.eye_y - 0.022
    gx, gy = x - s.eye_x - 0.006, y
    rx, ry = 0.158 + 0.008 * sun, 0.112 + 0.016 * sun - 0.012 * thick
    qx, qy = (gx / rx).square(), (gy / ry).square()
    r = (qx * qx + qy * qy + 0.9 * qx * qy).clamp(min=1e-6).sqrt().sqrt()
    lens = (r - 1) * ry
    rim = 0.0085 + 0.0105 * thick + 0.004 * sun
    ring = lens.abs() - rim
    bridge = torch.maximum((y + 0.035 - 0.10 * (0.06 - x).clamp(min=0)).abs() - rim, x - 0.058)
    temple = torch.maximum((y + 0.040).abs() - rim, s.eye_x + 0.006 + rx * 0.93 - x)
    temple = torch.maximum(temple, f.distance)
    # Beyond the silhouette of a turned head the surface coordinates stand still: nothing is drawn there.
    edge = f.distance - 0.015
    drawn = torch.maximum(torch.minimum(torch.minimum(ring, bridge), temple), edge)
    frame_ = cover(drawn, px.clamp(min=0.008))
    glass = cover(torch.maximum(lens, edge), px)
    dark = torch.tensor([0.012, 0.012, 0.016], device=x.device).reshape(1, 3, 1, 1)
    tint = dark + 0.16 * c.fill * smoothstep(0.4 - gy * 5) * 0.25
    streak = smoothstep(1 - ((gx + gy * 0.8 + 0.02).abs() - 0.018) / 0.012) * (gy < 0.05).float()
    image = image * (1 - 0.06 * glass)
    image = over(image, tint, glass * sun * 0.93)
    image = image + glass * streak * c.key * (0.035 + 0.05 * sun)
    # soft shadow of the frame, then the frame
    image = image * (1 - 0.16 * cover(lens - 0.03, 0.06) * (1 - glass) * cover(f.distance, px))
    tone = c.phase.sin() * 0.5 + 0.5
    colour = torch.cat([0.03 + 0.10 * tone, 0.025 + 0.05 * tone, 0.025 + 0.02 * tone], 1) + 0.10 * (1 - thick)
    gleam = 0.6 + 0.5 * smoothstep(-gy * 8)
    image = over(image, colour * gleam * (0.4 + c.key * 0.6), frame_)
    return image, labels.masked_fill((frame_ > 0.5) | (glass > 0.5), LABEL["eye_g"])


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
    base = n.base
    top = s.top - 0.10 - 0.05 * brimmed
    wide = s.width + 0.055 + 0.6 * h.sides
    edge = -0.335 + 0.035 * brimmed - 0.02 * s.child
    t = ((f.y - CHEEK_ROW) / (top - CHEEK_ROW)).clamp(0, 1.2)
    t2 = t * t
    area = wide.square() * (1 - t2 * t2)
    dome = base.square() - area
    dome = dome / (0.08 + (2 * base).square() + (4 * t * t2 * wide.square()).square()).sqrt()
    lower = f.y - edge - 0.06 * (base / wide).square() * (1 - brimmed)
    crown = torch.maximum(dome, lower)
    brim_y = f.y - edge + 0.01 + 0.05 * base.square()
    brim = ((base / (wide * 1.55)).square() + (brim_y / 0.065).square()).clamp(min=1e-5).sqrt() - 1
    brim = brim * 0.065 + (1 - brimmed)
    shadow = smoothstep(1 - lower / 0.14) * (lower > 0).float() * cover(f.distance, px)
    image = image * (1 - (0.30 + 0.25 * brimmed) * shadow)
    light = illuminate(c, (n.nx, n.ny - 0.1, n.nz), 0.1)
    band = smoothstep((lower + 0.10) / 0.015)
    knit = 0.10 * torch.sin(f.x * 85) * fade(f.px, 45) * (1 - brimmed) + 0.05 * torch.sin(f.y * 70) * (
        1 - band
    )
    colour = triple(params, "hat")
    cloth = colour * (1 + knit + band * (0.18 - 0.65 * brimmed))
    alpha = cover(crown, px)
    image = over(image, cloth * light, alpha)
    brim_alpha = cover(brim, px)
    image = over(image, colour * light * (0.85 - 3.0 * brim_y).clamp(0.5, 1.3), brim_alpha)
    return image, labels.masked_fill((alpha > 0.5) | (brim_alpha > 0.5), LABEL["hat"])
