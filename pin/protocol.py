"""Verification by the LFW protocol under attack, and what else is measured about a defence."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from pin.attacks import Goal
from pin.pairs import Pairs
from shared.metrics import auc, best_threshold_accuracy, eer, psnr, tar_at_far

Images = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Outcome:
    """A recogniser behind a defence, under one attack. Shares in [0, 1].

    accuracy, deviation: mean and standard deviation over the folds. success: share of the pairs right when
    clean that the attack turns wrong. eer, tar: equal error rate and true accepts at 1 % (`far`) false
    accepts. drift: mean 1 - cosine between the attacked, defended feature and the clean, undefended one.
    """

    accuracy: float
    deviation: float
    success: float
    eer: float
    tar: float
    drift: float


class Verifier:
    """Recogniser and defence on one set of pairs: thresholds are fixed on clean, defended pairs.

    first, second: (P, 1, H, W), the images of the pairs. The defence is applied to both.
    """

    def __init__(self, recognizer: Images, defense: Images, first: Tensor, second: Tensor, pairs: Pairs):
        self.recognizer, self.defense, self.pairs = recognizer, defense, pairs
        self.plain = in_batches(recognizer, first)
        self.anchor = in_batches(lambda x: recognizer(defense(x)), second)
        self.clean = self.score(first)
        self.thresholds = fold_thresholds(self.clean, pairs)
        self.right = decide(self.clean, self.thresholds, pairs)

    @property
    def threshold(self) -> float:
        """One threshold for attacks that need the decision: the mean over the folds."""
        return self.thresholds.mean().item()

    def features(self, images: Tensor) -> Tensor:
        """Defended features."""
        return in_batches(lambda x: self.recognizer(self.defense(x)), images)

    def score(self, images: Tensor) -> Tensor:
        """Cosine of each pair when the first images are `images`."""
        return F.cosine_similarity(self.features(images), self.anchor)

    def goal(self) -> Goal:
        """The attacker's goal on every pair: apart if the same person, together if not."""
        direction = torch.where(self.pairs.same, -1.0, 1.0).to(self.anchor.device)
        return Goal(self.anchor, direction, self.threshold)

    def outcome(self, images: Tensor, far: float = 0.01) -> Outcome:
        """Everything measured when the first images of all pairs are `images`."""
        features = self.features(images)
        scores = F.cosine_similarity(features, self.anchor)
        right = decide(scores, self.thresholds, self.pairs)
        folds = [right[self.pairs.fold == k].float().mean().item() for k in range(len(self.thresholds))]
        turned = (self.right & ~right).sum() / self.right.sum().clamp_min(1)
        numbers, same = scores.cpu().numpy(), self.pairs.same.numpy()
        return Outcome(
            accuracy=float(np.mean(folds)),
            deviation=float(np.std(folds)),
            success=turned.item(),
            eer=eer(numbers, same),
            tar=tar_at_far(numbers, same, far),
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
        "ssim": structural_similarity_index_measure(purified, x, data_range=2.0).item(),
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


def detection_auc(recognizer: Images, defense: Images, clean: Tensor, attacked: Tensor) -> dict[str, float]:
    """Area under the ROC curve of each attack score, clean images against attacked ones."""
    one, two = (attack_scores(recognizer, defense, x) for x in (clean, attacked))
    labels = np.repeat([0, 1], [len(clean), len(attacked)])
    return {name: auc(torch.cat([one[name], two[name]]).cpu().numpy(), labels) for name in one}
