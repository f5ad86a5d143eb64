"""Training of the follow-up's variant, the artificial immune system (AIS), on the same basis and faces.

Beside PIN: no DAE, a memory in the head, a price for losing the identity, and attacks on an older self.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pin.ais import AISEncoder, AISSelection
from pin.attacks import Goal, fgsm
from pin.basis import Basis
from pin.job import Job
from pin.losses import mask_cost, reinforce
from pin.model import ESN, PIN, Defended
from shared.processes import drawn
from shared.runtime import step_generator

AIS_NOISE = 21  # a stream of randomness of its own
SAMPLES, IDENTITY, STEP, FOLLOW = 25, 8.0, 0.04, 0.9
"""The official values: masks per image, weight of the identity term, noise level and FGSM step, momentum."""


def make_ais(size: int, components: int, widths: tuple[int, ...], hidden: int) -> ESN:
    """AIS' selection network for square images of `size` pixels."""
    side = size
    for _ in widths:
        side = (side + 1) // 2
    return ESN(AISEncoder(widths), AISSelection(widths[-1] * side * side, hidden, components))


def identity_cost(recognizer: nn.Module, basis: Basis, x: Tensor, seen: Tensor, masks: Tensor) -> Tensor:
    """IDENTITY * (1 - cos) between features of clean x and of `seen` projected with each mask.

    x, seen: (B, 1, H, W). masks: (S, B, K) -> (S, B). Not linear in the mask, so it has no closed form.
    """
    clean = recognizer(x)
    coefficients = basis.coefficients(seen)
    purified = basis.reconstruct((masks * coefficients).flatten(0, 1), (-1, *x.shape[1:]))
    features = recognizer(purified).unflatten(0, masks.shape[:2])
    return IDENTITY * (1 - F.cosine_similarity(features, clean, dim=-1))


def train_ais(job: Job, faces, basis: Basis, lamb: float) -> None:
    """Stage `esn-ais`: absolute Gaussian noise in the first half, then FGSM on a slowly following copy of
    itself.

    Policy gradient with each image's own baseline. The copy is refreshed ten times a run (officially every
    20,000 steps). Needs the run's recogniser, which `check_settings` asks for.
    """
    stage = "esn-ais"
    config, esn = job.config, job.networks[stage]
    recognizer = job.networks["recognizer"].eval().requires_grad_(False).to(job.accelerator.device)
    model = job.accelerator.prepare(esn)
    older = copy.deepcopy(esn).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(esn.parameters(), config.esn_rate, momentum=0.9)
    total = config.esn_steps
    states = {"optimizer": optimizer, "older": older}
    for step, (x, _) in job.steps(stage, total, faces, config.esn_batch, **states):
        generator = step_generator(config.seed, step, AIS_NOISE)
        if step < total // 2:
            seen = x + STEP * drawn(partial(torch.randn, generator=generator), x.shape).to(x.device)
        else:
            older_self = Defended(recognizer, PIN(basis, None, older, "threshold"))
            goal = Goal(recognizer(x), -torch.ones(len(x), device=x.device))
            seen = fgsm(older_self, x, goal, STEP)
        esn.train()
        with job.accelerator.autocast():
            p = model(seen)
        cost = mask_cost(basis, x, seen, lamb)
        extra = partial(identity_cost, recognizer, basis, x, seen)
        loss, value = reinforce(p, cost, SAMPLES, "image", generator, extra)
        optimizer.zero_grad()
        job.accelerator.backward(loss)
        optimizer.step()
        if (step + 1) % max(total // 10, 1) == 0:
            follow(older, esn)
        job.log(step, total, **{f"{stage}/cost": value, f"{stage}/kept": p.detach().sum(1).mean()})
    esn.eval()
    job.finish(stage, total)


@torch.no_grad()
def follow(older: nn.Module, newer: nn.Module) -> None:
    """Move a copy towards the network: weights 0.9 old + 0.1 new, counters as they are."""
    for name, value in newer.state_dict().items():
        kept = older.state_dict()[name]
        kept.copy_(FOLLOW * kept + (1 - FOLLOW) * value if value.is_floating_point() else value)
