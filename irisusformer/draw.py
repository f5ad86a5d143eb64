"""Write procedural eyes with their ground truth to a folder, as a data set on disk, and a sheet of them.

    python draw.py --output eyes --count 16
    python draw.py --output set/train --count 300
    python draw.py --output set/test --count 100 --first 1000           # other people
    python train.py paper --dataset casia-distance --data-root set

Writes OUTPUT/{image,SegmentationClass,pupil_edge_mask,iris_edge_mask}/NAME.png, the layout of the
IrisParseNet release, ellipses as OUTPUT/ellipses.json, and OUTPUT/sheet.png with the annotations drawn in.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from irisusformer.data import Side
from irisusformer.eyes import LOOKS, Look, draw_eye, require_looks
from irisusformer.geometry import Ellipse
from irisusformer.iris import identity
from irisusformer.pictures import BLUE, GREEN, RED, outlined, with_ellipse
from shared.io import image_grid, progress, write_image
from shared.ranges import Count, Natural
from shared.records import write_json
from shared.runtime import parse, run_main


@dataclass(frozen=True)
class DrawConfig:
    """What to draw."""

    output: Path
    """Folder to write to."""
    count: Count = 16
    """People, one picture each unless --pictures says more."""
    pictures: Count = 1
    """Pictures of each person."""
    first: Natural = 0
    """Number of the first person; the same number is the same person everywhere."""
    height: Side = 240
    """Pixels."""
    width: Side = 320
    """Pixels."""
    looks: tuple[Look, ...] = LOOKS
    """Sensors, taken in turn."""


def draw(config: DrawConfig) -> None:
    """Write every picture. UserError without looks."""
    require_looks(config.looks)
    ellipses, tiles = {}, []
    numbers = [(config.first + i, k) for i in range(config.count) for k in range(config.pictures)]
    for i, (person, k) in enumerate(progress(numbers, "drawing")):
        look = config.looks[i % len(config.looks)]
        eye, name = (
            draw_eye(identity(person), k, config.height, config.width, look),
            f"{person:06d}_{k}_{look}",
        )
        image = torch.from_numpy(eye.image).permute(2, 0, 1)
        write_image(config.output / "image" / f"{name}.png", image)
        layers = {"SegmentationClass": eye.mask, "pupil_edge_mask": eye.pupil, "iris_edge_mask": eye.outer}
        for folder, layer in layers.items():
            write_image(config.output / folder / f"{name}.png", torch.from_numpy(layer).float()[None])
        inner, outer = Ellipse(*eye.pupil_ellipse), Ellipse(*eye.outer_ellipse)
        ellipses[name] = {"pupil": inner, "limbus": outer}
        marked = outlined(image, torch.from_numpy(eye.mask), GREEN)
        tiles += [image, with_ellipse(with_ellipse(marked, inner, RED), outer, BLUE)]
    write_json(config.output / "ellipses.json", ellipses)
    write_image(config.output / "sheet.png", image_grid(tiles[:32], 8 if config.width <= 160 else 4))


def main() -> None:
    config = parse(DrawConfig, __doc__)
    draw(config)
    print(config.output)


if __name__ == "__main__":
    run_main(main)
