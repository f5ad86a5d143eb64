"""Score detectors and creators as the contest did.

    python eval.py                                    the newest run on its embedded contest, claims included
    python eval.py --dfgc /datasets/DFGC-2022 --preds a.txt b.txt c.txt --weights 0.2 0.3 0.5
    python eval.py --dfgc /datasets/DFGC-2022 --run ../runs/dfgc2022/paper-0 --boxes mtcnn

Prints the tables and writes results.json and pictures into the run folder or, with --dfgc, --out.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dfgc2022 import contest as scoring
from dfgc2022.boxes import Rule
from dfgc2022.creation import Definition, clip_realism, published_rows, read_ratings
from dfgc2022.datasets import dfgc2022
from dfgc2022.demo import evaluate_demo
from dfgc2022.pipeline import Average, Scorer, Settings, score_videos
from dfgc2022.protocol import fuse, require_weights, write_submission
from dfgc2022.realism import predict_unrated
from dfgc2022.train import Config as TrainConfig
from dfgc2022.train import load_members
from shared.io import find_run, load_config, runs_root
from shared.published import (
    environment,
    format_table,
    load_published,
    print_claims,
    print_metrics,
    write_results,
)
from shared.ranges import Count, Natural
from shared.runtime import RunConfig, UserError, parse, pick_device, run_main

RELEASED = {"Public": (829, 1399), "Private-1": (766, 1400)}
"""Real and fake clips of the released parts (paper, Table 1)."""


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    run: Path | None = None
    """Run folder. None: the newest one, unless --preds are given."""
    dfgc: Path | None = None
    """Root of the DFGC 2022 release (or of clips in its layout). None: the run's embedded contest."""
    preds: tuple[Path, ...] = ()
    """Submission files (`name, probability` lines) to score on --dfgc."""
    weights: tuple[float, ...] = ()
    """Fuse the submissions with these weights, in their order, beside weights searched on Public; 0.2 0.3
    0.5 are the winner's for Swin, ConvNeXt (epoch 10) and ConvNeXt (epoch 30). Embedded contest: the
    ensembles' weights, by default the winner's.
    """
    ratings: Path | None = None
    """Ratings table for the creation track: submission,clip,rater,realism,mouth,quality,expression,id. With
    --run, the realism of submissions without ratings is predicted from those with, and labelled so.
    """
    anti_detection: Definition = "auc10"
    """Definition of the anti-detection term; the one that was run is not documented."""
    boxes: str = "auto"
    """Face boxes for --dfgc with --run: auto, mtcnn, haar, skin, or the path of a .csv or .onnx file."""
    every: Count = 10
    """Frames whose index is divisible by this are scored."""
    crop: Rule = "winner"
    """Crop arithmetic, that of the crops which the run was trained on; see extract.py."""
    faces: Literal["best", "max", "mean"] = "best"
    """Several faces in a frame: the most probable one, or the largest or mean score."""
    average: Average = "mean"
    """Frames to video: the contest's mean, or weighted by how sure each frame is."""
    draws: Count = 500
    """Bootstrap draws of the confidence intervals."""
    workers: Natural = 0
    """Processes that read videos."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """Folder of the results on --dfgc. None: the run's, or runs/dfgc2022-contest for --preds alone."""


OF_A_RELEASE = ("preds", "ratings", "boxes", "every", "crop", "faces", "average", "out")
"""Settings for --dfgc alone: an embedded contest has clips, ratings, boxes and a folder of its own."""


def main(config: Config) -> None:
    begin = time.perf_counter()
    if config.dfgc is None:
        given = [name for name in OF_A_RELEASE if getattr(config, name) != getattr(Config(), name)]
        if given:
            raise UserError(
                f"--{given[0]} needs --dfgc, the clips with their labels; leave it out or give both"
            )
        folder = find_run("dfgc2022", config.run)
        settings = load_config(folder, TrainConfig)
        if not (folder / "world" / "world.json").exists():
            raise UserError(
                f"{folder}: was not trained on the embedded contest; say what to score with --dfgc"
            )
        claims, metrics, extra = evaluate_demo(folder, settings, config)
    else:
        folder, settings, claims = config.out or runs_root() / "dfgc2022-contest", RunConfig(), []
        if config.run is not None:
            folder = config.out or find_run("dfgc2022", config.run)
            settings = load_config(find_run("dfgc2022", config.run), TrainConfig)
        metrics, extra = evaluate_contest(folder, settings, config)
    print()
    published = load_published("dfgc2022")
    if claims:
        print_claims(claims)
        print()
    if any(metric.comparable for metric in metrics):  # the published ones of the same clips stand above
        others = [row for row in published["rows"] if row["table"] != "detection top-3"]
        published = {**published, "rows": others}
    print_metrics([metric for metric in metrics if metric.table in SHOWN or metric.comparable], published)
    write_results(
        folder, claims, metrics, environment(settings, time.perf_counter() - begin, config.device), extra
    )
    print(folder)


SHOWN = ("detection top-3", "robustness", "predicted realism", "fusion", "frames to video")
"""Tables shown again beside the published ones; results.json holds all."""


def evaluate_contest(folder: Path, settings: RunConfig, config: Config):
    """Score submissions and, with a run, its members on clips in the layout of the release."""
    found = dfgc2022(config.dfgc)
    terms = read_ratings(config.ratings) if config.ratings else {}  # before any video is read
    folder.mkdir(parents=True, exist_ok=True)
    submissions = scoring.read_submissions(config.preds, found.clips)
    scorer, pipeline = None, Settings(config.boxes, config.every, config.crop, config.faces, config.average)
    networks = load_members(find_run("dfgc2022", config.run), settings) if config.run is not None else {}
    twice = sorted(networks.keys() & submissions.keys())
    if twice:
        raise UserError(f"--preds: {twice[0]} is also the name of a detector of the run; rename the file")
    if config.weights and "fusion" in submissions:
        raise UserError("--preds: fusion is the name of the weighted mean of the others; rename the file")
    if not networks and not submissions:
        raise UserError("nothing to score: give --run, or --preds that can be read")
    weights = fusion_weights(config, len(submissions), len(networks))
    if networks:
        device = pick_device(config.device)
        scorer = Scorer(networks, device, bf16=device.type == "cuda")
        videos = [found.paths[clip.name] for clip in found.clips]
        made = score_videos(
            videos,
            scorer,
            pipeline,
            folder / "scores.jsonl",
            workers=config.workers,
        )
        for clip in made:
            if clip.note:
                print(f"warning: {clip.note}")
        for name in scorer.networks:
            submissions[name] = {clip.name: clip.score[name] for clip in made}
            write_submission(folder / f"{name}.txt", submissions[name])
    members = list(submissions.values())
    if weights:
        fused, warnings = fuse(members, weights)
        print("".join(f"warning: {warning}\n" for warning in warnings), end="")
        submissions["fusion"] = fused
        write_submission(folder / "fusion.txt", fused)
    complete = all(
        (
            sum(c.part == part and c.label == 0 for c in found.clips),
            sum(c.part == part and c.label for c in found.clips),
        )
        == counts
        for part, counts in RELEASED.items()
    )
    contest = scoring.Contest(
        found.clips, submissions, "DFGC-2022" if complete else config.dfgc.name, complete
    )
    metrics, crossed = scoring.score_detection(contest, config.draws)
    scoring.draw_pictures(folder / "samples", contest, crossed)
    if 2 <= len(members) <= 5:  # the grid of weights grows as 11^(members - 1)
        even = (1 / len(members),) * len(members)
        metrics += scoring.fusion_choices(contest, members, weights or even)
    elif len(members) > 5:
        print(f"\nfusion weights are not searched for {len(members)} detectors, only for up to 5")
    if complete:
        print_published()
    if config.ratings:
        predicted = None
        if scorer is not None:
            unrated = {clip.creator for clip in found.clips if clip.creator} - terms.keys()
            rated = clip_realism(config.ratings)
            predicted = predict_unrated(found.clips, found.paths, rated, unrated, scorer, pipeline)
        _, more = scoring.score_creation(contest, terms, config.anti_detection, predicted)
        metrics += more
    return metrics, {"matrix": vars(crossed) if crossed else None}


def fusion_weights(config: Config, readable: int, networks: int) -> tuple[float, ...]:
    """--weights for the submissions that could be read and the detectors of the run. None, and a warning,
    where one was meant for a submission that could not be read. Raises UserError on a wrong number or sum.
    """
    bad = len(config.preds) - readable
    if config.weights and bad and len(config.weights) == len(config.preds) + networks:
        print(f"warning: no fusion: {bad} of its {len(config.weights)} members could not be read")
        return ()
    if config.weights:
        require_weights(config.weights, readable + networks)
    return config.weights


def print_published() -> None:
    """The published leaderboard and creation table, for the released clips."""
    published = load_published("dfgc2022")
    cells: dict[str, dict[str, float]] = {}
    for row in published["rows"]:
        if row["table"] == "detection top-3":
            cells.setdefault(row["method"], {})[row["dataset"]] = row["value"]
    parts = list(next(iter(cells.values())))
    print("\npublished AUC on the same clips (Private-2 was never released)")
    print(format_table(["team", *parts], [[team, *row.values()] for team, row in cells.items()]))
    rows, sums = published_rows(published, "creation round 3")
    worst = float(np.max([abs(row.total - sums[row.submission]) for row in rows]))
    print(f"published creation sums add up to within {worst:.3f} in {len(rows)} rows")


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
