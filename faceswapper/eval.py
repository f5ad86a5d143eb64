"""Measure a run: drawn faces with known truth, or the FaceForensics++ protocol on prepared frames.

Without `--run`: the newest run. `--faceforensics DIR` evaluates its generators, or with `--official` the
released one, on the swaps listed there.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from faceswapper import protocol
from faceswapper.baselines import untrained
from faceswapper.claims import Scores, judge
from faceswapper.data import DRAWN, DrawnFaces, true_swap, unseen_pairs
from faceswapper.faceforensics import FaceForensicsConfig, measure_swaps, swap
from faceswapper.gallery import methods_sheet, swap_grid
from faceswapper.losses import Batch
from faceswapper.model import Generator, load_official
from faceswapper.train import Config as TrainConfig
from faceswapper.trials import Trial, load_generators, main_name, plan
from shared.io import find_run, load_config, write_image
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
from shared.ranges import Within
from shared.runtime import UserError, parse, pick_device, run_main

TEST_SEED = 900_001
"""Of the test people; no training seed should be it."""
GRID = 5
"""Sources and targets in the grid of swaps."""
UNITS = {
    "ID retrieval": "%", "background PSNR": "dB", "PSNR to target": "dB",
}  # fmt: skip
WORLDS = {"faces": "drawn faces", "simple": "simple world"}
"""What the embedded data are called in tables."""


@dataclass(frozen=True)
class Config(FaceForensicsConfig):
    """Which run to measure, and on what."""

    run: Path | None = None
    """Run folder. Default: the newest run."""
    official: Path | None = None
    """With --faceforensics: faceswapper.ckpt, measured in place of a run. Results go to the folder of
    --out."""
    out: Path = Path("official-results")
    """Folder for the results of --official."""
    test_people: Annotated[int, Within(2)] = 100
    """Drawn faces: unseen people, each once as source and once as target."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@torch.inference_mode()
def swap_all(generator: Generator, trial: Trial, source: Batch, target: Batch, batch: int = 64) -> Tensor:
    """Swaps (N, 3, S, S), source i on target i, with what the trial's variant sees."""
    parts = [
        swap(generator, trial, *(Batch(*(x[i : i + batch] for x in side)) for side in (source, target)))
        for i in range(0, len(source.picture), batch)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def score(
    swaps: Tensor,
    source: Tensor,
    target: Batch,
    truth: Tensor,
    person: list[str],
    tools: dict[str, nn.Module],
) -> dict[str, float]:
    """All metrics of drawn swaps (N, 3, S, S) in [-1, 1]; person: of each source, then of each target."""
    recognise = tools["judge"]
    mine, theirs, gallery = (recognise(x) for x in (swaps, source, target.picture))
    n = len(swaps)
    return {
        "cos source": protocol.cosine(mine, theirs),
        "cos target": protocol.cosine(mine, gallery),
        "ID retrieval": protocol.id_retrieval(mine, torch.cat((theirs, gallery)), person, person[:n]),
        **tools["reader"].errors(swaps, target.picture),
        "face L1": protocol.region_l1(swaps, truth, 1 - target.mask),
    } | protocol.picture_metrics(swaps, target.picture, target.mask)


def evaluate_drawn(config: Config, folder: Path) -> tuple[list[Claim], list[Metric], dict, TrainConfig]:
    """Generators of a run and baselines on unseen drawn people; writes the pictures. UserError for a run on
    photographs, which has no judges."""
    data = load_config(folder, TrainConfig).data
    if data not in DRAWN:
        raise UserError(f"{folder}: trained on {data}, so there is no known truth; give --faceforensics DIR")
    generators, tools, settings = load_generators(folder, TrainConfig)
    device = pick_device(config.device)
    trials = {trial.name: trial for trial in plan(settings)}
    size, values = settings.size.img_size, settings.landmark_values
    source_set, target_set = unseen_pairs(size, config.test_people, TEST_SEED, values, data)
    truth_set = DrawnFaces(true_swap(source_set.params, target_set.params), source_set.person, size, values)
    source, given, truth = (x.batch(slice(None)) for x in (source_set, target_set, truth_set))
    target, sources = (Batch(x["image"], x["landmarks"], x["mask"]) for x in (given, source))
    person = [str(int(p)) for p in torch.cat((source_set.person, target_set.person))]
    mean_face = source["image"].mean(0)
    # The truth inside the face, the target around it: what the metrics of a perfect swap are.
    perfect = torch.lerp(truth["image"], target.picture, target.mask)
    pictures = untrained(
        source["image"], target.picture, target.mask, mean_face, source_set.points, target_set.points
    )
    pictures["true swap"] = perfect
    for name, generator in generators.items():
        generator.to(device)
        pictures[name] = swap_all(generator, trials[name], sources, target)
    by_name = {
        name: score(swaps, source["image"], target, truth["image"], person, tools)
        for name, swaps in pictures.items()
    }
    groups: dict[str, list[dict[str, float]]] = {}
    for name, row in by_name.items():
        groups.setdefault(trials[name].variant if name in trials else name, []).append(row)
    scores: Scores = {
        name: {metric: sum(r[metric] for r in rows) / len(rows) for metric in rows[0]}
        for name, rows in groups.items()
    }
    units, where = UNITS | tools["reader"].units, WORLDS[data]
    columns = [f"{m} [{units[m]}]" if m in units else m for m in next(iter(scores.values()))]
    print(f"{where}: {config.test_people} swaps of unseen people at {size}x{size}; errors against the target")
    print(format_table(["method", *columns], [[name, *row.values()] for name, row in scores.items()]))
    measured_on = f"{where}, {config.test_people} unseen people"
    metrics = [
        Metric(where, f"{size}x{size}", metric, units.get(metric, ""), value, measured_on, False, name)
        for name, row in scores.items()
        for metric, value in row.items()
    ]
    main = main_name(settings)
    on = trials[main].restrict(Batch(*(x[:GRID] for x in target)))
    people = trials[main].restrict(Batch(*(x[GRID : 2 * GRID] for x in sources)))
    grid = swap_grid(generators[main].cpu(), people.picture, *on, people.mask)
    write_image(folder / "samples" / "grid.png", grid, synthetic="face swaps by FaceSwapper, drawn people")
    sheet = methods_sheet({"source": source["image"]} | pictures)
    write_image(folder / "samples" / "methods.png", sheet, synthetic="face swaps by several methods")
    return judge(scores, data), metrics, {"scores": scores, "by_name": by_name}, settings


def evaluate_faceforensics(config: Config, folder: Path | None) -> tuple[list[Metric], dict, TrainConfig]:
    """The FaceForensics++ protocol for the generators of a run, the swaps of the main one written, or for the
    released one. UserError without the frames."""
    if config.faceforensics is None:
        raise UserError("--official measures the released generator on the frames of --faceforensics DIR")
    device = pick_device(config.device)
    if folder is None:
        generator = load_official("generator", config.official).to(device)
        metrics, extra = measure_swaps(config, generator, config.out)
        return metrics, extra, TrainConfig()
    generators, _, settings = load_generators(folder, TrainConfig)
    trials = {trial.name: trial for trial in plan(settings)}
    players = {name: (generator.to(device), trials[name]) for name, generator in generators.items()}
    generator, trial = players.pop(main_name(settings))
    metrics, extra = measure_swaps(config, generator, folder, trial, players)
    return metrics, extra, settings


def main(config: Config) -> Path:
    """Evaluate, print, write results.json and pictures; returns the folder."""
    began = time.perf_counter()
    folder = None if config.official else find_run("faceswapper", config.run)
    if config.official or config.faceforensics:
        metrics, extra, settings = evaluate_faceforensics(config, folder)
        claims: list[Claim] = []
        folder = folder or config.out
        folder.mkdir(parents=True, exist_ok=True)
    else:
        claims, metrics, extra, settings = evaluate_drawn(config, folder)
    published = load_published("faceswapper")
    if claims:
        print(f"published: {published['note']}")
        print()
        print_claims(claims)
    else:
        print_metrics(metrics, published)
    write_results(
        folder, claims, metrics, environment(settings, time.perf_counter() - began, config.device), extra
    )
    return folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(Config, __doc__))))
