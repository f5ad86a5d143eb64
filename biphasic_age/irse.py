"""ArcFace's IR-SE50 (Deng et al., CVPR 2019), with the parameter names of the public `model_ir_se50.pth` of
TreB1eN/InsightFace_Pytorch (MIT licence), so that the file loads as it is."""

from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))
"""Channels and residual units of each stage."""


class SqueezeExcitation(nn.Module):
    """Each channel times a gate computed from all channel means."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Unit(nn.Module):
    """BN, conv, PReLU, conv with the stride, BN, squeeze and excitation, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            SqueezeExcitation(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IRSE50(nn.Module):
    """(B, 3, 112, 112) in [-1, 1], aligned to ArcFace's five points -> unit vectors (B, 512)."""

    def __init__(self):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        units, inputs = [], 64
        for channels, count in STAGES:
            for number in range(count):
                units.append(Unit(inputs, channels, 2 if number == 0 else 1))
                inputs = channels
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)
        )

    def levels(self, x: Tensor) -> list[Tensor]:
        """Feature maps after the four stages."""
        ends, end = [], 0
        for _, count in STAGES:
            ends.append(end := end + count)
        maps, x = [], self.input_layer(x)
        for number, unit in enumerate(self.body, start=1):
            x = unit(x)
            if number in ends:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.output_layer(self.levels(x)[-1]).float(), dim=1)
