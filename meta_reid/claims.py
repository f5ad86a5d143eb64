"""The demo's experiment on walkers: claims (a) to (f), every number behind them, and its pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from meta_reid.data import walker_target
from meta_reid.figures import embedding_plot, ranking_lists, weight_bars
from meta_reid.measure import Measured, measure, measure_plain
from meta_reid.protocols import Result
from meta_reid.rows import Row, run_seeds
from meta_reid.train import Config
from meta_reid.vit import VITS
from shared.io import write_image
from shared.published import Claim, Metric
from shared.runtime import pick_device

if TYPE_CHECKING:
    from meta_reid.eval import Options


def walker_claims(
    config: Config, rows: dict[str, Row], options: "Options", folder: Path
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
    pictures(everywhere, at_sources, seeds[0] if seeds else None, folder)
    norm = "layer norm" if config.architecture in VITS else "BN"
    return claims_from(m_ap, everywhere, at_sources, seeds, norm), metrics


def claims_from(
    m_ap: dict[str, float],
    everywhere: dict[str, Measured],
    sources: dict[tuple[str, int], Measured],
    seeds: list[int],
    norm: str = "BN",
) -> list[Claim]:
    """The claims whose rows were trained; every claim must hold with every seed.

    m_ap: "<row> <part> <seed>" -> mAP at T. everywhere: META's rows at T. sources: the row `meta` at A, B and
    C, by site and seed. norm: what stands in the ablation where the method has IN.
    """
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
        f"IN in the global branch generalises better than {norm} there",
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
            if mode not in on.modes:
                continue  # needs a scoring network that the run does not have
            gap = (on.full(mode) - off.full(mode)).abs().max()
            (same if mode == "official" else changed)[f"{mode}, seed {seed}"] = float(gap)
    if same:
        text = "The consistency loss cannot reach the released embedding, only those that use the scores"
        holds = max(same.values()) == 0 and min(changed.values()) > 0
        asked = "largest change of an embedding: 0 for official, above 0 for shared and learned"
        claims.append(Claim("f", text, same | changed, asked, holds))
    return claims


def pictures(
    everywhere: dict[str, Measured],
    sources: dict[tuple[str, int], Measured],
    seed: int | None,
    folder: Path,
) -> None:
    """Ranking lists, weights for each site, and the embedding plot of the first META row."""
    if seed is None:
        return
    unseen, target = everywhere[f"meta-{seed}"], walker_target("T", seed)
    mode = "shared" if "shared" in unseen.modes else "uniform"
    query, gallery = target.splits[0]
    sheet = ranking_lists(unseen.full(mode), target, query[:: len(query) // 8][:8], gallery)
    write_image(folder / "samples" / "ranking.png", sheet)
    sites = {site: measured for (site, s), measured in sources.items() if s == seed} | {"T": unseen}
    if unseen.weights is not None:
        table = {site: measured.weights.mean(0) for site, measured in sites.items()}
        weight_bars(table, list("ABC"), folder / "samples" / "weights.png")
    plot = {site: measured.full(mode) for site, measured in sites.items()}
    embedding_plot(plot, folder / "samples" / "embedding.png")
