"""Purify your own face images with a trained PIN, and score how attacked each of them looks.

Writes the purified images, rows.png (what was kept and what was taken away) and scores.csv / scores.json:
`distance` is the length of what was taken away, `kept` the number of eigenfaces kept, and `cosine_distance`
how far the recogniser's feature moved. The two distances are higher for attacked images; what is normal is
learnt from clean images of the same camera.
"""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pin.basis import load_basis
from pin.data import preprocess, read_landmarks
from pin.figures import ROW, UNKNOWN_ROW, picture_row, to_unit
from pin.model import ESN, PIN, load_official
from pin.protocol import attack_scores
from pin.recognizers import Recognizer, adapt
from pin.train import Config, build_networks, variant_config
from shared.io import (
    find_run,
    image_grid,
    images_of,
    keep_inputs,
    load_config,
    load_weights,
    progress,
    write_image,
)
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

OFFICIAL_SIZE = 112
"""Side of the images that the official networks are for."""


@dataclass(frozen=True)
class Options:
    """Settings of a purification."""

    images: tuple[Path, ...]
    """Image files, or folders of them."""
    output: Path = Path("purified")
    """Folder for the results."""
    run: Path | None = None
    """Run folder; default: the newest. Ignored with the official weights."""
    variant: str = "pin"
    """Which of the run's selection networks."""
    mode: Literal["sample", "threshold", "mean", "expected", "topk"] = "threshold"
    """How probabilities become a mask. sample is the official default."""
    k: int | None = None
    """Eigenfaces kept in mode topk, which needs it."""
    seed: int = 0
    """Seed of mode sample."""
    landmarks: Path | None = None
    """Five landmarks per image, for ArcFace alignment; those of --clean too."""
    clean: Path | None = None
    """Folder with the unattacked images under the same names: the perturbation is then the true one."""
    eigenfaces: Path | None = None
    """Official lfw_eig.pth; with --dae, --encoder and --pca-layer instead of a run."""
    dae: Path | None = None
    """Official dae2_200.pth."""
    encoder: Path | None = None
    """Official encoder_*.pth."""
    pca_layer: Path | None = None
    """Official pca_layer_*.pth."""
    ais: Path | None = None
    """The follow-up's file of encoder and pca_layer, with its --eigenfaces; it has no DAE."""
    recognizer: Path | None = None
    """Official recogniser weights for the cosine distance; default: the run's own recogniser."""
    recognizer_name: Recognizer = "arcface_ir_se50"
    """Which network they belong to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def load_defense(options: Options, device: torch.device) -> tuple[PIN, torch.nn.Module | None]:
    """The defence and, where there is one, a recogniser. UserError when the parts are incomplete."""
    if (options.mode == "topk") != (options.k is not None) or (options.k is not None and options.k < 1):
        raise UserError("--mode topk and --k (at least 1) belong together")
    official = (options.eigenfaces, options.dae, options.encoder, options.pca_layer)
    recognizer = None
    if options.ais is not None:
        if options.eigenfaces is None or any(part is not None for part in official[1:]):
            raise UserError("--ais goes with --eigenfaces, and without --dae, --encoder and --pca-layer")
        dae = None
        esn = ESN(load_official("ais_encoder", options.ais), load_official("ais_pca_layer", options.ais))
        basis = load_basis(options.eigenfaces, 1500, OFFICIAL_SIZE)
    elif any(part is not None for part in official):
        if not all(part is not None for part in official):
            raise UserError(
                "official weights come as four files: --eigenfaces, --dae, --encoder and --pca-layer"
            )
        basis = load_basis(options.eigenfaces, 2500, OFFICIAL_SIZE)
        dae = load_official("dae", options.dae)
        esn = ESN(load_official("encoder", options.encoder), load_official("pca_layer", options.pca_layer))
    else:
        folder = find_run("pin", options.run)
        config = load_config(folder, Config)
        if options.variant not in config.variants:
            raise UserError(
                f"{folder}: no variant {options.variant!r}; it holds {', '.join(config.variants)}"
            )
        facts = load_weights(folder, {})["facts"]
        networks = build_networks(config, facts["classes"])
        wanted = ["dae", f"esn-{options.variant}", *config.recognizers[:1]]
        load_weights(folder, {name: networks[name] for name in wanted})
        basis = load_basis(folder / "basis.safetensors", config.components)
        basis.check(facts["basis"], f"the checkpoint in {folder}")
        dae = networks["dae"] if variant_config(config, options.variant).dae else None
        esn = networks[f"esn-{options.variant}"]
        recognizer = networks[config.recognizers[0]] if config.recognizers else None
    if options.recognizer is not None:
        recognizer = adapt(
            options.recognizer_name, load_official(options.recognizer_name, options.recognizer)
        )
    if options.k is not None and options.k > basis.size[1]:
        raise UserError(f"--k {options.k}: the basis holds {basis.size[1]} eigenfaces")
    generator = torch.Generator().manual_seed(options.seed)
    pin = PIN(basis, dae, esn, options.mode, options.k, generator=generator).eval().to(device)
    return pin, recognizer.eval().to(device) if recognizer is not None else None


def names_of(paths: list[Path]) -> list[str]:
    """A name for each image's result: its own without the ending, with it where that repeats (or is that of
    the sheet), and numbered where that repeats too."""
    short, whole = Counter(["rows", *(path.stem for path in paths)]), Counter(path.name for path in paths)
    names = []
    for number, path in enumerate(paths):
        repeated = path.name if whole[path.name] == 1 else f"{number:04d}_{path.name}"
        names.append(path.stem if short[path.stem] == 1 else repeated)
    return names


@torch.no_grad()
def predict(options: Options) -> Path:
    """Write purified images, a picture row for each, and scores.csv / scores.json; returns the folder."""
    device = pick_device(options.device)
    pin, recognizer = load_defense(options, device)
    size = round(pin.basis.size[0] ** 0.5)
    points = read_landmarks(options.landmarks) if options.landmarks else {}
    records, tiles = [], []
    paths = [image for place in options.images for image in images_of(place, subfolders=False)]
    names = names_of(paths)
    clean = [] if options.clean is None else [options.clean / path.name for path in paths]
    results = [options.output / f"{name}.png" for name in ("rows", *names)]
    keep_inputs([*paths, *clean], results, "--output")
    for path, name in zip(progress(paths, "purify"), names, strict=True):
        if options.landmarks and path.name not in points:
            raise UserError(f"{options.landmarks}: no line for {path.name}")
        x = preprocess(path, size, points.get(path.name))[None].to(device)
        q = pin.mask(pin.probabilities(x))
        purified = pin.project(x, q)
        scores = {"distance": (purified - x).norm().item(), "kept": q.sum().item()}
        if recognizer is not None:
            both = attack_scores(recognizer, lambda _, result=purified: result, x)
            scores["cosine_distance"] = both["cosine_distance"].item()
        records.append({"image": str(path), "purified": f"{name}.png", **scores})
        write_image(options.output / f"{name}.png", to_unit(purified[0]), synthetic="purified by PIN")
        original = None
        if options.clean is not None:
            # The face lies where it lay before the attack.
            original = preprocess(options.clean / path.name, size, points.get(path.name)).to(device)
        tiles += picture_row(pin.basis, original, x[0], purified[0], q[0])
    columns, labels = len(tiles) // len(records), UNKNOWN_ROW if options.clean is None else ROW
    sheet = image_grid(tiles, columns=columns, column_labels=labels[:columns], scale=max(1, 96 // size))
    write_image(options.output / "rows.png", sheet, synthetic="purified by PIN")
    write_json(options.output / "scores.json", {"mode": options.mode, "images": records})
    with open(options.output / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    return options.output


if __name__ == "__main__":
    run_main(lambda: print(predict(parse(Options, __doc__))))
