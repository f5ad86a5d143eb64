"""Size, cost, speed and memory at the paper's resolution, and the training step against its textbook form.

Plain: every generator call encodes anew, a noise map for each class, all terms in one backward pass, fp32.
Fast: `objective.py` with channels-last networks, as training has them, once in the same precision and once in
bf16. One run measures all forms, which start with the same weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from biphasic_age import naive
from biphasic_age.discriminator import Discriminator
from biphasic_age.frozen import AgeNet, IdentityNet, freeze
from biphasic_age.layouts import CLASSES
from biphasic_age.losses import Weights
from biphasic_age.model import SIZES, Generator, SizeName
from biphasic_age.objective import Guides, discriminator_backward, generator_backward
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report, throughput
from shared.runtime import parse, pick_device, run_main

GROUPS = 4


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    size: SizeName = "paper"
    """Widths and depths of the networks."""
    image_size: int = 256
    """Side of the pictures in pixels."""
    batch_size: int | None = None
    """Pictures per training step; default 1 on the CPU and 16 on a GPU."""
    seconds: float = 3.0
    """Shortest time that the speed of inference is measured for; at least three calls are made."""
    rounds: int | None = None
    """Timed calls of each form of the training step, in turns, so that a busy moment meets them all; default
    2 on the CPU and 5 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@dataclass
class Step:
    """Everything that one training step needs."""

    generator: Generator
    critic: Discriminator
    guides: Guides
    optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    image: Tensor
    layout: Tensor
    source: Tensor
    target: Tensor

    def fast(self, autocast: Callable = nullcontext) -> None:
        of_generator, of_critic = self.optimisers
        of_generator.zero_grad(set_to_none=True)
        self.critic.requires_grad_(False)
        _, made = generator_backward(
            self.generator, self.critic, self.guides, self.image, self.layout, self.source, self.target,
            Weights(), autocast=autocast,
        )  # fmt: skip
        of_generator.step()
        self.critic.requires_grad_(True)
        of_critic.zero_grad(set_to_none=True)
        real = self.image, self.layout, self.source
        discriminator_backward(
            self.critic, real, [(made.translated, self.layout, self.target)], None, autocast
        )
        of_critic.step()

    def plain(self) -> None:
        of_generator, of_critic = self.optimisers
        of_generator.zero_grad(set_to_none=True)
        self.critic.requires_grad_(False)
        total, y = naive.training_losses(
            self.generator, self.critic, self.guides, self.image, self.layout, self.source, self.target,
            Weights(),
        )  # fmt: skip
        total.backward()
        of_generator.step()
        self.critic.requires_grad_(True)
        of_critic.zero_grad(set_to_none=True)
        real = self.image, self.layout, self.source
        naive.critic_loss(self.critic, real, (y.detach(), self.layout, self.target)).backward()
        of_critic.step()


def make_step(
    config: BenchConfig, device: torch.device, memory: torch.memory_format = torch.contiguous_format
) -> Step:
    """Networks of the configured size and one random batch, in one order in memory; layouts of 16 by 16
    blocks."""
    torch.manual_seed(0)
    size, side = SIZES[config.size], config.image_size
    batch = config.batch_size or (16 if device.type == "cuda" else 1)
    generator = Generator(size).to(device, memory_format=memory)
    critic = Discriminator(size.critic_width, size.critic_stages).to(device, memory_format=memory)
    means = torch.tensor([25.0, 35.0, 45.0, 58.0], device=device)
    age, identity = (
        freeze(network).to(device, memory_format=memory) for network in (AgeNet(), IdentityNet(1000))
    )
    guides = Guides(age, identity, means)
    adam = partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.99), fused=device.type == "cuda")
    blocks = torch.randint(0, len(CLASSES), (batch, side // 16, side // 16), dtype=torch.uint8)
    layout = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    source = torch.arange(batch, device=device) % GROUPS
    image = (torch.rand(batch, 3, side, side, device=device) * 2 - 1).contiguous(memory_format=memory)
    optimisers = adam(generator.parameters()), adam(critic.parameters())
    return Step(generator, critic, guides, optimisers, image, layout, source, (source + 2) % GROUPS)


def step_gmacs(config: BenchConfig) -> dict[str, float]:
    """1e9 multiply-accumulates of one picture's training step, forward and backward, counted without
    computing: `plain` and `fast`."""
    counts, meta = {}, torch.device("meta")
    for form in ("plain", "fast"):
        with meta:
            step = make_step(replace(config, batch_size=1), meta)
        counts[form] = count_macs(getattr(step, form), training=True) / 1e9
    return counts


def main(config: BenchConfig) -> None:
    """Measure and print; bench.json keeps the numbers."""
    device = pick_device(config.device)
    gpu, bf16 = device.type == "cuda", partial(torch.autocast, device.type, torch.bfloat16)
    # Networks of their own for each form: optimisers keep moments in the order in memory of the networks.
    plain = make_step(config, device)
    fast, half = (make_step(config, device, torch.channels_last) for _ in range(2))
    rows = networks(fast, config.seconds, device, bf16 if gpu else nullcontext)
    forms = {"plain fp32": plain.plain, "fast fp32": fast.fast, "fast bf16": partial(half.fast, bf16)}
    gmacs = step_gmacs(config)
    times = in_turn(forms, device, rounds=config.rounds or (5 if gpu else 2))
    batch = len(fast.image)
    for form, call in forms.items():
        row = {"what": "training step", "form": form, "batch": batch, "gmacs": gmacs[form.split()[0]]}
        row |= {"per_second": batch / times[form], "peak_mib": peak_memory(call, device) / 2**20}
        rows.append(row)
    report("biphasic_age", rows, device=device)
    compare(rows)
    if device.type == "cpu":
        print("GPU: not measured here; the same command measures it where there is one")


def networks(step: Step, seconds: float, device: torch.device, autocast: Callable) -> list[dict]:
    """Rows of the networks alone: parameters, cost, inference."""
    generator, critic = step.generator.eval(), step.critic.eval()
    one = step.image[:1], step.layout[:1], step.target[:1]
    features = generator.features(one[0])
    soft = generator.soft_maps(one[1], one[2], 0)
    maps = generator.constrain(features, one[2], soft)
    parts = {
        "encoder": (generator.encoder, lambda: generator.encoder(one[0])),
        "ProjectionNet": (generator.projection, lambda: generator.soft_maps(one[1], one[2], 0)),
        "ConstraintNet": (
            generator.constraint,
            lambda: (
                generator.constraint.disentangle(features.age),
                generator.constrain(features, one[2], soft),
            ),
        ),
        "decoder": (generator.decoder, lambda: generator.paint(features, maps, one[0])),
        "generator": (generator, lambda: generator(*one, noise=0)),
        "discriminator": (critic, lambda: critic(*one)),
    }
    rows = []
    with torch.no_grad(), autocast():
        for what, (module, call) in parts.items():
            row = {"what": what, "form": "", "batch": 1}
            row |= {"parameters": count_parameters(module), "gmacs": count_macs(call) / 1e9}
            if what == "generator":
                row["per_second"] = throughput(call, 1, device, seconds)
                row["peak_mib"] = peak_memory(call, device) / 2**20
            rows.append(row)
        if device.type == "cuda":  # one picture does not fill a GPU
            many, count = (step.image, step.layout, step.target), len(step.image)
            call = partial(generator, *many, noise=0)
            row = {"what": "generator", "form": "", "batch": count, "parameters": count_parameters(generator)}
            row |= {"gmacs": count_macs(call) / 1e9 / count}
            row |= {"per_second": throughput(call, count, device, seconds)}
            rows.append(row | {"peak_mib": peak_memory(call, device) / 2**20})
    generator.train()
    critic.train()
    return rows


def compare(rows: list[dict]) -> None:
    """Print the fast forms of the training step against the plain one."""
    steps = {row["form"]: row for row in rows if row["what"] == "training step"}
    plain = steps.pop("plain fp32")
    for form, row in steps.items():
        speed = row["per_second"] / plain["per_second"]
        memory = row["peak_mib"] / plain["peak_mib"]
        print(f"training step, {form}: {speed:.2f} x the speed and {memory:.2f} x the memory of plain fp32")


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
