"""The pictures that accompany a face: landmark picture from 98 points, face mask from a parsing; and 98
points from 68."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LandmarkValues = Literal["unit", "signed"]

CANVAS, LINE_WIDTH = 256, 200 / 72
"""The official drawing: 2 points wide at 100 dots per inch on a canvas of 256 pixels."""
CURVES = (
    (range(60, 68), (1.0, 0.0, 0.0)),
    (range(68, 76), (1.0, 0.0, 0.0)),
    (range(76, 88), (0.0, 128 / 255, 0.0)),
    (range(88, 96), (0.0, 0.0, 1.0)),
)
"""WFLW points of each open polyline and its colour: eyes red, outer lip green, inner lip blue."""
FACE_LABELS = (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)
"""BiSeNet labels that are rewritten by a swap: skin, brows, eyes, glasses, nose, mouth, lips. Hair, ears and
neck stay."""


def draw_landmarks(points: Tensor, size: int, values: LandmarkValues = "unit") -> Tensor:
    """98 WFLW points (B, 98, 2), x and y in pixels of the picture, (0, 0) the centre of the first pixel ->
    landmark pictures (B, 3, size, size).

    Eyes and lips as antialiased coloured lines on white, as wide as the official drawing makes them relative
    to the picture. values "unit": white 1, colours in [0, 1], what the official files hold after loading;
    "signed": the plain drawing on [-1, 1]. Raises ValueError on another number of points.
    """
    if points.dim() != 3 or tuple(points.shape[1:]) != (98, 2):
        raise ValueError(f"points must have shape (B, 98, 2), got {tuple(points.shape)}")
    # Below a pixel's width a line would break up: it is kept a pixel wide.
    half = max(LINE_WIDTH * size / CANVAS, 1.0) / 2
    axis = torch.arange(size, device=points.device, dtype=torch.float32)
    picture = torch.ones(len(points), 3, size, size, device=points.device)
    for chosen, colour in CURVES:
        curve = points[:, chosen.start : chosen.stop].float()
        # only the rectangle that the curves of the batch touch
        low = (curve.amin((0, 1)) - half - 1).floor().clamp(0, size - 1).int().tolist()
        high = (curve.amax((0, 1)) + half + 2).ceil().clamp(1, size).int().tolist()
        x, y = (axis[lo : max(hi, lo + 1)] for lo, hi in zip(low, high, strict=True))
        cover = (half + 0.5 - _distance(curve, x, y)).clamp(0, 1)[:, None]
        ink = torch.tensor(colour, device=points.device).view(1, 3, 1, 1)
        view = picture[:, :, low[1] : low[1] + len(y), low[0] : low[0] + len(x)]
        view += cover * (ink - view)
    return picture if values == "unit" else picture * 2 - 1


def _distance(curve: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Distance of pixels to the nearest segment of open polylines (B, n, 2): (B, len(y), len(x))."""
    nearest = torch.full((len(curve), len(y), len(x)), torch.inf, device=curve.device)
    for start, end in zip(curve[:, :-1].unbind(1), curve[:, 1:].unbind(1), strict=True):
        along = end - start
        dx = x.view(1, 1, -1) - start[:, 0].view(-1, 1, 1)
        dy = y.view(1, -1, 1) - start[:, 1].view(-1, 1, 1)
        ax, ay = along[:, 0].view(-1, 1, 1), along[:, 1].view(-1, 1, 1)
        share = ((dx * ax + dy * ay) / (ax * ax + ay * ay).clamp_min(1e-8)).clamp(0, 1)
        nearest = torch.minimum(nearest, (dx - share * ax).square() + (dy - share * ay).square())
    return nearest.sqrt()


def to_file(picture: Tensor) -> Tensor:
    """A landmark picture with `unit` values -> what is written to disk, in [0, 1]: red is (1, .5, .5), so
    that the loader's (p - 0.5) / 0.5 gives the `unit` values back."""
    return picture / 2 + 0.5


def face_mask(labels: Tensor) -> Tensor:
    """BiSeNet label map, any shape -> bool, True in the face."""
    table = torch.zeros(256, dtype=torch.bool, device=labels.device)
    table[list(FACE_LABELS)] = True
    return table[labels.long()]


def ibug_to_wflw(points: Tensor) -> Tensor:
    """68 iBUG points (B, 68, 2) -> 98 WFLW points (B, 98, 2).

    Lips and corners correspond; contour and nose bridge are resampled along their polylines, eyes get the
    points between the given ones, the lower brow lies below the upper one by a fifth of the brow's length,
    the pupils are the means of the eyes.
    """
    contour = _resample(points[:, :17], 33)
    brows = []
    for upper in (points[:, 17:22], points[:, 22:27]):
        down = points[:, 33:34] - points[:, 27:28]
        down = down / down.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        thick = 0.2 * (upper[:, -1:] - upper[:, :1]).norm(dim=-1, keepdim=True)
        lower = _resample(upper, 6)[:, 1:-1].flip(1) + down * thick
        brows.append(torch.cat((upper, lower), 1))
    nose = torch.cat((points[:, 27:31], points[:, 31:36]), 1)
    eyes, pupils = [], []
    for eye in (points[:, 36:42], points[:, 42:48]):
        top, bottom = eye[:, 1:3].mean(1, keepdim=True), eye[:, 4:6].mean(1, keepdim=True)
        eyes.append(torch.cat((eye[:, :2], top, eye[:, 2:5], bottom, eye[:, 5:]), 1))
        pupils.append(eye.mean(1, keepdim=True))
    return torch.cat((contour, *brows, nose, *eyes, points[:, 48:68], *pupils), 1)


def _resample(line: Tensor, count: int) -> Tensor:
    """Points (B, n, 2) -> (B, count, 2), evenly spaced in the index of the points."""
    return F.interpolate(line.transpose(1, 2), count, mode="linear", align_corners=True).transpose(1, 2)
