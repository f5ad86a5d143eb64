"""A user's picture at other ages: input checks, aligned crop, layout, generator, paste-back; for
`predict.py`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from biphasic_age.align import Eyes, Similarity, find_eyes, paste, similarity, to_pixels, warp
from biphasic_age.datasets import LayoutOrder, read_labels
from biphasic_age.frozen import BiSeNetParser, SmallParser, load_parser, require_face
from biphasic_age.layouts import CLASSES, from_celebamask, resize_labels
from biphasic_age.stages import Trained, load_generator
from shared.runtime import UserError

PARTS: dict[str, tuple[str, ...]] = {
    "skin": ("skin", "nose", "neck", "l_ear", "r_ear"),
    "hair": ("hair",),
    "brows": ("l_brow", "r_brow"),
    "eyes": ("l_eye", "r_eye", "eye_g"),
    "mouth": ("mouth", "u_lip", "l_lip"),
    "rest": ("background", "cloth", "hat", "ear_r", "neck_l"),
}
"""Parts whose ageing has a strength of its own, and their classes."""

Parser = BiSeNetParser | SmallParser
LITTLE_HAIR = 0.01


@dataclass
class Ager:
    """A trained generator with the parser that it needs."""

    trained: Trained
    parser: Parser | None
    device: torch.device

    @property
    def size(self) -> int:
        """Side of the pictures that the generator was trained on."""
        return self.trained.config.image_size

    @property
    def name(self) -> str:
        return f"{self.trained.folder.name}, {self.trained.data}"


@dataclass
class Aged:
    """One picture at several ages; pictures are (3, H, W) in [0, 1]."""

    crop: Tensor
    """The aligned crop that the generator saw."""
    layout: Tensor
    """(S, S) labels of the crop."""
    crops: list[Tensor]
    """The crop at every age that was asked for."""
    photos: list[Tensor]
    """The whole picture at every age."""
    change: list[dict[str, float]]
    """For every age: mean absolute change of each class that the crop shows."""
    warnings: list[str] = field(default_factory=list)


def load_ager(
    run: Path | None, variant: str, data: str | None, parser_weights: Path | None, device: torch.device
) -> Ager:
    """A run's generator; its own parser, or the public one when its weights are given. UserError when the run
    has none of them."""
    trained = load_generator(run, variant, data)
    if trained.data == "scene":
        raise UserError(f"{trained.folder}: the two-head scene is no face; name a set of faces with --data")
    parser: Parser | None = trained.parser
    weights = parser_weights or trained.config.parser_weights
    if weights is not None:
        parser = load_parser(weights)
    trained.net.to(device).eval()
    return Ager(trained, None if parser is None else parser.to(device).eval(), device)


def read_layout(path: Path, size: tuple[int, int], order: LayoutOrder = "bisenet") -> Tensor:
    """A label map file for a picture of (height, width) = size -> (H, W) int64 in BiSeNet's order. order: of
    the file. UserError for another shape or no label map."""
    labels = read_labels(path).long()
    if order == "celebamask":
        labels = from_celebamask(labels)
    height, width = labels.shape
    if abs(width / height * size[0] / size[1] - 1) > 0.02:
        raise UserError(f"{path}: the layout is {width}x{height} and the picture {size[1]}x{size[0]}")
    return resize_labels(labels[None], size)[0]


def squared(photo: Tensor) -> Tensor:
    """The photo in the middle of a square, its borders repeated."""
    height, width = photo.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(photo[None], (left, side - width - left, top, side - height - top), mode="replicate")[0]


def shrinking(photo: Tensor, size: int) -> Similarity:
    """From the photo's pixels to those of its square at another side."""
    height, width = photo.shape[-2:]
    side, half = max(height, width), complex(0.5, 0.5)
    corner = complex((side - width) // 2, (side - height) // 2)
    scale = size / side
    return Similarity(complex(scale), scale * (corner + half) - half)


def resized(image: Tensor, size: int) -> Tensor:
    """A square picture at another side."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def own_parser(ager: Ager) -> Parser:
    """Its parser. UserError when there is none."""
    if ager.parser is None:
        raise UserError(
            f"{ager.trained.folder}: this run trained no face parser; give the public one with "
            "--parser-weights 79999_iter.pth, or a label map with --layout"
        )
    return ager.parser


@torch.no_grad()
def parse(parser: Parser, image: Tensor, device: torch.device) -> Tensor:
    """(3, S, S) in [0, 1] -> labels (S, S) on the CPU."""
    return parser.labels((image * 2 - 1)[None].to(device))[0].cpu()


def parse_photo(parser: Parser, photo: Tensor, side: int, device: torch.device, name: str) -> Tensor:
    """Labels (side, side) of a photo's square. UserError when they show no face."""
    labels = parse(parser, resized(squared(photo), side), device)
    require_face(labels, name, share=0.02)
    return labels


def by_eyes(photo: Tensor, labels: Tensor, eyes: Eyes, size: int) -> Similarity | None:
    """The similarity photo -> crop (size, size) that puts the eyes of a photo at `eyes`, shares of the crop's
    side. labels (S, S): of the photo's square. None when the eyes are not seen, or too near to each other."""
    side, found = labels.shape[-1], find_eyes(labels)
    if found is None or found[1][0] - found[0][0] < 0.04 * side:
        return None
    whole, aligned = shrinking(photo, side), similarity(found, to_pixels(eyes, size))
    return Similarity(aligned.a * whole.a, aligned.a * whole.b + aligned.b)


def locate(ager: Ager, photo: Tensor, name: str) -> tuple[Similarity, list[str]]:
    """Where the aligned crop lies in a photo: the similarity photo -> crop, and remarks. UserError when the
    parser finds no face."""
    parser = own_parser(ager)
    side = parser.size if isinstance(parser, BiSeNetParser) else ager.size
    labels = parse_photo(parser, photo, side, ager.device, name)
    move = None if ager.trained.eyes is None else by_eyes(photo, labels, ager.trained.eyes, ager.size)
    if move is None:
        note = f"{name}: the eyes were not found; the picture is taken as already aligned"
        return shrinking(photo, ager.size), [note]
    return move, []


@torch.no_grad()
def translate(
    ager: Ager,
    photo: Tensor,
    ages: list[float],
    name: str = "picture",
    aligned: bool = False,
    layout: Tensor | None = None,
    strengths: dict[str, float] | None = None,
    seed: int | None = None,
) -> Aged:
    """A photo (3, H, W) in [0, 1] at every age in years.

    aligned: the picture is already cropped like the training pictures. layout (H, W): its label map instead
    of the parser's (aligned pictures only). strengths: part of `PARTS` -> how much of the change of age it
    gets (1 all, 0 none). seed: of the noise; None gives the output without noise. UserError when the parser
    finds no face, or an age is outside the trained range.
    """
    weights = ager.trained.scale.weights(torch.tensor(ages, dtype=torch.float32))
    size, warnings = ager.size, []
    if aligned or layout is not None:
        move = shrinking(photo, size)
    else:
        move, warnings = locate(ager, photo, name)
    for age in ages:
        shown = ager.trained.scale.shown(age)
        if abs(age - shown) > 0.5:
            warnings.append(f"{name}: for {age:g} the face is shown at {shown:.0f}, the outermost age learnt")
    crop = warp(photo, move, (size, size))
    looks_like_one = True
    if layout is None:
        labels = parse(own_parser(ager), crop, ager.device)
        if isinstance(ager.parser, SmallParser):
            looks_like_one = ager.parser.space.contains((crop * 2 - 1)[None].to(ager.device)).item()
    else:
        labels = resize_labels(squared(layout[None].float()), (size, size))[0].long()
    require_face(labels, name, looks_like_one=looks_like_one)
    if (labels == CLASSES.index("hair")).float().mean() < LITTLE_HAIR:
        warnings.append(f"{name}: almost no hair found; hair will not age")
    x, labels_b = (crop * 2 - 1)[None].to(ager.device), labels[None].to(ager.device)
    net, weights = ager.trained.net, weights.to(ager.device)
    features = net.features(x)
    mixture = None
    if strengths:
        here = strength_map(labels_b, strengths)
        own = source_weights(features.logits)
        mixture = here, net.maps(features, labels_b, own, *noise_of(seed))
    crops, change = [], []
    for row in weights:
        maps = net.maps(features, labels_b, row[None], *noise_of(seed))
        if mixture is not None:
            here, own_maps = mixture
            maps = [
                b + (a - b) * F.interpolate(here, a.shape[-2:], mode="area")
                for a, b in zip(maps, own_maps, strict=True)
            ]
        y = (net.paint(features, maps, x)[0].float().cpu() / 2 + 0.5).clamp(0, 1)
        crops.append(y)
        change.append(change_by_class(crop, y, labels))
    photos = [paste(photo, crop, y, move) for y in crops]
    return Aged(crop, labels, crops, photos, change, warnings)


def noise_of(seed: int | None) -> tuple[float | None, torch.Generator | None]:
    """Arguments `noise` and `generator` of the generator: the same noise for every age."""
    return (0.0, None) if seed is None else (None, torch.Generator().manual_seed(seed))


def source_weights(logits: Tensor | None) -> Tensor:
    """What ConstraintNet takes the input's age for, (1, K). UserError without ConstraintNet."""
    if logits is None:
        raise UserError("--strength needs ConstraintNet, which tells the input's age; this variant has none")
    return logits.softmax(1)


def strength_map(labels: Tensor, strengths: dict[str, float]) -> Tensor:
    """Labels (1, H, W) -> (1, 1, H, W): the strength of each pixel's part, 1 where none is given. UserError
    for an unknown part."""
    table = torch.ones(len(CLASSES))
    for part, strength in strengths.items():
        if part not in PARTS:
            raise UserError(f"--strength {part}: unknown part; there are {', '.join(PARTS)}")
        for name in PARTS[part]:
            table[CLASSES.index(name)] = strength
    return table.to(labels.device)[labels][:, None]


def change_by_class(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean absolute change, in [0, 1], of each class that the labels show."""
    change = (after - before).abs().mean(0)
    shown = labels.unique().tolist()
    return {CLASSES[k]: round(change[labels == k].mean().item(), 5) for k in shown}
