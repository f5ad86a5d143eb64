"""The creation track's score: five subjective means and an anti-detection term, in every documented
definition.

The organisers announced s = s_r + s_q + s_e + s_m + s_id + 5 (1 - s_d). All published totals are the plain
sum of the five means and one anti-detection term, but that term exceeds 5, so the rule that was run is not
the announced one and is not documented. The definition used is printed beside every number.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dfgc2022.protocol import Clip, arrays, reals_beside
from shared.metrics import auc
from shared.runtime import UserError

TERMS = ("realism", "mouth", "quality", "expression", "ID")
Definition = Literal["auc10", "auc5", "probability10", "probability5", "auc2"]
DEFINITIONS: dict[str, tuple[float, str, str]] = {
    "auc10": (10, "auc", "10 (1 - mean AUC over detectors): spans the published values; our default"),
    "auc5": (5, "auc", "5 (1 - mean AUC over detectors): the announced formula, s_d read as an AUC"),
    "probability10": (10, "probability", "10 (1 - mean fake probability over detectors and fakes)"),
    "probability5": (
        5,
        "probability",
        "5 (1 - mean fake probability): the announced formula, s_d read as a score",
    ),
    "auc2": (2, "auc", "2 (1 - mean AUC over detectors): the 2021 edition"),
}
"""Definition -> (weight, what s_d is, in words)."""


@dataclass(frozen=True)
class Row:
    """A line of the creation track's table."""

    submission: str
    terms: dict[str, float]
    """The five subjective means, 1 to 5."""
    anti_detection: float
    predicted: bool = False
    """True when the subjective terms come from a model instead of people."""

    @property
    def total(self) -> float:
        """Plain sum of the terms and anti-detection."""
        return sum(self.terms.values()) + self.anti_detection


def anti_detection(
    clips: Sequence[Clip],
    submissions: Mapping[str, Mapping[str, float]],
    creator: str,
    definition: Definition = "auc10",
) -> float:
    """Anti-detection term of one creator: w (1 - s_d), s_d the mean over detectors.

    The creator's fakes stand against the real clips of the parts that they lie in. Raises UserError when
    there is no fake of the creator, or no real clip there where an AUC is asked for.
    """
    weight, kind, _ = DEFINITIONS[definition]
    fakes, reals = opponents(clips, creator)
    if not fakes or not submissions or (kind == "auc" and not reals):
        raise UserError(f"anti-detection of {creator} needs its fakes, real clips and a detector's scores")
    if kind == "probability":
        s_d = np.mean([arrays(fakes, scores)[0].mean() for scores in submissions.values()])
    else:
        s_d = np.mean([auc(*arrays(fakes + reals, scores)) for scores in submissions.values()])
    return float(weight * (1 - s_d))


def opponents(clips: Sequence[Clip], creator: str) -> tuple[list[Clip], list[Clip]]:
    """(fakes of a creator, real clips of the parts that these lie in)."""
    fakes = [clip for clip in clips if clip.label == 1 and clip.creator == creator]
    return fakes, reals_beside(clips, fakes)


def read_ratings(path: Path) -> dict[str, dict[str, float]]:
    """Ratings table -> submission -> the five means over its clips and raters. See `rating_rows`."""
    values: dict[str, list[list[int]]] = {}
    for submission, _, marks in rating_rows(path):
        values.setdefault(submission, []).append(marks)
    return {
        name: dict(zip(TERMS, map(float, np.mean(marks, 0)), strict=True)) for name, marks in values.items()
    }


def clip_realism(path: Path) -> dict[str, float]:
    """Ratings table -> clip -> mean realism over its raters. See `rating_rows`."""
    values: dict[str, list[int]] = {}
    for _, clip, marks in rating_rows(path):
        values.setdefault(clip, []).append(marks[0])
    return {clip: float(np.mean(marks)) for clip, marks in values.items()}


def rating_rows(path: Path) -> list[tuple[str, str, list[int]]]:
    """Ratings table -> (submission, clip, five marks in the order of `TERMS`) per line.

    Columns: submission, clip, rater, realism, mouth, quality, expression, id; integers 1 to 5. Raises
    UserError that names the line on a missing column, another value, or one clip rated twice by a rater.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
            reader = csv.DictReader(file)
            header = {name.strip().lower(): name for name in reader.fieldnames or []}
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a table of ratings ({error})") from None
    wanted = ("submission", "clip", "rater", *(term.lower() for term in TERMS))
    missing = [name for name in wanted if name not in header]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; columns are {', '.join(wanted)}")
    found, seen = [], set()
    for line, row in enumerate(rows, 2):
        key = tuple(row[header[name]] for name in wanted[:3])
        marks = [row[header[term.lower()]] for term in TERMS]
        if any(mark is None or mark.strip() not in ("1", "2", "3", "4", "5") for mark in marks):
            raise UserError(f"{path}, line {line}: ratings are whole numbers from 1 to 5, got {marks}")
        if key in seen:
            raise UserError(f"{path}, line {line}: rater {key[2]} rated {key[1]} of {key[0]} twice")
        seen.add(key)
        found.append((key[0], key[1], [int(mark) for mark in marks]))
    return found


def ranking(rows: Sequence[Row]) -> list[Row]:
    """Rows from the highest total to the lowest; after the rated ones those with predicted terms alone."""
    return sorted(rows, key=lambda row: (row.predicted, -row.total))


def correlations(rows: Sequence[Row]) -> dict[str, float]:
    """What a table says about its own terms: Spearman of the total with anti-detection, realism and ID, and
    Pearson of ID with anti-detection among the 12 best."""
    from scipy.stats import pearsonr, spearmanr  # takes seconds

    total = [row.total for row in rows]
    anti = [row.anti_detection for row in rows]
    best = ranking(rows)[:12]
    return {
        "total ~ anti-detection": float(spearmanr(total, anti).statistic),
        "total ~ realism": float(spearmanr(total, [row.terms["realism"] for row in rows]).statistic),
        "total ~ ID": float(spearmanr(total, [row.terms["ID"] for row in rows]).statistic),
        "ID ~ anti-detection, 12 best": float(
            pearsonr([row.terms["ID"] for row in best], [row.anti_detection for row in best]).statistic
        ),
    }


def published_rows(published: dict, table: str) -> tuple[list[Row], dict[str, float]]:
    """Rows of a published creation table (`creation round 3`, 2 or 1) and the published sums."""
    cells: dict[str, dict[str, float]] = {}
    for row in published["rows"]:
        if row["table"] == table and row["metric"] != "rank":
            cells.setdefault(row["method"], {})[row["metric"]] = row["value"]
    rows = [
        Row(name, {term: cell[term] for term in TERMS}, cell["anti-detection"])
        for name, cell in cells.items()
    ]
    return rows, {name: cell["sum"] for name, cell in cells.items()}
