"""Size, cost and speed of META at 256x128, beside its sequential form and a plain ResNet-50."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meta_reid.baselines import Plain
from meta_reid.losses import objective
from meta_reid.model import META
from meta_reid.sequential import Sequential
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.runtime import parse, pick_device, run_main

CLASSES = (767, 5532, 751)
ROUNDS = 2
"""Each speed is the best of so many rounds, all cases in turn, so that other work disturbs them alike."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    batch: int | None = None
    """Images per evaluation pass. Default: 4 on a CPU, 64 on a GPU."""
    train_batch: int | None = None
    """Images per training step. Default: 8 on a CPU, 64 on a GPU."""
    seconds: float = 10.0
    """Measuring time of each number."""
    device: str = "auto"
    """auto, cpu or cuda."""


def main() -> None:
    """Print the table and write bench.json."""
    options = parse(Options, __doc__)
    device = pick_device(options.device)
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

    def evaluation(network: nn.Module, function: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        pixels = images(batch)

        def call() -> Any:
            network.eval()
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                return function(pixels)

        return call

    def training(forward: Callable[[torch.Tensor, int], Any]) -> Callable[[], Any]:
        pixels, labels = images(train_batch), torch.arange(train_batch, device=device) // 4

        def step() -> None:
            model.train()
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = sum(objective(forward(pixels, 1), labels, labels).values())
            loss.backward()

        return step

    embeddings = {
        "evaluation, experts as one batch": (model, model.embed),
        "evaluation, sequential": (model, loop.embed),
        "evaluation, sequential, no look-ups": (model, Sequential(model, lookup=False).embed),
        "evaluation, plain ResNet-50": (plain, plain.embed),
    }
    cases = {name: evaluation(*pair) for name, pair in embeddings.items()}
    cases |= {"training step": training(model), "training step, sequential": training(loop.train_step)}
    rates = dict.fromkeys(cases, 0.0)
    for _ in range(ROUNDS):
        for name, call in cases.items():
            count = train_batch if name.startswith("training") else batch
            rates[name] = max(rates[name], throughput(call, count, device, options.seconds / ROUNDS))
    memory = {name: peak_memory(call, device) / 1e6 for name, call in cases.items()}
    rows = []
    for name in cases:
        network, function = embeddings.get(name, (model, None))
        network.eval()
        rows.append(
            {
                "what": name,
                "batch": batch if function else train_batch,
                "parameters [M]": count_parameters(network) / 1e6,
                "GMACs/image": count_macs(function, images(1)) / 1e9 if function else None,
                "images/s": rates[name],
                "peak memory [MB]": memory[name],
            }
        )
    report("meta_reid", rows)
    fast, slow, _, resnet, step, slow_step = rates.values()
    print(f"evaluation: {fast / slow:.2f} x sequential, {4 * fast / resnet:.2f} x (plain ResNet-50) / 4")
    share = memory["training step"] / memory["training step, sequential"]
    print(f"training step: {step / slow_step:.2f} x sequential, {share:.2f} of its peak memory")


if __name__ == "__main__":
    run_main(main)
