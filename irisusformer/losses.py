"""The objective: segmentation weighted by a learned uncertainty, and the alternatives it is compared with.

Per pixel: y in {0, 1} or 255 (ignored), p = sigmoid(logits), a = logits of the auxiliary head,
l = BCE(p, y). Every mean is over the pixels of the batch that are not ignored. The abstract of the paper
gives the idea (an uncertainty learned from the prediction's discrepancy, a weighting scheme, a regulariser);
the formulas are a reconstruction.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.processes import total, world

IGNORE = 255
Weighting = Literal["attenuate", "emphasize", "none"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy per pixel, computed from logits; y may be soft."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none")


def valid_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` where `valid`; 0 where nothing is.

    Of several processes each gets its share of the whole batch's mean: the mean of the shares is that mean,
    however many pixels each has to ignore.
    """
    return torch.where(valid, values, 0).sum() * world() / total(valid.sum()).clamp(min=1)


def discrepancy(logits: Tensor, aux: Tensor) -> Tensor:
    """D = KL(q || p) per pixel between the two heads' class probabilities, q = sigmoid(aux).

    arXiv:2003.03773: its code calls KLDivLoss(log_softmax(first), softmax(second)), which is
    KL(second || first).
    """
    q = aux.sigmoid()
    inside = F.logsigmoid(aux) - F.logsigmoid(logits)
    outside = F.logsigmoid(-aux) - F.logsigmoid(-logits)
    return (q * inside + (1 - q) * outside).clamp(min=0)


def weight(u: Tensor, scheme: Weighting, beta: float) -> Tensor:
    """The weighting scheme: exp(-beta u) trusts uncertain labels less, 1 + beta u looks at them more."""
    if scheme == "attenuate":
        return torch.exp(-beta * u)
    return 1 + beta * u if scheme == "emphasize" else torch.ones_like(u)


def dice_loss(logits: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """1 - soft Dice over the batch's valid pixels."""
    p = torch.where(valid, logits.sigmoid(), 0)
    y = torch.where(valid, y, 0)
    both, sizes = total(torch.stack([(p * y).sum(), p.sum() + y.sum()]))
    return 1 - (2 * both + 1) / (sizes + 1)


def objective(
    out: dict[str, Tensor],
    target: Tensor,
    mode: Literal["learned", "two_head", "free", "ce"] = "learned",
    weighting: Weighting = "attenuate",
    beta: float = 1.0,
    lambda_unc: float = 0.4,
    lambda_reg: float = 0.0,
    lambda_d: float = 0.1,
    lambda_dice: float = 0.0,
    regions: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss and its terms for one batch, in fp32 also under autocast.

    Modes of the auxiliary head:
        learned   u = sigmoid(a) regresses the discrepancy |p - y| and weighs the segmentation loss:
                  mean(w(sg u) l) + 0.4 mean BCE(u, sg|p - y|) + lambda_reg mean(u)
        two_head  a is a second segmentation head q (arXiv:2003.03773):
                  mean(w(D) l) + lambda_d mean(D) + 0.4 mean BCE(q, y), D = KL(q || p) with its gradient
        free      u = softplus(a - 2) is free: mean(exp(-u) l) + 0.1 mean(u)
        ce        no uncertainty learning: mean(w(sg D) l) + 0.4 mean BCE(q, y), w = 1 unless asked

    Args:
        out: `logits`, `aux` (B, 1, H, W) and optionally `regions` (B, 2, H, W) of the network.
        target: (B, 1, H, W) integers 0, 1 or 255 (ignored).
        regions: (B, 2, H, W) targets of the pupil and the outer boundary's inside, with 255 for unknown.
    """
    logits, aux = out["logits"].float(), out["aux"].float()
    valid = target != IGNORE
    y = torch.where(valid, target, 0).float()
    l_pixel = cross_entropy(logits, y)

    if mode == "learned":
        u = aux.sigmoid()
        seg = valid_mean(weight(u.detach(), weighting, beta) * l_pixel, valid)
        unc = valid_mean(cross_entropy(aux, (logits.sigmoid() - y).abs().detach()), valid)
        terms = {"seg": seg, "unc": unc, "reg": valid_mean(u, valid)}
        loss = seg + lambda_unc * unc + lambda_reg * terms["reg"]
    elif mode == "two_head":
        d = discrepancy(logits, aux)
        seg = valid_mean(weight(d, weighting, beta) * l_pixel, valid)
        terms = {"seg": seg, "unc": valid_mean(cross_entropy(aux, y), valid), "reg": valid_mean(d, valid)}
        loss = seg + lambda_unc * terms["unc"] + lambda_d * terms["reg"]
    elif mode == "free":
        u = F.softplus(aux - 2)
        terms = {"seg": valid_mean(torch.exp(-u) * l_pixel, valid), "reg": valid_mean(u, valid)}
        loss = terms["seg"] + 0.1 * terms["reg"]
    else:
        d = discrepancy(logits, aux).detach()
        seg = valid_mean(weight(d, weighting, beta) * l_pixel, valid)
        terms = {"seg": seg, "unc": valid_mean(cross_entropy(aux, y), valid)}
        loss = seg + lambda_unc * terms["unc"]

    if lambda_dice:
        terms["dice"] = dice_loss(logits, y, valid)
        loss = loss + lambda_dice * terms["dice"]
    if "regions" in out and regions is not None:
        known = regions != IGNORE
        per_pixel = cross_entropy(out["regions"].float(), torch.where(known, regions, 0).float())
        terms["regions"] = valid_mean(per_pixel, known)
        loss = loss + terms["regions"]  # weight 1, as IrisParseNet weighs its three maps
    return {"loss": loss, **terms}
