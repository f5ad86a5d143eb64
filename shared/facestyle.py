"""Hair style of procedural faces as numbers: used by the drawing and by the captions."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.faceparams import Params
from shared.faceshape import smoothstep


def hair_lengths(params: Params) -> dict[str, Tensor]:
    """length (0 none .. about 1 to the chest), bald, grey, red and fringe_seen (0 .. 1), each (B,)."""
    age, male = params["age"], params["masculinity"]
    child = smoothstep((19 - age) / 17)
    old = smoothstep((age - 32) / 52)
    balding, fringe = params["balding"], params["fringe"]
    start = 58 - 34 * balding  # age at which the hair begins to go
    bald = smoothstep((age - start) / 30) * smoothstep((male - 0.42) / 0.2) * smoothstep((balding - 0.3) * 4)
    worn = (params["hair_length"] - 0.55 * (male - 0.45).clamp(min=0)).clamp(min=0)
    baby = smoothstep((4 - age) / 3)
    dark = params["hair_darkness"]
    return {
        "length": 0.06 + 1.15 * ((worn - 0.35).clamp(min=0) * 1.5) * (1 - 0.7 * baby),
        "bald": bald,
        "grey": smoothstep((age - 38 - 30 * params["greying"]) / 26),
        "red": smoothstep((params["hair_warmth"] - 0.72) / 0.16) * smoothstep((1.02 - dark) * 4),
        "fringe_seen": smoothstep((fringe - 0.52) / 0.25)
        * (1 - bald)
        * (1 - 0.6 * old)
        * torch.ones_like(child),
    }
