"""Verification by the LFW protocol under attack, and what else is measured about a defence."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pin.attacks import Goal
from pin.pairs import Pairs
from shared.metrics import best_threshold_accuracy, eer, psnr, ssim

Images = Callable[[Tensor], Tensor]
FARS = {"tar_1e2": 1e-2, "tar_1e3": 1e-3, "tar_1e4": 1e-4}
"""False accept rates of the true accept rates in an `Outcome`."""


@torch.no_grad()
def in_batches(function: Images, x: Tensor, batch: int = 256) -> Tensor:
    """function over the images of x, `batch` at a time, without gradients."""
    return torch.cat([function(part) for part in x.split(batch)])


def attack_in_batches(
    attack: Callable, recognizer: Images, x: Tensor, goal: Goal, batch: int = 256
) -> Tensor:
    """attack(recognizer, x, goal) over the images of x, `batch` at a time."""
    parts = torch.arange(len(x), device=x.device).split(batch)
    return torch.cat([attack(recognizer, x[part], goal.part(part)) for part in parts])


def fold_thresholds(scores: Tensor, pairs: Pairs) -> Tensor:
    """For each fold the threshold with the best accuracy on all other folds: (P,) scores -> (folds,)."""
    values, same, fold = (part.cpu().numpy() for part in (scores, pairs.same, pairs.fold))
    return torch.tensor(
        [best_threshold_accuracy(values[fold != k], same[fold != k])[1] for k in range(int(fold.max()) + 1)]
    )


def decide(scores: Tensor, thresholds: Tensor, pairs: Pairs) -> Tensor:
    """Whether each pair is judged rightly with its own fold's threshold, (P,) bool."""
    return (scores.cpu() >= thresholds[pairs.fold]) == pairs.same


@torch.no_grad()
def impostor_scores(first: Tensor, second: Tensor, pairs: Pairs, most: int = 3000) -> Tensor:
    """Cosines of different people's images (N,), from the features (P, d) of the pairs' images.

    Where the people are known, of every first image with every second one, each two images once (`most`
    images of each at most); otherwise of the list's own pairs.
    """
    if pairs.people is None:
        return F.cosine_similarity(first, second)[~pairs.same.to(first.device)]
    images, features = [], []
    for index, values in ((pairs.first, first), (pairs.second, second)):
        place = {image: row for row, image in enumerate(index.tolist())}
        images.append(torch.tensor(list(place))[:most])
        features.append(F.normalize(values[list(place.values())[:most]]))
    one, two = images[0][:, None], images[1][None]
    mirrored = torch.isin(one, images[1]) & torch.isin(two, images[0]) & (one > two)
    different = (pairs.people[one] != pairs.people[two]) & ~mirrored
    return (features[0] @ features[1].T)[different.to(first.device)]


def accept_above(impostors: Tensor, far: float) -> float:
    """Least score that a threshold must lie above, so that a share of at most `far` of the impostors (N,)
    passes. NaN where they are too few to tell: fewer than 10 / far."""
    if len(impostors) < round(10 / far):
        return float("nan")
    return impostors.topk(int(far * len(impostors) + 1e-9) + 1).values[-1].item()


@dataclass(frozen=True)
class Outcome:
    """A recogniser behind a defence, under one attack. Shares in [0, 1].

    accuracy, deviation: mean and standard deviation over the folds. success: share of the pairs right when
    clean that the attack turns wrong. eer: equal error rate of the attacked scores. tar_1e2, tar_1e3,
    tar_1e4: share of the (attacked) pairs of one person that pass the threshold at which 1e-2, 1e-3, 1e-4
    of the clean, defended pairs of different people do; NaN where those are fewer than ten over that rate.
    drift: mean 1 - cosine between the attacked, defended feature and the clean, undefended one.
    """

    accuracy: float
    deviation: float
    success: float
    eer: float
    tar_1e2: float
    tar_1e3: float
    tar_1e4: float
    drift: float


class Verifier:
    """Recogniser and defence on one set of pairs: thresholds are fixed on clean, defended pairs.

    first, second: (P, 1, H, W), the images of the pairs. The defence is applied to both. impostors: number of
    clean pairs of different people that the thresholds of true accept rates come from.
    """

    def __init__(self, recognizer: Images, defense: Images, first: Tensor, second: Tensor, pairs: Pairs):
        self.recognizer, self.defense, self.pairs = recognizer, defense, pairs
        self.plain = in_batches(recognizer, first)
        self.anchor = self.features(second)
        features = self.features(first)
        self.clean = F.cosine_similarity(features, self.anchor)
        impostors = impostor_scores(features, self.anchor, pairs)
        self.impostors = len(impostors)
        self.strict = {name: accept_above(impostors, far) for name, far in FARS.items()}
        self.thresholds = fold_thresholds(self.clean, pairs)
        self.right = decide(self.clean, self.thresholds, pairs)

    @property
    def threshold(self) -> float:
        """One threshold for attacks that need the decision: the mean over the folds."""
        return self.thresholds.mean().item()

    def features(self, images: Tensor) -> Tensor:
        """Defended features."""
        return in_batches(lambda x: self.recognizer(self.defense(x)), images)

    def goal(self) -> Goal:
        """The attacker's goal on every pair: apart if the same person, together if not."""
        direction = torch.where(self.pairs.same, -1.0, 1.0).to(self.anchor.device)
        return Goal(self.anchor, direction, self.threshold)

    def outcome(self, images: Tensor) -> Outcome:
        """Everything measured when the first images of all pairs are `images`."""
        features = self.features(images)
        scores = F.cosine_similarity(features, self.anchor)
        right = decide(scores, self.thresholds, self.pairs)
        folds = [right[self.pairs.fold == k].float().mean().item() for k in range(len(self.thresholds))]
        turned = (self.right & ~right).sum() / self.right.sum().clamp_min(1)
        numbers, same = scores.cpu(), self.pairs.same
        accepted = {
            name: (numbers[same] > limit).float().mean().item() if math.isfinite(limit) else math.nan
            for name, limit in self.strict.items()
        }
        return Outcome(
            accuracy=float(np.mean(folds)),
            deviation=float(np.std(folds)),
            success=turned.item(),
            eer=eer(numbers.numpy(), same.numpy()),
            **accepted,
            drift=(1 - F.cosine_similarity(features, self.plain)).mean().item(),
        )


def perturbation_size(adversarial: Tensor, x: Tensor) -> dict[str, float]:
    """Mean over images of the maximum, L2 and RMS change, for pixels in [-1, 1] (twice those of [0, 1])."""
    change = (adversarial - x).flatten(1)
    rms = change.square().mean(1).sqrt()
    return {
        "max": change.abs().amax(1).mean().item(),
        "l2": change.norm(dim=1).mean().item(),
        "rms": rms.mean().item(),
    }


def purified_quality(purified: Tensor, x: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of purified images to clean ones, means over images, both with data range 2.

    On the images in [-1, 1] themselves: SSIM compares local means and is another number after a shift to
    [0, 1]. Window of 11 x 11 pixels, sigma 1.5 (Wang et al. 2004).
    """
    return {
        "psnr": psnr(purified / 2, x / 2),
        "ssim": ssim(purified / 2, x / 2),
    }


def attack_scores(recognizer: Images, defense: Images, x: Tensor) -> dict[str, Tensor]:
    """Two signs of an attack per image, higher = more suspicious: ||x - x_hat|| and 1 - cos(F(x),
    F(x_hat))."""
    purified = in_batches(defense, x)
    plain, defended = in_batches(recognizer, x), in_batches(recognizer, purified)
    return {
        "distance": (purified - x).flatten(1).norm(dim=1),
        "cosine_distance": 1 - F.cosine_similarity(plain, defended),
    }


def detection_scores(
    recognizer: Images, defense: Images, clean: Tensor, attacked: Tensor
) -> dict[str, np.ndarray]:
    """Each attack score of clean images and then of attacked ones, (N + M,)."""
    one, two = (attack_scores(recognizer, defense, x) for x in (clean, attacked))
    return {name: torch.cat([one[name], two[name]]).cpu().numpy() for name in one}
