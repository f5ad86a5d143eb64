"""Ranger, the released trainer's optimiser: rectified Adam, lookahead and gradient centralisation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Ranger(torch.optim.RAdam):
    """RAdam (betas 0.95 and 0.999, eps 1e-5) on centred gradients, with slow weights every `k` steps.

    Centring subtracts a gradient's mean over all dimensions but the first. The slow weights start as the
    first seen weights and move by `alpha` towards the fast ones, which then go on from there. The released
    learning rate of 0.5 is right only for layers with lr_mul 0.01.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.5,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        alpha: float = 0.5,
        k: int = 6,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        self.alpha, self.k = alpha, k

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; the slow weights are kept in each parameter's state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in moving:
            if p.grad.ndim > 1:
                p.grad.sub_(p.grad.mean(tuple(range(1, p.grad.ndim)), keepdim=True))
        before = {p: p.clone() for p in moving if "slow" not in self.state[p]}
        # RAdam sets a parameter's state up when it finds none.
        super().step()
        for p in moving:
            state = self.state[p]
            if p in before:
                state["slow"] = before[p]
            if int(state["step"]) % self.k == 0:
                state["slow"].lerp_(p, self.alpha)
                p.copy_(state["slow"])
        return loss
