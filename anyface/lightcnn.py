"""Light CNN 9 and 29 v2 (Wu et al., TIFS 2018): the face recogniser of the relative recognition rate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MFM(nn.Module):
    """Convolution or linear layer of twice the width, then the larger half of each pair (max feature map)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, padding: int = 1, linear: bool = False):
        super().__init__()
        if linear:
            self.filter: nn.Module = nn.Linear(inputs, 2 * outputs)
        else:
            self.filter = nn.Conv2d(inputs, 2 * outputs, kernel, 1, padding)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(*self.filter(x).chunk(2, 1))


class Group(nn.Module):
    """1x1 and 3x3 max-feature-map convolutions."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv_a = MFM(inputs, inputs, 1, 0)
        self.conv = MFM(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv_a(x))


class Residual(nn.Module):
    """Two max-feature-map convolutions and the input."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = MFM(width, width), MFM(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x


def _pool() -> nn.Module:
    return nn.MaxPool2d(2, 2, ceil_mode=True)


class LightCNN9(nn.Module):
    """Grey faces (B, 1, 128, 128) in [0, 1] -> features (B, 256); `fc2` classifies training identities."""

    def __init__(self, classes: int = 79077):
        super().__init__()
        self.features = nn.Sequential(
            MFM(1, 48, 5, 2),
            _pool(),
            Group(48, 96),
            _pool(),
            Group(96, 192),
            _pool(),
            Group(192, 128),
            Group(128, 128),
            _pool(),
        )
        self.fc1 = MFM(8 * 8 * 128, 256, linear=True)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.features(x).flatten(1))


class LightCNN29v2(nn.Module):
    """Grey faces (B, 1, 128, 128) in [0, 1] -> features (B, 256); `fc2` classifies training identities."""

    def __init__(self, classes: int = 80013):
        super().__init__()
        self.conv1 = MFM(1, 48, 5, 2)
        for i, (width, after) in enumerate(((48, 96), (96, 192), (192, 128), (128, 128)), 1):
            setattr(self, f"block{i}", nn.Sequential(*(Residual(width) for _ in range(i))))
            setattr(self, f"group{i}", Group(width, after))
        self.fc = nn.Linear(8 * 8 * 128, 256)
        self.fc2 = nn.Linear(256, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _max_and_mean(self.conv1(x))
        x = _max_and_mean(self.group1(self.block1(x)))
        x = _max_and_mean(self.group2(self.block2(x)))
        x = self.group3(self.block3(x))
        x = _max_and_mean(self.group4(self.block4(x)))
        return self.fc(x.flatten(1))


def _max_and_mean(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)


def grey_faces(image: Tensor) -> Tensor:
    """RGB (B, 3, S, S) in [-1, 1] -> Light CNN's input (B, 1, 128, 128) in [0, 1] (ITU-R 601 luma)."""
    luma = image.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)
    grey = ((image.clamp(-1, 1) + 1) / 2 * luma).sum(1, keepdim=True)
    return F.interpolate(grey, (128, 128), mode="bilinear", antialias=True, align_corners=False)
