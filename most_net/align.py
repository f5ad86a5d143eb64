"""Eye alignment: turn, scale and cut a picture so that both eyes lie at fixed places of the 200x250 frame."""

import math
import re
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from shared.io import read_utf8
from shared.runtime import UserError

HEIGHT, WIDTH = 250, 200
EYES = ((75.0, 125.0), (125.0, 125.0))
"""(x, y) of the eye on the picture's left and on its right, recalled from the public aligned packages."""

Point = tuple[float, float]


def align_to_eyes(
    image: Tensor, eyes: tuple[Point, Point], height: int = HEIGHT, width: int = WIDTH
) -> Tensor:
    """(C, H, W) in [0, 1] -> (C, height, width) with the eyes at `EYES`, scaled with the frame's height.

    eyes: (x, y) in pixels of the left and right eye in the picture. Outside the picture its border is
    repeated. Shrinks by area averaging first, so that lines do not alias. Raises ValueError when the eyes
    coincide.
    """
    (x1, y1), (x2, y2) = eyes
    distance = math.hypot(x2 - x1, y2 - y1)
    if distance < 1:
        raise ValueError("the eyes lie at the same place")
    scale = height / HEIGHT
    array = image.permute(1, 2, 0).contiguous().numpy()
    shrink = scale * (EYES[1][0] - EYES[0][0]) / distance
    if shrink < 0.5:
        size = (max(1, round(array.shape[1] * 2 * shrink)), max(1, round(array.shape[0] * 2 * shrink)))
        factors = size[0] / array.shape[1], size[1] / array.shape[0]
        array = cv2.resize(array, size, interpolation=cv2.INTER_AREA)
        (x1, y1), (x2, y2) = ((x * factors[0], y * factors[1]) for x, y in eyes)
    matrix = _similarity(((x1, y1), (x2, y2)), tuple((x * scale, y * scale) for x, y in EYES))
    warped = cv2.warpAffine(
        array, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return torch.from_numpy(warped.reshape(height, width, -1)).permute(2, 0, 1).clamp(0, 1)


def _similarity(source: tuple[Point, Point], target: tuple[Point, Point]) -> np.ndarray:
    """The rotation, scaling and shift that takes two points to two others, as a 2x3 matrix."""
    a, b, c, d = (complex(*point) for point in (*source, *target))
    turn = (d - c) / (b - a)
    shift = c - turn * a
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def read_eyes(path: Path, points: tuple[int, int] = (16, 18)) -> tuple[Point, Point]:
    """Eye centres from a landmark file: one "x y" per line or all on one line.

    Files of 2 to 5 points (FERET's .pos and .3pts) begin with the eyes. In longer ones, such as the 35 points
    of CUFS, `points` are the numbers of the eyes, from 0. Whichever lies further left comes first. Raises
    UserError on a missing or foreign file.
    """
    text = read_utf8(path, "landmarks, x y per line,")
    numbers = [float(word) for word in re.findall(r"-?\d+(?:\.\d+)?", text)]
    found = list(zip(numbers[::2], numbers[1::2], strict=False))
    first, second = (0, 1) if len(found) <= 5 else points
    if len(numbers) % 2 or len(found) <= max(first, second):
        raise UserError(
            f"{path}: {len(numbers)} numbers; expected x y per line and points number {first} and {second}"
        )
    left, right = sorted((found[first], found[second]))
    if right[0] - left[0] < 2:
        raise UserError(f"{path}: points {first} and {second} are no two eyes; set --alignment.eye-points")
    return left, right
