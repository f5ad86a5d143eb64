"""Cut face crops out of videos: `<out>/<video>/NNNN.png` and a list file for training.

    python extract.py --videos clips/ --out crops/ --boxes mtcnn
    python extract.py --dataset celeb-df-v2 --videos /datasets/celeb-df-v2 --split train --out crops/ \\
        --boxes mtcnn

<video> is the file's name or, with --dataset, its path in the set, where names may repeat. A video whose
crops are there is not read again; what was wrong with it is said again.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import cv2

from dfgc2022.boxes import Rule, box_source, crop_face, source_mark
from dfgc2022.data import PEOPLE
from dfgc2022.datasets import DATASETS
from dfgc2022.video import VideoError, batched, list_videos, read_frames
from shared.io import progress
from shared.ranges import Count
from shared.records import read_json, write_json
from shared.runtime import UserError, parse, run_main

RECORD = "extraction.json"
"""In a folder of crops: what they were made by, and what is wrong with the video."""


@dataclass(frozen=True)
class Config:
    """Settings of the extraction."""

    videos: Path
    """A video, a folder of videos, or the root of `dataset`."""
    out: Path
    """Where the crop folders and `list.txt` go."""
    dataset: Literal[tuple(DATASETS)] | None = None
    """Read `videos` as this public set and write its labels to the list."""
    split: str | None = None
    """Only this split of the set: train, val or test. Videos that the release puts in none (the real ones of
    DeeperForensics, all of DeepFakeDetection) are left out, with a warning.
    """
    label: Literal[0, 1] | None = None
    """Label of all videos when no data set gives them. None writes no list."""
    boxes: str = "auto"
    """Face boxes: auto, mtcnn, haar, skin, crops, or the path of a .csv or .onnx (YuNet) file."""
    every: Count = 1
    """Keep frames whose index is divisible by this. The winner kept all and scored every 10th."""
    crop: Rule = "winner"
    """Crop arithmetic."""
    workers: Count = 1
    """Videos that are read at once."""


def extract(video: tuple[Path, Path], boxes: str, every: int, crop: Rule) -> tuple[int, str]:
    """Crops of one video (its file, their folder); (number of crops, what is wrong with the video or "").

    A finished folder is left as it is: crops are written under a temporary name that is renamed at the end.
    What they were made by and the note stay beside them. Raises UserError on a folder made otherwise.
    """
    path, folder = video
    made_by = {"boxes": source_mark(boxes), "every": every, "crop": crop}
    if folder.is_dir():
        count = sum(1 for _ in folder.glob("*.png"))
        return count, _note_of(folder, made_by) or ("" if count else f"{path}: no face found")
    part = folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed, perhaps with other settings
    part.mkdir(parents=True)
    source, count, note = box_source(boxes), 0, ""
    try:
        for group in batched(read_frames(path, every)):
            indices, images = [index for index, _ in group], [image for _, image in group]
            for index, image, found in zip(indices, images, source(path.name, indices, images), strict=True):
                face = crop_face(image, found[0], crop) if found else None
                if face is not None:
                    # Not cv2.imwrite, which says nothing when the disk is full.
                    png = cv2.imencode(".png", cv2.cvtColor(face, cv2.COLOR_RGB2BGR))[1]
                    (part / f"{index:04d}.png").write_bytes(png.tobytes())
                    count += 1
    except VideoError as error:
        note = str(error)
    write_json(part / RECORD, {"made_by": made_by, "note": note})
    part.rename(folder)
    return count, note or ("" if count else f"{path}: no face found")


def _note_of(folder: Path, made_by: dict) -> str:
    """The note kept in a finished folder; crops of another origin than extract.py have none."""
    if not (folder / RECORD).exists():
        return ""
    form, advice = lambda found: (found["made_by"], str(found["note"])), "delete its folder"
    before, note = read_json(folder / RECORD, "a record of extract.py", form, advice)
    if before != made_by:
        raise UserError(
            f"{folder}: holds crops made with other boxes or settings ({before}, now {made_by}); give "
            "another --out or delete it"
        )
    return note


def extract_all(
    videos: list[tuple[Path, int | None]],
    out: Path,
    boxes: str,
    every: int,
    crop: Rule = "winner",
    workers: int = 1,
    root: Path | None = None,
    people: Sequence[tuple[str, ...]] = (),
) -> list[str]:
    """Crops of many videos and list.txt of those with a label and a face; returns the notes on bad ones.

    root: a folder whose structure the crops repeat; None: they lie side by side. people: whom each video
    shows, for people.json beside the list.
    """
    box_source(boxes)  # reports a wrong choice once
    names = [path.relative_to(root).as_posix() if root else path.name for path, _ in videos]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two videos are called {twice}; extract them into different folders")
    out.mkdir(parents=True, exist_ok=True)
    work = partial(extract, boxes=boxes, every=every, crop=crop)
    jobs = [(path, out / name) for (path, _), name in zip(videos, names, strict=True)]
    if workers > 1:
        with get_context("spawn").Pool(workers) as pool:
            results = list(progress(pool.imap(work, jobs), "extracting", len(jobs)))
    else:
        results = [work(job) for job in progress(jobs, "extracting")]
    lines = [
        f"{name} {label}\n"
        for name, (_, label), (count, _) in zip(names, videos, results, strict=True)
        if label is not None and count
    ]
    if lines:
        (out / "list.txt").write_text("".join(lines))
    if people:
        write_json(out / PEOPLE, dict(zip(names, people, strict=True)))
    return [note for _, note in results if note]


def main(config: Config) -> None:
    if config.dataset:
        found = DATASETS[config.dataset](config.videos)
        chosen = [v for v in found if config.split in (None, v.split)]
        videos, people = [(v.path, v.label) for v in chosen], [v.people for v in chosen]
        loose = [v for v in found if not v.split]
        if config.split and loose:
            print(
                f"warning: {len(loose)} videos stand in no split and are left out, "
                f"{sum(v.label == 0 for v in loose)} of them real; without --split they are taken"
            )
        if not videos:
            raise UserError(f"{config.videos}: no video of split {config.split}")
    else:
        videos, people = [(path, config.label) for path in list_videos(config.videos)], []
    root = config.videos if config.dataset else None
    notes = extract_all(
        videos, config.out, config.boxes, config.every, config.crop, config.workers, root, people
    )
    for note in notes:
        print(f"warning: {note}")
    print(f"{len(videos) - len(notes)} of {len(videos)} videos without a remark, crops in {config.out}")


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
