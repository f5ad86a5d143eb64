"""Result tables in Markdown and LaTeX: measured rows, then the published ones of the same protocol.

A run of Protocol 2 or 3 has one target. This script joins evaluated runs into the whole table:

    python tables.py --runs p2-C3 p2-MS p2-M --out protocol2.md
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from meta_reid.protocols import SETTINGS
from shared.published import Metric, load_published
from shared.records import read_json, replacing
from shared.runtime import UserError, parse, run_main

SHOWN = ("mAP", "Rank-1")


@dataclass(frozen=True)
class Options:
    """Which runs, and where to."""

    runs: tuple[Path, ...] = ()
    """Folders of evaluated runs of one protocol, each with another target."""
    out: Path = Path("table.md")
    """File to write: .md or .tex."""


def summary(metrics: Sequence[Metric], published: Sequence[dict[str, Any]] = ()) -> list[list[str]]:
    """mAP / Rank-1 of every method and data set: a header, then a row for each method.

    A cell is the mean over seeds and splits, with the deviation between the splits (one seed) or between the
    seeds (several) where there is one. Published rows of the same table and setting follow, named with their
    source (see `published.json`); they are comparable only with the row of their own method and aggregation.
    """
    sets = list(dict.fromkeys(metric.dataset for metric in metrics))
    rows = [["method", *sets]]
    for method in dict.fromkeys(metric.method for metric in metrics):
        own = [metric for metric in metrics if metric.method == method]
        rows.append([method] + [" / ".join(cell(own, data, name) for name in SHOWN) for data in sets])
    here = {(metric.table, metric.setting) for metric in metrics}
    values: dict[str, dict[tuple[str, str], float]] = {}
    for known in published:
        if (known["table"], known["setting"]) in here:
            name = f"{known['method']}, published ({known['source'][0]})"
            values.setdefault(name, {})[known["dataset"], known["metric"]] = known["value"]
    for name, known in values.items():
        pairs = [[known.get((data, metric)) for metric in SHOWN] for data in sets]
        rows.append([name] + [" / ".join("-" if v is None else f"{v:.1f}" for v in pair) for pair in pairs])
    return rows


def cell(metrics: Sequence[Metric], data: str, name: str) -> str:
    """One number of a method on a data set, with its deviation; a dash where nothing was measured."""
    values = [m.value for m in metrics if (m.dataset, m.metric) == (data, name)]
    spread = [m.value for m in metrics if (m.dataset, m.metric) == (data, f"{name} std")]
    if not values:
        return "-"
    deviation = stdev(values) if len(values) > 1 else spread[0] if spread else None
    return f"{mean(values):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A `summary` in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A `summary` for LaTeX."""
    body = [" & ".join(row).replace("_", r"\_").replace("±", r"$\pm$") + r" \\" for row in rows]
    columns = "l" + "c" * (len(rows[0]) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"


def evaluated(run: Path) -> list[Metric]:
    """The metrics in a run's results.json. Raises UserError where there is none."""
    return read_json(
        run / "results.json",
        "the results of a run",
        lambda found: [Metric(**metric) for metric in found["metrics"]],
        f"python eval.py --run {run} writes it",
    )


def join(runs: Sequence[Sequence[Metric]]) -> list[Metric]:
    """Metrics of runs of one protocol with different targets, and each method's average over the targets.

    There is no average of a method that not all runs have, nor of Protocol 2 or 3 before all of its three
    targets are there. Raises UserError for runs of several protocols, of walkers, or of one target twice.
    """
    metrics = [metric for run in runs for metric in run]
    tables = {metric.table for metric in metrics}
    if len(tables) != 1 or "walkers" in tables:
        raise UserError(f"--runs: expected runs of one protocol on files, found {', '.join(sorted(tables))}")
    targets = [{metric.dataset for metric in run} for run in runs]
    sets = set.union(*targets)
    if len(sets) < sum(map(len, targets)):
        raise UserError("--runs: a target stands in two of the runs")
    table = tables.pop()
    published = {setting.split("->")[1] for setting in SETTINGS.values()}
    if len(runs) == 1 or (sets < published and table.split()[0] in ("Protocol-2", "Protocol-3")):
        return metrics
    averages = []
    for method in dict.fromkeys(metric.method for metric in metrics):
        for name in SHOWN:
            own = [m for m in metrics if (m.method, m.metric) == (method, name)]
            by_set = [mean(m.value for m in own if m.dataset == data) for data in {m.dataset for m in own}]
            if len(by_set) == len(sets):
                comparable = all(m.comparable for m in own)
                averages.append(
                    Metric(table, "average", name, "percent", mean(by_set), "average", comparable, method)
                )
    return metrics + averages


def main() -> None:
    """Write and print the joined table."""
    options = parse(Options, __doc__)
    if not options.runs:
        raise UserError("--runs is missing: the folders of evaluated runs")
    if options.out.suffix not in (".md", ".tex"):
        raise UserError(f"--out {options.out}: the ending must be .md or .tex")
    joined = join([evaluated(run) for run in options.runs])
    table = summary(joined, load_published("meta_reid")["rows"])
    text = latex(table) if options.out.suffix == ".tex" else markdown(table)
    with replacing(options.out) as file:
        file.write_text(text)
    print(text, end="")
    print(options.out)


if __name__ == "__main__":
    run_main(main)
