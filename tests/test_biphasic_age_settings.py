"""Biphasic ageing: the full-size preset's numbers, and that training uses what its settings say."""

from dataclasses import astuple, replace

import helpers
import pytest
import torch

from biphasic_age import train as training
from biphasic_age.losses import Weights
from biphasic_age.model import SIZES, Generator
from biphasic_age.objective import Guides, generator_backward
from biphasic_age.stages import plan
from biphasic_age.train import PRESETS, train
from shared.runtime import UserError, parse_presets


def test_a_size_that_the_networks_cannot_halve_is_said():
    for changes in ({"image_size": 36}, {"scene_size": 30, "data": ("scene",), "limits": (1, 2, 3)}):
        with pytest.raises(UserError, match="a multiple of 8"):
            plan(replace(PRESETS["demo"], **changes))


def test_demo_draws_its_own_data_and_the_paper_preset_follows_the_protocol():
    demo, paper = PRESETS["demo"], PRESETS["paper"]
    assert demo.data == ("scene", "faces") and paper.data == ("cacd",)
    assert paper.limits == (30.0, 40.0, 50.0) and paper.image_size == 256
    learning = paper.recipe.steps, paper.batch_size, paper.recipe.lr, paper.betas
    assert learning == (200_000, 16, 1e-4, (0.5, 0.99))


def test_the_paper_preset_has_the_reconstructions_numbers():
    paper = PRESETS["paper"]
    assert (paper.warmup, paper.average, paper.flip, paper.d_layout) == (2000, 0.999, True, True)
    recipe = paper.recipe
    assert (recipe.size, recipe.output, recipe.jitter, recipe.critic_lr) == ("paper", "direct", 0.05, 1.0)
    # adversarial, age, identity, reconstruction, cycle, disentanglement; optional terms; years within age
    assert astuple(recipe.weights) == (1, 1, 1, 10, 10, 0.1, 0, 0, 0, 0.01, 0)
    assert (paper.age_width, paper.age_stages, paper.guide_lr) == (64, 6, 1e-4)


def test_training_takes_the_decay_and_the_discriminators_rate_from_its_settings(tmp_path, monkeypatch):
    decays, rates, finish = [], [], training.finish_step

    def watched(stage, *given):
        rates.append([optimiser.param_groups[0]["lr"] for optimiser in given[-1]])
        finish(stage, *given)

    monkeypatch.setattr(training, "follow", lambda average, net, decay: decays.append(decay))
    monkeypatch.setattr(training, "finish_step", watched)
    options = (*helpers.TINY["biphasic_age"], "--data", "scene", "--scene.variants", "full")
    options += ("--scene.steps", "2", "--scene.lr", "0.01", "--scene.critic-lr", "3", "--average", "0.7")
    train(parse_presets(PRESETS, "", ("demo", *options, "--device", "cpu", "--out", str(tmp_path / "run"))))
    assert decays == [0.7] * 2
    assert rates[-2:] == [[0.01, 0.03]] * 2


def test_every_call_of_the_generator_has_noise_of_its_own():
    """To the own age, to the target age, and back."""
    torch.manual_seed(0)
    net, noises = Generator(SIZES["unit"], classes=5), []
    net.projection.register_forward_pre_hook(lambda module, given: noises.append(given[2]))
    image, layout = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    ages = torch.tensor([0, 1]), torch.tensor([2, 3])
    weights = Weights(adversarial=0, age=0, identity=0)
    generator_backward(net, None, Guides(), image, layout, *ages, weights)
    assert len(noises) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(noises[a], noises[b])
