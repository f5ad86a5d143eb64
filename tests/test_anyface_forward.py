"""AnyFace's official networks against forward passes written here from their parameters alone."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.encoder import E4E, IRSE50
from anyface.lightcnn import LightCNN9, LightCNN29v2
from anyface.model import Stream
from anyface.stylegan2 import Discriminator, Generator

State = dict[str, Tensor]
BLOCKS = ((8, 2), (16, 2), (24, 2), (32, 1))


@pytest.fixture(autouse=True)
def exact():
    """Double precision, so that only another computation makes a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(network: nn.Module) -> State:
    """Every parameter and statistic moved off its first value, which would hide a missing bias or norm."""
    rng = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.is_floating_point() and "kernel" not in name:
            value.add_(torch.randn(value.shape, generator=rng) * 0.2)
    return network.eval().state_dict()


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def equal_linear(p: State, name: str, x: Tensor, lr_mul: float = 1.0) -> Tensor:
    weight = p[f"{name}.weight"] * lr_mul / math.sqrt(x.shape[1])
    return x @ weight.T + p[f"{name}.bias"] * lr_mul


def blur(x: Tensor, before: int, after: int, gain: float = 1.0) -> Tensor:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (torch.outer(row, row) * gain).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


# --- StyleGAN2 ------------------------------------------------------------------------------------


def slow_generator(p: State, codes: Tensor) -> Tensor:
    """One sample after the other, its modulated weights made explicitly; stored noise."""

    def modulated(name: str, x: Tensor, code: Tensor, demodulate: bool, up: bool) -> Tensor:
        weight = p[f"{name}.conv.weight"][0]
        style = equal_linear(p, f"{name}.conv.modulation", code[None])[0]
        weight = weight * style[None, :, None, None] / math.sqrt(weight[0].numel())
        if demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            return blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 1, 4)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def styled(name: str, x: Tensor, code: Tensor, noise: int, up: bool = False) -> Tensor:
        x = modulated(name, x, code, True, up) + p[f"{name}.noise.weight"] * p[f"noises.noise_{noise}"]
        return leaky(x + p[f"{name}.activate.bias"].view(1, -1, 1, 1))

    def coloured(name: str, x: Tensor, code: Tensor, below: Tensor | None) -> Tensor:
        rgb = modulated(name, x, code, False, False) + p[f"{name}.bias"]
        if below is None:
            return rgb
        spread = torch.zeros(1, 3, 2 * below.shape[2], 2 * below.shape[3])
        spread[..., ::2, ::2] = below
        return rgb + blur(spread, 2, 1, 4)

    pictures = []
    for code in codes:
        x = styled("conv1", p["input.input"], code[0], 0)
        rgb = coloured("to_rgb1", x, code[1], None)
        for block in range((codes.shape[1] - 2) // 2):
            i = 1 + 2 * block
            x = styled(f"convs.{2 * block}", x, code[i], i, up=True)
            x = styled(f"convs.{2 * block + 1}", x, code[i + 1], i + 1)
            rgb = coloured(f"to_rgbs.{block}", x, code[i + 2], rgb)
        pictures.append(rgb)
    return torch.cat(pictures)


CHANNELS = {4: 12, 8: 10, 16: 8, 32: 6}


@pytest.mark.parametrize("modulation", ["scaled", "grouped"])
def test_generator(modulation):
    torch.manual_seed(0)
    network = Generator(32, style_dim=16, n_mlp=3, channels=CHANNELS, modulation=modulation)
    p = lively(network)
    z = torch.randn(2, 16)
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in (1, 2, 3):
        w = leaky(equal_linear(p, f"style.{layer}", w, 0.01))
    torch.testing.assert_close(network.mapping(z), w)
    codes = torch.randn(2, 8, 16)
    wanted = slow_generator(p, codes)
    torch.testing.assert_close(network.synthesis(codes), wanted)
    assert wanted.std() > 0.1


def slow_discriminator(p: State, x: Tensor) -> Tensor:
    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = p[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), stride=stride, padding=padding)

    def active(name: str, x: Tensor) -> Tensor:
        return leaky(x + p[f"{name}.bias"].view(1, -1, 1, 1))

    x = active("convs.0.1", conv("convs.0.0", x))
    blocks = len({key.split(".")[1] for key in p if key.startswith("convs.")}) - 1
    for i in range(1, blocks + 1):
        y = active(f"convs.{i}.conv1.1", conv(f"convs.{i}.conv1.0", x))
        y = active(f"convs.{i}.conv2.2", conv(f"convs.{i}.conv2.1", blur(y, 2, 2), 2))
        x = (y + conv(f"convs.{i}.skip.1", blur(x, 1, 1), 2)) / math.sqrt(2)
    group = min(4, len(x))
    others = len(x) // group
    feature = torch.zeros(len(x), 1, *x.shape[2:])
    for j in range(others):  # members of a group are `others` apart
        members = x[j::others]
        feature[j::others] = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
    x = active("final_conv.1", conv("final_conv.0", torch.cat((x, feature), 1))).flatten(1)
    return equal_linear(p, "final_linear.1", leaky(equal_linear(p, "final_linear.0", x)))


def test_discriminator():
    torch.manual_seed(0)
    network = Discriminator(32, channels=CHANNELS)
    x = torch.randn(8, 3, 32, 32)
    wanted = slow_discriminator(lively(network), x)
    torch.testing.assert_close(network(x), wanted)
    assert wanted.std() > 0.01


# --- IR-SE50, e4e ---------------------------------------------------------------------------------


def norm(p: State, name: str, x: Tensor) -> Tensor:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, variance, weight, bias = (
        p[f"{name}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def prelu(p: State, name: str, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * p[f"{name}.weight"].view(1, -1, 1, 1))


def slow_body(p: State, x: Tensor) -> list[Tensor]:
    """Outputs of all units; the first unit of a group halves the side."""
    x = prelu(p, "input_layer.2", norm(p, "input_layer.1", F.conv2d(x, p["input_layer.0.weight"], padding=1)))
    outputs, width = [], x.shape[1]
    for number, stride in enumerate(s for _, count in BLOCKS for s in [2] + [1] * (count - 1)):
        name = f"body.{number}.res_layer"
        y = F.conv2d(norm(p, f"{name}.0", x), p[f"{name}.1.weight"], padding=1)
        y = F.conv2d(prelu(p, f"{name}.2", y), p[f"{name}.3.weight"], stride=stride, padding=1)
        y = norm(p, f"{name}.4", y)
        gate = F.conv2d(y.mean((2, 3), keepdim=True), p[f"{name}.5.fc1.weight"]).clamp_min(0)
        y = y * torch.sigmoid(F.conv2d(gate, p[f"{name}.5.fc2.weight"]))
        if y.shape[1] == width:
            x = x[..., ::stride, ::stride]
        else:
            short = f"body.{number}.shortcut_layer"
            x = norm(p, f"{short}.1", F.conv2d(x, p[f"{short}.0.weight"], stride=stride))
        x, width = x + y, y.shape[1]
        outputs.append(x)
    return outputs


def test_identity_network():
    torch.manual_seed(0)
    network = IRSE50(32, BLOCKS, 12)
    p, x = lively(network), torch.randn(2, 3, 32, 32)
    y = norm(p, "output_layer.0", slow_body(p, x)[-1]).flatten(1)
    y = norm(p, "output_layer.4", y @ p["output_layer.3.weight"].T + p["output_layer.3.bias"])
    wanted = (y / y.square().sum(1, keepdim=True).sqrt()).float()
    torch.testing.assert_close(network(x), wanted)  # single precision whatever the trunk's


def test_e4e_encoder():
    torch.manual_seed(0)
    network = E4E(9, 16, 64, BLOCKS)
    p, x = lively(network), torch.randn(2, 3, 64, 64)
    units = slow_body(p, x)
    ends = [sum(count for _, count in BLOCKS[: i + 1]) - 1 for i in range(4)]

    def twice(x: Tensor) -> Tensor:
        """Bilinear, corners on corners."""
        n = x.shape[-1]
        places = torch.arange(2 * n) * (n - 1) / (2 * n - 1)
        weights = (1 - (places[:, None] - torch.arange(n)).abs()).clamp_min(0)
        return weights @ x @ weights.T

    coarse = units[ends[3]]
    middle = twice(coarse) + F.conv2d(units[ends[2]], p["latlayer1.weight"], p["latlayer1.bias"])
    fine = twice(middle) + F.conv2d(units[ends[1]], p["latlayer2.weight"], p["latlayer2.bias"])
    codes = []
    for i in range(9):
        y, layer = coarse if i < 3 else middle if i < 7 else fine, 0
        while y.shape[-1] > 1:
            conv = f"styles.{i}.convs.{2 * layer}"
            y = F.conv2d(y, p[f"{conv}.weight"], p[f"{conv}.bias"], stride=2, padding=1)
            y, layer = torch.where(y > 0, y, 0.01 * y), layer + 1
        code = equal_linear(p, f"styles.{i}.linear", y.flatten(1))
        codes.append(code if i == 0 else codes[0] + code)
    torch.testing.assert_close(network(x), torch.stack(codes, 1))


# --- Light CNN ------------------------------------------------------------------------------------


def mfm(p: State, name: str, x: Tensor) -> Tensor:
    weight, bias = p[f"{name}.filter.weight"], p[f"{name}.filter.bias"]
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2) if x.ndim == 4 else x @ weight.T + bias
    return torch.maximum(y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :])


def group(p: State, name: str, x: Tensor) -> Tensor:
    return mfm(p, f"{name}.conv", mfm(p, f"{name}.conv_a", x))


def quarters(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (4, B, C, H/2, W/2): the four pixels that a pooling of 2 sees."""
    return torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])


def test_light_cnn_9():
    torch.manual_seed(0)
    network = LightCNN9(5)
    p = lively(network)
    x = y = torch.rand(2, 1, 128, 128)
    y = quarters(mfm(p, "features.0", y)).amax(0)
    y = quarters(group(p, "features.2", y)).amax(0)
    y = quarters(group(p, "features.4", y)).amax(0)
    y = quarters(group(p, "features.7", group(p, "features.6", y))).amax(0)
    torch.testing.assert_close(network(x), mfm(p, "fc1", y.flatten(1)))


def test_light_cnn_29_v2():
    torch.manual_seed(0)
    network = LightCNN29v2(5)
    p = lively(network)

    def pooled(x: Tensor) -> Tensor:
        return quarters(x).amax(0) + quarters(x).mean(0)

    def stage(number: int, x: Tensor) -> Tensor:
        for i in range(number):
            block = f"block{number}.{i}"
            x = x + mfm(p, f"{block}.conv2", mfm(p, f"{block}.conv1", x))
        return group(p, f"group{number}", x)

    x = torch.rand(2, 1, 128, 128)
    y = pooled(stage(2, pooled(stage(1, pooled(mfm(p, "conv1", x))))))
    y = pooled(stage(4, stage(3, y))).flatten(1)
    torch.testing.assert_close(network(x), y @ p["fc.weight"].T + p["fc.bias"])


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_stream(together):
    """Post-norm transformer layers, then five equalised linear layers, all of them activated."""
    torch.manual_seed(0)
    network = Stream(
        16, (2, 4), n_latent=6, style_dim=4, layers=2, heads=4, feedforward=24, batch_as_sequence=together
    )
    p, features = lively(network), torch.randn(3, 16)

    def layer_norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = features
    for i in range(2):
        name = f"transformer_encoder.layers.{i}"
        qkv = x @ p[f"{name}.self_attn.in_proj_weight"].T + p[f"{name}.self_attn.in_proj_bias"]
        q, k, v = qkv.chunk(3, 1)
        mixed = torch.zeros_like(x)
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            scores = q[:, part] @ k[:, part].T / 2
            if not together:  # every sample alone: it attends to itself
                scores = scores.masked_fill(~torch.eye(3, dtype=torch.bool), -math.inf)
            mixed[:, part] = scores.softmax(1) @ v[:, part]
        out = mixed @ p[f"{name}.self_attn.out_proj.weight"].T + p[f"{name}.self_attn.out_proj.bias"]
        x = layer_norm(f"{name}.norm1", x + out)
        hidden = (x @ p[f"{name}.linear1.weight"].T + p[f"{name}.linear1.bias"]).clamp_min(0)
        x = layer_norm(
            f"{name}.norm2", x + hidden @ p[f"{name}.linear2.weight"].T + p[f"{name}.linear2.bias"]
        )
    codes, phi = network(features)
    torch.testing.assert_close(phi, x)
    for i in range(3):
        x = leaky(equal_linear(p, f"mapping.{i}", x, 0.01))
    torch.testing.assert_close(codes, x.view(3, 6, 4))
