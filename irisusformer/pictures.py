"""Pictures of what the network sees: masks, uncertainty, boundaries."""

from collections.abc import Callable

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor

from irisusformer.geometry import Ellipse
from shared.io import image_grid

GREEN, RED, BLUE = (26, 230, 77), (255, 64, 51), (51, 153, 255)  # 8-bit RGB
Colour = tuple[int, int, int]


def heat(values: Tensor, top: float = 0.5) -> Tensor:
    """(H, W) in [0, top] -> (3, H, W), dark to bright; half is the discrepancy of a pixel left undecided."""
    table = torch.from_numpy(matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3]).float()
    return table[(values.cpu().float() / top).clamp(0, 1).mul(255).long()].permute(2, 0, 1)


def tint(image: Tensor, region: Tensor, colour: Colour, strength: float = 0.4) -> Tensor:
    """Colour a region (H, W) of an image (3, H, W)."""
    alpha = region.cpu().float() * strength
    return image.cpu() * (1 - alpha) + torch.tensor(colour)[:, None, None] / 255 * alpha


def outlined(image: Tensor, region: Tensor, colour: Colour) -> Tensor:
    """Draw the contour of a region (H, W) into an image (3, H, W)."""
    contours, _ = cv2.findContours(
        region.cpu().numpy().astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    return _drawn(image, lambda canvas, width: cv2.drawContours(canvas, contours, -1, colour, width))


def with_ellipse(image: Tensor, ellipse: Ellipse | None, colour: Colour) -> Tensor:
    """Draw an ellipse into an image (3, H, W); nothing when there is none."""
    if ellipse is None:
        return image
    box = (ellipse.x, ellipse.y), (2 * ellipse.a, 2 * ellipse.b), float(np.degrees(ellipse.angle))
    return _drawn(image, lambda canvas, width: cv2.ellipse(canvas, box, colour, width, cv2.LINE_AA))


def _drawn(image: Tensor, draw: Callable[[np.ndarray, int], object]) -> Tensor:
    # 8-bit, because OpenCV draws antialiased lines into nothing else
    canvas = (image.cpu() * 255).byte().permute(1, 2, 0).contiguous().numpy()
    draw(canvas, max(1, round(min(canvas.shape[:2]) / 400)))  # a line of one pixel is lost in a large photo
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255


def overview(image: Tensor, truth: Tensor, predicted: dict[str, Tensor], most: int = 8) -> Tensor:
    """Sheet of up to `most` images: image, annotation, predicted mask, wrong pixels, uncertainty."""
    tiles = []
    for i in range(min(most, len(image))):
        picture, target, mask = image[i].cpu(), truth[i, 0].cpu(), predicted["mask"][i, 0].cpu()
        wrong = (mask != target) & (target != 255)
        tiles += [picture, tint(picture, target == 1, GREEN), tint(picture, mask == 1, BLUE)]
        tiles += [tint(picture, wrong, RED, 0.9), heat(predicted["uncertainty"][i, 0])]
    labels = ["image", "annotation", "mask", "errors", "uncertainty"]
    return image_grid(tiles, 5, column_labels=labels, scale=max(1, 128 // image.shape[-1]))
