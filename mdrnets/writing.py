"""What `ema` writes into the memory: features of undamaged pictures, by the parts that they belong to.

Parts are the labels where a set has them, otherwise what the parser sees. It is at rest and a picture comes
in two forms, as it is and mirrored, so what it sees is computed once for each and kept on disk for later
steps and runs.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.data import Pictures
from mdrnets.datasets import FacePictures
from mdrnets.model import MDRNet
from mdrnets.parser import parts_on_grid

FORM = 1
"""Of the kept files and of how pictures are read; another number makes all of them anew."""

Autocast = Callable[[], AbstractContextManager]

log = logging.getLogger(__name__)


def write_memory(
    net: MDRNet, x: Tensor, parsing: Tensor, generator: torch.Generator, autocast: Autocast = nullcontext
) -> None:
    """Encode undamaged pictures x (B, 3, H, W) in [-1, 1] and write them into the blocks of their parts:
    shares of each in every cell (B, K, h, w). autocast: arithmetic of the networks; queries and memory stay
    in fp32."""
    dmm = net.refine.dmm
    with torch.no_grad():
        with autocast():
            features = net.refine.features(x, torch.zeros_like(x[:, :1]), parsing)
        dmm.write(dmm.queries(features.float()).flatten(0, 1), parsing.argmax(1).flatten(), generator)


def parsing_of(
    batch: dict[str, Tensor],
    which: list[tuple[int, bool]],
    pictures: Pictures,
    parsed: "ParsedParts",
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Shares of the parts in every cell of a batch's undamaged pictures, (B, K, h, w) float: of the labels,
    or 1 for the part that the parser sees. which: see `ParsedParts`."""
    count = len(pictures.parts)
    if pictures.labelled:
        return parts_on_grid(batch["parts"], count, parsed.cells)
    return F.one_hot(parsed(batch["image"], which, autocast), count).movedim(-1, 1).float()


def fingerprint(parser: nn.Module) -> str:
    """SHA-256 of a network's weights and of their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(parser.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class ParsedParts:
    """The part that the parser sees in every cell of an undamaged picture, kept in `folder` (None: computed
    whenever it is asked for).

    A file for every picture and orientation, compressed by zlib, whose checksum tells a damaged one. Its name
    is a hash of the picture's file (`FacePictures.stamp`), of the parser's weights and of `circumstances`
    (what else decides what the parser sees: its size, the precision). It gets that name when it is whole, so
    that a killed run leaves no half of one, and several processes and runs can share the folder. Damaged
    files are made anew and named in a warning; where nothing can be written, on a full disk for example, a
    warning says so once and training goes on without keeping more.
    """

    def __init__(
        self,
        parser: nn.Module,
        pictures: FacePictures,
        cells: tuple[int, int],
        folder: Path | None,
        circumstances: str = "",
    ):
        self.parser, self.pictures, self.cells, self.folder = parser, pictures, cells, folder
        self.writable = folder is not None
        if folder is not None:
            self.made_by = [FORM, fingerprint(parser), *pictures.parts, *cells, circumstances]

    def __call__(self, x: Tensor, which: list[tuple[int, bool]], autocast: Autocast = nullcontext) -> Tensor:
        """Pictures x (B, 3, H, W) in [-1, 1], and of each its number and whether it is mirrored -> parts (B,
        h, w) int64 on their device."""
        if self.folder is None:
            return self._parsed(x, autocast)
        places = [self._place(*each) for each in which]
        parts = [self._kept(place) for place in places]
        absent = [i for i, found in enumerate(parts) if found is None]
        if absent:
            seen = self._parsed(x[absent], autocast).byte().cpu()
            for i, each in zip(absent, seen, strict=True):
                parts[i] = each
                self._keep(places[i], each)
        return torch.stack(parts).to(x.device, torch.long)

    @torch.no_grad()
    def _parsed(self, x: Tensor, autocast: Autocast) -> Tensor:
        with autocast():
            return self.parser(x, self.cells).argmax(1)

    def _place(self, picture: int, mirrored: bool) -> Path:
        key = json.dumps([*self.made_by, *self.pictures.stamp(picture), mirrored])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _kept(self, place: Path) -> Tensor | None:
        rows, columns = self.cells
        try:
            values = zlib.decompress(place.read_bytes())
            if len(values) != rows * columns:
                raise ValueError(f"{len(values)} cells instead of {rows * columns}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, zlib.error) as error:
            log.warning("%s: damaged (%s); what the parser sees is computed again", place, error)
            return None
        return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(rows, columns)

    def _keep(self, place: Path, parts: Tensor) -> None:
        if not self.writable:
            return
        temporary = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=place.parent, prefix=".", suffix=".part", delete=False) as file:
                temporary = Path(file.name)
                file.write(zlib.compress(parts.numpy().tobytes()))
            temporary.replace(place)
        except OSError as error:
            self.writable = False
            log.warning(
                "%s: cannot be written (%s); training goes on and keeps no more of what the parser sees",
                self.folder, error.strerror,
            )  # fmt: skip
            if temporary is not None:
                temporary.unlink(missing_ok=True)
