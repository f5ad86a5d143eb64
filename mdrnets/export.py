"""Write a trained network as ONNX, with the memory as constants and every shape fixed; optionally also in 8
bits.

Inputs of the file: `image` (1, 3, S, S) in [-1, 1] and `mask` (1, 1, S, S) with 1 = corrupted. Output:
`output`, equal to the image wherever the mask is 0. The file is compared with the network before it is kept.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from mdrnets.data import DataName
from mdrnets.inpaint import Model, load_model
from mdrnets.masks import StrokeMasks
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import parse, run_main

TOLERANCE = 1e-3
"""Largest difference to the network that an exported file may have, on [-1, 1]."""


@dataclass(frozen=True)
class ExportConfig:
    """Which network, and where the file goes."""

    run: Path | None = None
    """Run folder; default: the newest."""
    data: DataName | None = None
    """Networks trained on this set; default: the run's last."""
    variant: str | None = None
    """Which refinement network; default: the most complete one."""
    out: Path = Path("mdrnet.onnx")
    """File to write."""
    int8: bool = False
    """Also write FILE.int8.onnx, whose matrix products and convolutions have 8-bit weights (for CPUs)."""


class Exported(nn.Module):
    """The network with tensors in and out, and MREM in the form whose shapes do not depend on the mask."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).eval()
        if self.net.refine.mrem is not None:
            self.net.refine.mrem.static = True

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.net(image, mask)["output"]


def example(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random image and a free-form mask of the network's size."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return image, StrokeMasks(size, 0.2, 0.3, seed).mask(seed)[None]


@torch.no_grad()
def distance(model: Model, path: Path) -> Tensor:
    """Distances of a file's output from the network's, on an example that it was not traced with."""
    image, mask = example(model.size, seed=1)
    (output,) = run_onnx(path, image=image, mask=mask.float())
    return (output - model.net(image, mask)["output"]).abs()


def export(model: Model, path: Path) -> float:
    """Write the file and return its largest difference to the network. UserError when that is too large."""
    with replacing(path) as file:
        write_onnx(Exported(model.net), example(model.size), file, ["image", "mask"], ["output"])
        difference = distance(model, file).max().item()
        require_close(path, difference, TOLERANCE)
    return difference


def main(config: ExportConfig) -> Path:
    """Export, compare, and say what was written."""
    model = load_model(config.run, config.data, config.variant, None, torch.device("cpu"))
    difference = export(model, config.out)
    print(f"{config.out}: {model.name}, largest difference to the network {difference:.1e}")
    if config.int8:
        small = config.out.with_suffix(".int8.onnx")
        with tempfile.TemporaryDirectory() as folder:
            # Without shapes and folded constants the quantiser leaves layers out and warns about each.
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(config.out, prepared, skip_symbolic_shape=True)
            quantize_dynamic(prepared, small, weight_type=QuantType.QUInt8)
        error = distance(model, small).mean().item()
        print(f"{small}: 8-bit weights, mean difference to the network {error:.1e}")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ExportConfig, __doc__))))
