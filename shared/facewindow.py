"""Drawing only where, and only for those faces where, there is something to draw.

A part of a face covers few pixels, and many faces wear no hat: `Window` cuts out of every picture a
rectangle of one size that bounds the part, `draw_some` takes the faces that wear something. Neither changes
what a face looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared.faceparams import Params


class View:
    """The attributes of another object (tensors or tuples of tensors), each put through a function at its
    first use."""

    def __init__(self, source: Any, through: Callable[[Tensor], Tensor]) -> None:
        self._source, self._through = source, through

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._source, name)
        if isinstance(value, Tensor):
            value = self._through(value)
        elif isinstance(value, tuple):
            value = tuple(self._through(item) for item in value)
        self.__dict__[name] = value
        return value


def chosen(source: Any, faces: Tensor | slice) -> Any:
    """The same tensor, Params or object with tensors for some faces: numbers (n,) int64, or a slice."""
    if isinstance(faces, slice):
        return source[faces] if isinstance(source, Tensor | Params) else View(source, lambda t: t[faces])
    if isinstance(source, Params):
        return source[faces]
    # a quarter of the time of source[faces]
    return (
        source.index_select(0, faces)
        if isinstance(source, Tensor)
        else View(source, lambda t: t.index_select(0, faces))
    )


def draw_some(
    paint: Callable[..., tuple[Tensor, Tensor]], worn: Tensor, image: Tensor, labels: Tensor, *about: Any
) -> None:
    """Overwrites image and labels with paint(image, labels, *about) for the faces with worn, (B,) bool."""
    faces = worn.nonzero()[:, 0]
    if len(faces):
        image[faces], labels[faces] = paint(*(chosen(thing, faces) for thing in (image, labels, *about)))


Spans = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # first and last rows, first and last columns


def spans(s: Any, height: int, width: int, middle: tuple[Any, Any], reach: tuple[Any, Any]) -> Spans:
    """Bounds in the picture, each (B, 1) int64, of a rectangle of the upright face: its middle (u, v) and
    half its sides in half heights."""
    cos, sin = s.cos_roll * s.scale, s.sin_roll * s.scale
    (u, v), (du, dv) = middle, reach
    ends = []
    for at, grown, count in (
        (u * sin + v * cos + s.shift_y + 1, du * sin.abs() + dv * cos.abs(), height),
        (u * cos - v * sin + s.shift_x + width / height, du * cos.abs() + dv * sin.abs(), width),
    ):
        pair = ((at - grown) * (height / 2) - 1, (at + grown) * (height / 2))
        ends.append(tuple(end.flatten(1).floor().clamp(0, count - 1).long() for end in pair))
    return tuple(ends)


class Window:
    """One rectangle per face of pictures, which holds the given one; all are as large as the largest.

    rows (B, height) and columns (B, width): the pixels' numbers in the picture.
    """

    def __init__(self, height: int, width: int, ends: Spans) -> None:
        self.rows, self.columns = (
            self._span(*pair, count) for pair, count in zip(ends, (height, width), strict=True)
        )
        self.height, self.width = self.rows.shape[1], self.columns.shape[1]
        self._first = (self.rows * width + self.columns[:, :1])[:, None]  # (B, 1, height), of each row
        self._picture = height * width
        self._starts: dict[int, Tensor] = {}  # channels -> (B channels height,), of each row in memory

    @staticmethod
    def _span(first: Tensor, last: Tensor, count: int) -> Tensor:
        length = int((last - first).max()) + 1
        return first.clamp(max=count - length) + torch.arange(length, device=first.device)

    @staticmethod
    def around(field: Tensor) -> Window:
        """Around the pixels where a field (B, 1, H, W) is negative."""
        ends = []
        for lowest in (field.amin(3), field.amin(2)):
            flags = lowest.flatten(1) < 0
            first = flags.to(torch.uint8).argmax(1, keepdim=True)
            last = flags.shape[1] - 1 - flags.flip(1).to(torch.uint8).argmax(1, keepdim=True)
            ends.append((first, torch.where(flags.any(1, keepdim=True), last, first)))
        return Window(*field.shape[2:], tuple(ends))

    def _rows(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Every run of `width` numbers in a tensor (B, C, H, W), a view (runs, width), and which of them are
        the window's rows: whole rows are copied in a fifth to a half of the time of gather and scatter."""
        count, channels = tensor.shape[:2]
        if channels not in self._starts:
            pictures = torch.arange(count * channels, device=tensor.device).mul_(self._picture)
            self._starts[channels] = (pictures.reshape(count, channels, 1) + self._first).flatten()
        runs = tensor.as_strided((tensor.numel() - self.width + 1, self.width), (1, 1))
        return runs, self._starts[channels]

    def take(self, tensor: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, height, width); numbers of whole faces, (B, C, 1, 1), stay as they are."""
        if tensor.shape[2:] == (1, 1):
            return tensor
        runs, rows = self._rows(tensor.contiguous())
        return runs.index_select(0, rows).reshape(*tensor.shape[:2], self.height, self.width)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Writes part (B, C, height, width) into tensor (B, C, H, W), which lies in memory in that order."""
        assert tensor.is_contiguous()
        runs, rows = self._rows(tensor)
        runs.index_copy_(0, rows, part.reshape(-1, self.width))

    def view(self, source: Any) -> View:
        return View(source, self.take)
