"""The objective, one function per term, and how the terms make up the two learning strategies.

The paper names the strategies (supervised self-driven generation; unsupervised condition-driven,
cycle-consistent generation); forms and weights are decided here, with PFA-GAN's and IPCGAN's as orientation.

Symbols: x image, S layout, a its age group, t target group; x_s = G(x, S, a), y = G(x, S, t),
x_c = G(y, S, a); images (B, 3, H, W) in [-1, 1]. All means are over all elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scores = Tensor | list[Tensor]
"""A discriminator's patch scores, or a list of them from several scales."""


@dataclass(frozen=True)
class Weights:
    """Weights of the generator's terms; 0 leaves a term out."""

    adversarial: float = 1.0
    """L_adv: the discriminator takes the translated face for a real one of its age."""
    age: float = 1.0
    """L_age: the frozen age network puts the translated face into its group."""
    identity: float = 1.0
    """L_id: the frozen identity network knows the person again."""
    reconstruction: float = 10.0
    """L_rec: self-driven generation gives the input back."""
    cycle: float = 10.0
    """L_cyc: translation to another age and back gives the input back."""
    disentangle: float = 0.1
    """L_dis: the age features tell the input's age group."""
    perceptual: float = 0.0
    """L_per: features of the self-driven output are those of the input."""
    adversarial_self: float = 0.0
    """L_adv of the self-driven output at its own age."""
    detail: float = 0.0
    """Laplacian detail loss between the self-driven output and the input."""
    expectation: float = 0.01
    """Within L_age: squared distance in years to the mean age of the group."""
    confusion: float = 0.0
    """Gradient reversal: the identity features must not tell the age group."""


# --- the self-driven and the cyclic strategy ----------------------------------------------------------


def reconstruction(output: Tensor, image: Tensor) -> Tensor:
    """L_rec and L_cyc: mean |output - image|."""
    return (output - image).abs().mean()


def perceptual(of_output: list[Tensor], of_image: list[Tensor]) -> Tensor:
    """L_per = sum over the levels of mean |phi(output) - phi(image)|; no gradient through phi(image)."""
    return sum((a.float() - b.detach()).abs().mean() for a, b in zip(of_output, of_image, strict=True))


def laplacian(image: Tensor, levels: int = 3) -> list[Tensor]:
    """Band-pass levels of an image (B, C, H, W), fine to coarse: each is what 2x2 averaging loses."""
    bands = []
    for _ in range(levels):
        smaller = F.avg_pool2d(image, 2)
        bands.append(image - F.interpolate(smaller, image.shape[-2:], mode="bilinear", align_corners=False))
        image = smaller
    return bands


def detail(output: Tensor, image: Tensor, levels: int = 3) -> Tensor:
    """sum over the levels of 2^-level mean |band(output) - band(image)|, so that wrinkles and hair are not
    lost among smooth shading. Beyond the paper; its authors' earlier work on ageing uses wavelet packets."""
    pairs = zip(laplacian(output, levels), laplacian(image, levels), strict=True)
    return sum((a - b).abs().mean() / 2**level for level, (a, b) in enumerate(pairs))


# --- adversarial --------------------------------------------------------------------------------------


def least_squares(scores: Scores, goal: float) -> Tensor:
    """0.5 mean (D - goal)^2, averaged over the scales."""
    scales = scores if isinstance(scores, list) else [scores]
    return sum(0.5 * (score.float() - goal).square().mean() for score in scales) / len(scales)


def discriminator(real: Scores, fake: Scores, wrong: Scores | None = None) -> Tensor:
    """L_D = 0.5 mean (D(x', S', a') - 1)^2 + 0.5 mean D(y, S, t)^2 (LSGAN).

    wrong: scores of real pictures under another age than their own; the two fake terms are then averaged, as
    in IPCGAN.
    """
    false = least_squares(fake, 0.0)
    if wrong is not None:
        false = (false + least_squares(wrong, 0.0)) / 2
    return least_squares(real, 1.0) + false


# --- age and identity ---------------------------------------------------------------------------------


def age(
    logits: Tensor,
    target: Tensor,
    years: Tensor | None = None,
    means: Tensor | None = None,
    weight: float = 0.01,
) -> Tensor:
    """L_age = CE(T(y), t) [+ weight * mean (E[age](y) - mean age of group t)^2].

    logits (B, K) of the groups; target (B,) groups or (B, K) weights; years (B,) expectation of the age
    network; means (K,) mean age of each group in years. Without `years` only the cross entropy.
    """
    loss = F.cross_entropy(logits.float(), target)
    if years is None or means is None or not weight:
        return loss
    wanted = means[target] if target.ndim == 1 else target @ means
    return loss + weight * (years.float() - wanted.to(years)).square().mean()


def identity(of_output: Tensor, of_image: Tensor) -> Tensor:
    """L_id = mean (1 - cos(phi(y), phi(x))), embeddings (B, E); no gradient through phi(x)."""
    return (1 - F.cosine_similarity(of_output.float(), of_image.detach().float(), dim=1)).mean()


def disentangle(logits: Tensor, source: Tensor) -> Tensor:
    """L_dis = CE(age logits of ConstraintNet for x, a); logits (B, K), source (B,)."""
    return F.cross_entropy(logits.float(), source)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def confusion(of_identity: Tensor, source: Tensor, classify: nn.Module) -> Tensor:
    """CE of a classifier of the age group on F_id (B, C, h, w) behind a gradient reversal: the classifier
    learns to tell the age, the features learn not to."""
    pooled = _Reverse.apply(of_identity).mean((2, 3))
    return F.cross_entropy(classify(pooled).float(), source)
