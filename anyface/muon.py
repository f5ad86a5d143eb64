"""Muon (Jordan et al., 2024): steps of equal size in all directions of a weight matrix. It teaches the demo's
small generator faster than Adam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 4) -> Tensor:
    """The nearest matrix whose singular values are near 1, by a quintic Newton-Schulz iteration, (R, C)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for a generator's convolutions (1, out, in, k, k), Adam for everything else.

    A step of a convolution has a root mean square of its `lr` times the weights' initial 1 (equalised
    learning rate). PyTorch's own Muon takes matrices only.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._convolution(p, group) if p.ndim == 5 else self._other(p, group)

    def _convolution(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        state["mean"].mul_(group["momentum"]).add_(p.grad)
        ahead = p.grad + group["momentum"] * state["mean"]  # Nesterov
        update = orthogonalise(ahead.view(p.shape[1], -1))
        size = update.square().mean().sqrt() + group["eps"]
        p.sub_((group["lr"] / size * update).view_as(p))

    def _other(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        (a, b), t = group["betas"], state["step"]
        state["mean"].lerp_(p.grad, 1 - a)
        state["square"].lerp_(p.grad.square(), 1 - b)
        root = (state["square"] / (1 - b**t)).sqrt_().add_(group["eps"])
        p.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - a**t))
