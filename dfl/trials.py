"""The trainings of a run: which ones, what each changes, and how a finished one is kept and read back."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dfl.baselines import build_method
from dfl.client import Method, local_part
from dfl.data import ClientData, Federated, Samples
from dfl.engine import State, part
from dfl.federation import Federation, move
from shared.records import write_tensors
from shared.runtime import UserError
from shared.weights import load_state, load_torch

if TYPE_CHECKING:
    from dfl.train import Config

TRIALS: dict[str, dict] = {
    "dfl": {},
    "local": {"method": "local"},
    "fedavg": {"method": "fedavg"},
    "fedprox": {"method": "fedprox", "mu": 0.1},
    "fedbn": {"method": "fedbn"},
    "fedper": {"method": "fedper"},
    "fedrep": {"method": "fedrep"},
    "scaffold": {"method": "scaffold"},
    "moon": {"method": "moon", "mu": 1.0},
    "ditto": {"method": "ditto", "mu": 0.1},
    "fedproto": {"method": "fedproto", "mu": 1.0},
    "fedavg-wide": {"method": "fedavg", "wide": True},
    "fedper-wide": {"method": "fedper", "wide": True},
    "dfl-shuffle": {"pairing": "shuffle"},
    "dfl-prototypes": {"source": "prototypes"},
    "dfl-club": {"mi": "club", "lambda_min": 0.05},
    "dfl-no-min-mi": {"lambda_min": 0.0},
    "dfl-no-max-mi": {"lambda_max": 0.0},
    "dfl-no-mi": {"mi": "none"},
    "dfl-no-diversity": {"source": "none"},
    "dfl-neither": {"mi": "none", "source": "none"},
    "dfl-local-head": {"share_head": False},
    "dfl-all-averaged": {"aggregate": "all"},
    "dfl-one-stage": {"schedule": "joint"},
    "dfl-one-pass": {"schedule": "joint_once"},
    "dfl-two-epochs": {"local_epochs": 2},
    "dfl-half": {"fraction": 0.5},
    "fedavg-half": {"method": "fedavg", "fraction": 0.5},
    "fedavg-wide-half": {"method": "fedavg", "wide": True, "fraction": 0.5},
    "fedper-half": {"method": "fedper", "fraction": 0.5},
}
"""Row of the result table -> what it changes in the configuration. `-half`: half of the clients in each
round."""

CLAIMS = (
    "dfl", "fedavg", "fedavg-wide", "fedper", "dfl-no-mi", "dfl-no-diversity", "dfl-neither",
    "dfl-all-averaged", "dfl-half", "fedavg-half",
)  # fmt: skip
"""The trials that the claims C1 to C8 compare."""


@dataclass(frozen=True)
class Trial:
    """One training: a row of the table with one seed, or a point of a sweep over the setting `swept`. `label`
    names its files and its lines in the log."""

    name: str
    label: str
    config: "Config"
    swept: Literal["rho", "fraction"] | None = None


def plan(config: "Config") -> list[Trial]:
    """All trials of a run in their order. Raises UserError for none, an unknown one, and one named twice."""
    if not config.trials:
        raise UserError(f"--trials: name at least one of {', '.join(TRIALS)}")
    unknown = sorted({*config.trials, *config.sweep_trials} - TRIALS.keys())
    if unknown:
        raise UserError(f"unknown trial '{unknown[0]}'; there are {', '.join(TRIALS)}")
    trials = []
    for seed in range(config.seed, config.seed + config.seeds):
        for name in config.trials:
            trials.append(
                Trial(name, f"{name}/{seed}", dataclasses.replace(config, seed=seed, **TRIALS[name]))
            )
    points = [("rho", f"{value:g}", value) for value in config.sweep]
    points += [("fraction", f"fraction{value:g}", value) for value in config.fractions]
    for setting, point, value in points:
        for name in config.sweep_trials:
            changed = dataclasses.replace(config, **{**TRIALS[name], setting: value})
            trials.append(Trial(name, f"{name}@{point}/{config.seed}", changed, setting))
    labels = [trial.label for trial in trials]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--trials, --sweep, --fractions, --sweep-trials: they name {label} twice")
    return trials


def trial_path(folder: Path, trial: Trial) -> Path:
    """The weights of a finished trial in a run folder."""
    return folder / "trials" / f"{trial.label.replace('/', '-')}.safetensors"


def load_trial(
    folder: Path, trial: Trial, device: torch.device | str = "cpu"
) -> tuple[Method, nn.Module, list[State], Federated, list[int]]:
    """A finished trial: its method, an empty network and every client's personal model on `device`, its
    federation without samples, and the numbers of the clients that have trained. Raises UserError when the
    trial was not trained, and when its file is damaged or foreign or holds NaN."""
    path = trial_path(folder, trial)
    tensors = load_torch(path)
    empty = torch.zeros(0, dtype=torch.int64)
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        none = Samples(torch.zeros(0, *facts["image_shape"]), empty, empty)
        classes = tuple(facts["classes"])
        data = Federated(
            trial.config.data,
            len(classes),
            0,
            [ClientData(k, name, none, none) for k, name in enumerate(facts["clients"])],
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            class_names=classes,
        )
        data.prepare(none.images)
        method = build_method(trial.config, data)
        trained = [range(len(data.clients))[k] for k in facts["trained"]]
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a trial of this version ({error!r}); train again") from None
    unusable = [name for name, value in tensors.items() if not value.isfinite().all()]
    if unusable:
        raise UserError(f"{path}: NaN or infinity in {unusable[0]}; train again with --restart")
    net = method.build().eval()
    states = [{**part(tensors, f"client{k}"), **part(tensors, "shared")} for k in range(len(data.clients))]
    for state in states:
        load_state(net, state, path, prefixes=())
    return method, net.to(device), move(states, device), data, trained


def save_trial(folder: Path, trial: Trial, federation: Federation) -> None:
    """Write the global part (`shared.*`) and each client's own part (`client<k>.*`)."""
    tensors = {f"shared.{name}": value for name, value in federation.shared.items()}
    for k, client in enumerate(federation.clients):
        own = local_part(client.state, federation.method.shared)
        tensors |= {f"client{k}.{name}": value for name, value in own.items()}
    data = federation.data
    facts = {
        "image_shape": data.image_shape,
        "classes": data.class_names or tuple(str(label) for label in range(data.classes)),
        "clients": tuple(client.name for client in data.clients),
        "trained": sorted(federation.trained),
        "mean": data.mean,
        "std": data.std,
    }
    # What predict.py needs beside the weights, so that it can do without the data set.
    metadata = {"facts": json.dumps(facts)}
    tensors = {name: value.clone() for name, value in tensors.items()}
    write_tensors(trial_path(folder, trial), tensors, metadata)
