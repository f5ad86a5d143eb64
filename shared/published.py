"""Published numbers, measured numbers, claims: loaded, printed side by side, written to results.json."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.io import read_record
from shared.records import read_json, write_json
from shared.runtime import REPOSITORY, RunConfig, machine


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, tested on embedded data."""

    id: str
    """Short name, e.g. C1."""
    text: str
    """What is claimed, in a sentence."""
    measured: dict[str, float]
    """The numbers it rests on."""
    margin: str
    """What was asked of them, e.g. "dfl - fedavg >= 4"."""
    holds: bool
    """Whether they met it."""


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    table: str
    """Table of published.json that it belongs to, or a name of our own."""
    setting: str
    """Row group or condition."""
    metric: str
    """Name of the metric, as in published.json where it corresponds."""
    unit: str
    """Unit, e.g. %."""
    value: float
    """The number."""
    dataset: str
    """What it was measured on."""
    comparable: bool
    """True only when data, protocol and metric are the published ones."""
    method: str = "ours"
    """Method in the row."""


def load_published(paper: str) -> dict[str, Any]:
    """published.json of a paper: {"note": str, "rows": [...]}. UserError when it is missing or damaged."""
    path = REPOSITORY / paper / "published.json"
    return read_json(path, "published numbers", lambda found: {key: found[key] for key in ("note", "rows")})


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as aligned text; numbers to four significant digits, None as a dash."""
    cells = [header] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def print_claims(claims: list[Claim]) -> None:
    """Each claim with its numbers and whether it held; then how many did. Without claims, nothing."""
    if not claims:
        return
    for claim in claims:
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        numbers = ", ".join(f"{name} {_cell(float(value))}" for name, value in claim.measured.items())
        print(f"{claim.id}: {verdict}. {claim.text}\n    measured: {numbers}; asked: {claim.margin}")
    print(f"claims: {sum(claim.holds for claim in claims)} of {len(claims)} hold")


def published_row(metric: dict[str, Any], published: dict[str, Any]) -> dict[str, Any] | None:
    """The published row that a measured number may stand beside, or None."""
    if not metric["comparable"]:
        return None
    keys = ("table", "setting", "dataset", "metric", "method")
    return next((row for row in published["rows"] if all(row.get(k) == metric[k] for k in keys)), None)


def print_metrics(metrics: list[Metric], published: dict[str, Any]) -> None:
    """Measured numbers, beside a published one only where the two are comparable; then the published rows
    that nothing here is set against, with their sources."""
    rows, used = [], []
    for metric in metrics:
        row = published_row(asdict(metric), published)
        used += [row] if row else []
        name = f"{metric.metric} [{metric.unit}]" if metric.unit else metric.metric
        beside = row["value"] if row else None
        rows.append(
            [metric.table, metric.setting, metric.dataset, metric.method, name, float(metric.value), beside]
        )
    print(format_table(["table", "setting", "data", "method", "metric", "measured", "published"], rows))
    others = sum(row not in used for row in published["rows"])
    if published["note"]:
        print(f"published: {published['note']}")
    if others:
        print(f"{others} published or context rows stand in published.json with their sources; nothing here")
        print("was measured under their data and protocol, so they are not set beside these numbers.")


def environment(config: RunConfig, seconds: float, device: str | None = None) -> dict[str, Any]:
    """Versions, machine, seed, duration and command of a result.

    config: of the run. device: where the result was computed, when not where the run was.
    """
    # A run of a GPU may be evaluated where there is none.
    on_gpu = (device or config.device) != "cpu"
    return machine(on_gpu) | {"preset": config.preset, "seed": config.seed, "seconds": round(seconds, 1)}


def write_results(
    folder: Path,
    claims: list[Claim],
    metrics: list[Metric],
    environment: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write results.json into a run folder and return its path. Non-finite numbers become null. Where the
    folder says on what machine and by which command it was trained, the environment has that as `training`.
    """
    path = folder / "results.json"
    training = read_record(folder)["training"] if (folder / "config.json").exists() else None
    environment = environment | ({"training": training} if training else {})
    write_json(path, {"claims": claims, "metrics": metrics, "environment": environment, **(extra or {})})
    return path
