"""Compare the networks of a run with each other, with the baselines and with the drawn sketches.

Without `--run`: the newest run. `--write` also writes the sketches as files, for `python -m
most_net.metrics`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from most_net import baselines
from most_net.artists import measure_artists
from most_net.claims import Scores, judge
from most_net.data import Pairs
from most_net.figures import DRAWN_BY, save_figures
from most_net.learner import styles_in, synthesise
from most_net.mechanism import atlas, measure
from most_net.metrics import Pretrained, nlda_rate, quality, window_of
from most_net.pairs import find_pairs, load
from most_net.train import Config as TrainConfig
from most_net.trials import DRAWN, Trial, drawn_pairs, load_network, plan, split_data, trial_pairs
from shared.io import find_run, load_config, load_weights, write_image
from shared.published import (
    Claim,
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    write_results,
)
from shared.ranges import Natural
from shared.runtime import UserError, parse, pick_device, run_main

TEST_SEED, TEST_FACES = 999, 128
PROBED = 64
"""Test pairs on which the memories are examined."""
NLDA_TRAIN = {338: 150, 944: 300}
"""Test people of the standard split -> training people of the recognition."""


@dataclass(frozen=True)
class Config:
    """Evaluate a run."""

    run: Path | None = None
    """Run folder. Default: the newest run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""
    nlda_train: Natural | None = None
    """Training people of NLDA recognition. Default: 150 and 300 on the standard test sets, otherwise nearly
    half of the test people; 0 leaves it out."""
    patches: bool = True
    """Also the neighbour-patch baseline, which is slow on large sets."""
    lpips: bool = False
    """Also LPIPS (AlexNet); needs its ImageNet weights."""
    lpips_weights: Path | None = None
    """torchvision's AlexNet state dict. Default: torchvision's download."""
    fid: bool = False
    """Also FID and KID; need the InceptionV3 weights."""
    fid_weights: Path | None = None
    """torch-fidelity's InceptionV3 file. Default: its download."""
    write: bool = False
    """Write all test sketches to predictions/<method>/ in the run folder, the drawn ones to truth/."""


def load_test(config: TrainConfig, trial: Trial, test: Pairs | None) -> tuple[Pairs, Tensor]:
    """The test pairs at the size of the trial, and their sketches (N, 1, H, W) in [0, 1] at full size.

    test: the real ones at the size of the run. UserError when there are none.
    """
    if config.dataset in DRAWN:
        test = drawn_pairs(config, trial, TEST_FACES, TEST_SEED)
        return test, test.sketches / 255
    if test is None:
        raise UserError("no test pairs: neither a test part in the data set nor held-out pairs in the run")
    if config.scale == 1:
        return test, test.sketches / 255
    lists = (config.layout, config.train_list, config.test_list)
    train_files, test_files = find_pairs(config.dataset, config.data_root, *lists)
    files = {pair.name: pair for pair in train_files + test_files}
    return test, load([files[name] for name in test.names], config.alignment).sketches / 255


def enlarge(images: Tensor, like: Tensor) -> Tensor:
    """Sketches of a run on scaled pairs, at the size of the drawn ones."""
    if images.shape == like.shape:
        return images
    return F.interpolate(images, like.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)


def plain_baselines(test: Pairs, train: Pairs | None) -> dict[str, Tensor]:
    """Sketches of the baselines that are not trained, (N, 1, H, W) in [0, 1]; neighbour patches come from
    `train`, if given."""
    photos = test.photos.float().cpu() / 255
    out = {"grey photo": baselines.grey(photos), "dodge sketch": baselines.dodge(photos)}
    if train is not None:
        known = train.photos / 255, train.sketches / 255
        side = max(4, test.photos.shape[-2] // 12 // 2 * 2)
        out[f"neighbour patches ({len(train)})"] = baselines.neighbour_patches(photos, *known, side)
    return out


def networks(folder: Path, config: TrainConfig, device: torch.device) -> dict[Trial, nn.Module]:
    """Every trained network of the run."""
    finished = plan(config)[: load_weights(folder, {})["trial"]]
    if not finished:
        raise UserError(f"{folder}: no network is trained yet; let train.py finish the first one")
    return {trial: load_network(folder, TrainConfig, trial.name)[0].to(device) for trial in finished}


def of_first_memory(test: Pairs, net: nn.Module) -> Pairs:
    """The test pairs on which the first memory of a network is examined: of its own style alone, where every
    style has a memory."""
    own = [i for i, style in enumerate(test.styles.tolist()) if styles_in(net) == 1 or style == 0]
    return test.select(own[:PROBED])


def score(
    config: Config, truth: Tensor, got: Tensor, pretrained: Pretrained
) -> tuple[dict[str, float], list[float]]:
    """All metrics of sketches (N, 1, H, W) in [0, 1] against the drawn ones, and the NLDA rate in per cent
    for 1, 2, ... dimensions, of which the metric is the maximum. UserError when `nlda_train` was given and
    does not leave people to train on and to search."""
    columns = quality(truth, got, window_of(truth.shape[-2]))
    values = {name: float(column.mean()) for name, column in columns.items()}
    values["L1"] = 2 * float((truth - got).abs().mean())  # on [-1, 1]
    people = len(truth)
    train_people = config.nlda_train
    if train_people is None:
        train_people = NLDA_TRAIN.get(people, int(0.45 * people))
    fits = 2 <= train_people <= people - 2
    if config.nlda_train and not fits:
        raise UserError(f"--nlda-train {config.nlda_train}: between 2 and {people - 2} of {people} people")
    curve: list[float] = []
    if fits:
        found = nlda_rate(truth, got, train_people)
        values["NLDA"], curve = 100 * found.best, (100 * found.curve).tolist()
    return values | pretrained(got), curve


def evaluate(config: Config) -> Path:
    """Measure everything, print it, write results.json, pictures and, when asked, the sketches."""
    start = time.perf_counter()
    folder = find_run("most_net", config.run)
    settings = load_config(folder, TrainConfig)
    device = pick_device(config.device)
    nets = networks(folder, settings, device)
    main = [trial for trial in nets if trial.name != "artists"]
    if not main:
        raise UserError(f"{folder}: only a network of several artists, nothing to compare it with")
    real_train, _, real_test = split_data(settings)
    test, truth = load_test(settings, main[0], real_test)
    pretrained = Pretrained(truth, config, device)
    known = trial_pairs(settings, main[0], real_train) if config.patches else None
    methods = plain_baselines(test, known)
    methods |= {trial.name: synthesise(nets[trial], test, trial.size) for trial in main}

    scores: Scores = {}
    nlda: dict[str, list[float]] = {}
    for name, got in methods.items():
        scores[name], nlda[name] = score(config, truth, enlarge(got, truth), pretrained)
    window = window_of(test.photos.shape[-2])
    probe = test.select(list(range(min(PROBED, len(test)))))
    memories = {
        trial.name: measure(nets[trial], of_first_memory(test, nets[trial]), trial.size, window)
        for trial in main
        if hasattr(nets[trial], "memories")
    }
    shown = {trial.name: (nets[trial], trial.size) for trial in main}
    others = {trial.name for trial in main if trial.seed != settings.seed}
    first_seed = {name: images for name, images in methods.items() if name not in others}
    everything = None if real_train is None else len(real_train)
    save_figures(folder / "samples", shown, probe, first_seed, scores, everything)
    artists: dict[str, float] = {}
    for trial in nets:
        if trial.name == "artists":
            net = nets[trial].cpu()  # a small network on a few faces
            artists, sheet = measure_artists(net, trial.artists, trial.size)
            write_image(folder / "samples" / "artists.png", sheet, DRAWN_BY)
            faces = drawn_pairs(settings, trial, PROBED, TEST_SEED)
            sheet = atlas(net, faces, trial.size)
            write_image(folder / "samples" / "atlas-artists.png", sheet, DRAWN_BY)
    claims: list[Claim] = []
    if settings.dataset in DRAWN:
        claims = judge(settings.pairs, scores, memories, artists)
    data = f"{settings.dataset}, {len(test)} test pairs"
    means = mean_over_seeds(scores)
    metrics = [
        Metric("sketches", "", metric, _unit(metric), value, data, comparable=False, method=name)
        for name, row in means.items()
        for metric, value in row.items()
    ]
    print(f"{data}, mean over seeds (single seeds stand in results.json)")
    columns = list(next(iter(means.values())))
    print(format_table(["method", *columns], [[name, *row.values()] for name, row in means.items()]))
    print(f"published: {load_published('most_net')['note']}")
    print_claims(claims)
    seconds = time.perf_counter() - start
    extra = {"scores": scores, "NLDA by dimensions": nlda, "memory": memories, "artists": artists}
    write_results(folder, claims, metrics, environment(settings, seconds, config.device), extra)
    if config.write:
        for name, images in {"truth": truth, **methods}.items():
            for file, image in zip(test.names, enlarge(images, truth), strict=True):
                where = folder / ("truth" if name == "truth" else f"predictions/{name.replace(' ', '-')}")
                made = None if name == "truth" else f"sketch by {name} of a photo"
                write_image(where / f"{file}.png", image, made)
    return folder


def mean_over_seeds(scores: Scores) -> Scores:
    """Scores of single seeds, most-8-0 and so on, as means: "most, 8 pairs". Baselines stay as they are."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, row in scores.items():
        variant, *rest = name.rsplit("-", 2)
        trained = len(rest) == 2 and rest[1].isdigit()
        groups.setdefault(f"{variant}, {rest[0]} pairs" if trained else name, []).append(row)
    return {
        name: {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}
        for name, rows in groups.items()
    }


def _unit(metric: str) -> str:
    return "%" if metric == "NLDA" else ""


if __name__ == "__main__":
    run_main(lambda: print(evaluate(parse(Config, __doc__))))
