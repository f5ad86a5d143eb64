"""Measure a run: what the method's parts are for, and the metrics of text-to-face synthesis beside baselines.

No number of AnyFace's own tables is known; none stands beside what is measured here.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from anyface import sheets
from anyface.claims import code_claims, mean, picture_claims
from anyface.clip import BPETokenizer, image_features
from anyface.compare import METRIC_SIZE, Pictures, compare, draw_diversity, make_methods
from anyface.data import (
    Cache,
    Faces,
    build_cache,
    encode_captions,
    one_caption_each,
    open_faces,
    reconstruction_features,
)
from anyface.effects import (
    caption_counts,
    caption_effects,
    code_effects,
    editing,
    kept_identity,
    read_texts,
    timing,
)
from anyface.lightcnn import grey_faces
from anyface.model import Stream, load_official
from anyface.protocol import (
    COLUMNS,
    SECOND,
    Networks,
    feature_networks,
    lpips_network,
    r_precision,
    read_rows,
)
from anyface.stages import Constants, load_constants, load_streams, plan, reads_words, variant_config
from anyface.train import Config
from anyface.userstudy import write_study
from anyface.weights import load_clip, load_light_cnn
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
from shared.ranges import Natural, Weight, Within
from shared.runtime import parse, pick_device, run_main

UNITS = {"R-precision@1": "%", "R-precision@10": "%", SECOND: "%", "named traits": "%"}


@dataclass(frozen=True)
class EvalConfig:
    """Which run to measure, and how."""

    run: Path | None = None
    """Run folder; default: the newest."""
    compared: Annotated[int, Within(2)] = 100
    """Test captions that all methods of the comparison make a face for."""
    optimise_steps: Natural = 60
    """Steps of latent optimisation for each caption; 0 leaves it out. StyleCLIP takes 200 to 300."""
    psi: Weight = 1.0
    """Truncation of the noise layers, in the row with noise and in the diversity of draws."""
    fid_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth; FID is left out without it."""
    lpips_weights: Path | None = None
    """torchvision's alexnet-owt-7be5be79.pth; LPIPS is left out without it."""
    lightcnn_weights: Path | None = None
    """LightCNN_29Layers_V2_checkpoint.pth.tar or LightCNN_9Layers_checkpoint.pth.tar, for RFRR; without it
    RFRR is left out, or in the simple world measured with the judge's features and named so."""
    identity_weights: Path | None = None
    """model_ir_se50.pth: how much of the source's identity an edit keeps; left out without it."""
    second_clip: Path | None = None
    """Another of OpenAI's CLIPs (QuickGELU), which was no training signal, for a second R-precision."""
    rows: Path | None = None
    """CSV with published rows that you hold (method, dataset, metric, value, protocol), shown below the
    measured ones."""
    study: Natural = 0
    """Captions of a user study: writes a page for blind ranking of the methods; 0 writes none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def make_networks(settings: EvalConfig, config: Config, constants: Constants, device) -> Networks:
    """The networks that metrics need, as far as they are given."""
    clip_input = config.behaviour.clip_input
    features = feature_networks(constants.clip, clip_input, settings.fid_weights, constants.judge)
    if settings.lightcnn_weights is not None:
        light = load_light_cnn(settings.lightcnn_weights).to(device)
        features["LightCNN"] = lambda pictures: light(grey_faces(pictures))
    second = None
    if settings.second_clip is not None:
        second = load_clip(settings.second_clip).to(device).eval()
        features["second CLIP"] = partial(image_features, second)
    lpips = lpips_network(settings.lpips_weights)
    return Networks(features, None if lpips is None else lpips.to(device), second)


def caption_features(faces: Faces, cache: Cache, networks: Networks, n: int) -> dict[str, Tensor]:
    """Features of the first n captions (n, F), by the name of their CLIP."""
    texts = {"CLIP": cache.text[:n, 0]}
    if networks.second_clip is not None:
        captions = [own[0] for own in faces.captions[:n]]
        tokenizer = BPETokenizer(networks.second_clip.context_length)
        texts["second CLIP"] = encode_captions(networks.second_clip, tokenizer, captions, cache.text.device)
    return texts


def all_effects(
    config: Config,
    streams: dict[str, dict[int, tuple[Stream, Stream]]],
    constants: Constants,
    faces: Faces,
    cache: Cache,
    train_mean: Tensor,
) -> tuple[dict[str, dict[int, dict[str, float]]], list[Claim]]:
    """Effects on codes for every pair of streams, and in the world the claims."""
    effects: dict[str, dict[int, dict[str, float]]] = {}
    for name, by_seed in streams.items():
        own, its_cache = variant_config(config, name), cache
        if own.behaviour.clip_input != config.behaviour.clip_input:
            image = reconstruction_features(
                faces, constants.clip, constants.generator, own.behaviour.clip_input, cache.codes.device
            )
            its_cache = replace(cache, image=image)
        effects[name] = {
            seed: code_effects(pair, its_cache, train_mean, constants.clip, own.words)
            for seed, pair in by_seed.items()
        }
    if constants.judge is None or "full" not in streams or config.words:
        return effects, []
    seen, precision, edits, counts = [], [], [], []
    for seed, (text, _) in streams["full"].items():
        seen.append(
            caption_effects(text, faces, cache, train_mean, constants, config.noise_layers, config.seed)
        )
        with torch.inference_mode():
            made = image_features(constants.clip, constants.generator.synthesis(text(cache.text[:, 0])[0]))
        precision.append(r_precision(made, cache.text[:, 0], top=10, seed=config.seed))
        edits.append(editing(text, cache, constants))
        counts.append(caption_counts(text, faces, constants, config.seed))
        effects["full"][seed] |= seen[-1]
    averaged = {k: mean([row[k] for row in seen]) for k in seen[0]}
    edited = {
        k: [mean(list(each)) for each in zip(*(row[k] for row in edits), strict=True)] for k in edits[0]
    }
    counted = [mean(list(each)) for each in zip(*counts, strict=True)]
    claims = code_claims(effects) + picture_claims(
        averaged, mean(precision), edited, counted, 10 / min(100, len(faces))
    )
    return effects, claims


def draw_sheets(
    config: Config,
    folder: Path,
    text: Stream,
    w_t: Tensor,
    constants: Constants,
    faces: Faces,
    cache: Cache,
    methods: dict[str, Pictures],
    compared: int,
) -> None:
    """Pictures for a person to judge, into samples/. w_t (N, L, D): codes of the test captions; compared:
    for so many there are pictures of the methods."""
    captions = [own[0] for own in faces.captions[: min(8, compared)]]
    first = torch.arange(len(captions))
    beside = {"true face": faces.picture(first, min(constants.generator.size, METRIC_SIZE))}
    titles = {"nearest training caption": "nearest", "no-dt": "MSE", "latent optimisation": "optimised"}
    beside |= {title: methods[name](first) for name, title in titles.items() if name in methods}
    layers, seed = config.noise_layers, config.seed
    others = [own[0] for own in faces.captions[1:6]]
    made = {
        "captions": sheets.caption_sheet(w_t[: len(captions)], captions, constants, layers, seed, beside),
        "editing": sheets.editing_sheet(cache.codes[: len(others)], w_t[1:6], others, constants),
    }
    if faces.unseen is not None and not config.words:
        unseen = [own[0] for own in faces.unseen[: len(captions)]]
        truth = {"true face": beside["true face"]}
        with torch.inference_mode():
            codes = text(encode_captions(constants.clip, constants.tokenizer, unseen, w_t.device))[0]
        made["unseen"] = sheets.caption_sheet(codes, unseen, constants, layers, seed, truth)
        made["build-up"] = sheets.build_up_sheet(text, faces, constants, seed)
    if constants.wide is not None:
        truth = {"true face": faces.picture(first, constants.wide.size)}
        made["captions-64"] = sheets.caption_sheet(
            w_t[: len(captions)], captions, constants, layers, seed, truth, wide=True
        )
    for name, picture in made.items():
        write_image(folder / "samples" / f"test-{name}.png", picture, synthetic="AnyFace")


def to_metrics(rows: dict[str, dict[str, float]], dataset: str, setting: str) -> list[Metric]:
    """Rows of a table as metrics; none is comparable with a published number."""
    return [
        Metric("comparison", setting, metric, UNITS.get(metric, ""), value, dataset, False, method)
        for method, row in rows.items()
        for metric, value in row.items()
    ]


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Methods in rows, metrics in columns."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    header = [f"{name} [{UNITS[name]}]" if name in UNITS else name for name in names]
    cells = [[k, *(row.get(name) for name in names)] for k, row in rows.items()]
    return format_table([title, *header], cells)


def main(settings: EvalConfig) -> Path:
    """Evaluate a run: effects, claims, comparison, pictures; returns the run folder."""
    began = time.perf_counter()
    held = [] if settings.rows is None else read_rows(settings.rows)
    folder = find_run("anyface", settings.run)
    config = load_config(folder, Config)
    device = pick_device(settings.device)
    constants = load_constants(config, folder, device)
    # All files that are given are opened before the first long computation.
    networks, identity = make_networks(settings, config, constants, device), None
    if settings.identity_weights is not None:
        identity = load_official("ir_se50_112", settings.identity_weights).to(device)
    stages = [stage for stage in plan(config) if not stage.part]
    streams: dict[str, dict[int, tuple[Stream, Stream]]] = {}
    for stage in stages:
        streams.setdefault(stage.name, {})[stage.seed] = load_streams(config, folder, constants, stage)
    known = (constants.clip, constants.tokenizer, constants.generator, config.behaviour.clip_input, device)
    train_faces = open_faces(config, "train", constants.generator)
    test_faces = one_caption_each(open_faces(config, "test", constants.generator))
    train = build_cache(train_faces, *known, images=False)
    test = build_cache(test_faces, *known, words=reads_words(config))

    effects, claims = all_effects(config, streams, constants, test_faces, test, train.mean)
    shown = {f"{name}/{seed}": row for name, by_seed in effects.items() for seed, row in by_seed.items()}
    short = ("collapse index", "spread", "rank", "norm ratio")
    print(f"\n=== {test_faces.title}: {len(test_faces)} test faces ===\n")
    print(table("streams", {k: {name: row[name] for name in short} for k, row in shown.items()}))

    n = min(settings.compared, len(test_faces))
    methods = make_methods(
        config, streams, constants, (train_faces, train), test, n, settings.psi, settings.optimise_steps
    )
    said = caption_features(test_faces, test, networks, n)
    rows = compare(methods, test_faces, said, networks, constants.judge)
    print("\n" + table(f"{n} captions", rows))
    first = streams[stages[0].name][stages[0].seed]
    texts, words = test.text[:, 0], variant_config(config, stages[0].name).words
    w_t = read_texts(first[0], constants.clip, texts, test.tokens[:, 0] if words else None)[0]
    drawn = draw_diversity(w_t[:n], constants, config, settings.psi, train.mean, networks)
    told = ", ".join(f"{name} {value:.4f}" for name, value in drawn.items())
    print(f"\ndiversity of three draws of a caption, mean over pairs: {told}")
    kept = {}
    if identity is not None:
        kept = kept_identity(test.codes[:n], w_t[:n], constants.generator, identity)
        told = ", ".join(f"{degree}: {value:.3f}" for degree, value in kept.items())
        print(f"identity kept by edits (IR-SE50 cosine to the source) at degree {told}")
    speed = timing(first[0], test, constants, words)
    print(f"run time, CLIP feature to one picture: {speed['mean']:.2f} +- {speed['deviation']:.2f} ms")
    draw_sheets(config, folder, first[0], w_t, constants, test_faces, test, methods, n)
    if settings.study:
        captions = [own[0] for own in test_faces.captions[: min(settings.study, n)]]
        # The page and its pictures say that they are synthetic: a real face of the training set is not.
        left_out = ("mean face", "own code (upper bound)", "nearest training caption")
        ranked = {name: pictures for name, pictures in methods.items() if name not in left_out}
        shown = {name: pictures(torch.arange(len(captions))) for name, pictures in ranked.items()}
        print(f"user study: {write_study(folder / 'study', captions, shown, config.seed)}")

    setting = f"N = {n}, caption number id mod count, psi {settings.psi:g}, M {config.noise_layers}"
    metrics = to_metrics(rows, test_faces.title, setting)
    print()
    headline = [m for m in metrics if m.method == stages[0].name]
    published = load_published("anyface")
    print_metrics(headline, published)
    sources = f"published.json and {settings.rows}" if held else "published.json"
    print(f"\nrows of {sources}, each under its own protocol; nothing here was measured so:")
    others = [[row[name] for name in COLUMNS] for row in (*published["rows"], *held)]
    print(format_table(list(COLUMNS), others))
    if claims:
        print()
        claims = [replace(claim, id=f"C{i}") for i, claim in enumerate(claims, start=1)]
        print_claims(claims)
    extra = {"effects": effects, "diversity": drawn["L1"], "diversity by measure": drawn}
    extra |= {"identity kept by edits": kept, "milliseconds": speed, "rows given": held}
    write_results(
        folder, claims, metrics, environment(config, time.perf_counter() - began, settings.device), extra
    )
    return folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(EvalConfig, __doc__))))
