"""Evaluate PIN: verification under attacks that know the recogniser, another one, only its answers, or the
defence.

Claims are judged on the embedded people of a run. Public pairs (--lfw, --bin) are attacked with the values of
the authors' later code: 0.04 in [-1, 1], 5.1 grey levels.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pin import defenses
from pin.basis import load_basis
from pin.claims import Table, check_claims, compare_with_fixed
from pin.data import test_faces, training_faces
from pin.experiments import (
    Lab,
    adaptive_attacks,
    craft,
    defence_table,
    plug_and_play,
    premise,
    query_attack,
    selection_quality,
    smallest_changes,
)
from pin.figures import draw_detection, draw_figures
from pin.job import placed, with_bf16
from pin.model import load_official, make_esn
from pin.pairs import Pairs, insightface_bin, lfw_pairs, random_pairs
from pin.protocol import FARS, detection_scores, in_batches, perturbation_size, purified_quality
from pin.recognizers import Recognizer, adapt
from pin.train import Config, build_networks, variant_config
from shared.io import find_run, load_config, load_weights, progress
from shared.metrics import auc
from shared.published import (
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    print_metrics,
    write_results,
)
from shared.ranges import Count
from shared.runtime import UserError, in_bf16, parse, pick_device, run_main


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation."""

    run: Path | None = None
    """Run folder; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of DAE, ESN and recogniser, also where an attack differentiates them. auto: bf16 on a GPU,
    fp32 on the CPU."""
    pairs: Count = 200
    """Embedded data and folders without a pair list: pairs of the same person, and as many of different
    people."""
    repeats: Count = 5
    """Seeds of the random masks that are averaged."""
    full: bool = False
    """All attacks and defences; the `study` preset does so by itself. Minutes instead of one."""
    queries: Count = 100
    """Queries of the Square attack (ten times as many with --full)."""
    lfw: Path | None = None
    """LFW folder: evaluate on its pairs instead of the run's own test people."""
    pair_list: Path | None = None
    """Pair list for --lfw when it is not LFW/pairs.txt: pairsDevTest.txt, or lines `file1 file2 label`."""
    bin: Path | None = None
    """InsightFace .bin file (CFP-FP, AgeDB-30, CALFW, CPLFW) instead."""
    landmarks: Path | None = None
    """Five landmarks per image of --lfw, for ArcFace alignment."""
    recognizer: Path | None = None
    """Official recogniser weights, for runs that train none (112 x 112)."""
    recognizer_name: Recognizer = "arcface_ir_se50"
    """Which network they belong to."""
    surrogate: Path | None = None
    """Weights of another official recogniser, whose attacks are tried on the first (transfer)."""
    surrogate_name: Recognizer = "arcface_ir50"
    """Which network those belong to."""
    legacy: bool = False
    """Feed Light CNN [-1, 1] as PIN's code does instead of [0, 1]."""


def evaluation_pairs(options: Options, config: Config) -> tuple[Tensor, Tensor, Pairs, str]:
    """First and second images (P, 1, H, W), the pairs, and the name of the data. UserError when thresholds
    cannot be had from other folds."""
    if options.bin is not None and options.lfw is not None:
        raise UserError("--lfw and --bin are two sets: give one of them")
    if options.lfw is None and (options.pair_list is not None or options.landmarks is not None):
        raise UserError("--pair-list and --landmarks belong to --lfw: give its folder too")
    if options.legacy and options.recognizer is None and options.surrogate is None:
        raise UserError("--legacy is about official weights: give --recognizer or --surrogate too")
    if options.bin is not None:
        faces, pairs = insightface_bin(options.bin, config.size)
        name = options.bin.stem
    elif options.lfw is not None:
        faces, pairs = lfw_pairs(options.lfw, options.pair_list, config.size, options.landmarks)
        name = "LFW pairs" if options.pair_list is None else options.pair_list.name
    elif config.data in ("folder", "celeba") and not config.recognizers:
        raise UserError("this run trained no recogniser: give --recognizer and pairs by --lfw or --bin")
    else:
        faces = test_faces(config)
        pairs = random_pairs(faces.labels, options.pairs, options.pairs, config.seed)
        name = f"embedded ({config.data})" if config.data in ("simple", "faces") else config.data_root.name
    folds = int(pairs.fold.max()) + 1 if len(pairs.fold) else 0
    kinds = set(zip(pairs.fold.tolist(), pairs.same.tolist(), strict=True))
    if folds < 2 or len(kinds) < 2 * folds:
        raise UserError(
            f"{name}: {int(pairs.same.sum())} pairs of the same person and {int((~pairs.same).sum())} of two "
            f"people in {folds} folds; thresholds come from the other folds, so there must be two or more, "
            f"with both kinds in each"
        )
    images = torch.stack([faces[i][0] for i in progress(range(len(faces)), name)])
    return images[pairs.first], images[pairs.second], pairs, name


def fixed(network: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A network that is evaluated: frozen, on the device, in the arithmetic of --precision."""
    network = placed(network.eval().requires_grad_(False), device)
    return with_bf16(network, device) if in_bf16(precision, device) else network


def open_lab(options: Options, folder: Path, config: Config) -> tuple[Lab, str]:
    """A trained run and its test pairs; the basis is checked against the hash in the checkpoint."""
    if "pin" not in config.variants:
        raise UserError(f"{folder}: trained without the variant pin, which all comparisons are about")
    device = pick_device(options.device)
    first, second, pairs, data = evaluation_pairs(options, config)
    train = training_faces(config)
    standing = load_weights(folder, {})
    networks = build_networks(config, standing["facts"]["classes"])
    unfinished = networks.keys() - set(standing["done"])
    if unfinished:
        raise UserError(
            f"{folder}: not trained to the end ({', '.join(sorted(unfinished))}); run train.py again"
        )
    load_weights(folder, networks)
    basis = load_basis(folder / "basis.safetensors", config.components)
    basis.check(standing["facts"]["basis"], f"the checkpoint in {folder}")
    networks = {name: fixed(network, options.precision, device) for name, network in networks.items()}
    recognizers = {name: networks[name] for name in config.recognizers}
    if options.recognizer is not None:
        network = load_official(options.recognizer_name, options.recognizer)
        network = adapt(options.recognizer_name, network, options.legacy)
        recognizers = {"recognizer": fixed(network, options.precision, device)}
    if options.surrogate is not None:
        network = load_official(options.surrogate_name, options.surrogate)
        network = adapt(options.surrogate_name, network, options.legacy)
        recognizers["surrogate"] = fixed(network, options.precision, device)
    if "recognizer" not in recognizers:
        raise UserError("no recogniser to attack: give official weights with --recognizer FILE")
    some = torch.linspace(0, len(train) - 1, min(len(train), 1000)).long()
    lab = Lab(
        recognizers=recognizers,
        basis=basis.to(device),
        dae=networks.get("dae"),
        esns={
            name.removeprefix("esn-"): network
            for name, network in networks.items()
            if name.startswith("esn-")
        },
        prices={variant: standing["facts"][f"lambda-{variant}"] for variant in config.variants},
        sees_dae={variant: variant_config(config, variant).dae for variant in config.variants},
        first=first.to(device),
        second=second.to(device),
        pairs=pairs,
        train=torch.stack([train[int(i)][0] for i in some]),
        noise=config.noise,
        seed=config.seed,
        authors=options.lfw is not None or options.bin is not None,
    )
    return lab, data


def to_metrics(table: Table, data: str, name: str) -> list[Metric]:
    """Outcomes as rows of results.json, without rates that the pairs are too few for."""
    rows = []
    for defense, by_attack in table.items():
        for attack, outcome in by_attack.items():
            for metric, value in vars(outcome).items():
                if not math.isnan(value):
                    label = f"TAR at FAR {FARS[metric]:.0e}" if metric in FARS else metric
                    rows.append(Metric(name, attack, label, "fraction", value, data, False, defense))
    return rows


def print_table(title: str, table: Table, metric: str = "accuracy") -> None:
    """One number of every defence under every attack."""
    attacks = list(dict.fromkeys(attack for by_attack in table.values() for attack in by_attack))
    rows = [
        [name, *(f"{getattr(by[attack], metric):.3f}" if attack in by else "-" for attack in attacks)]
        for name, by in table.items()
    ]
    print(f"\n{title}")
    print(format_table(["defence", *attacks], rows))


def print_accepts(table: Table, data: str, impostors: int) -> None:
    """True accept rates at 1e-3, and which rates `impostors` pairs of different people are too few for."""
    if impostors >= round(10 / FARS["tar_1e3"]):
        title = f"true accepts at 1e-3 false accepts on {data}, threshold from {impostors:,} clean pairs"
        print_table(title, table, "tar_1e3")
    for far in FARS.values():
        if impostors < round(10 / far):
            print(
                f"TAR at FAR {far:.0e} is left out: it takes {round(10 / far):,} pairs of different people, "
                f"and here are {impostors:,}"
            )


def evaluate(options: Options) -> Path:
    """Run the experiments on a run and write results.json and pictures; returns the run folder."""
    begin = time.perf_counter()
    folder = find_run("pin", options.run)
    config = load_config(folder, Config)
    lab, data = open_lab(options, folder, config)
    full = options.full or config.preset == "study"
    torch.manual_seed(config.seed)
    untrained = make_esn(config.size, config.components, config.esn_widths, config.hidden)
    untrained = fixed(untrained, options.precision, lab.device)
    quality = {variant: selection_quality(lab, variant, untrained) for variant in lab.esns}
    lab.attacked = craft(lab, full=full)
    if "surrogate" in lab.recognizers:
        lab.transferred = craft(lab, "surrogate", (lab.main,))
    kept = {variant: max(round(numbers["kept"]), 1) for variant, numbers in quality.items()}
    table = defence_table(lab, kept, options.repeats, slow=full)
    other = plug_and_play(lab, options.repeats) if lab.transferred else {}
    adaptive = adaptive_attacks(lab, full)
    shift = premise(lab, min(60, lab.basis.size[1] // 2))
    queries = query_attack(lab, options.queries * (10 if full else 1), 50)
    changes = smallest_changes(lab, 10_000 if lab.authors else 2000, 50) if full else {}
    threshold = lab.pin("pin", "threshold")
    suspicion = detection_scores(lab.recognizer, threshold, lab.first, lab.attacked[lab.main])
    truth = np.repeat([0, 1], len(lab.first))
    detection = {name: auc(scores, truth) for name, scores in suspicion.items()}
    fidelity = purified_quality(in_batches(threshold, lab.first), lab.first)
    sizes = {name: perturbation_size(images, lab.first) for name, images in lab.attacked.items()}

    metrics = to_metrics(table, data, "defences") + to_metrics(adaptive, data, "adaptive attacks")
    metrics += to_metrics(other, data, "second recogniser")
    for name, values in {
        **{f"selection, {variant}": numbers for variant, numbers in quality.items()},
        "feature shift": shift,
        **{f"Square, {name}": numbers for name, numbers in queries.items()},
        **{f"smallest change, {name}": numbers for name, numbers in changes.items()},
        f"attack detection AUC, {lab.main}": detection,
        "purified, clean": fidelity,
        **{f"size of {name}": numbers for name, numbers in sizes.items()},
    }.items():
        metrics += [
            Metric("analysis", name, key, "", value, data, False, "PIN") for key, value in values.items()
        ]

    print_table(
        f"accuracy on {data}, 10 folds, defence on both images, attacker sees the bare recogniser", table
    )
    print_accepts(table, data, lab.verifier(defenses.identity).impostors)
    print_table("attackers who know the defence", adaptive)
    print()
    print_metrics([metric for metric in metrics if metric.table == "analysis"], load_published("pin"))
    print()
    embedded = config.data in ("simple", "faces") and not lab.authors
    claims = check_claims(table, quality, shift, adaptive, other) if embedded else []
    print_claims(claims)
    gains = compare_with_fixed(table)
    print("sampled masks against as many leading eigenfaces, the same for every face:")
    for variant, by_attack in gains.items():
        print(f"    {variant}: " + ", ".join(f"{attack} {gain:+.3f}" for attack, gain in by_attack.items()))
    draw_figures(lab, table, quality, folder / "samples")
    draw_detection(suspicion, truth, lab.main, folder / "samples" / "detection.png")
    record = environment(config, time.perf_counter() - begin, options.device)
    write_results(folder, claims, metrics, record, {"gain over fixed top-K": gains})
    return folder


if __name__ == "__main__":
    run_main(lambda: print(evaluate(parse(Options, __doc__))))
