"""Per-pixel uncertainty by other means, to set beside the learned map; every score is in [0, 1]."""

import torch
from torch import Tensor

from irisusformer.losses import cross_entropy
from irisusformer.model import IrisUsformer, pad_to_stride

DRAWS = 8  # forward passes of MC dropout


def confidence(prob: Tensor) -> Tensor:
    """1 - |2p - 1|: what the softmax itself gives away for free (maximum probability)."""
    return 1 - (2 * prob - 1).abs()


@torch.no_grad()
def flip_disagreement(model: IrisUsformer, image: Tensor, prob: Tensor) -> Tensor:
    """|p(x) - p(mirrored x), mirrored back|."""
    return (prob - model(image.flip(-1), return_uncertainty=False)["logits"].sigmoid().flip(-1)).abs()


@torch.no_grad()
def mc_dropout(model: IrisUsformer, image: Tensor, rate: float = 0.1) -> tuple[Tensor, Tensor]:
    """Mean probability and its confidence over DRAWS passes with channel dropout switched on.

    Also works on a network trained without dropout; its rate is then the given one. Dropout sits in the
    decoder alone, so the encoder runs once.
    """
    height, width = image.shape[-2:]
    maps = model.encode(pad_to_stride(image * 2 - 1))
    trained = model.drop.p
    model.drop.p = trained or rate
    model.drop.train()
    try:
        draws = [model.forward_head(*model.decode(maps), False)["logits"].sigmoid() for _ in range(DRAWS)]
    finally:
        model.drop.eval()
        model.drop.p = trained
    mean = torch.stack(draws).mean(0)[..., :height, :width]
    return mean, confidence(mean)


@torch.no_grad()
def ensemble(prob: Tensor, others: list[IrisUsformer], image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean probability of independently initialised networks, of which the first gave `prob`, and its
    confidence."""
    members = [model(image, return_uncertainty=False)["logits"].sigmoid() for model in others]
    mean = torch.stack([prob, *members]).mean(0)
    return mean, confidence(mean)


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """The T on a fine grid for which sigmoid(logits / T) has the smallest cross-entropy."""
    grid = torch.logspace(-0.6, 0.9, 61)
    losses = torch.stack([cross_entropy(logits / t, truth.float()).mean() for t in grid])
    return float(grid[losses.argmin()])
