"""Show a face at other ages, younger and older, with a trained run.

    python predict.py photo.jpg --ages 20,35,50,65
    python predict.py folder/ --ages 25 70 --strength hair=1 skin=0.3

Writes for every picture: a strip of all ages, the whole picture at every age, the layout, and result.json
with the change of every part of the face. Pictures are marked as synthetic in their metadata. A picture of a
person at another age is a guess, not evidence: do not pass it off as a photograph.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from biphasic_age.datasets import LayoutOrder
from biphasic_age.layouts import paint_layout
from biphasic_age.translate import Aged, Ager, load_ager, read_layout, translate
from shared.io import image_grid, images_of, keep_inputs, progress, read_photo, write_image
from shared.ranges import Seed
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class PredictConfig:
    """Pictures, ages, and with which network."""

    picture: Annotated[Path, tyro.conf.Positional]
    """A photo with one face, or a folder of them."""
    ages: tuple[str, ...] = ()
    """Ages in years, with commas or spaces between them; any age inside the trained range. Default: the mean
    age of every group that the run was trained on."""
    aligned: bool = False
    """The pictures are already cropped and aligned like the training pictures."""
    layout: Path | None = None
    """Label map of an aligned picture, instead of the parser; for a folder, a folder of NAME.png."""
    layout_order: LayoutOrder = "bisenet"
    """Order of the labels in it."""
    strength: tuple[str, ...] = ()
    """How much of the change a part gets, PART=SHARE: skin, hair, brows, eyes, mouth or rest; 0 leaves it,
    1 is the default, 2 doubles it."""
    noise_seed: Seed | None = None
    """Seed of the layout's noise. None: the output without noise."""
    run: Path | None = None
    """Run folder; default: the newest."""
    variant: str = "full"
    """Which network of the run."""
    data: str | None = None
    """Network trained on this set; default: the run's last."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser; default: the run's own parser."""
    out: Path = Path("aged")
    """Folder for the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def read_ages(words: tuple[str, ...]) -> list[float]:
    """Ages in years from the command line. UserError when one is no number."""
    try:
        ages = [float(part) for word in words for part in word.split(",") if part]
    except ValueError:
        ages = []
    if words and not ages:
        raise UserError(f"--ages {' '.join(words)}: not numbers of years; write for example 20,35,50")
    return ages


def read_strengths(words: tuple[str, ...]) -> dict[str, float]:
    """PART=SHARE from the command line. UserError when one is not of that form."""
    strengths = {}
    for word in words:
        part, _, share = word.partition("=")
        try:
            strengths[part] = float(share)
        except ValueError:
            strengths[part] = math.nan
        if not 0 <= strengths[part] <= 2:  # nan too
            raise UserError(f"--strength {word}: write PART=SHARE, for example hair=0.5; a share from 0 to 2")
    return strengths


def write_outputs(folder: Path, ager: Ager, photo: torch.Tensor, ages: list[float], aged: Aged) -> None:
    """The strip, every picture at full size, the layout and result.json."""
    made = f"face translated to another age by {ager.name}"
    labels = ["input", *(f"{age:g}" for age in ages)]
    scale = max(1, 160 // aged.crop.shape[-1])
    strip = image_grid([aged.crop, *aged.crops], columns=len(labels), column_labels=labels, scale=scale)
    write_image(folder / "strip.png", strip, made)
    for age, picture in zip(ages, aged.photos, strict=True):
        write_image(folder / f"age_{age:g}.png", picture, f"{made}: {age:g} years")
    write_image(folder / "layout.png", paint_layout(aged.layout))
    write_json(
        folder / "result.json",
        {
            "model": ager.name,
            "synthetic": True,
            "size": list(photo.shape[-2:]),
            "warnings": aged.warnings,
            "ages": [
                {"age": age, "file": f"age_{age:g}.png", "mean_change": change}
                for age, change in zip(ages, aged.change, strict=True)
            ],
        },
    )


def main(config: PredictConfig) -> Path:
    """Translate every picture; returns the folder with the results. In a folder the other pictures are still
    translated when one is not fit, and then all faults are named in one UserError."""
    ages, strengths = read_ages(config.ages), read_strengths(config.strength)
    ager = load_ager(
        config.run, config.variant, config.data, config.parser_weights, pick_device(config.device)
    )
    ages = ages or [round(mean, 1) for mean in ager.trained.scale.means]
    ager.trained.scale.weights(torch.tensor(ages))  # an age out of range is said before any picture is read
    pictures, several = images_of(config.picture, subfolders=False), config.picture.is_dir()
    if several and config.layout is not None and not config.layout.is_dir():
        raise UserError(f"--layout {config.layout}: for a folder of pictures give a folder of layouts")
    config.out.mkdir(parents=True, exist_ok=True)
    stems = Counter(path.stem for path in pictures)
    faults = []
    for path in progress(pictures, "pictures"):
        name = path.stem if stems[path.stem] == 1 else path.name  # two files may differ in the ending alone
        folder = config.out / name if several else config.out
        try:
            layout = config.layout
            if layout is not None and layout.is_dir():
                layout = layout / f"{name}.png"
            made = [folder / f"{word}.png" for word in ("strip", "layout", *(f"age_{age:g}" for age in ages))]
            keep_inputs([path] if layout is None else [path, layout], made)
            photo, remarks = read_photo(path)
            if layout is not None:
                if not layout.is_file():
                    raise UserError(f"{layout}: no layout for {path}")
                layout = read_layout(layout, tuple(photo.shape[-2:]), config.layout_order)
            aged = translate(
                ager, photo, ages, path.name, config.aligned, layout, strengths, config.noise_seed
            )
        except UserError as error:
            if not several:
                raise
            faults.append(str(error))
            continue
        aged.warnings[:0] = remarks
        for warning in aged.warnings:
            print(f"warning: {warning}")
        write_outputs(folder, ager, photo, ages, aged)
    if faults:
        raise UserError(f"{len(faults)} of {len(pictures)} pictures were not translated: {'; '.join(faults)}")
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(PredictConfig, __doc__))))
