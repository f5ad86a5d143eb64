"""Age groups, and continuous ages as mixtures of neighbouring groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.runtime import UserError, own_type

EDGES = (30.0, 40.0, 50.0)
"""Highest ages of all groups but the last: 30-, 31-40, 41-50, 51+."""


def age2group(ages: Tensor, limits: Sequence[float] = EDGES) -> Tensor:
    """Ages in years, any shape -> group indices 0 .. len(limits), int64. A limit belongs to the younger
    group."""
    return torch.bucketize(ages.float(), torch.tensor(limits, device=ages.device))


def group_names(limits: Sequence[float] = EDGES) -> tuple[str, ...]:
    """How tables call the groups, e.g. ("30-", "31-40", "41-50", "51+")."""
    inner = [f"{low + 1:g}-{high:g}" for low, high in zip(limits, limits[1:], strict=False)]
    return (f"{limits[0]:g}-", *inner, f"{limits[-1] + 1:g}+")


def as_weights(target: Tensor, groups: int) -> Tensor:
    """Target ages as networks take them, group indices (B,) or weights of groups (B, groups) -> weights (B,
    groups), float32. Raises ValueError on another shape."""
    if target.ndim == 1 and not target.is_floating_point():
        return F.one_hot(target, groups).float()
    if target.ndim == 2 and target.shape[1] == groups:
        return target
    raise ValueError(f"target must be (B,) integers or (B, {groups}) weights, got {tuple(target.shape)}")


def mixture(age: Tensor, table: Tensor) -> Tensor:
    """Weights (B, groups) of the rows of a table (groups, C) -> (B, C), in the table's type: autocast would
    round it to bf16, where groups that differ little become one."""
    with own_type(table):
        return age.to(table.dtype) @ table


@dataclass(frozen=True)
class AgeScale:
    """What a trained generator knows of ages.

    limits: highest age of each group but the last. means: mean age of each group in the training set, the
    age that a group's embedding stands for. low, high: youngest and oldest training age.
    """

    limits: tuple[float, ...]
    means: tuple[float, ...]
    low: float
    high: float

    @staticmethod
    def of(ages: Tensor, limits: Sequence[float] = EDGES) -> "AgeScale":
        """Measured on the ages (N,) of a training set. UserError names a group without a face."""
        groups = age2group(ages, limits)
        for k, name in enumerate(group_names(limits)):
            if not (groups == k).any():
                raise UserError(
                    f"no training face is of the age group {name}; every one of the {len(limits) + 1} groups "
                    "needs some: give more faces or other --limits"
                )
        means = tuple(ages[groups == k].double().mean().item() for k in range(len(limits) + 1))
        # Whole years: someone of 20 may be 20.9.
        return AgeScale(tuple(limits), means, float(ages.min().floor()), float(ages.max().ceil()))

    @property
    def names(self) -> tuple[str, ...]:
        return group_names(self.limits)

    def group(self, ages: Tensor) -> Tensor:
        return age2group(ages, self.limits)

    def shown(self, age: float) -> float:
        """The age that a picture of this age shows: beyond the outermost groups' means these, since nothing
        further out was learnt."""
        return min(max(age, self.means[0]), self.means[-1])

    def weights(self, ages: Tensor) -> Tensor:
        """(B,) years -> (B, K) weights of the groups, rows summing to 1: linear between the groups' means,
        the outermost group alone beyond them. UserError for an age outside the trained range."""
        outside = ages[~((ages >= self.low) & (ages <= self.high))]  # nan too
        if len(outside):
            raise UserError(
                f"age {outside[0].item():g} lies outside the ages {self.low:g} to {self.high:g} that this "
                "network was trained on"
            )
        means = torch.tensor(self.means, dtype=torch.float64)
        clamped = ages.double().cpu().clamp(means[0], means[-1])
        right = torch.bucketize(clamped, means).clamp(1, len(means) - 1)
        share = (clamped - means[right - 1]) / (means[right] - means[right - 1])
        weights = torch.zeros(len(ages), len(means), dtype=torch.float64)
        weights.scatter_(1, right[:, None], share[:, None])
        weights.scatter_(1, right[:, None] - 1, 1 - share[:, None])
        return weights.float().to(ages.device)
