"""Public face sets in their public layouts: CelebA-HQ with CelebAMask-HQ's labels, FFHQ, plain folders and
lists."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mdrnets.masks import list_images
from mdrnets.parser import GROUPS, group_of_label
from shared.faces import BISENET_CLASSES, CLASSES
from shared.io import read_image, read_utf8
from shared.runtime import UserError

CELEBA_LAYOUT = """expected under --data-root:
  CelebA-HQ-img/0.jpg ... 29999.jpg
  CelebAMask-HQ-mask-anno/0..14/00000_skin.png ...   (optional: labels)
  CelebA-HQ-to-CelebA-mapping.txt                    (only for --split celeba)
Get it from the CelebAMask-HQ project page (github.com/switchablenorms/CelebAMask-HQ; non-commercial
research)."""
FFHQ_LAYOUT = """expected under --data-root: images1024x1024/00000/00000.png ..., or thumbnails128x128/..., or
the pictures directly. Get it from github.com/NVlabs/ffhq-dataset (CC BY-NC-SA 4.0; pictures under their own
licences)."""
CELEBA_TRAIN, CELEBA_VALID = 162_770, 182_637
"""CelebA's official partition: pictures 1 to 162770 train, to 182637 validation, the rest test (recalled)."""
PARTS_PER_FOLDER = 2000

log = logging.getLogger(__name__)

Part = Literal["train", "test"]
Split = Literal["index", "celeba"]


def resize(image: Tensor, size: int) -> Tensor:
    """(C, H, W) -> (C, size, size), bilinear with antialiasing, no crop: the sets are aligned."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    shape = (size, size)
    return F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0].clamp(
        0, 1
    )


class FacePictures:
    """Picture files resized to a square. annotations: CelebAMask-HQ's label folder; without it parts are
    -1."""

    parts = tuple(GROUPS)

    def __init__(self, files: Sequence[Path], size: int, name: str, annotations: Path | None = None):
        self.files, self.size, self.name, self.annotations = list(files), size, name, annotations

    @property
    def labelled(self) -> bool:
        return self.annotations is not None

    def __len__(self) -> int:
        return len(self.files)

    def label(self, i: int) -> str:
        return self.files[i].name

    def stamp(self, i: int) -> tuple[str, int, int, int]:
        """What changes when the picture does: the file's place, size in bytes and time of change [ns]; and
        the side that it is resized to."""
        path = self.files[i].resolve()
        about = path.stat()
        return str(path), about.st_size, about.st_mtime_ns, self.size

    def load(self, i: int, labels: bool = True) -> tuple[Tensor, Tensor]:
        image = resize(read_image(self.files[i]), self.size)
        if self.annotations is None or not labels:
            return image, torch.full((self.size, self.size), -1)
        labels = read_annotation(self.annotations, int(self.files[i].stem))
        parts = group_of_label()[labels][None, None].float()
        return image, F.interpolate(parts, (self.size, self.size), mode="nearest-exact")[0, 0].long()


def read_annotation(folder: Path, number: int) -> Tensor:
    """CelebAMask-HQ's part files of one picture -> labels of the 19-class parser, (512, 512) int64.

    A part is there when its file is; any value above 0 belongs to it. Later parts in CelebAMask-HQ's own
    order cover earlier ones. UserError when the picture has no part file at all.
    """
    place = folder / str(number // PARTS_PER_FOLDER)
    labels = None
    for name in CLASSES[1:]:
        path = place / f"{number:05d}_{name}.png"
        if path.is_file():
            part = read_image(path, "L")[0] > 0
            labels = torch.zeros(part.shape, dtype=torch.long) if labels is None else labels
            labels[part] = BISENET_CLASSES.index(name)
    if labels is None:
        raise UserError(f"{place}: no part files {number:05d}_*.png; {CELEBA_LAYOUT}")
    return labels


def celeba_hq(root: Path, size: int, part: Part, split: Split = "index") -> FacePictures:
    """CelebA-HQ as CelebAMask-HQ ships it; labels are used when they are there.

    split "index": the last 2,000 of 30,000 pictures are the test set (for a set of n, the last n/15);
    "celeba": CelebA's official partition by the mapping file, training pictures to train and test pictures to
    test.
    """
    folder = root / "CelebA-HQ-img"
    if not folder.is_dir():
        raise UserError(f"CelebA-HQ: no folder {folder}; {CELEBA_LAYOUT}")
    files = _numbered(folder, "CelebA-HQ", CELEBA_LAYOUT)
    if split == "celeba":
        original = _read_mapping(root / "CelebA-HQ-to-CelebA-mapping.txt")
        absent = [f.name for f in files if int(f.stem) not in original]
        if absent:
            raise UserError(f"{root / 'CelebA-HQ-to-CelebA-mapping.txt'}: no line for {absent[0]}")
        chosen = {
            "train": lambda f: original[int(f.stem)] <= CELEBA_TRAIN,
            "test": lambda f: original[int(f.stem)] > CELEBA_VALID,
        }[part]
        files = [f for f in files if chosen(f)]
    else:
        files = _last(files, max(1, len(files) // 15), part)
    return FacePictures(files, size, "CelebA-HQ", _annotations(root))


def _annotations(root: Path) -> Path | None:
    """CelebAMask-HQ's label folder, if it is there."""
    folder = root / "CelebAMask-HQ-mask-anno"
    return folder if folder.is_dir() else None


def _numbered(folder: Path, what: str, layout: str) -> list[Path]:
    """Pictures below a folder whose names are numbers, in their order; warns how many have other names.
    UserError when none is left."""
    every = list_images(folder, what)
    files = sorted((f for f in every if f.stem.isdigit()), key=lambda path: int(path.stem))
    if not files:
        raise UserError(f"{what}: no numbered pictures in {folder}; {layout}")
    if len(files) < len(every):
        other = next(f for f in every if not f.stem.isdigit())
        count = f"{len(every) - len(files)} of {len(every)} pictures"
        log.warning(f"{what}: {count} left out, whose names are no numbers ({other})")
    return files


def _read_mapping(path: Path) -> dict[int, int]:
    """CelebA-HQ number -> CelebA picture number (1 to 202599). The file's columns: idx orig_idx orig_file."""
    if not path.is_file():
        raise UserError(f"--split celeba: no file {path}; {CELEBA_LAYOUT}")
    rows = [line.split() for line in read_utf8(path, "a table of numbers").splitlines()[1:]]
    rows = [row for row in rows if row]
    if any(len(row) != 3 or not (row[0].isdigit() and Path(row[2]).stem.isdigit()) for row in rows):
        raise UserError(f"{path}: expected lines of 'idx orig_idx orig_file' below a heading")
    return {int(row[0]): int(Path(row[2]).stem) for row in rows}


def ffhq(root: Path, size: int, part: Part) -> FacePictures:
    """FFHQ: the first 6/7 of the pictures (60,000 of 70,000) train, the rest test. It has no labels."""
    places = [root / name for name in ("images1024x1024", "thumbnails128x128")]
    folder = next((place for place in places if place.is_dir()), root)
    if not folder.is_dir():
        raise UserError(f"FFHQ: no folder {folder}; {FFHQ_LAYOUT}")
    files = _numbered(folder, "FFHQ", FFHQ_LAYOUT)
    return FacePictures(_last(files, max(1, len(files) // 7), part), size, "FFHQ")


def picture_folder(root: Path, size: int, part: Part) -> FacePictures:
    """Any folder of pictures, recursive; the last tenth is the test set. With folders `train` and `test` in
    it, those are used."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return FacePictures(list_images(root / part, "pictures"), size, root.name)
    files = list_images(root, "pictures")
    return FacePictures(_last(files, max(1, len(files) // 10), part), size, root.name)


def picture_list(path: Path, root: Path, size: int, celeba: bool = False) -> FacePictures:
    """A text file with one picture per line, relative to `root`. celeba: they are CelebA-HQ's, whose labels
    are used when they are there. UserError names the first that is missing or, with labels, has no number."""
    if not path.is_file():
        raise UserError(f"picture list: no file {path}")
    files = [
        root / line.strip() for line in read_utf8(path, "a list of pictures").splitlines() if line.strip()
    ]
    missing = next((file for file in files if not file.is_file()), None)
    if missing or not files:
        raise UserError(
            f"{path}: " + (f"names {missing}, which is not there" if missing else "names no picture")
        )
    annotations = _annotations(root) if celeba else None
    nameless = next((file for file in files if not file.stem.isdigit()), None)
    if annotations and nameless:
        raise UserError(
            f"{path}: names {nameless}, whose labels in {annotations.name} are found by a number; "
            "--data folder trains without them"
        )
    return FacePictures(files, size, root.name, annotations)


def _last(files: list[Path], tested: int, part: Part) -> list[Path]:
    if len(files) < 2:
        raise UserError(f"{files[0].parent}: one picture is not enough for a training and a test set")
    return files[:-tested] if part == "train" else files[-tested:]
