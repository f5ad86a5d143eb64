"""Size, cost, speed and memory at the paper's resolution, and the fast forms against the plain ones.

Plain: the whole correlation matrix, a loop over memory slots, three VGG calls. One run measures
both. On a GPU networks work in bf16 autocast, as training does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets import losses
from mdrnets.masks import StrokeMasks
from mdrnets.memory import DMM
from mdrnets.model import SIZES, CoarseNet, Discriminator, MDRNet, RefineNet, SizeName, composite
from mdrnets.objective import refine_losses
from mdrnets.parser import TinyParser
from mdrnets.train import PRESETS, Config
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.runtime import own_type, parse, pick_device, run_main

PARTS = 8


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    size: SizeName = "mdrnet_256"
    """Widths and depths of the networks."""
    image_size: int = 256
    """Side of the pictures in pixels."""
    hole: float = 0.3
    """Share of corrupted pixels."""
    batch_size: int | None = None
    """Pictures per step; default 1 on the CPU and that of the paper preset on a GPU."""
    seconds: float | None = None
    """Shortest time that each speed is measured for, default 3 on the CPU and 0.5 on a GPU; at least three
    calls are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def read_by_loops(dmm: DMM, features: Tensor, parsing: Tensor) -> Tensor:
    """DMM's forward, a slot at a time."""
    q, memory = dmm.queries(features), dmm.slots_normalised()
    p, r = parsing.flatten(2).transpose(1, 2), torch.zeros_like(q)
    for k in range(dmm.blocks):
        scores = torch.stack([(q * memory[k, i]).sum(-1) for i in range(dmm.slots)], -1)
        w = (scores / dmm.tau).softmax(-1)
        for i in range(dmm.slots):
            r = r + (p[..., k] * w[..., i]).unsqueeze(-1) * memory[k, i]
    r = r.transpose(1, 2).reshape(features.shape).to(features.dtype)
    return features + dmm.fuse(torch.cat((features, r), 1))


class PlainRefine(nn.Module):
    """RefineNet's weights, used in the plain forms."""

    def __init__(self, refine: RefineNet):
        super().__init__()
        self.refine = refine

    def forward(self, comp: Tensor, mask: Tensor, parsing: Tensor, read: bool = True) -> Tensor:
        features = self.refine.features(comp, mask, parsing)
        holes = F.adaptive_max_pool2d(mask, features.shape[-2:])
        features = read_by_loops(self.refine.dmm, features, parsing)
        return comp + self.refine.decoder(self.refine.mrem.dense(features, holes)[0])


def plain_losses(
    net: MDRNet, batch: dict[str, Tensor], config: Config, phi: nn.Module, critic: nn.Module
) -> Tensor:
    """The objective with three calls of phi: refined, composite and truth."""
    x, m = batch["image"], batch["mask"]
    y = net(x, m)["refined"].float()
    comp = composite(x, y, m)
    of_y, of_comp, of_x = phi(y), phi(comp), phi(x)
    total = config.valid * losses.valid(y, x, m) + config.hole * losses.hole(y, x, m)
    total = total + config.tv * losses.total_variation(comp, m)
    total = total + config.perceptual * losses.perceptual(of_y, of_comp, of_x)
    with own_type(x):
        total = total + config.style * losses.style(of_y, of_comp, of_x)
        inter, intra = losses.inco2(of_comp[-1], of_x[-1], m, config.inco_samples)
    total = total + config.inter * inter + config.intra * intra
    return total + config.adversarial * losses.hinge_generator(critic(comp).float())


def main(config: BenchConfig) -> None:
    """Measure and print; bench.json keeps the numbers."""
    device = pick_device(config.device)
    gpu = device.type == "cuda"
    train_config = PRESETS["paper"]
    batch_size = config.batch_size or (train_config.batch_size if gpu else 1)
    seconds = config.seconds or (0.5 if gpu else 3.0)
    size, side = SIZES[config.size], config.image_size
    torch.manual_seed(0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=gpu)
    net = MDRNet(CoarseNet(size), TinyParser(PARTS), RefineNet(size, PARTS), size.stride)
    net.to(device, memory_format=torch.channels_last)
    net.requires_grad_(False).refine.requires_grad_(True)
    critic = Discriminator().requires_grad_(False).to(device, memory_format=torch.channels_last)
    phi = losses.VGGFeatures().requires_grad_(False).to(device, memory_format=torch.channels_last)
    masks = StrokeMasks(side, config.hole - 0.01, config.hole + 0.01, seed=0)
    mask = torch.stack([masks.mask(i) for i in range(batch_size)]).to(device)
    x = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
    batch = {"image": x, "mask": mask}
    rows = []

    def row(what: str, form: str, items: int = batch_size, **numbers) -> None:
        rows.append({"what": what, "form": form, "batch": items, **numbers})

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
        with torch.inference_mode(), autocast:
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
    forms = {
        ("MREM, forward and backward", "fast"): lambda: mrem(features, holes),
        ("MREM, forward and backward", "plain"): lambda: mrem.dense(features, holes)[0],
        ("DMM, forward and backward", "fast"): lambda: dmm(features, parsing),
        ("DMM, forward and backward", "plain"): lambda: read_by_loops(dmm, features, parsing),
    }

    def with_gradient(function) -> None:
        with autocast:
            out = function()
        out.sum().backward()

    for (what, form), function in forms.items():
        row(
            what,
            form,
            per_second=throughput(lambda f=function: with_gradient(f), batch_size, device, seconds),
            peak_mib=peak_memory(lambda f=function: with_gradient(f), device) / 2**20,
        )

    # A training step of the refinement stage (coarse network at rest).
    optimiser = torch.optim.Adam(net.refine.parameters(), 2e-4, fused=gpu)
    plain = MDRNet(net.coarse, net.parser, PlainRefine(net.refine), size.stride)

    def step(form: str) -> None:
        with autocast:
            if form == "fast":
                chance = torch.Generator().manual_seed(0)
                terms, _ = refine_losses(net, batch, train_config, phi, critic, True, True, chance)
                loss = sum(terms.values())
            else:
                loss = plain_losses(plain, batch, train_config, phi, critic)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    for form in ("fast", "plain"):
        run = partial(step, form)
        # The plain form multiplies element by element, which is not counted.
        macs = count_macs(run, training=True) / batch_size / 1e9 if form == "fast" else None
        speed = throughput(run, batch_size, device, seconds)
        row("training step", form, gmacs=macs, per_second=speed, peak_mib=peak_memory(run, device) / 2**20)
    compare(rows)
    report("mdrnets", rows, device=device)
    if not gpu:
        print("GPU: not measured here; the same command measures it where there is one")


def compare(rows: list[dict]) -> None:
    """Print the fast forms against the plain ones."""
    found = {(row["what"], row["form"]): row for row in rows}
    for what in ("MREM, forward and backward", "DMM, forward and backward", "training step"):
        fast, plain = found[what, "fast"], found[what, "plain"]
        speed = fast["per_second"] / plain["per_second"]
        memory = fast["peak_mib"] / plain["peak_mib"]
        print(f"{what}: {speed:.2f} x the speed and {memory:.2f} x the memory of the plain form")


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
