"""Metrics of text-to-face synthesis.

A metric that needs a network which is not given is left out, or computed with another one and named after it.
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import ClipInput, image_features
from shared.metrics import InceptionFeatures, fid, lpips, perceptual_network
from shared.runtime import UserError, step_generator

RIVALS = 99
"""Captions of other faces that R-precision ranks the own one among."""

LPIPS_SIZE = 256
"""Side to which LPIPS resizes pictures, as the released evaluation script does."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of matching rows (N, D) -> (N,)."""
    return F.cosine_similarity(a, b, dim=1)


def own_ranks(queries: Tensor, keys: Tensor, rivals: int = RIVALS, seed: int = 0) -> Tensor:
    """Rank (N,) from 1 of each row's own key among it and `rivals` others drawn at random, by cosine.

    Ties with the own key count half. With fewer than rivals + 1 rows all others are rivals.
    """
    n = len(queries)
    scores = (F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T).cpu()
    own = scores.diagonal()[:, None]
    order = torch.rand(n, n, generator=step_generator(seed, 0, stream=21))
    order.fill_diagonal_(2.0)  # never drawn
    others = scores.gather(1, order.argsort(1)[:, : min(rivals, n - 1)])
    return 1 + (others > own).sum(1) + (others == own).sum(1) / 2


def r_precision(images: Tensor, texts: Tensor, top: int = 1, rivals: int = RIVALS, seed: int = 0) -> float:
    """Share of pictures whose own caption is among the `top` nearest of rivals + 1, in [0, 1].

    images, texts (N, F): features of the same encoder. SEA-T2F's protocol: top 1 of 100.
    """
    return (own_ranks(images, texts, rivals, seed) <= top).float().mean().item()


def mean_rank(queries: Tensor, keys: Tensor) -> float:
    """Mean rank of the own key among all N by cosine of centred features; chance is (N + 1) / 2."""
    return own_ranks(queries - queries.mean(0), keys - keys.mean(0), rivals=len(keys)).mean().item()


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 max(cos, 0), mean over pairs (Hessel et al., 2021, without their factor of 2.5)."""
    return 100 * cosine(images, texts).clamp_min(0).mean().item()


def rfrr(similarity: dict[str, Tensor]) -> dict[str, float]:
    """Relative face recognition rate: the share of captions for which a method's face is nearest to the true.

    similarity: method -> (N,) cosine to the true photo's face feature. Ties split evenly, shares sum to 1.
    It depends on the competitors, so values of different tables cannot be compared. ValueError for a single
    method.
    """
    if len(similarity) < 2:
        raise ValueError("RFRR compares at least two methods")
    scores = torch.stack(list(similarity.values()))  # (methods, N)
    best = scores == scores.max(0).values
    shares = (best / best.sum(0)).mean(1)
    return dict(zip(similarity, shares.tolist(), strict=True))


def diversity(draws: Tensor) -> float:
    """Mean absolute difference between pictures of one caption, over pairs of draws (K, N, 3, S, S)."""
    return _over_pairs(draws, lambda a, b: (a - b).abs().mean().item())


def _over_pairs(draws: Tensor, distance: Callable[[Tensor, Tensor], float]) -> float:
    values = [distance(draws[i], draws[j]) for i in range(len(draws)) for j in range(i)]
    return sum(values) / len(values)


class UnitInput(nn.Module):
    """A network on [-1, 1] as one on [0, 1], for `shared.metrics`."""

    def __init__(self, features, num_features: int):
        super().__init__()
        self.features, self.num_features = features, num_features

    def forward(self, pictures: Tensor) -> Tensor:
        return self.features(pictures * 2 - 1)


@dataclass(frozen=True)
class Networks:
    """What metrics are computed with. Missing ones are None and their metrics are left out.

    face: pictures in [-1, 1] -> features for RFRR and its name; frechet: name -> network for distances
    between sets.
    """

    clip: nn.Module
    clip_input: ClipInput
    second_clip: nn.Module | None
    frechet: dict[str, nn.Module]
    lpips: nn.Module | None
    face: tuple[str, nn.Module] | None


def frechet_networks(
    clip: nn.Module, clip_input: ClipInput, inception: Path | None, judge: nn.Module | None
) -> dict[str, nn.Module]:
    """FID when Inception's weights are given; always the distance in CLIP's features; with a judge, its."""

    def of_clip(pictures: Tensor) -> Tensor:
        return image_features(clip, pictures, clip_input)

    networks: dict[str, nn.Module] = {"frechet_clip": UnitInput(of_clip, clip.visual.output_dim)}
    if judge is not None:
        networks["frechet_judge"] = UnitInput(judge.features, judge.num_features)
    if inception is not None:
        networks["FID"] = InceptionFeatures(inception)
    return networks


def lpips_network(weights: Path | None) -> nn.Module | None:
    """AlexNet LPIPS when its weights are given."""
    return None if weights is None else perceptual_network("alex", weights)


def batches(pictures: Tensor, size: int = 64) -> Iterable[Tensor]:
    """Pictures in [-1, 1] as batches in [0, 1]."""
    return ((part.clamp(-1, 1) + 1) / 2 for part in pictures.split(size))


@torch.inference_mode()
def features_of(pictures: Tensor, network, size: int = 64) -> Tensor:
    """Features (N, F) of pictures (N, 3, S, S), in batches."""
    return torch.cat([network(part) for part in pictures.split(size)])


def _lpips(pictures: Tensor, others: Tensor, network: nn.Module) -> float:
    """Mean LPIPS of matching pictures (N, 3, S, S) in [-1, 1], at `LPIPS_SIZE`."""
    total = 0.0
    for pair in zip(batches(pictures), batches(others), strict=True):
        made, other = (
            F.interpolate(part, (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear", antialias=True) for part in pair
        )
        total += lpips(made, other, network) * len(made)
    return total / len(pictures)


@torch.inference_mode()
def measure(pictures: Tensor, truth: Tensor, texts: Tensor, networks: Networks) -> dict[str, float]:
    """All metrics of one method that need no other method.

    pictures: generated (N, 3, S, S) in [-1, 1]; truth: the captions' own photos, same shape; texts (N, F):
    features of the captions in `networks.clip`.
    """
    row = {}
    for name, network in networks.frechet.items():
        row[name] = fid(batches(truth), batches(pictures), network)
    if networks.lpips is not None:
        row["LPIPS"] = _lpips(pictures, truth, networks.lpips)
    row["L1 to truth"] = (pictures.clamp(-1, 1) - truth).abs().mean().item()
    seen = features_of(pictures, lambda part: image_features(networks.clip, part, networks.clip_input))
    row["R-precision@1"] = 100 * r_precision(seen, texts)
    row["R-precision@10"] = 100 * r_precision(seen, texts, top=10)
    row["CLIP score"] = clip_score(seen, texts)
    return row


@torch.inference_mode()
def feature_diversity(draws: Tensor, networks: Networks, device: torch.device) -> dict[str, float]:
    """Distance between pictures of one caption, mean over pairs of draws (K, N, 3, S, S) in [-1, 1], as the
    networks see them: 1 - cosine of CLIP's features, and LPIPS where its network is given."""

    def see(part: Tensor) -> Tensor:
        return image_features(networks.clip, part.to(device), networks.clip_input)

    seen = torch.stack([features_of(own, see) for own in draws])
    row = {"CLIP": _over_pairs(seen, lambda a, b: 1 - cosine(a, b).mean().item())}
    if networks.lpips is not None:
        row["LPIPS"] = _over_pairs(draws, lambda a, b: _lpips(a.to(device), b.to(device), networks.lpips))
    return row


COLUMNS = ("method", "dataset", "metric", "value", "protocol")
"""Of a user's rows."""


def read_rows(path: Path) -> list[dict[str, str | float]]:
    """Published rows that the user holds, a CSV with `COLUMNS`. UserError names what does not fit.

    They are shown with their protocol, below what is measured and never beside it.
    """
    try:
        lines = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a CSV with the columns {', '.join(COLUMNS)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    missing = sorted(set(COLUMNS) - set(lines.fieldnames or ()))
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}")
    rows = []
    for line in lines:
        row: dict[str, str | float] = {name: (line[name] or "").strip() for name in COLUMNS}
        empty = [name for name in COLUMNS if not row[name]]
        if empty:
            raise UserError(f"{path}, line {lines.line_num}: {', '.join(empty)} is empty")
        try:
            row["value"] = float(row["value"])
        except ValueError:
            raise UserError(f"{path}, line {lines.line_num}: {row['value']!r} is no number") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


@torch.inference_mode()
def face_similarity(pictures: Tensor, truth: Tensor, network) -> Tensor:
    """Cosine (N,) between the face features of generated pictures and of the true photos."""
    return cosine(features_of(pictures, network), features_of(truth, network)).cpu()
