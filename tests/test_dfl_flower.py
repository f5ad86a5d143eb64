"""dfl on Flower: a real simulation against the in-process engine, and messages that go wrong."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfl.baselines import build_method
from dfl.data import load_data
from dfl.federation import Federation
from dfl.train import PRESETS, TRIALS, Config
from shared.runtime import REPOSITORY, UserError

pytestmark = pytest.mark.flower

TOY = Config(clients=3, per_client=40, test_images=60, rounds=2, bank_per_round=1, fraction=0.67)


def in_process(config: Config) -> tuple[Federation, list[dict]]:
    data = load_data(config, config.seed)
    federation = Federation(build_method(config, data), config, data)
    return federation, [federation.run_round() for _ in range(config.rounds)]


@pytest.mark.parametrize("trial", ["dfl", "scaffold", "dfl-prototypes"])
def test_flower_gives_the_weights_of_the_built_in_engine(trial):
    from dfl.flower_app import simulate

    config = replace(TOY, **TRIALS[trial])
    rounds = []
    remote = simulate(config, lambda federation, scalars: rounds.append(dict(scalars)))
    local, expected = in_process(replace(config, engine="sequential"))
    assert remote.round == local.round == 2
    for name, value in local.shared.items():
        assert torch.allclose(remote.shared[name], value, atol=1e-6), name
    assert remote.bank.keys() == local.bank.keys()
    for k, client in enumerate(local.clients):
        for name, value in client.state.items():
            assert torch.allclose(remote.clients[k].state[name], value, atol=1e-6), name
    for ours, theirs in zip(rounds, expected, strict=True):
        for name in ("clients", "bytes_up", "bytes_down", "bytes_lent_up", "bytes_lent_down"):
            assert ours[name] == theirs[name]
        assert 0 <= ours["in_domain"] <= 100


def test_a_client_without_data_is_left_out(monkeypatch, capfd):
    import dfl.flower_app as app

    def one_empty(config, seed):
        data = load_data(config, seed)
        clients = list(data.clients)
        clients[1] = replace(clients[1], train=clients[1].train[:0])
        return replace(data, clients=clients)

    monkeypatch.setattr(app, "load_data", one_empty)
    rounds = []
    app.simulate(replace(TOY, fraction=1.0), lambda federation, scalars: rounds.append(dict(scalars)))
    assert [scalars["clients"] for scalars in rounds] == [2, 2]
    assert "client1 left out: no training data" in capfd.readouterr().out


def test_the_run_configuration_names_preset_trial_and_data():
    from dfl.flower_app import configure

    with open(REPOSITORY / "dfl" / "pyproject.toml", "rb") as file:
        options = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    assert configure(options) == PRESETS["demo"]
    config = configure(options | {"preset": "office", "data-root": "/photos", "trial": "fedbn", "rounds": 3})
    expected = replace(PRESETS["office"], data_root=Path("/photos"), method="fedbn", rounds=3)
    assert config == expected
    with pytest.raises(UserError, match="presets: demo, .*trials: dfl, "):
        configure(options | {"trial": "nonsense"})


def test_records_carry_states_exactly():
    from flwr.app import RecordDict

    from dfl.flower_app import pack, to_record, to_state, unpack

    state = {"a.weight": torch.randn(2, 3), "count": torch.tensor(7), "half": torch.randn(4).half()}
    back = to_state(to_record(state))
    assert all(
        torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items()
    )
    content = RecordDict(pack("specific", {3: state, 5: {}}))
    assert unpack("specific", content).keys() == {"3"} and unpack("extra", content) == {}
