"""Pictures of what PIN does: the picture row, probabilities, eigenfaces, and the price of robustness."""

from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pin.basis import Basis
from pin.claims import Table
from pin.experiments import Lab
from pin.model import PIN
from pin.protocol import in_batches
from shared.io import image_grid, write_image
from shared.metrics import auc, roc


def to_unit(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], cut."""
    return ((x + 1) / 2).clamp(0, 1)


def eigenface_picture(vectors: Tensor, size: int) -> Tensor:
    """Eigenfaces as grey pictures: (D, N) -> (N, 1, size, size), each scaled to its own extent, 0.5 =
    zero."""
    faces = vectors.T.reshape(-1, 1, size, size)
    extent = faces.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
    return 0.5 + 0.5 * faces / extent


def picture_row(
    basis: Basis, clean: Tensor | None, x: Tensor, purified: Tensor, q: Tensor, shown: int = 4
) -> list[Tensor]:
    """One image (1, H, W), as ROW or, when its unattacked original is not known, UNKNOWN_ROW names its parts.

    clean: the original. purified: of x, the attacked image. q: (K,) its mask; `shown` eigenfaces that it kept
    most of come last, white where it kept fewer. All pictures are (1, H, W) in [0, 1], differences enlarged
    about 0.5.
    """
    weight = (basis.coefficients(x[None])[0].abs() * q).topk(min(shown, len(q))).indices
    faces = eigenface_picture(basis.eig_vec[:, weight], x.shape[-1])
    faces = torch.where(q[weight].view(-1, 1, 1, 1) > 0, faces, 1.0)
    if clean is None:
        return [to_unit(x), to_unit(purified), to_unit(10 * (x - purified)), *faces]
    change, left = to_unit(10 * (x - clean)), to_unit(10 * (purified - clean))
    return [to_unit(clean), to_unit(x), to_unit(purified), change, left, *faces]


ROW = ["input", "attacked", "purified", "change x10", "left x10", "kept:", "", "", ""]
UNKNOWN_ROW = ["input", "purified", "removed x10", *ROW[5:]]


def purification_rows(pin: PIN, x: Tensor, attacked: Tensor) -> Tensor:
    """A sheet with one `picture_row` for each image of a batch (B, 1, H, W)."""
    with torch.no_grad():
        q = pin.mask(pin.probabilities(attacked))
        purified = pin.project(attacked, q)
    tiles = [
        tile for row in zip(x, attacked, purified, q, strict=True) for tile in picture_row(pin.basis, *row)
    ]
    return image_grid(tiles, columns=len(tiles) // len(x), column_labels=ROW, scale=max(1, 96 // x.shape[-1]))


@torch.no_grad()
def purification_sheet(pin: PIN, faces: Dataset) -> Tensor:
    """Six faces, purified, and what was taken away (times 5)."""
    x = torch.stack([faces[i * len(faces) // 6][0] for i in range(6)]).to(pin.basis.avg_face.device)
    purified = pin(x)
    rows = [(x + 1) / 2, (purified + 1) / 2, (5 * (x - purified) + 1) / 2]
    return image_grid(
        torch.cat(rows),
        columns=6,
        row_labels=["input", "purified", "removed x5"],
        scale=max(1, 96 // x.shape[-1]),
    )


@torch.no_grad()
def draw_figures(lab: Lab, table: Table, quality: dict[str, dict[str, float]], folder: Path) -> None:
    """Write all pictures of an evaluation into `folder`."""
    pin = lab.pin("pin", "threshold")
    chosen = torch.linspace(0, len(lab.first) - 1, 6).long()
    rows = purification_rows(pin, lab.first[chosen], lab.attacked[lab.main][chosen])
    write_image(folder / "purified.png", rows, "faces purified by PIN")
    size = lab.first.shape[-1]
    sheet = eigenface_picture(lab.basis.eig_vec[:, :64], size)
    write_image(folder / "eigenfaces.png", image_grid(sheet, columns=16, scale=max(1, 48 // size)))
    draw_probabilities(lab, folder / "probabilities.png")
    draw_trade_off(table, quality, folder / "trade-off.png")


def draw_probabilities(lab: Lab, path: Path) -> None:
    """Mean keep-probability over the eigenface index, with its spread over the test images, per ESN."""
    variants = [variant for variant in lab.esns if not variant.startswith("lambda-")]
    rows = -(-len(variants) // 2)
    figure, panels = plt.subplots(
        rows, 2, figsize=(8, 0.6 + 1.3 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, variant in zip_longest(panels.flat, variants):
        if variant is None:
            axes.remove()
            continue
        p = in_batches(lab.pin(variant).probabilities, lab.first).cpu()
        mean, spread, index = p.mean(0), p.std(0), range(p.shape[1])
        axes.plot(index, mean, linewidth=1, drawstyle="steps-mid")
        axes.fill_between(index, mean - spread, mean + spread, alpha=0.3, step="mid")
        axes.set(title=variant, ylim=(0, 1.05))
    figure.supxlabel("eigenface")
    figure.supylabel("keep-probability p")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_trade_off(table: Table, quality: dict[str, dict[str, float]], path: Path) -> None:
    """Clean and attacked accuracy of every ESN over its lambda: what robustness costs. Without two lambdas,
    nothing."""
    points = sorted(
        (numbers["lambda"], table["PIN sample" if variant == "pin" else f"PIN {variant}, sample"])
        for variant, numbers in quality.items()
        if variant in ("exact", "official-lambda") or variant.startswith("lambda-")
    )
    if len(points) < 2:
        return
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for attack in [name for name in ("clean", "PGD 8", "PGD 16", "PGD 0.04") if name in points[0][1]]:
        axes.plot([lamb for lamb, _ in points], [by[attack].accuracy for _, by in points], "o-", label=attack)
    axes.set(xscale="log", xlabel="lambda", ylabel="verification accuracy", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_detection(scores: dict[str, np.ndarray], attacked: np.ndarray, attack: str, path: Path) -> None:
    """ROC curves of the attack scores: share of attacked images found over that of clean ones suspected.

    scores: by name (N,), attacked: (N,) of 0 and 1.
    """
    figure, axes = plt.subplots(figsize=(4, 3.5), layout="constrained")
    for name, values in scores.items():
        false, true, _ = roc(values, attacked)
        axes.plot(false, true, label=f"{name.replace('_', ' ')}, AUC {auc(values, attacked):.3f}")
    axes.set(xlabel="clean images suspected", ylabel=f"attacked images found ({attack})", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
