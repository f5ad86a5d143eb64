"""The objective of FaceSwapper, one function per term, and both players' losses in the form that computes
nothing twice.

A batch holds B pairs (a, b). Everything here works on all 2B pictures at once, a's first: picture i is the
target, and its partner in the other half the source. A sum over the two directions of means over the batch is
twice the mean over the 2B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from faceswapper.blocks import Guide
from faceswapper.model import Cache, Decoded, Discriminator, Generator, MaskPyramid, averaged, swapped
from shared.ranges import Weight
from shared.runtime import own_type

# --- terms ------------------------------------------------------------------------------------------


def bce(logits: Tensor, real: bool) -> Tensor:
    """Binary cross entropy of logits (B, 1) against "real" or "fake", mean over the batch."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def r1(logits: Tensor, pictures: Tensor) -> Tensor:
    """0.5 * mean over the batch of ||d sum D / d pictures||^2; pictures require grad."""
    (gradient,) = torch.autograd.grad(logits.float().sum(), pictures, create_graph=True)
    return 0.5 * gradient.float().square().flatten(1).sum(1).mean()


def identity(real: Tensor, fake: Tensor) -> Tensor:
    """mean of 1 - cos between embeddings (B, D) of the source and of the swap."""
    return (1 - F.cosine_similarity(real.float(), fake.float())).mean()


def reconstruction(fake: Tensor, real: Tensor) -> Tensor:
    """mean |x_aa - a|."""
    return (fake.float() - real).abs().mean()


def side_reconstruction(side: list[Tensor], real: Tensor) -> Tensor:
    """Mean over the side pictures of mean |picture - real|, real averaged down to each one's size."""
    terms = [reconstruction(x, F.interpolate(real, x.shape[-2:], mode="area")) for x in side]
    return torch.stack(terms).mean()


def gram(features: Tensor) -> Tensor:
    """(B, C, h, w) -> F F^T / (h w C), (B, C, C) in fp32."""
    f = features.float().flatten(2)
    return f @ f.transpose(1, 2) / (f.shape[1] * f.shape[2])


def mask_levels(mask: Tensor, sides: list[int], pyramid: MaskPyramid = "cascade") -> list[Tensor]:
    """Mask (B, 1, S, S) at the side of every feature, corners not aligned (unlike in the decoder).

    `cascade`, official: each level from the former, in the features' order, so that all carry 8x8 cells.
    `direct`: the mean of the mask over each feature's cell, as in the decoder.
    """
    if pyramid == "direct":
        return [averaged(mask, side) for side in sides]
    levels, level = [], mask
    for side in sides:
        level = F.interpolate(level, (side, side), mode="bilinear", align_corners=False)
        levels.append(level)
    return levels


def attribute_face(same: list[Tensor], other: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Mean over features of the mean absolute difference of Gram matrices inside the face, (1 - M) F."""
    terms = []
    for f, g, mask in zip(same, other, masks, strict=True):
        face = (1 - mask).to(f.dtype)
        with own_type(f):
            terms.append((gram(f * face) - gram(g * face)).abs().mean())
    return torch.stack(terms).mean()


def attribute_background(same: list[Tensor], other: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Mean over features of mean |M F_same - M F_other|."""
    terms = [
        ((f - g).abs() * mask.to(f.dtype)).mean(dtype=torch.float32)
        for f, g, mask in zip(same, other, masks, strict=True)
    ]
    return torch.stack(terms).mean()


# --- both players -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Weights of the terms; the defaults are the published ones."""

    adversarial: Weight = 1.0
    """Swaps look real to the discriminator."""
    identity: Weight = 10.0
    """lambda_id: swaps look like the source to the recogniser."""
    reconstruction: Weight = 1.0
    """lambda_recon: a picture with its own identity is itself."""
    attribute_face: Weight = 2.0
    """lambda_att_face: another identity leaves the statistics of features inside the face."""
    attribute_background: Weight = 1.0
    """lambda_att_bg: another identity leaves the features outside the face."""
    r1: Weight = 1.0
    """lambda_reg: gradient penalty of the discriminator on real pictures."""
    side: Weight = 0.0
    """Trains the side pictures at the decoder's lower resolutions, which the official code never does."""


class Batch(NamedTuple):
    """2B pictures with what belongs to them, the a's first."""

    picture: Tensor
    """(2B, 3, S, S) in [-1, 1]."""
    landmarks: Tensor
    """Landmark pictures (2B, 3, S, S)."""
    mask: Tensor
    """(2B, 1, S, S), 1 = background."""


def pair(a: Tensor, b: Tensor, lm_a: Tensor, lm_b: Tensor, mask_a: Tensor, mask_b: Tensor) -> Batch:
    """B pairs -> `Batch`."""
    return Batch(torch.cat((a, b)), torch.cat((lm_a, lm_b)), torch.cat((mask_a, mask_b)))


class Swaps(NamedTuple):
    """One forward pass with gradient, good for the discriminator's step and for the generator's."""

    attributes: Tensor
    code: Tensor
    cache: Cache
    guides: dict[int, Guide]
    swap: Decoded


def swap_both(generator: Generator, batch: Batch, features: bool = True) -> Swaps:
    """Both directions: `swap.picture` (2B, 3, S, S) holds [x_ab, x_ba], targets in the batch's order.

    features: keep those that the attribute losses compare.
    """
    attributes, code, cache = generator.encode(batch.picture, batch.mask)
    guides = generator.org_decoder.guides(batch.landmarks, batch.mask)
    swap = generator.org_decoder.decode(attributes, swapped(code), guides, cache, features)
    return Swaps(attributes, code, cache, guides, swap)


def discriminator_real(
    discriminator: Discriminator, batch: Batch, weights: Weights, penalty: float = 1.0
) -> dict[str, Tensor]:
    """Terms on real pictures, weighted: `d_real`, and `d_r1` unless its weight is 0.

    penalty: factor on R1 for this step: 1, or n at every n-th step and 0 between (lazy regularisation).
    """
    factor = weights.r1 * penalty
    pictures = batch.picture.detach().requires_grad_(factor > 0)
    logits = discriminator(pictures, batch.landmarks)
    terms = {"d_real": 2 * bce(logits, True)}
    if factor > 0:
        terms["d_r1"] = 2 * factor * r1(logits, pictures)
    return terms


def discriminator_fake(discriminator: Discriminator, batch: Batch, swaps: Swaps) -> dict[str, Tensor]:
    """Term on the swaps: `d_fake`. Its graph is apart from `discriminator_real`'s: call backward on each in
    turn, so that both are never in memory together."""
    return {"d_fake": 2 * bce(discriminator(swaps.swap.picture.detach(), batch.landmarks), False)}


def generator_terms(
    generator: Generator,
    discriminator: Discriminator | None,
    embed: Callable[[Tensor], Tensor],
    batch: Batch,
    swaps: Swaps,
    weights: Weights,
    pyramid: MaskPyramid = "cascade",
) -> dict[str, Tensor]:
    """Terms of the generator, weighted; those of weight 0 are neither computed nor returned.

    discriminator: with its parameters frozen, None when adversarial is 0. embed: frozen recogniser, (2B, 3,
    S, S) in [-1, 1] -> (2B, D).
    """
    terms, fake = {}, swaps.swap.picture
    if weights.adversarial:
        terms["adversarial"] = weights.adversarial * 2 * bce(discriminator(fake, batch.landmarks), True)
    if weights.identity:
        with torch.no_grad():
            real = embed(batch.picture)
        terms["identity"] = weights.identity * 2 * identity(swapped(real), embed(fake))
    compare = bool(weights.attribute_face or weights.attribute_background)
    if weights.reconstruction or weights.side or compare:
        same = generator.org_decoder.decode(
            swaps.attributes, swaps.code, swaps.guides, swaps.cache, compare, side=weights.side > 0
        )
        if weights.side:
            terms["side"] = weights.side * 2 * side_reconstruction(same.side, batch.picture)
        if weights.reconstruction:
            loss = reconstruction(same.picture, batch.picture)
            terms["reconstruction"] = weights.reconstruction * 2 * loss
    if compare:
        masks = mask_levels(batch.mask, [f.shape[-1] for f in same.features], pyramid)
        if weights.attribute_face:
            loss = attribute_face(same.features, swaps.swap.features, masks)
            terms["attribute_face"] = weights.attribute_face * 2 * loss
        if weights.attribute_background:
            loss = attribute_background(same.features, swaps.swap.features, masks)
            terms["attribute_background"] = weights.attribute_background * 2 * loss
    return terms
