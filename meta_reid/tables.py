"""Result tables in Markdown and LaTeX: measured rows, then the published ones of the same protocol."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from shared.published import Metric

SHOWN = ("mAP", "Rank-1")


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
