"""Size, cost, speed and memory of AnyFace's networks, and the fast StyleGAN2 against the grouped form.

Grouped: weights for each sample in one grouped convolution, and the filter over single channels in two
dimensions, as public code without custom CUDA has it. One run measures both forms with the same weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import vit_b32
from anyface.encoder import IRSE50
from anyface.losses import code_distance, diverse_triplet
from anyface.model import Memory, Stream
from anyface.parts import CHANNELS
from anyface.stylegan2 import Generator
from shared.bench import count_macs, count_parameters, peak_memory, report, synchronize, throughput
from shared.runtime import parse, pick_device, run_main


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    size: int = 256
    """Side of the pictures of the full-width generator that is measured in both forms."""
    batch_size: int | None = None
    """Faces per call of the full-size networks; default 1 on the CPU and 8 on a GPU."""
    small_batch: int = 32
    """Faces per call of the demo's generator and of the losses."""
    seconds: float = 1.0
    """Shortest time that each speed is measured for; at least three calls are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def triplet_by_loops(w: Tensor, w_t: Tensor, w_other: Tensor, mean: Tensor, margin: float = 0.2) -> Tensor:
    """The released diverse triplet loss: a Python loop over the batch and its first eight negatives."""
    total = w.new_zeros(())
    for b in range(len(w)):
        away = code_distance(w_other[b], mean[0])
        negative = sum(code_distance(w[b], w_other[j]) / away for j in range(8)) / 8
        positive = code_distance(w[b], w_t[b]) / code_distance(w_t[b], mean[0])
        total = total + F.relu(positive - negative + margin)
    return total / len(w)


def read_by_loops(memory: Memory, f: Tensor) -> Tensor:
    """AnyFace++'s memory, a bank at a time."""
    rows = []
    for bank in memory.banks():
        best = (F.normalize(f, dim=-1) @ F.normalize(bank, dim=-1).T).argmax(1)
        rows.append(f + bank[best])
    return torch.stack(rows, 1)


def both_forms(**sizes) -> dict[str, Generator]:
    """The generator in both forms, with the same weights, frozen as in the streams' training."""
    fast, grouped = Generator(**sizes), Generator(**sizes, modulation="grouped")
    grouped.load_state_dict(fast.state_dict())
    return {"fast": fast.requires_grad_(False), "grouped": grouped.requires_grad_(False)}


def in_turn(
    functions: dict[str, Callable], items: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Items per second of each function, called in turn, so that what else a machine does at the time slows
    all of them alike: median over at least three rounds after one to warm up, `seconds` for each function."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - begin < seconds * len(functions):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: items / sorted(spent[1:])[len(spent[1:]) // 2] for name, spent in times.items()}


def main(config: BenchConfig) -> None:
    """Measure and print; bench.json keeps the numbers."""
    device = pick_device(config.device)
    gpu = device.type == "cuda"
    batch, small = config.batch_size or (8 if gpu else 1), config.small_batch
    torch.manual_seed(0)
    rows: list[dict] = []

    def row(
        what: str,
        form: str,
        items: int,
        function: Callable,
        module: nn.Module | None = None,
        one: Callable | None = None,
        speed: float | None = None,
    ) -> None:
        rows.append(
            {
                "what": what,
                "form": form,
                "batch": items,
                "parameters": count_parameters(module) if module is not None else None,
                "gmacs_per_item": count_macs(one) / 1e9 if one is not None else None,
                "items_per_second": speed or throughput(function, items, device, config.seconds),
                "peak_mib": peak_memory(function, device) / 2**20,
            }
        )

    def inference(what: str, module: nn.Module, call, *inputs: Tensor) -> None:
        def run(*given: Tensor):
            with torch.no_grad():
                return call(*given)

        one = [x[:1] for x in inputs]
        row(what, "fast", len(inputs[0]), lambda: run(*inputs), module, lambda: run(*one))

    # Full-size networks.
    clip = vit_b32().to(device).eval().requires_grad_(False)
    inference(
        "CLIP ViT-B/32, picture", clip, clip.encode_image, torch.randn(batch, 3, 224, 224, device=device)
    )
    tokens = torch.zeros(batch, 77, dtype=torch.long, device=device)
    tokens[:, :10] = 49407
    inference("CLIP ViT-B/32, caption", clip, clip.encode_text, tokens)
    del clip
    stream = Stream().to(device).eval().requires_grad_(False)
    inference("text stream", stream, stream, torch.randn(batch, 512, device=device))
    del stream
    identity = IRSE50().to(device).eval().requires_grad_(False)
    inference("IR-SE50", identity, identity, torch.randn(batch, 3, 112, 112, device=device))
    del identity

    large = Generator(1024).to(device).eval().requires_grad_(False)
    inference("StyleGAN2 1024, picture", large, large.synthesis, torch.randn(batch, 18, 512, device=device))
    del large

    # StyleGAN2 in both forms: pictures, and the gradient to the codes that the streams' losses need.
    tiny = {"style_dim": 64, "n_mlp": 3, "lr_mlp": 1.0}
    cases = {
        f"StyleGAN2 {config.size}": (batch, both_forms(size=config.size)),
        "demo's StyleGAN2 32": (small, both_forms(size=32, channels=CHANNELS, **tiny)),
        "demo's StyleGAN2 64": (small, both_forms(size=64, channels=CHANNELS, **tiny)),
    }
    for name, (items, forms) in cases.items():
        calls: dict[str, dict[str, Callable]] = {"picture": {}, "picture and gradient": {}}
        for form, generator in forms.items():
            generator.to(device)
            shape = (items, generator.n_latent, generator.style_dim)
            codes = torch.randn(shape, device=device, requires_grad=True)

            def picture(g=generator, c=codes) -> Tensor:
                with torch.no_grad():
                    return g.synthesis(c)

            def gradient(g=generator, c=codes) -> tuple[Tensor, ...]:
                return torch.autograd.grad(g.synthesis(c).square().mean(), c)

            calls["picture"][form], calls["picture and gradient"][form] = picture, gradient
        for what, functions in calls.items():
            speeds = in_turn(functions, items, device, config.seconds)
            for form, function in functions.items():
                g, first = forms[form], codes.detach()[:1]
                counted = form == "fast" and what == "picture"
                one = (lambda g=g, c=first: g.synthesis(c)) if counted else None
                module = g if what == "picture" else None
                row(f"{name}, {what}", form, items, function, module, one, speeds[form])

    # Losses and memory, forward and backward.
    w, w_t, w_other = torch.randn(3, small, 18, 512, device=device)
    w_t.requires_grad_(), w_other.requires_grad_()
    mean = torch.randn(1, 18, 512, device=device)
    memory, f = (
        Memory([torch.randn(40, 768) for _ in range(26)]).to(device),
        torch.randn(small, 768).to(device),
    )
    triplets = {"fast": lambda: diverse_triplet(w, w_t, w_other, mean, negatives="official")}
    triplets["grouped"] = lambda: triplet_by_loops(w, w_t, w_other, mean)
    for form, function in triplets.items():
        row("diverse triplet loss", form, small, lambda t=function: torch.autograd.grad(t(), (w_t, w_other)))
    row("AnyFace++ memory", "fast", small, lambda: memory(f))
    row("AnyFace++ memory", "grouped", small, lambda: read_by_loops(memory, f))

    report("anyface", rows)
    compare(rows)
    if not gpu:
        print("GPU: not measured here; the same command measures it where there is one")


def compare(rows: list[dict]) -> None:
    """Print the fast forms against the grouped or looped ones."""
    found = {(row["what"], row["form"]): row for row in rows}
    for what, form in found:
        if form == "grouped":
            fast, plain = found[what, "fast"], found[what, "grouped"]
            speed = fast["items_per_second"] / plain["items_per_second"]
            print(f"{what}: {speed:.2f} x the speed of the grouped or looped form")


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
