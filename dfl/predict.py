"""Classify your own images with a client's model, or with all of them, of a trained federation.

Writes predictions.json (class and probabilities of each file) and predictions.png.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from dfl.engine import State, call, part
from dfl.federation import transfer
from dfl.train import Config
from dfl.trials import Trial, load_trial, plan
from shared.io import (
    find_run,
    image_grid,
    images_of,
    keep_inputs,
    load_config,
    progress,
    read_image,
    write_image,
)
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

BATCH = 64
"""Images that are read and classified at once."""


@dataclass(frozen=True)
class PredictConfig:
    """Which model, and on what."""

    images: tyro.conf.Positional[Path]
    """An image file, or a folder of them."""
    run: Path | None = None
    """Run folder; default: the newest of this paper."""
    trial: str = "dfl"
    """Row of the table whose weights are used (first seed)."""
    mode: Literal["personal", "transfer", "invariant"] = "personal"
    """One client's own model; the mean prediction of the models of all clients that have trained (for a
    domain nobody has); or z_s replaced by zeros (a diagnosis of the invariant branch)."""
    client: int = 0
    """Number of the client, for `personal` and `invariant`."""
    out: Path = Path("predictions")
    """Folder for the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def main(options: PredictConfig) -> Path:
    """Predict all images; returns the output folder."""
    folder = find_run("dfl", options.run)
    config: Config = load_config(folder, Config)
    everything = {trial.name: trial for trial in reversed(plan(_with(config, options.trial)))}
    trial: Trial = everything[options.trial]
    device = pick_device(options.device)
    method, net, states, data, trained = load_trial(folder, trial, device)
    if not 0 <= options.client < len(states):
        names = ", ".join(client.name for client in data.clients)
        raise UserError(f"--client {options.client}: the clients are {names} (numbers from 0)")
    if options.mode == "invariant" and trial.config.method != "dfl":
        raise UserError(f"--mode invariant: {options.trial} has no invariant branch")
    paths = images_of(options.images)
    table, picture = options.out / "predictions.json", options.out / "predictions.png"
    keep_inputs(paths, (table, picture))
    options.out.mkdir(parents=True, exist_ok=True)
    height, width = data.image_shape[1:]

    def read(path: Path) -> Tensor:
        image = F.interpolate(read_image(path)[None], (height, width), mode="bilinear", antialias=True)
        return image[0].clamp(0, 1)

    @torch.inference_mode()
    def classify(batch: list[Path]) -> Tensor:
        x = data.prepare(torch.stack([read(path) for path in batch]).to(device))
        if options.mode == "transfer":
            return transfer([method.predict(net, state, x) for state in states], trained)
        if options.mode == "personal":
            return method.predict(net, states[options.client], x).softmax(-1)
        return without_specific(net, states[options.client], x).softmax(-1)

    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    probabilities = torch.cat([classify(batch) for batch in progress(batches, "images")]).cpu()
    best = probabilities.argmax(-1).tolist()
    write_json(
        table,
        [
            {
                "file": path,
                "class": data.class_names[best[i]],
                "probabilities": dict(zip(data.class_names, probabilities[i].tolist(), strict=True)),
            }
            for i, path in enumerate(paths)
        ],
    )
    shown = min(len(paths), 16)
    labels = [f"{data.class_names[best[i]]} {probabilities[i].max():.0%}" for i in range(shown)]
    scale = max(1, 96 // width)
    sheet = image_grid(
        [read(path) for path in paths[:shown]], columns=shown, column_labels=labels, scale=scale
    )
    write_image(picture, sheet)
    return options.out


def _with(config: Config, trial: str) -> Config:
    """The run's configuration, asked for this trial too (its weights may still be missing)."""
    return config if trial in config.trials else Config(**{**vars(config), "trials": (trial,)})


def without_specific(net: torch.nn.Module, state: State, x: Tensor) -> Tensor:
    """Logits with zeros in the place of z_s."""
    z_c = call(net.invariant, part(state, "invariant"), x)
    return call(net.head, part(state, "head"), torch.cat([torch.zeros_like(z_c), z_c], -1))


if __name__ == "__main__":
    run_main(lambda: print(main(parse(PredictConfig, __doc__))))
