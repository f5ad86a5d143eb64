"""FFHQ's alignment of a photo, from five given landmarks. There is no detector here."""

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.runtime import UserError

POINTS = "left eye, right eye, nose, left mouth corner, right mouth corner"


def face_square(landmarks: Tensor) -> Tensor:
    """Five points (5, 2) in pixels (x, y), left and right as seen in the picture -> (3, 2).

    Rows: centre of FFHQ's oriented square and its half sides to the right and downwards. UserError when the
    points are no face.
    """
    if landmarks.shape != (5, 2) or not landmarks.isfinite().all():
        raise UserError(f"landmarks: five points x y are needed ({POINTS}), not {landmarks.tolist()}")
    left, right, _, mouth_left, mouth_right = landmarks
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    across, down = right - left, mouth - eyes
    if across.norm() < 1 or down.norm() < 1 or across[0] <= 0:
        raise UserError(f"landmarks: these points are no face; give x y of {POINTS}, as seen in the picture")
    # The mean of both directions, so that neither a turned head nor an open mouth tilts the square.
    axis = across - torch.stack((-down[1], down[0]))
    axis = axis / axis.norm() * max(2.0 * across.norm().item(), 1.8 * down.norm().item())
    return torch.stack((eyes + 0.1 * down, axis, torch.stack((-axis[1], axis[0]))))


def align_face(image: Tensor, landmarks: Tensor, size: int) -> Tensor:
    """Photo (3, H, W) and five landmarks (5, 2) in pixels -> aligned face (3, size, size), antialiased.

    Beyond the photo's edge its border is mirrored.
    """
    centre, right, down = face_square(landmarks.float())
    height, width = image.shape[-2:]
    if max(right.norm().item(), *(centre - torch.tensor((width / 2, height / 2))).abs()) > 2 * max(
        height, width
    ):
        raise UserError(f"landmarks: these points lie far outside the photo of {width} x {height} pixels")
    # A larger picture first, then area averages: sampling a big photo at few points would alias.
    fine = size * max(1, round(2 * right.norm().item() / size))
    steps = (torch.arange(fine) + 0.5) / fine * 2 - 1
    points = centre + steps[None, :, None] * right + steps[:, None, None] * down  # (fine, fine, 2)
    grid = points / torch.tensor((width, height)) * 2 - 1
    sampled = F.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=False)
    return F.adaptive_avg_pool2d(sampled, size)[0]
