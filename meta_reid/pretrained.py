"""Weights of a torchvision ResNet or of a ViT into every set of norms of a network."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_reid.vit import VitTail, VitTrunk
from shared.runtime import UserError
from shared.weights import load_torch, pretrained_path

URLS = {
    "r18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "r34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "r50": "https://download.pytorch.org/models/resnet50-19c8e357.pth",
    "r101": "https://download.pytorch.org/models/resnet101-5d3b4d8f.pth",
    "r152": "https://download.pytorch.org/models/resnet152-b121ed2d.pth",
}
"""torchvision's ImageNet files; that of r50 is the one the official code starts from."""

TIMM = {
    "vit-s16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit-b16": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "clip-b16": "vit_base_patch16_clip_quickgelu_224.openai",
}
"""timm's names of the ViTs' weights."""

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


_OPEN_CLIP = {
    "conv1.": "patch_embed.proj.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
"""Parts of names in open_clip's image tower -> in timm's ViT."""


def vit_state(architecture: str, path: Path | None) -> tuple[dict[str, Tensor], str]:
    """Weights of a ViT under timm's names, and where they are from: a file, or timm's own download.

    The file is timm's, or open_clip's of a whole model or of its image tower, also under a key `model` or
    `state_dict`. Raises UserError when there is neither file nor network, or the file is none of these.
    """
    name = TIMM[architecture]
    if path is None:
        return timm_state(name), name
    found = load_torch(pretrained_path("ViT", path, f"give timm's {name} or open_clip's file with --weights"))
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    found = {str(key).removeprefix("module."): value for key, value in found.items()}
    tower = {key.removeprefix("visual."): v for key, v in found.items() if key.startswith("visual.")} or found
    if "class_embedding" not in tower:
        return found, str(path)
    state = {}
    for key, value in tower.items():
        for theirs, ours in _OPEN_CLIP.items():
            key = key.replace(theirs, ours)
        state[key] = value
    state["cls_token"], state["pos_embed"] = state["cls_token"].view(1, 1, -1), state["pos_embed"][None]
    return state, str(path)


def timm_state(name: str) -> dict[str, Tensor]:
    """timm's own download of a ViT. Raises UserError when it fails."""
    import timm  # takes seconds

    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError) as error:  # what the hub's client raises without network or file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"ViT: {name} could not be downloaded ({reason}); get its file from timm's page on the Hugging "
            "Face hub and pass it with --weights, or use --no-pretrained"
        ) from None


@torch.no_grad()
def init_vit(backbone: VitTrunk | VitTail, state: dict[str, Tensor], source: str) -> None:
    """Copy a ViT's weights, as from `vit_state`, into a trunk or the global branch's tail.

    Every set of norms gets its own copy, the tail's instance norms too; its entry norm, which a ViT lacks,
    stays as it is. Positions are interpolated to the images' grid. Raises UserError when a weight is missing
    or of another shape.
    """
    for name, tensor in backbone.state_dict().items():
        if "running_" in name or name.startswith("entry."):
            continue
        wanted = re.sub(r"(norm\w*)\.\d+\.", r"\1.", name)
        if wanted not in state:
            raise UserError(f"{source}: no weights of this ViT, {wanted} is missing")
        value = state[wanted].float()
        if wanted == "pos_embed":
            value = positions(value, backbone.grid, source)
        if value.shape != tensor.shape:
            raise UserError(
                f"{source}: {wanted} has shape {tuple(value.shape)} instead of {tuple(tensor.shape)}"
            )
        tensor.copy_(value)


def positions(embedding: Tensor, grid: tuple[int, int], source: str) -> Tensor:
    """Positional embedding of a class token and a square grid, (1, 1 + n * n, C) -> of another grid, bicubic.

    One of as many positions as the grid has is taken as it is. Raises UserError for another number that is no
    square.
    """
    count = embedding.shape[1] - 1
    if count == grid[0] * grid[1]:
        return embedding
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{source}: {count} positions, neither a square nor {grid[0]}x{grid[1]}")
    square = embedding[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([embedding[:, :1], resized], 1)
