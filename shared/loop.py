"""What the loops of several papers have around their steps: where they stand, gradients of several processes,
averaged weights."""

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Standing:
    """Where a run stands: its attributes (numbers, tensors, state dicts) are kept in the checkpoint."""

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, saved: dict) -> None:
        vars(self).update(saved)


class Position(Standing):
    """Where a run of several stages stands: stage, step, the optimisers in the middle of it and the sums for
    the next log line."""

    def __init__(self):
        self.stage = self.step = self.averaged = 0
        self.optimisers: list[dict] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """A step's losses, summed where they are: the loop does not wait for them."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.averaged += 1

    def means(self, accelerator: Accelerator, label: str) -> dict[str, float]:
        """`label/name` -> mean of a loss over the steps since the last call, of all processes."""
        means = accelerator.reduce(torch.stack(list(self.sums.values())), "mean") / self.averaged
        named = {f"{label}/{name}": mean for name, mean in zip(self.sums, means.tolist(), strict=True)}
        self.sums, self.averaged = {}, 0
        return named

    def next_stage(self) -> None:
        """The stage is done and its networks are kept elsewhere."""
        self.stage, self.step, self.optimisers = self.stage + 1, 0, []


def average_gradients(learning: Iterable[nn.Parameter], processes: int) -> None:
    """Mean of the gradients over all processes, in one message."""
    if processes == 1:
        return
    learning = [p for p in learning if p.requires_grad]
    # A module that this process's share did not need has no gradient here and may have one elsewhere.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    means = (flat / processes).split([g.numel() for g in gradients])
    for p, mean in zip(learning, means, strict=True):
        p.grad = mean.view_as(p)


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move an average of the weights towards them: decay average + (1 - decay) weights; buffers (what batch
    norm measured) are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    for kept, now in zip(average.buffers(), net.buffers(), strict=True):
        kept.copy_(now)
