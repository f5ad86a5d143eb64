"""Size, cost and speed of the networks, and of a federated round in its fast and its plain form.

On a CPU with a small batch, on a GPU with the preset's.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from dfl.baselines import build_method
from dfl.data import load_data, skewed
from dfl.federation import Federation
from dfl.model import build_backbone
from dfl.train import PRESETS, Config
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.runtime import parse, pick_device, run_main

SHAPES = {"mlp": (3, 8, 8), "digit_cnn": (3, 28, 28), "alexnet_bn": (3, 256, 256), "resnet18": (3, 224, 224)}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure with."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seconds: float = 2.0
    """Time for each number."""


def network_row(name: str, device: torch.device, seconds: float) -> dict:
    """Inference and one training step of an extractor with its head."""
    shape = SHAPES[name]
    batch = 32 if device.type == "cuda" or name in ("mlp", "digit_cnn") else 4
    net = build_backbone(name, 10, shape).to(device)
    x, y = torch.rand(batch, *shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    @torch.inference_mode()
    def infer():
        net.eval()(x)

    def step():
        net.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(x), y).backward()

    return {
        "what": name,
        "parameters": count_parameters(build_backbone(name, None, shape)),
        "MMACs": count_macs(net.eval(), x[:1]) / 1e6,
        "images/s inference": throughput(infer, batch, device, seconds),
        "images/s training": throughput(step, batch, device, seconds),
        "peak MB training": peak_memory(step, device) / 1e6,
        "batch": batch,
    }


def round_row(label: str, config: Config, data, device: torch.device, seconds: float) -> dict:
    """Training images per second of a whole round (both stages, all clients, averaging)."""
    federation = Federation(build_method(config, data), config, data, device)
    federation.run_round()  # fills the bank
    images = sum(len(client.train) for client in data.clients)
    return {"what": label, "images/s training": throughput(federation.run_round, images, device, seconds)}


def main(options: BenchConfig) -> None:
    """Measure, print the table, write runs/dfl/bench.json."""
    device = pick_device(options.device)
    rows = [network_row(name, device, options.seconds) for name in SHAPES]
    toy = replace(PRESETS["demo"], rounds=1)
    data = load_data(toy, 0).to(device)
    fast = round_row(
        "round of 8 mlp clients, vectorised", replace(toy, engine="vectorised"), data, device, options.seconds
    )
    plain = round_row(
        "the same, client by client", replace(toy, engine="sequential"), data, device, options.seconds
    )
    cnn = replace(PRESETS["digits5"], batch_size=32, clients=2)
    digits = torch.rand(110, 28, 28), torch.arange(110) % 10
    small = skewed(*digits, clients=2, per_client=32, test=20).to(device)
    cached = round_row(
        "round of 2 digit_cnn clients, frozen features once", cnn, small, device, options.seconds
    )
    again = replace(small, augment=lambda images, view: images)
    each = round_row("the same, computed in every batch", cnn, again, device, options.seconds)
    for row, base in ((fast, plain), (cached, each)):
        row["ratio"] = row["images/s training"] / base["images/s training"]
    report("dfl", [*rows, fast, plain, cached, each])


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
