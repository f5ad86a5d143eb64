"""The objective: one function per term. All expectations are means over the batch.

Figure 2 names the terms (classification, Min MI, Max MI, the other clients' extractors on local data). The
estimator of the mutual information, the weights and the baselines' constants are ours, because the paper's
equations were not available: Jensen-Shannon (as in Deep InfoMax) by default, CLUB as the alternative.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def derangement(batch: int, shift: Tensor) -> Tensor:
    """Indices (B,) of a cyclic shift by `shift` (scalar in 1..B-1): nobody is paired with himself.

    A random permutation has fixed points, which would count some joint pairs as independent ones.
    """
    return (torch.arange(batch, device=shift.device) + shift) % batch


def jsd_bound(joint: Tensor, product: Tensor) -> Tensor:
    """Jensen-Shannon lower bound from critic scores on joint (B,) and shuffled (B,) pairs.

    At the best critic it equals 2 JSD(joint || product) - 2 ln 2; a critic of zeros gives -2 ln 2.
    """
    return -F.softplus(-joint).mean() - F.softplus(product).mean()


def information(joint: Tensor, product: Tensor, mi: str = "jsd") -> Tensor:
    """An estimate that is zero for independent representations, or below it while the critic lags.

    mi "jsd": `jsd_bound` + 2 ln 2, at most 2 ln 2. mi "club": mean log q on joint pairs minus on shuffled
    ones.
    """
    return (joint - product).mean() if mi == "club" else jsd_bound(joint, product) + 2 * math.log(2)


def min_information(joint: Tensor, product: Tensor, mi: str) -> Tensor:
    """L_min: `information`, at least 0. The hinge stops a lagging critic from making it unboundedly
    negative."""
    return F.relu(information(joint, product, mi))


def max_information(joint: Tensor, product: Tensor) -> Tensor:
    """L_max: minus the Jensen-Shannon bound between z_c and the global z_g."""
    return -jsd_bound(joint, product)


def critic_loss(joint: Tensor, product: Tensor, mi: str = "jsd") -> Tensor:
    """What a critic minimises: minus its bound; for "club" the negative log-likelihood of the joint pairs."""
    return -joint.mean() if mi == "club" else -jsd_bound(joint, product)


def diversity(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """L_div: cross-entropy of the head on ([E_s^i(x); z_c], y), averaged over lent extractors i.

    logits (M, B, C), y (B,), weight (M,): 1/M for lent extractors, 0 for padding; all zero in the first
    round.
    """
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat(logits.shape[0]), reduction="none")
    return (each.view(logits.shape[:2]).mean(1) * weight).sum()


def proximal(state: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """FedProx, Ditto: half the squared distance to `anchor` over its tensors (times mu in the objective)."""
    return 0.5 * sum((state[name] - value).square().sum() for name, value in anchor.items())


def model_contrastive(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float = 0.5) -> Tensor:
    """MOON: pull z (B, d) towards the global model's features, away from the client's previous ones."""
    pull = F.cosine_similarity(z, z_global, dim=-1) / temperature
    push = F.cosine_similarity(z, z_previous, dim=-1) / temperature
    return F.softplus(push - pull).mean()


def prototype_distance(z: Tensor, y: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """FedProto: mean squared distance of z (B, d) to the global prototype (C, d) of its class, where one is
    known."""
    return ((z - prototypes[y]).square().mean(-1) * known[y]).mean()
