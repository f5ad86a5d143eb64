"""Evaluate a run: the demo's claims on walkers, or a published protocol beside the published numbers."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meta_reid.aggregation import MODES
from meta_reid.claims import walker_claims
from meta_reid.data import Target, file_target
from meta_reid.figures import embedding_plot, ranking_lists, to_plot, weight_bars
from meta_reid.items import Split
from meta_reid.measure import measure, measure_plain
from meta_reid.protocols import SETTINGS, Result, average, manifest_domains, targets_of
from meta_reid.rows import Row, plan, run_seeds
from meta_reid.tables import SHOWN, latex, markdown, summary
from meta_reid.train import PRESETS, Config, trained_on
from shared.io import find_run, load_config, load_weights, write_image
from shared.published import (
    Claim,
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    print_metrics,
    write_results,
)
from shared.ranges import Count, Natural, Positive
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class Options:
    """What to evaluate and how."""

    run: Path | None = None
    """Run folder. Default: the newest."""
    aggregation: tuple[str, ...] = MODES
    """Aggregation modes to report."""
    temperature: Positive = 1.0
    """Divides what enters the softmax of the weights."""
    normalize_parts: bool = False
    """Give mixture and global feature length 1 before they are joined."""
    batch: Count = 64
    """Images per forward pass."""
    workers: Natural = 0
    """Data-loading processes."""
    bf16: bool = False
    """bf16 autocast of the networks; relevance stays in float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    data_root: Path | None = None
    """Folder with the public sets, when it moved since the training."""
    manifest: Path | None = None
    """CSV of the user's own domains, when it moved since the training."""


def rows_of(config: Config, folder: Path) -> dict[str, Row]:
    """Trained rows of a run by name. Raises UserError while the run is unfinished."""
    rows = plan(config, trained_on(folder, config)[1])
    position = load_weights(folder, {row.name: row.model for row in rows})
    if position["row"] < len(rows):
        raise UserError(f"{folder}: the run is not finished; repeat the train command to continue it")
    return {row.name: row for row in rows}


def target_sets(config: Config) -> list[Target]:
    """Test sets of a run on files."""
    size = (config.height, config.width)
    if config.protocol != "manifest":
        return targets_of(int(config.protocol), config.target, config.data_root, size)
    items = manifest_domains(config.manifest, config.target)[config.target]
    seen: set[int] = set()
    # The first image of every identity is the query.
    query = [item for item in items if not (item.identity in seen or seen.add(item.identity))]
    chosen = {item.path for item in query}
    return [
        file_target(config.target, [Split(query, [item for item in items if item.path not in chosen])], size)
    ]


UNPUBLISHED = {
    "preset", "seed", "seeds", "variants", "out", "restart", "device", "precision", "compile", "workers",
    "protocol", "target", "data_root", "manifest", "market_background", "weights", "scoring", "scoring_relu",
    "shares", "save_every", "sample_every",
}  # fmt: skip
"""Settings in which a run may differ from the paper's and still be META as published: where and on which
split it ran, and the scoring, which the aggregation `official` does not use."""


def as_published(row: Row, options: Options) -> bool:
    """Whether a row is META itself on a published protocol, with the paper's settings, so that its embedding
    with the aggregation `official` may stand beside the published numbers; ablations, options of ours and
    shorter trainings may not."""
    config = row.config
    paper = PRESETS["protocol1" if config.protocol == "1" else "paper"]
    settings = {field.name for field in dataclasses.fields(Config)} - UNPUBLISHED
    own = all(getattr(config, name) == getattr(paper, name) for name in settings)
    evaluated = options.temperature == 1 and not options.normalize_parts
    return own and evaluated and config.protocol in ("1", "2", "3")


def one_target(
    row: Row, target: Target, options: Options, device: torch.device, folder: Path, alone: bool
) -> tuple[dict[str, Result], Tensor | None, dict[str, Tensor]]:
    """Results of a row on a target by part or mode, mean weights of the experts, (K,), of META with `shared`
    scoring, and some of META's embeddings, for a plot. Writes META's ranking lists. The other embeddings are
    gone with the call. alone: the protocol has no other target."""
    if row.config.method == "plain":
        return {row.name: measure_plain(row, target, options, device)}, None, {}
    measured = measure(row, target, options, device)
    query, gallery = target.splits[0]
    whole = measured.full(measured.modes[0])
    sheet = ranking_lists(whole, target, query[:8], gallery)
    write_image(folder / "samples" / f"ranking-{target.name}-{row.name}.png", sheet)
    mean = None if measured.weights is None else measured.weights.mean(0)
    results = {f"{row.name} {part}": result for part, result in measured.results.items()}
    return results, mean, to_plot(whole, target, alone)


def protocol_metrics(config: Config, rows: dict[str, Row], options: Options, folder: Path) -> list[Metric]:
    """The metrics of a protocol on real data, each aggregation mode apart; Protocol 1 adds the average."""
    device, metrics = pick_device(options.device), []
    table = f"Protocol-{config.protocol} comparison"
    settings = {"1": "M+C2+C3+CS"}.get(config.protocol, SETTINGS.get(config.target, config.target))
    targets, skipped = target_sets(config), {}

    def record(row: Row, part: str, values: dict[str, float], where: str, ending: str = "") -> None:
        released = as_published(row, options) and part.endswith("full:official")
        method, comparable = "META" if released else part, released and not ending
        for name, value in values.items():
            metrics.append(
                Metric(table, settings, name + ending, "percent", value, where, comparable, method)
            )

    for row in rows.values():
        by_part: dict[str, list[Result]] = {}
        weights: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        for target in targets:
            found, mean, few = one_target(row, target, options, device, folder, len(targets) == 1)
            embeddings |= few
            if mean is not None:
                weights[target.name] = mean
            for part, result in found.items():
                by_part.setdefault(part, []).append(result)
                record(row, part, result.mean, target.name)
                if len(target.splits) > 1:
                    record(row, part, result.std, target.name, " std")
            skipped[target.name] = next(iter(found.values())).skipped
        if weights:
            experts = trained_on(folder, config)[0]
            weight_bars(weights, experts, folder / "samples" / f"weights-{row.name}.png")
        if len(embeddings) > 1:
            of = "site" if len(targets) > 1 else "person"
            embedding_plot(embeddings, folder / "samples" / f"embedding-{row.name}.png", of)
        if len(targets) > 1:
            for part, results in by_part.items():
                record(row, part, average(results), "average")
    for name, count in skipped.items():
        if count:
            print(f"{name}: queries without a true match, left out: {count}")
    return metrics


def show(metrics: list[Metric], published: dict, config: Config) -> None:
    """Print means over seeds and splits: the first row with all its aggregations, of the others the parts
    without one; then what may stand beside published numbers."""
    first = config.variants[0]
    names = {first, *(f"{first}-{seed}" for seed in run_seeds(config))}
    shown = [m for m in metrics if ":" not in m.method or m.method.split()[0] in names]
    header, *rows = summary(shown)
    print(format_table(header, rows))
    print("mAP / Rank-1 in percent, means ± deviations between seeds or splits.")
    print("All rows: table.md beside the published ones, results.json with every seed and metric.")
    comparable = [m for m in metrics if m.comparable and m.metric in SHOWN]
    if comparable:
        print_metrics(comparable, published)


def main() -> None:
    """Evaluate one run and print its folder."""
    options, begin = parse(Options, __doc__), time.perf_counter()
    unknown = [mode for mode in options.aggregation if mode not in MODES]
    if unknown or not options.aggregation:
        raise UserError(f"--aggregation {' '.join(unknown)}: choose from {', '.join(MODES)}")
    folder = find_run("meta_reid", options.run)
    config: Config = load_config(folder, Config)
    moved = {"data_root": options.data_root, "manifest": options.manifest}
    config = dataclasses.replace(config, **{name: path for name, path in moved.items() if path})
    rows = rows_of(config, folder)
    claims: list[Claim] = []
    if config.protocol == "walkers":
        if set(options.aggregation) != set(MODES):
            raise UserError("--aggregation: the walkers' claims compare all modes; leave it out")
        claims, metrics = walker_claims(config, rows, options, folder)
    else:
        metrics = protocol_metrics(config, rows, options, folder)
    published = load_published("meta_reid")
    show(metrics, published, config)
    print_claims(claims)
    table = summary(metrics, published["rows"])
    (folder / "table.md").write_text(markdown(table))
    (folder / "table.tex").write_text(latex(table))
    write_results(folder, claims, metrics, environment(config, time.perf_counter() - begin, options.device))
    print(folder)


if __name__ == "__main__":
    run_main(main)
