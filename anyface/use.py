"""Using a trained AnyFace: faces from captions, one face from several captions, inversion and editing.

Pictures are (3, S, S) or (N, 3, S, S) in [0, 1] here; codes are W+ (N, L, D).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from anyface.bundle import Model
from anyface.clip import WordTokenizer, image_features, too_long
from anyface.encoder import E4E
from anyface.model import assemble, average_captions, edit
from shared.io import progress
from shared.runtime import UserError
from shared.weights import load_torch

BATCH = 16
MOST_BYTES = 4 * 2**30
"""Memory that the pictures of one call may take: 341 faces of 1024 px."""
EXPLAINED = 0.5
"""Share of a picture's variance that an inversion must reproduce to count as found."""
FAR = 1.5
"""Distance of an inversion from the mean code, in that of the generator's own faces, that is called far."""
PLAIN = 0.01
"""Variance, on [-1, 1], below which a picture is nearly of one colour."""


def notices(model: Model, caption: str) -> list[str]:
    """What a user should know about a caption before trusting the face: empty, cut, or words not known."""
    found = []
    left_out = too_long(model.tokenizer, caption)
    if not caption.strip():
        found.append("an empty caption describes no face in particular")
    elif left_out:
        room = model.tokenizer.context_length - 2
        found.append(f"caption cut to its first {room} tokens, {left_out} left out: {shortened(caption)}")
    if isinstance(model.tokenizer, WordTokenizer) and caption.strip():
        known = set(model.tokenizer.vocabulary)
        words = model.tokenizer.words(caption)
        unknown = [word for word in words if word not in known]
        if len(unknown) == len(words):
            found.append(f"no word of it is in this model's vocabulary: {shortened(caption)}")
        elif unknown:
            found.append(
                f"words that this model does not know: {shortened(', '.join(dict.fromkeys(unknown)))}"
            )
    return found


def notices_of(model: Model, captions: list[str], together: bool) -> list[str]:
    """`notices` of captions. together: they describe one face, and a stream that reads words gets them as one
    text."""
    texts = [joined(captions)] if together and model.words else captions
    return [notice for text in texts for notice in notices(model, text)]


def joined(captions: list[str]) -> str:
    """Several captions as the one text that a stream that reads words gets."""
    return ", ".join(captions)


def shortened(text: str, length: int = 60) -> str:
    """At most `length` characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def caption_codes(model: Model, captions: list[str]) -> Tensor:
    """One code for each caption (N, L, D). UserError without a caption."""
    if not captions:
        raise UserError("give at least one caption, for instance: a young woman with brown hair")
    return torch.cat([model.codes(captions[i : i + 64]) for i in range(0, len(captions), 64)])


@torch.no_grad()
def combined_code(model: Model, captions: list[str]) -> Tensor:
    """One code (1, L, D) for all captions together.

    The captions' CLIP features are averaged at the mean of their lengths and mapped once; AnyFace++ averages
    what its memory completed, as released. A stream that reads words gets the captions as one text.
    """
    if not captions:
        raise UserError("give at least one caption, for instance: a young woman with brown hair")
    if model.words:
        return model.codes([joined(captions)])
    features = model.features(captions)
    if model.memory is not None:
        return model.text(model.memory(features).mean(0, keepdim=True))
    return model.codes_of(average_captions(features))


@torch.no_grad()
def draw(
    model: Model,
    codes: Tensor,
    count: int,
    seed: int = 0,
    m: int | None = None,
    psi: float | None = None,
    cutoff: int = 8,
) -> tuple[Tensor, Tensor]:
    """`count` faces of each code: pictures (N, count, 3, S, S) and codes (N, count, L, D).

    m: layers that come from noise, 0 for one certain face; psi: truncation of the noise in the first `cutoff`
    layers. Default: as trained.
    Draw k is the same noise for every caption, so that columns of a grid share what captions do not say.
    """
    m, psi = model.m if m is None else m, model.psi if psi is None else psi
    layers = model.generator.n_latent
    if not 0 <= m <= layers:
        raise UserError(f"noise goes into 0 to {layers} layers of this model, not {m}")
    side = model.painter.size
    most = MOST_BYTES // (12 * side * side * len(codes))
    if not 1 <= count <= most:
        raise UserError(
            f"{count} faces of {side} px for each of {len(codes)} captions: 1 to {most} go into memory; "
            "make more in further calls, with other seeds"
        )
    z = torch.randn(count, model.generator.style_dim, generator=torch.Generator().manual_seed(seed))
    w_z = model.generator.mapping(z.to(model.device))
    if cutoff < 0:
        raise UserError(f"--cutoff counts layers from the first on, so it is 0 or more, not {cutoff}")
    every = torch.cat(
        [assemble(w_z, code.expand(count, -1, -1), m, psi, cutoff, model.mean) for code in codes]
    )
    pictures = paint(model, every)
    return pictures.unflatten(0, (len(codes), count)), every.unflatten(0, (len(codes), count))


@torch.no_grad()
def paint(model: Model, codes: Tensor) -> Tensor:
    """Codes (N, L, D) -> pictures (N, 3, S, S) in [0, 1], on the CPU."""
    starts = progress(range(0, len(codes), BATCH), "faces")
    parts = [((model.paint(codes[i : i + BATCH]) + 1) / 2).clamp(0, 1).cpu() for i in starts]
    return torch.cat(parts)


def clip_scores(model: Model, pictures: Tensor, captions: list[str]) -> list[float]:
    """100 * max(cosine, 0) between pictures (N, 3, S, S) in [0, 1] and one caption each."""
    seen = [
        model.see(pictures[i : i + BATCH].to(model.device) * 2 - 1) for i in range(0, len(pictures), BATCH)
    ]
    cosine = F.cosine_similarity(torch.cat(seen), model.features(captions))
    return (100 * cosine.clamp_min(0)).tolist()


# --- inversion ------------------------------------------------------------------------------------


@dataclass
class Inverted:
    """A picture found in the generator: code (1, L, D) and its reconstruction (3, S, S).

    explained: share of the picture's variance that it reproduces; distance: of the code from the mean of w,
    1 as for the generator's own faces.
    """

    code: Tensor
    picture: Tensor
    explained: float
    distance: float
    warnings: list[str] = field(default_factory=list)


def square(image: Tensor, size: int) -> tuple[Tensor, list[str]]:
    """Picture (3, H, W) in [0, 1] -> (3, size, size): the middle square, resized. With remarks."""
    height, width = image.shape[-2:]
    remarks, side = [], min(height, width)
    if height != width:
        remarks.append(f"{width} x {height} is no square: the middle {side} x {side} is used")
    top, left = (height - side) // 2, (width - side) // 2
    image = image[:, top : top + side, left : left + side]
    if side < size:
        remarks.append(f"{side} px are enlarged to the generator's {size} px")
    resized = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized[0], remarks


def ramp(t: float) -> float:
    """Factor on the learning rate at the share t of the steps: up over 5 %, down over the last 25 %."""
    return min(1.0, t / 0.05 + 0.05) * 0.5 * (1 - math.cos(math.pi * min(1.0, (1 - t) / 0.25)))


def invert(
    model: Model,
    image: Tensor,
    steps: int = 300,
    encoder: tuple[E4E, Tensor] | None = None,
    lr: float = 0.1,
    clip_weight: float = 0.1,
    code_weight: float = 0.01,
) -> Inverted:
    """Find a face (3, S, S) in [0, 1] in W+: by an e4e encoder, by optimisation, or by one after the other.

    Optimisation: Adam on L1, the CLIP distance of picture and reconstruction, and the squared distance of
    the code from the mean of w; it starts at the mean code or the encoder's. W+ can reproduce pictures that
    are no faces; the last term and `FAR` tell them. steps 0: the encoder alone. A picture that the generator
    cannot make, or only far from its faces, comes back with a warning.
    """
    target, remarks = square(image, model.generator.size)
    target = target.to(model.device)[None] * 2 - 1
    if encoder is not None:
        network, mean = encoder
        if mean.shape[1:] != model.mean.shape[1:]:
            raise UserError(
                f"the encoder makes codes {tuple(mean.shape[1:])}, this generator takes "
                f"{tuple(model.mean.shape[1:])}: they belong to different generators"
            )
        small = square(image, network.size)[0].to(model.device)[None] * 2 - 1
        with torch.no_grad():
            start = network.to(model.device)(small) + mean.to(model.device)
    else:
        if steps < 1:
            raise UserError("inversion needs at least one step, or the weights of an encoder (--e4e)")
        start = model.mean.clone()
    code = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([code], lr)
    wanted = model.see(target)
    centre, radius = typical(model)
    for step in progress(range(steps), "inversion"):
        optimiser.param_groups[0]["lr"] = lr * ramp(step / steps)
        made = model.generator.synthesis(code)
        seen = image_features(model.clip, made, model.clip_input)
        loss = F.l1_loss(made, target) + clip_weight * (1 - F.cosine_similarity(seen, wanted).mean())
        loss = loss + code_weight * ((code - centre) / radius).square().sum(-1).mean()
        (code.grad,) = torch.autograd.grad(loss, code)
        optimiser.step()
    code = code.detach()
    with torch.no_grad():
        made = model.generator.synthesis(code)
    explained = 1 - ((made - target).square().mean() / target.var().clamp_min(PLAIN)).item()
    distance = ((code - centre).norm(dim=-1).mean() / radius).item()
    if target.var() < PLAIN:
        remarks.append("this picture is nearly of one colour: is there a face in it?")
    elif explained < EXPLAINED:
        remarks.append(
            f"the generator reproduces only {100 * max(explained, 0):.0f} % of this picture's variance: "
            "is it one face, upright and aligned as in FFHQ? (predict.py --landmarks aligns a photo)"
        )
    elif distance > FAR:
        remarks.append(
            f"the generator makes this picture only {distance:.1f} times as far from its mean as its own "
            "faces lie: is it a face? Edits of it will look odd"
        )
    return Inverted(code, ((made[0] + 1) / 2).clamp(0, 1).cpu(), explained, distance, remarks)


@torch.no_grad()
def typical(model: Model, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean of w (D,) over `count` fixed draws, and the median distance of w from it."""
    z = torch.randn(count, model.generator.style_dim, generator=torch.Generator().manual_seed(0))
    w = model.generator.mapping(z.to(model.device))
    return w.mean(0), (w - w.mean(0)).norm(dim=1).median()


# --- editing --------------------------------------------------------------------------------------


def check_edit(model: Model, degree: int, alpha: float) -> None:
    """UserError for a degree or an alpha that this generator has not."""
    layers = model.generator.n_latent
    if not 0 <= degree <= layers:
        raise UserError(f"--degree is 0 to {layers} for this generator, not {degree}")
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha is 0 to 1, not {alpha:g}")


@torch.no_grad()
def edited(model: Model, source: Tensor, wanted: Tensor, degree: int, alpha: float = 1.0) -> Tensor:
    """The code of a source face (1, L, D) towards a caption's (1, L, D); see `anyface.model.edit`. UserError
    as `check_edit`."""
    check_edit(model, degree, alpha)
    return edit(source, wanted, degree, alpha)


def strip(model: Model, source: Tensor, wanted: Tensor, alpha: float = 1.0) -> tuple[Tensor, list[int]]:
    """Pictures (K, 3, S, S) of degrees 0 to L of one edit, and the degrees; the last is the source."""
    degrees = list(range(model.generator.n_latent + 1))
    codes = torch.cat([edited(model, source, wanted, degree, alpha) for degree in degrees])
    return paint(model, codes), degrees


def read_code(model: Model, path: Path, row: int = 0) -> Tensor:
    """A stored inversion (1, L, D): one of a tensor (N, L, D) in a .pt file, or `codes` in .safetensors.

    UserError when it belongs to another generator or the row is not there.
    """
    content = load_torch(path)
    if isinstance(content, dict):
        content = content.get("codes", content.get("w"))
    if not isinstance(content, Tensor) or content.ndim not in (2, 3, 4):
        raise UserError(
            f"{path}: no codes; a tensor (N, {model.mean.shape[1]}, {model.mean.shape[2]}) is read"
        )
    codes = content.float().reshape(-1, *content.shape[-2:])
    if codes.shape[1:] != model.mean.shape[1:]:
        raise UserError(
            f"{path}: codes {tuple(codes.shape[1:])}, this generator takes {tuple(model.mean.shape[1:])}: "
            "they were made for another generator"
        )
    if not 0 <= row < len(codes):
        raise UserError(f"{path}: row {row} asked for, it has {len(codes)}")
    return codes[row : row + 1].to(model.device)
