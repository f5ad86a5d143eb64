"""DFGC 2022: training, evaluation, prediction, extraction, export as users run them; resume, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import helpers
import numpy as np
import onnxruntime
import pytest
import torch
from curves import assert_same_curves, furthest_weights, run_one, run_two

import dfgc2022
from dfgc2022 import boxes as box_sources
from dfgc2022 import eval as evaluation
from dfgc2022 import export, extract, model, pipeline, predict, train, vra
from dfgc2022.datasets import dfgc2022 as read_release
from dfgc2022.protocol import FUSION, write_submission
from dfgc2022.recipe import of_the_contest
from dfgc2022.video import read_frames, write_clips
from dfgc2022.world import Size, build_world
from shared.io import load_config
from shared.published import load_published
from shared.runtime import REPOSITORY, UserError, parse, parse_presets

FOLDER = Path(dfgc2022.__file__).parent
TINY = helpers.TINY["dfgc2022"]
TEAM = ["diverse-swin", "diverse-convnext-0", "diverse-convnext-1"]


def run(script, *arguments, code=0, **environment):
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return helpers.script("dfgc2022", script, *arguments, code=code, timeout=None, **environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of the diverse team."""
    folder = tmp_path_factory.mktemp("runs") / "demo-0"
    result = run("train.py", "demo", *TINY, "--out", folder, "--members", *TEAM)
    assert result.stdout.splitlines()[-1] == str(folder)
    return folder


def test_training_logs_and_pictures(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert (trained / "samples" / "batch-diverse-swin.png").is_file()
    assert sorted(path.stem for path in (trained / "members").iterdir()) == sorted(TEAM)


def test_eval_of_the_embedded_contest(trained):
    said = run("eval.py", "--run", trained, "--draws", "20").stdout
    assert said.splitlines()[-1] == str(trained)
    results = json.loads((trained / "results.json").read_text())
    claims = {claim["id"]: claim for claim in results["claims"]}
    assert set(claims) == {"C1", "C3", "C4", "C6"} and claims["C6"]["holds"]
    assert not any(metric["comparable"] for metric in results["metrics"])
    tables = {metric["table"] for metric in results["metrics"]}
    assert {"detection top-3", "matrix", "creation", "fusion", "robustness", "predicted realism"} <= tables
    for name in ("roc.png", "matrix.png", "clips.png"):
        assert (trained / "samples" / name).is_file()
    lines = (trained / "submissions" / "diverse-ensemble.txt").read_text().splitlines()
    assert len(lines) == len(read_release(trained / "world").clips)


def test_predict_on_a_folder_with_a_bad_file(trained, tmp_path, capsys):
    clips = sorted((trained / "world" / "Train").glob("*.mp4"))[:2]
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for clip in clips:
        (source / clip.name).write_bytes(clip.read_bytes())
    (source / "broken.mp4").write_text("nothing")
    extract.main(extract.Config(clips[0], tmp_path, boxes=str(trained / "world" / "boxes.csv")))
    (tmp_path / clips[0].name).rename(source / "cut.mp4")
    boxes = str(trained / "world" / "boxes.csv")
    predict.main(predict.Config(source, out, run=trained, boxes=boxes, every=1, device="cpu"))
    assert "not a video" in capsys.readouterr().out
    record = json.loads((out / f"{clips[0].name}.json").read_text())
    assert record["score"] == pytest.approx(np.mean(record["frame_scores"]), abs=1e-6)
    assert not record["abstains"] and (out / f"{clips[0].name}.png").is_file()
    broken = json.loads((out / "broken.mp4.json").read_text())
    assert broken["score"] == 0.5 and broken["abstains"]
    assert len((out / "submission.txt").read_text().splitlines()) == 4
    assert record["boxes"].startswith("boxes.csv ")
    cut = json.loads((out / "cut.mp4.json").read_text())  # the folder of the first clip's crops
    assert cut["frames"] == record["frames"] and cut["score"] == pytest.approx(record["score"], abs=1e-5)
    alone = predict.Config(source / "cut.mp4", tmp_path / "alone", run=trained, every=1, device="cpu")
    predict.main(alone)
    assert json.loads((tmp_path / "alone" / "cut.mp4.json").read_text())["frames"] == cut["frames"]


def test_a_timeline_looks_for_faces_in_eight_frames_and_is_drawn_once(trained, tmp_path, monkeypatch):
    clip = tmp_path / "a.mp4"
    write_clips([clip], [np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)], 10)
    looked, read = [], []
    monkeypatch.setattr(box_sources.WholeFrame, "__call__", lambda self, name, indices, frames: (
        looked.append(list(indices)) or [[(0, 0, 32, 32, 1.0)] for _ in frames]))  # fmt: skip
    monkeypatch.setattr(
        pipeline, "read_frames", lambda path, every: read.append(path) or read_frames(path, every)
    )
    config = predict.Config(clip, tmp_path / "out", run=trained, boxes="crops", every=1, device="cpu")
    predict.main(config)
    assert [len(indices) for indices in looked] == [32, 8, 8] and looked[-1][::7] == [0, 39]
    predict.main(config)
    assert len(read) == 2  # for the scores and for the picture of the first call
    (tmp_path / "out" / "a.mp4.png").unlink()
    predict.main(config)
    assert len(read) == 3 and (tmp_path / "out" / "a.mp4.png").is_file()


def test_the_timeline_of_a_single_frame_can_be_read(trained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict.plt, "close", drawn.append)
    clip = next((trained / "world" / "Train").glob("*.mp4"))
    boxes = str(trained / "world" / "boxes.csv")
    predict.main(predict.Config(clip, tmp_path, run=trained, boxes=boxes, every=100, device="cpu"))
    face, line = drawn[0].axes
    assert face.images[0].get_array().shape == (predict.THUMBNAIL, predict.THUMBNAIL, 3)
    low, high = line.get_xlim()
    assert [tick for tick in line.get_xticks() if low <= tick <= high] == [-1, 0, 1]
    assert {mark.get_marker() for mark in line.lines[:-1]} == {"."}  # a line through one point shows nothing
    monkeypatch.undo()
    predict.plt.close(drawn[0])


def test_extract_and_train_on_lists_then_export(trained, tmp_path, capsys):
    boxes, crops = str(trained / "world" / "boxes.csv"), tmp_path / "crops"
    for label, kind in ((0, "real"), (1, "lowres")):
        folder = tmp_path / kind
        folder.mkdir()
        for path in sorted((trained / "world" / "Train").glob(f"*-{kind}.mp4")):
            (folder / path.name).write_bytes(path.read_bytes())
        extract.main(extract.Config(folder, crops / kind, label=label, boxes=boxes))
    config = train.Config(
        lists=tuple(crops / kind / "list.txt" for kind in ("real", "lowres")),
        detector="convnext_micro",
        init="none",
        batch_size=4,
        epochs=3,
        keep_every=2,
        val_share=0.3,
        val_every=2,
        competition_rules=True,
        out=tmp_path / "run",
        device="cpu",
    )
    folder = train.train(config)
    names = sorted(path.stem for path in (folder / "members").iterdir())
    assert names == ["convnext_micro", "convnext_micro-epoch0", "convnext_micro-epoch2"]
    for member in (None, "convnext_micro-epoch0"):
        export.main(export.Config(tmp_path / "d.onnx", run=folder, member=member))
        assert "largest difference" in capsys.readouterr().out and (tmp_path / "d.onnx").is_file()
    moved = tmp_path / "DFGC-2022"
    crops.rename(moved)
    lists = tuple(moved / kind / "list.txt" for kind in ("real", "lowres"))
    with pytest.raises(UserError, match="looks like a clip of the contest"):
        train.train(dataclasses.replace(config, lists=lists, out=tmp_path / "other"))


@pytest.mark.parametrize("detector", ["swin_micro", "timm/test_vit"])
def test_a_run_of_another_side_is_read_at_that_side(trained, tmp_path, detector):
    """Both are built for one side of their input, which evaluation has to know."""
    world, folder, out = trained / "world", tmp_path / "run", tmp_path / "out"
    lists = ("--lists", world / "crops" / "diverse.txt", "--members")
    options = ("--detector", detector, "--size", "48", "--steps", "1", "--out", folder)
    run("train.py", "demo", *TINY, *lists, *options)
    ((_, _, size),) = train.load_members(folder, load_config(folder, train.Config)).values()
    assert size == 48
    export.main(export.Config(tmp_path / "d.onnx", run=folder))
    (image,) = onnxruntime.InferenceSession(tmp_path / "d.onnx").get_inputs()
    assert image.shape[-2:] == [48, 48]
    clip, boxes = next((world / "Train").glob("*.mp4")), str(world / "boxes.csv")
    predict.main(predict.Config(clip, out, run=folder, boxes=boxes, every=3, device="cpu"))
    record = json.loads((out / f"{clip.name}.json").read_text())
    assert len(record["frames"]) == 2 and 0 < record["score"] < 1 and record["score"] != 0.5


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


def test_a_run_scores_a_release_and_predicts_what_nobody_rated(trained, tmp_path, capsys):
    world = trained / "world"
    config = evaluation.Config(
        dfgc=world,
        run=trained,
        boxes=str(world / "boxes.csv"),
        every=3,
        crop="box",
        ratings=world / "ratings.csv",
        draws=20,
        device="cpu",
        out=tmp_path / "o",
    )
    evaluation.main(config)
    header = json.loads((tmp_path / "o" / "scores.jsonl").read_text().splitlines()[0])
    assert (header["settings"]["every"], header["settings"]["crop"]) == (3, "box")
    said = capsys.readouterr().out
    assert "checker (realism predicted)" in said and "smooth (realism predicted)" not in said
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    creation = {
        (m["method"], m["metric"]): m["value"] for m in results["metrics"] if m["table"] == "creation"
    }
    assert 1 <= creation["checker", "realism"] <= 5 and ("checker", "mouth") not in creation
    same = tmp_path / f"{TEAM[0]}.txt"
    same.write_text("")
    with pytest.raises(UserError, match="diverse-swin is also the name of a detector"):
        evaluation.main(dataclasses.replace(config, preds=(same,)))
    few = tmp_path / "few.csv"
    few.write_text("".join((world / "ratings.csv").read_text().splitlines(keepends=True)[:6]))
    evaluation.main(dataclasses.replace(config, ratings=few, out=tmp_path / "few"))
    said = capsys.readouterr().out
    assert "realism is not predicted: that needs 20 rated clips of this test set, the ratings name 1" in said
    assert "warning: no ratings of checker, " in said and said.splitlines()[-1] == str(tmp_path / "few")
    results = json.loads((tmp_path / "few" / "results.json").read_text())
    tables = {m["table"] for m in results["metrics"]}
    assert {"detection top-3", "matrix", "creation", "fusion"} <= tables
    few.write_text("nothing")
    with pytest.raises(UserError, match="column submission is missing"):
        evaluation.main(dataclasses.replace(config, ratings=few, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()  # said before a video was read


def test_killed_training_ends_with_the_same_numbers(tmp_path, one_thread):
    names = ("diverse-swin", "diverse-convnext-0")
    config = dataclasses.replace(
        train.PRESETS["demo"],
        preset="demo",
        members=names,
        world=Size(train=6, test=4, keys=2),
        steps=4,
        batch_size=8,
        log_every=3,  # a checkpoint between two log lines
        checkpoint_every=2,
        device="cpu",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(dataclasses.replace(config, out=whole))
    arguments = ["demo", *TINY, "--log-every", "3", "--members", *names, "--device", "cpu", "--out", killed]
    helpers.kill_when((killed / "checkpoint").exists, "dfgc2022", *arguments)
    train.train(dataclasses.replace(config, out=killed))
    helpers.assert_same_runs(killed, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: train.train(train.Config(lists=(Path("absent.txt"),), out=out)), "absent.txt"),
        (lambda out: train.train(train.Config(members=("nobody",), out=out)), "unknown member"),
        *(
            (lambda out, change=change: train.train(demo(out, **change)), message)
            for change, message in (
                ({"train_creators": "single"}, "--train-creators: diverse-swin sets it to diverse"),
                ({"detector": "convnext_tiny"}, "--detector: diverse-swin sets it to swin_micro"),
                ({"lr": 9.0}, "--lr: diverse-swin sets it to 0.001"),
                ({"preset": "study", "members": ("one-frame",), "frames_per_video": 2}, "sets it to 1"),
            )
        ),
        *(
            (
                lambda out, name=name: train.train(
                    dataclasses.replace(train.PRESETS[name], preset=name, out=out)
                ),
                f"{name} trains on public sets: give --lists",
            )
            for name in ("paper", "paper-swin", "xception21", "winner21")
        ),
        *(
            (lambda out, given=given: evaluation.main(evaluation.Config(**given)), "needs --dfgc")
            for given in ({"preds": (Path("a.txt"),)}, {"out": Path("o")}, {"boxes": "skin"}, {"every": 5})
        ),
        (lambda out: evaluation.main(evaluation.Config(dfgc=out, preds=(Path("a.txt"),))), "Meta.csv"),
        (lambda out: predict.main(predict.Config(out / "absent.mp4")), "absent.mp4"),
        (lambda out: extract.main(extract.Config(out / "absent", out)), "absent"),
        (lambda out: export.main(export.Config(out, official="xception_dfgc21_baseline")), "--weights"),
        (lambda out: export.main(export.Config(out.parent)), "a folder; --out is the file to write"),
        (lambda out: build_world(out, 0, Size(pixels=33)), "--world.pixels 33: give an even number"),
    ],
)
def test_mistakes_get_one_message(call, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call(tmp_path / "run")


def demo(out, **change):
    return dataclasses.replace(train.PRESETS["demo"], **{"preset": "demo", "out": out, **change})


@pytest.mark.parametrize(
    ("script", "given"),
    [
        *((train, f"demo --{name} 0") for name in (
            "log-every", "checkpoint-every", "val-every", "batch-size", "decay-steps", "frames-per-video",
            "steps", "epochs", "samples-per-video", "size", "world.train", "world.test", "world.keys", "lr",
        )),
        *((train, f"demo --{name} -1") for name in (
            "batch-size", "frames-per-video", "keep-every", "blending", "weight-decay", "world.gap",
        )),
        (train, "demo --lr nan"),
        (train, "demo --val-share 1"),
        (train, "demo --adversarial 2"),
        (train, "demo --world.pixels 8"),
        *((evaluation, f"--{name} -1") for name in ("draws", "every", "workers")),
        (evaluation, "--draws 0"),
        (predict, "--input a --every 0"),
        (predict, "--input a --workers -1"),
        (extract, "--videos a --out b --every 0"),
        (vra, "--root a --every 0"),
    ],
)  # fmt: skip
def test_numbers_out_of_their_range(script, given):
    *_, name, value = given.split()
    read = parse_presets if script is train else parse
    settings = train.PRESETS if script is train else script.Config
    with pytest.raises(UserError, match=f"^{re.escape(name)} {re.escape(value)}.*: give "):
        read(settings, "", given.split())


@pytest.mark.parametrize(
    ("detector", "size", "fits"),
    [
        ("swin_micro", 48, True),
        ("timm/vit_tiny_patch16_224", 32, True),
        ("convnext_micro", 7, False),
        ("timm/vit_tiny_patch16_224", 7, False),
    ],
)
def test_another_side_of_the_input(detector, size, fits):
    entry = model.detector(detector)
    if fits:
        assert entry.at(size)(torch.zeros(1, 3, size, size)).shape == (1, 2)
    else:
        with pytest.raises(UserError, match=f"--size {size}: the detector takes no such side"):
            entry.at(size)


def test_a_mistake_on_the_command_line_exits_with_2(tmp_path):
    result = run("train.py", "demo", "--members", "nobody", "--out", tmp_path / "x", code=2)
    assert result.stderr.startswith("error: unknown member") and "Traceback" not in result.stderr


def test_predict_takes_members_and_released_files(trained, tmp_path, monkeypatch):
    team = list(predict.load_detectors(trained, (), (), ()))
    assert team == TEAM and list(predict.load_detectors(trained, TEAM[2:], (), ())) == TEAM[2:]
    with pytest.raises(UserError, match="no member 'x'"):
        predict.load_detectors(trained, ("x",), (), ())
    name = "xception_dfgc21_baseline"
    small = model.Detector(lambda: model.Xception(middle=1, width=0.1), 64, model.HALF)
    monkeypatch.setattr(model, "DETECTORS", model.DETECTORS | {name: small})
    paths = [tmp_path / f"epoch{number}.pth" for number in range(3)]
    for path in paths:
        torch.save(model.official(name).state_dict(), path)
    clip = next((trained / "world" / "Train").glob("*.mp4"))
    out = tmp_path / "out"
    boxes = str(trained / "world" / "boxes.csv")
    predict.main(
        predict.Config(
            clip, out, official=(name,) * 3, weights=tuple(paths), boxes=boxes, every=1, device="cpu"
        )
    )
    record = json.loads((out / f"{clip.name}.json").read_text())
    parts = record["detectors"]["score"]
    assert list(parts) == ["epoch0", "epoch1", "epoch2"]
    assert record["score"] == pytest.approx(float(np.dot(FUSION, list(parts.values()))), abs=1e-6)
    with pytest.raises(UserError, match="share a name"):
        predict.load_detectors(None, (), (name,) * 2, (paths[0], paths[0]))


@pytest.mark.slow
def test_claims_of_the_demo(tmp_path):
    """The demo preset as a user runs it, seed 0: minutes."""
    run("train.py", "demo", "--out", tmp_path / "demo")
    run("eval.py", "--run", tmp_path / "demo")
    claims = json.loads((tmp_path / "demo" / "results.json").read_text())["claims"]
    assert [claim["id"] for claim in claims if not claim["holds"]] == []


def test_two_processes_give_the_curves_of_one(tmp_path):
    """Attacks take signs of gradients, which rounding turns: those on the fakes of three-class are tiny."""
    arguments = ["demo", *TINY, "--members", "diverse-swin", "three-class", "--epsilon", "1e-4"]
    arguments += ["--steps", "6", "--log-every", "1"]
    one, two = (
        run_one(train.train, train.PRESETS, tmp_path, *arguments),
        run_two("dfgc2022", tmp_path, *arguments),
    )
    assert_same_curves(one, two, lines=12)
    assert furthest_weights(one / "members", two / "members") < 1e-3


def test_two_processes_share_batch_norm_and_attacked_fakes(trained, tmp_path):
    arguments = ["demo", *TINY, "--lists", str(trained / "world/crops/diverse.txt"), "--members"]
    arguments += [
        "--detector",
        "timm/test_efficientnet",
        "--size",
        "64",
        "--classes",
        "3",
        "--optimizer",
        "sgd",
    ]
    arguments += ["--adversarial", "0.2", "--epsilon", "1e-4", "--steps", "6", "--log-every", "1"]
    arguments += ["--val-share", "0.4", "--val-every", "3"]
    one, two = (
        run_one(train.train, train.PRESETS, tmp_path, *arguments),
        run_two("dfgc2022", tmp_path, *arguments),
    )
    assert_same_curves(one, two, lines=8)  # two of them of the validation
    assert furthest_weights(one / "members", two / "members") < 1e-3
