"""Run folders: resume, kills at any moment, locks, foreign and damaged folders, full disks."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shared import io
from shared.io import Run, find_run, load_config, load_weights
from shared.published import write_results
from shared.records import plain
from shared.runtime import REPOSITORY, LoaderConfig, UserError, parse_presets, run_main, seed_everything


@dataclass(frozen=True)
class Inner:
    """A nested setting."""

    sizes: tuple[int, ...] = (3, 4)
    """Sizes."""


@dataclass(frozen=True)
class Config(LoaderConfig):
    """A toy."""

    steps: int = 6
    """Steps."""
    root: Path | None = None
    """A path."""
    inner: Inner = Inner()
    """Nested."""


def train(config: Config, save_every: int = 1) -> Path:
    """A training loop in the form that every paper's has, with all three random generators in use."""
    torch.set_num_threads(1)
    run = Run("toy", config)
    seed_everything(config.seed)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    progress = run.load({"model": model}, {"optimizer": optimizer}) or {"step": 0}
    for step in range(progress["step"], config.steps):
        x = torch.randn(8, 4) + random.random() + np.random.rand()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step, loss=loss.item())
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            run.save({"model": model}, {"optimizer": optimizer}, {"step": step + 1})
    run.close()
    return run.folder


def outcome(folder: Path) -> tuple[dict, str]:
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    return {name: value.tolist() for name, value in weights.items()}, (folder / "log.jsonl").read_text()


def die_at(call: int, config: Config, save_every: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Train, but be killed at the call-th file operation or training step, as `kill -9` or `kill` does it."""
    calls = 0

    def counted(function):
        def wrapper(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), how)
            return function(*args, **options)

        return wrapper

    operations = [(io, "save_file"), (io, "_sync"), (torch, "save")]
    operations += [(Path, name) for name in ("rename", "replace", "mkdir", "unlink")]
    for owner, name in operations:
        setattr(owner, name, counted(getattr(owner, name)))
    io.shutil.rmtree = counted(shutil.rmtree)
    torch.optim.Adam.step = counted(torch.optim.Adam.step)
    train(config, save_every)


@pytest.mark.parametrize(
    ("save_every", "how", "stride"), [(1, signal.SIGKILL, 3), (2, signal.SIGKILL, 3), (1, signal.SIGTERM, 7)]
)
def test_killed_at_any_moment_a_run_continues_to_the_same_end(tmp_path, save_every, how, stride):
    expected = outcome(train(Config(out=tmp_path / "whole"), save_every))
    fork = multiprocessing.get_context("fork")
    survived = 0
    for call in (*range(1, 8), *range(8, 400, stride)):  # every operation that opens the folder
        config = Config(out=tmp_path / f"killed{call}")
        process = fork.Process(target=die_at, args=(call, config, save_every, how))
        process.start()
        process.join()
        if process.exitcode == 0:
            survived += 1
            break  # fewer operations than that in the whole run
        assert process.exitcode == -how
        # A second kill soon after the restart, then the same command to the end.
        process = fork.Process(target=die_at, args=(7, config, save_every))
        process.start()
        process.join()
        assert outcome(train(config, save_every)) == expected
        assert {entry.name for entry in config.out.iterdir() if "checkpoint" in entry.name} == {"checkpoint"}
    assert survived == 1 and call > 40


def test_killed_while_it_deletes_a_run_restart_goes_on(tmp_path):
    fork = multiprocessing.get_context("fork")
    for call in range(1, 12):
        config = Config(out=tmp_path / f"killed{call}", steps=2)
        train(config)
        again = replace(config, steps=1, restart=True)
        process = fork.Process(target=die_at, args=(call, again, 1))
        process.start()
        process.join()
        train(again)
        assert len((config.out / "log.jsonl").read_text().splitlines()) == 1


def test_a_reader_finds_weights_between_the_renames(tmp_path):
    folder = train(Config(out=tmp_path / "run"))
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    assert load_weights(folder, {"model": nn.Linear(4, 1)}) == {"step": 6}


def test_other_settings_are_refused_and_restart_deletes(tmp_path):
    config = Config(out=tmp_path / "run")
    before = outcome(train(config))
    with pytest.raises(UserError, match="other settings .steps 6 -> 7.*--restart"):
        train(replace(config, steps=7))
    assert outcome(config.out) == before
    train(replace(config, device="cpu", workers=3))  # what does not change the numbers may differ
    train(replace(config, steps=7, restart=True))
    assert len((config.out / "log.jsonl").read_text().splitlines()) == 7


def test_settings_may_be_mended_until_a_run_has_written_something(tmp_path):
    config = Config(out=tmp_path / "run")
    for steps in (5, 6):  # each ends before its first step, as for data that are not there
        run = Run("toy", replace(config, steps=steps))
        run.load({}, {})
        run.close()
    (config.out / "basis.safetensors").write_bytes(b"of these settings")
    with pytest.raises(UserError, match="other settings .steps 6 -> 7"):
        Run("toy", replace(config, steps=7))
    Run("toy", config).close()
    with pytest.raises(UserError, match="a run of toy, not of pin"):
        Run("pin", config)


def test_a_run_may_be_saved_before_anything_was_loaded(tmp_path):
    run = Run("toy", Config(out=tmp_path / "run"))
    run.save({"model": nn.Linear(4, 1)}, {}, {"step": 0})
    run.close()
    assert load_weights(tmp_path / "run", {"model": nn.Linear(4, 1)}) == {"step": 0}


def test_two_runs_in_one_folder(tmp_path):
    config = Config(out=tmp_path / "run")
    first = Run("toy", config)
    with pytest.raises(UserError, match="another process is training here"):
        Run("toy", config)
    first.close()
    Run("toy", config).close()


def test_folders_that_are_no_runs_are_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    for restart in (False, True):
        with pytest.raises(UserError, match="not empty and not a run folder"):
            Run("toy", Config(out=tmp_path, restart=restart))
    assert (tmp_path / "precious.txt").read_text() == "keep me" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="no run folder"):
        Run("toy", Config(out=tmp_path / "precious.txt" / "x"))
    train(Config(out=tmp_path / "run"))
    with pytest.raises(UserError, match="a run of toy, not of other"):
        Run("other", Config(out=tmp_path / "run"))


def test_finding_runs_and_their_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path / "with space"))
    with pytest.raises(UserError, match="run train.py first"):
        find_run("toy")
    train(Config(preset="demo"))
    config = Config(preset="demo", seed=1, root=tmp_path / "é", inner=Inner((7,)))
    newest = train(config)
    os.utime(newest / "config.json", (2e9, 2e9))
    assert find_run("toy") == newest == tmp_path / "with space" / "toy" / "demo-1"
    assert load_config(newest, Config) == config
    with pytest.raises(UserError, match="a run of toy, not of other"):
        find_run("other", newest)
    with pytest.raises(UserError, match="no config.json"):
        find_run("toy", tmp_path)
    record = json.loads((newest / "config.json").read_text())
    record["config"]["unheard_of"] = 1
    (newest / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not fit this version"):
        load_config(newest, Config)
    for wrong in (
        {"steps": "many"},
        {"steps": 2.5},
        {"restart": 1},
        {"inner": {"sizes": ["a"]}},
        {"preset": 3},
    ):
        (newest / "config.json").write_text(json.dumps(record | {"config": plain(config) | wrong}))
        with pytest.raises(UserError, match="does not fit this version"):
            load_config(newest, Config)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_damaged_checkpoints_are_named(tmp_path, name):
    config = Config(out=tmp_path / "run")
    path = train(config) / "checkpoint" / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_weights(config.out, {"model": nn.Linear(4, 1)})
        with pytest.raises(UserError, match=name):
            train(config)
        Run("toy", config)._lock.close()  # the failed run's lock went with it
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_weights(config.out, {"model": nn.Linear(4, 1)})


@pytest.mark.parametrize(
    "change",
    [
        {"objects": {}},
        {"objects": []},
        {"objects": {"optimizer": {"of": "another"}}},
        {"random": {"torch": 3}},
        {"random": []},
        {"log_step": None},
    ],
    ids=repr,
)
def test_state_of_another_run(tmp_path, change):
    config = Config(out=tmp_path / "run")
    path = train(config) / "checkpoint" / "state.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UserError, match=r"state.pt: the checkpoint of another run .*--restart"):
        train(config)


def test_a_log_that_lost_lines_is_not_filled_up(tmp_path):
    config = Config(out=tmp_path / "run")
    log = train(config) / "log.jsonl"
    for content in ("", log.read_text()[:10]):
        log.write_text(content)
        with pytest.raises(UserError, match="log.jsonl: lines before the checkpoint are gone"):
            train(config)
        assert log.read_text() == content


@pytest.mark.parametrize("name", ["a" * 300, "file/below"])
def test_folders_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no run folder"):
        train(Config(out=tmp_path / name))


def test_a_run_names_the_command_that_trained_it(tmp_path, monkeypatch):
    config = Config(out=tmp_path / "run")

    def named(command: str, config: Config) -> str:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{command}", "--steps", "6"])
        results = write_results(train(config), [], [], {"command": "python eval.py"}).read_text()
        return json.loads(results)["environment"]["training"]["command"]

    assert named("train.py", config) == "python train.py --steps 6"
    assert named("again.py", config) == "python train.py --steps 6"  # finished already, it trains nothing
    assert named("anew.py", replace(config, restart=True)) == "python anew.py --steps 6"


def test_checkpoint_of_another_model(tmp_path):
    train(Config(out=tmp_path / "run"))
    with pytest.raises(UserError, match="made for another model than Linear"):
        load_weights(tmp_path / "run", {"model": nn.Linear(5, 1)})
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_weights(tmp_path, {"model": nn.Linear(5, 1)})


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_full_disk_keeps_the_last_checkpoint(small_disk, capsys, where):
    large = nn.Linear(1000, 1000)
    save_over_the_last(small_disk("3m") / "run", *((large, None) if where == "weights" else (None, large)))
    assert "error: no space left writing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["save_file", "torch.save"])
def test_the_libraries_errors_on_a_full_disk(tmp_path, capsys, monkeypatch, name):
    def no_space(*_):
        raise {"save_file": io.SafetensorError, "torch.save": RuntimeError}[name]("failed")

    def fill():
        monkeypatch.setattr(*((io, "save_file") if name == "save_file" else (torch, "save")), no_space)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))

    save_over_the_last(tmp_path / "run", nn.Linear(9, 9), None, fill)
    assert "error: no space left writing" in capsys.readouterr().err


def save_over_the_last(folder: Path, model: nn.Module | None, object: nn.Module | None, before=lambda: None):
    run = Run("toy", Config(out=folder))
    run.load({})
    small = nn.Linear(10, 10)
    run.save({"model": small}, {}, {"step": 1})
    before()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: run.save({"model": model or small}, {"more": object or small}, {"step": 2}))
    assert ended.value.code == 2
    run.close()
    assert load_weights(folder, {"model": nn.Linear(10, 10)}) == {"step": 1}


def test_exit_codes(capsys):
    def user_mistake():
        raise UserError("the file is not there")

    def bug():
        raise ZeroDivisionError

    def interrupt():
        raise KeyboardInterrupt

    for main, code, text in [
        (user_mistake, 2, "error: the file is not there\n"),
        (interrupt, 130, "continues"),
    ]:
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert ended.value.code == code
        assert text in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_main(bug)


def show_help():
    parse_presets({"demo": Config()}, "Doc.", ["--help"])


def print_much():
    print("x" * 200_000)


def make_a_mistake():
    print("before it")
    raise UserError("no")


def run_on_a_closed_pipe(main: Callable[[], None], messages: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as sys.stdout, open(messages, "w") as sys.stderr:
        run_main(main)


@pytest.mark.parametrize("main", [show_help, print_much, lambda: print("short"), make_a_mistake])
def test_a_reader_that_closes_the_pipe_ends_the_script_quietly(tmp_path, main):
    """`| head`, met by help, while printing, and at the end of the program."""
    messages = tmp_path / "stderr"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_on_a_closed_pipe, args=(main, messages))
    process.start()
    process.join()
    assert messages.read_text() == ("error: no\n" if main is make_a_mistake else "")
    assert process.exitcode == 128 + signal.SIGPIPE


def test_another_pipe_that_closes_is_no_reader_of_the_output():
    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_main(main)


def test_a_script_leaves_the_other_processes_before_it_ends(tmp_path):
    def main():
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    run_main(main)
    assert not torch.distributed.is_initialized()


class Breaks(Dataset):
    """Ten items, the third of which cannot be had."""

    def __init__(self, how: str):
        self.how = how

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 3:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": UserError("a.png: damaged"), "bug": RuntimeError("oops")}[self.how]
        return index


def test_a_mistake_met_in_a_data_loading_process_is_one_message(capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: list(DataLoader(Breaks("mistake"), num_workers=1)))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a.png: damaged\n"


def test_a_data_loading_process_that_dies_is_one_message():
    """In a process of its own: PyTorch reports the death through a signal, at any moment."""
    program = (
        "from test_runs import *\n"
        "if __name__ == '__main__': run_main(lambda: list(DataLoader(Breaks('killed'), num_workers=1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: a data-loading process died" in done.stderr and "Traceback" not in done.stderr


def test_a_bug_in_a_data_loading_process_shows_its_traceback():
    with pytest.raises(RuntimeError, match="oops"):
        run_main(lambda: list(DataLoader(Breaks("bug"), num_workers=1)))


def test_presets_on_the_command_line(capsys):
    presets = {"demo": Config(), "paper": Config(steps=100)}
    assert parse_presets(presets, "Doc.", []) == Config(preset="demo")
    assert parse_presets(presets, "Doc.", ["--steps", "9"]) == Config(preset="demo", steps=9)
    assert parse_presets(presets, "Doc.", ["paper", "--seed", "2"]).seed == 2
    assert parse_presets(presets, "Doc.", ["paper"]).steps == 100
    for wrong in (["nonsense"], ["demo", "--nonsense", "1"], ["demo", "--steps", "many"]):
        with pytest.raises(SystemExit) as ended:
            parse_presets(presets, "Doc.", wrong)
        assert ended.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        parse_presets(presets, "Doc.", ["demo", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--steps" in text and "Seed of everything random" in text and "--preset" not in text
