"""report/index.html: what the runs that are there have shown, as one page that needs no network."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import MaxNLocator
from PIL import Image

from shared.io import read_record, runs_root
from shared.published import load_published, published_row
from shared.records import read_json, replacing
from shared.runtime import REPOSITORY, run_main

PAPERS = (
    "pin",
    "dfgc2022",
    "dfl",
    "mdrnets",
    "anyface",
    "faceswapper",
    "most_net",
    "meta_reid",
    "irisusformer",
    "biphasic_age",
)
LARGEST_PICTURE = 1400
"""Longest side in pixels of a picture on the page; larger ones are reduced."""

MOST_SERIES = 12
"""Most lines in one chart of training curves."""


def write_report(target: Path | None = None) -> Path:
    """Collect every run with a results.json and write the page; returns its path."""
    target = target or REPOSITORY / "report" / "index.html"
    papers = [describe_paper(name) for name in PAPERS]
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    templates.filters["number"] = format_number
    page = templates.get_template("report.html").render(papers=papers)
    with replacing(target) as temporary:
        temporary.write_text(page)
    return target


def describe_paper(name: str) -> dict[str, Any]:
    """Title, published rows and evaluated runs of one paper, the newest run first."""
    folder = REPOSITORY / name
    if not (folder / "train.py").is_file():
        return {"name": name, "here": False, "runs": []}
    title = next(line[1:].strip() for line in (folder / "README.md").open() if line.startswith("#"))
    results = sorted(
        runs_root().glob(f"{name}/*/results.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    return {
        "name": name,
        "here": True,
        "title": title,
        "published": load_published(name),
        "runs": [describe_run(path.parent) for path in results],
    }


def describe_run(folder: Path) -> dict[str, Any]:
    """results.json of a run with its curves and pictures as data URLs."""
    parts = ("claims", "metrics", "environment")
    results = read_json(folder / "results.json", "results", lambda found: {key: found[key] for key in parts})
    published = load_published(read_record(folder)["paper"])
    for metric in results["metrics"]:
        metric["published"] = (published_row(metric, published) or {}).get("value")
    return {
        "name": folder.name,
        **results,
        "curves": [figure_url(*curve) for curve in curves(folder / "log.jsonl")],
        "pictures": [
            (path.stem.replace("_", " "), picture_url(path))
            for path in sorted((folder / "samples").glob("*.png"))
        ],
    }


def curves(log: Path) -> list[tuple[str, dict[str, tuple[list, list]]]]:
    """log.jsonl -> [(metric, {series: (steps, values)})]. A scalar named "a/b" is series a of metric b.

    Lines that have a round are drawn over it, the others over the step. What never changes is no curve. A run
    that was killed may have left half a line, which does not count; without a log there are no curves.
    """
    charts: dict[str, dict[str, tuple[list, list]]] = {}
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    for line in lines:
        if not line.endswith("\n"):
            continue
        entry = json.loads(line)
        for name, value in entry.items():
            if name in ("step", "round") or not math.isfinite(value):
                continue
            series, _, metric = name.rpartition("/")
            steps, values = charts.setdefault(metric, {}).setdefault(series, ([], []))
            steps.append(entry.get("round", entry["step"]))
            values.append(value)
    drawn = {
        metric: {name: points for name, points in series.items() if len(points[0]) > 1}
        for metric, series in charts.items()
    }
    return [
        (metric, series)
        for metric, series in drawn.items()
        if any(len(set(values)) > 1 for _, values in series.values())
    ]


def figure_url(metric: str, series: dict[str, tuple[list, list]]) -> str:
    """One chart as an SVG data URL."""
    figure, axes = plt.subplots(figsize=(4.4, 2.9), layout="constrained")
    shown = dict(list(series.items())[:MOST_SERIES])
    for name, (steps, values) in shown.items():
        axes.plot(steps, values, label=name, linewidth=1.3)
    more = f" (first {MOST_SERIES} of {len(series)})" if len(series) > MOST_SERIES else ""
    axes.set_title(metric + more, fontsize=10)
    axes.set_xlabel("step or round", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    if any(series):
        axes.legend(fontsize=6, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return data_url("image/svg+xml", buffer.getvalue())


def picture_url(path: Path) -> str:
    """A picture as a data URL, reduced when it is larger than a page needs."""
    if path.stat().st_size < 300_000:
        return data_url("image/png", path.read_bytes())
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
    return data_url("image/jpeg", buffer.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """Bytes as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def format_number(value: Any) -> str:
    """Four significant digits; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def main() -> None:
    print(write_report())


if __name__ == "__main__":
    run_main(main)
