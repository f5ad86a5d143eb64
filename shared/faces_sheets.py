"""Contact sheets of the procedural faces, as shared/README.md shows them: python -m shared.faces_sheets"""

from pathlib import Path

import torch

from shared.faces import ARTISTS, CLASSES, Params, draw, make_params, sample, sample_attributes, sketches
from shared.io import image_grid, to_pil
from shared.runtime import run_main

HERE = Path(__file__).parent
PALETTE = torch.rand(len(CLASSES), 3, generator=torch.Generator().manual_seed(8))


def identities() -> torch.Tensor:
    """Six people (rows) in eight situations each."""
    people = sample(6, seed=5)
    tiles = []
    for person in range(6):
        rows = Params.cat([people[[person]]] * 8)
        faces = make_params(rows.identity, sample_attributes(8, seed=person), rows.age)
        tiles += list(draw(faces, 80).image)
    return image_grid(tiles, 8)


def ages() -> torch.Tensor:
    """Four people from childhood to old age."""
    years = (3, 8, 14, 20, 32, 45, 58, 70, 85)
    people = sample(4, seed=12, worn=0.0)
    tiles = []
    for person in range(4):
        neutral = people[[person]].replace(yaw=0.0, pitch=0.0, glasses=0.0, hat=0.0, blur=0.0, noise=0.0)
        tiles += [draw(neutral.replace(age=float(age)), 96).image[0] for age in years]
    return image_grid(tiles, len(years), column_labels=[str(age) for age in years])


def drawn() -> torch.Tensor:
    """Photograph and every artist's sketch of it."""
    people = sample(7, seed=21)
    tiles = list(draw(people, 96).image)
    for artist in ARTISTS:
        tiles += list(sketches(people, 96, artist))
    return image_grid(tiles, 7, row_labels=["photo", *ARTISTS])


def semantics() -> torch.Tensor:
    """Images, their semantic maps, and the 68 landmarks."""
    faces = draw(sample(7, seed=33), 128)
    maps = PALETTE[faces.semantics.long()].permute(0, 3, 1, 2)
    marked = faces.image.clone()
    for image, points in zip(marked, faces.landmarks.round().long(), strict=True):
        for x, y in points.tolist():
            if 1 <= x < 127 and 1 <= y < 127:
                image[:, y - 1 : y + 2, x - 1 : x + 2] = torch.tensor([0.1, 1.0, 0.3])[:, None, None]
    return image_grid([*faces.image, *maps, *marked], 7, row_labels=["image", "classes", "landmarks"])


def resolutions() -> torch.Tensor:
    """The same faces at 32, 64 and 256 pixels, shown at one size."""
    people = sample(5, seed=40)
    tiles = []
    for size in (32, 64, 256):
        image = draw(people, size).image
        tiles += list(torch.nn.functional.interpolate(image, (160, 160), mode="nearest"))
    return image_grid(tiles, 5, row_labels=["32", "64", "256"])


def main() -> None:
    sheets = {f.__name__: f for f in (identities, ages, drawn, semantics, resolutions)}
    for name, make in sheets.items():
        path = HERE / f"faces_{name}.png"
        to_pil(make()).quantize(96).save(path, optimize=True)
        print(path.name)


if __name__ == "__main__":
    run_main(main)
