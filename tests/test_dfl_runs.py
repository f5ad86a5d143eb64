"""dfl as a user runs it: train, eval and predict as subprocesses, kill and resume, two processes."""

import json
import random
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
from federations import federation
from safetensors import safe_open
from safetensors.torch import load_file

from dfl import eval as evaluation
from dfl import train as training
from dfl.baselines import build_method
from dfl.data import load_data
from dfl.eval import EvalConfig, evaluate_run
from dfl.federation import Federation, evaluate
from dfl.predict import PredictConfig, main
from dfl.train import PRESETS, Config
from dfl.trials import load_trial, plan, trial_path
from shared.io import load_config, read_image, write_image
from shared.records import write_tensors
from shared.runtime import UserError

SMALL = ["demo", "--trials", "dfl", "fedavg", *helpers.TINY["dfl"]]
TWO_ROUNDS = {"clients": 4, "per_client": 40, "test_images": 60, "rounds": 2}
script = partial(helpers.script, "dfl")


def outcome(folder: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = {
        f"{path.stem}/{name}": value
        for path in sorted((folder / "trials").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    return lines, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "é run"
    trained = script("train.py", *SMALL, "--rounds", 6, "--out", folder, fresh=True)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == str(folder)
    return folder


def test_evaluation_prints_and_writes_what_it_found(run):
    done = script("eval.py", "--run", run, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run)
    assert "not available" in done.stdout and "T1: holds" in done.stdout
    results = json.loads((run / "results.json").read_text())
    # The other claims need trials that were not run.
    assert [claim["id"] for claim in results["claims"]] == ["C2", "T1"]
    assert {metric["method"] for metric in results["metrics"]} == {"dfl", "fedavg"}
    assert not any(metric["comparable"] for metric in results["metrics"])
    for name in ("federation", "curves", "accuracies", "probes", "maps"):
        picture = read_image(run / "samples" / f"{name}.png")
        assert picture.std() > 0.05
    values = {metric["metric"]: metric["value"] for metric in results["metrics"] if metric["method"] == "dfl"}
    log, _ = outcome(run)
    assert values["kB lent down"] > values["kB lent up"] > 0
    course = [line["dfl/0/in_domain"] for line in log if "dfl/0/in_domain" in line]
    assert values["in-domain"] == pytest.approx(sum(course[-3:]) / 3)


@pytest.mark.parametrize("mode", ["personal", "transfer", "invariant"])
def test_predictions_for_own_pictures(run, tmp_path, mode):
    for i in range(3):
        write_image(tmp_path / "my digits" / f"{i}.png", torch.rand(1, 20, 14))
    out = tmp_path / "out"
    done = script(
        "predict.py", tmp_path / "my digits", "--run", run, "--mode", mode, "--client", 1, "--out", out
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in found] == ["0.png", "1.png", "2.png"]
    for entry in found:
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert entry["probabilities"][entry["class"]] == max(entry["probabilities"].values())
    assert read_image(out / "predictions.png").shape[0] == 3


def test_predictions_spare_the_pictures_and_say_where_no_folder_can_be(run, tmp_path):
    out = tmp_path / "predictions"
    write_image(out / "predictions.png", torch.rand(3, 8, 8))
    before = (out / "predictions.png").read_bytes()
    with pytest.raises(UserError, match="predictions.png would be overwritten by a result"):
        main(PredictConfig(out, run, out=out))
    assert (out / "predictions.png").read_bytes() == before
    occupied = tmp_path / "a file"
    occupied.write_text("")
    done = script("predict.py", out, "--run", run, "--out", occupied)
    assert done.returncode == 2 and done.stderr == f"error: {occupied}: File exists; give another path\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing here"], "nothing here: no such picture or folder"),
        ([".", "--client", "9"], "--client 9: the clients are client0, client1, client2, client3"),
        ([".", "--trial", "moon"], "moon-0.safetensors: no such file"),
        ([".", "--trial", "fedavg", "--mode", "invariant"], "has no invariant branch"),
    ],
)
def test_prediction_mistakes(run, tmp_path, arguments, message):
    write_image(tmp_path / "a.png", torch.rand(3, 8, 8))
    arguments = [tmp_path if argument == "." else argument for argument in arguments]
    done = script("predict.py", *arguments, "--run", run)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "log.jsonl: not readable as a log"),
        ("", "log.jsonl: no lines of dfl/0, which is trained"),
        ('{"dfl/0/in_domain": 3}\n\0\0\n', "log.jsonl: line 2 is none of a log"),
        ("[]\n", "log.jsonl: line 1 is none of a log"),
        ('{"loss": 3}\n', "log.jsonl: line 1 is none of a log"),
        ('{"dfl/0/in_domain": null}\n', "log.jsonl: line 1 is none of a log"),
    ],
)
def test_a_log_that_is_gone_or_damaged(run, tmp_path, content, message):
    for name in ("config.json", "trials"):
        (tmp_path / name).symlink_to(run / name)
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate_run(EvalConfig(run=tmp_path))


NO_TRIAL = "not a trial of this version"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, NO_TRIAL),
        ([], NO_TRIAL),
        ({"image_shape": [3, 8]}, NO_TRIAL),
        ({"image_shape": "large"}, NO_TRIAL),
        ({"mean": [0.5]}, NO_TRIAL),
        ({"clients": []}, NO_TRIAL),
        ({"trained": [8]}, NO_TRIAL),
        ({"image_shape": [3, 9, 9]}, "made for another model"),
    ],
)
def test_a_trial_whose_facts_are_wrong_is_refused(run, tmp_path, facts, message):
    config: Config = load_config(run, Config)
    trial = plan(config)[0]
    path = trial_path(run, trial)
    with safe_open(path, "pt") as file:
        whole = json.loads(file.metadata()["facts"])
    load_trial(run, trial)
    write_tensors(
        trial_path(tmp_path, trial), load_file(path), {"facts": json.dumps(facts and whole | facts)}
    )
    with pytest.raises(UserError, match=f"dfl-0.safetensors: {message}"):
        load_trial(tmp_path, trial)


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    trial = plan(load_config(run, Config))[0]
    path, copy = trial_path(run, trial), trial_path(tmp_path, trial)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["client1.specific.fc1.weight"][0, 0] = torch.nan
    write_tensors(copy, tensors, metadata)
    with pytest.raises(UserError, match="NaN or infinity in client1.specific.fc1.weight"):
        load_trial(tmp_path, trial)


def test_a_checkpoint_in_the_middle_of_another_federation_is_refused(tmp_path):
    config = Config(out=tmp_path / "run", checkpoint_every=1, **TWO_ROUNDS)
    folder = training.train(config)
    state = torch.load(folder / "checkpoint" / "state.pt")
    other = federation(replace(config, widths=(8, 8)))
    for position, message in (
        ({"trial": 0, "federation": other.state_dict()}, "'shared' is of other networks or clients"),
        ({"trial": 0, "federation": {"round": 1}}, "another run .KeyError"),
        ({"stage": 0, "step": 7}, "another run .KeyError"),
    ):
        state["objects"]["position"] = position
        torch.save(state, folder / "checkpoint" / "state.pt")
        with pytest.raises(UserError, match=f"state.pt: the checkpoint of .*{message}"):
            training.train(config)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_runs_end_as_the_uninterrupted_one(run, tmp_path, seed):
    chance = random.Random(seed)
    folder = tmp_path / "run"
    for kills in range(2):
        wanted = chance.randint(1, 5) + 5 * kills

        def reached(lines: int = wanted) -> bool:
            there = helpers.has_logged(folder, lines)
            time.sleep(chance.random() * 0.05 if there else 0)
            return there

        helpers.kill_when(reached, "dfl", *SMALL, "--rounds", 6, "--out", folder)
    script("train.py", *SMALL, "--rounds", 6, "--out", folder, code=0)
    helpers.assert_same_runs(folder, run)


def test_two_processes_give_the_curve_of_one(run, tmp_path):
    folder = tmp_path / "two"
    script("train.py", *SMALL, "--rounds", 6, "--out", folder, fresh=True, two=True, code=0)
    log, weights = outcome(folder)
    expected_log, expected = outcome(run)
    assert len(log) == len(expected_log)
    for a, b in zip(log, expected_log, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            tolerance = 1.5 if re.search("in_domain|worst|spread|counterfactual|unseen", name) else 2e-3
            assert a[name] == pytest.approx(b[name], abs=tolerance), name
    assert all(torch.allclose(weights[name], value, atol=2e-3) for name, value in expected.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["digits5"], "--data digits5 needs --data-root FOLDER"),
        (["demo", "--trials", "nonsense"], "unknown trial 'nonsense'; there are dfl, local"),
        (["demo", "--out", "/proc/nowhere"], "no run folder"),
        (["demo", "--device", "cuda"], "PyTorch finds no CUDA device"),
        (["demo", "--method", "fedavg"], "--method"),  # a trial's business: see TRIALS
        (["demo", "--mu", "1"], "--mu"),
        (["demo", "--min-clients", "0"], "--min-clients 0: give 1 or more"),
        (["demo", "--engine", "flower", "--precision", "bf16"], "clients compute on the CPU in fp32"),
        (["demo", "--compile"], "--compile: clients train under torch.func"),
        (["demo", "--backbone", "digit_cnn"], "digit_cnn takes 28x28 images, the data are 8x8"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(tmp_path, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        return
    done = script("train.py", *arguments, PAPERS_RUNS=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr


def test_a_trial_on_flower_logs_every_round_once(tmp_path, monkeypatch):
    def simulated(config, record):
        """What `flower_app.simulate` reports, from the engine in this process."""
        data = load_data(config, config.seed)
        federation = Federation(build_method(config, data), replace(config, engine="sequential"), data)
        for _ in range(config.rounds):
            scalars = federation.run_round()
            found = evaluate(federation, full=False)
            record(federation, scalars | {name: found[name] for name in ("in_domain", "worst")})
        return federation

    monkeypatch.setattr(training, "flower", simulated)
    config = Config(clients=3, per_client=40, test_images=60, rounds=4, engine="flower", out=tmp_path / "run")
    log = [json.loads(line) for line in (training.train(config) / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log if "dfl/0/in_domain" in line] == [1, 2, 3, 4]
    assert [line["round"] for line in log if "dfl/0/counterfactual" in line] == [4]


def test_participation_is_swept(tmp_path):
    small = dict(
        clients=4, per_client=40, test_images=60, rounds=2, sweep_trials=("dfl",), out=tmp_path / "run"
    )
    config = Config(fractions=(0.25, 0.5), sweep=(0.5,), seeds=2, **small)
    labels = [trial.label for trial in training.plan(config)]
    assert labels == ["dfl/0", "dfl/1", "dfl@0.5/0", "dfl@fraction0.25/0", "dfl@fraction0.5/0"]
    folder = evaluate_run(EvalConfig(run=training.train(config)))
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    swept = {(m["table"], m["setting"]) for m in metrics if m["table"].startswith("sweep")}
    rhos = {("sweep over rho", f"rho {value}") for value in ("0.5", "0.9")}
    assert swept == rhos | {("sweep over fraction", f"fraction {value}") for value in ("0.25", "0.5", "1")}
    log, _ = outcome(folder)
    clients = {
        name.split("/")[0]: value for line in log for name, value in line.items() if "/clients" in name
    }
    assert clients == {"dfl": 4, "dfl@0.5": 4, "dfl@fraction0.25": 1, "dfl@fraction0.5": 2}
    assert (folder / "samples" / "fraction_in_domain.png").is_file()


def test_baselines_alone_half_a_line_and_rows_of_the_paper(tmp_path, monkeypatch, capsys):
    folder = training.train(Config(trials=("local",), out=tmp_path / "run", **TWO_ROUNDS))
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 3, "local/0/in_')  # what a kill may leave
    keys = ("table", "setting", "dataset", "protocol", "method", "metric", "unit", "source")
    row = {key: f"their {key}" for key in keys} | {"value": 93.21}
    monkeypatch.setattr(evaluation, "load_published", lambda paper: {"note": "", "rows": [row]})
    evaluate_run(EvalConfig(run=folder))
    shown = capsys.readouterr().out
    assert "own published tables: 1 rows" in shown and "93.21  their source" in shown
    assert "linear probes" not in shown


def test_only_coloured_digits_have_a_background_to_look_at(tmp_path):
    for style, measured in (("coloured", True), ("textured", False)):
        folder = training.train(Config(style=style, out=tmp_path / style, **TWO_ROUNDS))
        evaluate_run(EvalConfig(run=folder))
        metrics = json.loads((folder / "results.json").read_text())["metrics"]
        assert any(metric["table"] == "maps" for metric in metrics) == measured
        assert (folder / "samples" / "maps.png").is_file()


@pytest.mark.slow
def test_the_demo_holds_its_claims(tmp_path):
    """The demo itself, three seeds."""
    folder = training.train(replace(PRESETS["demo"], out=tmp_path / "run", device="cpu"))
    claims = json.loads((evaluate_run(EvalConfig(run=folder)) / "results.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [*(f"C{i}" for i in range(1, 9)), "T1"]
    assert [claim["id"] for claim in claims if not claim["holds"]] == []


def test_evaluating_nothing(tmp_path):
    done = script("eval.py", PAPERS_RUNS=str(tmp_path))
    assert done.returncode == 2 and "run train.py first" in done.stderr
