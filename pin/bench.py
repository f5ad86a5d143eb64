"""Cost of PIN at the paper's size, beside a literal transcription of the official formulas, in one run."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pin.attacks import Goal, pgd
from pin.basis import Basis
from pin.losses import exact, mask_cost, reinforce
from pin.model import ESN, PIN, official
from pin.recognizers import adapt
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.runtime import parse, pick_device, run_main

SIZE, COMPONENTS, SAMPLES = 112, 2500, 30


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    batch: int | None = None
    """Images per batch of the networks; default 2 on a CPU, 128 on a GPU."""
    seconds: float = 2.0
    """Time spent on each measurement."""
    training: bool = True
    """Also time ESN training steps."""
    pairs: int = 6000
    """Pairs attacked with PGD-40 on a GPU; 0 leaves it out. Never on a CPU."""
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
        {"what": "cost of 30 masks, official formula", "per second": throughput(literal, 1, device, seconds)},
        {"what": "cost of 30 masks, Parseval form", "per second": throughput(ours, 1, device, seconds)},
    ]
    for row, function in zip(rows, (literal, ours), strict=True):
        row["peak MB"] = peak_memory(function, device) / 1e6
    speed, memory = rows[1]["per second"] / rows[0]["per second"], rows[1]["peak MB"] / rows[0]["peak MB"]
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
        {"what": "projection of 32, official loop", "per second": throughput(loop, 32, device, seconds)},
        {"what": "projection of 32, batched", "per second": throughput(ours, 32, device, seconds)},
    ]
    print(f"projection of 32 images: {rows[1]['per second'] / rows[0]['per second']:.1f} times as fast")
    return rows


def network_rows(device: torch.device, batch: int, seconds: float) -> list[dict]:
    """Parameters, MACs per image, inference throughput and peak memory of every network of the defence."""
    rows = []
    shapes = {"dae": (1, SIZE), "encoder": (1, SIZE), "arcface_ir_se50": (3, SIZE), "lightcnn29": (1, 128)}
    for name, (channels, side) in shapes.items():
        network = official(name, **({"classes": 1} if name.startswith("light") else {})).eval().to(device)
        x = torch.randn(batch, channels, side, side, device=device)
        run = lambda network=network, x=x: infer(network, x)  # noqa: E731
        rows.append(
            {
                "what": f"{name}, inference of {batch}",
                "parameters": count_parameters(network),
                "MMACs": count_macs(network, x[:1]) / 1e6,
                "per second": throughput(run, batch, device, seconds),
                "peak MB": peak_memory(run, device) / 1e6,
            }
        )
    return rows


def infer(network: torch.nn.Module, x: Tensor) -> Tensor:
    """One pass without gradients, in bf16 on a GPU."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return network(x)


def system_rows(basis: Basis, device: torch.device, batch: int, options: Options) -> list[dict]:
    """The whole defence per image, and ESN training steps with both estimators."""
    dae, esn = official("dae").eval().to(device), ESN(official("encoder"), official("pca_layer")).to(device)
    x = torch.rand(batch, 1, SIZE, SIZE, device=device) * 2 - 1
    rows = []
    for label, autoencoder in (("with DAE", dae), ("without DAE", None)):
        pin = PIN(basis, autoencoder, esn, "threshold").eval()
        run = lambda pin=pin: infer(pin, x)  # noqa: E731
        rows.append(
            {
                "what": f"PIN {label}, {batch} images",
                "per second": throughput(run, batch, device, options.seconds),
            }
        )
        rows[-1]["ms per image"] = 1000 / rows[-1]["per second"]
    if not options.training:
        return rows
    optimizer = torch.optim.SGD(esn.parameters(), 1e-4, momentum=0.9)
    for name, estimator in (("reinforce", reinforce), ("exact", exact)):

        def step(estimator=estimator) -> None:
            noisy = x + 0.02 * torch.randn_like(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                with torch.no_grad():
                    seen = dae(noisy)[1]
                p = esn(seen)
            loss, _ = estimator(p, mask_cost(basis, x, noisy, 1e-4), samples=SAMPLES)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        rows.append(
            {
                "what": f"ESN training step, {name}, batch {batch}",
                "per second": throughput(step, batch, device, options.seconds),
                "peak MB": peak_memory(step, device) / 1e6,
            }
        )
    return rows


def attack_rows(device: torch.device, pairs: int, batch: int) -> list[dict]:
    """PGD-40 on a set as large as LFW's pairs, on IR-SE50 (random weights: the time is the same)."""
    recognizer = adapt("arcface_ir_se50", official("arcface_ir_se50").eval().requires_grad_(False).to(device))

    def features(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return recognizer(x).float()

    x = torch.rand(pairs, 1, SIZE, SIZE, device=device) * 2 - 1
    begin = time.perf_counter()
    for part in x.split(batch):
        pgd(features, part, Goal(features(part.flip(0)).detach(), -torch.ones(len(part), device=device)))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return [{"what": f"PGD-40 on {pairs} pairs, IR-SE50", "per second": pairs / seconds, "seconds": seconds}]


def bench(options: Options) -> Path:
    """All measurements; returns the path of bench.json."""
    device = pick_device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 2)
    torch.manual_seed(0)
    basis = random_basis(device)
    rows = objective_rows(basis, device, options.seconds)
    rows += projection_rows(basis, device, options.seconds)
    rows += network_rows(device, batch, options.seconds)
    rows += system_rows(basis, device, batch, options)
    if device.type == "cuda" and options.pairs:
        rows += attack_rows(device, options.pairs, batch)
    return report("pin", rows, options.output)


if __name__ == "__main__":
    run_main(lambda: print(bench(parse(Options, __doc__))))
