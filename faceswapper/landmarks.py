"""FAN, the network that finds 98 WFLW points; `drawing.py` draws the landmark picture from them.

Names, shapes and arithmetic are those of the released `wing.ckpt` (AdaptiveWingLoss), whose first hourglass
alone is used.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 256
"""Side of FAN's pictures."""
POINTS = 98

# --- network ----------------------------------------------------------------------------------------


class CoordConv(nn.Module):
    """Convolution that also sees where it is: row, column (-1 to 1) and their distance from the centre."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(cin + 3, cout, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = torch.linspace(-1, 1, height, device=x.device).view(-1, 1).expand(height, width)
        columns = torch.linspace(-1, 1, width, device=x.device).view(1, -1).expand(height, width)
        radius = (rows.square() + columns.square()).sqrt()
        place = torch.stack((rows, columns, radius / radius.max())).to(x.dtype)
        return self.conv(torch.cat((x, place.expand(len(x), -1, -1, -1)), 1))


class ConvBlock(nn.Module):
    """Three 3x3 convolutions of cout/2, cout/4 and cout/4 channels, joined, plus the input."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout // 2, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout // 2)
        self.conv2 = nn.Conv2d(cout // 2, cout // 4, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout // 4)
        self.conv3 = nn.Conv2d(cout // 4, cout // 4, 3, 1, 1, bias=False)
        self.downsample = None
        if cin != cout:
            self.downsample = nn.Sequential(
                nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, cout, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        y1 = self.conv1(F.relu(self.bn1(x)))
        y2 = self.conv2(F.relu(self.bn2(y1)))
        y3 = self.conv3(F.relu(self.bn3(y2)))
        return torch.cat((y1, y2, y3), 1) + (x if self.downsample is None else self.downsample(x))


class HourGlass(nn.Module):
    """Four levels, each: one branch at full and one at half resolution, added."""

    def __init__(self, channels: int, depth: int = 4):
        super().__init__()
        self.depth = depth
        self.coordconv = CoordConv(channels, channels)
        for level in range(depth, 0, -1):
            self.add_module(f"b1_{level}", ConvBlock(channels, channels))
            self.add_module(f"b2_{level}", ConvBlock(channels, channels))
            self.add_module(f"b3_{level}", ConvBlock(channels, channels))
        self.b2_plus_1 = ConvBlock(channels, channels)

    def _level(self, level: int, x: Tensor) -> Tensor:
        low = getattr(self, f"b2_{level}")(F.avg_pool2d(x, 2))
        low = self._level(level - 1, low) if level > 1 else self.b2_plus_1(low)
        low = getattr(self, f"b3_{level}")(low)
        return getattr(self, f"b1_{level}")(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return self._level(self.depth, self.coordconv(x))


class FAN(nn.Module):
    """(B, 3, 256, 256) in [0, 1] -> heat maps (B, 99, 64, 64); the last is the face's boundary."""

    def __init__(self):
        super().__init__()
        self.conv1 = CoordConv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = ConvBlock(64, 128)
        self.conv3 = ConvBlock(128, 128)
        self.conv4 = ConvBlock(128, 256)
        self.m0 = HourGlass(256)
        self.top_m_0 = ConvBlock(256, 256)
        self.conv_last0 = nn.Conv2d(256, 256, 1)
        self.bn_end0 = nn.BatchNorm2d(256)
        self.l0 = nn.Conv2d(256, POINTS + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv4(self.conv3(F.avg_pool2d(self.conv2(x), 2)))
        x = self.top_m_0(self.m0(x))
        return self.l0(F.relu(self.bn_end0(self.conv_last0(x))))

    @torch.no_grad()
    def find(self, pictures: Tensor, quirk: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> 98 points (B, 98, 2), x and y in pixels of the picture,
        where (0.5, 0.5) is the centre of the first one.

        Pictures of another size are resized to 256 and the points scaled back (the official code returns
        zeros below 256). quirk: move a point to its stronger neighbour only where both coordinates are below
        63, as the official code does; otherwise everywhere.
        """
        height, width = pictures.shape[-2:]
        x = pictures if (height, width) == (SIDE, SIDE) else _resize(pictures)
        points = points_of(self(x / 2 + 0.5)[:, :POINTS].float(), quirk)
        return points * torch.tensor((width / SIDE, height / SIDE), device=points.device)


def _resize(pictures: Tensor) -> Tensor:
    antialias = max(pictures.shape[-2:]) > SIDE
    return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=antialias)


def points_of(maps: Tensor, quirk: bool = False) -> Tensor:
    """Heat maps (B, P, 64, 64) -> points (B, P, 2) in a 256 canvas: the largest value after enlarging four
    times, plus a half, plus a quarter towards the larger neighbour (see `FAN.find` for quirk)."""
    maps = F.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=True)
    index = maps.flatten(2).argmax(2)
    x, y = index % SIDE, index // SIDE
    inside = (x > 0) & (y > 0) & (x < SIDE - 1) & (y < SIDE - 1)
    if quirk:
        inside &= (x < 63) & (y < 63)
    flat = maps.flatten(2)

    def at(dx: int, dy: int) -> Tensor:
        moved = (y + dy).clamp(0, SIDE - 1) * SIDE + (x + dx).clamp(0, SIDE - 1)
        return flat.gather(2, moved.unsqueeze(-1)).squeeze(-1)

    step = torch.stack(((at(1, 0) - at(-1, 0)).sign(), (at(0, 1) - at(0, -1)).sign()), -1)
    return torch.stack((x, y), -1).float() + 0.5 + 0.25 * step * inside.unsqueeze(-1)
