"""META: networks against a plain loop over experts, official names, initialisation, norms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from meta_reid.aggregation import moments
from meta_reid.backbone import ARCHITECTURES, Architecture, GlobalTail, Trunk
from meta_reid.baselines import Plain
from meta_reid.losses import (
    backward,
    consistency,
    objective,
)
from meta_reid.model import META, RELEASED_CLASSES, load_official, official
from meta_reid.norms import ended, probe_and_norm_in_parts
from meta_reid.pretrained import imagenet_name, init_imagenet
from meta_reid.sequential import Sequential
from shared.bench import count_macs
from shared.runtime import UserError

KEYS = json.loads((Path(__file__).parents[1] / "meta_reid" / "keys.json").read_text())


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Different statistics in every BN set, as after training."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=rng) * 0.2)
            module.running_var.copy_(torch.rand(size, generator=rng) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(size, generator=rng) + 0.5)
                module.bias.copy_(torch.randn(size, generator=rng) * 0.1)
    return model


def tiny(k: int = 3, architecture: str | Architecture = "mini", **options) -> META:
    torch.manual_seed(0)
    return randomise(META([5 + i for i in range(k)], architecture, scoring="both", **options)).double()


def pictures(batch: int = 6) -> torch.Tensor:
    return torch.rand(batch, 3, 48, 24, generator=torch.Generator().manual_seed(1)).double() * 255


@pytest.fixture(params=["whole", "parts"])
def sizes(request, monkeypatch):
    """Small maps are normalised as a whole on a CPU, large ones image by image; "parts" treats all so."""
    if request.param == "parts":
        monkeypatch.setattr("meta_reid.norms.IMAGE", 0)


def expected_keys() -> dict[str, list[int]]:
    """keys.json folds numbers that run: name with {k} -> shape and the numbers."""
    return {name.replace("#", number): shape for name, numbers, shape in KEYS for number in numbers}


def test_official_names_shapes_and_sizes():
    with torch.device("meta"):
        model = official("meta_r50_3experts")
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert found == expected_keys() and len(found) == 1291
    assert sum(p.numel() for p in model.parameters()) == 196_926_659
    assert sum(p.numel() for p in model.backbone.parameters()) == 23_629_504
    assert sum(p.numel() for p in model.backbone_agg.parameters()) == 20_550_656
    assert len(model.backbone.units) == 53 and sum(model.backbone.channels) == 26_560
    assert model.aggregation == "official"
    with pytest.raises(ValueError, match="meta_r50_3experts"):
        official("meta_r101")


def test_cost_and_output_of_the_full_network():
    with torch.device("meta"):
        model = META(RELEASED_CLASSES, scoring="separate").eval()
        model.aggregation = "official"
        images = torch.empty(2, 3, 256, 128)
        assert model(images).shape == (2, 4096)
        described = model.describe(images)
        assert described.experts.shape == (3, 2, 2048, 16, 8) and described.relevance.shape == (2, 3, 53)
        # 16.21 G with four stems; the stem is shared here.
        assert count_macs(model.embed, images) / 2e9 == pytest.approx(15.98, abs=0.01)


@pytest.mark.parametrize(
    "name, units", [("r18", 20), ("r34", 36), ("r101", 104), ("r152", 155), ("mini", 12)]
)
def test_depths(name, units):
    with torch.device("meta"):
        trunk = Trunk(ARCHITECTURES[name], 2)
        assert len(trunk.units) == units
        assert GlobalTail(ARCHITECTURES[name]).blocks


@pytest.mark.parametrize("k", [2, 3, 5])
def test_batched_experts_equal_the_plain_loop_in_evaluation(k, sizes):
    model = tiny(k).eval()
    with torch.no_grad():
        fast, plain = model.describe(pictures()), Sequential(model).describe(pictures())
        for name in ("experts", "universal", "relevance"):
            torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-9, atol=1e-9)
        model.aggregation = "shared"
        torch.testing.assert_close(model(pictures()), Sequential(model).embed(pictures()))
        single = torch.cat([model(image[None]) for image in pictures()])
        torch.testing.assert_close(model(pictures()), single)


def test_batched_experts_equal_the_plain_loop_in_single_precision(sizes):
    model = tiny().float().eval()
    images = pictures().float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fast, plain = model.describe(images), Sequential(model).describe(images.contiguous())
    for name in ("experts", "universal", "relevance"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-5, atol=1e-5)


BOTTLENECKS = Architecture(True, (1, 2, 2, 2), planes=(2, 4, 8, 16))


@pytest.mark.parametrize("domain, architecture", [(0, "mini"), (1, "mini"), (2, "mini"), (1, BOTTLENECKS)])
def test_batched_training_step_equals_the_plain_loop_forward_and_gradients(domain, architecture, sizes):
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = []
    for form in (lambda m: m.forward, lambda m: Sequential(m).train_step):
        model = tiny(architecture=architecture).train()
        out = form(model)(pictures().contiguous(memory_format=torch.channels_last), domain)
        sum(objective(out, labels, labels).values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        statistics = {name: b for name, b in model.named_buffers() if "running" in name}
        found.append((out, gradients, statistics))
    (fast, fast_grads, fast_stats), (plain, plain_grads, plain_stats) = found
    for a, b in zip(fast[:4], plain[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fast.mixtures, plain.mixtures, rtol=1e-6, atol=1e-6)
    for name, gradient in plain_grads.items():
        assert (gradient is None) == (fast_grads[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(fast_grads[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    torch.testing.assert_close(fast_stats, plain_stats, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("episodic", [False, True])
def test_one_half_after_the_other_gives_the_gradients_of_the_whole(warm, episodic):
    labels, union = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([3, 3, 1, 1, 4, 4])
    weights_ = {"consistency_weight": 0.7, "uniformity_weight": 0.4}
    whole, halves = (tiny(episodic_grad=episodic).train() for _ in range(2))
    for model in (whole, halves):
        model.set_warm(warm)
    terms = objective(whole(pictures(), 1, warm), labels, union, **weights_)
    sum(terms.values()).backward()
    found = backward(halves, pictures(), 1, labels, union, warm=warm, **weights_)
    assert found.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(found[name], term.detach(), rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(halves.state_dict(), whole.state_dict())


def test_no_pass_looks_names_up_in_a_state_dict(monkeypatch):
    model = tiny().train()

    def scanned(*_, **__):
        raise AssertionError("a state dict was collected")

    monkeypatch.setattr(nn.Module, "state_dict", scanned)
    model(pictures(), 1)
    assert model.eval()(pictures()).shape == (6, 192)
    with pytest.raises(AssertionError, match="collected"):
        Sequential(model).embed(pictures())


def test_where_gradients_reach_and_statistics_move():
    model = tiny().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    out = model(pictures(), 1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    student = sum(consistency(out.expert, q, labels) for q in out.mixtures.values())
    student.backward(retain_graph=True)
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and all(name.startswith("affine") for name in reached)
    assert not any("Expert2" in name for name in reached)  # the domain's own expert is not scored
    sum(objective(out, labels, labels).values()).backward()
    trunk_sets = {name for name, p in model.named_parameters() if p.grad is not None and ".bn1" in name}
    assert {name.split(".")[-2][-1] for name in trunk_sets if name.startswith("backbone.")} == {"2", "4"}
    assert model.heads_Expert2.classifier.weight.grad is not None
    assert model.heads_Expert1.classifier.weight.grad is None
    moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert "backbone.bn12.running_mean" in moved and "backbone.bn14.running_mean" in moved
    assert "backbone.bn11.running_mean" not in moved and "backbone.bn13.running_mean" not in moved


def test_warm_up_freezes_all_of_the_trunk_but_the_experts_own_norms():
    model = tiny().train()
    model.set_warm(True)
    before = {name: b.clone() for name, b in model.named_buffers()}
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    sum(objective(model(pictures(), 0, warm=True), labels, labels).values()).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert trained and all(name.split(".")[-2][-1] == "1" or ".2." in name for name in trained)
    assert not any("conv" in name for name in trained)
    assert torch.equal(model.backbone.bn14.running_mean, before["backbone.bn14.running_mean"])
    assert not torch.equal(model.backbone.bn11.running_mean, before["backbone.bn11.running_mean"])
    model.set_warm(False)
    assert model.backbone.conv1.weight.requires_grad and model.backbone.bn14.weight.requires_grad


def test_episodic_grad_reaches_the_shared_convolutions():
    model = tiny(episodic_grad=True).train()
    out = model(pictures(), 0)
    consistency(out.expert, out.mixtures["shared"] * 3, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_imagenet_weights_reach_every_set_and_share_no_storage():
    arch = "mini"
    model = tiny()
    rng = torch.Generator().manual_seed(3)
    source = {}
    for backbone in (model.backbone, model.backbone_agg):
        for name, value in backbone.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                source.setdefault(imagenet_name(name), torch.rand(value.shape, generator=rng).double())
    for backbone in (model.backbone, model.backbone_agg):
        init_imagenet(backbone, source, "file")
    for k in "1234":
        norm = getattr(model.backbone.layer20, f"bn2{k}")
        assert torch.equal(norm.running_var, source["layer2.0.bn2.running_var"])
        shortcut = getattr(model.backbone.layer20.downsample, str(int(k) + 1))
        assert torch.equal(shortcut.weight, source["layer2.0.downsample.1.weight"])
    assert torch.equal(model.backbone_agg.layer40.bn11.weight, source["layer4.0.bn1.weight"])
    pointers = [t.data_ptr() for t in model.backbone.state_dict().values() if t.numel() > 1]
    assert len(set(pointers)) == len(pointers)
    for norm in ("bn", "ibn", "in"):
        init_imagenet(Plain(4, arch, norm).double(), source, "file")
    with pytest.raises(UserError, match="missing"):
        init_imagenet(model.backbone, {}, "file")
    with pytest.raises(UserError, match="shape"):
        init_imagenet(model.backbone, source | {"conv1.weight": torch.zeros(1)}, "file")


@pytest.mark.parametrize("norm", ["bn", "ibn", "in"])
def test_plain_networks(norm):
    model = Plain(7, "mini", norm)
    pooled, logits = model.train()(pictures().float())
    assert pooled.shape == (6, 96) and logits.shape == (6, 7)
    assert model.eval()(pictures().float()).shape == (6, 96)
    kinds = {type(module).__name__ for module in model.blocks[0].modules()}
    assert ("IBN" in kinds) == (norm == "ibn")
    assert ("BatchNorm2d" in {type(m).__name__ for m in [model.stem.norms[0]]}) == (norm != "in")


def small_official(monkeypatch) -> META:
    """The released layout on the mini backbone, so that a checkpoint of it is small."""
    monkeypatch.setitem(ARCHITECTURES, "r50", ARCHITECTURES["mini"])
    return randomise(official("meta_r50_3experts", (2, 3, 4)))


def test_official_checkpoints(tmp_path, monkeypatch):
    model = small_official(monkeypatch)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith(("mean_in", "var_in")):
            state[name] = torch.ones(5, state[name].shape[1])
    path = tmp_path / "model_final.pth"
    torch.save({"model": state, "epoch": 3}, path)
    loaded = load_official("meta_r50_3experts", path)
    images = pictures(3).float()
    torch.testing.assert_close(loaded(images), model(images))
    assert loaded.heads_agg.classifier.weight.shape == (9, 96)
    names = ("heads_agg", "heads_F_final", "heads_F_finals")
    counted = {f"module.{name}.classifier.weight": torch.ones(7, 96) for name in names}
    torch.save({"model": state | counted}, tmp_path / "counted.pth")
    other = load_official("meta_r50_3experts", tmp_path / "counted.pth")
    assert other.heads_agg.classifier.weight.shape == (7, 96)
    torch.testing.assert_close(other(images), model(images))

    cases = {
        "foreign": ({"conv.weight": torch.zeros(1)}, "heads_Expert1"),
        "missing": ({k: v for k, v in state.items() if "conv1" not in k}, "is missing"),
        "shape": (state | {"module.pixel_mean": torch.zeros(2)}, "has shape"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_official("meta_r50_3experts", tmp_path / name)
    (tmp_path / "torn").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="torn"):
        load_official("meta_r50_3experts", tmp_path / "torn")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_image_by_image_gives_the_maps_and_moments_of_the_whole(kind):
    rng = torch.Generator().manual_seed(0)
    x, plus = (torch.randn(3, 2, 8, 5, 3, generator=rng).to(kind) + 2 for _ in range(2))
    wide = torch.promote_types(kind, torch.float32)
    scale, shift = (torch.randn(3, 1, 8, 1, 1, generator=rng).to(wide) for _ in range(2))
    for added, relu in ((None, True), (plus, True), (None, False)):
        images = x.clone()
        found = probe_and_norm_in_parts(images, scale, shift, 2, added, relu)
        torch.testing.assert_close(images, ended((x.to(wide) * scale + shift).to(kind), added, relu))
        for got, exact in zip(found, moments(x[:2]), strict=True):
            assert got.dtype == wide
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close_to_single_precision(sizes):
    model = tiny().float().eval()
    images = pictures().float()
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    assert torch.cosine_similarity(exact, rough).min() > 0.99


def test_a_training_step_in_bfloat16_has_the_terms_and_gradients_of_one_in_single_precision():
    labels, found = torch.tensor([0, 0, 1, 1, 2, 2]), []
    for rough in (False, True):
        model = tiny().float().train()

        def precision(rough=rough):
            return torch.autocast("cpu", torch.bfloat16, enabled=rough)

        terms = backward(model, pictures().float(), 1, labels, labels, autocast=precision)
        learned = [p.grad.flatten() for n, p in model.named_parameters() if ".conv" in n]
        found.append((torch.stack(list(terms.values())), torch.cat(learned)))
    (exact, gradient), (terms, other) = found
    torch.testing.assert_close(terms, exact, rtol=0.1, atol=0.05)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.95 and not torch.equal(terms, exact)


KERNEL = """
import torch
from meta_reid.aggregation import moments
from meta_reid.kernel import probe_and_norm

device = "cuda" if torch.cuda.is_available() else "cpu"
for kind in (torch.float32, torch.bfloat16):
    shapes = (3, 2, 64, 16, 8), (2, 3, 40, 5, 3), (4, 1, 192, 12, 10), (2, 2, 8, 1, 1)
    for sets, batch, channels, *size in shapes:
        rng = torch.Generator().manual_seed(0)
        x = (2 * torch.randn(sets * batch, channels, *size, generator=rng) + 1).to(kind)
        x = x.to(device, memory_format=torch.channels_last)
        affine = torch.randn(sets, 2 * channels + 1, generator=rng).to(device)
        scale, shift = affine[:, :channels], affine[:, channels + 1 :]
        apart = x.clone().unflatten(0, (sets, batch))
        wanted = (apart.float() * scale[:, None, :, None, None] + shift[:, None, :, None, None]).flatten(0, 1)
        found = probe_and_norm(x, scale, shift)
        for got, exact in zip(found, moments(apart), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
        # Half a unit in the last place of bf16, or a whole one where the interpreter cuts digits off.
        rtol = 2**-7 if kind == torch.bfloat16 else 1e-6
        torch.testing.assert_close(x.float(), wanted, rtol=rtol, atol=1e-5)
"""


def test_kernel_probes_and_norms_as_the_plain_form_does():
    """On a GPU the kernel itself; elsewhere Triton's interpreter, in a process of its own."""
    triton = pytest.importorskip("triton")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of this Triton does not know today's NumPy")
    environment = os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
