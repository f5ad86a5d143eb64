"""Pairs of photo and sketch from files, in the layouts in which CUFS, CUFSF and FS2K are passed around."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from most_net.align import EYES, HEIGHT, WIDTH, align_to_eyes, read_eyes
from most_net.data import Pairs
from most_net.metrics import image_files
from shared.io import find_images, progress, read_image, read_utf8
from shared.processes import rank
from shared.ranges import Natural
from shared.records import read_json
from shared.runtime import UserError

Layout = Literal["auto", "list", "folders", "original", "side-by-side", "fs2k"]

STANDARD = {"cuhk": (88, 100), "ar": (80, 43), "xm2vts": (100, 195), "cufsf": (250, 944)}
"""Training and test pairs of the standard split; CUFS is the first three together, 268 and 338."""
WHERE = {
    "cufs": "CUFS: CUHK student, AR and XM2VTS pairs from their owners, or a ready-made aligned package",
    "cufsf": "CUFSF: sketches from CUHK, photos from the FERET database of NIST",
    "fs2k": "FS2K: from its project page, with anno_train.json and anno_test.json",
    "pairs": "any folder of aligned pairs",
}
COLOURED = 0.08


@dataclass(frozen=True)
class Alignment:
    """What to do with pairs that are not 250 rows by 200 columns."""

    resize: Literal["error", "eyes", "stretch"] = "error"
    """error: refuse them. eyes: align by landmark files. stretch: resize photo and sketch alike."""
    photo_landmarks: Path | None = None
    """Folder of the photos' landmark files (.dat, .pos, .3pts, .txt), named like the photos."""
    sketch_landmarks: Path | None = None
    """Folder of the sketches' landmark files."""
    eye_points: tuple[Natural, Natural] = (16, 18)
    """Numbers of the eye centres, from 0, in files of more than 5 points."""
    colour: Literal["error", "grey"] = "error"
    """Sketches in colour: refuse them (photos and sketches may be swapped), or convert them to grey."""


@dataclass(frozen=True)
class Pair:
    """The files of a pair. sketch None: both are side by side in `photo`. subset: its part of the data
    set."""

    name: str
    photo: Path
    sketch: Path | None
    subset: str = ""
    style: int = 0


def load_dataset(
    dataset: str,
    root: Path | None,
    layout: Layout = "auto",
    train_list: Path | None = None,
    test_list: Path | None = None,
    alignment: Alignment | None = None,
    scale: float = 1.0,
) -> tuple[Pairs, Pairs | None]:
    """Training and test pairs of a data set, 250x200 times `scale`. None when there is no test part.

    Raises UserError when the folder, its layout, a pairing or an image is not as expected.
    """
    alignment = alignment or Alignment()
    if root is None or not root.is_dir():
        what = "--data-root is needed" if root is None else f"--data-root {root}: no such folder"
        raise UserError(f"{what}. {WHERE[dataset]}; layouts: see most_net/README.md")
    train, test = find_pairs(dataset, root, layout, train_list, test_list)
    _compare_with_standard(dataset, train, test)
    return load(train, alignment, scale), load(test, alignment, scale) if test else None


def find_pairs(
    dataset: str, root: Path, layout: Layout, train_list: Path | None = None, test_list: Path | None = None
) -> tuple[list[Pair], list[Pair]]:
    """The files of the training and test pairs, in the order of list or name."""
    if train_list is None and (layout == "list" or test_list):
        raise UserError("layout list: name the list of the training pairs with --train-list")
    if layout == "auto":
        layout = _recognise(root, train_list)
    if layout == "list":
        train, test = read_list(root, train_list), read_list(root, test_list) if test_list else []
        named = Counter(pair.photo for pair in train + test)
        twice = [photo for photo, count in named.items() if count > 1]
        if twice:
            raise UserError(
                f"{twice[0]}: twice in the lists, as {len(twice)} photos are; leave one line each"
            )
        return train, test
    if train_list:
        raise UserError(f"--train-list is for layout list, not {layout}")
    if layout == "fs2k":
        return read_fs2k(root, "train"), read_fs2k(root, "test")
    if layout == "folders":
        return read_folders(root, "train"), read_folders(root, "test")
    if layout == "original":
        return split_standard(read_original(root), dataset)
    train = [Pair(name, path, None) for name, path in image_files(_part(root, "train") or root).items()]
    test = _part(root, "test")
    return train, [Pair(name, path, None) for name, path in image_files(test).items()] if test else []


def _recognise(root: Path, train_list: Path | None) -> Layout:
    if train_list is not None:
        return "list"
    if (root / "anno_train.json").is_file():
        return "fs2k"
    if any((root / name).is_dir() for name in ("train_photos", "train/photos")):
        return "folders"
    if any(_folder(path, "photo") for path in (root, *sorted(root.iterdir())) if path.is_dir()):
        return "original"
    if find_images(root, subfolders=False) or (root / "train").is_dir():
        return "side-by-side"
    raise UserError(
        f"{root}: no known layout. Expected one of: train_photos/ and train_sketches/; photos/ and sketches/ "
        "here or per subset; anno_train.json (FS2K); images of photo and sketch side by side; --train-list"
    )


# --- layouts ------------------------------------------------------------------------------------------


def read_list(root: Path, path: Path) -> list[Pair]:
    """Lines "photo||sketch[||...]" relative to `root`; what follows the sketch is ignored."""
    if not path.is_file():
        raise UserError(f"{path}: no such list")
    lines = [line.strip() for line in read_utf8(path, "a list of pairs").splitlines()]
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        fields = line.split("||")
        if len(fields) < 2 or not all(Path(field.strip()).name for field in fields[:2]):
            raise UserError(f"{path}, line {number}: expected photo||sketch, found {line!r}")
        photo, sketch = (root / field.strip() for field in fields[:2])
        subset = Path(fields[0]).parts[0]
        pairs.append(Pair(f"{subset}-{photo.stem}", photo, sketch, subset))
    if not pairs:
        raise UserError(f"{path}: lists no pair")
    return pairs


def read_folders(root: Path, part: str) -> list[Pair]:
    """<part>_photos/ and <part>_sketches/, or <part>/photos/ and <part>/sketches/, with equal names."""
    for join in ("{}_{}", "{}/{}"):
        photos, sketches = (root / join.format(part, kind) for kind in ("photos", "sketches"))
        if photos.is_dir():
            return match(image_files(photos), image_files(sketches), photos, sketches)
    if part == "test":
        return []
    raise UserError(f"{root}: neither {part}_photos/ nor {part}/photos/ is there")


def read_original(root: Path) -> list[Pair]:
    """photo(s)/ and sketch(es)/ in `root` or in each of its folders (the subsets), names as released."""
    pairs = []
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        photos, sketches = _folder(folder, "photo"), _folder(folder, "sketch")
        if (photos is None) != (sketches is None):
            alone, missing = (photos, "sketch(es)") if photos else (sketches, "photo(s)")
            raise UserError(f"{alone}: no folder {missing}/ beside it")
        if photos and sketches:
            subset = "" if folder == root else folder.name
            keyed = [_normalised(image_files(part)) for part in (photos, sketches)]
            pairs += match(*keyed, photos, sketches, subset)
    if not pairs:
        raise UserError(f"{root}: no folder photo(s)/ beside a folder sketch(es)/ in it")
    return pairs


def read_fs2k(root: Path, part: str) -> list[Pair]:
    """FS2K: anno_<part>.json names photo/photo<k>/image<id>, whose sketch is sketch/sketch<k>/sketch<id>;
    style k of three is artist k - 1."""

    def names_in(entries: list[dict]) -> list[str]:
        return [entry["image_name"].removesuffix(".jpg").removesuffix(".png") for entry in entries]

    path = root / f"anno_{part}.json"
    names = read_json(path, "FS2K's annotations", names_in)
    if not names:
        raise UserError(f"{path}: names no image")
    files: dict[Path, dict[str, Path]] = {}
    pairs = []
    for name in names:
        found = re.fullmatch(r"photo([1-3])/image(\w+)", name)
        if not found:
            raise UserError(f"{path}: image name {name!r}, expected photo<k>/image<id>, k from 1 to 3")
        style, number = found.groups()
        members = []
        for kind, stem in (("photo", "image"), ("sketch", "sketch")):
            folder = root / kind / f"{kind}{style}"
            if folder not in files:
                files[folder] = image_files(folder)
            if f"{stem}{number}" not in files[folder]:
                raise UserError(f"{folder}: no image {stem}{number}, which {path.name} names")
            members.append(files[folder][f"{stem}{number}"])
        pairs.append(Pair(f"{style}-{number}", *members, f"style{style}", int(style) - 1))
    return pairs


def normalise(stem: str) -> str:
    """The name that photo and sketch of a person share, as CUHK, AR, XM2VTS and FERET name their files.

    Lower case without the suffix sz1; f2 and m2 are other hands' names for f and m, as mp and wp are for m
    and w in AR; f1 and m1 are other people. FERET's photo 00001fb010_930831 is person 00001.
    """
    stem = re.sub(r"[-_]sz1$", "", stem.lower())
    stem = re.sub(r"^([fm])2(?=-)", r"\1", stem)
    stem = re.sub(r"^([mw])p(?=-)", r"\1", stem)
    feret = re.match(r"(\d{5})(?:[a-z]{2}\d{3}.*)?$", stem)
    return feret.group(1) if feret else stem


def _normalised(files: dict[str, Path]) -> dict[str, Path]:
    keyed: dict[str, Path] = {}
    for stem, path in files.items():
        key = normalise(stem)
        if key in keyed:
            raise UserError(f"{path}: the same person as {keyed[key].name} by name ({key})")
        keyed[key] = path
    return keyed


def match(
    photos: dict[str, Path],
    sketches: dict[str, Path],
    photo_folder: Path,
    sketch_folder: Path,
    subset: str = "",
) -> list[Pair]:
    """Pairs of equal names, sorted. UserError that lists what has no partner."""
    alone = [f"{photo_folder.name}/{photos[name].name}" for name in sorted(photos.keys() - sketches.keys())]
    alone += [
        f"{sketch_folder.name}/{sketches[name].name}" for name in sorted(sketches.keys() - photos.keys())
    ]
    if alone:
        shown = ", ".join(alone[:6]) + (f" and {len(alone) - 6} more" if len(alone) > 6 else "")
        raise UserError(f"{photo_folder.parent}: without a partner of the same name: {shown}")
    prefix = f"{subset}-" if subset else ""
    return [Pair(prefix + name, photos[name], sketches[name], subset) for name in sorted(photos)]


def split_standard(pairs: list[Pair], dataset: str) -> tuple[list[Pair], list[Pair]]:
    """Without lists: in each subset the first n_train of the sorted names train, the others test."""
    train, test = [], []
    for subset in dict.fromkeys(pair.subset for pair in pairs):
        members = [pair for pair in pairs if pair.subset == subset]
        counts = STANDARD.get("cufsf" if dataset == "cufsf" else _subset(subset))
        cut = counts[0] if counts and dataset != "pairs" else len(members)
        train, test = train + members[:cut], test + members[cut:]
    return train, test


def _subset(name: str) -> str:
    # The longest first: "ar" is in many a word, also in a folder called XM2VTS_warped.
    return next((known for known in sorted(STANDARD, key=len, reverse=True) if known in name.lower()), name)


def _counts(pairs: list[Pair]) -> str:
    """How many pairs of each subset, in words."""
    subsets = Counter(pair.subset for pair in pairs)
    each = ", ".join(f"{subset} {count}" for subset, count in subsets.items() if subset)
    return f"{len(pairs)}" + (f" ({each})" if each else "")


def _compare_with_standard(dataset: str, train: list[Pair], test: list[Pair]) -> None:
    """Print how many pairs of each subset train and test; warn when they are not the standard split's. Of
    several processes, which all read the files, the first one does."""
    if rank():
        return
    print(f"{dataset}: {_counts(train)} training pairs, {_counts(test)} test pairs")
    standard = {"cufs": (268, 338), "cufsf": STANDARD["cufsf"]}.get(dataset)
    if standard is None:
        return
    subsets = ("cuhk", "ar", "xm2vts") if dataset == "cufs" else ()
    found = {
        part: tuple(sum(_subset(pair.subset) == part for pair in half) for half in (train, test))
        for part in subsets
    }
    # Folders of all subsets together do not say which pair is of which: then the sums alone count.
    told = any(map(sum, found.values()))
    differ = told and any(found[part] != STANDARD[part] for part in subsets)
    if (len(train), len(test)) != standard or differ:
        each = ", ".join(f"{part} {STANDARD[part][0]} and {STANDARD[part][1]}" for part in subsets)
        warnings.warn(
            f"{dataset}: {len(train)} training and {len(test)} test pairs; the standard split has "
            f"{standard[0]} and {standard[1]}{f' ({each})' if each else ''}. Numbers are not comparable with "
            "the literature's.",
            stacklevel=3,
        )


def _folder(parent: Path, kind: str) -> Path | None:
    names = {"photo": ("photo", "photos"), "sketch": ("sketch", "sketches")}[kind]
    return next(
        (path for path in sorted(parent.iterdir()) if path.is_dir() and path.name.lower() in names), None
    )


def _part(root: Path, part: str) -> Path | None:
    return root / part if (root / part).is_dir() else None


# --- images -------------------------------------------------------------------------------------------


def load(pairs: list[Pair], alignment: Alignment, scale: float = 1.0) -> Pairs:
    """Read, check, align and scale. UserError names the file at fault."""
    photos, sketches = [], []
    for pair in progress(pairs, "pairs"):
        photo, sketch = read_pair(pair, alignment)
        if photo.shape[1:] == sketch.shape[1:] == (HEIGHT, WIDTH):
            both = torch.cat([photo, sketch])
        else:
            both = _to_frame(pair, photo, sketch, alignment)
        if scale != 1.0:
            size = (round(HEIGHT * scale), round(WIDTH * scale))
            both = F.interpolate(both[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        values = both.clamp(0, 1).mul(255).round().byte()
        photos.append(values[:3])
        sketches.append(values[3:])
    names = tuple(pair.name for pair in pairs)
    return Pairs(torch.stack(photos), torch.stack(sketches), names, torch.tensor([p.style for p in pairs]))


def read_pair(pair: Pair, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Photo (3, H, W) and sketch (1, H, W) in [0, 1] of one pair."""
    if pair.sketch is None:
        both = read_image(pair.photo)
        if both.shape[-1] % 2:
            raise UserError(f"{pair.photo}: {both.shape[-1]} columns do not halve into photo and sketch")
        photo, sketch = both.chunk(2, dim=-1)
        path = pair.photo
    else:
        photo, sketch, path = read_image(pair.photo), read_image(pair.sketch), pair.sketch
    chroma = float((sketch.amax(0) - sketch.amin(0)).mean())
    if chroma > COLOURED and alignment.colour == "error":
        raise UserError(
            f"{path}: the sketch is in colour (mean chroma {chroma:.2f}). If photos and sketches are not "
            "swapped, convert it with --alignment.colour grey"
        )
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return photo, (sketch * weights).sum(0, keepdim=True)


def _to_frame(pair: Pair, photo: Tensor, sketch: Tensor, alignment: Alignment) -> Tensor:
    sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (photo, sketch)]
    path = pair.photo
    if alignment.resize == "eyes":
        out = []
        for image, file, folder in (
            (photo, pair.photo, alignment.photo_landmarks),
            (sketch, pair.sketch or pair.photo, alignment.sketch_landmarks),
        ):
            eyes = read_eyes(_landmarks(file, folder), alignment.eye_points)
            out.append(align_to_eyes(image, eyes))
        return torch.cat(out)
    if photo.shape[1:] != sketch.shape[1:]:
        raise UserError(
            f"{path}: photo {sizes[0]} but sketch {sizes[1]} pixels, so they are not aligned; "
            "use --alignment.resize eyes with landmark files"
        )
    if alignment.resize == "error":
        raise UserError(
            f"{path}: {sizes[0]} pixels, expected {WIDTH}x{HEIGHT} with the eyes at {EYES[0]} and {EYES[1]}. "
            "Use --alignment.resize eyes with landmark files, or stretch for pairs that are aligned otherwise"
        )
    height, width = photo.shape[1:]
    if width > height:
        raise UserError(f"{path}: a landscape picture of {sizes[0]} would be squeezed; cut it to the face")
    both = torch.cat([photo, sketch])[None]
    return F.interpolate(both, (HEIGHT, WIDTH), mode="bilinear", antialias=True, align_corners=False)[0]


def _landmarks(file: Path, folder: Path | None) -> Path:
    folder = folder or file.parent
    for suffix in (".dat", ".pos", ".3pts", ".txt"):
        if (folder / f"{file.stem}{suffix}").is_file():
            return folder / f"{file.stem}{suffix}"
    raise UserError(f"{folder}: no landmark file {file.stem}.dat, .pos, .3pts or .txt for {file.name}")
