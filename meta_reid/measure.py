"""A trained row on one target: every part and aggregation mode of its embedding, in bounded memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from meta_reid.data import Target
from meta_reid.model import META
from meta_reid.protocols import Result, embed, evaluate, prepare
from meta_reid.rows import Row
from shared.runtime import UserError

if TYPE_CHECKING:
    from meta_reid.eval import Options


@dataclass(frozen=True)
class Measured:
    """A META row on one target: results by part or mode, and what the experts say about each image."""

    results: dict[str, Result]
    """global, mixture:<mode>, full:<mode>."""
    parts: dict[str, Tensor]
    """global, mixture:<mode> -> (N, C). Whole embeddings, twice as wide, are made when they are asked for."""
    normalize_parts: bool
    """Whether the halves of a whole embedding get length 1."""
    weights: Tensor | None
    """(N, K) of `shared`, or None without that scoring network."""
    distance: Tensor
    """(N, K): sum of r over the layers."""

    @property
    def modes(self) -> list[str]:
        """Aggregation modes that were measured."""
        return [name.split(":")[1] for name in self.parts if ":" in name]

    def full(self, mode: str) -> Tensor:
        """Whole embeddings [mixture | global] of a mode, (N, 2C)."""
        return joined(self.parts[f"mixture:{mode}"], self.parts["global"], self.normalize_parts)


def joined(mixture: Tensor, universal: Tensor, normalize_parts: bool) -> Tensor:
    """[mixture | global], (N, 2C); normalize_parts: each half at length 1."""
    whole = torch.cat([mixture, universal], 1)
    if normalize_parts:
        for half in whole.chunk(2, 1):
            half.copy_(normalize(half))
    return whole


def measure(row: Row, target: Target, options: "Options", device: torch.device) -> Measured:
    """Embed a target once and evaluate every part and aggregation mode of a META row."""
    model: META = prepare(row.model, device)
    model.temperature = options.temperature
    modes = [m for m in options.aggregation if m in model.scorings or m not in ("shared", "learned")]
    if not modes:
        asked = " ".join(f"'{mode}'" for mode in options.aggregation)
        raise UserError(
            f"--aggregation {asked}: {row.name} was trained with the '{row.config.scoring}' scoring"
        )

    def everything(images: Tensor) -> tuple[Tensor, ...]:
        described = model.describe(images)
        first, universal = model.parts(described, modes[0])
        mixtures = [first, *(model.mixture(described, mode) for mode in modes[1:])]
        weights = [model.expert_weights(described, "shared")] if "shared" in model.scorings else []
        return (universal, described.relevance.sum(-1), *mixtures, *weights)

    universal, distance, *rest = embed(
        everything, target.images, device, options.batch, options.workers, options.bf16
    )
    parts, results = {"global": universal}, {"global": evaluate(universal, target, device)}
    for mode, mixture in zip(modes, rest, strict=False):
        parts[f"mixture:{mode}"] = mixture
        results[f"mixture:{mode}"] = evaluate(mixture, target, device)
        # One whole embedding at a time: of MSMT17's 93,820 images each has 1.5 GB.
        whole = joined(mixture, universal, options.normalize_parts)
        results[f"full:{mode}"] = evaluate(whole, target, device)
    weights = rest[-1] if "shared" in model.scorings else None
    return Measured(results, parts, options.normalize_parts, weights, distance)


def measure_plain(row: Row, target: Target, options: "Options", device: torch.device) -> Result:
    """A plain network: the better of the feature before and after the BNNeck."""
    model = prepare(row.model, device)
    both = embed(model.parts, target.images, device, options.batch, options.workers, options.bf16)
    return max((evaluate(feature, target, device) for feature in both), key=lambda result: result.mean["mAP"])
