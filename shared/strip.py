"""shared/strip.png, the picture strip of the front page: a piece of a sheet of each paper's newest run.

python -m shared.strip
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shared.io import find_run
from shared.report import PAPERS
from shared.runtime import REPOSITORY, run_main

PIECES: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
"""Paper -> file in the run's samples, and the piece of it: left, top, right, bottom in pixels."""
SIDE, LABEL, COLUMNS = 190, 18, 5


def tile(paper: str) -> Image.Image:
    """The paper's piece in a square under its name. UserError when there is no run."""
    name, box = PIECES[paper]
    piece = Image.open(find_run(paper) / "samples" / name).convert("RGB").crop(box)
    factor = SIDE / max(piece.size)
    piece = piece.resize([round(side * factor) for side in piece.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE + LABEL), "white")
    square.paste(piece, ((SIDE - piece.width) // 2, LABEL + (SIDE - piece.height) // 2))
    ImageDraw.Draw(square).text((SIDE // 2, 2), paper, "black", ImageFont.load_default(13), "ma")
    return square


def write_strip(path: Path = REPOSITORY / "shared" / "strip.png") -> Path:
    """Write all papers' tiles in rows of five; returns the path."""
    rows, gap = -(-len(PAPERS) // COLUMNS), 6
    size = COLUMNS * (SIDE + gap) - gap, rows * (SIDE + LABEL + gap) - gap
    strip = Image.new("RGB", size, "white")
    for number, paper in enumerate(PAPERS):
        row, column = divmod(number, COLUMNS)
        strip.paste(tile(paper), (column * (SIDE + gap), row * (SIDE + LABEL + gap)))
    strip.quantize(200).save(path, optimize=True)
    return path


if __name__ == "__main__":
    run_main(lambda: print(write_strip()))
