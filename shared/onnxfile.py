"""Networks as ONNX files: writing them, comparing them with the network, running them with ONNX Runtime."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from shared.runtime import UserError


def write_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    free: dict[int, str] | None = None,
    opset: int | None = None,
) -> None:
    """Trace a module on `example` and write it.

    inputs, outputs: names of the file's tensors. free: axis -> name, for axes of all of them whose length may
    change; all other lengths are constants. opset: None is PyTorch's own choice.
    """
    axes = {name: free for name in (*inputs, *outputs)} if free else None
    with warnings.catch_warnings(), torch.no_grad():
        # The older exporter, which needs no further package, warns of its successor, and of what becomes a
        # constant, here on purpose.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )


def require_close(path: Path, difference: float, tolerance: float) -> None:
    """UserError when an exported file differs too much from its network."""
    if not difference <= tolerance:
        raise UserError(
            f"{path}: would differ from the network by {difference:.2g}, more than {tolerance:g}; not kept"
        )


def open_onnx(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX file, ready to run on the CPU. threads: 0 takes as many as it likes. UserError when it is
    missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; an ONNX network belongs there")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise UserError(f"{path}: damaged or not an ONNX network ({str(error).splitlines()[0]})") from None


def run_onnx(path: Path, **inputs: Tensor) -> list[Tensor]:
    """All outputs of an ONNX file."""
    found = open_onnx(path).run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    return [torch.from_numpy(np.asarray(value)) for value in found]
