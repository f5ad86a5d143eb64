"""Metrics of face swapping, in the definitions of the protocol that FaceShifter introduced.

Networks are plugged in: the paper's own are a CosFace recogniser, Hopenet for pose and a network or a 3-D
model for expression. What is measured without them is called a proxy and is not comparable with published
numbers.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics import psnr, ssim
from shared.onnxfile import open_onnx
from shared.runtime import UserError

EYES = ((60, 68), (68, 76))
OUTER_LIP, INNER_LIP = (76, 88), (88, 96)
OPENINGS = ("left eye", "right eye", "mouth", "mouth width")


class OnnxNetwork:
    """A network from an ONNX file: crops (B, 3, S, S) in [-1, 1] -> its first output (B, D), float32.

    The crops are resized to the size that the file asks for, or to `side` where it leaves that open. Of a
    file whose pictures are not square (CosFace's are 112x96) it gets the middle of the crop. A file with a
    fixed batch gets so many at a time. Raises UserError when the file is missing, damaged or takes something
    else.
    """

    def __init__(self, path: Path, side: int = 112):
        self.session = open_onnx(path)
        entry = self.session.get_inputs()[0]
        shape = [n if isinstance(n, int) else None for n in entry.shape]
        if len(shape) != 4 or shape[1] not in (3, None):
            raise UserError(f"{path}: its input has shape {entry.shape}, expected pictures (B, 3, H, W)")
        self.name, self.batch = entry.name, shape[0]
        self.size = shape[2] or side, shape[3] or side

    def __call__(self, pictures: Tensor) -> Tensor:
        (height, width), side = self.size, pictures.shape[-1]
        rows, columns = (round(side * min(1.0, share)) for share in (height / width, width / height))
        top, left = (side - rows) // 2, (side - columns) // 2
        x = pictures.float().cpu()[..., top : top + rows, left : left + columns]
        x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return torch.cat([self._run(part) for part in x.split(self.batch or len(x))])

    def _run(self, x: Tensor) -> Tensor:
        lacking = (self.batch or len(x)) - len(x)  # an incomplete batch is filled up with its last picture
        whole = torch.cat((x, x[-1:].expand(lacking, -1, -1, -1)))
        found = np.asarray(self.session.run(None, {self.name: whole.numpy()})[0])
        return torch.from_numpy(found)[: len(x)]


# --- identity -------------------------------------------------------------------------------------------


def id_retrieval(swaps: Tensor, gallery: Tensor, videos: list[str], wanted: list[str]) -> float:
    """ID retrieval in %: the share of swaps whose nearest original frame, by cosine, is of the source's
    video.

    swaps (N, D), gallery (M, D): embeddings of swaps and of all original frames; videos: of each original;
    wanted: the source's video of each swap.
    """
    number = {video: i for i, video in enumerate(dict.fromkeys(videos))}
    missing = [video for video in wanted if video not in number]
    if missing:
        raise ValueError(f"no original frame of video {missing[0]}")
    labels = torch.tensor([number[v] for v in videos])
    nearest = (F.normalize(swaps) @ F.normalize(gallery).T).argmax(1).cpu()
    return 100 * (labels[nearest] == torch.tensor([number[v] for v in wanted])).float().mean().item()


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of corresponding embeddings (N, D)."""
    return F.cosine_similarity(a, b).mean().item()


def vector_error(a: Tensor, b: Tensor) -> float:
    """Mean L2 distance of corresponding vectors (N, D): pose error of (yaw, pitch, roll) in degrees,
    expression error of expression vectors."""
    return (a - b).norm(dim=1).mean().item()


# --- proxies from landmarks -----------------------------------------------------------------------------


def procrustes_angle(points: Tensor, onto: Tensor) -> Tensor:
    """Angle in degrees, at least 0, of the rotation in the picture that best takes points (N, 98, 2) to
    `onto`, after shift and scale are removed: (N,). A proxy of the pose error that sees roll and little
    else."""
    a, b = (p - p.mean(1, keepdim=True) for p in (points, onto))
    sine = (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(1)
    cosine_ = (a * b).sum((1, 2))
    return torch.rad2deg(torch.atan2(sine, cosine_)).abs()


def procrustes_residual(points: Tensor, onto: Tensor) -> Tensor:
    """What remains of the distance of two shapes (N, 98, 2) after the best shift, scale and rotation, as a
    share of the size of `onto`, in [0, 1]: (N,). Turning the head and moving the mouth change it."""
    a, b = (p - p.mean(1, keepdim=True) for p in (points, onto))
    a, b = (p / p.flatten(1).norm(dim=1).view(-1, 1, 1).clamp_min(1e-8) for p in (a, b))
    sine = (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(1)
    cosine_ = (a * b).sum((1, 2))
    return (1 - (sine.square() + cosine_.square())).clamp_min(0).sqrt()


def openings(points: Tensor) -> Tensor:
    """Opening of both eyes and of the mouth, and the mouth's width, as shares of the distance of the eyes:
    98 points (N, 98, 2) -> (N, 4), in the order of `OPENINGS`."""
    eyes = [points[:, a:b] for a, b in EYES]
    unit = (eyes[0].mean(1) - eyes[1].mean(1)).norm(dim=1).clamp_min(1e-6)
    heights = [(eye[:, 1:4] - eye[:, 5:8].flip(1)).norm(dim=2).mean(1) for eye in eyes]
    lip = points[:, slice(*INNER_LIP)]
    heights.append((lip[:, 1:4] - lip[:, 5:8].flip(1)).norm(dim=2).mean(1))
    outer = points[:, slice(*OUTER_LIP)]
    heights.append((outer[:, 0] - outer[:, 6]).norm(dim=1))
    return torch.stack(heights, 1) / unit[:, None]


def expression_proxy(points: Tensor, onto: Tensor) -> float:
    """Mean absolute difference of `openings`."""
    return (openings(points) - openings(onto)).abs().mean().item()


# --- pictures -------------------------------------------------------------------------------------------


def measured(pictures: Tensor) -> Tensor:
    """What is measured: the 8-bit picture, in [0, 1]."""
    return (pictures.float() / 2 + 0.5).clamp(0, 1).mul(255).round().div(255)


def region_l1(a: Tensor, b: Tensor, region: Tensor) -> float:
    """Mean |a - b| over a region (N, 1, S, S) of weights, pictures in [-1, 1]; the mean over pictures."""
    a, b = (2 * measured(x) - 1 for x in (a, b))
    area = region.sum((1, 2, 3)).clamp_min(1e-6)
    return (((a - b).abs() * region).sum((1, 2, 3)) / (3 * area)).mean().item()


def region_psnr(a: Tensor, b: Tensor, region: Tensor) -> float:
    """PSNR in dB over a region, from the mean squared error over all pictures."""
    error = ((measured(a) - measured(b)).square() * region).sum() / (3 * region.sum().clamp_min(1e-6))
    return (-10 * error.clamp_min(1e-10).log10()).item()


def picture_metrics(swaps: Tensor, targets: Tensor, mask: Tensor) -> dict[str, float]:
    """How much of the target is kept: L1 ([-1, 1]) and PSNR outside the face, SSIM and PSNR of the whole.

    mask (N, 1, S, S), 1 = background. A copy of the target gives 0 and the largest values.
    """
    a, b = measured(swaps), measured(targets)
    whole = psnr(a, b) if not torch.equal(a, b) else float("inf")
    return {
        "background L1": region_l1(swaps, targets, mask),
        "background PSNR": region_psnr(swaps, targets, mask),
        "SSIM to target": ssim(a, b),
        "PSNR to target": whole,
    }
