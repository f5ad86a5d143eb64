"""Pictures with holes: procedural faces for the demo, and the training and test sets of any picture source.

The loaders of CelebA-HQ, FFHQ, CelebAMask-HQ and plain folders are in `datasets.py`, the masks in `masks.py`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mdrnets import datasets
from mdrnets.masks import BINS, BoxMasks, MaskFiles, MaskSource, StrokeMasks, measure_masks, mixed
from mdrnets.parser import GROUPS, group_of_label
from mdrnets.simple import PARTS, draw_simple_faces
from shared import faces
from shared.io import progress
from shared.runtime import UserError

if TYPE_CHECKING:
    from mdrnets.train import Config

DataName = Literal["faces", "simple", "celeba-hq", "ffhq", "folder"]
DRAWN_AT_ONCE = 128
TEST_FACES, TEST_MASKS = 1_000_003, 1_000_033
"""Seeds of the procedural test set; no training seed should be one of them."""


class Pictures(Protocol):
    """Where pictures come from: `load(i)` gives (3, S, S) in [0, 1] and the parts (S, S) int64, -1 where
    unknown, or not asked for. `parts`: names of the facial parts; `labelled`: whether they are known; `name`:
    for results; `label(i)`: the file or number of a picture."""

    parts: tuple[str, ...]
    labelled: bool
    name: str

    def __len__(self) -> int: ...

    def load(self, i: int, labels: bool = True) -> tuple[Tensor, Tensor]: ...

    def label(self, i: int) -> str: ...


class DrawnFaces:
    """A fixed set of drawn faces in memory.

    world: "faces" (shared's parametric faces with the eight parts of `GROUPS`) or "simple" (flat faces, six
    parts). Drawn at twice the size and averaged down; a pure function of (world, count, seed, size).
    """

    labelled = True

    def __init__(self, world: str, count: int, seed: int, size: int):
        self.name = f"procedural {'faces' if world == 'faces' else 'simple faces'}"
        self.seed = seed
        if world == "simple":
            self.parts = PARTS
            self.images, self.labels = draw_simple_faces(count, seed, size)
            return
        self.parts = tuple(GROUPS)
        table, chunks = group_of_label(), []
        for start in progress(range(0, count, DRAWN_AT_ONCE), "drawing faces"):
            people = faces.sample(min(DRAWN_AT_ONCE, count - start), seed, start=start)
            drawn = faces.draw(people, 2 * size)
            group = F.one_hot(table[faces.to_bisenet(drawn.semantics).long()], len(GROUPS)).movedim(-1, 1)
            share = F.avg_pool2d(group.float(), 2)
            chunks.append((F.avg_pool2d(drawn.image, 2), share.argmax(1).to(torch.uint8)))
        self.images, self.labels = (torch.cat(column) for column in zip(*chunks, strict=True))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int, labels: bool = True) -> tuple[Tensor, Tensor]:
        return self.images[i], self.labels[i].long()

    def label(self, i: int) -> str:
        return f"seed {self.seed}, face {i}"


class TrainSet(Dataset):
    """Training samples: item (i, draw) is picture i with mask number `draw`.

    flip: mirror the picture, and mirror and turn the mask independently of it (the masks' set has no
    preferred direction), all as a pure function of (seed, draw). labels: whether parts are wanted, which cost
    reading up to 18 files of a picture. A sample: `image` (3, S, S) in [-1, 1], `mask` (1, S, S) with 1 =
    corrupted, `parts` (S, S) int64, -1 where unknown or not wanted, `index` of the picture, and whether it is
    `mirrored`.
    """

    def __init__(self, pictures: Pictures, masks: MaskSource, seed: int, flip: bool, labels: bool = True):
        self.pictures, self.masks, self.seed, self.flip = pictures, masks, seed, flip
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor | int | bool]:
        index, draw = at
        image, parts = self.pictures.load(index, self.labels)
        mask = self.masks.mask(mixed(self.seed, draw))
        mirrored = False
        if self.flip:
            dice = mixed(self.seed, draw, 1)
            mirrored = bool(dice & 1)
            if mirrored:
                image, parts = image.flip(-1), parts.flip(-1)
            mask = torch.rot90(mask.flip(-1) if dice & 2 else mask, dice >> 2 & 3, (1, 2)).contiguous()
        sample = {"image": image * 2 - 1, "mask": mask, "parts": parts}
        return sample | {"index": index, "mirrored": mirrored}


class TestSet(Dataset):
    """Test samples: picture i with the mask hash(seed, i) of one ratio bin, so that all methods see the same
    holes.

    A sample has the fields of `TrainSet` but `mirrored`.
    """

    __test__ = False  # not a test class

    def __init__(self, pictures: Pictures, masks: MaskSource, seed: int):
        self.pictures, self.masks, self.seed = pictures, masks, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def mask_key(self, i: int) -> int:
        """Number of the mask that goes with picture i."""
        return mixed(self.seed, i)

    def pairing(self) -> list[tuple[str, str]]:
        """Which mask every picture has, by their labels."""
        return [(self.pictures.label(i), self.masks.label(self.mask_key(i))) for i in range(len(self))]

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        image, parts = self.pictures.load(i)
        mask = self.masks.mask(self.mask_key(i))
        return {"image": image * 2 - 1, "mask": mask, "parts": parts, "index": i}


def open_pictures(config: "Config", data: DataName, part: datasets.Part, seed: int = 0) -> Pictures:
    """Training or test pictures of a set. Raises UserError when a public set is not there, has a list for one
    part alone, or has no labels and the parser is to be trained."""
    size, root = config.image_size, config.data_root
    if data in ("faces", "simple"):
        count = config.train_images if part == "train" else config.test_images
        # Training faces differ between seeds; the test faces are others, the same for all.
        return DrawnFaces(data, count, seed if part == "train" else TEST_FACES, size)
    if root is None:
        layout = {"celeba-hq": datasets.CELEBA_LAYOUT, "ffhq": datasets.FFHQ_LAYOUT}.get(data, "")
        raise UserError(f"--data {data} needs --data-root. {layout}".strip())
    if (config.train_list is None) != (config.test_list is None):
        raise UserError(
            "--train-list and --test-list go together: a list's pictures may be in both parts of a split"
        )
    chosen = config.train_list if part == "train" else config.test_list
    if chosen is not None:
        pictures = datasets.picture_list(chosen, root, size, celeba=data == "celeba-hq")
    elif data == "celeba-hq":
        pictures = datasets.celeba_hq(root, size, part, config.split)
    else:
        pictures = (datasets.ffhq if data == "ffhq" else datasets.picture_folder)(root, size, part)
    if config.parser == "tiny" and part == "train" and not pictures.labelled:
        raise UserError(
            f"--parser tiny learns from labels, which {pictures.name} does not have here; "
            "use --parser bisenet with --parser-weights"
        )
    return pictures


measured_once = lru_cache(maxsize=2)(measure_masks)
"""Public sets have tens of thousands of masks: a process reads all of them once, not for every stage."""


def training_masks(config: "Config", seed: int) -> MaskSource:
    """Masks of the training set, of the configured ratios."""
    low, high = config.mask_ratio
    if config.masks == "files":
        if config.mask_root is None:
            raise UserError("--masks files needs --mask-root: a folder of mask pictures")
        measured = measured_once(config.mask_root, config.image_size, config.mask_polarity)
        return MaskFiles(measured, config.image_size, low, high, config.mask_polarity)
    if config.masks == "boxes":
        return BoxMasks(config.image_size, low, high, seed)
    return StrokeMasks(config.image_size, low, high, seed, config.mask_pool)


def masks_by_bin(config: "Config", bins: Sequence[tuple[float, float]] = BINS) -> dict[str, MaskSource]:
    """Masks of the test set, one source for each ratio bin; the keys are like "10-20 %"."""
    names = [f"{100 * low:.0f}-{100 * high:.0f} %" for low, high in bins]
    size = config.image_size
    if config.test_mask_root is not None:
        measured = measured_once(config.test_mask_root, size, config.mask_polarity)
        sources = [MaskFiles(measured, size, *limits, config.mask_polarity) for limits in bins]
    else:
        drawn = BoxMasks if config.masks == "boxes" else StrokeMasks
        sources = [drawn(size, *limits, TEST_MASKS) for limits in bins]
    return dict(zip(names, sources, strict=True))
