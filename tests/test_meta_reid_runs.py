"""META: schedules, training, resume and evaluation as a user runs them."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import helpers
import pytest
import torch
from curves import assert_same_curves, furthest_weights, run_one, run_two
from safetensors.torch import load_file

from meta_reid import eval as evaluation
from meta_reid import predict
from meta_reid.eval import Options, protocol_metrics, rows_of
from meta_reid.losses import objective
from meta_reid.rows import VARIANTS, plan
from meta_reid.train import PRESETS, learning_rate, optimiser, train
from meta_reid.walkers import draw
from shared.io import Run, write_image
from shared.runtime import UserError, parse_presets


def script(name: str, *arguments: str, runs: Path, fresh: bool = False) -> subprocess.CompletedProcess:
    return helpers.script("meta_reid", name, *arguments, fresh=fresh, PAPERS_RUNS=str(runs))


def test_schedule():
    config = PRESETS["paper"]
    per_epoch, steps = 857, 857 * 120
    rate = [learning_rate(step, steps, per_epoch, config) for step in range(0, steps)]
    assert rate[0] == pytest.approx(0.004) and rate[499] == pytest.approx(0.04 * 0.9982, rel=1e-5)
    assert all(a >= b for a, b in zip(rate[500:], rate[501:], strict=False))
    assert rate[857] == rate[2 * 857 - 1] > rate[2 * 857]  # the cosine moves once an epoch
    assert rate[-1] == pytest.approx(4e-5, rel=1e-3)


def test_presets_and_weight_decay():
    assert PRESETS["paper"].people * PRESETS["paper"].images == 64 and PRESETS["paper"].epochs == 120
    assert PRESETS["protocol1"] == replace(PRESETS["paper"], protocol="1")
    paper = PRESETS["paper"]
    assert (paper.architecture, paper.height, paper.width, paper.pretrained) == ("r50", 256, 128, True)
    assert (paper.lr, paper.final_lr, paper.warmup, paper.freeze) == (0.04, 4e-5, 500, 500)
    assert (paper.consistency, paper.uniformity, paper.clip) == (1, 0, None)
    row = plan(replace(PRESETS["demo"], seeds=1, variants=("meta",)), {0: [3, 3, 3]})[0]
    groups = optimiser(row.model, row.config).param_groups
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in groups)
    names = {id(p): name for name, p in row.model.named_parameters()}
    assert [group["weight_decay"] for group in groups] == [5e-4, 0]
    assert all("bias" in names[id(p)] for p in groups[1]["params"])
    assert not any("F_final" in names[id(p)] for group in groups for p in group["params"])
    with pytest.raises(UserError, match=r"unknown variant \['x'\]"):
        plan(replace(PRESETS["demo"], seeds=1, variants=("x",)), {0: [3, 3, 3]})


def test_inactive_experts_stay_still(tmp_path):
    config = replace(
        PRESETS["demo"],
        seeds=1,
        steps=1,
        warmup=0,
        variants=("meta",),
        out=tmp_path / "run",
        device="cpu",
        save_every=20,
    )
    before = plan(config, {0: [40, 40, 40]})[0].model.state_dict()
    folder = train(config)
    after = load_file(folder / "checkpoint" / "meta-0.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "backbone.bn11.weight" in moved and "backbone.bn14.weight" in moved
    assert not any("bn12." in name or "bn13." in name for name in moved if name.startswith("backbone."))
    assert not any("Expert2.classifier" in name for name in moved)


def test_the_trunk_thaws_and_the_rate_moves_while_it_trains(tmp_path):
    config = replace(
        PRESETS["demo"],
        seeds=1,
        variants=("meta",),
        people=4,
        warmup=2,
        freeze=1,
        device="cpu",
        save_every=20,
    )
    frozen = plan(config, {0: [40, 40, 40]})[0].model.state_dict()
    for steps, thawed in ((1, False), (2, True)):
        changed = replace(config, steps=steps, out=tmp_path / str(steps))
        checkpoint = train(changed) / "checkpoint"
        after = load_file(checkpoint / "meta-0.safetensors")
        for name in ("backbone.conv1.weight", "backbone.bn14.weight", "backbone.bn14.running_mean"):
            assert torch.equal(after[name], frozen[name]) != thawed, name
        assert not torch.equal(after["backbone.bn11.weight"], frozen["backbone.bn11.weight"])
        groups = torch.load(checkpoint / "state.pt")["objects"]["optimiser"]["param_groups"]
        assert groups[0]["lr"] == learning_rate(steps - 1, steps, 60, changed)
    held = replace(config, steps=1, freeze=0, weight_decay=0.0, clip=1e-6, out=tmp_path / "clipped")
    after = load_file(train(held) / "checkpoint" / "meta-0.safetensors")
    torch.testing.assert_close(
        after["backbone.conv1.weight"], frozen["backbone.conv1.weight"], rtol=0, atol=1e-7
    )


def small(**changes):
    return replace(
        PRESETS["demo"], preset="demo", seeds=1, steps=40, save_every=20, people=4, device="cpu", **changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"variants": ("meta", "baseline")},
        {"variants": ("meta",), "architecture": "vit-mini", "optimizer": "adamw"},
    ],
)
def test_a_killed_run_continues_to_the_same_weights_and_log(changes, tmp_path):
    whole = train(small(out=tmp_path / "whole", **changes))
    killed = tmp_path / "killed"
    arguments = ["demo", *helpers.TINY["meta_reid"], "--device", "cpu"]
    for name, value in changes.items():
        arguments += [f"--{name}", *([value] if isinstance(value, str) else value)]
    helpers.kill_when((killed / "checkpoint").is_dir, "meta_reid", *arguments, "--out", killed)
    train(small(out=killed, **changes))
    helpers.assert_same_runs(killed, whole)


def test_pictures_while_it_trains_change_nothing(tmp_path):
    rows = ("meta", "baseline")
    without = train(small(variants=rows, sample_every=1000, out=tmp_path / "without"))
    written = tmp_path / "with" / "samples"
    seen = []

    def watch(self, name, image):
        seen.append((name, image.shape))
        picture(self, name, image)

    with pytest.MonkeyPatch.context() as patch:
        picture = Run.picture
        patch.setattr(Run, "picture", watch)
        pictured = train(small(variants=rows, sample_every=10, out=tmp_path / "with"))
    helpers.assert_same_runs(pictured, without)
    assert [name for name, _ in seen] == ["training-meta-0"] * 4 + ["training-baseline-0"] * 4
    for name in rows:
        assert (written / f"training-{name}-0.png").stat().st_size > 0
        assert (without / "samples" / f"training-{name}-0.png").exists()  # of the last step
    # Six queries, each with its ten nearest; the weights stand left of them.
    assert seen[0][1][1] == 6 * (2 * 52 + 2) - 2 and seen[0][1][2] > 11 * (2 * 28 + 2) + 60


def test_train_evaluate_and_search_from_the_folder(tmp_path, monkeypatch):
    trained = script("train.py", "demo", "--seeds", "1", "--steps", "2", runs=tmp_path, fresh=True)
    assert trained.returncode == 0, trained.stderr
    folder = Path(trained.stdout.splitlines()[-1])
    assert folder == (tmp_path / "meta_reid" / "demo-0").resolve()
    evaluated = script("eval.py", runs=tmp_path, fresh=True)
    assert evaluated.returncode == 0, evaluated.stderr
    printed = evaluated.stdout.splitlines()
    assert printed[-1] == str(folder) and len(printed) < 50
    assert sum(line.startswith("meta ") for line in printed) == 11  # global, five mixtures, five whole ones
    assert [line[0] for line in printed if line[1:3] == ": "] == list("abcdef")
    results = json.loads((folder / "results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == list("abcdef")
    assert results["claims"][-1]["measured"]["official, seed 0"] == 0
    assert not any(metric["comparable"] for metric in results["metrics"])
    for name in (
        "samples/ranking.png",
        "samples/weights.png",
        "samples/embedding.png",
        "table.md",
        "table.tex",
    ):
        assert (folder / name).stat().st_size > 0

    for name in "abc":
        write_image(tmp_path / "gallery" / f"{name}.png", torch.rand(3, 48, 24))
    arguments = ["--gallery", str(tmp_path / "gallery"), "--query", str(tmp_path / "gallery" / "b.png")]
    arguments += ["--index", str(tmp_path / "i.safetensors"), "--out", str(tmp_path / "out"), "--top", "2"]
    found = script("predict.py", *arguments, runs=tmp_path)
    assert found.returncode == 0, found.stderr
    answer = json.loads((tmp_path / "out" / "results.json").read_text())["queries"][0]
    assert answer["found"][0]["path"].endswith("b.png") and len(answer["found"]) == 2
    assert answer["looks_like"] in "ABC" and sum(answer["weight"].values()) == pytest.approx(1, abs=1e-4)
    assert list((tmp_path / "out").glob("*.png"))
    # What another aggregation made is not compared, and where nothing can be written nothing is computed.
    (tmp_path / "file").touch()
    index = ["--index", str(tmp_path / "i.safetensors")]
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path))

    def refused(error: type[Exception], message: str, *wrong: str) -> None:
        monkeypatch.setattr(sys, "argv", ["predict.py", *wrong])
        with pytest.raises(error, match=message):
            predict.main()

    refused(UserError, "another --aggregation", *arguments[2:], "--aggregation", "learned")
    refused(UserError, "shared, temperature 2, normalized parts", *arguments[2:], "--temperature", "2",
            "--normalize-parts")  # fmt: skip
    refused(UserError, "a folder; give the name of a", *arguments[:2], "--index", str(tmp_path))
    # No picture that was given is written over.
    refused(UserError, "b.png would be overwritten.*another --index", *arguments[:2], "--index", arguments[3])
    earlier = tmp_path / "gallery" / "0000-b.png"
    shutil.copy(arguments[3], earlier)
    refused(UserError, "0000-b.png would be overwritten.*another --out", *arguments[:4], *index, "--out",
            str(earlier.parent))  # fmt: skip
    earlier.unlink()
    refused(FileExistsError, "file", "--query", arguments[1], *index, "--out", str(tmp_path / "file"))
    # A gallery picture that is gone costs the pictures, not the answers.
    (tmp_path / "gallery" / "b.png").rename(tmp_path / "b.png")
    gone = ["--query", str(tmp_path / "b.png"), *index, "--out", str(tmp_path / "gone")]
    refused(UserError, "gallery/b.png: no such image", *gone)
    assert (tmp_path / "gone" / "results.json").exists()
    said = f"b.png: looks like source {answer['looks_like']}; nearest {answer['found'][0]['path']} (1.00)"
    assert found.stdout.splitlines()[-2].endswith(said)


def test_a_manifest_of_the_users_own_domains_is_trained_and_evaluated(tmp_path, capsys):
    lines = ["path,id,camera,domain"]
    for domain in "ABT":
        drawn = draw(domain, people=4, views=4, seed=1)
        for i, picture in enumerate(drawn.images):
            write_image(tmp_path / domain / f"{i}.png", picture / 255)
            lines.append(f"{domain}/{i}.png,{drawn.identities[i]},{i},{domain}")
    lines.append("T/0.png,alone,0,T")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    changes = {"architecture": "mini", "pretrained": False, "height": 48, "width": 24, "workers": 0}
    config = replace(
        PRESETS["manifest"], preset="manifest", manifest=tmp_path / "mine.csv", target="T", people=4, steps=2,
        save_every=20, device="cpu", out=tmp_path / "run", **changes,
    )  # fmt: skip
    folder = train(config)
    metrics = protocol_metrics(config, rows_of(config, folder), Options(device="cpu"), folder)
    found = {metric.method for metric in metrics}
    assert {"meta-0 global", "meta-0 full:shared", "meta-0 mixture:official"} <= found
    assert not any("learned" in method for method in found)  # its scoring networks were not trained
    assert all(0 <= metric.value <= 100 and not metric.comparable for metric in metrics)
    assert capsys.readouterr().out.splitlines() == ["T: queries without a true match, left out: 1"]
    with pytest.raises(UserError, match="mine.csv: no domain 'yard'; it has A, B, T"):
        evaluation.target_sets(replace(config, target="yard"))
    for name in ("ranking-T-meta-0.png", "weights-meta-0.png", "embedding-meta-0.png"):
        assert (folder / "samples" / name).stat().st_size > 0
    shutil.rmtree(tmp_path / "A")
    (tmp_path / "mine.csv").unlink()
    assert predict.load_model(predict.Options(run=folder))[1] == ["A", "B"]  # the run alone is enough
    (folder / "sources.json").write_text("{}")
    with pytest.raises(UserError, match="sources.json: not readable as the sources of a run"):
        predict.load_model(predict.Options(run=folder))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "paper"], "--data-root is missing"),
        (["train.py", "paper", "--data-root", "nowhere"], "Get it from"),
        (["train.py", "manifest"], "--manifest is missing"),
        (["train.py", "demo", "--people", "50"], "40 identities"),
        (["eval.py"], "run train.py first"),
        (["predict.py"], "nothing to do"),
    ],
)
def test_mistakes_get_one_message(arguments, message, tmp_path):
    done = script(*arguments, runs=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_every_variant_is_a_setting():
    settings = {field.name for field in fields(PRESETS["demo"])}
    for changes in VARIANTS.values():
        assert changes.keys() <= settings


def in_one_go(model, images, domain, labels, union, consistency, uniformity, warm, autocast, go_back):
    """`losses.backward` with one backward for both halves, as several processes have it."""
    with autocast():
        terms = objective(model(images, domain, warm), labels, union, consistency, uniformity)
    go_back(sum(terms.values()))
    return {name: term.detach() for name, term in terms.items()}


def test_two_processes_give_the_curves_of_two_shares(tmp_path, monkeypatch):
    """The halves' gradients are tested in double precision; in 22 steps this small training makes their other
    rounding large."""
    monkeypatch.setattr("meta_reid.train.backward", in_one_go)
    arguments = ["demo", "--seeds", "1", "--variants", "meta", "baseline", "--people", "4", "--steps", "22"]
    arguments += ["--warmup", "5", "--freeze", "4"]
    one = run_one(train, PRESETS, tmp_path, *arguments, "--shares", "2")
    two = run_two("meta_reid", tmp_path, *arguments)
    assert_same_curves(one, two, lines=4)
    assert furthest_weights(one / "checkpoint", two / "checkpoint") < 1e-3


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("people", "1", "2 or more"), ("images", "0", "1 or more"), ("epochs", "0", "1 or more"),
        ("steps", "0", "1 or more"), ("seeds", "0", "1 or more"), ("sample-every", "0", "1 or more"),
        ("save-every", "0", "1 or more"), ("shares", "0", "1 or more"), ("height", "0", "1 or more"),
        ("workers", "-1", "0 or more"), ("warmup", "-3", "0 or more"), ("freeze", "-1", "0 or more"),
        ("lr", "nan", "a number above 0"), ("lr", "0", "a number above 0"), ("clip", "0", "a number above 0"),
        ("momentum", "1.5", "a number from 0 to 1"), ("weight-decay", "-1", "0 or more"),
        ("consistency", "-1", "0 or more"), ("uniformity", "nan", "0 or more"),
        ("final-lr", "-1", "0 or more"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(option, value, allowed):
    with pytest.raises(UserError, match=rf"--{option} {value}(\.0)?: give {allowed}"):
        parse_presets(PRESETS, "", ["demo", f"--{option}", value])


def test_without_momentum_there_is_no_nesterov():
    row = plan(small(variants=("meta",), momentum=0.0), {0: [3, 3, 3]})[0]
    assert not optimiser(row.model, row.config).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": ()}, "--variants"),
        ({"variants": ("meta", "meta")}, "--variants meta meta: give each once"),
        ({"save_every": 30}, "multiple of 20"),
        ({"height": 96}, "--height 96 --width 24: walkers are drawn with --height 48"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(replace(small(variants=("meta",), out=tmp_path / "run"), **changes))
