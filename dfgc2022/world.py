"""The demo's contest: procedural people, five "creators" of face swaps, real video files in the public
layout.

Every clip is a recording of one person, with the camera's noise; a fake shows a donor's recorded face in the
target's pose and head shape, processed by its creator and composited into the target's recorded frames
through an ellipse, as a face swap would be. Post-processing and the encoder come last. Train, Public and
Private-1 use people of their own; Private-2 uses other creators and other post-processing.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np
import torch

from dfgc2022.creation import TERMS
from dfgc2022.simple import simple_scenes
from dfgc2022.video import write_clips
from shared.faces import IDENTITY, Params, draw, sample
from shared.io import progress
from shared.ranges import Count, Natural, Within
from shared.records import read_json, write_json
from shared.runtime import UserError

CREATORS = ("lowres", "smooth", "seam", "sharp", "checker")
POSTS = {"none": 10, "c23": 23, "c40": 40, "noise": 10, "blur": 10}
"""Post-processing -> constant rate factor of the H.264 encoder."""
SKULL = ("face_width", "face_length", "forehead", "cheekbones", "jaw", "chin", "cheeks", "ear_angle")
COMPLEXION = ("skin_tone", "undertone")
HAIR = (*(name for name in IDENTITY if name.startswith("hair")), "fringe", "parting", "widow_peak", "balding")


@dataclass(frozen=True)
class Size:
    """How large the embedded contest is."""

    train: Count = 300
    """Training people, one real and one fake clip each per creator set."""
    test: Count = 60
    """People of each test part, two real clips and one fake per creator each."""
    keys: Count = 4
    """Drawn frames of a clip; these are the ones that are scored."""
    gap: Natural = 2
    """Blended frames between two drawn ones; the pipeline skips them."""
    pixels: Annotated[int, Within(16)] = 64
    """Side of a frame, an even number, as the encoder wants it."""
    people: Literal["drawn", "simple"] = "drawn"
    """Faces of shared/faces.py, or ellipses with eyes and a mouth (simple.py; 32 pixels in their trial)."""

    @property
    def every(self) -> int:
        """Distance of the drawn frames."""
        return self.gap + 1


class Scene(NamedTuple):
    """Drawn frames of n targets and of a donor in the place of each, and landmarks; no camera yet."""

    target: np.ndarray  # (n, keys, P, P, 3) float32 in [0, 255]
    donor: np.ndarray
    landmarks: np.ndarray  # (n, keys, 68, 2), or two corners of the face


class Recording(NamedTuple):
    """One person and a donor as filmed, F = keys * every - gap frames: what creators work on."""

    target: np.ndarray  # (F, P, P, 3) float32 in [0, 255]
    donor: np.ndarray
    landmarks: np.ndarray  # (F, 68, 2)


def build_world(folder: Path, seed: int, size: Size) -> Path:
    """Write the contest below `folder` unless it is there: `Train/` with lists, and the test parts in the
    layout of the public DFGC 2022 release, with boxes.csv and ratings.csv. Returns the folder. Raises
    UserError on an odd side of the frames.
    """
    if size.pixels % 2:
        raise UserError(f"--world.pixels {size.pixels}: give an even number")
    done = folder / "world.json"
    record = {"seed": seed, **vars(size)}
    if done.exists() and read_json(done, "a drawn contest", advice="delete its folder") == record:
        return folder
    boxes: list[list] = []
    with progress(desc="drawing clips", total=4) as bar:
        _train_set(folder, seed, size, boxes)
        bar.update()
        meta, ratings = [], []
        for number, (part, creators, posts) in enumerate(
            (
                ("Public", CREATORS[:4], ("none", "c23", "c40")),
                ("Private-1", CREATORS[:4], ("none", "c23", "c40")),
                ("Private-2", ("checker", "sharp"), ("noise", "blur", "c40")),
            ),
            1,
        ):
            _test_part(folder, part, creators, posts, seed * 16 + number, size, boxes, meta, ratings)
            bar.update()
    dataset = folder / "Detection Dataset"
    _write_csv(dataset / "Detection Dataset Meta.csv", META, meta)
    for part, name in (("Public", "Public"), ("Private-1", "Private"), ("Private-2", "Private-2")):
        labels = {row[0]: row[1] for row in meta if row[2] == part}
        (dataset / f"{name} Label.json").write_text(json.dumps(labels, indent=0))
    _write_csv(folder / "boxes.csv", ["video", "frame", "x1", "y1", "x2", "y2", "probability"], boxes)
    _write_csv(folder / "ratings.csv", ["submission", "clip", "rater", *(t.lower() for t in TERMS)], ratings)
    write_json(done, record)
    return folder


META = ["videoName", "label", "split", "target", "compression", "face-swap method"]


def _train_set(folder: Path, seed: int, size: Size, boxes: list) -> None:
    """One real clip per person and one fake: `diverse` draws its creator from the first three, `single` is
    always the first."""
    scene = scenes(size.train, seed * 16, size)
    rng = np.random.default_rng((seed, 0))
    lists: dict[str, list[str]] = {"diverse": [], "single": []}
    jobs: list[tuple[Path, np.ndarray]] = []
    for person in range(size.train):
        creator = CREATORS[int(rng.integers(3))]
        filmed = record(scene, person, size, rng)
        clips = {"real": filmed.target}
        for name in dict.fromkeys((CREATORS[0], creator)):
            clips[name] = swap(filmed, name, rng)
        for name, frames in clips.items():
            path = folder / "Train" / f"{person:04d}-{name}.mp4"
            jobs.append((path, post_process(frames, "none", rng)))
            _note_boxes(boxes, path.name, filmed.landmarks, size, rng)
        lists["diverse"] += [f"{person:04d}-real.mp4 0", f"{person:04d}-{creator}.mp4 1"]
        lists["single"] += [f"{person:04d}-real.mp4 0", f"{person:04d}-{CREATORS[0]}.mp4 1"]
    _encode(jobs, "none")
    for name, lines in lists.items():
        (folder / "Train" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _test_part(
    folder: Path,
    part: str,
    creators: Sequence[str],
    posts: Sequence[str],
    seed: int,
    size: Size,
    boxes: list,
    meta: list,
    ratings: list,
) -> None:
    scene, others = scenes(size.test, seed, size), scenes(size.test, seed + 7, size, donors=False)
    rng = np.random.default_rng((seed, 1))
    folder = folder / "Detection Dataset" / ("Private" if part == "Private-1" else part)
    jobs: dict[str, list] = {post: [] for post in posts}
    for person in range(size.test):
        target = f"{person // 2 + 1}/{person % 2 + 1}"
        filmed, other = (record(shown, person, size, rng) for shown in (scene, others))
        ideal = swap(filmed, "ideal", rng)
        clips = [("", shown.target, shown.landmarks) for shown in (filmed, other)]
        clips += [(name, swap(filmed, name, rng), filmed.landmarks) for name in creators]
        for creator, frames, landmarks in clips:
            post = posts[int(rng.integers(len(posts)))]
            name = "".join(map(chr, rng.integers(97, 123, 10))) + ".mp4"
            clip = post_process(frames, post, rng)
            jobs[post].append((folder / name, clip))
            _note_boxes(boxes, name, landmarks, size, rng)
            meta.append([name, int(bool(creator)), part, f"{target}/1" if creator else target, post, creator])
            if creator and part != "Private-2":
                for rater in range(5):
                    marks = simulated_rating(clip, ideal, filmed, rng)
                    ratings.append([creator, name, rater, *marks])
    for post, clips in jobs.items():
        _encode(clips, post)


# --- pictures ---------------------------------------------------------------------------------------


def scenes(people: int, seed: int, size: Size, donors: bool = True) -> Scene:
    """Draw `people` targets in motion, and for each a donor with the target's head shape, hair, complexion,
    pose and light.

    Pure function of the arguments.
    """
    if size.people == "simple":
        return Scene(*simple_scenes(people, seed, size.keys, size.pixels))
    base = sample(people, seed, strength=0.6, worn=0.3).replace(noise=0.0, hat=0.0)
    base = base.replace(scale=1.15)
    donor = sample(people, seed + 1000, strength=0.6, worn=0.3)
    kept = {name: base[name] for name in (*SKULL, *HAIR, *COMPLEXION, "masculinity", "greying")}
    donor = Params(donor.identity, base.attributes, base.age, base.seed).replace(**kept)
    steps, turns = np.linspace(0, 1, size.keys), sample(people, seed + 2000, strength=0.6)
    moving = ("yaw", "pitch", "mouth_open", "smile", "shift_x", "gaze_x")
    parts = {"target": [], "donor": [], "landmarks": []}
    for step in steps:
        change = {name: base[name] + step * 0.4 * (turns[name] - base[name]) for name in moving}
        drawn = draw(base.replace(**change), size.pixels, camera=False)
        parts["target"].append(drawn.image)
        parts["landmarks"].append(drawn.landmarks)
        if donors:
            parts["donor"].append(draw(donor.replace(**change), size.pixels, camera=False).image)
    target, donor_frames = (
        torch.stack(parts[name], 1).permute(0, 1, 3, 4, 2).mul(255).numpy() if parts[name] else np.empty(0)
        for name in ("target", "donor")
    )
    return Scene(target, donor_frames, torch.stack(parts["landmarks"], 1).numpy())


def record(scene: Scene, person: int, size: Size, rng: np.random.Generator) -> Recording:
    """A person (and the donor, where there is one) filmed: blended frames between the drawn ones, and the
    noise of a camera, deviation 2 of 255, new in every frame.
    """
    fraction = np.arange(size.keys * size.every - size.gap) / size.every
    low = np.floor(fraction).astype(int)
    high = np.minimum(low + 1, size.keys - 1)
    share = (fraction - low).astype(np.float32)

    def between(keys: np.ndarray) -> np.ndarray:
        weight = share.reshape(-1, *[1] * (keys.ndim - 1))
        return keys[low] * (1 - weight) + keys[high] * weight

    target, donor = (
        between(keys[person]) + 2 * rng.standard_normal((len(low), *keys.shape[2:]), np.float32)
        if keys.size
        else keys
        for keys in (scene.target, scene.donor)
    )
    return Recording(target, donor, between(scene.landmarks[person]))


def swap(filmed: Recording, creator: str, rng: np.random.Generator) -> np.ndarray:
    """A creator's fake, (F, P, P, 3) in [0, 255]. `ideal`: the swap without any artefact."""
    offset = rng.choice([-1, 1], 3) * rng.uniform(18, 32, 3) if creator == "seam" else np.zeros(3)
    frames = []
    for frame, face, landmarks in zip(*filmed, strict=True):
        distance = ellipse_distance(landmarks, frame.shape[0])
        weight = np.clip((0.9 - distance) / 0.25, 0, 1)[..., None]
        inside = weight[..., 0] > 0.5
        # Colour of the donor's face to that of the target's, as every face swap does.
        face = face + (frame[inside].mean(0) - face[inside].mean(0))
        if creator == "seam":
            weight = (distance < 0.75).astype(np.float32)[..., None]
        frames.append(frame * (1 - weight) + weight * (process(face, creator) + offset))
    return np.clip(np.stack(frames), 0, 255).astype(np.float32)


def process(face: np.ndarray, creator: str) -> np.ndarray:
    """What a creator does to the donor's face (P, P, 3) before compositing."""
    side = face.shape[0]
    if creator == "lowres":
        small = cv2.resize(face, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)
    if creator == "smooth":
        return cv2.GaussianBlur(face, (0, 0), 1.6)
    if creator == "sharp":
        return face + 2.5 * (face - cv2.GaussianBlur(face, (0, 0), 1.2))
    if creator == "checker":
        rows, columns = np.indices(face.shape[:2])
        return face + 12.0 * (1 - 2 * ((rows + columns) % 2))[..., None]
    return face


def ellipse_distance(landmarks: np.ndarray, pixels: int) -> np.ndarray:
    """Squared distance from the centre of a face (68, 2), 1 on the ellipse around jaw and brows. (P, P)."""
    low, high = landmarks.min(0), landmarks.max(0)
    centre, axes = (low + high) / 2, (high - low) / 2 * (1.0, 1.1)
    y, x = np.indices((pixels, pixels), dtype=np.float32)
    return (((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2).astype(np.float32)


def post_process(frames: np.ndarray, post: str, rng: np.random.Generator) -> np.ndarray:
    """What the organisers do to a clip (F, P, P, 3) before the encoder; bytes."""
    if post == "noise":
        frames = frames + 4 * rng.standard_normal(frames.shape, np.float32)
    if post == "blur":
        frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.7) for frame in frames])
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _encode(jobs: Sequence[tuple[Path, np.ndarray]], post: str) -> None:
    if jobs:
        write_clips([path for path, _ in jobs], [clip for _, clip in jobs], POSTS[post])


def _note_boxes(boxes: list, name: str, landmarks: np.ndarray, size: Size, rng: np.random.Generator) -> None:
    """A face detector's boxes: the true ones, moved by about a pixel."""
    for index in range(0, len(landmarks), size.every):
        points = landmarks[index]
        box = np.concatenate([points.min(0), points.max(0)]) + rng.normal(0, 0.8, 4)
        boxes.append([name, index, *(f"{value:.2f}" for value in box), "0.99"])


def simulated_rating(
    clip: np.ndarray, ideal: np.ndarray, filmed: Recording, rng: np.random.Generator
) -> list[int]:
    """One simulated rater's five marks, 1 to 5, of a fake: what is wrong with its face, plus the rater's
    mood.

    Realism, mouth and quality fall with the distance to the ideal swap, ID with the distance to the donor.
    """
    frames, donor = clip.astype(np.float32), filmed.donor
    inside = np.stack([ellipse_distance(points, frames.shape[1]) < 0.7 for points in filmed.landmarks])

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.mean((a[inside] - b[inside]) ** 2)))

    artefact = distance(frames, ideal)
    detail = abs(float(np.diff(frames, axis=2).std() - np.diff(ideal, axis=2).std()))
    true = [
        5 - artefact / 8,
        4.8 - artefact / 10,
        4.8 - detail / 2,
        4.2 - artefact / 20,
        4.6 - distance(frames - frames[inside].mean(0), donor - donor[inside].mean(0)) / 10,
    ]
    return [int(np.clip(round(value + rng.normal(0, 0.5)), 1, 5)) for value in true]


def _write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
