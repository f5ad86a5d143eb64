"""The face recogniser of the identity loss: IR-SE50 trained with ArcFace, with the released names.

Source of architecture and weights: TreB1eN/InsightFace_Pytorch (MIT), file model_ir_se50.pth.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 112
"""Side of its pictures."""
GROUPS = ((64, 3), (128, 4), (256, 14), (512, 3))
"""Channels and number of units; the first unit of each group halves the resolution."""


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate computed from their average."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Unit(nn.Module):
    """BN, 3x3, PReLU, 3x3 of the given stride, BN, squeeze and excite; the input is added."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        if cin == cout:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(cin),
            nn.Conv2d(cin, cout, 3, 1, 1, bias=False),
            nn.PReLU(cout),
            nn.Conv2d(cout, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            SqueezeExcite(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class IRSE50(nn.Module):
    """(B, 3, 112, 112) in [-1, 1] -> embedding of length 1 (B, 512) and the outputs of its 24 units."""

    def __init__(self):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        units, cin = [], 64
        for channels, count in GROUPS:
            for i in range(count):
                units.append(Unit(cin, channels, 2 if i == 0 else 1))
                cin = channels
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )

    def embed(self, x: Tensor) -> Tensor:
        """The embedding alone."""
        return F.normalize(self.output_layer(self.body(self.input_layer(x))))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self.input_layer(x), []
        for unit in self.body:
            x = unit(x)
            features.append(x)
        return F.normalize(self.output_layer(x)), features


class Recogniser(nn.Module):
    """A frozen embedding network for whole crops: (B, 3, S, S) in [-1, 1] -> (B, D) of length 1.

    The picture is resized to `side` (bilinear, corners aligned), as in the official loss. crop: share of the
    picture's side that is kept around its centre before that; 1 is the official whole picture.
    """

    def __init__(self, network: IRSE50, side: int = SIDE, crop: float = 1.0):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.side, self.crop = side, crop

    def train(self, mode: bool = True) -> "Recogniser":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.crop < 1:
            cut = round(x.shape[-1] * (1 - self.crop) / 2)
            x = x[..., cut : x.shape[-2] - cut, cut : x.shape[-1] - cut]
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=True)
        return self.network.embed(x)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of (B, D) and (B, D): (B,)."""
    return 1 - F.cosine_similarity(a.float(), b.float())


def random_recogniser(seed: int = 0) -> IRSE50:
    """IR-SE50 with random weights, for speed measurements alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IRSE50()
