"""DFGC 2022: whole contests scored from submission files, in a release's layout."""

import dataclasses
import json

import numpy as np
import pytest

from dfgc2022 import eval as evaluation
from dfgc2022.datasets import dfgc2022 as read_release
from dfgc2022.protocol import FUSION, write_submission
from dfgc2022.recipe import of_the_contest
from dfgc2022.world import Size, build_world
from shared.published import load_published
from shared.runtime import REPOSITORY, UserError


def test_the_contests_clips_are_told_from_this_projects_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path / "runs"))
    for own in (tmp_path / "runs" / "dfgc2022" / "demo-0/world/crops/a", REPOSITORY / "dfgc2022/crops/ff/a"):
        assert not of_the_contest(own)
    for place in (
        "DFGC-2022/Public/a",
        "dfgc2022/a",
        "sets/Detection Dataset/Public/a",
        "runs/dfgc2022/x/Result Clips/a",
    ):
        assert of_the_contest(tmp_path / place)
    assert of_the_contest(REPOSITORY / "dfgc2022" / "DFGC-2022" / "a")


def test_contest_from_submission_files(tmp_path, capsys):
    build_world(tmp_path, 0, Size(train=2, test=4, keys=2))
    clips = read_release(tmp_path).clips
    rng = np.random.default_rng(0)
    for name, noise in (("a", 0.3), ("b", 2.0), ("c", 0.5)):
        scores = {clip.name: float(np.clip(clip.label + rng.normal(0, noise), 0, 1)) for clip in clips}
        write_submission(tmp_path / f"{name}.txt", scores)
    (tmp_path / "bad.txt").write_text("x.mp4, nan\n")
    preds = tuple(tmp_path / f"{name}.txt" for name in ("a", "b", "c", "bad"))
    config = evaluation.Config(
        dfgc=tmp_path,
        preds=preds,
        weights=FUSION,
        ratings=tmp_path / "ratings.csv",
        anti_detection="auc5",
        draws=20,
        out=tmp_path / "o",
    )
    evaluation.main(config)
    said = capsys.readouterr().out
    assert "not scored" in said and "leaderboard" in said and "announced formula" in said
    assert "AUC by compression" in said and "weights and temperatures chosen on Public" in said
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    board = {m["method"]: m["value"] for m in results["metrics"] if m["dataset"].endswith("Private (1+2)")}
    assert set(board) == {"a", "b", "c", "fusion"} and board["a"] > board["b"]
    choices = [m["setting"] for m in results["metrics"] if m["table"] == "fusion"]
    assert choices[0] == "fixed 0.2, 0.3, 0.5" and any(name.startswith("searched on") for name in choices)
    by_group = {m["method"] for m in results["metrics"] if m["table"] == "by identity group"}
    assert by_group == set(board)


def test_a_complete_release_stands_beside_the_published_numbers(tmp_path, capsys, monkeypatch):
    """With the counts of a tiny contest in place of the paper's Table 1."""
    build_world(tmp_path, 0, Size(train=2, test=4, keys=2))
    clips = read_release(tmp_path).clips
    monkeypatch.setattr(evaluation, "RELEASED", {"Public": (8, 16), "Private-1": (8, 16)})
    preds = tuple(tmp_path / f"{name}.txt" for name in "abcdef")
    for path in preds:
        write_submission(path, {clip.name: clip.label / 2 for clip in clips})
    config = evaluation.Config(dfgc=tmp_path, preds=preds, draws=20, out=tmp_path / "o")
    evaluation.main(config)
    said = capsys.readouterr().out
    assert "published AUC on the same clips" in said and "HanChen" in said
    assert "fusion weights are not searched for 6 detectors" in said
    others = sum(row["table"] != "detection top-3" for row in load_published("dfgc2022")["rows"])
    assert f"{others} published or context rows stand" in said
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    comparable = {m["dataset"] for m in results["metrics"] if m["comparable"]}
    assert comparable == {"Public", "Private-1"}  # whatever stands in for Private-2, which nobody has
    monkeypatch.setattr(evaluation, "RELEASED", {"Public": (8, 16), "Private-1": (9, 16)})
    evaluation.main(config)
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert not any(m["comparable"] for m in results["metrics"])


def test_a_bad_submission_ends_neither_the_contest_nor_the_fusion_of_the_others(tmp_path, capsys):
    build_world(tmp_path, 0, Size(train=2, test=4, keys=2))
    clips = read_release(tmp_path).clips
    preds = tuple(tmp_path / f"{name}.txt" for name in "abc")
    for path in preds[:2]:
        write_submission(path, {clip.name: clip.label / 2 for clip in clips})
    preds[2].write_text("x.mp4, 1.5\n")
    config = evaluation.Config(dfgc=tmp_path, preds=preds, weights=FUSION, draws=20, out=tmp_path / "o")
    evaluation.main(config)
    said = capsys.readouterr().out
    assert "c.txt, line 1: score 1.5" in said and "no fusion: 1 of its 3 members could not be read" in said
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert {m["method"] for m in results["metrics"] if m["table"] == "detection top-3"} == {"a", "b"}
    own = tmp_path / "fusion.txt"  # the name that the weighted mean gets
    own.write_bytes(preds[0].read_bytes())
    for change, message in (
        ({"weights": (0.5, 0.6)}, "2 members need as many weights"),
        ({"preds": (own, preds[1]), "weights": (0.5, 0.5)}, "fusion is the name of the weighted mean"),
        ({"preds": preds[2:], "weights": ()}, "nothing to score"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.main(dataclasses.replace(config, **change))


def test_a_contest_without_known_creators_is_scored_all_the_same(tmp_path, capsys):
    build_world(tmp_path, 0, Size(train=2, test=4, keys=2))
    table = tmp_path / "Detection Dataset" / "Detection Dataset Meta.csv"
    table.write_text("videoName,label\n")
    clips = read_release(tmp_path).clips
    write_submission(tmp_path / "a.txt", {clip.name: clip.label / 2 for clip in clips})
    evaluation.main(
        evaluation.Config(
            dfgc=tmp_path,
            preds=(tmp_path / "a.txt",),
            ratings=tmp_path / "ratings.csv",
            draws=20,
            out=tmp_path / "o",
        )
    )
    assert "warning: no fake with real clips beside it has a creator" in capsys.readouterr().out
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["matrix"] is None and any(m["table"] == "detection top-3" for m in results["metrics"])
    assert (tmp_path / "o/samples/roc.png").is_file() and not (tmp_path / "o/samples/matrix.png").exists()
