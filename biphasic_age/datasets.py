"""Public face sets with ages in their public layouts: MORPH, CACD, UTKFace, FFHQ-Aging, FG-NET; CSV lists.

Ages, people and sex come from the file names (FFHQ-Aging: from its label file). Pictures are expected aligned
by the eyes and cropped with some hair and chin; layouts in `parsing/` beside them.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from biphasic_age.layouts import CLASSES, from_celebamask, resize_labels
from shared.io import find_images, read_image
from shared.runtime import UserError

Part = Literal["train", "test"]
LayoutOrder = Literal["bisenet", "celebamask"]
FOLDS = 5


@dataclass(frozen=True)
class Record:
    """One picture of a set."""

    path: Path
    age: float
    """Years; of FFHQ-Aging the middle of the labelled range."""
    identity: str
    """Name of the person; of sets without people the picture itself."""
    sex: str = ""
    """M, F, or empty when unknown."""
    layout: Path | None = None
    """Label map given in a CSV list."""


@dataclass(frozen=True)
class Source:
    """A public set: where its pictures lie, what their names say, how many there are."""

    pattern: str
    """Regular expression of a file name, with groups `age` and, where known, `identity` and `sex`."""
    example: str
    """One file name, for messages."""
    where: str
    """Where to get it."""
    images: int | None
    """Published number of pictures; all counts are recalled, not re-read."""
    people: int | None
    """Published number of people; None when the set does not say who is who."""
    sexes: tuple[str, str] = ("M", "F")
    """How the name writes male and female."""


SOURCES: dict[str, Source] = {
    "morph": Source(
        r"(?P<identity>\d+)_(?P<number>\d+)(?P<sex>[MF])(?P<age>\d{1,3})$", "009055_1M54.JPG",
        "MORPH Album 2, by licence from UNCW", 55_134, 13_617,
    ),
    "cacd": Source(
        r"(?P<age>\d{1,3})_(?P<identity>.+)_(?P<number>\d+)$", "40_Charlotte_Gainsbourg_0011.jpg",
        "CACD, bcsiriuschen.github.io/CARC", 163_446, 2_000,
    ),
    "utkface": Source(
        r"(?P<age>\d{1,3})_(?P<sex>[01])_(?:[0-4]_)?(?P<number>\d{8,})\D*$",
        "25_0_1_20170116174525125.jpg.chip.jpg", "UTKFace, susanqq.github.io/UTKFace (aligned and cropped)",
        23_708, None, ("0", "1"),
    ),
    "fgnet": Source(
        r"(?P<identity>\d{3})[Aa](?P<age>\d{2})[A-Za-z]?$", "046A10.JPG", "FG-NET", 1_002, 82
    ),
}  # fmt: skip
"""Sets whose file names carry the ages. UTKFace: some names lack the race, or end in
`.pg.chip`, `jpg.chip` or ` .jpg.chip`; what is needed here stands in all."""

FFHQ_WHERE = """expected under the root: ffhq_aging_labels.csv (columns image_number, age_group, gender, ...)
and the pictures as 00000.png or 00000/00000.png, directly or in a folder such as ffhq_aging256x256. Get them
with github.com/royorel/FFHQ-Aging-Dataset (layout recalled, not re-read)"""


def read_source(name: str, root: Path) -> list[Record]:
    """All pictures of a set of `SOURCES` below `root`, in order of their names.

    Raises UserError when the folder or its pictures are missing, and for a picture whose name does not tell
    the age.
    """
    source = SOURCES[name]
    records = []
    for path in _pictures(root, name, f"names like {source.example}; {source.where}"):
        found = re.match(source.pattern, path.stem, re.IGNORECASE)
        if found is None:
            raise UserError(
                f"{path}: the name does not tell the age; {name} names look like {source.example}. "
                "Rename or remove it, or list the pictures in a CSV file (path,age,identity)"
            )
        said = found.groupdict()
        sex = dict(zip(source.sexes, "MF", strict=True)).get((said.get("sex") or "").upper(), "")
        # A set without names of people: every picture is a person.
        records.append(Record(path, float(said["age"]), said.get("identity") or path.name, sex))
    return records


def read_ffhq_aging(root: Path) -> list[Record]:
    """FFHQ-Aging: the age is the middle of its labelled range (e.g. 20-29 gives 24.5). Raises UserError when
    the label file or a picture that it lists is missing, or when a picture is there twice (in two sizes)."""
    labels = root / "ffhq_aging_labels.csv"
    if not labels.is_file():
        raise UserError(f"FFHQ-Aging: no file {labels}; {FFHQ_WHERE}")
    found, records = {}, []
    for path in _pictures(root, "FFHQ-Aging", FFHQ_WHERE):
        if path.stem.isdigit() and found.setdefault(int(path.stem), path) != path:
            other = found[int(path.stem)]
            raise UserError(
                f"FFHQ-Aging: picture {int(path.stem)} is there twice: {other} and {path}; keep one"
            )
    for line, row in _rows(labels, ("image_number", "age_group")):
        number, limits = row["image_number"], re.fullmatch(r"(\d+)-(\d+)", row["age_group"].strip())
        if not number.isdigit() or limits is None:
            raise UserError(f"{labels}, line {line}: expected a picture number and a range such as 20-29")
        if int(number) not in found:
            raise UserError(f"{labels}, line {line}: picture {number} is not there; {FFHQ_WHERE}")
        age = (int(limits[1]) + int(limits[2])) / 2
        sex = {"male": "M", "female": "F"}.get((row.get("gender") or "").strip().lower(), "")
        records.append(Record(found[int(number)], age, number, sex))
    return records


def read_list(path: Path) -> list[Record]:
    """A CSV list with the heading path,age,identity and optionally layout and sex; paths relative to it.

    Raises UserError with the line for a missing column, picture or layout, for an age that is no number and
    for a sex that is neither M nor F.
    """
    if not path.is_file():
        raise UserError(f"--list: no file {path}; expected CSV with the heading path,age,identity")
    records = []
    for line, row in _rows(path, ("path", "age", "identity")):
        picture = path.parent / row["path"]
        layout = path.parent / row["layout"] if row.get("layout") else None
        missing = next((p for p in (picture, layout) if p is not None and not p.is_file()), None)
        if missing is not None:
            raise UserError(f"{path}, line {line}: no file {missing}")
        try:
            age = float(row["age"])
        except ValueError:
            age = -1.0
        if not 0 <= age <= 130:
            raise UserError(f"{path}, line {line}: age {row['age']!r} is not a number of years (0 to 130)")
        sex = (row.get("sex") or "").strip().upper()
        if sex not in ("", "M", "F"):
            raise UserError(f"{path}, line {line}: sex {row['sex']!r} is neither M nor F nor empty")
        records.append(Record(picture, age, row["identity"], sex, layout))
    if not records:
        raise UserError(f"{path}: lists no picture")
    return records


def _rows(path: Path, columns: Sequence[str]):
    """Lines of a CSV file with their numbers; UserError when it is no such file in UTF-8, when a column is
    missing or a line is short."""
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8 ({error})") from None
    reader = csv.DictReader(io.StringIO(text))
    absent = [name for name in columns if name not in (reader.fieldnames or [])]
    if absent:
        raise UserError(f"{path}: no column {absent[0]}; expected the heading {','.join(columns)}")
    for row in reader:
        if any(row[name] is None or row[name] == "" for name in columns):
            raise UserError(f"{path}, line {reader.line_num}: {','.join(columns)} must all be given")
        yield reader.line_num, row


def _pictures(root: Path, name: str, hint: str) -> list[Path]:
    """Picture files below a folder, without those in `parsing`, sorted. UserError when there are none."""
    if not root.is_dir():
        raise UserError(f"{name}: no folder {root}; expected {hint}")
    files = [p for p in find_images(root) if "parsing" not in p.relative_to(root).parts]
    if not files:
        raise UserError(f"{name}: no pictures in {root}; expected {hint}")
    return files


def split(records: Sequence[Record], fold: int, part: Part, folds: int = FOLDS) -> list[Record]:
    """Five-fold cross-validation without a person on both sides; fold (1 to `folds`) is the tested one.

    Folds have about equally many pictures and do not depend on the order of `records`. Pictures come in an
    order that says nothing of age and person, so that the first few are a fair sample. UserError when there
    are fewer people than folds.
    """
    if not 1 <= fold <= folds:
        raise UserError(f"--fold {fold}: there are folds 1 to {folds}")
    people = sorted({record.identity for record in records})
    if len(people) < folds:
        raise UserError(f"{len(people)} people are too few for {folds} folds that share nobody")
    ordered = sorted(records, key=lambda record: str(record.path))
    number = {name: i for i, name in enumerate(people)}
    groups = np.array([number[record.identity] for record in ordered])
    from sklearn.model_selection import GroupKFold  # takes a second

    pairs = list(GroupKFold(folds).split(groups, groups=groups))
    chosen = [ordered[i] for i in pairs[fold - 1][0 if part == "train" else 1]]
    return sorted(chosen, key=lambda record: hashlib.sha256(record.path.name.encode()).digest())


def layout_file(record: Record, root: Path) -> Path:
    """Where the layout of a picture lies: as the list says, otherwise <root>/parsing/<stem>.png."""
    return record.layout or root / "parsing" / f"{record.path.stem}.png"


def read_labels(path: Path) -> Tensor:
    """An 8-bit label map -> (H, W) uint8; of a picture with a palette its numbers, not its colours.

    Raises UserError on a damaged file, another kind of picture, or something else than labels of 19 classes.
    """
    try:
        with Image.open(path) as opened:
            mode, labels = opened.mode, torch.from_numpy(np.array(opened))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable label map ({error}); remove or replace it") from None
    if mode not in ("L", "P"):
        raise UserError(f"{path}: a layout is an 8-bit label map, this is a {mode} picture")
    if int(labels.max()) >= len(CLASSES):
        raise UserError(f"{path}: holds the value {int(labels.max())}; labels are 0 to {len(CLASSES) - 1}")
    return labels


def read_layout(path: Path, size: int, order: LayoutOrder = "bisenet") -> Tensor:
    """An 8-bit label map -> (size, size) uint8 in BiSeNet's order, resized by nearest neighbour.

    Raises UserError when it is missing or no such map (`read_labels`).
    """
    if not path.is_file():
        raise UserError(
            f"no layout {path}; layouts are 8-bit label maps of 19 classes with the geometry of the aligned "
            "picture: `python parse.py FOLDER --parser-weights 79999_iter.pth` writes them"
        )
    labels = resize_labels(read_labels(path)[None], (size, size))[0]
    return from_celebamask(labels) if order == "celebamask" else labels


def read_parts(folder: Path, picture: Path) -> Tensor:
    """The label map (H, W) uint8, in BiSeNet's order, of a picture of CelebAMask-HQ: its part files (those of
    2,000 pictures in a folder: 1/02001_skin.png) on top of each other in that order.

    UserError when the picture has no part files, or its name is no number.
    """
    number = int(picture.stem) if picture.stem.isdigit() else -1
    place, labels = folder / str(max(number, 0) // 2000), None
    for label, name in enumerate(CLASSES):
        path = place / f"{number:05d}_{name}.png"
        if path.is_file():
            part = read_image(path, "L")[0] > 0  # 255, but another value where a tool has saved it anew
            labels = torch.zeros(part.shape, dtype=torch.uint8) if labels is None else labels
            labels[part] = label
    if labels is None:
        raise UserError(
            f"{picture}: no part files of it, like {place / f'{max(number, 0):05d}_skin.png'}; --masks is "
            "the folder CelebAMask-HQ-mask-anno, and pictures are named 0.jpg, 1.jpg ..."
        )
    return labels


READERS: dict[str, Callable[[Path], list[Record]]] = {
    **{name: (lambda root, name=name: read_source(name, root)) for name in SOURCES},
    "ffhq-aging": read_ffhq_aging,
    "csv": read_list,
}
"""Name of a set -> function of its folder (for `csv`: of the file)."""


def with_layouts(records: Sequence[Record], root: Path) -> list[Record]:
    """The records with the places of their layouts filled in. UserError for the first that is missing, and
    for two pictures of one name whose layouts no list tells apart."""
    placed, owners = [], {}
    for record in records:
        layout = layout_file(record, root)
        if record.layout is None and owners.setdefault(layout, record.path) != record.path:
            raise UserError(
                f"{owners[layout]} and {record.path} would share the layout {layout.name}; rename one, or "
                "name their layouts in a CSV file (path,age,identity,layout)"
            )
        if not layout.is_file():
            read_layout(layout, 1)  # raises the message
        placed.append(replace(record, layout=layout))
    return placed


def summary(name: str, records: Sequence[Record], groups: Tensor, names: Sequence[str]) -> str:
    """A line on what was found, beside the published counts: pictures, people, pictures in each age group."""
    people = len({record.identity for record in records})
    counts = torch.bincount(groups, minlength=len(names)).tolist()
    found = ", ".join(f"{group}: {count:,}" for group, count in zip(names, counts, strict=True))
    source = SOURCES.get(name)
    line = f"{name}: {len(records):,} pictures of {people:,} people; {found}"
    if source and source.images:
        whole = f"{source.images:,} pictures" + (f" of {source.people:,} people" if source.people else "")
        line += f" (the whole set: about {whole})"
    return line
