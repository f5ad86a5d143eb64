"""Public iris data sets in their public layouts: which file is whose mask.

    casia-distance, ubiris, miche   the IrisParseNet release: ROOT/{train,test}/{image or JPEGImages,
                                    SegmentationClass, pupil_edge_mask, iris_edge_mask}
    nir-isl/SET                     NIR-ISL 2021: ROOT/{train,test}/SET/... or ROOT/SET/{train,test}/... with
                                    the same folders; SET is a key of NIR_ISL
    casia-interval, iitd,           images in any sub-folders of ROOT/images, masks of IRISSEG-EP in
    ubiris-irisseg                  ROOT/masks, named OperatorA_<image>.tiff; other operators: --operator
    nice                            NICE.I: ROOT/{train,test}/{images,masks}, same names
    openeds                         ROOT/{train,test}/{images/*.png, labels/*.npy}, 2 = iris, 3 = pupil
    folder                          ROOT/images and ROOT/masks (or ROOT/{train,test}/...) paired by name
    csv                             ROOT is a CSV file with the columns image, mask and optionally split
    all                             each of the above that has a folder of its name (nir-isl: one) in ROOT

Images and masks are matched by stem whatever their endings. A split is the folder's train and test; or the
CSV's column; or ROOT/train.txt and ROOT/test.txt with one stem per line (of one of them alone the other
split is the rest), for which the IrisParseNet release and NICE.I may lie in ROOT without {train,test} as
well. Where there is neither, every fifth subject (sub-folder, or the first five characters of CASIA's names)
or else every fifth image is for testing, but not of data sets whose splits are published.
"""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from irisusformer.losses import IGNORE
from shared.io import IMAGE_ENDINGS, find_images, read_image, read_utf8
from shared.runtime import UserError

IMAGE_FOLDERS = ("image", "images", "JPEGImages")
MASK_FOLDERS = ("SegmentationClass_1D", "SegmentationClass", "masks", "mask")
NIR_ISL = {
    "distance": "CASIA-Iris-Asia/CASIA-distance",
    "occlusion": "CASIA-Iris-Asia/CASIA-Iris-Complex/Occlusion",
    "off-angle": "CASIA-Iris-Asia/CASIA-Iris-Complex/Off_angle",
    "mobile": "CASIA-Iris-Mobile-V1.0",
    "africa": "CASIA-Iris-Africa",
}
WHERE = {
    "casia-distance": "CASIA-Iris-Distance: biometrics.idealtest.org; masks: the "
    "IrisParseNet release (github.com/xiamenwcy/IrisParseNet, password by mail)",
    "ubiris": "UBIRIS.v2: iris.di.ubi.pt; masks: NICE.I and the IrisParseNet release",
    "miche": "MICHE-I: biplab.unisa.it; masks: the IrisParseNet release",
    "nir-isl": "NIR-ISL 2021: github.com/xiamenwcy/NIR-ISL-2021",
    "casia-interval": "CASIA-Iris-Interval: biometrics.idealtest.org; masks: IRISSEG-EP (Salzburg)",
    "iitd": "IIT Delhi iris database; masks: IRISSEG-EP (Salzburg)",
    "ubiris-irisseg": "UBIRIS.v2: iris.di.ubi.pt; masks: IRISSEG-EP (Salzburg)",
    "nice": "NICE.I contest: nice1.di.ubi.pt",
    "openeds": "OpenEDS: Facebook Reality Labs' semantic segmentation data set",
}
DATASETS = ("casia-distance", "ubiris", "miche", *(f"nir-isl/{name}" for name in NIR_ISL), "casia-interval")
DATASETS += ("iitd", "ubiris-irisseg", "nice", "openeds", "folder", "csv", "all")


@dataclass(frozen=True)
class Pair:
    """One image with its annotation files. `labels` is an OpenEDS label map that stands for all masks."""

    name: str
    image: Path
    mask: Path | None = None
    pupil: Path | None = None
    outer: Path | None = None
    labels: Path | None = None
    subject: str = ""


def find_pairs(dataset: str, root: Path | None, split: str, operator: str = "A") -> list[Pair]:
    """All pairs of a data set's split, "train" or "test", sorted by name.

    Raises UserError when the data set is unknown, a folder of its layout is absent, folders and lists both
    split it, or an image lacks a mask (or the other way round); the message lists the files.
    """
    family = dataset.split("/")[0]
    if dataset not in DATASETS:
        raise UserError(f"data set {dataset!r} is none of {', '.join(DATASETS)}")
    if root is None or not root.exists():
        where = f"; get it: {WHERE[family]}" if family in WHERE else ""
        lacking = "--data-root is missing" if root is None else f"--data-root {root} does not exist"
        raise UserError(f"{dataset}: {lacking}{where}. Layouts: README.md, 'Data sets'")
    if family == "all":
        return all_pairs(root, split, operator)
    if family == "csv":
        return csv_pairs(root, split)
    if family == "openeds":
        return openeds_pairs(root, split)
    if family in ("casia-interval", "iitd", "ubiris-irisseg"):
        pairs = match(dataset, root / "images", {"mask": root / "masks"}, f"Operator{operator}_")
        return split_list(pairs, root, split)
    if family == "nir-isl":
        base = nir_isl_base(root, dataset.split("/")[1], split)
        return folder_pairs(dataset, base)
    lists = [path for path in (root / "train.txt", root / "test.txt") if path.is_file()]
    if (root / split).is_dir():
        if lists:
            raise UserError(f"{root / split} and {lists[0]} both say how {dataset} is split: remove one")
        return folder_pairs(dataset, root / split)
    if family == "folder" or lists:
        return split_list(folder_pairs(dataset, root), root, split)
    raise UserError(
        f"{dataset}: no folder {root / split} and no list {root / split}.txt; get it: {WHERE[family]}. "
        "Layout: README.md, 'Data sets'"
    )


def all_pairs(root: Path, split: str, operator: str) -> list[Pair]:
    """The pairs of every data set under ROOT, one after the other."""
    homes = {name: root / name.split("/")[0] for name in DATASETS if name not in ("csv", "all")}
    for name in NIR_ISL:
        if not nir_isl_base(homes[f"nir-isl/{name}"], name, split).is_dir():
            del homes[f"nir-isl/{name}"]
    present = {name: home for name, home in homes.items() if home.is_dir()}
    if not present:
        raise UserError(f"all: {root} holds no folder named after a data set: {', '.join(DATASETS)}")
    return [pair for name, home in present.items() for pair in find_pairs(name, home, split, operator)]


def nir_isl_base(root: Path, name: str, split: str) -> Path:
    """ROOT/split/SET, or the other published arrangement ROOT/SET/split where that is there."""
    either = root / split / NIR_ISL[name], root / NIR_ISL[name] / split
    return next((path for path in either if path.is_dir()), either[0])


def folder_pairs(dataset: str, base: Path) -> list[Pair]:
    """Pairs of one split's folder: images, masks and, where there are any, boundary masks."""
    images = existing(dataset, base, IMAGE_FOLDERS)
    partners = {"mask": existing(dataset, base, MASK_FOLDERS)}
    for role, name in (("pupil", "pupil_edge_mask"), ("outer", "iris_edge_mask")):
        if (base / name).is_dir():
            partners[role] = base / name
    return match(dataset, images, partners)


def existing(dataset: str, base: Path, names: tuple[str, ...]) -> Path:
    """The first of the named folders that is there. UserError when none is."""
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise UserError(f"{dataset}: {base} holds none of the folders {', '.join(names)}")


def files_in(folder: Path, endings: tuple[str, ...] = IMAGE_ENDINGS) -> list[Path]:
    """Files of these endings in a folder and below, sorted. UserError when there is no folder."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    return find_images(folder, endings=endings)


def match(dataset: str, images: Path, partners: dict[str, Path], prefix: str = "") -> list[Pair]:
    """Pair by stem; where stems repeat in sub-folders, by <folder>_<stem> or <folder>-<stem>.

    Raises UserError that lists what has no partner, or names two masks of one image, or two images of one
    name.
    """
    found = files_in(images)
    if not found:
        raise UserError(f"{dataset}: no image in {images} ({', '.join(IMAGE_ENDINGS)})")
    no_twins(dataset, found)
    by_role = {}
    for role, folder in partners.items():
        files = by_role[role] = {}
        masks = [(p.stem.removeprefix(prefix), p) for p in files_in(folder) if p.stem.startswith(prefix)]
        times = Counter(stem for stem, _ in masks)
        for stem, path in masks:
            key = stem if times[stem] == 1 else f"{path.parent.name}_{stem}"
            if key in files:
                raise UserError(f"{dataset}: {files[key]} and {path} are masks of one image; remove one")
            files[key] = path
    stems = Counter(path.stem for path in found)
    pairs, lonely, used = [], [], set()
    for path in found:
        longer = [f"{path.parent.name}{joint}{path.stem}" for joint in "_-"]
        keys = [*longer, path.stem] if stems[path.stem] == 1 else longer
        key = next((key for key in keys if key in by_role["mask"]), None)
        if key is None or any(key not in files for files in by_role.values()):
            missing = [role for role, files in by_role.items() if key is None or key not in files]
            lonely.append(f"{path} ({', '.join(missing)})")
            continue
        used.add(key)
        flat = path.stem[:5] if dataset == "casia-interval" else key
        subject = flat if path.parent == images else path.parent.name
        pairs.append(
            Pair(key, path, subject=subject, **{role: files[key] for role, files in by_role.items()})
        )
    orphans = [str(path) for key, path in by_role["mask"].items() if key not in used]
    if lonely or orphans:
        text = (
            f"{dataset}: {len(lonely)} images without a partner and {len(orphans)} masks without an image: "
        )
        raise UserError(
            text + "; ".join((lonely + orphans)[:10]) + ". Add the files or remove the single ones"
        )
    return sorted(pairs, key=lambda pair: pair.name)


def no_twins(dataset: str, paths: list[Path]) -> None:
    """UserError when two files of a folder differ in their endings alone: which one is meant?"""
    names: dict[Path, Path] = {}
    for path in paths:
        other = names.setdefault(path.with_suffix(""), path)
        if other != path:
            raise UserError(f"{dataset}: {other} and {path} share a name; remove or rename one")


def split_list(pairs: list[Pair], root: Path, split: str) -> list[Pair]:
    """The split by text files, or every fifth subject for testing."""
    listed = root / f"{split}.txt"
    if listed.is_file():
        return listed_pairs(pairs, listed)
    other = root / ("test.txt" if split == "train" else "train.txt")
    if other.is_file():
        elsewhere = {pair.name for pair in listed_pairs(pairs, other)}
        rest = [pair for pair in pairs if pair.name not in elsewhere]
        if not rest:
            raise UserError(f"{other}: names every image; nothing is left for the {split} split")
        return rest
    subjects = sorted({pair.subject for pair in pairs})
    held_out = set(subjects[4::5])
    chosen = [pair for pair in pairs if (pair.subject in held_out) == (split == "test")]
    if not chosen:
        raise UserError(f"{root}: too few subjects ({len(subjects)}) for a {split} split; write {listed}")
    return chosen


def listed_pairs(pairs: list[Pair], listed: Path) -> list[Pair]:
    """The pairs that a text file names, in its order: a line is a name, with or without its ending."""
    by_name = {pair.name: pair for pair in pairs}
    lines = [line.strip() for line in read_utf8(listed, "a list of names").splitlines() if line.strip()]
    found = [by_name.get(line, by_name.get(Path(line).stem)) for line in lines]
    missing = [line for line, pair in zip(lines, found, strict=True) if pair is None]
    if missing:
        raise UserError(f"{listed}: names images that are not there: {', '.join(missing[:10])}")
    return found


def csv_pairs(path: Path, split: str) -> list[Pair]:
    """Rows of a CSV file; image and mask are relative to it.

    Raises UserError that names the line of a missing value or file, or of a split that is neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: not a CSV file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as a table ({error})") from None
    if not {"image", "mask"} <= columns:
        raise UserError(f"{path}: needs the columns image and mask (and optionally split: train or test)")
    pairs = []
    for line, row in enumerate(rows, 2):
        for column in ("image", "mask"):
            if not row[column]:
                raise UserError(f"{path}, line {line}: no value in the column {column}")
        image, mask = (path.parent / row[column] for column in ("image", "mask"))
        for file in (image, mask):
            if not file.is_file():
                raise UserError(f"{path}, line {line}: no file {file}")
        part = (row.get("split", split) or "").strip().lower()
        if part not in ("train", "test"):
            raise UserError(f"{path}, line {line}: split {part!r} is neither train nor test")
        if part == split:
            pairs.append(Pair(image.stem, image, mask, subject=image.stem))
    if "split" not in columns:
        return split_list(pairs, path.parent, split)
    if not pairs:
        raise UserError(f"{path}: no row has the split {split}")
    return pairs


def openeds_pairs(root: Path, split: str) -> list[Pair]:
    """OpenEDS: ROOT/split/{images,labels}, paired by place and name. UserError that names what has no
    partner, or shares its name.
    """
    base = root / split
    files = files_in(base / "images")
    no_twins("openeds", files)
    images = {path.relative_to(base / "images").with_suffix("").as_posix(): path for path in files}
    maps = files_in(base / "labels", (".npy",))
    labels = {path.relative_to(base / "labels").with_suffix("").as_posix(): path for path in maps}
    single = sorted(set(images) ^ set(labels))
    if single or not images:
        raise UserError(
            f"openeds: {base}: images and labels do not pair: {', '.join(single[:10]) or 'no files'}"
        )
    return [Pair(name, images[name], labels=labels[name]) for name in sorted(images)]


# ------------------------------------------------------------------------------------------------- reading


def read_pair(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """image (3, H, W) float32, mask (1, H, W) and regions (2, H, W) uint8 of one pair.

    Raises UserError for a damaged file, a mask of another size or with other values than {0, 1} or {0, 255},
    an empty iris mask, and an image too small to hold an eye; the message names the file.
    """
    image = read_eye(pair.image)
    size = image.shape[-2:]
    regions = torch.full((2, *size), IGNORE, dtype=torch.uint8)
    if pair.labels is not None:
        labels = read_labels(pair.labels, size)
        return (
            image,
            (labels == 2)[None].to(torch.uint8),
            torch.stack([labels == 3, labels >= 2]).to(torch.uint8),
        )
    mask = read_mask(pair.mask, size)
    for i, path in enumerate((pair.pupil, pair.outer)):
        if path is not None:
            regions[i] = fill(read_mask(path, size, may_be_empty=True))  # a lid can cover a whole pupil
    return image, mask[None], regions


SMALLEST = 16  # pixels; below this no iris can be told from its pupil


def read_eye(path: Path) -> Tensor:
    """An image file -> (3, H, W) in [0, 1]; grey, 16-bit, palette and transparent files are converted."""
    image = read_image(path)
    if min(image.shape[-2:]) < SMALLEST:
        raise UserError(
            f"{path}: {image.shape[-1]}x{image.shape[-2]} pixels are too few, at least {SMALLEST}"
        )
    return image


def read_mask(path: Path, size: tuple[int, int], may_be_empty: bool = False) -> Tensor:
    """A mask file -> (H, W) uint8 of 0 and 1."""
    mask = read_image(path, "L")[0]
    if mask.shape != torch.Size(size):
        have, want = (f"{s[1]}x{s[0]}" for s in (mask.shape, size))
        raise UserError(f"{path}: the mask has {have} pixels, its image {want}; they must be the same")
    counts = torch.bincount((mask * 255).round().long().flatten(), minlength=256)
    values = counts.nonzero().flatten().tolist()
    binary = set(values) <= {0, 1} or set(values) <= {0, 255}
    numbers = None if binary and values != [0] else class_numbers(path)
    if numbers is not None:
        return numbers
    if not binary:
        raise UserError(
            f"{path}: not a binary mask, it has {len(values)} values (such as {values[:5]}) instead of "
            "0 and 1 or 0 and 255; store masks without lossy compression, or threshold this one first"
        )
    if values == [0] and not may_be_empty:
        raise UserError(f"{path}: the mask is empty; remove the pair or correct the annotation")
    return (mask > 0).to(torch.uint8)


def class_numbers(path: Path) -> Tensor | None:
    """Pixels (H, W) uint8 of a palette or 16-bit file that are 0 and 1, which the conversion to grey changes:
    coloured classes, as VOC stores them. None for other files."""
    with Image.open(path) as picture:
        if picture.mode != "P" and not picture.mode.startswith("I"):
            return None
        numbers = np.array(picture)
    return torch.from_numpy(numbers.astype(np.uint8)) if set(np.unique(numbers)) == {0, 1} else None


def read_labels(path: Path, size: tuple[int, int]) -> Tensor:
    """An OpenEDS label map (H, W) int64: 0 skin, 1 sclera, 2 iris, 3 pupil. UserError on anything else."""
    try:
        labels = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable label map ({error})") from None
    if labels.shape != tuple(size) or not set(np.unique(labels)) <= {0, 1, 2, 3}:
        raise UserError(f"{path}: expected labels 0 to 3 of shape {tuple(size)}, found shape {labels.shape}")
    if not (labels == 2).any():
        raise UserError(f"{path}: no pixel is labelled iris (2); remove the pair or correct the annotation")
    return torch.from_numpy(labels.astype(np.int64))


def fill(region: Tensor) -> Tensor:
    """A region or its closed outline (H, W) -> the filled region."""
    array = region.numpy().copy()
    contours, _ = cv2.findContours(array, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return torch.from_numpy(cv2.drawContours(array, contours, -1, 1, cv2.FILLED))
