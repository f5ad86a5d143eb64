"""FaceSwapper: every term of the objective against closed forms and against the official step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from faceswapper import literal, losses
from faceswapper.losses import Weights
from faceswapper.model import Discriminator, Generator, Size, initialise, swapped
from shared.loop import follow

TINY = Size(img_size=32, channel_base=128, max_channels=8, id_dim=6)


class TinyRecogniser(nn.Module):
    """Stands for IR-SE50 in the official step: picture resized to 112 -> (unit embedding, features)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 7 * 7, 5)

    def forward(self, x):
        return F.normalize(self.layer(F.avg_pool2d(x, 16).flatten(1))), []

    def embed(self, x):
        return self(F.interpolate(x, (112, 112), mode="bilinear", align_corners=True))[0]


def world(batch: int = 2):
    torch.manual_seed(0)
    pairs = [torch.rand(batch, 3, 32, 32) * 2 - 1 for _ in range(2)]
    pairs += [torch.rand(batch, 3, 32, 32) for _ in range(2)]
    pairs += [(torch.rand(batch, 1, 32, 32) > 0.5).float() for _ in range(2)]
    g, d = initialise(Generator(TINY)), initialise(Discriminator(TINY))
    for net in (g, d):
        for p in net.parameters():
            if p.ndim == 1:
                nn.init.normal_(p, 0, 0.3)
    return g, d, TinyRecogniser(), tuple(pairs)


# --- closed forms -----------------------------------------------------------------------------------


def test_weights_are_the_published_ones():
    assert Weights() == Weights(1.0, 10.0, 1.0, 2.0, 1.0, 1.0, 0.0)


def test_adversarial_terms():
    logits = torch.tensor([[0.0], [2.0]])
    for real in (True, False):
        wanted = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
        torch.testing.assert_close(losses.bce(logits, real), wanted)


def test_r1_of_a_linear_discriminator():
    x = torch.randn(3, 3, 4, 4, requires_grad=True)
    w = torch.randn(3 * 16)
    logits = x.flatten(1) @ w[:, None]
    torch.testing.assert_close(losses.r1(logits, x), 0.5 * w.square().sum())


def test_identity_and_reconstruction():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(losses.identity(a, b), torch.tensor((0 + 1 - 0.5**0.5) / 2))
    assert losses.reconstruction(torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 3, 2, 2)) == 0.5


def test_gram_is_divided_by_positions_and_channels():
    f = torch.randn(1, 2, 3, 4)
    flat = f.reshape(2, 12)
    torch.testing.assert_close(losses.gram(f)[0], flat @ flat.T / 24)


def test_attribute_losses_look_at_their_side_of_the_mask_alone():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    f, face, background = (torch.randn(1, 3, 8, 8) for _ in range(3))
    other_face, other_background = f.clone(), f.clone()
    other_face[..., 4:] = face[..., 4:]
    other_background[..., :4] = background[..., :4]
    assert losses.attribute_background([f], [other_face], [mask]) == 0
    assert losses.attribute_face([f], [other_background], [mask]) == 0
    assert losses.attribute_face([f], [other_face], [mask]) > 0
    wanted = (f - other_background)[..., :4].abs().sum() / f.numel()
    torch.testing.assert_close(losses.attribute_background([f], [other_background], [mask]), wanted)
    # Statistics inside the face, not places: another order of the face's columns changes nothing.
    moved = f.clone()
    moved[..., 4:] = f[..., 4:].flip(-1)
    assert losses.attribute_face([f], [moved], [mask]) < 1e-7


def test_mask_levels():
    mask = (torch.rand(1, 1, 32, 32) > 0.5).float()
    sides = [8, 8, 16, 32]
    level, cascade = mask, losses.mask_levels(mask, sides)
    for side, found in zip(sides, cascade, strict=True):
        level = F.interpolate(level, (side, side), mode="bilinear", align_corners=False)
        assert torch.equal(found, level)
    direct = losses.mask_levels(mask, sides, "direct")
    assert torch.equal(direct[-1], mask)
    torch.testing.assert_close(direct[0], mask.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5)))


# --- against the official step ----------------------------------------------------------------------


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros(1) if g is None else g for g in found]


def test_both_losses_equal_the_official_ones_with_their_gradients():
    g, d, r, pairs = world()
    w = Weights(0.7, 9.0, 1.3, 200.0, 1.7, 0.4)
    batch = losses.pair(*pairs)
    swaps = losses.swap_both(g, batch)
    terms = losses.discriminator_real(d, batch, w) | losses.discriminator_fake(d, batch, swaps)
    official = literal.discriminator_loss(g, d, tuple(x.clone() for x in pairs), w)
    torch.testing.assert_close(sum(terms.values()), official, atol=1e-4, rtol=1e-4)
    for a, b in zip(gradients(sum(terms.values()), d), gradients(official, d), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

    found = losses.generator_terms(g, d, r.embed, batch, swaps, w)
    wanted = literal.generator_loss(g, d, r, pairs, w)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, _), a, b in zip(
        g.named_parameters(),
        gradients(sum(found.values()), g),
        gradients(sum(wanted.values()), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_whole_training_step_equals_the_official_one():
    g, d, r, pairs = world()
    nets = {"fast": (g, d), "official": (copy.deepcopy(g), copy.deepcopy(d))}
    averages = {}
    for form, (g, d) in nets.items():
        average = averages[form] = copy.deepcopy(g).requires_grad_(False)
        g_opt, d_opt = (torch.optim.SGD(net.parameters(), 1e-2) for net in (g, d))
        for _ in range(2):
            if form == "official":
                batch = tuple(x.clone() for x in pairs)
                literal.train_step(g, d, average, r, batch, g_opt, d_opt, Weights())
                continue
            batch = losses.pair(*pairs)
            swaps = losses.swap_both(g, batch)
            d.requires_grad_(True)
            d_opt.zero_grad()
            sum(losses.discriminator_real(d, batch, Weights()).values()).backward()
            sum(losses.discriminator_fake(d, batch, swaps).values()).backward()
            d_opt.step()
            d.requires_grad_(False)
            g_opt.zero_grad()
            sum(losses.generator_terms(g, d, r.embed, batch, swaps, Weights()).values()).backward()
            g_opt.step()
            follow(average, g, 0.999)
    for a, b in zip(nets["fast"], nets["official"], strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for p, q in zip(averages["fast"].parameters(), averages["official"].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)


# --- what reaches what ------------------------------------------------------------------------------


def test_the_discriminators_step_leaves_the_generator_alone():
    g, d, _, pairs = world()
    batch = losses.pair(*pairs)
    swaps = losses.swap_both(g, batch)
    losses.discriminator_fake(d, batch, swaps)["d_fake"].backward()
    sum(losses.discriminator_real(d, batch, Weights()).values()).backward()
    assert all(p.grad is None for p in g.parameters())
    assert all(p.grad is not None for p in d.parameters())
    assert batch.picture.grad is None


def test_what_the_generator_never_trains_is_what_the_spec_of_the_release_says():
    """Side heads and the unused 1x1 of the decoder get no gradient, in the official networks 0.177 M."""
    g, d, r, pairs = world()
    batch = losses.pair(*pairs)
    swaps = losses.swap_both(g, batch)
    sum(losses.generator_terms(g, d, r.embed, batch, swaps, Weights()).values()).backward()
    unused = {n for n, p in g.named_parameters() if p.grad is None}
    assert unused and all("rgb_converters" in n or ("org_decoder" in n and "conv1x1" in n) for n in unused)
    with torch.device("meta"):
        whole = Generator(Size())
    count = sum(
        p.numel()
        for n, p in whole.named_parameters()
        if "rgb_converters" in n or ("org_decoder" in n and "conv1x1" in n)
    )
    assert count / 1e6 == pytest.approx(0.177, abs=0.001)


def test_side_pictures_learn_only_when_asked():
    g, d, r, pairs = world(1)
    batch = losses.pair(*pairs)
    swaps = losses.swap_both(g, batch)
    weights = Weights(0, 0, 0, 0, 0, 0, side=2.0)
    (name, loss), *others = losses.generator_terms(g, None, r.embed, batch, swaps, weights).items()
    loss.backward()
    assert name == "side" and not others
    assert all(p.grad.abs().sum() > 0 for p in g.org_decoder.rgb_converters.parameters())
    small = F.avg_pool2d(batch.picture, 2)
    assert losses.side_reconstruction([small + 0.5, batch.picture], batch.picture) == pytest.approx(0.25)


def test_no_stop_gradient_in_the_attribute_losses():
    f, g = (torch.randn(1, 3, 8, 8, requires_grad=True) for _ in range(2))
    mask = torch.full((1, 1, 8, 8), 0.5)
    for term in (losses.attribute_face, losses.attribute_background):
        for gradient in torch.autograd.grad(term([f], [g], [mask]), (f, g)):
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["adversarial", "identity", "reconstruction", "attribute_face", "attribute_background"]
)
def test_a_weight_of_zero_takes_its_term_out(name):
    g, d, r, pairs = world(1)
    batch = losses.pair(*pairs)
    swaps = losses.swap_both(g, batch)
    with torch.no_grad():
        every = losses.generator_terms(g, d, r.embed, batch, swaps, Weights())
        less = losses.generator_terms(g, d, r.embed, batch, swaps, Weights(**{name: 0.0}))
    assert every.keys() - less.keys() == {name}


def test_lazy_r1():
    _, d, _, pairs = world(1)
    batch = losses.pair(*pairs)
    full = losses.discriminator_real(d, batch, Weights())
    assert "d_r1" not in losses.discriminator_real(d, batch, Weights(), penalty=0)
    torch.testing.assert_close(losses.discriminator_real(d, batch, Weights(), 16)["d_r1"], 16 * full["d_r1"])
    assert "d_r1" not in losses.discriminator_real(d, batch, Weights(r1=0))


def test_partners_lie_in_the_other_half():
    x = torch.arange(6)
    assert swapped(x).tolist() == [3, 4, 5, 0, 1, 2]
    g, _, _, pairs = world(1)
    a, b, lm_a, lm_b, mask_a, mask_b = pairs
    x_ab, x_ba = losses.swap_both(g, losses.pair(*pairs)).swap.picture.chunk(2)
    torch.testing.assert_close(x_ba, g.swap(a, b, lm_b, mask_b), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x_ab, g.swap(b, a, lm_a, mask_a), atol=1e-5, rtol=1e-4)
