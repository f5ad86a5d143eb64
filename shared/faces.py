"""Procedural faces with known truth: image, semantic map, 68 landmarks, parameters, captions and sketches.

    params = sample(64, seed=0)                       # 64 people in 64 poses, lights, ...
    faces = draw(params, size=64)                     # faces.image (64, 3, 64, 64), .semantics, .landmarks
    same = make_params(params.identity, sample_attributes(64, seed=1), params.age)   # the same people again
    older = params.replace(age=70.0, glasses=1.0)
    texts = captions(params, seed=0)
    drawn = sketches(params, size=128, artist="pencil")

Everything is a pure function of the parameters: a face does not depend on the batch in which it is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.facedraw import paint_head
from shared.facehair import hair_field, hair_shape, head_box, paint_back_hair, paint_background, paint_hair
from shared.facelook import CLASSES, LABEL, build_look
from shared.faceparams import (
    AGE_RANGE,
    ATTRIBUTES,
    IDENTITY,
    Params,
    make_params,
    neutral_attributes,
    sample,
    sample_ages,
    sample_attributes,
    sample_identities,
)
from shared.faceshape import build_shape, frame, landmarks, upright
from shared.facesketch import ARTISTS, render_sketch, studio
from shared.facetext import Caption, captions, facts
from shared.facewear import paint_body, paint_glasses, paint_hat
from shared.facewindow import Window, chosen, draw_some, spans

__all__ = [
    "AGE_RANGE",
    "ARTISTS",
    "ATTRIBUTES",
    "BISENET_CLASSES",
    "CLASSES",
    "IDENTITY",
    "LABEL",
    "Caption",
    "Faces",
    "Params",
    "captions",
    "draw",
    "facts",
    "make_params",
    "neutral_attributes",
    "sample",
    "sample_ages",
    "sample_attributes",
    "sample_identities",
    "sketches",
    "to_bisenet",
]

# Order of the labels of the public face-parsing networks (BiSeNet of zllrunning/face-parsing.PyTorch).
BISENET_CLASSES = (
    *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r"),
    *("nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
)
MAX_SIZE = 2048
CHUNK = 64  # faces of 64 x 64 pixels


@dataclass(frozen=True)
class Faces:
    """B drawn faces.

    image (B, 3, H, W) float32 RGB in [0, 1]; semantics (B, H, W) uint8, indices into `CLASSES` ("l_": left
    half of an upright picture); landmarks (B, 68, 2) float32, x and y in pixels, (0, 0) the centre of the
    first pixel, iBUG order; params: what was drawn.
    """

    image: Tensor
    semantics: Tensor
    landmarks: Tensor
    params: Params


def to_bisenet(semantics: Tensor) -> Tensor:
    """Labels in the order of `CLASSES` -> labels in the order of `BISENET_CLASSES`; any shape, dtype kept."""
    table = torch.tensor([BISENET_CLASSES.index(name) for name in CLASSES], device=semantics.device)
    return table[semantics.long()].to(semantics.dtype)


def _picture_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) >= 8):
        raise ValueError(f"size must be an integer or (height, width) of at least 8 pixels, got {size!r}")
    if max(height, width) > MAX_SIZE:
        raise ValueError(f"size must be at most {MAX_SIZE} pixels, got {size!r}")
    return height, width


@torch.no_grad()
def draw(params: Params, size: int | tuple[int, int] = 64, camera: bool = True) -> Faces:
    """Draws faces at a size in pixels, or (height, width); the face is scaled with the height.

    camera=False leaves out blur and noise. Raises ValueError for sizes below 8 or above 2048 pixels.
    """
    height, width = _picture_size(size)
    # chunks large enough to hide the cost of a call and small enough for the caches of a core; the numbers
    # of all faces are found at once
    chunk = max(1, CHUNK * 64 * 64 // (height * width))
    s = build_shape(params)
    c = build_look(params, s)
    h = hair_shape(params, s, c)
    # faces with windows of about one size together
    ends = spans(s, height, width, *head_box(s, h, params, 2 / height))
    order = math.prod(last - first for first, last in ends).flatten().argsort()
    device = params.identity.device
    images = torch.empty(len(params), 3, height, width, device=device)
    semantics = torch.empty(len(params), height, width, dtype=torch.uint8, device=device)
    sorted_ = [chosen(thing, order) for thing in (params, s, c, h)]
    with torch.inference_mode():  # calls without a gradient's bookkeeping; what is returned is ordinary
        for start in range(0, len(params), chunk):
            part = slice(start, start + chunk)
            window = Window(height, width, tuple(tuple(end[order[part]] for end in pair) for pair in ends))
            numbers = (chosen(thing, part) for thing in sorted_)
            images[part], semantics[part] = _draw(*numbers, window, height, width, camera)
    back = order.argsort()
    return Faces(
        images.index_select(0, back), semantics.index_select(0, back), landmarks(s, height, width), params
    )


@torch.no_grad()
def sketches(
    params: Params, size: int | tuple[int, int] = 64, artist: str = "pencil", seed: int = 0
) -> Tensor:
    """The same faces as drawn by one of `ARTISTS`: (B, 1, H, W) in [0, 1], white paper = 1, aligned with
    `draw`.

    Light, background, skin tone and camera of the photograph are not drawn; pose, expression and what is
    worn are.
    seed changes the hand (strokes and paper), not the face. Raises ValueError for an unknown artist.
    """
    if artist not in ARTISTS:
        raise ValueError(f"artist must be one of {', '.join(ARTISTS)}, got {artist!r}")
    height, width = _picture_size(size)
    drawn = draw(studio(params), (height, width), camera=False)
    weights = torch.tensor([0.30, 0.59, 0.11], device=drawn.image.device).reshape(1, 3, 1, 1)
    tone = (drawn.image * weights).sum(1, keepdim=True)
    part = drawn.semantics[:, None].to(torch.float32)
    padded = torch.nn.functional.pad(part, (0, 1, 0, 1), mode="replicate")
    edges = ((padded[..., :-1, 1:] != part) | (padded[..., 1:, :-1] != part)).to(torch.float32)
    return render_sketch(tone, edges, params, artist, seed)


def _draw(
    params: Params, s: Any, c: Any, h: Any, window: Window, height: int, width: int, camera: bool
) -> tuple[Tensor, Tensor]:
    """window: around the head with its hair and hat."""
    image = paint_background(params, height, width)
    labels = torch.zeros(len(params), 1, height, width, device=image.device)
    f = frame(s, 2 / height, *upright(s, window.rows, window.columns, height, width))
    hair = hair_field(f, s, h, c)
    about = (window.take(image), window.take(labels))
    for canvas, part in zip((image, labels), paint_back_hair(*about, f, s, hair), strict=True):
        window.put(canvas, part)
    paint_body(image, labels, s, c, params)
    about = paint_head(window.take(image), window.take(labels), f, s, c, params)
    about = paint_hair(*about, f, s, h, c, hair)
    draw_some(paint_glasses, params["glasses"].round() > 0.5, *about, f, s, c, params)
    draw_some(paint_hat, params["hat"].round() > 0.5, *about, f, s, h, c, params, hair.n)
    for canvas, part in zip((image, labels), about, strict=True):
        window.put(canvas, part)
    image = image.clamp_(0, 1).sqrt_()
    if camera:
        image = _camera(image, params)
    return image, labels[:, 0].to(torch.uint8)


def _camera(image: Tensor, params: Params) -> Tensor:
    """Blur, then noise from a hash of (the face's seed, the pixel)."""
    _, channels, height, width = image.shape
    sigma = (params["blur"] * height).reshape(-1, 1, 1, 1)
    radius = int((3 * sigma.max()).ceil()) if len(params) else 0
    if radius > 0:
        image = _blur(image, sigma, radius)
    keys = params.seed
    low = (keys ^ (keys >> 32)).to(torch.int32).reshape(-1, 1, 1, 1)
    counter = torch.arange(height * width, dtype=torch.int32, device=image.device).reshape(
        1, 1, height, width
    )
    h = (counter * -1640531527) ^ low
    h = (h ^ (h >> 15)).mul_(-2048144789)
    h = (h ^ (h >> 13)).mul_(-1028477387)
    h ^= h >> 16
    # six fields of five bits, two for each channel: triangular distribution
    planes = torch.empty_like(image)
    for channel, k in enumerate((0, 10, 20)):
        planes[:, channel] = ((h >> k).bitwise_and_(31) + (h >> (k + 5)).bitwise_and_(31))[:, 0]
    deviation = (2 * (32.0**2 - 1) / 12) ** 0.5
    scale = params["noise"].reshape(-1, 1, 1, 1) / deviation
    return image.addcmul_(planes.sub_(31), scale).clamp_(0, 1)


def _blur(image: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian with one sigma (pixels) per face; taps beyond 3 sigma weigh nothing."""
    offsets = torch.arange(radius + 1, device=image.device).reshape(1, 1, 1, -1)
    weight = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)).square()) * (offsets <= (3 * sigma).ceil())
    weight = weight / (weight[..., :1] + 2 * weight[..., 1:].sum(-1, keepdim=True))
    taps = (3 * sigma).ceil().flatten()
    for dim in (2, 3):
        size = image.shape[dim]
        pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = torch.nn.functional.pad(image, pad, mode="replicate")
        image = image * weight[..., :1]
        for k in range(1, radius + 1):
            wide = (taps >= k).nonzero()[:, 0]
            source, w = (padded, weight) if len(wide) == len(taps) else (padded[wide], weight[wide])
            pair = source.narrow(dim, radius - k, size) + source.narrow(dim, radius + k, size)
            pair.mul_(w[..., k : k + 1])
            image = image.add_(pair) if source is padded else image.index_add_(0, wide, pair)
    return image
