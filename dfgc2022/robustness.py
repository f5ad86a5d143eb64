"""What happens to detectors when clips are recompressed, resized, blurred, made noisy or attacked.

The first four change video files and go through a real encoder and the whole pipeline; the attack is
white-box on the crops of one detector.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from dfgc2022.boxes import box_source
from dfgc2022.model import fake_logit
from dfgc2022.pipeline import NO_FACE, Scorer, Settings, normalise, per_channel, pieces
from dfgc2022.video import read_frames, write_clips


def _halved(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return cv2.resize(
        cv2.resize(frame, (width // 2, height // 2), interpolation=cv2.INTER_AREA), (width, height)
    )


def _noisy(frame: np.ndarray) -> np.ndarray:
    # A seed of the frame's own: equal in every run, different from frame to frame as a camera's noise is.
    noise = np.random.default_rng(zlib.crc32(frame.tobytes())).normal(0, 4, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


CHANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray] | None, int]] = {
    "CRF 23": (None, 23),
    "CRF 40": (None, 40),
    "half size and back": (_halved, 10),
    "blur, sigma 0.7": (lambda frame: cv2.GaussianBlur(frame, (0, 0), 0.7), 10),
    "noise, sigma 4": (_noisy, 10),
}
"""Change -> (of each frame, rate factor of the encoder after it)."""


def change_videos(videos: Sequence[Path], out: Path, change: str) -> list[Path]:
    """Changed copies below `out`, under the same names, so that the same boxes apply. Frame numbers stay."""
    of_frame, crf = CHANGES[change]
    paths = [out / path.name for path in videos]
    groups: dict[tuple, tuple[list[Path], list[np.ndarray]]] = {}
    for path, copy in zip(videos, paths, strict=True):
        frames = [frame if of_frame is None else of_frame(frame) for _, frame in read_frames(path)]
        clip = np.stack(frames)
        clip = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]  # the encoder wants even sides
        names, clips = groups.setdefault(clip.shape, ([], []))
        names.append(copy)
        clips.append(clip)
    for names, clips in groups.values():
        write_clips(names, clips, crf)
    return paths


def attack(scorer: Scorer, name: str, crops: np.ndarray, label: int, epsilon: float = 2.0) -> np.ndarray:
    """FGSM against detector `name`: probability of fake of crops (n, S, S, 3) uint8 after each pixel moved by
    `epsilon` levels towards the wrong class. label: 0 real, 1 fake. Returns (n,)."""
    network, entry, _ = scorer.networks[name]
    images = normalise(torch.from_numpy(crops).to(scorer.device), entry).requires_grad_()
    direction = 1 if label == 0 else -1
    (gradient,) = torch.autograd.grad(direction * fake_logit(network(images)).sum(), images)
    std = per_channel(entry.normalise[1], images.device)
    with torch.no_grad():
        moved = images + gradient.sign() * epsilon / 255 / std
        return fake_logit(network(moved)).sigmoid().cpu().numpy()


def attacked_score(scorer: Scorer, name: str, video: Path, label: int, settings: Settings) -> float:
    """Score of a video whose crops are attacked, see `attack`: the mean over its frames, 0.5 without any."""
    size, source = scorer.networks[name][2], box_source(settings.boxes)
    found = pieces(video, 0, source, [size], settings)
    parts = [attack(scorer, name, piece.crops[size], label) for piece in found if piece.frames]
    return float(np.concatenate(parts).mean()) if parts else NO_FACE
