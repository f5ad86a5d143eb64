"""Face recognisers under attack: Light CNN and a small one for 32 x 32 images (ArcFace's networks are in
`shared/irse.py`), and what fits PIN's images to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.onnxfile import open_onnx
from shared.runtime import UserError

Recognizer = Literal["arcface_ir_se50", "arcface_ir50", "lightcnn9", "lightcnn29", "lightcnn29_v2"]
"""Official recognisers by their `official()` names."""


class MFM(nn.Module):
    """Max-feature-map: a convolution (or linear layer) to twice the channels, maximum of the two halves."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1, linear=False
    ):
        super().__init__()
        if linear:
            self.filter = nn.Linear(inputs, 2 * outputs)
        else:
            self.filter = nn.Conv2d(inputs, 2 * outputs, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.filter(x).chunk(2, dim=1)
        return torch.maximum(a, b)


class Group(nn.Module):
    """MFM 1x1, then MFM 3x3 to the new width."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv_a = MFM(inputs, inputs, 1, 1, 0)
        self.conv = MFM(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv_a(x))


class ResBlock(nn.Module):
    """Two MFM 3x3 and the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = MFM(channels, channels)
        self.conv2 = MFM(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


class LightCNN9(nn.Module):
    """Light CNN-9: (B, 1, 128, 128) -> features (B, 256). `forward_head` gives the training logits."""

    def __init__(self, classes: int = 79077):
        super().__init__()
        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.features = nn.Sequential(
            MFM(1, 48, 5, 1, 2),
            pool,
            Group(48, 96),
            pool,
            Group(96, 192),
            pool,
            Group(192, 128),
            Group(128, 128),
            pool,
        )
        self.fc1 = MFM(8 * 8 * 128, 256, linear=True)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc1(self.features(x).flatten(1)), training=self.training)

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, 256) -> class logits."""
        return self.fc2(features)


class LightCNN29(nn.Module):
    """Light CNN-29 or 29-v2: (B, 1, 128, 128) -> features (B, 256), not normalised.

    v2 pools by maximum plus average and ends in a plain linear layer.
    """

    def __init__(self, classes: int = 79077, v2: bool = False):
        super().__init__()
        self.v2 = v2
        self.conv1 = MFM(1, 48, 5, 1, 2)
        self.block1, self.group1 = nn.Sequential(ResBlock(48)), Group(48, 96)
        self.block2, self.group2 = nn.Sequential(*(ResBlock(96) for _ in range(2))), Group(96, 192)
        self.block3, self.group3 = nn.Sequential(*(ResBlock(192) for _ in range(3))), Group(192, 128)
        self.block4, self.group4 = nn.Sequential(*(ResBlock(128) for _ in range(4))), Group(128, 128)
        self.fc = nn.Linear(8 * 8 * 128, 256) if v2 else MFM(8 * 8 * 128, 256, linear=True)
        self.fc2 = nn.Linear(256, classes, bias=not v2)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) if self.v2 else _max_pool(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self._pool(self.conv1(x))
        x = self._pool(self.group1(self.block1(x)))
        x = self._pool(self.group2(self.block2(x)))
        x = self.group4(self.block4(self.group3(self.block3(x))))
        return F.dropout(self.fc(self._pool(x).flatten(1)), training=self.training)

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, 256) -> class logits."""
        return self.fc2(features)


class SmallRecognizer(nn.Module):
    """The demo's recogniser: (B, 1, S, S) in [-1, 1] -> unit vectors (B, features).

    kernel: (features, classes), the training head's class directions.
    """

    def __init__(self, size: int = 32, classes: int = 90, width: int = 16, features: int = 64):
        super().__init__()
        layers, inputs = [], 1
        for outputs, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.PReLU(outputs),
            ]
            inputs = outputs
        side = -(-size // 8)
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs * side * side, features, bias=False), nn.BatchNorm1d(features)
        )
        self.kernel = nn.Parameter(torch.randn(features, classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.body(x)))


class Adapter(nn.Module):
    """Fit PIN's grey [-1, 1] images to what a recogniser was trained on.

    size: side it expects (None: as given). channels: 3 repeats the grey channel. unit_range: map to [0, 1].
    network may be any callable; features of different lengths are fine.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        size: int | None = None,
        channels: int = 1,
        unit_range: bool = False,
    ):
        super().__init__()
        self.network, self.size, self.channels, self.unit_range = network, size, channels, unit_range

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        if self.unit_range:
            x = (x + 1) / 2
        return self.network(x.expand(-1, self.channels, -1, -1))


def adapt(name: Recognizer, network: nn.Module, legacy: bool = False) -> Adapter:
    """Adapter for an official network by its `official()` name.

    Light CNN was trained on [0, 1] (recalled from its README); PIN's code feeds it [-1, 1]: `legacy=True`.
    """
    if name.startswith("lightcnn"):
        return Adapter(network, size=128, unit_range=not legacy)
    return Adapter(network, size=112, channels=3)


class ColourIn(nn.Module):
    """Colour images (B, 3, H, W) in [-1, 1] for a defence or a defended recogniser, which take ITU-R 601
    luma (B, 1, H, W)."""

    def __init__(self, inner: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True))


class OnnxRecognizer:
    """An ONNX face recogniser (for example InsightFace's) as a callable; no gradients, so query attacks only.

    path: model with one image input (N, C, H, W) in [-1, 1]; the grey channel is repeated when C = 3. Raises
    UserError when it is missing, no ONNX file, or takes images of another form, as (N, H, W, C).
    """

    def __init__(self, path: Path):
        self.session = open_onnx(path)
        self.input = self.session.get_inputs()[0]
        shape = self.input.shape
        if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] not in (1, 3)):
            raise UserError(
                f"{path}: takes {shape}, not images (N, C, H, W) of 1 or 3 channels; export it so"
            )

    def __call__(self, x: Tensor) -> Tensor:
        channels, side = self.input.shape[1], self.input.shape[2]
        if isinstance(side, int) and side != x.shape[-1]:
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        x = x.expand(-1, channels if isinstance(channels, int) else -1, -1, -1)
        (features,) = self.session.run(None, {self.input.name: x.detach().cpu().numpy()})[:1]
        return torch.from_numpy(features).to(x.device)
