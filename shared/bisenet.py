"""BiSeNet with a ResNet-18 context path: the public face-parsing network, with its public parameter names.

Structure and names are those of the public checkpoint `79999_iter.pth` (zllrunning/face-parsing.PyTorch, MIT
licence), so that it loads as it is. Source of the architecture: Yu et al., BiSeNet, ECCV 2018.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size stays (or halves with stride 2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """The ResNet-18 block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet18(nn.Module):
    """ResNet-18 without its head: (B, 3, H, W) -> features at 1/8 (128), 1/16 (256) and 1/32 (512
    channels)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (inputs, outputs) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), start=1):
            blocks = BasicBlock(inputs, outputs, 1 if i == 1 else 2), BasicBlock(outputs, outputs, 1)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        f8 = self.layer2(self.layer1(x))
        f16 = self.layer3(f8)
        return f8, f16, self.layer4(f16)


class AttentionRefinement(nn.Module):
    """3x3 convolution whose channels are weighted by a gate computed from their global average."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = ConvBNReLU(inputs, outputs)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))).sigmoid()


class ContextPath(nn.Module):
    """ResNet-18 and the way back up: (B, 3, H, W) -> 1/8 ResNet features, 1/8 context, 1/16 context."""

    def __init__(self):
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvBNReLU(128, 128)
        self.conv_head16 = ConvBNReLU(128, 128)
        self.conv_avg = ConvBNReLU(512, 128, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f8, f16, f32 = self.resnet(x)
        feat32 = self.arm32(f32) + self.conv_avg(f32.mean((2, 3), keepdim=True))
        feat32 = self.conv_head32(F.interpolate(feat32, size=f16.shape[-2:]))
        feat16 = self.arm16(f16) + feat32
        feat16 = self.conv_head16(F.interpolate(feat16, size=f8.shape[-2:]))
        return f8, feat16, feat32


class FeatureFusion(nn.Module):
    """Joins detail and context at 1/8; a channel gate scales what is added again."""

    def __init__(self, channels: int):
        super().__init__()
        self.convblk = ConvBNReLU(channels, channels, kernel=1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat((detail, context), 1))
        gate = self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x + x * gate


class Head(nn.Module):
    """3x3 convolution and a 1x1 classifier without bias."""

    def __init__(self, inputs: int, hidden: int, classes: int):
        super().__init__()
        self.conv = ConvBNReLU(inputs, hidden)
        self.conv_out = nn.Conv2d(hidden, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Face parser. (B, 3, H, W), RGB in [0, 1] normalised with ImageNet's mean and deviation, trained at
    512x512 -> three logit maps (B, classes, H, W): the output, and the auxiliary ones at 1/8 and 1/16 used in
    training.
    """

    def __init__(self, classes: int = 19):
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion(256)
        self.conv_out = Head(256, 256, classes)
        self.conv_out16 = Head(128, 64, classes)
        self.conv_out32 = Head(128, 64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detail, feat16, feat32 = self.cp(x)
        logits = (
            self.conv_out(self.ffm(detail, feat16)),
            self.conv_out16(feat16),
            self.conv_out32(feat32),
        )
        return tuple(F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True) for y in logits)
