"""Cost of PIN at the paper's size, beside a literal transcription of the official formulas, in one run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pin.attacks import Goal, gradient, pgd
from pin.basis import Basis, CovarianceSolver
from pin.job import placed
from pin.losses import exact, mask_cost, reinforce
from pin.model import ESN, PIN, official
from pin.protocol import attack_in_batches, in_batches
from pin.recognizers import adapt
from shared.bench import count_macs, count_parameters, peak_memory, report, synchronize, throughput
from shared.ranges import Count, Positive
from shared.runtime import UserError, parse, pick_device, run_main

SIZE, COMPONENTS, SAMPLES = 112, 2500, 30
OFFICIAL_BATCH = 20
"""Of the ESN's training."""
LFW_IMAGES = 13_233
PGD_STEPS = 40

Part = Literal["defence", "training", "attack", "basis"]


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    batch: Count | None = None
    """Images per batch of the networks; default 2 on a CPU, 128 on a GPU."""
    seconds: Positive = 2.0
    """Time spent on each measurement."""
    parts: tuple[Part, ...] = ("defence", "training", "attack", "basis")
    """What to measure: formulas and networks; ESN training steps; on a GPU alone PGD-40, and all eigenfaces
    of as many images as LFW has."""
    pairs: Count = 6000
    """Pairs attacked with PGD-40."""
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Arithmetic of the attacked recogniser. fp32 as PyTorch comes: convolutions in TF32."""
    attack_batches: tuple[Count, ...] = (128, 256, 512)
    """Batches tried for the attack; the fastest is taken."""
    output: Path | None = None
    """Folder for bench.json; default runs/pin."""


def official_costs(
    vectors: Tensor, mean: Tensor, clean: Tensor, noisy: Tensor, masks: Tensor, lamb: float
) -> Tensor:
    """Costs of S masks of one image by the official formula: a masked basis for each mask, then two products.

    vectors (D, K), mean (D), clean and noisy (D), masks (S, K) -> (S).
    """
    bases = vectors.unsqueeze(0) * masks.unsqueeze(1)  # (S, D, K)
    coefficients = torch.matmul(bases.transpose(1, 2), (noisy - mean).view(1, -1, 1))
    restored = torch.matmul(bases, coefficients).squeeze(2)
    return (restored - (clean - mean)).square().mean(1) + lamb * masks.sum(1)


def official_projection(vectors: Tensor, mean: Tensor, x: Tensor, masks: Tensor) -> Tensor:
    """Purification by the official loop: gather each image's eigenfaces, project, one image at a time."""
    results = []
    for image, mask in zip(x.flatten(1), masks, strict=True):
        chosen = vectors[:, mask.bool()]
        results.append(mean + chosen @ (chosen.T @ (image - mean)))
    return torch.stack(results).view_as(x)


def ours_costs(basis: Basis, x: Tensor, noisy: Tensor, masks: Tensor, lamb: float) -> Tensor:
    """The same costs in the Parseval form, for a whole batch: masks (S, B, K) -> (S, B)."""
    return mask_cost(basis, x, noisy, lamb)(masks)


def measured(
    what: str, function: Callable[[], Any], items: int, device: torch.device, seconds: float, **more: float
) -> dict[str, Any]:
    """A row of the table: cost, speed and memory of a call that handles `items` of something."""
    # 0 of products with one vector, which PyTorch does not count
    cost = count_macs(function, training=True) / items / 1e9
    return {
        "what": what,
        **more,
        **({"gmacs": cost} if cost else {}),
        "per_second": throughput(function, items, device, seconds),
        "peak MB": peak_memory(function, device) / 1e6,
    }


def random_basis(device: torch.device) -> Basis:
    """Orthonormal columns of the full size; their values do not matter for speed."""
    vectors = torch.linalg.qr(torch.randn(SIZE**2, COMPONENTS, device=device)).Q
    return Basis(torch.zeros(SIZE**2, device=device), vectors).to(device)


def objective_rows(basis: Basis, device: torch.device, seconds: float) -> list[dict]:
    """30 masks of one image, official against Parseval, and their agreement."""
    x = torch.rand(1, 1, SIZE, SIZE, device=device) * 2 - 1
    noisy = x + 0.02 * torch.randn_like(x)
    masks = (torch.rand(SAMPLES, 1, COMPONENTS, device=device) > 0.5).float()
    literal = lambda: official_costs(  # noqa: E731
        basis.eig_vec, basis.avg_face, x.flatten(), noisy.flatten(), masks[:, 0], 0.015
    )
    ours = lambda: ours_costs(basis, x, noisy, masks, 0.015)  # noqa: E731
    torch.testing.assert_close(ours()[:, 0], literal(), rtol=1e-3, atol=1e-3)
    rows = [
        measured("cost of 30 masks, official formula", literal, 1, device, seconds),
        measured("cost of 30 masks, Parseval form", ours, 1, device, seconds),
    ]
    speed, memory = (rows[1][key] / rows[0][key] for key in ("per_second", "peak MB"))
    print(f"cost of 30 masks: {speed:.0f} times as fast, {100 * memory:.2g} % of the memory")
    return rows


def projection_rows(basis: Basis, device: torch.device, seconds: float) -> list[dict]:
    """Purifying 32 images given their masks, loop against batch."""
    x = torch.rand(32, 1, SIZE, SIZE, device=device) * 2 - 1
    masks = (torch.rand(32, COMPONENTS, device=device) > 0.5).float()
    loop = lambda: official_projection(basis.eig_vec, basis.avg_face, x, masks)  # noqa: E731
    ours = lambda: basis.reconstruct(basis.coefficients(x) * masks, x.shape)  # noqa: E731
    torch.testing.assert_close(ours(), loop(), rtol=1e-3, atol=1e-3)
    rows = [
        measured("projection of 32, official loop", loop, 32, device, seconds),
        measured("projection of 32, batched", ours, 32, device, seconds),
    ]
    print(f"projection of 32 images: {rows[1]['per_second'] / rows[0]['per_second']:.1f} times as fast")
    return rows


def network_rows(device: torch.device, batch: int, seconds: float) -> list[dict]:
    """Parameters, MACs per image, inference throughput and peak memory of every network of the defence."""
    rows = []
    shapes = {"dae": (1, SIZE), "encoder": (1, SIZE), "arcface_ir_se50": (3, SIZE), "lightcnn29": (1, 128)}
    for name, (channels, side) in shapes.items():
        network = official(name, **({"classes": 1} if name.startswith("light") else {})).eval()
        network = placed(network, device)
        run = partial(infer, network, torch.randn(batch, channels, side, side, device=device))
        parameters = count_parameters(network)
        rows.append(measured(f"{name}, {batch} images", run, batch, device, seconds, parameters=parameters))
    return rows


def infer(network: torch.nn.Module, x: Tensor) -> Tensor:
    """One pass without gradients, in bf16 on a GPU."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return network(x)


def defence_networks(device: torch.device) -> tuple[torch.nn.Module, ESN]:
    """DAE and ESN of the full size."""
    dae, esn = official("dae").eval(), ESN(official("encoder"), official("pca_layer"))
    return placed(dae, device), placed(esn, device)


def system_rows(basis: Basis, device: torch.device, batch: int, seconds: float) -> list[dict]:
    """The whole defence per image."""
    dae, esn = defence_networks(device)
    x = torch.rand(batch, 1, SIZE, SIZE, device=device) * 2 - 1
    rows = []
    for label, autoencoder in (("with DAE", dae), ("without DAE", None)):
        run = partial(infer, PIN(basis, autoencoder, esn, "threshold").eval(), x)
        rows.append(measured(f"PIN {label}, {batch} images", run, batch, device, seconds))
        rows[-1]["ms per image"] = 1000 / rows[-1]["per_second"]
    return rows


def training_rows(basis: Basis, device: torch.device, batches: list[int], seconds: float) -> list[dict]:
    """ESN training steps with both estimators, in bf16 on a GPU."""
    dae, esn = defence_networks(device)
    optimizer = torch.optim.SGD(esn.parameters(), 1e-4, momentum=0.9)

    def step(estimator: Callable, x: Tensor) -> None:
        noisy = x + 0.02 * torch.randn_like(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                seen = dae(noisy)[1]
            p = esn(seen)
        loss, _ = estimator(p, mask_cost(basis, x, noisy, 1e-4), samples=SAMPLES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows = []
    for batch in batches:
        x = torch.rand(batch, 1, SIZE, SIZE, device=device) * 2 - 1
        for estimator in (reinforce, exact):
            what = f"ESN training step, {estimator.__name__}, batch {batch}"
            rows.append(measured(what, partial(step, estimator, x), batch, device, seconds))
    return rows


def attack_rows(device: torch.device, options: Options) -> list[dict]:
    """PGD-40 on a set as large as LFW's pairs, on IR-SE50 (random weights: the time is the same).

    First one gradient with each batch, to find the batch that pays.
    """
    name = "arcface_ir_se50"
    recognizer = adapt(name, placed(official(name).eval().requires_grad_(False), device))
    attack = partial(pgd, steps=PGD_STEPS)
    rows = []
    for precision in options.precisions:

        def features(x: Tensor, precision=precision) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return recognizer(x).float()

        def task(count: int, features=features) -> tuple[Tensor, Goal]:
            x = torch.rand(count, 1, SIZE, SIZE, device=device) * 2 - 1
            return x, Goal(in_batches(features, x.flip(0)), -torch.ones(count, device=device))

        tried = {}
        for batch in options.attack_batches:
            x, goal = task(batch)
            step = partial(gradient, features, x, goal)
            what = f"gradient of IR-SE50, {precision}, batch {batch}"
            tried[batch] = measured(what, step, batch, device, options.seconds)
        batch = max(tried, key=lambda size: tried[size]["per_second"])
        x, goal = task(options.pairs)
        begin = time.perf_counter()
        attack_in_batches(attack, features, x, goal, batch)
        synchronize(device)
        seconds = time.perf_counter() - begin
        print(f"PGD-{PGD_STEPS}, {precision}: {options.pairs} pairs in {seconds:.1f} s", flush=True)
        whole = {
            "what": f"PGD-{PGD_STEPS} on {options.pairs} pairs, IR-SE50, {precision}, batch {batch}",
            "gmacs": PGD_STEPS * tried[batch]["gmacs"],
            "per_second": options.pairs / seconds,
            "peak MB": tried[batch]["peak MB"],
            "seconds": seconds,
        }
        rows += [*tried.values(), whole]
    return rows


def basis_rows(device: torch.device, images: int = LFW_IMAGES, block: int = 256) -> list[dict]:
    """All eigenfaces of a stream of as many images as LFW has, from noise (every eigenvalue counts)."""
    pixels, times, found = SIZE**2, [], []

    def clock() -> None:
        synchronize(device)
        times.append(time.perf_counter())

    def fit() -> None:
        clock()
        solver = CovarianceSolver(pixels, pixels, device)
        for start in range(0, images, block):
            solver.add(torch.rand(min(block, images - start), 1, SIZE, SIZE, device=device) * 2 - 1)
        clock()
        found.append(solver.solve().eig_vec)
        clock()

    peak = peak_memory(fit, device) / 1e6
    skew = (found[0].T @ found[0]).sub_(torch.eye(pixels, device=device)).abs().max().item()
    streaming, solving = times[1] - times[0], times[2] - times[1]
    print(f"all {pixels} eigenfaces: {solving:.1f} s, orthonormal to {skew:.1e}", flush=True)
    return [
        {
            "what": f"covariance of {images} images, fp32",
            "gmacs": pixels**2 / 1e9,
            "per_second": images / streaming,
            "seconds": streaming,
        },
        {"what": f"all {pixels} eigenfaces, float64", "peak MB": peak, "seconds": solving},
    ]


def bench(options: Options) -> Path:
    """All measurements; returns the path of bench.json."""
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    batch = options.batch or (128 if on_gpu else 2)
    torch.manual_seed(0)
    rows = []
    if {"defence", "training"} & set(options.parts):
        basis = random_basis(device)
    if "defence" in options.parts:
        rows += objective_rows(basis, device, options.seconds)
        rows += projection_rows(basis, device, options.seconds)
        rows += network_rows(device, batch, options.seconds)
        rows += system_rows(basis, device, batch, options.seconds)
    if "training" in options.parts:
        batches = [OFFICIAL_BATCH, batch, 4 * batch] if on_gpu else [batch]
        rows += training_rows(basis, device, batches, options.seconds)
    if on_gpu and "attack" in options.parts:
        rows += attack_rows(device, options)
    if on_gpu and "basis" in options.parts:
        rows += basis_rows(device)
    if not rows:
        raise UserError(f"--parts {' '.join(options.parts)}: measured on a GPU alone")
    return report("pin", rows, options.output, device)


if __name__ == "__main__":
    run_main(lambda: print(bench(parse(Options, __doc__))))
