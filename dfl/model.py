"""The networks of Disentangled Federated Learning: backbones, the two-branch client model, the critics.

An extractor is a backbone without its last linear layer. The paper's Figure 2 gives the two branches, the
concatenation and the head; the backbones, the width of the head and the critics are our decision, because the
text that describes them was not available to us. `digit_cnn` and `alexnet_bn` follow the parameter names of
the public FedBN checkpoints, so that those load into the single-branch baselines.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.runtime import UserError, own_type
from shared.weights import load_state, load_torch

Norm = Literal["batch", "group", "none"]
Backbone = Literal["mlp", "digit_cnn", "alexnet_bn", "resnet18", "resnet18_cifar"]


def norm_layer(norm: Norm, channels: int, dims: int = 2) -> nn.Module:
    """The layer in a `bn` slot: batch (over `dims` spatial axes, 0 or 2), group (8 channels each) or
    nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels) if dims else nn.BatchNorm1d(channels)
    return nn.GroupNorm(channels // 8, channels) if norm == "group" else nn.Identity()


class Classifier(nn.Module):
    """A backbone: `forward_features` gives z (B, d), `forward_head` the logits (B, C).

    With `classes=None` there is no head and `forward` returns z: the extractor of one branch.
    `width` is d, `head_prefix` the name of the last linear layer in the state dict.
    """

    width: int
    head_prefix: str
    classes: int | None

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, z: Tensor) -> Tensor:
        return self.get_submodule(self.head_prefix)(z)

    def forward(self, x: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, 3, H, W) -> logits (B, C) (z without a head), or (z, logits) with `with_features`."""
        z = self.forward_features(x)
        if self.classes is None:
            return z
        logits = self.forward_head(z)
        return (z, logits) if with_features else logits


class Mlp(Classifier):
    """Two hidden layers; widths (64, 32) for the toy digits, (128, 64) for the parameter-matched
    baselines."""

    head_prefix = "fc3"

    def __init__(self, inputs: int, classes: int | None = None, widths: tuple[int, int] = (64, 32)):
        super().__init__()
        self.classes, self.width = classes, widths[1]
        self.fc1 = nn.Linear(inputs, widths[0])
        self.fc2 = nn.Linear(widths[0], widths[1])
        if classes is not None:
            self.fc3 = nn.Linear(widths[1], classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))


class DigitCNN(Classifier):
    """FedBN's digit network for 28x28x3 images; d = 512."""

    head_prefix = "fc3"
    width = 512

    def __init__(self, classes: int | None = None, norm: Norm = "batch"):
        super().__init__()
        self.classes = classes
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.bn1 = norm_layer(norm, 64)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.bn2 = norm_layer(norm, 64)
        self.conv3 = nn.Conv2d(64, 128, 5, padding=2)
        self.bn3 = norm_layer(norm, 128)
        self.fc1 = nn.Linear(6272, 2048)
        self.bn4 = norm_layer(norm, 2048, dims=0)
        self.fc2 = nn.Linear(2048, 512)
        self.bn5 = norm_layer(norm, 512, dims=0)
        if classes is not None:
            self.fc3 = nn.Linear(512, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)  # (B, 64, 14, 14)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)  # (B, 64, 7, 7)
        x = F.relu(self.bn3(self.conv3(x))).flatten(1)  # (B, 6272)
        x = F.relu(self.bn4(self.fc1(x)))
        return F.relu(self.bn5(self.fc2(x)))


class AlexNetBN(Classifier):
    """AlexNet with normalisation after every layer, as FedBN trains it on 256x256x3 images; d = 4096."""

    head_prefix = "classifier.fc3"
    width = 4096

    def __init__(self, classes: int | None = None, norm: Norm = "batch"):
        super().__init__()
        self.classes = classes
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        shapes = ((3, 64, 11, 4), (64, 192, 5, 1), (192, 384, 3, 1), (384, 256, 3, 1), (256, 256, 3, 1))
        for i, (inputs, outputs, kernel, stride) in enumerate(shapes, start=1):
            # The first convolution pads by 2 although its kernel is 11: 256 -> 63.
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, kernel, stride, padding=min(kernel // 2, 2))
            layers[f"bn{i}"] = norm_layer(norm, outputs)
            layers[f"relu{i}"] = nn.ReLU()
            if i in (1, 2, 5):
                layers[f"maxpool{i}"] = nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(9216, 4096),
                bn6=norm_layer(norm, 4096, dims=0),
                relu6=nn.ReLU(),
                fc2=nn.Linear(4096, 4096),
                bn7=norm_layer(norm, 4096, dims=0),
                relu7=nn.ReLU(),
            )
        )
        if classes is not None:
            self.classifier.add_module("fc3", nn.Linear(4096, classes))

    def forward_features(self, x: Tensor) -> Tensor:
        z = F.adaptive_avg_pool2d(self.features(x), 6).flatten(1)  # (B, 9216)
        for name, layer in self.classifier.named_children():
            z = layer(z) if name != "fc3" else z
        return z


class ResNet18(Classifier):
    """torchvision's ResNet-18 up to the average pool; `cifar_stem` for small images; d = 512."""

    head_prefix = "fc"
    width = 512

    def __init__(self, classes: int | None = None, norm: Norm = "batch", cifar_stem: bool = False):
        from torchvision.models import resnet18  # takes seconds, and most backbones do without

        super().__init__()
        self.classes = classes
        net = resnet18(weights=None, norm_layer=lambda channels: norm_layer(norm, channels))
        if cifar_stem:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        for name, layer in net.named_children():
            if name != "fc":
                self.add_module(name, layer)
        if classes is not None:
            self.fc = nn.Linear(512, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x) if name != "fc" else x
        return x.flatten(1)


def build_backbone(
    name: Backbone,
    classes: int | None,
    image_shape: tuple[int, int, int] = (3, 8, 8),
    norm: Norm = "batch",
    widths: tuple[int, int] = (64, 32),
) -> Classifier:
    """A freshly initialised backbone: He normal (fan-in) weights, zero biases (our decision).

    classes: None builds an extractor. image_shape: (3, H, W) of the input; `mlp` needs it, and it is checked
    for `digit_cnn`, whose first linear layer only fits 28x28, and for `alexnet_bn`, whose last pooling needs
    63x63. widths: hidden widths of `mlp` (the only backbone without `bn` slots). Raises UserError when the
    images do not fit.
    """
    there = f"the data are {image_shape[1]}x{image_shape[2]}"
    if name == "digit_cnn" and image_shape[1:] != (28, 28):
        raise UserError(f"backbone digit_cnn takes 28x28 images, {there}")
    if name == "alexnet_bn" and min(image_shape[1:]) < 63:
        raise UserError(f"backbone alexnet_bn takes images of 63x63 or more, {there}")
    if name == "mlp":
        net: Classifier = Mlp(image_shape[0] * image_shape[1] * image_shape[2], classes, widths)
    elif name == "digit_cnn":
        net = DigitCNN(classes, norm)
    elif name == "alexnet_bn":
        net = AlexNetBN(classes, norm)
    else:
        net = ResNet18(classes, norm, cifar_stem=name == "resnet18_cifar")
    net.apply(he_normal)
    return net


def he_normal(module: nn.Module) -> None:
    """He initialisation of one layer, for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Critic(nn.Module):
    """T(a, b): a score that is high for representations of the same image (a, b of shape (B, d) -> (B,)).

    The parameter-free LayerNorm keeps the score bounded: without it the minimised bound runs away. Always in
    single precision, also under autocast.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(2 * width, hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with own_type(a):
            a, b = (F.layer_norm(v.float(), (self.width,)) for v in (a, b))
            return self.fc2(F.relu(self.fc1(torch.cat([a, b], -1)))).squeeze(-1)


class GaussianCritic(nn.Module):
    """q(b | a), a diagonal Gaussian: log-density of b (B, d) given a (B, d), summed over features -> (B,).

    For the CLUB bound. The log-variance is bounded by tanh, and both inputs are layer-normalised. Always in
    single precision.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(width, hidden)
        self.mean = nn.Linear(hidden, width)
        self.log_variance = nn.Linear(hidden, width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with own_type(a):
            a, b = (F.layer_norm(v.float(), (self.width,)) for v in (a, b))
            hidden = F.relu(self.fc1(a))
            log_variance = torch.tanh(self.log_variance(hidden))
            error = (b - self.mean(hidden)).square() / log_variance.exp()
            return -0.5 * (error + log_variance).sum(-1)


class TwoBranch(nn.Module):
    """One client's model (Figure 2): E_s, E_c, the head P on their concatenation, and the two critics.

    build: returns a new extractor with an attribute `width`; it is called twice, so the branches share no
    tensor. mi: "club" makes T_min a Gaussian q(z_c | z_s); T_max is a Jensen-Shannon critic in every case.
    """

    def __init__(self, build: Callable[[], Classifier], classes: int, hidden: int = 64, mi: str = "jsd"):
        super().__init__()
        self.specific = build()
        self.invariant = build()
        d = self.invariant.width
        self.head = nn.Linear(2 * d, classes)
        self.critic_min = GaussianCritic(d, hidden) if mi == "club" else Critic(d, hidden)
        self.critic_max = Critic(d, hidden)
        for module in (self.head, self.critic_min, self.critic_max):
            module.apply(he_normal)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) -> z_s, z_c, each (B, d)."""
        return self.specific(x), self.invariant(x)

    def forward_head(self, z_s: Tensor, z_c: Tensor) -> Tensor:
        """(..., d), (..., d) -> logits (..., C). The specific part comes first."""
        return self.head(torch.cat([z_s, z_c], -1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> logits (B, C), the `personal` prediction."""
        return self.forward_head(*self.features(x))


def official(name: Literal["digit_cnn", "alexnet_bn"]) -> Classifier:
    """A single-branch network of the public FedBN checkpoints: (B, 3, 28|256, 28|256) -> logits (B, 10)."""
    if name not in ("digit_cnn", "alexnet_bn"):
        raise UserError(f"no official network '{name}': choose digit_cnn or alexnet_bn")
    side = 28 if name == "digit_cnn" else 256
    return build_backbone(name, 10, (3, side, side))


def load_official(name: str, path: Path, which: str = "server_model") -> Classifier:
    """Read one network out of a FedBN checkpoint.

    path: a file with a dict {server_model, model_0 ... model_{K-1} (FedBN mode), a_iter}, or a bare state
    dict. which: the entry to read. Raises UserError naming the entries that exist, or the tensors that do not
    fit.
    """
    net = official(name)
    content = _dict_of(Path(path))
    if any(isinstance(value, dict) for value in content.values()):
        entries = sorted(key for key, value in content.items() if isinstance(value, dict))
        if which not in content:
            raise UserError(f"{path}: no entry '{which}'; the checkpoint holds {', '.join(entries)}")
        content = content[which]
    load_state(net, content, source=str(path))
    return net


def load_extractors(path: Path, net: nn.Module) -> None:
    """Start every backbone in `net` from one state dict, e.g. torchvision's ImageNet ResNet-18.

    The file's own head is left out, and so is a head of `net`. Raises UserError when a tensor does not fit.
    """
    content = _dict_of(Path(path))
    for module in net.modules():
        if isinstance(module, Classifier):
            head = module.head_prefix + "."
            given = {name: value for name, value in content.items() if not name.startswith(head)}
            own = {name: value for name, value in module.state_dict().items() if name.startswith(head)}
            load_state(module, given | own, source=str(path))


def _dict_of(path: Path) -> dict:
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict")
    return content
