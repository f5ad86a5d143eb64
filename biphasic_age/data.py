"""Faces with age, identity and layout: drawn faces for the demo, and the training samples of any source.

Public sets are read in `datasets.py`; the two-head scene is drawn in `scene.py`.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from biphasic_age import datasets
from biphasic_age.ages import age2group, group_names
from biphasic_age.layouts import CLASSES, mirrored
from biphasic_age.scene import GROUPS, PARTS, draw_scenes
from shared import faces
from shared.io import progress, read_image
from shared.runtime import UserError

if TYPE_CHECKING:
    from biphasic_age.train import Config

DataName = Literal["faces", "scene", "morph", "cacd", "utkface", "ffhq-aging", "fgnet", "csv"]
TEST_SEED, JUDGE_SEED = 3_000_017, 2_000_003
"""Seeds of drawn test people and of the people that judges learn from; no training seed should be one."""
DRAWN_AT_ONCE = 128
DRAWN_AGES = (20.0, 84.0)
DRAWN_LIMITS = (36.0, 52.0, 68.0)
"""Drawn people grey and wrinkle between 40 and 75, so that the paper's groups would look alike: four groups
of 16 years instead."""


class FaceSet:
    """Faces in memory or on disk.

    `ages` (N,) years, `groups` (N,) int64, `people` (N,) int64 and their `names` by number, `classes` number
    of layout classes, `name`; `attributes` (N, A) float, 1 or 0, -1 where unknown, named by
    `attribute_names`: what ageing should keep.
    `load(i)` gives the picture (3, S, S) in [0, 1] and the labels (S, S) uint8.
    """

    attribute_names: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        ages: Tensor,
        people: Tensor,
        limits: Sequence[float],
        classes: int,
        attributes: Tensor | None = None,
    ):
        self.name, self.ages, self.people, self.classes = name, ages, people, classes
        self.attributes = torch.zeros(len(ages), 0) if attributes is None else attributes
        self.names = [str(k) for k in range(int(people.max()) + 1)]
        self.limits = tuple(limits)
        self.groups = age2group(ages, limits)

    def __len__(self) -> int:
        return len(self.ages)

    def load(self, i: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class MemoryFaces(FaceSet):
    """Faces or scenes that were drawn. images (N, 3, S, S) in [0, 1], layouts (N, S, S) uint8; params: what
    was drawn, of faces."""

    def __init__(self, images: Tensor, layouts: Tensor, params: faces.Params | None = None, **about):
        super().__init__(**about)
        self.images, self.layouts, self.params = images, layouts, params

    def load(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.layouts[i]


class FileFaces(FaceSet):
    """Faces of a public set, read when they are asked for and resized to a square. A record without a layout
    gives one class everywhere."""

    def __init__(self, records: Sequence[datasets.Record], size: int, order: datasets.LayoutOrder, **about):
        ages = torch.tensor([record.age for record in records])
        number = {name: i for i, name in enumerate(sorted({record.identity for record in records}))}
        people = torch.tensor([number[record.identity] for record in records])
        sexes = torch.tensor([[{"M": 1.0, "F": 0.0}.get(record.sex, -1.0)] for record in records])
        super().__init__(ages=ages, people=people, classes=len(CLASSES), attributes=sexes, **about)
        self.names, self.attribute_names = list(number), ("male",)
        self.records, self.size, self.order = list(records), size, order

    def load(self, i: int) -> tuple[Tensor, Tensor]:
        record = self.records[i]
        image = read_image(record.path)
        if tuple(image.shape[-2:]) != (self.size, self.size):
            shape = (self.size, self.size)
            image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)
        if record.layout is None:
            return image, torch.zeros(self.size, self.size, dtype=torch.uint8)
        return image, datasets.read_layout(record.layout, self.size, self.order)


def sample_people(people: int, seed: int, pictures: int = 1) -> tuple[faces.Params, Tensor]:
    """Drawn people, frontal and cropped to the head as ageing sets are: their parameters, `pictures` of each
    with other pose, light and ages, and the person's number (people * pictures,).

    Hairlines do not recede with age, because a translation keeps the layout of its input; everybody greys
    between about 40 and 80.
    """
    identity = faces.sample_identities(people, seed).repeat_interleave(pictures, 0)
    n = people * pictures
    attributes = faces.sample_attributes(n, seed, strength=0.3, worn=0.0, identity=identity)
    ages = faces.sample_ages(n, seed, *DRAWN_AGES)
    params = faces.make_params(identity, attributes, ages, seed)
    params = params.replace(
        scale=1.35 * params["scale"], shift_x=0.0, shift_y=-0.02, balding=0.0, greying=0.4 * params["greying"]
    )
    return params, torch.arange(people).repeat_interleave(pictures)


def draw_people(params: faces.Params, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, S, S) in [0, 1] and labels (n, S, S) uint8 in BiSeNet's order."""
    images, layouts = [], []
    for start in progress(range(0, len(params), DRAWN_AT_ONCE), "drawing faces"):
        drawn = faces.draw(params[start : start + DRAWN_AT_ONCE], size)
        images.append(drawn.image)
        layouts.append(faces.to_bisenet(drawn.semantics))
    return torch.cat(images), torch.cat(layouts)


DRAWN_ATTRIBUTES = ("masculinity", "skin_tone", "smile")


def drawn_faces(
    people: int, seed: int, size: int, pictures: int = 1, limits: Sequence[float] = DRAWN_LIMITS
) -> MemoryFaces:
    """Procedural faces of known age and identity; a pure function of the arguments."""
    params, numbers = sample_people(people, seed, pictures)
    middle = torch.tensor([0.5, 0.5, 0.05])
    columns = torch.stack([params[name] for name in DRAWN_ATTRIBUTES], 1)
    about = {"ages": params.age, "people": numbers, "limits": limits, "classes": len(CLASSES)}
    about["attributes"] = (columns > middle).float()
    drawn = MemoryFaces(*draw_people(params, size), params, name="drawn faces", **about)
    drawn.attribute_names = ("male", "dark skin", "smiling")
    return drawn


def scene_faces(count: int, seed: int, size: int = 32, heads: int = 2) -> MemoryFaces:
    """The two-head scene as a training set: `count` scenes, each at one age only. The four ages are called
    25, 35, 45 and 55."""
    scenes = draw_scenes(count, seed, size, heads)
    rng = torch.Generator().manual_seed(seed + 1)
    group = torch.arange(count) % GROUPS
    group = group[torch.randperm(count, generator=rng)]
    images = scenes.image[torch.arange(count), group]
    about = {"ages": 25.0 + 10 * group, "people": torch.arange(count), "limits": (30.0, 40.0, 50.0)}
    return MemoryFaces(images, scenes.layout, name="two-head scene", classes=len(PARTS), **about)


def open_faces(config: "Config", data: DataName, part: datasets.Part, seed: int = 0) -> FaceSet:
    """Training or test faces of a set. Raises UserError when a public set is not there."""
    if data == "scene":
        count = config.scene_images if part == "train" else config.test_images
        seed = seed if part == "train" else TEST_SEED
        return scene_faces(count, seed, config.scene_size, config.scene_heads)
    if data == "faces":
        if part == "test":
            return drawn_faces(config.test_images, TEST_SEED, config.image_size, limits=config.limits)
        people = config.train_images // config.pictures
        return drawn_faces(people, seed, config.image_size, config.pictures, config.limits)
    root = config.list if data == "csv" else config.data_root
    if root is None:
        option = "--list FILE.csv" if data == "csv" else "--data-root DIR"
        raise UserError(f"--data {data} needs {option}")
    records = datasets.READERS[data](root)
    if part == "train" and os.environ.get("RANK", "0") == "0":
        groups = age2group(torch.tensor([record.age for record in records]), config.limits)
        print(datasets.summary(data, records, groups, group_names(config.limits)))
    if config.layouts:
        base = config.layout_root or (root.parent if data == "csv" else root)
        records = datasets.with_layouts(records, base)
    records = datasets.split(records, config.fold, part)
    return FileFaces(records, config.image_size, config.layout_order, name=data, limits=config.limits)


def mixed(*numbers: int) -> int:
    """A 63-bit hash of some integers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


class TrainSet(Dataset):
    """Training samples, as often from each age group: item (_, draw) is a face of a group, both chosen by
    `draw` alone.

    Age sets are heavily skewed, so the sampler's own index is not used. flip: mirror every other picture with
    its layout; jitter: strength of a random change of brightness, contrast and colour. A sample: `image` (3,
    S, S) in [-1, 1], `layout` (S, S) uint8, `group`, `age`, `identity`.
    """

    def __init__(self, source: FaceSet, seed: int, flip: bool = False, jitter: float = 0.0):
        self.source, self.seed, self.flip, self.jitter = source, seed, flip, jitter
        count = len(source.limits) + 1
        members = [(source.groups == k).nonzero().flatten() for k in range(count)]
        self.members = [entry for entry in members if len(entry)]

    def __len__(self) -> int:
        return len(self.source)

    def pick(self, draw: int) -> int:
        """Which picture a draw takes."""
        group = self.members[draw % len(self.members)]
        return int(group[mixed(self.seed, draw) % len(group)])

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        draw = at[1]
        i = self.pick(draw)
        image, layout = self.source.load(i)
        if self.flip and mixed(self.seed, draw, 1) & 1:
            image = image.flip(-1)
            layout = mirrored(layout) if self.source.classes == len(CLASSES) else layout.flip(-1)
        if self.jitter:
            rng = torch.Generator().manual_seed(mixed(self.seed, draw, 2) % 2**62)
            image = jittered(image, self.jitter, rng)
        return {
            "image": image * 2 - 1,
            "layout": layout,
            "group": self.source.groups[i],
            "age": self.source.ages[i],
            "identity": self.source.people[i],
            "attributes": self.source.attributes[i],
        }


class PairSet(TrainSet):
    """Training samples for recognition: draws 2n and 2n + 1 are two pictures of one person. Only people with
    several pictures take part."""

    def __init__(self, source: FaceSet, seed: int, flip: bool = False, jitter: float = 0.0):
        super().__init__(source, seed, flip, jitter)
        order = source.people.argsort(stable=True)
        groups = order.split(source.people.bincount().tolist())
        self.people = [group for group in groups if len(group) > 1]

    def pick(self, draw: int) -> int:
        pair = draw // 2
        own = self.people[mixed(self.seed, pair, 3) % len(self.people)]
        first = mixed(self.seed, pair, 4) % len(own)
        other = (first + 1 + mixed(self.seed, pair, 5) % (len(own) - 1)) % len(own)
        return int(own[other if draw % 2 else first])


def jittered(image: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """(3, H, W) in [0, 1] with contrast, brightness and each colour changed by up to `strength`."""
    contrast, brightness, *gains = ((torch.rand(5, generator=rng) * 2 - 1) * strength).tolist()
    mean = image.mean()
    image = mean + (1 + contrast) * (image - mean) + brightness
    return (image * (1 + torch.tensor(gains).view(3, 1, 1))).clamp(0, 1)


def all_faces(source: FaceSet, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `limit` pictures (n, 3, S, S) in [-1, 1] and their layouts (n, S, S)."""
    loaded = [source.load(i) for i in range(min(len(source), limit or len(source)))]
    images, layouts = zip(*loaded, strict=True)
    return torch.stack(images) * 2 - 1, torch.stack(layouts)
