"""From videos to scores: frames, boxes, crops, detectors, one number per video.

    scorer = Scorer({"convnext": (network, detector(name), 384)})
    scores = score_videos(list_videos(folder), scorer, Settings(boxes="mtcnn"), out=folder / "scores.jsonl")

Worker processes read videos and cut crops in pieces of at most 32 frames, however long the video is; the main
process scores crops of many videos in one batch. A video that cannot be read is noted and scored 0.5.
"""

import itertools
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dfgc2022.boxes import Rule, WholeFrame, box_source, crop_face, source_mark
from dfgc2022.model import Detector, fake_probability
from dfgc2022.video import VideoError, batched, read_frames
from shared.io import progress, read_utf8
from shared.runtime import UserError

NO_FACE = 0.5
"""Score of a video without any face, the winner's rule."""
Average = Literal["mean", "confident"]


@dataclass(frozen=True)
class Settings:
    """How videos become crops."""

    boxes: str = "auto"
    """Source of face boxes, see `dfgc2022.boxes.box_source`."""
    every: int = 10
    """Frames whose index is divisible by this are scored."""
    crop: Rule = "winner"
    """Crop arithmetic."""
    faces: Literal["best", "max", "mean"] = "best"
    """Frames with several faces: the most probable one, or the largest or mean score of all of them."""
    average: Average = "mean"
    """Frames to video: the arithmetic mean (the contest's), or weighted by how sure each frame is."""


@dataclass
class ClipScore:
    """What the pipeline found out about one video."""

    name: str
    """File name with its ending."""
    frames: list[int] = field(default_factory=list)
    """Index of each scored frame in the video."""
    probabilities: dict[str, list[float]] = field(default_factory=dict)
    """Detector -> probability of fake of each scored frame."""
    score: dict[str, float] = field(default_factory=dict)
    """Detector -> average over the frames, 0.5 when there are none."""
    looked_at: int = 0
    """Frames in which a face was looked for."""
    note: str = ""
    """What is wrong with the video, empty when nothing is."""
    stamp: list[int] = field(default_factory=list)
    """Size in bytes and time of change of the file (or of all crops), which tell another video of the same
    name.
    """


@dataclass
class Piece:
    """Crops of a stretch of one video; `crops` maps a side S to (n, S, S, 3) uint8."""

    clip: int
    frames: list[int]
    crops: dict[int, np.ndarray]
    looked_at: int
    last: bool = False
    note: str = ""


def pieces(
    path: Path,
    clip: int,
    source,
    sizes: Sequence[int],
    settings: Settings,
    wanted: Collection[int] | None = None,
) -> Iterator[Piece]:
    """Crops of one video, RGB, resized with OpenCV's bilinear filter as the winner did.

    A bad video raises nothing: the last piece carries a note. A folder is read as crops saved under their
    frame numbers, which need neither boxes nor cropping. wanted: look at these frames alone, and read no
    further than to the last of them.
    """
    note, rule, frames = "", settings.crop, read_frames(path, settings.every)
    if path.is_dir():
        source, rule, frames = WholeFrame(), "frame", read_crops(path, settings.every)
    if wanted is not None:
        read = itertools.takewhile(lambda pair: pair[0] <= max(wanted), frames)
        frames = (pair for pair in read if pair[0] in wanted)
    try:
        for group in batched(frames):
            indices, images = [index for index, _ in group], [image for _, image in group]
            found = source(path.name, indices, images)
            kept, crops = [], []
            for index, image, boxes in zip(indices, images, found, strict=True):
                for box in boxes[:1] if settings.faces == "best" else boxes:
                    crop = crop_face(image, box, rule)
                    if crop is not None:
                        kept.append(index)
                        crops.append(crop)
            resized = {
                size: np.stack(
                    [cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR) for crop in crops]
                )
                for size in sizes
                if crops
            }
            yield Piece(clip, kept, resized, len(group))
    except VideoError as error:
        note = str(error)
    yield Piece(clip, [], {}, 0, last=True, note=note)


def read_crops(folder: Path, every: int) -> Iterator[tuple[int, np.ndarray]]:
    """Images of a folder named by frame number, those divisible by `every`, as `read_frames` gives frames.

    Raises VideoError on a damaged image or a name that is no number.
    """
    numbered = {}
    for path in folder.glob("*.png"):
        if not path.stem.isdigit():
            raise VideoError(f"{path}: crops are named by their frame number")
        numbered[int(path.stem)] = path
    if not numbered:
        raise VideoError(f"{folder}: holds no crops (NNNN.png)")
    for index in sorted(index for index in numbered if index % every == 0):
        image = cv2.imread(str(numbered[index]))
        if image is None:
            raise VideoError(f"{numbered[index]}: not a readable image")
        yield index, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class _Pieces(IterableDataset):
    """Pieces of all videos; with several workers each reads every n-th video."""

    def __init__(self, videos: Sequence[Path], sizes: Sequence[int], settings: Settings):
        self.videos, self.sizes, self.settings = videos, sizes, settings

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        source = box_source(self.settings.boxes)
        if worker:
            cv2.setNumThreads(1)
        for number in range(
            worker.id if worker else 0, len(self.videos), worker.num_workers if worker else 1
        ):
            yield from pieces(self.videos[number], number, source, self.sizes, self.settings)


class Scorer:
    """Detectors on one device: crops (n, S, S, 3) uint8 per side S -> probability of fake per detector (n,).

    detectors: name -> (network, its entry in the list of detectors, side S). bf16: bfloat16 autocast.
    """

    def __init__(
        self,
        detectors: dict[str, tuple[nn.Module, Detector, int]],
        device: torch.device | str = "cpu",
        bf16: bool = False,
    ):
        self.device, self.bf16 = torch.device(device), bf16
        self.networks = {}
        for name, (network, entry, size) in detectors.items():
            network = network.eval().to(self.device, memory_format=torch.channels_last)
            self.networks[name] = (network, entry, size)
        self.sizes = sorted({size for _, _, size in self.networks.values()})

    @torch.inference_mode()
    def __call__(self, crops: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
        on_device = {size: torch.from_numpy(array).to(self.device) for size, array in crops.items()}
        result = {}
        for name, (network, entry, size) in self.networks.items():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = network(normalise(on_device[size], entry))
            result[name] = fake_probability(logits).cpu().numpy()
        return result


def normalise(crops: Tensor, entry: Detector) -> Tensor:
    """Crops (n, S, S, 3) uint8 -> the detector's input (n, 3, S, S) float32."""
    mean, std = (per_channel(values, crops.device) for values in entry.normalise)
    return (crops.permute(0, 3, 1, 2).float() / 255 - mean) / std


@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value per channel (1, 3, 1, 1) on a device. Kept: a copy to a GPU in every batch would wait for all
    that the GPU still has to do.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def score_videos(
    videos: Sequence[Path],
    scorer: Scorer,
    settings: Settings,
    out: Path | None = None,
    batch: int = 64,
    workers: int = 0,
) -> list[ClipScore]:
    """Score every video, in the order given.

    out: a .jsonl file to which each finished video is written at once; a later call with the same settings,
    boxes and weights goes on after them, and scores a video anew that has changed. Raises UserError when two
    videos share a name or `out` was written otherwise.
    """
    names = [path.name for path in videos]
    repeated = (
        sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    )
    if repeated:
        raise UserError(f"two videos are called {repeated[0]}; scores are kept by name")
    box_source(settings.boxes)  # a wrong source is reported here, not by every worker
    finished = _resume(out, scorer, settings, videos)
    todo = [path for path in videos if path.name not in finished]
    workers = min(workers, len(todo))
    loader = DataLoader(
        _Pieces(todo, scorer.sizes, settings),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # OpenCV's threads do not survive a fork
        prefetch_factor=4 if workers else None,
    )
    clips = {number: ClipScore(path.name, stamp=_stamp(path)) for number, path in enumerate(todo)}
    waiting: list[Piece] = []
    log = open(out, "a") if out else None  # noqa: SIM115 - closed below
    bar = progress(desc="videos", total=len(todo))
    try:
        for piece in loader:
            waiting.append(piece)
            if sum(len(part.frames) for part in waiting) >= batch or len(waiting) >= 4 * batch:
                _flush(waiting, clips, scorer, settings, finished, log, bar)
        _flush(waiting, clips, scorer, settings, finished, log, bar)
    finally:
        if log:
            log.close()
    return [finished[name] for name in names]


def _flush(
    waiting: list[Piece], clips: dict, scorer: Scorer, settings: Settings, finished: dict, log, bar
) -> None:
    full = [piece for piece in waiting if piece.frames]
    scores = {name: np.empty(0) for name in scorer.networks}
    if full:
        scores = scorer(
            {size: np.concatenate([piece.crops[size] for piece in full]) for size in scorer.sizes}
        )
    position = 0
    for piece in waiting:
        clip = clips[piece.clip]
        clip.looked_at += piece.looked_at
        clip.frames += piece.frames
        for name, values in scores.items():
            part = values[position : position + len(piece.frames)]
            clip.probabilities.setdefault(name, []).extend(float(value) for value in part)
        position += len(piece.frames)
        if piece.last:
            _finish(clip, settings, piece.note)
            finished[clip.name] = clips.pop(piece.clip)
            bar.update()
            if log:
                log.write(json.dumps(asdict(clip)) + "\n")
                log.flush()
    waiting.clear()


def _finish(clip: ClipScore, settings: Settings, note: str) -> None:
    """Faces of a frame to one value, frames to the video's score."""
    frames, frame_of = np.unique(np.array(clip.frames, dtype=int), return_inverse=True)
    clip.frames = frames.tolist()
    for name, values in clip.probabilities.items():
        if settings.faces == "max":
            merged = np.zeros(len(frames))
            np.maximum.at(merged, frame_of, values)
        else:
            merged = np.bincount(frame_of, values) / np.bincount(frame_of)
        clip.probabilities[name] = per_frame = merged.tolist()
        clip.score[name] = frames_to_video(per_frame, settings.average)
    clip.note = note
    if not clip.frames and not note:
        clip.note = f"{clip.name}: no face in the {clip.looked_at} frames looked at"


def frames_to_video(probabilities: Sequence[float], average: Average = "mean") -> float:
    """Probabilities of fake of a video's frames -> that of the video, 0.5 when there are none.

    mean: the winner's rule. confident: each frame weighs |2 p - 1|, so that undecided frames count little.
    """
    p = np.array(probabilities)
    sure = np.abs(2 * p - 1)
    if average == "confident" and sure.sum() > 0:
        return float((sure * p).sum() / sure.sum())
    return float(p.mean()) if len(p) else NO_FACE


def fingerprint(network: nn.Module) -> str:
    """Hash of up to 64 values of every tensor of a network: tells other weights under the same name."""
    digest = 0
    for name, value in network.state_dict().items():
        some = value.flatten()[:: max(1, value.numel() // 64)].double().cpu().numpy()
        digest = zlib.crc32(some.tobytes(), zlib.crc32(name.encode(), digest))
    return f"{digest:08x}"


def _stamp(path: Path) -> list[int]:
    found = [file.stat() for file in (path.glob("*.png") if path.is_dir() else [path]) if file.exists()]
    return [sum(file.st_size for file in found), max(file.st_mtime_ns for file in found)] if found else []


def _resume(
    out: Path | None, scorer: Scorer, settings: Settings, videos: Sequence[Path]
) -> dict[str, ClipScore]:
    if out is None:
        return {}
    detectors = {name: fingerprint(network) for name, (network, _, _) in sorted(scorer.networks.items())}
    header = {"detectors": detectors, "settings": asdict(settings) | {"boxes": source_mark(settings.boxes)}}
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = read_utf8(out, "scores of videos").splitlines(keepends=True) if out.exists() else []
    if not lines:
        out.write_text(json.dumps(header) + "\n")
        return {}
    try:
        found = json.loads(lines[0])
        whole = [line for line in lines[1:] if line.endswith("\n")]  # a killed run may leave half a line
        clips = [ClipScore(**json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise UserError(f"{out}: not a file of scores ({error}); give another --out") from None
    if found != header:
        raise UserError(
            f"{out}: was written with other detectors, boxes or settings; give another --out or delete it"
        )
    stamps = {path.name: _stamp(path) for path in videos}
    kept = [clip.stamp == stamps.get(clip.name, clip.stamp) for clip in clips]
    out.write_text("".join([lines[0], *itertools.compress(whole, kept)]))
    return {clip.name: clip for clip in itertools.compress(clips, kept)}
