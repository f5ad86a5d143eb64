"""The embedded contest evaluated: what the run's detectors score, and whether the paper's findings show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfgc2022 import contest as scoring
from dfgc2022.creation import DEFINITIONS, anti_detection, clip_realism, published_rows, read_ratings
from dfgc2022.datasets import TestSet, dfgc2022
from dfgc2022.pipeline import ClipScore, Scorer, Settings, frames_to_video, score_videos
from dfgc2022.protocol import (
    FUSION,
    POOLED,
    Clip,
    Matrix,
    arrays,
    fuse,
    write_submission,
)
from dfgc2022.realism import RealismModel, agreement, clip_features
from dfgc2022.robustness import CHANGES, attacked_score, change_videos
from dfgc2022.train import TEAMS, load_members
from dfgc2022.train import Config as TrainConfig
from dfgc2022.video import read_frames
from dfgc2022.world import CREATORS
from shared.io import image_grid, progress, write_image
from shared.metrics import auc
from shared.published import Claim, Metric, load_published
from shared.runtime import UserError, pick_device

DATA = "embedded contest"
TRAINED, UNSEEN = CREATORS[:3], CREATORS[3:]


def evaluate_demo(folder: Path, settings: TrainConfig, config: Any) -> tuple[list[Claim], list[Metric], dict]:
    """Claims, numbers and tables of a run on its embedded contest; writes submissions and pictures beside it.

    config: eval.py's settings. Raises UserError when the run lacks a whole team.
    """
    if not set(TEAMS["diverse"]) <= set(settings.members):
        raise UserError(f"{folder}: the embedded contest needs the members {', '.join(TEAMS['diverse'])}")
    world = folder / "world"
    found = dfgc2022(world)
    pipeline = Settings(str(world / "boxes.csv"), settings.world.every)
    scorer = Scorer(load_members(folder, settings), pick_device(config.device))
    videos = [found.paths[clip.name] for clip in found.clips]
    made = score_videos(videos, scorer, pipeline, folder / "scores.jsonl", workers=config.workers)
    submissions = {name: {clip.name: clip.score[name] for clip in made} for name in scorer.networks}
    teams = {name: members for name, members in TEAMS.items() if set(members) <= set(submissions)}
    weights = config.weights or FUSION
    for name, members in teams.items():
        submissions[f"{name}-ensemble"], _ = fuse([submissions[member] for member in members], weights)
    (folder / "submissions").mkdir(exist_ok=True)
    for name, scores in submissions.items():
        write_submission(folder / "submissions" / f"{name}.txt", scores)
    contest = scoring.Contest(found.clips, submissions, DATA)
    metrics, crossed = scoring.score_detection(contest, config.draws)
    scoring.draw_pictures(folder / "samples", contest, crossed)
    areas = {name: part_aucs(found.clips, scores) for name, scores in submissions.items()}
    diverse = {name: submissions[name] for name in TEAMS["diverse"]}
    team = Scorer({name: scorer.networks[name] for name in TEAMS["diverse"]}, scorer.device)
    realism, predicted = predict_realism(found, team, pipeline, world / "ratings.csv")
    rows, more = scoring.score_creation(
        scoring.Contest(found.clips, diverse, DATA),
        read_ratings(world / "ratings.csv"),
        config.anti_detection,
        predicted,
    )
    metrics += realism + more + scoring.fusion_choices(contest, list(diverse.values()), weights)
    metrics += robustness(found, team, pipeline, folder / "changed", weights)
    metrics += confidence_weighting(found.clips, made, weights)
    draw_clips(folder / "samples" / "clips.png", found, settings.world.every)
    claims = demo_claims(found.clips, submissions, areas, crossed)
    return (
        claims,
        metrics,
        {"matrix": vars(crossed), "creation": rows, "notes": [c.note for c in made if c.note]},
    )


def part_aucs(clips: Sequence[Clip], scores: dict[str, float]) -> dict[str, float]:
    """AUC of Public, Private-1, Private-2 and the private parts pooled."""
    parts = {
        part: [clip for clip in clips if clip.part == part] for part in ("Public", "Private-1", "Private-2")
    }
    parts[POOLED] = parts["Private-1"] + parts["Private-2"]
    return {name: auc(*arrays(group, scores)) for name, group in parts.items()}


def demo_claims(
    clips: Sequence[Clip], submissions: dict, areas: dict[str, dict[str, float]], crossed: Matrix
) -> list[Claim]:
    """The findings of the competition, on the embedded contest."""
    best = areas["diverse-ensemble"]
    claims = [
        Claim(
            "C1",
            "A detector is good on new people with known methods and drops sharply on unseen sources.",
            {"Private-1": best["Private-1"], "Private-2": best["Private-2"]},
            "Private-1 >= 0.80 and Private-2 <= Private-1 - 0.15",
            best["Private-1"] >= 0.80 and best["Private-2"] <= best["Private-1"] - 0.15,
        )
    ]
    if "single-ensemble" in areas:
        single = areas["single-ensemble"]["Private-1"]
        claims.append(
            Claim(
                "C2",
                "Training on diverse methods beats training on a single one.",
                {"diverse": best["Private-1"], "single": single},
                "diverse - single >= 0.08 on Private-1",
                best["Private-1"] - single >= 0.08,
            )
        )
    mean = float(np.mean([areas[member]["Private-1"] for member in TEAMS["diverse"]]))
    claims.append(
        Claim(
            "C3",
            "The weighted ensemble is at least as good as its average member.",
            {"ensemble": best["Private-1"], "mean of members": mean},
            "ensemble >= mean of its members on Private-1",
            best["Private-1"] >= mean,
        )
    )
    columns = [crossed.detectors.index(name) for name in TEAMS["diverse"]]
    seen, unseen = (
        [float(crossed.auc[crossed.creators.index(name)][columns].mean()) for name in names]
        for names in (TRAINED, UNSEEN)
    )
    team = {name: submissions[name] for name in TEAMS["diverse"]}
    evasive, caught = (
        np.mean([anti_detection(clips, team, name) for name in names]) for names in (UNSEEN, TRAINED)
    )
    claims.append(
        Claim(
            "C4",
            "Creators known from training are detected better than unseen ones and earn less anti-detection.",
            {
                "AUC known": float(np.mean(seen)),
                "AUC unseen": float(np.mean(unseen)),
                "anti-detection known": float(caught),
                "anti-detection unseen": float(evasive),
            },
            f"AUC known > unseen, anti-detection known < unseen ({DEFINITIONS['auc10'][2].split(':')[0]})",
            bool(np.mean(seen) > np.mean(unseen) and caught < evasive),
        )
    )
    if "shuffled" in areas:
        value = areas["shuffled"]["Private-1"]
        claims.append(
            Claim(
                "C5",
                "Shuffled training labels leave chance.",
                {"AUC": value},
                "0.5 +- 0.08",
                abs(value - 0.5) <= 0.08,
            )
        )
    return [*claims, sums_claim()]


def sums_claim() -> Claim:
    """All published totals of the creation track are the plain sum of their six terms."""
    published = load_published("dfgc2022")
    tables = [published_rows(published, f"creation round {number}") for number in (1, 2, 3)]
    gaps = [abs(row.total - sums[row.submission]) for rows, sums in tables for row in rows]
    agree = sum(gap <= 0.001 + 1e-9 for gap in gaps)
    return Claim(
        "C6",
        "The published creation totals are the plain sum of five subjective means and anti-detection.",
        {"rows that agree": agree, "rows": len(gaps), "largest gap": max(gaps)},
        "every row within 0.001",
        agree == len(gaps),
    )


def predict_realism(
    found: TestSet, scorer: Scorer, pipeline: Settings, ratings: Path
) -> tuple[list[Metric], dict[str, float]]:
    """Realism predicted from features, trained on Public's (simulated) ratings, tested on Private-1's; and
    the mean prediction per creator that nobody rated.
    """
    rated = clip_realism(ratings)
    groups = {
        part: [clip for clip in found.clips if clip.part == part and clip.label == 1]
        for part in ("Public", "Private-1", "Private-2")
    }
    features = {
        part: np.stack(
            [clip_features(found.paths[c.name], scorer, pipeline) for c in progress(group, "features")]
        )
        for part, group in groups.items()
    }
    mos = {part: np.array([rated[c.name] for c in groups[part]]) for part in ("Public", "Private-1")}
    model = RealismModel().fit(features["Public"], mos["Public"])
    predicted = model.predict(features["Private-1"])
    metrics = [
        Metric(
            "predicted realism", "clip level", name, "", value, f"{DATA} Private-1", False, "VRA, predicted"
        )
        for name, value in agreement(predicted, mos["Private-1"]).items()
    ]
    unrated = model.predict(features["Private-2"])
    creators = np.array([clip.creator for clip in groups["Private-2"]])
    return metrics, {name: float(unrated[creators == name].mean()) for name in dict.fromkeys(creators)}


def confidence_weighting(
    clips: Sequence[Clip], made: Sequence[ClipScore], weights: Sequence[float]
) -> list[Metric]:
    """The diverse ensemble with frames weighted by confidence instead of evenly."""
    members = [
        {clip.name: frames_to_video(clip.probabilities.get(name, []), "confident") for clip in made}
        for name in TEAMS["diverse"]
    ]
    areas = part_aucs(clips, fuse(members, weights)[0])
    return [
        Metric("frames to video", "by confidence", "AUC", "fraction", areas[part], f"{DATA} {part}", False,
               "diverse-ensemble")
        for part in ("Public", "Private-1", "Private-2")
    ]  # fmt: skip


def robustness(
    found: TestSet, team: Scorer, pipeline: Settings, folder: Path, weights: Sequence[float]
) -> list[Metric]:
    """AUC of the diverse ensemble on the uncompressed clips of Private-1, as they are, changed, and
    attacked.
    """
    clips = [clip for clip in found.clips if clip.part == "Private-1" and clip.compression == "none"]
    paths = [found.paths[clip.name] for clip in clips]
    results = {}
    for change in ("unchanged", *CHANGES):
        changed = paths if change == "unchanged" else change_videos(paths, folder / change, change)
        made = score_videos(changed, team, pipeline)
        members = [{clip.name: clip.score[name] for clip in made} for name in team.networks]
        results[change] = auc(*arrays(clips, fuse(members, weights)[0]))
    name = TEAMS["diverse"][1]
    attacked = {
        clip.name: attacked_score(team, name, path, clip.label, pipeline)
        for clip, path in zip(clips, progress(paths, "attack"), strict=True)
    }
    metrics = [
        Metric("robustness", change, "AUC", "fraction", value, f"{DATA} Private-1", False, "diverse-ensemble")
        for change, value in results.items()
    ]
    value = auc(*arrays(clips, attacked))
    return [
        *metrics,
        Metric(
            "robustness",
            "FGSM, 2 of 255, white box",
            "AUC",
            "fraction",
            value,
            f"{DATA} Private-1",
            False,
            name,
        ),
    ]


def draw_clips(path: Path, found: TestSet, every: int) -> None:
    """One row of frames per creator, and real clips above."""
    tiles, labels = [], []
    for creator in ("", *CREATORS):
        chosen = [
            clip for clip in found.clips if clip.creator == creator and clip.compression in ("none", "noise")
        ][:4]
        frames = [next(iter(read_frames(found.paths[clip.name], every)))[1] for clip in chosen]
        if len(frames) == 4:
            tiles += [torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames]
            labels.append(creator or "real")
    if tiles:
        write_image(path, image_grid(tiles, 4, row_labels=labels, scale=2))
