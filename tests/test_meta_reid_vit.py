"""META on a ViT: experts' layer norms against a plain loop, whole runs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from meta_reid import predict
from meta_reid.aggregation import MODES, mix, weights
from meta_reid.baselines import Plain
from meta_reid.data import Target, Tensors
from meta_reid.eval import Options, rows_of
from meta_reid.export import export
from meta_reid.losses import backward, consistency, objective
from meta_reid.measure import measure, measure_plain
from meta_reid.model import META, Description, Training
from meta_reid.rows import plan, start_from_pretrained
from meta_reid.train import PRESETS, optimiser, train
from meta_reid.vit import VITS, TokenNorm, VitArchitecture
from shared.bench import count_macs
from shared.runtime import UserError

SIZE = (32, 16)
SMALL = {
    "vit": VitArchitecture(24, 4, 3, patch=8, pixels="imagenet"),
    "clip": VitArchitecture(24, 4, 3, patch=8, clip=True, pixels="clip"),
}
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def randomise(model: nn.Module) -> nn.Module:
    """Different affines and statistics in every set, as after training."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, TokenNorm)):
            for tensor in norm.state_dict().values():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
            norm.bias.sub_(1)
    return model


def tiny(kind: str = "vit", k: int = 3, **options) -> META:
    torch.manual_seed(0)
    options = {"scoring": "both", "size": SIZE} | options
    return randomise(META([5 + i for i in range(k)], SMALL[kind], **options)).double()


def pictures(batch: int = 6) -> Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double() * 255


# --- the plain loop: one expert after the other, everything written out ------------------------------


def layer_norm(x: Tensor, norm: nn.Module, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised tokens, and the tokens before the affine."""
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return x * norm.weight + norm.bias, x


def plain_block(x: Tensor, block: nn.Module, norm, quick: bool) -> Tensor:
    q, k, v = block.attn.qkv(norm(block.norm1, x)).chunk(3, -1)
    heads = []
    for h in torch.arange(x.shape[-1]).chunk(block.attn.heads):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / len(h) ** 0.5
        heads.append(scores.softmax(-1) @ v[..., h])
    x = x + block.attn.proj(torch.cat(heads, -1))
    hidden = block.mlp.fc1(norm(block.norm2, x))
    hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else nn.functional.gelu(hidden)
    return x + block.mlp.fc2(hidden)


def as_map(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(len(x), -1, 4, 2)


def plain_pass(model: META, images: Tensor, chosen: int, learn: bool = False) -> tuple[Tensor, Tensor]:
    """One set: its map (the tokens where the global branch leaves) and its relevance (B, L)."""
    trunk, distances = model.backbone, []
    patches = trunk.patch_embed.proj((images - model.pixel_mean) / model.pixel_std).flatten(2).transpose(1, 2)
    x = torch.cat([trunk.cls_token.expand(len(images), 1, -1), patches], 1) + trunk.pos_embed

    def norm(place: nn.ModuleList, x: Tensor) -> Tensor:
        one = place[chosen]
        y, seen = layer_norm(x, one, trunk.eps)
        if chosen < model.K:
            seen = seen.detach()[:, 1:]
            mean_gap = (one.running_mean - seen.mean(1)).square().sum(-1)
            gap = mean_gap + (one.running_var.sqrt() - seen.var(1).sqrt()).square().sum(-1)
            distances.append(gap.sqrt())
            if learn:
                flat = seen.flatten(0, 1)
                one.running_mean.copy_(0.9 * one.running_mean + 0.1 * flat.mean(0))
                one.running_var.copy_(0.9 * one.running_var + 0.1 * flat.var(0))
        return y

    clip = trunk.norm_pre is not None
    x = norm(trunk.norm_pre, x) if clip else x
    if chosen == model.K:
        for block in trunk.blocks[:2]:
            x = plain_block(x, block, norm, clip)
        return x, torch.empty(0)
    for block in trunk.blocks:
        x = plain_block(x, block, norm, clip)
    return as_map(norm(trunk.norm, x)[:, 1:]), torch.stack(distances, 1)


def plain_tail(model: META, x: Tensor) -> Tensor:
    tail, clip = model.backbone_agg, model.backbone.norm_pre is not None

    def layer(place: nn.ModuleList, x: Tensor) -> Tensor:
        return layer_norm(x, place[0], tail.eps)[0]

    def instance(place: nn.ModuleList, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + tail.eps).sqrt()
        return x * place[0].weight + place[0].bias

    norm = instance if tail.instance_norm else layer
    x = plain_block(x, tail.blocks["2"], layer, clip)
    x = plain_block(norm(tail.entry, x[:, 1:]), tail.blocks["3"], norm, clip)
    return as_map(layer(tail.norm, x))


def plain_description(model: META, images: Tensor) -> Description:
    passes = [plain_pass(model, images, k) for k in range(model.K)]
    universal = plain_tail(model, plain_pass(model, images, model.K)[0])
    return Description(torch.stack([f for f, _ in passes]), universal, torch.stack([r for _, r in passes], 1))


def plain_step(model: META, images: Tensor, domain: int) -> Training:
    """A training step with autograd through every expert."""
    passes = [plain_pass(model, images, k, learn=k == domain) for k in range(model.K)]
    others = [k for k in range(model.K) if k != domain]
    r, maps = (torch.stack([passes[k][i] for k in others], d) for i, d in ((1, 1), (0, 0)))
    scores = {kind: model.scores(kind, r, others) for kind in model.scorings}
    mixtures = {kind: mix(weights(kind, r, z), maps.detach()).mean((2, 3)) for kind, z in scores.items()}
    head = getattr(model, f"heads_Expert{domain + 1}")
    e, u = (
        passes[domain][0].mean((2, 3)),
        plain_tail(model, plain_pass(model, images, model.K)[0]).mean((2, 3)),
    )
    necks = (head.classifier(head.neck(e)), model.heads_agg.classifier(model.heads_agg.neck(u)))
    return Training(e, necks[0], u, necks[1], mixtures)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("instance_norm", [True, False])
def test_batched_experts_equal_the_plain_loop_in_evaluation(kind, instance_norm):
    model = tiny(kind, instance_norm=instance_norm).eval()
    with torch.no_grad():
        fast, plain = model.describe(pictures()), plain_description(model, pictures())
        for name in ("experts", "universal", "relevance"):
            torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-9, atol=1e-9)
        assert fast.relevance.shape == (6, 3, 9 + (kind == "clip"))
        single = torch.cat([model(image[None]) for image in pictures()])
        torch.testing.assert_close(model(pictures()), single)
        model.float()
        rough = model.describe(pictures().float())
        for name in ("experts", "universal", "relevance"):
            expected = getattr(plain, name).float()
            torch.testing.assert_close(getattr(rough, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("domain", [0, 2])
def test_batched_training_step_equals_the_plain_loop_forward_and_gradients(kind, domain):
    found = []
    for step in (META.forward, plain_step):
        model = tiny(kind).train()
        out = step(model, pictures(), domain)
        sum(objective(out, LABELS, LABELS).values()).backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()))
    (fast, fast_grads, fast_state), (plain, plain_grads, plain_state) = found
    for a, b in zip(fast[:4], plain[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fast.mixtures, plain.mixtures, rtol=1e-6, atol=1e-6)
    for name, gradient in plain_grads.items():
        assert (gradient is None) == (fast_grads[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(fast_grads[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    torch.testing.assert_close(fast_state, plain_state, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("warm", [False, True])
def test_one_half_after_the_other_gives_the_gradients_of_the_whole(warm):
    whole, halves = (tiny("clip").train() for _ in range(2))
    for model in (whole, halves):
        model.set_warm(warm)
    terms = objective(whole(pictures(), 1, warm), LABELS, LABELS)
    sum(terms.values()).backward()
    found = backward(halves, pictures(), 1, LABELS, LABELS, warm=warm)
    assert found.keys() == terms.keys()
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(halves.state_dict(), whole.state_dict())


def sets_of(names: set[str]) -> set[str]:
    """Numbers of the trunk's sets among names of parameters or buffers."""
    return {n.split(".")[-2] for n in names if n.startswith("backbone.") and ".norm" in n}


def test_a_batch_moves_its_own_domains_expert_alone():
    model = tiny().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    out = model(pictures(), 1)
    student = sum(consistency(out.expert, q, LABELS) for q in out.mixtures.values())
    student.backward(retain_graph=True)
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and all(name.startswith("affine") for name in reached)
    sum(objective(out, LABELS, LABELS).values()).backward()
    assert sets_of({name for name, p in model.named_parameters() if p.grad is not None}) == {"1", "3"}
    moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert sets_of(moved) == {"1"} and len([n for n in moved if n.startswith("backbone.")]) == 2 * 9


def test_warm_up_freezes_all_of_the_trunk_but_the_experts_norms():
    model = tiny("clip").train()
    model.set_warm(True)
    sum(objective(model(pictures(), 0, warm=True), LABELS, LABELS).values()).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert (
        trained and {name.split(".")[-2] for name in trained} == {"0"} and all("norm" in n for n in trained)
    )
    model.set_warm(False)
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_episodic_grad_reaches_the_shared_layers_and_no_other_experts_norms():
    model = tiny(episodic_grad=True).train()
    out = model(pictures(), 0)
    consistency(out.expert, out.mixtures["shared"] * 3, LABELS).backward()
    assert model.backbone.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert all(norm.weight.grad is None for norm in model.backbone.blocks[0].norm1)


def test_relevance_finds_the_domain_whose_statistics_an_image_has():
    """Statistics learned from dark and from bright pictures, and new pictures of each kind."""
    torch.manual_seed(0)
    model = META((3, 3), SMALL["vit"], size=SIZE).train()
    kinds = (lambda n: torch.rand(n, 3, *SIZE) * 60, lambda n: 150 + torch.rand(n, 3, *SIZE) * 100)
    for _ in range(60):
        for domain, draw in enumerate(kinds):
            model(draw(8), domain)
    model.eval()
    for domain, draw in enumerate(kinds):
        described = model.describe(draw(8))
        assert (described.relevance.sum(-1).argmin(1) == domain).all()
        assert (model.expert_weights(described, "nearest").argmax(1) == domain).all()


def test_signed_features_are_pooled_by_their_mean():
    model = tiny().eval()
    described = model.describe(pictures())
    assert described.experts.min() < -0.1
    mixture, universal = model.parts(described, "uniform")
    torch.testing.assert_close(mixture, described.experts.mean((0, 3, 4)) / (1 + 1e-5) ** 0.5)
    for mode in MODES:
        assert model.parts(described, mode)[0].shape == universal.shape == (6, 24)


def test_instance_norm_takes_out_what_a_camera_does_to_all_patches_alike():
    """The global branch's last part sees no shift and no gain of a channel; the ablation does."""
    for instance_norm in (True, False):
        model = tiny(instance_norm=instance_norm).eval()
        tokens = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)).double()
        moved = tokens * (torch.rand(24).double() + 0.5) + torch.randn(24).double()
        place = model.backbone_agg.entry
        norm = model.backbone_agg.instance if instance_norm else model.backbone_agg.layer
        assert torch.allclose(norm(place, tokens), norm(place, moved), atol=1e-4) == instance_norm


# --- weights ---------------------------------------------------------------------------------------


def test_sizes_and_norms_that_do_not_fit():
    with pytest.raises(UserError, match="48x20 do not divide into patches of 8x8"):
        META((3, 3), SMALL["vit"], size=(48, 20))
    with pytest.raises(UserError, match="--norm in"):
        Plain(3, SMALL["vit"], "in", size=SIZE)


@pytest.mark.parametrize("name", ["vit-b16", "clip-b16"])
def test_the_full_networks(name):
    with torch.device("meta"):
        model = META((1467, 11934, 1502), name).eval()
        images = torch.empty(2, 3, 256, 128)
        assert model(images).shape == (2, 1536)
        described = model.describe(images)
        assert described.experts.shape == (3, 2, 768, 16, 8) and model.backbone.pos_embed.shape[1] == 129
        assert described.relevance.shape == (2, 3, 25 + (name == "clip-b16"))
        # Four passes of twelve blocks: linear layers and attention of 129 tokens.
        cost = 4 * 12 * (12 * 768**2 * 129 + 2 * 768 * 129**2)
        assert count_macs(model.embed, images) / 2 == pytest.approx(cost, rel=0.01)
    assert sum(p.numel() for p in model.backbone.parameters()) == pytest.approx(85.8e6, rel=0.01)


@pytest.mark.parametrize("name", ["vit-b16", "clip-b16"])
def test_one_step_of_a_full_network_on_small_pictures(name):
    model = META((2, 2), name, size=(32, 16)).train()
    images = torch.rand(4, 3, 32, 16) * 255
    labels = torch.tensor([0, 0, 1, 1])
    config = replace(PRESETS["vit"], architecture=name)
    optim = optimiser(model, config)
    before = model.backbone.blocks[0].attn.qkv.weight.clone()
    terms = backward(model, images, 0, labels, labels)
    optim.step()
    assert all(torch.isfinite(term) for term in terms.values())
    assert not torch.equal(model.backbone.blocks[0].attn.qkv.weight, before)


def test_bfloat16_stays_close_to_single_precision():
    model = tiny().float().eval()
    with torch.no_grad():
        exact = model(pictures().float())
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(pictures().float())
            assert model.describe(pictures().float()).relevance.dtype == torch.float32
    assert torch.cosine_similarity(exact, rough).min() > 0.99


@pytest.mark.parametrize("ending", ["pt", "onnx"])
def test_export_reproduces_the_network(ending, tmp_path):
    model = tiny("clip").float()
    assert export(model, SIZE, tmp_path / f"meta.{ending}") < 1e-4


# --- whole runs ------------------------------------------------------------------------------------


def test_a_vit_is_trained_evaluated_searched_with_and_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(VITS, "vit-mini", VitArchitecture(16, 4, 2, patch=8, pixels="imagenet"))
    rows = ("meta", "no-in", "baseline")
    config = replace(
        PRESETS["demo-vit"], preset="demo-vit", variants=rows, steps=3, people=4, device="cpu",
        pixels="half", out=tmp_path / "run",
    )  # fmt: skip
    folder = train(config)
    trained = rows_of(config, folder)
    images = Tensors((torch.rand(12, 3, 48, 24) * 255).byte())
    people = torch.arange(12) % 3
    target = Target("T", images, people, torch.arange(12), [(torch.arange(3), torch.arange(3, 12))])
    for name in ("meta-0", "no-in-0"):
        measured = measure(trained[name], target, Options(), torch.device("cpu"))
        assert set(measured.modes) == set(MODES) and measured.full("shared").shape == (12, 32)
    assert (
        0 <= measure_plain(trained["baseline-0"], target, Options(), torch.device("cpu")).mean["mAP"] <= 100
    )
    for name in rows:
        assert (folder / "samples" / f"training-{name}-0.png").stat().st_size > 0
    model, names, size, _ = predict.load_model(predict.Options(run=folder))
    assert names == ["A", "B", "C"] and size == (48, 24)
    assert (model.pixel_mean == 127.5).all()  # --pixels half
    assert export(model, size, tmp_path / "meta.pt") < 1e-4


def test_settings_of_the_vit_presets():
    assert PRESETS["vit"].architecture == "vit-b16" and PRESETS["vit"].pretrained
    row = plan(replace(PRESETS["demo-vit"], variants=("meta",)), {0: [3, 3, 3]})[0]
    found = optimiser(row.model, row.config)
    assert isinstance(found, torch.optim.AdamW)
    assert [group["weight_decay"] for group in found.param_groups] == [0.05, 0]
    with pytest.raises(UserError, match="no pretrained weights for 'vit-mini'"):
        start_from_pretrained(row.model, replace(row.config, pretrained=True))
