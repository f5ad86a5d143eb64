"""States of DFL as Flower's messages carry them, and as a node keeps its client between two rounds."""

from pathlib import Path

from flwr.app import ArrayRecord, RecordDict
from safetensors import safe_open

from dfl.client import Client
from dfl.engine import State
from shared.records import write_tensors

MEMORY = "memory/"
"""Before the names of a client's memory in its file, beside those of its weights."""


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


def client_name(number: int) -> str:
    """Name of a client's file."""
    return f"client_{number}.safetensors"


def write_client(path: Path, client: Client, run: int) -> None:
    """Keep a client, and of which run it is.

    Flower has `context.state` for this, but sends a node's answer before it stores that: the next round can
    begin without it, and does where it is large.
    """
    memory = {MEMORY + name: value for name, value in client.memory.items()}
    write_tensors(path, {**client.state, **memory}, {"run": str(run)})


def read_client(path: Path, run: int | None = None) -> Client | None:
    """The inverse of `write_client`; None when nothing is there, or nothing of this run (None: of any)."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if run is not None and (file.metadata() or {}).get("run") != str(run):
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    client = Client({})
    for name, value in tensors.items():
        part = client.memory if name.startswith(MEMORY) else client.state
        part[name.removeprefix(MEMORY)] = value
    return client
