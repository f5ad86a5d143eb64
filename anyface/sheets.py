"""Sheets that a person can judge: captions and their faces, editing, caption after caption, 64 px."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from anyface.data import Cache, Faces, encode_captions, read_text
from anyface.model import Stream, assemble, average_captions, edit
from anyface.parts import Learner, widen
from anyface.stages import Constants
from anyface.world import describe
from shared.io import image_grid
from shared.runtime import step_generator

TEXT_WIDTH = 210
"""Pixels that a caption takes beside its row."""
TRAINING_SIDE = 256
"""Largest side of a picture on the sheets of training."""
COLUMN = 96
"""Pixels that pictures are enlarged to, by a whole number."""


def written(text: str, height: int) -> Tensor:
    """A caption as a white panel (3, height, TEXT_WIDTH) in [0, 1], wrapped."""
    panel = Image.new("RGB", (TEXT_WIDTH, height), "white")
    font = ImageFont.load_default(12)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 34)]
    ImageDraw.Draw(panel).multiline_text((4, 4), "\n".join(lines[: height // 15]), "black", font)
    return torch.from_numpy(np.array(panel)).permute(2, 0, 1).float() / 255


def sheet(captions: list[str], columns: dict[str, Tensor]) -> Tensor:
    """Captions in rows, the pictures (N, 3, S, S) in [-1, 1] of every column beside them -> (3, H, W)."""
    size = next(iter(columns.values())).shape[-1]
    scale = max(1, COLUMN // size)
    tiles = [
        column[i].float().cpu().clamp(-1, 1) / 2 + 0.5
        for i in range(len(captions))
        for column in columns.values()
    ]
    grid = image_grid(tiles, len(columns), column_labels=list(columns), scale=scale)
    side = size * scale
    head = grid.shape[1] - len(captions) * (side + 2) + 2
    text = torch.ones(3, grid.shape[1], TEXT_WIDTH)
    for i, caption in enumerate(captions):
        top = head + i * (side + 2)
        text[:, top : top + side] = written(caption, side)
    return torch.cat((text, grid), 2)


@torch.inference_mode()
def caption_sheet(
    w_t: Tensor,
    captions: list[str],
    constants: Constants,
    layers: int,
    seed: int,
    beside: dict[str, Tensor] | None = None,
    wide: bool = False,
) -> Tensor:
    """The pictures of `beside` by name, the captions' faces, and three draws of their coarse layers.

    w_t (N, L, D): the captions' codes. wide: painted by the generator of twice the side.
    """
    painter = constants.wide if wide else constants.generator
    noise = torch.randn(3, len(w_t), constants.generator.style_dim, generator=step_generator(seed, 0, 24))
    codes = {"AnyFace": w_t}
    for i, z in enumerate(noise.to(w_t), start=1):
        codes[f"noise {i}"] = assemble(constants.generator.mapping(z), w_t, layers)
    made = {name: painter.synthesis(widen(code, painter.n_latent)) for name, code in codes.items()}
    return sheet(captions, {**(beside or {}), **made})


@torch.inference_mode()
def editing_sheet(w: Tensor, w_t: Tensor, captions: list[str], constants: Constants) -> Tensor:
    """Faces w (N, L, D) edited with the captions' codes at rising degrees, from text to source."""
    generator = constants.generator
    degrees = range(0, generator.n_latent + 1, max(1, generator.n_latent // 8))
    columns = {f"degree {degree}": generator.synthesis(edit(w, w_t, degree)) for degree in degrees}
    return sheet(captions, columns)


@torch.inference_mode()
def build_up_sheet(text: Stream, faces: Faces, constants: Constants, seed: int, count: int = 5) -> Tensor:
    """Faces of the world: the true picture, then with one, two, three, four captions of one trait each."""
    names = ("hair colour", "background", "skin", "hat")
    device = constants.generator.input.input.device
    count = min(count, len(faces))
    captions = [
        [describe(faces.values[i : i + 1], seed + i, traits=(name,))[0][0] for name in names]
        for i in range(count)
    ]
    flat = encode_captions(constants.clip, constants.tokenizer, [c for own in captions for c in own], device)
    features = flat.view(count, len(names), -1)
    columns = {"true face": faces.picture(torch.arange(count), constants.generator.size)}
    for n in range(1, len(names) + 1):
        joined = torch.cat([average_captions(own[:n]) for own in features])
        columns[f"{n} caption{'s' * (n > 1)}"] = constants.generator.synthesis(text(joined)[0])
    return sheet(["\n".join(own) for own in captions], columns)


@torch.no_grad()
def training_sheet(learner: Learner, cache: Cache, constants: Constants, layers: int, seed: int) -> Tensor:
    """Eight training faces: reconstruction, the text stream's face of a caption, two draws of its coarse
    layers, the image stream's. layers: that come from noise."""
    text, image = learner.models["text"].eval(), learner.models["image"].eval()
    generator = constants.generator
    tokens = cache.tokens[:8, 0] if learner.words else None
    w_t = read_text(text, constants.clip, cache.text[:8, 0], tokens)[0]
    w_i = image(cache.image[:8])[0]
    z = torch.randn(2, len(w_t), generator.style_dim, generator=step_generator(seed, 0, 14))
    draws = [assemble(generator.mapping(part.to(w_t)), w_t, layers) for part in z]
    codes = (cache.codes[:8], w_t, *draws, w_i)
    side = min(generator.size, TRAINING_SIDE)
    rows = [F.adaptive_avg_pool2d(generator.synthesis(code), side) for code in codes]
    text.train(), image.train()
    labels = ["G(w)", "caption", "noise 1", "noise 2", "image"]
    scale = max(1, 96 // side)
    return image_grid(torch.cat(rows) / 2 + 0.5, len(w_t), row_labels=labels, scale=scale)
