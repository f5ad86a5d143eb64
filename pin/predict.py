"""Purify your own face images with a trained PIN, and score how attacked each of them looks.

Writes the purified images, scores.csv / scores.json, and rows.png: what was kept of the first images and what
was taken away.
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
from pin.data import landmarks_of, preprocess, read_landmarks
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
from shared.ranges import Count, Seed
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

OFFICIAL_SIZE = 112
"""Side of the images that the official networks are for."""
BATCH = 64
"""Images that are purified together."""
SHOWN = 24
"""Rows of rows.png: the sheet of a large folder would fill the memory."""


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
    k: Count | None = None
    """Eigenfaces kept in mode topk, which needs it."""
    seed: Seed = 0
    """Seed of mode sample."""
    landmarks: Path | None = None
    """Five landmarks per image, for ArcFace alignment; those of --clean too. A line names its image alone or
    with the folders above it."""
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
    if (options.mode == "topk") != (options.k is not None):
        raise UserError("--mode topk and --k belong together")
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
        sees_dae = variant_config(config, options.variant).dae
        wanted = [*["dae"] * sees_dae, f"esn-{options.variant}", *config.recognizers[:1]]
        load_weights(folder, {name: networks[name] for name in wanted})
        basis = load_basis(folder / "basis.safetensors", config.components)
        basis.check(facts["basis"], f"the checkpoint in {folder}")
        dae = networks["dae"] if sees_dae else None
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
    """Write purified images, scores.csv / scores.json and a sheet of picture rows; returns the folder.
    UserError without images."""
    device = pick_device(options.device)
    paths = [image for place in options.images for image in images_of(place, subfolders=False)]
    if not paths:
        raise UserError("--images: give image files or folders of them")
    names = names_of(paths)
    clean = [] if options.clean is None else [options.clean / path.name for path in paths]
    results = [options.output / f"{name}.png" for name in ("rows", *names)]
    keep_inputs([*paths, *clean], results, "--output")
    options.output.mkdir(parents=True, exist_ok=True)
    pin, recognizer = load_defense(options, device)
    size = round(pin.basis.size[0] ** 0.5)
    listed = read_landmarks(options.landmarks) if options.landmarks else None
    points = [landmarks_of(path, listed) if listed else None for path in paths]
    records, tiles = [], []
    for part in progress(torch.arange(len(paths)).split(BATCH), "purify"):
        indices = part.tolist()
        x = torch.stack([preprocess(paths[i], size, points[i]) for i in indices]).to(device)
        q = pin.mask(pin.probabilities(x))
        purified = pin.project(x, q)
        scores = {"distance": (purified - x).flatten(1).norm(dim=1), "kept": q.sum(1)}
        if recognizer is not None:
            both = attack_scores(recognizer, lambda _, result=purified: result, x)
            scores["cosine_distance"] = both["cosine_distance"]
        columns = {name: values.tolist() for name, values in scores.items()}
        for row, i in enumerate(indices):
            result = f"{names[i]}.png"
            numbers = {name: values[row] for name, values in columns.items()}
            records.append({"image": str(paths[i]), "purified": result, **numbers})
            write_image(options.output / result, to_unit(purified[row]), synthetic="purified by PIN")
            if i < SHOWN:
                # The face lies where it lay before the attack.
                original = preprocess(clean[i], size, points[i]).to(device) if clean else None
                tiles += picture_row(pin.basis, original, x[row], purified[row], q[row])
    write_json(options.output / "scores.json", {"mode": options.mode, "images": records})
    with open(options.output / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    width, labels = len(tiles) // min(len(records), SHOWN), UNKNOWN_ROW if options.clean is None else ROW
    sheet = image_grid(tiles, columns=width, column_labels=labels[:width], scale=max(1, 96 // size))
    write_image(options.output / "rows.png", sheet, synthetic="purified by PIN")
    return options.output


if __name__ == "__main__":
    run_main(lambda: print(predict(parse(Options, __doc__))))
