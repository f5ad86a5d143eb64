"""Picture files as photos: whatever is in them (rotation, transparency, 16 bit, no colour), always RGB."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.runtime import UserError


class Photo(NamedTuple):
    """A picture file."""

    name: str
    rgb: np.ndarray
    """(H, W, 3) uint8."""
    alpha: np.ndarray | None = None
    """(H, W) uint8 where the file is not opaque."""

    @property
    def seen(self) -> np.ndarray:
        """What the networks look at: transparent places white."""
        if self.alpha is None:
            return self.rgb
        a = self.alpha[..., None].astype(np.float32) / 255
        return np.rint(self.rgb * a + 255 * (1 - a)).astype(np.uint8)

    @property
    def grey(self) -> bool:
        """Whether there is no colour in it."""
        return bool((self.rgb == self.rgb[..., :1]).all())


def read_photo(path: Path) -> Photo:
    """A picture file, turned as its EXIF data say. UserError when it is missing, damaged or no picture."""
    try:
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I;16") or turned.mode == "I":
                turned = Image.fromarray((np.asarray(turned) / 257).clip(0, 255).astype(np.uint8))
            rgba = np.array(turned.convert("RGBA"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None
    alpha = None if (rgba[..., 3] == 255).all() else rgba[..., 3]
    return Photo(path.name, np.ascontiguousarray(rgba[..., :3]), alpha)
