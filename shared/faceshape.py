"""The head of a procedural face as a solid: numbers of its parts, projection, and the 68 landmarks.

Head coordinates: x to the right of the picture, y down, z towards the viewer; the pupils lie near y = 0, the
chin of an
adult near y = 0.6, half the width of a face is about 0.48. Row y of the head is the ellipse with half axes
w(y) across
and DEPTH * w(y) in depth around z = zc(y). A relief (nose, brows, cheeks, chin) is added along z.
Yaw turns about x = z = 0, pitch about y = PIVOT; the projection is orthographic.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from shared.faceparams import Params

DEPTH = 1.0
PIVOT = 0.25
CHEEK_ROW = 0.04
LOG2E = 1.4426950408889634
CENTRE_Y = 0.05  # where head point (0, 0) lies in the picture, in half heights


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, smooth between; overwrites its argument."""
    x = x.clamp_(0, 1)
    return (x * -2).add_(3).mul_(x).mul_(x)


def bell(square: Tensor) -> Tensor:
    """exp(-square), overwriting its argument; tails below 1e-13 stand still, because results near the
    smallest float take the processor a hundred times longer."""
    return square.clamp_(max=30).mul_(-LOG2E).exp2_()  # a third of the time of exp


def root(x: Tensor) -> Tensor:
    """Square root, 1e-6 for all below 1e-12: roots of exact zeros take ten times longer. Overwrites x."""
    return x.clamp_(min=1e-12).sqrt_()


def above(x: Tensor, level: float | Tensor) -> Tensor:
    """1 where x > level, otherwise 0, as floats: a quarter of the time of booleans."""
    return torch.gt(x, level, out=torch.empty_like(x))


def build_shape(params: Params) -> SimpleNamespace:
    """Numbers of every part of B heads, each (B, 1, 1, 1): identity, age and expression put together."""

    def column(name: str) -> Tensor:
        return params[name].reshape(-1, 1, 1, 1).to(torch.float32)

    def centred(name: str) -> Tensor:
        return column(name) * 2 - 1

    s = SimpleNamespace()
    age = column("age")
    s.child = child = smoothstep((19 - age) / 17)
    s.old = old = smoothstep((age - 32) / 52)
    s.male = male = centred("masculinity") * (1 - 0.85 * child)
    smile, s.open = column("smile"), column("mouth_open").clamp(0, 1)
    s.smile, s.grin, s.frown = smile, smile.clamp(min=0), (-smile).clamp(min=0)
    raised = column("brow_raise")

    # outline
    s.width = 0.468 + 0.034 * centred("face_width") + 0.014 * male + 0.012 * child
    s.top = -(0.69 + 0.035 * centred("forehead") + 0.04 * child)
    s.chin = 0.600 + 0.045 * centred("face_length") + 0.018 * male - 0.105 * child
    s.chin_open = s.chin + 0.075 * s.open
    s.lower_a = 0.20 + 0.34 * centred("jaw") + 0.14 * male + 0.22 * child + 0.12 * old
    s.lower_b = 0.12 + 0.34 * centred("chin") + 0.16 * male + 0.15 * child + 0.22 * old
    s.upper_a = 0.34 - 0.16 * centred("cheekbones")
    s.jut = 0.24 + 0.02 * male - 0.05 * child

    # eyes and brows
    size = 1 + 0.13 * centred("eye_size") + 0.16 * child
    s.eye_x = 0.203 + 0.020 * centred("eye_spacing") + 0.25 * (s.width - 0.47)
    s.eye_y = 0.020 * centred("eye_row") + 0.045 * child
    s.eye_w = 0.103 * size - 0.003 * male
    round_ = 1 + 0.22 * centred("eye_roundness") + 0.22 * child - 0.08 * male
    s.lid_top = 0.050 * size * round_
    s.lid_low = 0.027 * size * round_ * (1 - 0.35 * s.grin)
    opening = column("eye_open") * (1 - 0.12 * s.grin) * (1 - 0.14 * old) - 0.06 * old * column("eyelid")
    s.lid_up = s.lid_top * opening - s.lid_low * (1 - opening) * 0.9
    s.eye_tilt = 0.10 * centred("eye_tilt") + 0.03 - 0.09 * old
    s.iris = 0.0495 * size * (1 + 0.04 * child)
    s.gaze_x, s.gaze_y = 0.040 * column("gaze_x"), 0.024 * column("gaze_y")
    s.fold = 0.020 + 0.016 * column("eyelid") + 0.004 * child  # height of the crease above the lid
    s.brow_y = s.eye_y - 0.122 - 0.018 * centred("brow_height") + 0.012 * male + 0.010 * old - 0.032 * raised
    s.brow_y = s.brow_y - 0.006 * child
    s.brow_w = 0.124 * (1 + 0.12 * centred("brow_length"))
    s.brow_t = 0.0175 * (1 + 0.5 * centred("brow_thickness") + 0.28 * male) * (1 - 0.25 * child)
    s.brow_arch = 0.026 * (1 + 0.8 * centred("brow_arch") - 0.35 * male) + 0.012 * raised.clamp(min=0)
    s.brow_tilt = 0.10 * centred("brow_tilt") + 0.16 * s.frown - 0.05 * old

    # nose
    s.nose_root = s.eye_y - 0.02
    s.nose_y = (0.232 + 0.030 * centred("nose_length") + 0.008 * male + 0.014 * old) * (1 - 0.22 * child)
    s.nose_y = s.nose_y + 0.035 * child
    s.nose_w = 0.094 * (1 + 0.20 * centred("nose_width") + 0.05 * male + 0.06 * old) * (1 - 0.14 * child)
    s.nose_w = s.nose_w * (1 + 0.06 * s.grin)
    s.bridge = 0.062 + 0.030 * centred("nose_bridge") + 0.010 * male - 0.036 * child
    s.tip = 0.150 + 0.022 * centred("nose_tip") + 0.008 * male - 0.055 * child

    # mouth
    s.mouth_y = s.nose_y + 0.153 + 0.020 * centred("mouth_row") - 0.032 * child + 0.006 * old
    s.mouth_w = 0.148 * (1 + 0.14 * centred("mouth_width") + 0.04 * male) * (1 - 0.13 * child)
    s.mouth_w = s.mouth_w * (1 + 0.20 * s.grin - 0.08 * s.frown - 0.10 * s.open)
    s.lip_up = (
        0.031 * (1 + 0.42 * centred("upper_lip") - 0.12 * male) * (1 - 0.38 * old) * (1 - 0.15 * s.grin)
    )
    s.lip_low = (
        0.041 * (1 + 0.36 * centred("lower_lip") - 0.08 * male) * (1 - 0.28 * old) * (1 - 0.12 * s.grin)
    )
    s.bow = 0.22 + 0.5 * column("cupid_bow")
    s.curve = 0.046 * smile + 0.010
    s.gap_up = 0.012 * s.open + 0.006 * s.grin * s.open
    s.gap_low = 0.115 * s.open
    s.ear = (1 + 0.16 * centred("ear_size") + 0.05 * male + 0.14 * old) * (1 + 0.06 * child)
    s.ear_out = 0.022 + 0.040 * column("ear_angle")

    # pose
    yaw, pitch, roll = (torch.deg2rad(column(name)) for name in ("yaw", "pitch", "roll"))
    s.sin_yaw, s.cos_yaw, s.sin_pitch, s.cos_pitch = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    s.tan_pitch = pitch.tan()
    s.sin_roll, s.cos_roll = roll.sin(), roll.cos()
    s.rho = (s.cos_yaw**2 + (DEPTH * s.sin_yaw) ** 2).sqrt()  # width of a turned row over w(y)
    s.cos_delta, s.sin_delta = s.cos_yaw / s.rho, DEPTH * s.sin_yaw / s.rho
    s.scale = 1.03 * column("scale") * (1 - 0.07 * child)
    s.shift_x, s.shift_y = column("shift_x"), column("shift_y") + CENTRE_Y
    return s


def profile(s: SimpleNamespace, y: Tensor) -> tuple[Tensor, Tensor]:
    """w(y)^2 and zc(y); negative w^2 lies beyond skull and chin."""
    t2, body, *_, low = _profile(s, y)
    area = (1 - t2).mul_(body).mul_(s.width * s.width)
    return area, t2.clamp_(max=1.2).mul_(low).mul_(s.jut)


def profile_slope(s: SimpleNamespace, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the derivative of w^2 between them."""
    t2, body, ab, b, held, t, inverse, low = _profile(s, y)
    rest, area = 1 - t2, s.width * s.width
    slope = ab.addcmul_(b, held).mul_(rest).sub_(body).mul_(t.mul_(inverse)).mul_(2 * area)
    return body.mul_(rest).mul_(area), slope, t2.clamp_(max=1.2).mul_(low).mul_(s.jut)


def _profile(s: SimpleNamespace, y: Tensor) -> tuple[Tensor, ...]:
    low = above(y, CHEEK_ROW)
    up, down = 1 / (s.top - CHEEK_ROW), 1 / (s.chin_open - CHEEK_ROW)
    inverse = (low * (down - up)).add_(up)
    t = (y - CHEEK_ROW).mul_(inverse)
    t2 = t * t
    # Beyond the chin the factor of a narrow jaw would turn negative and the head begin again: it is held.
    held = t2.clamp(max=1.02)
    b = low * s.lower_b
    ab = (low * (s.lower_a - s.upper_a)).add_(s.upper_a).addcmul_(b, held)  # a + b t^2
    return t2, (ab * held).add_(1), ab, b, held, t, inverse, low


def nose_relief(s: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """Height of the nose over the head's surface."""
    t = ((y - s.nose_root) * (1 / (s.nose_y - s.nose_root))).clamp_(0, 1)
    t2 = t * t
    height = (t2 * (s.tip - s.bridge)).add_(s.bridge).mul_(t.mul_(4).clamp_(max=1))
    sigma = t2.mul_(0.30 * (s.nose_w - 0.04)).add_(0.034)
    below = (y - (s.nose_y - 0.005)).clamp_(min=0).mul_(24)
    return height.mul_(bell((x / sigma).square_().addcmul_(below, below)))


def project(s: SimpleNamespace, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Head points (B, N) to picture coordinates in half heights, (0, 0) the middle."""
    flat = {k: getattr(s, k).reshape(-1, 1) for k in ("sin_yaw", "cos_yaw", "sin_pitch", "cos_pitch")}
    u = x * flat["cos_yaw"] + z * flat["sin_yaw"]
    z1 = z * flat["cos_yaw"] - x * flat["sin_yaw"]
    v = PIVOT + (y - PIVOT) * flat["cos_pitch"] - z1 * flat["sin_pitch"]
    return to_picture(s, u, v)


def to_picture(s: SimpleNamespace, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of the picture plane: roll, scale and shift, for (B, N) points."""
    scale, c, r = s.scale.reshape(-1, 1), s.cos_roll.reshape(-1, 1), s.sin_roll.reshape(-1, 1)
    return scale * (u * c - v * r) + s.shift_x.reshape(-1, 1), scale * (u * r + v * c) + s.shift_y.reshape(
        -1, 1
    )


@dataclass
class Place:
    """Pixels in the picture plane after undoing roll, shift and scale."""

    px: float  # size of a pixel in half heights
    u: Tensor
    v: Tensor


@dataclass
class Frame(Place):
    """Head coordinates of pixels, each (B, 1, H, W)."""

    x: Tensor  # on the surface of the head
    y: Tensor
    normal: tuple[Tensor, Tensor, Tensor]  # of the surface without relief, seen from the camera
    distance: Tensor  # signed distance to the outline of the head in the picture plane, negative inside


def upright(
    s: SimpleNamespace, rows: Tensor, columns: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Places (u, v) of pixels in the picture plane after undoing roll, shift and scale, (B, 1, h, w): rows
    (B, h) and columns (B, w) of a picture."""
    px = 2.0 / height
    a = (((columns + 0.5) * px - width / height)[:, None, None, :] - s.shift_x) / s.scale
    b = (((rows + 0.5) * px - 1)[:, None, :, None] - s.shift_y) / s.scale
    return a * s.cos_roll + b * s.sin_roll, b * s.cos_roll - a * s.sin_roll


def frame(s: SimpleNamespace, px: float, u: Tensor, v: Tensor) -> Frame:
    """Finds for every pixel the point of the head that it shows: two fixed-point steps on the depth."""
    vp = v - PIVOT
    depth = root(1 - (u * (1 / s.width)).square_() - (v * (1 / 0.75)).square_()).mul_(0.5)
    level_y, fall = vp * s.cos_pitch + PIVOT, vp.mul_(s.tan_pitch)
    # first step, with the depth of the ellipsoid
    y = torch.addcmul(level_y, depth, s.sin_pitch)
    area, zc = profile(s, y)
    w = area.clamp_(min=1e-4).sqrt_()
    sin_a, cos_a = _angle(s, w, u - zc * s.sin_yaw)
    x = sin_a.mul_(w)
    nose = nose_relief(s, x, y)
    z = zc.addcmul_(w, cos_a, value=DEPTH)
    depth = (z.mul_(s.cos_yaw / s.cos_pitch)).addcmul_(x, -s.sin_yaw / s.cos_pitch).add_(fall)
    # second step, with that of the first
    y = level_y.addcmul_(depth, s.sin_pitch)
    area, slope, zc = profile_slope(s, y)
    w = area.clamp(min=1e-4).sqrt_()
    base = zc.mul_(-s.sin_yaw).add_(u)
    sin_a, cos_a = _angle(s, w, base - nose.mul_(s.sin_yaw))
    x = w * sin_a
    inverse = 1 / s.rho
    level = (base * inverse).square_().sub_(area)
    gradient = base.mul_(2 * inverse * inverse).square_().addcmul_(slope, slope).add_(1e-3).rsqrt_()
    # normal of the ellipse stack: (sin a, -w', cos a / DEPTH), turned by yaw, then pitch
    ny, nz = slope.mul_(-0.5).div_(w), cos_a * (1 / DEPTH)
    nx = (sin_a * s.cos_yaw).addcmul_(nz, s.sin_yaw)
    nz = nz.mul_(s.cos_yaw).addcmul_(sin_a, -s.sin_yaw)
    turned = (ny * s.cos_pitch).addcmul_(nz, -s.sin_pitch)
    nz = nz.mul_(s.cos_pitch).addcmul_(ny, s.sin_pitch)
    length = (nx * nx).addcmul_(turned, turned).addcmul_(nz, nz).clamp_(min=1e-4).rsqrt_()
    # behind the ear line the surface runs on: |x| grows past w, so that marks of the front do not repeat
    # there
    back = cos_a.clamp_(max=0).mul_(w)
    x = x.addcmul_(back, x.sign(), value=-0.8)
    normal = (nx.mul_(length), turned.mul_(length), nz.mul_(length))
    return Frame(px, u, v, x, y, normal, level.mul_(gradient))


def _angle(s: SimpleNamespace, w: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the place on its ellipse of a point seen offset (overwritten) beside its middle."""
    sin_b = offset.div_(w * s.rho).clamp_(-1, 1)
    cos_b = root(1 - sin_b * sin_b)
    sin_a = (sin_b * s.cos_delta).addcmul_(cos_b, -s.sin_delta)
    return sin_a, cos_b.mul_(s.cos_delta).addcmul_(sin_b, s.sin_delta)


def surface(s: SimpleNamespace, x: Tensor, y: Tensor) -> Tensor:
    """Depth z of points of the face; s holds numbers of a shape that goes with x and y."""
    area, zc = profile(s, y)
    return zc + DEPTH * (area - x * x).clamp(min=0).sqrt() + nose_relief(s, x, y)


def eye_curves(s: SimpleNamespace, ex: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower lid over ex in [-1, 1] (nose to temple), as offsets in y from the eye's axis."""
    q = 1 - ex * ex
    upper = -s.lid_up * q * (1 - 0.22 * ex)
    return upper, s.lid_low * q * (1 + 0.25 * ex)


def lip_curves(s: SimpleNamespace, mx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outer upper, inner upper, inner lower and outer lower lip over mx in [-1, 1], as offsets from the
    mouth's row."""
    m2 = mx * mx
    q = (1 - m2).clamp(min=0)
    centre = s.curve * (0.35 - m2)  # corners rise when curve > 0
    inner_up = centre - s.gap_up * q
    inner_low = centre + s.gap_low * q * (1 + 0.2 * q)
    rise = q * (1 + 0.35 * (1 - q)) - s.bow * bell(60 * m2)
    upper = inner_up - s.lip_up * rise
    lower = inner_low + s.lip_low * q * (0.75 + 0.35 * q)
    return upper, inner_up, inner_low, lower


def landmarks(s: SimpleNamespace, height: int, width: int) -> Tensor:
    """The 68 points in iBUG order, (B, 68, 2) as x, y in pixels (0, 0: centre of the first pixel)."""
    f = SimpleNamespace(**{k: v.reshape(-1, 1) for k, v in vars(s).items()})
    one = torch.ones_like(f.width)
    points: list[tuple[Tensor, Tensor, Tensor]] = []

    # 0-16: visible outline of the jaw, from ear to ear
    angle = torch.linspace(-0.02, 1, 9, device=one.device) * (torch.pi / 2)
    y = CHEEK_ROW + (f.chin_open - CHEEK_ROW) * angle.sin()
    area, zc = profile(f, y)
    w = area.clamp(min=0).sqrt()
    left, right = [], []
    for side, out in ((-1.0, left), (1.0, right)):
        # at the outline sin b = +-1, so that sin a = +-cos delta and cos a = +-sin delta
        out.extend([side * w * f.cos_delta, y, zc + side * w * f.sin_delta * DEPTH])
    points.append(
        (torch.cat([left[0], right[0].flip(1)[:, 1:]], 1),)
        + tuple(torch.cat([left[i], right[i].flip(1)[:, 1:]], 1) for i in (1, 2))
    )

    def add(x: Tensor, y: Tensor) -> None:
        points.append((x, y, surface(f, x, y)))

    # 17-26: brows, each from left to right
    bx = torch.linspace(0.95, -0.95, 5, device=one.device)
    x, y = brow_point(f, bx)
    add(-x, y)
    add(x.flip(1), y.flip(1))
    # 27-35: ridge of the nose, then its base
    t = torch.linspace(0, 1, 4, device=one.device)
    y = f.nose_root + 0.03 + (f.nose_y - f.nose_root - 0.03) * t
    zero = torch.zeros_like(y)
    add(zero, y)
    bx = torch.tensor([-0.78, -0.4, 0.0, 0.4, 0.78], device=one.device) * f.nose_w
    y = f.nose_y + torch.tensor([0.018, 0.034, 0.042, 0.034, 0.018], device=one.device) * one
    add(bx, y)
    # 36-47: eyes, corner - upper lid - corner - lower lid, the first eye on the left of the picture
    ex = torch.tensor([1.0, 0.4, -0.4, -1.0, -0.4, 0.4], device=one.device) * one
    upper, lower = eye_curves(f, ex)
    is_low = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], device=one.device)
    x, y = eye_point(f, ex * f.eye_w, torch.lerp(upper, lower, is_low.expand_as(upper)))
    add(-x, y)
    order = torch.tensor([3, 2, 1, 0, 5, 4], device=one.device)
    add(x[:, order], y[:, order])
    # 48-67: outer and inner lips
    mx = (
        torch.tensor(
            [-1.0, -0.62, -0.2, 0.0, 0.2, 0.62, 1.0, 0.62, 0.25, 0.0, -0.25, -0.62], device=one.device
        )
        * one
    )
    outer_up, _, _, outer_low = lip_curves(f, mx)
    y = torch.cat([outer_up[:, :7], outer_low[:, 7:]], 1)
    add(mx * f.mouth_w, f.mouth_y + y)
    mx = torch.tensor([-0.9, -0.35, 0.0, 0.35, 0.9, 0.35, 0.0, -0.35], device=one.device) * one
    _, inner_up, inner_low, _ = lip_curves(f, mx)
    y = torch.cat([inner_up[:, :5], inner_low[:, 5:]], 1)
    add(mx * f.mouth_w, f.mouth_y + y)

    x, y, z = (torch.cat([p[i] for p in points], 1) for i in range(3))
    a, b = project(s, x, y, z)
    return torch.stack([(a + width / height) * height / 2 - 0.5, (b + 1) * height / 2 - 0.5], dim=2)


def brow_point(s: SimpleNamespace, bx: Tensor) -> tuple[Tensor, Tensor]:
    """Middle line of the brow on the right of the picture over bx in [-1, 1] (nose to temple)."""
    x = s.eye_x + 0.012 + bx * s.brow_w
    y = s.brow_y + s.brow_arch * (bx - 0.25).square() * 1.1 - s.brow_tilt * bx * s.brow_w - 0.012
    return x, y


def eye_point(s: SimpleNamespace, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """From the tilted frame of the eye on the right of the picture to head coordinates."""
    return s.eye_x + dx + dy * s.eye_tilt, s.eye_y + dy - dx * s.eye_tilt
