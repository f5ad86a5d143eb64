"""What the trainer and the evaluation read: tensors of images with identity, camera and source domain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meta_reid import walkers
from meta_reid.items import Item, Split
from shared.io import read_pixels
from shared.runtime import UserError, step_generator

TRAIN_PEOPLE, TRAIN_VIEWS, TEST_PEOPLE, TEST_VIEWS, QUERIES = 40, 8, 60, 6, 2


@dataclass(frozen=True)
class Labels:
    """Labels of all training images, (N,) each."""

    domain: Tensor
    """Source domain, 0..K-1."""
    local: Tensor
    """Identity within the domain, 0..classes[domain]-1, whatever gaps the original numbers have."""
    union: Tensor
    """Identity in the union of all domains."""
    names: list[str]
    """Names of the domains."""

    @property
    def classes(self) -> list[int]:
        """Identities of each domain."""
        return [int(self.local[self.domain == k].max()) + 1 for k in range(len(self.names))]


def label(identities: Sequence[Sequence[int]], names: Sequence[str]) -> Labels:
    """Number the identities of each domain without gaps, in ascending order, and those of the union."""
    domain, local, union, offset = [], [], [], 0
    for k, original in enumerate(identities):
        number = {identity: i for i, identity in enumerate(sorted(set(original)))}
        local += [number[identity] for identity in original]
        union += [number[identity] + offset for identity in original]
        domain += [k] * len(original)
        offset += len(number)
    return Labels(torch.tensor(domain), torch.tensor(local), torch.tensor(union), list(names))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, *size) uint8, bicubic, aspect not kept.

    By PIL as in the official code: on an image that grows one way and shrinks the other PyTorch's own bicubic
    differs from it by more than rounding.
    """
    height, width = size
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(2, 0, 1)


def augmentation(size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Training augmentation of a (3, H, W) uint8 image, in the official order; no random erasing.

    torchvision's ImageNet AutoAugment stands in for the official policy of the same name.
    """
    from torchvision.transforms import v2  # takes seconds

    return v2.Compose(
        [
            v2.RandomApply([v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128)], p=0.1),
            v2.Lambda(partial(resize, size=size)),
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(10),
            v2.RandomCrop(size),
            v2.RandomApply([v2.ColorJitter(brightness=0.15, contrast=0.1)], p=0.5),
        ]
    )


class Files(Dataset):
    """Images on disk -> ((3, H, W) uint8, index).

    An index alone gives the resized image; an (index, draw) pair the augmented one, whose randomness
    depends on (seed, draw) alone. seed: None where nothing is augmented, as in an evaluation. A missing or
    damaged image raises UserError that names its file.
    """

    def __init__(self, items: Sequence[Item], size: tuple[int, int] = (256, 128), seed: int | None = None):
        self.items, self.size, self.seed = items, size, seed
        self.augment = None if seed is None else augmentation(size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        image = read_pixels(self.items[index].path)
        if draw is None:
            return resize(image, self.size), index
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds GPUs too and, where there is none, notes a stack each time.
            torch.default_generator.manual_seed(step_generator(self.seed, draw, stream=1).initial_seed())
            return self.augment(image), index


def batches(loader: DataLoader) -> Iterator:
    """The loader's batches; a UserError from a worker keeps its message alone."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None


class Tensors(Dataset):
    """Images in memory, (N, 3, H, W) uint8, with the interface of `Files` and no augmentation."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index = key[0] if isinstance(key, tuple) else key
        return self.images[index], index


@dataclass(frozen=True)
class Target:
    """A test: images once, and for each split which of them are queries and which the gallery."""

    name: str
    images: Dataset
    identities: Tensor
    cameras: Tensor
    splits: list[tuple[Tensor, Tensor]]


def file_target(name: str, splits: Sequence[Split], size: tuple[int, int]) -> Target:
    """Splits of a public set -> `Target`; an image that several splits use is embedded once."""
    position: dict[Item, int] = {}
    numbered = []
    for split in splits:
        parts = (split.query, split.gallery)
        numbered.append(
            tuple(
                torch.tensor([position.setdefault(i, len(position)) for i in part], dtype=torch.long)
                for part in parts
            )
        )
    items = list(position)
    identities = torch.tensor([item.identity for item in items])
    cameras = torch.tensor([item.camera for item in items])
    return Target(name, Files(items, size), identities, cameras, numbered)


def walker_sources(seed: int) -> tuple[Tensors, Labels]:
    """The demo's training images: 40 identities x 8 views at each of the sites A, B and C."""
    drawn = [
        walkers.draw(site, TRAIN_PEOPLE, TRAIN_VIEWS, seed=1000 * seed + k) for k, site in enumerate("ABC")
    ]
    images = torch.cat([part.images for part in drawn])
    return Tensors(images), label([part.identities.tolist() for part in drawn], list("ABC"))


def walker_target(site: str, seed: int) -> Target:
    """60 new identities x 6 views at a site; the first two views of each are queries."""
    drawn = walkers.draw(site, TEST_PEOPLE, TEST_VIEWS, seed=1000 * seed + 100 + "ABCT".index(site))
    is_query = torch.arange(len(drawn.images)) % TEST_VIEWS < QUERIES
    split = (is_query.nonzero().squeeze(1), (~is_query).nonzero().squeeze(1))
    # Views of one camera count as matches too: the walkers' cameras differ too little to demand a change.
    cameras = torch.arange(len(drawn.images))
    return Target(site, Tensors(drawn.images), drawn.identities, cameras, [split])
