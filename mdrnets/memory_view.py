"""Look into a trained memory: for every facial part the slots in use and the picture patches nearest to them.

Writes memory.png (a row for each part: patches of its most used slots, best match first) and memory.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mdrnets.data import DataName, Pictures, open_pictures
from mdrnets.inpaint import Model, load_model
from mdrnets.mechanism import usage_table
from mdrnets.parser import likely_cells
from mdrnets.train import Config
from shared.io import find_run, image_grid, load_config, progress, write_image
from shared.published import format_table
from shared.ranges import Count
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class ViewConfig:
    """Which memory, and how much of it is shown."""

    run: Path | None = None
    """Run folder; default: the newest."""
    data: DataName | None = None
    """Networks trained on this set; default: the run's last."""
    variant: str | None = None
    """Which refinement network; default: the most complete one."""
    slots: Count = 4
    """Most used slots shown of each part."""
    patches: Count = 4
    """Nearest patches shown of each slot."""
    pictures: Count = 500
    """Training pictures that patches are taken from."""
    patch: Count = 5
    """Side of a patch in memory cells."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@torch.no_grad()
def nearest_patches(model: Model, pictures: Pictures, config: ViewConfig) -> tuple[Tensor, list[list[int]]]:
    """Patches (K, slots, patches, 3, side, side) in [0, 1] of undamaged training pictures whose query of that
    part is nearest to the most used slots of the part, and the slots' numbers (K lists)."""
    net, dmm, stride = model.net, model.net.refine.dmm, model.net.stride
    shown = dmm.usage.topk(min(config.slots, dmm.slots), dim=1).indices  # (K, slots)
    memory = dmm.slots_normalised().gather(1, shown.unsqueeze(-1).expand(-1, -1, dmm.memory.shape[-1]))
    best = torch.full((*shown.shape, config.patches), -2.0, device=model.device)
    side, reach = config.patch * stride, config.patch // 2 * stride
    found = torch.zeros(*best.shape, 3, side, side)
    for i in progress(range(min(config.pictures, len(pictures))), "pictures"):
        image = pictures.load(i)[0]
        x = (image[None] * 2 - 1).to(model.device)
        cells = (x.shape[-2] // stride, x.shape[-1] // stride)
        parsing = net.parser(x, cells)
        q = dmm.queries(net.refine.features(x, torch.zeros_like(x[:, :1]), parsing))[0]  # (P, C)
        likeness = torch.einsum("ksc,pc->ksp", memory, q)
        own = likely_cells(parsing[0]).flatten(1)  # (K, P)
        value, place = likeness.masked_fill(~own.unsqueeze(1), -2.0).max(-1)
        padded = F.pad(image[None], (reach,) * 4, mode="replicate")[0]
        for k, s in (value > best[..., -1]).nonzero().tolist():
            row, column = (stride * c for c in divmod(int(place[k, s]), cells[1]))
            rank = int((best[k, s] >= value[k, s]).sum())
            best[k, s, rank + 1 :] = best[k, s, rank:-1].clone()
            found[k, s, rank + 1 :] = found[k, s, rank:-1].clone()
            best[k, s, rank] = value[k, s]
            found[k, s, rank] = padded[:, row : row + side, column : column + side]
    return found, shown.tolist()


def main(config: ViewConfig) -> Path:
    """Write the picture and the table beside the run's other results; returns the run folder."""
    device = pick_device(config.device)
    model = load_model(config.run, config.data, config.variant, None, device)
    folder = find_run("mdrnets", config.run)
    settings = load_config(folder, Config)
    dmm = model.net.refine.dmm
    if dmm is None or dmm.blocks != len(model.parts):
        raise UserError(f"{model.name}: has no memory for each part; choose another --variant")
    data = config.data or settings.data[-1]
    found, slots = nearest_patches(model, open_pictures(settings, data, "train", settings.seed), config)
    columns = found.shape[1] * found.shape[2]
    heads = ["most used", *(f"number {n + 1}" for n in range(1, found.shape[1]))]
    labels = [heads[c // config.patches] if c % config.patches == 1 else "" for c in range(columns)]
    scale = max(1, 48 // found.shape[-1])
    tiles = found.flatten(0, 2)
    sheet = image_grid(tiles, columns, row_labels=list(model.parts), column_labels=labels, scale=scale)
    write_image(folder / "samples" / "memory.png", sheet)
    rows = usage_table(dmm, model.parts)
    print(format_table(["part", "effective slots", "share of the most used"], rows))
    table = zip(model.parts, rows, slots, strict=True)
    record = {name: {"effective_slots": row[1], "most_used": used} for name, row, used in table}
    write_json(folder / "memory.json", record)
    return folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ViewConfig, __doc__))))
