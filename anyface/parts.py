"""The small constants of the demo, taught on drawn faces: CLIP, the generator at 32 and 64 px, the judge.

At the paper's scale these come as pretrained files. Each is a `Learner`: networks, an optimiser, and the loss
of a step, which is a pure function of (seed, step).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import WordTokenizer, build_clip, image_features, text_features
from anyface.data import mixed
from anyface.judges import Judge, judge_loss
from anyface.muon import Muon
from anyface.stylegan2 import Generator
from anyface.world import (
    LATENT,
    TRAITS,
    describe,
    draw_latents,
    every_wording,
    make_world,
    read_traits,
    render,
    unit,
)
from shared.runtime import step_generator

CONTEXT = 28
CHANNELS = {4: 64, 8: 64, 16: 64, 32: 32, 64: 16}
SHAKEN = 0.2
"""Noise on every layer's code while the generator learns, in standard deviations of the codes."""
_DRAWN = ("clip", "generator", "wide", "judge", "mapping", "half", "shaken")
WORLD_STREAMS = {name: number for number, name in enumerate(_DRAWN, start=31)}
"""Numbers that keep the random draws of the parts apart."""


@dataclass
class Learner:
    """Networks that learn together.

    models: by the name of their file; terms: step -> weighted losses, to be summed; schedule: share of the
    steps done -> factor on the learning rates. shared: a process computes its share of the batch and
    gradients are averaged; otherwise every process does the same whole step. words: a text stream that reads
    all tokens.
    """

    label: str
    steps: int
    models: dict[str, nn.Module]
    optimiser: torch.optim.Optimizer
    terms: Callable[[int], dict[str, Tensor]]
    schedule: Callable[[float], float]
    shared: bool = False
    words: bool = False


def warm_cosine(t: float) -> float:
    """Factor on the learning rate at the share t of the steps: up over a twentieth, then a cosine to 0."""
    return min(1.0, (t + 1e-3) / 0.05) * (0.5 + 0.5 * math.cos(math.pi * t))


def constant(t: float) -> float:
    """The released trainer has no schedule."""
    return 1.0


def small_clip(patch: int = 8) -> tuple[nn.Module, WordTokenizer]:
    """CLIP for 32 px with two layers of width 64 on either side, and the tokenizer of the world's words."""
    tokenizer = WordTokenizer.from_captions(every_wording(), CONTEXT)
    return build_clip(
        64, 32, 2, 64, patch, CONTEXT, tokenizer.vocab_size, 64, 2, 2, vision_heads=2
    ), tokenizer


def small_generator(size: int = 32) -> Generator:
    """StyleGAN2 with codes of 64 and a mapping of three layers."""
    return Generator(size, 64, 3, lr_mlp=1.0, channels={r: c for r, c in CHANNELS.items() if r <= size})


def grow(larger: Generator, smaller: Generator) -> None:
    """Give a generator the layers of one of a smaller side; its further blocks stay as they are."""
    layers = {k: v for k, v in smaller.state_dict().items() if not k.startswith("noises")}
    larger.load_state_dict(layers, strict=False)


def clip_learner(
    clip: nn.Module, tokenizer: WordTokenizer, steps: int, seed: int, device, faces: int = 6000
) -> Learner:
    """Symmetric contrastive loss on faces and captions in all wordings, the held-out ones too: the streams'
    CLIP knows more of the language than their captions use. Captions name three to six traits: with fewer,
    many faces of a batch fit each caption."""
    clip.to(device)
    per_face = 6
    world = make_world(faces, seed + WORLD_STREAMS["clip"] * 1_000_003, per_face=0)
    captions = describe(world.values, seed, per_face, held_out=None, counts=(3, 6))
    tokens = torch.stack([tokenizer(own) for own in captions]).to(device)
    pictures = world.pictures().to(device)
    labels = torch.arange(64, device=device)

    def terms(step: int) -> dict[str, Tensor]:
        rng = step_generator(seed, step, WORLD_STREAMS["clip"])
        index = torch.randint(faces, (64,), generator=rng)
        which = torch.randint(per_face, (64,), generator=rng)
        image = F.normalize(image_features(clip, pictures[index]), dim=1)
        text = F.normalize(text_features(clip, tokens[index, which]), dim=1)
        logits = clip.logit_scale.exp() * image @ text.T
        return {"contrast": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2}

    optimiser = torch.optim.AdamW(clip.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return Learner("clip", steps, {"clip": clip}, optimiser, terms, warm_cosine)


def teach_mapping(generator: Generator, steps: int, seed: int) -> None:
    """Teach the mapping network alone: from a shaken w, a linear layer must give the traits of its vector as
    ones and zeros, and place and size, in least squares.

    Synthesis sees w through linear layers. Logits, which cross entropy would teach, grow without bound and
    mix the colours of neighbouring values; ones and zeros do not. At the end w has a deviation of 1.
    """
    counts = [len(trait.shares) for trait in TRAITS]
    device = generator.input.input.device
    head = nn.Linear(generator.style_dim, sum(counts) + 3).to(device)
    optimiser = torch.optim.Adam([*generator.style.parameters(), *head.parameters()], 1e-2)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * warm_cosine(step / steps)
        rng = step_generator(seed, step, WORLD_STREAMS["mapping"])
        z = unit(torch.randn(2, 256, LATENT, generator=rng)).to(device)
        w = generator.mapping(z.flatten(0, 1)).view(2, 256, -1)
        coarse, fine = head(_shake(w, step_generator(seed, step, WORLD_STREAMS["shaken"])))
        told = [
            (coarse if trait.coarse else fine)[:, start : start + len(trait.shares)]
            for trait, start in zip(TRAITS, np.cumsum([0, *counts[:-1]]), strict=True)
        ]
        loss = (coarse[:, -3:] - z[0, :, :3].tanh()).square().mean()
        for one, value in zip(told, read_traits(*z).T, strict=True):
            loss = loss + (one - F.one_hot(value, one.shape[1])).square().sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        # The last layer's leaky ReLU lets positive factors through.
        size = w.flatten(0, 1).std(0).square().mean().sqrt()
        for parameter in generator.style[-1].parameters():
            parameter /= size


def _shake(codes: Tensor, rng: torch.Generator) -> Tensor:
    """Codes (..., D) with noise of `SHAKEN` deviations, so that what is near a face's own code, as captions'
    codes are, still is that face."""
    noise = torch.randn(codes.shape, generator=rng).to(codes.device)
    return codes + SHAKEN * codes.detach().flatten(0, -2).std(0).mean() * noise


def generator_learner(label: str, generator: Generator, steps: int, seed: int, device) -> Learner:
    """Supervised style mixing: codes with the coarse layers of one face and the fine ones of another must
    give the drawing of those traits. Every face's code is then known."""
    generator.to(device)
    terms = _drawing_terms(generator, generator, seed, WORLD_STREAMS[label])
    synthesis = [p for name, p in generator.named_parameters() if not name.startswith("style")]
    optimiser = Muon([{"params": synthesis}, {"params": generator.style.parameters(), "lr": 2e-3}])
    return Learner(label, steps, {label: generator}, optimiser, terms, warm_cosine)


def wide_learner(wide: Generator, generator: Generator, steps: int, seed: int, device) -> Learner:
    """The generator of twice the side: it begins as the small one with one more block, and its whole
    synthesis learns. The mapping stays, so the small one's codes are its codes too."""
    wide.to(device).requires_grad_(True)
    grow(wide, generator)
    wide.style.requires_grad_(False)
    synthesis = [p for p in wide.parameters() if p.requires_grad]
    terms = _drawing_terms(wide, generator, seed, WORLD_STREAMS["wide"])
    return Learner("wide", steps, {"wide": wide}, Muon(synthesis, lr=1e-2), terms, warm_cosine)


def _drawing_terms(net: Generator, mapper: Generator, seed: int, stream: int, batch: int = 16):
    """L1 and L2 to the drawings; eyes, glasses, nose and lips in the middle count four times, because they
    are few pixels. Codes are shaken."""
    device = net.input.input.device
    weight = torch.ones(net.size, net.size)
    n = net.size // 8
    weight[3 * n : 7 * n, 2 * n : 6 * n] = 4.0
    weight = (weight / weight.mean()).to(device)

    def terms(step: int) -> dict[str, Tensor]:
        rng = step_generator(seed, step, stream)
        coarse, fine = unit(torch.randn(2, batch, LATENT, generator=rng))
        target = render(coarse, fine, net.size).to(device)
        code = mixed(mapper.mapping(coarse.to(device)), mapper.mapping(fine.to(device)), net.n_latent)
        off = net.synthesis(_shake(code, rng)) - target
        return {"L1": (weight * off.abs()).mean(), "L2": (weight * off.square()).mean()}

    return terms


def judge_learner(judge: Judge, steps: int, seed: int, device) -> Learner:
    """Cross entropy of all traits on noisy drawings."""
    judge.to(device)

    def terms(step: int) -> dict[str, Tensor]:
        draw = step_generator(seed, step, WORLD_STREAMS["judge"])
        coarse, fine = draw_latents(64, draw.initial_seed() % 2**31)
        pictures = render(coarse, fine, judge.size)
        pictures = (pictures + 0.02 * torch.randn(pictures.shape, generator=draw)).to(device)
        return {"traits": judge_loss(judge(pictures), read_traits(coarse, fine).to(device))}

    optimiser = torch.optim.Adam(judge.parameters(), 2e-3)
    return Learner("judge", steps, {"judge": judge}, optimiser, terms, warm_cosine)


def widen(codes: Tensor, layers: int) -> Tensor:
    """Codes (B, L, D) for a generator of more layers: the last one again for the new layers."""
    return torch.cat((codes, codes[:, -1:].expand(-1, layers - codes.shape[1], -1)), 1)
