"""META against its description written out plainly: one pass after the other, tensors by official name."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from meta_reid.backbone import ARCHITECTURES, Architecture, GlobalTail, Trunk
from meta_reid.model import META, official
from meta_reid.pretrained import imagenet_name
from meta_reid.rows import plan, start_from_pretrained
from meta_reid.train import PRESETS

SMALL = Architecture(True, (1, 2, 2, 2), planes=(2, 4, 8, 16))
POSITIONS = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
EXPERTS = (1, 2, 3)
GLOBAL = 4


def randomise(model: nn.Module) -> nn.Module:
    """Norms as after training, each set with its own statistics and parameters."""
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data = torch.rand(module.num_features, generator=rng) + 0.5
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data = 0.3 * torch.randn(module.num_features, generator=rng)
    return model


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """BN with running statistics, eps 1e-5, over dimension 1."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(1, -1, *[1] * (x.ndim - 2))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def instance_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """IN with affine, eps 1e-5, biased variance."""
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)


def bottleneck(state: dict[str, Tensor], at: str, x: Tensor, stride: int, norm, downsample: int, k: int):
    """ResNet v1 bottleneck, the stride in the 3x3 convolution; k: number of its set of norms."""
    y = norm(f"{at}.bn1{k}", F.conv2d(x, state[f"{at}.conv1.weight"])).relu()
    y = norm(f"{at}.bn2{k}", F.conv2d(y, state[f"{at}.conv2.weight"], stride=stride, padding=1)).relu()
    y = norm(f"{at}.bn3{k}", F.conv2d(y, state[f"{at}.conv3.weight"]))
    if f"{at}.downsample.0.weight" in state:
        x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
        x = norm(f"{at}.downsample.{downsample}", x)
    return (y + x).relu()


def one_pass(state: dict[str, Tensor], images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Trunk with set k: its map, for the global set where its branch leaves, and r, (B, L)."""
    distances = []

    def norm(name: str, x: Tensor) -> Tensor:
        mean, deviation = state[f"{name}.running_mean"], state[f"{name}.running_var"].sqrt()
        square = (mean - x.mean((2, 3))).square() + (deviation - x.var((2, 3)).sqrt()).square()
        distances.append(square.sum(1).sqrt())
        return batch_norm(state, name, x)

    mean = torch.tensor([123.675, 116.28, 103.53]).double().view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).double().view(1, 3, 1, 1)
    x = F.conv2d((images - mean) / std, state["backbone.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(f"backbone.bn1{k}", x).relu(), 3, 2, ceil_mode=True)
    for stage, number in POSITIONS:
        if k == GLOBAL and (stage, number) > (3, 0):
            break
        stride = 2 if stage in (2, 3) and number == 0 else 1
        x = bottleneck(state, f"backbone.layer{stage}{number}", x, stride, norm, k + 1, k)
    return x, torch.stack(distances, 1)


def tail(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The global branch's own layers: BN in stage 3, IN in stage 4."""
    for stage, number in POSITIONS[4:]:
        form = batch_norm if stage == 3 else instance_norm
        at = f"backbone_agg.layer{stage}{number}"
        x = bottleneck(state, at, x, 1, lambda name, x, form=form: form(state, name, x), 1, 1)
    return x


def gem(x: Tensor) -> Tensor:
    """Generalised mean with p = 3."""
    return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


@pytest.mark.parametrize("size", [(64, 32), (70, 44)])
def test_the_released_evaluation_is_its_description(size, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "r50", SMALL)
    torch.manual_seed(0)
    model = randomise(official("meta_r50_3experts", (2, 3, 4))).double()
    images = torch.rand(4, 3, *size).double() * 255
    state = model.state_dict()
    passes = [one_pass(state, images, k) for k in EXPERTS]
    maps, r = torch.stack([found[0] for found in passes]), torch.stack([found[1] for found in passes], 1)
    scores = [
        F.linear(
            F.linear(r[:, k - 1], state[f"affine1_Expert{k}.weight"], state[f"affine1_Expert{k}.bias"]),
            state[f"affine2_Expert{k}.weight"],
            state[f"affine2_Expert{k}.bias"],
        )
        for k in EXPERTS
    ]
    universal = gem(tail(state, one_pass(state, images, GLOBAL)[0]))
    with torch.no_grad():
        described = model.describe(images)
        torch.testing.assert_close(described.relevance, r, rtol=1e-9, atol=1e-9)
        for mode, logits in (("official", r.sum(2)), ("learned", torch.cat(scores, 1))):
            mixture = gem(torch.einsum("bk,kbchw->bchw", logits.softmax(1), maps))
            halves = [("heads_F_finals", mixture), ("heads_agg", universal)]
            expected = [batch_norm(state, f"{head}.bottleneck.0", half) for head, half in halves]
            torch.testing.assert_close(
                model.embed(images, mode), torch.cat(expected, 1), rtol=1e-8, atol=1e-8
            )
        torch.testing.assert_close(model(images), model.embed(images, "official"))


@pytest.mark.parametrize("name", ["r18", "r34", "r50", "r101", "r152"])
def test_every_weight_of_torchvisions_resnet_finds_its_place(name):
    with torch.device("meta"):
        source = getattr(torchvision.models, name.replace("r", "resnet"))().state_dict()
        trunk, agg = Trunk(ARCHITECTURES[name], 2).state_dict(), GlobalTail(ARCHITECTURES[name]).state_dict()
    used = {imagenet_name(key) for key in trunk}
    assert used == {key for key in source if not key.startswith("fc.")}
    for backbone in (trunk, agg):
        for key, value in backbone.items():
            assert source[imagenet_name(key)].shape == value.shape, key


@torch.no_grad()
def test_layers_begin_as_in_the_release():
    torch.manual_seed(0)
    model = META((400, 400, 400), "mini", scoring="separate")
    for k in "123":
        first, last = getattr(model, f"affine1_Expert{k}"), getattr(model, f"affine2_Expert{k}")
        assert float(first.weight.std()) == pytest.approx((2 / 512) ** 0.5, rel=0.1)
        assert float(last.weight.std()) == pytest.approx(2**0.5, rel=0.1)
        assert not first.bias.any() and not last.bias.any()
        head = getattr(model, f"heads_Expert{k}")
        assert float(head.classifier.weight.std()) == pytest.approx(0.001, rel=0.1)
        neck = head.bottleneck[0]
        assert (neck.weight == 1).all() and not neck.bias.any() and not neck.bias.requires_grad


def test_the_first_weights_are_the_files(tmp_path):
    source = torchvision.models.resnet18().state_dict()
    for name in ("layer2.0.bn1.running_mean", "layer4.1.bn2.weight"):
        source[name] = torch.rand_like(source[name])
    torch.save(source, tmp_path / "resnet.pth")
    config = replace(
        PRESETS["paper"], architecture="r18", weights=tmp_path / "resnet.pth", variants=("meta", "baseline")
    )
    meta, plain = plan(config, {0: [3, 3, 3]})
    for row in (meta, plain):
        start_from_pretrained(row.model, row.config)
    for k in "1234":
        norm = getattr(meta.model.backbone.layer20, f"bn1{k}")
        assert torch.equal(norm.running_mean, source["layer2.0.bn1.running_mean"])
    last = meta.model.backbone_agg.layer41, plain.model.layer41
    assert all(torch.equal(block.bn21.weight, source["layer4.1.bn2.weight"]) for block in last)
    assert torch.equal(plain.model.conv1.weight, source["conv1.weight"])


def test_a_new_neck_divides_by_no_more_than_epsilon():
    model = META((2, 2), "mini").eval()
    pooled = torch.rand(3, model.features)
    torch.testing.assert_close(model.heads_F_finals.neck(pooled), pooled / (1 + 1e-5) ** 0.5)
