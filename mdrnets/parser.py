"""Semantic guidance: which facial part every memory cell belongs to.

The paper says that its memory blocks belong to facial parts and not which parts; the eight groups below are
our decision. Both parsers give class probabilities on the memory's grid, from the composite of the coarse
result.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.bisenet import BiSeNet
from shared.weights import load_state, load_torch, pretrained_path

GROUPS: dict[str, tuple[int, ...]] = {
    "background": (0,),
    "skin": (1,),
    "brows": (2, 3),
    "eyes": (4, 5, 6),
    "nose": (10,),
    "mouth": (11, 12, 13),
    "hair": (17, 18),
    "other": (7, 8, 9, 14, 15, 16),
}
"""Our eight parts and the labels of the public 19-class parser in each."""

GLASSES, HAT = 6, 18
"""Labels of the 19-class parser that `predict.py --hide` looks for."""

PART_COLOURS = torch.tensor(
    [
        (0.25, 0.25, 0.28),
        (0.96, 0.78, 0.62),
        (0.55, 0.27, 0.07),
        (0.13, 0.47, 0.91),
        (0.98, 0.60, 0.20),
        (0.88, 0.16, 0.30),
        (0.42, 0.20, 0.55),
        (0.45, 0.70, 0.42),
    ]
)
"""(8, 3) RGB in [0, 1], for pictures of the parsing."""

WHERE = (
    "get 79999_iter.pth (linked from the README of zllrunning/face-parsing.PyTorch) "
    "and give it with --parser-weights"
)


def group_of_label(groups: dict[str, tuple[int, ...]] = GROUPS) -> Tensor:
    """(labels,) index of the group that each label of the 19-class parser falls into."""
    table = torch.empty(sum(len(labels) for labels in groups.values()), dtype=torch.long)
    for k, labels in enumerate(groups.values()):
        table[list(labels)] = k
    return table


def merge(
    probabilities: Tensor, cells: tuple[int, int], groups: dict[str, tuple[int, ...]] = GROUPS
) -> Tensor:
    """Probabilities of 19 labels (B, 19, H, W) -> of K groups on the memory's grid (B, K, h, w), summing to
    1."""
    maps = F.adaptive_avg_pool2d(probabilities, cells).unbind(1)
    grouped = torch.stack([sum(maps[label] for label in labels) for labels in groups.values()], 1)
    return grouped / grouped.sum(1, keepdim=True).clamp_min(1e-8)


def parts_on_grid(parts: Tensor, count: int, cells: tuple[int, int]) -> Tensor:
    """True part of every pixel (B, H, W) int -> share of each part in every cell (B, K, h, w) float."""
    return F.adaptive_avg_pool2d(F.one_hot(parts.long(), count).movedim(-1, 1).float(), cells)


def likely_cells(parsing: Tensor) -> Tensor:
    """(..., K, h, w) probabilities -> bool: cells where a part has at least a quarter of its largest share.

    On a coarse grid a small part (brows, eyes, mouth) shares its cells with skin and is the most probable one
    in hardly any.
    """
    return parsing >= 0.25 * parsing.amax((-2, -1), keepdim=True)


def paint_parts(parsing: Tensor) -> Tensor:
    """Soft parsing (B, K, h, w) -> picture (B, 3, h, w) in [0, 1]."""
    return torch.einsum("bkhw,kc->bchw", parsing, PART_COLOURS[: parsing.shape[1]].to(parsing))


class BiSeNetParser(nn.Module):
    """The public 19-class parser, frozen, merged into the eight groups. `size`: side it parses at, in
    pixels."""

    def __init__(self, size: int = 512):
        super().__init__()
        self.network, self.size = BiSeNet(), size
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False
        )

    def train(self, mode: bool = True) -> nn.Module:
        """Batch statistics stay those of the checkpoint."""
        return super().train(False)

    def labels(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> probabilities of the 19 labels (B, 19, size, size)."""
        scaled = F.interpolate(image, (self.size, self.size), mode="bilinear", align_corners=False)
        return self.network((scaled / 2 + 0.5 - self.mean) / self.deviation)[0].float().softmax(1)

    def forward(self, image: Tensor, cells: tuple[int, int]) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> (B, 8, h, w) for cells = (h, w)."""
        return merge(self.labels(image), cells)

    def is_face(self, image: Tensor, parsing: Tensor) -> Tensor:
        """Whether skin and at least one feature take a likely share of each parsing (B, 8, h, w), (B,)
        bool."""
        share = parsing.mean((2, 3))
        return (share[:, 1] > 0.05) & (share[:, 2:6].sum(1) > 0.005)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the first dilated, without normalisation; the input is added."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))


class FaceSpace(nn.Module):
    """Tells pictures that look like the training faces from others: a probabilistic principal subspace of
    small grey versions with mean 0 and deviation 1 (distance from face space, Turk and Pentland, 1991).

    `limits`: the distances between which 99 % of the training pictures lie; infinite until `learn`. Below the
    lower one are pictures without the structure of a face. `contrast`: half the least deviation of a training
    picture's grey values; a flat colour has less, whose hole, filled with a bit of face and normalised, would
    pass for one.
    """

    def __init__(self, side: int = 12, axes: int = 20):
        super().__init__()
        self.side = side
        self.register_buffer("mean", torch.zeros(side * side))
        self.register_buffer("axes", torch.zeros(axes, side * side))
        self.register_buffer("variance", torch.ones(axes))
        self.register_buffer("rest", torch.tensor(1.0))
        self.register_buffer("limits", torch.tensor((float("-inf"), float("inf"))))
        self.register_buffer("contrast", torch.tensor(0.0))

    def grey(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, side^2), with mean 0."""
        grey = F.adaptive_avg_pool2d(image.float().mean(1, keepdim=True), self.side).flatten(1)
        return grey - grey.mean(1, keepdim=True)

    def small(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, side^2), normalised; a flat picture gives zeros."""
        grey = self.grey(image)
        return grey / grey.std(1, keepdim=True).clamp_min(1e-2)

    def distance(self, image: Tensor) -> Tensor:
        """Negative log-likelihood up to a constant, (B,); image (B, 3, H, W) in any range."""
        offset = self.small(image) - self.mean
        inside = offset @ self.axes.T
        outside = (offset.square().sum(1) - inside.square().sum(1)).clamp_min(0)
        return (inside.square() / self.variance).sum(1) + outside / self.rest

    def learn(self, images: Tensor) -> None:
        """Set the subspace and the limits from training pictures (n, 3, H, W)."""
        data = self.small(images)
        self.mean.copy_(data.mean(0))
        _, values, axes = torch.linalg.svd(data - self.mean, full_matrices=False)
        spectrum, kept = values.square() / len(data), min(len(self.axes), len(values))
        self.axes[:kept] = axes[:kept]
        self.variance[:kept] = spectrum[:kept].clamp_min(1e-6)
        self.rest.copy_((spectrum[kept:].sum() / max(data.shape[1] - kept, 1)).clamp_min(1e-6))
        self.limits.copy_(self.distance(images).quantile(torch.tensor((0.005, 0.995)).to(images)))
        self.contrast.copy_(self.grey(images).std(1).min() / 2)

    def contains(self, image: Tensor) -> Tensor:
        """Whether each picture (B, 3, H, W) looks like a training picture, (B,) bool."""
        distance, deviation = self.distance(image), self.grey(image).std(1)
        return (deviation >= self.contrast) & (distance >= self.limits[0]) & (distance <= self.limits[1])


class TinyParser(nn.Module):
    """A parser for small pictures and other domains, trained beside the coarse network with cross entropy.

    `face_space` tells faces from other pictures; it is learned when the parser is trained.
    """

    def __init__(self, parts: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, 2, 1),
            ResidualBlock(32, 2),
            ResidualBlock(32, 4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, parts, 1),
        )
        self.face_space = FaceSpace()

    def logits(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> (B, K, H/2, W/2)."""
        return self.body(image)

    def forward(self, image: Tensor, cells: tuple[int, int]) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> class probabilities (B, K, h, w) for cells = (h, w)."""
        return F.adaptive_avg_pool2d(self.logits(image).float().softmax(1), cells)

    def is_face(self, image: Tensor, parsing: Tensor) -> Tensor:
        """Whether each picture (B, 3, H, W) looks like a training face, (B,) bool."""
        return self.face_space.contains(image)


def load_bisenet(parser: BiSeNetParser, path: Path | None) -> None:
    """The public weights into the frozen parser. UserError when the file is missing or another one."""
    load_bisenet_state(parser.network, pretrained_path("BiSeNet face parser", path, WHERE))


def load_bisenet_state(network: BiSeNet, path: Path | str) -> None:
    """Public weights into `network`: a bare state dict, or one under "state_dict"/"model", with or without
    `module.` in front of the names. UserError says what does not fit."""
    state = load_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    load_state(network, state, path, prefixes=("module.", "net."))


ParserKind = Literal["tiny", "bisenet"]


def make_parser(kind: ParserKind, parts: int, size: int = 512) -> nn.Module:
    """An untrained parser of the kind a run uses: `tiny`, or `bisenet` (its weights follow from a file)."""
    return TinyParser(parts) if kind == "tiny" else BiSeNetParser(size)
