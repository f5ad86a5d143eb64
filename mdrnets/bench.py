"""Size, cost, speed and memory at the paper's resolution, and the fast forms against the plain ones.

Plain: `naive.py`, in fp32 and PyTorch's usual order in memory. Fast: the forms that training uses, with
channels-last networks, once in fp32 and once in bf16. One run measures all forms in turns; networks of both
start with the same weights. On a GPU inference and the two modules work in bf16 autocast, as training does.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets import losses, naive
from mdrnets.masks import StrokeMasks
from mdrnets.model import SIZES, CoarseNet, Discriminator, MDRNet, RefineNet, SizeName
from mdrnets.objective import refine_losses
from mdrnets.parser import TinyParser
from mdrnets.train import PRESETS, Config
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report, throughput
from shared.ranges import Count, Positive, Within
from shared.runtime import own_type, parse, pick_device, run_main

PARTS = 8


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    size: SizeName = "mdrnet_256"
    """Widths and depths of the networks."""
    image_size: Annotated[int, Within(24)] = 256
    """Side of the pictures in pixels."""
    hole: Annotated[float, Within(0.01, 0.99)] = 0.3
    """Share of corrupted pixels."""
    batch_size: Count | None = None
    """Pictures per step; default 1 on the CPU and that of the paper preset on a GPU."""
    seconds: Positive | None = None
    """Shortest time that each speed is measured for, default 3 on the CPU and 0.5 on a GPU; at least three
    calls are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@dataclass
class Step:
    """Everything that a training step of the refinement stage needs; the coarse network is at rest."""

    net: MDRNet
    critic: Discriminator
    phi: nn.Module
    optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    batch: dict[str, Tensor]
    config: Config

    def _run(self, losses_of: Callable, critic_loss: Callable, autocast: Callable) -> None:
        of_net, of_critic = self.optimisers
        self.critic.requires_grad_(False)
        with autocast():
            loss, comp = losses_of()
        of_net.zero_grad(set_to_none=True)
        loss.backward()
        of_net.step()
        self.critic.requires_grad_(True)
        with autocast():
            loss = critic_loss(comp)
        of_critic.zero_grad(set_to_none=True)
        loss.backward()
        of_critic.step()

    def fast(self, autocast: Callable = nullcontext) -> None:
        def losses_of() -> tuple[Tensor, Tensor]:
            chance = torch.Generator().manual_seed(0)
            terms, comp = refine_losses(
                self.net, self.batch, self.config, self.phi, self.critic, True, True, chance
            )
            return sum(terms.values()), comp

        def critic_loss(comp: Tensor) -> Tensor:
            scores = self.critic(torch.cat((self.batch["image"], comp.detach()))).float()
            return losses.hinge_discriminator(*scores.chunk(2))

        self._run(losses_of, critic_loss, autocast)

    def plain(self) -> None:
        plain = partial(naive.refine_losses, self.net, self.batch, self.config, self.phi, self.critic)
        self._run(plain, partial(naive.critic_loss, self.critic, self.batch["image"]), nullcontext)


def make_step(
    config: BenchConfig, device: torch.device, memory: torch.memory_format, plain: bool = False
) -> Step:
    """Networks of the configured size in one order in memory and one batch, random and the same in every
    call. plain: for `Step.plain`."""
    torch.manual_seed(0)
    size, side, train_config = SIZES[config.size], config.image_size, PRESETS["paper"]
    net = MDRNet(CoarseNet(size), TinyParser(PARTS), RefineNet(size, PARTS), size.stride)
    net.requires_grad_(False).refine.requires_grad_(True)
    net = naive.made_plain(net) if plain else net
    critic, phi = Discriminator(), losses.VGGFeatures().requires_grad_(False)
    net, critic, phi = (module.to(device, memory_format=memory) for module in (net, critic, phi))
    count = config.batch_size or (train_config.batch_size if device.type == "cuda" else 1)
    masks = StrokeMasks(side, config.hole - 0.01, config.hole + 0.01, seed=0)
    mask = torch.stack([masks.mask(i) for i in range(count)]).to(device)
    x = (torch.rand(count, 3, side, side) * 2 - 1).to(device)
    adam = partial(torch.optim.Adam, betas=train_config.betas, fused=device.type == "cuda")
    rate = train_config.lr
    optimisers = adam(net.refine.parameters(), rate), adam(critic.parameters(), rate * train_config.lr_ratio)
    return Step(net, critic, phi, optimisers, {"image": x, "mask": mask}, train_config)


def main(config: BenchConfig) -> None:
    """Measure and print; bench.json keeps the numbers."""
    device = pick_device(config.device)
    gpu = device.type == "cuda"
    seconds = config.seconds or (0.5 if gpu else 3.0)
    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    autocast = bf16 if gpu else nullcontext
    # Networks of their own for each form: optimisers keep moments in the order in memory of the networks.
    last = torch.channels_last
    fast, half = (make_step(config, device, last) for _ in range(2))
    plain = make_step(config, device, torch.contiguous_format, plain=True)
    net, critic, x, mask = fast.net, fast.critic, fast.batch["image"], fast.batch["mask"]
    size, side, batch_size = SIZES[config.size], config.image_size, len(x)
    rows = []

    def row(what: str, form: str, items: int = batch_size, **numbers) -> None:
        rows.append({"what": what, "form": form, "batch": items, **numbers})

    def compared(what: str, forms: dict[str, Callable], gmacs: float | None = None) -> None:
        # The plain forms multiply element by element, which is not counted.
        times = in_turn(forms, device, seconds)
        for form, call in forms.items():
            row(
                what,
                form,
                gmacs=None if form.startswith("plain") else gmacs,
                per_second=batch_size / times[form],
                peak_mib=peak_memory(call, device) / 2**20,
            )

    # Networks and inference.
    cells = (side // size.stride,) * 2
    parsing = torch.rand(batch_size, PARTS, *cells, device=device).softmax(1)
    calls = {
        "coarse network": (net.coarse, lambda x, m: net.coarse(x, m)),
        "refinement network": (net.refine, lambda x, m: net.refine(x, m, parsing[: len(x)])),
        "discriminator": (critic, lambda x, m: critic(x)),
        "inference, all": (net, lambda x, m: net(x, m)["output"]),
    }
    net.eval()
    for what, (module, call) in calls.items():
        with torch.inference_mode(), autocast():
            for items in sorted({1, batch_size}):
                some = x[:items], mask[:items]
                row(
                    what,
                    "fast",
                    items,
                    parameters=count_parameters(module),
                    gmacs=count_macs(call, x[:1], mask[:1]) / 1e9,
                    per_second=throughput(lambda c=call, s=some: c(*s), items, device, seconds),
                    peak_mib=peak_memory(lambda c=call, s=some: c(*s), device) / 2**20,
                )
    net.train()

    # The two modules alone, forward and backward.
    channels = size.widths[-1]
    features = torch.randn(batch_size, channels, *cells, device=device, requires_grad=True)
    holes = F.adaptive_max_pool2d(mask, cells)
    dmm, mrem = net.refine.dmm, net.refine.mrem

    def with_gradient(function: Callable[[], Tensor]) -> None:
        with autocast():
            out = function()
        out.sum().backward()

    for what, in_fast, in_plain in (
        ("MREM", lambda: mrem(features, holes), lambda: mrem.dense(features, holes)[0]),
        ("DMM", lambda: dmm(features, parsing), lambda: naive.read_by_loops(dmm, features, parsing)),
    ):
        forms = {"plain": partial(with_gradient, in_plain), "fast": partial(with_gradient, in_fast)}
        compared(f"{what}, forward and backward", forms)

    # InCo2's sampling, on features of VGG's pool3: every cell against those that training compares.
    psi = [torch.randn(batch_size, 256, side // 8, side // 8, device=device) for _ in range(2)]
    psi[0].requires_grad_()

    def coordination(samples: int | None) -> Tensor:
        with own_type(mask):  # in fp32 under autocast too
            return sum(losses.inco2(*psi, mask, samples))

    forms = {"plain": None, "fast": fast.config.inco_samples}
    forms = {form: partial(with_gradient, partial(coordination, n)) for form, n in forms.items()}
    compared("InCo2, forward and backward", forms)

    forms = {"plain fp32": plain.plain, "fast fp32": fast.fast, "fast bf16": partial(half.fast, bf16)}
    compared("training step", forms, count_macs(fast.fast, training=True) / batch_size / 1e9)
    compare(rows)
    report("mdrnets", rows, device=device)
    if not gpu:
        print("GPU: not measured here; the same command measures it where there is one")


def compare(rows: list[dict]) -> None:
    """Print the fast forms against the plain ones."""
    plain = {row["what"]: row for row in rows if row["form"].startswith("plain")}
    for row in rows:
        if row["what"] in plain and row["form"].startswith("fast"):
            against = plain[row["what"]]
            speed = row["per_second"] / against["per_second"]
            memory = row["peak_mib"] / against["peak_mib"]
            print(
                f"{row['what']}, {row['form']}: {speed:.2f} x the speed and {memory:.2f} x the memory of "
                f"{against['form']}"
            )


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
