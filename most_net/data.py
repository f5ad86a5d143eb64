"""Pairs in memory, the batches of training, and the procedural data set.

The public data sets are a few hundred to a few thousand small pairs: a whole training set fits on the
device as bytes, so a batch is a few crops and nothing is read, decoded or copied while training. Files: see
`pairs.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from most_net.simple import (
    BACKGROUND,
    BROWS,
    EYES,
    HAIR,
    MOUTH,
    NOSE,
    SKIN,
    draw_by_rules,
    draw_simple,
)
from shared.faces import ARTISTS, CLASSES, draw, sample, sketches
from shared.runtime import StepBatches, step_generator

RULES = "rules"
"""The artist who works by rules; the others are those of `shared.faces`."""


@dataclass(frozen=True)
class Pairs:
    """N aligned pairs: photos (N, 3, H, W) and sketches (N, 1, H, W), bytes; styles (N,) the artist's number;
    parts (N, H, W), the semantic map, only of procedural faces."""

    photos: Tensor
    sketches: Tensor
    names: tuple[str, ...]
    styles: Tensor
    parts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: list[int]) -> "Pairs":
        """The pairs at `indices`, in that order."""
        chosen = torch.tensor(indices, dtype=torch.long, device=self.photos.device)
        return Pairs(
            self.photos[chosen],
            self.sketches[chosen],
            tuple(self.names[i] for i in indices),
            self.styles[chosen],
            None if self.parts is None else self.parts[chosen],
        )

    def to(self, device: torch.device) -> "Pairs":
        return replace(
            self,
            photos=self.photos.to(device),
            sketches=self.sketches.to(device),
            styles=self.styles.to(device),
        )


def signed(images: Tensor) -> Tensor:
    """Bytes 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def pad_to(images: Tensor, height: int, width: int) -> Tensor:
    """Pad (N, C, H, W) on all sides by border replication; 250x200 to 256 gets 3 rows and 28 columns."""
    top, left = (height - images.shape[-2]) // 2, (width - images.shape[-1]) // 2
    bottom, right = height - images.shape[-2] - top, width - images.shape[-1] - left
    return F.pad(images.float(), (left, right, top, bottom), mode="replicate").to(images.dtype)


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pad_to`."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Batch:
    """photo (B, 3, size, size) and sketch (B, 1, size, size) in [-1, 1], of one artist."""

    photo: Tensor
    sketch: Tensor
    style: int


def batches(
    pairs: Pairs,
    batch_size: int,
    steps: int,
    seed: int,
    load: int,
    size: int,
    flip: bool = False,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches for the steps start_step .. steps - 1: pad to `load`, cut the same random `size` square from
    photo and sketch, flip both or none. With several artists a batch is of one, in turns. Pure in (seed,
    step)."""
    photos, sketch_images = (pad_to(x, load, load) for x in (pairs.photos, pairs.sketches))
    styles = pairs.styles.tolist()
    artists = sorted(set(styles))
    orders, members = [], []
    for turn, artist in enumerate(artists):
        members.append([i for i, style in enumerate(styles) if style == artist])
        done, total = ((step - turn + len(artists) - 1) // len(artists) for step in (start_step, steps))
        orders.append(iter(StepBatches(len(members[-1]), batch_size, seed + turn, total, done, rank, world)))
    for step in range(start_step, steps):
        turn = step % len(artists)
        indices = [members[turn][i] for i in next(orders[turn])]
        generator = step_generator(seed, step, stream=1 + rank)
        offsets = torch.randint(load - size + 1, (len(indices), 2), generator=generator).tolist()
        flips = torch.rand(len(indices), generator=generator).lt(0.5 if flip else 0).tolist()
        cut = [
            [_cut(images[i], *offset, size, mirrored) for images in (photos, sketch_images)]
            for i, offset, mirrored in zip(indices, offsets, flips, strict=True)
        ]
        photo, sketch = (signed(torch.stack(column)) for column in zip(*cut, strict=True))
        yield Batch(photo, sketch, artists[turn])


def _cut(image: Tensor, top: int, left: int, size: int, mirrored: bool) -> Tensor:
    piece = image[:, top : top + size, left : left + size]
    return piece.flip(-1) if mirrored else piece


# --- procedural faces -------------------------------------------------------------------------------

SIMPLE_OF = {
    "skin": SKIN,
    **dict.fromkeys(("l_ear", "r_ear", "neck"), SKIN),
    **dict.fromkeys(("hair", "hat"), HAIR),
    **dict.fromkeys(("l_brow", "r_brow"), BROWS),
    **dict.fromkeys(("l_eye", "r_eye"), EYES),
    "nose": NOSE,
    **dict.fromkeys(("u_lip", "l_lip", "mouth"), MOUTH),
}
"""The parts that the artist by rules tells apart, from the 19 classes of `shared.faces`."""


def simple_pairs(n: int, seed: int, size: int) -> Pairs:
    """n pairs of the simple world at size x size, drawn at twice the size and averaged."""
    image, parts = draw_simple(n, seed, 2 * size)
    return _drawn(image, parts, [_halved(draw_by_rules(image, parts))], ("simple",), seed)


def face_pairs(n: int, seed: int, size: int, artists: tuple[str, ...] = (RULES,)) -> Pairs:
    """n faces of `shared.faces` at size x size, each drawn by all `artists`: n * len(artists) pairs.

    Background, skin tone, light and hair colour of the photo do not appear in a sketch. Raises ValueError for
    an unknown artist.
    """
    params = sample(n, seed, strength=0.5, worn=0.0)
    faces = draw(params, 2 * size)
    table = torch.tensor([SIMPLE_OF.get(name, BACKGROUND) for name in CLASSES], dtype=torch.uint8)
    parts = table[faces.semantics.long()]
    drawn = []
    for artist in artists:
        if artist == RULES:
            drawn.append(_halved(draw_by_rules(faces.image, parts)))
        elif artist in ARTISTS:
            drawn.append(sketches(params, size, artist, seed))
        else:
            raise ValueError(f"unknown artist {artist!r}; there are {', '.join((RULES, *ARTISTS))}")
    return _drawn(faces.image, parts, drawn, artists, seed)


def _drawn(image: Tensor, parts: Tensor, drawn: list[Tensor], artists: tuple[str, ...], seed: int) -> Pairs:
    n, count = len(image), len(artists)
    names = tuple(f"{artist}-{seed}-{i:04d}" for artist in artists for i in range(n))
    styles = torch.arange(count).repeat_interleave(n)
    photos = _bytes(_halved(image)).repeat(count, 1, 1, 1)
    return Pairs(photos, _bytes(torch.cat(drawn)), names, styles, parts[:, ::2, ::2].repeat(count, 1, 1))


def _halved(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2)


def _bytes(images: Tensor) -> Tensor:
    return images.clamp(0, 1).mul(255).round().byte()
