"""The client's side of DFL: stage S (personalisation), stage C (generalisation), and one local round.

Each objective below is written for one client and one batch; `engine.train_stage` runs it for a group. In the
comments x (B, 3, H, W), y (B,), z (B, d); `sg` is a stop-gradient. The paper's Figure 2 gives the branches
and what is pulled together or apart; order, weights and optimisers are our reconstruction.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl import losses
from dfl.engine import Draws, Stage, State, Step, call, part, per_client, stack, train_stage, unstack
from dfl.model import TwoBranch, build_backbone
from shared.runtime import own_type, step_generator

if TYPE_CHECKING:
    from dfl.data import ClientData, Federated
    from dfl.train import Config

PIECE = 256
"""Images of a client that go through its network at once after training."""


@dataclass(frozen=True)
class Method:
    """A federated method: its network, its local stages, and which tensors the server averages."""

    name: str
    build: Callable[[], nn.Module]
    stages: tuple[Stage, ...]
    shared: Callable[[str], bool]
    """Whether a floating-point tensor of this name belongs to the global part. Integers never travel."""
    predict: Callable[[nn.Module, State, Tensor], Tensor]
    """(network, state, x) -> logits (B, C) of the client's personal model."""
    representations: dict[str, Callable[[nn.Module, State, Tensor], Tensor]]
    """What the probes read, by name: (network, state, x) -> (B, d)."""
    lend: Callable[[nn.Module, State, Iterable[Tensor], Tensor, int], State] | None = None
    """(network, state, x, y, classes) -> what other clients may use (DFL: E_s, or its class means). x: the
    client's set in pieces of at most `PIECE` images, made ready only as they are asked for."""
    answer: Callable[[nn.Module, State, State, Iterable[Tensor], Tensor], State] | None = None
    """(network, state, memory, x, y) -> further tensors for the server (SCAFFOLD, FedProto). x: as above."""
    gather: Callable[[State, list["Upload"], int], State] | None = None
    """(extra, uploads, number of clients) -> the server's further tensors of the next round."""
    first_extra: Callable[[nn.Module, int], State] = lambda net, classes: {}
    """The server's further tensors before the first round."""
    first_memory: Callable[[nn.Module, State], State] = lambda net, state: {}
    """What a client remembers before its first round."""


@dataclass
class Client:
    """What one client keeps between rounds: its whole model as last trained, and what a method remembers."""

    state: State
    memory: State = field(default_factory=dict)


@dataclass
class Download:
    """Server to client: the global part, lent extractors by client number, what else the method sends."""

    round: int
    shared: State
    bank: dict[int, State] = field(default_factory=dict)
    extra: State = field(default_factory=dict)


@dataclass
class Upload:
    """Client to server after a local round."""

    client: int
    samples: int
    shared: State
    lent: State = field(default_factory=dict)
    extra: State = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def global_part(state: State, shared: Callable[[str], bool]) -> State:
    """The tensors that the server averages: floating point, and `shared` by name."""
    return {name: value for name, value in state.items() if value.is_floating_point() and shared(name)}


def local_part(state: State, shared: Callable[[str], bool]) -> State:
    """Everything else; with `global_part` it covers the state without overlap."""
    taken = global_part(state, shared)
    return {name: value for name, value in state.items() if name not in taken}


def normalisation(net: nn.Module) -> set[str]:
    """Names of all parameters and buffers of normalisation layers."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, kinds)]
    return {f"{name}.{key}" for name, layer in layers for key in layer.state_dict()}


# --- the DFL objective ------------------------------------------------------------------------------------


def freeze_for_s(net: TwoBranch, state: State, memory: State, x: Tensor) -> dict[str, Tensor]:
    """Stage S looks at z_c = sg E_c^k(x)."""
    return {"z_c": call(net.invariant, part(state, "invariant"), x)}


def freeze_for_c(net: TwoBranch, state: State, memory: State, x: Tensor) -> dict[str, Tensor]:
    """Stage C looks at z_s = sg E_s^k(x), z_g = sg E_c^G(x) and sg E_s^i(x) of the lent extractors."""
    return {"z_s": call(net.specific, part(state, "specific"), x), **freeze_for_joint(net, state, memory, x)}


def freeze_for_joint(net: TwoBranch, state: State, memory: State, x: Tensor) -> dict[str, Tensor]:
    """z_g (B, d) of the round's snapshot, and z_i (B, M, d) of the lent extractors, if there are any."""
    frozen = {"z_g": call(net.invariant, part(memory["start"], "invariant"), x)}
    if "bank" in memory and "prototypes" not in memory["bank"]:
        lenders = len(memory["bank_weight"])
        lent = [{name: value[i] for name, value in memory["bank"].items()} for i in range(lenders)]
        frozen["z_i"] = torch.stack([call(net.specific, state, x) for state in lent], 1)
    return frozen


def forward_s(net: TwoBranch, state: State, memory: State, batch: State) -> dict[str, Tensor]:
    z_s = call(net.specific, part(state, "specific"), batch["x"], train=True)
    return {"z_s": z_s, "z_c": batch["z_c"]}


def forward_c(net: TwoBranch, state: State, memory: State, batch: State) -> dict[str, Tensor]:
    z_c = call(net.invariant, part(state, "invariant"), batch["x"], train=True)
    return {"z_s": batch["z_s"], "z_c": z_c}


def forward_joint(net: TwoBranch, state: State, memory: State, batch: State) -> dict[str, Tensor]:
    return {
        "z_s": call(net.specific, part(state, "specific"), batch["x"], train=True),
        "z_c": call(net.invariant, part(state, "invariant"), batch["x"], train=True),
    }


def scores(critic: nn.Module, state: State, a: Tensor, b: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Critic scores on joint and on shuffled pairs, each (B,)."""
    other = losses.derangement(len(a), shift)
    return call(critic, state, a, b), call(critic, state, a, b[other])


def critic_objective(
    config: "Config", maximal: bool, net: TwoBranch, state: State, memory: State, batch: State, live: State
) -> tuple[Tensor, dict[str, Tensor]]:
    """-I_{T_min}(sg z_s, sg z_c) - I_{T_max}(sg z_c, z_g); stage S trains T_min alone."""
    z_s, z_c = live["z_s"].detach(), live["z_c"].detach()
    pairs = scores(net.critic_min, part(state, "critic_min"), z_s, z_c, batch["shift"])
    loss = losses.critic_loss(*pairs, mi=config.mi)
    if maximal:
        pairs = scores(net.critic_max, part(state, "critic_max"), z_c, batch["z_g"], batch["shift"])
        loss = loss + losses.critic_loss(*pairs)
    return loss, {}


def lent_features(config: "Config", memory: State, batch: State, classes: int) -> Tensor:
    """What takes the place of z_s in L_div, (M, B, d)."""
    if config.source == "prototypes":
        prototypes = memory["bank"]["prototypes"]  # (M, C, d)
        lender = torch.arange(len(prototypes), device=prototypes.device)[:, None]
        drawn = ((batch["lent"] * classes).long() + lender) % classes  # (M, B)
        return prototypes[lender, drawn]
    z_i = batch["z_i"][batch["mixed"]] if config.pairing == "shuffle" else batch["z_i"]
    return z_i.transpose(0, 1)


def objective(
    config: "Config", general: bool, net: TwoBranch, state: State, memory: State, batch: State, live: State
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_cls + lambda_min L_min, and in stage C (`general`) + lambda_max L_max + lambda_div L_div."""
    z_s, z_c = live["z_s"], live["z_c"]
    head = part(state, "head")
    loss = cls = F.cross_entropy(call(net.head, head, torch.cat([z_s, z_c], -1)), batch["y"])
    logged = {"cls": cls}
    if config.mi != "none":
        pairs = scores(net.critic_min, part(state, "critic_min"), z_s, z_c, batch["shift"])
        l_min = losses.min_information(*pairs, mi=config.mi)
        width = z_c.shape[-1] / 32 if config.mi == "club" else 1  # CLUB sums over features: tuned at d = 32
        loss = loss + config.lambda_min / width * l_min
        logged["I_min"] = losses.information(*pairs, mi=config.mi)  # without the hinge: below 0 a critic lags
    if general and config.mi != "none":
        pairs = scores(net.critic_max, part(state, "critic_max"), z_c, batch["z_g"], batch["shift"])
        loss = loss + config.lambda_max * losses.max_information(*pairs)
        logged["I_max"] = losses.information(*pairs)
    if general and "bank" in memory:
        z_i = lent_features(config, memory, batch, net.head.out_features)
        logits = call(net.head, head, torch.cat([z_i, z_c.expand_as(z_i)], -1))  # (M, B, C)
        l_div = losses.diversity(logits, batch["y"], memory["bank_weight"])
        loss = loss + config.lambda_div * l_div
        logged["div"] = l_div
    return loss, logged


def lend_extractor(net: TwoBranch, state: State, x: Iterable[Tensor], y: Tensor, classes: int) -> State:
    """The specific extractor's parameters and statistics (no integer counters)."""
    return {name: value for name, value in part(state, "specific").items() if value.is_floating_point()}


def lend_prototypes(net: TwoBranch, state: State, x: Iterable[Tensor], y: Tensor, classes: int) -> State:
    """Class means of z_s, (C, d). A class that the client lacks gets the mean of all its samples."""
    z_s = torch.cat([call(net.specific, part(state, "specific"), piece) for piece in x])
    return {"prototypes": class_means(z_s, y, classes)[0]}


def class_means(z: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """z (n, d), y (n,) -> means (C, d), counts (C,). An empty class gets the overall mean.

    In single precision, also under autocast: bf16 counts only up to 256.
    """
    with own_type(z):
        z = z.float()
        member = F.one_hot(y, classes).to(z)  # (n, C)
        count = member.sum(0)
        means = member.T @ z / count.clamp(min=1)[:, None]
        return torch.where(count[:, None] > 0, means, z.mean(0)), count


def dfl(config: "Config", data: "Federated") -> Method:
    """Disentangled Federated Learning with the switches of `Config`."""

    def build() -> TwoBranch:
        hidden = 64 if config.backbone == "mlp" else 512
        return TwoBranch(
            lambda: build_backbone(config.backbone, None, data.image_shape, config.norm, config.widths),
            data.classes,
            hidden,
            config.mi,
        )

    norms = {name for name in normalisation(build()) if name.startswith("invariant.")}

    def shared(name: str) -> bool:
        branch = name.split(".")[0]
        if config.aggregate in ("all", "none"):
            return config.aggregate == "all" and not branch.startswith("critic")
        if branch == "head":
            return config.share_head
        return branch == "invariant" and not (config.aggregate == "invariant_bnlocal" and name in norms)

    def optimiser(leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(leaves, config.lr, config.momentum)

    def critic_optimiser(leaves: list[Tensor]) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if config.critic_optimiser == "sgd" else torch.optim.Adam
        return kind(leaves, config.critic_lr)

    def steps(branches: tuple[str, ...], general: bool) -> tuple[Step, ...]:
        critics = ("critic_min", "critic_max") if general else ("critic_min",)
        train = Step(
            lambda name: name.split(".")[0] in branches, partial(objective, config, general), optimiser
        )
        if config.mi == "none":
            return (train,)
        fit_critics = Step(
            lambda name: name.split(".")[0] in critics,
            partial(critic_objective, config, general),
            critic_optimiser,
        )
        return (fit_critics, train)

    if config.schedule == "alternate":
        stages = (
            Stage("S", config.local_epochs, forward_s, steps(("specific", "head"), False), freeze_for_s),
            Stage("C", config.local_epochs, forward_c, steps(("invariant", "head"), True), freeze_for_c),
        )
    else:  # all parameters at once
        everything = steps(("specific", "invariant", "head"), True)
        epochs = config.local_epochs * (2 if config.schedule == "joint" else 1)
        stages = (Stage("J", epochs, forward_joint, everything, freeze_for_joint),)

    return Method(
        "dfl",
        build,
        stages,
        shared,
        predict=lambda net, state, x: call(net, state, x),
        representations={
            "z_c": lambda net, state, x: call(net.invariant, part(state, "invariant"), x),
            "z_s": lambda net, state, x: call(net.specific, part(state, "specific"), x),
        },
        lend={"models": lend_extractor, "prototypes": lend_prototypes, "none": None}[config.source],
    )


# --- one local round --------------------------------------------------------------------------------------


def local_round(
    method: Method,
    config: "Config",
    net: nn.Module,
    clients: list[Client],
    sets: list["ClientData"],
    downloads: list[Download],
    data: "Federated",
    autocast: Callable = nullcontext,
) -> tuple[list[Client], list[Upload]]:
    """A group of clients with equally many training images receives, trains and answers.

    The clients given are not changed, so that a failure leaves them as they were. Raises ValueError for a
    client with fewer than two images.
    """
    size, n = len(clients), len(sets[0].train.labels)
    if n < 2:
        raise ValueError(f"{n} training images, at least two are needed")
    own = [each.train.images for each in sets]
    images = torch.stack(own) if size > 1 else own[0][None]  # (G, n, 3, H, W); one client's is not copied
    labels = torch.stack([each.train.labels for each in sets])  # (G, n)
    start = stack(
        [{**client.state, **download.shared} for client, download in zip(clients, downloads, strict=True)]
    )
    memory: dict[str, Any] = {
        "start": start,
        "previous": stack([client.state for client in clients]),
        "extra": stack([download.extra for download in downloads]),
        "own": stack([client.memory for client in clients]),
        **stack_banks([download.bank for download in downloads], labels.device),
    }
    state, metrics = start, {}
    generators = [client_generator(config.seed, downloads[0].round, each.number) for each in sets]
    for stage in method.stages:
        draws = Draws.group(
            [Draws.of(n, config.batch_size, stage.epochs, generator) for generator in generators],
            labels.device,
        )
        state, means = train_stage(
            stage,
            net,
            state,
            memory,
            images,
            labels,
            draws,
            data.prepare,
            data.augment,
            config.clip,
            autocast,
        )
        metrics |= means

    lends = method.lend is not None and (downloads[0].round - 1) % config.lend_every == 0

    def answer(state: State, memory: State, images: Tensor, labels: Tensor) -> tuple[State, State]:
        def pieces() -> Iterable[Tensor]:
            return (data.prepare(piece) for piece in images.split(PIECE))

        lent = method.lend(net, state, pieces(), labels, data.classes) if lends else {}
        lent = {name: value.half() if config.lend_half else value for name, value in lent.items()}
        return lent, method.answer(net, state, memory, pieces(), labels) if method.answer else {}

    # torch.func.grad inside a method's `answer` sets up its own gradients.
    with torch.no_grad(), autocast():
        lent, extra = per_client(answer, size)(state, memory, images, labels)
    states, lents, extras = (unstack(tree, size) for tree in (state, lent, extra))
    numbers = {name: value.tolist() for name, value in metrics.items()}
    uploads = [
        Upload(
            sets[i].number,
            n,
            global_part(states[i], method.shared),
            lents[i],
            {name: value for name, value in extras[i].items() if not name.startswith("own.")},
            {name: values[i] for name, values in numbers.items()},
        )
        for i in range(size)
    ]
    return [Client(states[i], part(extras[i], "own")) for i in range(size)], uploads


def client_generator(seed: int, round: int, client: int) -> torch.Generator:
    """A client's randomness in a round, the same in every engine and process."""
    return step_generator(seed, round, stream=1 + client)


def stack_banks(banks: list[Mapping[int, State]], device: torch.device) -> dict[str, Any]:
    """Lent states of each client -> {"bank": (G, M, ...), "bank_weight": (G, M)}; {} when nobody lent.

    M is the longest list; a shorter one is filled up with copies of weight 0.
    """
    longest = max(len(bank) for bank in banks)
    if not longest:
        return {}
    filler = next(state for bank in banks for state in bank.values())
    lists = [list(bank.values()) + [filler] * (longest - len(bank)) for bank in banks]
    weight = torch.zeros(len(banks), longest, device=device)
    for row, bank in zip(weight, banks, strict=True):
        row[: len(bank)] = 1 / max(len(bank), 1)
    lent = stack([stack(states) for states in lists])
    return {"bank": {name: value.float() for name, value in lent.items()}, "bank_weight": weight}
