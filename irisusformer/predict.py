"""Segment the user's own eye images: mask, uncertainty, boundary ellipses, rubber sheet, quality.

    python predict.py --input eye.jpg --output found/
    python predict.py --input images/ --output found/ --run RUN
    python predict.py --input eye.mp4 --output found/

Per image: NAME_mask.png, NAME_overlay.png (mask, ellipses, contour of the high-uncertainty region),
NAME_uncertainty.png (heat map over the image), NAME_polar.png, NAME_polar_mask.png and
NAME_polar_reliability.png (64x512) and NAME.json; for a video NAME.json with one record a frame, and
NAME_overlay.mp4 (with --frame-maps also the pictures of every frame, below NAME/). summary.csv has a line per
image or frame: `score` is 1 less the mean uncertainty inside the mask, `usable` the share of the iris ring
that the mask leaves.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from irisusformer.data import Side, enlarged, shrunk
from irisusformer.datasets import read_eye
from irisusformer.geometry import Ellipse, fit_boundaries, quality, rubber_sheet
from irisusformer.model import IrisUsformer, fold_batch_norm
from irisusformer.pictures import BLUE, GREEN, RED, heat, outlined, tint, with_ellipse
from irisusformer.train import PAPER, Config, build, variants, working_side
from shared.io import (
    VIDEO_ENDINGS,
    find_images,
    find_run,
    images_of,
    keep_inputs,
    load_config,
    load_safetensors,
    load_weights,
    progress,
    to_pil,
    write_image,
)
from shared.ranges import Count, Share
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

SUMMARY = ("name", "score", "usable", "mean_uncertainty", "iris_pixels")
PICTURES = ("mask", "overlay", "uncertainty", "polar", "polar_mask", "polar_reliability")
FRAMES = 8  # of a video, segmented in one pass


@dataclass(frozen=True)
class PredictConfig:
    """What to segment, and with which network."""

    input: Path
    """An image, a folder of images, or a video."""
    output: Path
    """Folder to write to."""
    run: Path | None = None
    """Run folder to take the network from; default: the newest."""
    network: str | None = None
    """Which of the run's networks; default: the first."""
    weights: Path | None = None
    """Other weights of the same architecture, .safetensors."""
    tau: Share | None = None
    """Uncertainty above this is the high region; default: the one found in training."""
    short_side: Side | None = None
    """Images whose shorter side is longer are shrunk to this for the network, and its maps enlarged again.
    Default: the size the run was trained at where it learned from procedural eyes, otherwise its own
    --short-side."""
    every: Count = 1
    """Take every n-th frame of a video."""
    frame_maps: bool = False
    """Also write the pictures of each frame taken of a video, as of an image, to OUTPUT/NAME/NUMBER_*.png."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def load_network(run: Path | None, network: str | None, weights: Path | None) -> tuple[IrisUsformer, Config]:
    """A run's network for inference, BatchNorm folded, and the run's settings.

    Raises UserError when the run has no network of that name.
    """
    folder = find_run(PAPER, run)
    config = load_config(folder, Config)
    named = variants(config)
    name = network or next(iter(named))
    if name not in named:
        raise UserError(f"--network {name}: {folder} holds {', '.join(named)}")
    model = build(named[name])
    if weights is None:
        load_weights(folder, {name: model})
    else:
        load_safetensors(weights, model)
    return fold_batch_norm(model), config


Maps = dict[str, Tensor]


def segment(model: IrisUsformer, image: Tensor, tau: float | None = None, short_side: int = 960) -> Maps:
    """Maps of one image (3, H, W) in [0, 1]: `prob`, `uncertainty` (H, W), `mask`, `high_region` bool, and
    `pupil`, `outer` where the network has boundary heads; computed at a shorter side of
    at most `short_side` pixels."""
    return segment_all(model, image[None], tau, short_side)[0]


def segment_all(model: IrisUsformer, images: Tensor, tau: float | None, short_side: int) -> list[Maps]:
    """The maps of `segment` for each of several images (B, 3, H, W), in one pass."""
    found = model.predict(shrunk(images.to(model.tau.device), short_side), tau)
    maps = {name: enlarged(value, images.shape[-2:])[:, 0].cpu() for name, value in found.items()}
    maps["mask"] = maps["prob"] >= 0.5
    for name in ("high_region", "pupil", "outer"):
        if name in maps:
            maps[name] = maps[name] >= 0.5
    return [{name: value[i] for name, value in maps.items()} for i in range(len(images))]


Ellipses = tuple[Ellipse | None, Ellipse | None]
Sheet = dict[str, np.ndarray]


def measure(image: Tensor, maps: Maps) -> tuple[dict[str, Any], Sheet | None, Ellipses]:
    """Geometry and quality of one image: a JSON record, the rubber sheet when both boundaries were found,
    and the ellipses of pupil and limbus."""
    mask, uncertainty = maps["mask"].numpy(), maps["uncertainty"].numpy()
    # ellipses need no more than about 640 pixels
    shrink = min(1.0, 640 / max(mask.shape))
    regions = [mask, *(maps[name].numpy() for name in ("pupil", "outer") if name in maps)]
    if shrink < 1:
        size = (round(mask.shape[1] * shrink), round(mask.shape[0] * shrink))
        regions = [
            cv2.resize(region.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
            for region in regions
        ]
    pupil, limbus = (None if e is None else e.scaled(1 / shrink) for e in fit_boundaries(*regions))
    sheet = None
    if pupil is not None and limbus is not None:
        sheet = rubber_sheet(image.permute(1, 2, 0).numpy(), mask, uncertainty, pupil, limbus)
    record = {
        "width": mask.shape[1],
        "height": mask.shape[0],
        "iris_pixels": int(mask.sum()),
        "mean_uncertainty": float(uncertainty.mean()),
        "high_share": float(maps["high_region"].float().mean()),
        "quality": quality(mask, uncertainty, sheet and sheet["mask"]),
        "pupil": pupil and asdict(pupil),
        "limbus": limbus and asdict(limbus),
    }
    return record, sheet, (pupil, limbus)


def overlay(image: Tensor, maps: Maps, ellipses: Ellipses) -> Tensor:
    """Image (3, H, W) with mask, contour of the high-uncertainty region and ellipses drawn in."""
    picture = tint(image, maps["mask"], GREEN, 0.3)
    picture = outlined(picture, maps["high_region"], RED)
    for ellipse in ellipses:
        picture = with_ellipse(picture, ellipse, BLUE)
    return picture


def write_maps(
    folder: Path, name: str, image: Tensor, maps: Maps, sheet: Sheet | None, ellipses: Ellipses
) -> None:
    """Write the pictures of one image that the module's description lists."""
    write_image(folder / f"{name}_mask.png", maps["mask"][None].float())
    write_image(folder / f"{name}_overlay.png", overlay(image, maps, ellipses))
    warm = heat(maps["uncertainty"])
    write_image(folder / f"{name}_uncertainty.png", 0.5 * image + 0.5 * warm)
    if sheet is not None:
        write_image(folder / f"{name}_polar.png", torch.from_numpy(sheet["image"]).permute(2, 0, 1))
        for part in ("mask", "reliability"):
            write_image(
                folder / f"{name}_polar_{part}.png", torch.from_numpy(sheet[part].astype(np.float32))[None]
            )


def frames(path: Path, every: int) -> tuple[float, Iterator[Tensor]]:
    """Rate (1/s) and frames (3, H, W) of a video. UserError when it cannot be decoded, a warning on stderr
    when it ends before its header says."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # its complaints go past Python to stderr
    video = cv2.VideoCapture(str(path))
    first, frame = video.read()
    if not first:
        raise UserError(f"{path}: no frame could be decoded; convert it to H.264 .mp4")

    def read() -> Iterator[Tensor]:
        number, more, current = 0, True, frame
        while more:
            if number % every == 0:
                yield torch.from_numpy(current[:, :, ::-1].copy()).permute(2, 0, 1).float() / 255
            more, current = video.read()
            number += 1
        announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if number < 0.98 * announced - 2:  # containers estimate their length
            print(f"warning: {path}: ends early, {number} of {announced} frames", file=sys.stderr)

    return video.get(cv2.CAP_PROP_FPS) or 25.0, read()


def segmented(
    model: IrisUsformer, images: Iterator[Tensor], tau: float | None, short_side: int
) -> Iterator[tuple[Tensor, Maps]]:
    """Every image of a video with its maps, FRAMES in a pass."""
    while batch := list(islice(images, FRAMES)):
        yield from zip(batch, segment_all(model, torch.stack(batch), tau, short_side), strict=True)


def summary_row(name: str, record: dict[str, Any]) -> list:
    """A line of summary.csv, in the order of SUMMARY."""
    q = record["quality"]
    return [name, q["score"], q["usable"], record["mean_uncertainty"], record["iris_pixels"]]


def predict_video(model: IrisUsformer, config: PredictConfig, short_side: int) -> list[list]:
    """Write maps and record of every n-th frame; returns the lines of summary.csv."""
    records, rows, writer = [], [], None
    path, name = config.input, config.input.stem
    rate, images = frames(path, config.every)
    for number, (image, maps) in enumerate(progress(segmented(model, images, config.tau, short_side), name)):
        record, sheet, ellipses = measure(image, maps)
        if config.frame_maps:
            write_maps(config.output / name, f"{number * config.every:06d}", image, maps, sheet, ellipses)
        records.append({"frame": number * config.every, **record})
        rows.append(summary_row(f"{name}#{number * config.every}", record))
        picture = np.asarray(to_pil(overlay(image, maps, ellipses)))[:, :, ::-1]
        if writer is None:
            target, code = str(config.output / f"{name}_overlay.mp4"), cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(target, code, rate / config.every, picture.shape[1::-1])
            if not writer.isOpened():
                raise UserError(f"{target}: OpenCV cannot write a video there")
        writer.write(picture)
    writer.release()
    write_json(config.output / f"{name}.json", records)
    return rows


def predict_images(model: IrisUsformer, config: PredictConfig, short_side: int) -> list[list]:
    """Write maps and record of every image; returns the lines of summary.csv. UserError without images, and
    where a result would replace one of them or another result."""
    source = config.input
    paths = images_of(source)
    films = find_images(source, endings=VIDEO_ENDINGS) if source.is_dir() else []
    if films:
        print(
            f"warning: {source}: not segmented, give each as --input: {', '.join(map(str, films))}",
            file=sys.stderr,
        )
    base = source.parent if source.is_file() else source
    named: dict[str, Path] = {}
    made_of: dict[Path, Path] = {}
    for path in paths:
        name = "_".join(path.relative_to(base).with_suffix("").parts)
        if name in named:
            name = "_".join(path.relative_to(base).parts)  # same stem, another ending
        for result in (f"{name}.json", *(f"{name}_{part}.png" for part in PICTURES)):
            other = made_of.setdefault(config.output / result, path)
            if other != path:
                raise UserError(f"{other} and {path} would both be written to {result}: rename one of them")
        named[name] = path
    keep_inputs(paths, made_of, "--output")
    rows = []
    for name, path in progress(named.items(), "segmenting"):
        image = read_eye(path)
        maps = segment(model, image, config.tau, short_side)
        record, sheet, ellipses = measure(image, maps)
        write_maps(config.output, name, image, maps, sheet, ellipses)
        write_json(config.output / f"{name}.json", {"file": str(path), **record})
        rows.append(summary_row(name, record))
    return rows


def main() -> None:
    config = parse(PredictConfig, __doc__)
    if not config.input.exists():
        raise UserError(f"--input {config.input}: no such file or folder")
    model, trained = load_network(config.run, config.network, config.weights)
    short_side = config.short_side or working_side(trained)
    model.to(pick_device(config.device), memory_format=torch.channels_last)
    config.output.mkdir(parents=True, exist_ok=True)
    video = config.input.suffix.lower() in VIDEO_ENDINGS
    rows = predict_video(model, config, short_side) if video else predict_images(model, config, short_side)
    with open(config.output / "summary.csv", "w", newline="") as file:
        csv.writer(file).writerows([SUMMARY, *rows])
    print(
        f"{len(rows)} {'frames' if video else 'images'}, mean quality {np.mean([row[1] for row in rows]):.3f}"
    )
    print(config.output)


if __name__ == "__main__":
    run_main(main)
