"""Cost and speed of IrisUsformer at 480x640, beside a naive version, its fast variants, U-Net, IrisParseNet.

    python bench.py
    python bench.py --height 320 --width 416 --batch-size 4

Everything is measured in one run on one machine. `gmacs` are 1e9 multiply-accumulates of convolutions and
attention products (not FLOPs, which would be twice as many), of a training step with its backward pass.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from irisusformer.baselines import IrisParseNet, UNet
from irisusformer.data import EyeWorld
from irisusformer.export import export, quantize
from irisusformer.losses import objective
from irisusformer.model import IrisUsformer, fold_batch_norm
from irisusformer.naive import naive
from irisusformer.train import PAPER
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.io import progress
from shared.onnxfile import open_onnx
from shared.ranges import Count, Positive
from shared.runtime import parse, pick_device, run_main, seed_everything


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    size: Literal["tiny", "small", "lite", "base"] = "base"
    """Width of the network."""
    also: tuple[Literal["tiny", "small", "lite", "base"], ...] = ("tiny", "small", "lite")
    """Other widths, in bf16."""
    height: Count = 480
    """Pixels."""
    width: Count = 640
    """Pixels."""
    batch_size: Count | None = None
    """Images per call; default 1 on the CPU, 8 on a GPU."""
    seconds: Positive = 3.0
    """Measuring time for each row."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    onnx: bool = True
    """Also ONNX Runtime in fp32 and int8, on the CPU."""
    compile: bool = True
    """Also torch.compile (takes a minute or more to compile)."""


def gmacs(model: nn.Module, height: int, width: int, training: bool = False) -> float:
    """Counted on a device without data, so that no kernel hides its work from the counter.

    training: forward and backward instead of forward alone.
    """
    shapes = copy.deepcopy(model).to("meta").train(training)
    image = torch.zeros(1, 3, height, width, device="meta")

    def call() -> None:
        out = shapes(image)
        if training:
            sum(value.sum() for value in out.values()).backward()

    return count_macs(call, training=training) / 1e9


def ready(model: nn.Module) -> nn.Module:
    """A copy for inference: BatchNorm folded, channels_last."""
    return fold_batch_norm(copy.deepcopy(model)).to(memory_format=torch.channels_last)


def inference(model: nn.Module, image: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Any]:
    """A call of the whole network, mask and uncertainty, without gradients."""
    if dtype is not None:
        model, image = copy.deepcopy(model).to(dtype), image.to(dtype)

    @torch.inference_mode()
    def call():
        return model(image)

    return call


def training_step(model: nn.Module, image: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Any]:
    """Forward, objective, backward and AdamW."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    target = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.uint8, device=image.device)

    def call():
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            out = model(image)
        objective(out, target)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def onnx_calls(model: IrisUsformer, image: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """ONNX Runtime with as many threads as PyTorch, fp32 and int8 (calibrated on procedural eyes)."""
    export(model, folder / "fp32.onnx")
    eyes = EyeWorld("eyes", "train", 4, (240, 320)).images.numpy().astype(np.float32) / 255
    quantize(folder / "fp32.onnx", folder / "int8.onnx", eyes)
    array = image.cpu().contiguous().numpy()
    calls = {}
    for name in ("fp32", "int8"):
        run = open_onnx(folder / f"{name}.onnx", torch.get_num_threads()).run
        calls[f"ours, ONNX Runtime {name}"] = lambda run=run: run(None, {"image": array})
    return calls


def rows_of(config: BenchConfig, folder: Path) -> list[dict[str, Any]]:
    """Every row of the table. folder: for the ONNX files that are measured."""
    seed_everything(0)
    device = pick_device(config.device)
    batch = config.batch_size or (8 if device.type == "cuda" else 1)
    image = torch.rand(batch, 3, config.height, config.width, device=device)
    last = image.contiguous(memory_format=torch.channels_last)

    model = IrisUsformer(config.size).to(device).eval()
    fast = IrisUsformer(config.size, fast_up=True).to(device)
    unet, irisparsenet = UNet().to(device), IrisParseNet().to(device)
    ours, ours_fast, their_unet, their_irisparsenet = map(ready, (model, fast, unet, irisparsenet))
    bf16, on_gpu = torch.bfloat16, device.type == "cuda"
    calls: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
        "ours, naive": (model, inference(naive(model), image)),
        "ours": (model, inference(ours, last)),
        "ours, fast_up": (fast, inference(ours_fast, last)),
        "ours, bf16": (model, inference(ours, last, bf16)),
        "ours, fast_up, bf16": (fast, inference(ours_fast, last, bf16)),
        "U-Net": (unet, inference(their_unet, last)),
        "U-Net, bf16": (unet, inference(their_unet, last, bf16)),
        "IrisParseNet": (irisparsenet, inference(their_irisparsenet, last)),
    }
    for size in config.also:
        other = IrisUsformer(size).to(device)
        calls[f"{size}, bf16"] = (other, inference(ready(other), last, bf16))
    if on_gpu:  # a CPU would take minutes
        usual = fold_batch_norm(copy.deepcopy(model))
        calls["ours, usual order in memory, bf16"] = (model, inference(usual, image, bf16))
        calls["ours, naive, bf16"] = (model, inference(naive(model), image, bf16))
        calls["IrisParseNet, bf16"] = (irisparsenet, inference(their_irisparsenet, last, bf16))
    if config.compile:
        dtype = bf16 if on_gpu else torch.float32
        compiled = copy.deepcopy(ours).to(dtype)
        compiled.compile()
        name = "ours, compiled, bf16" if on_gpu else "ours, compiled"
        calls[name] = (model, inference(compiled, last.to(dtype)))
    if config.onnx and not on_gpu:
        calls |= {name: (model, call) for name, call in onnx_calls(model, image, folder).items()}
    calls["ours, training step"] = (model, training_step(model, last))
    calls["ours, training step, bf16"] = (model, training_step(model, last, bf16))

    rows, costs = [], {}
    for name, (network, call) in progress(calls.items(), "measuring"):
        kind = network, "training" in name
        if kind not in costs:
            costs[kind] = gmacs(network, config.height, config.width, kind[1])
        speed = throughput(call, batch, device, config.seconds)
        memory = None if "ONNX" in name else peak_memory(call, device) / 2**20
        rows.append(
            {
                "network": name,
                "parameters, M": count_parameters(network) / 1e6,
                "gmacs": costs[kind],
                "per_second": speed,
                "x naive": speed / rows[0]["per_second"] if rows else 1.0,
                "peak memory, MiB": memory,
            }
        )
    return rows


def main() -> None:
    config = parse(BenchConfig, __doc__)
    print(f"ours is {config.size}; {config.height}x{config.width}, per_second counts images")
    print("gmacs: 1e9 multiply-accumulates of convolutions and attention products; FLOPs are twice as many")
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(config, Path(folder))
    print(report(PAPER, rows, device=pick_device(config.device)))


if __name__ == "__main__":
    run_main(main)
