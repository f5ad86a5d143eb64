"""DFGC 2022: training, evaluation, prediction, extraction, export as users run them; resume, bad input."""

import dataclasses
import json

import helpers
import numpy as np
import onnxruntime
import pytest
import torch
from curves import assert_same_curves, furthest_weights, run_one, run_two

from dfgc2022 import boxes as box_sources
from dfgc2022 import eval as evaluation
from dfgc2022 import export, extract, model, pipeline, predict, train
from dfgc2022.datasets import dfgc2022 as read_release
from dfgc2022.protocol import FUSION
from dfgc2022.video import read_frames, write_clips
from dfgc2022.world import Size
from shared.io import load_config
from shared.runtime import UserError

TINY = helpers.TINY["dfgc2022"]
TEAM = ["diverse-swin", "diverse-convnext-0", "diverse-convnext-1"]


def run(script, *arguments, **options):
    options = {"code": 0, "CUDA_VISIBLE_DEVICES": ""} | options
    return helpers.script("dfgc2022", script, *arguments, timeout=None, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of the diverse team."""
    folder = tmp_path_factory.mktemp("runs") / "demo-0"
    result = run("train.py", "demo", *TINY, "--out", folder, "--members", *TEAM, fresh=True)
    assert result.stdout.splitlines()[-1] == str(folder)
    return folder


def test_training_logs_and_pictures(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert (trained / "samples" / "batch-diverse-swin.png").is_file()
    assert sorted(path.stem for path in (trained / "members").iterdir()) == sorted(TEAM)


def test_eval_of_the_embedded_contest(trained):
    said = run("eval.py", "--run", trained, "--draws", "20", fresh=True).stdout
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
