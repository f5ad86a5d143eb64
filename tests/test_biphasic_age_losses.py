"""Biphasic face ageing: every term of the objective, what its gradient reaches, and frozen networks."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from biphasic_age import losses, naive
from biphasic_age.discriminator import Discriminator, TwoScales
from biphasic_age.frozen import (
    YEARS,
    AgeNet,
    BiSeNetParser,
    IdentityNet,
    SmallParser,
    age_training_loss,
    freeze,
    load_age,
    load_identity,
    load_parser,
    require_face,
)
from biphasic_age.losses import Weights
from biphasic_age.model import SIZES, Generator, Switches
from biphasic_age.objective import Guides, discriminator_backward, generator_backward
from shared.irse import IRSE
from shared.runtime import UserError

NOTHING = Weights(adversarial=0, age=0, identity=0, reconstruction=0, cycle=0, disentangle=0, expectation=0)
QUIET = Switches(noise=False)


class World:
    """Tiny networks and one batch."""

    def __init__(self, switches: Switches = QUIET, **options):
        torch.manual_seed(0)
        self.generator = Generator(SIZES["unit"], classes=5, switches=switches, **options)
        for module in self.generator.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, 0, 0.1)
        self.critic = Discriminator(4, 2, classes=5).requires_grad_(False).eval()
        self.guides = Guides(
            freeze(AgeNet(4, 2)), freeze(IdentityNet(3, 4, 8)), torch.tensor([20.0, 35.0, 45.0, 60.0])
        )
        rng = torch.Generator().manual_seed(1)
        self.image = torch.rand(3, 3, 16, 16, generator=rng) * 2 - 1
        blocks = torch.randint(0, 5, (3, 4, 4), generator=rng)
        self.layout = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
        self.source, self.target = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1])

    def backward(self, weights: Weights, **options) -> tuple[dict, object]:
        self.generator.zero_grad(set_to_none=True)
        return generator_backward(
            self.generator, self.critic, self.guides, self.image, self.layout, self.source, self.target,
            weights, **options,
        )  # fmt: skip

    def touched(self) -> set[str]:
        """Top parts of the generator that a gradient reached."""
        named = self.generator.named_parameters()
        return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


# --- terms as closed forms ----------------------------------------------------------------------------


def test_least_squares_terms():
    real, fake = torch.full((2, 1, 3, 3), 0.8), torch.full((2, 1, 3, 3), 0.4)
    assert losses.least_squares(fake, 1.0).item() == pytest.approx(0.5 * 0.36)
    assert losses.discriminator(real, fake).item() == pytest.approx(0.5 * 0.04 + 0.5 * 0.16)
    wrong = torch.full((2, 1, 3, 3), 0.6)
    averaged = 0.5 * 0.04 + (0.5 * 0.16 + 0.5 * 0.36) / 2
    assert losses.discriminator(real, fake, wrong).item() == pytest.approx(averaged)
    assert losses.least_squares([fake, real], 1.0).item() == pytest.approx((0.18 + 0.02) / 2)


def test_age_term_is_cross_entropy_and_squared_years():
    logits, target = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([1])
    means = torch.tensor([20.0, 35, 45, 60])
    ce = math.log(math.exp(2) + 3)
    assert losses.age(logits, target).item() == pytest.approx(ce, rel=1e-5)
    years = torch.tensor([30.0])
    assert losses.age(logits, target, years, means).item() == pytest.approx(ce + 0.01 * 25, rel=1e-5)
    mixture = torch.tensor([[0, 0.5, 0.5, 0]])
    assert losses.age(logits, mixture, years, means).item() == pytest.approx(ce + 0.01 * 100, rel=1e-5)


def test_identity_term_is_one_minus_cosine_and_holds_the_truth_fixed():
    a = torch.tensor([[3.0, 0.0], [0.0, 2.0]], requires_grad=True)
    b = torch.tensor([[1.0, 1.0], [0.0, -5.0]], requires_grad=True)
    loss = losses.identity(a, b)
    assert loss.item() == pytest.approx((1 - math.sqrt(0.5) + 2) / 2, rel=1e-5)
    loss.backward()
    assert a.grad is not None and b.grad is None


def test_detail_ignores_brightness_and_sees_wrinkles():
    x = torch.rand(2, 3, 16, 16)
    assert losses.detail(x + 0.2, x).item() == pytest.approx(0, abs=1e-6)
    wrinkles = 0.1 * (torch.arange(16) % 2).float().view(1, 1, 16, 1)
    assert losses.detail(x + wrinkles, x).item() > 0.04
    assert [tuple(band.shape[-2:]) for band in losses.laplacian(x)] == [(16, 16), (8, 8), (4, 4)]


def test_perceptual_sums_levels_and_holds_the_truth_fixed():
    a, b = [torch.ones(1, 2, 2, 2, requires_grad=True)], [torch.zeros(1, 2, 2, 2, requires_grad=True)]
    loss = losses.perceptual([*a, *a], [*b, *b])
    assert loss.item() == 2.0
    loss.backward()
    assert a[0].grad is not None and b[0].grad is None


def test_confusion_turns_the_gradient_of_the_features_and_not_of_the_classifier():
    features = torch.randn(3, 6, 2, 2, requires_grad=True)
    classify, source = torch.nn.Linear(6, 4), torch.tensor([0, 1, 2])
    losses.confusion(features, source, classify).backward()
    turned, classifier = features.grad.clone(), classify.weight.grad.clone()
    features.grad = classify.weight.grad = None
    F.cross_entropy(classify(features.mean((2, 3))), source).backward()
    assert torch.allclose(turned, -features.grad) and torch.allclose(classifier, classify.weight.grad)


# --- the strategies as gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("switches", [QUIET, Switches(noise=False, constraint=False)])
@pytest.mark.parametrize("output", ["direct", "residual", "gated"])
def test_branch_by_branch_gradients_are_those_of_one_sum(output, switches):
    """Against one backward pass through the sum of all terms."""
    weights = Weights(perceptual=0.7, detail=0.3, adversarial_self=0.4, confusion=0.2)
    world = World(switches, output=output)
    state = {k: v.clone() for k, v in world.generator.state_dict().items()}
    terms, made = world.backward(weights)
    found = [None if p.grad is None else p.grad.clone() for p in world.generator.parameters()]
    g, x, s, a, t = world.generator, world.image, world.layout, world.source, world.target
    g.load_state_dict(state)
    g.zero_grad(set_to_none=True)
    identity, age = world.guides.identity, world.guides.age
    first = g.features(x)
    x_s, y = g(torch.cat((x, x)), torch.cat((s, s)), torch.cat((a, t))).chunk(2)
    x_c, seen = g(y, s, a), age(y)
    whole = {
        "reconstruction": 10 * (x_s - x).abs().mean(),
        "cycle": 10 * (x_c - x).abs().mean(),
        "detail": 0.3 * losses.detail(x_s, x),
        "perceptual": 0.7 * losses.perceptual(identity.levels(x_s), identity.levels(x)),
        "adversarial": 0.5 * (world.critic(y, s, t) - 1).square().mean(),
        "adversarial_self": 0.4 * 0.5 * (world.critic(x_s, s, a) - 1).square().mean(),
        "age": losses.age(seen.groups, t, seen.years, world.guides.means),
        "identity": losses.identity(identity.embed(y), identity.embed(x)),
    }
    if g.constraint is not None:
        whole["disentangle"] = 0.1 * F.cross_entropy(first.logits, a)
        whole["confusion"] = 0.2 * losses.confusion(first.identity, a, g.constraint.classify)
    sum(whole.values()).backward()
    assert terms.keys() == whole.keys()
    for name, term in whole.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-4, abs=1e-6), name
    for (name, p), gradient in zip(g.named_parameters(), found, strict=True):
        if p.grad is None:
            assert gradient is None, name
        else:
            # Biases in front of a norm have rounding alone, below 1e-6; all others are far larger.
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-5 * p.grad.abs().max() + 1e-6), name
    assert torch.allclose(made.translated, y, atol=1e-5) and torch.allclose(made.restored, x_s, atol=1e-5)


def test_batch_norm_does_not_tell_the_strategies_apart():
    """What the decoder's norms measure is of both strategies' rows together, and of photographs alone."""
    world = World(output="residual")
    g, x, s = world.generator, world.image, world.layout
    norms = [m for m in g.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen: list[list[int]] = [[] for _ in norms]
    hooks = [
        m.register_forward_pre_hook(lambda _, x, at=at: at.append(len(x[0])))
        for m, at in zip(norms, seen, strict=True)
    ]
    world.backward(Weights())
    decoders = set(g.decoder.modules())
    for norm, rows in zip(norms, seen, strict=True):
        assert rows == ([6, 3] if norm in decoders else [3, 3])  # forth with both ages, and back
    for hook in hooks:
        hook.remove()
    measured = {k: v.clone() for k, v in g.state_dict().items() if "running" in k}
    again = World(output="residual").generator
    again(torch.cat((x, x)), torch.cat((s, s)), torch.cat((world.source, world.target)))
    for name, value in again.state_dict().items():
        if "running_mean" in name:
            assert torch.allclose(value, measured[name], atol=1e-5), name


def test_plain_form_of_the_bench_minimises_the_same():
    world = World(Switches())
    with torch.no_grad():
        world.generator.projection.noisy.raw_sigma.fill_(-50.0)
    terms, _ = world.backward(Weights())
    total, _ = naive.training_losses(
        world.generator, world.critic, world.guides, world.image, world.layout, world.source, world.target,
        Weights(),
    )  # fmt: skip
    assert sum(terms.values()).item() == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("term", "reaches"),
    [
        ("reconstruction", {"encoder", "projection", "constraint", "decoder"}),
        ("cycle", {"encoder", "projection", "constraint", "decoder"}),
        ("adversarial", {"encoder", "projection", "constraint", "decoder"}),
        ("age", {"encoder", "projection", "constraint", "decoder"}),
        ("identity", {"encoder", "projection", "constraint", "decoder"}),
        ("disentangle", {"encoder", "constraint"}),
        ("confusion", {"encoder", "constraint"}),
    ],
)
def test_each_term_reaches_its_parts_and_no_frozen_network(term, reaches):
    world = World(Switches())
    terms, _ = world.backward(replace(NOTHING, **{term: 1.0}))
    assert set(terms) == {term}
    assert world.touched() == reaches
    frozen = (world.critic, world.guides.age, world.guides.identity)
    assert all(p.grad is None for net in frozen for p in net.parameters())


def test_bf16_keeps_losses_years_and_ages_in_fp32():
    """Also the terms that are off by default; years in bf16 would be a quarter of a year off."""
    world = World(Switches())
    everything = Weights(perceptual=1.0, adversarial_self=1.0, detail=1.0, confusion=1.0)
    batch = (world.image, world.layout, world.source, world.target)
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    terms, made = generator_backward(
        world.generator, world.critic, world.guides, *batch, everything, autocast=bf16
    )
    assert len(terms) == 10
    assert {value.dtype for value in (*terms.values(), *made.__dict__.values())} == {torch.float32}
    with bf16():
        seen = world.guides.age(world.image)
        maps = world.generator.maps(world.generator.features(world.image), world.layout, world.target)
    exact = seen.ages.softmax(1) @ torch.arange(float(YEARS))
    assert torch.equal(seen.years, exact)
    assert {m.dtype for m in maps} == {torch.bfloat16}


def test_self_driven_branch_uses_the_source_age_and_condition_branch_the_target():
    """Rows of the age embeddings that get a gradient: the ages that were asked for."""
    world = World(Switches())
    world.generator.eval()  # otherwise batch norm, over the rows of both, lets each feel the other's gradient
    world.source, world.target = torch.tensor([0, 0, 0]), torch.tensor([3, 3, 3])
    for term, rows in (("reconstruction", {0}), ("adversarial", {3}), ("cycle", {0, 3})):
        world.backward(replace(NOTHING, **{term: 1.0}))
        moved = world.generator.constraint.age.weight.grad.abs().sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) == rows, term


def test_ramp_runs_the_self_driven_strategy_alone():
    world = World()
    terms, made = world.backward(Weights(), condition=False)
    assert set(terms) == {"reconstruction", "disentangle"} and made.translated is None
    terms, made = world.backward(Weights(reconstruction=0))
    assert "reconstruction" not in terms and made.restored is None and made.translated is not None


def test_reparsing_gives_the_way_back_another_layout():
    world, seen = World(), []
    world.guides.parse = lambda y: seen.append(y) or torch.zeros_like(world.layout)
    terms, made = world.backward(Weights())
    assert torch.equal(seen[0], made.translated)
    world.guides.parse = None
    same, _ = world.backward(Weights())
    assert same["cycle"] != terms["cycle"]


@pytest.mark.parametrize("kind", [Discriminator, TwoScales])
@pytest.mark.parametrize("mismatch", [False, True])
def test_discriminator_step_in_one_batch_is_the_formula(kind, mismatch):
    world = World()
    torch.manual_seed(2)
    critic = kind(width=4, stages=2, classes=5).eval()  # eval: the same spectral norm in every call
    y = torch.rand_like(world.image)
    real = world.image, world.layout, world.source
    wrong = (world.source + 1) % 4 if mismatch else None
    value = discriminator_backward(critic, real, [(y, world.layout, world.target)], wrong)
    found = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    scores = [critic(*real), critic(y, world.layout, world.target)]
    scores += [critic(world.image, world.layout, wrong)] if mismatch else []
    expected = losses.discriminator(*scores)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, gradient in zip(critic.parameters(), found, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)


# --- frozen networks ----------------------------------------------------------------------------------


def test_age_network_gives_groups_and_the_expected_age():
    net = AgeNet(4, 2, groups=4)
    seen = net(torch.rand(2, 3, 16, 16))
    assert seen.groups.shape == (2, 4) and seen.ages.shape == (2, YEARS)
    by_hand = (seen.ages.softmax(1) * torch.arange(101)).sum(1)
    assert torch.allclose(seen.years, by_hand, atol=1e-3)
    loss = age_training_loss(seen, torch.tensor([12.4, 130.0]), torch.tensor([0, 3]))
    expected = F.cross_entropy(seen.ages, torch.tensor([12, 100])) + F.cross_entropy(
        seen.groups, torch.tensor([0, 3])
    )
    assert torch.allclose(loss, expected)


def test_full_age_network_is_pfa_gans_form():
    with torch.device("meta"):
        net = AgeNet()
    channels = [m.out_channels for m in net.features if isinstance(m, torch.nn.Conv2d)]
    assert channels == [64, 128, 256, 512, 512, 512]
    assert (net.ages.out_features, net.groups.in_features, net.groups.out_features) == (101, 101, 4)


def test_identity_network_embeds_on_the_unit_sphere():
    net = IdentityNet(7, 4, 16).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net.embed(x).norm(dim=1), torch.ones(2))
    assert net(x).shape == (2, 7) and net(x).abs().max() <= 16
    assert len(net.levels(x)) == 3


def test_published_networks_load_their_files_and_refuse_others(tmp_path):
    torch.manual_seed(0)
    parser, identity, age = BiSeNetParser(64).network, IRSE(), AgeNet()
    files = {name: tmp_path / f"{name}.pth" for name in ("parser", "identity", "age")}
    torch.save({f"module.{k}": v for k, v in parser.state_dict().items()}, files["parser"])
    torch.save(identity.state_dict(), files["identity"])
    torch.save({"state_dict": age.state_dict()}, files["age"])
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    labels = load_parser(files["parser"], 64).labels(x)
    assert labels.shape == (1, 64, 64) and labels.max() < 19
    normal = (x / 2 + 0.5 - torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)) / torch.tensor(
        (0.229, 0.224, 0.225)
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.equal(labels, parser.eval()(normal)[0].argmax(1))
    loaded = load_identity(files["identity"])
    assert loaded.embed(x).norm().item() == pytest.approx(1, abs=1e-5)
    assert [f.shape[1] for f in loaded.levels(x)] == [64, 128, 256, 512]
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert torch.equal(load_age(files["age"])(x).years, age.eval()(x).years)
    for load, wrong in ((load_parser, "identity"), (load_identity, "age"), (load_age, "parser")):
        with pytest.raises(UserError, match="made for another model"):
            load(files[wrong])


@pytest.mark.parametrize(
    ("load", "option"),
    [
        (load_parser, "--parser-weights"),
        (load_identity, "--identity-weights"),
        (load_age, "--age-weights"),
    ],
)
def test_absent_weights_say_what_to_get_and_which_option(load, option, tmp_path):
    for path in (None, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match=option):
            load(path)


def test_published_names():
    with torch.device("meta"):
        names = {name: list(p.shape) for name, p in IRSE().state_dict().items()}
        parser = {name: list(p.shape) for name, p in BiSeNetParser().network.state_dict().items()}
    assert len(names) == 397 and names["output_layer.3.weight"] == [512, 25088]
    assert names["body.0.res_layer.5.fc1.weight"] == [4, 64, 1, 1]
    assert names["body.3.shortcut_layer.0.weight"] == [128, 64, 1, 1]
    assert "body.0.shortcut_layer.0.weight" not in names
    assert parser["cp.resnet.layer2.0.downsample.0.weight"] == [128, 64, 1, 1]
    assert parser["cp.arm32.conv_atten.weight"] == [128, 128, 1, 1]
    assert parser["conv_out16.conv_out.weight"] == [19, 64, 1, 1]


def test_small_parser_learns_a_layout():
    torch.manual_seed(0)
    parser = SmallParser(3, 4)
    labels = torch.randint(0, 3, (4, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = torch.stack([(labels == k).float() for k in range(3)], 1) * 2 - 1
    optimiser = torch.optim.Adam(parser.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(parser(image), labels).backward()
        optimiser.step()
    assert (parser.eval().labels(image) == labels).float().mean() > 0.95


def test_a_layout_without_skin_is_no_face():
    labels = torch.zeros(16, 16, dtype=torch.long)
    with pytest.raises(UserError, match="street.png: the parser found no face"):
        require_face(labels, "street.png")
    labels[4:12, 4:12] = 1
    require_face(labels, "face.png")
