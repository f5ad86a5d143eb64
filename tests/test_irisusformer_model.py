"""IrisUsformer's networks: cost, layers against slow references, switches, sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from irisusformer.baselines import IrisParseNet, UNet
from irisusformer.model import (
    SIZES,
    Attention,
    Block,
    IrisUsformer,
    LayerNorm2d,
    fold_batch_norm,
    pad_to_stride,
    readout,
)
from irisusformer.naive import naive
from shared.bench import count_macs, count_parameters


def meta_macs(model: nn.Module, height: int, width: int, **options) -> float:
    model = model.to("meta").eval()
    image = torch.zeros(1, 3, height, width, device="meta")
    return count_macs(lambda: model(image, **options)) / 1e9


def closed_form(size: str, height: int, width: int) -> float:
    """Multiply-accumulates of mask and uncertainty in 1e9, summed by hand from the layer list."""
    s = SIZES[size]
    pixels = [height * width / 4**level for level in range(5)]

    def block(level):
        c, r, n = s.dims[level], s.reductions[level], pixels[level + 1]
        kernel, keys = ((r + 1) ** 2 if r > 1 else 9), n / r**2
        query = n * (9 * c + c * c)
        key_value = 2 * keys * (kernel * c + c * c)
        return query + key_value + 2 * n * keys * c + n * c * c + n * (2 * s.ratio * c * c + 9 * s.ratio * c)

    total = 27 * s.stem * pixels[0]
    widths = (s.stem, *s.dims)
    for level in range(4):
        total += 9 * widths[level] * widths[level + 1] * pixels[level + 1] + s.encoder_depths[level] * block(
            level
        )
    for i, level in enumerate((2, 1, 0)):
        c = s.dims[level]
        total += 9 * (s.dims[level + 1] * c + 2 * c * c) * pixels[level + 1] + s.decoder_depths[i] * block(
            level
        )
    full = s.dims[0] + s.stem
    total += pixels[0] * (9 * full * (s.fine + 16) + s.fine + 16)
    return total / 1e9


@pytest.mark.parametrize(
    ("size", "parameters", "mask", "both", "height", "width"),
    [
        ("base", 12.01, 90.70, 93.89, 480, 640),
        ("base", 12.01, 34.7, 36.1, 320, 416),
        ("base", 12.01, 26.1, 27.1, 320, 320),
        ("lite", 6.23, 52.3, 54.8, 480, 640),
        ("small", 2.32, 23.35, 25.13, 480, 640),
        ("tiny", 0.55, 0.06, 0.08, 64, 64),
    ],
)
def test_cost(size, parameters, mask, both, height, width):
    model = IrisUsformer(size)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=0.005)
    digits = 0.006 if mask in (90.70, 0.06) else 0.06
    assert meta_macs(model, height, width, return_uncertainty=False) == pytest.approx(mask, abs=digits)
    assert meta_macs(model, height, width) == pytest.approx(both, abs=digits)
    assert meta_macs(model, height, width) == pytest.approx(closed_form(size, height, width), rel=1e-6)


def test_base_costs_35_percent_of_irisparsenet():
    reference = IrisParseNet()
    assert count_parameters(reference) / 1e6 == pytest.approx(31.298, abs=0.001)
    full = meta_macs(reference, 481, 641)
    assert full == pytest.approx(263.41, abs=0.01)
    assert 0.33 < meta_macs(IrisUsformer("base"), 480, 640, return_uncertainty=False) / full < 0.37
    assert 0.33 < meta_macs(IrisUsformer("base"), 480, 640) / full < 0.37
    bitrans = IrisUsformer("lite", arch="bitrans")
    assert meta_macs(bitrans, 480, 640, return_uncertainty=False) / full == pytest.approx(0.20, abs=0.005)


def test_plain_network_is_pointwise_but_for_the_stem_and_costs_what_the_readme_says():
    plain = IrisUsformer("base", position_sensitive=False)
    spread = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size > m.stride]
    assert spread == ["stem.0"]
    assert count_parameters(plain) / 1e6 == pytest.approx(8.81, abs=0.005)
    assert meta_macs(plain, 480, 640) == pytest.approx(58.65, abs=0.006)


def test_auxiliary_head_of_base_has_10417_parameters():
    assert count_parameters(IrisUsformer("base").aux_head) == 10417


def test_unet_has_31_million_parameters():
    model = UNet()
    assert count_parameters(model) / 1e6 == pytest.approx(31.04, abs=0.01)
    assert meta_macs(model, 480, 640) == pytest.approx(225.94, rel=0.001)
    assert UNet(4)(torch.rand(2, 3, 32, 48))["logits"].shape == (2, 1, 32, 48)


def test_irisparsenet_returns_three_maps_of_the_input_size():
    out = IrisParseNet().eval()(torch.rand(1, 3, 33, 49))
    assert out["logits"].shape == (1, 1, 33, 49) and out["regions"].shape == (1, 2, 33, 49)


@pytest.mark.parametrize("reduction", [1, 4])
def test_attention_equals_a_loop_over_queries(reduction):
    torch.manual_seed(0)
    attention = Attention(8, 2, reduction).eval()
    y = torch.randn(1, 8, 8, 12)
    query = attention.query(attention.query_map(y))
    both = attention.key_value_map(y)
    key, value = attention.key(both[:, 0::2]), attention.value(both[:, 1::2])
    assert key.shape[-2:] == (8 // reduction, 12 // reduction)
    expected = torch.zeros(8, 8, 12)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(8):
            for j in range(12):
                scores = (query[0, head, i, j, None, None] * key[0, head]).sum(0).flatten() / 4**0.5
                expected[head, i, j] = value[0, head].flatten(1) @ scores.softmax(0)
    torch.testing.assert_close(attention(y), attention.out(expected[None]), atol=1e-5, rtol=1e-4)


def test_layer_norm_normalises_the_channels_of_each_pixel():
    x = torch.randn(2, 6, 3, 4)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(LayerNorm2d(6)(x), (x - mean) / (var + 1e-6).sqrt(), atol=1e-5, rtol=1e-4)


def test_only_the_plain_block_ignores_positions():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 4, 4)
    order = torch.randperm(16)

    def shuffle(z):
        return z.flatten(2)[..., order].unflatten(2, (4, 4))

    plain = Block(8, 2, 1, 2, position_sensitive=False).eval()
    torch.testing.assert_close(plain(shuffle(x)), shuffle(plain(x)), atol=1e-5, rtol=1e-4)
    ours = Block(8, 2, 1, 2).eval()
    assert (ours(shuffle(x)) - shuffle(ours(x))).abs().max() > 1e-3


@pytest.mark.parametrize("height, width", [(64, 64), (50, 71), (1, 1), (20, 15), (97, 33)])
def test_any_input_size(height, width):
    out = IrisUsformer("tiny", boundaries=True).eval()(torch.rand(1, 3, height, width))
    assert {name: tuple(value.shape[1:]) for name, value in out.items()} == {
        "logits": (1, height, width),
        "aux": (1, height, width),
        "regions": (2, height, width),
    }


def test_padding_reflects_right_and_bottom():
    x = torch.rand(1, 3, 40, 64)
    padded = pad_to_stride(x)
    assert padded.shape == (1, 3, 64, 64)
    torch.testing.assert_close(padded[..., 40:, :], x[..., 15:39, :].flip(2))
    assert torch.equal(pad_to_stride(padded), padded)


SWITCHES = [
    {"position_sensitive": False},
    {"position_sensitive": False, "pos_embed": "learned"},
    {"aux_at": "d2"},
    {"mixer": "conv"},
    {"arch": "bitrans"},
    {"fast_up": True},
    {"dropout": 0.1},
    {"mode": "two_head"},
    {"mode": "free"},
    {"mode": "ce", "boundaries": True},
]


@pytest.mark.parametrize("switches", SWITCHES)
def test_switches_train_every_parameter(switches):
    torch.manual_seed(0)
    model = IrisUsformer("tiny", **switches)
    out = model(torch.rand(2, 3, 64, 64))
    sum(value.square().mean() for value in out.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_uncertainty_branch_is_computed_only_when_asked_for():
    model = IrisUsformer("tiny").eval()
    image = torch.rand(1, 3, 64, 64)
    assert "aux" not in model(image, return_uncertainty=False)
    torch.testing.assert_close(model(image, return_uncertainty=False)["logits"], model(image)["logits"])


def test_fast_up_costs_less():
    slow, fast = (meta_macs(IrisUsformer("base", fast_up=fast_up), 480, 640) for fast_up in (False, True))
    assert fast == pytest.approx(slow - 0.75 * (4.34 + 4.34 + 4.34), abs=0.02)


def settled(**switches) -> IrisUsformer:
    """A network whose BatchNorms have seen data and have weights of their own."""
    torch.manual_seed(0)
    model = IrisUsformer("tiny", **switches)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    for _ in range(3):
        model(torch.rand(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("switches", [{}, {"arch": "bitrans"}, {"position_sensitive": False}])
def test_folding_batch_norm_changes_nothing(switches):
    model = settled(**switches)
    folded = fold_batch_norm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    image = torch.rand(1, 3, 96, 64)
    for name, value in model(image).items():
        torch.testing.assert_close(folded(image)[name], value, atol=1e-4, rtol=1e-4)


def test_naive_version_is_the_same_function():
    model = settled()
    image = torch.rand(1, 3, 64, 96)
    for name, value in naive(model)(image).items():
        torch.testing.assert_close(value, model(image)[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position_sensitive", [True, False])
def test_initial_weights_of_blocks_are_small_and_of_other_convolutions_kaimings(position_sensitive):
    torch.manual_seed(0)
    model = IrisUsformer("tiny", position_sensitive=position_sensitive)
    for conv in (model.ups[0].conv[0], model.fusions[0].conv[0], model.fine[0], model.aux_head[0][0]):
        kaiming = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(kaiming, rel=0.1)
    for conv in (model.encoder[0][0].mix.query, model.decoder[0][0].ffn.expand):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_initial_probability_is_the_prior():
    torch.manual_seed(0)
    prob = IrisUsformer("tiny").eval().predict(torch.rand(1, 3, 64, 64))["prob"]
    assert prob.mean().item() == pytest.approx(0.1, abs=0.02)


def test_predict_reads_mask_uncertainty_and_high_region():
    model = settled(boundaries=True)
    image = torch.rand(2, 3, 40, 50)
    out, raw = model.predict(image, tau=0.2), model(image)
    torch.testing.assert_close(out["logits"], raw["logits"])
    torch.testing.assert_close(out["prob"], raw["logits"].sigmoid())
    torch.testing.assert_close(out["uncertainty"], raw["aux"].sigmoid())
    assert torch.equal(out["mask"], (out["prob"] >= 0.5).to(torch.uint8))
    assert torch.equal(out["high_region"], out["uncertainty"] > 0.2)
    torch.testing.assert_close(out["outer"], raw["regions"][:, 1:].sigmoid())


def test_uncertainty_of_the_modes():
    logits, aux = torch.tensor([0.3]), torch.tensor([-1.2])
    p, q = logits.sigmoid(), aux.sigmoid()
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(readout("two_head", logits, aux)["uncertainty"], 1 - torch.exp(-divergence))
    free = 1 - torch.exp(-F.softplus(aux - 2))
    torch.testing.assert_close(readout("free", logits, aux)["uncertainty"], free)
    assert readout("ce", logits, logits)["uncertainty"] == 0
