"""Write the layouts that training needs: parses every aligned picture of a folder into parsing/NAME.png.

python parse.py /datasets/morph --parser-weights 79999_iter.pth
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image
from torch.nn import functional as F

from biphasic_age.frozen import load_parser, require_face
from biphasic_age.stages import load_generator
from shared.io import IMAGE_ENDINGS, find_images, progress, read_image
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class ParseConfig:
    """Which pictures, and which parser."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of aligned pictures; those of its subfolders are parsed too."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser. Default: the small parser that a run trained."""
    run: Path | None = None
    """Run folder whose parser is used without --parser-weights; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def main(config: ParseConfig) -> Path:
    """Parse all pictures; returns the folder of layouts. UserError names two pictures of one name, and after
    all have been parsed those in which no face was found."""
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
    device, side = pick_device(config.device), None
    if config.parser_weights is not None:
        parser = load_parser(config.parser_weights)
    else:
        trained = load_generator(config.run)
        parser, side = trained.parser, trained.config.image_size
        if parser is None:
            raise UserError(f"{trained.folder}: this run trained no face parser; give --parser-weights")
    parser, out, faults = parser.to(device), config.folder / "parsing", []
    out.mkdir(exist_ok=True)
    for path in progress(pictures, "pictures"):
        image = read_image(path)
        size = tuple(image.shape[-2:])
        x = (image * 2 - 1)[None].to(device)
        if side is not None:  # the small parser knows faces of the run's size alone
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        labels = parser.labels(x)[0].cpu()
        picture = Image.fromarray(labels.byte().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
        picture.save(out / f"{path.stem}.png")
        looks_like_one = side is None or parser.space.contains(x).item()
        try:
            require_face(labels, str(path), looks_like_one=looks_like_one)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{len(faults)} of {len(pictures)} pictures: {'; '.join(faults[:5])}")
    return out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ParseConfig, __doc__))))
