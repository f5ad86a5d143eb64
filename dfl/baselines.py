"""The methods that DFL is compared with, on the same engine, data, schedule and number of passes.

Every one is a single-branch network (`wide` gives it about DFL's number of parameters). DFL spends two passes
over the data per local epoch (stages S and C), so every method here does too; Ditto and FedRep share them
between their two stages.

    local     nothing is averaged
    fedavg    everything is averaged (McMahan et al., 2017)
    fedprox   + mu/2 ||w - w_G||^2 (Li et al., 2020)
    fedbn     all but the normalisation layers (Li et al., 2021)
    fedper    all but the head (Arivazhagan et al., 2019)
    fedrep    as fedper, head first, then body (Collins et al., 2021)
    scaffold  control variates correct the client's drift (Karimireddy et al., 2020), option I
    moon      model-contrastive learning (Li et al., 2021)
    ditto     FedAvg, and beside it a personal model held near it (Li et al., 2021)
    fedproto  only class prototypes travel (Tan et al., 2022)
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl import losses
from dfl.client import PIECE, Method, Upload, class_means, dfl, normalisation
from dfl.engine import Stage, State, Step, call, part
from dfl.model import build_backbone
from shared.runtime import UserError

if TYPE_CHECKING:
    from dfl.data import Federated
    from dfl.train import Config

BASELINES = (
    "local", "fedavg", "fedprox", "fedbn", "fedper", "fedrep", "scaffold", "moon", "ditto", "fedproto",
)  # fmt: skip


def build_method(config: "Config", data: "Federated") -> Method:
    """The method that `config.method` names: dfl or a baseline."""
    return dfl(config, data) if config.method == "dfl" else baseline(config, data)


def forward(net: nn.Module, state: State, memory: State, batch: State) -> dict[str, Tensor]:
    z, logits = call(net, state, batch["x"], train=True, with_features=True)
    return {"z": z, "logits": logits}


def objective(
    config: "Config", net: nn.Module, state: State, memory: State, batch: State, live: State
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy plus the term of `config.method`."""
    loss = cls = F.cross_entropy(live["logits"], batch["y"])
    if config.method == "fedprox":
        loss = loss + config.mu * losses.proximal(state, weights(net, memory["start"]))
    elif config.method == "moon":
        loss = loss + config.mu * losses.model_contrastive(live["z"], batch["z_g"], batch["z_p"])
    elif config.method == "fedproto":
        extra = memory["extra"]
        loss = loss + config.mu * losses.prototype_distance(
            live["z"], batch["y"], extra["means"], extra["known"]
        )
    elif config.method == "scaffold":
        # The gradient of <w, c - c_k> is the correction c - c_k.
        own, common = memory["own"], memory["extra"]
        loss = loss + sum((state[name] * (common[name] - own[name])).sum() for name in weights(net, state))
    return loss, {"cls": cls}


def weights(net: nn.Module, state: State) -> State:
    """The trained tensors of a state, without running statistics."""
    names = dict(net.named_parameters())
    return {name: value for name, value in state.items() if name in names}


def freeze_for_moon(net: nn.Module, state: State, memory: State, x: Tensor) -> dict[str, Tensor]:
    """Features under the received and under the client's previous model."""
    z_g = call(net, memory["start"], x, with_features=True)[0]
    return {"z_g": z_g, "z_p": call(net, memory["previous"], x, with_features=True)[0]}


def scaffold_answer(net: nn.Module, state: State, memory: State, x: Iterable[Tensor], y: Tensor) -> State:
    """Option I: the new c_k is the gradient of the local loss at the received model. Sends its change."""
    start = memory["start"]
    fixed = {name: value for name, value in start.items() if name not in weights(net, start)}

    def loss(free: State, piece: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(call(net, {**fixed, **free}, piece), labels)

    control: State = {}
    for piece, labels in zip(x, y.split(PIECE), strict=True):
        share = len(labels) / len(y)
        for name, slope in torch.func.grad(loss)(weights(net, start), piece, labels).items():
            control[name] = control[name] + share * slope if name in control else share * slope
    change = {name: value - memory["own"][name] for name, value in control.items()}
    return {**change, **{f"own.{name}": value for name, value in control.items()}}


def no_control(net: nn.Module, state: State) -> State:
    """Control variates before the first round."""
    return {name: torch.zeros_like(value) for name, value in weights(net, state).items()}


def scaffold_gather(extra: State, uploads: list[Upload], clients: int) -> State:
    return {
        name: value + sum(upload.extra[name] for upload in uploads) / clients for name, value in extra.items()
    }


def fedproto_answer(
    classes: int, net: nn.Module, state: State, memory: State, x: Iterable[Tensor], y: Tensor
) -> State:
    z = torch.cat([call(net, state, piece, with_features=True)[0] for piece in x])
    means, count = class_means(z, y, classes)
    return {"means": means, "count": count}


def fedproto_gather(extra: State, uploads: list[Upload], clients: int) -> State:
    """Prototypes averaged with the number of samples behind them."""
    count = sum(upload.extra["count"] for upload in uploads)  # (C,)
    total = sum(upload.extra["means"] * upload.extra["count"][:, None] for upload in uploads)
    known = count > 0
    means = torch.where(known[:, None], total / count.clamp(min=1)[:, None], extra["means"])
    return {"means": means, "known": torch.maximum(known.to(means), extra["known"])}


class Pair(nn.Module):
    """Ditto's two models: the common one is averaged, the personal one predicts."""

    def __init__(self, common: nn.Module, personal: nn.Module):
        super().__init__()
        self.common, self.personal = common, personal
        personal.load_state_dict(common.state_dict())


def ditto_objective(
    config: "Config", which: str, net: Pair, state: State, memory: State, batch: State, live: State
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = cls = F.cross_entropy(live["logits"], batch["y"])
    if which == "personal":
        anchor = weights(net.common, part(memory["start"], "common"))
        loss = loss + config.mu * losses.proximal(part(state, "personal"), anchor)
    return loss, {"cls": cls}


def ditto_forward(which: str, net: Pair, state: State, memory: State, batch: State) -> dict[str, Tensor]:
    return {"logits": call(net.get_submodule(which), part(state, which), batch["x"], train=True)}


def baseline(config: "Config", data: "Federated") -> Method:
    """One of `BASELINES`; `config.mu` weighs the extra term of fedprox, moon, ditto and fedproto.

    Raises UserError when `config.wide` is asked of a backbone whose widths are fixed.
    """
    if config.wide and config.backbone != "mlp":
        raise UserError(
            f"--wide and the -wide trials double the widths of mlp; {config.backbone} has fixed ones"
        )
    widths = tuple(2 * width for width in config.widths) if config.wide else config.widths

    def single() -> nn.Module:
        return build_backbone(config.backbone, data.classes, data.image_shape, config.norm, widths)

    net = single()
    head, norms = net.head_prefix + ".", normalisation(net)

    def optimiser(leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(leaves, config.lr, config.momentum)

    def stage(
        name: str, epochs: int, trains: Callable[[str], bool] = lambda name: True, freeze=None
    ) -> Stage:
        return Stage(name, epochs, forward, (Step(trains, partial(objective, config), optimiser),), freeze)

    def ditto_stage(which: str) -> Stage:
        step = Step(lambda name: name.startswith(which), partial(ditto_objective, config, which), optimiser)
        return Stage(which, config.local_epochs, partial(ditto_forward, which), (step,))

    averaged = {
        "local": lambda name: False,
        "fedbn": lambda name: name not in norms,
        "fedper": lambda name: not name.startswith(head),
        "fedrep": lambda name: not name.startswith(head),
        "ditto": lambda name: name.startswith("common."),
        "fedproto": lambda name: False,
    }
    method = Method(
        config.method,
        single,
        (stage("local", 2 * config.local_epochs),),
        averaged.get(config.method, lambda name: True),
        predict=lambda net, state, x: call(net, state, x),
        representations={"z": lambda net, state, x: call(net, state, x, with_features=True)[0]},
    )
    if config.method == "fedrep":
        first = stage("head", config.local_epochs, lambda name: name.startswith(head))
        then = stage("body", config.local_epochs, lambda name: not name.startswith(head))
        return replace(method, stages=(first, then))
    if config.method == "moon":
        return replace(method, stages=(stage("local", 2 * config.local_epochs, freeze=freeze_for_moon),))
    if config.method == "ditto":
        return replace(
            method,
            build=lambda: Pair(single(), single()),
            stages=(ditto_stage("common"), ditto_stage("personal")),
            predict=lambda net, state, x: call(net.personal, part(state, "personal"), x),
            representations={
                "z": lambda net, state, x: call(net.personal, part(state, "personal"), x, with_features=True)[
                    0
                ]
            },
        )
    if config.method == "scaffold":
        return replace(
            method,
            answer=scaffold_answer,
            gather=scaffold_gather,
            first_extra=lambda net, classes: no_control(net, net.state_dict()),
            first_memory=no_control,
        )
    if config.method == "fedproto":
        return replace(
            method,
            answer=partial(fedproto_answer, data.classes),
            gather=fedproto_gather,
            first_extra=lambda net, classes: {
                "means": torch.zeros(classes, net.width),
                "known": torch.zeros(classes),
            },
        )
    return method
