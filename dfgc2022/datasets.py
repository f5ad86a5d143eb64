"""The public sets in the layouts of their releases.

A public set is a list of `Video`s, which extract.py turns into crop folders and a list; the test set is a
list of `protocol.Clip`s with their paths.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dfgc2022.data import CropFolder
from dfgc2022.protocol import PARTS, Clip
from shared.io import VIDEO_ENDINGS, find_images, read_utf8
from shared.records import read_json
from shared.runtime import UserError

FF_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "FaceShifter", "NeuralTextures")


@dataclass(frozen=True)
class Video:
    """A labelled video of a public set."""

    path: Path
    label: int
    """0 real, 1 fake."""
    source: str
    """Set and method, e.g. FaceForensics++/Deepfakes/c23."""
    split: str = ""
    """train, val or test, where the release says so."""
    people: tuple[str, ...] = ()
    """Whom it shows, by the set's own names: of a fake the target and the donor. Where a set does not name
    people, the recording that a fake was made from stands for its person.
    """


def faceforensics(root: Path, compression: str = "c23", methods: Sequence[str] = FF_METHODS) -> list[Video]:
    """FaceForensics++: `original_sequences/youtube/<c>/videos/`,
    `manipulated_sequences/<method>/<c>/videos/`, and the official `splits/{train,val,test}.json` where
    present. DeepFakeDetection is a method with reals of its own, `original_sequences/actors`. Methods that
    are not there are named in a warning; UserError when all are absent.
    """
    here = [method for method in methods if (root / "manipulated_sequences" / method).is_dir()]
    if here and len(here) < len(methods):
        absent = ", ".join(method for method in methods if method not in here)
        print(f"warning: {root}: goes without {absent}, no folder of manipulated_sequences/")
    methods = here or methods
    splits = {}
    for split in ("train", "val", "test"):
        path = root / "splits" / f"{split}.json"
        pairs = read_json(path, "pairs of names of videos", _pairs) if path.exists() else []
        for pair in pairs:
            splits |= {name: split for name in (*pair, "_".join(pair), "_".join(pair[::-1]))}
    places = []
    if set(methods) != {"DeepFakeDetection"}:
        places.append((root / "original_sequences" / "youtube", 0, "original"))
    if "DeepFakeDetection" in methods:
        places.append((root / "original_sequences" / "actors", 0, "actors"))
    places += [(root / "manipulated_sequences" / method, 1, method) for method in methods]
    videos = []
    for place, label, method in places:
        for path in _videos(place / compression / "videos", "FaceForensics++"):
            source = f"FaceForensics++/{method}/{compression}"
            people = tuple(path.stem.split("__")[0].split("_"))  # 000_003, 01_02__walking__ABC
            videos.append(Video(path, label, source, splits.get(path.stem, ""), people))
    return videos


def celeb_df(root: Path) -> list[Video]:
    """Celeb-DF v2: `Celeb-real/`, `YouTube-real/`, `Celeb-synthesis/` and `List_of_testing_videos.txt`,
    whose label 1 means real.
    """
    listing = root / "List_of_testing_videos.txt"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; it comes with Celeb-DF v2")
    lines = read_utf8(listing, "a list of videos").splitlines()
    testing = {line.split()[1] for line in lines if len(line.split()) == 2}
    videos = []
    for name, label in (("Celeb-real", 0), ("YouTube-real", 0), ("Celeb-synthesis", 1)):
        for path in _videos(root / name, "Celeb-DF v2"):
            split = "test" if f"{name}/{path.name}" in testing else "train"
            people = tuple(part for part in path.stem.split("_") if part.startswith("id"))  # id0_id1_0000
            videos.append(Video(path, label, f"Celeb-DF-v2/{name}", split, people or (path.stem,)))
    return videos


def dfdc(root: Path) -> list[Video]:
    """DFDC: `dfdc_train_part_k/` with videos and metadata.json."""
    folders = sorted(root.glob("dfdc_train_part_*"))
    if not folders:
        raise UserError(f"{root}: no dfdc_train_part_* here; get DFDC from its Kaggle page")
    videos = []
    for folder in folders:
        for name, (label, original) in _dfdc_labels(folder).items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: named in metadata.json but not there")
            videos.append(Video(path, label, f"DFDC/{folder.name}", "train", (original,)))
    return videos


def _dfdc_labels(folder: Path) -> dict[str, tuple[int, str]]:
    """metadata.json of a part: name of a video -> 1 for a fake, otherwise 0, and the name of the recording
    that it was made from, or is.
    """
    path = folder / "metadata.json"
    entries = read_json(path, "DFDC's labels", lambda found: dict(found.items()))
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("label") not in ("FAKE", "REAL"):
            raise UserError(f"{path}: {name} has no label FAKE or REAL")
    return {
        name: (int(entry["label"] == "FAKE"), str(entry.get("original") or name))
        for name, entry in entries.items()
    }


def dfdc_crops(root: Path, parts: range = range(50)) -> tuple[list[CropFolder], int]:
    """Crop folders `dfdc_train_part_k/<name>.mp4/` under DFDC's own metadata.json, and the number without
    crops. Says how many parts are absent; UserError when all are.
    """
    found, empty = [], 0
    folders = [root / f"dfdc_train_part_{part}" for part in parts]
    here = [folder for folder in folders if folder.is_dir()]
    for folder in here:
        for name, (label, original) in _dfdc_labels(folder).items():
            if next((folder / name).glob("*.png"), None) is None:
                empty += 1
            else:
                found.append(CropFolder(folder / name, label, (original,)))
    if not found:
        raise UserError(f"{root}: no crops in dfdc_train_part_0 ... dfdc_train_part_49")
    if len(here) < len(folders):
        print(f"warning: {root}: {len(folders) - len(here)} of {len(folders)} parts of DFDC are not there")
    return found, empty


def deeperforensics(root: Path, method: str = "end_to_end_mix_4_distortions") -> list[Video]:
    """DeeperForensics-1.0: `manipulated_videos/<method>/`, `source_videos/**` and
    `lists/splits/{train,val,test}.txt` where present.
    """
    splits = {}
    for split in ("train", "val", "test"):
        path = root / "lists" / "splits" / f"{split}.txt"
        if path.exists():
            lines = read_utf8(path, "a list of videos").splitlines()
            splits |= {Path(line.strip()).name: split for line in lines if line.strip()}
    fakes = _videos(root / "manipulated_videos" / method, "DeeperForensics-1.0")
    videos = []
    for path in _videos(root / "source_videos", "DeeperForensics-1.0"):
        actor = path.relative_to(root / "source_videos").parts[0]  # M101/light_up/...
        videos.append(Video(path, 0, "DeeperForensics/source", people=(Path(actor).stem,)))
    for path in fakes:
        people = tuple(path.stem.split("_"))  # 000_M101, 000 being FaceForensics++'s
        videos.append(Video(path, 1, f"DeeperForensics/{method}", splits.get(path.name, ""), people))
    return videos


@dataclass
class TestSet:
    """Clips of the DFGC 2022 detection data and where their videos are."""

    __test__ = False  # not a test of pytest
    clips: list[Clip] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)


def dfgc2022(root: Path, parts: Sequence[str] = PARTS) -> TestSet:
    """The DFGC 2022 release: `Detection Dataset/{Public,Private}/*.mp4`, `{Public,Private} Label.json`,
    `Detection Dataset Meta.csv`, and `Result Clips/metadata_C{1,2,3}.txt`, whose targets tell a fake's round.

    Private-2 was not released; clips that someone has under `Private-2/` with `Private-2 Label.json` are
    read too. In place of a video may stand the folder of its crops. Labelled clips that the table lacks are
    counted in a warning; their creators are unknown. Raises UserError on a missing file or label, and when
    table and labels contradict each other.
    """
    base = root / "Detection Dataset" if (root / "Detection Dataset").is_dir() else root
    if not (base / "Detection Dataset Meta.csv").is_file():
        raise UserError(
            f"{root}: no DFGC 2022 clips here: expected 'Detection Dataset Meta.csv', '{{Public,Private}} "
            "Label.json' and {Public,Private}/*.mp4 below 'Detection Dataset'; a form to get them is linked "
            "in github.com/NiCE-X/DFGC-2022"
        )
    meta = _read_meta(base / "Detection Dataset Meta.csv")
    rounds = read_rounds(base.parent / "Result Clips")
    found = TestSet()
    for part in parts:
        name = "Private" if part == "Private-1" else part
        if part == "Private-2" and not (base / name).is_dir():
            continue
        labels = read_json(base / f"{name} Label.json", "labels of videos", lambda found: found.items())
        for video, label in labels:
            row, path = meta.get(_stem(video), {}), base / name / video
            if label not in (0, 1):
                raise UserError(f"{base / name} Label.json: label {label!r} of {video} is neither 0 nor 1")
            if row.get("label", str(label)) != str(label):
                raise UserError(f"{video}: label {label} in {name} Label.json, {row['label']} in the table")
            if not path.exists():  # a file, or a folder of its crops
                raise UserError(f"{path}: labelled but not there")
            clip = Clip(
                video,
                label,
                part,
                creator=row.get("face-swap method", "") if label else "",
                compression=row.get("compression", "") or "none",
                target=row.get("target", ""),
                round=rounds.get(row.get("target", ""), "") if label else "",
            )
            found.clips.append(clip)
            found.paths[video] = path
    unknown = [clip.name for clip in found.clips if _stem(clip.name) not in meta]
    if unknown:
        print(f"warning: {base}: {len(unknown)} clips are not in the table ({', '.join(unknown[:3])})")
    return found


def read_rounds(folder: Path) -> dict[str, str]:
    """`metadata_C{1,2,3}.txt` of the creation track -> round of each target `group/id/clip`; empty without
    the files. Raises UserError on a target that stands in two rounds.
    """
    rounds: dict[str, str] = {}
    for number in "123":
        path = folder / f"metadata_C{number}.txt"
        for target in read_utf8(path, "a list of targets").split() if path.is_file() else ():
            if rounds.setdefault(target, number) != number:
                raise UserError(f"{path}: {target} is a target of round {rounds[target]} already")
    return rounds


def _read_meta(path: Path) -> dict[str, dict[str, str]]:
    """The table by video stem; headers in any case, with or without blanks around; all values as text,
    because targets like 1/1/3 look like dates.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [
                {key.strip().lower(): (value or "").strip() for key, value in row.items() if key}
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as the table of the detection data ({error})") from None
    if rows and "videoname" not in rows[0]:
        raise UserError(f"{path}: column videoName is missing; there are {', '.join(rows[0])}")
    table = {_stem(row["videoname"]): row for row in rows}
    if len(table) < len(rows):
        names = [_stem(row["videoname"]) for row in rows]
        raise UserError(f"{path}: {next(name for name in names if names.count(name) > 1)} stands there twice")
    return table


DATASETS: dict[str, Callable[[Path], list[Video]]] = {
    "faceforensics-c23": partial(faceforensics, compression="c23"),
    "faceforensics-c40": partial(faceforensics, compression="c40"),
    "deepfakedetection-c23": partial(faceforensics, compression="c23", methods=("DeepFakeDetection",)),
    "deepfakedetection-c40": partial(faceforensics, compression="c40", methods=("DeepFakeDetection",)),
    "celeb-df-v2": celeb_df,
    "dfdc": dfdc,
    "deeperforensics": deeperforensics,
}
"""Name on the command line -> reader of a public set."""


def _videos(folder: Path, dataset: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{dataset}: no folder {folder}; its layout stands in the README")
    videos = find_images(folder, endings=VIDEO_ENDINGS)
    if not videos:
        raise UserError(f"{dataset}: no video in {folder}")
    return videos


def _pairs(content: Any) -> list[list[str]]:
    if not isinstance(content, list) or not all(
        isinstance(pair, list) and all(isinstance(name, str) for name in pair) for pair in content
    ):
        raise ValueError("other content")
    return content


def _stem(name: str) -> str:
    return Path(name).stem if Path(name).suffix.lower() in VIDEO_ENDINGS else name
