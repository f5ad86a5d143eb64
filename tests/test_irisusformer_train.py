"""IrisUsformer's training: variants, schedule, weighting, fine-tuning, several data sets and processes."""

import json
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from curves import assert_same_curves, furthest_weights, run_one, run_two
from PIL import Image
from torch.utils.data import Subset

from irisusformer import cross_database
from irisusformer import eval as evaluation
from irisusformer.bench import BenchConfig
from irisusformer.cross_database import label, matrix
from irisusformer.draw import DrawConfig, draw
from irisusformer.eyes import draw_eye
from irisusformer.iris import identity
from irisusformer.predict import PredictConfig
from irisusformer.protocol import evaluate
from irisusformer.recognition import RecognitionConfig
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
from shared.runtime import UserError, parse, parse_presets

test_set.__test__ = False  # a function of train.py, no test
TINY = [*helpers.TINY["irisusformer"], "--variants", "learned", "ce", "--ensemble", "2"]
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


@pytest.mark.parametrize(
    "option",
    [
        *("--labels -1", "--labels 0", "--train-images 0", "--test-images 0", "--image-size 64 1"),
        *("--log-every 0", "--save-every 0", "--batch-size 0", "--seeds 0", "--ensemble -1", "--dropout 1.5"),
        *("--lr nan", "--lr 0", "--ema 1.5", "--clip 0", "--beta -1", "--plain-start 2", "--warmup -1"),
        "--steps 0",
    ],
)
def test_settings_out_of_range_are_refused(option):
    with pytest.raises(UserError, match=f"{option.split()[0]} .*: give "):
        parse_presets(PRESETS, "", ["demo", *option.split()])


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (PredictConfig, ("--tau nan", "--tau -3", "--every 0", "--short-side 8")),
        (RecognitionConfig, ("--rotation -1", "--people 0", "--pictures 0", "--tau 2")),
        (BenchConfig, ("--height 0", "--batch-size -1", "--seconds 0")),
        (DrawConfig, ("--count 0", "--pictures 0", "--first -1", "--height 8")),
    ],
)
def test_options_out_of_range_are_refused(config_class, options):
    needed = {PredictConfig: ["--input", "eye.png", "--output", "out"], DrawConfig: ["--output", "out"]}
    for option in options:
        with pytest.raises(UserError, match=f"{option.split()[0]} .*: give "):
            parse(config_class, "", [*needed.get(config_class, ()), *option.split()])


def test_procedural_eyes_need_a_look_and_simple_ones_are_square():
    with pytest.raises(UserError, match="--looks: give at least one of nir"):
        training_set(replace(SMALL, looks=()))
    with pytest.raises(UserError, match="--image-size 64 96: simple eyes are square"):
        training_set(replace(SMALL, dataset="simple", image_size=(64, 96)))


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
    seen, asked = [], {"mode": "ce", "weighting": "emphasize"}

    def spy(out, target, mode, weighting, **rest):
        seen.append(weighting)
        return original(out, target, mode, weighting, **rest)

    from irisusformer import train as module

    original = module.objective
    monkeypatch.setattr(module, "objective", spy)
    for options, weighting in (({}, "attenuate"), ({"mode": "ce"}, "none"), (asked, "emphasize")):
        learner = Learner(
            "learned", replace(SMALL, steps=10, plain_start=0.2, **options), torch.device("cpu")
        )
        seen.clear()
        for step in range(4):
            learner.update(learner.model, eyes_in_white(), step, Accelerator(cpu=True))
        assert seen == ["none", "none", weighting, weighting]


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
    rows = evaluation.metrics_of(config, {"learned": result})
    assert [row.metric for row in rows if row.comparable] == ["E1", "mIoU (iris class)", "F1"]
    assert {row.method for row in rows} == {"IrisUsformer"}
    assert not any(row.comparable for row in evaluation.metrics_of(replace(config, labels=20), {"a": result}))
    nice = evaluation.metrics_of(replace(config, arch="bitrans"), {"learned": result}, nice=True)
    assert {row.method for row in nice} == {"BiTrans"} and not nice[0].comparable
    evaluation.print_beside(config, {"learned": result}, load_published("irisusformer"), nice=False)
    printed = capsys.readouterr().out
    assert "IrisParseNet (published)  0.41" in printed and "learned (measured)" in printed


def test_boundary_heads_need_masks_to_learn_from_and_others_read_none(tmp_path):
    for split in ("train", "test"):
        draw(DrawConfig(tmp_path / split, count=2, height=32, width=48))
    config = replace(SMALL, dataset="ubiris", data_root=tmp_path, boundaries=True)
    for role, name in (("outer", "iris_edge_mask"), ("pupil", "pupil_edge_mask")):
        data = training_set(config), test_set(replace(config, boundaries=False))
        assert getattr(data[0].pairs[0], role) and not getattr(data[1].pairs[0], role)
        (tmp_path / "train" / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=f"--boundaries: ubiris has no {name} to learn from"):
            training_set(config)
        (tmp_path / name).rename(tmp_path / "train" / name)


def test_cross_database_matrix(tmp_path, monkeypatch, capsys):
    folders = [
        train(replace(SMALL, out=tmp_path / "nir", looks=("nir",))),
        train(replace(SMALL, out=tmp_path / "simple", dataset="simple")),
    ]
    found = matrix(folders, "cpu")
    assert set(found) == {"eyes:nir", "simple"} and set(found["simple"]) == {"eyes:nir", "simple"}
    assert all(0 <= cell["e1"] <= 100 for row in found.values() for cell in row.values())
    written = tmp_path / "found" / "matrix.json"
    arguments = ["--runs", *map(str, folders), "--output", str(written), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["cross_database.py", *arguments])
    cross_database.main()
    assert json.loads(written.read_text()) == found
    assert f"{found['simple']['eyes:nir']['e1']:.4g}"[:4] in capsys.readouterr().out
    with pytest.raises(UserError, match="same data"):
        matrix([folders[0], folders[0]], "cpu")
    with pytest.raises(UserError, match="at least two runs"):
        matrix(folders[:1], "cpu")
    own = [replace(SMALL, dataset="folder", data_root=tmp_path / sensor) for sensor in ("mine", "theirs")]
    assert [label(config) for config in own] == [f"folder:{tmp_path}/mine", f"folder:{tmp_path}/theirs"]


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
