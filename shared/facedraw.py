"""Paints the head of a procedural face: skin, brows, nose, wrinkles, marks and beard, lit in 3-D."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.facefeatures import MouthWindow, paint_eyes
from shared.facelook import LABEL, bump, cover, illuminate, over
from shared.faceparams import Params
from shared.faceshape import Frame, bell, nose_relief, smoothstep
from shared.facewindow import Window, chosen


def paint_head(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Head over what lies behind it: linear image (B, 3, H, W) and labels (B, 1, H, W), overwritten."""
    window = Window(f.distance < 2 * f.px / s.scale)
    part = paint_surface(window.take(image), window.take(labels), window.view(f), s, c, params)
    window.put(image, part[0])
    window.put(labels, part[1])
    return image, labels


def paint_surface(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """The head in a window around it."""
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
    light.mul_(1 - occlusion)

    # skin colour
    flush = (0.55 * cheek + 0.5 * bump(x, ny0, 0.08, 0.07) + 0.25 * chin) * c.redness * 0.55
    flush = flush + 0.9 * c.blush * cheek
    texture = skin_texture(f, s, c, x, y)
    colour = (c.flush * flush).add_(1).mul_(c.skin).mul_(texture)
    colour = paint_marks(colour, params, s, c, x, y, px)
    bags = bump(exs + 0.005, eys - 0.066, 0.085, 0.028) * (0.06 + 0.26 * s.old)
    bag_colour = torch.tensor([0.7, 1.0, 0.8], device=x.device).reshape(1, 3, 1, 1)
    colour.mul_((bags * -bag_colour).add_(1))
    colour = paint_beard(colour, f, s, c, ax, x, y, my, ny0)

    # make-up around the eyes, then brows
    above = smoothstep((ey - s.brow_y + s.eye_y - 0.02) / 0.05) * smoothstep((0.03 - ey) / 0.03)
    above = above * bell((exs / 0.12).square() * (exs / 0.12).square())
    colour = over(colour, c.eye_shadow_colour, above * (0.62 * c.eye_shadow))
    brow, brow_label = brow_mask(f, s, c, ax, y, px)
    colour = over(colour, c.brow, brow)

    lips = MouthWindow(f, s, c, x, my, px)
    colour = lips.paint(colour)

    # shine of the skin
    shine = (nx * c.half[0] + ny * c.half[1] + nz * c.half[2]).clamp_(min=0.12)
    s2 = shine * shine
    s4 = s2 * s2
    s16 = (s4 * s4).square()
    spec = 0.085 * s4 * s16
    lips.put_gloss(spec, c.gloss * lips.window.take(s4).pow_(9))
    rgb = colour.mul_(light).addcmul_(spec * (1 - occlusion), c.key)

    level = c.key.mean(1, keepdim=True) * 0.45 + c.fill.mean(1, keepdim=True) * 0.8
    lips.open(rgb, s, level)

    # nostrils
    window = Window((ax < 1.6 * s.nose_w) & ((ny0 - 0.030).abs() < 0.10))
    nx, dy = window.take(ax) - 0.43 * s.nose_w, window.take(ny0) - 0.030
    nostril = bump(nx, dy + 0.16 * nx, 0.30 * s.nose_w, 0.0135)
    window.put(rgb, window.take(rgb) * (1 - (0.92 * nostril).clamp(max=0.85)))
    # eyes
    reach = 1.3 * s.lid_up.abs() + s.fold + 3.6 * (0.0075 + 0.42 * px)
    window = Window((ex.abs() < s.eye_w + 0.075) & (ey > -reach) & (ey < 1.3 * s.lid_low + reach))
    eye = torch.zeros_like(x)
    parts = paint_eyes(window.take(rgb), f.px, s, c, *(window.take(t) for t in (ex, ey, side)), level)
    window.put(rgb, parts[0])
    window.put(eye, parts[1])

    image = over(image, rgb, head)
    labels = label_head(labels, f, s, head, x, ax, y, ny0, brow_label, lips, eye)
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
    fold = bell(((ax - path) / 0.020).square()) * smoothstep((ny0 + 0.05) / 0.05)
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
    bag = bell(((ey - 0.072 + 0.9 * ex * ex * 2) / 0.013).square()) * smoothstep((0.10 - ex.abs()) / 0.05)
    furrows = furrows + 0.42 * s.old * bag
    marionette = bell(((ax - s.mouth_w - 0.022 - 0.12 * (my - 0.02)) / 0.014).square())
    marionette = marionette * smoothstep((my - 0.005) / 0.04) * smoothstep((0.14 - my) / 0.06)
    furrows = furrows + (0.45 * s.old + 0.1 * s.frown) * marionette
    return 0.42 * furrows, relief - 0.016 * furrows


def skin_texture(f: Frame, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """Blotches and pores around 1; frequencies above the picture's resolution fade out."""
    p = c.phase
    soft = torch.sin(11 * x + 1.3 * p) * torch.sin(9 * y + 2.1 * p + 2 * torch.sin(6 * x + p))
    texture = 1 + (0.018 + 0.03 * s.old) * soft
    if f.px >= 1 / 32:
        return texture
    fine = torch.sin(63 * x + 41 * y + 3 * torch.sin(31 * y + p)) * torch.sin(57 * y - 38 * x + p)
    return texture + ((0.022 + 0.02 * s.old) * min(1.5625 - f.px * 50, 1.0)) * fine


def paint_marks(
    colour: Tensor, params: Params, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor, px: Tensor
) -> Tensor:
    """Freckles, age spots and moles."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1)

    speckled = (params["freckles"] > 0).nonzero()[:, 0]
    if len(speckled):
        dots = freckles(chosen(s, speckled), chosen(c, speckled), x[speckled], y[speckled])
        colour[speckled] = colour[speckled].mul_(1 - dots * params["freckles"][speckled, None, None, None])
    for name in ("mole1", "mole2"):
        mx = (column(f"{name}_x") * 2 - 1) * 0.34
        mole_y = -0.28 + 0.75 * column(f"{name}_y")
        radius = 0.024 * column(f"{name}_size").sqrt()
        distance = ((x - mx).square_() + (y - mole_y).square_()).sqrt_() - radius
        mole = cover(distance, px.clamp(min=0.012)) * (column(f"{name}_size") * 8).clamp(max=1)
        colour = over(colour, c.skin * 0.16, 0.85 * mole)
    return colour


def freckles(s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """How much freckles of full strength darken red, green and blue, (B, 3, H, W)."""
    gx, gy = x * 24 + 0.3 * c.phase, y * 24
    ix, iy = gx.floor(), gy.floor()
    a = torch.sin(ix * 12.99 + iy * 78.23 + c.phase) * 437.58
    a = a - a.floor()
    b = a * 57.31
    b = b - b.floor()
    dot = ((gx - ix - 0.3 - 0.4 * a).square() + (gy - iy - 0.3 - 0.4 * b).square()) * (1 / (0.05 + 0.05 * b))
    dots = (1 - dot).clamp_(min=0) * bump(x, y - s.nose_y + 0.10, 0.34, 0.17)
    strength = torch.tensor([0.55, 1.0, 1.15], device=x.device).reshape(1, 3, 1, 1)
    return dots * (strength * (0.25 + c.fair) * 0.55 * (1 - 0.5 * s.old))


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
    strands = torch.zeros_like(x)
    if f.px < 1 / 32:
        strands = torch.sin(120 * x + 30 * torch.sin(9 * y + c.phase))
        strands *= torch.sin(75 * y + 8 * torch.sin(30 * x)) * min(1.875 - f.px * 60, 1.0)
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
    soft = cover(area, px.clamp(min=0.014)) * (0.92 - 0.3 * s.child)
    if f.px >= 0.022:
        return soft, area < 0
    hairs = torch.sin((ax + 0.6 * (y - middle) * (1 + 0.6 * bx)) * 160 + c.phase)
    hairs = 1 + 0.20 * hairs * min(2.2 - f.px * 100, 1.0)
    return soft * hairs.clamp_(max=1.08), area < 0


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
    mouth: MouthWindow,
    eye: Tensor,
) -> Tensor:
    """Classes of the head's pixels, painted over what is behind."""
    on = head > 0.5
    left = x < 0
    t = ((y - s.nose_root) / (s.nose_y - s.nose_root)).clamp(0, 1)
    half = 0.045 + (s.nose_w * 1.04 - 0.045) * t * t
    round_ = (ny0.clamp(min=0) / 0.052).square() + (ax / half.clamp(min=0.02)).square() - 1
    nose = (round_ < 0) & (y > s.nose_root)
    labels.masked_fill_(on, LABEL["skin"])
    labels.masked_fill_(on & nose, LABEL["nose"])
    mouth.label(labels, on)
    eyes, brows = on & (eye > 0.5), on & brow
    for area, name in (
        (brows & left, "l_brow"),
        (brows & ~left, "r_brow"),
        (eyes & left, "l_eye"),
        (eyes & ~left, "r_eye"),
    ):
        labels.masked_fill_(area, LABEL[name])
    return labels
