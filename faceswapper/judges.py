"""Small networks for the drawn worlds: recognisers and a reader of attributes.

Two recognisers never meet: the one in the training loss (in place of IR-SE50) and the one that judges, of
another width, trained on other people from another seed. The reader regresses pose and expression. In the
simple world the recognisers learn to tell people apart, in the demo's to read what makes them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper import protocol
from faceswapper.data import EXPRESSION, PERSON, POSE, DrawnFaces, from_bytes
from shared.faces import ATTRIBUTES, Params
from shared.io import progress
from shared.runtime import step_generator

READ = (*POSE, *EXPRESSION)
"""Attributes that the reader knows, in the units of `shared.faces`."""
SPANS = [(ATTRIBUTES[name][2] - ATTRIBUTES[name][1]) / 2 for name in READ]
BATCH, SIDE = 48, 32
SIMPLE_BATCH, SIMPLE_DIM = 32, 64
"""Simple world: pictures per step, and length of the recognisers' embedding."""
SIMPLE_READ = ("shift_x", "shift_y", "mouth", "eye")
"""Simple world: what its reader knows; place first, then openings."""
SHARPNESS = 16.0
"""Factor on the cosines of the recognisers' softmax."""
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
    """A recogniser: (B, 3, S, S) in [-1, 1] -> embedding of length 1, (B, dim)."""

    def __init__(self, width: int = 16, soft: bool = False, dim: int = len(PERSON)):
        super().__init__()
        self.trunk, self.dim = Trunk(width, dim, soft), dim

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.trunk(x))


class Reader(nn.Module):
    """Reads pictures (B, 3, S, S) in [-1, 1]: attributes (B, len(READ)), and points (B, 45, 2) as shares of
    the picture's side."""

    units = {"pose": "degrees", "position": "% of the side"}

    def __init__(self, width: int = 16):
        super().__init__()
        self.trunk = Trunk(width, len(READ) + 2 * len(INNER))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.trunk(x)
        attributes = out[:, : len(READ)] * out.new_tensor(SPANS)
        return attributes, 0.5 + 0.5 * out[:, len(READ) :].unflatten(1, (-1, 2))

    def errors(self, swaps: Tensor, targets: Tensor) -> dict[str, float]:
        """How far swaps are from their targets: yaw and pitch, mouth and eyes, and the points."""
        (mine, points), (wanted, wanted_points) = self(swaps), self(targets)
        expression = slice(len(POSE), len(POSE) + len(EXPRESSION))
        return {
            "pose": protocol.vector_error(mine[:, :2], wanted[:, :2]),
            "expression": protocol.vector_error(mine[:, expression], wanted[:, expression]),
            "position": 100 * (points - wanted_points).norm(dim=2).mean().item(),
        }


class SimpleReader(nn.Module):
    """Reads pictures (B, 3, S, S) in [-1, 1] of the simple world: `SIMPLE_READ`, (B, 4), in [0, 1]."""

    units = {"position": "of its range", "expression": "of its range"}

    def __init__(self, width: int = 16):
        super().__init__()
        self.trunk = Trunk(width, len(SIMPLE_READ))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 + 0.5 * self.trunk(x)

    def errors(self, swaps: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean absolute differences of swaps and targets: both shifts; openings of mouth and eyes."""
        apart = (self(swaps) - self(targets)).abs().mean(0)
        return {"position": apart[:2].mean().item(), "expression": apart[2:].mean().item()}


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
    net: nn.Module,
    pictures: DrawnFaces,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    seed: int,
    name: str,
    mobile: bool = False,
    batch: int = BATCH,
    extra: Iterable[nn.Parameter] = (),
) -> None:
    """Train the trunk of `net`; afterwards it is frozen.

    loss: output of the trunk (batch, D) and the numbers of the pictures (batch,) -> a number. mobile: shift
    and mirror. extra: what the loss itself learns.
    """
    seen = looked_at(from_bytes(pictures.images))
    optimiser = torch.optim.AdamW([*net.parameters(), *extra], 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, max(steps, 2))
    for step in progress(range(steps), name):
        generator = step_generator(seed, step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        images = shaken(seen[chosen], generator)
        value = loss(net.trunk(moved(images, generator) if mobile else images), chosen)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    net.eval().requires_grad_(False)


def _near(truth: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a regression of `truth` (N, D)."""
    return lambda out, chosen: F.mse_loss(out, truth[chosen])


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
    truth = identity_targets(pictures.params)
    _learn(net, pictures, _near(truth), steps, seed, "recogniser", mobile=True)
    return net


def train_simple_embedder(pictures: DrawnFaces, seed: int, width: int, steps: int) -> Embedder:
    """A recogniser for the simple world: a softmax over cosines to one direction for each person."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Embedder(width, dim=SIMPLE_DIM)
        people = nn.Parameter(torch.randn(int(pictures.person.max()) + 1, SIMPLE_DIM))

    def tell_apart(out: Tensor, chosen: Tensor) -> Tensor:
        cosines = F.normalize(out) @ F.normalize(people).T
        return F.cross_entropy(SHARPNESS * cosines, pictures.person[chosen])

    _learn(net, pictures, tell_apart, steps, seed, "recogniser", batch=SIMPLE_BATCH, extra=[people])
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
    _learn(net, pictures, _near(reader_targets(pictures)), steps, seed, "reader")
    return net


def train_simple_reader(pictures: DrawnFaces, seed: int, width: int, steps: int) -> SimpleReader:
    """Learns to read place and openings from pictures of the simple world."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SimpleReader(width)
    truth = 2 * torch.stack([pictures.params[name] for name in SIMPLE_READ], 1) - 1
    _learn(net, pictures, _near(truth), steps, seed, "reader", batch=SIMPLE_BATCH)
    return net
