"""A small face finder, landmarker and parser in one, trained on procedural faces alone: the fallback of
`prepare.py` and `predict.py` that needs no download. Its weights lie beside this file.

    python -m faceswapper.finder               train it again and write finder.safetensors

Eyes are looked for over a pyramid of sizes; pairs that are level and well apart are faces. It knows upright,
nearly frontal faces. On photographs use YuNet, FAN and BiSeNet instead.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.faces import draw, sample, to_bisenet
from shared.io import load_safetensors, progress
from shared.ranges import Count, Seed
from shared.records import write_tensors
from shared.runtime import parse, run_main, seed_everything

WEIGHTS = Path(__file__).with_name("finder.safetensors")
SIDE = 64
"""Side of the pictures that it reads."""
STRIDE = 2
DISTANCE = 13.0
"""Pixels between the eyes at which it works best; trained from 0.75 to 1.6 times that."""
THRESHOLD = 0.35
"""Least product of both eyes' peaks that counts as a face."""
PARTS, POINTS = 19, 68


class Reading(NamedTuple):
    """What the network says of pictures (B, 3, 64, 64)."""

    eyes: Tensor
    """Logits of two heat maps (B, 2, 32, 32): the eye on the picture's left, and on its right."""
    points: Tensor
    """68 iBUG points (B, 68, 2), x and y in pixels of the 64 picture."""
    parts: Tensor
    """Logits of BiSeNet's 19 labels (B, 19, 32, 32)."""


def _layers(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.GroupNorm(4, cout), nn.ReLU())


class Finder(nn.Module):
    """(B, 3, H, W) in [0, 1], H and W multiples of 16 -> `Reading`; a U-Net from half to an eighth of the
    size."""

    def __init__(self, width: int = 16):
        super().__init__()
        w = width
        self.normalise = nn.InstanceNorm2d(3)
        self.d1 = nn.Sequential(nn.Conv2d(3, w, 5, STRIDE, 2), nn.ReLU(), _layers(w, w))
        self.d2 = nn.Sequential(_layers(w, 2 * w, 2), _layers(2 * w, 2 * w))
        self.d3 = nn.Sequential(_layers(2 * w, 4 * w, 2), _layers(4 * w, 4 * w))
        self.d4 = nn.Sequential(_layers(4 * w, 4 * w, 2), _layers(4 * w, 4 * w))
        self.u3, self.u2 = _layers(4 * w, 4 * w), _layers(4 * w, 2 * w)
        self.u1 = _layers(2 * w, 2 * w)
        self.l3, self.l2, self.l1 = (
            nn.Conv2d(4 * w, 4 * w, 1),
            nn.Conv2d(2 * w, 4 * w, 1),
            nn.Conv2d(w, 2 * w, 1),
        )
        self.head = nn.Conv2d(2 * w, 2 + POINTS + PARTS, 1)

    def forward(self, x: Tensor) -> Reading:
        d1 = self.d1(self.normalise(x))
        d2 = self.d2(d1)
        d3 = self.d3(d2)
        y = self.u3(_twice(self.d4(d3)) + self.l3(d3))
        y = self.u2(_twice(y) + self.l2(d2))
        y = self.u1(_twice(y) + self.l1(d1))
        eyes, points, parts = self.head(y).split((2, POINTS, PARTS), 1)
        return Reading(eyes, expectation(points), parts)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def expectation(maps: Tensor) -> Tensor:
    """Score maps (B, P, h, w) -> the mean place (x, y) under their softmax, in input pixels: (B, P, 2)."""
    height, width = maps.shape[-2:]
    share = maps.float().flatten(2).softmax(-1).unflatten(2, (height, width))
    x = STRIDE * torch.arange(width, device=maps.device) + (STRIDE - 1) / 2
    y = STRIDE * torch.arange(height, device=maps.device) + (STRIDE - 1) / 2
    return torch.stack(((share.sum(2) * x).sum(-1), (share.sum(3) * y).sum(-1)), -1)


@cache
def load_finder(device: str = "cpu") -> Finder:
    """The trained network. UserError when its file is missing or damaged."""
    net = Finder()
    load_safetensors(WEIGHTS, net)
    return net.eval().requires_grad_(False).to(device)


class Eyes(NamedTuple):
    """Centres of the left and right eye in a picture (x, y in pixels) and how sure that is."""

    left: tuple[float, float]
    right: tuple[float, float]
    score: float


@torch.inference_mode()
def find_faces(photos: Tensor, net: Finder | None = None, factor: float = 1.3) -> list[list[Eyes]]:
    """Photos of one size (B, 3, H, W) in [0, 1] -> eyes of the faces of each, the surest first.

    Eyes are found from 10 pixels apart up to about a third of the shorter side, in a pyramid whose levels
    differ by `factor`.
    """
    net = net or load_finder(str(photos.device))
    height, width = photos.shape[-2:]
    found: list[list[Eyes]] = [[] for _ in photos]
    side, limit = 40.0, float(min(height, width))
    while side <= limit:
        scale = side / min(height, width)
        rows, columns = max(32, round(height * scale / 16) * 16), max(32, round(width * scale / 16) * 16)
        small = F.interpolate(photos, (rows, columns), mode="bilinear", antialias=True)
        maps = net(small).eyes.sigmoid().cpu()  # once: every number read from a GPU waits for it
        for faces, each in zip(found, maps, strict=True):
            for score, pair in _pairs(each):
                scaled = [
                    ((x + 0.5) * width / columns - 0.5, (y + 0.5) * height / rows - 0.5) for x, y in pair
                ]
                faces.append(Eyes(*scaled, score))
        side *= factor
    return [_apart(faces) for faces in found]


@torch.inference_mode()
def find_pairs(pictures: Tensor, net: Finder | None = None) -> list[list[tuple[float, list]]]:
    """Pictures (B, 3, H, W) in [0, 1], sides multiples of 16, at their own size alone -> for each the pairs
    of places that could be eyes, with a score."""
    net = net or load_finder(str(pictures.device))
    return [_pairs(maps) for maps in net(pictures).eyes.sigmoid().cpu()]


def _pairs(maps: Tensor, peaks: int = 8) -> list[tuple[float, list[tuple[float, float]]]]:
    """Pairs of peaks in heat maps (2, h, w) that could be eyes: score, places in pixels of the input."""
    tops = (F.max_pool2d(maps[None], 5, 1, 2)[0] == maps) & (maps > THRESHOLD**2)
    sides = []
    for heat, top in zip(maps, tops, strict=True):
        values, index = (heat * top).flatten().topk(min(peaks, heat.numel()))
        sides.append(
            [(float(v), *_centroid(heat, int(i))) for v, i in zip(values, index, strict=True) if v > 0]
        )
    found = []
    for s1, x1, y1 in sides[0]:
        for s2, x2, y2 in sides[1]:
            apart = x2 - x1
            level = abs(y2 - y1) < 0.5 * apart
            if level and 0.7 * DISTANCE < math.hypot(apart, y2 - y1) < 1.6 * DISTANCE and s1 * s2 > THRESHOLD:
                found.append((s1 * s2, [(x1, y1), (x2, y2)]))
    return found


def _centroid(heat: Tensor, index: int) -> tuple[float, float]:
    row, column = divmod(index, heat.shape[1])
    rows = torch.arange(max(0, row - 1), min(heat.shape[0], row + 2), device=heat.device)
    columns = torch.arange(max(0, column - 1), min(heat.shape[1], column + 2), device=heat.device)
    patch = heat[rows][:, columns]
    patch = patch / patch.sum().clamp(min=1e-9)
    x, y = float((patch.sum(0) * columns).sum()), float((patch.sum(1) * rows).sum())
    return STRIDE * x + (STRIDE - 1) / 2, STRIDE * y + (STRIDE - 1) / 2


def _apart(faces: list[Eyes]) -> list[Eyes]:
    """The surest of faces whose middles lie within an eye distance of each other."""
    kept: list[Eyes] = []
    for face in sorted(faces, key=lambda f: -f.score):
        x, y = (face.left[0] + face.right[0]) / 2, (face.left[1] + face.right[1]) / 2
        for other in kept:
            ox, oy = (other.left[0] + other.right[0]) / 2, (other.left[1] + other.right[1]) / 2
            if math.hypot(x - ox, y - oy) < math.dist(other.left, other.right):
                break
        else:
            kept.append(face)
    return kept


@torch.inference_mode()
def read_crops(crops: Tensor, net: Finder | None = None) -> tuple[Tensor, Tensor]:
    """Aligned crops (B, 3, S, S) in [0, 1] -> 68 points (B, 68, 2) in their pixels, and BiSeNet labels (B, S,
    S) uint8."""
    net = net or load_finder(str(crops.device))
    side = crops.shape[-1]
    small = F.interpolate(crops, (SIDE, SIDE), mode="bilinear", antialias=True)
    _, points, parts = net(small)
    labels = F.interpolate(parts, (side, side), mode="bilinear").argmax(1).to(torch.uint8)
    return (points + 0.5) * (side / SIDE) - 0.5, labels


# --- training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Train the finder on procedural faces."""

    faces: Count = 2000
    """Faces drawn once."""
    steps: Count = 900
    """Steps of Adam."""
    batch: Count = 32
    """Faces per step."""
    seed: Seed = 0
    """Seed of everything random."""
    out: Path = WEIGHTS
    """Where the weights are written."""


def warped(images: Tensor, labels: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random size, place, turn, light, grey and noise: images (B, 3, S, S), labels (B, S, S), points (B, 68,
    2) -> the same at 64 pixels. Outside the drawing the labels are -1."""
    batch, size = len(images), images.shape[-1]
    left, right = points[:, 36:42].mean(1), points[:, 42:48].mean(1)
    zoom = DISTANCE / (right - left).norm(dim=1) * 2 ** (torch.rand(batch) * 1.1 - 0.42)
    angle = (torch.rand(batch) - 0.5) * 0.5
    centre = points[:, 27:].mean(1)
    target = SIDE / 2 + (torch.rand(batch, 2) - 0.5) * 0.4 * SIDE
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    inverse = torch.linalg.inv(matrix)
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE).float()] * 2, indexing="xy"), -1)
    source = (grid[None] - target[:, None, None]) @ inverse.transpose(1, 2)[:, None] + centre[:, None, None]
    places = (source + 0.5) / size * 2 - 1
    image = F.grid_sample(images, places, padding_mode="reflection", align_corners=False)
    classes = F.grid_sample(labels[:, None].float() + 1, places, mode="nearest", align_corners=False)[:, 0]
    grey = image.mean(1, keepdim=True).expand_as(image)
    image = torch.where(torch.rand(batch, 1, 1, 1) < 0.25, grey, image)
    image = image.clamp(1e-4, 1) ** 2 ** (torch.rand(batch, 1, 1, 1) - 0.5)
    image = image + 0.03 * torch.rand(batch, 1, 1, 1) * torch.randn_like(image)
    moved = (points - centre[:, None]) @ matrix.transpose(1, 2) + target[:, None]
    return image.clamp(0, 1), classes.long() - 1, moved


def heat_maps(eyes: Tensor) -> Tensor:
    """Gaussian bumps of height 1 and deviation of one cell at eyes (B, 2, 2): (B, 2, 32, 32)."""
    axis = torch.arange(SIDE // STRIDE) * STRIDE + (STRIDE - 1) / 2
    dx, dy = axis - eyes[..., :1], axis - eyes[..., 1:]
    return torch.exp(-(dx[..., None, :].square() + dy[..., None].square()) / (2 * STRIDE**2))


def objective(net: Finder, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
    """Cross entropies of eyes and parts, and L1 of the points in pixels; an eighth of the batch is scrambled
    and has no face."""
    empty = torch.arange(len(images)) < len(images) // 8
    images = torch.where(empty[:, None, None, None], _scrambled(images), images)
    eyes = torch.stack([points[:, 36:42].mean(1), points[:, 42:48].mean(1)], 1)
    heat = heat_maps(eyes) * ~empty[:, None, None, None]
    found = net(images)
    seen = ((points > 0) & (points < SIDE - 1)).all(-1, keepdim=True) & ~empty[:, None, None]
    distance = ((found.points - points).abs() * seen).sum() / seen.sum().clamp_min(1)
    labels = labels[:, ::STRIDE, ::STRIDE].masked_fill(empty[:, None, None], -1)
    parts = F.cross_entropy(found.parts, labels, ignore_index=-1)
    sure = F.binary_cross_entropy_with_logits(found.eyes, heat, pos_weight=torch.tensor(10.0))
    return 3 * sure + parts + 0.2 * distance


def _scrambled(images: Tensor) -> Tensor:
    """The blocks of 8x8 pixels of every image in random order."""
    blocks = F.unfold(images, 8, stride=8)
    order = torch.rand(len(images), blocks.shape[-1]).argsort(1)[:, None].expand_as(blocks)
    return F.fold(blocks.gather(2, order), images.shape[-2:], 8, stride=8)


def train(config: Config) -> Path:
    """Draw faces, learn, write the weights."""
    seed_everything(config.seed)
    params = sample(config.faces, 9_000 + config.seed, strength=0.9, worn=0.7)
    drawn = draw(params.replace(eye_open=params["eye_open"].clamp(min=0.4)), 96)
    labels = to_bisenet(drawn.semantics)
    net = Finder()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, config.steps)
    for step in progress(range(config.steps), "finder"):
        chosen = torch.randint(config.faces, (config.batch,))
        loss = objective(net, *warped(drawn.image[chosen], labels[chosen], drawn.landmarks[chosen]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)
    write_tensors(config.out, {name: value.half() for name, value in net.state_dict().items()})
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(train(parse(Config, __doc__))))
