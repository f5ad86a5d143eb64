"""Size, cost and speed of the networks, and of a federated round in its fast and its plain form.

On a CPU in fp32. On a GPU in bf16, as train.py computes there, beside fp32, with batches of 32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dfl.baselines import build_method
from dfl.data import Federated, load_data, skewed
from dfl.federation import Federation
from dfl.model import Classifier, build_backbone
from dfl.train import PRESETS, Config
from shared.bench import count_macs, peak_memory, report, throughput
from shared.ranges import Positive
from shared.runtime import parse, pick_device, run_main

SHAPES = {"mlp": (3, 8, 8), "digit_cnn": (3, 28, 28), "alexnet_bn": (3, 256, 256), "resnet18": (3, 224, 224)}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure with."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seconds: Positive = 2.0
    """Time for each number."""


def precision(device: torch.device, bf16: bool) -> torch.autocast:
    """The arithmetic of a measurement, a context as `Accelerator.autocast` gives one."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def forms(name: str, device: torch.device) -> list[tuple[str, bool, torch.memory_format]]:
    """(label, bf16, layout of the input) of each form to measure; the last is the plain one."""
    plain = ("fp32", False, torch.contiguous_format)
    if device.type == "cpu":
        return [plain]
    found = [("bf16", True, torch.contiguous_format), plain]
    return found if name == "mlp" else [("bf16, channels last", True, torch.channels_last), *found]


def passes(net: Classifier, x: Tensor, bf16: bool) -> dict[str, Callable[[], None]]:
    """Inference, and forward and backward pass of a training step."""
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)

    @torch.inference_mode()
    def infer() -> None:
        with precision(x.device, bf16):
            net(x)

    @torch.enable_grad()
    def step() -> None:
        net.zero_grad()
        with precision(x.device, bf16):
            loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()

    return {"inference": infer, "training": step}


def network_rows(name: str, device: torch.device, seconds: float) -> list[dict]:
    """An extractor with its head: a row for each pass in each form. `ratio` is to the plain form."""
    shape = SHAPES[name]
    batch = 32 if device.type == "cuda" or name in ("mlp", "digit_cnn") else 4
    net = build_backbone(name, 10, shape).to(device)
    images = torch.rand(batch, *shape, device=device)
    extractor = sum(p.numel() for key, p in net.named_parameters() if not key.startswith(net.head_prefix))
    rows = []
    for kind in ("inference", "training"):
        net.train(kind == "training")
        macs = count_macs(passes(net, images, bf16=False)[kind]) / batch
        measured = []
        for label, bf16, layout in forms(name, device):
            run = passes(net, images.contiguous(memory_format=layout), bf16)[kind]
            measured.append(
                {
                    "what": f"{name}, {kind}",
                    "form": label,
                    "batch": batch,
                    "parameters": extractor,
                    "gmacs": macs / 1e9,
                    "per_second": throughput(run, batch, device, seconds),
                    "peak_mb": peak_memory(run, device) / 1e6,
                }
            )
        for row in measured[:-1]:
            row["ratio"] = row["per_second"] / measured[-1]["per_second"]
        rows += measured
    return rows


def stop(message: str) -> None:
    """A client that is left out, or a group that trains one by one after all, is not what is timed."""
    raise RuntimeError(message)


def round_row(label: str, config: Config, data: Federated, device: torch.device, seconds: float) -> dict:
    """Training images per second of a whole round (both stages, all clients, averaging)."""
    gpu = device.type == "cuda"
    autocast = partial(precision, device, gpu)
    federation = Federation(build_method(config, data), config, data, device, autocast=autocast, report=stop)
    federation.run_round()  # fills the bank
    images = sum(len(client.train) for client in data.clients)
    speed = throughput(federation.run_round, images, device, seconds)
    return {"what": label, "form": "bf16" if gpu else "fp32", "batch": config.batch_size, "per_second": speed}


def round_rows(device: torch.device, seconds: float) -> list[dict]:
    """Pairs of a round's fast and plain form; `ratio` is between the two."""
    toy = replace(PRESETS["demo"], rounds=1)
    data = load_data(toy, 0).to(device)
    vectorised, sequential = ({"engine": engine} for engine in ("vectorised", "sequential"))
    pairs = [
        ("round of 8 mlp clients, vectorised", replace(toy, **vectorised), data),
        ("the same, client by client", replace(toy, **sequential), data),
    ]
    cnn = replace(PRESETS["digits5"], batch_size=32, clients=2)
    digits = torch.rand(110, 28, 28), torch.arange(110) % 10
    small = skewed(*digits, clients=2, per_client=32, test=20).to(device)
    again = replace(small, augment=lambda images, view: images)
    pairs += [
        ("round of 2 digit_cnn clients, frozen features once", cnn, small),
        ("the same, computed in every batch", cnn, again),
    ]
    if device.type == "cuda":  # minutes on a CPU, and several GB
        grouped = replace(cnn, norm="group", clients=8)
        digits = torch.rand(1300, 28, 28), torch.arange(1300) % 10
        many = skewed(*digits, clients=8, per_client=160, test=20).to(device)
        pairs += [
            ("round of 8 digit_cnn clients (group norm), vectorised", replace(grouped, **vectorised), many),
            ("the same, client by client", replace(grouped, **sequential), many),
        ]
    rows = [round_row(label, config, data, device, seconds) for label, config, data in pairs]
    for fast, plain in zip(rows[::2], rows[1::2], strict=True):
        fast["ratio"] = fast["per_second"] / plain["per_second"]
    return rows


def main(options: BenchConfig) -> None:
    """Measure, print the table, write runs/dfl/bench.json."""
    device = pick_device(options.device)
    rows = [row for name in SHAPES for row in network_rows(name, device, options.seconds)]
    report("dfl", [*rows, *round_rows(device, options.seconds)], device=device)


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
