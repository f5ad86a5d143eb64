"""Small networks for the demo's world: recognisers and a reader of attributes.

Two recognisers never meet: the one in the training loss (in place of IR-SE50) and the one that judges, of
another width, trained on other people from another seed. The reader regresses pose and expression.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper.data import EXPRESSION, PERSON, POSE, DrawnFaces, from_bytes
from shared.faces import ATTRIBUTES, Params
from shared.io import progress
from shared.runtime import step_generator

READ = (*POSE, *EXPRESSION)
"""Attributes that the reader knows, in the units of `shared.faces`."""
SPANS = [(ATTRIBUTES[name][2] - ATTRIBUTES[name][1]) / 2 for name in READ]
BATCH, SIDE = 48, 32
INNER = range(51, 96)
"""The 45 of the 98 points that lie inside the face: nose, eyes, lips."""


def looked_at(x: Tensor) -> Tensor:
    """Pictures as the judges see them: within what a picture can show, averaged down to 32x32.

    Without the limits a generator could please the recogniser with values that no picture has.
    """
    x = x.clamp(-1, 1)
    return x if x.shape[-1] == SIDE else F.adaptive_avg_pool2d(x, SIDE)


def blurred(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels; at the border over those that are there."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Trunk(nn.Module):
    """Looks at 32x32 pixels through strided convolutions: (B, 3, S, S) in [-1, 1] -> (B, out).

    soft: it blurs them first, so that in the training loss it cannot be pleased by stripes a pixel or two
    wide, which no face has.
    """

    def __init__(self, width: int, out: int, soft: bool = False):
        super().__init__()
        self.soft = soft
        layers, cin = [], 3
        for factor in (1, 2, 4):
            layers += [nn.Conv2d(cin, factor * width, 3, 2, 1), nn.BatchNorm2d(factor * width), nn.ReLU()]
            cin = factor * width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(16 * cin, out)

    def forward(self, x: Tensor) -> Tensor:
        x = looked_at(x)
        if self.soft:
            x = blurred(blurred(x))
        return self.head(self.body(x).flatten(1))


class Embedder(nn.Module):
    """A recogniser: (B, 3, S, S) in [-1, 1] -> embedding of length 1, (B, len(PERSON))."""

    def __init__(self, width: int = 16, soft: bool = False):
        super().__init__()
        self.trunk, self.dim = Trunk(width, len(PERSON), soft), len(PERSON)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.trunk(x))


class Reader(nn.Module):
    """Reads pictures (B, 3, S, S) in [-1, 1]: attributes (B, len(READ)), and points (B, 45, 2) as shares of
    the picture's side."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.trunk = Trunk(width, len(READ) + 2 * len(INNER))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.trunk(x)
        attributes = out[:, : len(READ)] * out.new_tensor(SPANS)
        return attributes, 0.5 + 0.5 * out[:, len(READ) :].unflatten(1, (-1, 2))


def shaken(images: Tensor, generator: torch.Generator) -> Tensor:
    """Training pictures of the judges: brighter or darker, blurred, with noise, so that a judgement does not
    depend on how a picture was made."""
    n = len(images)

    def normal() -> Tensor:
        return torch.randn(n, 1, 1, 1, generator=generator)

    share = torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.05 * share * torch.randn(images.shape, generator=generator)
    softer = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1), share)
    return softer * (1 + 0.1 * normal()) + 0.05 * normal() + noise


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch shifted by up to a tenth of the side, and half of the time mirrored: who it is stays."""
    reach = images.shape[-1] // 10
    dy, dx, mirror = torch.randint(-reach, reach + 1, (3,), generator=generator).tolist()
    images = images.roll((dy, dx), (2, 3))
    return images.flip(3) if mirror % 2 else images


def _learn(
    net: nn.Module, pictures: DrawnFaces, truth: Tensor, steps: int, seed: int, name: str, mobile: bool
) -> None:
    """Regression of `truth` (N, D) by the trunk of `net`; afterwards it is frozen. mobile: shift and
    mirror."""
    seen = looked_at(from_bytes(pictures.images))
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, max(steps, 2))
    for step in progress(range(steps), name):
        generator = step_generator(seed, step)
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        images = shaken(seen[chosen], generator)
        value = F.mse_loss(net.trunk(moved(images, generator) if mobile else images), truth[chosen])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    net.eval().requires_grad_(False)


def identity_targets(params: Params) -> Tensor:
    """What makes a person in the world, (N, len(PERSON)), each column about centred; hues count as far as
    there is something that has them."""
    columns = {name: params[name] - 0.5 for name in PERSON}
    for name in ("beard", "moustache", "lipstick", "eye_shadow"):
        columns[name] = params[name] - 0.3
    for name in ("lipstick", "eye_shadow"):
        columns[f"{name}_hue"] = 2 * (params[f"{name}_hue"] - 0.5) * params[name]
    columns["blush"] = params["blush"] - 0.25
    columns["skin_tone"] = 2 * columns["skin_tone"]
    return torch.stack(list(columns.values()), 1)


def train_embedder(pictures: DrawnFaces, seed: int, width: int, steps: int, soft: bool = False) -> Embedder:
    """A recogniser for the world: it learns to read what makes a person; its embedding is what it read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Embedder(width, soft)
    _learn(net, pictures, identity_targets(pictures.params), steps, seed, "recogniser", mobile=True)
    return net


def reader_targets(pictures: DrawnFaces) -> Tensor:
    """What the reader's trunk learns: attributes as shares of half their range, points on [-1, 1]."""
    attributes = torch.stack([pictures.params[name] for name in READ], 1) / torch.tensor(SPANS)
    points = pictures.points[:, INNER.start : INNER.stop] / pictures.size * 2 - 1
    return torch.cat((attributes, points.flatten(1)), 1)


def train_reader(pictures: DrawnFaces, seed: int, width: int, steps: int) -> Reader:
    """Learns to read pose, expression and points from pictures of the world."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Reader(width)
    _learn(net, pictures, reader_targets(pictures), steps, seed, "reader", mobile=False)
    return net
