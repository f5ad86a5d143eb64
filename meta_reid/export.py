"""Export the evaluation path of a trained META, images in, embeddings out, any batch size.

The ending of --out decides: .onnx for ONNX, .pt for TorchScript. The file is read back and compared.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meta_reid.model import META
from meta_reid.predict import Network, load_model
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import UserError, parse, run_main


@dataclass(frozen=True)
class Options(Network):
    """Weights and target file."""

    out: Path = Path("meta.pt")
    """File to write, .pt or .onnx."""


class Embedding(nn.Module):
    """`META.embed` as a module of its own."""

    def __init__(self, model: META):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in 0..255 -> (B, 2C)."""
        return self.model.embed(images)


def export(model: META, size: tuple[int, int], path: Path) -> float:
    """Trace a network, write it, and return the largest difference of the file's output on other images.

    Raises UserError on another ending, and when the written file does not reproduce the network.
    """
    if path.suffix not in (".pt", ".onnx"):
        raise UserError(f"{path}: the ending must be .pt (TorchScript) or .onnx")
    embedding = Embedding(model).eval()
    example, images = torch.rand(2, 3, *size) * 255, torch.rand(3, 3, *size) * 255
    with replacing(path) as file, torch.no_grad(), warnings.catch_warnings():
        # TorchScript warns of its successor, and of sizes that are constants here on purpose.
        warnings.simplefilter("ignore")
        if path.suffix == ".pt":
            torch.jit.save(torch.jit.trace(embedding, example, check_trace=False), str(file))
            found = torch.jit.load(str(file))(images)
        else:
            write_onnx(embedding, (example,), file, ["images"], ["embedding"], free={0: "batch"})
            (found,) = run_onnx(file, images=images)
        expected = embedding.eval()(images)
        gap = float((expected - found).abs().max())
        require_close(path, gap, 1e-3 * float(expected.abs().max()))
    return gap


def main() -> None:
    """Export one network."""
    options = parse(Options, __doc__)
    model, _, size, weights = load_model(options)
    gap = export(model, size, options.out)
    print(f"{weights}: written to {options.out}, largest difference {gap:.2g}")


if __name__ == "__main__":
    run_main(main)
