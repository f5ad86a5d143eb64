"""Public face sets in their public layouts, with landmark pictures and masks in sister folders.

The released data put, beside a folder of pictures, folders of the same name with a suffix: `CelebA`,
`CelebA_lm_images`, `CelebA_mask_images`, for the tests also `_parsing_images`. The same holds here for every
set: `prepare.py` writes the sisters. Files correspond by their path below the folder without the ending.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from faceswapper.drawing import face_mask
from shared.faces import BISENET_CLASSES, CLASSES
from shared.io import find_images, read_image, read_utf8
from shared.runtime import UserError

PublicSet = Literal["celeba", "vggface2", "celeba-hq", "ffhq", "folder"]
LANDMARKS, MASKS, PARSING = "_lm_images", "_mask_images", "_parsing_images"
"""Suffixes of the sister folders."""
FOLDERS = {
    "celeba": ("CelebA", "img_align_celeba", "CelebA images"),
    "vggface2": ("train", "VGGFace2/train"),
    "celeba-hq": ("CelebA-HQ-img",),
    "ffhq": ("images1024x1024", "images256x256", "thumbnails128x128"),
    "folder": (".",),
}
"""Where a set's pictures lie below its root; the first that is there is taken."""
ANNOTATIONS = "CelebAMask-HQ-mask-anno"
PARTS_PER_FOLDER = 2000
_SISTERS = """Beside the folder X of pictures: X_lm_images (landmark pictures) and X_mask_images (white in
the face), made by `python prepare.py`."""
LAYOUTS = {
    "celeba": """Expected: CelebA/*.png (the released crops) or img_align_celeba/*.jpg. Get it from
mmlab.ie.cuhk.edu.hk/projects/CelebA.html (research only).""",
    "vggface2": """Expected: train/n000002/0001_01.jpg ... VGGFace2 is no longer given out by its authors; use
a copy that you have the right to.""",
    "celeba-hq": """Expected: CelebA-HQ-img/0.jpg ... Without mask files the labels in CelebAMask-HQ-mask-anno
are used. Get it from github.com/switchablenorms/CelebAMask-HQ (non-commercial).""",
    "ffhq": """Expected: images1024x1024/00000/00000.png ... or thumbnails128x128/... Get it from
github.com/NVlabs/ffhq-dataset.""",
    "folder": "Expected: a folder of pictures, searched with its subfolders.",
}
LAYOUTS = {name: f"{text} {_SISTERS}" for name, text in LAYOUTS.items()}
FF_LAYOUT = """Expected: ff++/raw_<video>_<k>.png, ff++_lm_images, ff++_mask_images, optional
ff++_parsing_images, and face_swap_list.txt with lines '<source file> <target file>'. FaceForensics++ is given
out by the form on github.com/ondyari/FaceForensics; `python prepare.py VIDEOS --name ff++ --pairs
splits/*.json` makes all of it from its original videos."""


def list_pictures(folder: Path, what: str) -> list[Path]:
    """Picture files in a folder and its subfolders, sorted. UserError when there is no folder or no
    picture."""
    if not folder.is_dir():
        raise UserError(f"{what}: no folder {folder}")
    files = find_images(folder)
    if not files:
        raise UserError(f"{what}: no picture in {folder}")
    return files


def resized(image: Tensor, size: int, nearest: bool = False) -> Tensor:
    """(C, H, W) -> (C, size, size): bilinear with antialiasing, or nearest for label pictures."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    if nearest:
        return F.interpolate(image[None], (size, size), mode="nearest-exact")[0]
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def by_stem(folder: Path, what: str) -> dict[str, Path]:
    """Path below the folder without ending -> file. UserError when two files differ in nothing else."""
    found: dict[str, Path] = {}
    for file in list_pictures(folder, what):
        other = found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
        if other != file:
            raise UserError(
                f"{what}: {other} and {file.name} have the same name without the ending; remove one"
            )
    return found


def sister(folder: Path, suffix: str) -> Path:
    """The sister folder of a folder of pictures; of a link, beside the link."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(folder.name + suffix)


@dataclass(frozen=True)
class Sisters:
    """Folders that belong to a folder of pictures; parsing only where labels are used."""

    pictures: Path
    landmarks: Path
    masks: Path
    parsing: Path | None = None


class PictureFiles:
    """Pictures with their landmark pictures and masks from files; see `data.PictureSet`.

    chosen: stems to take, in order; default all. annotations: CelebAMask-HQ's labels, in place of mask files.
    Raises UserError when a sister folder or a file in it is missing.
    """

    def __init__(
        self, folders: Sisters, size: int, name: str, chosen: Sequence[str] | None = None,
        annotations: Path | None = None,
    ):  # fmt: skip
        self.size, self.name, self.annotations = size, name, annotations
        self.files = by_stem(folders.pictures, name)
        self.names = list(self.files if chosen is None else chosen)
        self.landmarks = self._sister(folders.landmarks, "landmark pictures")
        self.masks = None if annotations else self._sister(folders.masks, "masks")
        self.parsing = self._sister(folders.parsing, "parsings") if folders.parsing else None
        self._need(self.files, folders.pictures, "pictures")

    def _sister(self, folder: Path, what: str) -> dict[str, Path]:
        if not folder.is_dir():
            raise UserError(f"{self.name}: no folder {folder} with {what}; make it with `python prepare.py`")
        found = by_stem(folder, f"{self.name}, {what}")
        self._need(found, folder, what)
        return found

    def _need(self, found: dict[str, Path], folder: Path, what: str) -> None:
        missing = [stem for stem in self.names if stem not in found]
        if missing:
            count = f"{len(missing)} of {len(self.names)}"
            raise UserError(f"{folder}: {count} {what} missing, first {missing[0]}")

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> dict[str, Tensor]:
        stem = self.names[i]
        if self.annotations is None:
            mask = 1 - resized(read_image(self.masks[stem], "L"), self.size)
        else:
            face = face_mask(read_annotation(self.annotations, int(stem)))[None].float()
            mask = 1 - resized(face, self.size)
        item = {
            "image": resized(read_image(self.files[stem]), self.size) * 2 - 1,
            "landmarks": resized(read_image(self.landmarks[stem]), self.size) * 2 - 1,
            "mask": mask,
        }
        if self.parsing is not None:
            labels = resized(read_image(self.parsing[stem], "L"), self.size, nearest=True)
            item["parsing"] = (labels * 255).round().long()
        return item


def read_annotation(folder: Path, number: int) -> Tensor:
    """CelebAMask-HQ's part files of one picture -> BiSeNet labels (H, W) int64; later parts cover earlier
    ones.

    UserError when the picture has no part file at all.
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
        raise UserError(f"{place}: no part files {number:05d}_*.png; {LAYOUTS['celeba-hq']}")
    return labels


def open_set(
    data: PublicSet,
    root: Path,
    size: int,
    pictures: str | None = None,
    landmarks: str | None = None,
    masks: str | None = None,
) -> PictureFiles:
    """Training pictures of a public set under `root`.

    pictures, landmarks, masks: folders below the root, instead of the usual names (the README of the official
    code prints others). Raises UserError with the expected layout.
    """
    places = [root / name for name in ((pictures,) if pictures else FOLDERS[data])]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(f"{data}: no folder {' or '.join(map(str, places))}. {LAYOUTS[data]}")
    folders = Sisters(
        folder,
        root / landmarks if landmarks else sister(folder, LANDMARKS),
        root / masks if masks else sister(folder, MASKS),
    )
    labels = root / ANNOTATIONS
    use_labels = data == "celeba-hq" and not folders.masks.is_dir() and labels.is_dir()
    chosen = None
    if data in ("celeba-hq", "ffhq"):  # thumbnails, read-me pictures and the like are no data
        chosen = [s for s in by_stem(folder, data) if Path(s).name.isdigit()]
        chosen.sort(key=lambda stem: int(Path(stem).name))
    return PictureFiles(folders, size, data, chosen, labels if use_labels else None)


def read_swap_list(path: Path) -> list[tuple[str, str]]:
    """Lines '<source file> <target file>' -> pairs of stems. Any white space, line ends and endings;
    UserError names a line that is not a pair."""
    if not path.is_file():
        raise UserError(f"no list of swaps {path}; {FF_LAYOUT}")
    pairs = []
    for number, line in enumerate(read_utf8(path, "a list of swaps").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise UserError(f"{path}, line {number}: expected '<source file> <target file>', got {line!r}")
        pairs.append(tuple(Path(word).with_suffix("").as_posix() for word in words))
    if not pairs:
        raise UserError(f"{path}: lists no swap")
    return pairs


def video_of(stem: str) -> str:
    """raw_<video>_<k> -> <video>, whatever is in its name; another name is its own video."""
    found = re.fullmatch(r"(?:.*/)?raw_(.+)_\d+", stem)
    return found[1] if found else stem


class SwapList:
    """The test: source and target of every line of a swap list, each once. `sources`, `targets`: the two
    sides in the order of the list, as `PictureFiles`; `originals`: all pictures of the folder.

    landmarks, masks, parsing: folders below the root, instead of the pictures' sisters. Parsings are optional
    unless their folder is named.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        pictures: str = "ff++",
        swaps: str = "face_swap_list.txt",
        landmarks: str | None = None,
        masks: str | None = None,
        parsing: str | None = None,
    ):
        folder = root / pictures
        if not folder.is_dir():
            raise UserError(f"FaceForensics++: no folder {folder}. {FF_LAYOUT}")
        labels = root / parsing if parsing else sister(folder, PARSING)
        folders = Sisters(
            folder,
            root / landmarks if landmarks else sister(folder, LANDMARKS),
            root / masks if masks else sister(folder, MASKS),
            labels if parsing or labels.is_dir() else None,
        )
        self.pairs = read_swap_list(root / swaps)
        name = "FaceForensics++" if pictures == "ff++" else pictures
        self.originals = PictureFiles(folders, size, name)
        self.sources = PictureFiles(folders, size, name, [source for source, _ in self.pairs])
        self.targets = PictureFiles(folders, size, name, [target for _, target in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)
