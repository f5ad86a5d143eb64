"""From a photo to the crop that the networks know, and back: similarity transforms from two eyes or a box."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from shared.ranges import Part, Share

Point = tuple[float, float]
Matrix = np.ndarray


class Face(NamedTuple):
    """A face in a photo, in pixels."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    eyes: tuple[Point, Point] | None
    """The eye on the picture's left and on its right, when known."""
    score: float = 1.0

    @property
    def size(self) -> float:
        """Longer side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Framing:
    """Where the eyes lie in a crop, relative to its side.

    The paper's author describes the crop as MTCNN's box of the aligned face, enlarged 1.4 times. An MTCNN box
    has about 2.3 eye distances in width and 3 in height, which gives these numbers.
    """

    eye_distance: Part = 0.24
    eye_row: Share = 0.43


DEMO_FRAMING = Framing(0.29, 0.51)
"""Of the procedural faces that the demo trains on."""
ENLARGE = 1.4


def box_of_eyes(left: Point, right: Point) -> tuple[float, float, float, float]:
    """The box that a detector would draw around a face with these eyes."""
    x, y, distance = (left[0] + right[0]) / 2, (left[1] + right[1]) / 2, math.dist(left, right)
    side = distance / Framing.eye_distance / ENLARGE
    centre = y + (0.5 - Framing.eye_row) * side * ENLARGE
    return x - 0.39 * side, centre - side / 2, x + 0.39 * side, centre + side / 2


def crop_matrix(face: Face, size: int, framing: Framing = Framing()) -> Matrix:  # noqa: B008 - frozen
    """Photo -> crop of `size` pixels, as a 2x3 matrix on pixel centres.

    With eyes: they come to lie level at the framing's places. Without: the square around the box, enlarged by
    1.4, upright. Raises ValueError when the eyes coincide or the box is empty.
    """
    if face.eyes is None:
        left, top, right, bottom = face.box
        side = face.size * ENLARGE
        if side <= 0:
            raise ValueError("the box is empty")
        scale = size / side
        x, y = (left + right) / 2 - side / 2, (top + bottom) / 2 - side / 2
        return np.array(
            [[scale, 0, -scale * x - 0.5 + 0.5 * scale], [0, scale, -scale * y - 0.5 + 0.5 * scale]]
        )
    a, b = complex(*face.eyes[0]), complex(*face.eyes[1])
    if abs(b - a) < 1:
        raise ValueError("the eyes lie at the same place")
    turn = framing.eye_distance * size / (b - a)
    shift = complex(size / 2 - 0.5, framing.eye_row * size - 0.5) - turn * (a + b) / 2
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def crop_side(matrix: Matrix, size: int) -> float:
    """Side in photo pixels of the square that a crop shows."""
    return size / math.hypot(matrix[0, 0], matrix[1, 0])


def cut(photo: np.ndarray, matrix: Matrix, size: int) -> np.ndarray:
    """Photo (H, W, 3) uint8 -> crop (size, size, 3); outside the photo its border is repeated. A photo that
    is shrunk more than twice is averaged first."""
    shrink = math.hypot(matrix[0, 0], matrix[1, 0])
    if shrink < 0.5:
        height, width = photo.shape[:2]
        reduced = max(1, round(width * 2 * shrink)), max(1, round(height * 2 * shrink))
        photo = cv2.resize(photo, reduced, interpolation=cv2.INTER_AREA)
        fx, fy = reduced[0] / width, reduced[1] / height
        # pixel centres: x' + 0.5 = fx (x + 0.5)
        back = np.array([[1 / fx, 0, 0.5 / fx - 0.5], [0, 1 / fy, 0.5 / fy - 0.5], [0, 0, 1]])
        matrix = matrix @ back
    return cv2.warpAffine(
        photo, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def paste(photo: np.ndarray, crop: np.ndarray, alpha: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Blend a crop (S, S, 3) uint8 into a photo (H, W, 3) uint8 where alpha (S, S) in [0, 1] says so.

    Only the window that the crop covers is computed. Pixels with alpha 0 stay bit for bit. Returns a new
    photo.
    """
    size, (height, width) = crop.shape[0], photo.shape[:2]
    inverse = cv2.invertAffineTransform(matrix)
    corners = inverse @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], np.float64)
    x0, y0 = np.floor(corners.min(1)).astype(int).clip(0)
    x1, y1 = np.minimum(np.ceil(corners.max(1)).astype(int) + 1, (width, height))
    result = photo.copy()
    if x1 <= x0 or y1 <= y0:
        return result
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ (x0, y0)
    where = (int(x1 - x0), int(y1 - y0))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(crop, moved, where, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    weight = cv2.warpAffine(alpha.astype(np.float32), moved, where, flags=flags)[..., None]
    window = result[y0:y1, x0:x1]
    mixed = window + (warped.astype(np.float32) - window) * weight
    window[:] = np.where(weight > 0, np.rint(mixed).clip(0, 255), window).astype(np.uint8)
    return result


def to_tensor(images: list[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Images of one size, (H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float().div_(255)


def to_arrays(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) uint8."""
    return images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class Steady:
    """Smoothes the eyes over the frames of a video: small movements are averaged, large ones followed.

    A jump of more than `cut` eye distances is another shot: smoothing starts again.
    """

    def __init__(self, least: float = 0.35, cut: float = 0.5):
        self.least, self.cut = least, cut
        self.eyes: np.ndarray | None = None

    def __call__(self, face: Face | None) -> Face | None:
        """The face of the next frame -> the face to use; None is passed on and forgets the past."""
        if face is None or face.eyes is None:
            self.eyes = None
            return face
        eyes = np.array(face.eyes)
        if self.eyes is not None:
            distance = np.linalg.norm(eyes[1] - eyes[0])
            moved = np.abs(eyes - self.eyes).max() / distance
            if moved < self.cut:
                share = min(1.0, max(self.least, 8 * moved))
                eyes = self.eyes + share * (eyes - self.eyes)
        self.eyes = eyes
        return face._replace(eyes=(tuple(map(float, eyes[0])), tuple(map(float, eyes[1]))))
