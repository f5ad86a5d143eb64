"""Paints the head of a procedural face: skin, eyes, brows, nose, mouth, wrinkles, marks and beard, lit in
3-D.

Colours are mixed in linear light (squares of the displayed values) and displayed as square roots at the end.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.faceparams import Params
from shared.faceshape import Frame, eye_curves, lip_curves, nose_relief, smoothstep

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
    return torch.clamp(distance * (-1 / px) + 0.5, 0, 1)


def bump(x: Tensor, y: Tensor, sx: float | Tensor, sy: float | Tensor) -> Tensor:
    """exp(-(x/sx)^2 - (y/sy)^2)."""
    return torch.exp(-(x * (1 / sx)).square() - (y * (1 / sy)).square())


def illuminate(c: SimpleNamespace, normal: tuple[Tensor, Tensor, Tensor], wrap: Tensor | float) -> Tensor:
    """Light arriving on a surface: (B, 3, H, W). wrap > 0 lets it reach round the edge, as under skin."""
    nx, ny, nz = normal
    lambert = nx * c.light[0] + ny * c.light[1] + nz * c.light[2]
    direct = (lambert * (1 / (1 + wrap)) + wrap / (1 + wrap)).clamp(min=0)
    sky = 0.80 - 0.14 * ny + 0.16 * nz
    return direct * c.key + sky * c.fill


def over(image: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return torch.lerp(image, colour, alpha)


def paint_head(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Head over what lies behind it: linear image (B, 3, H, W) and labels (B, 1, H, W)."""
    x, y, px = f.x, f.y, f.px / s.scale
    ax, side = x.abs(), torch.sign(x)
    head = cover(f.distance, px)

    # relief for the light
    nose = nose_relief(s, x, y)
    ny0 = y - s.nose_y
    wing = bump(ax - 0.74 * s.nose_w, ny0 + 0.002, 0.36 * s.nose_w, 0.040)
    exs, eys = ax - s.eye_x, y - s.eye_y
    ex, ey = exs - eys * s.eye_tilt, eys + exs * s.eye_tilt
    socket = bump(exs + 0.02, eys + 0.012, 0.135, 0.075)
    ball = bump(exs, eys + 0.008, 0.085, 0.048)
    brow_ridge = bump(exs - 0.0, y - s.brow_y - 0.02, 0.16, 0.045)
    cheek = bump(ax - 0.60 * s.width, y - s.nose_y + 0.03, 0.13, 0.115)
    my = y - s.mouth_y
    muzzle = bump(x, my, 0.17, 0.11)
    chin = bump(x, y - s.chin_open + 0.085, 0.11, 0.075)
    groove = bump(x, my - 0.052 - s.lip_low - s.gap_low, 0.10, 0.028)
    philtrum = bump(x, (y - 0.5 * (s.nose_y + s.mouth_y) - 0.01), 0.018, 0.045)
    relief = (
        nose
        + (0.045 * wing - 0.034 * socket + 0.026 * ball)
        + (0.018 + 0.010 * s.male) * brow_ridge
        + (0.030 + 0.024 * s.grin + 0.014 * s.child) * cheek
        + 0.028 * muzzle
        + 0.034 * chin
        - 0.016 * groove
        - 0.006 * philtrum
    )
    wrinkles, relief = add_wrinkles(relief, f, s, ax, ex, ey, ny0, my)

    hu, hv = gradient(relief, px)
    nx, ny, nz = f.normal
    nx, ny = nx - hu * nz, ny - hv * nz
    length = (nx * nx + ny * ny + nz * nz).rsqrt()
    nx, ny, nz = nx * length, ny * length, nz * length
    wrap = torch.tensor([0.42, 0.26, 0.20], device=x.device).reshape(1, 3, 1, 1)
    light = illuminate(c, (nx, ny, nz), wrap)

    # occlusion: socket, side of the nose, under nose and lip; the nose's cast shadow
    shadow_x = x + 0.055 * c.light[0]
    under = bump(shadow_x, ny0 - 0.062, 0.95 * s.nose_w, 0.032)
    occlusion = 0.20 * socket * (1 - 0.4 * s.child) + 0.30 * under + 0.16 * groove
    beside = bump(ax - s.nose_w - 0.018, ny0 + 0.004, 0.022, 0.040)
    occlusion = (occlusion + 0.20 * beside + wrinkles).clamp(max=0.8)
    light = light * (1 - occlusion)

    # skin colour
    flush = (0.55 * cheek + 0.5 * bump(x, ny0, 0.08, 0.07) + 0.25 * chin) * c.redness * 0.55
    flush = flush + 0.9 * c.blush * cheek
    texture = skin_texture(f, s, c, x, y)
    colour = c.skin * (1 + c.flush * flush) * texture
    colour = paint_marks(colour, params, s, c, x, y, px)
    bags = bump(exs + 0.005, eys - 0.066, 0.085, 0.028) * (0.06 + 0.26 * s.old)
    colour = colour * (1 - bags * torch.tensor([0.7, 1.0, 0.8], device=x.device).reshape(1, 3, 1, 1))
    colour = paint_beard(colour, f, s, c, ax, x, y, my, ny0)

    # make-up around the eyes, then brows
    lid_up, lid_low = eye_curves(s, (ex / s.eye_w).clamp(-1, 1))
    above = smoothstep((ey - s.brow_y + s.eye_y - 0.02) / 0.05) * smoothstep((0.03 - ey) / 0.03)
    above = above * torch.exp(-(exs / 0.12).square() * (exs / 0.12).square())
    colour = over(colour, c.eye_shadow_colour, above * (0.62 * c.eye_shadow))
    brow, brow_label = brow_mask(f, s, c, ax, y, px)
    colour = over(colour, c.brow, brow)

    # lips
    mx = x / s.mouth_w
    up_out, up_in, low_in, low_out = lip_curves(s, mx.clamp(-1, 1))
    steep = 0.75
    ends = (mx.abs() - 1) * s.mouth_w
    lip = cover(torch.maximum(torch.maximum(up_out - my, my - low_out) * steep, ends), px * 1.2)
    inside = cover(torch.maximum(torch.maximum(up_in - my, my - low_in) * 0.9, ends + 0.012), px)
    inside = inside * ((low_in - up_in) * (1.2 / px)).clamp(0, 1)
    upper = my < 0.5 * (up_in + low_in)
    lip_shade = torch.where(upper, 0.80 + 3.0 * (up_in - my), 1.05 - 2.2 * (my - low_in)).clamp(0.45, 1.15)
    ridges = 1 + 0.05 * torch.sin(mx * 46 + c.phase) * (1 - 2 * px * 46 / s.mouth_w / 6.3).clamp(0, 1)
    colour = over(colour, c.lips * (lip_shade * ridges), lip)

    # shine of the skin
    shine = (nx * c.half[0] + ny * c.half[1] + nz * c.half[2]).clamp(min=0)
    s2 = shine * shine
    s4 = s2 * s2
    s16 = (s4 * s4).square()
    wet = lip * torch.where(upper, 0.1, 1.0)
    spec = 0.085 * s4 * s16 * (1 - 0.6 * lip) + c.gloss * s16 * s16 * s4 * wet
    rgb = colour * light + spec * c.key * (1 - occlusion)

    # mouth: line between the lips, or teeth and dark inside
    line = torch.exp(-((my - 0.5 * (up_in + low_in)) / (0.006 + 0.6 * px)).square()) * cover(
        ends - 0.012, px * 2
    )
    rgb = rgb * (1 - 0.72 * line * (1 - inside))
    level = c.key.mean(1, keepdim=True) * 0.45 + c.fill.mean(1, keepdim=True) * 0.8
    rgb = paint_mouth(rgb, s, mx, my, up_in, low_in, inside, level, px)

    # nostrils
    nostril = bump(ax - 0.43 * s.nose_w, ny0 - 0.030 + 0.16 * (ax - 0.43 * s.nose_w), 0.30 * s.nose_w, 0.0135)
    rgb = rgb * (1 - (0.92 * nostril).clamp(max=0.85))
    rgb, eye = paint_eyes(rgb, f, s, c, ex, ey, side, lid_up, lid_low, level, px)

    image = over(image, rgb, head)
    labels = label_head(labels, f, s, head, x, ax, y, ny0, brow_label, lip, inside, upper, eye)
    return image, labels


def gradient(field: Tensor, px: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences in the picture plane."""
    padded = torch.nn.functional.pad(field, (1, 1, 1, 1), mode="replicate")
    k = 0.5 / px
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * k,
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * k,
    )


def add_wrinkles(
    relief: Tensor, f: Frame, s: SimpleNamespace, ax: Tensor, ex: Tensor, ey: Tensor, ny0: Tensor, my: Tensor
) -> tuple[Tensor, Tensor]:
    """Folds of age and expression: (darkening, relief with furrows)."""
    y = f.y
    # nasolabial fold: from the wing of the nose round the corner of the mouth
    t = ((ny0 + 0.01) / (s.mouth_y - s.nose_y + 0.05)).clamp(0, 1)
    path = s.nose_w + 0.012 + (s.mouth_w + 0.035 - s.nose_w) * t * (1.5 - 0.5 * t)
    fold = torch.exp(-((ax - path) / 0.020).square()) * smoothstep((ny0 + 0.05) / 0.05)
    fold = fold * smoothstep((s.mouth_y + 0.06 - y) / 0.07)
    depth = 0.05 + 0.55 * s.old + 0.34 * s.grin * (1 - 0.6 * s.child)
    furrows = depth * fold
    # forehead: three lines over the brows
    lines = 0.5 + 0.5 * torch.cos((y - s.brow_y + 6 * 0.01 * torch.sin(9 * f.x)) * (6.283 / 0.062))
    lines = lines * lines * lines
    fore = lines * smoothstep((s.brow_y - 0.035 - y) / 0.04) * smoothstep((y - s.brow_y + 0.25) / 0.06)
    fore = fore * smoothstep((0.36 - ax) / 0.12)
    furrows = furrows + 0.42 * s.old * fore
    # crow's feet: rays from the outer corner of the eye
    cx, cy = ex - s.eye_w - 0.012, ey
    ray = torch.cos(13 * cy / (cx.abs() + 0.035))
    feet = (0.5 + 0.5 * ray).square() * bump(cx - 0.05, cy, 0.05, 0.06) * smoothstep(cx / 0.02)
    furrows = furrows + (0.5 * s.old + 0.12 * s.grin * (1 - s.child)) * feet
    # bags under the eyes, lines from the mouth's corners down
    bag = torch.exp(-((ey - 0.072 + 0.9 * ex * ex * 2) / 0.013).square()) * smoothstep(
        (0.10 - ex.abs()) / 0.05
    )
    furrows = furrows + 0.42 * s.old * bag
    marionette = torch.exp(-((ax - s.mouth_w - 0.022 - 0.12 * (my - 0.02)) / 0.014).square())
    marionette = marionette * smoothstep((my - 0.005) / 0.04) * smoothstep((0.14 - my) / 0.06)
    furrows = furrows + (0.45 * s.old + 0.1 * s.frown) * marionette
    return 0.42 * furrows, relief - 0.016 * furrows


def skin_texture(f: Frame, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """Blotches and pores around 1; frequencies above the picture's resolution fade out."""
    p = c.phase
    soft = torch.sin(11 * x + 1.3 * p) * torch.sin(9 * y + 2.1 * p + 2 * torch.sin(6 * x + p))
    fine = torch.sin(63 * x + 41 * y + 3 * torch.sin(31 * y + p)) * torch.sin(57 * y - 38 * x + p)
    fade = (1.6 - f.px * 50).clamp(0, 1) if isinstance(f.px, Tensor) else min(max(1.6 - f.px * 50, 0.0), 1.0)
    return 1 + (0.018 + 0.03 * s.old) * soft + (0.022 + 0.02 * s.old) * fade * fine


def paint_marks(
    colour: Tensor, params: Params, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor, px: Tensor
) -> Tensor:
    """Freckles, age spots and moles."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1)

    gx, gy = x * 24 + 0.3 * c.phase, y * 24
    ix, iy = gx.floor(), gy.floor()
    a = torch.sin(ix * 12.99 + iy * 78.23 + c.phase) * 437.58
    a = a - a.floor()
    b = a * 57.31
    b = b - b.floor()
    dot = ((gx - ix - 0.3 - 0.4 * a).square() + (gy - iy - 0.3 - 0.4 * b).square()) * (1 / (0.05 + 0.05 * b))
    dots = (1 - dot).clamp(min=0) * bump(x, y - s.nose_y + 0.10, 0.34, 0.17)
    amount = column("freckles") * (0.25 + c.fair) * 0.55 * (1 - 0.5 * s.old)
    colour = colour * (1 - torch.cat([0.55 * dots, dots, 1.15 * dots], 1) * amount)
    for name in ("mole1", "mole2"):
        mx = (column(f"{name}_x") * 2 - 1) * 0.34
        mole_y = -0.28 + 0.75 * column(f"{name}_y")
        radius = 0.024 * column(f"{name}_size").sqrt()
        distance = ((x - mx).square() + (y - mole_y).square()).sqrt() - radius
        mole = cover(distance, px.clamp(min=0.012)) * (column(f"{name}_size") * 8).clamp(max=1)
        colour = over(colour, c.skin * 0.16, 0.85 * mole)
    return colour


def paint_beard(
    colour: Tensor,
    f: Frame,
    s: SimpleNamespace,
    c: SimpleNamespace,
    ax: Tensor,
    x: Tensor,
    y: Tensor,
    my: Tensor,
    ny0: Tensor,
) -> Tensor:
    """Beard, moustache and the shade of shaved skin."""
    across = ((ax - s.mouth_w - 0.01) / (s.width - s.mouth_w)).clamp(0, 1)
    line = s.mouth_y + 0.045 + s.gap_low * (1 - across) - across * across * (s.mouth_y - 0.06)
    strands = torch.sin(120 * x + 30 * torch.sin(9 * y + c.phase)) * torch.sin(75 * y + 8 * torch.sin(30 * x))
    strands = strands * min(max(1.9 - f.px * 60, 0.0), 1.0)
    edge = y + 0.012 * strands
    region = smoothstep((edge - line) / 0.05)
    lip = bump(x, ny0 - 0.5 * (s.mouth_y - s.nose_y) - 0.045, s.mouth_w * 1.05, 0.042)
    lip = smoothstep((lip + 0.05 * strands - 0.35) / 0.3)
    hair = 1 - (1 - region * (1.25 * c.beard).clamp(max=1) ** 0.7) * (
        1 - lip * c.moustache.clamp(max=1) ** 0.7
    )
    shaved = 0.16 * c.stubble * torch.maximum(region, lip)
    grey = c.skin * torch.tensor([0.62, 0.70, 0.80], device=x.device).reshape(1, 3, 1, 1)
    colour = over(colour, grey, shaved)
    return over(colour, c.beard_colour * (1 + 0.35 * strands), (0.94 * hair).clamp(0, 1))


def brow_mask(
    f: Frame, s: SimpleNamespace, c: SimpleNamespace, ax: Tensor, y: Tensor, px: Tensor
) -> tuple[Tensor, Tensor]:
    """Opacity of the brows with their hairs, and the plain area for the label."""
    bx = (ax - s.eye_x - 0.012) / s.brow_w
    middle = s.brow_y + s.brow_arch * (bx - 0.25).square() * 1.1 - s.brow_tilt * bx * s.brow_w - 0.012
    q = (1 - bx.square()).clamp(min=0)
    thickness = s.brow_t * (0.25 + 0.75 * q) * (1 - 0.32 * bx)
    distance = (y - middle).abs() - thickness
    area = torch.maximum(distance, (bx.abs() - 1) * s.brow_w)
    hairs = torch.sin((ax + 0.6 * (y - middle) * (1 + 0.6 * bx)) * 160 + c.phase)
    hairs = 1 + 0.20 * hairs * min(max(2.2 - f.px * 100, 0.0), 1.0)
    soft = cover(area, px.clamp(min=0.014))
    return soft * (0.92 - 0.3 * s.child) * hairs.clamp(max=1.08), area < 0


def paint_mouth(
    rgb: Tensor,
    s: SimpleNamespace,
    mx: Tensor,
    my: Tensor,
    up_in: Tensor,
    low_in: Tensor,
    inside: Tensor,
    level: Tensor,
    px: Tensor,
) -> Tensor:
    """Dark cavity, tongue and upper teeth where the lips part."""
    device = my.device
    cavity = torch.tensor([0.085, 0.012, 0.012], device=device).reshape(1, 3, 1, 1) * level
    tongue = torch.tensor([0.48, 0.13, 0.13], device=device).reshape(1, 3, 1, 1) * level
    mouth = over(cavity.expand(-1, -1, *my.shape[2:]), tongue, smoothstep((my - low_in + 0.045) / 0.05) * 0.8)
    bottom = up_in + 0.036 * (1 - 0.5 * mx * mx)
    teeth = cover(my - bottom, px) * cover((mx.abs() - 0.86) * s.mouth_w, px)
    gaps = 1 - 0.16 * (0.5 + 0.5 * torch.cos(mx * 6.2832 * 4)).pow(8) * (1 - px * 14).clamp(0, 1)
    enamel = torch.tensor([0.86, 0.82, 0.74], device=device).reshape(1, 3, 1, 1) * level
    shade = (1 - 0.55 * mx * mx) * gaps * (0.72 + 9 * (my - up_in)).clamp(0.5, 1)
    return over(rgb, over(mouth, enamel * shade, teeth), inside)


def paint_eyes(
    rgb: Tensor,
    f: Frame,
    s: SimpleNamespace,
    c: SimpleNamespace,
    ex: Tensor,
    ey: Tensor,
    side: Tensor,
    lid_up: Tensor,
    lid_low: Tensor,
    level: Tensor,
    px: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both eyes at once in mirrored coordinates. Returns the picture and the opacity of the eyeballs."""
    device = ex.device
    ends = ex.abs() - s.eye_w
    q = (1 - (ex / s.eye_w).square()).clamp(min=0)
    near = torch.exp(-(ends.clamp(min=0) / 0.012).square())
    distance = torch.maximum(torch.maximum(lid_up - ey, ey - lid_low) * 0.86, ends)
    eye = cover(distance, px)
    # eyeball
    dx, dy = ex - side * s.gaze_x, ey + 0.006 - s.gaze_y
    r = (dx * dx + dy * dy).sqrt()
    white = torch.tensor([0.80, 0.78, 0.77], device=device).reshape(1, 3, 1, 1) * (1 - 0.1 * s.old)
    pink = torch.exp(-((ex + s.eye_w) / 0.025).square())
    white = white * (1 - pink * torch.tensor([0.25, 0.5, 0.5], device=device).reshape(1, 3, 1, 1))
    rounded = (1 - 0.42 * (ex / s.eye_w).square() - 0.35 * smoothstep((lid_up + 0.022 - ey) / 0.03)).clamp(
        min=0.15
    )
    ball = white * (rounded * level)
    iris = cover(r - s.iris, px)
    fibres = 1 + 0.22 * torch.sin(torch.atan2(dy, dx) * 19 + c.phase) * (1 - 18 * px).clamp(0, 1)
    depth = (0.55 + 0.9 * (r / s.iris).square() + 5.0 * dy).clamp(0.3, 1.7) * fibres
    depth = depth * (1 - 0.75 * smoothstep((r / s.iris - 0.72) / 0.3))
    shade = (1 - 0.55 * smoothstep((lid_up + 0.026 - ey) / 0.03)) * level
    ball = over(ball, c.iris * depth * shade * 1.25, iris)
    pupil = cover(r - 0.43 * s.iris, px * 1.2)
    ball = over(ball, torch.full_like(c.iris, 0.004), pupil)
    # highlight where the eye's sphere mirrors the light
    hx, hy = (
        ex - side * (s.gaze_x * 0.6 + 0.022 * c.light[0]),
        ey + 0.008 - 0.026 * c.light[1] - 0.6 * s.gaze_y,
    )
    spark = cover((hx * hx + hy * hy).sqrt() - 0.0105, px)
    ball = ball + spark * (0.25 + 0.65 * c.key.mean(1, keepdim=True)).clamp(max=1)
    rgb = over(rgb, ball, eye)
    # crease of the lid, lash line, lower lid
    fold = torch.exp(-((ey - lid_up + s.fold) / (0.006 + 0.35 * px)).square()) * near * (0.25 + 0.75 * q)
    lash = torch.exp(-((ey - lid_up + 0.002) / (0.0075 + 0.42 * px)).square()) * near
    wing = torch.exp(-((ey - lid_up + 0.25 * (ex - s.eye_w).clamp(min=0)) / (0.006 + 0.35 * px)).square())
    wing = wing * torch.exp(-((ex - s.eye_w) / 0.02).square())
    lower = torch.exp(-((ey - lid_low - 0.004) / (0.007 + 0.35 * px)).square()) * near
    lashes = (0.70 - 0.10 * s.male + 0.25 * c.eye_shadow).clamp(max=0.95)
    rgb = rgb * (1 - 0.40 * fold) * (1 - 0.30 * lower)
    return rgb * (1 - lashes * torch.maximum(lash, 0.8 * wing)), eye


def label_head(
    labels: Tensor,
    f: Frame,
    s: SimpleNamespace,
    head: Tensor,
    x: Tensor,
    ax: Tensor,
    y: Tensor,
    ny0: Tensor,
    brow: Tensor,
    lip: Tensor,
    inside: Tensor,
    upper: Tensor,
    eye: Tensor,
) -> Tensor:
    """Classes of the head's pixels, painted over what is behind."""
    on = head > 0.5
    left = x < 0
    t = ((y - s.nose_root) / (s.nose_y - s.nose_root)).clamp(0, 1)
    half = 0.045 + (s.nose_w * 1.04 - 0.045) * t * t
    round_ = (ny0.clamp(min=0) / 0.052).square() + (ax / half.clamp(min=0.02)).square() - 1
    nose = (round_ < 0) & (y > s.nose_root)
    labels = labels.masked_fill(on, LABEL["skin"])
    labels = labels.masked_fill(on & nose, LABEL["nose"])
    lips = on & (lip > 0.5)
    mouth = on & (inside > 0.5)
    eyes, brows = on & (eye > 0.5), on & brow
    for area, name in (
        (lips & upper, "u_lip"),
        (lips & ~upper, "l_lip"),
        (mouth, "mouth"),
        (brows & left, "l_brow"),
        (brows & ~left, "r_brow"),
        (eyes & left, "l_eye"),
        (eyes & ~left, "r_eye"),
    ):
        labels = labels.masked_fill(area, LABEL[name])
    return labels
