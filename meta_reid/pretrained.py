"""ImageNet weights of a torchvision ResNet into every set of norms of a network."""

import re

import torch
from torch import Tensor, nn

from shared.runtime import UserError

URLS = {
    "r18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "r34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "r50": "https://download.pytorch.org/models/resnet50-19c8e357.pth",
    "r101": "https://download.pytorch.org/models/resnet101-5d3b4d8f.pth",
    "r152": "https://download.pytorch.org/models/resnet152-b121ed2d.pth",
}
"""torchvision's ImageNet files; that of r50 is the one the official code starts from."""

_BLOCK = re.compile(r"layer(\d)(\d+)\.(?:(conv|bn)(\d)\d*|downsample\.(\d))\.(.+)")
_STEM = re.compile(r"(?:conv1|bn1\d+)\.(.+)")


def imagenet_name(name: str) -> str | None:
    """Name in our backbones -> name in torchvision's ResNet; None for what has no counterpart.

    layer{S}{B}.bn{J}{k} <- layer{S}.{B}.bn{J} for every k, downsample.{>=1} <- downsample.1.
    """
    block = _BLOCK.fullmatch(name)
    if block:
        stage, number, kind, j, position, rest = block.groups()
        part = f"{kind}{j}" if kind else f"downsample.{min(int(position), 1)}"
        return f"layer{stage}.{number}.{part}.{rest}"
    if _STEM.fullmatch(name):
        return f"{'conv1' if name.startswith('conv1') else 'bn1'}.{name.split('.', 1)[1]}"
    return None


@torch.no_grad()
def init_imagenet(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a torchvision ResNet's state dict into a trunk, a global tail or a plain network.

    Every set of norms gets its own copy, running statistics included, so all experts start alike and share
    no storage. Instance norms take gamma and beta; IBN-a the matching half. Raises UserError when a weight
    is missing or of another shape.
    """
    for name, tensor in backbone.state_dict().items():
        if name.endswith(("num_batches_tracked", "mean_in", "var_in")):
            continue
        half = re.search(r"\.(IN|BN)\.", name)
        wanted = imagenet_name(name.replace(half.group(), ".") if half else name)
        if wanted is None:
            continue
        if wanted not in state:
            raise UserError(f"{source}: no ImageNet weights of this ResNet, {wanted} is missing")
        value = state[wanted]
        if half and len(value) > len(tensor):
            value = value[: len(tensor)] if half.group(1) == "IN" else value[-len(tensor) :]
        if value.shape != tensor.shape:
            raise UserError(
                f"{source}: {wanted} has shape {tuple(value.shape)} instead of {tuple(tensor.shape)}"
            )
        tensor.copy_(value)
