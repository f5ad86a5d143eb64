"""Figures of an evaluation."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from torch import Tensor

matplotlib.use("Agg")  # pictures are written, never shown


def distributions(years: dict[str, Tensor], group: Tensor, names: tuple[str, ...], path: Path) -> None:
    """Write a figure: the ages that a judge sees in real faces of each group (`copy` at their own group) and
    in every method's outputs, from the youngest inputs made older and from the oldest made younger.

    years: method -> (N, K), with `copy`; group (N,).
    """
    last = len(names) - 1
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, start, title in zip(panels, (0, last), ("made older", "made younger"), strict=True):
        targets = [k for k in range(last + 1) if k != start]
        series = {"real faces": [years["copy"][group == k, k] for k in targets]}
        series |= {n: [y[group == start, k] for k in targets] for n, y in years.items() if n != "copy"}
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [p + (i - (len(series) - 1) / 2) * width for p in range(len(targets))]
            drawn = [v.numpy() if len(v) else [float("nan")] for v in values]
            box = panel.boxplot(drawn, positions=places, widths=0.85 * width, patch_artist=True, sym=".")
            for patch in box["boxes"]:
                patch.set_facecolor(f"C{i}")
            panel.plot([], [], "s", color=f"C{i}", label=name)
        panel.set_xticks(range(len(targets)), [names[k] for k in targets])
        panel.set(title=f"{names[start]} {title}", xlabel="target group")
    panels[0].set_ylabel("age seen by the judge [years]")
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
