"""Size, cost, speed and memory of AnyFace's networks, and the fast StyleGAN2 against the grouped form.

Grouped: weights for each sample in one grouped convolution, and the filter over single channels in two
dimensions, as public code without custom CUDA has it. One run measures both forms with the same weights.
On a GPU generator, CLIP and IR-SE50 work in bf16 autocast and streams and losses in fp32, as in training.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from anyface.clip import vit_b32
from anyface.data import Cache
from anyface.encoder import IRSE50
from anyface.losses import code_distance, diverse_triplet
from anyface.model import Memory, Stream
from anyface.parts import CHANNELS, small_clip
from anyface.ranger import Ranger
from anyface.stages import Constants, make_streams
from anyface.stylegan2 import Generator
from anyface.train import PRESETS, Config, stream_terms
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report, throughput
from shared.ranges import Count, Positive
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    size: Literal[8, 16, 32, 64, 128, 256, 512, 1024] = 256
    """Side of the pictures of the full-width generator that is measured in both forms."""
    batch_size: Count | None = None
    """Faces per call of the full-size networks; default 1 on the CPU and 8 on a GPU."""
    small_batch: Count = 32
    """Faces per call of the demo's generator and of the losses."""
    seconds: Positive | None = None
    """Shortest time that each speed is measured for, default 1 on the CPU and 0.5 on a GPU; at least three
    calls are made."""
    compile: bool = False
    """Measure StyleGAN2 of `size` once more in both forms under torch.compile, and nothing else."""
    profile: bool = False
    """Print where the time of StyleGAN2 of `size` goes in both forms, and nothing else; on a CPU."""
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


def training_steps(
    config: Config, forms: dict[str, Constants], items: int, device: torch.device, autocast: Callable
) -> dict[str, Callable[[], None]]:
    """A training step of one pair of streams on random features, through the generator of each form."""
    constants = next(iter(forms.values()))
    generator, width = constants.generator, constants.clip.visual.output_dim
    with device:
        text, image = (net.train() for net in make_streams(config, constants, 0))
        batch = {name: torch.randn(items, width) for name in ("f_t", "f_i", "f_other")}
        batch |= {"w": torch.randn(items, generator.n_latent, generator.style_dim)}
        batch |= {"face": torch.arange(items)}
        mean, z = torch.randn_like(batch["w"][:1]), torch.randn(items, generator.style_dim)
    cache = Cache(batch["w"], batch["f_i"], batch["f_t"][:, None], np.ones(items, int), mean)
    parameters = [*text.parameters(), *image.parameters()]
    optimiser = (Ranger if config.optimiser == "ranger" else torch.optim.Adam)(parameters, lr=1e-4)

    def step(of: Constants) -> None:
        terms = stream_terms(text, image, batch, z, cache, of, config, autocast)
        optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimiser.step()

    return {form: partial(step, of) for form, of in forms.items()}


def some_codes(generator: Generator, items: int, device: torch.device) -> Tensor:
    """Random W+ codes that ask for a gradient."""
    shape = (items, generator.n_latent, generator.style_dim)
    return torch.randn(shape, device=device, requires_grad=True)


def picture(synthesis: Callable[[Tensor], Tensor], codes: Tensor, autocast: Callable) -> Tensor:
    """Codes to pictures."""
    with torch.no_grad(), autocast():
        return synthesis(codes)


def gradient(synthesis: Callable[[Tensor], Tensor], codes: Tensor, autocast: Callable) -> tuple[Tensor, ...]:
    """Codes to pictures and the way back, as losses on pictures need it."""
    with autocast():
        made = synthesis(codes)
    return torch.autograd.grad(made.float().square().mean(), codes)


def compiled(
    size: int, items: int, device: torch.device, autocast: Callable, seconds: float, row: Callable
) -> None:
    """Rows of StyleGAN2 with gradient in both forms, as it is and under torch.compile."""
    with device:
        forms = both_forms(size=size)
    codes = some_codes(forms["fast"], items, device)
    functions = {}
    for form, generator in forms.items():
        functions[form] = partial(gradient, generator.synthesis, codes, autocast)
        functions[f"{form}, compiled"] = partial(
            gradient, torch.compile(generator.synthesis), codes, autocast
        )
    times = in_turn(functions, device, seconds)
    macs = count_macs(functions["fast"], training=True) // items
    for form, function in functions.items():
        counted = macs if form.startswith("fast") else None
        row(
            f"StyleGAN2 {size}, picture and gradient",
            form,
            items,
            function,
            None,
            counted,
            items / times[form],
        )


def where_time_goes(function: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of one call on a CPU and the shares of its operations: convolutions, the [1, 3, 3, 1] filters,
    and the rest."""
    function()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        function()
    parts = {"convolutions": 0.0, "filters": 0.0, "the rest": 0.0}
    for event in found.key_averages(group_by_input_shape=True):
        kernel = event.input_shapes[1] if "conv" in event.key and len(event.input_shapes) > 1 else []
        what = "filters" if kernel[1:] == [1, 4, 4] else "convolutions" if kernel else "the rest"
        parts[what] += event.self_cpu_time_total / 1e6
    total = sum(parts.values())
    return total, {what: spent / total for what, spent in parts.items()}


def main(config: BenchConfig) -> None:
    """Measure and print; bench.json keeps the numbers."""
    device = pick_device(config.device)
    gpu = device.type == "cuda"
    paper, demo = PRESETS["paper"], PRESETS["demo"]
    batch, small = config.batch_size or (paper.batch_size if gpu else 1), config.small_batch
    seconds = config.seconds or (0.5 if gpu else 1.0)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=gpu)
    torch.manual_seed(0)
    rows: list[dict] = []

    def row(
        what: str,
        form: str,
        items: int,
        function: Callable,
        module: nn.Module | None = None,
        macs: int | None = None,
        speed: float | None = None,
        fp32: bool = False,
    ) -> None:
        rows.append(
            {
                "what": what,
                "form": form,
                "batch": items,
                "arithmetic": "bf16" if gpu and not fp32 else "fp32",
                "parameters": count_parameters(module) if module is not None else None,
                "gmacs": macs / 1e9 if macs is not None else None,
                "per_second": speed or throughput(function, items, device, seconds),
                "peak_mib": peak_memory(function, device) / 2**20,
            }
        )

    def inference(what: str, module: nn.Module, call, *inputs: Tensor, fp32: bool = False) -> None:
        def run(*given: Tensor):
            with torch.no_grad(), nullcontext() if fp32 else autocast():
                return call(*given)

        # Attention's fused path for inference is unknown to the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        macs = count_macs(run, *(x[:1] for x in inputs))
        torch.backends.mha.set_fastpath_enabled(True)
        row(what, "fast", len(inputs[0]), lambda: run(*inputs), module, macs, fp32=fp32)

    if config.profile:
        if gpu:
            raise UserError("--profile reads the times of a CPU: add --device cpu")
        forms = both_forms(size=config.size)
        codes = some_codes(forms["fast"], batch, device).detach()
        for form, generator in forms.items():
            total, shares = where_time_goes(partial(picture, generator.synthesis, codes, autocast))
            told = ", ".join(f"{what} {100 * share:.0f} %" for what, share in shares.items())
            print(f"StyleGAN2 {config.size}, {batch} pictures, {form}: {total:.3g} s; {told}")
        return

    if config.compile:
        compiled(config.size, batch, device, autocast, seconds, row)
        report("anyface", rows, device=device)
        compare(rows)
        return

    # Full-size networks, made where they are used: 300 million random numbers take a CPU a while.
    with device:
        clip = vit_b32().eval().requires_grad_(False)
    inference(
        "CLIP ViT-B/32, picture", clip, clip.encode_image, torch.randn(batch, 3, 224, 224, device=device)
    )
    tokens = torch.zeros(batch, 77, dtype=torch.long, device=device)
    tokens[:, :10] = 49407
    inference("CLIP ViT-B/32, caption", clip, clip.encode_text, tokens)
    with device:
        stream = Stream().eval().requires_grad_(False)
    inference("text stream", stream, stream, torch.randn(batch, 512, device=device), fp32=True)
    del stream
    with device:
        identity = IRSE50().eval().requires_grad_(False)
    inference("IR-SE50", identity, identity, torch.randn(batch, 3, 112, 112, device=device))
    del identity

    with device:
        large = Generator(1024).eval().requires_grad_(False)
    inference("StyleGAN2 1024, picture", large, large.synthesis, torch.randn(batch, 18, 512, device=device))
    del large

    # StyleGAN2 in both forms: pictures, and the gradient to the codes that the streams' losses need.
    tiny = {"style_dim": 64, "n_mlp": 3, "lr_mlp": 1.0}
    with device:
        cases = {
            f"StyleGAN2 {config.size}": (batch, both_forms(size=config.size)),
            "demo's StyleGAN2 32": (small, both_forms(size=32, channels=CHANNELS, **tiny)),
            "demo's StyleGAN2 64": (small, both_forms(size=64, channels=CHANNELS, **tiny)),
        }
    for name, (items, forms) in cases.items():
        calls: dict[str, dict[str, Callable]] = {"picture": {}, "picture and gradient": {}}
        for form, generator in forms.items():
            codes = some_codes(generator, items, device)
            calls["picture"][form] = partial(picture, generator.synthesis, codes.detach(), autocast)
            calls["picture and gradient"][form] = partial(gradient, generator.synthesis, codes, autocast)
        for what, functions in calls.items():
            times = in_turn(functions, device, seconds)
            for form, function in functions.items():
                macs = count_macs(function, training=True) // items if form == "fast" else None
                module = forms[form] if what == "picture" else None
                row(f"{name}, {what}", form, items, function, module, macs, items / times[form])

    # A training step of both streams: the demo's, and on a GPU, where it takes no minutes, the paper's.
    small_networks = small_clip()[0].to(device).eval().requires_grad_(False)
    trainings = {"training step, demo": (demo, small_networks, *cases["demo's StyleGAN2 32"])}
    if gpu:
        trainings[f"training step, {config.size} px"] = (paper, clip, *cases[f"StyleGAN2 {config.size}"])
    for what, (preset, reader, items, forms) in trainings.items():
        constants = {form: Constants(reader, None, generator) for form, generator in forms.items()}
        steps = training_steps(preset, constants, items, device, autocast)
        times = in_turn(steps, device, seconds)
        for form, step in steps.items():
            macs = count_macs(step, training=True) // items if form == "fast" else None
            row(what, form, items, step, None, macs, items / times[form])

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
    learning = {
        form: partial(lambda t: torch.autograd.grad(t(), (w_t, w_other)), function)
        for form, function in triplets.items()
    }
    reading = {"fast": lambda: memory(f), "grouped": lambda: read_by_loops(memory, f)}
    for what, functions in {"diverse triplet loss": learning, "AnyFace++ memory": reading}.items():
        times = in_turn(functions, device, seconds)
        for form, function in functions.items():
            row(what, form, small, function, speed=small / times[form], fp32=True)

    report("anyface", rows, device=device)
    compare(rows)
    if not gpu:
        print("GPU: not measured here; the same command measures it where there is one")


def compare(rows: list[dict]) -> None:
    """Print the fast forms against the grouped or looped ones."""
    found = {(row["what"], row["form"]): row for row in rows}
    for what, form in found:
        if form == "grouped":
            fast, plain = found[what, "fast"], found[what, "grouped"]
            speed = fast["per_second"] / plain["per_second"]
            print(f"{what}: {speed:.2f} x the speed of the grouped or looped form")


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
