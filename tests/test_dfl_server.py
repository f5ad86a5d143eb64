"""dfl: the server's rules, and what goes wrong in a federation."""

import json
import math
from dataclasses import replace

import pytest
import torch
from federations import TOY, distance, federation, trained, with_client
from torch import nn

from dfl import analysis, baselines, client, convex
from dfl import train as training
from dfl.client import Upload, class_means
from dfl.data import Federated, load_data
from dfl.eval import EvalConfig, evaluate_run
from dfl.federation import accuracy, average, evaluate, fault, lenders, participants, size_of
from dfl.model import Classifier
from dfl.predict import PredictConfig
from dfl.predict import main as classify
from dfl.train import PRESETS
from dfl.trials import TRIALS
from shared.io import write_image
from shared.runtime import UserError

# --- server ---------------------------------------------------------------------------------------


def upload(client: int, samples: int, value: float) -> Upload:
    return Upload(client, samples, {"w": torch.full((2,), value)})


def test_average_is_weighted_over_participants():
    uploads = [upload(0, 10, 1.0), upload(1, 30, 5.0)]
    assert average(uploads, "samples")["w"].tolist() == [4, 4]
    assert average(uploads, "uniform")["w"].tolist() == [3, 3]


def test_sampling_is_a_function_of_seed_and_round():
    draws = [participants(0, round, 8, 0.5) for round in range(1, 200)]
    assert draws == [participants(0, round, 8, 0.5) for round in range(1, 200)]
    assert all(len(set(draw)) == 4 for draw in draws) and {k for draw in draws for k in draw} == set(range(8))
    assert participants(1, 1, 8, 0.01) and len(participants(0, 1, 8, 0.01)) == 1
    assert lenders(0, 1, 3, range(8), None) == [0, 1, 2, 4, 5, 6, 7]
    chosen = lenders(0, 1, 3, range(8), 2)
    assert len(chosen) == 2 and 3 not in chosen


def test_absent_clients_keep_their_state_and_stale_entries_stay():
    made = federation(replace(TOY, fraction=0.34))
    made.run_round()
    (present,) = participants(0, 1, 3, 0.34)
    for k, now in enumerate(made.clients):
        first = federation(TOY).clients[k].state
        assert (distance(now.state, first) > 0) == (k == present)
    assert set(made.bank) == {present}


@pytest.mark.parametrize(
    ("change", "lent"),
    [
        ({"source": "models"}, (14_432, 4)),
        ({"source": "models", "lend_half": True}, (14_432, 2)),
        ({"source": "prototypes"}, (10 * 32, 4)),
        ({"source": "none"}, (0, 4)),
    ],
)
def test_exactly_what_the_sharing_option_names_is_sent(change, lent):
    config = replace(TOY, **change)
    made = federation(config)
    first, second = made.run_round(), made.run_round()
    shared = (14_432 + 650) * 4
    tensors, size = lent
    assert first["bytes_up"] == second["bytes_up"] == shared + tensors * size
    assert first["bytes_down"] == shared  # the bank is empty
    assert second["bytes_down"] == shared + 2 * tensors * size
    for k, now in enumerate(made.clients):
        download = made.download(k)
        assert k not in download.bank
        names = {name for state in download.bank.values() for name in state}
        if change["source"] == "models":
            assert names == {name.removeprefix("specific.") for name in now.state if "specific" in name}
        else:
            assert names == ({"prototypes"} if change["source"] == "prototypes" else set())
    assert size_of(made.download(0).shared) == shared


def test_lending_every_second_round():
    made = federation(replace(TOY, lend_every=2))
    sent = [made.run_round()["bytes_lent_up"] for _ in range(4)]
    assert sent[0] == sent[2] > 0 == sent[1] == sent[3]


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_client_without_data_is_named_and_left_out():
    data = load_data(TOY, 0)
    data = with_client(data, 1, data.clients[1].train[:0])
    messages = []
    made = federation(TOY, data, report=messages.append)
    scalars = made.run_round()
    assert messages == ["round 1: client1 left out: no training data"]
    assert scalars["clients"] == 2 and scalars["left_out/client1"] == 1
    assert set(made.bank) == {0, 2}


def test_a_client_that_never_trained_has_no_part_in_the_transfer_mode():
    data = load_data(TOY, 0)
    made = federation(TOY, with_client(data, 1, data.clients[1].train[:0]))
    made.run_round()
    assert made.trained == {0, 2}
    logits = [
        made.method.predict(made.net, made.client_states()[k], data.prepare(data.unseen.images))
        for k in (0, 2)
    ]
    mean = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    made.clients[1].state = {name: value * math.nan for name, value in made.clients[1].state.items()}
    found = evaluate(made, full=True)
    assert found["unseen"] == pytest.approx(accuracy(mean, data.unseen.labels))
    assert found["counterfactual_transfer"] > found["counterfactual"]  # whose mean is over all


def test_nan_in_one_client_does_not_reach_the_others():
    data = load_data(TOY, 0)
    broken = replace(data.clients[1].train, images=data.clients[1].train.images * math.nan)
    messages = []
    made = federation(TOY, with_client(data, 1, broken), report=messages.append)
    made.run_round()
    assert len(messages) == 1 and "client1 left out: NaN or infinity" in messages[0]
    assert all(torch.isfinite(value).all() for value in made.shared.values())
    healthy = federation(TOY, with_client(data, 1, data.clients[1].train[:0]))
    healthy.run_round()
    assert distance(made.shared, healthy.shared) < 1e-5


def test_a_client_that_fails_in_a_round_is_lost_alone():
    data = load_data(TOY, 0)
    labels = data.clients[2].train.labels.clone()
    labels[:] = 99  # no such class: its loss cannot be computed
    messages = []
    made = federation(
        TOY, with_client(data, 2, replace(data.clients[2].train, labels=labels)), report=messages.append
    )
    scalars = made.run_round()
    assert scalars["clients"] == 2 and len(messages) == 2
    assert "3 clients could not train together (" in messages[0]
    assert "client2 left out: IndexError" in messages[1]


def test_too_few_answers_stop_the_run():
    data = load_data(TOY, 0)
    data = with_client(data, 1, data.clients[1].train[:0])
    made = federation(replace(TOY, min_clients=3), data)
    with pytest.raises(UserError, match="2 of the 3 clients needed .*client1: no training data"):
        made.run_round()


def test_class_means_count_exactly_under_autocast():
    z, y = torch.rand(600, 4, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        means, count = class_means(z, y, 2)
    assert count.tolist() == [600, 0]
    assert torch.allclose(means, z.float().mean(0).expand(2, -1), atol=1e-6)


def test_faults():
    assert fault(upload(0, 1, 1.0)) is None
    assert "NaN" in fault(upload(0, 1, math.inf))
    assert "loss" in fault(replace(upload(0, 1, 1.0), metrics={"loss": math.nan}))


def test_a_federation_is_saved_and_restored():
    made = trained(replace(TOY, **TRIALS["scaffold"]))
    other = federation(replace(TOY, **TRIALS["scaffold"]))
    other.load_state_dict(made.state_dict())
    assert other.trained == made.trained == {0, 1, 2}
    made.run_round(), other.run_round()
    assert distance(made.shared, other.shared) == 0 and made.round == other.round == 3


def test_the_state_of_another_federation_is_refused():
    config = replace(TOY, **TRIALS["scaffold"])
    saved = federation(config).state_dict()
    for change in ({"widths": (32, 32)}, {"clients": 2}, TRIALS["fedavg"]):
        with pytest.raises(ValueError, match="is of other networks or clients"):
            federation(replace(config, **change)).load_state_dict(saved)


# --- networks with batch normalisation --------------------------------------------------------------


class Small(Classifier):
    """The smallest extractor with running statistics."""

    head_prefix, width = "fc", 4

    def __init__(self, classes=None):
        super().__init__()
        self.classes = classes
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        if classes is not None:
            self.fc = nn.Linear(4, classes)

    def forward_features(self, x):
        return self.bn1(self.conv1(x)).relu().mean((2, 3))


@pytest.fixture
def batch_norm(monkeypatch):
    """Every backbone is `Small`."""
    for module in (baselines, client):
        monkeypatch.setattr(module, "build_backbone", lambda name, classes, *_: Small(classes))


STATISTICS = "bn1.running_mean"


def test_a_stage_moves_the_running_statistics_of_its_own_branch_only(batch_norm):
    config = replace(TOY, backbone="digit_cnn")
    made = trained(config, 1)
    start = {**made.clients[0].state, **made.shared}
    for stage, moved in zip(made.method.stages, ("specific", "invariant"), strict=True):
        one = replace(made.method, stages=(stage,))
        own, data = made.clients[0], made.data.clients[0]
        (after,), _ = client.local_round(one, config, made.net, [own], [data], [made.download(0)], made.data)
        for branch in ("specific", "invariant"):
            changed = distance(
                {"": after.state[f"{branch}.{STATISTICS}"]}, {"": start[f"{branch}.{STATISTICS}"]}
            )
            assert (changed > 0) == (branch == moved)


def test_running_statistics_are_averaged_or_stay_at_home(batch_norm):
    config = replace(TOY, backbone="digit_cnn")
    made = trained(config, 1)
    own = [each.state[f"invariant.{STATISTICS}"] for each in made.clients]
    assert not torch.equal(own[0], own[1])
    assert torch.allclose(made.shared[f"invariant.{STATISTICS}"], torch.stack(own).mean(0), atol=1e-6)
    for change, name in (
        ({"aggregate": "invariant_bnlocal"}, f"invariant.{STATISTICS}"),
        ({"method": "fedbn"}, STATISTICS),
    ):
        made = trained(replace(config, **change))
        assert name not in made.shared
        states = made.client_states()
        assert not torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("trial", ["dfl-prototypes", "scaffold", "fedproto"])
def test_a_client_answers_from_pieces_of_its_set_as_from_the_whole(batch_norm, monkeypatch, trial):
    config = replace(TOY, backbone="digit_cnn", **TRIALS[trial])
    whole = trained(config, 1)
    for module in (baselines, client):
        monkeypatch.setattr(module, "PIECE", 16)
    pieces = trained(config, 1)
    assert distance(whole.extra, pieces.extra) < 1e-6 if whole.extra else whole.bank
    for k, lent in whole.bank.items():
        assert distance(lent, pieces.bank[k]) < 1e-6


def test_no_round_makes_a_client_s_whole_set_ready_for_nothing(batch_norm, monkeypatch):
    sizes = []
    prepare = Federated.prepare
    monkeypatch.setattr(Federated, "prepare", lambda self, x: sizes.append(x.shape[-4]) or prepare(self, x))
    trained(replace(TOY, backbone="digit_cnn", method="local"), 1)
    assert set(sizes) == {TOY.batch_size}


def test_photographs_are_trained_evaluated_and_classified(batch_norm, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "DIRECTIONS", 2)
    monkeypatch.setattr(convex, "run", lambda **_: [0.0, 0.0])  # T1 has its own test
    for place in ("a/train", "a/test", "b/train", "b/test", "c/test"):
        for kind in ("attack", "genuine"):
            for i in range(6):
                write_image(tmp_path / "photos" / place / kind / f"{i}.png", torch.rand(3, 12, 12))
    config = replace(
        PRESETS["folder"], data_root=tmp_path / "photos", image_size=12, rounds=1, batch_size=4,
        trials=("dfl", "fedavg", "fedbn"), out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    folder = evaluate_run(EvalConfig(training.train(config), device="cpu"))
    claims = json.loads((folder / "results.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == ["D1", "D2", "D3", "T1"]
    own = PredictConfig(tmp_path / "photos" / "b" / "test", folder, out=tmp_path / "out", device="cpu")

    def attack(**options) -> torch.Tensor:
        found = json.loads((classify(replace(own, **options)) / "predictions.json").read_text())
        return torch.tensor([entry["probabilities"]["attack"] for entry in found])

    each = [attack(client=k) for k in (0, 1)]
    assert len(each[0]) == 12
    # c has nothing to train on.
    assert torch.allclose(attack(mode="transfer"), (each[0] + each[1]) / 2, atol=1e-6)


# --- mistakes in the program ------------------------------------------------------------------------


def test_an_error_of_every_client_is_the_program_s(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(client.losses, "critic_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(TOY, 1)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(client.losses, "critic_loss", full)
    with pytest.raises(UserError, match="0 of the 1 clients needed .*no memory"):
        trained(TOY, 1)


def test_one_image_is_too_few():
    data = load_data(TOY, 0)
    messages = []
    made = federation(TOY, with_client(data, 1, data.clients[1].train[:1]), report=messages.append)
    assert made.run_round()["clients"] == 2
    assert messages == ["round 1: client1 left out: 1 training image, at least two are needed"]


def test_bytes_are_counted_for_those_who_are_sent_something():
    data = load_data(TOY, 0)
    data = with_client(data, 1, data.clients[1].train[:0])
    made = federation(TOY, data)
    made.run_round()
    # The two others lend to each other; the empty one would have received from both.
    assert made.run_round()["bytes_lent_down"] == 14_432 * 4


def test_the_logged_information_has_no_hinge():
    joint, product = torch.tensor([0.0, -1.0]), torch.tensor([2.0, 1.0])
    for mi in ("jsd", "club"):
        assert client.losses.information(joint, product, mi) < 0
        assert client.losses.min_information(joint, product, mi) == 0
    made = federation(TOY)
    scalars = made.run_round()
    assert min(scalars["S/I_min"], scalars["C/I_min"]) < 0
