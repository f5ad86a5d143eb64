"""Which numbers a setting takes, said in its annotation: `lr: Positive`, `widths: tuple[Count, ...]`."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Within:
    """The numbers from `low` to `high`; `above`: without `low` itself. nan is in none."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"a number {'above' if self.above else 'from'} {self.low:.10g} to {self.high:.10g}"
        if self.low > -math.inf:
            return f"a number above {self.low:.10g}" if self.above else f"{self.low:.10g} or more"
        return "a number"


Count = Annotated[int, Within(1)]
"""Of things of which there must be one."""
Natural = Annotated[int, Within(0)]
"""Of things of which there may be none."""
Positive = Annotated[float, Within(0, above=True)]
"""A rate, a temperature, a bound on a norm."""
Weight = Annotated[float, Within(0)]
"""Of a term in a sum, or another amount; 0 leaves it out."""
Share = Annotated[float, Within(0, 1)]
"""A part of a whole, a probability."""
Part = Annotated[float, Within(0, 1, above=True)]
"""A share that is not empty."""
Decay = Annotated[float, Within(0, 0.999999)]
"""Of a moving average, such as Adam's moments; with 1 it would never move."""
Seed = Annotated[int, Within(0, 2**32 - 1)]
"""What NumPy's and PyTorch's generators both take."""


def out_of_range(config: Any) -> str | None:
    """What is wrong with the first number of a dataclass that is outside the range of its annotation, or not
    a number, with the name of its option; None when all are right. Looks into nested dataclasses, tuples,
    lists and optional settings."""
    return next(_complaints(config, type(config), "-"), None)


def _complaints(value: Any, kind: Any, option: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(value):
        for field, inner in typing.get_type_hints(type(value), include_extras=True).items():
            named = [about.name for about in getattr(inner, "__metadata__", ()) if hasattr(about, "name")]
            joint, name = "-" if option == "-" else ".", field.replace("_", "-")
            # tyro.conf.arg(name=""): the fields inside are options without a prefix.
            inside = option if "" in named else f"{option}{joint}{name}"
            yield from _complaints(getattr(value, field), inner, inside)
    elif origin in (typing.Union, types.UnionType):
        for inner in arguments if value is not None else ():
            yield from _complaints(value, inner, option)
    elif isinstance(value, (tuple, list)):
        kinds = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
        for entry, inner in zip(value, kinds, strict=False):
            yield from _complaints(entry, inner, option)
    elif isinstance(value, (int, float)):
        about = arguments[1:] if origin is Annotated else ()
        for allowed in [entry for entry in about if isinstance(entry, Within)] or [Within()]:
            if value not in allowed:
                yield f"{option} {value}: give {allowed}"
