"""Gradient attacks on face verification, batched, against anything that maps images to features.

Images are (B, 1, H, W) in [-1, 1], so an eps of 0.04 is 0.02 of [0, 1], or 5.1 grey levels. Every attack
keeps its result in [-1, 1] and, where it has one, in its ball. Parameter values are the first author's own
where the follow-up's code has them (FGSM, PGD, DeepFool), RobFR's (arXiv:2007.04118) for MI-FGSM and C&W.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Recognizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Goal:
    """What the attacker wants of each image.

    anchor: (B, d), the feature of the pair's other image. direction: (B,), -1 to lower the cosine to it
    (dodging), +1 to raise it (impersonation). threshold: the verifier's, for attacks that stop at the
    decision. The image's own feature is a useless anchor: the cosine to it has no gradient at the start.
    """

    anchor: Tensor
    direction: Tensor
    threshold: float = 0.0

    def objective(self, features: Tensor) -> Tensor:
        """J = direction * cosine, (B,), to be maximised."""
        return self.direction * F.cosine_similarity(features, self.anchor)

    def margin(self, features: Tensor) -> Tensor:
        """direction * (cosine - threshold), (B,): above 0 the verifier errs."""
        return self.objective(features) - self.direction * self.threshold

    def part(self, chosen: Tensor) -> "Goal":
        """The goal of some of the images."""
        return Goal(self.anchor[chosen], self.direction[chosen], self.threshold)


def gradient(recognizer: Recognizer, x: Tensor, goal: Goal, draws: int = 1) -> tuple[Tensor, Tensor]:
    """J (B,) and dJ/dx, averaged over `draws` passes: expectation over transformation for random defences."""
    x = x.detach().requires_grad_()
    value, slope = 0.0, 0.0
    for _ in range(draws):
        j = goal.objective(recognizer(x))
        slope = slope + torch.autograd.grad(j.sum(), x)[0]
        value = value + j.detach()
    return value / draws, slope / draws


def into_ball(adversarial: Tensor, x: Tensor, eps: float) -> Tensor:
    """Nearest point within eps of x in max norm and within [-1, 1]."""
    return adversarial.clamp(x - eps, x + eps).clamp(-1, 1)


def fgsm(recognizer: Recognizer, x: Tensor, goal: Goal, eps: float = 0.04, draws: int = 1) -> Tensor:
    """One step of size eps along the gradient's sign."""
    return into_ball(x + eps * gradient(recognizer, x, goal, draws)[1].sign(), x, eps)


def pgd(
    recognizer: Recognizer,
    x: Tensor,
    goal: Goal,
    eps: float = 0.04,
    steps: int = 40,
    step: float = 1 / 255,
    generator: torch.Generator | None = None,
    draws: int = 1,
    region: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent in the max norm; BIM without a `generator`, random start with one.

    region: (H, W) of 0 and 1; only pixels at 1 change (with eps = 2: a patch, a sticker, printed glasses).
    """
    region = 1.0 if region is None else region
    adversarial = x
    if generator is not None:
        noise = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        adversarial = into_ball(x + eps * (2 * noise - 1) * region, x, eps)
    for _ in range(steps):
        slope = gradient(recognizer, adversarial, goal, draws)[1]
        adversarial = into_ball(adversarial + step * slope.sign() * region, x, eps)
    return adversarial


def bim(
    recognizer: Recognizer, x: Tensor, goal: Goal, eps: float = 0.04, steps: int = 40, step: float = 1 / 255
):
    """Basic iterative method: PGD from the image itself."""
    return pgd(recognizer, x, goal, eps, steps, step)


def mi_fgsm(
    recognizer: Recognizer,
    x: Tensor,
    goal: Goal,
    eps: float = 0.04,
    steps: int = 20,
    step: float | None = None,
    decay: float = 1.0,
    diversity: float = 0.0,
    kernel: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Momentum iterative FGSM; the gradient is divided by its mean absolute value before it is summed up.

    diversity: probability of a random resize and pad before each pass (DI). kernel: odd width of the Gaussian
    that smooths the gradient (TI), 0 for none. step: default 1.5 eps / steps.
    """
    step = 1.5 * eps / steps if step is None else step
    adversarial, momentum = x, torch.zeros_like(x)
    for _ in range(steps):
        seen = recognizer
        if diversity and torch.rand((), generator=generator).item() < diversity:
            seen = _resized(recognizer, x.shape[-1], generator)
        slope = gradient(seen, adversarial, goal)[1]
        if kernel:
            slope = _smooth(slope, kernel)
        momentum = decay * momentum + slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        adversarial = into_ball(adversarial + step * momentum.sign(), x, eps)
    return adversarial


def _resized(recognizer: Recognizer, size: int, generator: torch.Generator | None) -> Recognizer:
    """The recogniser behind one random shrinking to 85-100 % and padding."""
    smallest = int(0.85 * size)
    side = int(torch.randint(smallest, size + 1, (), generator=generator))
    left, top = (int(torch.randint(0, size - side + 1, (), generator=generator)) for _ in range(2))
    border = (left, size - side - left, top, size - side - top)

    def seen(x: Tensor) -> Tensor:
        return recognizer(F.pad(F.interpolate(x, (side, side), mode="bilinear", align_corners=False), border))

    return seen


def _smooth(slope: Tensor, kernel: int) -> Tensor:
    offsets = torch.arange(kernel, device=slope.device) - kernel // 2
    weights = torch.exp(-0.5 * (offsets / (kernel / 6)) ** 2)
    weights = torch.outer(weights, weights)
    return F.conv2d(slope, (weights / weights.sum())[None, None], padding=kernel // 2)


def deepfool(
    recognizer: Recognizer,
    x: Tensor,
    goal: Goal,
    eps: float = 0.04,
    steps: int = 40,
    rule: Literal["author", "boundary"] = "author",
    overshoot: float = 0.02,
) -> Tensor:
    """DeepFool in two forms.

    "author": x += |cos| sign(g) / ||sign(g)||_2 until the change reaches eps (the authors' variant).
    "boundary": steps of |margin| / ||g||_1 along the sign to the linearised decision boundary, until it is
    crossed (Moosavi-Dezfooli et al. 2016, max norm), then `overshoot` of the change more.
    """
    adversarial = x
    for _ in range(steps):
        probe = adversarial.detach().requires_grad_()
        features = recognizer(probe)
        j = goal.objective(features)
        slope = torch.autograd.grad(j.sum(), probe)[0]
        direction = slope.sign()
        if rule == "author":
            active = (adversarial - x).abs().amax((1, 2, 3)) < eps
            length = j.detach().abs() / direction.flatten(1).norm(dim=1).clamp_min(1e-12)
        else:
            margin = goal.margin(features.detach())
            active = margin <= 0
            length = (1e-6 - margin) / slope.abs().sum((1, 2, 3)).clamp_min(1e-12)
        if not active.any():
            break
        move = (active * length).view(-1, 1, 1, 1) * direction
        adversarial = into_ball(adversarial + move, x, eps)
    if rule == "boundary":
        adversarial = into_ball(x + (1 + overshoot) * (adversarial - x), x, eps)
    return adversarial


def cw_l2(
    recognizer: Recognizer,
    x: Tensor,
    goal: Goal,
    rate: float = 1e-3,
    iterations: int = 100,
    weight: float = 1e-3,
    tries: int = 6,
    bisections: int = 10,
    confidence: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Carlini and Wagner's smallest L2 change that crosses the threshold; no ball.

    The image is tanh(w); Adam minimises ||x' - x||^2 + weight * max(confidence - margin, 0). Each image's
    weight grows tenfold until it succeeds (`tries` weights at most), then is bisected. Returns (images,
    success); an image without success comes back unchanged.
    """
    count = len(x)
    low = torch.zeros(count, device=x.device)
    high = torch.full((count,), torch.inf, device=x.device)
    weight = torch.full((count,), weight, device=x.device)
    best, distance = x.clone(), torch.full((count,), torch.inf, device=x.device)
    for attempt in range(1, tries + bisections + 1):
        w = torch.atanh(x * (1 - 1e-6)).detach().requires_grad_()
        optimizer = torch.optim.Adam([w], lr=rate)
        crossed = torch.zeros(count, dtype=torch.bool, device=x.device)
        for _ in range(iterations):
            candidate = torch.tanh(w)
            margin = goal.margin(recognizer(candidate))
            change = (candidate - x).square().sum((1, 2, 3))
            loss = (change + weight * (confidence - margin).clamp_min(0)).sum()
            (w.grad,) = torch.autograd.grad(loss, w)
            success = margin.detach() > 0
            crossed |= success
            better = success & (change.detach() < distance)
            best = torch.where(better.view(-1, 1, 1, 1), candidate.detach(), best)
            distance = torch.where(better, change.detach(), distance)
            optimizer.step()
        high = torch.where(crossed, torch.minimum(high, weight), high)
        low = torch.where(crossed, low, torch.maximum(low, weight))
        grown = low * 10 if attempt < tries else low
        weight = torch.where(high.isinf(), grown, (low + high) / 2)
    return best, distance.isfinite()


def apgd(
    recognizer: Recognizer,
    x: Tensor,
    goal: Goal,
    eps: float = 0.04,
    steps: int = 100,
    draws: int = 1,
    momentum: float = 0.75,
    rho: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD (Croce and Hein 2020): the step halves by itself, per image, where progress stops.

    Returns the best point seen. generator: random start.
    """
    current = x
    if generator is not None:
        noise = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        current = into_ball(x + eps * (2 * noise - 1), x, eps)
    step = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    value, slope = gradient(recognizer, current, goal, draws)
    best, best_value, best_slope = current, value, slope
    previous = current
    increases = torch.zeros(len(x), device=x.device)
    halved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    value_then = best_value
    window, last = max(int(0.22 * steps), 1), 0
    for i in range(1, steps + 1):
        ahead = into_ball(current + step * slope.sign(), x, eps)
        share = 1.0 if i == 1 else momentum
        following = current + share * (ahead - current) + (1 - share) * (current - previous)
        previous, current = current, into_ball(following, x, eps)
        value_new, slope = gradient(recognizer, current, goal, draws)
        increases += value_new > value
        value = value_new
        better = value > best_value
        best = torch.where(better.view(-1, 1, 1, 1), current, best)
        best_slope = torch.where(better.view(-1, 1, 1, 1), slope, best_slope)
        best_value = torch.maximum(value, best_value)
        if i - last == window:
            stuck = ~halved & (best_value <= value_then)
            halved = (increases < rho * window) | stuck
            step = torch.where(halved.view(-1, 1, 1, 1), step / 2, step)
            current = torch.where(halved.view(-1, 1, 1, 1), best, current)
            slope = torch.where(halved.view(-1, 1, 1, 1), best_slope, slope)
            value = torch.where(halved, best_value, value)
            value_then, last = best_value, i
            increases.zero_()
            window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return best


class BPDA(nn.Module):
    """A defence that cannot be differentiated, with the identity as its backward pass."""

    def __init__(self, defense: Callable[[Tensor], Tensor]):
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.defense(x) - x).detach()


def eyeglass_region(height: int, width: int) -> Tensor:
    """Frame-shaped band around the eyes of an ArcFace-aligned face, (H, W) of 0 and 1, for `pgd(region=)`."""
    y = (torch.arange(height) + 0.5).view(-1, 1) * 112 / height
    x = (torch.arange(width) + 0.5).view(1, -1) * 112 / width
    region = torch.zeros(height, width, dtype=torch.bool)
    for center in (38.3, 73.5):
        outer = ((x - center) / 17) ** 2 + ((y - 51.6) / 13) ** 2 <= 1
        inner = ((x - center) / 11) ** 2 + ((y - 51.6) / 8) ** 2 <= 1
        region |= outer & ~inner
    return (region | ((y - 51.6).abs() < 3) & ((x - 56).abs() < 7)).float()
