"""MOST-Net: the settings at full size, the weighted terms, and which weights are kept."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from most_net import trials
from most_net.data import Batch, Pairs, simple_pairs
from most_net.learner import Learner
from most_net.metrics import ssim
from most_net.model import Architecture, MostNet
from most_net.train import PRESETS, Weights, objective
from most_net.trials import plan, split_data

NO_GAN = {"perceptual": 0.0, "adversarial": 0.0}
SMALL = Architecture(base=4, downs=1, kernel=3, dilations=(1,), decoder_blocks=1, slots=8)


def test_the_full_size_has_the_specified_settings():
    paper = PRESETS["paper"]
    assert (paper.arch.base, paper.arch.channels, paper.arch.slots) == (64, 256, 512)
    assert (paper.arch.tau, paper.arch.momentum, paper.arch.revive_after) == (0.07, 0.9, 500)
    assert (paper.lr, paper.betas, paper.batch, paper.decay) == (2e-4, (0.5, 0.999), 4, 0.5)
    assert paper.steps * paper.batch / 268 == pytest.approx(800, rel=0.01)  # epochs
    assert (paper.size, paper.load, paper.warmup, paper.holdout, paper.select) == (256, 286, 200, 0.1, "val")
    weights = {"pixel": 10, "reconstruction": 10, "ssim": 0, "perceptual": 1, "adversarial": 1}
    assert paper.weights == Weights(**weights, align=0.5, slot=0, match=0)


@pytest.mark.parametrize("variant", ["none", "memory", "most"])
def test_every_term_has_its_weight(variant):
    torch.manual_seed(0)
    net = MostNet(SMALL, "none" if variant == "none" else "dynamic")
    batch = Batch(torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 1, 16, 16) * 2 - 1, 0)
    out = net(batch.photo, batch.sketch)

    def terms(**weights: float) -> dict[str, float]:
        config = replace(PRESETS["paper"], arch=SMALL, weights=Weights(**NO_GAN, **weights), warmup=0)
        trial = replace(plan(config)[0], variant=variant)
        return {k: float(v.detach()) for k, v in objective(config, trial, net, out, batch, 0).items()}

    everything = ("pixel", "reconstruction", "ssim", "align", "slot", "match")
    expected = {"none": {"pixel", "ssim"}, "memory": {"pixel", "ssim", "reconstruction"}}
    plain = terms(**dict.fromkeys(everything, 1.0))
    assert plain.keys() == expected.get(variant, set(everything))
    assert plain["pixel"] == pytest.approx(float((out["sketch"] - batch.sketch).abs().mean().detach()))
    ours, theirs = (127.5 * x.detach() for x in (out["sketch"], batch.sketch))  # a range of 2 for 255
    assert plain["ssim"] == pytest.approx(1 - float(ssim(ours, theirs).mean()), abs=1e-4)
    given = {name: 2.0 + i for i, name in enumerate(everything)}
    weighted = terms(**given)
    assert weighted == pytest.approx({name: given[name] * value for name, value in plain.items()}, rel=1e-5)
    assert terms().keys() == plain.keys() - {"ssim", "slot", "match"}  # off by default


@pytest.mark.parametrize("average", [False, True])
def test_the_weights_that_are_kept(average):
    """The best on held-out pairs, of the average where there is one."""
    torch.manual_seed(0)
    learner = Learner("x", MostNet(SMALL), None, 1e-3, (0.5, 0.999), average, keep_best=True)
    assert learner.current is (learner.average if average else learner.net)
    held_out = simple_pairs(2, 0, 16)
    values = []
    for tone in (-1.0, 1.0, -1.0):  # black pages, paper, black pages
        with torch.no_grad():
            for weight in learner.current.decoder.parameters():
                weight.zero_()
            learner.current.decoder.body[-1].bias.fill_(tone)
        values.append(learner.validate(held_out, 16))
    assert values[0] == values[2] < values[1] == learner.best_ssim
    assert learner.best.decoder.body[-1].bias.item() == 1


def test_of_88_students_68_train_and_20_validate(monkeypatch):
    names = tuple(f"{i:02d}" for i in range(88))
    pixels = torch.arange(88, dtype=torch.uint8)[:, None, None, None]
    pairs = Pairs(pixels.expand(-1, 3, 1, 1), pixels, names, torch.zeros(88, dtype=torch.long))
    monkeypatch.setattr(trials, "load_dataset", lambda *arguments: (pairs, None))
    train, held_out, test = split_data(PRESETS["cuhk"])
    assert (len(train), len(test)) == (68, 20) and test is held_out
    assert set(train.names) | set(test.names) == set(names)
    assert [trial.variant for trial in plan(PRESETS["cuhk"])] == ["none", "memory", "most", "unet"]
    gaps = torch.tensor([int(name) for name in test.names]).diff()
    assert gaps.min() >= 4 and gaps.max() <= 5  # spread evenly over the sorted names


@pytest.mark.skipif("PAPERS_DATA" not in os.environ, reason="PAPERS_DATA names no folder of public sets")
def test_the_students_are_read_as_they_lie():
    root = Path(os.environ["PAPERS_DATA"]) / "cufs/cuhk_student"
    train, held_out, _ = split_data(replace(PRESETS["cuhk"], data_root=root))
    assert (len(train), len(held_out)) == (68, 20)
    assert train.photos.shape == (68, 3, 125, 100) and train.sketches.shape == (68, 1, 125, 100)
    assert train.sketches.float().mean() > 128  # paper
