"""Biphasic ageing: training, resume, several processes, evaluation in miniature; the demo's claims (slow)."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
from curves import assert_same_curves, run_one, run_two
from PIL import Image
from safetensors.torch import load_file

from biphasic_age import eval as evaluation
from biphasic_age import train as training
from biphasic_age.data import drawn_faces
from biphasic_age.discriminator import TwoScales
from biphasic_age.losses import Weights
from biphasic_age.model import Generator
from biphasic_age.stages import (
    TABLE,
    VARIANTS,
    build,
    build_critic,
    learned_guides,
    load_generator,
    plan,
    stage_file,
    weights_of,
)
from biphasic_age.train import PRESETS, Config, other_groups, train
from shared.io import to_pil
from shared.records import plain, revive
from shared.runtime import UserError, parse, parse_presets

TINY = (*helpers.TINY["biphasic_age"], "--device", "cpu")
JUDGES = {
    "judge_people": 8, "judge_steps": 4, "judge_batch": 8, "judge_width": 4, "scene_judge_steps": 4,
    "device": "cpu",
}  # fmt: skip
script = partial(helpers.script, "biphasic_age")


def tiny(scene: dict | None = None, **changes) -> Config:
    """The demo in miniature. changes: to its `Config` or to its faces' `Recipe`; scene: to the scene's."""
    config = parse_presets(PRESETS, "", ["demo", *TINY])
    learning = {"variants": ("full",)}
    learning |= {key: changes.pop(key) for key in list(changes) if hasattr(config.recipe, key)}
    recipe = replace(config.recipe, **learning)
    scene = replace(config.scene, **{"variants": ("full",)} | (scene or {}))
    return replace(config, **{"data": ("faces",)} | changes, recipe=recipe, scene=scene)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    names = ("--variants", "full", "plain", "--scene.variants", "full", "no-layout")
    done = script("train.py", "demo", *TINY, *names, "--out", str(folder), fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(folder)
    return folder


def test_training_leaves_the_run_folder_described(run_folder):
    trained = {path.stem for path in (run_folder / "trained").iterdir()}
    assert trained == {
        *("scene-age-0", "scene-full-0", "scene-no-layout-0", "scene-about"),
        *(
            "faces-age-0",
            "faces-identity-0",
            "faces-parser-0",
            "faces-full-0",
            "faces-plain-0",
            "faces-about",
        ),
    }
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 * 3 + 4 * 4
    named = {name for line in lines for name in line}
    for term in ("reconstruction", "cycle", "adversarial", "age", "critic", "disentangle"):
        assert f"scene/full/0/{term}" in named and f"faces/full/0/{term}" in named
    assert "faces/full/0/identity" in named and "scene/full/0/identity" not in named
    assert "faces/plain/0/disentangle" not in named
    assert (run_folder / "samples" / "faces-full-0.png").is_file()


@pytest.fixture(scope="module")
def evaluated(run_folder) -> str:
    """What the first evaluation of the run printed."""
    judges = [word for key, value in JUDGES.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    done = script("eval.py", "--run", str(run_folder), *judges, fresh=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_evaluation_prints_claims_and_writes_results(run_folder, evaluated):
    assert evaluated.strip().splitlines()[-1] == str(run_folder)
    assert "claims:" in evaluated and "no row here is a result of the paper" in evaluated
    assert "mean absolute error" in evaluated and "false accept rate" in evaluated
    assert "% of the true scenes" in evaluated
    assert all(column in evaluated for column in ("helper accuracy", "full, by noise", "self SSIM"))
    results = json.loads((run_folder / "results.json").read_text())
    ids = [claim["id"] for claim in results["claims"]]
    assert ids == [f"C{i}" for i in range(1, len(ids) + 1)] and len(ids) >= 10
    assert not any(metric["comparable"] for metric in results["metrics"])
    assert {m["method"] for m in results["metrics"]} == {"copy", "full", "no-layout", "plain", "prototypes"}
    assert len(results["faces"]["ages"]["full"]) == 6
    for title in ("young-to-old", "old-to-young"):
        for name in ("full", "plain", "prototypes", "truth"):
            assert (run_folder / "samples" / f"test-faces-{title}-{name}.png").is_file()
    for name in ("test-faces-young-to-old-full", "test-scene", "faces-full-0"):
        with Image.open(run_folder / "samples" / f"{name}.png") as picture:
            assert "synthetic" in picture.text["Description"], name


def test_judges_are_kept_and_give_the_same_again(run_folder, evaluated):
    first = json.loads((run_folder / "results.json").read_text())["faces"]
    assert first["judges"]["verifier"]["far"] <= 0.01
    evaluation.main(evaluation.EvalConfig(run=run_folder, **JUDGES))
    again = json.loads((run_folder / "results.json").read_text())["faces"]
    assert again["by seed"] == first["by seed"] and again["judges"] == first["judges"]
    assert {path.name for path in (run_folder / "judges").iterdir()} == {
        f"faces-{name}.{ending}" for name in ("age", "identity") for ending in ("safetensors", "json")
    }


def test_a_run_is_loaded_for_use(run_folder):
    trained = load_generator(run_folder)
    assert isinstance(trained.net, Generator) and not trained.net.training and trained.data == "faces"
    assert trained.scale.names == ("36-", "37-52", "53-68", "69+") and trained.parser is not None
    (left, left_y), (right, right_y) = trained.eyes
    assert 0.2 < left < 0.5 < right < 0.8 and 0.3 < left_y < 0.7 and abs(left_y - right_y) < 0.1
    weights = trained.scale.weights(torch.tensor([30.0, 60.0]))
    made = trained.net(torch.zeros(2, 3, 16, 16), torch.ones(2, 16, 16, dtype=torch.uint8), weights, 0.0)
    assert made.shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="without the variant no-self"):
        load_generator(run_folder, "no-self")


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    arguments = ["demo", *TINY, "--data", "faces", "--variants", "full", "no-noise", "--average", "0.9"]
    arguments += ["--steps", "30", "--guide-steps", "10", "--warmup", "3"]
    # In the second of three stages.
    helpers.assert_resumes("biphasic_age", tmp_path, 12, *arguments)


def test_two_processes_give_the_curves_of_one(tmp_path):
    # Three steps of each stage: after more, rounding decides on signs in the kink of the residual's L1.
    arguments = ["demo", *TINY, "--data", "faces", "--steps", "3", "--log-every", "1"]
    one, two = run_one(train, PRESETS, tmp_path, *arguments), run_two("biphasic_age", tmp_path, *arguments)
    assert_same_curves(one, two, lines=6)
    assert load_generator(two).net is not None


# --- switches -----------------------------------------------------------------------------------------------


def test_every_row_of_the_ablation_table_trains(tmp_path):
    folder = train(tiny(out=tmp_path / "run", data=("scene",), scene={"variants": TABLE, "steps": 1}))
    for name in TABLE:
        assert (folder / "trained" / f"scene-{name}-0.safetensors").is_file(), name


def test_switches_take_out_what_they_name():
    config = tiny()
    for name, part in (
        ("no-constraint", "constraint."),
        ("no-attention", "attention."),
        ("plain", "projection."),
    ):
        assert not any(part in key for key in build(config, "faces", name).state_dict())
        assert any(part in key for key in build(config, "faces", "full").state_dict())
    for name, term in (
        ("no-self", "reconstruction"),
        ("no-cycle", "cycle"),
        ("no-age", "age"),
        ("no-identity", "identity"),
        ("no-adversarial", "adversarial"),
    ):
        changed, normal = weights_of(config, "faces", name), config.recipe.weights
        assert getattr(changed, term) == 0 and getattr(normal, term) > 0
        assert replace(changed, **{term: getattr(normal, term)}) == normal
    channels = {name: build_critic(config, "faces", name).first.weight.shape[1] for name in TABLE}
    assert channels["full"] == 22 and {n for n, c in channels.items() if c == 3} == {
        *("no-layout", "d-image", "plain")
    }
    assert isinstance(build_critic(replace(config, two_scales=True), "faces", "full"), TwoScales)
    for preset in ("study", "ablation"):
        assert set(VARIANTS) == set(PRESETS[preset].recipe.variants)


def test_without_layout_nothing_of_it_reaches_the_output():
    torch.manual_seed(0)
    image, layout = torch.rand(1, 3, 16, 16), torch.randint(0, 19, (1, 16, 16))
    for name, same in (("full", False), ("no-layout", True)):
        net = build(tiny(output="direct"), "faces", name).eval()
        with torch.no_grad():
            made = [net(image, entry, torch.tensor([1]), 0.0) for entry in (layout, layout.flip(-1))]
        assert torch.equal(*made) == same


def test_options_beyond_the_demo(tmp_path):
    weights = replace(Weights(), perceptual=0.1, detail=0.1, confusion=0.1, adversarial_self=0.5)
    config = tiny(
        out=tmp_path / "run", weights=weights, mismatch=True, reparse=True, two_scales=True, flip=True,
        jitter=0.1, average=0.9, warmup=2, output="gated",
    )  # fmt: skip
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    early = {name.rsplit("/", 1)[1] for name in lines[-2] if name != "step"}
    late = {name.rsplit("/", 1)[1] for name in lines[-1] if name != "step"}
    # In the warm-up only the self-driven strategy runs, and the discriminator rests.
    assert {"cycle", "adversarial", "critic"}.isdisjoint(early) and "reconstruction" in early
    assert late >= {"cycle", "perceptual", "detail", "confusion", "adversarial_self", "identity", "critic"}
    assert load_generator(folder).config.recipe.weights == weights


def test_what_a_run_must_train_itself():
    config = tiny()
    assert learned_guides(config, "faces") == ["age", "identity", "parser"]
    assert learned_guides(config, "scene") == ["age"]
    given = replace(config, age_weights=Path("a"), identity_weights=Path("i"), parser_weights=Path("p"))
    assert learned_guides(given, "faces") == [] and plan(given)[0].name == "full"
    with pytest.raises(UserError, match="unknown variant"):
        plan(tiny(variants=("nothing",)))
    with pytest.raises(UserError, match="three --limits"):
        plan(tiny(data=("scene",), limits=(30.0, 50.0)))


def test_targets_are_other_groups_each_as_often():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat(3000)
    target = other_groups(groups, 4, generator)
    assert (target != groups).all()
    counts = torch.bincount(groups * 4 + target, minlength=16).view(4, 4)
    assert (counts.diag() == 0).all() and (counts[counts > 0] - 1000).abs().max() < 120


def test_settings_survive_the_record():
    config = tiny(weights=replace(Weights(), cycle=3.0))
    assert revive(json.loads(json.dumps(plain(config))), Config) == config


# --- a set of files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """Drawn faces as files with layouts and a CSV list, ten people of whom each is there at four ages."""
    root = tmp_path_factory.mktemp("set")
    source = drawn_faces(10, 7, 16, 4)
    (root / "parsing").mkdir()
    lines = ["path,age,identity,sex"]
    for i in range(len(source)):
        image, layout = source.load(i)
        to_pil(image).save(root / f"{i:03d}.png")
        Image.fromarray(layout.numpy()).save(root / "parsing" / f"{i:03d}.png")
        age = (25, 45, 60, 75)[i % 4]
        lines.append(f"{i:03d}.png,{age},person {int(source.people[i])},M")
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root / "list.csv"


def test_a_list_of_files_is_trained_and_evaluated(listed, tmp_path, capsys):
    folder = train(tiny(out=tmp_path / "run", data=("csv",), list=listed, workers=0))
    assert "40 pictures of 10 people" in capsys.readouterr().out
    evaluation.main(evaluation.EvalConfig(run=folder, **JUDGES))
    results = json.loads((folder / "results.json").read_text())
    full = results["csv"]["by seed"]["full"]["0"]
    assert "true PSNR" not in full and {"age error older", "age error younger"} <= full.keys()
    assert results["csv"]["judges"]["verifier"]["genuine"] == 2 * 6  # two people at four ages
    assert (folder / "samples" / "test-csv-old-to-young-full.png").is_file()
    assert not (folder / "samples" / "test-csv-old-to-young-truth.png").exists()


def test_people_are_needed_for_an_identity_network(listed, tmp_path):
    lines = listed.read_text().splitlines()
    alone = [lines[0]] + [f"{n:03d}.png,{(25, 45, 60, 75)[n % 4]},face {n}," for n in range(40)]
    path = listed.parent / "alone.csv"
    path.write_text("\n".join(alone))
    with pytest.raises(UserError, match="no identity network can be trained"):
        train(tiny(out=tmp_path / "run", data=("csv",), list=path))


# --- mistakes ---------------------------------------------------------------------------------------------


def test_user_mistakes_end_with_one_message(tmp_path):
    done = script("train.py", "paper", "--data-root", str(tmp_path / "none"), "--out", str(tmp_path / "o"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "no folder" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="not a run folder"):
        evaluation.main(evaluation.EvalConfig(run=tmp_path))


@pytest.mark.parametrize("option", ["age_weights", "identity_weights", "parser_weights", "list"])
def test_a_wrong_file_is_said_before_there_is_a_run(option, tmp_path):
    """Not after the small networks have learnt, and without a folder that would be the newest run."""
    (tmp_path / "text.txt").write_text("neither weights nor a list")
    with pytest.raises(UserError, match="text.txt"):
        train(
            tiny(
                out=tmp_path / "run",
                data=("csv",) if option == "list" else ("faces",),
                **{option: tmp_path / "text.txt"},
            )
        )
    assert not (tmp_path / "run").exists()


def test_a_parser_that_nobody_has_is_asked_for(tmp_path):
    """Without layouts none is trained, and parsing the translated faces needs one."""
    with pytest.raises(UserError, match="79999_iter.pth"):
        train(tiny(out=tmp_path / "run", variants=("no-layout",), layouts=False, reparse=True))


def test_an_age_network_of_a_run_is_taken_by_another_of_its_sizes(run_folder, tmp_path):
    config = tiny(out=tmp_path / "run", age_weights=run_folder / "trained" / "faces-age-0.safetensors")
    assert "age" not in learned_guides(config, "faces")
    train(config)
    with pytest.raises(UserError, match="made for another model than AgeNet"):
        train(replace(config, age_width=config.age_width + 4, out=tmp_path / "other"))


def test_files_for_the_evaluation_are_opened_before_it_begins(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_scene", None)
    monkeypatch.setattr(evaluation, "evaluate_faces", None)
    (tmp_path / "text.txt").write_text("no weights")
    for option in ("fid_weights", "lpips_weights", "parser_weights", "age_judge", "identity_judge"):
        with pytest.raises(UserError, match="text.txt"):
            evaluation.main(evaluation.EvalConfig(run=run_folder, **{option: tmp_path / "text.txt"}))


def test_learning_rates_fall_to_nothing_in_the_second_half(tmp_path, monkeypatch):
    assert [training.schedule(step, 8) for step in (0, 4, 5, 6, 8)] == [1, 1, 0.75, 0.5, 0]
    asked = []
    monkeypatch.setattr(training, "schedule", lambda step, steps: asked.append((step, steps)) or 0.0)
    folder = train(tiny(out=tmp_path / "run", steps=2))
    assert asked == [(0, 2), (0, 2), (1, 2), (1, 2)]  # of generator and discriminator, which then stand still
    fresh = torch.manual_seed(0) and build(tiny(), "faces", "full")
    made = load_file(stage_file(folder, next(s for s in plan(tiny()) if s.name == "full")))
    for name, value in fresh.named_parameters():
        assert torch.equal(made[name], value), name


def test_more_test_pictures_than_the_run_was_told(run_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation, "evaluate_scene", lambda s, config, *_: seen.append(config.test_images) or ([], {})
    )
    monkeypatch.setattr(
        evaluation, "evaluate_faces", lambda s, config, *_: seen.append(config.test_images) or ([], {}, {})
    )
    monkeypatch.setattr(evaluation, "write_results", lambda *_: None)
    evaluation.main(evaluation.EvalConfig(run=run_folder, test_images=7, device="cpu"))
    assert set(seen) == {7}


@pytest.mark.parametrize(
    "given",
    [
        "--log-every 0", "--batch-size 0", "--train-images 1", "--pictures 0", "--guide-lr nan",
        "--workers -1", "--seeds 0", "--average 2", "--fold 6", "--recipe.steps 0", "--recipe.lr 0",
        "--scene.steps 0", "--warmup -1",
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(given):
    option, value = given.replace("--recipe.", "--").split()
    with pytest.raises(UserError, match=r"^--[\w.-]+ .*: give "):
        parse_presets(PRESETS, "", ["demo", option, value])


@pytest.mark.parametrize(
    "given", ["--judge-steps 0", "--judge-people 0", "--far 0", "--far -1", "--test-images 0"]
)
def test_judges_options_out_of_range_are_named(given):
    with pytest.raises(UserError, match=f"^{given.split()[0]} "):
        parse(evaluation.EvalConfig, "", given.split())


def test_limits_must_rise():
    with pytest.raises(UserError, match="--limits 50 40 30: give rising ages"):
        plan(tiny(limits=(50.0, 40.0, 30.0)))


@pytest.mark.slow
def test_the_demo_holds_its_claims(tmp_path):
    """The demo itself: minutes. Those that the README says hold do; C3 (wrinkles are weaker than they should
    be) and C11 (prototypes) do not, and C5 (wrinkles of the youngest made old) does on one thread alone."""
    folder = train(replace(PRESETS["demo"], out=tmp_path / "run", device="cpu"))
    evaluation.main(evaluation.EvalConfig(run=folder, device="cpu"))
    claims = json.loads((folder / "results.json").read_text())["claims"]
    held = {claim["id"] for claim in claims if claim["holds"]}
    assert len(claims) == 11 and held >= {f"C{i}" for i in range(1, 12)} - {"C3", "C5", "C11"}
