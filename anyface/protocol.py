"""Metrics of text-to-face synthesis.

A metric that needs a network which is not given is left out, or computed with another one and named after it.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import ClipInput, image_features
from anyface.judges import Judge
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


@dataclass(frozen=True)
class Networks:
    """What metrics are computed with. A metric whose network is not given is left out.

    features: name -> pictures (B, 3, S, S) in [-1, 1] -> (B, F), names of `FRECHET` and `FACES` and
    "second CLIP". second_clip: the same one, for captions.
    """

    features: dict[str, Callable[[Tensor], Tensor]]
    lpips: nn.Module | None = None
    second_clip: nn.Module | None = None


FRECHET = {"CLIP": "frechet_clip", "judge": "frechet_judge", "Inception": "FID"}
"""Network -> what the distance between sets in its features is called; only Inception's is FID."""
FACES = {"LightCNN": "LightCNN", "judge": "judge's features"}
"""Networks that RFRR can see faces with, the first that is given, and what it is then called."""
SECOND = "R-precision@1, second CLIP"


def feature_networks(
    clip: nn.Module, clip_input: ClipInput, inception: Path | None, judge: Judge | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """CLIP's image features, with a judge its features, and Inception's when its weights are given."""
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "CLIP": lambda pictures: image_features(clip, pictures, clip_input)
    }
    if judge is not None:
        networks["judge"] = judge.features
    if inception is not None:
        network = InceptionFeatures(inception).to(next(clip.parameters()).device)
        networks["Inception"] = lambda pictures: network(pictures / 2 + 0.5)
    return networks


def lpips_network(weights: Path | None) -> nn.Module | None:
    """AlexNet LPIPS when its weights are given."""
    return None if weights is None else perceptual_network("alex", weights)


def look(pictures: Tensor, networks: Networks) -> dict[str, Tensor]:
    """What every network sees of pictures (B, 3, S, S) in [-1, 1]: name -> features (B, F) on the CPU."""
    return {name: network(pictures).cpu() for name, network in networks.features.items()}


class Tally:
    """What is kept of a method's pictures: features by network, and means of numbers by name."""

    def __init__(self) -> None:
        self._features: dict[str, list[Tensor]] = {}
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, features: dict[str, Tensor], values: dict[str, float], count: int) -> None:
        """A batch of `count` pictures: their features, and means over them."""
        self._count += count
        for name, seen in features.items():
            self._features.setdefault(name, []).append(seen)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * count

    def seen(self, network: str) -> Tensor:
        """Features (N, F) of all pictures."""
        return torch.cat(self._features[network])

    @property
    def networks(self) -> list[str]:
        """Names of the networks."""
        return list(self._features)

    def means(self) -> dict[str, float]:
        """Numbers over all pictures."""
        return {name: total / self._count for name, total in self._sums.items()}


def measure(tally: Tally, truth: Tally, texts: dict[str, Tensor]) -> dict[str, float]:
    """All metrics of one method that need no other method.

    truth: of the captions' own photos; texts: name of a CLIP -> its features (N, F) of the captions.
    """
    row = {
        metric: fid([truth.seen(name)], [tally.seen(name)])
        for name, metric in FRECHET.items()
        if name in tally.networks
    }
    row |= tally.means()
    seen, said = tally.seen("CLIP"), texts["CLIP"].cpu()
    row["R-precision@1"] = 100 * r_precision(seen, said)
    row["R-precision@10"] = 100 * r_precision(seen, said, top=10)
    row["CLIP score"] = clip_score(seen, said)
    if "second CLIP" in texts:
        row[SECOND] = 100 * r_precision(tally.seen("second CLIP"), texts["second CLIP"].cpu())
    return row


def face_rates(rivals: dict[str, Tally], truth: Tally) -> dict[str, dict[str, float]]:
    """RFRR of competing methods: its name -> method -> share; empty without a network for faces."""
    for network, label in FACES.items():
        if network in truth.networks:
            near = {name: cosine(own.seen(network), truth.seen(network)) for name, own in rivals.items()}
            return {f"RFRR ({label})": rfrr(near)}
    return {}


def lpips_256(pictures: Tensor, others: Tensor, network: nn.Module) -> float:
    """Mean LPIPS of matching pictures (B, 3, S, S) in [-1, 1], at `LPIPS_SIZE`."""
    size = (LPIPS_SIZE, LPIPS_SIZE)
    made, other = (
        F.interpolate(part / 2 + 0.5, size, mode="bilinear", antialias=True) for part in (pictures, others)
    )
    return lpips(made, other, network)


def feature_diversity(draws: Tensor, networks: Networks) -> dict[str, float]:
    """Distance between pictures of one caption, mean over pairs of draws (K, B, 3, S, S) in [-1, 1], as the
    networks see them: 1 - cosine of CLIP's features, and LPIPS where its network is given."""
    seen = torch.stack([networks.features["CLIP"](own) for own in draws])
    row = {"CLIP": _over_pairs(seen, lambda a, b: 1 - cosine(a, b).mean().item())}
    if networks.lpips is not None:
        row["LPIPS"] = _over_pairs(draws, lambda a, b: lpips_256(a, b, networks.lpips))
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
