"""Draw photos with a trained run.

Sketches have the photos' own size. With `--align auto` the eyes are found first and brought to where
training had them: python predict.py photos/ --align auto --out drawn/
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from most_net.align import align_to_eyes
from most_net.data import crop_to, pad_to
from most_net.eyes import find_eyes
from most_net.learner import styles_in
from most_net.memory import Memory
from most_net.metrics import image_files
from most_net.train import Config as TrainConfig
from most_net.trials import frame_of, load_network
from shared.io import find_run, keep_inputs, progress, read_image, write_image
from shared.ranges import Natural, Within
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main
from shared.weights import load_state, load_torch


@dataclass(frozen=True)
class Config:
    """Photos to sketches."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Photos, or folders of photos."""
    out: Path = Path("sketches")
    """Folder of the sketches (PNG) and of sketches.json."""
    run: Path | None = None
    """Run folder. Default: the newest run."""
    trial: str | None = None
    """Network of the run. Default: its last one that has a memory."""
    style: Natural = 0
    """Artist, by the number of the memory."""
    memory: Path | None = None
    """Draw with this memory instead, written by most_net.adapt."""
    strength: Annotated[float, Within(-10, 10)] = 1.0
    """Of the artist's style: 0 keeps the photo's own statistics, 1 is as trained, more exaggerates."""
    align: Literal["none", "auto", "eyes"] = "none"
    """Turn and cut the photo so that the eyes lie where training had them: found by itself, or as --eyes."""
    eyes: tuple[float, float, float, float] | None = None
    """x y of the left eye in the picture, x y of the right one, in pixels, for --align eyes."""
    resolution: Literal["trained", "own"] = "trained"
    """At which the network works: photo scaled to the height of the training photos, or as it is, in tiles
    when large. The sketch has the photo's own size either way."""
    tile: Annotated[int, Within(16)] = 512
    """Side of a tile in pixels."""
    white_background: bool = False
    """Leave the paper white outside the person."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def photo_files(inputs: tuple[Path, ...]) -> list[Path]:
    """The photos named or in folders named. UserError when two would give one sketch, or there are none."""
    files: list[Path] = []
    for path in inputs:
        files += image_files(path).values() if path.is_dir() else [path]
    if not files:
        raise UserError("no photo named; give files or folders")
    stems = [path.stem for path in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise UserError(f"two photos called {twice[0]}: their sketches would have one name; give them apart")
    return files


CUT_SIDE = 400
"""Longest side in pixels at which person and background are told apart."""


@torch.inference_mode()
def draw(net: nn.Module, photo: Tensor, least: int, style: int, strength: float, tile: int) -> Tensor:
    """Photo (3, H, W) in [0, 1] -> sketch (1, H, W) in [0, 1], in overlapping tiles when larger than `tile`.

    least: smallest side the network was trained on. A tile knows nothing of the whole photo's statistics, so
    its tone (all that is coarser than a sixteenth of a tile) is taken from a sketch of the reduced photo.
    """
    height, width = photo.shape[-2:]

    def whole(image: Tensor) -> Tensor:
        side = [max(least, n) for n in image.shape[-2:]]
        signed = pad_to(image[None], *side) * 2 - 1
        out = net.sketch(signed.contiguous(memory_format=torch.channels_last), style, strength)
        return crop_to(out, *image.shape[-2:])[0] / 2 + 0.5

    if max(height, width) <= tile:
        return whole(photo).clamp(0, 1)
    factor = tile / max(height, width)
    size = (max(8, round(height * factor)), max(8, round(width * factor)))
    small = whole(F.interpolate(photo[None], size, mode="bilinear", antialias=True)[0])
    total, weight = torch.zeros(1, height, width, device=photo.device), torch.zeros(1, height, width)
    weight = weight.to(photo.device)
    for top, left in progress(list(product(_starts(height, tile), _starts(width, tile))), "tiles"):
        piece = whole(photo[:, top : top + tile, left : left + tile])
        ramp = _ramp(piece.shape[-2])[:, None] * _ramp(piece.shape[-1])
        place = (..., slice(top, top + tile), slice(left, left + tile))
        total[place] += piece * ramp.to(photo.device)
        weight[place] += ramp.to(photo.device)
    fine = total / weight
    tone = F.interpolate(_smooth(small, tile // 16)[None], (height, width), mode="bilinear")[0]
    return (fine - _smooth(fine, round(tile / 16 / factor)) + tone).clamp(0, 1)


def _starts(length: int, tile: int) -> list[int]:
    """First pixels of tiles that cover `length` and overlap by at least a quarter."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / (0.75 * tile)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int) -> Tensor:
    """Weights that fall towards both ends and stay above 0."""
    distance = torch.arange(length).float() + 1
    return torch.minimum(distance, distance.flip(0)).clamp(max=length / 4)


def _smooth(image: Tensor, radius: int) -> Tensor:
    """Box blur of (1, H, W). By running sums: of a large photo the box has tens of thousands of pixels."""
    radius = max(1, min(radius, (min(image.shape[-2:]) - 1) // 2))
    out = F.pad(image[None], (radius,) * 4, mode="replicate")[0].double()
    box = 2 * radius + 1
    for dim, before in ((1, (0, 0, 1, 0)), (2, (1, 0))):
        sums = F.pad(out.cumsum(dim), before)
        length = sums.shape[dim] - box
        out = (sums.narrow(dim, box, length) - sums.narrow(dim, 0, length)) / box
    return out.to(image.dtype)


def person_mask(photo: Tensor) -> Tensor:
    """1 on the person, 0 on the background: (3, H, W) in [0, 1] -> (1, H, W).

    GrabCut, told that the two upper corners are background and the middle is the person; no learned part. It
    works on at most `CUT_SIDE` pixels a side: it would take minutes on a camera's picture.
    """
    full = (photo.permute(1, 2, 0).cpu().numpy()[..., ::-1] * 255).round().astype(np.uint8)
    factor = min(1.0, CUT_SIDE / max(full.shape[:2]))
    width, height = (max(8, round(n * factor)) for n in full.shape[1::-1])
    image = cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA)
    mask = np.full((height, width), cv2.GC_PR_FGD, np.uint8)
    rim_y, rim_x = max(1, height // 20), max(1, width // 20)
    mask[:rim_y] = cv2.GC_BGD
    mask[: height // 3, :rim_x] = mask[: height // 3, -rim_x:] = cv2.GC_BGD
    mask[height // 3 : 3 * height // 4, 2 * width // 5 : 3 * width // 5] = cv2.GC_FGD
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(image, mask, None, *models, 4, cv2.GC_INIT_WITH_MASK)
    person = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    person = cv2.resize(person, full.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(cv2.GaussianBlur(person, (0, 0), max(0.5, full.shape[0] / 250)))[None]


def load_memory(path: Path, like: Memory) -> Memory:
    """A memory written by `most_net.adapt`. UserError when the file is damaged or of another network."""
    state = load_torch(path)
    slots = len(state["keys"]) if isinstance(state, dict) and "keys" in state else like.slots
    memory = Memory(like.keys.shape[1], slots, like.tau, like.momentum, like.revive_after, like.topk)
    load_state(memory, state, path, prefixes=())
    return memory


def place_eyes(photo: Tensor, config: Config, path: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """The eyes for the alignment. UserError when no face is found or the given eyes lie outside."""
    if config.align == "auto":
        eyes = find_eyes(photo)
        if eyes is None:
            raise UserError(
                f"{path}: no upright frontal face found. Give the eyes with --align eyes --eyes X Y X Y, "
                "or draw the photo as it is with --align none"
            )
        return eyes
    if config.eyes is None:
        raise UserError("--align eyes needs --eyes X Y X Y: the left eye in the picture, then the right one")
    eyes = (config.eyes[:2], config.eyes[2:])
    if any(not (0 <= x < photo.shape[-1] and 0 <= y < photo.shape[-2]) for x, y in eyes):
        raise UserError(f"{path}: --eyes {config.eyes} lie outside the photo")
    if eyes[1][0] - eyes[0][0] < 2:
        raise UserError("--eyes: first the eye further left, then the other, at least 2 pixels to its right")
    return eyes


def predict(config: Config) -> Path:
    """Draw every photo; returns the folder of the sketches."""
    if config.eyes is not None and config.align != "eyes":
        raise UserError("--eyes is for --align eyes")
    device = pick_device(config.device)
    net, settings, trial = load_network(find_run("most_net", config.run), TrainConfig, config.trial)
    if config.memory is not None:
        if not hasattr(net, "memories"):
            raise UserError(f"--memory: {trial.name} is a network without one")
        net.memories[0] = load_memory(config.memory, net.memories[0])
    net.to(device, memory_format=torch.channels_last).eval()
    style = 0 if config.memory is not None else config.style
    if style >= styles_in(net):
        raise UserError(f"--style {style}: {trial.name} has {styles_in(net)} of them, from 0")
    frame, records, photos = frame_of(settings, trial), {}, photo_files(config.inputs)
    keep_inputs(photos, (config.out / f"{path.stem}.png" for path in photos))
    config.out.mkdir(parents=True, exist_ok=True)  # here, where a path that cannot be used costs nothing
    for path in progress(photos, "sketches"):
        photo = read_image(path)
        record: dict[str, object] = {"photo": str(path)}
        if config.align != "none":
            eyes = place_eyes(photo, config, path)
            record["eyes"] = eyes
            photo = align_to_eyes(photo, eyes)
        working = photo
        if config.resolution == "trained":
            factor = frame[0] / photo.shape[-2]
            size = [max(8, round(n * factor)) for n in photo.shape[-2:]]
            working = F.interpolate(photo[None], size, mode="bilinear", antialias=True)[0]
        sketch = draw(net, working.to(device), trial.size, style, config.strength, config.tile).cpu()
        if sketch.shape[-2:] != photo.shape[-2:]:
            sketch = F.interpolate(sketch[None], photo.shape[-2:], mode="bicubic")[0].clamp(0, 1)
        if config.white_background:
            person = person_mask(photo)
            sketch = sketch * person + 1 - person
        target = config.out / f"{path.stem}.png"
        write_image(target, sketch, synthetic=f"sketch by MOST-Net ({trial.name}) of a photo")
        records[target.name] = record | {"size": [photo.shape[-1], photo.shape[-2]]}
    write_json(config.out / "sketches.json", {"network": trial.name, "style": style, "sketches": records})
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(predict(parse(Config, __doc__))))
