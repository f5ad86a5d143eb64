"""Several processes as one: batch norm and dropout over the whole batch, totals, gradients."""

import copy

import torch
import torch.multiprocessing as multiprocessing
from timm.layers import BatchNormAct2d, DropPath
from torch import nn

from shared.processes import (
    WholeBatchNorm,
    as_one,
    drawn,
    gathered,
    mean,
    means,
    own_rows,
    total,
)

CUTS = {0: slice(0, 3), 1: slice(3, 8)}  # rows of each of the two processes: not the same number


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BatchNormAct2d(4, act_layer=nn.SiLU)]
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
        nn.BatchNorm1d(5, momentum=None),
        nn.BatchNorm1d(5, affine=False),
    )


def batch() -> torch.Tensor:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x * torch.arange(1, 9).view(8, 1, 1, 1) + 3  # the processes' statistics differ


def step(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradient at the input, gradients and state after two steps of training, in float64."""
    net, x = net.double(), x.double()
    for _ in range(2):
        net.zero_grad()
        x = x.detach().requires_grad_()
        y = net(x)
        (y * torch.linspace(-1, 1, 5, dtype=y.dtype).sin() + y**3).sum().backward()
    result = {"output": y.detach(), "input": x.grad}
    result |= {f"gradient {name}": p.grad.clone() for name, p in net.named_parameters()}
    return result | {f"state {name}": value.clone() for name, value in net.state_dict().items()}


def dropouts() -> list[nn.Module]:
    return [nn.Dropout(0.3), nn.Dropout2d(0.4), DropPath(0.5)]


def one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    net = as_one(network(), "cpu")
    assert sum(isinstance(module, WholeBatchNorm) for module in net) == 4
    result = step(net, batch()[CUTS[rank]])
    empty = as_one(nn.BatchNorm1d(2), "cpu")
    result["beside nothing"] = empty(torch.ones(4, 2).cumsum(0)[: 4 * rank])
    x = torch.ones(4, 2, 6, 6)
    torch.manual_seed(5)
    for number, module in enumerate(dropouts()):
        result[f"dropout {number}"] = as_one(module, "cpu")(x[2 * rank : 2 * rank + 2])
    torch.manual_seed(6)
    result["drawn"] = drawn(torch.rand, (3, 2, 2), dim=1)
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    logged = means({"a": own[0], "b": float(own[1])})
    result |= {"total": total(own), "mean": mean(own), "a": logged["a"], "b": logged["b"]}
    result |= {"rows": own_rows(torch.arange(4)), "gathered": gathered(own)}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    multiprocessing.spawn(one_of_two, (str(tmp_path),), 2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = step(network(), batch())
    for name, value in one.items():
        if name in ("output", "input"):
            found = torch.cat([half[name] for half in halves])
        elif name.startswith("gradient"):
            found = halves[0][name] + halves[1][name]
        else:
            assert torch.equal(halves[0][name], halves[1][name]), name
            found = halves[0][name]
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-9), name
    alone = nn.BatchNorm1d(2)(torch.ones(4, 2).cumsum(0))
    assert halves[0]["beside nothing"].shape == (0, 2)
    assert torch.allclose(halves[1]["beside nothing"], alone, atol=1e-6)

    torch.manual_seed(5)
    for number, module in enumerate(dropouts()):
        whole = module(torch.ones(4, 2, 6, 6))
        assert torch.equal(torch.cat([half[f"dropout {number}"] for half in halves]), whole)
        assert 0 < (whole == 0).float().mean() < 1
    torch.manual_seed(6)
    assert torch.equal(torch.cat([half["drawn"] for half in halves], 1), torch.rand(3, 4, 2))
    for rank, half in enumerate(halves):
        assert half["total"].tolist() == [3, 30] and half["mean"].tolist() == [1.5, 15]
        assert (half["a"], half["b"]) == (1.5, 15)
        assert half["rows"].tolist() == [2 * rank, 2 * rank + 1]
        assert half["gathered"].tolist() == [1, 10, 2, 20]


def test_one_process_changes_nothing():
    net = network()
    kinds = [type(module) for module in net.modules()]
    assert as_one(net, "cpu") is net and [type(module) for module in net.modules()] == kinds
    x, values = torch.rand(3, 2), {"a": 1.0}
    assert total(x) is x and torch.equal(mean(x), x) and means(values) == values
    assert torch.equal(own_rows(x), x) and gathered(x) is x
    torch.manual_seed(0)
    numbers = drawn(torch.rand, (3, 2), dim=1)
    torch.manual_seed(0)
    assert torch.equal(numbers, torch.rand(3, 2))


def test_a_synchronised_network_at_rest_is_the_same():
    net = network().eval()
    synchronised = copy.deepcopy(net)
    for module in synchronised.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = WholeBatchNorm
    assert synchronised.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(synchronised(batch()), net(batch()))
