"""Sheets of pictures: what a network does during training, and all methods side by side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.baselines import CLASSICAL
from mdrnets.model import composite
from mdrnets.parser import paint_parts
from shared.io import image_grid


@torch.no_grad()
def training_sheet(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rows of a batch: damaged, coarse (where there is one), completed, truth."""
    x, m = batch["image"][:8], batch["mask"][:8]
    out = net.eval()(x, m)
    columns = [x.masked_fill(m > 0.5, 0), out.get("coarse"), out["output"], x]
    columns = [column.float() for column in columns if column is not None]
    pictures = torch.stack(columns, 1).flatten(0, 1) / 2 + 0.5
    return image_grid(pictures, columns=len(columns), scale=max(1, 64 // x.shape[-1]))


@torch.inference_mode()
def comparison_sheet(networks: dict[str, nn.Module], batch: dict[str, Tensor]) -> Tensor:
    """Rows of pictures: damaged, Telea, U-Net, coarse, parsing, none, full, truth; those that the run has."""
    x, m = batch["image"], batch["mask"]
    columns = {"input": x.masked_fill(m > 0.5, 0), "Telea": CLASSICAL["Telea (OpenCV)"](x, m)}
    for name in ("unet", "coarse", "none", "shared", "full", "full+inco2"):
        if name in networks:
            out = networks[name](x, m)
            columns[name] = composite(x, out["coarse"], m) if name == "coarse" else out["output"]
            if name == "coarse":
                painted = paint_parts(out["parsing"]) * 2 - 1
                columns["parsing"] = F.interpolate(painted, x.shape[-2:], mode="nearest")
    columns["truth"] = x
    tiles = torch.stack(list(columns.values()), 1).flatten(0, 1).float() / 2 + 0.5
    scale = max(1, 96 // x.shape[-1])
    return image_grid(tiles, columns=len(columns), column_labels=list(columns), scale=scale)
