"""Public sets of faces with captions, in the layouts that their projects ship, and the codes of the faces.

Four layouts, recognised by what lies under the root: Multi-Modal CelebA-HQ, CelebAText-HQ (as SEA-T2F reads
it), the folders of captions of AnyFace's release, and the picture list of its successor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from anyface.captions import celeba_captions, read_attributes
from shared.io import progress, read_image
from shared.records import write_tensors
from shared.runtime import UserError
from shared.weights import load_pickle, load_torch

Part = Literal["train", "test"]
Layout = Literal["auto", "mm-celeba-hq", "celebatext-hq", "anyface", "face-list"]

PER_FACE = 10
"""Captions kept of each face, as SEA-T2F does."""

LAYOUTS = {
    "mm-celeba-hq": """Multi-Modal CelebA-HQ (github.com/IIGROUP/MM-CelebA-HQ-Dataset; for research):
  train/filenames.pickle, test/filenames.pickle      (any one pickle of names in each)
  image/0.jpg ..., text/0.txt or celeba-caption/0.txt ...   (ten captions, one a line)""",
    "celebatext-hq": """CelebAText-HQ (github.com/cripac-sjx/SEA-T2F):
  captions/0.txt ..., CelebAimg/0.jpg ...            (pictures from CelebAMask-HQ)
  data_flist/train.flist, data_flist/test.flist      (a path a line)""",
    "anyface": """the layout of AnyFace's release:
  data/train_caps/0.txt ..., data/test_caps/0.txt ... (or train_caps2, test_caps2); optional images/0.jpg""",
    "face-list": """the picture list of AnyFace++:
  data_all/face.txt                                  (a relative picture path a line)
  latents_all/PATH.pt, captions_all/PATH.txt         (beside every picture PATH.jpg)""",
}
PICTURES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class FaceTexts:
    """Faces of one part of a set.

    names: file stem or relative path of each face without its ending; pictures: its file, None where the
    layout has none; captions: at least one each.
    """

    title: str
    names: list[str]
    pictures: list[Path | None]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> "FaceTexts":
        """The first `count` faces."""
        return FaceTexts(self.title, self.names[:count], self.pictures[:count], self.captions[:count])

    def picture(self, i: int, size: int) -> Tensor:
        """(3, size, size) in [-1, 1]. UserError when the set has no pictures or this one is damaged."""
        if self.pictures[i] is None:
            raise UserError(
                f"{self.title}: no picture of face {self.names[i]}; expected\n{LAYOUTS['anyface']}"
            )
        image = read_image(self.pictures[i])
        if tuple(image.shape[-2:]) != (size, size):
            image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
        return image.clamp(0, 1) * 2 - 1


def find_layout(root: Path) -> str:
    """Which of the four layouts lies under `root`. UserError that lists all when none does."""
    marks: dict[str, Callable[[Path], bool]] = {
        "face-list": lambda r: (r / "data_all" / "face.txt").is_file(),
        "celebatext-hq": lambda r: (r / "data_flist").is_dir(),
        "anyface": lambda r: _caption_folder(r, "train") is not None,
        "mm-celeba-hq": lambda r: (r / "train").is_dir() and (r / "image").is_dir(),
    }
    for name, here in marks.items():
        if here(root):
            return name
    known = "\n".join(LAYOUTS.values())
    raise UserError(f"{root}: no face and caption set recognised there; known layouts are\n{known}")


def open_set(root: Path | None, part: Part, layout: Layout = "auto") -> FaceTexts:
    """Faces and captions under `root`. UserError on a missing path, file or caption, naming it."""
    if root is None or not root.is_dir():
        raise UserError(
            f"--data-root {root}: no such folder; known layouts are\n" + "\n".join(LAYOUTS.values())
        )
    name = find_layout(root) if layout == "auto" else layout
    readers = {
        "mm-celeba-hq": _mm_celeba_hq,
        "celebatext-hq": _celebatext_hq,
        "anyface": _anyface,
        "face-list": _face_list,
    }
    found = readers[name](root, part)
    if not len(found):
        raise UserError(f"{root}: the {part} part is empty; expected\n{LAYOUTS[name]}")
    return found


def read_captions(path: Path) -> list[str]:
    """One caption a line, blank lines skipped, the first ten. UserError when there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such caption file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path}: holds no caption")
    return lines[:PER_FACE]


def _find_picture(folder: Path, name: str) -> Path:
    for ending in PICTURES:
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise UserError(f"{folder}: no picture {name}.jpg (or .png)")


def _collect(title: str, names: Sequence[str], pictures: Path, texts: Path) -> FaceTexts:
    return FaceTexts(
        title,
        list(names),
        [_find_picture(pictures, name) for name in names],
        [read_captions(texts / f"{name}.txt") for name in names],
    )


def _mm_celeba_hq(root: Path, part: Part) -> FaceTexts:
    lists = sorted(path for path in (root / part).glob("*") if path.suffix in (".pickle", ".pkl"))
    if not lists:
        raise UserError(f"{root / part}: no pickle of file names; expected\n{LAYOUTS['mm-celeba-hq']}")
    stored = load_pickle(lists[0])  # a list of strings names no class, so nothing is allowed
    if not isinstance(stored, (list, tuple)) or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{lists[0]}: expected a list of file names")
    names = [Path(name).stem for name in stored]
    texts = next((root / n for n in ("text", "celeba-caption") if (root / n).is_dir()), None)
    if texts is None:
        raise UserError(f"{root}: neither text/ nor celeba-caption/; expected\n{LAYOUTS['mm-celeba-hq']}")
    return _collect("Multi-Modal CelebA-HQ", names, root / "image", texts)


def _read_list(path: Path, layout: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such list; expected\n{LAYOUTS[layout]}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _celebatext_hq(root: Path, part: Part) -> FaceTexts:
    # SEA-T2F takes the fourth component of each path, the file name; the last one is the same there.
    path = root / "data_flist" / f"{part}.flist"
    lines = _read_list(path, "celebatext-hq")
    names = [Path(line).stem for line in lines]
    if (root / "captions").is_dir():
        return _collect("CelebAText-HQ", names, root / "CelebAimg", root / "captions")
    # Without the manual captions, captions are made from CelebA's attributes, and the title says so.
    attributes = read_attributes(root / "CelebAMask-HQ-attribute-anno.txt")
    odd = next((name for name in names if not name.isdecimal()), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} is no number of CelebA-HQ")
    missing = next((name for name in names if name not in attributes), None)
    if missing is not None:
        raise UserError(f"{root / 'CelebAMask-HQ-attribute-anno.txt'}: no line for {missing}.jpg")
    captions = [celeba_captions(attributes[name], PER_FACE, seed=int(name)) for name in names]
    pictures = [_find_picture(root / "CelebAimg", name) for name in names]
    return FaceTexts("CelebA-HQ, captions made from attributes", names, pictures, captions)


def _caption_folder(root: Path, part: Part) -> Path | None:
    places = [base / f"{part}_caps{ending}" for base in (root / "data", root) for ending in ("", "2")]
    return next((place for place in places if place.is_dir()), None)


def _anyface(root: Path, part: Part) -> FaceTexts:
    folder = _caption_folder(root, part)
    if folder is None:
        raise UserError(f"{root}: no folder data/{part}_caps; expected\n{LAYOUTS['anyface']}")
    names = sorted((path.stem for path in folder.glob("*.txt") if path.stem.isdigit()), key=int)
    captions = [read_captions(folder / f"{name}.txt") for name in names]
    images = root / "images"
    pictures = [_find_picture(images, name) if images.is_dir() else None for name in names]
    return FaceTexts("captions in AnyFace's layout", names, pictures, captions)


def _face_list(root: Path, part: Part) -> FaceTexts:
    lines = _read_list(root / "data_all" / "face.txt", "face-list")
    # The list has no split of its own: every tenth face tests.
    lines = [line for i, line in enumerate(lines) if (i % 10 == 9) == (part == "test")]
    names = [str(Path(line).with_suffix("")) for line in lines]
    pictures = [root / "data_all" / line for line in lines]
    missing = next((path for path in pictures if not path.is_file()), None)
    if missing:
        raise UserError(f"{root / 'data_all' / 'face.txt'}: names {missing}, which is not there")
    captions = [read_captions(root / "captions_all" / f"{name}.txt") for name in names]
    return FaceTexts("picture list in AnyFace++'s layout", names, pictures, captions)


# --- codes of the faces -------------------------------------------------------------------------------


def write_codes(path: Path, names: Sequence[str], codes: Tensor) -> None:
    """Codes (N, L, D) with the names of their faces, as one safetensors file."""
    joined = "\n".join(names)
    if len(names) != len(codes) or len(set(names)) != len(names):
        raise ValueError("one distinct name for each code")
    write_tensors(path, {"codes": codes}, {"names": joined})


def read_codes(path: Path | None, names: Sequence[str], root: Path | None = None) -> Tensor:
    """Codes (len(names), L, D) float32 of the faces `names`.

    path: a file of `write_codes`; or AnyFace's `latents.pt`, (N, L, D), whose row is the number that a face
    is called by; None looks for codes.safetensors, latents.pt and latents_all/ under `root`. UserError when
    a face has no code.
    """
    if path is None and root is not None:
        here = [root / n for n in ("codes.safetensors", "latents.pt", "data/latents.pt", "latents_all")]
        path = next((p for p in here if p.exists()), None)
    if path is None or not path.exists():
        raise UserError(
            f"codes of the faces: {path or 'none found'}; `python -m anyface.codes` makes codes.safetensors "
            "from the pictures, or from latents.pt and a list of file names"
        )
    if path.is_dir():
        files = [path / f"{name}.pt" for name in names]
        return torch.stack([_one_code(file) for file in progress(files, "codes")])
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                known = {name: i for i, name in enumerate((file.metadata() or {})["names"].split("\n"))}
                stored = file.get_tensor("codes")
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: damaged, or not written by `python -m anyface.codes` ({error})"
            ) from None
    else:
        stored = load_torch(path)
        if not isinstance(stored, Tensor) or stored.ndim != 3:
            raise UserError(f"{path}: expected one tensor of codes (N, L, D)")
        known = {str(i): i for i in range(len(stored))}
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"{path}: no code of face {missing[0]} (and of {len(missing) - 1} more)")
    return stored[torch.tensor([known[name] for name in names])].float()


def _one_code(path: Path) -> Tensor:
    code = load_torch(path)
    if not isinstance(code, Tensor) or code.squeeze(0).ndim != 2:
        raise UserError(f"{path}: expected one code (L, D)")
    return code.squeeze(0).float()


def choose_captions(
    counts: Sequence[int],
    faces: np.ndarray,
    draws: np.ndarray,
    seed: int,
    choice: Literal["sample", "id"],
    ids: np.ndarray | None = None,
) -> np.ndarray:
    """Which caption of each face a draw uses.

    counts: captions of every face of the set; faces: their rows in it. sample: uniformly, a pure function of
    (seed, draw). id: the number that the face is called by (ids, of every face; None: its row) modulo the
    count, the released trainer's only caption of a face.
    """
    counts = np.asarray(counts)[faces]
    if choice == "id":
        return (faces if ids is None else ids[faces]) % counts
    # A hash of the draw's number: the same whatever process or batch the draw falls into.
    start = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (np.asarray(draws, np.uint64) + start) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(29)
    return ((mixed >> np.uint64(11)) % counts.astype(np.uint64)).astype(np.int64)
