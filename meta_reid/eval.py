"""Evaluate a run: the demo's claims on walkers, or a published protocol beside the published numbers."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meta_reid.aggregation import MODES
from meta_reid.data import Target, file_target, walker_target
from meta_reid.figures import embedding_plot, ranking_lists, weight_bars
from meta_reid.items import Split, manifest
from meta_reid.model import META
from meta_reid.protocols import SETTINGS, Result, average, embed, evaluate, prepare, targets_of
from meta_reid.rows import Row, plan, run_seeds
from meta_reid.tables import SHOWN, latex, markdown, summary
from meta_reid.train import Config, trained_on
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
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class Options:
    """What to evaluate and how."""

    run: Path | None = None
    """Run folder. Default: the newest."""
    aggregation: tuple[str, ...] = MODES
    """Aggregation modes to report."""
    temperature: float = 1.0
    """Divides what enters the softmax of the weights."""
    normalize_parts: bool = False
    """Give mixture and global feature length 1 before they are joined."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Data-loading processes."""
    bf16: bool = False
    """bf16 autocast of the networks; relevance stays in float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    data_root: Path | None = None
    """Folder with the public sets, when it moved since the training."""


@dataclass(frozen=True)
class Measured:
    """A META row on one target: results by part or mode, and what the experts say about each image."""

    results: dict[str, Result]
    """global, mixture:<mode>, full:<mode>."""
    features: dict[str, Tensor]
    """The same keys -> embeddings, (N, D)."""
    weights: Tensor | None
    """(N, K) of `shared`, or None without that scoring network."""
    distance: Tensor
    """(N, K): sum of r over the layers."""


def measure(row: Row, target: Target, options: Options, device: torch.device) -> Measured:
    """Embed a target once and evaluate every part and aggregation mode of a META row."""
    model: META = prepare(row.model, device)
    model.temperature = options.temperature
    modes = [m for m in options.aggregation if m in model.scorings or m not in ("shared", "learned")]
    if not modes:
        asked = " ".join(f"'{mode}'" for mode in options.aggregation)
        raise UserError(
            f"--aggregation {asked}: {row.name} was trained with the '{row.config.scoring}' scoring"
        )

    def everything(images: Tensor) -> tuple[Tensor, ...]:
        described = model.describe(images)
        halves = [model.parts(described, mode) for mode in modes]
        weights = [model.expert_weights(described, "shared")] if "shared" in model.scorings else []
        return (halves[0][1], described.relevance.sum(-1), *(mixture for mixture, _ in halves), *weights)

    universal, distance, *rest = embed(
        everything, target.images, device, options.batch, options.workers, options.bf16
    )
    features = {"global": universal}
    for mode, mixture in zip(modes, rest, strict=False):
        halves = (mixture, universal)
        if options.normalize_parts:
            halves = tuple(torch.nn.functional.normalize(half) for half in halves)
        features[f"mixture:{mode}"], features[f"full:{mode}"] = mixture, torch.cat(halves, 1)
    results = {name: evaluate(feature, target) for name, feature in features.items()}
    return Measured(results, features, rest[-1] if "shared" in model.scorings else None, distance)


def measure_plain(row: Row, target: Target, options: Options, device: torch.device) -> Result:
    """A plain network: the better of the feature before and after the BNNeck."""
    model = prepare(row.model, device)
    both = embed(model.parts, target.images, device, options.batch, options.workers, options.bf16)
    return max((evaluate(feature, target) for feature in both), key=lambda result: result.mean["mAP"])


def rows_of(config: Config, folder: Path) -> dict[str, Row]:
    """Trained rows of a run by name. Raises UserError while the run is unfinished."""
    rows = plan(config, trained_on(folder, config)[1])
    position = load_weights(folder, {row.name: row.model for row in rows})
    if position["row"] < len(rows):
        raise UserError(f"{folder}: the run is not finished; repeat the train command to continue it")
    return {row.name: row for row in rows}


def walker_claims(
    config: Config, rows: dict[str, Row], options: Options, folder: Path
) -> tuple[list[Claim], list[Metric]]:
    """Claims (a) to (f) and the table of the walkers."""
    device = pick_device(options.device)
    everywhere: dict[str, Measured] = {}
    at_sources: dict[tuple[str, int], Measured] = {}
    metrics: list[Metric] = []
    m_ap: dict[str, float] = {}

    def record(row: str, part: str, seed: int, result: Result, site: str = "T") -> None:
        method = f"{row} {part}".strip()
        if site == "T":
            m_ap[f"{method} {seed}"] = result.mean["mAP"]
        for name in ("mAP", "Rank-1", "mINP"):
            value, where = result.mean[name], f"walkers at {site}"
            metrics.append(Metric("walkers", f"seed {seed}", name, "%", value, where, False, method))

    for name, row in rows.items():
        seed, variant = row.config.seed, name.rsplit("-", 1)[0]
        target = walker_target("T", seed)
        if row.config.method == "plain":
            record(variant, "", seed, measure_plain(row, target, options, device))
            continue
        everywhere[name] = measure(row, target, options, device)
        for part, result in everywhere[name].results.items():
            record(variant, part, seed, result)
        if variant == "meta":
            for site in "ABC":
                at_sources[site, seed] = measure(row, walker_target(site, seed), options, device)
                for part, result in at_sources[site, seed].results.items():
                    record(variant, part, seed, result, site)
    seeds = [seed for seed in run_seeds(config) if f"meta-{seed}" in rows]
    pictures(config, everywhere, at_sources, seeds[0] if seeds else None, folder)
    return claims_from(m_ap, everywhere, at_sources, seeds), metrics


def claims_from(
    m_ap: dict[str, float], everywhere: dict[str, Measured], sources: dict, seeds: list[int]
) -> list[Claim]:
    """The claims whose rows were trained; every claim must hold with every seed."""
    claims = []

    def difference(key: str, text: str, better: str, worse: str, margin: float) -> None:
        gaps = {}
        for seed in seeds:
            if f"{better} {seed}" in m_ap and f"{worse} {seed}" in m_ap:
                gaps[f"seed {seed}"] = m_ap[f"{better} {seed}"] - m_ap[f"{worse} {seed}"]
        if gaps:
            asked = f"{better} - {worse} >= {margin:g} mAP with every seed"
            claims.append(Claim(key, text, gaps, asked, min(gaps.values()) >= margin))

    difference("a", "META beats one network on mixed domains, unseen site", "meta full:shared", "baseline", 5)
    difference(
        "b",
        "IN in the global branch generalises better than BN there",
        "meta global",
        "no-in global",
        4,
    )
    difference(
        "c", "Adding the mixture does not harm the global branch", "meta full:shared", "meta global", -1
    )
    right = {}
    for (site, seed), measured in sources.items():
        if site in "AC" and measured.weights is not None:
            expert = "ABC".index(site)
            others = [k for k in range(3) if k != expert]
            average_weights, distances = measured.weights.mean(0), measured.distance.mean(0)
            right[f"{site} weight margin, seed {seed}"] = float(
                average_weights[expert] - average_weights[others].max()
            )
            right[f"{site} distance margin, seed {seed}"] = float(distances[others].min() - distances[expert])
    if right:
        asked = "mean weight of the site's own expert is the largest, its mean distance the smallest"
        text = "Relevance finds the source that an image looks like (new persons at sites A and C)"
        claims.append(Claim("d", text, right, asked, min(right.values()) > 0))
    difference(
        "e",
        "The released code's weights (most distant expert first) mix worse than uniform ones",
        "meta mixture:uniform",
        "meta mixture:official",
        5,
    )
    same, changed = {}, {}
    for seed in seeds:
        off = everywhere.get(f"no-consistency-{seed}")
        if off is None:
            continue
        on = everywhere[f"meta-{seed}"]
        for mode in ("official", "shared", "learned"):
            if f"full:{mode}" not in on.features:
                continue  # needs a scoring network that the run does not have
            gap = (on.features[f"full:{mode}"] - off.features[f"full:{mode}"]).abs().max()
            (same if mode == "official" else changed)[f"{mode}, seed {seed}"] = float(gap)
    if same:
        text = "The consistency loss cannot reach the released embedding, only those that use the scores"
        holds = max(same.values()) == 0 and min(changed.values()) > 0
        asked = "largest change of an embedding: 0 for official, above 0 for shared and learned"
        claims.append(Claim("f", text, same | changed, asked, holds))
    return claims


def pictures(
    config: Config, everywhere: dict[str, Measured], sources: dict, seed: int | None, folder: Path
) -> None:
    """Ranking lists, weights for each site, and the embedding plot of the first META row."""
    if seed is None:
        return
    unseen, target = everywhere[f"meta-{seed}"], walker_target("T", seed)
    key = "full:shared" if "full:shared" in unseen.features else "full:uniform"
    query, gallery = target.splits[0]
    sheet = ranking_lists(unseen.features[key], target, query[:: len(query) // 8][:8], gallery)
    write_image(folder / "samples" / "ranking.png", sheet)
    sites = {site: measured for (site, s), measured in sources.items() if s == seed} | {"T": unseen}
    if unseen.weights is not None:
        table = {site: measured.weights.mean(0) for site, measured in sites.items()}
        weight_bars(table, list("ABC"), folder / "samples" / "weights.png")
    plot = {site: measured.features[key] for site, measured in sites.items()}
    embedding_plot(plot, folder / "samples" / "embedding.png")


def target_sets(config: Config) -> list[Target]:
    """Test sets of a run on files."""
    size = (config.height, config.width)
    if config.protocol != "manifest":
        return targets_of(int(config.protocol), config.target, config.data_root, size)
    items = manifest(config.manifest)[config.target]
    seen: set[int] = set()
    # The first image of every identity is the query.
    query = [item for item in items if not (item.identity in seen or seen.add(item.identity))]
    chosen = {item.path for item in query}
    return [
        file_target(config.target, [Split(query, [item for item in items if item.path not in chosen])], size)
    ]


def as_published(row: Row, options: Options) -> bool:
    """Whether a row is META itself on a published protocol, so that its embedding with the aggregation
    `official` may stand beside the published numbers; ablations and options of ours may not."""
    config = row.config
    changed = config.episodic_grad or config.uniformity or not config.instance_norm
    evaluated = options.temperature == 1 and not options.normalize_parts
    own = row.name.rsplit("-", 1)[0] == "meta" and config.architecture == "r50" and not changed
    return own and evaluated and config.protocol != "manifest"


def protocol_metrics(config: Config, rows: dict[str, Row], options: Options, folder: Path) -> list[Metric]:
    """The metrics of a protocol on real data, each aggregation mode apart; Protocol 1 adds the average."""
    device, metrics = pick_device(options.device), []
    table = f"Protocol-{config.protocol} comparison"
    settings = {"1": "M+C2+C3+CS"}.get(config.protocol, SETTINGS.get(config.target, config.target))
    targets = target_sets(config)
    for row in rows.values():
        by_part: dict[str, list[Result]] = {}
        weights: dict[str, Tensor] = {}
        for target in targets:
            if row.config.method == "plain":
                found = {row.name: measure_plain(row, target, options, device)}
            else:
                measured = measure(row, target, options, device)
                found = {f"{row.name} {part}": result for part, result in measured.results.items()}
                if measured.weights is not None:
                    weights[target.name] = measured.weights.mean(0)
                query, gallery = target.splits[0]
                best = next(part for part in measured.features if part.startswith("full:"))
                sheet = ranking_lists(measured.features[best], target, query[:8], gallery)
                write_image(folder / "samples" / f"ranking-{target.name}-{row.name}.png", sheet)
            for part, result in found.items():
                by_part.setdefault(part, []).append(result)
                released = as_published(row, options) and part.endswith("full:official")
                for name, value in result.mean.items():
                    method = "META" if released else part
                    metrics.append(
                        Metric(table, settings, name, "percent", value, target.name, released, method)
                    )
                    if len(target.splits) > 1:
                        metrics.append(
                            Metric(table, settings, f"{name} std", "percent", result.std[name], target.name,
                                   False, method)
                        )  # fmt: skip
                if result.skipped:
                    print(f"{target.name}, {part}: {result.skipped} queries without a true match, left out")
        if weights:
            experts = trained_on(folder, config)[0]
            weight_bars(weights, experts, folder / "samples" / f"weights-{row.name}.png")
        if len(targets) > 1:
            for part, results in by_part.items():
                released = as_published(row, options) and part.endswith("full:official")
                for name, value in average(results).items():
                    method = "META" if released else part
                    metrics.append(
                        Metric(table, settings, name, "percent", value, "average", released, method)
                    )
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
    if options.data_root:
        config = dataclasses.replace(config, data_root=options.data_root)
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
