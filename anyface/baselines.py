"""What AnyFace is measured against in the same harness: the nearest training caption's real face, and
optimisation of the code for each caption (as StyleCLIP and TediGAN do). Regression to the code by MSE is the
variant `no-dt` of training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import ClipInput, image_features
from anyface.data import Cache
from anyface.stylegan2 import Generator
from shared.io import progress


def nearest_caption(texts: Tensor, cache: Cache) -> Tensor:
    """Captions' features (N, F) -> number (N,) of the training face that has the nearest caption in CLIP."""
    known = torch.arange(cache.text.shape[1], device=cache.text.device)
    own = known[None] < torch.from_numpy(cache.counts).to(cache.text.device)[:, None]  # (faces, K)
    keys = F.normalize(cache.text[own], dim=1)
    faces = own.nonzero()[:, 0]
    queries = F.normalize(texts, dim=1)
    return torch.cat([faces[(part @ keys.T).argmax(1)] for part in queries.split(256)])


def optimise_codes(
    texts: Tensor,
    generator: Generator,
    clip: nn.Module,
    mean: Tensor,
    clip_input: ClipInput = "correct",
    steps: int = 200,
    lr: float = 0.1,
    lambda_l2: float = 0.008,
    batch: int | None = None,
) -> Tensor:
    """Codes (N, L, D) that make G's picture match each caption feature (N, F), each from the mean code.

    Minimises 1 - cos(CLIP(G(w)), f_t) + lambda_l2 |w - mean|^2 with Adam; 200 steps, lr 0.1 with a linear
    ramp up and a cosine down, and 0.008 are StyleCLIP's (recalled). batch: captions at once; default: what
    the activations of so large pictures allow, at most 50.
    """
    batch = batch or max(4, min(50, 2**21 // generator.size**2))
    results = []
    for part in progress(texts.split(batch), "latent optimisation"):
        codes = mean.expand(len(part), -1, -1).clone().requires_grad_(True)
        optimiser = torch.optim.Adam([codes], lr)
        for step in range(steps):
            t = step / steps
            ramp = min(1.0, (1 - t) / 0.25)
            ramp = (0.5 - 0.5 * torch.cos(torch.tensor(ramp * torch.pi)).item()) * min(1.0, t / 0.05)
            optimiser.param_groups[0]["lr"] = lr * ramp
            seen = image_features(clip, generator.synthesis(codes), clip_input)
            match = 1 - F.cosine_similarity(seen, part, dim=1)
            # A sum over captions: each is optimised as if alone.
            loss = (match + lambda_l2 * (codes - mean).square().sum((1, 2))).sum()
            (codes.grad,) = torch.autograd.grad(loss, codes)
            optimiser.step()
        results.append(codes.detach())
    return torch.cat(results)
