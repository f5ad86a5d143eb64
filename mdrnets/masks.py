"""Corruption masks, 1 = corrupted: free-form strokes and boxes drawn from (seed, index), and mask files.

A mask belongs to a ratio bin by the share of corrupted pixels measured at the size it is used at, never by
its place in a list.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.io import IMAGE_ENDINGS, find_images, progress, read_image
from shared.runtime import UserError

BINS: tuple[tuple[float, float], ...] = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6))
"""Ratio bins that results are reported for; a mask is in (low, high] when low < ratio <= high."""

Polarity = Literal["white-hole", "black-hole"]
INVERTED = 0.75
"""Above this mean share of corrupted pixels, masks are probably the wrong way round."""

log = logging.getLogger(__name__)


class MaskSource(Protocol):
    """Where masks come from. `mask(key)` is a pure function of the key, (1, size, size) float in {0, 1};
    `label(key)` says which it is: a file, or what it is drawn from."""

    def mask(self, key: int) -> Tensor: ...

    def label(self, key: int) -> str: ...


def mixed(seed: int, *numbers: int) -> int:
    """A 32-bit hash of a seed and numbers: which mask goes with which picture."""
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0])


def ratio(mask: Tensor) -> float:
    """Share of corrupted pixels in [0, 1]."""
    return int((mask > 0.5).sum()) / mask.numel()


class StrokeMasks:
    """Free-form strokes of 2-8 overlapping discs, radius 4-10 % of the side, whose heading wanders by 0.6
    rad.

    The ratio is uniform in (low, high]: discs are added until it is met, and a disc that would lead beyond
    `high` is cut. `pool`: how many different masks there are (None: no limit).
    """

    def __init__(self, size: int, low: float, high: float, seed: int, pool: int | None = None):
        self.size, self.low, self.high, self.seed, self.pool = size, low, high, seed, pool
        self._kept: dict[int, Tensor] = {}

    def mask(self, key: int) -> Tensor:
        if self.pool is None:
            return self.draw(key)
        key %= self.pool
        if key not in self._kept:
            self._kept[key] = self.draw(key)
        return self._kept[key]

    def label(self, key: int) -> str:
        return f"strokes of seed {self.seed}, number {key if self.pool is None else key % self.pool}"

    def draw(self, key: int) -> Tensor:
        """The mask number `key`, (1, size, size)."""
        rng, side = np.random.default_rng((self.seed, key)), self.size
        low, high = int(self.low * side * side), int(self.high * side * side)
        wanted = rng.integers(min(low + 1, high), high + 1)
        canvas, painted = np.zeros((side, side), bool), 0
        pixels = np.arange(side) + 0.5
        while painted < wanted:
            (y, x), heading = rng.random(2) * side, rng.random() * 2 * np.pi
            for _ in range(rng.integers(2, 9)):
                radius = side * rng.uniform(0.04, 0.10)
                distance = (pixels[:, None] - y) ** 2 + (pixels - x) ** 2
                new = np.flatnonzero((distance <= radius**2) & ~canvas)
                if painted + len(new) > high:
                    # The last disc is cut down to its middle.
                    new = new[np.argsort(distance.flat[new], kind="stable")[: high - painted]]
                canvas.flat[new] = True
                painted += len(new)
                if painted >= wanted:
                    break
                heading += rng.normal(0, 0.6)
                y, x = y + radius * np.sin(heading), x + radius * np.cos(heading)
        return torch.from_numpy(canvas[None].astype(np.float32))


class BoxMasks:
    """One rectangle of uniform ratio in (low, high], aspect ratio 1/2 to 2, anywhere inside the picture."""

    def __init__(self, size: int, low: float, high: float, seed: int):
        self.size, self.low, self.high, self.seed = size, low, high, seed

    def mask(self, key: int) -> Tensor:
        rng, side = np.random.default_rng((self.seed, key)), self.size
        for _ in range(100):
            area = (self.low + (self.high - self.low) * (1 - rng.random())) * side * side
            aspect = np.exp(rng.uniform(-np.log(2), np.log(2)))
            height = min(side, max(1, round(np.sqrt(area * aspect))))
            width = min(side, max(1, round(area / height)))
            if self.low < height * width / (side * side) <= self.high:
                break
        y, x = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
        mask = torch.zeros(1, side, side)
        mask[:, y : y + height, x : x + width] = 1
        return mask

    def label(self, key: int) -> str:
        return f"box of seed {self.seed}, number {key}"


def to_mask(values: Tensor, size: tuple[int, int] | None, polarity: Polarity) -> Tensor:
    """Grey values (1, H, W) in [0, 1] -> mask (1, h, w) in {0, 1}: nearest neighbour, then threshold 0.5."""
    if size is not None and tuple(values.shape[-2:]) != size:
        values = F.interpolate(values[None], size, mode="nearest-exact")[0]
    white = (values >= 0.5).float()
    return white if polarity == "white-hole" else 1 - white


def read_mask(path: Path, size: tuple[int, int] | None, polarity: Polarity = "white-hole") -> Tensor:
    """Mask file -> (1, H, W) in {0, 1} at `size` (None: as it is). UserError on a damaged file."""
    return to_mask(read_image(path, "L"), size, polarity)


def list_images(folder: Path, what: str) -> list[Path]:
    """Picture files below a folder, sorted. UserError when there is no folder or none in it."""
    if not folder.is_dir():
        raise UserError(f"{what}: no folder {folder}")
    files = find_images(folder)
    if not files:
        raise UserError(f"{what}: no pictures ({', '.join(IMAGE_ENDINGS)}) in {folder}")
    return files


class MaskFiles:
    """Mask files of a folder, such as NVIDIA's irregular masks (Liu et al.), limited to one ratio bin.

    files: from `measure_masks`. Raises UserError when no mask is in the bin.
    """

    def __init__(
        self, measured: Sequence[tuple[Path, float]], size: int, low: float, high: float, polarity: Polarity
    ):
        self.files = [path for path, share in measured if low < share <= high]
        self.size, self.polarity = size, polarity
        if not self.files:
            raise UserError(
                f"none of {len(measured)} masks has a ratio in ({low:g}, {high:g}]: other masks are needed, "
                "or the other --mask-polarity"
            )

    def mask(self, key: int) -> Tensor:
        return read_mask(self._file(key), (self.size, self.size), self.polarity)

    def label(self, key: int) -> str:
        path = self._file(key)
        return f"{path.parent.name}/{path.name}"

    def _file(self, key: int) -> Path:
        return self.files[key % len(self.files)]


def measure_masks(folder: Path, size: int, polarity: Polarity) -> list[tuple[Path, float]]:
    """Every mask below `folder` with its measured ratio at `size`. Warns when they look inverted."""
    files = list_images(folder, "masks")
    measured = [(f, ratio(read_mask(f, (size, size), polarity))) for f in progress(files, "masks")]
    warn_inverted(sum(share for _, share in measured) / len(measured))
    return measured


def show_ratio(mask: Tensor) -> None:
    """Print the share of corrupted pixels in a batch, and warn when it looks inverted."""
    share = ratio(mask)
    print(f"holes: {100 * share:.0f} % of the first batch")
    warn_inverted(share)


def looks_inverted(mean_ratio: float) -> str | None:
    """A warning when the mean ratio of masks says that kept and corrupted are swapped; None otherwise."""
    if mean_ratio <= INVERTED:
        return None
    return (
        f"{100 * mean_ratio:.0f} % of the pixels are marked as corrupted: the masks look inverted. "
        "White means corrupted; use --mask-polarity black-hole for files where black does"
    )


def warn_inverted(mean_ratio: float) -> None:
    """Log the warning of `looks_inverted`."""
    if message := looks_inverted(mean_ratio):
        log.warning(message)
