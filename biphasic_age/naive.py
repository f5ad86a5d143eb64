"""The generator and its training step in the textbook form, with the same weights: what `bench.py` measures
against.

Every call of the generator encodes its image anew; every class has a noise map; enlargement comes before norm
and skip; nothing is computed in place; all terms are summed and sent backward at once; the discriminator sees
real and translated pictures one after the other.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age import losses
from biphasic_age.ages import as_weights
from biphasic_age.discriminator import Discriminator
from biphasic_age.layouts import one_hot
from biphasic_age.losses import Weights
from biphasic_age.model import Generator, Injection, InjectionBlock
from biphasic_age.objective import Guides


def soft_maps(net: Generator, labels: Tensor, target: Tensor) -> list[Tensor]:
    """ProjectionNet with a noise map for each class."""
    p, age = net.projection, as_weights(target, net.groups)
    s = one_hot(labels, net.classes)
    sigma = (age @ p.noisy.sigma())[:, :, None, None]
    z = s + sigma * s * torch.randn_like(s)
    g, b = (age @ p.age.weight)[:, :, None, None].chunk(2, 1)
    h = p.own(z) * (1 + g) + b * s.repeat_interleave(p.per_class, 1)
    h = F.leaky_relu(p.mix(F.leaky_relu(h, 0.2)), 0.2)
    full = F.leaky_relu(p.smooth(h), 0.2)
    half = F.leaky_relu(p.down1(full), 0.2)
    return [F.leaky_relu(p.down2(half), 0.2), half, full]


def inject(injection: Injection, x: Tensor, maps: Tensor) -> Tensor:
    """BN(x) * (1 + gamma') + beta, gamma' = gamma - 1 as SPADE writes it."""
    gamma = F.conv2d(maps, injection.gamma.weight, injection.gamma.bias - 1, padding=1)
    return injection.norm(x) * (1 + gamma) + injection.beta(maps)


def block(net: InjectionBlock, x: Tensor, maps: Tensor) -> Tensor:
    """The injection block on an input that is enlarged first."""
    if net.up:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    h = net.conv1(F.leaky_relu(inject(net.inject1, x, maps), 0.2))
    h = net.conv2(F.leaky_relu(inject(net.inject2, h, maps), 0.2))
    return h + net.skip(x)


def generate(net: Generator, image: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """G(x, S, t) (B, 3, H, W), and the age logits of the image."""
    c, d = net.constraint, net.decoder
    features = net.encoder(image)
    attention = c.attention(features)
    of_age, of_identity = attention * features, (1 - attention) * features
    logits = c.classify(of_age.mean((2, 3)))
    scale, shift = (as_weights(target, net.groups) @ c.age.weight)[:, :, None, None].chunk(2, 1)
    context = F.leaky_relu(c.context(of_age * (1 + scale) + shift), 0.2)
    maps = []
    for gates, latent in zip(c.gates, soft_maps(net, labels, target), strict=True):
        both = F.interpolate(gates(context), latent.shape[-2:], mode="bilinear", align_corners=False)
        gate, bias = both.chunk(2, 1)
        maps.append(latent * gate.sigmoid() + bias)
    h = of_identity
    for trunk in d.trunk:
        h = block(trunk, h, maps[0])
    h = block(d.up2, block(d.up1, h, maps[1]), maps[2])
    o = d.last(F.leaky_relu(h, 0.2))
    return ((image + o).clamp(-1, 1) if d.output == "residual" else o.tanh()), logits


def training_losses(
    net: Generator,
    critic: nn.Module,
    guides: Guides,
    image: Tensor,
    labels: Tensor,
    source: Tensor,
    target: Tensor,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """The sum of all terms, and y."""
    both, logits = generate(
        net, image.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1), torch.cat((source, target))
    )
    (x_s, y), logits = both.chunk(2), logits[: len(image)]
    x_c, _ = generate(net, y, labels, source)
    seen = guides.age(y)
    total = (
        weights.reconstruction * losses.reconstruction(x_s, image)
        + weights.cycle * losses.reconstruction(x_c, image)
        + weights.adversarial * losses.least_squares(critic(y, labels, target), 1.0)
        + weights.age * losses.age(seen.groups, target, seen.years, guides.means, weights.expectation)
        + weights.identity * losses.identity(guides.identity.embed(y), guides.identity.embed(image))
        + weights.disentangle * losses.disentangle(logits, source)
    )
    return total, y


def critic_loss(
    critic: Discriminator,
    real: tuple[Tensor, Tensor, Tensor],
    fake: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """L_D with one call of the critic for each kind of picture."""
    return losses.discriminator(critic(*real), critic(*fake))
