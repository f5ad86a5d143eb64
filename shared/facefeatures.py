"""Mouth and eyes of a procedural face."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shared.facelook import cover, over, stamp
from shared.faceshape import Frame, above, bell, eye_curves, lip_curves, root, smoothstep
from shared.facewindow import Window


class MouthWindow:
    """Lips and what lies between them, in a window of the head around the mouth.

    x, my: head coordinates of the pixels, my from the mouth's row; px (B, 1, 1, 1).
    """

    def __init__(
        self, f: Frame, s: SimpleNamespace, c: SimpleNamespace, x: Tensor, my: Tensor, px: Tensor
    ) -> None:
        margin = 2 * px
        high = s.curve.abs() + 1.4 * s.lip_up + s.gap_up + 0.025 + margin
        low = s.curve.abs() + 1.2 * (s.lip_low + s.gap_low) + 0.025 + margin
        rows = (my - 0.5 * (low - high)).abs_().sub_(0.5 * (low + high))
        self.window = Window.around(torch.maximum(rows, x.abs().sub_(s.mouth_w + margin)))
        self.px = px
        self.mx = mx = self.window.take(x) / s.mouth_w
        self.my = my = self.window.take(my)
        up_out, self.up_in, self.low_in, low_out = lip_curves(s, mx.clamp(-1, 1))
        self.ends = (mx.abs() - 1) * s.mouth_w
        edge = torch.maximum(up_out - my, my - low_out) * 0.75
        self.lip = cover(torch.maximum(edge, self.ends), px * 1.2)
        gap = torch.maximum(self.up_in - my, my - self.low_in) * 0.9
        inside = cover(torch.maximum(gap, self.ends + 0.012), px)
        self.inside = inside * ((self.low_in - self.up_in) * (1.2 / px)).clamp(0, 1)
        self.middle = 0.5 * (self.up_in + self.low_in)
        self.upper = above(self.middle, my)
        ridges = torch.sin(mx * 46 + c.phase) * (1 - 2 * px * 46 / s.mouth_w / 6.3).clamp(0, 1)
        shade = torch.lerp(1.05 - 2.2 * (my - self.low_in), 0.80 + 3.0 * (self.up_in - my), self.upper)
        self.colour = c.lips * (shade.clamp(0.45, 1.15) * (1 + 0.05 * ridges))

    def paint(self, colour: Tensor) -> Tensor:
        """Lips over the colour of the skin, which is overwritten."""
        self.window.put(colour, over(self.window.take(colour), self.colour, self.lip))
        return colour

    def put_gloss(self, shine: Tensor, gloss: Tensor) -> None:
        """Less of the skin's shine (overwritten) and more gloss, given in the window, on the lips."""
        wet = self.lip * (1 - 0.9 * self.upper)
        self.window.put(shine, self.window.take(shine) * (1 - 0.6 * self.lip) + gloss * wet)

    def open(self, rgb: Tensor, s: SimpleNamespace, level: Tensor) -> None:
        """Line between the lips, or dark cavity, tongue and upper teeth where they part; overwrites rgb."""
        mx, my, px = self.mx, self.my, self.px
        line = bell(((my - self.middle) / (0.006 + 0.6 * px)).square()) * cover(self.ends - 0.012, px * 2)
        image = self.window.take(rgb) * (1 - 0.72 * line * (1 - self.inside))
        cavity = level * torch.tensor([0.085, 0.012, 0.012], device=my.device).reshape(1, 3, 1, 1)
        tongue = level * torch.tensor([0.48, 0.13, 0.13], device=my.device).reshape(1, 3, 1, 1)
        mouth = torch.lerp(cavity, tongue, smoothstep((my - self.low_in + 0.045) / 0.05) * 0.8)
        bottom = self.up_in + 0.036 * (1 - 0.5 * mx * mx)
        teeth = cover(my - bottom, px) * cover((mx.abs() - 0.86) * s.mouth_w, px)
        waves = (0.5 + 0.5 * torch.cos(mx * 6.2832 * 4)).square_().square_().square_()
        gaps = 1 - 0.16 * waves * (1 - px * 14).clamp(0, 1)
        enamel = level * torch.tensor([0.86, 0.82, 0.74], device=my.device).reshape(1, 3, 1, 1)
        shade = (1 - 0.55 * mx * mx) * gaps * (0.72 + 9 * (my - self.up_in)).clamp(0.5, 1)
        self.window.put(rgb, over(image, over(mouth, enamel * shade, teeth), self.inside))

    def label(self, labels: Tensor, on: Tensor) -> None:
        """Writes lips and mouth where the head is on, (B, 1, H, W) 0 or 1, into labels."""
        on = self.window.take(on)
        lips = above(self.lip, 0.5).mul_(on)
        upper = lips * self.upper
        part = stamp(self.window.take(labels), upper, "u_lip")
        stamp(part, lips.sub_(upper), "l_lip")
        self.window.put(labels, stamp(part, above(self.inside, 0.5).mul_(on), "mouth"))


def paint_eyes(
    rgb: Tensor,
    pixel: float,
    s: SimpleNamespace,
    c: SimpleNamespace,
    ex: Tensor,
    ey: Tensor,
    side: Tensor,
    level: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both eyes at once in mirrored coordinates. Returns the picture and the opacity of the eyeballs."""
    device = ex.device
    px = pixel / s.scale
    lid_up, lid_low = eye_curves(s, (ex / s.eye_w).clamp(-1, 1))
    ends = ex.abs() - s.eye_w
    q = (1 - (ex / s.eye_w).square()).clamp(min=0)
    near = bell((ends.clamp(min=0) / 0.012).square())
    distance = torch.maximum(torch.maximum(lid_up - ey, ey - lid_low) * 0.86, ends)
    eye = cover(distance, px)
    # eyeball
    dx, dy = ex - side * s.gaze_x, ey + 0.006 - s.gaze_y
    r = root(dx * dx + dy * dy)
    white = torch.tensor([0.80, 0.78, 0.77], device=device).reshape(1, 3, 1, 1) * (1 - 0.1 * s.old)
    pink = bell(((ex + s.eye_w) / 0.025).square())
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
    spark = cover(root(hx * hx + hy * hy) - 0.0105, px)
    ball = ball + spark * (0.25 + 0.65 * c.key.mean(1, keepdim=True)).clamp(max=1)
    rgb = over(rgb, ball, eye)
    # crease of the lid, lash line, lower lid
    fold = bell(((ey - lid_up + s.fold) / (0.006 + 0.35 * px)).square()) * near * (0.25 + 0.75 * q)
    lash = bell(((ey - lid_up + 0.002) / (0.0075 + 0.42 * px)).square()) * near
    wing = bell(((ey - lid_up + 0.25 * (ex - s.eye_w).clamp(min=0)) / (0.006 + 0.35 * px)).square())
    wing = wing * bell(((ex - s.eye_w) / 0.02).square())
    lower = bell(((ey - lid_low - 0.004) / (0.007 + 0.35 * px)).square()) * near
    lashes = (0.70 - 0.10 * s.male + 0.25 * c.eye_shadow).clamp(max=0.95)
    rgb = rgb * (1 - 0.40 * fold) * (1 - 0.30 * lower)
    return rgb * (1 - lashes * torch.maximum(lash, 0.8 * wing)), eye
