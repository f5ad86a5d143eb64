"""Networks that the paper is compared with: IrisParseNet (its cost is the 100 %) and the classic U-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 of them, to `outputs` channels."""
    return nn.Sequential(conv_bn_relu(inputs, outputs), conv_bn_relu(outputs, outputs))


class UNet(nn.Module):
    """The classic U-Net with four levels and transposed convolutions; 31 M parameters with width 64.

    (B, 3, H, W) in [0, 1], H and W multiples of 16 -> {"logits": (B, 1, H, W)}.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(twice(a, b) for a, b in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(twice(a, b) for a, b in pairs)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, skips = image * 2 - 1, []
        for i, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return {"logits": self.head(x)}


class IrisParseNet(nn.Module):
    """IrisParseNet with ASPP (Wang et al., T-IFS 2020), after its published prototxt, for the cost.

    VGG-16 encoder, dilated pyramid with a sigmoid gate, and a decoder to three maps: pupil, iris, outer
    boundary. (B, 3, H, W) -> {"logits": (B, 1, H, W) of the iris, "regions": (B, 2, H, W)}. Sizes that are
    not a multiple of 16 are interpolated to the encoder's.
    """

    VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self):
        super().__init__()
        self.encoder, inputs = nn.ModuleList(), 3
        for widths in self.VGG:
            convs = [conv_bn_relu(a, b) for a, b in zip((inputs, *widths), widths, strict=False)]
            self.encoder.append(nn.Sequential(*convs))
            inputs = widths[-1]
        branches = [conv_bn_relu(512, 256, 1)] + [conv_bn_relu(512, 256, 3, d) for d in (6, 12, 18)]
        self.pyramid = nn.ModuleList(branches)
        self.context = conv_bn_relu(512, 256, 1)
        self.gate = nn.Sequential(conv_bn_relu(1280, 256), nn.Conv2d(256, 512, 3, padding=1))
        steps = ((1024, 512, 256), (768, 256, 128), (384, 128, 64), (192, 64, 32))
        self.decoder = nn.ModuleList(
            nn.Sequential(conv_bn_relu(a, b), conv_bn_relu(b, c)) for a, b, c in steps
        )
        self.fine, self.head = conv_bn_relu(96, 32), nn.Conv2d(32, 3, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, skips = image * 2 - 1, []
        for stage in self.encoder:
            skips.append(stage(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)
        x = F.max_pool2d(skips.pop(), 3, 1, 1)
        pooled = self.context(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        gate = self.gate(torch.cat([*(branch(x) for branch in self.pyramid), pooled], 1)).sigmoid()
        x = torch.cat([x, x * gate], 1)
        for step, skip in zip(self.decoder, reversed(skips), strict=True):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([step(x), skip], 1)
        pupil, iris, outer = self.head(self.fine(x)).split(1, 1)
        return {"logits": iris, "regions": torch.cat([pupil, outer], 1)}
