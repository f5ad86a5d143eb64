"""Detectors of face crops: the winner's ConvNeXt and Swin (timm), the organisers' Xception, smaller ones.

A detector maps normalised RGB crops (N, 3, S, S) to logits (N, C). C = 2: (real, fake). C = 1: logit of fake.
C = 3: (real, fake, adversarial fake), the 2021 winner's classes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from timm.models import convnext as timm_convnext
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn

from shared.runtime import UserError
from shared.weights import load_state, load_torch, pretrained_path

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# --- Xception, the 2021 edition's baseline ----------------------------------------------------------


class SeparableConv(nn.Module):
    """Depthwise 3x3 then pointwise 1x1 convolution, stride 1, padding 1, without biases."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """(ReLU, separable conv, batch norm) per entry of `widths`, max pooling when stride > 1, and a skip path.

    (N, widths[0], H, W) -> (N, widths[-1], ceil(H / stride), ceil(W / stride)). first_relu: whether the block
    opens with a ReLU, which must not be in place because the skip path reads the same tensor.
    """

    def __init__(self, widths: tuple[int, ...], stride: int = 1, first_relu: bool = True):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.ReLU(inplace=bool(layers)), SeparableConv(inputs, outputs), nn.BatchNorm2d(outputs)]
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*layers[0 if first_relu else 1 :])
        self.skip = None
        if stride > 1 or widths[0] != widths[-1]:
            self.skip = nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.rep(x) + (x if self.skip is None else self.skipbn(self.skip(x)))


class Xception(nn.Module):
    """Xception under the DFGC 2021 baseline's names: (N, 3, 299, 299) in [-1, 1] -> (N, num_classes).

    middle: number of 728-channel blocks (8 in the original). width: multiplies every channel count.
    """

    def __init__(self, num_classes: int = 1, middle: int = 8, width: float = 1.0):
        super().__init__()
        w = {c: max(4, round(c * width)) for c in (32, 64, 128, 256, 728, 1024, 1536, 2048)}
        self.conv1, self.bn1 = nn.Conv2d(3, w[32], 3, 2, bias=False), nn.BatchNorm2d(w[32])
        self.conv2, self.bn2 = nn.Conv2d(w[32], w[64], 3, bias=False), nn.BatchNorm2d(w[64])
        blocks = [
            XceptionBlock((w[64], w[128], w[128]), 2, first_relu=False),
            XceptionBlock((w[128], w[256], w[256]), 2),
            XceptionBlock((w[256], w[728], w[728]), 2),
            *(XceptionBlock((w[728],) * 4) for _ in range(middle)),
            XceptionBlock((w[728], w[728], w[1024]), 2),
        ]
        self.blocks = [f"block{number}" for number in range(1, len(blocks) + 1)]
        for name, block in zip(self.blocks, blocks, strict=True):
            self.add_module(name, block)
        self.conv3, self.bn3 = SeparableConv(w[1024], w[1536]), nn.BatchNorm2d(w[1536])
        self.conv4, self.bn4 = SeparableConv(w[1536], w[2048]), nn.BatchNorm2d(w[2048])
        self.fc = nn.Linear(w[2048], num_classes)
        self.num_features = w[2048]

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, 2048, s, s), s = 10 for S = 299."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.relu(self.bn4(self.conv4(x)), inplace=True)

    def forward_head(self, x: Tensor) -> Tensor:
        """(N, 2048, s, s) -> (N, num_classes)."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# --- the winner's networks, through timm ------------------------------------------------------------


def convnext(**options: Any) -> nn.Module:
    """timm's ConvNeXt with the winner's head: `head.fc` a Linear with PyTorch's default initialisation.

    options: timm's `in_chans, num_classes, depths, dims, drop_path_rate, ls_init_value, patch_size`.
    """
    network = timm_convnext.ConvNeXt(**{"num_classes": 2, **options})
    network.head.fc.reset_parameters()
    return network


def swin(**options: Any) -> nn.Module:
    """timm's Swin with the winner's head, its state dict under the names of timm 0.5.4.

    options: timm's `img_size, patch_size, window_size, num_classes, embed_dim, depths, num_heads,
    drop_path_rate` (0.1 by default: linear from 0 to 0.1 over the blocks).
    """
    network = timm_swin.SwinTransformer(**{"num_classes": 2, **options})
    network.head.fc.reset_parameters()
    return _with_legacy_names(network)


def _with_legacy_names(network: nn.Module) -> nn.Module:
    network.register_state_dict_post_hook(_legacy_names)
    network.register_load_state_dict_pre_hook(_current_names)
    return network


_COMPUTED = ("relative_position_index", "attn_mask")


def _legacy_names(network: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Rename a fresh state dict to timm 0.5.4's names and add the buffers which that version saved."""
    own = _taken_out(state, prefix)
    own |= {key: buffer for key, buffer in network.named_buffers() if buffer is not None}
    state.update({prefix + legacy_name(key): value for key, value in own.items()})


def _current_names(_network: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    """Rename a legacy state dict to what today's timm reads; index and mask are computed, not loaded."""
    kept = {key: value for key, value in _taken_out(state, prefix).items() if not key.endswith(_COMPUTED)}
    state.update({prefix + current_name(key): value for key, value in kept.items()})


def _taken_out(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}


def legacy_name(key: str) -> str:
    """Name in today's timm Swin -> in timm 0.5.4 (`layers.1.downsample` -> `layers.0.downsample`)."""
    parts = key.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts).replace("head.fc.", "head.")


def current_name(key: str) -> str:
    """The inverse of `legacy_name`."""
    parts = key.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) + 1)
    return ".".join(parts).replace("head.", "head.fc.")


# --- the list ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector:
    """What is needed to build a detector and to prepare its input."""

    build: Callable[..., nn.Module]
    """Keyword arguments -> network."""
    size: int
    """Side of the square input in pixels."""
    normalise: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and standard deviation per RGB channel of the input in [0, 1]."""
    imagenet: str = ""
    """timm's name of the ImageNet weights that fine-tuning starts from."""
    fixed: bool = False
    """Whether the network is built for one side of its input (`img_size`), as Swin and ViT are."""

    def sized(self, size: int | None, **options: Any) -> nn.Module:
        """The network for inputs of another side; None: its own."""
        return self.build(**options, **({"img_size": size} if size and self.fixed else {}))

    def at(self, size: int | None, **options: Any) -> nn.Module:
        """`sized`, tried out. Raises UserError for a side that the network does not take."""
        if size is None:
            return self.sized(size, **options)
        try:
            network = self.sized(size, **options).eval()
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"--size {size}: the detector takes no such side ({error})") from None
        return network


def _convnext(size: int, imagenet: str, **options: Any) -> Detector:
    return Detector(partial(convnext, **options), size, imagenet=imagenet)


def _swin(imagenet: str, **options: Any) -> Detector:
    return Detector(partial(swin, **options), options["img_size"], imagenet=imagenet, fixed=True)


_SWIN = {"patch_size": 4, "window_size": 12, "img_size": 384}
_DEEP, _SHALLOW = (3, 3, 27, 3), (3, 3, 9, 3)
DETECTORS: dict[str, Detector] = {
    "convnext_xlarge_384_in22ft1k": _convnext(
        384, "convnext_xlarge.fb_in22k_ft_in1k_384", depths=_DEEP, dims=(256, 512, 1024, 2048)
    ),
    "swin_large_patch4_window12_384_in22k": _swin(
        "swin_large_patch4_window12_384.ms_in22k",
        **_SWIN,
        embed_dim=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
    ),
    "xception_dfgc21_baseline": Detector(Xception, 299, HALF, "legacy_xception.tf_in1k"),
    "convnext_large": _convnext(
        384, "convnext_large.fb_in22k_ft_in1k_384", depths=_DEEP, dims=(192, 384, 768, 1536)
    ),
    "convnext_base": _convnext(
        384, "convnext_base.fb_in22k_ft_in1k_384", depths=_DEEP, dims=(128, 256, 512, 1024)
    ),
    "convnext_small": _convnext(
        384, "convnext_small.fb_in22k_ft_in1k_384", depths=_DEEP, dims=(96, 192, 384, 768)
    ),
    "convnext_tiny": _convnext(
        384, "convnext_tiny.fb_in22k_ft_in1k_384", depths=_SHALLOW, dims=(96, 192, 384, 768)
    ),
    "convnext_micro": _convnext(
        48, "", depths=(1, 1, 1, 1), dims=(24, 48, 96, 96), patch_size=2, ls_init_value=1.0
    ),
    "swin_base": _swin(
        "swin_base_patch4_window12_384.ms_in22k",
        **_SWIN,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
    ),
    "swin_tiny": _swin(
        "swin_tiny_patch4_window7_224.ms_in1k",
        img_size=224,
        patch_size=4,
        window_size=7,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
    ),
    "swin_micro": _swin(
        "", img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1, 2, 1), num_heads=(2, 4, 4)
    ),
}
OFFICIAL = tuple(DETECTORS)[:3]


def detector(name: str) -> Detector:
    """Entry of `DETECTORS`, or `timm/NAME` for any other image model of timm, with its own preprocessing.

    Raises UserError on an unknown name.
    """
    if name in DETECTORS:
        return DETECTORS[name]
    known = name.removeprefix("timm/")
    if not name.startswith("timm/") or not timm.is_model(known):
        raise UserError(
            f"no detector {name!r}; there are {', '.join(DETECTORS)}, and timm/NAME for any model of timm"
        )
    config = timm.get_pretrained_cfg(known)
    build = partial(_timm_model, known)
    norm = tuple(config.mean), tuple(config.std)
    return Detector(build, config.input_size[-1], norm, known, fixed=config.fixed_input_size)


def _timm_model(name: str, num_classes: int = 2, **options: Any) -> nn.Module:
    network = timm.create_model(name, num_classes=num_classes, **options)
    # Every Swin has one set of names here, whichever way it was built.
    return _with_legacy_names(network) if isinstance(network, timm_swin.SwinTransformer) else network


def official(name: str, **options: Any) -> nn.Module:
    """A network of the winner or of the organisers, freshly initialised, under its official parameter names.

    name: one of `OFFICIAL`. Raises UserError on an unknown name.
    """
    if name not in OFFICIAL:
        raise UserError(f"no official network {name!r}; there are {', '.join(OFFICIAL)}")
    return DETECTORS[name].build(**options)


def load_official(name: str, path: Path) -> nn.Module:
    """The network `name` with the weights of a released file, in evaluation mode.

    Understands `state_dict`/`model` wrappers, DataParallel's `module.` prefix, Swin under timm 0.5.4's and
    today's names, with or without the saved index and mask. Raises UserError that lists what does not fit.
    """
    network = official(name)
    load_detector_state(network, load_torch(path), path)
    return network.eval()


def load_detector_state(network: nn.Module, content: Any, source: Path | str) -> None:
    """A released or otherwise saved state into any detector, strictly; see `load_official`."""
    content = _unwrapped(content, source)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    if isinstance(network, timm_swin.SwinTransformer):
        if "head.fc.weight" in state:
            state = {legacy_name(key): value for key, value in state.items()}
        own = network.state_dict()
        computed = {key for key in own if key.endswith(_COMPUTED)}
        state = {key: value for key, value in state.items() if not key.endswith(_COMPUTED)}
        state |= {key: own[key] for key in computed}
    load_state(network, state, source, prefixes=())


def _unwrapped(content: Any, source: Path | str) -> dict[str, Any]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{source}: holds no state dict of tensors")
    return content


def load_imagenet(network: nn.Module, name: str, path: Path | None) -> None:
    """ImageNet weights of detector `name` into all of `network` but its head, from a file or timm's download.

    path: timm's or the authors' original file; position tables are resampled to the side of the network.
    Raises UserError without file and network, or on one that does not fit.
    """
    tag = detector(name).imagenet
    if not tag:
        raise UserError(f"{name}: has no ImageNet weights; train it from scratch (--init none)")
    hub = timm.get_pretrained_cfg(tag).hf_hub_id
    path = pretrained_path(
        f"ImageNet weights of {name}",
        path,
        f"get the weights of timm's {tag} and give their file with --imagenet",
        partial(hf_hub_download, hub, "model.safetensors") if hub else None,
    )
    content = _unwrapped(load_torch(path), path)
    # What timm does to a file of this kind of network before it loads it.
    adapted = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    content = adapted(content, network) if adapted else content
    if isinstance(network, timm_swin.SwinTransformer):
        content = {legacy_name(key): value for key, value in content.items()}
    own = network.state_dict()
    heads = ("head.weight", "head.bias", "head.fc.", "fc.", "classifier.")
    fresh = {key for key in own if key.startswith(heads) or key.endswith(_COMPUTED)}
    state = {key: value for key, value in content.items() if key in own} | {key: own[key] for key in fresh}
    load_state(network, state, path, prefixes=())


# --- reading a detector's output --------------------------------------------------------------------


def fake_logit(logits: Tensor) -> Tensor:
    """Logits (N, C) -> log-odds of fake (N,). All classes but the first are fake."""
    logits = logits.float()
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1:].logsumexp(1) - logits[:, 0]


def fake_probability(logits: Tensor) -> Tensor:
    """Logits (N, C) -> probability of fake (N,): sigmoid for C = 1, otherwise 1 - softmax of class 0."""
    return fake_logit(logits).sigmoid()


def pooled_features(network: nn.Module, images: Tensor, vra_compat: bool = False) -> Tensor:
    """Features (N, D) before the last linear layer.

    vra_compat: as the realism (VRA) releases took them from ConvNeXt, pooled but before `head.norm`.
    """
    maps = network.forward_features(images)
    if isinstance(network, Xception):
        return maps.mean((2, 3))
    if vra_compat and isinstance(network, timm_convnext.ConvNeXt):
        return network.head.global_pool(maps).flatten(1)
    return network.forward_head(maps, pre_logits=True)
