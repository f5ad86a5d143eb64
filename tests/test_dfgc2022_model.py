"""DFGC 2022: networks under their official names, the reading of released files, the small presets."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import dfgc2022
from dfgc2022 import model
from dfgc2022.model import DETECTORS, OFFICIAL, Xception, fake_probability, load_official, official
from shared.bench import count_macs, count_parameters
from shared.runtime import UserError

KEYS = json.loads((Path(dfgc2022.__file__).parent / "keys.json").read_text())
TINY_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 1)}
TINY_SWIN["num_heads"] = (1, 2, 2)
TINY_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}


@pytest.fixture
def tiny(monkeypatch):
    """The official names, built small."""
    small = {
        "convnext_xlarge_384_in22ft1k": lambda **o: model.convnext(**TINY_CONVNEXT, **o),
        "swin_large_patch4_window12_384_in22k": lambda **o: model.swin(**TINY_SWIN, **o),
        "xception_dfgc21_baseline": lambda **o: Xception(middle=1, width=0.1, **o),
    }
    replaced = {name: model.Detector(build, 32) for name, build in small.items()}
    monkeypatch.setattr(model, "DETECTORS", DETECTORS | replaced)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes(name):
    with torch.device("meta"):
        network = official(name)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == KEYS[name]


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("convnext_xlarge_384_in22ft1k", 348_152_066, 179.0),
        ("swin_large_patch4_window12_384_in22k", 195_201_590, 103.9),
        ("xception_dfgc21_baseline", 20_809_001, 8.36),
    ],
)
def test_official_size_and_cost(name, parameters, gmacs):
    entry = DETECTORS[name]
    with torch.device("meta"):
        network = official(name).eval()
        images = torch.zeros(1, 3, entry.size, entry.size)
    assert count_parameters(network) == parameters
    assert count_macs(network, images) / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("wrap", ["bare", "module", "state_dict"])
def test_released_files_load(tiny, tmp_path, name, wrap):
    torch.manual_seed(1)
    source = official(name).eval()
    state = source.state_dict()
    if wrap == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state} if wrap == "state_dict" else state, tmp_path / "w.pth")
    loaded = load_official(name, tmp_path / "w.pth")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), source(images))


@pytest.mark.parametrize("buffers", [True, False])
def test_swin_under_both_timm_namings(tiny, tmp_path, buffers):
    """Legacy-named weights give the logits of the network that was saved under today's names."""
    torch.manual_seed(2)
    today = timm.models.swin_transformer.SwinTransformer(num_classes=2, **TINY_SWIN).eval()
    legacy = {}
    for key, value in today.state_dict().items():
        key = key.replace("head.fc", "head")
        for layer in (1, 2):
            key = key.replace(f"layers.{layer}.downsample", f"layers.{layer - 1}.downsample")
        legacy[key] = value
    if buffers:
        legacy["layers.0.blocks.1.attn_mask"] = torch.full((64, 16, 16), 7.0)
        legacy["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    images = torch.rand(2, 3, 32, 32)
    for number, state in enumerate((legacy, today.state_dict())):
        torch.save(state, tmp_path / f"{number}.pth")
        loaded = load_official("swin_large_patch4_window12_384_in22k", tmp_path / f"{number}.pth")
        assert torch.equal(loaded(images), today(images))


def test_what_does_not_fit_is_listed(tiny, tmp_path):
    state = official("convnext_xlarge_384_in22ft1k").state_dict()
    state["head.fc.weight"] = torch.zeros(1000, 24)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"head.fc.weight has shape \(1000, 24\) instead of \(2, 24\)"):
        load_official("convnext_xlarge_384_in22ft1k", tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        load_official("convnext_xlarge_384_in22ft1k", tmp_path / "list.pth")
    with pytest.raises(UserError, match="no official network"):
        official("resnet")


@pytest.mark.parametrize("name", OFFICIAL[:2])
def test_imagenet_weights_fill_all_but_the_head(tiny, monkeypatch, tmp_path, name):
    torch.manual_seed(3)
    donor, network = official(name), official(name)
    state = {model.current_name(k) if "swin" in name else k: v for k, v in donor.state_dict().items()}
    if "swin" in name:
        state = {k: v for k, v in state.items() if not k.endswith(("attn_mask", "position_index"))}
    state["head.fc.weight"], state["head.fc.bias"] = torch.zeros(1000, 24), torch.zeros(1000)
    torch.save(state, tmp_path / "w.pth")
    tagged = model.Detector(model.DETECTORS[name].build, 32, imagenet=DETECTORS[name].imagenet)
    monkeypatch.setitem(model.DETECTORS, name, tagged)
    head = {k: v.clone() for k, v in network.state_dict().items() if k.startswith("head")}
    model.load_imagenet(network, name, tmp_path / "w.pth")
    for key, value in network.state_dict().items():
        fresh = key in ("head.weight", "head.bias") or key.startswith("head.fc")
        assert torch.equal(value, head[key] if fresh else donor.state_dict()[key]), key
    with pytest.raises(UserError, match="no file"):
        model.load_imagenet(network, name, tmp_path / "absent.pth")
    torch.save(torch.zeros(3), tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: holds no state dict"):
        model.load_imagenet(network, name, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 64), ("swin_tiny_patch4_window7_224", 112), ("test_convnext", 64)]
)
def test_imagenet_weights_of_any_timm_network_fit_another_side(tmp_path, name, size):
    donor = timm.create_model(name)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    network = model.detector(f"timm/{name}").at(size, num_classes=3)
    model.load_imagenet(network, f"timm/{name}", tmp_path / "w.pth")
    same = next(key for key, _ in donor.named_parameters() if "blocks" in key)
    assert torch.equal(network.get_parameter(same), donor.get_parameter(same))
    if name == "test_vit":
        table = network.pos_embed[0, -16:].view(4, 4, -1)  # 4 x 4 pieces of 16 pixels
        assert torch.allclose(table.mean((0, 1)), donor.pos_embed[0, -100:].mean(0), atol=0.01)


def test_heads_start_as_the_winners_did():
    """A fresh Linear: uniform within 1/sqrt(features), unlike timm's truncated normal of deviation 0.02."""
    torch.manual_seed(0)
    weight = model.convnext(depths=(1, 1, 1, 1), dims=(8, 8, 8, 1024)).head.fc.weight.detach()
    assert weight.abs().max() <= 1024**-0.5
    assert weight.std() == pytest.approx(1024**-0.5 / 3**0.5, rel=0.05)


def test_swin_block_against_a_slow_reference():
    """One shifted block, attention computed window by window and pair by pair with the -100 mask."""
    torch.manual_seed(0)
    network = model.swin(**{**TINY_SWIN, "depths": (2,), "num_heads": (2,)}).eval()
    block = network.layers[0].blocks[1]
    attention = block.attn
    x = torch.randn(1, 16, 16, 8)
    shifted = torch.roll(block.norm1(x), (-2, -2), (1, 2))[0]
    cut = [0 if i < 12 else 1 if i < 14 else 2 for i in range(16)]
    out = torch.zeros(16, 16, 8)
    table = attention.relative_position_bias_table
    for top in range(0, 16, 4):
        for left in range(0, 16, 4):
            cells = [(top + r, left + c) for r in range(4) for c in range(4)]
            tokens = torch.stack([shifted[cell] for cell in cells])
            q, k, v = attention.qkv(tokens).view(16, 3, 2, 4).unbind(1)  # (16, heads, 4) each
            for head in range(2):
                scores = q[:, head] @ k[:, head].T * 4**-0.5
                for i, (r, c) in enumerate(cells):
                    for j, (s, d) in enumerate(cells):
                        scores[i, j] += table[(r - s + 3) * 7 + (c - d + 3), head]
                        if (cut[r], cut[c]) != (cut[s], cut[d]):
                            scores[i, j] -= 100
                mixed = scores.softmax(1) @ v[:, head]
                for i, cell in enumerate(cells):
                    out[cell][head * 4 : head * 4 + 4] = mixed[i]
    expected = x + torch.roll(attention.proj(out), (2, 2), (0, 1))[None]
    expected = expected + block.mlp(block.norm2(expected))
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_xception_computes_what_timms_does():
    """timm carries the same port of Xception that the baseline is made of."""
    torch.manual_seed(0)
    ours = official("xception_dfgc21_baseline").eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.5, 1.5), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(values, low, high)
            for values in (module.bias, module.running_mean):
                nn.init.uniform_(values, -0.2, 0.2)
    theirs = timm.create_model("legacy_xception", num_classes=1).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 101, 101)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5) and ours(images).std() > 0


def test_xception_keeps_the_skip_path_clean():
    """The block's first ReLU must not change the tensor that the skip path reads."""
    block = model.XceptionBlock((4, 4, 4)).eval()
    x = torch.randn(1, 4, 8, 8)
    kept = x.clone()
    assert torch.allclose(block(x) - block.rep(kept.clone()), kept, atol=1e-6)
    assert torch.equal(x, kept)


def test_fake_probability_of_each_head():
    logits = torch.tensor([[0.3, -0.2, 1.1], [2.0, 0.0, 0.5]])
    assert torch.allclose(fake_probability(logits[:, :1]), logits[:, 0].sigmoid())
    assert torch.allclose(fake_probability(logits[:, :2]), logits[:, :2].softmax(1)[:, 1])
    assert torch.allclose(fake_probability(logits), logits.softmax(1)[:, 1:].sum(1))


@pytest.mark.parametrize("name", ["convnext_micro", "swin_micro", "timm/efficientnet_b0"])
def test_small_detectors_give_two_logits_and_features(name):
    entry = model.detector(name)
    network = entry.build().eval()
    images = torch.rand(2, 3, min(entry.size, 64), min(entry.size, 64))
    assert network(images).shape == (2, 2)
    features = model.pooled_features(network, images)
    assert features.shape[0] == 2 and features.ndim == 2


def test_vra_features_skip_the_head_norm():
    network = model.convnext(**TINY_CONVNEXT).eval()
    images = torch.rand(2, 3, 32, 32)
    raw = model.pooled_features(network, images, vra_compat=True)
    normed = model.pooled_features(network, images)
    assert torch.allclose(raw, network.forward_features(images).mean((2, 3)), atol=1e-6)
    norm = network.head.norm
    assert torch.allclose(
        normed, torch.nn.functional.layer_norm(raw, (24,), norm.weight, norm.bias, 1e-6), atol=1e-5
    )


def test_unknown_detectors_are_named():
    with pytest.raises(UserError, match="no detector 'resnet'"):
        model.detector("resnet")
    with pytest.raises(UserError, match="has no ImageNet weights"):
        model.load_imagenet(model.detector("convnext_micro").build(), "convnext_micro", None)
