"""Images of persons, data sets of them, and a CSV manifest for the user's own cameras."""

import csv
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from shared.runtime import UserError

DISTRACTOR = 0
"""Identity of gallery images that belong to nobody; no query has it."""


@dataclass(frozen=True)
class Item:
    """One image of one person."""

    path: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class Split:
    """A test: who is looked for, and where."""

    query: list[Item]
    gallery: list[Item]


@dataclass(frozen=True)
class ReID:
    """A data set: training images, and test splits (none for sets that only train)."""

    name: str
    train: list[Item]
    splits: list[Split] = field(default_factory=list)

    def everything(self) -> list[Item]:
        """Training and test images together, for protocols that train on all; distractors left out."""
        test = [item for split in self.splits[:1] for item in split.query + split.gallery]
        return self.train + [item for item in test if item.identity != DISTRACTOR]


def find_folder(root: Path, name: str, layout: str, where: str, *candidates: str) -> Path:
    """The first of the candidate folders that is there. UserError says where the set comes from."""
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    looked = " or ".join(str(root / candidate) for candidate in candidates)
    raise UserError(f"{name}: no folder {looked}. Get it from {where} and lay it out as {layout}")


def matching(folder: Path, patterns: Iterable[str], name: str) -> list[Path]:
    """Sorted files of a folder. Raises UserError when there are none."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not paths:
        raise UserError(f"{name}: no images ({', '.join(patterns)}) in {folder}")
    return paths


def parse_name(path: Path, pattern: re.Pattern, name: str) -> tuple[int, ...]:
    """Numbers in a file name. Raises UserError when it is not named as expected."""
    found = pattern.search(path.name)
    if not found:
        raise UserError(f"{name}: {path} is not named as expected ({pattern.pattern}); remove or rename it")
    return tuple(map(int, found.groups()))


NOT_MATLAB = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MatReadError, zlib.error)
"""What `loadmat` stumbles over in a damaged file."""


def read_mat(path: Path, name: str) -> dict:
    """Variables of a MATLAB file (before 7.3). Raises UserError when it is not readable."""
    try:
        return loadmat(path)
    except NOT_MATLAB as error:
        raise UserError(f"{name}: {path} is not readable as a MATLAB file ({error})") from None


def manifest(path: Path) -> dict[str, list[Item]]:
    """The user's own images: a CSV with the columns path, id, camera, domain -> items of each domain.

    Relative paths start at the CSV's folder; ids and cameras are any text, an id counts within its domain.
    UTF-8, with or without a byte order mark. Raises UserError on a missing file, column, value or image,
    naming the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; expected a CSV with the columns path, id, camera, domain")
    numbers: dict[tuple, dict[str, int]] = {}
    domains: dict[str, list[Item]] = {}
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        missing = {"path", "id", "camera", "domain"} - set(rows.fieldnames or ())
        if missing:
            raise UserError(f"{path}: no column {', '.join(sorted(missing))}; found {rows.fieldnames}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            values = {key: (row[key] or "").strip() for key in ("path", "id", "camera", "domain")}
            empty = [key for key, value in values.items() if not value]
            if empty:
                raise UserError(f"{where}: {', '.join(empty)} is empty")
            image = path.parent / values["path"]
            if not image.is_file():
                raise UserError(f"{where}: no image {image}")
            domain = values["domain"]
            ids, cameras = numbers.setdefault((domain, "id"), {}), numbers.setdefault((domain, "camera"), {})
            identity = ids.setdefault(values["id"], len(ids) + 1)
            camera = cameras.setdefault(values["camera"], len(cameras))
            domains.setdefault(domain, []).append(Item(image, identity, camera))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.reader.line_num}: not readable as CSV ({error}); mend it"
        ) from None
    if not domains:
        raise UserError(f"{path}: no rows")
    return domains
