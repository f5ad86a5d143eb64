"""Several processes that train one network as one process does with the whole batch.

Each process holds its rows of every batch (see `runtime.StepBatches`), all of them with the same random
state. Without `torchrun` every function here gives back what it is given.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def world() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        return _Total.apply(slope)  # every process's loss depends on every process's x


def total(x: Tensor) -> Tensor:
    """Sum over the processes, with its gradient.

    A loss that is a function of totals is the whole batch's in every process, and the mean of the processes'
    gradients is its gradient.
    """
    return _Total.apply(x) if world() > 1 else x


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Mean over the processes, without gradient."""
    return total(x.detach()) / world()


def means(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """`mean` of every entry, in one message: what a log line says of the whole batch."""
    numbers = [torch.as_tensor(value).detach().float() for value in values.values()]
    if world() == 1 or not numbers:
        return dict(zip(values, numbers, strict=True))
    device = next((number.device for number in numbers if number.is_cuda), torch.device("cpu"))
    return dict(zip(values, mean(torch.stack([number.to(device) for number in numbers])), strict=True))


def own_rows(whole: Tensor, dim: int = 0) -> Tensor:
    """This process's part of something of the whole batch."""
    return whole.chunk(world(), dim)[rank()]


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], dim: int = 0) -> Tensor:
    """Random numbers of `shape`: those that one process would draw for these rows of the whole batch.

    dim: where the rows lie; every process has as many.
    """
    whole = [size * world() if at == dim else size for at, size in enumerate(shape)]
    return own_rows(draw(tuple(whole)), dim)


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The whole batch of this process's rows."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class WholeBatchNorm(_BatchNorm):
    """Batch norm over the rows of all processes, on any device; they may hold different numbers of rows.

    `nn.SyncBatchNorm` is for CUDA alone. timm's norms with an activation in them keep it.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalise(x) if self.training else self._at_rest(x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def _at_rest(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _normalise(self, x: Tensor) -> Tensor:
        others, view = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() // x.shape[1]])
        sums = total(torch.cat([wide.sum(others), count]))
        count = sums[-1].detach()
        average = sums[:-1] / count
        centred = wide - average.view(view)
        # Around the common mean: a difference of squares would lose digits.
        variance = total(centred.square().sum(others)) / count
        self._follow(average.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale.view(view)
        return (y + self.bias.view(view) if self.affine else y).to(x.dtype)

    def _follow(self, average: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        pace = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(average, pace)
        self.running_var.lerp_(variance, pace)


class WholeDropout(nn.Dropout):
    """Dropout of this process's rows with the whole batch's draws."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop(x, x.shape, self.p) if self.training and self.p else x


class WholeDropout2d(nn.Dropout2d):
    """Channel dropout of this process's rows with the whole batch's draws."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop(x, (*x.shape[:2], 1, 1), self.p) if self.training and self.p else x


class WholeDropPath(nn.Module):
    """timm's stochastic depth (`drop_prob`, `scale_by_keep`) of this process's rows with the whole batch's
    draws."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        return _drop(x, (len(x), *(1 for _ in x.shape[1:])), self.drop_prob, self.scale_by_keep)


def _drop(x: Tensor, shape: tuple[int, ...], p: float, scale: bool = True) -> Tensor:
    kept = drawn(lambda whole: x.new_empty(whole).bernoulli_(1 - p), shape)
    return x * (kept / (1 - p) if scale and p < 1 else kept)


# By name: timm takes seconds to import, and most networks have nothing of it.
WHOLE = {"Dropout": WholeDropout, "Dropout2d": WholeDropout2d, "DropPath": WholeDropPath}


def as_one(net: nn.Module, device: torch.device | str) -> nn.Module:
    """Let batch norm and dropout of a network see the whole batch; to be called before DDP wraps it.

    Names, parameters and buffers stay, so optimisers may be made before or after. With one process the
    network is given back untouched.
    """
    if world() == 1:
        return net
    on_cuda = torch.device(device).type == "cuda"
    for module in net.modules():
        if isinstance(module, _BatchNorm) and not on_cuda:
            module.__class__ = WholeBatchNorm
        module.__class__ = WHOLE.get(type(module).__name__, type(module))
    if on_cuda:
        from timm.layers import convert_sync_batchnorm  # PyTorch's own loses timm's activations

        net = convert_sync_batchnorm(net)
    return net
