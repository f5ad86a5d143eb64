"""Metrics of sketch synthesis, as a library and as a command.

    python -m most_net.metrics GT_DIR PRED_DIR [--nlda-train 150] [--lpips] [--fid]

compares equally named images of two folders: SSIM, FSIM, Scoot, on request face recognition (NLDA), LPIPS,
FID and KID. Everything is measured on 8-bit grey, as the literature does; do not compare padded or
contrast-stretched files. NLDA is in per cent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import shared.metrics
from most_net.fsim import features as fsim_features
from most_net.fsim import fsim, fsim_of_features
from most_net.nlda import Recognition, recognition
from most_net.scoot import scoot
from shared.io import IMAGE_ENDINGS, find_images, progress, read_image
from shared.published import format_table
from shared.ranges import Count, Natural
from shared.records import write_json
from shared.runtime import UserError, parse, run_main

__all__ = ["Recognition", "fsim", "grey_bytes", "nlda_rate", "quality", "scoot", "ssim", "window_of"]


SSIM_WINDOW = 11


def grey_bytes(images: Tensor) -> Tensor:
    """(B, 1, H, W) in [0, 1] -> the 8-bit values 0..255 that a grey file holds, as float32."""
    return images.clamp(0, 1).mul(255).round()


def ssim(
    first: Tensor, second: Tensor, data_range: float = 255.0, window: int = SSIM_WINDOW, sigma: float = 1.5
) -> Tensor:
    """Structural similarity (Wang et al., 2004) of (B, 1, H, W): (B,), 1 when equal. Differentiable.

    Gaussian weights, population statistics, K1 = 0.01 and K2 = 0.03, mean over the pixels whose window lies
    inside the image. Raises ValueError when no window does.
    """
    if min(first.shape[-2:]) < window:
        raise ValueError(
            f"images of {tuple(first.shape[-2:])} pixels are smaller than the window of {window}"
        )
    x = torch.arange(window, dtype=first.dtype, device=first.device) - window // 2
    weights = torch.exp(-x.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    stacked = torch.cat([first, second, first.square(), second.square(), first * second])
    smooth = F.conv2d(F.conv2d(stacked, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean1, mean2, square1, square2, product = smooth.chunk(5)
    variances = square1 - mean1.square() + square2 - mean2.square()
    covariance = product - mean1 * mean2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    return (top / ((mean1.square() + mean2.square() + c1) * (variances + c2))).mean((1, 2, 3))


def window_of(height: int) -> int:
    """Side of SSIM's window for pictures of that height: 11, and 7 on the small ones of the demo."""
    return SSIM_WINDOW if height >= 64 else 7


def quality(
    truth: Tensor, prediction: Tensor, window: int = SSIM_WINDOW, batch: int = 16
) -> dict[str, Tensor]:
    """SSIM, FSIM and Scoot of every pair of grey images (N, 1, H, W) in [0, 1]: name -> (N,) float64.
    window: side of SSIM's."""
    rows = []
    batches = zip(truth.split(batch), prediction.split(batch), strict=True)
    for a, b in progress(batches, "metrics", total=-(-len(truth) // batch)):
        a, b = grey_bytes(a).double(), grey_bytes(b).double()
        both = fsim_features(torch.cat([a, b]))  # one batch of transforms
        halves = [tuple(part.chunk(2)[i] for part in both) for i in range(2)]
        rows.append(torch.stack([ssim(a, b, window=window), fsim_of_features(*halves), scoot(a, b)]))
    return dict(zip(("SSIM", "FSIM", "Scoot"), torch.cat(rows, 1).cpu(), strict=True))


def nlda_rate(truth: Tensor, prediction: Tensor, train_people: int, partitions: int = 20) -> Recognition:
    """NLDA recognition of grey sketches (N, 1, H, W) in [0, 1], drawn against synthesised."""
    pixels = [grey_bytes(images).flatten(1).cpu().numpy() for images in (truth, prediction)]
    return recognition(*pixels, train_people, partitions=partitions)


# --- command ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Compare synthesised sketches with drawn ones."""

    truth: Annotated[Path, tyro.conf.Positional]
    """Folder of the drawn sketches."""
    prediction: Annotated[Path, tyro.conf.Positional]
    """Folder of the synthesised sketches, with the same file names (the ending may differ)."""
    nlda_train: Natural = 0
    """Training people of the NLDA recognition: 150 for CUFS (338 people), 300 for CUFSF (944). 0: leave
    out."""
    partitions: Count = 20
    """Random partitions of the NLDA recognition."""
    lpips: bool = False
    """Also LPIPS (AlexNet); needs its ImageNet weights."""
    lpips_weights: Path | None = None
    """torchvision's AlexNet state dict. Default: torchvision's download."""
    fid: bool = False
    """Also FID and KID; need the InceptionV3 weights. FID is biased upwards on a few hundred images."""
    fid_weights: Path | None = None
    """torch-fidelity's InceptionV3 file. Default: its download."""
    out: Path | None = None
    """Write the means, the numbers of every image and the curve of NLDA to this JSON file."""


def result_file(path: Path) -> None:
    """Make the folder of a result, before the work for it. UserError when the path is itself a folder."""
    if path.is_dir():
        raise UserError(f"--out {path}: a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def image_files(folder: Path) -> dict[str, Path]:
    """Stem -> image file of a folder. UserError when it is missing, empty, or has a stem twice."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in find_images(folder, subfolders=False):
        if path.stem in files:
            raise UserError(f"{folder}: {files[path.stem].name} and {path.name} have the same name")
        files[path.stem] = path
    if not files:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGE_ENDINGS)})")
    return files


def load_folders(truth: Path, prediction: Path) -> tuple[list[str], Tensor, Tensor]:
    """Names and grey images (N, 1, H, W) in [0, 1] of two folders. UserError on unpaired names, on different
    sizes and on sizes below SSIM's window."""
    first, second = image_files(truth), image_files(prediction)
    for here, there, folder in ((first, second, prediction), (second, first, truth)):
        missing = sorted(here.keys() - there.keys())
        if missing:
            raise UserError(f"{folder}: no image called {', '.join(missing[:5])} ({len(missing)} missing)")
    images: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in progress(sorted(first), "images"):
        a, b = read_image(first[name], "L"), read_image(second[name], "L")
        for image, path in ((a, first[name]), (b, second[name])):
            expected = images[0][0] if images[0] else a
            if image.shape != expected.shape:
                raise UserError(f"{path}: {_size(image)} pixels, expected {_size(expected)} like the others")
            if min(image.shape[-2:]) < SSIM_WINDOW:
                raise UserError(
                    f"{path}: {_size(image)} pixels; the metrics need {SSIM_WINDOW} on every side"
                )
        images[0].append(a)
        images[1].append(b)
    return sorted(first), torch.stack(images[0]), torch.stack(images[1])


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


class Pretrained:
    """LPIPS, FID and KID as asked, of grey sketches repeated to three channels against the same truth
    (N, 1, H, W): the networks are loaded and the truth's features computed once. UserError when a network's
    file is not to be had."""

    def __init__(self, truth: Tensor, config: Config, device: torch.device | str = "cpu"):
        self.device, self.lpips, self.inception = device, None, None
        self.real = self._batches(truth)
        if config.lpips:
            self.lpips = shared.metrics.perceptual_network("alex", config.lpips_weights).to(device)
        if config.fid:
            self.inception = shared.metrics.InceptionFeatures(config.fid_weights).to(device)
            self.real_features = self._features(self.real)

    def __call__(self, prediction: Tensor) -> dict[str, float]:
        """The means of sketches (N, 1, H, W) in [0, 1]."""
        means, fake = {}, self._batches(prediction)
        if self.lpips is not None:
            pairs = zip(self.real, fake, strict=True)
            values = [shared.metrics.lpips(b, a, self.lpips) * len(a) for a, b in pairs]
            means["LPIPS"] = sum(values) / len(prediction)
        if self.inception is not None:
            features = self.real_features, self._features(fake)
            means["FID"] = shared.metrics.fid(*features)
            means["KID"], _ = shared.metrics.kid(*features, size=min(len(prediction), 1000))
        return means

    def _batches(self, images: Tensor) -> list[Tensor]:
        return [part.to(self.device).expand(-1, 3, -1, -1) for part in images.split(16)]

    @torch.inference_mode()
    def _features(self, batches: list[Tensor]) -> list[Tensor]:
        return [self.inception(images) for images in batches]


def main(config: Config) -> None:
    """Print the means; with --out also write them, the numbers of every image and the curve of NLDA."""
    if config.out:
        result_file(config.out)
    names, truth, prediction = load_folders(config.truth, config.prediction)
    pretrained = Pretrained(truth, config)
    values = quality(truth, prediction)
    means = {metric: float(column.mean()) for metric, column in values.items()}
    curves = {}
    if config.nlda_train:
        try:
            found = nlda_rate(truth, prediction, config.nlda_train, config.partitions)
        except ValueError as error:
            raise UserError(f"--nlda-train: {error}") from None
        means["NLDA"], curves["NLDA by dimensions"] = 100 * found.best, 100 * found.curve
    means |= pretrained(prediction)
    rows = [[f"{name} [%]" if name == "NLDA" else name, value] for name, value in means.items()]
    print(format_table(["metric", f"mean of {len(names)} images"], rows))
    if config.out:
        per_image = {name: {m: column[i] for m, column in values.items()} for i, name in enumerate(names)}
        write_json(config.out, {"means": means, "images": per_image, **curves})


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
