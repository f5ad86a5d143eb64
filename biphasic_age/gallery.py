"""Pictures of what a generator does: strips of one face at all ages."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biphasic_age.ages import group_names
from shared.io import image_grid

if TYPE_CHECKING:
    from biphasic_age.train import Config


@torch.no_grad()
def strips(net: nn.Module, image: Tensor, layout: Tensor, groups: int) -> Tensor:
    """Faces (B, 3, H, W) in [-1, 1] with layouts (B, H, W) -> (B, groups, 3, H, W) in [-1, 1], each at every
    age without noise. Leaves the network in evaluation mode."""
    net.eval()
    targets = torch.arange(groups, device=image.device)
    made = [net(image, layout, k.expand(len(image)), 0.0) for k in targets]
    return torch.stack(made, 1)


def strip_sheet(
    image: Tensor, made: Tensor, names: tuple[str, ...], rows: list[str] | None = None, scale: int = 1
) -> Tensor:
    """Input and its strip in one row per face, (3, H', W') in [0, 1]."""
    tiles = torch.cat((image[:, None], made), 1).flatten(0, 1) / 2 + 0.5
    labels = ["input", *names]
    return image_grid(tiles, len(labels), row_labels=rows, column_labels=labels, scale=scale)


def training_sheet(net: nn.Module, image: Tensor, layout: Tensor, config: "Config", count: int = 6) -> Tensor:
    """A few faces of a training batch at all ages."""
    image, layout = image[:count], layout[:count]
    names = group_names(config.limits)
    made = strips(net, image, layout, len(names))
    return strip_sheet(image, made, names, scale=max(1, 96 // image.shape[-1]))
