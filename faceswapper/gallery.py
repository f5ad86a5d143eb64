"""Sheets of pictures: what training sees, sources x targets, and methods side by side."""

import torch
from torch import Tensor

from faceswapper.losses import Batch, swap_both
from faceswapper.model import Generator
from shared.io import image_grid

SHOWN = 6
"""Pictures in a row of the training sheet."""


def shown(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], on the CPU."""
    return (x.detach().float().cpu() / 2 + 0.5).clamp(0, 1)


def enlargement(size: int) -> int:
    """Whole factor that brings a picture to about 128 pixels."""
    return max(1, 128 // size)


@torch.no_grad()
def training_sheet(generator: Generator, batch: Batch) -> Tensor:
    """Targets, their reconstructions, sources, and swaps of a training batch as rows of one sheet."""
    half = len(batch.picture) // 2
    few = min(SHOWN, half)
    chosen = torch.cat((torch.arange(few), half + torch.arange(few)))
    batch = Batch(*(x[chosen] for x in batch))
    swaps = swap_both(generator, batch, features=False)
    decode = generator.org_decoder.decode
    same = decode(swaps.attributes, swaps.code, swaps.guides, swaps.cache, features=False).picture
    rows = [batch.picture[:few], same[:few], batch.picture[few:], swaps.swap.picture[:few]]
    labels = ["target", "reconstruction", "source", "swap"]
    return image_grid(shown(torch.cat(rows)), few, labels, scale=enlargement(batch.picture.shape[-1]))


@torch.no_grad()
def swap_grid(
    generator: Generator,
    sources: Tensor,
    targets: Tensor,
    landmarks: Tensor,
    mask: Tensor,
    source_mask: Tensor | None = None,
) -> Tensor:
    """Every source on every target: (N, 3, S, S) and (M, 3, S, S) in [-1, 1] -> one sheet.

    First column the sources, first row the targets; the attributes of a target are encoded once for all
    sources. source_mask: see `Generator.code`.
    """
    attributes, cache = generator.attr_encoder.encode(targets)
    codes = generator.code(sources, source_mask).repeat_interleave(len(targets), 0)
    guides = generator.org_decoder.guides(landmarks, mask)
    swaps = generator.org_decoder.decode(attributes, codes, guides, cache, features=False).picture
    swaps = swaps.unflatten(0, (len(sources), len(targets)))
    tiles = [torch.ones_like(shown(targets[0])), *shown(targets)]
    for source, row in zip(sources, swaps, strict=True):
        tiles += [shown(source), *shown(row)]
    labels = ["source \\ target", *(f"target {i + 1}" for i in range(len(targets)))]
    return image_grid(tiles, len(targets) + 1, None, labels, scale=enlargement(targets.shape[-1]))


def methods_sheet(rows: dict[str, Tensor], columns: int = 10) -> Tensor:
    """Pictures (N, 3, S, S) in [-1, 1] of every method, a row each."""
    tiles = torch.cat([shown(pictures[:columns]) for pictures in rows.values()])
    columns = min(columns, len(next(iter(rows.values()))))
    return image_grid(tiles, columns, list(rows), scale=enlargement(tiles.shape[-1]))
