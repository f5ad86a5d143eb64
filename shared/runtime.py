"""What every script does before and around its own work: command line, errors, seeds, device, batches."""

import dataclasses
import errno
import os
import platform
import random
import re
import select
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.utils.data import Sampler

from shared.processes import rank
from shared.ranges import Natural, Seed, out_of_range

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class RunConfig:
    """What every training configuration has. A paper's `Config` adds its own fields."""

    preset: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "custom"
    """Name of the preset this configuration started from."""
    seed: Seed = 0
    """Seed of everything random."""
    out: Path | None = None
    """Run folder. Default: runs/<paper>/<preset>-<seed>."""
    restart: bool = False
    """Delete what the run folder holds and begin again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks. auto: bf16 autocast on CUDA, fp32 on the CPU."""
    compile: bool = False
    """Compile the networks with torch.compile."""


@dataclass(frozen=True)
class LoaderConfig(RunConfig):
    """The same where workers may read the data."""

    workers: Natural = 0
    """Data-loading processes (threads, where a set is read once) per training process."""


def parse_presets(presets: dict[str, T], doc: str, argv: list[str] | None = None) -> T:
    """Command line of a training script: a subcommand per preset, `--field value` over it.

    presets: name -> frozen dataclass (a `RunConfig`); the first is the default when none is named.
    doc: the script's docstring. argv: without the program's name; default `sys.argv[1:]`.
    Exits with code 2 on an unknown preset, field or value. Raises UserError on a number out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = {name: dataclasses.replace(config, preset=name) for name, config in presets.items()}
    default = next(iter(named))
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, default)
    # What a preset is for stands in the script's docstring: the presets share one class and its docstring.
    described = {name: ("The default." * (name == default), config) for name, config in named.items()}
    return _checked(tyro.extras.overridable_config_cli(described, description=doc, args=argv))


def parse(config_class: type[T], doc: str, argv: list[str] | None = None) -> T:
    """Command line of any other script: one dataclass, every field an option. UserError on a number out of
    its range."""
    return _checked(tyro.cli(config_class, description=doc, args=argv))


def _checked(config: T) -> T:
    if complaint := out_of_range(config):
        raise UserError(complaint)
    return config


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE_PATH = (
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip
"""Of errors that a user's path makes: a file where a folder should be, or the other way round, or no right to
read or write there."""


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    # TensorBoard's writing thread hands its error to the next call from the main thread, which reports it.
    if not (isinstance(arguments.exc_value, OSError) and arguments.exc_value.errno in FULL_DISK):
        threading.__excepthook__(arguments)


def _worker_died(error: Exception) -> bool:
    """Whether a data-loading process is gone: PyTorch says so, or it went while its batch was fetched."""
    if isinstance(error, RuntimeError):
        return bool(re.match(r"DataLoader worker \(pid", str(error)))
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.utils.data.dataloader" for frame, _ in frames)


def _report_dead_worker() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise again
    print(
        "error: a data-loading process died, mostly for lack of memory: use fewer --workers; the same "
        "command continues from the last checkpoint",
        file=sys.stderr,
    )
    sys.exit(2)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    try:
        descriptor = stream.fileno()
    except UnsupportedOperation:  # a stream in memory
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _leave_the_pipe(error: BrokenPipeError) -> None:
    """End as a program does that writes to a closed pipe; another pipe's error is raised again."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
    if not unread:
        raise error
    with open(os.devnull, "w") as nowhere:
        for stream in unread:  # the interpreter writes what is left when it ends
            os.dup2(nowhere.fileno(), stream.fileno())
    sys.exit(128 + signal.SIGPIPE)


def run_main(main: Callable[[], None]) -> None:
    """Run a script. A user's mistake or a full disk: one message and exit code 2. A bug: its traceback. When
    the reader of the output has seen enough (`| head`): silence, and the exit code of a closed pipe, 141."""
    threading.excepthook = _report_thread
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be met
    except BrokenPipeError as error:
        _leave_the_pipe(error)
    except RuntimeError as error:
        # PyTorch reports a dead data-loading process from a signal handler, so also while another error,
        # of the same death, is being handled.
        if not _worker_died(error):
            raise
        _report_dead_worker()


def _run(main: Callable[[], None]) -> None:
    try:
        main()
        if torch.distributed.is_initialized():
            several = torch.distributed.get_world_size() > 1
            torch.distributed.destroy_process_group()
            if several:
                # Threads that outlive the interpreter now and then abort a process that has finished.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
    except UserError as error:
        # From a data-loading process it comes wrapped in that process's traceback.
        message = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _worker_died(error):
            raise
        _report_dead_worker()
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in UNUSABLE_PATH and error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
            sys.exit(2)
        # safetensors passes the system's error on as text alone
        full = error.errno in FULL_DISK if isinstance(error, OSError) else "No space left" in str(error)
        if not full:
            raise
        where = getattr(error, "filename", None) or "the run folder's disk"
        print(
            f"error: no space left writing {where}: free some, then run the same command again",
            file=sys.stderr,
        )
        sys.exit(2)


def run_training(train: Callable[[T], object], presets: dict[str, T], doc: str) -> None:
    """Run a training script: a preset from the command line (see `parse_presets`) to `train`, and what that
    returns, the run folder, as the last line printed. Of the processes that `torchrun` started, the first
    one prints."""

    def main() -> None:
        folder = train(parse_presets(presets, doc))
        if rank() == 0:
            print(folder)

    run_main(main)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu` or `cuda` -> device. Raises UserError on another name, or when CUDA is absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; try --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether --precision means bf16 autocast; `auto`: on a GPU that has it."""
    return precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )


def processor(table: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name. A virtual machine may hide which one it is, so the numbers of family and model
    stand behind it."""
    lines = table.read_text().splitlines() if table.is_file() else []
    about = {
        key.strip(): value.strip() for key, found, value in (line.partition(":") for line in lines) if found
    }
    name = about.get("model name") or platform.processor() or "CPU"
    numbers = [f"{key} {about[key]}" for key in ("cpu family", "model") if key in about]
    return " ".join([name, *([f"({', '.join(numbers)})"] if numbers else [])])


def machine(on_gpu: bool = True) -> dict[str, Any]:
    """Where this process computes, with which versions, and its command. on_gpu: if there is one."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else None,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def start(config: RunConfig, **accelerate_options) -> Accelerator:
    """Seed, choose device and precision, join the other processes when `torchrun` started several.

    Every process gets the same seed: what must differ between processes says so itself (see `StepBatches`).
    """
    device = pick_device(config.device)
    bf16 = in_bf16(config.precision, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no", **accelerate_options
    )
    seed_everything(config.seed)
    torch.backends.cudnn.benchmark = True  # batches of one shape: the fastest kernels are looked for once
    return accelerator


def maybe_compile(module: torch.nn.Module, enabled: bool) -> torch.nn.Module:
    """`torch.compile` in place (names in the state dict stay), or nothing."""
    if enabled:
        module.compile()
    return module


def own_type(x: torch.Tensor) -> torch.autocast:
    """A context in which autocast leaves the types of what is computed on the device of x alone. Not by the
    name of the device: there is no autocast for `meta`, where costs are counted."""
    return torch.autocast("cuda" if x.device.type == "cuda" else "cpu", enabled=False)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone, so that a resumed run draws the same."""
    mixed = np.random.SeedSequence((seed, stream, step)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


def one_opencv_thread(_worker: int) -> None:
    """Start of a data-loading process: OpenCV would take a thread for every core in each of them."""
    import cv2  # here, because most scripts do without

    cv2.setNumThreads(1)


class StepBatches(Sampler):
    """Batch sampler of a run of `steps` steps whose order is a pure function of (seed, step).

    n: size of the data set. batch_size: of all processes together; each rank gets its contiguous share.
    start_step: where a resumed run goes on. draws: yield (index, draw) pairs, `draw` the running number of
    the sample in the whole run, to seed that sample's augmentation whatever worker draws it. roles: into so
    many equal parts a batch is cut by what its samples are for; each rank gets its share of every part.
    Epochs are reshuffled and run into each other, so every batch is full also when n < batch_size.
    Raises UserError when the batch does not divide by the number of processes, ValueError without data.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        draws: bool = False,
        roles: int = 1,
    ):
        if n < 1:
            raise ValueError("StepBatches needs at least one sample")
        if batch_size % (world * roles):
            raise UserError(
                f"a batch of {batch_size} does not divide over {world} processes: give another batch size or "
                "number of processes"
            )
        self.n, self.batch_size, self.seed, self.steps = n, batch_size, seed, steps
        self.start_step, self.rank, self.world, self.draws = start_step, rank, world, draws
        self.roles = roles
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list]:
        part = self.batch_size // self.roles
        share = part // self.world
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.rank * share
            starts = [first + role * part for role in range(self.roles)]
            draws = [draw for start in starts for draw in range(start, start + share)]
            indices = [self._at(draw) for draw in draws]
            yield list(zip(indices, draws, strict=True)) if self.draws else indices

    def _at(self, draw: int) -> int:
        epoch, position = divmod(draw, self.n)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return int(self._order[position])
