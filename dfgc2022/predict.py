"""Score your own videos: a number per video, a timeline with face thumbnails, JSON beside it.

python predict.py --input clip.mp4                          the newest run
python predict.py --input folder/ --run runs/dfgc2022/paper-0 --boxes mtcnn
python predict.py --input clip.mp4 --official convnext_xlarge_384_in22ft1k --weights convnext_30.pth
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dfgc2022.boxes import Rule, box_source
from dfgc2022.model import OFFICIAL, detector, load_official
from dfgc2022.pipeline import ClipScore, Scorer, Settings, pieces, score_videos
from dfgc2022.protocol import FUSION, write_submission
from dfgc2022.train import TEAMS, load_members
from dfgc2022.train import Config as TrainConfig
from dfgc2022.video import list_videos
from shared.io import find_run, load_config
from shared.runtime import UserError, parse, pick_device, run_main

THUMBNAILS = 8


@dataclass(frozen=True)
class Config:
    """Settings of the prediction."""

    input: Path
    """A video, or a folder of videos."""
    out: Path = Path("predictions")
    """Where scores.jsonl, submission.txt and one .json and .png per video go."""
    run: Path | None = None
    """Run folder of the detectors. None: the newest."""
    official: Literal[OFFICIAL] | None = None
    """Use this released network instead of a run, with `weights`."""
    weights: Path | None = None
    """Released file of the official network."""
    boxes: str = "auto"
    """Face boxes: auto, mtcnn, haar, skin, crops, or the path of a .csv or .onnx (YuNet) file."""
    every: int = 10
    """Frames whose index is divisible by this are scored."""
    crop: Rule = "winner"
    """Crop arithmetic: the winner's, the 2021 baseline's, the box as it is, or the whole frame."""
    faces: Literal["best", "max", "mean"] = "best"
    """Several faces in a frame: the most probable one, or the largest or mean score."""
    workers: int = 0
    """Processes that read videos."""
    device: str = "auto"
    """auto, cpu or cuda."""


def load_detectors(config: Config) -> dict:
    """The detectors asked for: name -> (network, list entry, side)."""
    if config.official:
        if config.weights is None:
            raise UserError(f"--official {config.official}: give its file with --weights")
        entry = detector(config.official)
        return {config.official: (load_official(config.official, config.weights), entry, entry.size)}
    folder = find_run("dfgc2022", config.run)
    members = load_members(folder, load_config(folder, TrainConfig))
    # Of an embedded contest only its best team scores; baselines and controls stay out.
    return {name: members[name] for name in TEAMS["diverse"] if name in members} or members


def combined(clip: ClipScore) -> tuple[float, np.ndarray, bool]:
    """(video score, score per frame, whether it abstains for lack of a face): the winner's weights for three
    detectors, otherwise their mean."""
    names = list(clip.score)
    weights = FUSION if len(names) == len(FUSION) else (1 / len(names),) * len(names)
    frames = sum(w * np.array(clip.probabilities[name]) for w, name in zip(weights, names, strict=True))
    score = sum(w * clip.score[name] for w, name in zip(weights, names, strict=True))
    return float(score), np.atleast_1d(frames), not clip.frames


def draw_timeline(path: Path, video: Path, clip: ClipScore, scorer: Scorer, settings: Settings) -> None:
    """Frame scores over the frame number, with faces from evenly spaced frames above."""
    score, frames, _ = combined(clip)
    size = scorer.sizes[-1]
    wanted = set(
        np.array(clip.frames)[np.linspace(0, len(clip.frames) - 1, THUMBNAILS).round().astype(int)].tolist()
    )
    faces: dict[int, np.ndarray] = {}
    for piece in pieces(video, 0, box_source(settings.boxes), [size], settings):
        faces |= {
            index: piece.crops[size][number]
            for number, index in enumerate(piece.frames)
            if index in wanted and index not in faces
        }
    figure = plt.figure(figsize=(10, 4))
    grid = figure.add_gridspec(2, THUMBNAILS, height_ratios=(1, 2))
    for column, (index, face) in enumerate(sorted(faces.items())):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(face)
        axis.set_title(str(index), fontsize=7)
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    for name, values in clip.probabilities.items():
        axis.plot(clip.frames, values, linewidth=0.7, alpha=0.6, label=name)
    axis.plot(clip.frames, frames, color="black", marker=".", label="combined")
    axis.axhline(score, color="black", linestyle=":", linewidth=0.8)
    axis.set(ylim=(0, 1), xlabel="frame", ylabel="probability of fake", title=f"{clip.name}: {score:.3f}")
    axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    videos = list_videos(config.input)
    settings = Settings(config.boxes, config.every, config.crop, config.faces)
    device = pick_device(config.device)
    scorer = Scorer(load_detectors(config), device, bf16=device.type == "cuda")
    config.out.mkdir(parents=True, exist_ok=True)
    clips = score_videos(videos, scorer, settings, config.out / "scores.jsonl", workers=config.workers)
    scores = {}
    for video, clip in zip(videos, clips, strict=True):
        scores[clip.name], frames, abstains = combined(clip)
        record = {
            "video": str(video),
            "score": scores[clip.name],
            "abstains": abstains,
            "frames": clip.frames,
            "frame_scores": frames.tolist(),
            "detectors": {"score": clip.score, "frame_scores": clip.probabilities},
            "note": clip.note,
        }
        (config.out / f"{clip.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        if clip.frames:
            draw_timeline(config.out / f"{clip.name}.png", video, clip, scorer, settings)
        note = f"  ({clip.note})" if clip.note else ""
        print(f"{clip.name}  {scores[clip.name]:.4f}{note}")
    write_submission(config.out / "submission.txt", scores)
    print(config.out)


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
