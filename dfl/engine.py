"""Local training of a group of clients at once.

A model is a state: a dict from the names of its `state_dict` to tensors. Objectives are written for one
client. `train_stage` takes states with a leading client axis (G, ...) and either runs the objectives under
`torch.vmap` or, for a group of one, plainly; so the vectorised and the sequential engine are the same lines
of code.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

State = dict[str, Tensor]


def part(state: State, prefix: str) -> State:
    """The tensors below `prefix`, without it: part(state, "head") has weight and bias."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(prefix + ".")}


def call(module: nn.Module, state: State, *inputs: Any, train: bool = False, **options: Any) -> Any:
    """`module(*inputs)` with the tensors of `state`. train: batch statistics, which then update in
    `state`."""
    module.train(train)
    return functional_call(module, state, inputs, options)


def stack(states: Iterable[State]) -> State:
    """States with the same names -> one state with a leading axis."""
    states = list(states)
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(state: State, size: int) -> list[State]:
    """The inverse of `stack`; every state owns its memory."""
    return [{name: value[i].clone() for name, value in state.items()} for i in range(size)]


def per_client(function: Callable, size: int) -> Callable:
    """A function of one client -> the same function with a leading axis of `size` clients on all tensors."""
    if size > 1:
        return torch.vmap(function)

    def single(*inputs: Any) -> Any:
        output = function(*tree_map(lambda tensor: tensor[0], inputs))
        return tree_map(lambda tensor: tensor.unsqueeze(0), output)

    return single


@dataclass(frozen=True)
class Step:
    """One update in a batch: which parameters move, what they minimise, and with which optimiser."""

    trains: Callable[[str], bool]
    objective: Callable[[nn.Module, State, State, State, State], tuple[Tensor, dict[str, Tensor]]]
    """(network, state, memory, batch, live) -> loss, scalars to log. `live` is what the stage's forward
    gave."""
    optimiser: Callable[[list[Tensor]], Optimizer]


@dataclass(frozen=True)
class Stage:
    """Some epochs over the client's data. In each batch `forward` runs once, then each step updates."""

    name: str
    epochs: int
    forward: Callable[[nn.Module, State, State, State], dict[str, Tensor]]
    """(network, state, memory, batch) -> the representations that the steps share."""
    steps: tuple[Step, ...]
    freeze: Callable[[nn.Module, State, State, Tensor], dict[str, Tensor]] | None = None
    """(network, state, memory, x) -> features (n, ...) of what does not move; they join the batch."""


@dataclass(frozen=True)
class Draws:
    """The randomness of one client in one stage, all drawn beforehand so that no engine changes it.

    index (T, B): samples of each batch. shift (T,): cyclic shift of the negative pairs. mixed (T, B): for
    each sample of the batch another one, all different. lent (T, B) and view (T, B, 6): uniform numbers in
    [0, 1), for the class of a lent prototype and for the augmentation of an image.
    """

    index: Tensor
    shift: Tensor
    mixed: Tensor
    lent: Tensor
    view: Tensor

    @classmethod
    def of(cls, n: int, batch: int, epochs: int, generator: torch.Generator) -> "Draws":
        """n >= 2 samples in full batches of min(batch, n); what is left over of an epoch is dropped."""
        size = min(batch, n)
        orders = [torch.randperm(n, generator=generator)[: n // size * size] for _ in range(epochs)]
        index = torch.cat(orders).view(-1, size)  # (T, B)
        steps = len(index)
        shift = torch.randint(1, size, (steps,), generator=generator)
        # One circle through the batch in random order: each sample's partner is the next, never itself.
        circle = torch.rand(steps, size, generator=generator).argsort(1)
        return cls(
            index,
            shift,
            torch.empty_like(circle).scatter_(1, circle, circle.roll(-1, 1)),
            torch.rand(steps, size, generator=generator),
            torch.rand(steps, size, 6, generator=generator),
        )

    @staticmethod
    def group(draws: list["Draws"], device: torch.device) -> State:
        """Draws of G clients -> tensors with axes (T, G, ...)."""
        names = [field.name for field in fields(Draws)]
        return {name: torch.stack([getattr(d, name) for d in draws], 1).to(device) for name in names}


def clip(grads: list[Tensor], limit: float) -> None:
    """Scale gradients (G, ...) in place so that the norm of each client's is at most `limit`."""
    norm = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()  # (G,)
    scale = (limit / (norm + 1e-6)).clamp(max=1)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))


def in_chunks(function: Callable, x: Tensor, size: int = 512) -> dict[str, Tensor]:
    """function(x (G, n, ...)) -> dict of (G, n, ...), a few samples at a time to bound the memory."""
    parts = [function(piece) for piece in x.split(size, dim=1)]
    return {name: torch.cat([piece[name] for piece in parts], 1) for name in parts[0]}


def laid_out(x: Tensor) -> Tensor:
    """Network input (G, B, 3, H, W), a single client's channels last on CUDA: what bf16 convolutions are
    fastest in. Under `vmap` the layout is not ours to choose."""
    return x[0].contiguous(memory_format=torch.channels_last)[None] if len(x) == 1 and x.is_cuda else x


def train_stage(
    stage: Stage,
    net: nn.Module,
    states: State,
    memory: State,
    images: Tensor,
    labels: Tensor,
    draws: State,
    prepare: Callable[[Tensor], Tensor],
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    limit: float = 5.0,
    autocast: Callable = nullcontext,
) -> tuple[State, dict[str, Tensor]]:
    """One stage for G clients. Returns the new states and the mean of each logged scalar (G,).

    states, memory: leading axis G; memory holds what the clients received. images (G, n, 3, H, W) raw, labels
    (G, n), draws of `Draws.group`. prepare: raw -> network input. augment: (images, numbers (G, B, 6)) ->
    images; without it the frozen features are computed once per stage. A client whose loss is not finite does
    not disturb the others.
    """
    size = len(labels)
    clients = torch.arange(size, device=labels.device)[:, None]
    freeze = per_client(partial(stage.freeze, net), size) if stage.freeze else lambda *_: {}
    forward = per_client(partial(stage.forward, net), size)
    objectives = [per_client(partial(step.objective, net), size) for step in stage.steps]

    parameters = dict(net.named_parameters())
    names = [[name for name in parameters if step.trains(name)] for step in stage.steps]
    leaves = {name: states[name].detach().clone().requires_grad_() for group in names for name in group}
    # Running statistics change in place, so they are copied too.
    buffers = {name: value.clone() for name, value in states.items() if name not in parameters}
    states = {**states, **buffers, **leaves}
    optimisers = [
        step.optimiser([leaves[name] for name in group])
        for step, group in zip(stage.steps, names, strict=True)
    ]

    def ready(x: Tensor) -> Tensor:
        return laid_out(prepare(x))

    frozen = None
    if augment is None:
        with torch.no_grad(), autocast():
            frozen = in_chunks(lambda x: freeze(states, memory, ready(x)), images) if stage.freeze else {}
    sums: dict[str, Tensor] = {}
    for t in range(len(draws["index"])):
        index = draws["index"][t]  # (G, B)
        x = images[clients, index]
        batch = {"y": labels[clients, index], **{name: draws[name][t] for name in ("shift", "mixed", "lent")}}
        batch["x"] = ready(x if augment is None else augment(x, draws["view"][t]))
        with autocast():
            if frozen is None:
                with torch.no_grad():
                    batch |= freeze(states, memory, batch["x"])
            else:
                batch |= {name: value[clients, index] for name, value in frozen.items()}
            live = forward(states, memory, batch)
        for objective, optimiser, group in zip(objectives, optimisers, names, strict=True):
            with autocast():
                losses, logged = objective(states, memory, batch, live)
            grads = list(torch.autograd.grad(losses.sum(), [leaves[name] for name in group]))
            clip(grads, limit)
            for name, grad in zip(group, grads, strict=True):
                leaves[name].grad = grad
            optimiser.step()
            for name, value in logged.items():
                sums[name] = sums.get(name, 0) + value.detach()
    means = {f"{stage.name}/{name}": value / len(draws["index"]) for name, value in sums.items()}
    return {name: value.detach() for name, value in states.items()}, means
