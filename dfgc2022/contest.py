"""A whole contest scored: leaderboard, break-downs, matrix and creation table, as text, metrics and pictures.

A submission that cannot be read is reported and left out; the others are still scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_curve

from dfgc2022.creation import (
    DEFINITIONS,
    TERMS,
    Definition,
    Row,
    anti_detection,
    correlations,
    opponents,
    ranking,
)
from dfgc2022.protocol import (
    Area,
    Clip,
    Matrix,
    arrays,
    breakdown,
    fuse,
    leaderboard,
    matrix,
    part_areas,
    read_submission,
    scaled,
    search_weights,
    temperature,
    winner_metrics,
)
from shared.published import Metric, format_table
from shared.runtime import UserError


@dataclass(frozen=True)
class Contest:
    """Test clips, the scores of each detector on all of them, and what the data are called."""

    clips: list[Clip]
    submissions: dict[str, dict[str, float]]
    dataset: str
    comparable: bool = False
    """True only for the released DFGC 2022 clips, complete: Public and Private-1 are then those of the
    published table. Private-2 was never released, whoever's clips stand in for it.
    """


def read_submissions(paths: Sequence[Path], clips: Sequence[Clip]) -> dict[str, dict[str, float]]:
    """Submission files -> scores by detector (the file's name). Bad files, which are left out, and missing
    clips are printed.
    """
    names = [clip.name for clip in clips]
    read: dict[str, dict[str, float]] = {}
    for path in paths:
        try:
            scores, warnings = read_submission(path, names)
            if path.stem in read:
                raise UserError(f"{path}: another submission is called {path.stem} as well")
        except UserError as error:
            print(f"warning: not scored: {error}")
            continue
        for warning in warnings:
            print(f"warning: {warning}")
        read[path.stem] = scores
    return read


def score_detection(contest: Contest, draws: int = 1000) -> tuple[list[Metric], Matrix | None]:
    """Print the leaderboard, the winner's auxiliary metrics, break-downs and the matrix; return them.

    Creators whose fakes lie in parts without real clips are named in a warning and left out of the matrix;
    there is none, and a warning says so, where no creator of a fake is known.
    """
    metrics = []
    board = leaderboard(contest.clips, contest.submissions, draws)
    parts = list(board[0][1])
    print("\nleaderboard: video-level AUC, fake positive, [95 % bootstrap interval]")
    rows = [
        [number, name, *(_interval(areas.get(part)) for part in parts)]
        for number, (name, areas) in enumerate(board, 1)
    ]
    print(format_table(["rank", "detector", *parts], rows))
    for name, areas in board:
        for part, found in areas.items():
            metrics.append(
                Metric(
                    "detection top-3",
                    "final ranking",
                    "AUC",
                    "fraction",
                    found.value,
                    _part(contest, part),
                    _is_released(contest, part),
                    name,
                )
            )
    print("\nat threshold 0.5 on all clips (winner's metrics: 0.5 counts as fake, equal scores have EER 0)")
    aux = {
        name: winner_metrics(*arrays(contest.clips, scores)) for name, scores in contest.submissions.items()
    }
    print(
        format_table(
            ["detector", *next(iter(aux.values()))], [[name, *m.values()] for name, m in aux.items()]
        )
    )
    for by in ("compression", "round", "identity group", "creator and part"):
        table = {
            name: breakdown(contest.clips, scores, by, draws) for name, scores in contest.submissions.items()
        }
        keys = list(dict.fromkeys(key for areas in table.values() for key in areas))
        if keys and by in ("compression", "round"):  # the others have twenty columns or more: results.json
            print(f"\nAUC by {by}, [95 % bootstrap interval]")
            rows = [[name, *(_interval(areas.get(key)) for key in keys)] for name, areas in table.items()]
            print(format_table(["detector", *keys], rows))
        metrics += [
            Metric(f"by {by}", key, "AUC", "fraction", found.value, contest.dataset, False, name)
            for name, areas in table.items()
            for key, found in areas.items()
        ]
    creators = sorted({clip.creator for clip in contest.clips if clip.label == 1 and clip.creator})
    alone = [creator for creator in creators if not opponents(contest.clips, creator)[1]]
    if alone:
        print(f"\nwarning: no real clips beside the fakes of {', '.join(alone)}: not in the matrix")
    if len(alone) == len(creators):
        print("\nwarning: no fake with real clips beside it has a creator ('face-swap method' in the table): "
              "no matrix")  # fmt: skip
        return metrics, None
    crossed = matrix(contest.clips, contest.submissions, draws)
    print("\ncreators x detectors: AUC against all real clips of the parts with a creator's fakes (mean "
          f"width of the 95 % intervals {float((crossed.high - crossed.low).mean()):.3f})")  # fmt: skip
    rows = [
        [name, *map(float, crossed.auc[row]), float(crossed.evasion[row])]
        for row, name in enumerate(crossed.creators)
    ]
    rows += [
        ["mean (S_D)", *map(float, crossed.detection_score), None],
        ["pooled", *map(float, crossed.pooled), None],
    ]
    print(format_table(["creator", *crossed.detectors, "mean 1-AUC"], rows))
    for row, creator in enumerate(crossed.creators):
        for column, name in enumerate(crossed.detectors):
            value = float(crossed.auc[row, column])
            metrics.append(Metric("matrix", creator, "AUC", "fraction", value, contest.dataset, False, name))
    return metrics, crossed


def fusion_choices(
    contest: Contest, members: Sequence[Mapping[str, float]], weights: Sequence[float]
) -> list[Metric]:
    """Given weights beside weights and temperatures chosen on Public, all measured on the private parts.

    Prints a table. Nothing, and a remark, where Public or the private parts lack real or fake clips.
    """
    public = [clip for clip in contest.clips if clip.part == "Public"]
    measured = [part for part in part_areas(contest.clips, members[0], 1) if part != "Public"]
    if len({clip.label for clip in public}) < 2 or not measured:
        print(
            "\nfusion weights are not searched: that needs real and fake clips of Public and a private part"
        )
        return []
    temperatures = [temperature(public, member) for member in members]
    calm = [
        dict(zip(member, scaled(np.array(list(member.values())), t), strict=True))
        for member, t in zip(members, temperatures, strict=True)
    ]
    searched, searched_calm = search_weights(public, members), search_weights(public, calm)
    choices = {
        f"fixed {_numbers(weights)}": fuse(members, weights)[0],
        f"searched on Public {_numbers(searched)}": fuse(members, searched)[0],
        f"fixed, temperatures {_numbers(temperatures)}": fuse(calm, weights)[0],
        f"searched with temperatures {_numbers(searched_calm)}": fuse(calm, searched_calm)[0],
    }
    rows, metrics = [], []
    for name, scores in choices.items():
        areas = part_areas(contest.clips, scores, 1)
        rows.append([name, *(areas[part].value for part in measured)])
        metrics += [
            Metric(
                "fusion", name, "AUC", "fraction", areas[part].value, _part(contest, part), False, "fusion"
            )
            for part in measured
        ]
    print("\nfusion of " + str(len(members)) + " detectors, weights and temperatures chosen on Public alone")
    print(format_table(["choice", *measured], rows))
    return metrics


def score_creation(
    contest: Contest,
    terms: Mapping[str, Mapping[str, float]],
    definition: Definition = "auc10",
    predicted: Mapping[str, float] | None = None,
) -> tuple[list[Row], list[Metric]]:
    """Print the creation track's table; return its rows, best first, and its numbers.

    terms: submission -> five means. predicted: realism by a model, used where there are no ratings; such rows
    are labelled, and stand below the others without a rank and a sum. Creators with neither are named in a
    warning, and so are those whose fakes lie in parts without real clips. Anti-detection is computed on the
    clips of the contest.
    """
    rows, unrated, alone = [], [], []
    for creator in sorted({clip.creator for clip in contest.clips if clip.label == 1 and clip.creator}):
        if DEFINITIONS[definition][1] == "auc" and not opponents(contest.clips, creator)[1]:
            alone.append(creator)
            continue
        anti = anti_detection(contest.clips, contest.submissions, creator, definition)
        if creator in terms:
            rows.append(Row(creator, dict(terms[creator]), anti))
        elif predicted and creator in predicted:
            rows.append(Row(creator, {"realism": predicted[creator]}, anti, predicted=True))
        else:
            unrated.append(creator)
    if unrated:
        print(f"\nwarning: no ratings of {', '.join(unrated)}; the creation track goes without them")
    if alone:
        print(
            f"\nwarning: no real clips beside the fakes of {', '.join(alone)}; the creation track goes "
            "without them"
        )
    rows = ranking(rows)
    print(f"\ncreation track; anti-detection: {DEFINITIONS[definition][2]}")
    table = []
    for number, row in enumerate(rows, 1):
        terms_of = [*(row.terms.get(term) for term in TERMS), row.anti_detection]
        # The sum of two terms is not to be compared with those of six.
        cells = [None, f"{row.submission} (realism predicted)", *terms_of, None]
        table.append(cells if row.predicted else [number, row.submission, *terms_of, row.total])
    print(format_table(["rank", "submission", *TERMS, "anti-detection", "sum"], table))
    if len(rows) >= 3 and not any(row.predicted for row in rows):
        print(
            "correlations: " + ", ".join(f"{name} {value:.2f}" for name, value in correlations(rows).items())
        )
    metrics = [
        Metric(
            "creation",
            f"anti-detection {definition}",
            name,
            "points",
            value,
            contest.dataset,
            False,
            row.submission,
        )
        for row in rows
        for name, value in _numbers_of(row).items()
    ]
    return rows, metrics


def draw_pictures(folder: Path, contest: Contest, crossed: Matrix | None) -> None:
    """roc.png and, where there is a matrix, matrix.png."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(5, 5))
    for name, scores in contest.submissions.items():
        values, labels = arrays(contest.clips, scores)
        fpr, tpr, _ = roc_curve(labels, values)
        axis.plot(fpr, tpr, label=name, linewidth=1.2)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axis.set(xlabel="real clips called fake", ylabel="fake clips called fake", title=contest.dataset)
    axis.legend(fontsize=7)
    _save(figure, folder / "roc.png")
    if crossed is None:
        return
    height, width = crossed.auc.shape
    figure, axis = plt.subplots(figsize=(2.5 + 0.7 * width, 1.8 + 0.4 * height))
    image = axis.imshow(crossed.auc, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
    axis.set_xticks(range(width), crossed.detectors, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(height), crossed.creators, fontsize=8)
    for (row, column), auc in np.ndenumerate(crossed.auc):
        ink = "white" if abs(auc - 0.5) > 0.35 else "black"  # both ends of the colour map are dark
        axis.text(column, row, f"{auc:.2f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, label="AUC")
    axis.set_title("creators x detectors", fontsize=9)
    _save(figure, folder / "matrix.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _numbers_of(row: Row) -> dict[str, float]:
    found = {**row.terms, "anti-detection": row.anti_detection}
    return found if row.predicted else {**found, "sum": row.total}


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _interval(found: Area | None) -> str:
    return "-" if found is None else f"{found.value:.4f} [{found.low:.3f}, {found.high:.3f}]"


def _is_released(contest: Contest, part: str) -> bool:
    return contest.comparable and part in ("Public", "Private-1")


def _part(contest: Contest, part: str) -> str:
    return part if _is_released(contest, part) else f"{contest.dataset} {part}"
