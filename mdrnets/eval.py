"""Measure a run by the paper's protocol: five mask-ratio bins, the same holes for every method.

No number of the paper's own tables is known; none stands beside what is measured here.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mdrnets.baselines import CLASSICAL
from mdrnets.claims import copy_claim, make_claims, mean_over
from mdrnets.data import TEST_MASKS, Pictures, TestSet, masks_by_bin, open_pictures
from mdrnets.gallery import comparison_sheet
from mdrnets.mechanism import interventions, repair, similarity_gaps, usage_table
from mdrnets.model import composite
from mdrnets.objective import feature_network
from mdrnets.parser import parts_on_grid
from mdrnets.protocol import (
    FEWEST_FOR_FID,
    PROTOCOL_NAMES,
    UNITS,
    Protocol,
    Scores,
    mean,
    optional_networks,
    to_bytes,
)
from mdrnets.stages import VARIANTS, build, plan, stage_file
from mdrnets.train import Config
from shared.io import find_run, load_config, load_safetensors, progress, write_image
from shared.published import (
    Claim,
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    print_metrics,
    write_results,
)
from shared.ranges import Count
from shared.records import read_json, write_json
from shared.runtime import UserError, parse, pick_device, run_main

Results = dict[str, dict[int, dict[str, dict[str, float]]]]
"""method -> seed -> bin -> metric -> value."""


@dataclass(frozen=True)
class EvalConfig:
    """Which run to measure, and how."""

    run: Path | None = None
    """Run folder; default: the newest."""
    protocol: Protocol = "ours"
    """`ours`: RGB, 8 bit. `edgeconnect`: that project's script, not comparable with the other."""
    oracle_parsing: bool = False
    """Give the networks the true parsing instead of the parser's; reported in every setting."""
    lpips_weights: Path | None = None
    """torchvision's alexnet-owt-7be5be79.pth; LPIPS is left out without it."""
    fid_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth; FID is left out without it."""
    batch_size: Count = 64
    """Pictures at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def load_networks(
    config: Config, folder: Path, data: str, parts: int, device: torch.device
) -> dict[str, dict[int, nn.Module]]:
    """Finished networks of a run on one data set: method -> seed -> network in eval mode. UserError when
    there is none."""
    networks: dict[str, dict[int, nn.Module]] = {}
    for stage in plan(config):
        path = stage_file(folder, stage)
        if stage.data == data and path.is_file():
            net = build(config, stage.name, parts)
            load_safetensors(path, net)
            networks.setdefault(stage.name, {})[stage.seed] = net.to(device).eval()
    if not networks:
        raise UserError(f"{folder}: no stage on {data} is finished yet; let train.py run on")
    return networks


def complete(net: nn.Module, name: str, batch: dict[str, Tensor], parts: int, oracle: bool) -> Tensor:
    """Output of a network; "coarse" is the composite of the first stage alone."""
    x, m = batch["image"], batch["mask"]
    if name == "unet":
        return net(x, m)["output"]
    if name == "coarse":
        return composite(x, net.coarse(x.masked_fill(m > 0.5, 0.0), m), m)
    parsing = None
    if oracle:
        if int(batch["parts"].min()) < 0:
            raise UserError("--oracle-parsing: these pictures have no labels")
        cells = (x.shape[-2] // net.stride, x.shape[-1] // net.stride)
        parsing = parts_on_grid(batch["parts"], parts, cells)
    return net(x, m, parsing)["output"]


def not_available(settings: EvalConfig, count: int) -> dict[str, str]:
    """Metrics that `count` pictures are not measured by, and why: nothing replaces them."""
    absent = {} if settings.lpips_weights else {"LPIPS": "no --lpips-weights"}
    if not settings.fid_weights:
        absent["FID"] = "no --fid-weights"
    elif count < FEWEST_FOR_FID:
        absent["FID"] = f"{count} test pictures of at least {FEWEST_FOR_FID}"
    return absent


def protocol_of(settings: EvalConfig) -> str:
    """The protocol as every table and result names it."""
    return PROTOCOL_NAMES[settings.protocol] + (", TRUE PARSING GIVEN" if settings.oracle_parsing else "")


@torch.inference_mode()
def evaluate(
    settings: EvalConfig, config: Config, pictures: Pictures, networks: dict[str, dict[int, nn.Module]]
) -> tuple[Results, dict[str, float], dict[str, list[tuple[str, str]]]]:
    """Scores of all networks and of the untrained baselines in every bin; the bins' measured mean ratios; and
    which mask every picture had in each."""
    device, absent = pick_device(settings.device), not_available(settings, len(pictures))
    for name, why in absent.items():
        print(f"{name}: not available, {why}")
    fid_weights = None if "FID" in absent else settings.fid_weights
    lpips, inception = optional_networks(settings.lpips_weights, fid_weights, device)
    results: Results = {}
    ratios: dict[str, float] = {}
    pairings: dict[str, list[tuple[str, str]]] = {}
    for name, masks in masks_by_bin(config).items():
        tests = TestSet(pictures, masks, TEST_MASKS)
        loader = DataLoader(
            tests,
            settings.batch_size,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
        )
        runs = [(method, seed) for method, seeds in networks.items() for seed in seeds]
        runs += [(method, config.seed) for method in CLASSICAL]
        scores = {run: Scores(settings.protocol, lpips, inception) for run in runs}
        shares = []
        for batch in progress(loader, f"holes of {name}"):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            shares.append(batch["mask"].mean((1, 2, 3)))
            features = None if inception is None else inception(to_bytes(batch["image"]))
            for (method, seed), score in scores.items():
                if method in CLASSICAL:
                    output = CLASSICAL[method](batch["image"], batch["mask"])
                else:
                    net, parts = networks[method][seed], len(pictures.parts)
                    output = complete(net, method, batch, parts, settings.oracle_parsing)
                score.add(output, batch["image"], batch["mask"], features)
        ratios[name], pairings[name] = torch.cat(shares).mean().item(), tests.pairing()
        for (method, seed), score in scores.items():
            results.setdefault(method, {}).setdefault(seed, {})[name] = score.means()
    return results, ratios, pairings


def to_metrics(results: Results, settings: EvalConfig, dataset: str, count: int) -> list[Metric]:
    """Means over seeds as rows, for every bin and their mean; the setting names bin, protocol and count."""
    metrics = []
    for method, seeds in results.items():
        names = list(first(first(seeds)))
        bins = {
            name: {k: mean([row[name][k] for row in seeds.values()]) for k in names} for name in first(seeds)
        }
        bins["10-60 %"] = {k: mean([row[k] for row in bins.values()]) for k in names}
        for name, row in bins.items():
            setting = f"hole {name}; {count} pictures; {protocol_of(settings)}"
            metrics += [
                Metric("A", setting, k, UNITS.get(k, ""), v, dataset, False, method) for k, v in row.items()
            ]
    return metrics


def first(table: dict):
    """The first value of a dict."""
    return next(iter(table.values()))


def batch_of_tests(pictures: Pictures, config: Config, count: int, device: torch.device) -> dict[str, Tensor]:
    """The first `count` test pictures, with holes of all bins in turn."""
    sources = list(masks_by_bin(config).values())
    sets = [TestSet(pictures, masks, TEST_MASKS) for masks in sources]
    samples = [sets[i % len(sets)][i] for i in range(min(count, len(pictures)))]
    fields = ("image", "mask", "parts")
    return {k: torch.stack([sample[k] for sample in samples]).to(device) for k in fields}


def evaluate_data(
    settings: EvalConfig, config: Config, folder: Path, data: str, device: torch.device
) -> tuple[list[Claim], list[Metric], dict]:
    """Tables, pictures, claims and mechanism checks on one data set."""
    pictures = open_pictures(config, data, "test", config.seed)
    networks = load_networks(config, folder, data, len(pictures.parts), device)
    results, ratios, pairings = evaluate(settings, config, pictures, networks)
    write_json(folder / f"test_masks-{data}.json", pairings)
    batch = batch_of_tests(pictures, config, 128, device)
    nets = {name: first(seeds) for name, seeds in networks.items()}
    gaps = {}
    if config.features != "vgg" and "full" in nets:
        psi = feature_network(config, nets["full"]).to(device)
        gaps = {name: similarity_gaps(net, psi, batch) for name, net in nets.items() if name in VARIANTS}

    print(f"\n=== {pictures.name}: {len(pictures)} test pictures in every bin; {protocol_of(settings)} ===\n")
    print(summary(results))
    print("\n" + by_bin(results))
    slots = {}
    for name in ("shared", "disentangled", "full"):
        if name in nets:
            rows = usage_table(nets[name].refine.dmm, pictures.parts)
            slots[name] = {part: {"effective": used, "top": top} for part, used, top in rows}
            print(f"\nslots in use, {name}:")
            print(format_table(["part", "effective slots", "share of the most used"], rows))
    if gaps:
        print("\nInCo2 gaps on test composites:")
        print(
            format_table(
                ["variant", "inter", "intra"], [[name, *pair.values()] for name, pair in gaps.items()]
            )
        )
    shown = batch_of_tests(pictures, config, 10, device)
    sheet = comparison_sheet(nets, shown)
    write_image(folder / "samples" / f"test-{data}.png", sheet, f"faces completed by {folder.name}")

    claims = []
    if data in ("faces", "simple") and settings.protocol == "ours":
        tampering = interventions(nets["disentangled"], batch) if "disentangled" in nets else None
        repaired = repair(nets["disentangled-ema"], batch) if "disentangled-ema" in nets else None
        claims = make_claims(pictures.name, mean_over(results, "PSNR hole"), tampering, repaired, gaps)
    metrics = to_metrics(results, settings, pictures.name, len(pictures))
    extra = {"hole_ratio": ratios, "by_seed": results, "gaps": gaps, "slots": slots}
    extra["not_available"] = not_available(settings, len(pictures))
    return claims, metrics, extra | {"test_masks": f"test_masks-{data}.json"}


def main(settings: EvalConfig) -> Path:
    """Evaluate a run: tables, claims, mechanism checks, pictures; returns the run folder."""
    began = time.perf_counter()
    folder = find_run("mdrnets", settings.run)
    config = load_config(folder, Config)
    claims, metrics, extra = [], [], {}
    for data in config.data:
        some_claims, some_metrics, extra[data] = evaluate_data(
            settings, config, folder, data, pick_device(settings.device)
        )
        claims, metrics = claims + some_claims, metrics + some_metrics
    copied = folder / "copy_task.json"
    if copied.is_file():
        claims.append(copy_claim(read_json(copied, "the errors of the copy task")))
    claims = [replace(claim, id=f"C{i}") for i, claim in enumerate(claims, start=1)]
    print("\nkept pixels: returned bit for bit in every completed picture (checked)\n")
    headline = [m for m in metrics if m.setting.startswith("hole 10-60 %") and m.metric == "PSNR hole"]
    print_metrics(headline, load_published("mdrnets"))
    print()
    print_claims(claims)
    extra |= {"protocol": PROTOCOL_NAMES[settings.protocol], "oracle_parsing": settings.oracle_parsing}
    extra["test_mask_seed"] = TEST_MASKS
    write_results(
        folder, claims, metrics, environment(config, time.perf_counter() - began, settings.device), extra
    )
    return folder


def summary(results: Results) -> str:
    """Every method: its metrics as means over bins and seeds, and the main one of each seed."""
    names = list(first(first(first(results))))
    main_metric = "PSNR hole" if "PSNR hole" in names else "PSNR"
    averages = {name: mean_over(results, name) for name in names}
    rows = []
    for method, seeds in results.items():
        each = [f"{mean([row[main_metric] for row in bins.values()]):.2f}" for bins in seeds.values()]
        rows.append([method, *(averages[name][method] for name in names), " / ".join(each)])
    header = [f"{name} [{UNITS[name]}]" if name in UNITS else name for name in names]
    return format_table(["mean over bins", *header, f"{main_metric} by seed"], rows)


def by_bin(results: Results) -> str:
    """Table A: a table for each metric, every method in every bin, mean over seeds."""
    bins, names = list(first(first(results))), list(first(first(first(results))))
    tables = []
    for name in names:
        rows = [
            [method, *(mean([row[hole][name] for row in seeds.values()]) for hole in bins)]
            for method, seeds in results.items()
        ]
        header = f"{name} [{UNITS[name]}]" if name in UNITS else name
        tables.append(format_table([f"{header}, hole of", *bins], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_main(lambda: print(main(parse(EvalConfig, __doc__))))
