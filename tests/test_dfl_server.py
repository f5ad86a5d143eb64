"""dfl: the server's rules, and what goes wrong in a federation."""

import math
from dataclasses import replace

import pytest
import torch
from federations import TOY, distance, federation, trained, with_client

from dfl.client import Upload, class_means
from dfl.data import load_data
from dfl.federation import average, fault, lenders, participants, size_of
from dfl.trials import TRIALS
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
    for k, client in enumerate(made.clients):
        first = federation(TOY).clients[k].state
        assert (distance(client.state, first) > 0) == (k == present)
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
    for k, client in enumerate(made.clients):
        download = made.download(k)
        assert k not in download.bank
        names = {name for state in download.bank.values() for name in state}
        if change["source"] == "models":
            assert names == {name.removeprefix("specific.") for name in client.state if "specific" in name}
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
    made.run_round(), other.run_round()
    assert distance(made.shared, other.shared) == 0 and made.round == other.round == 3


def test_the_state_of_another_federation_is_refused():
    config = replace(TOY, **TRIALS["scaffold"])
    saved = federation(config).state_dict()
    for change in ({"widths": (32, 32)}, {"clients": 2}, TRIALS["fedavg"]):
        with pytest.raises(ValueError, match="is of other networks or clients"):
            federation(replace(config, **change)).load_state_dict(saved)
