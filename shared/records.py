"""Files that are whole or not there, JSON, and the state of the random generators as plain tensors."""

import dataclasses
import json
import math
import random
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.runtime import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends well; otherwise what was at `path` stays. Its
    folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary name, non-finite numbers as null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, none of which shares memory with another, as one safetensors file through a temporary
    name. metadata: texts that the file holds beside them."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata)


def read_json(path: Path, what: str, form: Callable[[Any], Any] | None = None, advice: str = "") -> Any:
    """Content of a JSON file in UTF-8, or what `form` makes of it.

    what: it should be, for people. form: takes the content apart, and stumbles where it is something else.
    advice: what to do then. Raises UserError that names a missing, damaged or foreign file.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
        return form(content) if form else content
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # A missing key says nothing but its name.
        reason = repr(error) if isinstance(error, LookupError) else str(error)
        after = f"; {advice}" if advice else ""
        raise UserError(f"{path}: not readable as {what} ({reason}){after}") from None


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples, NumPy and torch numbers -> what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def revive(value: Any, kind: Any) -> Any:
    """The inverse of `plain` for the types that a Config's fields have. Raises TypeError on another type's
    value."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return revive(value, arguments[0])
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: revive(entry, hints[key]) for key, entry in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return revive(value, next(entry for entry in arguments if entry is not type(None)))
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        pairs = zip(value, arguments, strict=False) if inner is None else ((entry, inner) for entry in value)
        return tuple(revive(entry, expected) for entry, expected in pairs)
    if origin is list:
        return [revive(entry, arguments[0]) for entry in value]
    if kind in (int, float, str, bool):
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not kind and not number:
            raise TypeError(f"{value!r} is no {kind.__name__}")
    return Path(value) if kind is Path else value


def random_state() -> dict:
    """State of Python's, NumPy's and PyTorch's global generators, made of tensors, numbers and lists."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), next_gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    # A run may go on with another number of GPUs: then their generators keep the fresh seed.
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
