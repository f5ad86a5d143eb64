"""IrisUsformer's scripts: training, resuming, evaluation, prediction, export, the cross-database matrix."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from curves import assert_same_curves, furthest_weights, run_one, run_two
from PIL import Image
from torch.utils.data import Subset

from irisusformer import eval as evaluation
from irisusformer.bench import BenchConfig, rows_of
from irisusformer.cross_database import matrix
from irisusformer.export import export, largest_difference
from irisusformer.eyes import draw_eye
from irisusformer.iris import identity
from irisusformer.metrics import ErrorDetection
from irisusformer.model import IrisUsformer
from irisusformer.predict import PredictConfig, frames, predict_images, predict_video, segment
from irisusformer.protocol import Result, evaluate
from irisusformer.train import (
    DEMO,
    PRESETS,
    VARIANTS,
    Learner,
    build,
    learning_rate,
    load_init,
    test_set,
    train,
    training_set,
    variants,
)
from shared.io import load_weights
from shared.published import load_published
from shared.runtime import UserError

test_set.__test__ = False  # a function of train.py, no test
SCRIPTS = ["train", "eval", "predict", "export", "cross_database", "recognition", "draw", "bench"]
TINY = [*helpers.TINY["irisusformer"], "--variants", "learned", "ce", "--ensemble", "2"]


def run(script, *arguments, code=0, **environment):
    return helpers.script("irisusformer", f"{script}.py", *arguments, code=code, **environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train", "demo", *TINY, "--steps", 12, "--save-every", 4, "--out", out)
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
    done = run("eval", "--run", trained)
    assert done.stdout.splitlines()[-1] == str(trained)
    for text in ("AUROC", "ensemble of ce", "MC dropout", "flip disagreement", "temperature", "cost: holds"):
        assert text in done.stdout
    results = json.loads((trained / "results.json").read_text())
    claims = {claim["id"]: claim for claim in results["claims"]}
    assert claims["cost"]["holds"] and "position-sensitive" not in claims  # needs the plain network
    assert set(results["segmentation"]) == {"learned", "ce", "ce-1"}
    assert all(not metric["comparable"] for metric in results["metrics"])
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
    model = IrisUsformer("tiny").eval()
    for asked in (False, True):
        out = tmp_path / f"out-{asked}"
        out.mkdir()
        predict_video(model, PredictConfig(film, out, every=2, frame_maps=asked), 64)
        assert (out / "film").is_dir() == asked and (out / "film_overlay.mp4").exists()
    for kind in ("mask", "overlay", "uncertainty"):
        found = sorted(path.name for path in (out / "film").glob(f"*_{kind}.png"))
        assert found == [f"000000_{kind}.png", f"000002_{kind}.png"]


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


def test_large_images_are_shrunk_for_the_network_only():
    torch.manual_seed(0)
    maps = segment(IrisUsformer("tiny", boundaries=True).eval(), torch.rand(3, 300, 500), short_side=64)
    assert {tuple(value.shape) for value in maps.values()} == {(300, 500)}
    assert maps["mask"].dtype == maps["high_region"].dtype == maps["pupil"].dtype == torch.bool


# ------------------------------------------------------------------------------------------------- training

SMALL = replace(
    DEMO,
    train_images=8,
    test_images=4,
    batch_size=4,
    steps=3,
    log_every=1,
    save_every=3,
    variants=("learned",),
    ensemble=1,
)


def test_every_variant_differs_from_the_method_in_what_its_name_says():
    named = variants(replace(DEMO, variants=tuple(VARIANTS)))
    assert set(named) == set(VARIANTS) | {"ce-1", "ce-2"}
    assert named["learned"] == replace(DEMO, variants=tuple(VARIANTS))
    assert not named["plain"].position_sensitive and named["d2"].aux_at == "d2"
    assert named["learned_noisy"].annotation == "noisy" and named["ce-2"].seed == 2
    with pytest.raises(UserError, match="choose from learned"):
        variants(replace(DEMO, variants=("nonsense",)))


def test_study_trains_everything_on_both_worlds():
    assert set(PRESETS["study"].variants) == set(VARIANTS) and PRESETS["study"].seeds == 2
    assert PRESETS["study-simple"].dataset == "simple"


def test_learning_rate_warms_up_and_decays():
    config = replace(DEMO, lr=1.0, warmup=10, steps=100)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 50) == pytest.approx(0.5**0.9)
    assert learning_rate(config, 100) == 0


def test_weight_decay_spares_norms_and_biases():
    learner = Learner("learned", SMALL, torch.device("cpu"))
    decayed, others = learner.optimizer.param_groups
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0
    assert {p.ndim for p in others["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 4


def eyes_in_white() -> dict[str, torch.Tensor]:
    """A batch in which everything is iris."""
    mask = torch.ones(2, 1, 32, 32, dtype=torch.uint8)
    return {"image": torch.rand(2, 3, 32, 32), "mask": mask, "regions": mask.repeat(1, 2, 1, 1)}


def test_weighting_begins_after_the_plain_start(monkeypatch):
    seen = []

    def spy(out, target, mode, weighting, **rest):
        seen.append(weighting)
        return original(out, target, mode, weighting, **rest)

    from irisusformer import train as module

    original = module.objective
    monkeypatch.setattr(module, "objective", spy)
    learner = Learner("learned", replace(SMALL, steps=10, plain_start=0.2), torch.device("cpu"))
    for step in range(4):
        learner.update(learner.model, eyes_in_white(), step, Accelerator(cpu=True))
    assert seen == ["none", "none", "attenuate", "attenuate"]


def test_average_of_the_weights_follows_them():
    """Early steps count more: the decay begins at 1/10."""
    for ema, step, decay in ((0.9, 0, 0.1), (0.9, 200, 0.9)):
        learner = Learner("learned", replace(SMALL, ema=ema, steps=1000), torch.device("cpu"))
        parameter, average = next(learner.model.parameters()), next(learner.average.parameters())
        before = average.clone()
        learner.update(learner.model, eyes_in_white(), step, Accelerator(cpu=True))
        assert not torch.equal(parameter, before)
        torch.testing.assert_close(average, decay * before + (1 - decay) * parameter.detach())
        assert learner.result is learner.average


def test_training_sets_tau_from_the_training_images(tmp_path):
    folder = train(replace(SMALL, out=tmp_path / "run", ema=0.5))
    model = build(SMALL)
    assert load_weights(folder, {"learned": model}) == {"step": 3}
    data = training_set(SMALL)
    values = model.eval().predict(torch.stack([data[i]["image"] for i in range(8)]))["uncertainty"].flatten()
    assert model.tau.item() == pytest.approx(0.5 * values.quantile(0.99).item(), rel=0.05)


def test_fine_tuning_begins_with_the_given_weights_and_few_labels(tmp_path):
    folder = train(replace(SMALL, out=tmp_path / "first"))
    model = build(SMALL)
    load_init(folder, model, "learned", SMALL)
    other = build(SMALL)
    load_init(folder / "checkpoint" / "learned.safetensors", other, "learned", SMALL)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    config = replace(SMALL, init=folder, labels=3, out=tmp_path / "second")
    assert len(training_set(config)) == 3
    torch.testing.assert_close(
        Learner("learned", config, torch.device("cpu")).model.state_dict(), model.state_dict()
    )
    train(config)
    with pytest.raises(UserError, match="its network has size tiny, not lite; train one of the same shape"):
        Learner("learned", replace(config, size="lite"), torch.device("cpu"))


def test_training_on_files_with_boundary_heads(tmp_path, capsys):
    for split in ("train", "test"):
        for i in range(2):
            eye = draw_eye(identity(i), 0, 60, 80, "nir", 1)
            layers = {"image": (eye.image * 255).astype(np.uint8), "SegmentationClass": eye.mask}
            layers |= {"pupil_edge_mask": eye.pupil, "iris_edge_mask": eye.outer}
            for name, array in layers.items():
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                array = array if array.dtype == np.uint8 else array.astype(np.uint8) * 255
                Image.fromarray(array).save(folder / f"{i}.png")
    config = replace(
        SMALL, dataset="casia-distance", data_root=tmp_path / "data", crop=64, boundaries=True, steps=2
    )
    folder = train(replace(config, out=tmp_path / "run"))
    assert "learned/regions" in json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    model = build(config)
    load_weights(folder, {"learned": model})
    result = evaluate(model, test_set(config), torch.device("cpu"))
    assert len(result.boundaries) == 2 and set(result.localisation()) >= {"inner_hdis", "dice_outer"}
    assert all(np.isfinite(result.scaled_ece()))
    alone = evaluate(model, Subset(test_set(config), [0]), torch.device("cpu"))
    assert np.isnan(alone.scaled_ece()).all(), "one image cannot be scaled with another's temperature"
    rows = evaluation.metrics_of(config, {"learned": result})
    assert not any(row.comparable for row in rows) and rows[0].dataset == "CASIA-Iris-Distance"
    result.images *= 50  # as many as the published split has
    result.mean_uncertainty *= 50
    assert all(row.comparable for row in evaluation.metrics_of(config, {"learned": result}))
    evaluation.print_beside(config, {"learned": result}, load_published("irisusformer"), nice=False)
    printed = capsys.readouterr().out
    assert "IrisParseNet (published)  0.41" in printed and "learned (measured)" in printed


def test_cross_database_matrix(tmp_path):
    folders = [
        train(replace(SMALL, out=tmp_path / "nir", looks=("nir",))),
        train(replace(SMALL, out=tmp_path / "simple", dataset="simple")),
    ]
    found = matrix(folders, "cpu")
    assert set(found) == {"eyes:nir", "simple"} and set(found["simple"]) == {"eyes:nir", "simple"}
    assert all(0 <= cell["e1"] <= 100 for row in found.values() for cell in row.values())
    with pytest.raises(UserError, match="same data"):
        matrix([folders[0], folders[0]], "cpu")


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


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    config = replace(
        DEMO, out=tmp_path / "run", variants=("learned",), steps=250, train_images=150, test_images=60
    )
    model = build(config)
    load_weights(train(config), {"learned": model})
    result = evaluate(model, test_set(config), torch.device("cpu"), 20)
    assert result.segmentation()["e1"] < 3 and result.uncertainty()["auroc"] > 0.92


def test_two_processes_give_the_curves_of_one(tmp_path):
    arguments = [
        "demo",
        *TINY,
        "--steps",
        "6",
        "--save-every",
        "6",
        "--batch-size",
        "4",
        "--lambda-dice",
        "0.5",
    ]
    arguments += ["--variants", "learned", "dropout", "--ema", "0.9", "--image-size", "32", "32"]
    a = run_one(train, PRESETS, tmp_path, *arguments)
    b = run_two("irisusformer", tmp_path, *arguments)
    assert_same_curves(a, b, lines=6)
    assert furthest_weights(a / "checkpoint", b / "checkpoint") < 1e-3
