"""Programs started as copies of one process that has imported the libraries already.

Most of what a short script computes are its imports. Each process of the tests therefore keeps a server (the
standard library's fork server) that has imported the libraries once; a program begins in a copy of it, in a
process, folder, environment and pipes of its own, and imports this project's code afresh.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

LIBRARIES = [
    *("accelerate", "cv2", "matplotlib.figure", "open_clip", "safetensors.torch", "scipy.stats"),
    *("sklearn.metrics", "timm", "torch", "torch._dynamo", "torch.utils.tensorboard", "torchmetrics.image"),
    *("torchvision", "tyro"),
]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


def child(program: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """What `python program...` does in that folder."""
    for stream, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)  # two may share one
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    tests, paths = str(Path(__file__).parent), environment["PYTHONPATH"].split(os.pathsep)
    sys.path = ["", *paths, *(path for path in sys.path if path and path not in (tests, *paths))]
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).absolute().parent)
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def start(
    program: list[str], folder: Path, environment: Mapping[str, str], out: str, err: str
) -> ForkServerProcess:
    """Begin `python program...` (a file, or -m and a module); its output goes to the files out, err."""
    process = SERVER.Process(target=child, args=(program, str(folder), dict(environment), out, err))
    process.start()
    return process


def run(
    program: list[str], folder: Path, environment: Mapping[str, str], timeout: float | None
) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text.

    Raises subprocess.TimeoutExpired.
    """
    return _run(program, folder, [environment], timeout)


def run_two(
    program: list[str], folder: Path, environment: Mapping[str, str], timeout: float | None
) -> subprocess.CompletedProcess:
    """Two processes with what torchrun tells its processes in their environment; their output in one.

    The exit code is the first that is not 0. Raises subprocess.TimeoutExpired.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return _run(program, folder, [{**environment, **group, **rank} for rank in ranks], timeout)


def _run(
    program: list[str], folder: Path, environments: list[Mapping[str, str]], timeout: float | None
) -> subprocess.CompletedProcess:
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        processes = [start(program, folder, each, out.name, err.name) for each in environments]
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        if None in codes:
            raise subprocess.TimeoutExpired(program, timeout, out.read(), err.read())
        return subprocess.CompletedProcess(program, next(filter(None, codes), 0), out.read(), err.read())
