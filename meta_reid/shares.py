"""Shares of a step: each GPU of the official training normalises its batch by itself, and so do the shares
that one process runs one after another in place of them.
"""

import torch
from torch import Tensor, nn

from shared.processes import rank, world


class Statistics:
    """Running statistics of a model whose step has several shares: the first share's stay.

    As in the official training, where DistributedDataParallel hands out the first GPU's before each pass: all
    shares of a step begin with the same.
    """

    def __init__(self, model: nn.Module, shares: int):
        self.buffers, self.shares = list(model.buffers()), shares
        self.before: list[Tensor] = []
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def begin(self, share: int) -> None:
        """Before the pass of a share, 0 ... shares - 1."""
        if self.shares == 1:
            return
        if share == 0:
            self.before = [buffer.clone() for buffer in self.buffers]
            return
        if share == 1:
            self.kept = [buffer.clone() for buffer in self.buffers]
        torch._foreach_copy_(self.buffers, self.before)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last share's pass."""
        if self.shares > 1:
            torch._foreach_copy_(self.buffers, self.kept)
        moved = [buffer for buffer in self.buffers if buffer.is_floating_point()]
        if world() > 1 and moved:
            flat = torch.cat([buffer.flatten().float() for buffer in moved])
            torch.distributed.broadcast(flat, 0)
            if rank():
                parts = flat.split([buffer.numel() for buffer in moved])
                torch._foreach_copy_(moved, [p.view_as(b) for p, b in zip(parts, moved, strict=True)])
