"""Training crops in the winner's list format: folders of crops, one per video, as extract.py writes them.

`read_list` reads a list, `CropFolders` draws training samples from its folders. The public sets that crops
are cut out of stand in datasets.py, the embedded contest in world.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dfgc2022.augment import self_blend, test_transform, train_transform
from shared.io import read_utf8
from shared.records import read_json
from shared.runtime import UserError

PEOPLE = "people.json"
"""Beside a list: its folders -> whom their videos show, where a public set says so."""


@dataclass(frozen=True)
class CropFolder:
    """The crops of one video: `<folder>/NNNN.png`."""

    folder: Path
    label: int
    people: tuple[str, ...] = ()
    """Whom the video shows. Empty where only the folder's name may tell."""


def read_list(path: Path) -> tuple[list[CropFolder], int]:
    """A list file of the winner -> (crop folders, number of empty ones left out).

    Lines are `<folder> <label>`, label 0 or 1; those that name landmarks are passed over, as there. A
    relative folder is looked for beside the list, and so is people.json, which extract.py writes for some
    public sets. Raises UserError on a bad line or a missing folder.
    """
    known = path.with_name(PEOPLE)
    people = read_json(known, "people of videos", _people) if known.exists() else {}
    lines = read_utf8(path, "a list of crop folders, which extract.py writes,").splitlines()
    found, empty = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip() or "landmarks" in line:
            continue
        folder, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if label not in ("0", "1") or not folder:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not '<folder> <0 or 1>'")
        place = path.parent / folder.strip()
        if not place.is_dir():
            raise UserError(
                f"{path}, line {number}: no folder {place}; extract.py makes crop folders from videos"
            )
        if next(place.glob("*.png"), None) is None:
            empty += 1
        else:
            found.append(CropFolder(place, int(label), people.get(folder.strip(), ())))
    if not found:
        raise UserError(f"{path}: names no folder with crops")
    return found, empty


def _people(found: dict) -> dict[str, tuple[str, ...]]:
    return {folder: tuple(map(str, names)) for folder, names in found.items()}


class CropFolders(Dataset):
    """One random crop of a video folder per sample; item (index, draw) -> (crop (S, S, 3) uint8, label).

    All randomness of a sample comes from (seed, draw). blending: share of real samples that are turned into
    self-blended fakes. cache: keep decoded crops in memory, for small sets. frames: use at most so many
    crops of a video, evenly spaced. shuffle_labels: a control that must end at chance.
    """

    def __init__(
        self,
        folders: Sequence[CropFolder],
        size: int,
        seed: int,
        flips_only: bool = False,
        blending: float = 0.0,
        cache: bool = False,
        frames: int | None = None,
        balance: bool = False,
        shuffle_labels: bool = False,
    ):
        self.folders, self.seed, self.blending, self.cache = list(folders), seed, blending, cache
        self.labels = np.array([folder.label for folder in folders])
        if shuffle_labels:
            self.labels = np.random.default_rng(seed).permutation(self.labels)
        self.transform = train_transform(size, flips_only)
        self.frames = frames
        self.classes = [np.flatnonzero(self.labels == label) for label in (0, 1)] if balance else None
        self._files: dict[int, list[Path]] = {}
        self._crops: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.folders)

    def files(self, index: int) -> list[Path]:
        """Crops of a folder in the order of their frames, listed once."""
        if index not in self._files:
            paths = sorted(self.folders[index].folder.glob("*.png"), key=_frame_number)
            if self.frames is not None and len(paths) > self.frames:
                paths = [paths[i] for i in np.linspace(0, len(paths) - 1, self.frames).round().astype(int)]
            self._files[index] = paths
        return self._files[index]

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = item
        rng = np.random.default_rng((self.seed, draw))
        if self.classes:
            index = int(rng.choice(self.classes[int(rng.integers(2))]))
        files = self.files(index)
        crop, label = self._read(files[int(rng.integers(len(files)))]), int(self.labels[index])
        if label == 0 and self.blending and rng.random() < self.blending:
            crop, label = self_blend(crop, rng), 1
        self.transform.set_random_seed(int(rng.integers(2**31)))
        return torch.from_numpy(self.transform(image=crop)["image"]), label

    def _read(self, path: Path) -> np.ndarray:
        if path in self._crops:
            return self._crops[path]
        image = read_crop(path)
        if self.cache:
            self._crops[path] = image
        return image


class Middle(Dataset):
    """The middle crop of each folder, without augmentation, for validation: (crop (S, S, 3) uint8, label)."""

    def __init__(self, folders: Sequence[CropFolder], size: int):
        self.folders, self.transform = list(folders), test_transform(size)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        files = sorted(self.folders[index].folder.glob("*.png"), key=_frame_number)
        crop = self.transform(image=read_crop(files[len(files) // 2]))["image"]
        return torch.from_numpy(crop), self.folders[index].label


def read_crop(path: Path) -> np.ndarray:
    """An image file -> (H, W, 3) uint8 RGB. Raises UserError that names a damaged one."""
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f"{path}: not a readable image; extract this video's crops again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _frame_number(path: Path) -> int:
    if not path.stem.isdigit():
        raise UserError(f"{path}: crops are named by their frame number")
    return int(path.stem)
