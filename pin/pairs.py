"""Verification pairs: drawn at random, from LFW's lists, from lists of files, from InsightFace's `.bin`."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pin.data import ImageFiles, TensorFaces, read_landmarks
from shared.runtime import UserError
from shared.weights import load_pickle

FOLDS = 10


@dataclass(frozen=True)
class Pairs:
    """Verification pairs: indices (P,) of first and second image in a set, same (P,) bool, fold (P,).

    people: (images of the set,), the person of each, where known.
    """

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor
    people: Tensor | None = None


def deal(same: Tensor, folds: int = FOLDS) -> Tensor:
    """A fold for each pair, both kinds dealt out in turn: same (P,) bool -> (P,).

    Fewer folds where one kind has fewer pairs than that, so that every fold holds both.
    """
    folds = max(min(folds, int(same.sum()), int((~same).sum())), 1)
    return (torch.where(same, same.cumsum(0), (~same).cumsum(0)) - 1) % folds


def random_pairs(labels: Tensor, same: int, different: int, seed: int) -> Pairs:
    """Distinct random pairs of images, `same` of one person and `different` of two, dealt out to the folds.

    All pairs (i, j > i) of a kind are numbered row by row and numbers are drawn, so that memory is taken by
    the pairs drawn and not by the possible ones. Raises UserError when the set has too few people or
    pictures.
    """
    generator = np.random.default_rng(seed)
    people = labels.numpy()
    _, person, pictures = np.unique(people, return_inverse=True, return_counts=True)
    order = np.argsort(person, kind="stable")
    earlier = np.empty(len(people), np.int64)  # pictures of the same person before each
    earlier[order] = np.arange(len(people)) - np.repeat(pictures.cumsum() - pictures, pictures)
    alike = pictures[person] - 1 - earlier  # pictures of the same person after each
    others = np.arange(len(people))[::-1] - alike
    first, second = [], []
    for wanted, partners, kind in ((same, alike, True), (different, others, False)):
        possible = int(partners.sum())
        if possible < wanted:
            raise UserError(f"{wanted} pairs wanted and only {possible} possible: give more images or people")
        number = generator.choice(possible, wanted, replace=False)
        ends = partners.cumsum()
        one = np.searchsorted(ends, number, side="right")
        for i, place in zip(one, number - (ends - partners)[one], strict=True):
            first.append(i)
            second.append(i + 1 + np.flatnonzero((people[i + 1 :] == people[i]) == kind)[place])
    equal = torch.arange(same + different) < same
    return Pairs(torch.tensor(first), torch.tensor(second), equal, deal(equal), labels)


def lfw_pairs(
    root: Path, pairs: Path | None = None, size: int = 112, landmarks: Path | None = None
) -> tuple[ImageFiles, Pairs]:
    """LFW: `root/<Name>/<Name>_0001.jpg` and its `pairs.txt` -> (ImageFiles, Pairs).

    The list's first line gives folds and pairs of each kind per fold (`pairs.txt`) or, alone, pairs of each
    kind (`pairsDevTrain.txt`, `pairsDevTest.txt`, dealt out to folds here); then come `name i j` (same) or
    `name i name2 j` (different). Also reads lists of `file1 file2 label` (MegaFace's form), files relative to
    root, without a first line. Raises UserError that names the line that cannot be read or where a list is
    too short or too long, and one that counts missing images instead of leaving pairs out.
    """
    source = pairs or root / "pairs.txt"
    try:
        text = source.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source}: pair list not readable ({error}); LFW's pairs.txt comes from vis-www.cs.umass.edu/lfw"
        ) from None
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    # A pair has three or four fields, all numbers when people are called by numbers.
    headed = bool(lines) and len(lines[0][1]) < 3 and all(field.isdecimal() for field in lines[0][1])
    header = [int(field) for field in lines.pop(0)[1]] if headed else []
    entries = [_pair(root, fields, f"{source}, line {number}") for number, fields in lines]
    if not entries:
        raise UserError(f"{source}: holds no pairs")
    folds, each = ([1, *header])[-2:] if headed else (1, len(entries))
    announced = 2 * folds * each if headed else len(entries)
    if len(entries) != announced:
        ends, last = ("ends too early", -1) if len(entries) < announced else ("is too long", announced)
        raise UserError(
            f"{source}, line {lines[last][0]}: the list {ends}: its first line announces {announced} pairs "
            f"and it holds {len(entries)}; get it anew"
        )
    index: dict[Path, int] = {}
    people: list[str | None] = []
    for one, two, _, names in entries:
        for path, name in zip((one, two), names, strict=True):
            if index.setdefault(path, len(index)) == len(people):
                people.append(name)
    missing = [path for path in index if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(index)} images of {source} are missing, the first is {missing[0]}; "
            f"expected {root}/<Name>/<Name>_0001.jpg"
        )
    same = torch.tensor([entry[2] for entry in entries])
    fold = torch.arange(len(entries)) // (2 * each) if folds > 1 else deal(same)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(people))}
    known = None if None in numbers else torch.tensor([numbers[name] for name in people])
    files = ImageFiles(list(index), [-1] * len(index), size, landmarks and read_landmarks(landmarks))
    first = torch.tensor([index[entry[0]] for entry in entries])
    second = torch.tensor([index[entry[1]] for entry in entries])
    return files, Pairs(first, second, same, fold, known)


def _pair(
    root: Path, fields: list[str], place: str
) -> tuple[Path, Path, bool, tuple[str | None, str | None]]:
    """(first file, second file, same, the two people where the line names them) of a line's fields."""

    def lfw(name: str, number: str) -> Path:
        files = [root / name / f"{name}_{int(number):04d}{ending}" for ending in (".jpg", ".png")]
        return next((file for file in files if file.is_file()), files[0])

    if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
        return lfw(fields[0], fields[1]), lfw(fields[0], fields[2]), True, (fields[0], fields[0])
    if len(fields) == 4 and fields[1].isdecimal() and fields[3].isdecimal():
        return lfw(fields[0], fields[1]), lfw(fields[2], fields[3]), False, (fields[0], fields[2])
    if len(fields) == 3 and fields[2] in ("0", "1"):
        return root / fields[0], root / fields[1], fields[2] == "1", (None, None)
    raise UserError(
        f"{place}: cannot read the pair {' '.join(fields)!r}; expected 'name i j', 'name i name2 j' or "
        f"'file1 file2 label'"
    )


def insightface_bin(path: Path, size: int = 112) -> tuple[TensorFaces, Pairs]:
    """CFP-FP, AgeDB-30, CALFW, CPLFW, LFW as InsightFace's `.bin`: JPEG bytes 2i and 2i + 1 form pair i."""
    arrays = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
    arrays |= {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
    content = load_pickle(path, allowed={"_codecs.encode", "numpy.ndarray", "numpy.dtype", *arrays})
    if not (
        isinstance(content, (tuple, list)) and len(content) == 2 and len(content[0]) == 2 * len(content[1])
    ):
        raise UserError(f"{path}: no InsightFace .bin, which holds a list of images and half as many answers")
    images = []
    for number, data in enumerate(content[0]):
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        decoded = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
        if decoded is None:
            raise UserError(f"{path}: image {number} is damaged")
        picture = Image.fromarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        images.append(
            torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32))[None].div(127.5).sub(1)
        )
    same = torch.tensor([bool(answer) for answer in content[1]])
    first = torch.arange(0, len(images), 2)
    faces = TensorFaces(torch.stack(images), torch.full((len(images),), -1))
    return faces, Pairs(first, first + 1, same, deal(same))
