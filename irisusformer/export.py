"""Export a trained network to ONNX with dynamic batch and image size, and check it with ONNX Runtime.

    python export.py --output iris.onnx
    python export.py --output iris.onnx --int8     # also iris.int8.onnx, quantised for CPUs

The graph takes `image` (B, 3, H, W) float32, RGB in [0, 1], at least 17x17, and returns `prob` and
`uncertainty` (B, 1, H, W), with boundary heads also `pupil` and `outer`.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from irisusformer.data import EyeWorld
from irisusformer.model import IrisUsformer, fold_batch_norm, readout
from irisusformer.predict import load_network
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.published import format_table
from shared.records import replacing
from shared.runtime import UserError, parse, run_main

CHECKED = ((1, 3, 64, 64), (2, 3, 101, 150), (1, 3, 240, 320))


@dataclass(frozen=True)
class ExportConfig:
    """What to export."""

    output: Path
    """File to write, .onnx."""
    run: Path | None = None
    """Run folder to take the network from; default: the newest."""
    network: str | None = None
    """Which of the run's networks; default: the first."""
    weights: Path | None = None
    """Other weights of the same architecture, .safetensors."""
    int8: bool = False
    """Also write an 8-bit version, calibrated on procedural eyes."""


class Readout(nn.Module):
    """A network that returns its maps as a tuple, in the order of `names`."""

    def __init__(self, model: IrisUsformer):
        super().__init__()
        self.model = model
        self.names = ["prob", "uncertainty"] + (["pupil", "outer"] if model.region_head is not None else [])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.model(image)
        maps = readout(self.model.mode, out["logits"], out["aux"])
        regions = out["regions"].sigmoid().split(1, 1) if "regions" in out else ()
        return maps["prob"], maps["uncertainty"], *regions


def export(model: IrisUsformer, path: Path, height: int = 96, width: int = 128) -> Readout:
    """Write the ONNX file; returns the module that it must agree with."""
    graph = Readout(fold_batch_norm(copy.deepcopy(model).cpu())).eval()
    example = (torch.rand(1, 3, height - 3, width - 5),)
    free = {0: "batch", 2: "height", 3: "width"}
    # The older exporter is also the one that follows dynamic sizes through padding and cropping.
    write_onnx(graph, example, path, ["image"], graph.names, free, opset=17)
    return graph


def largest_difference(graph: Readout, path: Path, shape: tuple[int, ...]) -> float:
    """Largest absolute difference between PyTorch and ONNX Runtime on a random image."""
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = graph(image)
    found = run_onnx(path, image=image)
    return max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True))


def quantize(path: Path, target: Path, images: np.ndarray) -> None:
    """8-bit weights and activations of the convolutions, calibrated on images (N, 3, H, W)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"image": image[None]}

    prepared = target.with_suffix(".prepared.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # it warns about what was just done
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Images(),
        QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def main() -> None:
    config = parse(ExportConfig, __doc__)
    if config.output.suffix != ".onnx":
        raise UserError(f"--output {config.output}: the file must end in .onnx")
    model, _ = load_network(config.run, config.network, config.weights)
    with replacing(config.output) as file:
        graph = export(model, file)
        rows = [["x".join(map(str, shape)), largest_difference(graph, file, shape)] for shape in CHECKED]
        print(format_table(["input", "largest difference to PyTorch"], rows))
        require_close(config.output, max(row[1] for row in rows), 1e-3)
    if config.int8:
        eyes = EyeWorld("eyes", "train", 16, (240, 320)).images.numpy().astype(np.float32) / 255
        target = config.output.with_suffix(".int8.onnx")
        quantize(config.output, target, eyes)
        full, eight = (
            run_onnx(file, image=torch.from_numpy(eyes[:4]))[0] for file in (config.output, target)
        )
        changed = float(((full >= 0.5) != (eight >= 0.5)).float().mean())
        print(f"int8: {100 * changed:.2f} % of the mask's pixels differ from the fp32 file's")
        print(target)
    print(config.output)


if __name__ == "__main__":
    run_main(main)
