"""Semantic layouts: the classes of the public face parsers, label maps, one-hot maps, mirroring.

A layout is a map of 19 classes. Two orders of them are in use; this code works in the order of the public
BiSeNet parser and converts the other one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = (
    *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r"),
    *("nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
)
"""Order of zllrunning/face-parsing.PyTorch's BiSeNet."""

CELEBAMASK_CLASSES = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth"),
    *("u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""Order of the masks that CelebAMask-HQ's own `g_mask.py` writes."""

SIDES = (("l_brow", "r_brow"), ("l_eye", "r_eye"), ("l_ear", "r_ear"))
"""Classes that change places when a picture is mirrored."""

COLOURS = torch.tensor(
    [
        *((60, 60, 66), (246, 203, 164), (130, 76, 32), (160, 96, 44), (40, 120, 230), (70, 160, 250)),
        *((20, 200, 200), (225, 150, 120), (205, 130, 100), (240, 220, 60), (250, 160, 60), (140, 20, 40)),
        *((230, 50, 80), (200, 30, 110), (220, 180, 140), (180, 180, 40), (90, 150, 90), (95, 55, 130)),
        (170, 110, 200),
    ]
).div(255)
"""(19, 3) RGB in [0, 1], for pictures of layouts."""


def from_celebamask(labels: Tensor) -> Tensor:
    """Labels in CelebAMask-HQ's order -> BiSeNet's order; any shape, dtype kept."""
    table = torch.tensor([CLASSES.index(name) for name in CELEBAMASK_CLASSES], device=labels.device)
    return table[labels.long()].to(labels.dtype)


def mirrored(labels: Tensor) -> Tensor:
    """Label maps (..., H, W) of the 19 classes as they are in the mirrored picture: turned, and with left and
    right brow, eye and ear exchanged."""
    swap = list(range(len(CLASSES)))
    for left, right in SIDES:
        i, j = CLASSES.index(left), CLASSES.index(right)
        swap[i], swap[j] = j, i
    table = torch.tensor(swap, device=labels.device)
    return table[labels.flip(-1).long()].to(labels.dtype)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) at another size, by nearest neighbour: labels must not be averaged."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


def to_labels(layout: Tensor, classes: int) -> Tensor:
    """A layout as the networks take it -> label map (B, H, W) int64.

    layout: label map (B, H, W) of integers, or one-hot (B, classes, H, W). ValueError on another shape.
    """
    if layout.ndim == 3 and not layout.is_floating_point():
        return layout.long()
    if layout.ndim == 4 and layout.shape[1] == classes:
        return layout.argmax(1)
    raise ValueError(
        f"layout must be (B, H, W) integers or (B, {classes}, H, W) one-hot, got {tuple(layout.shape)}"
    )


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Label map (B, H, W) of integers -> float32 (B, classes, H, W) of 0 and 1."""
    shape = (labels.shape[0], classes, *labels.shape[1:])
    return torch.zeros(shape, device=labels.device).scatter_(1, labels[:, None].long(), 1.0)


def paint_layout(labels: Tensor) -> Tensor:
    """Label map (..., H, W) -> picture (..., 3, H, W) in [0, 1]."""
    return COLOURS.to(labels.device)[labels.long()].movedim(-1, -3)
