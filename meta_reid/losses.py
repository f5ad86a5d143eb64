"""The five terms of META's objective, all of weight 1, and an optional sixth from later work."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize

from meta_reid.model import META, Training
from shared.runtime import own_type


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, epsilon: float = 0.1) -> Tensor:
    """CE: the true class gets 1 - epsilon, each other epsilon / (C - 1).

    logits (B, C), labels (B,). The sum over samples is divided by the number of samples with a loss above
    zero, as in the official code. (PyTorch's `label_smoothing` spreads epsilon / C over all classes.)
    """
    log_p = logits.float().log_softmax(1)
    others = epsilon / max(logits.shape[1] - 1, 1)
    true = log_p.gather(1, labels[:, None]).squeeze(1)
    loss = -(1 - epsilon - others) * true - others * log_p.sum(1)
    return loss.sum() / (loss > 0).sum().clamp_min(1)


def distances(features: Tensor) -> Tensor:
    """Euclidean distances of a batch, (B, C) -> (B, B), in float32 or better."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    # Under autocast the product would be in bf16, too coarse for a difference of large numbers.
    with own_type(x):
        square = x.square().sum(1)
        return (square[:, None] + square[None] - 2 * x @ x.T).clamp_min(1e-12).sqrt()


def batch_hard(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the farthest of its identity, itself included, and the nearest other, (B,) each."""
    d, same = distances(features), labels[:, None] == labels[None]
    positive = d.masked_fill(~same, -torch.inf).amax(1)
    negative = d.masked_fill(same, torch.inf).amin(1)
    return positive, negative


def triplet(features: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    """TRI: mean of max(0, hardest positive - hardest negative + margin) over un-normalised features."""
    positive, negative = batch_hard(features, labels)
    return (positive - negative + margin).relu().mean()


def consistency(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """CON: the mixture of the other experts separates identities at least as well as the domain's own.

    teacher e and student q, (B, C) pooled features; no gradient reaches e. Mean max(0, ap_s - ap_t) plus
    mean max(0, an_t - an_s), the batch-hard distances of each.
    """
    ap_t, an_t = batch_hard(teacher.detach(), labels)
    ap_s, an_s = batch_hard(student, labels)
    return (ap_s - ap_t).relu().mean() + (an_t - an_s).relu().mean()


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(-t |x_i - x_j|^2) over pairs of the batch, features (B, C) at length 1.

    Not in META: the uniformity loss of Wang and Isola (ICML 2020), which later work on this task (BAU,
    NeurIPS 2024) applies within each domain; batches here hold one domain.
    """
    with own_type(features):
        x = normalize(features.float())
        squared = (2 - 2 * x @ x.T).clamp_min(0)
    pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return squared[pairs[0], pairs[1]].mul(-t).exp().mean().log()


def expert_terms(
    expert: Tensor,
    logits: Tensor,
    mixtures: dict[str, Tensor],
    labels: Tensor,
    consistency_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Terms of `META.expert_half`; labels (B,): identity within the domain."""
    terms = {"ce_expert": smoothed_cross_entropy(logits, labels), "triplet_expert": triplet(expert, labels)}
    for kind, mixture in mixtures.items():
        terms[f"consistency_{kind}"] = consistency_weight * consistency(expert, mixture, labels)
    return terms


def global_terms(
    universal: Tensor, logits: Tensor, labels: Tensor, uniformity_weight: float = 0.0
) -> dict[str, Tensor]:
    """Terms of `META.global_half`; labels (B,): identity in the union of all domains."""
    terms = {
        "ce_global": smoothed_cross_entropy(logits, labels),
        "triplet_global": triplet(universal, labels),
    }
    if uniformity_weight:
        terms["uniformity"] = uniformity_weight * uniformity(universal)
    return terms


def objective(
    out: Training,
    labels: Tensor,
    union_labels: Tensor,
    consistency_weight: float = 1.0,
    uniformity_weight: float = 0.0,
) -> dict[str, Tensor]:
    """The terms by name, to be summed.

    labels, union_labels: (B,) identity within the domain and in the union of all domains. With two scoring
    networks there are two consistency terms; each trains its own network alone.
    """
    return expert_terms(
        out.expert, out.expert_logits, out.mixtures, labels, consistency_weight
    ) | global_terms(out.universal, out.universal_logits, union_labels, uniformity_weight)


def backward(
    model: META,
    images: Tensor,
    domain: int,
    labels: Tensor,
    union_labels: Tensor,
    consistency_weight: float = 1.0,
    uniformity_weight: float = 0.0,
    warm: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    go_back: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, Tensor]:
    """Forward and backward of one batch: the gradients of the summed `objective`; returns its terms.

    The domain's expert and the global branch share only the stem, so the one goes back before the other sets
    out: the maps of a single pass are kept at a time. autocast: around what computes the terms; go_back: adds
    the gradients of a sum of terms.
    """
    with autocast():
        stem = model.normalise(images)
        cut = stem.detach().requires_grad_(stem.requires_grad)
        terms = expert_terms(*model.expert_half(cut, domain), labels, consistency_weight)
    go_back(sum(terms.values()))
    terms = {name: term.detach() for name, term in terms.items()}
    with autocast():
        rest = global_terms(*model.global_half(cut, warm), union_labels, uniformity_weight)
    go_back(sum(rest.values()))
    if cut.requires_grad:
        stem.backward(cut.grad)
    return terms | {name: term.detach() for name, term in rest.items()}
