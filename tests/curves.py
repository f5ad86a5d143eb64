"""Loss curves of one process and of two in one group, which must be the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import script
from safetensors.torch import load_file

from shared.runtime import parse_presets


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def run_two(paper: str, folder: Path, *arguments: str) -> Path:
    """Run folder of `train.py ARGUMENTS` on the CPU in two processes, of which one names it."""
    options = (*arguments, "--device", "cpu", "--out", folder / "two")
    done = script(paper, "train.py", *options, two=True, code=0, timeout=180)
    assert done.stdout.splitlines().count(str(folder / "two")) == 1, done.stdout
    return folder / "two"


def run_one(train: Callable, presets: dict, folder: Path, *arguments: str) -> Path:
    """Run folder of the same training in this process."""
    torch.set_num_threads(1)
    argv = [*arguments, "--device", "cpu", "--out", str(folder / "one")]
    return train(parse_presets(presets, "", argv))


def assert_same_curves(a: Path, b: Path, lines: int, rel: float = 1e-4, near: float = 1e-6) -> None:
    """Two runs logged the same numbers, at least `lines` of each, within float tolerance."""
    log, other = log_of(a), log_of(b)
    assert len(log) == len(other) >= lines
    for x, y in zip(log, other, strict=True):
        assert x == pytest.approx(y, rel=rel, abs=near)


def furthest_weights(a: Path, b: Path) -> float:
    """Of the weights in two checkpoints, by the same names."""
    differences = [0.0]
    for path in sorted(a.glob("*.safetensors")):
        mine, its = load_file(path), load_file(b / path.name)
        assert mine.keys() == its.keys()
        differences += [(mine[name].double() - its[name].double()).abs().max().item() for name in mine]
    assert len(differences) > 1
    return max(differences)
