"""The engine on a problem whose optimum is known: a sum of least squares with a shared and a private block.

    f_k(c, s_k) = 1/(2n) ||A_k c + B_k s_k - y_k||^2,   minimise sum_k f_k over c and all s_k

Stage S takes gradient steps on s_k, stage C on c, the server averages c. This exercises the partial average,
the alternation and the sampling of clients against a closed form; it is not the paper's theorem, whose
statement was not available to us.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfl.client import Method
from dfl.data import ClientData, Federated, Samples
from dfl.engine import Stage, State, Step
from dfl.federation import Federation
from dfl.train import Config

ROWS, SHARED, PRIVATE = 40, 5, 3


class Blocks(nn.Module):
    """c (5,) and s (3,)."""

    def __init__(self):
        super().__init__()
        self.c, self.s = nn.Parameter(torch.zeros(SHARED)), nn.Parameter(torch.zeros(PRIVATE))


def least_squares(
    net: nn.Module, state: State, memory: State, batch: State, live: State
) -> tuple[Tensor, dict[str, Tensor]]:
    """f_k on a batch; an image holds the row (A, B) and its label is y."""
    rows = batch["x"][:, 0, 0]  # (n, 8)
    error = rows @ torch.cat([state["c"], state["s"]]) - batch["y"]
    return error.square().mean() / 2, {}


def problem(clients: int, seed: int) -> Federated:
    """Random Gaussian A (40, 5), B (40, 3) for each client; y from a common c and own s_k, noise of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SHARED, generator=generator)
    members = []
    for k in range(clients):
        rows = torch.randn(ROWS, 1, 1, SHARED + PRIVATE, generator=generator).expand(-1, 3, -1, -1)
        truth = torch.cat([common, torch.randn(PRIVATE, generator=generator)])
        y = rows[:, 0, 0] @ truth + 0.1 * torch.randn(ROWS, generator=generator)
        samples = Samples(rows, y, torch.zeros(ROWS))
        members.append(ClientData(k, f"client{k}", samples, samples))
    return Federated("least squares", 1, 1, members)


def objective(data: Federated, states: list[State]) -> float:
    """Mean of f_k over the clients, in float64."""
    total = 0.0
    for client, state in zip(data.clients, states, strict=True):
        rows = client.train.images[:, 0, 0].double()
        error = rows @ torch.cat([state["c"], state["s"]]).double() - client.train.labels.double()
        total += error.square().mean().item() / 2
    return total / len(states)


def optimum(data: Federated) -> float:
    """The least mean of f_k, by one joint least-squares problem in float64."""
    clients = len(data.clients)
    matrix = torch.zeros(clients * ROWS, SHARED + clients * PRIVATE, dtype=torch.float64)
    for k, client in enumerate(data.clients):
        rows = client.train.images[:, 0, 0].double()
        block = slice(k * ROWS, (k + 1) * ROWS)
        matrix[block, :SHARED] = rows[:, :SHARED]
        matrix[block, SHARED + k * PRIVATE : SHARED + (k + 1) * PRIVATE] = rows[:, SHARED:]
    y = torch.cat([client.train.labels for client in data.clients]).double()
    solution = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
    return (matrix @ solution - y).square().mean().item() / 2


def run(
    steps: int = 1,
    fraction: float = 1.0,
    rounds: int = 400,
    rate: Callable[[int], float] = lambda round: 0.1,
    clients: int = 4,
    seed: int = 0,
) -> list[float]:
    """Distance of the objective from the optimum after each round.

    steps: gradient steps per stage. fraction: share of clients per round. rate: step length in a round.
    """
    data = problem(clients, seed)
    now = [1]

    def stage(block: str) -> Stage:
        step = Step(
            lambda name: name == block,
            least_squares,
            lambda leaves: torch.optim.SGD(leaves, rate(now[0])),
        )
        return Stage(block, steps, lambda net, state, memory, batch: {}, (step,))

    method = Method(
        "least squares",
        Blocks,
        (stage("s"), stage("c")),
        shared=lambda name: name == "c",
        predict=_no_prediction,
        representations={},
    )
    config = replace(
        Config(), batch_size=ROWS, clip=1e9, weighting="uniform", fraction=fraction, seed=seed, method="local"
    )
    federation = Federation(method, config, data)
    best, gaps = optimum(data), []
    for round in range(1, rounds + 1):
        now[0] = round
        federation.run_round()
        gaps.append(objective(data, federation.client_states()) - best)
    return gaps


def _no_prediction(net: nn.Module, state: State, x: Tensor) -> Tensor:
    raise NotImplementedError("least squares has nothing to classify")
