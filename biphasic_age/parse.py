"""Make a folder ready for training: writes the layout of every picture into parsing/NAME.png.

    python parse.py crops/ --parser-weights 79999_iter.pth                  # of aligned pictures
    python parse.py /datasets/morph --align crops/ --parser-weights 79999_iter.pth
    python parse.py CelebA-HQ-img/ --masks CelebAMask-HQ-mask-anno/         # from CelebAMask-HQ's part files

With --align, pictures as they come are first cut out by the places of the eyes, under the same names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.align import EYES, warp
from biphasic_age.datasets import read_parts
from biphasic_age.frozen import load_parser, require_face
from biphasic_age.stages import load_generator
from biphasic_age.translate import by_eyes, parse_photo
from shared.io import IMAGE_ENDINGS, find_images, progress, read_image, write_image
from shared.ranges import Within
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class ParseConfig:
    """Which pictures, and which parser."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures; those of its subfolders are parsed too."""
    align: Path | None = None
    """Folder for crops aligned by the eyes, and their layouts; without it the pictures are taken as aligned.
    Needs --parser-weights."""
    size: Annotated[int, Within(8)] = 256
    """Side of those crops in pixels."""
    masks: Path | None = None
    """CelebAMask-HQ-mask-anno: layouts are put together from its part files, nothing is parsed."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser. Default: the small parser that a run trained."""
    run: Path | None = None
    """Run folder whose parser is used without --parser-weights; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def aligned(image: Tensor, parser: nn.Module, size: int, device: torch.device, name: str) -> Tensor:
    """A picture (3, H, W) in [0, 1] -> the crop (3, size, size) with the eyes at `EYES`. UserError when the
    parser finds no face in it, or no eyes."""
    labels = parse_photo(parser, image, parser.size, device, name)
    move = by_eyes(image, labels, EYES, size)
    if move is None:
        raise UserError(f"{name}: the eyes were not found")
    return warp(image, move, (size, size))


def main(config: ParseConfig) -> Path:
    """Make all layouts; returns their folder. UserError names two pictures of one name, and after all have
    been parsed those in which no face was found."""
    found = find_images(config.folder)
    pictures = [path for path in found if "parsing" not in path.relative_to(config.folder).parts]
    if not pictures:
        raise UserError(f"{config.folder}: no pictures ({', '.join(IMAGE_ENDINGS)}, subfolders too)")
    names: dict[str, Path] = {}
    for path in pictures:
        if names.setdefault(path.stem, path) != path:
            raise UserError(
                f"{path} and {names[path.stem]} would share the layout {path.stem}.png; rename one"
            )
    if config.align is not None:
        if config.masks is not None:
            raise UserError("--masks are of aligned pictures: --align has nothing to do there")
        if config.parser_weights is None:
            raise UserError("--align needs --parser-weights: a run's own parser knows aligned faces alone")
        if config.align.resolve() == config.folder.resolve():
            raise UserError(f"--align {config.align}: give another folder than that of the pictures")
    out, faults = (config.align or config.folder) / "parsing", []
    if config.masks is not None:
        out.mkdir(exist_ok=True)
        for path in progress(pictures, "pictures"):
            Image.fromarray(read_parts(config.masks, path).numpy()).save(out / f"{path.stem}.png")
        return out
    device, side = pick_device(config.device), None
    if config.parser_weights is not None:
        parser = load_parser(config.parser_weights)
    else:
        trained = load_generator(config.run)
        parser, side = trained.parser, trained.config.image_size
        if parser is None:
            raise UserError(f"{trained.folder}: this run trained no face parser; give --parser-weights")
    parser = parser.to(device)
    out.mkdir(parents=True, exist_ok=True)
    for path in progress(pictures, "pictures"):
        image = read_image(path)
        try:
            if config.align is not None:
                image = aligned(image, parser, config.size, device, str(path))
                # With the name, which tells age and person, and without loss.
                write_image(config.align / f"{path.stem}.png", image)
            x = (image * 2 - 1)[None].to(device)
            if side is not None:  # the small parser knows faces of the run's size alone
                x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            labels = parser.labels(x)[0].cpu()
            layout = Image.fromarray(labels.byte().numpy())
            layout = layout.resize((image.shape[-1], image.shape[-2]), Image.Resampling.NEAREST)
            layout.save(out / f"{path.stem}.png")
            looks_like_one = side is None or parser.space.contains(x).item()
            require_face(labels, str(path), looks_like_one=looks_like_one)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{len(faults)} of {len(pictures)} pictures: {'; '.join(faults[:5])}")
    return out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ParseConfig, __doc__))))
