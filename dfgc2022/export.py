"""Export a detector as ONNX (face crops in, probability of fake out) and check it with onnxruntime.

    python export.py --out detector.onnx
    python export.py --official swin_large_patch4_window12_384_in22k --weights swin_40.pth --out swin.onnx

The file takes RGB crops (N, 3, S, S) in 0..255 and returns N probabilities.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dfgc2022.model import OFFICIAL, detector, fake_probability, load_official
from dfgc2022.train import Config as TrainConfig
from dfgc2022.train import load_members
from shared.io import find_run, load_config
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import UserError, parse, run_main

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Config:
    """Settings of the export."""

    out: Path
    """The .onnx file to write."""
    run: Path | None = None
    """Run folder. None: the newest."""
    member: str | None = None
    """Member of the run. None: its first."""
    official: Literal[OFFICIAL] | None = None
    """Export this released network instead, with `weights`."""
    weights: Path | None = None
    """Released file of the official network."""


class Probability(nn.Module):
    """A detector with bytes in and probabilities out: (N, 3, S, S) RGB in 0..255 float32 -> (N,)."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, crops: Tensor) -> Tensor:
        return fake_probability(self.network((crops / 255 - self.mean) / self.std))


def export(network: nn.Module, normalise: tuple, size: int, path: Path) -> float:
    """Write the ONNX file with a free batch size; returns the largest difference from PyTorch on random
    crops.

    Raises UserError when it exceeds 1e-3; what was at `path` stays then.
    """
    module = Probability(network, *normalise).eval()
    crops = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    with replacing(path) as file:
        write_onnx(module, (crops[:2],), file, ["crops"], ["probability"], free={0: "batch"})
        (found,) = run_onnx(file, crops=crops)
        with torch.no_grad():
            gap = float((found - module(crops)).abs().max())
        require_close(path, gap, TOLERANCE)
    return gap


def main(config: Config) -> None:
    if config.out.is_dir():
        raise UserError(f"{config.out}: a folder; --out is the file to write")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.official:
        if config.weights is None:
            raise UserError(f"--official {config.official}: give its file with --weights")
        entry = detector(config.official)
        network, size = load_official(config.official, config.weights), entry.size
    else:
        folder = find_run("dfgc2022", config.run)
        members = load_members(folder, load_config(folder, TrainConfig))
        name = config.member or next(iter(members))
        if name not in members:
            raise UserError(f"{folder}: no member {name!r}; there are {', '.join(members)}")
        network, entry, size = members[name]
    gap = export(network, entry.normalise, size, config.out)
    print(f"{config.out}: largest difference from PyTorch {gap:.1e}")


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
