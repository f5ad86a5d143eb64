"""BiSeNet (Yu et al., ECCV 2018) as the public face parser uses it, with its public parameter names, so that
`79999_iter.pth` of zllrunning/face-parsing.PyTorch (MIT licence) loads as it is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class AttentionRefinement(nn.Module):
    """Convolution whose channels are gated by their global average."""

    def __init__(self, inputs: int):
        super().__init__()
        self.conv = ConvBNReLU(inputs, 128)
        self.conv_atten = nn.Conv2d(128, 128, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(128)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))).sigmoid()


class ContextPath(nn.Module):
    """(B, 3, H, W) -> ResNet-18 features at 1/8, and context at 1/8 and 1/16."""

    def __init__(self):
        super().__init__()
        self.resnet = resnet18(weights=None)
        del self.resnet.fc
        self.arm16 = AttentionRefinement(256)
        self.arm32 = AttentionRefinement(512)
        self.conv_head32 = ConvBNReLU(128, 128)
        self.conv_head16 = ConvBNReLU(128, 128)
        self.conv_avg = ConvBNReLU(512, 128, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.resnet
        f8 = net.layer2(net.layer1(net.maxpool(F.relu(net.bn1(net.conv1(x))))))
        f16 = net.layer3(f8)
        f32 = net.layer4(f16)
        context32 = self.arm32(f32) + self.conv_avg(f32.mean((2, 3), keepdim=True))
        context32 = self.conv_head32(F.interpolate(context32, f16.shape[-2:]))
        context16 = self.conv_head16(F.interpolate(self.arm16(f16) + context32, f8.shape[-2:]))
        return f8, context16, context32


class FeatureFusion(nn.Module):
    """Joins details and context; a channel gate scales what is added once more."""

    def __init__(self, channels: int):
        super().__init__()
        self.convblk = ConvBNReLU(channels, channels, kernel=1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, details: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat((details, context), 1))
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
    """(B, 3, H, W), RGB normalised with ImageNet's mean and deviation, trained at 512x512 -> logits of the
    output and of two auxiliary heads, each (B, classes, H, W)."""

    def __init__(self, classes: int = 19):
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion(256)
        self.conv_out = Head(256, 256, classes)
        self.conv_out16 = Head(128, 64, classes)
        self.conv_out32 = Head(128, 64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f8, context16, context32 = self.cp(x)
        heads = self.conv_out(self.ffm(f8, context16)), self.conv_out16(context16), self.conv_out32(context32)
        return tuple(F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True) for y in heads)
