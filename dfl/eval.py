"""Evaluate a run: table of methods, claims, probes, sweep over the skew, pictures.

Accuracies are the mean of the last three rounds and of the seeds; nothing is selected on test data. What a
run did not train is left out, and so are the claims that need it.
"""

import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dfl.analysis import (
    background_share,
    bars_figure,
    curves_figure,
    heat,
    matrix_figure,
    probe_samples,
    probes,
    sensitivity,
    sweep_figure,
)
from dfl.claims import domain_claims, engine_claim, skew_claims
from dfl.data import load_data
from dfl.train import Config
from dfl.trials import Trial, load_trial, plan, trial_path
from shared.io import find_run, image_grid, load_config, progress, read_utf8, write_image
from shared.published import (
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    write_results,
)
from shared.runtime import UserError, parse, pick_device, run_main

TARGET = 80.0
"""In-domain accuracy in per cent of the convergence measure `rounds to 80`."""
PROBED = {"dfl", "dfl-no-mi", "dfl-no-diversity", "dfl-neither", "dfl-all-averaged", "fedavg", "fedavg-wide"}
"""Trials whose representations the claims are about; `--probe-all` reads the others too."""
COLUMNS = {
    "in_domain": "in-domain",
    "worst": "worst client",
    "spread": "spread",
    "counterfactual": "counterfactual",
    "counterfactual_transfer": "c. transfer",
    "unseen": "unseen",
    "round3": "round 3",
    "rounds_to_80": "rounds to 80",
    "stability": "stability",
    "bytes_up": "kB up",
    "bytes_down": "kB down",
    "bytes_lent_up": "kB lent up",
    "bytes_lent_down": "kB lent down",
}

RECIPES = ("digits", "mnist")
"""Data whose attribute is drawn by recipe; in the others it is the domain, or what attributes.csv names."""
SWEPT = {"rho": "strength of the skew rho", "fraction": "share of clients in a round"}
"""Settings that a run may sweep over."""


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate."""

    run: Path | None = None
    """Run folder; default: the newest of this paper."""
    probe_all: bool = False
    """Probe the representations of every trial, not only of those that the claims need."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where probes and maps are computed. auto: CUDA when there is one."""


def read_log(folder: Path) -> dict[str, dict[str, list[float]]]:
    """log.jsonl -> {trial label: {scalar: values by round}}. Raises UserError when it is missing or
    damaged."""
    path = folder / "log.jsonl"
    series: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(read_utf8(path, "a log").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue  # half a line, of a run that was killed while it wrote
        try:
            for key, value in json.loads(line).items():
                if key not in ("step", "round"):
                    trial, seed, scalar = key.split("/", 2)
                    series[f"{trial}/{seed}"][scalar].append(float(value))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} is none of a log ({error}); train again with --restart"
            ) from None
    return series


def summarise(log: dict[str, list[float]]) -> dict[str, float]:
    """The numbers of one training: means of the last three rounds, and how it got there."""
    course = log["in_domain"]
    mean = {name: statistics.fmean(log[name][-3:]) for name in COLUMNS if name in log}
    return mean | {
        "round3": course[min(2, len(course) - 1)],
        "rounds_to_80": next((i for i, value in enumerate(course, 1) if value >= TARGET), len(course) + 1),
        "stability": statistics.pstdev(course[-8:]),
        **{name: statistics.fmean(log[name]) / 1000 for name in mean if name.startswith("bytes")},
    }


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds of each number."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def probe_table(
    folder: Path, trials: list[Trial], everything: bool, device: torch.device
) -> dict[str, dict[str, float]]:
    """{trial: {"z_c label": ...}}, mean over seeds."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    wanted = [trial for trial in trials if everything or trial.name in PROBED]
    for trial in progress(wanted, "probes"):
        method, net, states, *_ = load_trial(folder, trial, device)
        data = load_data(trial.config, trial.config.seed).to(device)
        rows[trial.name].append(probes(method, net, states, data))
    return {name: average(found) for name, found in rows.items()}


def draw_maps(folder: Path, trial: Trial, device: torch.device) -> dict[str, float]:
    """samples/maps.png: where each branch of client 0 looks; returns the background's share of each map, in
    per cent, where images have a background that can be told from the rest: on coloured digits."""
    method, net, states, *_ = load_trial(folder, trial, device)
    data = load_data(trial.config, trial.config.seed)
    samples = probe_samples(data)
    shown = data.prepare(samples.images[:10]).to(device)
    maps = {
        name: sensitivity(represent, net, states[0], shown).cpu()
        for name, represent in method.representations.items()
    }
    raw = samples.images[:10].float()
    raw = raw / 255 if samples.images.dtype == torch.uint8 else raw.clamp(0, 1)
    tiles = [*raw, *(tile for each in maps.values() for tile in heat(each))]
    scale = max(1, 64 // raw.shape[-1])
    rows = ["image", *maps]
    write_image(folder / "samples" / "maps.png", image_grid(tiles, len(raw), row_labels=rows, scale=scale))
    if trial.config.data not in RECIPES or trial.config.style != "coloured":
        return {}
    ink = raw.amin(1)  # the background has a saturated colour: its smallest channel is dark
    return {f"{name} on background": background_share(each, ink) * 100 for name, each in maps.items()}


def limits(table: dict[str, dict[str, float]], sweep: dict[str, dict[str, dict[float, float]]]) -> list[str]:
    """What does not speak for the method, from the same numbers."""
    lines = []
    dfl, fedavg = table.get("dfl", {}), table.get("fedavg", {})
    if "counterfactual" in dfl and "counterfactual" in fedavg:
        lines.append(
            f"On purely counterfactual images FedAvg reaches {fedavg['counterfactual']:.1f} %, DFL "
            f"{dfl['counterfactual']:.1f} % ({dfl['counterfactual_transfer']:.1f} % in transfer mode); on an "
            f"unseen client {fedavg['unseen']:.1f} against {dfl['unseen']:.1f} %."
        )
    course = sweep.get("in_domain", {})
    if {"dfl", "fedavg"} <= course.keys():
        points = ", ".join(
            f"rho {rho:g}: {course['dfl'][rho]:.1f} against {course['fedavg'][rho]:.1f}"
            for rho in course["dfl"]
            if rho in course["fedavg"]  # in a run that has not ended one of the two may be missing
        )
        lines.append(
            f"In-domain accuracy of DFL against FedAvg by strength of the skew, first seed: {points}."
        )
    if dfl and "dfl-no-max-mi" in table:
        lines.append(
            f"Without the max-MI term in-domain accuracy is {table['dfl-no-max-mi']['in_domain']:.1f} %, "
            f"with it {dfl['in_domain']:.1f} %."
        )
    for trial, joint in (
        ("dfl-one-stage", "One joint stage with as many passes over the data"),
        ("dfl-one-pass", "One joint pass, which moves each extractor as often as two stages do,"),
    ):
        row = table.get(trial, {})
        if "counterfactual" in dfl and "counterfactual" in row:
            lines.append(
                f"{joint} gives {row['in_domain']:.1f} % in-domain and {row['counterfactual']:.1f} % "
                f"counterfactual, alternating stages {dfl['in_domain']:.1f} and "
                f"{dfl['counterfactual']:.1f} %."
            )
    return lines


def sweep_table(
    trials: list[Trial], rows: dict[str, dict[str, float]], config: Config, setting: str
) -> dict[str, dict[str, dict[float, float]]]:
    """{number: {trial: {value of `setting`: number}}} with the first seed, the run's own value included."""
    result: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for trial in trials:
        own = trial.swept is None and trial.config.seed == config.seed
        if (own or trial.swept == setting) and trial.name in config.sweep_trials and trial.label in rows:
            for number in ("in_domain", "counterfactual"):
                if number in rows[trial.label]:
                    value = getattr(trial.config, setting)
                    result[number][trial.name][value] = rows[trial.label][number]
    return {
        number: {name: dict(sorted(points.items())) for name, points in series.items()}
        for number, series in result.items()
    }


def evaluate_run(options: EvalConfig) -> Path:
    """Read a run, print and write everything; returns the run folder."""
    begin, device = time.perf_counter(), pick_device(options.device)
    folder = find_run("dfl", options.run)
    config: Config = load_config(folder, Config)
    trials = [trial for trial in plan(config) if trial_path(folder, trial).is_file()]
    if not trials:
        raise UserError(f"{folder}: no trial has finished yet; run train.py to its end")
    log = read_log(folder)
    for trial in trials:
        if not {"in_domain", "bytes_up", "bytes_down"} <= log[trial.label].keys():
            raise UserError(
                f"{folder / 'log.jsonl'}: no lines of {trial.label}, which is trained; train again "
                "with --restart"
            )
    rows = {trial.label: summarise(log[trial.label]) for trial in trials}
    grouped: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.swept is None:
            grouped[trial.name].append(trial)
    table = {name: average([rows[trial.label] for trial in group]) for name, group in grouped.items()}
    main = [trial for group in grouped.values() for trial in group]
    probed = probe_table(folder, main, options.probe_all, device)
    table = {name: {**row, **probed.get(name, {})} for name, row in table.items()}
    swept = [name for name, values in (("rho", config.sweep), ("fraction", config.fractions)) if values]
    sweeps = {setting: sweep_table(trials, rows, config, setting) for setting in swept}
    sweep = sweeps.get("rho", {})

    samples = folder / "samples"
    curves = {
        name: [
            statistics.fmean(values)
            for values in zip(*(log[t.label]["in_domain"] for t in group), strict=False)
        ]
        for name, group in grouped.items()
    }
    write_image(samples / "curves.png", curves_figure(curves))
    bars = {
        name: {COLUMNS[c]: row[c] for c in ("in_domain", "worst", "counterfactual") if c in row}
        for name, row in table.items()
    }
    write_image(samples / "accuracies.png", bars_figure(bars, "Accuracy by method"))
    if probed:
        write_image(samples / "probes.png", matrix_figure(probed, "Linear probes [%]"))
    for setting, tables in sweeps.items():
        for number, series in tables.items():
            picture = sweep_figure(series, number.replace("_", "-"), SWEPT[setting])
            write_image(samples / f"{setting}_{number}.png", picture)
    looks = draw_maps(folder, grouped["dfl"][0], device) if "dfl" in grouped else {}

    made_by_recipe = config.data in RECIPES
    found = [*(skew_claims(table) if made_by_recipe else domain_claims(table)), engine_claim()]
    dataset = f"{config.style} {config.data}" if made_by_recipe else config.data
    metrics = [
        Metric("methods", name, COLUMNS.get(number, number), unit(number), value, dataset, False, name)
        for name, row in table.items()
        for number, value in row.items()
        if not math.isnan(value)
    ]
    metrics += [
        Metric(f"sweep over {setting}", f"{setting} {x:g}", COLUMNS[number], "%", value, dataset, False, name)
        for setting, tables in sweeps.items()
        for number, series in tables.items()
        for name, points in series.items()
        for x, value in points.items()
    ]
    metrics += [
        Metric("maps", "client 0", name, "%", value, dataset, False, "dfl") for name, value in looks.items()
    ]

    shown = [number for number in COLUMNS if any(number in row for row in table.values())]
    planned = len(plan(config))
    if len(trials) < planned:
        print(f"{len(trials)} of {planned} trainings have finished: means are over the seeds that are there")
    print(f"{dataset}: mean of the last three rounds and of the seeds, accuracies in %")
    print(
        format_table(
            ["method", "seeds", *(COLUMNS[number] for number in shown)],
            [
                [name, len(grouped[name]), *(row.get(number) for number in shown)]
                for name, row in table.items()
            ],
        )
    )
    print(
        f"rounds to {TARGET:.0f}: of in-domain accuracy, {config.rounds + 1} where it is never reached; "
        "stability: standard deviation\nof the last eight rounds; kB: per client and round"
    )
    heads = list(dict.fromkeys(number for row in probed.values() for number in row))
    if probed:
        kind = "counterfactual images" if made_by_recipe else "all clients' test images"
        print(f"\nlinear probes on {kind}, accuracy in %")
        print(
            format_table(
                ["method", *heads], [[name, *(row.get(h) for h in heads)] for name, row in probed.items()]
            )
        )
    for name, points in sweeps.get("fraction", {}).get("in_domain", {}).items():
        course = ", ".join(f"{x:g}: {value:.1f}" for x, value in points.items())
        print(f"in-domain accuracy of {name} by share of participants: {course}")
    for name, value in looks.items():
        print(f"sensitivity of {name}: {value:.0f} %")
    print()
    print_claims(found)
    for line in limits(table, sweep):
        print(f"limit: {line}")
    published = load_published("dfl")
    own = [row for row in published["rows"] if not row["setting"].startswith("context")]
    print(f"\nDFL's own published tables: {f'{len(own)} rows' if own else 'not available'}")
    if own:
        keys = ["table", "setting", "dataset", "protocol", "method", "metric", "unit", "value", "source"]
        print(format_table(keys, [[row.get(key) for key in keys] for row in own]))
        print("nothing here was measured under their data and protocol, so they are not set beside the above")
    else:
        print(published["note"])
    seconds = time.perf_counter() - begin
    write_results(
        folder, found, metrics, environment(config, seconds), {"limits": limits(table, sweep), "table": table}
    )
    return folder


def unit(number: str) -> str:
    """Unit of a number of the table."""
    if number.startswith("bytes"):
        return "kB per client and round"
    return "rounds" if number == "rounds_to_80" else "%"


if __name__ == "__main__":
    run_main(lambda: print(evaluate_run(parse(EvalConfig, __doc__))))
