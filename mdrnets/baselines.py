"""What the method is compared with in the same harness: mean colour, OpenCV's two fillers, a plain U-Net."""

from collections.abc import Callable

import cv2
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.model import composite


class UNet(nn.Module):
    """Plain U-Net, the generic learned baseline: masked image and mask -> completed image.

    x (B, 3, H, W) in [-1, 1], mask (B, 1, H, W); H and W multiples of `multiple`. Returns a dict with
    `refined` (the raw result, tanh) and `output` (the composite), like `MDRNet`.
    """

    multiple = 8

    def __init__(self):
        super().__init__()
        widths = (16, 32, 48, 64)
        before = (4, *widths)
        self.down = nn.ModuleList(self._pair(a, b) for a, b in zip(before, widths, strict=False))
        up = list(zip(widths[1:], widths, strict=False))[::-1]
        self.up = nn.ModuleList(self._pair(deep + skip, skip) for deep, skip in up)
        self.last = nn.Conv2d(widths[0], 3, 3, 1, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        convs = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        return nn.Sequential(convs[0], nn.LeakyReLU(0.2), convs[1], nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        y, skips = torch.cat((x.masked_fill(mask > 0.5, 0.0), mask), 1), []
        for i, layer in enumerate(self.down):
            y = layer(F.avg_pool2d(y, 2) if i else y)
            skips.append(y)
        for layer, skip in zip(self.up, skips[-2::-1], strict=True):
            y = layer(torch.cat((F.interpolate(y, scale_factor=2.0), skip), 1))
        refined = self.last(y).tanh()
        return {"refined": refined, "output": composite(x, refined.to(x.dtype), mask)}


def mean_colour(x: Tensor, mask: Tensor) -> Tensor:
    """The hole in the mean colour of the kept pixels (mid grey where nothing is kept)."""
    kept = 1 - mask
    mean = (x * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp_min(1)
    return composite(x, mean.expand_as(x), mask)


def opencv_filler(method: int, radius: float = 3.0) -> Callable[[Tensor, Tensor], Tensor]:
    """OpenCV's inpainting, `cv2.INPAINT_TELEA` or `cv2.INPAINT_NS`, on 8-bit images one by one."""

    def fill(x: Tensor, mask: Tensor) -> Tensor:
        images = (x / 2 + 0.5).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        holes = (mask[:, 0] > 0.5).byte().cpu().numpy()
        filled = [cv2.inpaint(i, h, radius, method) for i, h in zip(images, holes, strict=True)]
        stacked = torch.stack([torch.from_numpy(f) for f in filled]).permute(0, 3, 1, 2)
        return composite(x, stacked.to(x) / 127.5 - 1, mask)

    return fill


CLASSICAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean colour": mean_colour,
    "Telea (OpenCV)": opencv_filler(cv2.INPAINT_TELEA),
    "Navier-Stokes (OpenCV)": opencv_filler(cv2.INPAINT_NS),
}
"""Name -> function of (x, mask) that needs no training."""
