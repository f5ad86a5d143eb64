"""Cross-database evaluation: every run's network on every run's test set.

    python cross_database.py --runs ../runs/irisusformer/ubiris ../runs/irisusformer/miche

Rows are what a network was trained on, columns what it is tested on. Every run remembers its own data set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from irisusformer.protocol import evaluate
from irisusformer.train import PAPER, Config, build, test_set, variants, working_side
from shared.io import find_run, load_config, load_weights
from shared.published import format_table
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class CrossConfig:
    """Which runs to set against each other."""

    runs: tuple[Path, ...]
    """Run folders, one per database."""
    output: Path | None = None
    """JSON file for the numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def label(config: Config) -> str:
    """Name of what a run was trained on; the user's own sets are told by where they are."""
    if config.dataset in ("folder", "csv", "all"):
        return f"{config.dataset}:{config.data_root}"
    return config.dataset if config.dataset != "eyes" else f"eyes:{'+'.join(config.looks)}"


def matrix(folders: list[Path], device_name: str) -> dict[str, dict[str, dict[str, float]]]:
    """trained on -> tested on -> {"e1", "f1", "auroc"} of each run's first network.

    Raises UserError when there are fewer than two runs, or two of the same data.
    """
    if len(folders) < 2:
        raise UserError("--runs: give the folders of at least two runs")
    device = pick_device(device_name)
    configs = [load_config(folder, Config) for folder in folders]
    names = [label(config) for config in configs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs were trained on the same data: {', '.join(names)}")
    tests = {name: test_set(config) for name, config in zip(names, configs, strict=True)}
    result = {}
    for name, config, folder in zip(names, configs, folders, strict=True):
        network, own = next(iter(variants(config).items()))
        model = build(own)
        load_weights(folder, {network: model})
        model.to(device, memory_format=torch.channels_last).eval()
        result[name] = {}
        for other, data in tests.items():
            scores = evaluate(model, data, device, short_side=working_side(own))
            segmentation = scores.segmentation()
            auroc = scores.uncertainty()["auroc"]
            result[name][other] = {"e1": segmentation["e1"], "f1": segmentation["f1"], "auroc": auroc}
    return result


def main() -> None:
    config = parse(CrossConfig, __doc__)
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    result = matrix([find_run(PAPER, run) for run in config.runs], config.device)
    for metric, title in (("e1", "E1, %"), ("f1", "F1, %"), ("auroc", "AUROC of u")):
        rows = [[name, *(cell[metric] for cell in row.values())] for name, row in result.items()]
        print(format_table([f"{title}: trained on", *(f"on {name}" for name in result)], rows), end="\n\n")
    if config.output:
        write_json(config.output, result)
        print(config.output)


if __name__ == "__main__":
    run_main(main)
