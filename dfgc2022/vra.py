"""Realism of face swaps predicted on the DFGC-VRA clips, the 1,400 rated ones of the creation track.

    python vra.py --root /datasets/DFGC-VRA --run ../runs/dfgc2022/paper-0

Trains on the 700 training clips of the 2023 split, tests on its three test sets (new people, new methods,
both new) and prints the agreement with the raters, per clip and per submission. All values are predictions.
"""

import csv
import itertools
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dfgc2022.boxes import source_mark
from dfgc2022.model import OFFICIAL
from dfgc2022.pipeline import Scorer, Settings, fingerprint
from dfgc2022.predict import load_detectors
from dfgc2022.realism import NoFaceError, RealismModel, agreement, clip_features
from shared.io import runs_root
from shared.published import Metric, environment, load_published, print_metrics, write_results
from shared.ranges import Count
from shared.records import replacing
from shared.runtime import RunConfig, UserError, parse, pick_device, run_main

TEST_GROUPS = frozenset((3, 4, 8, 13, 15, 19))
TEST_METHODS = frozenset(
    (73479, 82508, 82511, 83496, 83609, 92147, 92584, 93014, 93060)
)  # and the organisers' baseline of round 3
TESTS = {"test-1": "new people", "test-2": "new methods", "test-3": "new people and methods"}


@dataclass(frozen=True)
class Config:
    """Settings of the realism assessment."""

    root: Path
    """Folder of C1, C2, C3 (clips) and metadata (C1-mos.csv ...), as the DFGC-VRA release lays them out."""
    run: Path | None = None
    """Run whose detectors give the features. None: the newest."""
    members: tuple[str, ...] = ()
    """Detectors of the run; see predict.py."""
    official: tuple[Literal[OFFICIAL], ...] = ()
    """Features of these released networks instead; the authors used all three of the winner."""
    weights: tuple[Path, ...] = ()
    """Released files of the official networks."""
    boxes: str | None = None
    """Face boxes, see predict.py. None: crop/C1_crop_video.csv ... of the release."""
    every: Count = 10
    """Frames whose index is divisible by this are used."""
    vra_compat: bool = False
    """Features as the release took them: without ImageNet normalisation, ConvNeXt before its last norm."""
    wide: bool = False
    """Search all C and gamma of the authors instead of every third."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """Folder of features and results. None: runs/dfgc2022-vra."""


@dataclass(frozen=True)
class RatedClip:
    """A rated fake of the creation track."""

    path: Path
    round: int
    group: int
    """Identity group, 1 to 22."""
    submission: int
    """CodaLab's number; 0 is the organisers' baseline."""
    mos: float
    """Mean realism of five raters, 1 to 5."""

    @property
    def split(self) -> str:
        """train, test-1 (new people), test-2 (new methods) or test-3 (both), as in 2023."""
        method = self.submission in TEST_METHODS or (self.submission, self.round) == (0, 3)
        return ("train", "test-1", "test-2", "test-3")[(self.group in TEST_GROUPS) + 2 * method]


def read_vra(root: Path) -> list[RatedClip]:
    """Rated clips: `metadata/C<r>-mos.csv` (name first, mean opinion score last, names ending in `-crop`),
    `C<r>/<group>-<id>-<clip>-submit-<submission>.mp4`.

    Raises UserError on a missing file, a name of another form or a score outside 1 to 5.
    """
    clips = []
    for number in (1, 2, 3):
        table = root / "metadata" / f"C{number}-mos.csv"
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(file)][1:]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{table}: not readable as the scores of DFGC-VRA ({error})") from None
        for line, row in enumerate(rows, 2):
            if not row:
                continue
            name = row[0].removesuffix(".mp4").removesuffix("-crop")
            match = re.fullmatch(r"(\d+)-\d+-\d+-submit-(\d+)", name)
            if match is None or not re.fullmatch(r"[1-5](\.\d+)?", row[-1]) or float(row[-1]) > 5:
                raise UserError(
                    f"{table}, line {line}: {','.join(row)!r} is not a clip and a score of 1 to 5"
                )
            path = root / f"C{number}" / f"{name}.mp4"
            if not path.is_file():
                raise UserError(f"{path}: rated in {table.name} but not there")
            clips.append(RatedClip(path, number, *map(int, match.groups()), float(row[-1])))
    return clips


def features_of(clips: Sequence[RatedClip], scorer: Scorer, config: Config, out: Path) -> np.ndarray:
    """(clips, D) features; each clip's are kept below `out`, so that an interrupted call goes on. Clips
    without a face are named in warnings, their rows are nan. Raises UserError when no clip has a face.
    """
    rows: list[np.ndarray | None] = []
    networks = [fingerprint(network) for network, _, _ in scorer.networks.values()]
    for number in (1, 2, 3):
        boxes = config.boxes or str(config.root / "crop" / f"C{number}_crop_video.csv")
        settings = Settings(boxes, config.every)
        mark = f"{zlib.crc32(source_mark(boxes).encode()):08x}"
        header = "-".join([*networks, mark, str(config.every), *["compat"] * config.vra_compat])
        for clip in (clip for clip in clips if clip.round == number):
            kept = out / "features" / header / f"C{number}-{clip.path.stem}.npy"
            if not kept.exists():
                try:
                    features = clip_features(clip.path, scorer, settings, config.vra_compat)
                except NoFaceError as error:
                    print(f"warning: {clip.path.name} is left out: {error}")
                    rows.append(None)
                    continue
                with replacing(kept) as temporary, open(temporary, "wb") as file:
                    np.save(file, features)
            rows.append(np.load(kept))
    first = next((row for row in rows if row is not None), None)
    if first is None:
        raise UserError(f"{config.root}: no clip with a face")
    return np.stack([np.full_like(first, np.nan) if row is None else row for row in rows])


def assess(clips: Sequence[RatedClip], features: np.ndarray, wide: bool = False) -> list[Metric]:
    """Train on the training clips; agreement on each test set per clip and per submission, with the VRA
    code's logistic fit beside it, and the mean of PLCC and SRCC over the three tests (the 2023 competition's
    score). Clips and rows correspond.
    """
    splits, mos = np.array([clip.split for clip in clips]), np.array([clip.mos for clip in clips])
    missing = [name for name in ("train", *TESTS) if not (splits == name).any()]
    if missing:
        raise UserError(f"no clip of {missing[0]}: the 2023 split needs the clips of all groups and rounds")
    train = splits == "train"
    model = RealismModel(wide=wide).fit(features[train], mos[train])
    metrics, correlations = [], []
    for name, what in TESTS.items():
        chosen = splits == name
        predicted = model.predict(features[chosen])
        levels = {"clip": (predicted, mos[chosen])}
        methods = np.array([(c.round, c.submission) for c in clips])[chosen]
        kinds, member = np.unique(methods, axis=0, return_inverse=True)
        if len(kinds) > 2:
            means = [np.bincount(member.ravel(), values) / np.bincount(member.ravel())
                     for values in levels["clip"]]  # fmt: skip
            levels["submission"] = tuple(means)
        for level, pair in levels.items():
            found = agreement(*pair)
            fitted = agreement(*pair, logistic=True)
            found |= {f"{key} after a logistic fit": fitted[key] for key in ("PLCC", "RMSE") if key in fitted}
            if level == "clip":
                correlations += [found["PLCC"], found["SRCC"]]
            metrics += [
                Metric("DFGC-VRA 2023", f"{name}, {what}, per {level}", key, "", value, "DFGC-VRA", False,
                       "predicted realism")
                for key, value in found.items()
            ]  # fmt: skip
    mean = float(np.mean(correlations))
    return [
        *metrics,
        Metric("DFGC-VRA 2023", "final score", "mean of PLCC and SRCC", "", mean, "DFGC-VRA", False,
               "predicted realism"),
    ]  # fmt: skip


def main(config: Config) -> None:
    begin = time.perf_counter()
    clips = sorted(read_vra(config.root), key=lambda clip: clip.round)
    out = config.out or runs_root() / "dfgc2022-vra"
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(config.device)
    networks = load_detectors(config.run, config.members, config.official, config.weights)
    scorer = Scorer(networks, device, bf16=device.type == "cuda")
    features = features_of(clips, scorer, config, out)
    found = np.isfinite(features).all(1)
    metrics = assess(list(itertools.compress(clips, found)), features[found], config.wide)
    print_metrics(metrics, load_published("dfgc2022"))
    write_results(out, [], metrics, environment(RunConfig(), time.perf_counter() - begin, config.device))
    print(out)


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
