"""DFL on Flower: the same client code and the same server behind messages, for several machines.

    flwr run . here                              # a deployment, see the README
    python train.py demo --engine flower         # a simulation inside the ordinary training script

A TRAIN message carries what `Download` holds, its reply what `Upload` holds; the private part of a client
stays in its node's `context.state`. Flower is an optional extra (requirements-flower.txt).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

# Flower reports its use unless told not to, and reads the variable when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from flwr.app import (  # noqa: E402
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from dfl.baselines import build_method  # noqa: E402
from dfl.client import Client, Download, Upload, local_round  # noqa: E402
from dfl.data import load_data  # noqa: E402
from dfl.engine import State  # noqa: E402
from dfl.federation import Federation, accuracy, fault, predict, round_scalars, take_part  # noqa: E402
from dfl.train import PRESETS, Config  # noqa: E402
from dfl.trials import TRIALS  # noqa: E402
from shared.records import plain, revive, write_tensors  # noqa: E402
from shared.runtime import UserError  # noqa: E402

Report = Callable[[Federation, dict[str, float]], None]


# --- states as records ----------------------------------------------------------------------------


def to_record(state: State) -> ArrayRecord:
    """A state as Flower sends it."""
    return ArrayRecord({name: value.detach().cpu().contiguous() for name, value in state.items()})


def to_state(record: ArrayRecord) -> State:
    """The inverse of `to_record`."""
    return dict(record.to_torch_state_dict())


def pack(prefix: str, states: dict) -> dict[str, ArrayRecord]:
    """Records "prefix-key" of the states that hold anything."""
    return {f"{prefix}-{key}": to_record(state) for key, state in states.items() if state}


def unpack(prefix: str, content: RecordDict) -> dict[str, State]:
    """The inverse of `pack`."""
    start = f"{prefix}-"
    records = content.array_records.items()
    return {key.removeprefix(start): to_state(record) for key, record in records if key.startswith(start)}


# --- the client's side ----------------------------------------------------------------------------

client_app = ClientApp()

CLIENTS_OUT = "DFL_CLIENTS_OUT"
"""Environment variable: where nodes without `out` in their configuration write their clients' weights."""


@lru_cache(maxsize=1)
def settle(settings: str) -> tuple[Config, Federation]:
    """Configuration, data, network and first states from their JSON; kept for a node's later messages."""
    config: Config = revive(json.loads(settings), Config)
    return config, make_federation(config)


def own_client(message: Message, context: Context) -> tuple[Config, Federation, int, Client]:
    """Settings of a message, the federation as it began, this node's number, and its client as it stands.

    The federation is kept between messages and runs, so a client's later state is never put into it.
    """
    config, federation = settle(message.content["config"]["settings"])
    number = int(context.node_config["partition-id"])
    if "local" not in context.state.array_records:
        return config, federation, number, federation.clients[number]
    memory = unpack("memory", context.state).get("own", {})
    return config, federation, number, Client(to_state(context.state["local"]), memory)


@client_app.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is."""
    number = MetricRecord({"client": int(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": number}), reply_to=message)


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """One local round."""
    config, federation, number, client = own_client(message, context)
    content = message.content
    bank = {int(key): state for key, state in unpack("specific", content).items()}
    extra = unpack("extra", content).get("all", {})
    download = Download(int(content["config"]["server-round"]), to_state(content["arrays"]), bank, extra)
    data = federation.data
    clients, uploads = local_round(
        federation.method,
        config,
        federation.net,
        [client],
        [data.clients[number]],
        [download],
        data,
    )
    client, upload = clients[0], uploads[0]
    if fault(upload) is None:  # a faulty answer is left out by the server, and its client stays as it was
        context.state["local"] = to_record(client.state)
        if client.memory:
            context.state["memory-own"] = to_record(client.memory)
        # A node's state lives as long as the Flower run; the file outlives it. The node says where, not the
        # server.
        folder = Path(str(context.node_config.get("out", os.environ.get(CLIENTS_OUT, "flower-client"))))
        write_tensors(folder / f"client_{number}.safetensors", client.state)
    metrics = {"client": number, "num-examples": upload.samples, **upload.metrics}
    records = {"arrays": to_record(upload.shared), "metrics": MetricRecord(metrics)}
    return Message(
        RecordDict({**records, **pack("lent", {"own": upload.lent}), **pack("extra", {"own": upload.extra})}),
        reply_to=message,
    )


@client_app.evaluate()
def evaluate_client(message: Message, context: Context) -> Message:
    """In-domain accuracy in per cent of the personal model under the new global part."""
    _, federation, number, client = own_client(message, context)
    test = federation.data.clients[number].test
    state = {**client.state, **to_state(message.content["arrays"])}
    logits = predict(federation.method, federation.net, [state], [test.images], federation.data, False)
    metrics = {"num-examples": len(test), "in_domain": accuracy(logits[0], test.labels)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


# --- the server's side ----------------------------------------------------------------------------


class DFLStrategy(FedAvg):
    """Flower's round around `Federation`: its sampling, bank, fault rules and average."""

    def __init__(self, federation: Federation, report: Report):
        config = federation.config
        nodes = len(federation.clients)
        super().__init__(min_available_nodes=nodes, min_train_nodes=1, min_evaluate_nodes=nodes)
        self.federation, self.on_round = federation, report
        self.settings = json.dumps(plain(replace(config, engine="sequential")))
        self.clients: dict[int, int] = {}
        """Node id -> client number."""

    def summary(self) -> None:
        """Flower asks a strategy to describe itself; the run folder's config.json does."""

    def find_clients(self, grid: Grid) -> None:
        """Ask every node which client it is: node ids are random."""
        wanted = len(self.federation.clients)
        while len(nodes := list(grid.get_node_ids())) < wanted:
            print(f"{len(nodes)} of {wanted} clients are connected; waiting for the others", flush=True)
            time.sleep(2)
        questions = [
            Message(
                RecordDict({"config": ConfigRecord({})}), dst_node_id=node, message_type=MessageType.QUERY
            )
            for node in nodes
        ]
        for reply in grid.send_and_receive(questions):
            if reply.has_error():
                raise UserError(f"a Flower node could not start the client: {reply.error.reason}")
            self.clients[reply.metadata.src_node_id] = int(reply.content["metrics"]["client"])
        if sorted(self.clients.values()) != list(range(wanted)):
            raise UserError(
                f"the nodes' partition-ids are {sorted(self.clients.values())}: each of 0 to {wanted - 1} is "
                "needed once"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per participant, each with its own lenders."""
        if not self.clients:
            self.find_clients(grid)
        federation = self.federation
        federation.round = server_round
        self.chosen, self.failures = take_part(federation)
        self.downloads = {k: federation.download(k) for k in self.chosen if k not in self.failures}
        nodes = {number: node for node, number in self.clients.items()}
        settings = {"settings": self.settings, "server-round": server_round}
        return [
            Message(
                RecordDict(
                    {
                        "arrays": to_record(download.shared),
                        "config": ConfigRecord(settings),
                        **pack("specific", download.bank),
                        **pack("extra", {"all": download.extra}),
                    }
                ),
                dst_node_id=nodes[k],
                message_type=MessageType.TRAIN,
            )
            for k, download in self.downloads.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Replies -> uploads -> `Federation.aggregate`; errors and NaN are named and left out."""
        federation, uploads = self.federation, []
        for reply in replies:
            k = self.clients[reply.metadata.src_node_id]
            if reply.has_error():
                self.failures[k] = str(reply.error.reason)
                continue
            content = reply.content
            numbers = dict(content["metrics"])
            upload = Upload(
                k,
                int(numbers.pop("num-examples")),
                to_state(content["arrays"]),
                unpack("lent", content).get("own", {}),
                unpack("extra", content).get("own", {}),
                {name: value for name, value in numbers.items() if name != "client"},
            )
            problem = fault(upload)
            if problem:
                self.failures[k] = problem
            else:
                uploads.append(upload)
        answered = {upload.client for upload in uploads} | self.failures.keys()
        self.failures |= {k: "no answer" for k in self.chosen if k not in answered}
        uploads.sort(key=lambda upload: upload.client)
        federation.aggregate(uploads, self.failures)
        self.scalars = round_scalars(federation, uploads, self.downloads, self.failures)
        return to_record(federation.shared), MetricRecord(self.scalars)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Everyone evaluates the new global part."""
        record = RecordDict({"arrays": arrays, "config": ConfigRecord({"settings": self.settings})})
        return [Message(record, dst_node_id=node, message_type=MessageType.EVALUATE) for node in self.clients]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean and worst accuracy over the clients that answered."""
        values = [reply.content["metrics"]["in_domain"] for reply in replies if not reply.has_error()]
        if values:
            self.scalars |= {"in_domain": sum(values) / len(values), "worst": min(values)}
        self.on_round(self.federation, self.scalars)
        return MetricRecord({"in_domain": self.scalars["in_domain"]}) if values else None


def run_rounds(grid: Grid, federation: Federation, report: Report) -> None:
    """All rounds of a trial over the nodes of `grid`."""
    strategy = DFLStrategy(federation, report)
    strategy.start(grid, to_record(federation.shared), num_rounds=federation.config.rounds)


def make_federation(config: Config) -> Federation:
    """The server's federation; its messages about clients go to the console."""
    data = load_data(config, config.seed)
    return Federation(build_method(config, data), config, data, report=print)


def configure(options: Mapping) -> Config:
    """Settings from a Flower run configuration: preset, trial, rounds, data-root ("" for the presets that
    need none). UserError for an unknown preset or trial and for no rounds."""
    preset, trial, root = (str(options[key]) for key in ("preset", "trial", "data-root"))
    if trial not in TRIALS or preset not in PRESETS:
        raise UserError(f"presets: {', '.join(PRESETS)}; trials: {', '.join(TRIALS)}")
    changes = {"rounds": options["rounds"], "data_root": Path(root) if root else None}
    config = replace(PRESETS[preset], **changes, **TRIALS[trial])
    if not isinstance(config.rounds, int) or config.rounds < 1:
        raise UserError(f"rounds={config.rounds}: give a whole number, 1 or more")
    return config


server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Entry point of `flwr run`. Run configuration: what `configure` reads, and out (folder for the
    weights)."""
    config = configure(context.run_config)
    folder = Path(str(context.run_config["out"])).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def report(federation: Federation, scalars: dict[str, float]) -> None:
        print(json.dumps({"round": federation.round, **scalars}), flush=True)
        write_tensors(folder / "shared.safetensors", federation.shared)

    run_rounds(grid, make_federation(config), report)


def simulate(config: Config, report: Report, cores: int = 1) -> Federation:
    """One trial as a Flower simulation on this machine; `report` is called after each round.

    Returns the federation with every client's final state. cores: per client actor. Raises UserError when
    too few clients answered.
    """
    federation, app = make_federation(config), ServerApp()
    mistakes: list[UserError] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CLIENTS_OUT] = folder  # Flower's processes, which start below, inherit it

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            # Flower runs this in a thread, and makes of any error there a RuntimeError without its message.
            try:
                run_rounds(grid, federation, report)
            except UserError as error:
                mistakes.append(error)

        try:
            run_simulation(
                server_app=app,
                client_app=client_app,
                num_supernodes=len(federation.clients),
                backend_config={"client_resources": {"num_cpus": cores, "num_gpus": 0.0}},
            )
        finally:
            del os.environ[CLIENTS_OUT]
        if mistakes:
            raise mistakes[0]
        if federation.round < config.rounds:
            raise UserError(f"the Flower simulation ended after {federation.round} rounds; see its log above")
        for k, client in enumerate(federation.clients):
            path = Path(folder) / f"client_{k}.safetensors"
            if path.is_file():
                client.state = load_file(path)
    return federation
