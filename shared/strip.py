"""shared/strip.png, the picture strip of the front page: four cells of a sheet of each paper's newest run.

python -m shared.strip
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shared.io import find_run
from shared.report import PAPERS
from shared.runtime import REPOSITORY, run_main

CELLS: dict[str, tuple[str, int | tuple[int, int], tuple[tuple[int, int], ...]]] = {
    "pin": ("purified.png", 96, ((0, 508), (98, 508), (196, 508), (784, 410))),
    "dfgc2022": ("clips.png", 128, ((51, 0), (311, 130), (51, 390), (181, 520))),
    "dfl": ("federation.png", 48, ((44, 0), (94, 0), (44, 150), (94, 150))),
    "mdrnets": ("test-faces.png", 96, ((0, 214), (686, 214), (0, 802), (686, 802))),
    "anyface": ("test-captions-64.png", 64, ((342, 18), (474, 84), (342, 216), (408, 414))),
    "faceswapper": ("grid.png", 128, ((0, 148), (260, 18), (260, 148), (260, 538))),
    "meta_reid": ("ranking.png", (114, 104), ((0, 0), (174, 0), (0, 636), (174, 636))),
    "irisusformer": ("test.png", 128, ((0, 408), (260, 408), (0, 798), (520, 798))),
    "biphasic_age": ("test-faces-young-to-old-full.png", 128, ((0, 18), (520, 18), (0, 278), (520, 278))),
    "most_net": ("comparison.png", 96, ((129, 0), (129, 980), (521, 0), (521, 980))),
}
"""Paper -> file in the run's samples; side, or width and height, of a cell; left and top of four of them."""
SIDE, LABEL, COLUMNS, GAP = 94, 18, 5, 6


def tile(paper: str) -> Image.Image:
    """The paper's four cells under its name. UserError when there is no run."""
    name, side, corners = CELLS[paper]
    sheet = Image.open(find_run(paper) / "samples" / name).convert("RGB")
    made = Image.new("RGB", (2 * SIDE, 2 * SIDE + LABEL), "white")
    width, height = side if isinstance(side, tuple) else (side, side)
    for number, (left, top) in enumerate(corners):
        cell = sheet.crop((left, top, left + width, top + height))
        cell = cell.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        made.paste(cell, (number % 2 * SIDE, LABEL + number // 2 * SIDE))
    ImageDraw.Draw(made).text((SIDE, 2), paper, "black", ImageFont.load_default(13), "ma")
    return made


def write_strip(path: Path = REPOSITORY / "shared" / "strip.png") -> Path:
    """Write all papers' tiles in rows of five; returns the path."""
    width, height = 2 * SIDE + GAP, 2 * SIDE + LABEL + GAP
    rows = -(-len(PAPERS) // COLUMNS)
    strip = Image.new("RGB", (COLUMNS * width - GAP, rows * height - GAP), "white")
    for number, paper in enumerate(PAPERS):
        strip.paste(tile(paper), (number % COLUMNS * width, number // COLUMNS * height))
    strip.quantize(200).save(path, optimize=True)
    return path


if __name__ == "__main__":
    run_main(lambda: print(write_strip()))
