"""What a training loop needs around its steps: where it stands, gradients of several processes, averages."""

import torch
from torch import Tensor, nn


class Position:
    """Where a run stands: stage, step, the optimisers in the middle of it and the sums for the next log
    line."""

    def __init__(self):
        self.stage = self.step = self.averaged = 0
        self.optimisers: list[dict] = []
        self.sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, saved: dict) -> None:
        vars(self).update(saved)


def average_gradients(learning: list[nn.Parameter], processes: int) -> None:
    """Mean of the gradients over all processes, in one message."""
    if processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    means = (flat / processes).split([g.numel() for g in gradients])
    for p, mean in zip(learning, means, strict=True):
        p.grad = mean.view_as(p)


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the average of the weights towards the weights; what batch norm measured is copied."""
    for kept, now in zip(average.parameters(), net.parameters(), strict=True):
        kept.lerp_(now, 1 - decay)
    for kept, now in zip(average.buffers(), net.buffers(), strict=True):
        kept.copy_(now)
