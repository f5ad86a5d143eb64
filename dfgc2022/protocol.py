"""The detection track's protocol: submissions, pooled AUC with confidence intervals, break-downs, the matrix.

Labels: 0 real, 1 fake; a score is the probability of fake. The contest ranks by the AUC of Private-1 and
Private-2 pooled, not averaged: the published private numbers are neither the mean nor the size-weighted
mean of their parts. So a detector whose scores shift between the parts loses. A clip that a submission
misses counts 0.5.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.io import read_utf8
from shared.metrics import auc
from shared.runtime import UserError

MISSING = 0.5
PARTS = ("Public", "Private-1", "Private-2")
POOLED = "Private (1+2)"
FUSION = (0.2, 0.3, 0.5)
"""The winner's weights of Swin (epoch index 40), ConvNeXt (10) and ConvNeXt (30)."""


@dataclass(frozen=True)
class Clip:
    """One clip of a test set."""

    name: str
    """File name with its ending."""
    label: int
    """0 real, 1 fake."""
    part: str
    """One of `PARTS`."""
    creator: str = ""
    """Creation submission of a fake."""
    compression: str = "none"
    """none, c23 or c40."""
    target: str = ""
    """group/identity/clip of a fake, group/identity of a real clip."""
    round: str = ""
    """Creation round of a fake, where known."""


# --- submissions ------------------------------------------------------------------------------------


def write_submission(path: Path, scores: Mapping[str, float]) -> None:
    """`name, probability` lines, six decimals, as the contest asked for."""
    path.write_text("".join(f"{name}, {score:.6f}\n" for name, score in scores.items()))


def read_submission(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, float], list[str]]:
    """A submission file -> (scores by clip, warnings).

    names: the clips that are asked for; those missing get 0.5 and are named in a warning, as are those nobody
    asked for, which are left out. Raises UserError that names file and line on a score outside [0, 1], not a
    number, or on a clip named twice.
    """
    lines = read_utf8(path, "a submission").splitlines()
    scores: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, comma, value = line.rpartition(",")
        try:
            score = float(value)
        except ValueError:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not 'name, probability'") from None
        name = name.strip()
        if not comma or not name:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not 'name, probability'")
        if not 0 <= score <= 1:  # also catches NaN
            raise UserError(f"{path}, line {number}: score {value.strip()} of {name} is not in [0, 1]")
        if name in scores:
            raise UserError(f"{path}, line {number}: {name} stands there twice")
        scores[name] = score
    return (scores, []) if names is None else complete(scores, list(names), str(path))


def complete(
    scores: Mapping[str, float], names: Sequence[str], source: str
) -> tuple[dict[str, float], list[str]]:
    """Exactly the clips in `names`, in their order, 0.5 for those missing; and a warning for each
    difference.
    """
    missing = [name for name in names if name not in scores]
    unknown = sorted(set(scores) - set(names))
    warnings = []
    if missing:
        warnings.append(f"{source}: {len(missing)} clips are missing and count 0.5 ({_first(missing)})")
    if unknown:
        warnings.append(f"{source}: {len(unknown)} clips are not in this test set ({_first(unknown)})")
    return {name: scores.get(name, MISSING) for name in names}, warnings


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def require_weights(weights: Sequence[float], members: int) -> None:
    """Raises UserError unless there is one weight for each member, none negative, 1 together."""
    fits = len(weights) == members and min(weights, default=-1) >= 0
    if not fits or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"{members} members need as many weights >= 0 that sum to 1, got {list(weights)}")


def fuse(
    members: Sequence[Mapping[str, float]], weights: Sequence[float] = FUSION
) -> tuple[dict[str, float], list[str]]:
    """Weighted arithmetic mean of video scores over the union of the members' clips, 0.5 where one has none.

    Returns scores and warnings. Raises UserError on other weights than `require_weights` wants.
    """
    require_weights(weights, len(members))
    names = list(dict.fromkeys(name for member in members for name in member))
    warnings = []
    for number, member in enumerate(members):
        warnings += complete(member, names, f"member {number + 1}")[1]
    fused = {
        name: sum(weight * member.get(name, MISSING) for weight, member in zip(weights, members, strict=True))
        for name in names
    }
    return fused, warnings


# --- AUC --------------------------------------------------------------------------------------------


def bootstrap_auc(
    scores: np.ndarray, labels: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the AUC, fakes and reals resampled separately with replacement.

    Exact for each draw: AUC = w_f' C w_r / (n_f n_r), C[i, j] = [fake i > real j] + [equal] / 2, w the
    number of times each clip was drawn.
    """
    rng = np.random.default_rng(seed)
    real, fake = np.sort(scores[labels == 0]), scores[labels == 1]
    below, upto = np.searchsorted(real, fake, "left"), np.searchsorted(real, fake, "right")
    values = np.empty(draws)
    for draw in range(draws):
        times_fake = rng.multinomial(len(fake), np.full(len(fake), 1 / len(fake)))
        times_real = rng.multinomial(len(real), np.full(len(real), 1 / len(real)))
        before = np.concatenate(([0], np.cumsum(times_real)))
        values[draw] = times_fake @ (before[below] + before[upto]) / 2
    values /= len(fake) * len(real)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def winner_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUC, EER, recall, precision, F1 and accuracy as the winner's code defines them, at threshold 0.5.

    A score of exactly 0.5 counts as fake there. EER: false positive rate at the ROC point where it is nearest
    to the false negative rate, the first of equals, so that it is 0 where all scores are equal. A ratio
    without cases is 0. Raises ValueError when a class is missing.
    """
    from sklearn.metrics import roc_curve  # takes seconds

    area = auc(scores, labels)
    fpr, tpr, _ = roc_curve(labels, scores)
    says_fake = scores >= 0.5
    hits = int((says_fake & (labels == 1)).sum())
    recall = hits / int((labels == 1).sum())
    precision = hits / max(int(says_fake.sum()), 1)
    return {
        "AUC": area,
        "EER": float(fpr[np.argmin(np.abs(1 - tpr - fpr))]),
        "recall": recall,
        "precision": precision,
        "F1": 2 * precision * recall / max(precision + recall, 1e-12),
        "accuracy": float((says_fake == (labels == 1)).mean()),
    }


def arrays(clips: Sequence[Clip], scores: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of clips, joined by name."""
    return np.array([scores[clip.name] for clip in clips]), np.array([clip.label for clip in clips])


def _has_both(clips: Sequence[Clip]) -> bool:
    return len({clip.label for clip in clips}) == 2


@dataclass(frozen=True)
class Area:
    """An AUC, its interval and what it was computed on."""

    value: float
    low: float
    high: float
    reals: int
    fakes: int


def area(clips: Sequence[Clip], scores: Mapping[str, float], draws: int = 1000) -> Area | None:
    """AUC of some clips with its 95 % bootstrap interval; None when they are not both real and fake."""
    if not _has_both(clips):
        return None
    values, labels = arrays(clips, scores)
    low, high = bootstrap_auc(values, labels, draws)
    return Area(auc(values, labels), low, high, int((labels == 0).sum()), int((labels == 1).sum()))


def part_areas(clips: Sequence[Clip], scores: Mapping[str, float], draws: int = 1000) -> dict[str, Area]:
    """AUC per part, and of the private parts pooled."""
    groups = {part: [clip for clip in clips if clip.part == part] for part in PARTS}
    groups[POOLED] = groups["Private-1"] + groups["Private-2"] if groups["Private-2"] else []
    areas = {name: area(group, scores, draws) for name, group in groups.items()}
    return {name: value for name, value in areas.items() if value}


def leaderboard(
    clips: Sequence[Clip], submissions: Mapping[str, Mapping[str, float]], draws: int = 1000
) -> list[tuple[str, dict[str, Area]]]:
    """(detector, AUC per part) from the best to the worst; ranked by the pooled private AUC, or by Private-1,
    or by Public where the others are not there."""
    table = [(name, part_areas(clips, scores, draws)) for name, scores in submissions.items()]
    key = next((part for part in (POOLED, "Private-1", "Public") if table and part in table[0][1]), None)
    if key is None:
        raise UserError("a leaderboard needs real and fake clips in one part at least")
    return sorted(table, key=lambda row: -row[1][key].value)


BREAKDOWNS: dict[str, Callable[[Clip], str]] = {
    "creator": lambda clip: clip.creator,
    "compression": lambda clip: clip.compression,
    "round": lambda clip: clip.round,
    "identity group": lambda clip: clip.target.split("/")[0],
    "creator and part": lambda clip: f"{clip.creator}, {clip.part}" if clip.creator else "",
}


def reals_beside(clips: Sequence[Clip], fakes: Sequence[Clip]) -> list[Clip]:
    """The real clips of the parts that some fakes lie in."""
    parts = {clip.part for clip in fakes}
    return [clip for clip in clips if clip.label == 0 and clip.part in parts]


def breakdown(
    clips: Sequence[Clip], scores: Mapping[str, float], by: str, draws: int = 1000
) -> dict[str, Area]:
    """AUC per creator, compression, round or identity group (`by`, a key of `BREAKDOWNS`).

    Fakes of a creator or round are set against all real clips of the parts that they lie in; compressions and
    groups against their own. A value without real clips is left out.
    """
    key = BREAKDOWNS[by]
    values = sorted({key(clip) for clip in clips if clip.label == 1} - {""})
    areas = {}
    for value in values:
        chosen = [clip for clip in clips if key(clip) == value]
        if by not in ("compression", "identity group"):  # which real clips have of their own
            chosen += reals_beside(clips, chosen)
        found = area(chosen, scores, draws)
        if found:
            areas[value] = found
    return areas


# --- creators x detectors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """AUC of each creator's fakes against all real clips of their parts, per detector, and the margins."""

    creators: list[str]
    detectors: list[str]
    auc: np.ndarray
    """(creators, detectors)."""
    low: np.ndarray
    high: np.ndarray
    """Ends of the 95 % bootstrap intervals, same shape."""
    pooled: np.ndarray
    """(detectors,) AUC of all fakes together."""

    @property
    def detection_score(self) -> np.ndarray:
        """S_D (detectors,): mean over creators."""
        return self.auc.mean(0)

    @property
    def evasion(self) -> np.ndarray:
        """(creators,): mean over detectors of 1 - AUC."""
        return 1 - self.auc.mean(1)


def matrix(
    clips: Sequence[Clip], submissions: Mapping[str, Mapping[str, float]], draws: int = 1000
) -> Matrix:
    """Cross-evaluation of all creators with all detectors. Creators whose fakes lie in parts without real
    clips are left out; UserError when that leaves none.
    """
    table = [breakdown(clips, scores, "creator", draws) for scores in submissions.values()]
    creators = list(table[0]) if table else []
    if not creators:
        raise UserError("a matrix needs fakes whose creator is known, and real clips beside them")
    cells = [[column[creator] for column in table] for creator in creators]
    value, low, high = (
        np.array([[getattr(cell, end) for cell in row] for row in cells]) for end in ("value", "low", "high")
    )
    pooled = np.array([auc(*arrays(clips, scores)) for scores in submissions.values()])
    return Matrix(creators, list(submissions), value, low, high, pooled)


# --- after the contest: weights and temperatures chosen on held-out clips ---------------------------------


def search_weights(
    clips: Sequence[Clip], members: Sequence[Mapping[str, float]], steps: int = 10
) -> tuple[float, ...]:
    """Fusion weights on a grid of 1/steps with the largest AUC on held-out clips; the first of equals."""
    columns = np.array([arrays(clips, member)[0] for member in members])
    labels = np.array([clip.label for clip in clips])
    grid = [weights for weights in np.ndindex(*(steps + 1,) * (len(members) - 1)) if sum(weights) <= steps]
    candidates = [np.array([*weights, steps - sum(weights)]) / steps for weights in grid]
    best = max(candidates, key=lambda weights: auc(weights @ columns, labels))
    return tuple(float(weight) for weight in best)


def temperature(clips: Sequence[Clip], scores: Mapping[str, float]) -> float:
    """T > 0 that minimises the cross-entropy of sigmoid(logit(score) / T) on held-out clips."""
    values, labels = arrays(clips, scores)
    grid = np.geomspace(0.1, 10, 201)
    losses = [_cross_entropy(scaled(values, t), labels) for t in grid]
    return float(grid[int(np.argmin(losses))])


def scaled(scores: np.ndarray, t: float) -> np.ndarray:
    """Probabilities with their logits divided by a temperature."""
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return 1 / (1 + np.exp(-np.log(clipped / (1 - clipped)) / t))


def _cross_entropy(values: np.ndarray, labels: np.ndarray) -> float:
    values = np.clip(values, 1e-12, 1 - 1e-12)
    return float(-np.mean(labels * np.log(values) + (1 - labels) * np.log(1 - values)))
