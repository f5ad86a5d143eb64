"""Reading the released files, and the self-check that says what in them fits.

python -m faceswapper.weights faceswapper.ckpt model_ir_se50.pth wing.ckpt
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from shared.published import format_table
from shared.runtime import UserError, parse, run_main
from shared.weights import load_torch

WRAPPERS = ("state_dict", "model", "params")
"""Entries that hold a whole state dict in files written by others."""
NETWORKS = ("generator", "discriminator", "face_model", "fan")


class Comparison(NamedTuple):
    """How a file's names fit a network's."""

    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]


def states_of(path: Path | str) -> dict[str, dict[str, Tensor]]:
    """A released file -> its state dicts by network name; "" for a file that is one state dict.

    Prefixes `module.` are taken off. Raises UserError on a damaged or foreign file.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no state dict")
    named = {name: content[name] for name in NETWORKS if isinstance(content.get(name), dict)}
    if not named:
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
        named = {"": inner}
    found = {}
    for name, state in named.items():
        tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        if not tensors:
            raise UserError(f"{path}: holds no tensors; expected a released FaceSwapper file")
        whole = all(key.startswith("module.") for key in tensors)
        found[name] = {key.removeprefix("module.") if whole else key: v for key, v in tensors.items()}
    return found


def compare(network: nn.Module, state: dict[str, Tensor]) -> Comparison:
    """Names of `state` against those of `network`."""
    wanted = network.state_dict()
    shapes = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    missing = [key for key in wanted if key not in state]
    return Comparison(missing, [key for key in state if key not in wanted], shapes)


def read_official(name: str, network: nn.Module, path: Path | str) -> dict[str, Tensor]:
    """The part of a released file that `network` takes. UserError when something is missing or does not
    fit."""
    states = states_of(path)
    state = states.get(name, states.get(""))
    if state is None:
        raise UserError(f"{path}: has no entry {name!r}; it holds {', '.join(states)}")
    found = compare(network, state)
    faults = [f"{key} is missing" for key in found.missing] + found.other_shape
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path}: does not fit the network {name!r}: {'; '.join(faults[:5])}{more}")
    wanted = network.state_dict()
    return {key: state[key].to(value.dtype) for key, value in wanted.items()}


@dataclass(frozen=True)
class CheckConfig:
    """Released files to check."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """faceswapper.ckpt, model_ir_se50.pth, wing.ckpt or training checkpoints."""


def check(path: Path) -> list[dict]:
    """One row for each network that a file holds: names that fit, are missing, surplus, of another shape."""
    from faceswapper.model import OFFICIAL, official  # noqa: PLC0415 - model.py reads its files through here

    rows = []
    for name, state in states_of(path).items():
        candidates = [name] if name else list(OFFICIAL)
        with torch.device("meta"):
            compared = {each: compare(official(each), state) for each in candidates}
        best = min(compared, key=lambda each: len(compared[each].missing) + len(compared[each].other_shape))
        found = compared[best]
        row = {"file": path.name, "network": best, "names": len(state), "missing": len(found.missing)}
        row |= {"surplus": len(found.unexpected), "other shape": len(found.other_shape)}
        row["fits"] = not found.missing and not found.other_shape
        rows.append(row)
    return rows


def main(config: CheckConfig) -> None:
    """Print the table. UserError when a file does not fit any released network."""
    rows = [row for path in config.files for row in check(path)]
    keys = list(rows[0])
    print(format_table(keys, [[row[key] for key in keys] for row in rows]))
    bad = [f"{row['file']} ({row['network']})" for row in rows if not row["fits"]]
    if bad:
        raise UserError(f"these do not fit: {', '.join(bad)}")


if __name__ == "__main__":
    run_main(lambda: main(parse(CheckConfig, __doc__)))
