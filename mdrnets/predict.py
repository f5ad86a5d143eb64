"""Complete your own pictures with a trained run: a mask file, or glasses, a hat or a box to hide.

    python predict.py face.png --mask hole.png
    python predict.py face.png --hide glasses --pixel 120 96

Writes for every picture: the completed picture at full size, the coarse result, the parsing, a sheet of all,
with --pixel where the network looked for that pixel, and result.json. White in a mask means corrupted.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from mdrnets.data import DataName
from mdrnets.inpaint import (
    Completed,
    Crop,
    Hide,
    Model,
    attention_of,
    complete,
    fitting_mask,
    hiding_mask,
    load_model,
)
from mdrnets.masks import Polarity, list_images
from mdrnets.mechanism import memory_replaced
from mdrnets.parser import paint_parts
from shared.io import image_grid, keep_inputs, progress, read_photo, write_image
from shared.ranges import Count, Natural, Seed
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class PredictConfig:
    """Pictures, what to complete in them, and with which network."""

    picture: Annotated[Path, tyro.conf.Positional]
    """A picture, or a folder of pictures."""
    mask: Path | None = None
    """Mask picture; for a folder, a folder of masks with the same names in the same folders."""
    hide: Hide | None = None
    """Instead of a mask: hide glasses, a hat or a box."""
    box: tuple[Natural, Natural, Count, Count] | None = None
    """With --hide box: left, top, width, height in pixels; default: the middle third."""
    mask_polarity: Polarity = "white-hole"
    """Which colour of a mask means corrupted."""
    run: Path | None = None
    """Run folder; default: the newest."""
    data: DataName | None = None
    """Networks trained on this set; default: the run's last."""
    variant: str | None = None
    """Which refinement network; default: the most complete one."""
    seed: Seed | None = None
    """Which seed of it; default: the run's first."""
    crop: Crop = "picture"
    """Show the network the whole picture (an aligned face), or a square around the hole (a large photo)."""
    blend: bool = True
    """Adjust colours inside the hole so that there is no seam."""
    pixel: tuple[Natural, Natural] | None = None
    """x y of a corrupted pixel whose attention and memory slots are shown."""
    part: str | None = None
    """With --slot: let this facial part read one memory slot alone, e.g. mouth."""
    slot: Natural | None = None
    """Number of that slot; default: 0."""
    out: Path = Path("completed")
    """Folder for the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def read_inputs(
    config: PredictConfig, model: Model, path: Path, mask_path: Path | None
) -> tuple[Tensor, Tensor, list[str]]:
    """Picture, mask and remarks."""
    image, remarks = read_photo(path)
    if mask_path is None:
        return image, hiding_mask(model, image, config.hide, config.box), remarks
    mask, more = fitting_mask(mask_path, tuple(image.shape[-2:]), config.mask_polarity)
    return image, mask, remarks + more


def one_slot(model: Model, part: str | None, slot: int):
    """A context in which `part` reads memory slot `slot` alone; nothing when part is None."""
    if part is None:
        return nullcontext()
    dmm = model.net.refine.dmm
    if dmm is None or dmm.blocks != len(model.parts):
        raise UserError(f"--part: {model.name} has no memory for each part")
    if part not in model.parts or not 0 <= slot < dmm.slots:
        raise UserError(f"--part is one of {', '.join(model.parts)}; --slot is 0 to {dmm.slots - 1}")
    memory = dmm.memory.detach().clone()
    k = model.parts.index(part)
    memory[k] = memory[k, slot].clone()
    return memory_replaced(dmm, memory)


def heat(done: Completed, weights: Tensor) -> Tensor:
    """Attention weights (h, w) as a red glow on the damaged picture (3, H, W)."""
    left, top, width, height = done.box
    glow = F.interpolate(
        (weights / weights.max().clamp_min(1e-12))[None, None], (height, width), mode="nearest"
    )
    shown = done.damaged * 0.5
    view = shown[:, top : top + height, left : left + width]
    view += (1 - view) * glow[0] * torch.tensor((1.0, 0.25, 0.1)).view(3, 1, 1)
    return shown


def painted_parsing(done: Completed) -> Tensor:
    """The parsing in colours (3, H, W) where the network looked; the rest of the picture is black."""
    left, top, width, height = done.box
    shown = torch.zeros_like(done.image)
    if done.inputs is not None:
        colours = F.interpolate(paint_parts(done.parsing[None]), (height, width), mode="nearest")[0]
        shown[:, top : top + height, left : left + width] = colours
    return shown


def write_outputs(folder: Path, model: Model, done: Completed, config: PredictConfig) -> None:
    """All pictures and result.json of one completion. UserError, before anything is written, for a --pixel
    that was not completed."""
    asked = config.pixel is not None and done.inputs is not None
    weights, slots = attention_of(model, done, config.pixel) if asked else (None, [])
    made = f"hole completed by {model.name}" if done.inputs is not None else None
    write_image(folder / "completed.png", done.image, made)
    write_image(folder / "coarse.png", done.coarse, made)
    write_image(folder / "parsing.png", painted_parsing(done))
    tiles = [done.damaged, done.coarse, painted_parsing(done), done.image]
    labels = ["input", "coarse", "parsing", "completed"]
    record = {"model": model.name, "hole_ratio": done.hole_ratio, "crop": done.box, "warnings": done.warnings}
    if asked:
        record |= {"pixel": config.pixel, "slots": slots}
    if weights is not None:
        for name, each in zip(("from kept cells", "from the hole"), weights, strict=True):
            tiles.append(heat(done, each))
            labels.append(name)
        write_image(folder / "attention.png", image_grid(tiles[-2:], columns=2, column_labels=labels[-2:]))
    scale = max(1, 128 // done.image.shape[-1])
    sheet = image_grid(tiles, columns=len(tiles), column_labels=labels, scale=scale)
    write_image(folder / "sheet.png", sheet, made)
    write_json(folder / "result.json", record)


def main(config: PredictConfig) -> Path:
    """Complete every picture; returns the folder with the results. In a folder, a picture and its mask lie at
    the same place below their folders, and the results too. UserError when two would get one place, and for
    options that do not go together."""
    if (config.mask is None) == (config.hide is None):
        raise UserError("give either --mask FILE or --hide glasses|hat|box")
    if config.box is not None and config.hide != "box":
        raise UserError("--box is what --hide box hides: give both")
    if config.slot is not None and config.part is None:
        raise UserError(f"--slot {config.slot}: of which part? Give --part too, e.g. --part mouth")
    model = load_model(config.run, config.data, config.variant, config.seed, pick_device(config.device))
    folder = config.picture.is_dir()
    pictures = list_images(config.picture, "pictures") if folder else [config.picture]
    places = [path.relative_to(config.picture).with_suffix("") if folder else Path() for path in pictures]
    for i, place in enumerate(places):
        if place in places[:i]:
            twin = pictures[places.index(place)]
            raise UserError(f"{twin} and {pictures[i]}: their results would have one name; rename one")
    for path, place in zip(progress(pictures, "pictures"), places, strict=True):
        mask_path = config.mask
        if mask_path is not None and mask_path.is_dir():
            beside = mask_path / (place.parent if folder else "") / path.stem
            named = [beside.with_name(f"{path.stem}{ending}") for ending in (path.suffix, ".png", ".jpg")]
            mask_path = next((file for file in named if file.is_file()), None)
            if mask_path is None:
                raise UserError(f"{config.mask}: no mask {path.stem}.png for {path}")
        results = ("completed", "coarse", "parsing", "attention", "sheet")
        inputs = [path] if mask_path is None else [path, mask_path]
        keep_inputs(inputs, (config.out / place / f"{name}.png" for name in results))
        image, mask, remarks = read_inputs(config, model, path, mask_path)
        with one_slot(model, config.part, config.slot or 0):
            done = complete(model, image, mask, config.crop, config.blend)
            done.warnings[:0] = remarks
            write_outputs(config.out / place, model, done, config)
        for warning in done.warnings:
            print(f"warning: {warning}")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(PredictConfig, __doc__))))
