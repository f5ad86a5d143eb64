"""Result tables in Markdown and LaTeX: measured rows, then the published ones of the same protocol."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from shared.published import Metric

SHOWN = ("mAP", "Rank-1")


def markdown(metrics: Sequence[Metric], published: Sequence[dict[str, Any]] = ()) -> str:
    """mAP / Rank-1 of every method and data set.

    A cell is the mean over seeds and splits, with the deviation between the splits (one seed) or between the
    seeds (several) where there is one. Published rows of the same table and setting follow, named with their
    source (see `published.json`); they are comparable only with the row of their own method and aggregation.
    """
    sets = list(dict.fromkeys(metric.dataset for metric in metrics))
    lines = ["| method | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for method in dict.fromkeys(metric.method for metric in metrics):
        own = [metric for metric in metrics if metric.method == method]
        row(method, [" / ".join(cell(own, data, name) for name in SHOWN) for data in sets])
    here = {(metric.table, metric.setting) for metric in metrics}
    values: dict[str, dict[tuple[str, str], float]] = {}
    for known in published:
        if (known["table"], known["setting"]) in here:
            name = f"{known['method']}, published ({known['source'][0]})"
            values.setdefault(name, {})[known["dataset"], known["metric"]] = known["value"]
    for name, known in values.items():
        pairs = [[known.get((data, metric)) for metric in SHOWN] for data in sets]
        row(name, [" / ".join("-" if v is None else f"{v:.1f}" for v in pair) for pair in pairs])
    return "\n".join(lines) + "\n"


def cell(metrics: Sequence[Metric], data: str, name: str) -> str:
    """One number of a method on a data set, with its deviation; a dash where nothing was measured."""
    values = [m.value for m in metrics if (m.dataset, m.metric) == (data, name)]
    spread = [m.value for m in metrics if (m.dataset, m.metric) == (data, f"{name} std")]
    if not values:
        return "-"
    deviation = stdev(values) if len(values) > 1 else spread[0] if spread else None
    return f"{mean(values):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def latex(table: str) -> str:
    """A Markdown table for LaTeX."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    body = [" & ".join(cell.replace("_", r"\_").replace("±", r"$\pm$") for cell in row) + r" \\"
            for row in rows[:1] + rows[2:]]  # fmt: skip
    columns = "l" + "c" * (len(rows[0]) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"
