"""How results are measured: the ageing protocol of this line of papers, with a pluggable estimator.

The youngest group is aged to all others and the oldest rejuvenated to all others. Ages and identities are
those that judges see (`judges.py`); images are in [-1, 1] here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biphasic_age.ages import age2group
from shared import metrics

Method = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(image (B, 3, H, W), layout (B, H, W), source (B,), target (B,)) -> image (B, 3, H, W)."""
Estimator = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> years (B,), or unit embeddings (B, D)."""
DIRECTIONS = ("older", "younger")
FAR = 1e-5
"""False accept rate at which papers of this line read their verification service's threshold."""


@torch.inference_mode()
def translate_all(
    method: Method, image: Tensor, layout: Tensor, source: Tensor, groups: int, batch: int = 64
) -> Tensor:
    """Every face at every age group, (N, groups, 3, H, W). Faces of all targets are translated together."""
    made = torch.empty(len(image), groups, *image.shape[1:], device=image.device)
    for at in range(0, len(image), max(1, batch // groups)):
        part = slice(at, at + max(1, batch // groups))
        n = len(image[part])
        every = [value[part].repeat_interleave(groups, 0) for value in (image, layout, source)]
        target = torch.arange(groups, device=image.device).repeat(n)
        made[part] = method(*every, target).float().unflatten(0, (n, groups))
    return made


@torch.inference_mode()
def in_batches(judge: Estimator, images: Tensor, batch: int = 256) -> Tensor:
    """A judge on images (..., 3, H, W) -> (..., what it gives per image)."""
    shape = images.shape[:-3]
    flat = images.flatten(0, -4) if images.ndim > 4 else images
    out = torch.cat([judge(flat[i : i + batch]).float() for i in range(0, len(flat), batch)])
    return out.unflatten(0, shape)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB of each pair of images (..., 3, H, W) in [-1, 1], (...)."""
    return -10 * ((a - b) / 2).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean SSIM (11x11 Gaussian) of images (N, 3, H, W) in [-1, 1]."""
    return metrics.ssim(a / 2 + 0.5, b / 2 + 0.5)


# --- ageing accuracy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgeRow:
    """Ages seen in the outputs of one direction and target group, beside those of real faces of the group."""

    direction: str
    target: int
    mean: float
    std: float
    real_mean: float
    real_std: float
    hit: float
    """Share of outputs whose seen age lies in the target group."""

    @property
    def error(self) -> float:
        """|difference of the means|, years."""
        return abs(self.mean - self.real_mean)


def age_rows(years: Tensor, real: Tensor, source: Tensor, limits: tuple[float, ...]) -> list[AgeRow]:
    """years (N, K) seen in the outputs, real (N,) in the inputs, source (N,) true groups of the inputs -> a
    row per direction and target; a direction without inputs has none."""
    rows, last = [], len(limits)
    for direction, group in zip(DIRECTIONS, (0, last), strict=True):
        chosen = source == group
        for target in range(last + 1):
            of_target = real[source == target]
            if target == group or not chosen.any() or not len(of_target):
                continue
            seen = years[chosen, target]
            rows.append(
                AgeRow(
                    direction,
                    target,
                    seen.mean().item(),
                    seen.std(correction=0).item(),
                    of_target.mean().item(),
                    of_target.std(correction=0).item(),
                    (age2group(seen, limits) == target).float().mean().item(),
                )
            )
    return rows


def rising_share(years: Tensor, source: Tensor, group: int) -> float:
    """Share of the inputs of a group whose seen ages rise from target to target, years (N, K)."""
    chosen = years[source == group]
    return (chosen.diff(dim=1) > 0).all(1).float().mean().item()


# --- identity -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verifier:
    """An identity judge with its threshold, calibrated on pairs of real faces."""

    threshold: float
    """Cosine from which two faces are one person."""
    far: float
    """False accept rate on the calibration pairs at that threshold."""
    tar: float
    """True accept rate there; nan without genuine pairs."""
    genuine: int
    impostor: int
    """Numbers of pairs."""


def calibrate(embeddings: Tensor, people: Tensor, far: float = FAR) -> Verifier:
    """The laxest threshold whose false accept rate is at most `far`, on all pairs of (N, D) embeddings.

    With too few impostor pairs for that rate the strictest supported one is taken: 10 false accepts among all
    impostor pairs. The true accept rate is nan where nobody is there twice. Raises ValueError when there is
    one person alone.
    """
    scores = (embeddings @ embeddings.T).cpu()
    same = people.cpu()[:, None] == people.cpu()[None]
    upper = torch.ones_like(same).triu(1)
    genuine, impostor = scores[same & upper], scores[~same & upper]
    if not len(impostor):
        raise ValueError("calibration needs more than one person")
    wanted = max(far, min(1.0, 10 / len(impostor)))
    same_scores = genuine if len(genuine) else torch.full((1,), 2.0)  # above every cosine
    labels = np.concatenate([np.ones(len(same_scores)), np.zeros(len(impostor))])
    rates, tar, thresholds = metrics.roc(torch.cat((same_scores, impostor)).numpy(), labels)
    best = int(np.flatnonzero(rates <= wanted)[-1])
    accepted = float(tar[best]) if len(genuine) else float("nan")
    return Verifier(float(thresholds[best]), float(rates[best]), accepted, len(genuine), len(impostor))


def identity_kept(made: Tensor, inputs: Tensor, threshold: float) -> dict[str, Tensor]:
    """made (N, K, D) and inputs (N, D) unit embeddings -> per face and target: `confidence` cosine between
    input and output, (N, K), `verified` (N, K) bool; `between` mean cosine between outputs of different
    targets, (N,)."""
    confidence = torch.einsum("nkd,nd->nk", made, inputs)
    pairs = torch.einsum("nkd,njd->nkj", made, made)
    count = made.shape[1]
    off = ~torch.eye(count, dtype=torch.bool, device=made.device)
    return {
        "confidence": confidence,
        "verified": confidence >= threshold,
        "between": pairs[:, off].mean(1),
    }


def translated_only(values: Tensor, source: Tensor) -> Tensor:
    """Of (N, K) values those whose target is another group than the input's, flat."""
    count = values.shape[1]
    return values[source[:, None] != torch.arange(count, device=values.device)]


def at_extremes(values: Tensor, source: Tensor) -> Tensor:
    """Of (N, K) values those of the protocol: inputs of the youngest and oldest group, other targets."""
    chosen = (source == 0) | (source == values.shape[1] - 1)
    return translated_only(values[chosen], source[chosen])


# --- where the picture changes ----------------------------------------------------------------------------


def class_sums(values: Tensor, weights: Tensor, layout: Tensor, classes: int) -> Tensor:
    """(2, classes): sums of `values` and of `weights`, both (N, H, W), over each layout class's pixels. In
    double precision: in single precision counting ends at 2^24."""
    labels = layout.flatten().long()
    sums = [torch.bincount(labels, v.flatten().double(), minlength=classes) for v in (values, weights)]
    return torch.stack(sums)


def changes(
    made: Tensor, image: Tensor, layout: Tensor, source: Tensor, classes: int, batch: int = 16
) -> Tensor:
    """(2, classes): sum of |y - x| over all faces and other-age targets on each layout class, and how many
    pixels these are. made (N, K, 3, H, W), image (N, 3, H, W), layout (N, H, W), source (N,)."""
    other = (source[:, None] != torch.arange(made.shape[1], device=made.device))[..., None, None]
    sums = torch.zeros(2, classes, dtype=torch.float64, device=made.device)
    for at in range(0, len(image), batch):  # copies of all translations would not fit beside them
        part = slice(at, at + batch)
        change = ((made[part] - image[part, None]).abs().mean(2) * other[part]).sum(1)  # (B, H, W)
        sums += class_sums(change, other[part].sum(1).expand_as(change), layout[part], classes)
    return sums


def part_change(made: Tensor, image: Tensor, layout: Tensor, source: Tensor, classes: int) -> Tensor:
    """mean |y - x| on each layout class over all faces and other-age targets, (classes,); nan where a class
    does not occur. Arguments as for `changes`."""
    total, pixels = changes(made, image, layout, source, classes)
    return (total / pixels).float()


def pooled_change(
    made: Tensor, image: Tensor, layout: Tensor, source: Tensor, classes: Iterable[int]
) -> float:
    """mean |y - x| over the pixels of some layout classes, in all other-age outputs; nan without pixels."""
    wanted = list(classes)
    sums = changes(made, image, layout, source, max(*wanted, int(layout.max())) + 1)[:, wanted].sum(1)
    return (sums[0] / sums[1]).item()


def mean_iou(found: Tensor, wanted: Tensor, classes: int) -> float:
    """Mean intersection over union of label maps (N, H, W), over the classes that occur in `wanted`."""
    ious = []
    for k in range(classes):
        a, b = found == k, wanted == k
        if b.any():
            ious.append(((a & b).sum() / (a | b).sum()).item())
    return float(np.mean(ious))
