"""ArcFace's IR and IR-SE networks (Deng et al., CVPR 2019), with the parameter names of the public files.

Structure and names are those of `model_ir_se50.pth` (TreB1eN/InsightFace_Pytorch, MIT licence), so that it
loads as it is; `variant="pin"` is the other layout in which such networks are published.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

IRSE50_BLOCKS = ((64, 3), (128, 4), (256, 14), (512, 3))
"""(channels, number of units) of each group; the first unit of a group halves the side."""
Variant = Literal["insightface_pytorch", "pin"]


class SEModule(nn.Module):
    """Squeeze and excitation: each channel times a gate computed from all channel means."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    """Improved residual unit: BN, conv, [BN,] PReLU, conv with the stride, BN, [SE]; plus the shortcut.

    se: with squeeze and excitation. variant "pin" has the inner BN and a convolution in every shortcut of
    stride 2; "insightface_pytorch" has neither: its shortcut is the (strided) identity wherever channels stay
    the same.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        se: bool = True,
        variant: Variant = "insightface_pytorch",
    ):
        super().__init__()
        identity = stride == 1 if variant == "pin" else inputs == outputs
        if identity:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            *([nn.BatchNorm2d(outputs)] if variant == "pin" else []),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            *([SEModule(outputs)] if se else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class Trunk(nn.Module):
    """Input layer and units: (B, 3, S, S) in [-1, 1] -> feature maps at S/2, S/4, ..., one for each group."""

    def __init__(
        self,
        blocks: Sequence[tuple[int, int]] = IRSE50_BLOCKS,
        se: bool = True,
        variant: Variant = "insightface_pytorch",
    ):
        super().__init__()
        inputs = blocks[0][0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.PReLU(inputs)
        )
        units, self.ends = [], []
        for outputs, count in blocks:
            for i in range(count):
                units.append(Bottleneck(inputs, outputs, 1 if i else 2, se, variant))
                inputs = outputs
            self.ends.append(len(units) - 1)
        self.body = nn.Sequential(*units)

    def levels(self, x: Tensor) -> list[Tensor]:
        """Feature maps after each group."""
        maps, x = [], self.input_layer(x)
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in self.ends:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map."""
        return self.body(self.input_layer(x))


class IRSE(Trunk):
    """Aligned face (B, 3, size, size) in [-1, 1] -> identity embedding (B, embedding) of length 1.

    `IRSE()` is IR-SE50 at 112 pixels, `se=False` IR-50.
    """

    def __init__(
        self,
        size: int = 112,
        blocks: Sequence[tuple[int, int]] = IRSE50_BLOCKS,
        embedding: int = 512,
        dropout: float = 0.6,
        se: bool = True,
        variant: Variant = "insightface_pytorch",
    ):
        super().__init__(blocks, se, variant)
        self.size, width, side = size, blocks[-1][0], math.ceil(size / 2 ** len(blocks))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(width * side * side, embedding),
            nn.BatchNorm1d(embedding),
        )

    def forward_head(self, features: Tensor) -> Tensor:
        """Feature map (B, C, size/16, size/16) -> unit vectors (B, embedding)."""
        return F.normalize(self.output_layer(features).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
