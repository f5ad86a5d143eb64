"""What the tests of several papers need: smallest options, scripts as a user starts them, kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
from PIL import Image

from shared.io import SYNTHETIC_SOURCE
from shared.runtime import REPOSITORY

TINY = {
    paper: options.split()
    for paper, options in {
        "pin": "--people 8 --images-per-person 6 --test-people 6 --test-images 5 --size 16 --components 20 "
        "--keep 8 --dae-widths 4 8 --esn-widths 4 8 --hidden 16 --dae-steps 6 --esn-steps 6 "
        "--recognizer-epochs 2 --save-every 2",
        "dfgc2022": "--world.train 6 --world.test 4 --world.keys 2 --steps 4 --batch-size 8 --log-every 2 "
        "--checkpoint-every 2",
        "dfl": "--seeds 1 --sweep --clients 4 --per-client 40 --test-images 200 --checkpoint-every 2",
        "mdrnets": "--size unit --image-size 16 --train-images 24 --test-images 10 --coarse-steps 6 "
        "--refine-steps 4 --copy-steps 2 --log-every 2 --checkpoint-every 2 --sample-every 4",
        "anyface": "--train-faces 40 --test-faces 24 --mapping-steps 20 --generator-steps 3 --clip-steps 3 "
        "--half-steps 2 --judge-steps 2 --wide-steps 1 --steps 4 --batch-size 8 --log-every 2 "
        "--checkpoint-every 2 --sample-every 4 --decode-batch 2",
        "biphasic_age": "--size unit --image-size 16 --train-images 24 --pictures 3 --test-images 12 "
        "--scene-images 24 --scene-size 16 --age-width 4 --age-stages 2 --identity-width 4 --guide-steps 3 "
        "--guide-batch 4 --batch-size 4 --steps 4 --scene.steps 4 --log-every 2 --checkpoint-every 2 "
        "--scene.size unit --sample-every 100",
        "faceswapper": "--size.img-size 32 --size.channel-base 128 --size.max-channels 8 --size.id-dim 8 "
        "--train-people 4 --judge-people 6 --judge-steps 2 --warmup 1 --iterations 3",
        "most_net": "--variants most --pairs 4 --seeds 1 --extras --artists",
        "meta_reid": "--seeds 1 --steps 40 --people 4 --save-every 20",
        "irisusformer": "--train-images 12 --test-images 6 --batch-size 2 --log-every 1",
    }.items()
}
"""Options of the demo that make its networks, data and steps as small as they may be."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def script(
    paper: str,
    name: str,
    *arguments: object,
    fresh: bool = False,
    two: bool = False,
    code: int | None = None,
    timeout: float | None = 300,
    **environment: str,
) -> subprocess.CompletedProcess:
    """A script from the paper's folder, as a user starts it. code: the exit code that it must have.

    fresh: by an interpreter of its own, which imports everything; else, if its number of threads is the usual
    one, in a copy of a process that has imported the libraries. two: in two processes, started by torchrun
    if fresh.
    """
    program, environment = [name, *map(str, arguments)], ENVIRONMENT | environment
    if fresh or environment["OMP_NUM_THREADS"] != ENVIRONMENT["OMP_NUM_THREADS"]:
        done = subprocess.run(
            [sys.executable, *(TORCHRUN if two else ()), *program],
            cwd=REPOSITORY / paper,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    else:
        start = forked.run_two if two else forked.run
        done = start(program, REPOSITORY / paper, environment, timeout)
    assert code is None or done.returncode == code, done.stdout + done.stderr[-3000:]
    return done


def kill_when(reached: Callable[[], bool], paper: str, *arguments: object) -> None:
    """Start train.py and kill it, as `kill -9` does, as soon as `reached`; it must not have ended by then."""
    program = ["train.py", *map(str, arguments)]
    process = forked.start(program, REPOSITORY / paper, ENVIRONMENT, os.devnull, os.devnull)
    try:
        while not reached():
            assert process.exitcode is None, "ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()


DIES = """
import os, signal, sys
import torch
from shared.io import Run
torch.set_num_threads(1)
saves = 0
whole = Run.save
def save(self, *arguments):
    global saves
    whole(self, *arguments)
    saves += 1
    if saves == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
Run.save = save
"""


def die_after(saves: int, program: str, folder: Path) -> None:
    """Run a program, which finds the folder in sys.argv[2], and kill it after so many checkpoints."""
    path = folder.with_name("program.py")
    path.write_text(DIES + program)
    paths = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    done = forked.run(
        [str(path), str(saves), str(folder)], REPOSITORY, ENVIRONMENT | {"PYTHONPATH": paths}, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def has_logged(folder: Path, lines: int) -> bool:
    """Whether a run's log has so many lines already."""
    log = folder / "log.jsonl"
    return log.exists() and log.read_text().count("\n") >= lines


def assert_resumes(paper: str, folder: Path, lines: int, *arguments: object) -> None:
    """A run killed after so many lines of its log ends with the log and the weights of a whole one."""
    whole, killed = folder / "whole", folder / "killed"
    script(paper, "train.py", *arguments, "--out", whole, code=0)
    kill_when(lambda: has_logged(killed, lines), paper, *arguments, "--out", killed)
    script(paper, "train.py", *arguments, "--out", killed, code=0)
    assert_same_runs(killed, whole)


def is_marked(path: Path) -> bool:
    """Whether a picture says in its metadata that a model made it."""
    with Image.open(path) as picture:
        return picture.info.get("DigitalSourceType") == SYNTHETIC_SOURCE


def weights(folder: Path) -> dict[str, bytes]:
    """All files of weights in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def assert_same_runs(first: Path, second: Path) -> None:
    """The same log and the same weights, to the bit, in all files."""
    assert (first / "log.jsonl").read_text() == (second / "log.jsonl").read_text()
    a, b = weights(first), weights(second)
    assert a and a.keys() == b.keys()
    assert not [name for name in a if a[name] != b[name]]
