"""Paints the head of a procedural face: skin, brows, nose, wrinkles, marks and beard, lit in 3-D."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.facefeatures import MouthWindow, paint_eyes
from shared.facelook import bump, cover, illuminate, over, stamp
from shared.faceparams import Params
from shared.faceshape import Frame, above, bell, nose_relief, root, smoothstep
from shared.facewindow import Window, chosen


def paint_head(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """Head over what lies behind it: linear image (B, 3, H, W) and labels (B, 1, H, W), overwritten."""
    window = Window.around(f.distance - 2 * f.px / s.scale)
    part = paint_surface(window.take(image), window.take(labels), window.view(f), s, c, params)
    window.put(image, part[0])
    window.put(labels, part[1])
    return image, labels


def paint_surface(
    image: Tensor, labels: Tensor, f: Frame, s: SimpleNamespace, c: SimpleNamespace, params: Params
) -> tuple[Tensor, Tensor]:
    """The head in a window around it."""
    x, y, px = f.x, f.y, f.px / s.scale
    ax, side = x.abs(), x.sign()
    head = cover(f.distance, px)

    # relief for the light
    ny0, my = y - s.nose_y, y - s.mouth_y
    exs, eys = ax - s.eye_x, y - s.eye_y
    ex, ey = exs.addcmul(eys, s.eye_tilt, value=-1), eys.addcmul(exs, s.eye_tilt)
    socket = bump(exs + 0.02, eys + 0.012, 0.135, 0.075)
    cheek = bump(ax - 0.60 * s.width, ny0 + 0.03, 0.13, 0.115)
    chin = bump(x, y - (s.chin_open - 0.085), 0.11, 0.075)
    groove = bump(x, my - (0.052 + s.lip_low + s.gap_low), 0.10, 0.028)
    relief = nose_relief(s, x, y)
    relief.add_(bump(ax - 0.74 * s.nose_w, ny0 + 0.002, 0.36 * s.nose_w, 0.040), alpha=0.045)
    relief.add_(socket, alpha=-0.034).add_(bump(exs, eys + 0.008, 0.085, 0.048), alpha=0.026)
    relief.addcmul_(
        bump(exs, y - (s.brow_y + 0.02), 0.16, 0.045), 0.018 + 0.010 * s.male
    )  # ridge of the brow
    relief.addcmul_(cheek, 0.030 + 0.024 * s.grin + 0.014 * s.child)
    relief.add_(bump(x, my, 0.17, 0.11), alpha=0.028)  # muzzle
    relief.add_(chin, alpha=0.034).add_(groove, alpha=-0.016)
    philtrum = bump(x, y - (0.5 * (s.nose_y + s.mouth_y) + 0.01), 0.018, 0.045)
    relief.add_(philtrum, alpha=-0.006)
    wrinkles, relief = add_wrinkles(relief, f, s, ax, ex, ey, ny0, my)

    hu, hv = gradient(relief, px)
    nx, ny, nz = f.normal
    nx, ny = nx.addcmul(hu, nz, value=-1), ny.addcmul(hv, nz, value=-1)
    length = (nx * nx).addcmul_(ny, ny).addcmul_(nz, nz).rsqrt_()
    nx, ny, nz = nx.mul_(length), ny.mul_(length), length.mul_(nz)
    wrap = torch.tensor([0.42, 0.26, 0.20], device=x.device).reshape(1, 3, 1, 1)
    light = illuminate(c, (nx, ny, nz), wrap)

    # occlusion: socket, side of the nose, under nose and lip; the nose's cast shadow
    under = bump(x + 0.055 * c.light[0], ny0 - 0.062, 0.95 * s.nose_w, 0.032)
    beside = bump(ax - (s.nose_w + 0.018), ny0 + 0.004, 0.022, 0.040)
    open_ = wrinkles.add_(socket.mul_(0.20 * (1 - 0.4 * s.child))).add_(under, alpha=0.30)
    open_ = open_.add_(groove, alpha=0.16).add_(beside, alpha=0.20).clamp_(max=0.8).neg_().add_(1)
    light.mul_(open_)

    # skin colour
    texture = skin_texture(f, s, c, x, y)
    flush = bump(x, ny0, 0.08, 0.07).mul_(0.5).add_(cheek, alpha=0.55).add_(chin, alpha=0.25)
    flush = flush.mul_(0.55 * c.redness).addcmul_(cheek, 0.9 * c.blush)
    colour = (flush * c.flush).add_(1).mul_(c.skin).mul_(texture)
    colour = paint_marks(colour, params, s, c, x, y, px)
    bags = bump(exs + 0.005, eys - 0.066, 0.085, 0.028).mul_(0.06 + 0.26 * s.old)
    bag_colour = torch.tensor([-0.7, -1.0, -0.8], device=x.device).reshape(1, 3, 1, 1)
    colour.mul_((bags * bag_colour).add_(1))
    grown = (c.beard + c.moustache + c.stubble).flatten().nonzero()[:, 0]
    if len(grown):
        fields = (
            chosen(f, grown),
            chosen(s, grown),
            chosen(c, grown),
            *(chosen(t, grown) for t in (ax, x, y, my, ny0)),
        )
        colour[grown] = paint_beard(chosen(colour, grown), *fields)

    # make-up around the eyes, then brows
    shaded = c.eye_shadow.flatten().nonzero()[:, 0]
    if len(shaded):
        lid, out = chosen(ey, shaded), chosen(exs, shaded)
        alpha = smoothstep((lid - (s.brow_y - s.eye_y + 0.02)[shaded]).mul_(1 / 0.05))
        alpha = alpha.mul_(smoothstep((0.03 - lid).mul_(1 / 0.03))).mul_(0.62 * c.eye_shadow[shaded])
        alpha = alpha.mul_(bell(out.mul_(1 / 0.12).square_().square_()))
        colour[shaded] = over(chosen(colour, shaded), c.eye_shadow_colour[shaded], alpha)
    brow, brow_label = brow_mask(f, s, c, ax, y, px)
    colour = over(colour, c.brow, brow)

    lips = MouthWindow(f, s, c, x, my, px)
    colour = lips.paint(colour)

    # shine of the skin
    shine = nx.mul_(c.half[0]).addcmul_(ny, c.half[1]).addcmul_(nz, c.half[2]).clamp_(min=0.12)
    s4 = shine.square_().square_()
    s16 = s4.square().square_()
    spec = s16.mul_(s4).mul_(0.085)
    wet = lips.window.take(s4)
    lips.put_gloss(spec, wet.square().square_().square_().mul_(wet).mul_(c.gloss))
    rgb = colour.mul_(light).addcmul_(spec.mul_(open_), c.key)

    level = c.key.mean(1, keepdim=True) * 0.45 + c.fill.mean(1, keepdim=True) * 0.8
    lips.open(rgb, s, level)

    # nostrils
    window = Window.around(torch.maximum(ax - 1.6 * s.nose_w, (ny0 - 0.030).abs_().sub_(0.10)))
    nx, dy = window.take(ax) - 0.43 * s.nose_w, window.take(ny0) - 0.030
    nostril = bump(nx, dy + 0.16 * nx, 0.30 * s.nose_w, 0.0135)
    window.put(rgb, window.take(rgb) * (1 - (0.92 * nostril).clamp(max=0.85)))
    # eyes
    reach = 1.3 * s.lid_up.abs() + s.fold + 3.6 * (0.0075 + 0.42 * px)
    low, high = 1.3 * s.lid_low + reach, reach
    rows = (ey - 0.5 * (low - high)).abs_().sub_(0.5 * (low + high))
    window = Window.around(torch.maximum(rows, ex.abs().sub_(s.eye_w + 0.075)))
    eye = torch.zeros_like(x)
    parts = paint_eyes(window.take(rgb), f.px, s, c, *(window.take(t) for t in (ex, ey, side)), level)
    window.put(rgb, parts[0])
    window.put(eye, parts[1])

    image = over(image, rgb, head)
    labels = label_head(labels, s, head, x, ax, y, ny0, brow_label, lips, eye)
    return image, labels


def gradient(field: Tensor, px: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences in the picture plane."""
    padded = torch.nn.functional.pad(field, (1, 1, 1, 1), mode="replicate")
    k = 0.5 / px
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).mul_(k),
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).mul_(k),
    )


def add_wrinkles(
    relief: Tensor, f: Frame, s: SimpleNamespace, ax: Tensor, ex: Tensor, ey: Tensor, ny0: Tensor, my: Tensor
) -> tuple[Tensor, Tensor]:
    """Folds of age and expression: (darkening, relief with furrows)."""
    y = f.y
    # nasolabial fold: from the wing of the nose round the corner of the mouth
    t = (ny0 + 0.01).mul_(1 / (s.mouth_y - s.nose_y + 0.05)).clamp_(0, 1)
    path = (t * -0.5).add_(1.5).mul_(t).mul_(s.mouth_w + 0.035 - s.nose_w).add_(s.nose_w + 0.012)
    fold = bell((ax - path).mul_(1 / 0.020).square_()).mul_(smoothstep((ny0 + 0.05).mul_(1 / 0.05)))
    fold = fold.mul_(smoothstep((s.mouth_y + 0.06 - y).mul_(1 / 0.07)))
    furrows = fold.mul_(0.05 + 0.55 * s.old + 0.34 * s.grin * (1 - 0.6 * s.child))
    # forehead: three lines over the brows
    lines = (f.x * 9).sin_().mul_(0.06).add_(y).sub_(s.brow_y).mul_(6.283 / 0.062).cos_().mul_(0.5).add_(0.5)
    lines = (lines * lines).mul_(lines).mul_(smoothstep((s.brow_y - 0.035 - y).mul_(1 / 0.04)))
    lines = lines.mul_(smoothstep((y - (s.brow_y - 0.25)).mul_(1 / 0.06)))
    furrows.addcmul_(lines.mul_(smoothstep((0.36 - ax).mul_(1 / 0.12))), 0.42 * s.old)
    # crow's feet: rays from the outer corner of the eye
    cx, cy = ex - (s.eye_w + 0.012), ey
    ray = (cy * 13).div_(cx.abs().add_(0.035)).cos_().mul_(0.5).add_(0.5).square_()
    feet = ray.mul_(bump(cx - 0.05, cy, 0.05, 0.06)).mul_(smoothstep(cx.mul_(1 / 0.02)))
    furrows.addcmul_(feet, 0.5 * s.old + 0.12 * s.grin * (1 - s.child))
    # bags under the eyes, lines from the mouth's corners down
    bag = bell((ex * ex).mul_(1.8).add_(ey).sub_(0.072).mul_(1 / 0.013).square_())
    furrows.addcmul_(bag.mul_(smoothstep(ex.abs().mul_(-1 / 0.05).add_(2))), 0.42 * s.old)
    marionette = bell(ax.add(my, alpha=-0.12).sub_(s.mouth_w + 0.0196).mul_(1 / 0.014).square_())
    marionette = marionette.mul_(smoothstep((my - 0.005).mul_(1 / 0.04)))
    marionette = marionette.mul_(smoothstep((0.14 - my).mul_(1 / 0.06)))
    furrows.addcmul_(marionette, 0.45 * s.old + 0.1 * s.frown)
    return furrows * 0.42, relief.add_(furrows, alpha=-0.016)


def skin_texture(f: Frame, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """Blotches and pores around 1; frequencies above the picture's resolution fade out."""
    p = c.phase
    soft = (x * 6).add_(p).sin_().mul_(2).add_(y, alpha=9).add_(2.1 * p).sin_()
    soft = soft.mul_((x * 11).add_(1.3 * p).sin_())
    texture = soft.mul_(0.018 + 0.03 * s.old).add_(1)
    if f.px >= 1 / 32:
        return texture
    fine = (y * 31).add_(p).sin_().mul_(3).add_(x, alpha=63).add_(y, alpha=41).sin_()
    fine = fine.mul_((y * 57).add_(x, alpha=-38).add_(p).sin_())
    return texture.addcmul_(fine, (0.022 + 0.02 * s.old) * min(1.5625 - f.px * 50, 1.0))


def paint_marks(
    colour: Tensor, params: Params, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor, px: Tensor
) -> Tensor:
    """Freckles, age spots and moles."""
    speckled = (params["freckles"] > 0).nonzero()[:, 0]
    if len(speckled):
        dots = freckles(*(chosen(thing, speckled) for thing in (s, c, x, y)))
        dots = dots.mul_(-params["freckles"][speckled, None, None, None]).add_(1)
        colour[speckled] = dots.mul_(chosen(colour, speckled))
    for name in ("mole1", "mole2"):
        marked = (params[f"{name}_size"] > 0).nonzero()[:, 0]
        if len(marked):
            fields = (chosen(t, marked) for t in (colour, c.skin, x, y, px))
            colour[marked] = mole(params[marked], name, *fields)
    return colour


def mole(params: Params, name: str, colour: Tensor, skin: Tensor, x: Tensor, y: Tensor, px: Tensor) -> Tensor:
    """colour with a mole over it."""
    mx, my, size = (params[f"{name}_{what}"].reshape(-1, 1, 1, 1) for what in ("x", "y", "size"))
    x, y = x.sub_((mx * 2 - 1) * 0.34), y.sub_(0.75 * my - 0.28)
    distance = root(x.square_().addcmul_(y, y)).sub_(0.024 * size.sqrt())
    dot = cover(distance, px.clamp(min=0.012)).mul_(0.85 * (size * 8).clamp(max=1))
    return over(colour, skin * 0.16, dot)


def freckles(s: SimpleNamespace, c: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """How much freckles of full strength darken red, green and blue, (B, 3, H, W)."""
    gx, gy = (x * 24).add_(0.3 * c.phase), y * 24
    ix, iy = gx.floor(), gy.floor()
    a = (ix * 12.99).add_(iy * 78.23).add_(c.phase).sin_().mul_(437.58)
    a = a.sub_(a.floor())
    b = a * 57.31
    b = b.sub_(b.floor())
    gx, gy = gx.sub_(ix).sub_(0.3).sub_(a, alpha=0.4), gy.sub_(iy).sub_(0.3).sub_(b, alpha=0.4)
    dot = gx.square_().addcmul_(gy, gy).div_(b.mul_(0.05).add_(0.05))
    dots = (1 - dot).clamp_(min=0).mul_(bump(x, y - (s.nose_y - 0.10), 0.34, 0.17))
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
    across = (ax - (s.mouth_w + 0.01)).mul_(1 / (s.width - s.mouth_w)).clamp_(0, 1)
    # lower edge of bare skin: below the lips in the middle, up to the ears at the sides
    line = (across * (0.06 - s.mouth_y)).sub_(s.gap_low).mul_(across).add_(s.mouth_y + 0.045 + s.gap_low)
    edge = y
    if f.px < 1 / 32:
        strands = (y * 9).add_(c.phase).sin_().mul_(30).add_(x, alpha=120).sin_()
        strands.mul_((x * 30).sin_().mul_(8).add_(y, alpha=75).sin_()).mul_(min(1.875 - f.px * 60, 1.0))
        edge = y.add(strands, alpha=0.012)
    region = smoothstep((edge - line).mul_(1 / 0.05))
    lip = bump(x, ny0 - (0.5 * (s.mouth_y - s.nose_y) + 0.045), s.mouth_w * 1.05, 0.042)
    if f.px < 1 / 32:
        lip.add_(strands, alpha=0.05)
    lip = smoothstep(lip.sub_(0.35).mul_(1 / 0.3))
    shaved = torch.maximum(region, lip).mul_(0.16 * c.stubble)
    grey = c.skin * torch.tensor([0.62, 0.70, 0.80], device=x.device).reshape(1, 3, 1, 1)
    colour = over(colour, grey, shaved)
    bare = region.mul_(-((1.25 * c.beard).clamp(max=1) ** 0.7)).add_(1)
    bare = bare.mul_(lip.mul_(-(c.moustache.clamp(max=1) ** 0.7)).add_(1))
    hair = bare.neg_().add_(1).mul_(0.94).clamp_(0, 1)
    if f.px < 1 / 32:
        return over(colour, strands.mul_(0.35).add_(1) * c.beard_colour, hair)
    return over(colour, c.beard_colour, hair)


def brow_mask(
    f: Frame, s: SimpleNamespace, c: SimpleNamespace, ax: Tensor, y: Tensor, px: Tensor
) -> tuple[Tensor, Tensor]:
    """Opacity of the brows with their hairs, and the plain area for the label."""
    bx = (ax - (s.eye_x + 0.012)).mul_(1 / s.brow_w)
    middle = (bx - 0.25).square_().mul_(1.1 * s.brow_arch).addcmul_(bx, -s.brow_tilt * s.brow_w)
    off = y - middle.add_(s.brow_y - 0.012)
    q = (bx * bx).neg_().add_(1).clamp_(min=0).mul_(0.75).add_(0.25)
    thickness = q.mul_((bx * -0.32).add_(1)).mul_(s.brow_t)
    area = torch.maximum(off.abs().sub_(thickness), bx.abs().sub_(1).mul_(s.brow_w))
    soft = cover(area, px.clamp(min=0.014)).mul_(0.92 - 0.3 * s.child)
    inside = above(-area, 0)
    if f.px >= 0.022:
        return soft, inside
    hairs = off.mul_(bx.mul_(0.6).add_(1)).mul_(0.6).add_(ax).mul_(160).add_(c.phase).sin_()
    hairs = hairs.mul_(0.20 * min(2.2 - f.px * 100, 1.0)).add_(1)
    return soft.mul_(hairs.clamp_(max=1.08)), inside


def label_head(
    labels: Tensor,
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
    on = above(head, 0.5)
    left = above(-x, 0)
    t = (y - s.nose_root).mul_(1 / (s.nose_y - s.nose_root)).clamp_(0, 1)
    half = (t * t).mul_(s.nose_w * 1.04 - 0.045).add_(0.045).clamp_(min=0.02)
    tip = ny0.clamp(min=0).mul_(1 / 0.052).square_()
    nose = above(-tip.add_((ax / half).square_()), -1).mul_(above(y, s.nose_root)).mul_(on)
    stamp(labels, on, "skin")
    stamp(labels, nose, "nose")
    mouth.label(labels, on)
    eyes, brows = above(eye, 0.5).mul_(on), brow.mul_(on)
    on_left = brows * left
    stamp(labels, on_left, "l_brow")
    stamp(labels, brows.sub_(on_left), "r_brow")
    on_left = eyes * left
    stamp(labels, on_left, "l_eye")
    stamp(labels, eyes.sub_(on_left), "r_eye")
    return labels
