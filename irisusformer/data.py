"""Samples for training and evaluation: the procedural eyes of the demo, files of any data set, augmentation.

A sample is a dict: `image` (3, H, W) float32 in [0, 1]; `mask` (1, H, W) uint8, 1 = usable iris texture,
255 = ignored; `regions` (2, H, W) uint8, the filled pupil and the inside of the outer boundary, 255 where
a data set does not give them; procedural sets add `noisy` and `with_pupil`, wrong annotations of the mask.
"""

from collections.abc import Callable
from typing import Annotated

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from irisusformer.datasets import Pair, read_pair
from irisusformer.eyes import LOOKS, Eye, Look, draw_eye, draw_simple_eye, require_looks
from irisusformer.iris import identity
from irisusformer.losses import IGNORE
from shared.io import progress
from shared.ranges import Within
from shared.runtime import UserError

Sample = dict[str, Tensor]
Side = Annotated[int, Within(32)]
"""Of pictures to draw and windows to learn from, pixels: in fewer no eye can be recognised."""
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def shrunk(image: Tensor, short_side: int | None) -> Tensor:
    """A batch (B, 3, H, W) with a shorter side of at most `short_side` pixels (None: of any), antialiased."""
    height, width = image.shape[-2:]
    scale = (short_side or min(height, width)) / min(height, width)
    if scale >= 1:
        return image
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def enlarged(value: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) at another size (H, W), float32."""
    if value.shape[-2:] == size:
        return value.float()
    return F.interpolate(value.float(), size, mode="bilinear", align_corners=False)


def noisy_annotation(eye: Eye, rng: np.random.Generator) -> np.ndarray:
    """The mask as a careless annotator draws it (H, W) bool.

    With probability 0.8 an ellipse of the outer boundary scaled by 0.78 to 1.22 and shifted by up to 3 % of
    the height, less pupil and lids; lashes and reflections are ignored. Otherwise the true mask.
    """
    if rng.random() > 0.8:
        return eye.mask
    x, y, a, b, angle = eye.outer_ellipse
    height, width = eye.mask.shape
    scale, shift = rng.uniform(0.78, 1.22), rng.uniform(-0.03, 0.03, 2) * height
    disc = np.zeros((height, width), np.uint8)
    box = ((x + shift[0], y + shift[1]), (2 * a * scale, 2 * b * scale), float(np.degrees(angle)))
    cv2.ellipse(disc, box, 1, -1)
    return disc.astype(bool) & eye.opening & ~eye.pupil


def pupil_annotation(eye: Eye, rng: np.random.Generator) -> np.ndarray:
    """A structured mistake: every fifth mask includes the pupil."""
    return eye.mask | (eye.pupil & eye.opening) if rng.random() < 0.2 else eye.mask


class EyeWorld(Dataset):
    """`count` procedural eyes, drawn once and kept in memory (`samples`: stacked tensors, uint8 images).

    world: "eyes" (draw_eye) or "simple" (draw_simple_eye). split: train and test share no person. Raises
    UserError without looks, and for simple eyes that are not square.
    """

    def __init__(
        self,
        world: str,
        split: str,
        count: int,
        size: tuple[int, int] = (64, 64),
        looks: tuple[Look, ...] = LOOKS,
        seed: int = 0,
    ):
        require_looks(looks)
        if world == "simple" and size[0] != size[1]:
            raise UserError(f"--image-size {size[0]} {size[1]}: simple eyes are square, give one side twice")
        first = {"train": 0, "test": 500_000}[split] + 1_000_000 * seed
        samples = []
        for i in progress(range(count), f"drawing {split} eyes"):
            number = first + i
            if world == "simple":
                eye = draw_simple_eye(number, size[0])
            else:
                eye = draw_eye(identity(number), 0, *size, looks[i % len(looks)])
            rng = np.random.default_rng([number, 4])
            layers = eye.mask, noisy_annotation(eye, rng), pupil_annotation(eye, rng), eye.pupil, eye.outer
            samples.append(((eye.image * 255).round().astype(np.uint8), np.stack(layers)))
        self.images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
        self.layers = torch.from_numpy(np.stack([layers for _, layers in samples]).astype(np.uint8))
        self.names = [f"{world}-{first + i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Sample of an index, or of (index, draw): mirrored or not as the running number `draw` decides."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        image, layers = self.images[index].float() / 255, self.layers[index]
        if draw is not None and np.random.default_rng([draw, 5]).random() < 0.5:
            image, layers = image.flip(-1), layers.flip(-1)
        mask, noisy, with_pupil = layers[:3, None]
        return {"image": image, "mask": mask, "noisy": noisy, "with_pupil": with_pupil, "regions": layers[3:]}


class IrisFiles(Dataset):
    """Image and annotation files of any data set (see datasets.py), augmented when `augment` is given.

    short_side: pictures whose shorter side is longer are shrunk to it with their annotation; None: never.
    """

    def __init__(
        self,
        pairs: list[Pair],
        augment: Callable[[Sample, int], Sample] | None = None,
        short_side: int | None = None,
    ):
        self.pairs, self.augment, self.short_side = pairs, augment, short_side
        self.names = [pair.name for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image, mask, regions = read_pair(self.pairs[index])
        image = shrunk(image[None], self.short_side)[0]
        if image.shape[-2:] != mask.shape[-2:]:
            size = image.shape[-2:]
            mask, regions = (
                F.interpolate(layers[None], size, mode="nearest-exact")[0] for layers in (mask, regions)
            )
        sample = {"image": image, "mask": mask, "regions": regions}
        return self.augment(sample, draw) if self.augment else sample


class Augmentation:
    """IrisParseNet's augmentation and, after it, changes of light; one albumentations pipeline.

    Random scale out of SCALES and mirror; each with probability 0.5 Gaussian smoothing (sigma up to 6),
    rotation within 60 degrees, translation by up to 30 pixels; a random `crop` x `crop` window. Area from
    outside the picture is ignored (255). Then brightness, contrast and gamma within 20 %, grey in 1 of 10.
    """

    def __init__(self, crop: int, seed: int):
        import albumentations as A

        def outside(**options):
            return {"border_mode": cv2.BORDER_CONSTANT, "fill": 0, "fill_mask": IGNORE, **options}

        self.seed = seed
        self.pipeline = A.Compose(
            [
                A.OneOf([A.RandomScale((s - 1, s - 1), p=1) for s in SCALES], p=1),
                A.HorizontalFlip(p=0.5),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 6), p=0.5),
                A.Affine(rotate=(-60, 60), p=0.5, **outside()),
                A.Affine(translate_px=(-30, 30), p=0.5, **outside()),
                A.PadIfNeeded(crop, crop, **outside()),
                A.RandomCrop(crop, crop),
                A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
                A.RandomGamma((80, 120), p=0.5),
                A.ToGray(p=0.1),
            ]
        )

    def __call__(self, sample: Sample, draw: int) -> Sample:
        """The augmented sample; a pure function of the sample, the seed and the running number `draw`."""
        self.pipeline.set_random_seed(int(np.random.SeedSequence([self.seed, draw]).generate_state(1)[0]))
        out = self.pipeline(
            image=np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy()),
            masks=[layer.numpy() for layer in (*sample["mask"], *sample["regions"])],
        )
        layers = torch.from_numpy(np.stack(out["masks"]))
        image = torch.from_numpy(np.ascontiguousarray(out["image"])).permute(2, 0, 1).clamp(0, 1)
        return {"image": image, "mask": layers[:1], "regions": layers[1:]}
