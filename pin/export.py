"""Export DAE, ESN and projection as one ONNX file, to put in front of any recogniser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pin.predict import Options as Purify
from pin.predict import load_defense
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import parse, run_main


@dataclass(frozen=True)
class Options:
    """Settings of an export."""

    output: Path = Path("pin.onnx")
    """File to write. Input `x`, output `purified`: (B, 1, H, W) in [-1, 1], B free."""
    run: Path | None = None
    """Run folder; default: the newest."""
    variant: str = "pin"
    """Which of the run's selection networks."""
    mode: Literal["threshold", "expected"] = "threshold"
    """Hard or soft mask; a random one cannot be exported."""
    eigenfaces: Path | None = None
    """Official eigenfaces; with --dae, --encoder and --pca-layer, or with --ais, instead of a run."""
    dae: Path | None = None
    """Official dae2_200.pth."""
    encoder: Path | None = None
    """Official encoder_*.pth."""
    pca_layer: Path | None = None
    """Official pca_layer_*.pth."""
    ais: Path | None = None
    """The follow-up's file of encoder and pca_layer."""


def export(options: Options) -> Path:
    """Write the file and return its path. UserError when it does not do what the defence does."""
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    purify = Purify(images=(), **chosen)
    defense, _ = load_defense(purify, torch.device("cpu"))
    side = round(defense.basis.size[0] ** 0.5)
    # The check of the image's size becomes a constant, rightly.
    example = (torch.zeros(2, 1, side, side),)
    x = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with replacing(options.output) as file:
        write_onnx(defense, example, file, ["x"], ["purified"], free={0: "batch"})
        (found,) = run_onnx(file, x=x)
        with torch.no_grad():
            gap = (found - defense(x)).abs().flatten(1).mean(1).max().item()
        # A mean over pixels: an eigenface whose probability is next to 0.5 may be kept here and not there.
        require_close(options.output, gap, 1e-2)
    return options.output


if __name__ == "__main__":
    run_main(lambda: print(export(parse(Options, __doc__))))
