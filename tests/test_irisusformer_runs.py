"""IrisUsformer's scripts: whole runs, resuming, evaluation, prediction, export, the benchmark."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from irisusformer import eval as evaluation
from irisusformer import export as exporting
from irisusformer import predict
from irisusformer.bench import BenchConfig, rows_of
from irisusformer.data import EyeWorld
from irisusformer.export import export, largest_difference
from irisusformer.eyes import draw_eye
from irisusformer.iris import identity
from irisusformer.metrics import ErrorDetection
from irisusformer.model import IrisUsformer
from irisusformer.predict import PredictConfig, frames, predict_images, predict_video, segment, segment_all
from irisusformer.protocol import Result, evaluate
from irisusformer.train import DEMO, build, test_set, variants
from shared.onnxfile import run_onnx
from shared.runtime import UserError

test_set.__test__ = False  # a function of train.py, no test
SCRIPTS = ["train", "eval", "predict", "export", "cross_database", "recognition", "draw", "bench"]
TINY = [*helpers.TINY["irisusformer"], "--variants", "learned", "ce", "--ensemble", "2"]


def run(script, *arguments, **options):
    return helpers.script("irisusformer", f"{script}.py", *arguments, **{"code": 0} | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train", "demo", *TINY, "--steps", 12, "--save-every", 4, "--out", out, fresh=True)
    assert done.stdout.splitlines()[-1] == str(out)
    return out


@pytest.fixture
def eyes(tmp_path):
    folder = tmp_path / "eyes"
    folder.mkdir()
    for i in range(2):
        picture = draw_eye(identity(i), 0, 60, 80, "visible", 1).image
        Image.fromarray((picture * 255).astype(np.uint8)).save(folder / f"eye{i}.png")
    return folder


def test_killed_run_resumes_to_the_same_numbers(trained, tmp_path):
    out = tmp_path / "killed"
    arguments = ["demo", *TINY, "--steps", 12, "--save-every", 4, "--out", out]
    first_picture = out / "samples" / "step-000004.png"
    helpers.kill_when(first_picture.exists, "irisusformer", *arguments)
    run("train", *arguments)
    helpers.assert_same_runs(out, trained)


def test_eval_prints_claims_and_writes_results(trained):
    done = run("eval", "--run", trained, fresh=True)
    assert done.stdout.splitlines()[-1] == str(trained)
    for text in ("AUROC", "ensemble of ce", "MC dropout", "flip disagreement", "temperature", "cost: holds"):
        assert text in done.stdout
    results = json.loads((trained / "results.json").read_text())
    claims = {claim["id"]: claim for claim in results["claims"]}
    assert claims["cost"]["holds"] and "position-sensitive" not in claims  # needs the plain network
    assert set(results["segmentation"]) == {"learned", "ce", "ce-1"}
    assert all(not metric["comparable"] for metric in results["metrics"])
    assert {"edge_ratio", "image_spearman"} <= {metric["metric"] for metric in results["metrics"]}
    assert {f"error_in_top_{share}%" for share in (1, 5, 10)} <= set(results["uncertainty"][0])
    assert (trained / "samples" / "curves.png").exists() and (trained / "samples" / "test.png").exists()


def test_predict_writes_maps_geometry_and_summary(trained, eyes, tmp_path):
    out = tmp_path / "out"
    run("predict", "--run", trained, "--input", eyes, "--output", out, "--tau", 0.3)
    with open(out / "summary.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["eye0", "eye1"]
    record = json.loads((out / "eye0.json").read_text())
    assert (record["width"], record["height"]) == (80, 60) and 0 <= record["quality"]["score"] <= 1
    for kind in ("mask", "overlay", "uncertainty"):
        assert Image.open(out / f"eye0_{kind}.png").size == (80, 60)


def test_predict_reads_videos(trained, tmp_path):
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 60))
    for seed in range(4):
        writer.write((draw_eye(identity(1), seed, 60, 80, "visible", 1).image * 255).astype(np.uint8))
    writer.release()
    run("predict", "--run", trained, "--input", film, "--output", tmp_path / "out", "--every", 2)
    assert [r["frame"] for r in json.loads((tmp_path / "out/film.json").read_text())] == [0, 2]
    assert cv2.VideoCapture(str(tmp_path / "out/film_overlay.mp4")).read()[0]


def test_predict_writes_the_pictures_of_frames_when_asked(tmp_path):
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 60))
    for seed in range(4):
        writer.write((draw_eye(identity(1), seed, 60, 80, "visible", 1).image * 255).astype(np.uint8))
    writer.release()
    model, passes = IrisUsformer("tiny").eval(), []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    for asked in (False, True):
        out = tmp_path / f"out-{asked}"
        out.mkdir()
        predict_video(model, PredictConfig(film, out, every=2, frame_maps=asked), 64)
        assert (out / "film").is_dir() == asked and (out / "film_overlay.mp4").exists()
    for kind in ("mask", "overlay", "uncertainty"):
        found = sorted(path.name for path in (out / "film").glob(f"*_{kind}.png"))
        assert found == [f"000000_{kind}.png", f"000002_{kind}.png"]
    assert passes == [2, 2], "frames are segmented together"


def test_images_segmented_together_have_the_maps_that_each_has_alone():
    torch.manual_seed(0)
    model, images = IrisUsformer("tiny", boundaries=True).eval(), torch.rand(3, 3, 70, 90)
    for image, maps in zip(images, segment_all(model, images, 0.1, 48), strict=True):
        alone = segment(model, image, 0.1, 48)
        assert maps.keys() == alone.keys() and {value.shape for value in maps.values()} == {(70, 90)}
        for name in ("prob", "uncertainty"):
            torch.testing.assert_close(maps[name], alone[name], atol=1e-5, rtol=1e-4)


def test_predict_names_the_videos_of_a_folder_that_it_leaves_out(eyes, tmp_path, capsys):
    (eyes / "more").mkdir()
    (eyes / "more" / "film.mp4").touch()
    out = tmp_path / "out"
    out.mkdir()
    rows = predict_images(IrisUsformer("tiny").eval(), PredictConfig(eyes, out), 64)
    assert [row[0] for row in rows] == ["eye0", "eye1"]
    assert f"not segmented, give each as --input: {eyes / 'more' / 'film.mp4'}" in capsys.readouterr().err


def test_predict_replaces_no_picture_that_it_reads(eyes):
    annotated = eyes / "eye0_mask.png"
    annotated.write_bytes((eyes / "eye0.png").read_bytes())
    before = annotated.read_bytes()
    with pytest.raises(
        UserError, match="eye0_mask.png would be overwritten by a result: give another --output"
    ):
        predict_images(IrisUsformer("tiny").eval(), PredictConfig(eyes, eyes), 64)
    assert annotated.read_bytes() == before and len(list(eyes.iterdir())) == 3


@pytest.mark.parametrize(
    ("names", "result"),
    [
        (("a/b/c.png", "a/b_c.png", "a_b/c.png"), r"a_b_c.png.json"),
        (("e.png", "e_polar.png"), "e_polar_mask.png"),
    ],
)
def test_predict_replaces_no_result_by_another(tmp_path, names, result):
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "in" / name)
    with pytest.raises(UserError, match=f"{names[-2]} and .*{names[-1]} would both be written to {result}"):
        predict_images(IrisUsformer("tiny").eval(), PredictConfig(tmp_path / "in", tmp_path / "out"), 64)


def test_predict_writes_what_it_found_of_the_boundaries(eyes, tmp_path, monkeypatch):
    """Polar pictures and ellipses, of a network that sees what was drawn."""
    eye = draw_eye(identity(0), 0, 60, 80, "visible", 1)
    mask, uncertainty = torch.from_numpy(eye.mask), torch.full((60, 80), 0.25)
    maps = {"prob": mask.float(), "mask": mask, "uncertainty": uncertainty, "high_region": uncertainty > 0.5}
    monkeypatch.setattr(predict, "segment", lambda *rest: maps)
    out = tmp_path / "out"
    out.mkdir()
    (row, *_) = predict_images(IrisUsformer("tiny").eval(), PredictConfig(eyes / "eye0.png", out), 64)
    record = json.loads((out / "eye0.json").read_text())
    assert record["limbus"]["x"] == pytest.approx(eye.outer_ellipse[0], abs=2)
    assert record["pupil"]["x"] == pytest.approx(eye.pupil_ellipse[0], abs=2)
    polar = {
        part: np.asarray(Image.open(out / f"eye0_polar{part}.png")) for part in ("", "_mask", "_reliability")
    }
    assert {array.shape[:2] for array in polar.values()} == {(64, 512)}
    usable = polar["_mask"] > 0
    assert usable.mean() == pytest.approx(record["quality"]["usable"], abs=1e-6) and usable.mean() > 0.3
    assert (polar["_reliability"][usable] == 191).all() and not polar["_reliability"][~usable].any()
    assert row[2] == record["quality"]["usable"]


def test_a_video_that_ends_early_is_said(tmp_path, capsys):
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (81, 61))
    for seed in range(12):
        writer.write(np.random.default_rng(seed).integers(0, 255, (61, 81, 3), np.uint8))
    writer.release()
    assert len(list(frames(film, 1)[1])) == 12 and capsys.readouterr().err == ""
    content = film.read_bytes()
    film.write_bytes(content[: len(content) // 2])
    assert 0 < len(list(frames(film, 1)[1])) < 12
    assert "film.avi: ends early" in capsys.readouterr().err


def test_mc_dropout_is_measured_where_dropout_was_trained():
    config = replace(DEMO, variants=("dropout", "d2"), test_images=2)
    models = {name: build(c).eval() for name, c in variants(config).items()}
    results, _ = evaluation.evaluate_run(config, models, torch.device("cpu"))
    assert "mc_dropout" in results["dropout"].detection and "mc_dropout" not in results["d2"].detection


def test_evaluation_takes_fewer_large_eyes_at_a_time(monkeypatch):
    config, passes = replace(DEMO, variants=("d2",), test_images=5, image_size=(32, 64)), []
    model = build(variants(config)["d2"]).eval()
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    monkeypatch.setattr(evaluation, "PIXELS", 2 * 32 * 64 + 1)
    evaluation.evaluate_run(config, {"d2": model}, torch.device("cpu"))
    assert passes == [2, 2, 1]


def test_nice_compat_reaches_the_results():
    image = {"e1": 80.0, "e1_nice": 20.0, "iou": 1.0, "f1": 1.0}
    result = Result(images=[image], mean_uncertainty=[0.1], edges=[(1.0, 1.0)])
    result.detection["u"] = ErrorDetection.empty()
    result.detection["u"].add(np.array([0.1, 0.2]), np.array([True, False]))
    for nice, value in ((False, 80), (True, 20)):
        rows = evaluation.metrics_of(replace(DEMO, dataset="miche"), {"learned": result}, nice)
        assert [row.value for row in rows if row.metric.startswith("E1")] == [value]


def test_users_mistakes_have_one_message_and_code_2(trained, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    dot = tmp_path / "dot.png"
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(dot)
    out = ["--output", tmp_path / "out", "--run", trained]
    for script, arguments, message in (
        ("train", ["paper", "--data-root", tmp_path / "nowhere"], "does not exist; get it: UBIRIS.v2"),
        ("predict", ["--input", tmp_path / "film.mp4", *out], "no frame could be decoded"),
        ("predict", ["--input", dot, *out], "1x1 pixels are too few"),
    ):
        done = run(script, *arguments, code=2)
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    assert "usage" in run(script, "--help").stdout


def test_onnx_reproduces_the_network_at_any_size(tmp_path):
    torch.manual_seed(0)
    for options in ({}, {"boundaries": True, "mode": "two_head", "arch": "bitrans"}):
        model = IrisUsformer("tiny", **options).eval()
        graph = export(model, tmp_path / "iris.onnx")
        for shape in ((1, 3, 64, 64), (2, 3, 41, 90)):
            assert largest_difference(graph, tmp_path / "iris.onnx", shape) < 1e-4


def test_export_writes_the_8_bit_file_beside_the_other(tmp_path, monkeypatch, capsys, caplog):
    torch.manual_seed(0)
    model, target = IrisUsformer("tiny").eval(), tmp_path / "iris.onnx"
    monkeypatch.setattr(exporting, "load_network", lambda *rest: (model, DEMO))
    monkeypatch.setattr(exporting, "EyeWorld", lambda *rest: EyeWorld("eyes", "train", 4, (32, 64)))
    monkeypatch.setattr(exporting, "CHECKED", ((1, 3, 64, 64),))
    monkeypatch.setattr("sys.argv", ["export.py", "--output", str(target), "--int8"])
    with caplog.at_level("ERROR"):  # gives the root logger back the level that the script takes from it
        exporting.main()
    small = target.with_suffix(".int8.onnx")
    assert capsys.readouterr().out.splitlines()[-2:] == [str(small), str(target)]
    assert {path.name for path in tmp_path.iterdir()} == {"iris.onnx", "iris.int8.onnx"}
    image = torch.from_numpy(draw_eye(identity(0), 0, 64, 64, "nir", 1).image).permute(2, 0, 1)[None]
    full, eight = (run_onnx(path, image=image)[0] for path in (target, small))
    assert 0 < (full - eight).abs().max() < 0.05


def test_large_images_are_shrunk_for_the_network_only():
    torch.manual_seed(0)
    maps = segment(IrisUsformer("tiny", boundaries=True).eval(), torch.rand(3, 300, 500), short_side=64)
    assert {tuple(value.shape) for value in maps.values()} == {(300, 500)}
    assert maps["mask"].dtype == maps["high_region"].dtype == maps["pupil"].dtype == torch.bool


def test_large_images_are_shrunk_in_evaluation_for_the_network_only():
    torch.manual_seed(0)
    model, seen = IrisUsformer("tiny").eval(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    image, mask = torch.rand(3, 120, 200), torch.zeros(1, 120, 200, dtype=torch.uint8)
    mask[:, 40:80, 60:100] = 1
    sample = {"image": image, "mask": mask, "regions": mask.repeat(2, 1, 1)}
    more = evaluation.other_scores(model, [model])
    result = evaluate(model, [sample], torch.device("cpu"), more=more, short_side=60)
    assert set(seen) == {(60, 100)}
    pixels = {int(d.wrong.sum() + d.right.sum()) for d in result.detection.values()}
    assert pixels == {120 * 200} and set(result.detection) >= {"flip", "mc_dropout", "ensemble"}


def test_bench_measures_everything_in_one_run(tmp_path):
    options = ["--size", "tiny", "--height", 64, "--width", 64, "--seconds", 0.01]
    run("bench", *options, "--no-compile", "--no-onnx", PAPERS_RUNS=str(tmp_path))
    rows = {r["network"]: r for r in json.loads((tmp_path / "irisusformer/bench.json").read_text())["rows"]}
    assert {"ours, naive", "ours", "ours, fast_up", "ours, bf16", "U-Net", "IrisParseNet"} <= set(rows)
    assert {"small, bf16", "lite, bf16"} <= set(rows)
    assert rows["ours"]["gmacs"] < rows["U-Net"]["gmacs"] < rows["IrisParseNet"]["gmacs"]
    # gradients of weights and maps cost a forward pass each, but for the map before the first convolution
    assert 2.7 < rows["ours, training step"]["gmacs"] / rows["ours"]["gmacs"] < 3
    assert all(row["per_second"] > 0 and row["peak memory, MiB"] > 0 for row in rows.values())


@pytest.mark.slow
def test_base_is_faster_than_its_naive_version():
    config = BenchConfig(compile=False, onnx=False)
    rows = {row["network"]: row for row in rows_of(config, Path())}
    assert rows["ours"]["x naive"] >= 1.5
