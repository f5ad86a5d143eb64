"""DFL on Flower: the same client code and the same server behind messages, for several machines.

    flwr run . here                              # a deployment, see the README
    python train.py demo --engine flower         # a simulation inside the ordinary training script

A TRAIN message carries what `Download` holds, its reply what `Upload` holds; the private part of a client
stays at its node, in a file, and so do its images: a node reads its own client's alone, the server none.
Flower is an optional extra (requirements-flower.txt).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
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

from dfl.baselines import build_method  # noqa: E402
from dfl.client import Client, Download, Upload, local_round  # noqa: E402
from dfl.data import ClientData, Federated, load_data  # noqa: E402
from dfl.federation import Federation, accuracy, fault, predict, round_scalars, take_part  # noqa: E402
from dfl.flower_state import (  # noqa: E402
    client_name,
    pack,
    read_client,
    to_record,
    to_state,
    unpack,
    write_client,
)
from dfl.train import PRESETS, Config  # noqa: E402
from dfl.trials import TRIALS  # noqa: E402
from shared.records import plain, revive, write_tensors  # noqa: E402
from shared.runtime import UserError  # noqa: E402

Report = Callable[[Federation, dict[str, float]], None]


# --- the client's side ----------------------------------------------------------------------------

client_app = ClientApp()

CLIENTS_OUT = "DFL_CLIENTS_OUT"
"""Environment variable: where nodes without `out` in their configuration keep their clients."""


@lru_cache(maxsize=1)
def settle(settings: str, root: str | None) -> Federation:
    """The federation as it begins, without images, from its settings in JSON; kept for a node's later
    messages. root: where this site has the data, if not where the server has them.
    """
    config: Config = revive(json.loads(settings), Config)
    return make_federation(replace(config, data_root=Path(root)) if root else config, own=())


def own_data(message: Message, context: Context) -> tuple[Federation, ClientData]:
    """The federation as it begins, and this node's own set. In a simulation one process serves many nodes.

    Raises UserError for data that cannot be read, and when the federation has no client of this number.
    """
    root = context.node_config.get("data-root")
    federation = settle(message.content["config"]["settings"], None if root is None else str(root))
    config, clients = federation.config, federation.data.clients
    number = int(context.node_config["partition-id"])
    if not 0 <= number < len(clients):
        raise UserError(f"partition-id={number}: the clients are 0 to {len(clients) - 1}")
    if not len(clients[number].test):  # skewed digits are there already
        clients[number] = load_data(config, config.seed, own=(number,)).clients[number]
    return federation, clients[number]


def client_file(number: int, context: Context) -> Path:
    """Where a node keeps its client. The node says where, not the server."""
    out = context.node_config.get("out", os.environ.get(CLIENTS_OUT, "flower-client"))
    return Path(str(out)) / client_name(number)


def own_client(federation: Federation, number: int, context: Context) -> Client:
    """A node's client as it stands.

    The federation is kept between messages and runs, so a client's later state is never put into it.
    """
    return read_client(client_file(number, context), context.run_id) or federation.clients[number]


@client_app.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is, how many images it trains on, and which clients and classes it knows of."""
    try:
        federation, own = own_data(message, context)
    except UserError as error:  # Flower passes no message of an error on
        return Message(RecordDict({"problem": ConfigRecord({"text": str(error)})}), reply_to=message)
    metrics = MetricRecord({"client": own.number, "images": len(own.train)})
    records = {"metrics": metrics, "known": ConfigRecord(names_in(federation.data))}
    return Message(RecordDict(records), reply_to=message)


def names_in(data: Federated) -> dict[str, list[str]]:
    """What all sites must have alike for a label to mean the same at each."""
    return {"clients": [client.name for client in data.clients], "classes": list(data.class_names)}


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """One local round."""
    federation, own = own_data(message, context)
    number, content = own.number, message.content
    bank = {int(key): state for key, state in unpack("specific", content).items()}
    extra = unpack("extra", content).get("all", {})
    download = Download(int(content["config"]["server-round"]), to_state(content["arrays"]), bank, extra)
    clients, uploads = local_round(
        federation.method,
        federation.config,
        federation.net,
        [own_client(federation, number, context)],
        [own],
        [download],
        federation.data,
    )
    client, upload = clients[0], uploads[0]
    if fault(upload) is None:  # a faulty answer is left out by the server, and its client stays as it was
        write_client(client_file(number, context), client, context.run_id)
    metrics = {"client": number, "num-examples": upload.samples, **upload.metrics}
    records = {"arrays": to_record(upload.shared), "metrics": MetricRecord(metrics)}
    return Message(
        RecordDict({**records, **pack("lent", {"own": upload.lent}), **pack("extra", {"own": upload.extra})}),
        reply_to=message,
    )


@client_app.evaluate()
def evaluate_client(message: Message, context: Context) -> Message:
    """In-domain accuracy in per cent of the personal model under the new global part."""
    federation, own = own_data(message, context)
    client = own_client(federation, own.number, context)
    state = {**client.state, **to_state(message.content["arrays"])}
    logits = predict(federation.method, federation.net, [state], [own.test.images], federation.data, False)
    metrics = {"num-examples": len(own.test), "in_domain": accuracy(logits[0], own.test.labels)}
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
        """Ask every node which client it is: node ids are random. Raises UserError when nodes and clients do
        not match, and when a site has other folders than the server."""
        federation = self.federation
        wanted, known = len(federation.clients), names_in(federation.data)
        while len(nodes := list(grid.get_node_ids())) < wanted:
            print(f"{len(nodes)} of {wanted} clients are connected; waiting for the others", flush=True)
            time.sleep(2)
        settings = RecordDict({"config": ConfigRecord({"settings": self.settings})})
        questions = [Message(settings, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        for reply in grid.send_and_receive(questions):
            if reply.has_error() or "problem" in reply.content:
                reason = reply.error.reason if reply.has_error() else reply.content["problem"]["text"]
                raise UserError(f"a Flower node could not start its client: {reason}")
            number = int(reply.content["metrics"]["client"])
            self.clients[reply.metadata.src_node_id] = number
            federation.sizes[number] = int(reply.content["metrics"]["images"])
            for what, names in known.items():
                theirs = list(reply.content["known"][what])
                if theirs != names:
                    raise UserError(
                        f"the node of client {number} has the {what} {', '.join(theirs)}, the server "
                        f"{', '.join(names)}: each site needs all folders, and images in its own"
                    )
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


def make_federation(config: Config, own: Collection[int] | None = None) -> Federation:
    """The server's federation; its messages about clients go to the console. own: as for `load_data`."""
    data = load_data(config, config.seed, own)
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

    run_rounds(grid, make_federation(config, own=()), report)


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
            federation.clients[k] = read_client(Path(folder) / client_name(k)) or client
    return federation
