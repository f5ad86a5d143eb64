"""The simple world: drawn faces from two Gaussian vectors, and captions that say what is in them.

A face has coarse traits (where it is, how large, how long the hair, a hat), read from `z_coarse`, and fine
ones (colours, glasses, lips), read from `z_fine`; a trait is a quantile of one coordinate. Drawing the coarse
traits of one person with the fine ones of another is what style mixing should do, so a generator can be
taught on it with its mapping and every face's exact code known. One phrasing of every value is held out: the
streams never train on it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LATENT = 64
"""Length of each of the two vectors."""

HELD_OUT = -1
"""Position of the phrasing of a value that captions for training the streams never use."""


@dataclass(frozen=True)
class Trait:
    """One attribute. shares: probability of each value; phrases: value -> its wordings; coordinate: which
    number of its vector decides."""

    name: str
    coarse: bool
    coordinate: int
    shares: tuple[float, ...]
    phrases: tuple[tuple[str, ...], ...]


TRAITS = (
    Trait(
        "hair length", True, 3, (0.5, 0.5),
        (("short hair", "cropped hair", "hair cut short", "a short haircut"),
         ("long hair", "flowing hair", "hair down to the shoulders", "a long haircut")),
    ),
    Trait(
        "hat", True, 4, (0.6, 0.4),
        (("no hat", "nothing on the head", "a bare head", "no cap"),
         ("a hat", "a purple hat", "a hat on the head", "a cap")),
    ),
    Trait(
        "hair colour", False, 0, (0.25, 0.25, 0.25, 0.25),
        (("black hair", "dark hair", "hair that is black", "black locks"),
         ("brown hair", "chestnut hair", "hair that is brown", "brown locks"),
         ("blond hair", "golden hair", "hair that is blond", "blond locks"),
         ("red hair", "ginger hair", "hair that is red", "red locks")),
    ),
    Trait(
        "skin", False, 1, (1 / 3, 1 / 3, 1 / 3),
        (("pale skin", "fair skin", "a pale face", "a fair face"),
         ("tan skin", "olive skin", "a tan face", "an olive face"),
         ("brown skin", "deep skin", "a brown face", "a deep face")),
    ),
    Trait(
        "background", False, 2, (1 / 3, 1 / 3, 1 / 3),
        (("a blue background", "a blue wall behind", "blue behind", "a blue backdrop"),
         ("a green background", "a green wall behind", "green behind", "a green backdrop"),
         ("a grey background", "a grey wall behind", "grey behind", "a grey backdrop")),
    ),
    Trait(
        "glasses", False, 3, (0.5, 0.5),
        (("no glasses", "no spectacles", "bare eyes", "no eyeglasses"),
         ("glasses", "spectacles", "glasses on the nose", "eyeglasses")),
    ),
    Trait(
        "lips", False, 4, (0.5, 0.5),
        (("pale lips", "lips without colour", "a pale mouth", "colourless lips"),
         ("red lips", "lips painted red", "a red mouth", "scarlet lips")),
    ),
)  # fmt: skip

SUBJECTS = ("a person", "someone", "a face", "this person", "the person", "a man", "a woman")
FRAMES = ("{} with {}", "{} has {}", "{} who has {}", "a picture of {} with {}", "{} that shows {}")

_HAIR = torch.tensor([(0.09, 0.07, 0.07), (0.42, 0.25, 0.12), (0.93, 0.78, 0.36), (0.80, 0.30, 0.10)])
_SKIN = torch.tensor([(0.99, 0.87, 0.78), (0.85, 0.64, 0.44), (0.47, 0.30, 0.20)])
_WALL = torch.tensor([(0.25, 0.45, 0.85), (0.25, 0.65, 0.35), (0.68, 0.68, 0.70)])
_LIPS = torch.tensor([(0.80, 0.58, 0.52), (0.80, 0.08, 0.14)])
_HAT = torch.tensor((0.48, 0.20, 0.62))
_CLOTHES = torch.tensor((0.16, 0.20, 0.32))

ZOOM = 1.2
"""How large the middle face is, so that eyes and glasses take pixels enough at 32x32."""


def unit(z: Tensor) -> Tensor:
    """Vectors (..., 64) at a mean square of 1, all that StyleGAN2's mapping network sees of them: it scales
    its input so, and a trait that hung on the length could not be drawn."""
    return z * z.square().mean(-1, keepdim=True).rsqrt()


def draw_latents(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(z_coarse, z_fine) of `count` faces, each (count, 64): standard normal, brought to `unit` length."""
    rng = torch.Generator().manual_seed(seed)
    z = unit(torch.randn(2, count, LATENT, generator=rng))
    return z[0], z[1]


def read_traits(z_coarse: Tensor, z_fine: Tensor) -> Tensor:
    """Values of all `TRAITS`, (B, 7) int64: the quantile that the trait's coordinate falls in."""
    columns = []
    for trait in TRAITS:
        bounds = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(trait.shares).cumsum(0)[:-1])
        source = z_coarse if trait.coarse else z_fine
        columns.append(torch.bucketize(source[:, trait.coordinate].contiguous(), bounds.to(source)))
    return torch.stack(columns, 1)


def render(z_coarse: Tensor, z_fine: Tensor, size: int = 32) -> Tensor:
    """Pictures (B, 3, size, size) in [-1, 1]: coarse traits of `z_coarse` with fine traits of `z_fine`.

    Ellipses with soft edges, one over the other. A pure function of the two vectors.
    """
    value = {
        trait.name: column for trait, column in zip(TRAITS, read_traits(z_coarse, z_fine).T, strict=True)
    }
    n, axis = len(z_coarse), (torch.arange(size) + 0.5) / size * 2 - 1
    place = z_coarse[:, :3].tanh().view(n, 3, 1, 1)
    scale = ZOOM * (1 + 0.05 * place[:, 2])
    x = (axis.view(1, 1, -1) - 0.03 * place[:, 0]) / scale  # face coordinates, (B, size, size)
    y = (axis.view(1, -1, 1) - 0.03 * place[:, 1] - 0.06) / scale
    soft = size * 1.2  # edges are about a pixel wide at any size

    def ellipse(cx: float, cy: float, rx: float, ry: float, bend: float = 0.0) -> Tensor:
        down = y - cy + bend * ((x - cx) / rx) ** 2  # the ends of a bent ellipse are higher than its middle
        radius = (((x - cx) / rx) ** 2 + (down / ry) ** 2).sqrt()
        return torch.sigmoid((1 - radius) * min(rx, ry) * soft)

    def flag(name: str) -> Tensor:
        return value[name].view(n, 1, 1).float()

    picture = _WALL[value["background"]].view(n, 3, 1, 1).expand(n, 3, size, size)

    def paint(where: Tensor, colour: Tensor) -> None:
        nonlocal picture
        picture = torch.lerp(picture, colour.view(-1, 3, 1, 1), where.unsqueeze(1))

    hair, skin = _HAIR[value["hair colour"]], _SKIN[value["skin"]]
    dark, white = torch.tensor((0.06, 0.05, 0.08)), torch.tensor((0.98, 0.98, 0.98))
    long = ellipse(0, 0.12, 0.66, 0.80) * torch.sigmoid((0.72 - y) * soft)
    cap = ellipse(0, -0.14, 0.58, 0.64) * torch.sigmoid((0.02 - y) * soft)
    paint(torch.maximum(cap, long * flag("hair length")), hair)
    paint(ellipse(0, 1.10, 0.72, 0.40), _CLOTHES)
    paint(ellipse(0, 0.68, 0.19, 0.24), skin * 0.86)
    for side in (-1, 1):
        paint(ellipse(side * 0.46, 0.06, 0.08, 0.12) * (1 - flag("hair length")), skin * 0.92)
    paint(ellipse(0, 0.08, 0.46, 0.60), skin)
    paint(ellipse(0, -0.42, 0.42, 0.20), hair)
    for side in (-1, 1):
        paint(ellipse(side * 0.20, -0.155, 0.125, 0.035, bend=-0.03), hair * 0.55)
        paint(ellipse(side * 0.20, 0.0, 0.115, 0.08), white)
        paint(ellipse(side * 0.20, 0.0, 0.06, 0.07), dark)
        rim = ellipse(side * 0.215, 0.0, 0.205, 0.17) - ellipse(side * 0.215, 0.0, 0.14, 0.105)
        paint(rim.clamp(0, 1) * flag("glasses"), dark)
    paint(ellipse(0, 0.19, 0.055, 0.09), skin * 0.78)
    paint(ellipse(0, 0.42, 0.20, 0.06, bend=0.05), _LIPS[value["lips"]])
    crown = ellipse(0, -0.52, 0.50, 0.36) * torch.sigmoid((-0.36 - y) * soft)
    brim = ellipse(0, -0.36, 0.66, 0.085)
    paint(torch.maximum(crown, brim) * flag("hat"), _HAT)
    return picture * 2 - 1


def describe(
    values: Tensor,
    seed: int,
    count: int = 1,
    held_out: bool | None = False,
    traits: tuple[str, ...] | None = None,
    counts: tuple[int, int] = (1, 4),
) -> list[list[str]]:
    """`count` captions for each face, from its traits' values (B, 7).

    Each names `counts` (least, most) traits, chosen at random, in random order and wording; traits: exactly
    these instead. held_out: use only the wordings that are kept from the streams (True), only the others
    (False) or all (None). Captions of face i depend on (seed, i) alone.
    """
    names = [trait.name for trait in TRAITS]
    result = []
    for i, row in enumerate(values.tolist()):
        rng = np.random.default_rng((seed, i))
        captions = []
        for _ in range(count):
            if traits is None:
                chosen = rng.permutation(len(TRAITS))[: rng.integers(counts[0], counts[1] + 1)].tolist()
            else:
                chosen = [names.index(name) for name in traits]
            captions.append(_sentence([_phrase(TRAITS[t], row[t], held_out, rng) for t in chosen], rng))
        result.append(captions)
    return result


def _phrase(trait: Trait, value: int, held_out: bool | None, rng: np.random.Generator) -> str:
    wordings = trait.phrases[value]
    if held_out is not None:
        wordings = wordings[HELD_OUT:] if held_out else wordings[:HELD_OUT]
    return wordings[rng.integers(len(wordings))]


def _sentence(phrases: list[str], rng: np.random.Generator) -> str:
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    frame, subject = FRAMES[rng.integers(len(FRAMES))], SUBJECTS[rng.integers(len(SUBJECTS))]
    return frame.format(subject, listed)


def mentioned(caption: str) -> list[tuple[int, int]]:
    """(trait, value) pairs that a caption of `describe` states, read back from its wording.

    Of overlapping wordings the longest counts: "no hat" does not say "a hat".
    """
    spans = []
    for t, trait in enumerate(TRAITS):
        for v, wordings in enumerate(trait.phrases):
            for wording in wordings:
                at = f" {caption} ".replace(",", " ").find(f" {wording} ")
                if at >= 0:
                    spans.append((len(wording), at, t, v))
    taken: list[tuple[int, int, int, int]] = []
    for span in sorted(spans, reverse=True):
        if all(span[1] + span[0] <= other[1] or other[1] + other[0] <= span[1] for other in taken):
            taken.append(span)
    return [(t, v) for _, _, t, v in sorted(taken, key=lambda span: span[1])]


@dataclass(frozen=True)
class World:
    """`count` faces with their captions.

    z_coarse, z_fine (N, 64); values (N, 7); captions: per face those the streams may train on; unseen: per
    face captions in held-out wordings.
    """

    z_coarse: Tensor
    z_fine: Tensor
    values: Tensor
    captions: list[list[str]]
    unseen: list[list[str]]

    def pictures(self, index: Tensor | slice = slice(None), size: int = 32) -> Tensor:
        """(B, 3, size, size) in [-1, 1] of the faces at `index`."""
        return render(self.z_coarse[index], self.z_fine[index], size)


def make_world(count: int, seed: int, per_face: int = 10) -> World:
    """Faces of a seed: training and test worlds use different ones."""
    z_coarse, z_fine = draw_latents(count, seed)
    values = read_traits(z_coarse, z_fine)
    return World(
        z_coarse,
        z_fine,
        values,
        describe(values, seed, per_face),
        describe(values, seed + 1, per_face, held_out=True),
    )


def every_wording() -> list[str]:
    """Captions that together use every word of the world, for a tokenizer's vocabulary."""
    phrases = [wording for trait in TRAITS for wordings in trait.phrases for wording in wordings]
    return phrases + list(SUBJECTS) + [frame.format("", "") for frame in FRAMES] + ["x , y and z"]
