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
    return source[faces] if isinstance(source, Tensor | Params) else View(source, lambda t: t[faces])


def draw_some(
    paint: Callable[..., tuple[Tensor, Tensor]], worn: Tensor, image: Tensor, labels: Tensor, *about: Any
) -> None:
    """Overwrites image and labels with paint(image, labels, *about) for the faces with worn, (B,) bool."""
    faces = worn.nonzero()[:, 0]
    if len(faces):
        image[faces], labels[faces] = paint(
            image[faces], labels[faces], *(chosen(thing, faces) for thing in about)
        )


class Window:
    """One rectangle per face around the true pixels of mask (B, 1, H, W); all are as large as the largest."""

    def __init__(self, mask: Tensor) -> None:
        height, width = mask.shape[2:]
        inside = mask.to(torch.float32)  # amax of it is much faster than any of booleans
        top, self.height = self._span(inside.amax(3).flatten(1) > 0)
        left, self.width = self._span(inside.amax(2).flatten(1) > 0)
        rows = top + torch.arange(self.height, device=mask.device)
        columns = left + torch.arange(self.width, device=mask.device)
        self.index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]  # (B, 1, pixels)

    @staticmethod
    def _span(any_: Tensor) -> tuple[Tensor, int]:
        """First position of each rectangle, (B, 1), and the length of all, from (B, positions)."""
        count = any_.shape[1]
        flags = any_.to(torch.uint8)
        first = flags.argmax(1)
        last = count - 1 - flags.flip(1).argmax(1)
        length = int(torch.where(any_.any(1), last - first + 1, 1).max())
        return first.clamp(max=count - length)[:, None], length

    def take(self, tensor: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, height, width); numbers of whole faces, (B, C, 1, 1), stay as they are."""
        if tensor.shape[2:] == (1, 1):
            return tensor
        count, channels = tensor.shape[:2]
        cut = tensor.flatten(2).gather(2, self.index.expand(-1, channels, -1))
        return cut.reshape(count, channels, self.height, self.width)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Writes part (B, C, height, width) into tensor (B, C, H, W)."""
        tensor.flatten(2).scatter_(2, self.index.expand(-1, tensor.shape[1], -1), part.flatten(2))

    def view(self, source: Any) -> View:
        return View(source, self.take)
