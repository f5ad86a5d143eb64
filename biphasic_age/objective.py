"""The two learning strategies as gradients: what one training step minimises, with little memory.

The gradients are those of one backward pass through the weighted sum of all terms (a test compares them). But
features of the input are computed once for both strategies, and every branch is sent backward as soon as it
is known, down to the image or the features where branches meet: its activations are freed before the next
branch needs memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biphasic_age import losses
from biphasic_age.constraint import Disentangled
from biphasic_age.frozen import AgeNet, IdentityNet
from biphasic_age.losses import Weights
from biphasic_age.model import Generator

Autocast = Callable[[], AbstractContextManager]


@dataclass
class Guides:
    """Frozen networks that judge what the generator makes; None where its term's weight is 0."""

    age: AgeNet | None = None
    """T."""
    identity: IdentityNet | nn.Module | None = None
    """phi, with `embed(image)` and `levels(image)`."""
    means: Tensor | None = None
    """Mean age of each group, (K,) in years, on the networks' device."""
    parse: Callable[[Tensor], Tensor] | None = None
    """Image (B, 3, H, W) -> layout (B, H, W): parses the translated face anew before it is translated back.
    None reuses the input's layout."""


@dataclass
class Made:
    """What the generator made in a step, detached."""

    translated: Tensor | None
    """y (B, 3, H, W); None when only the self-driven strategy ran."""
    restored: Tensor | None
    """x_s; None when the self-driven strategy has no weight."""


def generator_backward(
    generator: Generator,
    critic: nn.Module,
    guides: Guides,
    image: Tensor,
    layout: Tensor,
    source: Tensor,
    target: Tensor,
    weights: Weights,
    condition: bool = True,
    autocast: Autocast = nullcontext,
) -> tuple[dict[str, Tensor], Made]:
    """Adds the gradients of all terms to the generator's parameters.

    image (B, 3, H, W) in [-1, 1], layout (B, H, W), source and target (B,) age groups. condition=False runs
    the self-driven strategy alone. The critic's parameters must not require gradients. Returns the weighted
    terms, detached, and the images made.
    """
    terms: dict[str, Tensor] = {}

    def backward(**losses_of_branch: Tensor) -> None:
        total = sum(losses_of_branch.values())
        terms.update({name: loss.detach() for name, loss in losses_of_branch.items()})
        total.backward()

    with autocast():
        features = generator.features(image)
    shared, meeting = _leaves(features)

    # Both strategies are painted in one batch. If each had its own, batch norm would tell the decoder for
    # which of them it paints; in use, where there is one average of both, it would do half of each.
    alone = weights.reconstruction or weights.perceptual or weights.detail or weights.adversarial_self
    ages = ([source] if alone else []) + ([target] if condition else [])
    painted: tuple[Tensor, ...] = ()
    if ages:
        with autocast():
            painted = _paint(generator, shared, image, layout, ages)
    outputs = [output.detach().requires_grad_() for output in painted]

    restored = None
    if alone:
        restored = outputs[0].detach()
        with autocast():
            x_s, branch = outputs[0], {}
            if weights.reconstruction:
                branch["reconstruction"] = weights.reconstruction * losses.reconstruction(x_s, image)
            if weights.detail:
                branch["detail"] = weights.detail * losses.detail(x_s, image)
            if weights.perceptual:
                with torch.no_grad():
                    of_image = guides.identity.levels(image)
                branch["perceptual"] = weights.perceptual * losses.perceptual(
                    guides.identity.levels(x_s), of_image
                )
            if weights.adversarial_self:
                branch["adversarial_self"] = weights.adversarial_self * losses.least_squares(
                    critic(x_s, layout, source), 1.0
                )
        backward(**branch)

    translated = None
    if condition:
        y = outputs[-1]
        translated = y.detach()
        with autocast():
            if weights.adversarial:
                scores = critic(y, layout, target)
                backward(adversarial=weights.adversarial * losses.least_squares(scores, 1.0))
            if weights.age:
                seen = guides.age(y)
                loss = losses.age(seen.groups, target, seen.years, guides.means, weights.expectation)
                backward(age=weights.age * loss)
            if weights.identity:
                with torch.no_grad():
                    of_image = guides.identity.embed(image)
                loss = losses.identity(guides.identity.embed(y), of_image)
                backward(identity=weights.identity * loss)
            if weights.cycle:
                back_layout = layout if guides.parse is None else guides.parse(translated)
                with unmeasured(generator):
                    x_c = generator(y, back_layout, source).float()
                backward(cycle=weights.cycle * losses.reconstruction(x_c, image))

    arrived = [(output, leaf.grad) for output, leaf in zip(painted, outputs, strict=True)]
    arrived = [(output, gradient) for output, gradient in arrived if gradient is not None]
    if arrived:
        torch.autograd.backward(*map(list, zip(*arrived, strict=True)))

    # Where the branches meet: what they sent to the features, and the terms on the features themselves.
    ends: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for value, leaf in meeting:
        if leaf.grad is not None:
            ends.append(value)
            gradients.append(leaf.grad)
    if features.logits is not None and weights.disentangle:
        terms["disentangle"] = weights.disentangle * losses.disentangle(features.logits, source)
        ends.append(terms["disentangle"])
        gradients.append(None)
    if generator.constraint is not None and weights.confusion:
        with autocast():
            loss = losses.confusion(features.identity, source, generator.constraint.classify)
        terms["confusion"] = weights.confusion * loss
        ends.append(terms["confusion"])
        gradients.append(None)
    if ends:
        torch.autograd.backward(ends, gradients)
    return {name: term.detach() for name, term in terms.items()}, Made(translated, restored)


def _paint(
    generator: Generator, features: Disentangled, image: Tensor, layout: Tensor, ages: list[Tensor]
) -> tuple[Tensor, ...]:
    """The images at each of `ages`, (B,) groups, decoded in one batch: (B, 3, H, W) each."""
    maps = [
        torch.cat(level)
        for level in zip(*(generator.maps(features, layout, age) for age in ages), strict=True)
    ]
    count = len(ages)
    age, identity = (value.repeat(count, 1, 1, 1) for value in (features.age, features.identity))
    made = generator.paint(Disentangled(age, identity, None, None), maps, image.repeat(count, 1, 1, 1))
    return made.float().chunk(count)


@contextmanager
def unmeasured(network: nn.Module) -> Iterator[None]:
    """Batch norm as in training, but what it measures does not enter the running statistics: those are of
    photographs, which is what the network gets in use, and not of its own pictures on their way back."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _leaves(features: Disentangled) -> tuple[Disentangled, list[tuple[Tensor, Tensor]]]:
    """The same features cut off from the graph, and the pairs (feature, its leaf) where gradients cross."""
    age = features.age.detach().requires_grad_()
    if features.identity is features.age:
        return Disentangled(age, age, None, None), [(features.age, age)]
    identity = features.identity.detach().requires_grad_()
    return Disentangled(age, identity, None, None), [(features.age, age), (features.identity, identity)]


def discriminator_backward(
    critic: nn.Module,
    real: tuple[Tensor, Tensor, Tensor],
    fakes: list[tuple[Tensor, Tensor, Tensor]],
    wrong: Tensor | None = None,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Adds the gradients of L_D to the critic's parameters; returns L_D, detached.

    real: images, layouts and groups of an independent real batch. fakes: triples of translated images, their
    layouts and target groups. wrong: other groups (B,) for the real batch, to be scored as false. Everything
    goes through the critic in one batch, which changes nothing, as it has no batch norm.
    """
    parts = [real, *fakes]
    if wrong is not None:
        parts.append((real[0], real[1], wrong))
    with autocast():
        scores = critic(*(torch.cat(column) for column in zip(*parts, strict=True)))
    counts = [len(real[0]), sum(len(fake[0]) for fake in fakes)] + ([] if wrong is None else [len(wrong)])
    if isinstance(scores, list):
        split = [list(pieces) for pieces in zip(*(scale.split(counts) for scale in scores), strict=True)]
    else:
        split = list(scores.split(counts))
    loss = losses.discriminator(*split)
    loss.backward()
    return loss.detach()
