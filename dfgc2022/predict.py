"""Score your own videos: a number per video, a timeline with face thumbnails, JSON beside it.

    python predict.py --input clip.mp4                          the newest run
    python predict.py --input crops/                            what extract.py cut out
    python predict.py --input folder/ --run ../runs/dfgc2022/paper-0 --boxes mtcnn
    python predict.py --input clip.mp4 --official convnext_xlarge_384_in22ft1k --weights convnext_30.pth
    python predict.py --input clip.mp4 --weights swin_40.pth convnext_10.pth convnext_30.pth --official \\
        swin_large_patch4_window12_384_in22k convnext_xlarge_384_in22ft1k convnext_xlarge_384_in22ft1k

Everything goes into --out: scores.jsonl, submission.txt, and a .json and a .png for each video.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import nn

from dfgc2022.boxes import Rule, box_source, source_mark
from dfgc2022.model import OFFICIAL, Detector, detector, load_official
from dfgc2022.pipeline import Average, ClipScore, Scorer, Settings, pieces, score_videos
from dfgc2022.protocol import FUSION, write_submission
from dfgc2022.train import TEAMS, load_members, plan
from dfgc2022.train import Config as TrainConfig
from dfgc2022.video import list_videos
from shared.io import find_run, load_config
from shared.ranges import Count, Natural
from shared.runtime import UserError, parse, pick_device, run_main

THUMBNAILS = 8
THUMBNAIL = 128
"""Side of a face thumbnail in pixels."""


@dataclass(frozen=True)
class Config:
    """Settings of the prediction."""

    input: Path
    """A video, a folder of crops NNNN.png as extract.py writes them, or a folder of such."""
    out: Path = Path("predictions")
    """Where scores.jsonl, submission.txt and one .json and .png per video go."""
    run: Path | None = None
    """Run folder of the detectors. None: the newest."""
    members: tuple[str, ...] = ()
    """Detectors of the run, by the names of the files in its `members`. None: the diverse team of an embedded
    contest, otherwise what training ended with.
    """
    official: tuple[Literal[OFFICIAL], ...] = ()
    """Use these released networks instead of a run, each with its file in `weights`."""
    weights: tuple[Path, ...] = ()
    """Released files of the official networks. Three detectors are fused 0.2, 0.3, 0.5 in their order, the
    winner's being Swin, ConvNeXt of epoch 10, ConvNeXt of epoch 30; others evenly.
    """
    boxes: str = "auto"
    """Face boxes: auto, mtcnn, haar, skin, crops, or the path of a .csv or .onnx (YuNet) file."""
    every: Count = 10
    """Frames whose index is divisible by this are scored."""
    crop: Rule = "winner"
    """Crop arithmetic: the winner's, the 2021 baseline's, the box as it is, or the whole frame."""
    faces: Literal["best", "max", "mean"] = "best"
    """Several faces in a frame: the most probable one, or the largest or mean score."""
    average: Average = "mean"
    """Frames to video: the contest's mean, or weighted by how sure each frame is."""
    workers: Natural = 0
    """Processes that read videos."""
    device: str = "auto"
    """auto, cpu or cuda."""


def load_detectors(
    run: Path | None, members: Sequence[str], official: Sequence[str], weights: Sequence[Path]
) -> dict[str, tuple[nn.Module, Detector, int]]:
    """Detectors of a run, or released ones: name -> (network, list entry, side). See `Config`."""
    if len(official) != len(weights):
        raise UserError(
            f"--official names {len(official)} networks, --weights {len(weights)} files; "
            "give one file for each network"
        )
    if official:
        stems = [path.stem for path in weights]
        if len(set(stems)) < len(stems):
            raise UserError("--weights: two files share a name; detectors are called by their files")
        return {
            path.stem: (load_official(name, path), detector(name), detector(name).size)
            for name, path in zip(official, weights, strict=True)
        }
    folder = find_run("dfgc2022", run)
    settings = load_config(folder, TrainConfig)
    found = load_members(folder, settings)
    unknown = [name for name in members if name not in found]
    if unknown:
        raise UserError(f"{folder}: no member {unknown[0]!r}; there are {', '.join(found)}")
    # Of an embedded contest only its best team scores; baselines and controls stay out, and so do the
    # weights of earlier epochs.
    team = [name for name in TEAMS["diverse"] if name in found]
    return {name: found[name] for name in members or team or [name for name, _ in plan(settings)]}


def combined(clip: ClipScore) -> tuple[float, np.ndarray, bool]:
    """(video score, score per frame, whether it abstains for lack of a face): the winner's weights for three
    detectors, otherwise their mean."""
    names = list(clip.score)
    weights = FUSION if len(names) == len(FUSION) else (1 / len(names),) * len(names)
    frames = sum(w * np.array(clip.probabilities[name]) for w, name in zip(weights, names, strict=True))
    score = sum(w * clip.score[name] for w, name in zip(weights, names, strict=True))
    return float(score), np.atleast_1d(frames), not clip.frames


def draw_timeline(path: Path, video: Path, clip: ClipScore, settings: Settings) -> None:
    """Frame scores over the frame number, with faces from evenly spaced frames above."""
    score, frames, _ = combined(clip)
    wanted = set(
        np.array(clip.frames)[np.linspace(0, len(clip.frames) - 1, THUMBNAILS).round().astype(int)].tolist()
    )
    faces: dict[int, np.ndarray] = {}
    for piece in pieces(video, 0, box_source(settings.boxes), [THUMBNAIL], settings, wanted):
        for number, index in enumerate(piece.frames):
            faces.setdefault(index, piece.crops[THUMBNAIL][number])
    figure = plt.figure(figsize=(10, 4))
    grid = figure.add_gridspec(2, THUMBNAILS, height_ratios=(1, 2))
    for column, (index, face) in enumerate(sorted(faces.items())):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(face)
        axis.set_title(str(index), fontsize=7)
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    for name, values in clip.probabilities.items():
        axis.plot(clip.frames, values, marker=".", markersize=3, linewidth=0.7, alpha=0.6, label=name)
    axis.plot(clip.frames, frames, color="black", marker=".", label="combined")
    axis.axhline(score, color="black", linestyle=":", linewidth=0.8)
    axis.set(ylim=(0, 1), xlabel="frame", ylabel="probability of fake", title=f"{clip.name}: {score:.3f}")
    axis.set_xlim(clip.frames[0] - 1, clip.frames[-1] + 1)  # whole frames also where there is only one
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    videos = list_videos(config.input, crops=True)
    settings = Settings(config.boxes, config.every, config.crop, config.faces, config.average)
    device = pick_device(config.device)
    networks = load_detectors(config.run, config.members, config.official, config.weights)
    config.out.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(networks, device, bf16=device.type == "cuda")
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
            "boxes": source_mark(config.boxes),
            "note": clip.note,
        }
        said, picture = config.out / f"{clip.name}.json", config.out / f"{clip.name}.png"
        text = json.dumps(record, indent=1) + "\n"
        drawn = picture.exists() and said.exists() and said.read_text() == text  # by an earlier call
        if clip.frames and not drawn:
            draw_timeline(picture, video, clip, settings)
        said.write_text(text)
        note = f"  ({clip.note})" if clip.note else ""
        print(f"{clip.name}  {scores[clip.name]:.4f}{note}")
    write_submission(config.out / "submission.txt", scores)
    print(config.out)


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
