"""dfl on Flower: a real simulation against the in-process engine, and messages that go wrong."""

import math
import shutil
import tomllib
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from dfl.baselines import build_method
from dfl.data import load_data
from dfl.federation import Federation, evaluate
from dfl.train import PRESETS, Config
from dfl.trials import TRIALS
from shared.io import write_image
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


def put_folder(root: Path, names: str = "abc", empty: str = "b") -> Config:
    """Clients of some random pictures of two classes each; those of `empty` have none to train on."""
    generator = torch.Generator().manual_seed(0)
    for name, kind, split in product(names, ("attack", "genuine"), ("train", "test")):
        (root / name / split / kind).mkdir(parents=True)
        for i in range(0 if split == "train" and name in empty else 3):
            write_image(root / name / split / kind / f"{i}.png", torch.rand(3, 8, 8, generator=generator))
    small = {"image_size": 8, "batch_size": 2, "workers": 0}
    return replace(TOY, data="folder", data_root=root, fraction=1.0, **small)


def test_a_client_without_data_is_left_out(tmp_path, capfd):
    from dfl.flower_app import simulate

    rounds = []
    simulate(put_folder(tmp_path), lambda federation, scalars: rounds.append(dict(scalars)))
    assert [scalars["clients"] for scalars in rounds] == [2, 2]
    assert "b left out: no training data" in capfd.readouterr().out


def test_too_few_answers_end_a_simulation_with_their_message():
    from dfl.flower_app import simulate

    with pytest.raises(UserError, match="2 of the 3 clients needed .--min-clients. answered"):
        simulate(replace(TOY, min_clients=3), lambda federation, scalars: None)


class Nodes:
    """A Flower grid whose nodes answer in this process, one after another.

    A node never gets back what it put into its context: a deployment sends the answer before it stores that.
    """

    def __init__(self, clients: int, out: Path, run: int = 1):
        from flwr.app import Context, RecordDict

        self.sent = []
        self.contexts = {
            100 + k: Context(run, 100 + k, {"partition-id": k, "out": str(out)}, RecordDict(), {})
            for k in range(clients)
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, **options):
        from dfl.flower_app import client_app

        messages = list(messages)
        self.sent += messages
        nodes = [deepcopy(self.contexts[message.metadata.dst_node_id]) for message in messages]
        return [client_app(message, node) for message, node in zip(messages, nodes, strict=True)]


@pytest.fixture
def app(monkeypatch):
    """The app's module, in a process that Flower takes for one of a server."""
    from flwr.supercore.task_identity import TaskIdentity

    import dfl.flower_app as app

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    app.settle.cache_clear()
    yield app
    app.settle.cache_clear()


def test_a_client_whose_answer_is_faulty_stays_as_it_was(app, tmp_path, monkeypatch):
    def broken(config, seed, own):
        data = load_data(config, seed, own)
        clients = list(data.clients)
        train = clients[1].train
        clients[1] = replace(clients[1], train=replace(train, images=train.images * math.nan))
        return replace(data, clients=clients)

    monkeypatch.setattr(app, "load_data", broken)
    federation, nodes = app.make_federation(replace(TOY, fraction=1.0)), Nodes(3, tmp_path)
    app.run_rounds(nodes, federation, lambda *_: None)
    assert federation.round == 2 and set(federation.bank) == {0, 2}
    assert {path.name for path in tmp_path.iterdir()} == {"client_0.safetensors", "client_2.safetensors"}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), "partition-ids are .*: each of 0 to 2 is needed once"),
        ((0, 1, 7), "partition-id=7: the clients are 0 to 2"),
        ((-1, 1, 2), "partition-id=-1: the clients are 0 to 2"),
    ],
)
def test_partition_ids_name_every_client_once(app, tmp_path, numbers, message):
    nodes = Nodes(3, tmp_path)
    for context, number in zip(nodes.contexts.values(), numbers, strict=True):
        context.node_config["partition-id"] = number
    with pytest.raises(UserError, match=message):
        app.run_rounds(nodes, app.make_federation(TOY), lambda *_: None)


def sites_of(tmp_path: Path, app) -> tuple[Config, Nodes]:
    """A folder federation whose nodes have all folders and the images of their own client; the server has
    the folders alone."""
    whole = put_folder(tmp_path / "whole")
    nodes = Nodes(3, tmp_path / "out")
    for number, name in ((None, "server"), *enumerate("abc")):
        shutil.copytree(whole.data_root, tmp_path / "sites" / name)
        for path in (tmp_path / "sites" / name).rglob("*.png"):
            if not path.is_relative_to(tmp_path / "sites" / name / name):
                path.unlink()
        if number is not None:
            nodes.contexts[100 + number].node_config["data-root"] = str(tmp_path / "sites" / name)
    return whole, nodes


def test_sites_keep_their_images_to_themselves(app, tmp_path, capfd):
    whole, nodes = sites_of(tmp_path, app)
    config = replace(whole, data_root=tmp_path / "sites" / "server")
    federation, rounds = app.make_federation(config, own=()), []
    app.run_rounds(nodes, federation, lambda federation, scalars: rounds.append(dict(scalars)))
    local, _ = in_process(replace(whole, engine="sequential"))
    assert [scalars["clients"] for scalars in rounds] == [2, 2]
    assert "b left out: no training data" in capfd.readouterr().out
    assert all(
        torch.allclose(federation.shared[name], value, atol=1e-6) for name, value in local.shared.items()
    )
    assert rounds[-1]["in_domain"] == pytest.approx(evaluate(local, full=False)["in_domain"])
    assert not any(len(client.train) + len(client.test) for client in federation.data.clients)


def test_a_site_with_other_folders_than_the_server_is_refused(app, tmp_path):
    whole, nodes = sites_of(tmp_path, app)
    for split in ("train", "test"):  # with one class less, the labels of a site would mean others
        for name in "abc":
            shutil.rmtree(tmp_path / "sites" / "c" / name / split / "attack")
    config = replace(whole, data_root=tmp_path / "sites" / "server")
    message = "client 2 has the classes genuine, the server attack, genuine: each site needs all folders"
    with pytest.raises(UserError, match=message):
        app.run_rounds(nodes, app.make_federation(config, own=()), lambda *_: None)
    shutil.rmtree(tmp_path / "sites" / "c" / "c" / "test" / "genuine")
    app.settle.cache_clear()
    with pytest.raises(UserError, match="could not start its client: .*test: no test images"):
        app.run_rounds(nodes, app.make_federation(config, own=()), lambda *_: None)


def test_a_second_run_with_the_same_settings_begins_anew(app, tmp_path):
    config = replace(TOY, **TRIALS["local"], fraction=1.0)
    ends = []
    for run in (1, 2):  # in one process and one folder
        app.run_rounds(Nodes(3, tmp_path, run), app.make_federation(config), lambda *_: None)
        ends.append(app.read_client(tmp_path / "client_1.safetensors", run).state)
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert app.read_client(tmp_path / "client_1.safetensors", 1) is None


@pytest.mark.parametrize("trial", ["dfl", "scaffold"])
def test_the_next_round_finds_what_a_node_has_learnt(app, tmp_path, trial):
    config = replace(TOY, **TRIALS[trial], fraction=1.0, rounds=3)
    federation = app.make_federation(config)
    app.run_rounds(Nodes(3, tmp_path), federation, lambda *_: None)
    local, _ = in_process(replace(config, engine="sequential"))
    first = app.make_federation(config).clients
    for k, client in enumerate(local.clients):
        kept = app.read_client(tmp_path / f"client_{k}.safetensors", 1)
        for ours, theirs in ((kept.state, client.state), (kept.memory, client.memory)):
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())
        assert any(not torch.equal(first[k].state[name], value) for name, value in kept.state.items())
    assert bool(local.clients[0].memory) == (trial == "scaffold")
    assert all(
        torch.allclose(federation.shared[name], value, atol=1e-6) for name, value in local.shared.items()
    )


@pytest.mark.parametrize("source", ["models", "prototypes", "none"])
def test_a_message_carries_exactly_what_the_sharing_option_names(app, tmp_path, source):
    from flwr.app import MessageType

    federation = app.make_federation(replace(TOY, fraction=1.0, bank_per_round=None, source=source))
    nodes = Nodes(3, tmp_path)
    app.run_rounds(nodes, federation, lambda *_: None)
    sent = [message for message in nodes.sent if message.metadata.message_type == MessageType.TRAIN]
    assert len(sent) == 6
    extractor = {name.removeprefix("specific.") for name in federation.clients[0].state if "specific" in name}
    lent = {"models": extractor, "prototypes": {"prototypes"}}
    for number, message in enumerate(sent):
        k, records = message.metadata.dst_node_id - 100, message.content.array_records
        assert set(records["arrays"]) == set(federation.shared)
        # The bank is empty in the first round, and nobody gets his own.
        others = {f"specific-{i}" for i in range(3) if i != k} if number >= 3 and source != "none" else set()
        assert set(records) == {"arrays"} | others
        assert all(set(records[name]) == lent[source] for name in others)


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
    for rounds in (0, "many"):
        with pytest.raises(UserError, match=f"rounds={rounds}: give a whole number"):
            configure(options | {"rounds": rounds})


def test_records_carry_states_exactly():
    from flwr.app import RecordDict

    from dfl.flower_state import pack, to_record, to_state, unpack

    state = {"a.weight": torch.randn(2, 3), "count": torch.tensor(7), "half": torch.randn(4).half()}
    back = to_state(to_record(state))
    assert all(
        torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items()
    )
    content = RecordDict(pack("specific", {3: state, 5: {}}))
    assert unpack("specific", content).keys() == {"3"} and unpack("extra", content) == {}
