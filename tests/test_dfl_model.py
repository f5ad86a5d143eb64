"""dfl: the networks and the terms of the objective, against closed forms."""

import json
import math

import pytest
import torch
from torch import nn

from dfl import losses
from dfl.model import (
    Critic,
    GaussianCritic,
    TwoBranch,
    build_backbone,
    load_extractors,
    load_official,
    official,
)
from shared.bench import count_macs, count_parameters
from shared.runtime import REPOSITORY, UserError

# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "width", "parameters", "mmac"),
    [
        ("mlp", (3, 8, 8), 32, 14_432, 0.0144),
        ("digit_cnn", (3, 28, 28), 512, 14_214_080, 47.8),
        ("alexnet_bn", (3, 256, 256), 4096, 57_022_528, 923),
        ("resnet18", (3, 224, 224), 512, 11_176_512, 1814),
    ],
)
def test_extractors_have_their_size(name, shape, width, parameters, mmac):
    net = build_backbone(name, None, shape).eval()
    assert net.width == width and count_parameters(net) == parameters
    assert count_macs(net, torch.zeros(1, *shape)) / 1e6 == pytest.approx(mmac, rel=0.01)
    assert net(torch.zeros(2, *shape)).shape == (2, width)


@pytest.mark.parametrize(("name", "parameters"), [("digit_cnn", 14_219_210), ("alexnet_bn", 57_063_498)])
def test_official_networks_have_the_public_names_and_shapes(name, parameters):
    wanted = json.loads((REPOSITORY / "dfl" / "keys.json").read_text())[name]
    net = official(name)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == wanted
    assert count_parameters(net) == parameters


def test_fedbn_files(tmp_path):
    net = official("digit_cnn")
    torch.nn.init.constant_(net.fc3.bias, 7.0)
    state = net.state_dict()
    torch.save({"server_model": state, "model_0": state, "a_iter": 99}, tmp_path / "fedbn")
    for which in ("server_model", "model_0"):
        assert load_official("digit_cnn", tmp_path / "fedbn", which).fc3.bias[0] == 7
    torch.save(state, tmp_path / "bare.pth")
    assert load_official("digit_cnn", tmp_path / "bare.pth").fc3.bias[0] == 7
    with pytest.raises(UserError, match="no entry 'model_9'; the checkpoint holds model_0, server_model"):
        load_official("digit_cnn", tmp_path / "fedbn", "model_9")
    with pytest.raises(UserError, match="made for another model"):
        load_official("alexnet_bn", tmp_path / "fedbn")
    with pytest.raises(UserError, match="no official network"):
        official("vgg")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth: holds no state dict"):
        load_official("digit_cnn", tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth: holds no state dict"):
        load_extractors(tmp_path / "list.pth", net)


def test_every_extractor_starts_from_one_file(tmp_path):
    net = TwoBranch(lambda: build_backbone("digit_cnn", None, (3, 28, 28)), 10, 8)
    torch.save(official("digit_cnn").state_dict(), tmp_path / "start.pth")
    load_extractors(tmp_path / "start.pth", net)
    given = torch.load(tmp_path / "start.pth", weights_only=True)
    for branch in (net.specific, net.invariant):
        assert all(torch.equal(value, given[name]) for name, value in branch.state_dict().items())


# --- objective ------------------------------------------------------------------------------------


def test_information_closed_forms():
    zero = torch.zeros(50)
    assert losses.jsd_bound(zero, zero).item() == pytest.approx(-2 * math.log(2))
    assert losses.information(zero, zero).item() == pytest.approx(0, abs=1e-6)
    assert losses.information(zero + 50, zero - 50).item() == pytest.approx(2 * math.log(2))
    # The hinge: a critic on the wrong side does not push the bound below zero.
    assert losses.min_information(zero - 5, zero + 5, "jsd") == 0
    assert losses.min_information(zero + 3, zero + 1, "club").item() == pytest.approx(2)


def test_critic_learns_known_information():
    """b = a or an independent draw, with a uniform on two values: JSD of joint and product is known."""
    torch.manual_seed(0)
    a = torch.randint(0, 2, (2000, 1)) * 2.0 - 1
    rich = torch.cat([a, -a, torch.ones_like(a)], 1)
    critic = Critic(3, 32)
    optimiser = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(150):
        shift = torch.randint(1, 2000, ())
        pairs = critic(rich, rich), critic(rich, rich[losses.derangement(2000, shift)])
        loss = losses.critic_loss(*pairs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # joint: mass 1/2 on each equal pair; product: 1/4 on each of four pairs. m = (joint + product) / 2.
    joint = 2 * 0.5 * math.log(0.5 / 0.375)
    product = 2 * 0.25 * math.log(0.25 / 0.375) + 2 * 0.25 * math.log(0.25 / 0.125)
    assert losses.information(*pairs).item() == pytest.approx(joint + product, abs=0.02)


def test_derangements_have_no_fixed_point():
    for shift in range(1, 7):
        index = losses.derangement(7, torch.tensor(shift))
        assert sorted(index.tolist()) == list(range(7)) and (index != torch.arange(7)).all()


def test_diversity_against_a_loop():
    torch.manual_seed(0)
    logits, y = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = sum(nn.functional.cross_entropy(each, y) for each in logits[:2]) / 2
    assert losses.diversity(logits, y, torch.tensor([0.5, 0.5, 0])).item() == pytest.approx(expected.item())


def test_terms_of_the_baselines_by_hand():
    state = {"w": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0]), "other": torch.tensor([9.0])}
    anchor = {"w": torch.tensor([0.0, 1.0]), "b": torch.tensor([4.0])}
    assert losses.proximal(state, anchor).item() == pytest.approx((1 + 4 + 4) / 2)
    z, other = torch.eye(3)[:2], torch.eye(3)[2:].repeat(2, 1)
    # cosine 1 with the global features and 0 with the previous ones, temperature 1/2: -log of e^2 / (e^2 + 1)
    pulled = losses.model_contrastive(z, 5 * z, other, 0.5)
    assert pulled.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 1)))
    assert losses.model_contrastive(z, other, z, 0.5).item() == pytest.approx(2 + pulled.item())
    prototypes, y = torch.zeros(4, 3), torch.tensor([1, 3])
    known = torch.tensor([1.0, 1.0, 1.0, 0.0])  # class 3 has no prototype: its sample counts 0
    assert losses.prototype_distance(z, y, prototypes, known).item() == pytest.approx((1 / 3 + 0) / 2)


def test_critics_stay_in_single_precision():
    a, b = torch.randn(2, 6, 8)
    for critic in (Critic(8, 16), GaussianCritic(8, 16)):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = critic(a, b)
        assert mixed.dtype == torch.float32 and torch.equal(mixed, critic(a, b))
