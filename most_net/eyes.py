"""A small eye finder for frontal photos, trained on procedural faces alone. Its weights lie beside this file.

    python -m most_net.eyes                    train it again and write eyes.safetensors

Two heat maps, for the eye on the left and on the right of the picture, are looked for over a pyramid of
sizes; the best pair that is level and well apart wins. No face-detection model needs to be downloaded. It
knows upright, nearly frontal faces; give the eyes by hand where it fails.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from most_net.align import Point
from shared.faces import draw, sample
from shared.io import load_safetensors, progress, save_safetensors
from shared.ranges import Count, Seed
from shared.runtime import parse, run_main, seed_everything

WEIGHTS = Path(__file__).with_name("eyes.safetensors")
SIZE = 64
DISTANCE = 12.0
"""Pixels between the eyes at which the network looks for them."""
STRIDE = 2
THRESHOLD = 0.45
"""Least product of both heat maps' peaks that counts as a face."""


class EyeFinder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> logits of two heat maps (B, 2, H / 2, W / 2), left and right in the
    picture."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width // 2, 5, STRIDE, 2), nn.ReLU()]
        channels = width // 2
        for dilation in (1, 2, 4, 2, 1):
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 2, 1))
        self.normalise = nn.InstanceNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.normalise(x))


@torch.inference_mode()
def find_eyes(photo: Tensor, net: EyeFinder | None = None) -> tuple[Point, Point] | None:
    """Centres (x, y) in pixels of the left and right eye in a photo (3, H, W) in [0, 1]; None without a
    face."""
    net = net or load_finder()
    height, width = photo.shape[-2:]
    found, factor = 0.0, 1.0
    eyes: tuple[Point, Point] | None = None
    for side in (40 * 1.2**i for i in range(10)):
        factor = side / min(height, width)
        size = (max(SIZE // 2, round(height * factor)), max(SIZE // 2, round(width * factor)))
        small = F.interpolate(photo[None], size, mode="bilinear", antialias=True)
        score, pair = best_pair(net(small)[0].sigmoid())
        if score > found:
            found = score
            scale = width / size[1], height / size[0]
            eyes = tuple(((x + 0.5) * scale[0] - 0.5, (y + 0.5) * scale[1] - 0.5) for x, y in pair)
    return eyes if found >= THRESHOLD else None


def best_pair(maps: Tensor, peaks: int = 8) -> tuple[float, tuple[Point, Point]]:
    """Score and places, in pixels of the network's input, of the best eye pair in heat maps (2, h, w)."""
    tops = F.max_pool2d(maps[None], 5, 1, 2)[0] == maps
    found = []
    for heat, top in zip(maps, tops, strict=True):
        values, index = (heat * top).flatten().topk(min(peaks, heat.numel()))
        found.append([(float(v), *_centroid(heat, int(i))) for v, i in zip(values, index, strict=True)])
    best = (0.0, ((0.0, 0.0), (0.0, 0.0)))
    for score_l, xl, yl in found[0]:
        for score_r, xr, yr in found[1]:
            apart = xr - xl
            if 0.65 * DISTANCE < apart < 1.5 * DISTANCE and abs(yr - yl) < 0.35 * apart:
                best = max(best, (score_l * score_r, ((xl, yl), (xr, yr))))
    return best


def _centroid(heat: Tensor, index: int) -> Point:
    row, column = divmod(index, heat.shape[1])
    rows = torch.arange(max(0, row - 1), min(heat.shape[0], row + 2))
    columns = torch.arange(max(0, column - 1), min(heat.shape[1], column + 2))
    patch = heat[rows][:, columns]
    patch = patch / patch.sum().clamp(min=1e-9)
    x, y = float((patch.sum(0) * columns).sum()), float((patch.sum(1) * rows).sum())
    return STRIDE * x + (STRIDE - 1) / 2, STRIDE * y + (STRIDE - 1) / 2


def load_finder(path: Path = WEIGHTS) -> EyeFinder:
    """The trained finder. UserError when its file is missing or damaged."""
    net = EyeFinder()
    load_safetensors(path, net)
    return net.eval()


# --- training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Train the eye finder on procedural faces."""

    faces: Count = 1500
    """Faces drawn once."""
    steps: Count = 600
    """Steps of Adam."""
    batch: Count = 32
    """Faces per step."""
    seed: Seed = 0
    """Seed of everything random."""
    out: Path = WEIGHTS
    """Where the weights are written."""


def augmented(images: Tensor, eyes: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Random size, place and turn, light, grey and noise: images (B, 3, S, S) and eyes (B, 2, 2) in pixels ->
    (B, 3, 64, 64) and eyes there. The eyes come to lie about `DISTANCE` apart."""
    batch, size = len(images), images.shape[-1]
    zoom = DISTANCE / distances * (2 ** (torch.rand(batch) * 0.9 - 0.45))
    angle = (torch.rand(batch) - 0.5) * 0.4
    centre = eyes.mean(1)
    target = SIZE / 2 + (torch.rand(batch, 2) - 0.5) * 0.6 * SIZE
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # source -> target
    inverse = torch.linalg.inv(matrix)
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIZE).float()] * 2, indexing="xy"), -1)
    source = (grid[None] - target[:, None, None]) @ inverse.transpose(1, 2)[:, None] + centre[:, None, None]
    places = (source + 0.5) / size * 2 - 1
    warped = F.grid_sample(images, places, padding_mode="reflection", align_corners=False)
    grey = warped.mean(1, keepdim=True).expand_as(warped)
    warped = torch.where(torch.rand(batch, 1, 1, 1) < 0.4, grey, warped)
    gamma = 2 ** (torch.rand(batch, 1, 1, 1) - 0.5)
    warped = warped.clamp(1e-4, 1) ** gamma + 0.03 * torch.rand(batch, 1, 1, 1) * torch.randn_like(warped)
    return warped.clamp(0, 1), (eyes - centre[:, None]) @ matrix.transpose(1, 2) + target[:, None]


def heat_maps(eyes: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian bumps of height 1 at eyes (B, 2, 2): (B, 2, 32, 32)."""
    axis = torch.arange(SIZE // STRIDE) * STRIDE + (STRIDE - 1) / 2
    dx, dy = axis - eyes[..., :1], axis - eyes[..., 1:]  # (B, 2, 32) each
    return torch.exp(-(dx[..., None, :].square() + dy[..., None].square()) / (2 * (STRIDE * sigma) ** 2))


def train(config: Config) -> Path:
    """Draw faces, learn the heat maps, write the weights."""
    seed_everything(config.seed)
    params = sample(config.faces, 7_000 + config.seed, strength=0.8, worn=0.7)
    params = params.replace(eye_open=params["eye_open"].clamp(min=0.5))
    faces = draw(params, 96)
    eyes = torch.stack([faces.landmarks[:, 36:42].mean(1), faces.landmarks[:, 42:48].mean(1)], 1)
    distances = (eyes[:, 1] - eyes[:, 0]).norm(dim=1)
    net = EyeFinder()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, config.steps)
    for _ in progress(range(config.steps), "eye finder"):
        chosen = torch.randint(config.faces, (config.batch,))
        images, places = augmented(faces.image[chosen], eyes[chosen], distances[chosen])
        # A sixth of the batch is scrambled into pictures without a face: there is nothing to find in them.
        empty = torch.arange(config.batch) < config.batch // 6
        images = torch.where(empty[:, None, None, None], _scrambled(images), images)
        target = heat_maps(places) * ~empty[:, None, None, None]
        loss = F.binary_cross_entropy_with_logits(net(images), target, pos_weight=torch.tensor(10.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_safetensors(config.out, net)
    return config.out


def _scrambled(images: Tensor) -> Tensor:
    """The blocks of 8x8 pixels of every image in random order."""
    blocks = F.unfold(images, 8, stride=8)
    order = torch.rand(len(images), blocks.shape[-1]).argsort(1)[:, None].expand_as(blocks)
    return F.fold(blocks.gather(2, order), images.shape[-2:], 8, stride=8)


if __name__ == "__main__":
    run_main(lambda: print(train(parse(Config, __doc__))))
