"""Biphasic face ageing: networks against closed forms and slow references, and what reaches what."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from biphasic_age import naive
from biphasic_age.constraint import ConstraintNet
from biphasic_age.discriminator import Discriminator, TwoScales
from biphasic_age.layouts import (
    CELEBAMASK_CLASSES,
    CLASSES,
    from_celebamask,
    mirrored,
    one_hot,
    paint_layout,
    resize_labels,
    to_labels,
)
from biphasic_age.model import (
    GATE_START,
    SIZES,
    Generator,
    Injection,
    InjectionBlock,
    Switches,
)
from biphasic_age.projection import NoisyLayout, ProjectionNet
from shared import faces
from shared.bench import count_macs, count_parameters

UNIT = SIZES["unit"]


def blobs(batch: int = 2, size: int = 16, classes: int = 5, seed: int = 0) -> torch.Tensor:
    """Label maps (batch, size, size) of blocks of 4x4 pixels."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.randint(0, classes, (batch, size // 4, size // 4), generator=rng)
    return small.repeat_interleave(4, 1).repeat_interleave(4, 2)


def images(batch: int = 2, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(**options) -> Generator:
    torch.manual_seed(0)
    net = Generator(UNIT, classes=5, **options)
    for module in net.modules():  # stronger weights than the start's, so that effects can be seen
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, 0, 0.2)
    return net


# --- size ---------------------------------------------------------------------------------------------


def test_full_size_has_the_reconstructions_parameters_and_cost():
    with torch.device("meta"):
        net = Generator(SIZES["paper"])
        x, labels = torch.zeros(1, 3, 256, 256), torch.zeros(1, 256, 256, dtype=torch.long)
        target = torch.zeros(1, dtype=torch.long)
        parts = {name: count_parameters(part) / 1e6 for name, part in net.named_children()}
        gmacs = count_macs(net, x, labels, target, 0) / 1e9
        plain = Discriminator(layout=False)
        scores = Discriminator()(x, labels, target)
        critic_gmacs = count_macs(plain, x, labels, target) / 1e9
        fast = Generator(SIZES["fast"])
    expected = {"encoder": 3.027, "projection": 0.181, "constraint": 1.495, "decoder": 8.352}
    assert parts == pytest.approx(expected, abs=5e-4)
    assert count_parameters(net) / 1e6 == pytest.approx(13.06, abs=0.005)
    assert count_parameters(fast) / 1e6 == pytest.approx(3.28, abs=0.005)
    # 92.0 with the 1x1 skips after the enlargement, which is where they are not computed here
    skips = (256 * 128 * 128**2 + 128 * 64 * 256**2) * 3 / 4 / 1e9
    assert gmacs + skips == pytest.approx(92.0, abs=0.1)
    assert count_parameters(plain) / 1e6 == pytest.approx(2.77, abs=0.005)
    assert critic_gmacs == pytest.approx(3.2, abs=0.05)
    assert scores.shape == (1, 1, 30, 30)


@pytest.mark.parametrize("output", ["direct", "residual", "gated"])
def test_output_is_an_image_and_soft_maps_have_three_sizes(output):
    net = make(output=output)
    out = net.explain(images(), blobs(), torch.tensor([1, 3]))
    assert out.image.shape == (2, 3, 16, 16) and out.image.abs().max() <= 1
    assert [tuple(m.shape) for m in out.soft] == [(2, 4, s, s) for s in (4, 8, 16)]
    assert [m.shape for m in out.maps] == [m.shape for m in out.soft]
    assert out.features.attention.shape == (2, 16, 4, 4)
    assert out.features.attention.min() > 0 and out.features.attention.max() < 1
    assert out.features.logits.shape == (2, 4)


def test_output_modes_are_their_formulas():
    x, labels, target = images(), blobs(), torch.tensor([0, 2])
    for output in ("direct", "residual", "gated"):
        net = make(output=output).eval()
        with torch.no_grad():
            net.decoder.last.weight.zero_()
            net.decoder.last.bias.fill_(0.3)
            y = net(x, labels, target, noise=0)
            if output == "direct":
                expected = torch.full_like(x, 0.3).tanh()
            elif output == "residual":
                expected = (x + 0.3).clamp(-1, 1)
            else:
                m = net.decoder.gate(net.maps(net.features(x), labels, target, 0)[2]).sigmoid()
                expected = x + m * (torch.tensor(0.3).tanh() - x)
        assert torch.allclose(y, expected, atol=1e-6), output


# --- noisy layouts and ProjectionNet ------------------------------------------------------------------


def test_a_strong_start_is_heard_and_the_gate_starts_nearly_shut():
    layout = blobs(2, 16, 5)
    told = {}
    for gain in (None, 1.0):
        torch.manual_seed(0)
        net = Generator(replace(SIZES["unit"], gain=gain), 5, 4, "gated").eval()
        assert (net.decoder.gate.bias == GATE_START).all()
        with torch.no_grad():
            young, old = (net.soft_maps(layout, torch.full((2,), t), 0.0)[0] for t in (0, 3))
        told[gain] = (young - old).std()
        critic = Discriminator(4, 2, 5, gain=gain)
        spread = critic.first.weight.std() * critic.first.weight[0].numel() ** 0.5
        assert (spread > 0.8) == (gain is not None)
    assert told[1.0] > 30 * told[None]


def test_noise_starts_at_half_and_stays_inside_its_region():
    noisy = NoisyLayout(5, 4)
    assert torch.allclose(noisy.sigma(), torch.full((4, 5), 0.5))
    labels = blobs()
    layout, age = one_hot(labels, 5), torch.eye(4)[:2]
    z = noisy(layout, labels, age, torch.randn(2, 1, 16, 16))
    assert (z[layout == 0] == 0).all() and (z[layout == 1] != 1).any()
    assert torch.equal(noisy(layout, labels, age, None), layout)


def test_noise_is_the_formula_with_a_map_for_each_class():
    noisy = NoisyLayout(5, 4)
    torch.nn.init.normal_(noisy.raw_sigma)
    labels, noise = blobs(), torch.randn(2, 5, 16, 16)
    s, age = one_hot(labels, 5), torch.tensor([[0, 1.0, 0, 0], [0.25, 0, 0.75, 0]])
    sigma = F.softplus(noisy.raw_sigma)
    expected = torch.stack([s[b] + (age[b] @ sigma)[:, None, None] * s[b] * noise[b] for b in range(2)])
    assert torch.allclose(noisy(s, labels, age, noise), expected, atol=1e-6)
    z = noisy(s, labels, age, noise)
    z.sum().backward()
    assert noisy.raw_sigma.grad.abs().sum() > 0


def test_one_map_of_noise_has_the_spread_of_a_map_each():
    noisy, labels = NoisyLayout(5, 4), blobs(1, 64)
    s, age = one_hot(labels, 5), torch.eye(4)[:1]
    for maps in (1, 5):
        noise = torch.randn(1, maps, 64, 64, generator=torch.Generator().manual_seed(3))
        inside = noisy(s, labels, age, noise)[s == 1]
        assert inside.std().item() == pytest.approx(0.5, rel=0.05)
        assert inside.mean().item() == pytest.approx(1.0, abs=0.03)


def test_no_class_sees_another_before_the_mixing():
    """Moving class 3's region changes only class 3's filters and, where it was, the class that took over."""
    p = ProjectionNet(5, 4, 4, per_class=2)
    a = blobs()
    b = a.clone()
    b[a == 3] = 0
    per_class = [p.own(one_hot(labels, 5)).unflatten(1, (5, 2)) for labels in (a, b)]
    changed = (per_class[0] - per_class[1]).abs().amax((0, 2, 3, 4)) > 0
    assert changed.tolist() == [True, False, False, True, False]


def test_age_shift_acts_inside_the_region_only():
    p = ProjectionNet(5, 4, 4, per_class=2)
    labels, seen = blobs(1), []
    p.mix.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].unflatten(1, (5, 2))))
    with torch.no_grad():
        p.age.weight.zero_()
        p(labels, torch.tensor([2]))
        p.age.weight[2, 10:] = 3.0  # the shifts of group 2; the scales stay 0
        p(labels, torch.tensor([2]))
    inside = one_hot(labels, 5)[:, :, None].expand_as(seen[0]) == 1
    difference = seen[1] - seen[0]
    assert (difference[~inside] == 0).all() and (difference[inside] != 0).all()


def test_recomputing_in_the_backward_pass_changes_no_gradient():
    gradients = []
    for recompute in (True, False):
        torch.manual_seed(0)
        p = ProjectionNet(5, 4, 4, per_class=2)
        p.recompute = recompute
        torch.manual_seed(1)
        maps = p(blobs(), torch.tensor([0, 3]), torch.randn(2, 1, 16, 16))
        sum(m.square().sum() for m in maps).backward()
        gradients.append([parameter.grad for parameter in p.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- ConstraintNet ------------------------------------------------------------------------------------


def test_attention_splits_features_without_loss():
    c = ConstraintNet(16, 4, 4)
    features = torch.randn(2, 16, 4, 4)
    parts = c.disentangle(features)
    assert torch.allclose(parts.age + parts.identity, features, atol=1e-6)
    assert torch.allclose(parts.age, parts.attention * features)
    assert torch.allclose(parts.logits, c.classify(parts.age.mean((2, 3))))


def test_constrained_maps_are_gate_times_soft_map_plus_bias():
    c = ConstraintNet(16, 4, 4)
    features, target = torch.randn(1, 16, 4, 4), torch.tensor([1])
    soft = [torch.randn(1, 4, s, s) for s in (4, 8, 16)]
    maps = c(features, target, soft)
    g, b = c.age.weight[1].chunk(2)
    context = F.leaky_relu(c.context(features * (1 + g[:, None, None]) + b[:, None, None]), 0.2)
    for gates, latent, found in zip(c.gates, soft, maps, strict=True):
        both = F.interpolate(gates(context), latent.shape[-2:], mode="bilinear")
        assert torch.allclose(found, latent * both[:, :4].sigmoid() + both[:, 4:], atol=1e-5)


# --- injection ----------------------------------------------------------------------------------------


def test_injection_is_spades_formula():
    injection, x, maps = Injection(6, 4), torch.randn(3, 6, 8, 8), torch.randn(3, 4, 8, 8)
    torch.nn.init.ones_(injection.gamma.bias)
    mean, var = x.mean((0, 2, 3), True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    gamma = F.conv2d(maps, injection.gamma.weight, padding=1)
    expected = (x - mean) / (var + 1e-5).sqrt() * (1 + gamma) + injection.beta(maps)
    assert torch.allclose(injection(x, maps), expected, atol=1e-5)


def test_enlarging_after_norm_and_skip_is_enlarging_before():
    fast = InjectionBlock(8, 4, 4, up=True)
    x, maps = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 8, 8)
    assert torch.allclose(fast(x, maps), naive.block(fast, x, maps), atol=1e-5)


@pytest.mark.parametrize("output", ["direct", "residual"])
def test_whole_generator_equals_the_plain_form(output):
    net = make(output=output)
    with torch.no_grad():
        net.projection.noisy.raw_sigma.fill_(-50.0)  # softplus gives 0: no noise in either form
    x, labels, target = images(), blobs(), torch.tensor([0, 3])
    y, logits = naive.generate(net, x, labels, target)
    explained = net.explain(x, labels, target)
    assert torch.allclose(explained.image, y, atol=1e-4)
    assert torch.allclose(explained.features.logits, logits, atol=1e-5)


# --- ages, layouts, noise as inputs -------------------------------------------------------------------


def test_an_age_between_groups_is_a_mixture_of_their_embeddings():
    net = make().eval()
    x, labels = images(1), blobs(1)
    with torch.no_grad():
        pure = [net(x, labels, torch.tensor([k]), 0) for k in (1, 2)]
        ends = [net(x, labels, F.one_hot(torch.tensor([k]), 4).float(), 0) for k in (1, 2)]
        middle = net(x, labels, torch.tensor([[0, 0.5, 0.5, 0]]), 0)
        near = net(x, labels, torch.tensor([[0, 0.999, 0.001, 0]]), 0)
    assert torch.equal(pure[0], ends[0]) and torch.equal(pure[1], ends[1])
    assert (near - pure[0]).abs().max() < 0.01 < (middle - pure[0]).abs().max()


def test_layout_as_labels_bytes_or_one_hot_gives_the_same():
    net, x, labels, target = make().eval(), images(), blobs(), torch.tensor([0, 1])
    with torch.no_grad():
        outputs = [net(x, form, target, 0) for form in (labels, labels.byte(), one_hot(labels, 5))]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with pytest.raises(ValueError, match="layout must be"):
        to_labels(torch.zeros(1, 3, 4, 4), 5)


def test_noise_is_drawn_given_or_left_out():
    net, x, labels, target = make().eval(), images(1), blobs(1), torch.tensor([2])
    with torch.no_grad():
        seeded = [net(x, labels, target, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        still = [net(x, labels, target, noise=0) for _ in range(2)]
        same = net(x, labels, target, noise=torch.zeros(1, 1, 16, 16))
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert torch.equal(still[0], still[1]) and torch.allclose(still[0], same)
    with pytest.raises(ValueError, match="noise must be"):
        net(x, labels, target, noise=1.0)


# --- switches -----------------------------------------------------------------------------------------


def test_without_layout_the_layout_changes_nothing():
    x, target = images(1), torch.tensor([2])
    for on in (True, False):
        net = make(switches=Switches(layout=on)).eval()
        with torch.no_grad():
            a, b = (net(x, blobs(1, seed=s), target, 0) for s in (0, 1))
        assert torch.equal(a, b) is not on


def test_without_noise_two_calls_agree():
    net = make(switches=Switches(noise=False)).eval()
    with torch.no_grad():
        a, b = (net(images(1), blobs(1), torch.tensor([2])) for _ in range(2))
    assert torch.equal(a, b)


def test_without_constraint_all_features_enter_the_trunk_and_maps_are_soft():
    net = make(switches=Switches(constraint=False))
    out = net.explain(images(), blobs(), torch.tensor([1, 3]))
    assert net.constraint is None and out.features.logits is None
    assert all(a is b for a, b in zip(out.soft, out.maps, strict=True))
    assert torch.equal(out.features.identity, out.features.age)


def test_without_attention_the_features_are_not_split():
    net = make(switches=Switches(attention=False))
    features = net.features(images())
    assert features.attention is None and torch.equal(features.age, features.identity)
    assert features.logits.shape == (2, 4)


def test_without_projection_the_hard_layout_is_injected():
    net = make(switches=Switches(projection=False)).eval()
    labels = blobs(1)
    soft = net.soft_maps(labels, torch.tensor([0]))
    lifted = net.projection.lift[2]
    assert torch.allclose(soft[2], lifted(one_hot(labels, 5)), atol=1e-6)
    with torch.no_grad():
        young, old = (net(images(1), labels, torch.tensor([k])) for k in (0, 3))
    assert not torch.equal(young, old), "ConstraintNet alone still carries the age"


# --- discriminator ------------------------------------------------------------------------------------


def test_discriminator_looks_at_age_and_layout():
    torch.manual_seed(0)
    critic = Discriminator(4, 2, classes=5).eval()
    blind = Discriminator(4, 2, classes=5, layout=False).eval()
    x = images(1)
    with torch.no_grad():
        assert not torch.equal(critic(x, blobs(1), torch.tensor([0])), critic(x, blobs(1), torch.tensor([1])))
        for net, differs in ((critic, True), (blind, False)):
            a, b = (net(x, blobs(1, seed=s), torch.tensor([0])) for s in (0, 1))
            assert (not torch.equal(a, b)) is differs


def test_two_kinds_of_pictures_in_one_batch_score_as_alone():
    torch.manual_seed(0)
    critic = Discriminator(4, 3, classes=5).eval()
    x, labels, target = images(4, 32), blobs(4, 32), torch.tensor([0, 1, 2, 3])
    alone = torch.cat([critic(x[k : k + 2], labels[k : k + 2], target[k : k + 2]) for k in (0, 2)])
    assert torch.allclose(critic(x, labels, target), alone, atol=1e-6)


def test_two_scales_see_the_picture_and_its_half():
    critic = TwoScales(width=4, stages=2, classes=5)
    scores = critic(images(), blobs(), torch.tensor([0, 1]))
    assert [tuple(s.shape) for s in scores] == [(2, 1, 6, 6), (2, 1, 2, 2)]


def test_spectral_norm_bounds_every_later_layer():
    torch.manual_seed(0)
    critic = Discriminator(4, 3, classes=5)
    for _ in range(30):
        critic(images(), blobs(), torch.tensor([0, 1]))
    for layer in critic.layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert largest == pytest.approx(1.0, abs=0.02)


# --- layouts ------------------------------------------------------------------------------------------


def test_class_tables_name_the_same_classes():
    assert CLASSES == faces.BISENET_CLASSES
    assert sorted(CLASSES) == sorted(CELEBAMASK_CLASSES)
    labels = torch.arange(19, dtype=torch.uint8)
    assert [CLASSES[i] for i in from_celebamask(labels).tolist()] == list(CELEBAMASK_CLASSES)


def test_mirroring_turns_the_map_and_exchanges_sides():
    labels = torch.tensor([[[CLASSES.index(name) for name in ("l_eye", "skin", "r_brow", "l_ear")]]])
    wanted = ["r_ear", "l_brow", "skin", "r_eye"]
    assert [CLASSES[i] for i in mirrored(labels)[0, 0].tolist()] == wanted
    assert torch.equal(mirrored(mirrored(labels)), labels)


def test_resizing_invents_no_label():
    labels = torch.tensor([[[0, 17], [17, 0]]], dtype=torch.uint8)
    larger = resize_labels(labels, (7, 5))
    assert larger.shape == (1, 7, 5) and larger.dtype == torch.uint8
    assert set(larger.unique().tolist()) == {0, 17}
    assert paint_layout(larger).shape == (1, 3, 7, 5)
