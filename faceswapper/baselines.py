"""Swaps that need no training: the target itself, pasted sources, the mean face.

All take and give pictures (B, 3, S, S) in [-1, 1]; mask (B, 1, S, S) of the target, 1 = background.
"""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RIM = 4
"""Pixels by which pictures are widened for Poisson blending, which cannot touch the border."""
ANCHORS = (range(60, 68), range(68, 76), range(76, 88))
"""WFLW points whose means align two faces: eyes and mouth."""


def paste(source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The source's pixels inside the target's face mask."""
    return torch.lerp(source, target, mask)


def align(source: Tensor, points: Tensor, onto: Tensor) -> Tensor:
    """Source warped by the affine map that brings its eyes and mouth onto the target's.

    points, onto: 98 points (B, 98, 2) of source and target in pixels, (0, 0) the centre of the first pixel.
    """
    size = source.shape[-1]
    anchors = [torch.stack([p[:, r.start : r.stop].mean(1) for r in ANCHORS], 1) for p in (points, onto)]
    here, there = ((2 * p + 1) / size - 1 for p in anchors)  # as grid_sample counts
    ones = torch.ones_like(there[..., :1])
    affine = torch.linalg.solve(torch.cat((there, ones), -1), here).transpose(1, 2)
    grid = F.affine_grid(affine, list(source.shape), align_corners=False)
    return F.grid_sample(source, grid, padding_mode="border", align_corners=False)


def match_colours(source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Source with mean and deviation of every channel in the target's face region brought to the target's."""
    face = 1 - mask
    area = face.sum((2, 3), keepdim=True).clamp_min(1)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x * face).sum((2, 3), keepdim=True) / area
        return mean, (((x - mean).square() * face).sum((2, 3), keepdim=True) / area).sqrt()

    (m, s), (wanted_m, wanted_s) = moments(source), moments(target)
    return ((source - m) * (wanted_s / s.clamp_min(1e-3)) + wanted_m).clamp(-1, 1)


def poisson(source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Gradients of the source inside the target's face mask, colours of the rim from the target (Perez et
    al., 2003), by OpenCV's seamlessClone. A picture without face pixels comes back as it is."""
    out = target.clone()
    for i in range(len(target)):
        face = (mask[i, 0] < 0.5).cpu().numpy().astype(np.uint8) * 255
        if not face.any():
            continue
        pictures = [
            (x[i].permute(1, 2, 0).cpu().numpy() * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)
            for x in (source, target)
        ]
        wide = [cv2.copyMakeBorder(x, RIM, RIM, RIM, RIM, cv2.BORDER_REPLICATE) for x in pictures]
        hole = cv2.copyMakeBorder(face, RIM, RIM, RIM, RIM, cv2.BORDER_CONSTANT, value=0)
        x, y, width, height = cv2.boundingRect(hole)
        centre = (x + width // 2, y + height // 2)
        blended = cv2.seamlessClone(wide[0], wide[1], hole, centre, cv2.NORMAL_CLONE)[RIM:-RIM, RIM:-RIM]
        out[i] = torch.from_numpy(blended).permute(2, 0, 1).to(out) / 127.5 - 1
    return out


def untrained(
    source: Tensor,
    target: Tensor,
    mask: Tensor,
    mean_face: Tensor,
    points: Tensor | None = None,
    onto: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every baseline by name. mean_face (3, S, S): mean of many aligned faces. points, onto: 98 points of
    source and target; with them the pasted sources are aligned."""
    out = {"copy target": target, "paste": paste(source, target, mask)}
    if points is not None:
        source = align(source, points, onto)
        out["paste, aligned"] = paste(source, target, mask)
    out["paste, colours matched"] = paste(match_colours(source, target, mask), target, mask)
    out["paste, Poisson"] = poisson(source, target, mask)
    out["mean face"] = paste(mean_face.expand_as(target), target, mask)
    return out
