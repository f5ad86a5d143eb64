"""Completing a user's own picture: input checks, crop, network, seamless paste. `predict.py` and `app.py` use
it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mdrnets.blend import extent, paste, shrink_known
from mdrnets.data import DataName
from mdrnets.masks import Polarity, looks_inverted, ratio, read_mask, to_mask
from mdrnets.model import MDRNet
from mdrnets.mrem import hole_cells
from mdrnets.parser import GLASSES, GROUPS, HAT, BiSeNetParser, likely_cells
from mdrnets.simple import PARTS
from mdrnets.stages import VARIANTS, build, plan, stage_file
from mdrnets.train import Config
from shared.io import find_run, load_config, load_safetensors
from shared.runtime import UserError

Hide = Literal["glasses", "hat", "box"]
Crop = Literal["picture", "hole"]
BEST_FIRST = ("full+inco2", "full", *VARIANTS)


@dataclass
class Model:
    """A trained network with what is needed to use it."""

    net: MDRNet
    parts: tuple[str, ...]
    size: int
    name: str
    device: torch.device


@dataclass
class Completed:
    """A completed picture; images are (3, H, W) in [0, 1]."""

    image: Tensor
    coarse: Tensor
    """The coarse result alone, pasted the same way."""
    damaged: Tensor
    """The picture with a grey hole."""
    parsing: Tensor
    """(K, h, w) on the crop's memory grid."""
    box: tuple[int, int, int, int]
    """Crop that the network saw: left, top, width, height in pixels."""
    hole_ratio: float
    warnings: list[str] = field(default_factory=list)
    inputs: tuple[Tensor, Tensor] | None = None
    """What the network saw: x (1, 3, S, S') in [-1, 1] and its mask; None when nothing was to be done."""


def load_model(
    run: Path | None, data: DataName | None, variant: str | None, seed: int | None, device: torch.device
) -> Model:
    """A finished network of a run. Defaults: the newest run, its last data set, the most complete variant,
    its first seed. UserError when there is none of that kind."""
    folder = find_run("mdrnets", run)
    config = load_config(folder, Config)
    data = data or config.data[-1]
    seed = config.seed if seed is None else seed
    finished = {
        stage.name: stage_file(folder, stage)
        for stage in plan(config)
        if stage.data == data and stage.seed == seed and stage_file(folder, stage).is_file()
    }
    wanted = (variant,) if variant else BEST_FIRST
    name = next((name for name in wanted if name in finished and name in VARIANTS), None)
    if name is None:
        there = ", ".join(n for n in finished if n in VARIANTS) or "none yet"
        raise UserError(
            f"{folder}: no finished network {variant or ''} on {data} with seed {seed}; there: {there}"
        )
    parts = PARTS if data == "simple" else tuple(GROUPS)
    net = build(config, name, len(parts))
    load_safetensors(finished[name], net)
    return Model(net.to(device).eval(), parts, config.image_size, f"{folder.name}, {data}, {name}", device)


def fitting_mask(path: Path, size: tuple[int, int], polarity: Polarity) -> tuple[Tensor, list[str]]:
    """Mask file for a picture of (height, width) and remarks. A mask of another size is scaled when its shape
    is the same within 2 %; UserError otherwise."""
    mask = read_mask(path, None, polarity)
    height, width = mask.shape[-2:]
    remarks = []
    with Image.open(path) as opened:
        if opened.has_transparency_data and opened.convert("RGBA").getextrema()[3][0] < 255:
            remarks.append(f"{path.name}: what is transparent in a mask means nothing, its colours count")
    if (height, width) == size:
        return mask, remarks
    if abs(width / height * size[0] / size[1] - 1) > 0.02:
        raise UserError(
            f"{path}: the mask is {width}x{height} and the picture {size[1]}x{size[0]}; "
            "give a mask of the same shape"
        )
    remarks.append(f"{path.name}: scaled from {width}x{height} to the picture's size")
    return to_mask(mask, size, "white-hole"), remarks


def hiding_mask(model: Model, image: Tensor, hide: Hide, box: tuple[int, int, int, int] | None) -> Tensor:
    """Mask (1, H, W) over glasses, a hat or a box (left, top, width, height; default: the middle third).

    With the public parser glasses and hats are its own labels. The small parser knows parts only: then the
    eye region, or the hair above the eyes, is hidden. UserError when there is nothing to hide.
    """
    height, width = image.shape[-2:]
    if hide == "box":
        left, top, wide, high = box or (width // 3, height // 3, width // 3, height // 3)
        if left + wide > width or top + high > height:
            raise UserError(f"--box {left} {top} {wide} {high} is not inside the picture of {width}x{height}")
        mask = torch.zeros(1, height, width)
        mask[:, top : top + high, left : left + wide] = 1
        return mask
    with torch.no_grad():
        parser = model.net.parser
        public = isinstance(parser, BiSeNetParser)
        side = parser.size if public else model.size  # each parser at the size that it learned at
        x = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True) * 2 - 1
        if public:
            found = (parser.labels(x.to(model.device)).argmax(1) == {"glasses": GLASSES, "hat": HAT}[hide])[0]
        else:
            cells = (model.size // model.net.stride,) * 2
            likely = likely_cells(parser(x.to(model.device), cells)[0])
            found = likely[next(i for i, name in enumerate(model.parts) if name.startswith("eyes"))]
            if hide == "hat":
                above = torch.arange(len(found), device=found.device) < found.any(1).nonzero().min()
                found = likely[model.parts.index("hair")] & above[:, None]
        if not found.any():
            raise UserError(f"--hide {hide}: none found in the picture; use --hide box or --mask")
        small = found.float().cpu()[None, None]
        reach = max(1, round(0.03 * small.shape[-1]))
        grown = F.max_pool2d(small, 2 * reach + 1, 1, reach)
        return F.interpolate(grown, (height, width), mode="nearest-exact")[0]


LONGEST = 8
"""Most that the network is shown of a picture: this many times as long as it is wide."""


def crop_box(mask: Tensor, crop: Crop) -> tuple[int, int, int, int]:
    """What the network is to see, (left, top, width, height): the whole picture, or a square around the hole
    with as much of its surroundings on every side as half its own size."""
    height, width = mask.shape[-2:]
    if crop == "picture":
        return 0, 0, width, height
    top, bottom, left, right = extent(mask)
    side = min(2 * max(bottom - top, right - left), height, width)

    def start(low: int, high: int, limit: int) -> tuple[int, int]:
        length = min(max(side, high - low), limit)
        return min(max((low + high - length) // 2, 0), limit - length), length

    (x, wide), (y, high) = start(left, right, width), start(top, bottom, height)
    return x, y, wide, high


@torch.no_grad()
def complete(
    model: Model, image: Tensor, mask: Tensor, crop: Crop = "picture", seamless: bool = True
) -> Completed:
    """Fill the hole of a picture (3, H, W) in [0, 1] of any size; mask (1, H, W), 1 = corrupted.

    The crop is scaled to the size that the network was trained at, completed, enlarged and pasted back. Kept
    pixels are returned bit for bit. An empty mask returns the picture; a full one, an inverted one and a
    picture that does not look like a face give a warning. Raises ValueError when image and mask differ in
    size, and UserError for a strip.
    """
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"image {tuple(image.shape)} and mask {tuple(mask.shape)} differ in size")
    share = ratio(mask)
    if share == 0:
        empty = torch.zeros(len(model.parts), 1, 1)
        notes = ["the mask is empty: nothing to complete, the picture is returned as it is"]
        return Completed(image, image, image, empty, (0, 0, 0, 0), 0.0, notes)
    notes = [note for note in [looks_inverted(share)] if note]
    if share == 1:
        notes = ["the mask covers the whole picture: the result is invented, nothing is kept"]
    left, top, width, height = box = crop_box(mask, crop)
    view = (slice(None), slice(top, top + height), slice(left, left + width))
    if max(height, width) > LONGEST * min(height, width):
        raise UserError(
            f"a strip of {width}x{height} pixels, over {LONGEST} times as long as wide, is no face: "
            "use --crop hole, or cut it"
        )
    scale = model.size / min(height, width)
    small = (max(8, round(height * scale)), max(8, round(width * scale)))
    x, m = shrink_known(image[view], mask[view], small)
    x, m = (x[None] * 2 - 1).to(model.device), m[None].to(model.device)
    out = model.net(x, m)
    if not model.net.parser.is_face(out["coarse_comp"], out["parsing"]).all():
        notes.append("this does not look like an aligned face: the result is probably meaningless")
    results = []
    for name in ("refined", "coarse"):
        filled = (out[name].float().clamp(-1, 1) / 2 + 0.5).cpu()
        filled = F.interpolate(filled, (height, width), mode="bicubic", antialias=True, align_corners=False)[
            0
        ]
        whole = image.clone()
        whole[view] = paste(image[view], mask[view], filled.clamp(0, 1), seamless)
        results.append(whole)
    results.append(image.masked_fill(mask > 0.5, 0.5))
    return Completed(*results, out["parsing"][0].cpu(), box, share, notes, (x, m))


@torch.no_grad()
def attention_of(model: Model, done: Completed, pixel: tuple[int, int]) -> tuple[Tensor | None, list[dict]]:
    """Where MREM looks for a corrupted pixel (x, y) of the picture, and which memory slots its cell reads.

    Returns weights (2, h, w), from kept and from corrupted cells, each summing to 1 or 0 (None: the network
    has no MREM), and for every part a dict of part, its probability and its three most read slots with their
    weights (none: it has no memory). UserError for a pixel outside the crop or not corrupted, or a network
    with neither module.
    """
    refine = model.net.refine
    if done.inputs is None:
        raise UserError("nothing was completed: there is no attention to show")
    if refine.mrem is None and refine.dmm is None:
        raise UserError(f"{model.name}: this network has neither MREM nor a memory to look into")
    seen, stride = done.inputs[0].shape[-2:], model.net.stride
    x, m = model.net.padded(*done.inputs)  # as the network itself does: a cell is `stride` of its pixels
    left, top, width, height = done.box
    column, row = ((pixel[0] + 0.5 - left) / width, (pixel[1] + 0.5 - top) / height)
    if not (0 <= column < 1 and 0 <= row < 1):
        raise UserError(f"pixel {pixel} lies outside the part of the picture that was completed")
    out = model.net(x, m)
    features = refine.features(out["coarse_comp"], m, out["parsing"])
    cells = features.shape[-2:]
    holes = hole_cells(m, cells)
    at = (int(row * seen[0]) // stride, int(column * seen[1]) // stride)
    if holes[0, 0, at[0], at[1]] < 0.5:
        raise UserError(f"pixel {pixel} is not in the hole; choose one that was completed")
    index = at[0] * cells[1] + at[1]
    slots = []
    if refine.dmm is not None:
        enhanced_first = refine.mrem is not None and refine.order == "mrem>dmm"
        asking = refine.mrem(features, holes) if enhanced_first else features
        weights = refine.dmm.weights(refine.dmm.queries(asking), refine.dmm.shares(out["parsing"]))[0, index]
        names = model.parts if refine.dmm.blocks == len(model.parts) else ("all",)
        shares = out["parsing"][0].flatten(1)[:, index].tolist() if len(names) > 1 else [1.0]
        for name, share, row_of_block in zip(names, shares, weights, strict=True):
            top_weights, top_slots = row_of_block.topk(min(3, refine.dmm.slots))
            most = {str(int(i)): round(float(w), 4) for i, w in zip(top_slots, top_weights, strict=True)}
            slots.append({"part": name, "probability": round(share, 4), "slots": most})
    if refine.mrem is None:
        return None, slots
    if refine.dmm is not None and refine.order == "dmm>mrem":
        features = refine.dmm(features, out["parsing"].to(features.dtype))
    _, inter, intra = refine.mrem.dense(features, holes)
    return torch.stack([w[0, index].view(cells).float().cpu() for w in (inter, intra)]), slots
