"""The terms of AnyFace's objective, one function each, and where the released trainer does otherwise.

Codes are W+ (B, L, D); phi are the streams' hidden features (B, F); every term is a mean over the batch. The
paper's text could not be read in full: forms are those of the released code, with its faults behind switches.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import ClipInput
from shared.ranges import Weight

Negatives = Literal["paired", "all", "official"]
Pairs = Literal["diagonal", "official"]
LOG_100 = math.log(100)


@dataclass(frozen=True)
class Behaviour:
    """Where the released trainer departs from the method. Field values of `paper` are the corrected ones."""

    negatives: Negatives = "paired"
    """Which captions count as mismatched in the diverse triplet loss, see `diverse_triplet`."""
    clip_pairs: Pairs = "diagonal"
    """CLIP loss between each picture and its own caption, or the mean over all pairs."""
    clip_input: ClipInput = "correct"
    """CLIP's own mean and standard deviation, or pictures in [-1, 1] as they are."""
    through_generator: bool = True
    """Let CLIP, reconstruction and identity losses reach the streams through the generator."""
    train_transformers: bool = True
    """Train the transformers too; the released optimiser holds the linear layers alone."""
    batch_as_sequence: bool = False
    """Attention across the samples of a batch."""
    norm_weight: Weight = 0.1
    """Weight of `norm_loss`; the released objective fixes directions and no lengths."""
    all_captions: bool = True
    """Sample among a face's captions; the released loader always takes line number id mod 10."""


BEHAVIOUR = {
    "paper": Behaviour(),
    "official": Behaviour(
        negatives="official",
        clip_pairs="official",
        clip_input="official",
        through_generator=False,
        train_transformers=False,
        batch_as_sequence=True,
        norm_weight=0.0,
        all_captions=False,
    ),
}


def code_distance(a: Tensor, b: Tensor) -> Tensor:
    """d(a, b): sum over layers of 1 - cosine; (..., L, D), broadcasting, -> (...)."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).sum(-1)


def diverse_triplet(
    w: Tensor,
    w_t: Tensor,
    w_other: Tensor | None,
    mean: Tensor,
    margin: float = 0.2,
    negatives: Negatives = "paired",
    same: Tensor | None = None,
) -> Tensor:
    """L_DT: mean of max(d(w, w_t) / d(w_t, mean) - d(w, w') / d(w', mean) + margin, 0).

    w: the faces' own codes, w_t: those of their captions, w_other: of mismatched captions, each (B, L, D);
    mean: (1, L, D) the mean face. negatives:
    - paired: w' is the row of w_other.
    - all: the other rows of w_t, the hinge averaged over them; w_other is not used.
      same (B, B) bool marks rows of one face, left out. Without negatives it is 0.
    - official: the mean over the first eight rows j of d(w_b, w_other_j) / d(w_other_b, mean), whose
      denominator is of another row than the numerator.
    Raises ValueError when w_other is missing, or with official when the batch is smaller than eight.
    """
    away = code_distance(w_t, mean)
    positive = code_distance(w, w_t) / away
    if negatives == "all":
        a, b = F.normalize(w, dim=-1), F.normalize(w_t, dim=-1)
        distances = w.shape[1] - torch.einsum("ild,jld->ij", a, b)
        other = ~torch.eye(len(w), dtype=torch.bool, device=w.device)
        if same is not None:
            other &= ~same
        hinge = F.relu(positive[:, None] - distances / away + margin)
        return (hinge * other).sum() / other.sum().clamp_min(1)
    if w_other is None:
        raise ValueError(f"negatives={negatives!r} needs the codes of mismatched captions")
    if negatives == "paired":
        negative = code_distance(w, w_other) / code_distance(w_other, mean)
    else:
        if len(w) < 8:
            raise ValueError(f"the official negatives need a batch of at least 8, not {len(w)}")
        rows = code_distance(w[:, None], w_other[None, :8])  # (B, 8)
        negative = (rows / code_distance(w_other, mean)[:, None]).mean(1)
    return F.relu(positive - negative + margin).mean()


def code_mse(w: Tensor, w_i: Tensor) -> Tensor:
    """L_MSE: mean squared difference over all elements of the codes."""
    return F.mse_loss(w_i, w)


def norm_loss(w_t: Tensor, w: Tensor) -> Tensor:
    """Mean squared difference of the codes' lengths per layer: L_DT sees directions alone. Decided here."""
    return (w_t.norm(dim=-1) - w.norm(dim=-1)).square().mean()


def cross_modal_distillation(phi_t: Tensor, phi_i: Tensor) -> Tensor:
    """L_CMD: half the sum of both KL divergences of softmax(phi_t) and softmax(phi_i); no side detached."""
    log_t, log_i = phi_t.log_softmax(-1), phi_i.log_softmax(-1)
    # KL(p || q) + KL(q || p) = sum of (p - q)(log p - log q).
    return ((log_t.exp() - log_i.exp()) * (log_t - log_i)).sum(-1).mean() / 2


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float = LOG_100,
    pairs: Pairs = "diagonal",
) -> Tensor:
    """L_CLIP: 1 - cosine * exp(logit_scale) / 100 between pictures and captions (B, E).

    pairs: diagonal takes each picture with its own caption; official the mean over the whole (B, B) matrix,
    which pulls every picture to every caption.
    """
    image, text = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    # The mean over the whole matrix is the product of the means, in fp32 also where products are in bf16.
    cosine = (image * text).sum(-1) if pairs == "diagonal" else (image.mean(0) * text.mean(0)).sum()
    scale = logit_scale.exp() if isinstance(logit_scale, Tensor) else math.exp(logit_scale)
    return 1 - cosine.mean() * scale / 100


def reconstruction(a: Tensor, b: Tensor) -> Tensor:
    """L_rec: mean absolute difference of two pictures."""
    return F.l1_loss(a, b)


def identity_loss(network: nn.Module, made: Tensor, source: Tensor) -> Tensor:
    """L_ID: mean of 1 - cosine of the embeddings of `network.embed`; the source's is a constant."""
    with torch.no_grad():
        target = network.embed(source)
    return (1 - F.cosine_similarity(network.embed(made), target)).mean()


def relation(source: Tensor, target: Tensor) -> Tensor:
    """L_rel of AnyFace++: 1000 * KL between the rows' similarities to the other rows, (B, F) each.

    Softmax over the B - 1 cosines of a row; the sum over B (B - 1), which is PyTorch's `mean` reduction.
    """
    count = len(source)

    def similarities(x: Tensor) -> Tensor:
        x = F.normalize(x.flatten(1), dim=-1)
        other = ~torch.eye(count, dtype=torch.bool, device=x.device)
        return (x @ x.T)[other].view(count, count - 1)

    log_p, log_q = similarities(source).log_softmax(-1), similarities(target).log_softmax(-1)
    return 1000 * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / log_p.numel()


def condition_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """L_KL-CA of AnyFace++: mean KL divergence of N(mean, exp(log_variance)) from N(0, 1)."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def cycle(w_t: Tensor, w_again: Tensor) -> Tensor:
    """L_Cycle of AnyFace++ (experimental, decided here): L1 of w_t and the image stream's code of G(w_t)."""
    return F.l1_loss(w_again, w_t)
