"""The networks that guide training or prepare input and do not learn in it: age, identity and face parser.

Each exists in the published form, whose weights are loaded from a file, and in a small form that a run trains
by itself on its own training pictures.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.facespace import FaceSpace
from biphasic_age.layouts import CLASSES
from shared.bisenet import BiSeNet
from shared.irse import IRSE
from shared.runtime import UserError, own_type
from shared.weights import load_state, load_torch, pretrained_path

YEARS = 101
"""Ages 0 to 100 of the expectation."""


class AgeSeen(NamedTuple):
    """What an age network says of faces."""

    groups: Tensor
    """Logits of the age groups, (B, K)."""
    years: Tensor
    """Expected age in years, (B,): mean of the softmax over ages 0 to 100 (DEX)."""
    ages: Tensor
    """Logits of the ages 0 to 100, (B, 101)."""


class AgeNet(nn.Module):
    """T, in the form of PFA-GAN's auxiliary age classifier: stages of 4x4 convolution with stride 2, BN and
    ReLU, from `width` channels up to eight times as many; a linear layer to 101 ages, another to the groups.

    Full size: width 64, 6 stages, for 256x256.
    """

    def __init__(self, width: int = 64, stages: int = 6, groups: int = 4):
        super().__init__()
        layers, inputs = [], 3
        for stage in range(stages):
            outputs = width * min(2**stage, 8)
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.ages = nn.Linear(inputs, YEARS)
        self.groups = nn.Linear(YEARS, groups)

    def forward(self, image: Tensor) -> AgeSeen:
        """Image (B, 3, H, W) in [-1, 1]."""
        ages = self.ages(self.features(image).mean((2, 3))).float()
        with own_type(ages):  # in bf16 it would be half a year off
            years = ages.softmax(1) @ torch.arange(YEARS, device=ages.device, dtype=ages.dtype)
        return AgeSeen(self.groups(ages), years, ages)


def age_training_loss(seen: AgeSeen, age: Tensor, group: Tensor) -> Tensor:
    """CE over the ages 0 to 100 plus CE over the groups; age (B,) in years, group (B,)."""
    labels = age.round().long().clamp(0, YEARS - 1)
    return F.cross_entropy(seen.ages, labels) + F.cross_entropy(seen.groups, group)


class IdentityNet(nn.Module):
    """phi's small form: six 3x3 convolutions, every other one with stride 2, BN, ReLU; a linear embedding. It
    learns the subjects of the training pictures with a softmax."""

    def __init__(self, identities: int, width: int = 32, embedding: int = 128):
        super().__init__()
        stages, inputs = [], 3
        for stage in range(3):
            outputs = width * 2**stage
            stages.append(
                nn.Sequential(
                    *(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
                    *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
                )
            )
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        self.embedding = nn.Linear(inputs * 16, embedding)
        self.subjects = nn.Linear(embedding, identities, bias=False)

    def levels(self, image: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> feature maps from fine to coarse."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps

    def embed(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> unit vectors (B, embedding)."""
        pooled = F.adaptive_avg_pool2d(self.levels(image)[-1], 4).flatten(1)
        return F.normalize(self.embedding(pooled).float(), dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Image -> logits (B, identities): 16 times the cosine to each subject's weight."""
        embedding = self.embed(image)
        with own_type(embedding):
            return 16 * F.linear(embedding, F.normalize(self.subjects.weight, dim=1))


class ArcFace(nn.Module):
    """phi's published form: IR-SE50 with ArcFace weights, on the face's inner square.

    crop: left, top, right, bottom of the 112x112 ArcFace crop as fractions of the picture's side.
    """

    def __init__(self, crop: tuple[float, float, float, float] = (0.2, 0.26, 0.8, 0.86)):
        super().__init__()
        self.network, self.crop = IRSE(), crop

    def _cropped(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        left, top, right, bottom = self.crop
        inner = image[
            ..., round(top * height) : round(bottom * height), round(left * width) : round(right * width)
        ]
        return F.interpolate(inner, (112, 112), mode="bilinear", align_corners=False, antialias=True)

    def levels(self, image: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> feature maps after the four stages."""
        return self.network.levels(self._cropped(image))

    def embed(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> unit vectors (B, 512)."""
        return self.network(self._cropped(image))


class SmallParser(nn.Module):
    """A small face parser that a run trains on its own layouts: an hourglass of three levels with skips.

    `space` tells faces from other pictures; a run lets it learn the training pictures.
    """

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        widths = (width, 2 * width, 4 * width)

        def pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
                *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            )

        self.down = nn.ModuleList(
            pair(inputs, outputs, 1 if level == 0 else 2)
            for level, (inputs, outputs) in enumerate(zip((3, *widths), (*widths, widths[-1]), strict=False))
        )
        self.up = nn.ModuleList(
            pair(below + beside, beside, 1)
            for below, beside in ((widths[2], widths[2]), (widths[2], widths[1]), (widths[1], widths[0]))
        )
        self.last = nn.Conv2d(widths[0], classes, 1)
        self.space = FaceSpace()

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> logits (B, classes, H, W)."""
        beside = []
        for down in self.down:
            image = down(image)
            beside.append(image)
        h = beside.pop()
        for up in self.up:
            skip = beside.pop()
            h = up(torch.cat((F.interpolate(h, skip.shape[-2:], mode="nearest"), skip), 1))
        return self.last(h)

    @torch.no_grad()
    def labels(self, image: Tensor) -> Tensor:
        """Image -> label map (B, H, W) int64."""
        return self(image).argmax(1)


class BiSeNetParser(nn.Module):
    """The public 19-class face parser (`load_parser` gives it its weights). size: side it works at."""

    def __init__(self, size: int = 512):
        super().__init__()
        self.network, self.size = BiSeNet(), size
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def labels(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> label map (B, H, W) int64."""
        scaled = F.interpolate(image, (self.size, self.size), mode="bilinear", align_corners=False)
        found = self.network((scaled / 2 + 0.5 - self.mean) / self.std)[0].argmax(1, keepdim=True)
        return F.interpolate(found.float(), image.shape[-2:], mode="nearest-exact")[:, 0].long()


def freeze(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, without gradients of its parameters."""
    return network.requires_grad_(False).eval()


def _read(path: Path) -> dict[str, Tensor]:
    state = load_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return state


def load_parser(path: Path | None, size: int = 512) -> BiSeNetParser:
    """The public parser, frozen. UserError when the file is missing or another one."""
    where = (
        "get 79999_iter.pth (linked from the README of zllrunning/face-parsing.PyTorch) and give it with "
        "--parser-weights"
    )
    path, parser = pretrained_path("face parser BiSeNet", path, where), BiSeNetParser(size)
    load_state(parser.network, _read(path), path, prefixes=("module.", "net."))
    return freeze(parser)


def load_identity(path: Path | None) -> ArcFace:
    """ArcFace's IR-SE50, frozen. UserError when the file is missing or another one."""
    where = (
        "get model_ir_se50.pth (linked from the README of TreB1eN/InsightFace_Pytorch) and give it with "
        "--identity-weights"
    )
    path, network = pretrained_path("identity network IR-SE50", path, where), ArcFace()
    load_state(network.network, _read(path), path)
    return freeze(network)


def load_age(path: Path | None, groups: int = 4, width: int = 64, stages: int = 6) -> AgeNet:
    """An age network, frozen: a file that `train.py` wrote, or any state dict of `AgeNet` of these sizes.
    UserError when the file is missing or another one."""
    where = (
        "give a state dict of AgeNet (of a run: trained/DATA-age-SEED.safetensors) with --age-weights, or "
        "let the run train one"
    )
    path, network = pretrained_path("age network", path, where), AgeNet(width, stages, groups)
    load_state(network, _read(path), path)
    return freeze(network)


def require_face(labels: Tensor, name: str, share: float = 0.05, looks_like_one: bool = True) -> None:
    """UserError when less than `share` of a label map (H, W) is skin, or when the picture does not look like
    a face to a parser that can tell: no face was found."""
    found = (labels == CLASSES.index("skin")).float().mean().item()
    if found < share or not looks_like_one:
        why = f"{100 * found:.1f} % skin" if found < share else "unlike the run's training faces"
        raise UserError(
            f"{name}: the parser found no face ({why}); give a picture in which the face is large and upright"
            + ("" if looks_like_one else ", cropped like the training faces, or use --parser-weights")
        )
