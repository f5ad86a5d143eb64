"""Pictures with landmark pictures and masks, and the pairs that training and evaluation take from them.

The demo's world is drawn by `shared.faces` with known truth, a simpler one by `simple.py`; the public data
sets are in `datasets.py`.

A *picture set* has `len`, `name`, `names[i]`, and `load(i)` -> {image (3, S, S) in [-1, 1], landmarks (3, S,
S), mask (1, S, S) with 1 = background}. Pairing follows the paper's code: picture a in random order, picture
b any other one, identities never used.
"""

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from faceswapper import datasets
from faceswapper.drawing import LandmarkValues, draw_landmarks, face_mask, ibug_to_wflw
from faceswapper.simple import SimpleParams, draw_simple, simple_world
from shared import faces
from shared.io import progress
from shared.runtime import UserError, step_generator

if TYPE_CHECKING:
    from faceswapper.train import Config

Params = faces.Params | SimpleParams
World = Literal["faces", "simple"]
"""What is drawn, with known truth: the repository's procedural faces, or flat ellipses."""
DRAWN: tuple[World, ...] = get_args(World)
INSIDE = ("skin_tone", "undertone", "eye_hue", "eye_lightness", "brow_thickness", "brow_height", "nose_width")
WORN = ("beard", "moustache", "lipstick", "lipstick_hue", "eye_shadow", "eye_shadow_hue", "blush")
"""A person in the demo's world: these identity columns of `shared.faces` and, always worn, these attributes.
They lie inside the face and are not drawn in the landmark picture. Outline, hair, and the geometry of eyes
and mouth change from picture to picture, as pose and light do: a swap keeps them."""
PERSON = (*INSIDE, *WORN)
POSE = ("yaw", "pitch", "shift_x", "shift_y")
EXPRESSION = ("mouth_open", "smile", "eye_open")
DRAWN_AT_ONCE = 128


class PictureSet(Protocol):
    """Where pictures come from; see the module's text."""

    name: str
    names: list[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> dict[str, Tensor]: ...


def always_worn(people: int, seed: int) -> dict[str, Tensor]:
    """What each person wears in every picture, `WORN` by name, (people,): half of them beard or moustache or
    both, the others lipstick, eye shadow or both."""
    draws = torch.rand(len(WORN) + 2, people, generator=step_generator(seed, 0, stream=11))
    hairy, both = draws[-1] < 0.5, draws[-2]
    first, second = (both < 0.7).float(), (both > 0.3).float()
    strong = 0.7 + 0.3 * draws
    values = [hairy * first * strong[0], hairy * second * strong[1]]
    values += [~hairy * first * strong[2], draws[3], ~hairy * second * strong[4], draws[5], ~hairy * draws[6]]
    return dict(zip(WORN, values, strict=True))


def world(people: int, per_person: int, seed: int) -> tuple[faces.Params, Tensor]:
    """Parameters of people x per_person pictures of the demo's world, person by person, and the person of
    each picture (N,) int64. A pure function of its arguments; people of different seeds are different."""
    n = people * per_person
    person = torch.arange(people).repeat_interleave(per_person)
    own = faces.sample_identities(people, 2 * seed)[person]
    identity = faces.sample_identities(n, 2 * seed + 1)
    inside = [faces.IDENTITY.index(name) for name in INSIDE]
    identity[:, inside] = own[:, inside]
    attributes = faces.sample_attributes(n, 2 * seed, strength=0.6, worn=0)
    params = faces.make_params(identity, attributes, 30.0, seed)
    worn = {name: value[person] for name, value in always_worn(people, seed).items()}
    # Near enough for details to have pixels; a fringe over the brows would hide a part of the person.
    return params.replace(
        scale=1.45 * params["scale"], noise=0.0, blur=0.0, fringe=0.5 * params["fringe"], freckles=0.0,
        mole1_size=0.0, mole2_size=0.0, **worn,
    ), person  # fmt: skip


def open_world(name: World, people: int, per_person: int, seed: int) -> tuple[Params, Tensor]:
    """`world` or `simple_world`."""
    return (simple_world if name == "simple" else world)(people, per_person, seed)


def true_swap(source: Params, target: Params) -> Params:
    """The target's picture as it would be with the source's identity: what a perfect swap gives inside the
    face."""
    if isinstance(target, SimpleParams):
        return SimpleParams(source.identity, target.attributes)
    return target.replace(**{name: source[name] for name in PERSON})


class DrawnFaces:
    """Drawn pictures in memory: images (N, 3, S, S) uint8, points (N, 98, 2) in pixels, masks (N, 1, S, S)
    uint8 with 1 = background, labels (N, S, S) uint8 in BiSeNet's order.

    person (N,): who it is, for the networks that judge; swap training does not look at it.
    """

    def __init__(self, params: Params, person: Tensor, size: int, landmark_values: LandmarkValues = "unit"):
        self.params, self.person, self.size, self.name = params, person, size, "drawn faces"
        self.names = [f"face {i}" for i in range(len(params))]
        parts = []
        for start in progress(range(0, len(params), DRAWN_AT_ONCE), "drawing faces"):
            images, points, labels = render(params[start : start + DRAWN_AT_ONCE], size)
            lines = draw_landmarks(points, size, landmark_values)
            parts.append((to_bytes(images), points, lines, face_mask(labels)[:, None].eq(0), labels))
        self.images, self.points, self.lines, masks, self.labels = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        self.masks = masks.to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.batch([i]).items()}

    def batch(self, chosen: list[int] | Tensor | slice) -> dict[str, Tensor]:
        """Several pictures at once: image, landmarks, mask."""
        return {
            "image": from_bytes(self.images[chosen]),
            "landmarks": self.lines[chosen],
            "mask": self.masks[chosen].float(),
        }


def render(params: Params, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, size, size) in [0, 1], 98 points (B, 98, 2) in pixels, BiSeNet's labels (B, size, size)
    uint8. The simple world has skin and background alone."""
    if isinstance(params, SimpleParams):
        images, points, face = draw_simple(params, size)
        return images, points, face.to(torch.uint8)
    drawn = faces.draw(params, size)
    return drawn.image, ibug_to_wflw(drawn.landmarks), faces.to_bisenet(drawn.semantics)


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return images.mul(255).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


class Pairs(Dataset):
    """Training pairs: item (i, draw) is picture i as `a` and a uniformly random other picture as `b`, a pure
    function of (seed, draw)."""

    def __init__(self, pictures: PictureSet, seed: int):
        if len(pictures) < 2:
            raise UserError(f"{pictures.name}: {len(pictures)} picture; a pair needs two")
        self.pictures, self.seed = pictures, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def partner(self, i: int, draw: int) -> int:
        """The other picture of a pair."""
        step = int(np.random.default_rng((self.seed, 7, draw)).integers(len(self.pictures) - 1))
        return (i + 1 + step) % len(self.pictures)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        first, second = self.pictures.load(at[0]), self.pictures.load(self.partner(*at))
        return {f"{k}_a": v for k, v in first.items()} | {f"{k}_b": v for k, v in second.items()}


def open_pictures(config: "Config", seed: int) -> PictureSet:
    """Training pictures of a run. Raises UserError when a public set is not there."""
    if config.data in DRAWN:
        params, person = open_world(config.data, config.train_people, config.per_person, seed)
        return DrawnFaces(params, person, config.size.img_size, config.landmark_values)
    if config.data_root is None:
        raise UserError(f"--data {config.data} needs --data-root. {datasets.LAYOUTS[config.data]}")
    return datasets.open_set(
        config.data, config.data_root, config.size.img_size, config.pictures_folder, config.landmarks_folder,
        config.masks_folder,
    )  # fmt: skip


def unseen_pairs(
    size: int, people: int, seed: int, landmark_values: LandmarkValues, name: World = "faces"
) -> tuple[DrawnFaces, DrawnFaces]:
    """Sources and targets of unseen people, source i to be put on target i, never the same person."""
    params, person = open_world(name, people, 2, seed)
    source, target = torch.arange(0, 2 * people, 2), torch.arange(1, 2 * people, 2).roll(1)
    return tuple(DrawnFaces(params[i], person[i], size, landmark_values) for i in (source, target))
