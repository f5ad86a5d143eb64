"""The objectives of the detectors. All take logits (N, C) and labels (N,), and return a scalar."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The winner's loss: softmax cross-entropy, mean, neither class weights nor smoothing.

    Their README says BCE, their code does this.
    """
    return F.cross_entropy(logits, labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The Xception baseline's loss: on one logit (N, 1) of fake, mean."""
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.05) -> Tensor:
    """The 2021 winner's loss: (1 - s) (-log p_label) + s (-mean_k log p_k), mean over the batch."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


LOSSES = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "smoothed": smoothed_cross_entropy,
}
