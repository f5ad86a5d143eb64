"""Where pretrained parts come from, and how their files are read without running what is in them."""

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.runtime import UserError

# What the readers of damaged files stumble over: a changed byte makes a wrong length, name, index or type.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def pretrained_path(
    name: str, path: Path | None, where: str, download: Callable[[], Path] | None = None
) -> Path:
    """The file of a pretrained part: the user's `path`, otherwise the library's own `download`.

    name: what it is, for people. where: where to get it and which option takes it. Raises UserError
    when the path is missing, or when neither path nor network is there.
    """
    if path is not None:
        if not path.is_file():
            raise UserError(f"{name}: no file {path}; {where}")
        return path
    if download is None:
        raise UserError(f"{name}: weights needed; {where}")
    try:
        return Path(download())
    except (URLError, OSError) as error:
        raise UserError(f"{name}: could not be downloaded ({error}); {where}") from None


def download_url(url: str) -> Callable[[], Path]:
    """A function that downloads `url` into torch.hub's cache and returns the file's path."""

    def download() -> Path:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        return path

    return download


def load_torch(path: Path | str, mmap: bool = False) -> Any:
    """A .pt/.pth/.pkl/.tar file of tensors, or .safetensors, to the CPU, without unpickling code.

    mmap: tensors are read from the file only where they are used, if it is of PyTorch's newer form.

    Raises UserError on a missing, truncated or foreign file, and on one that holds more than data.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The older form, no zip archive, cannot be mapped.
        mapped = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = _reason(error)
        raise UserError(f"{path}: refused, it holds more than tensors or is damaged ({reason})") from None
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or not a checkpoint ({reason})") from None


def _reason(error: pickle.UnpicklingError) -> str:
    """What PyTorch met in a file, without its advice to load the file with weights_only=False."""
    text = str(error)
    head, found, rest = text.partition("WeightsUnpickler error:")
    if not found and text.startswith("Weights only load failed"):
        rest = text.partition("\n\n")[2]
    sentence = (rest or head).strip().split("\n")[0].split(". Please")[0]
    return sentence.rstrip(".") or "not a PyTorch file"


class _Restricted(pickle.Unpickler):
    def __init__(self, file, allowed: set[str], replace: dict[str, Any], path: Path):
        super().__init__(file, encoding="latin1")
        self.allowed, self.replace, self.path = allowed, replace, path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.replace:
            return self.replace[full]
        if full in self.allowed:
            return super().find_class(module, name)
        raise UserError(f"{self.path}: refused, the pickle asks for {full}, which such a file does not need")


def load_pickle(path: Path | str, allowed: Iterable[str] = (), replace: dict[str, Any] | None = None) -> Any:
    """A pickle that may name only the classes and functions in `allowed` ("module.name").

    replace: stand-ins used instead of what the pickle names. Raises UserError on anything else, on a
    missing and on a damaged file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _Restricted(file, set(allowed), replace or {}, path).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged or not the expected pickle ({error})") from None


def load_state(
    module: nn.Module,
    state: dict[str, Any],
    source: Path | str,
    prefixes: Iterable[str] = ("module.",),
    exact: bool = False,
) -> None:
    """Load a state dict strictly, after taking one common prefix off all its names.

    prefixes: those that wrappers are known to add (`DataParallel`: "module."). exact: the types must be the
    module's own; otherwise real numbers of another precision are converted. Raises UserError that lists what
    is missing, unexpected, of another shape or of another kind of number, in words that name the file.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: holds no state dict of tensors")
    for prefix in prefixes:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    expected = module.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} is unexpected" for key in state if key not in expected]
    faults += [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults += [
        f"{key} holds {_type(state[key])} instead of {_type(value)}"
        for key, value in expected.items()
        if key in state
        and (_type(state[key]) != _type(value) if exact else _kind(state[key]) != _kind(value))
    ]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise UserError(f"{source}: made for another model than {type(module).__name__}: {shown}")
    module.load_state_dict(state)


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _kind(values: Tensor) -> str:
    """Real numbers of every precision are alike, and so are whole ones; between the two a value is lost or
    means something else."""
    kinds = {"complex": values.is_complex(), "real": values.is_floating_point()}
    return next((kind for kind, found in kinds.items() if found), "whole")
