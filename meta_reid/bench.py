"""Size, cost and speed of META at 256x128, beside its sequential form and a plain ResNet-50."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meta_reid.baselines import Plain
from meta_reid.losses import backward, objective
from meta_reid.metrics import rank
from meta_reid.model import META
from meta_reid.norms import kernels
from meta_reid.sequential import Sequential
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report
from shared.runtime import parse, pick_device, run_main

CLASSES = (767, 5532, 751)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    batch: int | None = None
    """Images per evaluation pass. Default: 4 on a CPU, 64 on a GPU."""
    train_batch: int | None = None
    """Images per training step. Default: 8 on a CPU, 64 on a GPU."""
    seconds: float = 4.0
    """Measuring time of each number."""
    ranking: bool = False
    """Measure nothing but the ranking of 10,000 queries against 100,000 images at 2,048 dimensions."""
    device: str = "auto"
    """auto, cpu or cuda."""


def ranking(device: torch.device) -> None:
    """Print time and peak memory of `metrics.rank`, the embeddings included, on random persons."""
    rng = torch.Generator().manual_seed(0)
    sizes = (10_000, 100_000)
    features = [torch.randn(size, 2048, generator=rng).to(device) for size in sizes]
    persons = [torch.randint(2_000, (size,), generator=rng).to(device) for size in sizes]
    cameras = [torch.randint(6, (size,), generator=rng).to(device) for size in sizes]
    begin = time.perf_counter()
    found = rank(*features, *persons, *cameras).summary()
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        peak, what = torch.cuda.max_memory_allocated(device) / 1e9, "GB allocated at its highest"
    else:
        peak, what = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB resident at its highest"
    print(f"ranking: {seconds:.0f} s, {peak:.1f} {what}, mAP {found['mAP']:.2f} of random embeddings")


def main() -> None:
    """Print the table and write bench.json."""
    options = parse(Options, __doc__)
    device = pick_device(options.device)
    if options.ranking:
        ranking(device)
        return
    gpu = device.type == "cuda"
    batch = options.batch or (64 if gpu else 4)
    train_batch = options.train_batch or (64 if gpu else 8)
    torch.manual_seed(0)
    model = META(CLASSES, scoring="separate").to(device, memory_format=torch.channels_last)
    plain = Plain(sum(CLASSES)).to(device, memory_format=torch.channels_last)
    loop = Sequential(model)

    def images(count: int) -> torch.Tensor:
        pixels = torch.rand(count, 3, 256, 128, device=device) * 255
        return pixels.contiguous(memory_format=torch.channels_last)

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=gpu)

    def evaluation(network: nn.Module, function: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        pixels = images(batch)

        def call() -> Any:
            network.eval()
            with torch.inference_mode(), precision():
                return function(pixels)

        return call

    def training(back: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Any]:
        pixels, labels = images(train_batch), torch.arange(train_batch, device=device) // 4

        def step() -> None:
            model.train()
            model.zero_grad(set_to_none=True)
            back(pixels, labels)

        return step

    def in_halves(pixels: torch.Tensor, labels: torch.Tensor) -> None:
        backward(model, pixels, 1, labels, labels, autocast=precision)

    def in_one(pixels: torch.Tensor, labels: torch.Tensor) -> None:
        with precision():
            loss = sum(objective(loop.train_step(pixels, 1), labels, labels).values())
        loss.backward()

    embeddings = {
        "evaluation, experts as one batch": (model, model.embed),
        "evaluation, sequential": (model, loop.embed),
        "evaluation, sequential, no look-ups": (model, Sequential(model, lookup=False).embed),
        "evaluation, plain ResNet-50": (plain, plain.embed),
    }
    cases = {name: evaluation(*pair) for name, pair in embeddings.items()}
    cases |= {"training step": training(in_halves), "training step, sequential": training(in_one)}
    times = in_turn(cases, device, options.seconds)
    rates = {n: (train_batch if n.startswith("training") else batch) / t for n, t in times.items()}
    memory = {name: peak_memory(call, device) / 1e6 for name, call in cases.items()}
    rows = []
    for name in cases:
        network, function = embeddings.get(name, (model, None))
        if function:
            network.eval()
            cost = count_macs(function, images(1))
        else:
            cost = count_macs(cases[name], training=True) / train_batch
        rows.append(
            {
                "what": name,
                "batch": batch if function else train_batch,
                "parameters [M]": count_parameters(network) / 1e6,
                "gmacs": cost / 1e9,
                "per_second": rates[name],
                "peak memory [MB]": memory[name],
            }
        )
    report("meta_reid", rows, device=device)
    fast, slow, _, resnet, step, slow_step = rates.values()
    if gpu:
        print("experts' probes and norms:", "one kernel" if kernels() else "PyTorch's operations")
    part = 4 * fast / resnet
    asked = f", asked: 0.9, {'reached' if part >= 0.9 else 'not reached'}" if gpu else ""
    print(f"evaluation: {fast / slow:.2f} x sequential, {part:.2f} x (plain ResNet-50) / 4{asked}")
    share = memory["training step"] / memory["training step, sequential"]
    print(f"training step: {step / slow_step:.2f} x sequential, {share:.2f} of its peak memory")


if __name__ == "__main__":
    run_main(main)
