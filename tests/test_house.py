"""All papers alike: what goes wrong around a run ends in one message and code 2, and nothing is lost."""

import contextlib
import fcntl
import io
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_same_runs, weights
from safetensors import safe_open
from safetensors.torch import save_file

from shared.report import PAPERS
from shared.runtime import REPOSITORY

HERE = [paper for paper in PAPERS if (REPOSITORY / paper / "train.py").is_file()]

LOADS = [
    paper
    for paper in HERE
    if any("num_workers=" in path.read_text() for path in (REPOSITORY / paper).glob("*.py"))
]
"""The papers that read their data in processes of their own when they are asked to."""

NARROW = {
    "pin": "--variants pin",
    "dfgc2022": "--steps 2 --members diverse-swin diverse-convnext-0 diverse-convnext-1",
    "dfl": "--trials dfl --per-client 20 --rounds 2 --checkpoint-every 1",
    "mdrnets": "--data simple --variants full --no-unet --copy-steps 0",
    "anyface": "--variants full --wide-steps 0",
    "biphasic_age": "--steps 2 --scene.steps 2",
    "faceswapper": "--variants full --judge-width 4 --per-person 2 --iterations 2 --checkpoint-every 1",
    "most_net": "--steps 2 --batch 2 --save-every 1",
    "meta_reid": "--variants meta --steps 21",
    "irisusformer": "--variants learned --ensemble 1 --steps 2 --save-every 1",
}
"""What makes of a paper's smallest options the shortest run that still writes every kind of file."""

TINY_EVAL = {"pin": "--pairs 10 --repeats 1 --queries 5", "faceswapper": "--test-people 6"}
"""What evaluation needs to accept a run so small."""


def script(paper: str, name: str, *arguments: str) -> tuple[int, str, str]:
    """A script of a paper in this process (its imports are paid once): exit code, stdout, stderr."""
    code = 0
    with (
        contextlib.chdir(REPOSITORY / paper),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    return code, out.getvalue(), err.getvalue()


def smallest(paper: str) -> list[str]:
    return ["demo", *TINY[paper], *NARROW.get(paper, "").split(), "--device", "cpu"]


def evaluate(paper: str, folder: Path) -> tuple[int, str, str]:
    return script(paper, "eval.py", "--run", str(folder), *TINY_EVAL.get(paper, "").split())


def train(paper: str, folder: Path, *more: str) -> tuple[int, str, str]:
    return script(paper, "train.py", *smallest(paper), "--out", str(folder), *more)


def struck(
    strike: Callable[[], None], paper: str, folder: Path, *more: str, said: Path | None = None
) -> tuple[int, str]:
    """Training in a process of its own, after `strike` there: exit code, stderr; it passes through `said`."""
    said = said or folder.with_name("stderr")

    def child() -> None:
        strike()
        code, _, err = train(paper, folder, *more)
        said.write_text(err)
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode, said.read_text() if said.exists() else ""


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_a_worker() -> None:
    """Every data-loading process is killed as soon as it has started."""
    torch.utils.data._utils.worker._worker_loop = die


def terminate_in_a_checkpoint() -> None:
    """`kill` at the moment when the last checkpoint has gone and the new one has not taken its place."""
    rename = Path.rename

    def ended(path: Path, target: Path) -> Path:
        if path.name == "checkpoint.new" and path.with_name("checkpoint.old").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return rename(path, target)

    Path.rename = ended


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """paper -> its tiny run, made once, in a folder whose name has a space and letters beyond ASCII."""
    runs: dict[str, Path] = {}

    def get(paper: str) -> Path:
        if paper not in runs:
            folder = tmp_path_factory.mktemp(paper) / "größe 雪 run"
            code, out, err = train(paper, folder)
            assert code == 0, err
            assert out.splitlines()[-1] == str(folder)
            runs[paper] = folder
        return runs[paper]

    return get


@pytest.fixture
def copy(trained, tmp_path):
    """paper -> a copy of its tiny run that a test may damage."""
    return lambda paper: Path(shutil.copytree(trained(paper), tmp_path / "run", dirs_exist_ok=True))


@pytest.mark.parametrize("paper", HERE)
def test_a_finished_run_is_left_as_it_is(paper, copy):
    folder = copy(paper)
    before = weights(folder)
    assert before
    code, out, _ = train(paper, folder)
    assert code == 0 and out.splitlines()[-1] == str(folder)
    assert weights(folder) == before


@pytest.mark.parametrize("paper", HERE)
def test_two_runs_in_one_folder(paper, copy):
    folder = copy(paper)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = train(paper, folder)
    assert code == 2 and err.startswith("error: ") and "another process is training here" in err


class Bomb:
    """A pickle that runs code when a careless reader loads it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("paper", HERE)
def test_hostile_truncated_and_foreign_checkpoints(paper, copy, tmp_path):
    """A file of weights and one of the other kind in turn: training and evaluation name it and run nothing in
    it."""
    folder, mark = copy(paper), tmp_path / "executed"
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt"))
    assert any(path.suffix == ".pt" for path in files)
    for path in (files[0], next(path for path in files if path.suffix == ".pt")):
        whole = path.read_bytes()
        foreign = tmp_path / "foreign"
        save_file({"of.another.model": torch.zeros(3)}, foreign)
        torch.save(Bomb(mark), tmp_path / "bomb.pt")
        contents = {
            "pickle": pickle.dumps(Bomb(mark)),
            "torch file": (tmp_path / "bomb.pt").read_bytes(),
            "truncated": whole[: len(whole) // 2],
            "foreign": foreign.read_bytes(),
            "empty": b"",
        }
        for kind, content in contents.items():
            path.write_bytes(content)
            code, _, err = train(paper, folder)
            if code == 0:  # a finished run need not be read to be seen as finished; its evaluation reads it
                code, _, err = evaluate(paper, folder)
            assert code == 2, f"{kind} {path.name}: code {code}\n{err}"
            assert err.startswith("error: ") and path.name in err and err.count("\n") <= 3, err
            assert not mark.exists(), f"code in {path.name} ran"
        path.write_bytes(whole)


@pytest.mark.parametrize("paper", HERE)
def test_weights_of_another_type(paper, copy):
    """Whole numbers where a network has real ones are refused by the file's name."""
    folder = copy(paper)
    path = max(folder.rglob("*.safetensors"))  # the first may be no network's
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(name for name, value in tensors.items() if value.is_floating_point() and value.ndim)
    save_file(tensors | {name: tensors[name].round().long()}, path, metadata)
    code, _, err = evaluate(paper, folder)
    assert code == 2 and err.startswith("error: ") and path.name in err and "int64" in err, err


@pytest.mark.parametrize("paper", HERE)
def test_a_run_struck_twice_ends_as_a_whole_one(paper, trained, tmp_path):
    """A data-loading process dies; then `kill` comes in the middle of a checkpoint; the same command goes on
    to the log and the weights of a run that nothing happened to."""
    folder = tmp_path / "run"
    if paper in LOADS:
        code, err = struck(lose_a_worker, paper, folder, "--workers", "1")
        assert code == 2 and err.startswith("error: a data-loading process died"), err
    code, err = struck(terminate_in_a_checkpoint, paper, folder)
    assert code == -signal.SIGTERM, err
    assert (folder / "checkpoint.old").is_dir() and not (folder / "checkpoint").exists()
    code, _, err = train(paper, folder)
    assert code == 0, err
    assert_same_runs(folder, trained(paper))


@pytest.mark.parametrize("paper", HERE)
def test_a_full_disk(paper, small_disk, tmp_path):
    """200 kB hold no paper's checkpoint and pictures, however small; a process of its own, as a user's."""
    disk = small_disk("200k")
    (disk / "filler").write_bytes(bytes(120_000))
    code, err = struck(lambda: None, paper, disk / "run", said=tmp_path / "stderr")
    assert code == 2, err
    assert "error: no space left writing" in err and "Traceback" not in err, err


@pytest.mark.parametrize("paper", HERE)
@pytest.mark.parametrize("name", ["train.py", "eval.py", "predict.py", "bench.py"])
def test_help_and_unknown_options(paper, name):
    code, out, _ = script(paper, name, *(["demo"] if name == "train.py" else []), "--help")
    assert code == 0 and "usage" in out
    code, _, _ = script(paper, name, *(["demo"] if name == "train.py" else []), "--nonsense", "1")
    assert code == 2
