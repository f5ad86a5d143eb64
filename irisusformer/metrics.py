"""Segmentation, localisation and uncertainty metrics.

The first group is IrisParseNet's evaluation: per image, averaged over images, in percent, on masks
binarised at 0.5 at native resolution. Where its scripts depart from the definition both are given.
"""

from dataclasses import dataclass

import cv2
import numpy as np


def confusion(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives of one image's bool masks."""
    return (
        int((mask & truth).sum()),
        int((mask & ~truth).sum()),
        int((~mask & truth).sum()),
        int((~mask & ~truth).sum()),
    )


def segmentation_scores(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores of one image (H, W) in percent.

    e1: share of wrong pixels (NICE.I type I). e1_nice: min(e1, 1 - e1), as the official script has it.
    e2: (FPR + FNR) / 2, type II; a rate without pixels to err on is 0. e2_ipn: both counts divided by all
    pixels, as IrisParseNet's script has it, which is e1 / 2. f1 and iou of the iris class (iou of two empty
    masks is 1, f1 then 1 as well). miou_2: mean IoU of iris and background.
    """
    tp, fp, fn, tn = confusion(mask.astype(bool), truth.astype(bool))
    e1 = (fp + fn) / (tp + fp + fn + tn)
    e2 = (fp / max(fp + tn, 1) + fn / max(fn + tp, 1)) / 2
    union = tp + fp + fn
    iou = tp / union if union else 1.0
    background = tn / (tn + fp + fn) if tn + fp + fn else 1.0
    return {
        "e1": 100 * e1,
        "e1_nice": 100 * min(e1, 1 - e1),
        "e2": 100 * e2,
        "e2_ipn": 50 * e1,
        "precision": 100 * tp / (tp + fp) if tp + fp else float(union == 0) * 100,
        "recall": 100 * tp / (tp + fn) if tp + fn else float(union == 0) * 100,
        "f1": 200 * tp / (2 * tp + fp + fn) if union else 100.0,
        "iou": 100 * iou,
        "miou_2": 50 * (iou + background),
    }


def average_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over images; also f1_std, and f1_found without images of F1 = 0, which IrisParseNet drops."""
    mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    f1 = np.array([score["f1"] for score in scores])
    mean["f1_std"] = float(f1.std())
    mean["f1_found"] = float(f1[f1 > 0].mean()) if (f1 > 0).any() else 0.0
    return mean


# ------------------------------------------------------------------------------------------- localisation


def boundary(region: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool of a filled region that touch its outside; the picture's border counts as inside."""
    region = region.astype(np.uint8)
    return (region - cv2.erode(region, np.ones((3, 3), np.uint8), borderValue=1)).astype(bool)


def hausdorff(region: np.ndarray, truth: np.ndarray) -> float:
    """Hausdorff distance in pixels between the boundaries of two filled regions (H, W).

    A region without a boundary, empty or filling the picture, against another has the picture's diagonal; two
    of them have 0.
    """
    a, b = boundary(region), boundary(truth)
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else float(np.hypot(*region.shape))
    to_a, to_b = (
        cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for edge in (a, b)
    )
    return float(max(to_b[a].max(), to_a[b].max()))


def dice(region: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two filled regions, 1 when both are empty."""
    tp, fp, fn, _ = confusion(region.astype(bool), truth.astype(bool))
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0


def localisation_scores(regions: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """NIR-ISL 2021: Dice and Hausdorff distance over the picture's width, of (2, H, W): pupil, outer.

    `inner_hdis`, `outer_hdis` and their mean `mhdis` are ratios; the tables of the literature print percent.
    """
    width = truth.shape[-1]
    inner, outer = (hausdorff(r, t) / width for r, t in zip(regions, truth, strict=True))
    return {
        "dice_inner": dice(regions[0], truth[0]),
        "dice_outer": dice(regions[1], truth[1]),
        "inner_hdis": inner,
        "outer_hdis": outer,
        "mhdis": (inner + outer) / 2,
    }


# -------------------------------------------------------------------------------------------- uncertainty


@dataclass
class ErrorDetection:
    """How well a score finds wrong pixels, from histograms: any number of pixels in constant memory.

    Scores are binned by their logit into 2^16 steps of 1/2048 between -16 and 16, finer than any difference
    that matters; pixels of one bin count as ties.
    """

    wrong: np.ndarray
    right: np.ndarray

    BINS = 2**16

    @classmethod
    def empty(cls) -> "ErrorDetection":
        """Nothing added yet."""
        return cls(np.zeros(cls.BINS, np.int64), np.zeros(cls.BINS, np.int64))

    def add(self, score: np.ndarray, wrong: np.ndarray) -> None:
        """score in [0, 1], higher is less certain; wrong: bool, of the same shape."""
        p = np.clip(score.astype(np.float64).ravel(), 1e-12, 1 - 1e-12)
        bins = np.clip((np.log(p) - np.log1p(-p) + 16) * 2048, 0, self.BINS - 1).astype(np.int64)
        wrong = wrong.ravel()
        self.wrong += np.bincount(bins[wrong], minlength=self.BINS)
        self.right += np.bincount(bins[~wrong], minlength=self.BINS)

    def auroc(self) -> float:
        """P(score of a wrong pixel > score of a right one), ties half; nan without wrong or right pixels."""
        below = np.cumsum(self.right) - self.right
        pairs = self.wrong.sum() * float(self.right.sum())
        return float((self.wrong * (below + self.right / 2)).sum() / pairs) if pairs else float("nan")

    def aupr(self) -> float:
        """Average precision: area under the step-wise precision-recall curve."""
        hits = np.cumsum(self.wrong[::-1])
        seen = np.cumsum((self.wrong + self.right)[::-1])
        if not hits[-1]:
            return float("nan")
        precision = hits / np.maximum(seen, 1)
        return float((precision * self.wrong[::-1]).sum() / hits[-1])

    def _errors_in_top(self, share: float) -> float:
        """Expected number of wrong pixels among the `share` most uncertain ones; ties are split evenly."""
        total = (self.wrong + self.right)[::-1]
        seen, hits = np.cumsum(total), np.cumsum(self.wrong[::-1])
        return float(np.interp(share * seen[-1], np.r_[0, seen], np.r_[0, hits]))

    def captured(self, share: float) -> float:
        """Share of all wrong pixels that the `share` most uncertain pixels hold."""
        return self._errors_in_top(share) / max(self.wrong.sum(), 1)

    def error_in_top(self, share: float) -> float:
        """Error rate inside the `share` most uncertain pixels."""
        return self._errors_in_top(share) / (share * (self.wrong.sum() + self.right.sum()))

    def error_after_abstaining(self, share: float) -> float:
        """Error rate of what is left once the `share` most uncertain pixels are set aside."""
        total = self.wrong.sum() + self.right.sum()
        return (self.wrong.sum() - self._errors_in_top(share)) / ((1 - share) * total)

    def aurc(self) -> float:
        """Area under the risk-coverage curve: mean error rate over all coverages."""
        coverage = np.linspace(0.005, 1, 200)
        return float(np.mean([self.error_after_abstaining(1 - c) for c in coverage]))

    def summary(self) -> dict[str, float]:
        """All numbers by name; shares and rates in [0, 1], `e1_abstain_5%` in percent."""
        result = {"auroc": self.auroc(), "aupr": self.aupr(), "aurc": self.aurc()}
        for share in (0.01, 0.05, 0.10):
            result[f"captured_{share:.0%}"] = self.captured(share)
            result[f"error_in_top_{share:.0%}"] = self.error_in_top(share)
        result["e1_abstain_5%"] = 100 * self.error_after_abstaining(0.05)
        return result


@dataclass
class Calibration:
    """Expected calibration error of the foreground probability, in 15 equal bins."""

    count: np.ndarray
    probability: np.ndarray
    positive: np.ndarray

    @classmethod
    def empty(cls, bins: int = 15) -> "Calibration":
        """Nothing added yet."""
        return cls(np.zeros(bins), np.zeros(bins), np.zeros(bins))

    def add(self, prob: np.ndarray, truth: np.ndarray) -> None:
        """prob in [0, 1] and bool truth, of one shape."""
        bins = len(self.count)
        index = np.minimum((prob.ravel() * bins).astype(np.int64), bins - 1)
        self.count += np.bincount(index, minlength=bins)
        self.probability += np.bincount(index, prob.ravel(), bins)
        self.positive += np.bincount(index, truth.ravel().astype(np.float64), bins)

    def ece(self) -> float:
        """Mean over pixels of |observed - predicted| of their bin, in [0, 1]."""
        return float(np.abs(self.probability - self.positive).sum() / max(self.count.sum(), 1))


def edge_ratio(uncertainty: np.ndarray, truth: np.ndarray, band: int = 3) -> tuple[float, float]:
    """Mean uncertainty within `band` pixels of the true mask's edge, and elsewhere; nan where no pixel is."""
    truth = truth.astype(np.uint8)
    kernel = np.ones((2 * band + 1,) * 2, np.uint8)
    near = (cv2.dilate(truth, kernel) - cv2.erode(truth, kernel, borderValue=1)).astype(bool)
    inside = float(uncertainty[near].mean()) if near.any() else float("nan")
    return inside, float(uncertainty[~near].mean()) if (~near).any() else float("nan")


def image_correlation(uncertainty: list[float], e1: list[float]) -> float:
    """Spearman's rank correlation over images between mean uncertainty and E1; nan if either is constant."""
    if len(set(uncertainty)) < 2 or len(set(e1)) < 2:
        return float("nan")
    from scipy.stats import spearmanr  # takes seconds

    return float(spearmanr(uncertainty, e1).statistic)
