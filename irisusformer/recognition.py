"""What the masks are for: iris recognition with and without the uncertain pixels.

    python recognition.py                     # procedural people, the newest run
    python recognition.py --data-root EYES    # your images, one folder per eye

Each image is segmented, unrolled and coded with one log-Gabor wavelet per row (after Masek's public
implementation); codes are compared by the Hamming distance of the bits that both masks allow, at the best
of a few rotations. Prints the equal error rate without masks, with the predicted mask, and with the mask
less the pixels of high uncertainty.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from irisusformer.datasets import read_eye
from irisusformer.eyes import Eye, Look, draw_eye
from irisusformer.geometry import Ellipse, rubber_sheet
from irisusformer.iris import identity
from irisusformer.model import IrisUsformer
from irisusformer.predict import load_network, measure, segment
from irisusformer.train import working_side
from shared.io import images_of, progress
from shared.metrics import eer
from shared.published import format_table
from shared.ranges import Count, Natural, Share
from shared.runtime import UserError, parse, pick_device, run_main

ROWS, COLUMNS = 16, 256  # resolution of the coded sheet
WAVELENGTH, BANDWIDTH = 18.0, 0.5  # of the log-Gabor filter, in columns and as sigma over frequency


@dataclass(frozen=True)
class RecognitionConfig:
    """Whose pictures to compare."""

    data_root: Path | None = None
    """Folder with one sub-folder of images per eye; default: procedural people."""
    people: Count = 20
    """Procedural people."""
    pictures: Count = 4
    """Pictures of each of them."""
    look: Look = "nir"
    """Sensor of the procedural pictures."""
    run: Path | None = None
    """Run folder to take the network from; default: the newest."""
    network: str | None = None
    """Which of the run's networks; default: the first."""
    tau: Share | None = None
    """Uncertainty above this is left out; default: the one found in training."""
    rotation: Natural = 12
    """Largest rotation tried, in columns of 360/256 degrees."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def iris_code(sheet: np.ndarray) -> np.ndarray:
    """Grey rubber sheet (64, 512) -> code (2, 16, 256) bool: signs of the log-Gabor response's two parts."""
    cells = sheet.reshape(ROWS, 64 // ROWS, COLUMNS, 512 // COLUMNS).mean((1, 3))
    cells = cells - cells.mean(1, keepdims=True)
    frequency = np.fft.fftfreq(COLUMNS)
    centre = 1 / WAVELENGTH
    gain = np.zeros(COLUMNS)
    positive = frequency > 0
    gain[positive] = np.exp(-(np.log(frequency[positive] / centre) ** 2) / (2 * np.log(BANDWIDTH) ** 2))
    response = np.fft.ifft(np.fft.fft(cells, axis=1) * gain, axis=1)
    return np.stack([response.real > 0, response.imag > 0])


def code_mask(mask: np.ndarray) -> np.ndarray:
    """Sheet mask (64, 512) -> (16, 256): cells of which at least half is usable."""
    return mask.reshape(ROWS, 64 // ROWS, COLUMNS, 512 // COLUMNS).mean((1, 3)) >= 0.5


def distances(codes: np.ndarray, masks: np.ndarray, rotation: int) -> np.ndarray:
    """Hamming distances (N, N) of codes (N, 2, 16, 256) over the bits both masks (N, 16, 256) allow.

    The smallest over rotations; 0.5, the distance of strangers, where less than 5 % of the bits are left.
    """
    best = np.full((len(codes), len(codes)), 0.5)
    usable = masks.reshape(len(masks), -1).astype(np.float32)
    bits = [np.where(code.reshape(len(codes), -1), 1, -1) * usable for code in codes.transpose(1, 0, 2, 3)]
    for shift in range(-rotation, rotation + 1):
        turned_mask = np.roll(masks, shift, 2).reshape(len(masks), -1).astype(np.float32)
        both = usable @ turned_mask.T
        agreement = np.zeros_like(both)
        for part, own in enumerate(bits):
            turned = np.where(np.roll(codes[:, part], shift, 2).reshape(len(codes), -1), 1, -1) * turned_mask
            agreement += own @ turned.T
        enough = both >= 0.05 * ROWS * COLUMNS
        distance = np.where(enough, 0.5 - agreement / (4 * np.maximum(both, 1)), 0.5)
        best = np.minimum(best, distance)
    return best


@dataclass(frozen=True)
class Picture:
    """One picture of an eye; `truth` where it was drawn."""

    owner: str
    image: Tensor
    truth: Eye | None = None


def pictures_of(config: RecognitionConfig) -> list[Picture]:
    """The user's pictures, owners told by folder, or drawn ones. UserError where there are none."""
    if config.data_root is not None:
        return [Picture(path.parent.name, read_eye(path)) for path in images_of(config.data_root)]
    pictures = []
    for person in progress(range(config.people), "drawing"):
        for number in range(config.pictures):
            eye = draw_eye(identity(2_000_000 + person), number, look=config.look)
            pictures.append(Picture(str(person), torch.from_numpy(eye.image).permute(2, 0, 1), eye))
    return pictures


Coded = tuple[str, np.ndarray, np.ndarray]  # whose, code, mask


def code(owner: str, sheet: dict[str, np.ndarray], mask: np.ndarray) -> Coded:
    """Code and its mask from a rubber sheet."""
    return owner, iris_code(sheet["image"].mean(2)), code_mask(mask)


def compare(
    model: IrisUsformer, pictures: list[Picture], short_side: int, tau: float, rotation: int
) -> list[tuple[str, int, float]]:
    """(bits compared, number of pictures, equal error rate in percent).

    Pictures whose boundaries were not found are left out, so the number says how many took part. Raises
    UserError when nothing is left to compare, fewer than two eyes, or none with two pictures.
    """
    coded: dict[str, list[Coded]] = {}
    for picture in progress(pictures, "segmenting"):
        maps = segment(model, picture.image, tau, short_side)
        _, sheet, _ = measure(picture.image, maps)
        if sheet is not None:
            everything = np.ones_like(sheet["mask"])
            sure = sheet["mask"] & (sheet["reliability"] >= 1 - tau)
            kinds = {"all": everything, "predicted mask": sheet["mask"], "mask less high uncertainty": sure}
            for name, mask in kinds.items():
                coded.setdefault(name, []).append(code(picture.owner, sheet, mask))
        if picture.truth is not None:
            eye = picture.truth
            ellipses = Ellipse(*eye.pupil_ellipse), Ellipse(*eye.outer_ellipse)
            true = rubber_sheet(eye.image, eye.mask, np.zeros(eye.mask.shape), *ellipses)
            coded.setdefault("true boundaries and mask", []).append(code(picture.owner, true, true["mask"]))
    if not coded:
        raise UserError(f"no boundaries were found in any of {len(pictures)} pictures: nothing to compare")
    return [(name, len(entries), equal_error_rate(entries, rotation)) for name, entries in coded.items()]


def equal_error_rate(entries: list[Coded], rotation: int) -> float:
    """Percent, over all pairs of pictures."""
    owners, codes, masks = (np.array(column) for column in zip(*entries, strict=True))
    same = owners[:, None] == owners[None]
    pairs = np.triu(np.ones_like(same), 1)
    if not (same & pairs).any() or same.all():
        raise UserError("recognition needs at least two eyes, one of them with two usable pictures")
    return 100 * eer(-distances(codes, masks, rotation)[pairs], same[pairs])


def main() -> None:
    config = parse(RecognitionConfig, __doc__)
    model, trained = load_network(config.run, config.network, None)
    model.to(pick_device(config.device), memory_format=torch.channels_last)
    pictures = pictures_of(config)
    tau = float(model.tau) if config.tau is None else config.tau
    rows = compare(model, pictures, working_side(trained), tau, config.rotation)
    found = next((number for name, number, _ in rows if name == "all"), 0)
    print(f"{len(pictures)} pictures of {len({picture.owner for picture in pictures})} eyes")
    print(f"boundaries were found in {found} of them")
    print(format_table(["bits compared", "pictures", "EER, %"], [list(row) for row in rows]))


if __name__ == "__main__":
    run_main(main)
