"""Training of the demo's recognisers: margin softmax, plain or hardened by adversarial training."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pin.attacks import into_ball
from pin.job import Job
from pin.losses import arcface_logits, cosine_logits
from pin.recognizers import SmallRecognizer
from shared.processes import drawn
from shared.runtime import step_generator

ATTACK_START = 11  # a stream of randomness of its own


def train_recognizer(job: Job, name: str, faces, seed: int) -> None:
    """Stage `<name>`: Adam with a one-cycle rate up to 4e-3; "robust" trains on attacked faces.

    seed: tells the recognisers of a run apart, in their start values and in the order of the images.
    """
    if job.done(name):
        return
    config, network = job.config, job.networks[name]
    model = job.accelerator.prepare(network)
    logits = cosine_logits if config.head == "additive" else arcface_logits
    total = max(config.recognizer_epochs * len(faces) // 64, 1)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    parts = {"optimizer": optimizer, "schedule": schedule}
    for step, (x, label) in job.steps(name, total, faces, 64, shuffle=seed, **parts):
        network.train()
        if name == "robust":
            generator = step_generator(config.seed, step, ATTACK_START)
            hard = attack_training_batch(network, x, label, config, logits, generator)
            network.train()
            if config.adversarial == "pgd":
                loss = F.cross_entropy(logits(model(hard), network.kernel, label), label)
            else:
                loss = trades_loss(model, network.kernel, x, hard, label, logits)
        else:
            loss = F.cross_entropy(logits(model(x), network.kernel, label), label)
        optimizer.zero_grad()
        job.accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        job.log(step, total, **{f"{name}/loss": loss.detach()})
    network.eval()
    job.finish(name, total)


def attack_training_batch(
    network: SmallRecognizer, x: Tensor, label: Tensor, config, logits, generator
) -> Tensor:
    """PGD on the class decision, from a random start, for adversarial training (Madry et al. 2018).

    For TRADES the divergence from the clean prediction is raised instead of the classification error.
    """
    network.eval()
    eps, steps = config.adversarial_eps, config.adversarial_steps
    noise = drawn(partial(torch.rand, generator=generator), x.shape).to(x.device)
    hard = into_ball(x + eps * (2 * noise - 1), x, eps)
    with torch.no_grad():
        clean = logits(network(x), network.kernel, label, margin=0.0)
    for _ in range(steps):
        hard = hard.detach().requires_grad_()
        scores = logits(network(hard), network.kernel, label, margin=0.0)
        loss = F.cross_entropy(scores, label) if config.adversarial == "pgd" else divergence(scores, clean)
        slope = torch.autograd.grad(loss, hard)[0]
        hard = into_ball(hard.detach() + 2.5 * eps / steps * slope.sign(), x, eps)
    return hard


def trades_loss(
    model: nn.Module, kernel: Tensor, x: Tensor, hard: Tensor, label: Tensor, logits, weight: float = 6.0
) -> Tensor:
    """Clean cross-entropy plus `weight` times the divergence of the attacked prediction (Zhang et al.
    2019). model: the recogniser, perhaps wrapped."""
    features = model(torch.cat([x, hard]))
    clean, attacked = features.chunk(2)
    error = F.cross_entropy(logits(clean, kernel, label), label)
    plain = [logits(part, kernel, label, margin=0.0) for part in (attacked, clean)]
    return error + weight * divergence(*plain)


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(scores)), mean over the batch."""
    return F.kl_div(scores.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
