"""Size, cost, speed and memory of a network or a training step."""

import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from shared.io import runs_root
from shared.published import format_table
from shared.records import write_json

# As `runtime.start` sets it for training: what is measured repeats one shape.
torch.backends.cudnn.benchmark = True
# The profiler behind `peak_memory` otherwise prints that it found no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any, out_val: Any) -> int:
    # PyTorch's own formula counts the gradient of the weight as if there were no groups.
    transposed, wanted = options[4], options[-1]
    each = (x if transposed else gradient).numel() * weight[0].numel()
    return 2 * each * (wanted[0] + wanted[1])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_options: Any, out_val: Any, **_named: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


FORMULAS = {
    # older versions of PyTorch have none for attention on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    **flop_registry,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


class _Counter(TorchDispatchMode):
    # PyTorch's FlopCounterMode follows modules too, and so allows no gradient inside a forward pass.
    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, formula = kwargs or {}, FORMULAS.get(function._overloadpacket)
        if formula is None:
            with self:  # what an operation is made of counts
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def count_macs(function: Callable, *inputs: Any, training: bool = False) -> int:
    """Multiply-accumulates of the matrix products and convolutions (attention included) of one call.

    By PyTorch's formulas, halved: they count a multiply and an add separately. training: the call runs
    backward passes, which are counted. Networks and inputs may be on the meta device, where nothing is
    computed.
    """
    counter = _Counter()
    with torch.set_grad_enabled(training), counter:
        function(*inputs)
    return counter.flops // 2


def synchronize(device: torch.device | str) -> None:
    """Wait for a CUDA device; nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def throughput(
    function: Callable[[], Any], items: int, device: torch.device | str = "cpu", seconds: float = 3.0
) -> float:
    """Items per second of `function`, which handles `items` of them per call.

    One warm-up call (two on CUDA), then repeated calls for `seconds`; the median call counts, because a
    shared machine makes the mean meaningless.
    """
    for _ in range(2 if torch.device(device).type == "cuda" else 1):
        function()
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 3:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return items / sorted(times)[len(times) // 2]


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    seconds: float = 0.0,
    rounds: int = 3,
) -> dict[str, float]:
    """Seconds that one call of each function takes, called in turn, so that what else the machine does slows
    all of them alike: the median over `rounds` rounds, or as many as `seconds` for each function allow, after
    one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin, done = time.perf_counter(), 0
    while done <= rounds or time.perf_counter() - begin < seconds * len(functions):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        done += 1
    return {name: median(spent[1:]) for name, spent in times.items()}


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Largest number of bytes of tensors alive at once that one call adds to what was there.

    CUDA: the allocator's own counter. CPU: PyTorch's allocation events, summed in their order.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    alive = peak = 0
    for event in sorted(
        (event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def peak_rate(device: torch.device | str = "cpu") -> float:
    """Multiply-accumulates per second of one large matrix product, the most that a network could reach: in
    bf16, or in fp32 where a CPU is faster in it."""
    side = 8192 if torch.device(device).type == "cuda" else 2048

    def rate(dtype: torch.dtype, side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return throughput(lambda: torch.mm(a, b), side**3, device, seconds=0.3)

    # A small product tells which precision: a CPU without bf16 units takes minutes for the large one in it.
    faster = max((torch.bfloat16, torch.float32), key=lambda dtype: rate(dtype, side // 8))
    return rate(faster, side)


def report(
    paper: str, rows: list[dict[str, Any]], folder: Path | None = None, device: torch.device | str = "cpu"
) -> Path:
    """Print rows, a table for each kind of them, which the name of their first cell tells, and write
    bench.json into `folder`, default runs/<paper>.

    device: where the rows were measured. Rows with `gmacs` (1e9 multiply-accumulates per item) and
    `per_second` (items) get a `share_of_peak` of this machine; see `peak_rate`.
    """
    peak = peak_rate(device) if any(row.get("gmacs") and row.get("per_second") for row in rows) else None
    rows = [
        row | {"share_of_peak": row["gmacs"] * 1e9 * row["per_second"] / peak}
        if row.get("gmacs") and row.get("per_second")
        else row
        for row in rows
    ]
    for first in dict.fromkeys(next(iter(row)) for row in rows):
        kind = [row for row in rows if next(iter(row)) == first]
        keys = list(dict.fromkeys(key for row in kind for key in row))
        print(format_table(keys, [[row.get(key) for key in keys] for row in kind]))
    cuda = torch.device(device).type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    if peak:
        print(f"peak of {machine}: {peak / 1e12:.3g} T multiply-accumulates per second, one matrix product")
    folder = folder or runs_root() / paper
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    write_json(path, {"machine": machine, "torch": torch.__version__, "peak": peak, "rows": rows})
    return path
