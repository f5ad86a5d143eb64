"""From a folder of photos or videos to a data set that train.py reads: crops, landmark pictures, masks,
parsings.

    python prepare.py photos/ --out data/mine --detector face_detection_yunet.onnx --landmarker wing.ckpt
    --parser 79999_iter.pth

Writes NAME/, NAME_lm_images/, NAME_mask_images/ and NAME_parsing_images/ as the official loaders expect them
(landmark pictures in light colours, white faces in masks, a parsing's grey value is its label), and index.csv
with where each crop was cut. Of videos it takes frames, called raw_<video>_<k> as FaceForensics++'s; with
--pairs it also writes the list of swaps for eval.py --faceforensics. Without a detector, landmarker or parser
of your own, the small built-in finder is used, which was trained on procedural faces: check its pictures
before you train on them.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from faceswapper.align import Framing, crop_matrix, crop_side, cut, to_tensor
from faceswapper.detect import open_detector, open_landmarker, open_parser
from faceswapper.drawing import draw_landmarks, face_mask, to_file
from faceswapper.photo import Photo, read_photo
from faceswapper.pipeline import profile
from faceswapper.video import sampled
from shared.io import IMAGE_ENDINGS, VIDEO_ENDINGS, find_images, images_of, progress, write_image
from shared.ranges import Count, Natural, Part, Share
from shared.records import read_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class PrepareConfig:
    """Photos in, training pictures out."""

    photos: Annotated[Path, tyro.conf.Positional]
    """Folder of photos or videos, searched with its subfolders, or one of them."""
    out: Path = Path("data/prepared")
    """Folder for the data set."""
    name: str = "images"
    """Name of the folder of crops; its sisters' names are made from it."""
    size: Count = 256
    """Side of a crop in pixels."""
    faces: Literal["largest", "all"] = "largest"
    """Of each photo."""
    least: Natural = 64
    """Faces whose crop has a smaller side than this in the photo, in pixels, are left out."""
    frames: Count = 10
    """Frames taken of each video, evenly spaced."""
    pairs: tuple[Path, ...] = ()
    """FaceForensics++'s splits/train.json, val.json and test.json: writes face_swap_list.txt, the k-th frame
    of each video of a pair onto the k-th of the other."""
    detector: str = "finder"
    """finder (built in), mtcnn, crops (the photos are aligned crops already), .csv with given boxes or eyes,
    or .onnx for YuNet."""
    landmarker: Path | None = None
    """wing.ckpt or faceswapper.ckpt; default: the built-in finder."""
    parser: Path | None = None
    """79999_iter.pth of the public face parser; default: the built-in finder."""
    eyes: tuple[Part, Share] = (Framing.eye_distance, Framing.eye_row)
    """Distance of the eyes in a crop, and their row, relative to its side."""
    batch_size: Count = 16
    """Crops at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


COLUMNS = ("file", "photo", "side", "profile", "a", "b", "c", "d", "e", "f")
"""Of index.csv; a to f is the matrix from photo to crop, row by row."""


class Sisters:
    """The four folders and the index."""

    def __init__(self, config: PrepareConfig):
        device = pick_device(config.device)
        self.config, self.device = config, device
        self.landmarker = open_landmarker(config.landmarker, device)
        self.parser = open_parser(config.parser, device)
        names = ("", "_lm_images", "_mask_images", "_parsing_images")
        self.folders = [config.out / f"{config.name}{name}" for name in names]
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)  # now, so that a wrong path is said before the work
        self.rows: list[tuple] = []
        self.waiting: list[tuple] = []

    def add(self, stem: str, photo: Path, pixels, matrix) -> None:
        """Queue a crop; a full batch is written."""
        crop = cut(pixels, matrix, self.config.size)
        self.waiting.append((stem, photo, crop, matrix))
        if len(self.waiting) == self.config.batch_size:
            self.flush()

    @torch.inference_mode()
    def flush(self) -> None:
        """Write what is queued."""
        if not self.waiting:
            return
        crops = to_tensor([crop for _, _, crop, _ in self.waiting], self.device)
        points, labels = self.landmarker(crops), self.parser(crops)
        drawn = to_file(draw_landmarks(points, self.config.size))
        white = face_mask(labels).float()[:, None]
        turned = profile(points).tolist()
        for n, (stem, photo, _, matrix) in enumerate(self.waiting):
            parsing = labels[n : n + 1].float() / 255
            for folder, picture in zip(self.folders, (crops[n], drawn[n], white[n], parsing), strict=True):
                write_image(folder / f"{stem}.png", picture)
            side = crop_side(matrix, self.config.size)
            numbers = [f"{v:.6f}" for v in matrix.flatten()]
            self.rows.append((f"{stem}.png", str(photo), f"{side:.0f}", int(turned[n]), *numbers))
        self.waiting = []


def inputs(place: Path) -> list[Path]:
    """The photos and videos of a folder, or the one that is named. UserError when there is none."""
    found = find_images(place, endings=(*IMAGE_ENDINGS, *VIDEO_ENDINGS)) if place.is_dir() else []
    return found or images_of(place)


def pictures_of(path: Path, frames: int) -> Iterator[tuple[str, str, Photo]]:
    """The photo, or the frames of the video: for messages, its name, and the picture."""
    if path.suffix.lower() not in VIDEO_ENDINGS:
        yield str(path), path.stem, read_photo(path)
        return
    for k, frame in enumerate(sampled(path, frames)):
        yield f"{path}, frame {k} of {frames}", f"raw_{path.stem}_{k}", Photo(path.name, frame)


def write_swap_list(config: PrepareConfig, pairs: list[tuple[str, str]], made: set[str]) -> list[str]:
    """face_swap_list.txt, both ways for every pair. Returns the swaps that lack a crop, for messages."""
    lines, lacking = [], []
    for one, other in pairs:
        for source, target in ((one, other), (other, one)):
            for k in range(config.frames):
                names = f"raw_{source}_{k}", f"raw_{target}_{k}"
                line = " ".join(f"{name}.png" for name in names)
                (lines if made.issuperset(names) else lacking).append(line)
    (config.out / "face_swap_list.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} swaps in {config.out / 'face_swap_list.txt'}")
    return lacking


def _pairs(content: list[list[str]]) -> list[tuple[str, str]]:
    return [(str(one), str(other)) for one, other in content]


def prepare(config: PrepareConfig) -> Path:
    """Cut and describe every face; returns the folder of the data set. UserError when no photo shows one."""
    pairs = [pair for path in config.pairs for pair in read_json(path, "pairs of videos", _pairs)]
    photos = inputs(config.photos)  # before the folders are made
    detector, sisters = open_detector(config.detector, pick_device(config.device)), Sisters(config)
    framing, used, left_out = Framing(*config.eyes), set(), []
    numbers: Counter[str] = Counter()  # VGGFace2 has thousands of pictures of one name
    for path in progress(photos, "photos"):
        below = path.relative_to(config.photos).as_posix() if config.photos.is_dir() else path.name
        for said, name, photo in pictures_of(path, config.frames):
            faces = detector([photo.seen], [below])[0]
            if not faces:
                left_out.append(f"{said}: no face")
            if config.faces == "largest" and faces:
                faces = [max(faces, key=lambda face: face.size)]
            for face in sorted(faces, key=lambda face: face.box[0]):
                matrix = crop_matrix(face, config.size, framing)
                side = crop_side(matrix, config.size)
                if side < config.least:
                    left_out.append(f"{said}: a face of {side:.0f} pixels with its surroundings")
                    continue
                stem = name
                while stem in used:  # the same name in two subfolders, or a second face
                    numbers[name] += 1
                    stem = f"{name}_{numbers[name] + 1}"
                used.add(stem)
                sisters.add(stem, path, photo.seen, matrix)
    sisters.flush()
    if pairs:
        left_out += [f"the swap {line}: a crop is missing" for line in write_swap_list(config, pairs, used)]
    for line in left_out:
        print(f"left out: {line}")
    if not sisters.rows:
        raise UserError(f"{config.photos}: no face was found; give their places with --detector FILE.csv")
    with open(config.out / "index.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *sisters.rows])
    print(f"{len(sisters.rows)} crops in {sisters.folders[0]}, {len(left_out)} left out")
    print(f"train on them: python train.py paper --data folder --data-root {sisters.folders[0]} ...")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(prepare(parse(PrepareConfig, __doc__))))
