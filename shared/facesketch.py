"""Sketches of procedural faces in the manner of four artists, aligned with the photograph of the same
parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.faceparams import Params, hash_keys, uniform

ARTISTS = ("outline", "pencil", "charcoal", "bold")


def studio(params: Params) -> Params:
    """The same faces as an artist draws them: light skin, even light, white paper behind, no camera."""
    return params.replace(
        skin_tone=0.12 + 0.25 * params["skin_tone"],
        light_azimuth=-30.0,
        light_elevation=35.0,
        light_strength=0.62,
        light_warmth=0.0,
        exposure=1.0,
        **{f"background{end}_{c}": 1.0 for end in ("", "2") for c in "rgb"},
        background_pattern=0.0,
        noise=0.0,
        blur=0.0,
    )


def gaussian(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 1, H, W), sigma in pixels."""
    radius = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
    image = F.conv2d(F.pad(image, (radius, radius, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(image, (0, 0, radius, radius), mode="replicate"), kernel.transpose(2, 3))


def grain(params: Params, seed: int, height: int, width: int, scale: float) -> Tensor:
    """Smooth noise of the paper and the hand, (B, 1, H, W), about -1 .. 1, the same for a face in any
    batch."""
    n = max(4, int(height / scale))
    keys = params.seed + int(hash_keys(seed, torch.tensor([0]), stream=6))
    values = uniform(keys, n * n).reshape(-1, 1, n, n) * 2 - 1
    return F.interpolate(values, (height, width), mode="bicubic", align_corners=False)


def _lines(tone: Tensor, sigma: float, strength: float) -> Tensor:
    """Dark lines where the tone dips below its surroundings: difference of Gaussians through a soft
    threshold."""
    difference = gaussian(tone, sigma) - gaussian(tone, 1.6 * sigma)
    return torch.tanh((-difference * strength).clamp(min=0))


def _hatch(height: int, width: int, period: float, angle: float, wobble: Tensor) -> Tensor:
    """Parallel pen strokes 0 .. 1 across the picture; period in pixels, angle in degrees."""
    device = wobble.device
    y = torch.arange(height, device=device).reshape(1, 1, -1, 1)
    x = torch.arange(width, device=device).reshape(1, 1, 1, -1)
    turn = torch.deg2rad(torch.tensor(angle, device=device))
    phase = (x * turn.cos() + y * turn.sin()) * (6.2832 / period) + 1.1 * wobble
    return 0.5 + 0.5 * torch.cos(phase)


def render_sketch(tone: Tensor, edges: Tensor, params: Params, artist: str, seed: int) -> Tensor:
    """tone: luminance of the studio picture (B, 1, H, W); edges: borders of its parts, 0 .. 1. Returns ink
    on white."""
    height, width = tone.shape[2:]
    unit = height / 128  # stroke widths follow the size of the picture
    wobble = grain(params, seed, height, width, 16 * unit)
    tooth = grain(params, seed + 1, height, width, max(1.0, 1.6 * unit))
    dark = 1 - tone
    if artist == "outline":
        ink = _lines(tone, 0.55 * unit + 0.15, 16) + 0.75 * gaussian(edges, 0.35 * unit + 0.1)
        return (1 - 0.92 * ink).clamp(0, 1)
    if artist == "pencil":
        ink = 0.75 * _lines(tone, 0.7 * unit + 0.15, 13) + 0.5 * gaussian(edges, 0.5 * unit + 0.1)
        period = max(3.0, 3.4 * unit)
        first = _hatch(height, width, period, 35, wobble) * ((dark - 0.26) * 1.7).clamp(0, 1)
        second = _hatch(height, width, period, -40, wobble) * ((dark - 0.55) * 1.8).clamp(0, 1)
        shade = 0.62 * first + 0.55 * second + 0.14 * (dark - 0.2).clamp(min=0)
        return (1 - (ink + shade * (1 + 0.35 * tooth))).clamp(0, 1)
    if artist == "charcoal":
        smudge = gaussian(dark, 2.2 * unit)
        ink = 0.9 * _lines(tone, 1.5 * unit + 0.15, 9) + 0.35 * gaussian(edges, 1.3 * unit)
        shade = ((smudge - 0.12) * 1.05).clamp(min=0) * (1 + 0.30 * tooth + 0.1 * wobble)
        return (0.97 - ink * (1 + 0.25 * tooth) - 0.85 * shade).clamp(0.04, 1)
    blocks = torch.sigmoid((gaussian(dark, 1.2 * unit) - 0.66) * 26)
    half = torch.sigmoid((gaussian(dark, 1.0 * unit) - 0.42) * 22) * (
        _hatch(height, width, max(4.0, 5 * unit), 90, wobble) > 0.6
    )
    ink = (
        1.1 * _lines(tone, 1.0 * unit + 0.2, 22)
        + 1.0 * gaussian(edges, 0.8 * unit + 0.1)
        + blocks
        + 0.75 * half
    )
    return (1 - ink).clamp(0, 1)
