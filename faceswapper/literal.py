"""The official arithmetic, spelled out: what the fast forms must equal, and what `bench.py` races against.

Every function reads the parameters of this folder's modules and does what the official code does with them,
in its order: a picture at a time, every resize where it is used, the generator run with gradient for the
discriminator's step, gradients for the frozen recogniser and for the pictures.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper.blocks import AdainResBlk, MaskedModulation, ResBlk
from faceswapper.losses import Weights
from faceswapper.model import AttributeEncoder, Decoder, Discriminator, Generator, IdentityEncoder
from faceswapper.recognizer import IRSE50

EPS, SLOPE = 1e-5, 0.2
Levels = dict[int, Tensor]
"""A picture at every resolution of the decoder."""


def _aligned(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=True)


def res_blk(block: ResBlk, x: Tensor) -> Tensor:
    """`ResBlk` with its averages taken after the convolutions."""
    y = x
    if block.norm1 is not None:
        y = F.instance_norm(y, weight=block.norm1.weight, bias=block.norm1.bias, eps=EPS)
    y = block.conv1(F.leaky_relu(y, SLOPE))
    if block.down:
        y = F.avg_pool2d(y, 2)
    if block.norm2 is not None:
        y = F.instance_norm(y, weight=block.norm2.weight, bias=block.norm2.bias, eps=EPS)
    y = block.conv2(F.leaky_relu(y, SLOPE))
    shortcut = x if block.conv1x1 is None else block.conv1x1(x)
    if block.down:
        shortcut = F.avg_pool2d(shortcut, 2)
    return (y + shortcut) / math.sqrt(2)


def layer(module: nn.Module, x: Tensor) -> Tensor:
    """One layer of an encoder or of the discriminator."""
    return res_blk(module, x) if isinstance(module, ResBlk) else module(x)


def modulation(norm: MaskedModulation, x: Tensor, code: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """Masked identity and landmark modulation; picture and mask at the size of x."""
    gamma, beta = norm.fc(code)[..., None, None].chunk(2, 1)
    y = (1 + gamma) * F.instance_norm((1 - mask) * x, eps=EPS) + beta
    y = y * (1 + norm.conv_weight(picture)) + norm.conv_bias(picture)
    return mask * x + (1 - mask) * y


def adain_res_blk(block: AdainResBlk, x: Tensor, code: Tensor, pictures: Levels, masks: Levels):
    """`AdainResBlk`, enlarging before its first convolution."""
    x = F.leaky_relu(modulation(block.norm1, x, code, pictures[x.shape[-1]], masks[x.shape[-1]]), SLOPE)
    if block.up:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    x = block.conv1(x)
    x = F.leaky_relu(modulation(block.norm2, x, code, pictures[x.shape[-1]], masks[x.shape[-1]]), SLOPE)
    return block.conv2(x)


def attribute_encoder(encoder: AttributeEncoder, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Attribute map and cache."""
    cache = {}
    for module in encoder.model:
        if x.shape[-1] in encoder.kept:
            cache[x.shape[-1]] = x
        x = layer(module, x)
    return x, cache


def identity_encoder(encoder: IdentityEncoder, x: Tensor) -> Tensor:
    """Identity code."""
    for module in encoder.model:
        x = layer(module, x)
    return encoder.final_layer(x.flatten(1))


def decoder(
    net: Decoder, x: Tensor, code: Tensor, picture: Tensor, cache: dict[int, Tensor], mask: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Picture, features after every block, side pictures."""
    if net.mask_pyramid == "direct":
        masks, pictures = (
            {r: F.interpolate(whole, (r, r), mode="area") for r in net.resolutions}
            for whole in (mask, picture)
        )
    else:
        masks, level = {}, mask
        for r in net.resolutions:
            level = _aligned(level, r)
            masks[r] = level
        pictures = {r: _aligned(picture, r) for r in net.resolutions}
    features, side = [], []
    for block in net.model:
        x = adain_res_blk(block, x, code, pictures, masks)
        r = x.shape[-1]
        if block.up and r in net.restored:
            n = net.restored.index(r)
            x = x + net.skip_connects[n](masks[r] * cache[r])
            side.append(net.rgb_converters[n](x))
        features.append(x)
    return net.to_rgb(x), features, side


class Directions(NamedTuple):
    """Both directions of a pair, and what the reconstruction needs of the encoders."""

    x_ba: Tensor
    x_ab: Tensor
    features_ba: list[Tensor]
    features_ab: list[Tensor]
    encoded: tuple


def generator(net: Generator, a, b, lm_a, lm_b, mask_a, mask_b) -> Directions:
    """The official forward: two encodings and one decoding for each of a and b, one after the other."""
    map_a, cache_a = attribute_encoder(net.attr_encoder, a)
    map_b, cache_b = attribute_encoder(net.attr_encoder, b)
    id_a, id_b = identity_encoder(net.id_encoder, a), identity_encoder(net.id_encoder, b)
    x_ba, f_ba, _ = decoder(net.org_decoder, map_b, id_a, lm_b, cache_b, mask_b)
    x_ab, f_ab, _ = decoder(net.org_decoder, map_a, id_b, lm_a, cache_a, mask_a)
    return Directions(x_ba, x_ab, f_ba, f_ab, (map_a, map_b, id_a, id_b, cache_a, cache_b))


def discriminator(net: Discriminator, picture: Tensor, drawn: Tensor) -> Tensor:
    """One logit per sample."""
    x = torch.cat((picture, drawn), 1) if net.conditional else picture
    for module in net.main:
        x = layer(module, x)
    return x.flatten(1)


def _bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _r1(logits: Tensor, picture: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), picture, create_graph=True)
    return 0.5 * gradient.pow(2).flatten(1).sum(1).mean()


def discriminator_loss(g: Generator, d: Discriminator, batch: tuple[Tensor, ...], w: Weights) -> Tensor:
    """The discriminator's loss; a and b are left requiring a gradient, the swaps are not detached."""
    a, b, lm_a, lm_b, _, _ = batch
    a.requires_grad_()
    b.requires_grad_()
    real_a, real_b = discriminator(d, a, lm_a), discriminator(d, b, lm_b)
    penalty = _r1(real_a, a) + _r1(real_b, b)
    made = generator(g, *batch)
    loss = _bce(real_a, 1.0) + _bce(real_b, 1.0) + w.r1 * penalty
    return loss + _bce(discriminator(d, made.x_ba, lm_b), 0.0) + _bce(discriminator(d, made.x_ab, lm_a), 0.0)


def _embed(net: IRSE50, picture: Tensor) -> Tensor:
    return net(_aligned(picture, 112))[0]


def _gram(f: Tensor) -> Tensor:
    b, c, h, w = f.shape
    f = f.view(b, c, h * w)
    return torch.bmm(f, f.transpose(1, 2)) / (h * w * c)


def _attribute_losses(same: list[Tensor], other: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    face = background = 0.0
    for f, g in zip(same, other, strict=True):
        mask = F.interpolate(mask, f.shape[-2:], mode="bilinear", align_corners=False)
        face = face + (_gram((1 - mask) * f) - _gram((1 - mask) * g)).abs().mean()
        background = background + (mask * f - mask * g).abs().mean()
    return face / len(same), background / len(same)


def generator_loss(
    g: Generator, d: Discriminator, recogniser: IRSE50, batch: tuple[Tensor, ...], w: Weights
) -> dict[str, Tensor]:
    """The generator's terms, weighted, from a new forward."""
    a, b, lm_a, lm_b, mask_a, mask_b = batch
    made = generator(g, *batch)
    map_a, map_b, id_a, id_b, cache_a, cache_b = made.encoded
    adversarial = _bce(discriminator(d, made.x_ba, lm_b), 1.0) + _bce(discriminator(d, made.x_ab, lm_a), 1.0)
    with torch.no_grad():
        real_a, real_b = _embed(recogniser, a), _embed(recogniser, b)
    likeness = (1 - F.cosine_similarity(real_a, _embed(recogniser, made.x_ba))).mean()
    likeness = likeness + (1 - F.cosine_similarity(real_b, _embed(recogniser, made.x_ab))).mean()
    x_aa, f_aa, _ = decoder(g.org_decoder, map_a, id_a, lm_a, cache_a, mask_a)
    x_bb, f_bb, _ = decoder(g.org_decoder, map_b, id_b, lm_b, cache_b, mask_b)
    face_a, background_a = _attribute_losses(f_aa, made.features_ab, mask_a)
    face_b, background_b = _attribute_losses(f_bb, made.features_ba, mask_b)
    return {
        "adversarial": w.adversarial * adversarial,
        "identity": w.identity * likeness,
        "reconstruction": w.reconstruction * ((x_aa - a).abs().mean() + (x_bb - b).abs().mean()),
        "attribute_face": w.attribute_face * (face_a + face_b),
        "attribute_background": w.attribute_background * (background_a + background_b),
    }


def train_step(
    g: Generator,
    d: Discriminator,
    average: Generator,
    recogniser: IRSE50,
    batch: tuple[Tensor, ...],
    g_optimiser: torch.optim.Optimizer,
    d_optimiser: torch.optim.Optimizer,
    w: Weights,
) -> None:
    """One official iteration in fp32: discriminator, generator, average. batch: (a, b, lm_a, lm_b, mask_a,
    mask_b); the recogniser's parameters require gradients and nobody clears them."""
    for optimiser, loss in ((d_optimiser, discriminator_loss), (g_optimiser, None)):
        value = loss(g, d, batch, w) if loss else sum(generator_loss(g, d, recogniser, batch, w).values())
        g_optimiser.zero_grad()
        d_optimiser.zero_grad()
        value.backward()
        optimiser.step()
    with torch.no_grad():
        for old, new in zip(average.parameters(), g.parameters(), strict=True):
            old.copy_(torch.lerp(new, old, 0.999))
