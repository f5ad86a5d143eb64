"""Write the graph of one swap as ONNX: fixed shapes, nothing that depends on the data.

Inputs: `source`, `target` (1, 3, S, S) in [-1, 1], `landmarks` (1, 3, S, S), the target's landmark picture,
and `mask` (1, 1, S, S) with 1 = background. Output: `swap` (1, 3, S, S). The file is compared with the
network before it is kept. A network trained with --mask-source expects 0 outside the source's face.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from faceswapper.blocks import fold
from faceswapper.model import Generator, load_official
from faceswapper.predict import of_run
from shared.io import find_run
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import UserError, parse, run_main

TOLERANCE = 1e-3
"""Largest difference to the network that an exported file may have."""
INPUTS = ["source", "target", "landmarks", "mask"]


@dataclass(frozen=True)
class ExportConfig:
    """Which network, and where the file goes."""

    run: Path | None = None
    """Run folder of train.py; default: the newest."""
    variant: str | None = None
    """Which of the run's generators; default: the method itself."""
    weights: Path | None = None
    """Instead of a run: the released faceswapper.ckpt."""
    out: Path = Path("faceswapper.onnx")
    """File to write."""


class OneSwap(nn.Module):
    """The generator with one direction as its forward."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = fold(generator.eval())

    def forward(self, source: Tensor, target: Tensor, landmarks: Tensor, mask: Tensor) -> Tensor:
        return self.generator.swap(source, target, landmarks, mask, self.generator.id_encoder.code(source))


def example(size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs."""
    rng = torch.Generator().manual_seed(seed)
    source, target, drawn = torch.rand(3, 1, 3, size, size, generator=rng)
    mask = (torch.rand(1, 1, size, size, generator=rng) > 0.5).float()
    return source * 2 - 1, target * 2 - 1, drawn, mask


@torch.no_grad()
def export(generator: Generator, path: Path) -> float:
    """Write the file and return its largest difference to the network. UserError when that is too large."""
    module, size = OneSwap(generator), generator.size.img_size
    check = example(size, seed=1)
    with replacing(path) as file:
        write_onnx(module, example(size), file, INPUTS, ["swap"])
        (found,) = run_onnx(file, **dict(zip(INPUTS, check, strict=True)))
        difference = (found - module(*check)).abs().max().item()
        require_close(path, difference, TOLERANCE)
    return difference


def main(config: ExportConfig) -> Path:
    """Export, compare, and say what was written. UserError when the file cannot be written there."""
    if config.out.is_dir():
        raise UserError(f"{config.out}: this is a folder; --out takes the name of a file")
    if config.weights is not None:
        generator = load_official("generator", config.weights)
    else:
        generator = of_run(find_run("faceswapper", config.run), config.variant)[0]
    difference = export(generator, config.out)
    print(f"{config.out}: largest difference to the network {difference:.1e}")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ExportConfig, __doc__))))
