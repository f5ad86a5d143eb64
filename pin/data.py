"""Where images come from: procedural faces, identity folders (FaceScrub, LFW), CelebA; and ArcFace's
alignment."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pin.world import draw_people
from shared.faces import draw, make_params, sample_ages, sample_attributes, sample_identities
from shared.io import find_images, read_image, read_utf8, to_pil
from shared.runtime import UserError

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    np.float32,
)
"""ArcFace's places of eyes, nose and mouth corners in a 112 x 112 crop, (x, y) in pixels."""


def preprocess(path: Path, size: int = 112, landmarks: np.ndarray | None = None) -> Tensor:
    """Image file -> grey (1, size, size) in [-1, 1], as the official code prepares it.

    Grey or colour files; bilinear to exactly size x size (the aspect is not kept), ITU-R 601 luma. With
    landmarks (5, 2) the face is first moved to ArcFace's template. Raises UserError on a damaged file.
    """
    picture = to_pil(read_image(path))
    if landmarks is None:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    else:
        picture = Image.fromarray(align(np.asarray(picture), landmarks, size))
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    return torch.from_numpy(grey)[None].div(127.5).sub(1)


def align(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """Crop (size, size, C) by the least-squares similarity from `landmarks` (5, 2) to the template
    (Umeyama)."""
    target = TEMPLATE * (size / 112)
    source_mean, target_mean = landmarks.mean(0), target.mean(0)
    source, moved = landmarks - source_mean, target - target_mean
    u, s, vt = np.linalg.svd(moved.T @ source)
    signs = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ np.diag(signs) @ vt
    scale = (s * signs).sum() / np.square(source).sum()
    matrix = np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])
    return cv2.warpAffine(image, matrix.astype(np.float64), (size, size), flags=cv2.INTER_LINEAR)


def read_landmarks(path: Path) -> dict[str, np.ndarray]:
    """`file x1 y1 ... x5 y5` lines (CelebA's landmark lists, or your own) -> file -> (5, 2) pixels.

    Lines of another form may stand before the first alone (CelebA's two). Raises UserError that names a line
    that cannot be read, and one whose points are not finite or all the same.
    """
    found = {}
    for number, line in enumerate(read_utf8(path, "a list of landmarks").splitlines(), 1):
        fields = line.split()
        if len(fields) != 11 and (not found or not fields):
            continue
        try:
            points = np.array(fields[1:], np.float32).reshape(5, 2)
        except ValueError:
            raise UserError(f"{path}, line {number}: no ten numbers after {fields[0]}") from None
        if not np.isfinite(points).all() or (points == points[0]).all():
            raise UserError(f"{path}, line {number}: the points of {fields[0]} are no face's")
        found[fields[0]] = points
    if not found:
        raise UserError(f"{path}: no line of a file name and ten numbers (x y of eyes, nose, mouth corners)")
    return found


def landmarks_of(path: Path, listed: dict[str, np.ndarray]) -> np.ndarray:
    """The points (5, 2) of an image from a list that names it alone or with folders above it, the longer name
    first. UserError when it is not in the list."""
    tails = ("/".join(path.parts[begin:]) for begin in range(len(path.parts)))
    points = next((listed[tail] for tail in tails if tail in listed), None)
    if points is None:
        raise UserError(f"no landmarks for {path}: add its line to the list")
    return points


class TensorFaces(Dataset):
    """Images held in memory: images (N, 1, S, S) in [-1, 1], labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class ImageFiles(Dataset):
    """Image files, read when asked for: (1, size, size) in [-1, 1] and the label."""

    def __init__(self, paths: list[Path], labels: list[int], size: int, landmarks: dict | None = None):
        self.paths, self.labels, self.size = paths, torch.tensor(labels), size
        self.landmarks = landmarks

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        points = None if self.landmarks is None else landmarks_of(path, self.landmarks)
        return preprocess(path, self.size, points), self.labels[index]


# --- procedural -----------------------------------------------------------------------------------


def procedural(
    world: str, people: int, per_person: int, size: int, seed: int, transposed: float = 0.0
) -> TensorFaces:
    """Embedded faces. world: "simple" (soft-edged cartoons) or "faces" (the project's shaded faces)."""
    generator = torch.Generator().manual_seed(seed)
    if world == "simple":
        return TensorFaces(*draw_people(people, per_person, size, generator, transposed))
    return TensorFaces(*_shaded_people(people, per_person, size, seed))


def _shaded_people(people: int, per_person: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Adults of shared/faces.py in grey, half the usual spread of pose and light, nothing worn."""
    identity = sample_identities(people, seed).repeat_interleave(per_person, 0)
    age = sample_ages(people, seed).repeat_interleave(per_person)
    attributes = sample_attributes(len(identity), seed, strength=0.5, worn=0.0)
    image = draw(make_params(identity, attributes, age, seed), size).image
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    labels = torch.arange(people).repeat_interleave(per_person)
    return (image * luma).sum(1, keepdim=True) * 2 - 1, labels


# --- folders --------------------------------------------------------------------------------------


def identity_folder(root: Path, size: int, landmarks: Path | None = None) -> ImageFiles:
    """`root/<person>/<any>.jpg`: FaceScrub, LFW, CASIA-WebFace, AT&T, your own; folders below a person's are
    his too, as in the official loader. Raises UserError if empty."""
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; expected {root}/<person>/<image>.jpg, one folder per person"
        )
    paths, labels = [], []
    people = sorted(entry for entry in root.iterdir() if entry.is_dir())
    for number, person in enumerate(people):
        files = find_images(person)
        paths += files
        labels += [number] * len(files)
    if not paths:
        raise UserError(f"{root}: no images in subfolders; expected {root}/<person>/<image>.jpg")
    return ImageFiles(paths, labels, size, landmarks and read_landmarks(landmarks))


def celeba(root: Path, size: int, landmarks: Path | None = None) -> ImageFiles:
    """CelebA: `root/img_align_celeba/*.jpg` (or the images in `root` itself), with `identity_CelebA.txt`
    beside.

    Without the identity file every label is -1: enough for basis, DAE and ESN, which need none. Raises
    UserError when there are no images, on a bad line of the identity file, and when that lacks images.
    """
    folder = root / "img_align_celeba" if (root / "img_align_celeba").is_dir() else root
    paths = find_images(folder, subfolders=False)
    if not paths:
        raise UserError(
            f"{root}: no CelebA here; expected {root}/img_align_celeba/000001.jpg (mmlab.ie.cuhk.edu.hk)"
        )
    record = root / "identity_CelebA.txt"
    listed = read_utf8(record, "a list of identities").splitlines() if record.is_file() else []
    identities: dict[str, int] = {}
    for number, line in enumerate(listed, 1):
        name, _, person = line.strip().partition(" ")
        if not person.strip().isdigit():
            raise UserError(f"{record}, line {number}: {line!r} is not '<image> <number of the person>'")
        identities[name] = int(person)
    unlisted = [path.name for path in paths if path.name not in identities]
    if identities and unlisted:
        raise UserError(
            f"{record}: {len(unlisted)} of {len(paths)} images have no line, the first is {unlisted[0]}; "
            "get the list anew, or take it away where no recogniser is trained"
        )
    labels = [identities.get(path.name, -1) for path in paths]
    return ImageFiles(paths, labels, size, landmarks and read_landmarks(landmarks))


def part_of_people(files: ImageFiles, test: bool, share: float = 0.75) -> TensorFaces:
    """Load a part of a small set into memory: the first `share` of its people, who are trained on, or with
    `test` the others."""
    people = int(files.labels.max()) + 1
    training = files.labels < round(share * people)
    if training.all() or not training.any():
        raise UserError(f"{people} people cannot be split into training and test: at least 2 are needed")
    chosen = (~training if test else training).nonzero().squeeze(1)
    return TensorFaces(torch.stack([files[i][0] for i in chosen.tolist()]), files.labels[chosen])


# --- what a run uses ------------------------------------------------------------------------------


def training_faces(config) -> Dataset:
    """The images to train on, from the data fields of a training Config."""
    if config.data in ("simple", "faces"):
        return procedural(
            config.data,
            config.people,
            config.images_per_person,
            config.size,
            2 * config.seed,
            config.transposed,
        )
    files = image_files(config)
    return part_of_people(files, test=False) if config.recognizers else files


def test_faces(config) -> TensorFaces:
    """Faces of people whom no network of the run has seen."""
    if config.data in ("simple", "faces"):
        return procedural(
            config.data,
            config.test_people,
            config.test_images,
            config.size,
            2 * config.seed + 1,
            config.transposed,
        )
    return part_of_people(image_files(config), test=True)


def image_files(config) -> Dataset:
    """The image files under `data_root`."""
    if config.data_root is None:
        raise UserError(f"--data {config.data} needs --data-root: the folder that holds the images")
    reader = celeba if config.data == "celeba" else identity_folder
    return reader(config.data_root, config.size, config.landmarks)
