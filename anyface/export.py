"""Write the text stream and the generator as ONNX, and all weights as safetensors.

    python export.py --out exported

clip_text.onnx: `tokens` (1, T) int64 -> `feature` (1, E). text.onnx: `feature` -> `codes` (1, L, D).
generator.onnx: `codes` -> `picture` (1, 3, S, S), about [-1, 1], with the stored noise. Every file is run and
compared with its network before it is kept.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anyface.bundle import Model, load_model, save_model
from shared.onnxfile import require_close, run_onnx, write_onnx
from shared.records import replacing
from shared.runtime import UserError, parse, run_main

TOLERANCE = 1e-3
"""Largest difference to the network that an exported file may have, relative to its largest value."""


@dataclass(frozen=True)
class ExportConfig:
    """Which model, and where the files go."""

    run: Path | None = None
    """Run folder; default: the newest."""
    out: Path = Path("exported")
    """Folder for the files."""


class TextStream(nn.Module):
    """The text stream with codes alone as output."""

    def __init__(self, stream: nn.Module):
        super().__init__()
        self.stream = stream

    def forward(self, feature: Tensor) -> Tensor:
        return self.stream(feature)[0]


class Painter(nn.Module):
    """The generator from codes to picture."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, codes: Tensor) -> Tensor:
        return self.generator.synthesis(codes)


class ClipText(nn.Module):
    """CLIP's text side, from tokens to the feature of the end token."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


def write_part(module: nn.Module, example: Tensor, path: Path, names: tuple[str, str]) -> float:
    """A network with fixed shapes as ONNX; returns its relative difference. UserError when too large."""
    module = module.eval()
    # The fused attention of nn.TransformerEncoderLayer has no ONNX form.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with replacing(path) as file:
        try:
            write_onnx(module, (example,), file, [names[0]], [names[1]])
            with torch.no_grad():
                wanted = module(example)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        (made,) = run_onnx(file, **{names[0]: example})
        difference = ((made - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()
        require_close(path, difference, TOLERANCE)
    return difference


def export(model: Model, folder: Path) -> dict[str, float]:
    """All files of a model; returns each ONNX file's largest relative difference to its network."""
    if model.words or model.memory is not None:
        raise UserError("only models whose text stream reads one feature per caption are exported")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokens = model.tokenizer(["a face"])
    feature = model.features(["a face"])
    parts = {
        "clip_text.onnx": (ClipText(model.clip), tokens, ("tokens", "feature")),
        "text.onnx": (TextStream(model.text), feature, ("feature", "codes")),
        "generator.onnx": (Painter(model.painter), _codes(model, feature), ("codes", "picture")),
    }
    found = {name: write_part(part, x, folder / name, io) for name, (part, x, io) in parts.items()}
    save_model(folder / "model", model)
    return found


def _codes(model: Model, feature: Tensor) -> Tensor:
    codes = model.codes_of(feature)
    missing = model.painter.n_latent - codes.shape[1]
    return torch.cat((codes, codes[:, -1:].expand(-1, missing, -1)), 1)


def main(config: ExportConfig) -> Path:
    """Export a run's model; returns the folder."""
    for name, difference in export(load_model(config.run), config.out).items():
        print(f"{name}: differs from the network by {difference:.1e} of its range")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ExportConfig, __doc__))))
