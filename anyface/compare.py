"""The comparison of eval.py: every method's pictures of the same captions, made and measured a batch at a
time. Of a batch only features and sums are kept, so that thousands of captions need no memory for pictures.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from anyface.baselines import nearest_caption, optimise_codes
from anyface.data import Cache, Faces, at_once
from anyface.effects import named_accuracy, read_texts
from anyface.judges import Judge, read_heads
from anyface.model import Stream, assemble
from anyface.protocol import (
    Networks,
    Tally,
    diversity,
    face_rates,
    feature_diversity,
    look,
    lpips_256,
    measure,
)
from anyface.stages import Constants, variant_config
from anyface.stylegan2 import Generator
from anyface.train import Config
from shared.io import progress
from shared.runtime import step_generator

METRIC_SIZE = 256
"""Side at which pictures are compared when the generator's is larger."""
BATCH = 32
"""Captions whose pictures are in memory at once."""

Pictures = Callable[[Tensor], Tensor]
"""Numbers (B,) of captions -> a method's pictures (B, 3, S, S) in [-1, 1], S at most `METRIC_SIZE`."""


@torch.inference_mode()
def paint(codes: Tensor, generator: Generator) -> Tensor:
    """Codes (B, L, D) -> pictures (B, 3, S, S) in [-1, 1], S at most `METRIC_SIZE`."""
    pictures = []
    for part in codes.split(at_once(generator)):
        made = generator.synthesis(part)
        if made.shape[-1] > METRIC_SIZE:
            size = (METRIC_SIZE, METRIC_SIZE)
            made = F.interpolate(made, size, mode="bilinear", antialias=True)
        pictures.append(made.clamp(-1, 1))
    return torch.cat(pictures)


def make_methods(
    config: Config,
    streams: dict[str, dict[int, tuple[Stream, Stream]]],
    constants: Constants,
    train: tuple[Faces, Cache],
    test: Cache,
    n: int,
    psi: float,
    optimise_steps: int,
) -> dict[str, Pictures]:
    """The methods by name, for the first n captions: streams, the first one with noise too, and baselines.

    psi: truncation of the noise; optimise_steps: of latent optimisation, 0 leaves it out.
    """
    texts, generator = test.text[:n, 0], constants.generator
    codes = {}
    for name, by_seed in streams.items():
        tokens = test.tokens[:n, 0] if variant_config(config, name).words else None
        codes[name] = read_texts(by_seed[min(by_seed)][0], constants.clip, texts, tokens)[0]
    first, mean = next(iter(codes)), train[1].mean
    noise = torch.randn(n, generator.style_dim, generator=step_generator(config.seed, 0, 26))
    w_z = generator.mapping(noise.to(texts))
    codes[f"{first}, noise"] = assemble(w_z, codes[first], config.noise_layers, psi, 8, mean)
    codes["mean face"] = mean.expand(n, -1, -1)
    codes["own code (upper bound)"] = test.codes[:n]
    if optimise_steps:
        codes["latent optimisation"] = optimise_codes(
            texts, generator, constants.clip, mean, config.behaviour.clip_input, optimise_steps
        )
    methods = {name: partial(_of_codes, code, generator) for name, code in codes.items()}
    nearest, size = nearest_caption(texts, train[1]).cpu(), min(generator.size, METRIC_SIZE)
    methods["nearest training caption"] = lambda index: train[0].picture(nearest[index], size)
    return methods


def _of_codes(codes: Tensor, generator: Generator, index: Tensor) -> Tensor:
    return paint(codes[index.to(codes.device)], generator)


@torch.inference_mode()
def compare(
    methods: dict[str, Pictures],
    faces: Faces,
    texts: dict[str, Tensor],
    networks: Networks,
    judge: Judge | None,
) -> dict[str, dict[str, float]]:
    """Method -> metric -> value.

    texts: the compared captions' features (N, F) by the name of their CLIP among `networks.features`; they
    are those of the first N faces. judge: reads the named traits; its features are among the networks'.
    """
    n, device = len(texts["CLIP"]), texts["CLIP"].device
    truth, tallies = Tally(), {name: Tally() for name in methods}
    for index in progress(torch.arange(n).split(BATCH), "comparison"):
        made = {name: pictures(index).to(device) for name, pictures in methods.items()}
        true = faces.picture(index, next(iter(made.values())).shape[-1]).to(device)
        truth.add(look(true, networks), {}, len(index))
        for name, pictures in made.items():
            sums = {} if networks.lpips is None else {"LPIPS": lpips_256(pictures, true, networks.lpips)}
            sums["L1 to truth"] = (pictures - true).abs().mean().item()
            tallies[name].add(look(pictures, networks), sums, len(index))
    captions = [own[0] for own in faces.captions[:n]]
    rows = {}
    for name, tally in tallies.items():
        rows[name] = measure(tally, truth, texts)
        if judge is not None:
            seen = read_heads(judge.head(tally.seen("judge").to(device))).cpu()
            rows[name]["named traits"] = 100 * named_accuracy(seen, captions)
    # The upper bound is no competitor: it has seen the photo.
    rivals = {name: tally for name, tally in tallies.items() if "upper bound" not in name}
    for metric, shares in face_rates(rivals, truth).items():
        for name, share in shares.items():
            rows[name][metric] = share
    return rows


@torch.inference_mode()
def draw_diversity(
    w_t: Tensor, constants: Constants, config: Config, psi: float, mean: Tensor, networks: Networks
) -> dict[str, float]:
    """Distance between three draws of the coarse layers of each caption's code w_t (N, L, D), mean over pairs
    and captions: L1 of pixels and what `feature_diversity` measures. psi: truncation of the noise towards
    the mean code (1, L, D)."""
    generator, totals = constants.generator, {}
    rng = step_generator(config.seed, 0, 27)
    noise = torch.randn(3, len(w_t), generator.style_dim, generator=rng)
    for index in torch.arange(len(w_t)).split(BATCH):
        codes = w_t[index.to(w_t.device)]
        draws = [
            assemble(generator.mapping(z.to(w_t)), codes, config.noise_layers, psi, mean=mean)
            for z in noise[:, index]
        ]
        draws = torch.stack([paint(code, generator) for code in draws])  # (3, B, 3, S, S)
        for name, value in ({"L1": diversity(draws)} | feature_diversity(draws, networks)).items():
            totals[name] = totals.get(name, 0.0) + value * len(index) / len(w_t)
    return totals
