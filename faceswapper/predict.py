"""Swap a face into a photo, a folder of photos or a video, with a trained run or the released weights.

    python predict.py --source face.jpg --target photo.jpg
    python predict.py --source a.jpg b.jpg --mix 0.7 0.3 --target video.mp4 --weights faceswapper.ckpt

The result is a manipulated face, for research on forgery detection, anonymisation of one's own data and film
with the consent of everyone shown. Every swap that is written says in its metadata that it is synthetic.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper.align import DEMO_FRAMING, Framing, to_tensor
from faceswapper.detect import open_detector, open_landmarker, open_parser
from faceswapper.model import Generator, load_official
from faceswapper.photo import Photo, read_photo
from faceswapper.pipeline import Blending, Source, Swapped, Swapper, counted
from faceswapper.train import Config as TrainConfig
from faceswapper.trials import Trial, load_generators, main_name, plan
from faceswapper.video import VideoReader, VideoWriter
from faceswapper.weights import states_of
from shared.io import VIDEO_ENDINGS, find_run, image_grid, images_of, load_config, progress, write_image
from shared.ranges import Count, Natural, Part, Share, Weight
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class Networks:
    """Which networks do the work."""

    run: Path | None = None
    """Run folder of train.py; default: the newest."""
    variant: str | None = None
    """Which of the run's generators; default: the method itself."""
    weights: Path | None = None
    """Instead of a run: the released faceswapper.ckpt."""
    detector: str = "finder"
    """finder (built in), mtcnn, crops (the pictures are aligned crops already), or a file: .csv with given
    boxes or eyes, .onnx for YuNet."""
    landmarker: Path | None = None
    """wing.ckpt; default: the one inside --weights, otherwise the built-in finder."""
    parser: Path | None = None
    """79999_iter.pth of the public face parser; default: the built-in finder."""
    eyes: tuple[Part, Share] | None = None
    """Distance of the eyes in a crop, and their row, relative to its side; default: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@dataclass(frozen=True)
class PredictConfig:
    """Whose face goes where."""

    source: tuple[Path, ...]
    """Photo of the person whose face is put in; several are averaged."""
    target: Path
    """Photo, folder of photos, or video."""
    out: Path = Path("swapped")
    """Folder for the results."""
    mix: tuple[Weight, ...] | None = None
    """Weights of several sources; default: all alike."""
    strength: Share = 1.0
    """0 keeps the target's identity, 1 is a whole swap, between mixes both."""
    face: Literal["largest", "surest"] | int = "largest"
    """Which face of the target: the largest, the surest, or its number from the left, from 0."""
    source_face: Literal["largest", "surest"] | int = "largest"
    """Which face of the sources."""
    strip: Natural = 5
    """Swaps between target and source in the progressive strip of a photo; 0: none."""
    levels: bool = False
    """Also the swap of a photo from coarse to fine, by the decoder's side heads; for runs that trained them
    (--weights.side)."""
    batch_size: Count = 16
    """Photos or frames at a time."""
    smooth: bool = True
    """Video: steady the crop over time."""
    least: Natural = 48
    """Faces whose crop has a smaller side than this, in pixels, are left alone."""
    blending: Blending = field(default_factory=Blending)
    """How a swap goes back into its photo."""
    networks: Annotated[Networks, tyro.conf.arg(name="")] = field(default_factory=Networks)
    """Which networks do the work."""


def open_swapper(config: Networks, blending: Blending, least: int) -> Swapper:
    """Generator and everything around it. UserError when a file is missing or does not fit."""
    device, values, framing, restrict = pick_device(config.device), "unit", Framing(), None
    landmarker = config.landmarker
    generator: Generator | nn.Module
    if config.weights is not None:
        generator = load_official("generator", config.weights)
        if landmarker is None and "fan" in states_of(config.weights):
            landmarker = config.weights
    else:
        generator, trial, settings = of_run(find_run("faceswapper", config.run), config.variant)
        if settings.data == "simple":
            raise UserError(
                "the run was trained on flat ellipses, it swaps no photographs: give --run or --weights"
            )
        values, restrict = settings.landmark_values, trial.restrict
        framing = DEMO_FRAMING if settings.data == "faces" else framing
    return Swapper(
        generator.to(device),
        open_detector(config.detector, device),
        open_landmarker(landmarker, device),
        open_parser(config.parser, device),
        framing if config.eyes is None else Framing(*config.eyes),
        blending,
        values,
        least,
        restrict,
    )


def trained_side(config: Networks) -> bool:
    """Whether the generator's side heads have learned."""
    if config.weights is not None:
        return False
    return load_config(find_run("faceswapper", config.run), TrainConfig).weights.side > 0


def of_run(folder: Path, variant: str | None) -> tuple[Generator, Trial, TrainConfig]:
    """A run's generator, what it was trained as, and the run's settings."""
    name = variant or main_name(load_config(folder, TrainConfig))
    generators, _, settings = load_generators(folder, TrainConfig, [name])
    return generators[name], next(trial for trial in plan(settings) if trial.name == name), settings


def write_photo(path: Path, photo: Photo, result: Swapped, made: str | None) -> None:
    """The result as PNG, with the target's transparency. made: how, for the metadata; None for a copy."""
    picture = to_tensor([result.photo])[0]
    if photo.alpha is not None:
        picture = torch.cat((picture, torch.from_numpy(photo.alpha)[None].float() / 255))
    write_image(path, picture, made)


def write_strip(
    swapper: Swapper, photo: Photo, result: Swapped, source: Source, steps: int, stem: Path, made: str
) -> None:
    """From the target over its own and the source's identity to the source, as a strip, and up to the whole
    swap as an animation that runs there and back; grey where the photo is."""
    crop, _ = swapper.aligned(photo.seen, result.face)
    target = swapper.describe(to_tensor([crop], swapper.device))
    swaps = swapper.progressive(target, source, steps)
    pictures = torch.cat((target.picture / 2 + 0.5, swaps, source.picture / 2 + 0.5))
    pictures = without_colour(pictures) if photo.grey else pictures
    labels = ["target", *(f"{share:.2f}" for share in np.linspace(0, 1, steps)), "source"]
    scale = max(1, 128 // pictures.shape[-1])
    strip = image_grid(pictures, columns=len(pictures), column_labels=labels, scale=scale)
    write_image(stem.with_name(f"{stem.name}_strip.png"), strip, made)
    shown = pictures[:-1].clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    frames = [Image.fromarray(np.uint8(p * 255 + 0.5)) for p in shown]
    there_and_back = frames + frames[-2:0:-1]
    there_and_back[0].save(
        stem.with_name(f"{stem.name}_strip.gif"),
        save_all=True,
        append_images=there_and_back[1:],
        duration=150,
        loop=0,
        comment=f"synthetic image: {made}".encode(),
    )


def without_colour(pictures: Tensor) -> Tensor:
    """(B, 3, S, S) -> the same with the luminance (ITU-R BT.601) in all channels."""
    weights = pictures.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
    return (pictures * weights).sum(1, keepdim=True).expand_as(pictures)


def write_levels(
    swapper: Swapper, photo: Photo, result: Swapped, source: Source, stem: Path, made: str
) -> None:
    """The swap at the decoder's resolutions, from coarse to fine, as a strip; grey where the photo is."""
    crop, _ = swapper.aligned(photo.seen, result.face)
    pictures = swapper.levels(swapper.describe(to_tensor([crop], swapper.device)), source)
    labels = [*(f"{picture.shape[-1]} px" for picture in pictures[:-1]), "swap"]
    side = max(128, swapper.size)
    large = torch.cat([F.interpolate(picture[None], (side, side), mode="nearest") for picture in pictures])
    large = without_colour(large) if photo.grey else large
    strip = image_grid(large, columns=len(large), column_labels=labels)
    write_image(stem.with_name(f"{stem.name}_levels.png"), strip, made)


def result_names(paths: Sequence[Path]) -> dict[str, str]:
    """File name of a target -> how its results call it: without the ending, with it where two files differ
    in nothing else."""
    stems = Counter(path.stem for path in paths)
    return {path.name: path.stem if stems[path.stem] == 1 else path.name for path in paths}


def swap_photos(config: PredictConfig, swapper: Swapper, source: Source, made: str) -> dict:
    """All photos of a folder, or one; returns a record for each. In a folder, photos without a usable face
    are copied as they are and said so."""
    folder = config.target.is_dir()
    paths = images_of(config.target, subfolders=False)
    records, names = {}, result_names(paths)
    for start in progress(range(0, len(paths), config.batch_size), "photos"):
        photos = [read_photo(path) for path in paths[start : start + config.batch_size]]
        found = swapper.detector([photo.seen for photo in photos], [photo.name for photo in photos])
        faces = []
        for each in found:
            numbered = isinstance(config.face, int) and config.face >= len(each)
            faces.append(None if folder and numbered else swapper.choose(each, config.face))
        for photo, faces_in, result in zip(
            photos, found, swapper.photos(photos, faces, source, config.strength), strict=True
        ):
            if result.face is None and not folder:
                raise UserError(f"{photo.name}: the target {result.remark}")
            if isinstance(config.face, int) and 0 < len(faces_in) <= config.face:
                said = f"shows no face number {config.face}: {counted(len(faces_in))}"
                result = result._replace(remark=said)
            stem = config.out / f"{config.source[0].stem}_FS_{names[photo.name]}"
            write_photo(stem.with_name(f"{stem.name}.png"), photo, result, made if result.face else None)
            if result.face is not None and config.strip > 1:
                write_strip(swapper, photo, result, source, config.strip, stem, made)
            if result.face is not None and config.levels:
                write_levels(swapper, photo, result, source, stem, made)
            records[photo.name] = {
                "faces": len(faces_in),
                "box": None if result.face is None else [round(v, 1) for v in result.face.box],
                "remark": result.remark,
            }
    if all(record["box"] is None for record in records.values()):
        raise UserError(f"{config.target}: no photo shows a usable face")
    return records


def swap_video(config: PredictConfig, swapper: Swapper, source: Source, made: str) -> dict:
    """A video with its sound. UserError when no frame shows a usable face."""
    reader = VideoReader(config.target)
    path = config.out / f"{config.source[0].stem}_FS_{config.target.stem}.mp4"
    swapped, remarks = 0, {}
    results = swapper.video(reader, source, config.face, config.batch_size, config.strength, config.smooth)
    with VideoWriter(path, reader.size, reader.rate, made, config.target) as writer:
        for result in progress(results, config.target.name, reader.announced or None):
            writer.write(result.photo)
            swapped += result.face is not None
            if result.remark:
                remarks[result.remark] = remarks.get(result.remark, 0) + 1
        if not swapped:
            raise UserError(f"{config.target}: no frame shows a usable face ({'; '.join(remarks)})")
    said = [f"{count} frames: {remark}" for remark, count in remarks.items()] + reader.remarks
    return {
        config.target.name: {"frames": reader.count, "swapped": swapped, "remark": "; ".join(said) or None}
    }


def predict(config: PredictConfig) -> Path:
    """Swap; returns the folder of the results."""
    if not config.target.exists():
        raise UserError(f"{config.target}: no such photo, folder or video")
    if config.levels and not trained_side(config.networks):
        raise UserError(
            "--levels: the side heads of this generator were not trained; a run with --weights.side 1 "
            "trains them, the released weights do not have them trained"
        )
    config.out.mkdir(parents=True, exist_ok=True)  # before the work, so that a wrong path is said at once
    swapper = open_swapper(config.networks, config.blending, config.least)
    source = swapper.source([read_photo(path) for path in config.source], config.source_face, config.mix)
    made = "face swapped by FaceSwapper"
    video = config.target.suffix.lower() in VIDEO_ENDINGS
    records = (swap_video if video else swap_photos)(config, swapper, source, made)
    for name, record in records.items():
        if record["remark"]:
            print(f"warning: {name}: {record['remark']}")
    settings = {
        "source": [str(path) for path in config.source],
        "mix": config.mix,
        "strength": config.strength,
    }
    write_json(config.out / "result.json", {**settings, "results": records, "synthetic": True})
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(predict(parse(PredictConfig, __doc__))))
