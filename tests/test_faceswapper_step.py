"""FaceSwapper: the step of the training loop itself against the official one, and its optimisers."""

import copy

import pytest
import torch
from test_faceswapper_losses import TinyRecogniser
from test_faceswapper_runs import learner_of

from faceswapper import literal
from faceswapper.train import update
from shared.runtime import start


def test_the_loops_step_is_the_official_one():
    """With plain gradient descent: the first step of Adam is a sign, which rounding turns over."""
    config, learner, _, batch = learner_of("full", mask_pyramid="cascade", r1_every=1, ema=0.999)
    torch.manual_seed(0)
    recogniser = TinyRecogniser()
    g, d, average = (copy.deepcopy(learner.models[n]) for n in ("generator", "discriminator", "average"))
    learner.optimisers = {
        "adam_g": torch.optim.SGD(learner.generator.parameters(), 1e-2),
        "adam_d": torch.optim.SGD(learner.discriminator.parameters(), 1e-2),
    }
    plain = [torch.optim.SGD(net.parameters(), 1e-2) for net in (g, d)]
    accelerator = start(config)
    for iteration in range(2):
        update(config, learner, recogniser.embed, batch, iteration, accelerator)
        halves = tuple(half.clone() for x in batch for half in x.chunk(2))
        literal.train_step(g, d, average, recogniser, halves, *plain, learner.weights)
    # an average moves by a thousandth of a step
    for mine, official, near in ((learner.generator, g, 1e-4), (learner.discriminator, d, 1e-4),
                                 (learner.average, average, 1e-6)):  # fmt: skip
        for (name, p), q in zip(mine.named_parameters(), official.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=near, rtol=10 * near, msg=lambda m, n=name: f"{n}: {m}")


def test_optimisers_and_starts_are_the_official_ones():
    _, learner, _, _ = learner_of("full")
    for optimiser in learner.optimisers.values():
        assert type(optimiser) is torch.optim.Adam, "whose weight decay is coupled, unlike AdamW's"
        assert {(group["eps"], group["weight_decay"]) for group in optimiser.param_groups} == {(1e-8, 1e-4)}
    own = {id(p) for p in learner.generator.id_encoder.parameters()}
    rest, identity = learner.optimisers["adam_g"].param_groups
    assert {id(p) for p in identity["params"]} == own and own.isdisjoint(map(id, rest["params"]))
    assert len(rest["params"]) + len(own) == len(list(learner.generator.parameters()))
    first = learner.discriminator.main[0]
    assert first.bias.abs().max() == 0
    assert first.weight.std().item() == pytest.approx((2 / (6 * 9)) ** 0.5, rel=0.2)
