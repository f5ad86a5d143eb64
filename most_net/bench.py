"""Size, cost and speed: the networks at 256x256, the training step against its literal form, the metrics.

python bench.py            a GPU when there is one; on a CPU small batches
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from most_net import literal
from most_net.align import HEIGHT, WIDTH
from most_net.data import Batch
from most_net.fsim import fsim
from most_net.metrics import grey_bytes
from most_net.model import FULL, TINY, Architecture, Discriminator, MostNet
from most_net.nlda import recognition
from most_net.scoot import scoot
from most_net.train import PRESETS, Weights, update
from most_net.trials import begin, plan
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report, throughput
from shared.norms import with_plain_norms
from shared.ranges import Natural, Positive
from shared.runtime import parse, pick_device, run_main, start

STEP_WEIGHTS = Weights(pixel=1, reconstruction=1, perceptual=0, adversarial=1)
PEOPLE = 338


@dataclass(frozen=True)
class Config:
    """Measure speed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""
    seconds: Positive = 2.0
    """Least time of each measurement."""
    parts: tuple[Literal["networks", "training", "metrics"], ...] = ("networks", "training", "metrics")
    """What to measure. The literal loops and NLDA of `metrics` run on the CPU."""
    batch: Natural = 0
    """Photos at a time at 256x256. 0: 32 and, for training, 4 on a GPU; 1 and 1 on a CPU."""


def network_rows(config: Config, device: torch.device) -> list[dict]:
    """Inference at 256x256: parameters and cost of each network, speed and memory of the whole."""
    net = MostNet(FULL).eval()
    photo, feature = torch.zeros(1, 3, 256, 256), torch.zeros(1, FULL.channels, 64, 64)
    queries = torch.zeros(64 * 64, FULL.channels)
    with torch.device("meta"):
        meta = MostNet(FULL)
    parts = (
        ("photo encoder", meta.photo_encoder, (photo.to("meta"),)),
        ("sketch encoder (training)", meta.sketch_encoder, (photo[:, :1].to("meta"),)),
        ("key head", meta.key_head, (feature.to("meta"),)),
        ("fusion", meta.fuse, (feature.repeat(1, 2, 1, 1).to("meta"),)),
        ("decoder", meta.decoder, (feature.to("meta"),)),
        ("discriminator (training)", Discriminator(), (photo, photo[:, :1])),
    )
    rows = [
        {"what": name, "parameters": count_parameters(module), "gmacs": count_macs(module, *inputs) / 1e9}
        for name, module, inputs in parts
    ]
    rows.append({"what": "memory reading", "gmacs": count_macs(net.memories[0].read, queries) / 1e9})
    batch = config.batch or (32 if device.type == "cuda" else 1)
    net.to(device, memory_format=torch.channels_last)
    for size in ((256, 256), (252, 200)):
        photos = torch.rand(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)

        def infer(photos: torch.Tensor = photos) -> None:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                net.sketch(photos)

        rows.append(
            {
                "what": f"inference {size[0]}x{size[1]}, batch {batch}, bf16",
                "gmacs": count_macs(net.sketch, photos[:1]) / 1e9,
                "per_second": throughput(infer, batch, device, config.seconds),
                "peak MiB": peak_memory(infer, device) / 2**20,
            }
        )
    return rows


def step_rows(
    config: Config, accelerator: Accelerator, arch: Architecture, size: int, batch: int, bf16: bool
) -> list[dict]:
    """A training step with discriminator, and the same step in its literal form: in fp32, and also in bf16
    where the step is, which on a GPU is so whatever `bf16` says."""
    device = accelerator.device
    wrapped = accelerator.mixed_precision == "bf16"
    bf16 = bf16 or wrapped
    settings = replace(PRESETS["demo"], arch=arch, weights=STEP_WEIGHTS, extras=(), size=size, load=size)
    trial = next(trial for trial in plan(settings) if trial.variant == "most")
    learner = begin(settings, trial, device)
    learner.prepare(accelerator, compiled=False)
    photo = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    sketch = torch.rand(batch, 1, size, size, device=device) * 2 - 1
    pairs = Batch(photo, sketch, 0)

    def ours() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bf16 and not wrapped else nullcontext():
            update(settings, trial, learner, accelerator, pairs, 0)

    net, discriminator = with_plain_norms(MostNet(arch)).to(device), Discriminator(arch.base).to(device)
    optimizers = tuple(torch.optim.Adam(m.parameters(), 2e-4, foreach=False) for m in (net, discriminator))

    def naive(low: bool) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                literal.literal_update(net, discriminator, optimizers, photo, sketch)

        return step

    name = f"training step {size}x{size}, batch {batch}"
    steps = {f"{name}, {'bf16' if bf16 else 'fp32'}": ours, f"{name}, literal form": naive(False)}
    if bf16:
        steps[f"{name}, literal form, bf16"] = naive(True)
    rows, seconds = [], in_turn(steps, device, config.seconds)
    for what, step in steps.items():
        speed = batch / seconds[what]
        cost = count_macs(step, training=True) / batch / 1e9
        memory = peak_memory(step, device) / 2**20
        rows.append({"what": what, "gmacs": cost, "per_second": speed, "peak MiB": memory})
    for row, column in zip(rows[1:], ("times the literal form", "times it in bf16"), strict=False):
        rows[0][column] = rows[0]["per_second"] / row["per_second"]
    return rows


def metric_rows(config: Config, device: torch.device) -> list[dict]:
    """FSIM and Scoot at 250x200 against their literal loops, and NLDA on 338 people. Loops and NLDA run on
    the CPU."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 1, HEIGHT // 10, WIDTH // 10, generator=generator)
    smooth = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")
    first = grey_bytes(smooth)
    second = grey_bytes(smooth + 0.05 * torch.randn(first.shape, generator=generator))
    there = first.to(device), second.to(device)
    rows = []
    for name, fast, slow in (("FSIM", fsim, literal.literal_fsim), ("Scoot", scoot, literal.literal_scoot)):
        begin_time = time.perf_counter()
        wanted = slow(first[0, 0].double().numpy(), second[0, 0].double().numpy())
        seconds = time.perf_counter() - begin_time
        speed = throughput(lambda fast=fast: fast(*there), len(first), device, config.seconds)
        row = {
            "what": f"{name} {HEIGHT}x{WIDTH}",
            "per_second": speed,
            "times the literal form": speed * seconds,
        }
        rows.append(row | {"difference": abs(float(fast(*there)[0]) - float(wanted))})
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 255, (PEOPLE, HEIGHT * WIDTH)).astype(np.float32)
    made = drawn + rng.normal(0, 60, drawn.shape).astype(np.float32)
    begin_time = time.perf_counter()
    recognition(drawn, made, 150)
    rows.append(
        {"what": f"NLDA, {PEOPLE} people, 20 partitions", "seconds": time.perf_counter() - begin_time}
    )
    return rows


def bench(config: Config) -> None:
    """Measure and print."""
    device = pick_device(config.device)
    accelerator = start(replace(PRESETS["demo"], device=device.type))
    batch = config.batch or (4 if device.type == "cuda" else 1)
    rows = network_rows(config, device) if "networks" in config.parts else []
    if "training" in config.parts:
        rows += step_rows(config, accelerator, TINY, 32, 6, bf16=False)
        rows += step_rows(config, accelerator, FULL, 256, batch, bf16=True)
    if "metrics" in config.parts:
        rows += metric_rows(config, device)
    report("most_net", rows, device=device)


if __name__ == "__main__":
    run_main(lambda: bench(parse(Config, __doc__)))
