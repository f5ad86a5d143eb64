"""PIN: the official networks compute what the specification's tables say, by a second forward written from
them, on the weights alone, with random weights in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pin.ais import AISEncoder, AISSelection
from pin.model import official

State = dict[str, Tensor]


# --- a forward from the tables ---------------------------------------------------------------------


def batch_norm(x: Tensor, w: State, at: str) -> Tensor:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, var, scale, shift = (
        w[f"{at}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def slope(x: Tensor, w: State, at: str) -> Tensor:
    """PReLU with one slope per channel."""
    negative = w[f"{at}.weight"].view((1, -1) + (1,) * (x.dim() - 2))
    return torch.where(x > 0, x, negative * x)


def conv(x: Tensor, w: State, at: str, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{at}.weight"], w.get(f"{at}.bias"), stride, padding)


def linear(x: Tensor, w: State, at: str) -> Tensor:
    y = x @ w[f"{at}.weight"].T
    return y + w[f"{at}.bias"] if f"{at}.bias" in w else y


def dae(x: Tensor, w: State) -> tuple[Tensor, Tensor]:
    def pass_through(x: Tensor) -> Tensor:
        for i in range(3):
            at = f"encoder1.{i}"
            x = slope(conv(x, w, f"{at}.conv1"), w, f"{at}.nolinear1")
            x = slope(conv(x, w, f"{at}.conv2", stride=2), w, f"{at}.nolinear2")
        for i in range(3):
            at = f"decoder1.{i}"
            x = F.conv_transpose2d(x, w[f"{at}.conv1.weight"], None, 2, 1, output_padding=1)
            x = conv(slope(x, w, f"{at}.nolinear1"), w, f"{at}.conv2")
            x = x.tanh() if i == 2 else slope(x, w, f"{at}.nolinear2")
        return x

    once = pass_through(x)
    return once, pass_through(once)  # the same weights twice


def encoder(x: Tensor, w: State, normed: bool = False) -> Tensor:
    """PIN's trunk, or AIS' with batch norm after conv1, conv2 and the shortcut's convolution."""

    def norm(x: Tensor, at: str) -> Tensor:
        return batch_norm(x, w, at) if normed else x

    x = slope(conv(x, w, "in_layer.0"), w, "in_layer.1")
    for i in range(1, 9):
        at, stride = f"block{i}", 2 if i % 2 else 1
        y = slope(norm(conv(x, w, f"{at}.conv1"), f"{at}.bn1"), w, f"{at}.nolinear1")
        y = slope(norm(conv(y, w, f"{at}.conv2", stride), f"{at}.bn2"), w, f"{at}.nolinear2")
        x = y + norm(conv(x, w, f"{at}.shortcut_layer.0", stride, 0), f"{at}.shortcut_layer.1")
    return x


def pca_layer(x: Tensor, w: State) -> Tensor:
    return 1 / (1 + (-linear(slope(linear(x.flatten(1), w, "fc1.1"), w, "fc1.2"), w, "fc2.0")).exp())


def ais_pca_layer(x: Tensor, w: State) -> Tensor:
    z = slope(batch_norm(linear(x.flatten(1), w, "fc1.1"), w, "fc1.2"), w, "fc1.3")
    items = w["memory.units.weight"]  # (128, 512)
    lengths = z.norm(dim=1)[:, None] * items.norm(dim=1)
    scores = (z @ items.T / lengths).exp()
    recalled = scores / scores.sum(1, keepdim=True) @ items
    return 1 / (1 + (-batch_norm(linear(recalled, w, "fc2.0"), w, "fc2.1")).exp())


def arcface(x: Tensor, w: State, pin: bool, se: bool) -> Tensor:
    x = slope(batch_norm(conv(x, w, "input_layer.0"), w, "input_layer.1"), w, "input_layer.2")
    unit, width = 0, 64
    for outputs, count in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for i in range(count):
            at, stride = f"body.{unit}", 1 if i else 2
            layers = iter(range(10))
            layer = lambda at=at, layers=layers: f"{at}.res_layer.{next(layers)}"  # noqa: E731
            y = conv(batch_norm(x, w, layer()), w, layer())
            if pin:
                y = batch_norm(y, w, layer())
            y = batch_norm(conv(slope(y, w, layer()), w, layer(), stride), w, layer())
            if se:
                gate = layer()
                squeezed = conv(y.mean((2, 3), keepdim=True), w, f"{gate}.fc1", padding=0).clamp_min(0)
                y = y * (1 / (1 + (-conv(squeezed, w, f"{gate}.fc2", padding=0)).exp()))
            if stride == 2 and (pin or width != outputs):
                x = batch_norm(conv(x, w, f"{at}.shortcut_layer.0", 2, 0), w, f"{at}.shortcut_layer.1")
            else:
                x = x[..., ::stride, ::stride]
            x, unit, width = x + y, unit + 1, outputs
    x = batch_norm(x, w, "output_layer.0").flatten(1)  # dropout does nothing here
    x = batch_norm(linear(x, w, "output_layer.3"), w, "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


def halves(y: Tensor) -> Tensor:
    middle = y.shape[1] // 2
    return torch.where(y[:, :middle] > y[:, middle:], y[:, :middle], y[:, middle:])


def mfm(x: Tensor, w: State, at: str, padding: int = 1) -> Tensor:
    return halves(conv(x, w, f"{at}.filter", padding=padding))


def group(x: Tensor, w: State, at: str) -> Tensor:
    return mfm(mfm(x, w, f"{at}.conv_a", 0), w, f"{at}.conv")


def windows(x: Tensor) -> Tensor:
    """The four pixels of every 2 x 2 window: (B, C, H, W) -> (B, C, H / 2, W / 2, 4)."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)


def lightcnn9(x: Tensor, w: State) -> Tensor:
    x = windows(mfm(x, w, "features.0", 2)).amax(-1)
    x = windows(group(x, w, "features.2")).amax(-1)
    x = windows(group(x, w, "features.4")).amax(-1)
    x = windows(group(group(x, w, "features.6"), w, "features.7")).amax(-1)
    return halves(linear(x.flatten(1), w, "fc1.filter"))


def lightcnn29(x: Tensor, w: State, v2: bool = False) -> Tensor:
    def pool(x: Tensor) -> Tensor:
        return windows(x).amax(-1) + windows(x).mean(-1) if v2 else windows(x).amax(-1)

    def blocks(x: Tensor, number: int) -> Tensor:
        for i in range(number):  # block n has n residual units
            at = f"block{number}.{i}"
            x = x + mfm(mfm(x, w, f"{at}.conv1"), w, f"{at}.conv2")
        return x

    x = pool(mfm(x, w, "conv1", 2))
    x = pool(group(blocks(x, 1), w, "group1"))
    x = pool(group(blocks(x, 2), w, "group2"))
    x = group(blocks(x, 3), w, "group3")
    x = pool(group(blocks(x, 4), w, "group4")).flatten(1)
    return linear(x, w, "fc") if v2 else halves(linear(x, w, "fc.filter"))


# --- against the networks ---------------------------------------------------------------------------


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep signals of about one size, and statistics, scales and slopes that all matter."""
    network = network.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            if value.dim() > 1:
                value.normal_(0, 1 / math.sqrt(value[0].numel()), generator=generator)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.3, generator=generator)
            else:
                value.uniform_(0.2, 1.4, generator=generator)
    return network


# Where a network allows it, faces smaller than 112 x 112, in the time of a few seconds.
FACE, LARGE, COLOUR, MAPS = (2, 1, 40, 40), (1, 1, 128, 128), (2, 3, 48, 48), (2, 512, 7, 7)
CASES = {
    "dae": ("dae", {}, FACE, dae),
    "encoder": ("encoder", {}, FACE, encoder),
    "pca_layer": ("pca_layer", {}, MAPS, pca_layer),
    "ais_encoder": ("ais_encoder", {}, FACE, lambda x, w: encoder(x, w, normed=True)),
    "ais_pca_layer": ("ais_pca_layer", {}, MAPS, ais_pca_layer),
    "IR-SE50, PIN": ("arcface_ir_se50", {"size": 48}, COLOUR, lambda x, w: arcface(x, w, True, True)),
    "IR-SE50, InsightFace_Pytorch": (
        "arcface_ir_se50",
        {"size": 48, "variant": "insightface_pytorch"},
        COLOUR,
        lambda x, w: arcface(x, w, False, True),
    ),
    "IR-50": ("arcface_ir50", {"size": 48}, COLOUR, lambda x, w: arcface(x, w, True, False)),
    "Light CNN 9": ("lightcnn9", {"classes": 2}, LARGE, lightcnn9),
    "Light CNN 29": ("lightcnn29", {"classes": 2}, LARGE, lightcnn29),
    "Light CNN 29 v2": ("lightcnn29_v2", {"classes": 2}, LARGE, lambda x, w: lightcnn29(x, w, v2=True)),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_networks_compute_what_the_specification_says(case):
    name, options, shape, reference = CASES[case]
    network = randomise(official(name, **options))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    ours, expected = network(x), reference(x, network.state_dict())
    if not isinstance(ours, tuple):
        ours, expected = (ours,), (expected,)
    for one, two in zip(ours, expected, strict=True):
        assert one.shape == two.shape and two.std() > 1e-3
        torch.testing.assert_close(one, two.to(one.dtype), atol=1e-5, rtol=1e-5)


def test_ais_memory_follows_and_replaces():
    torch.manual_seed(0)
    head = AISSelection(64, 16, 10, items=4)
    encoder = AISEncoder((4, 8))
    features = encoder(torch.randn(6, 1, 8, 8))
    assert features.shape == (6, 8, 2, 2)
    memory = head.memory
    z = torch.randn(6, 16)
    before = memory.units.weight.clone()
    output = memory(z)
    cosine = torch.nn.functional.cosine_similarity(z[:, None], before[None], dim=2)
    nearest = cosine.argmax(1)
    expected = before.clone()
    for item in nearest.unique():
        expected[item] = 0.999 * before[item] + 0.001 * z[nearest == item].mean(0)
    torch.testing.assert_close(memory.units.weight, expected)
    weights = torch.nn.functional.cosine_similarity(z[:, None], expected[None], dim=2).softmax(1)
    torch.testing.assert_close(output, weights @ expected)
    memory.decay_unused = True
    untouched = [item for item in range(4) if item not in nearest.tolist()]
    memory(z)
    torch.testing.assert_close(memory.units.weight[untouched], 0.999 * expected[untouched])
