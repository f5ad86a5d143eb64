"""Size, cost, speed and memory of a network or a training step."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from shared.io import runs_root
from shared.published import format_table
from shared.records import write_json

# The profiler behind `peak_memory` otherwise prints that it found no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(function: Callable, *inputs: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions (attention included) of one call.

    Half of what PyTorch's own FLOP counter says, which counts a multiply and an add separately.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.get_total_flops() // 2


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
    """Multiply-accumulates per second of one large matrix product, the most that a network could reach:
    bf16 on CUDA, fp32 on the CPU."""
    cuda = torch.device(device).type == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return throughput(lambda: torch.mm(a, b), side**3, device, seconds=0.3)


def report(
    paper: str, rows: list[dict[str, Any]], folder: Path | None = None, device: torch.device | str = "cpu"
) -> Path:
    """Print rows as a table and write bench.json into `folder`, default runs/<paper>.

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
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(format_table(keys, [[row.get(key) for key in keys] for row in rows]))
    cuda = torch.device(device).type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    if peak:
        print(f"peak of {machine}: {peak / 1e12:.3g} T multiply-accumulates per second, one matrix product")
    folder = folder or runs_root() / paper
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    write_json(path, {"machine": machine, "torch": torch.__version__, "peak": peak, "rows": rows})
    return path
