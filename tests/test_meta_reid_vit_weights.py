"""ViT trunks from timm's and open_clip's weights."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as ClipTower
from test_meta_reid_vit import SIZE, SMALL, as_map, pictures
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from meta_reid import pretrained
from meta_reid.backbone import PIXELS
from meta_reid.baselines import Plain
from meta_reid.model import META
from meta_reid.pretrained import init_vit, positions, vit_state
from meta_reid.rows import plan, start_from_pretrained
from meta_reid.train import PRESETS
from meta_reid.vit import VITS
from shared.runtime import UserError


def different(network: nn.Module) -> nn.Module:
    """No norm or bias like another, as after training: a new network's are all alike."""
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return network.eval()


def timm_network(size=SIZE, **options) -> VisionTransformer:
    torch.manual_seed(2)
    network = VisionTransformer(
        img_size=size, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0, **options
    )
    return different(network)


def normalised(images: Tensor, which: str) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in PIXELS[which])
    return (images - mean) / std


@pytest.mark.parametrize("name", pretrained.TIMM)
def test_the_full_networks_are_those_whose_weights_they_take(name):
    """timm's network of that name has every weight in its shape, norms, heads and pixels as here."""
    arch = VITS[name]
    with torch.device("meta"):
        theirs = timm.create_model(pretrained.TIMM[name], num_classes=0)
        model = META((3, 3), name, size=(224, 224))  # of the size that the positions were learned on
    state = theirs.state_dict()
    taken = {re.sub(r"(norm\w*)\.\d+\.", r"\1.", key): v for key, v in model.backbone.state_dict().items()}
    kept = {key: value for key, value in taken.items() if "running_" not in key}
    assert {key: value.shape for key, value in kept.items()} == {k: v.shape for k, v in state.items()}
    assert theirs.norm.eps == theirs.blocks[0].norm1.eps == arch.eps
    assert theirs.blocks[0].attn.num_heads == arch.heads
    assert ("Quick" in type(theirs.blocks[0].mlp.act).__name__) == arch.clip
    known = timm.get_pretrained_cfg(pretrained.TIMM[name])
    for ours, of_timm in zip(PIXELS[arch.pixels], (known.mean, known.std), strict=True):
        assert ours == pytest.approx([255 * value for value in of_timm])


@pytest.mark.parametrize("kind", SMALL)
def test_timms_weights_give_timms_features(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.TIMM, "vit-mini", "vit_of_the_test")
    clip = {"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": QuickGELU}
    source = timm_network(**(clip if kind == "clip" else {}))
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    model = META((3, 3, 3), SMALL[kind], size=SIZE).eval()
    state, where = vit_state("vit-mini", tmp_path / "vit.pth")
    for part in (model.backbone, model.backbone_agg):
        init_vit(part, state, where)
    plain = Plain(4, SMALL[kind], size=SIZE).eval()
    init_vit(plain.vit, state, where)
    for network in (source, model, plain):
        network.double()
    with torch.no_grad():
        expected = as_map(source.forward_features(normalised(pictures(), SMALL[kind].pixels))[:, 1:])
        for expert in model.describe(pictures()).experts:
            torch.testing.assert_close(expert, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plain.parts(pictures())[1], expected.mean((2, 3)), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.backbone_agg.blocks["3"].norm2[0].weight, source.blocks[3].norm2.weight)
    assert torch.equal(model.backbone_agg.norm[0].bias, source.norm.bias)


def test_weights_reach_every_set_and_share_no_storage():
    source, model = timm_network(), META((3, 3, 3), SMALL["vit"], size=SIZE)
    for part in (model.backbone, model.backbone_agg):
        init_vit(part, source.state_dict(), "source")
    assert [len(place) for place in model.backbone.units] == [4] * 4 + [3] * 5
    for block, own in zip(model.backbone.blocks, source.blocks, strict=True):
        assert all(torch.equal(norm.weight, own.norm1.weight) for norm in block.norm1)
    # A step of one expert would move the others, or the file's own tensors, if they shared memory.
    tensors = [*model.parameters(), *model.buffers(), *source.parameters()]
    pointers = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("whole", [True, False])
def test_open_clips_weights_give_open_clips_features(whole, tmp_path):
    torch.manual_seed(3)
    tower = different(
        ClipTower(SIZE, 8, 24, 4, 3, 4.0, output_dim=16, act_layer=QuickGELU, output_tokens=True)
    )
    state = {("visual." if whole else "") + name: value for name, value in tower.state_dict().items()}
    torch.save(state | ({"logit_scale": torch.ones(())} if whole else {}), tmp_path / "clip.pt")
    model = META((3, 3), SMALL["clip"], size=SIZE).eval()
    state, where = vit_state("clip-b16", tmp_path / "clip.pt")
    for part in (model.backbone, model.backbone_agg):
        init_vit(part, state, where)
    tower.double(), model.double()
    with torch.no_grad():
        expected = as_map(tower(normalised(pictures(), "clip"))[1])
        for expert in model.describe(pictures()).experts:
            torch.testing.assert_close(expert, expected, rtol=1e-9, atol=1e-9)


def test_positions_are_interpolated_as_timm_does():
    embedding = torch.randn(1, 1 + 14 * 14, 5)
    expected = resample_abs_pos_embed(embedding, [16, 8])
    torch.testing.assert_close(positions(embedding, (16, 8), "file"), expected)
    fits = torch.randn(1, 1 + 16 * 8, 5)
    assert positions(fits, (16, 8), "file") is fits
    with pytest.raises(UserError, match="130 positions"):
        positions(torch.randn(1, 131, 5), (16, 8), "file")


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    state, model = timm_network().state_dict(), META((3, 3), SMALL["vit"], size=SIZE)
    del state["blocks.1.norm1.weight"]
    with pytest.raises(UserError, match="blocks.1.norm1.weight is missing"):
        init_vit(model.backbone, state, "file")
    with pytest.raises(UserError, match="patch_embed.proj.weight has shape"):
        init_vit(model.backbone, state | {"patch_embed.proj.weight": torch.zeros(24, 3, 4, 4)}, "file")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        vit_state("vit-b16", tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no file .*open_clip's file with --weights"):
        vit_state("vit-b16", tmp_path / "none.pth")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(UserError, match=r"could not be downloaded \(no network\).*--weights"):
        vit_state("vit-b16", None)


def test_a_vit_starts_from_the_file_that_weights_names(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.TIMM, "vit-mini", "vit_of_the_test")
    monkeypatch.setitem(VITS, "vit-mini", SMALL["vit"])
    source = timm_network((32, 32))  # of another grid
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    config = replace(
        PRESETS["demo-vit"], height=32, width=16, pretrained=True, weights=tmp_path / "vit.pth",
        variants=("meta", "baseline"),
    )  # fmt: skip
    for row in plan(config, {0: [3, 3, 3]}):
        start_from_pretrained(row.model, row.config)
        vit = row.model.backbone if row.name == "meta-0" else row.model.vit
        assert torch.equal(vit.blocks[3].mlp.fc2.weight, source.blocks[3].mlp.fc2.weight)
        torch.testing.assert_close(vit.pos_embed, positions(source.pos_embed, (4, 2), "file"))
