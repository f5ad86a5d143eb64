"""The server's side: who takes part, what is sent, how it is averaged, and what is left out.

round t: A_t = sample of clients
         k in A_t receives E_c^G (and P^G) and up to M lent extractors
         k trains locally (client.py) and returns E_c^k, P^k, E_s^k
         E_c^G, P^G = weighted average over A_t;  bank[k] = E_s^k
"""

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfl.client import Client, Download, Method, Upload, global_part, local_round
from dfl.engine import State, per_client, stack
from dfl.model import load_extractors
from shared.runtime import UserError, step_generator

if TYPE_CHECKING:
    from dfl.data import Federated
    from dfl.train import Config


def participants(seed: int, round: int, clients: int, fraction: float) -> list[int]:
    """A_t: max(1, round(fraction K)) clients without replacement, the same for every method of a seed."""
    count = max(1, int(fraction * clients + 0.5))
    return sorted(torch.randperm(clients, generator=step_generator(seed, round))[:count].tolist())


def dropouts(seed: int, round: int, clients: int, probability: float) -> set[int]:
    """Clients that vanish in this round (a simulation of stragglers and lost connections)."""
    generator = step_generator(seed, round, stream=10**6)
    return set((torch.rand(clients, generator=generator) < probability).nonzero().flatten().tolist())


def lenders(seed: int, round: int, client: int, bank: Iterable[int], limit: int | None) -> list[int]:
    """S_k: up to `limit` other clients that have lent (None: all of them)."""
    others = sorted(set(bank) - {client})
    if limit is None or len(others) <= limit:
        return others
    order = torch.randperm(len(others), generator=step_generator(seed, round, stream=2 * 10**6 + client))
    return sorted(others[i] for i in order[:limit].tolist())


def average(uploads: list[Upload], weighting: str) -> State:
    """Weighted mean of the shared parts, in float32: weights n_k / sum n ("samples") or 1/K ("uniform").

    A running sum, so that one model more is held and not K.
    """
    weights = [upload.samples if weighting == "samples" else 1 for upload in uploads]
    mean: State = {}
    for upload, weight in zip(uploads, weights, strict=True):
        for name, value in upload.shared.items():
            piece = value.float() * (weight / sum(weights))
            mean[name] = mean[name].add_(piece) if name in mean else piece
    return mean


def fault(upload: Upload) -> str | None:
    """What is wrong with an answer: not finite, or nothing. None when it can be used."""
    tensors = {**upload.shared, **upload.lent, **upload.extra}
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist() if tensors else []
    bad = [name for name, good in zip(tensors, finite, strict=True) if not good]
    bad += [name for name, value in upload.metrics.items() if not math.isfinite(value)]
    return f"NaN or infinity in its answer ({bad[0]})" if bad else None


def size_of(*states: State) -> int:
    """Bytes of tensors."""
    return sum(value.numel() * value.element_size() for state in states for value in state.values())


class Federation:
    """The server and its clients in one process (or spread over those that `torchrun` started).

    `shared` is the global part, `bank` what clients lent, `extra` what else a method sends, `trained` who has
    answered at least once. `state_dict` and `load_state_dict` save and restore all of it.
    """

    def __init__(
        self,
        method: Method,
        config: "Config",
        data: "Federated",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        autocast: Callable = nullcontext,
        report: Callable[[str], None] = lambda message: None,
    ):
        self.method, self.config, self.data = method, config, data
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.autocast, self.report = autocast, report
        torch.manual_seed(config.seed)
        self.net = method.build().to(self.device)
        if config.init is not None:
            load_extractors(config.init, self.net)
        first = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.shared = global_part(first, method.shared)
        self.clients = [
            Client(
                {name: value.clone() for name, value in first.items()}, method.first_memory(self.net, first)
            )
            for _ in data.clients
        ]
        # Training images of each client; where the clients are elsewhere, what they say they have.
        self.sizes = [len(client.train) for client in data.clients]
        self.bank: dict[int, State] = {}
        self.trained: set[int] = set()
        extra = method.first_extra(self.net, data.classes)
        self.extra = {name: value.to(self.device) for name, value in extra.items()}
        self.round = 0

    # --- one round ----------------------------------------------------------------------------------

    def run_round(self) -> dict[str, float]:
        """Sample, send, train, check, aggregate. Returns the round's scalars.

        A client that has no data, fails, or answers with NaN is reported by name and left out. Raises
        UserError when fewer than `min_clients` answers are left.
        """
        self.round += 1
        chosen, failures = take_part(self)
        downloads = {k: self.download(k) for k in chosen if k not in failures}
        answers = self.train(downloads, failures)
        accepted = []
        for k, (client, upload) in sorted(answers.items()):
            problem = fault(upload)
            if problem:
                failures[k] = problem
            else:
                self.clients[k] = client
                accepted.append(upload)
        self.aggregate(accepted, failures)
        return round_scalars(self, accepted, downloads, failures)

    def download(self, k: int) -> Download:
        """What client k receives this round. Exactly what the sharing options name, and nothing of its
        own."""
        chosen = lenders(self.config.seed, self.round, k, self.bank, self.config.bank_per_round)
        return Download(self.round, self.shared, {i: self.bank[i] for i in chosen}, self.extra)

    def aggregate(self, uploads: list[Upload], failures: dict[int, str]) -> None:
        """New global part, bank and extras from the answers that were accepted; names who was left out."""
        for k, reason in sorted(failures.items()):
            self.report(f"round {self.round}: {self.data.clients[k].name} left out: {reason}")
        if len(uploads) < self.config.min_clients:
            reasons = "; ".join(f"{self.data.clients[k].name}: {why}" for k, why in sorted(failures.items()))
            raise UserError(
                f"round {self.round}: {len(uploads)} of the {self.config.min_clients} clients needed "
                f"(--min-clients) answered ({reasons or 'none failed'}); the last checkpoint is kept"
            )
        self.shared = average(uploads, self.config.weighting)
        self.trained |= {upload.client for upload in uploads}
        self.bank |= {upload.client: upload.lent for upload in uploads if upload.lent}
        if self.method.gather:
            self.extra = self.method.gather(self.extra, uploads, len(self.clients))

    # --- local training -------------------------------------------------------------------------------

    def train(
        self, downloads: dict[int, Download], failures: dict[int, str]
    ) -> dict[int, tuple[Client, Upload]]:
        """Local rounds of the clients in `downloads`; who fails goes into `failures`.

        Clients with equally many images are trained together when the engine is vectorised. A group that
        fails is trained again one by one, so that only the client at fault is lost. Several processes take
        turns and then exchange their clients. Raises the first client's error when all of several failed.
        """
        mine = list(downloads)[self.rank :: self.world]
        groups: dict[int, list[int]] = {}
        for k in mine:
            key = len(self.data.clients[k].train) if vectorises(self.config, self.net) else -1 - k
            groups.setdefault(key, []).append(k)
        answers: dict[int, tuple[Client, Upload]] = {}
        errors: list[Exception] = []
        pending = list(groups.values())
        while pending:
            group = pending.pop(0)
            try:
                clients, uploads = local_round(
                    self.method,
                    self.config,
                    self.net,
                    [self.clients[k] for k in group],
                    [self.data.clients[k] for k in group],
                    [downloads[k] for k in group],
                    self.data,
                    self.autocast,
                )
            except (RuntimeError, ValueError, IndexError, OSError) as error:
                if len(group) > 1:
                    self.report(
                        f"round {self.round}: {len(group)} clients could not train together "
                        f"({type(error).__name__}: {error}); they train one by one"
                    )
                    pending = [[k] for k in group] + pending
                else:
                    failures[group[0]] = f"{type(error).__name__}: {error}"
                    errors.append(error)
                continue
            answers |= dict(zip(group, zip(clients, uploads, strict=True), strict=True))
        if self.world > 1:
            answers = self.exchange(answers, failures)
        if errors and not answers and len(downloads) > 1 and not is_of_the_machine(errors[0]):
            raise errors[0]  # what strikes all clients alike is a mistake in the program, not theirs
        return answers

    def exchange(
        self, answers: dict[int, tuple[Client, Upload]], failures: dict[int, str]
    ) -> dict[int, tuple[Client, Upload]]:
        """Give every process the answers and failures of all, so that all go on with the same federation."""
        parcels: list = [None] * self.world
        torch.distributed.all_gather_object(parcels, (move(answers, "cpu"), failures))
        everything: dict[int, tuple[Client, Upload]] = {}
        for part, failed in parcels:
            everything |= move(part, self.device)
            failures |= failed
        return everything

    # --- evaluation and storage -----------------------------------------------------------------------

    def client_states(self) -> list[State]:
        """Every client's personal model: its own part with the current global part."""
        return [{**client.state, **self.shared} for client in self.clients]

    def state_dict(self) -> dict:
        return {
            "round": self.round,
            "shared": self.shared,
            "extra": self.extra,
            "bank": {str(k): state for k, state in self.bank.items()},
            "trained": sorted(self.trained),
            "clients": [{"state": client.state, "memory": client.memory} for client in self.clients],
        }

    def load_state_dict(self, saved: dict) -> None:
        """Raises an error of some kind for a state of another federation: ValueError if of its networks."""
        saved, own = move(saved, self.device), self.state_dict()
        for name in ("shared", "extra", "clients"):
            if shapes(saved[name]) != shapes(own[name]):
                raise ValueError(f"'{name}' is of other networks or clients")
        self.round, self.shared, self.extra = int(saved["round"]), saved["shared"], saved["extra"]
        self.bank = {int(k): state for k, state in saved["bank"].items()}
        self.trained = set(saved["trained"])
        self.clients = [Client(client["state"], client["memory"]) for client in saved["clients"]]


def take_part(federation: Federation) -> tuple[list[int], dict[int, str]]:
    """A_t of the present round, and those in it that cannot train, with the reason."""
    config, sizes = federation.config, federation.sizes
    chosen = participants(config.seed, federation.round, len(sizes), config.fraction)
    gone = dropouts(config.seed, federation.round, len(sizes), config.dropout)
    failures = {k: "dropped out" for k in chosen if k in gone}
    few = {k: sizes[k] for k in chosen if sizes[k] < 2}
    return chosen, failures | {
        k: "1 training image, at least two are needed" if n else "no training data" for k, n in few.items()
    }


def is_of_the_machine(error: Exception) -> bool:
    """Whether memory or a file failed, for which no line of the program is to blame."""
    return isinstance(error, OSError | torch.OutOfMemoryError)


def round_scalars(
    federation: Federation, accepted: list[Upload], downloads: dict[int, Download], failures: dict[int, str]
) -> dict[str, float]:
    """What a round logs: clients, bytes per client, the clients' mean metrics, who was left out."""
    up = [size_of(upload.shared, upload.lent, upload.extra) for upload in accepted]
    down = [size_of(each.shared, each.extra, *each.bank.values()) for each in downloads.values()]
    scalars = {
        "clients": len(accepted),
        "bytes_up": sum(up) / len(up),
        "bytes_down": sum(down) / len(down),
        "bytes_lent_up": sum(size_of(upload.lent) for upload in accepted) / len(up),
        "bytes_lent_down": sum(size_of(*each.bank.values()) for each in downloads.values()) / len(down),
    }
    for name in sorted({name for upload in accepted for name in upload.metrics}):
        values = [upload.metrics[name] for upload in accepted if name in upload.metrics]
        scalars[name] = sum(values) / len(values)
    return scalars | {f"left_out/{federation.data.clients[k].name}": 1.0 for k in sorted(failures)}


def vectorises(config: "Config", net: nn.Module) -> bool:
    """Whether clients train stacked: asked for, or automatic and without BatchNorm (whose running statistics
    `vmap` cannot update). Raises UserError when it is asked for and impossible."""
    batch_norm = any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in net.modules())
    if config.engine == "vectorised" and batch_norm:
        raise UserError("--engine vectorised cannot train BatchNorm; use --norm group or --engine sequential")
    return config.engine == "vectorised" or (config.engine == "auto" and not batch_norm)


def move(tree, device: torch.device | str):
    """All tensors of nested dicts, lists, clients and uploads to a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: move(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(move(value, device) for value in tree)
    if isinstance(tree, Client | Upload):
        return type(tree)(**{name: move(value, device) for name, value in vars(tree).items()})
    return tree


def shapes(tree):
    """Nested dicts and lists with the shape of each tensor in its place."""
    if isinstance(tree, dict):
        return {key: shapes(value) for key, value in tree.items()}
    return [shapes(value) for value in tree] if isinstance(tree, list) else tree.shape


# --- predictions of a federation --------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    method: Method,
    net: nn.Module,
    states: list[State],
    images: list[Tensor],
    data: "Federated",
    vectorised: bool,
) -> list[Tensor]:
    """Logits (n, C) of personal model k on images[k], for every k."""

    def one(state: State, x: Tensor) -> Tensor:
        return method.predict(net, state, data.prepare(x))

    if vectorised and len({len(x) for x in images}) == 1:
        pieces = zip(*[x.split(512) for x in images], strict=True)
        stacked = stack(states)
        run = per_client(one, len(states))
        return list(torch.cat([run(stacked, torch.stack(piece)) for piece in pieces], 1))
    return [
        torch.cat([one(state, piece) for piece in x.split(512)])
        for state, x in zip(states, images, strict=True)
    ]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of correct predictions in per cent."""
    return (logits.argmax(-1) == labels).float().mean().item() * 100


def evaluate(federation: Federation, full: bool) -> dict[str, float]:
    """Accuracies in per cent after aggregation.

    in_domain (mean, worst client, standard deviation over clients) on each client's own test set; with `full`
    also counterfactual (mean of the personal models), counterfactual_transfer and unseen (softmax averaged
    over the models of the clients that have trained) where the federation has such sets.
    """
    method, net, data = federation.method, federation.net, federation.data
    states = federation.client_states()
    vectorised = vectorises(federation.config, net)

    def run(images: list[Tensor]) -> list[Tensor]:
        return predict(method, net, states, images, data, vectorised)

    own = run([client.test.images for client in data.clients])
    each = torch.tensor(
        [accuracy(logits, client.test.labels) for logits, client in zip(own, data.clients, strict=True)]
    )
    result = {
        "in_domain": each.mean().item(),
        "worst": each.min().item(),
        "spread": each.std(correction=0).item(),
    }
    if full and data.counterfactual is not None:
        logits = run([data.counterfactual.images] * len(states))
        labels = data.counterfactual.labels
        result["counterfactual"] = sum(accuracy(each, labels) for each in logits) / len(logits)
        result["counterfactual_transfer"] = accuracy(transfer(logits, federation.trained), labels)
    if full and data.unseen is not None:
        logits = run([data.unseen.images] * len(states))
        result["unseen"] = accuracy(transfer(logits, federation.trained), data.unseen.labels)
    return result


def transfer(logits: list[Tensor], trained: Collection[int]) -> Tensor:
    """Mean of the softmax outputs (n, C) of the clients that have `trained`: the prediction for a domain
    nobody has. A client that never did has its first, random extractor, and no part in it."""
    return torch.stack([logits[k].float().softmax(-1) for k in sorted(trained)]).mean(0)
