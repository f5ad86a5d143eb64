"""The networks of a run: which ones, how they begin, and how they are read back."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from faceswapper.data import DRAWN
from faceswapper.judges import SIMPLE_DIM, Embedder, Reader, SimpleReader
from faceswapper.losses import Batch, Weights
from faceswapper.model import Discriminator, FrozenIdentity, Generator, initialise, load_official
from faceswapper.recognizer import Recogniser
from shared.io import load_config, load_weights
from shared.runtime import UserError, seed_everything

if TYPE_CHECKING:
    from faceswapper.train import Config

Variant = Literal[
    "full",
    "no-identity-loss",
    "no-landmarks",
    "no-attribute-losses",
    "no-mask",
    "no-discriminator",
    "unconditional",
    "frozen-identity",
]
"""The method and what it is without one of its parts."""
EMBEDDING = 512
"""Length of IR-SE50's embedding."""
SHARED = ("no-identity-loss", "no-attribute-losses", "no-discriminator", "unconditional")
"""Variants whose warm-up is the method's own: they differ in what comes after it."""


@dataclass(frozen=True)
class Trial:
    """One generator to train."""

    name: str
    variant: Variant
    seed: int
    iterations: int
    begins: int = 0
    """Iteration at which it begins, with the generator that the method had then; 0: from nothing."""
    keeps: int = 0
    """Iteration at which the generator is kept as `warm-<seed>` for the trials that begin there; 0: never."""

    @property
    def warm(self) -> str:
        """Name of the generator that trials of this seed begin with."""
        return f"warm-{self.seed}"

    def weights(self, weights: Weights) -> Weights:
        """Weights of the terms in this variant."""
        off: dict[str, tuple[str, ...]] = {
            "no-identity-loss": ("identity",),
            "no-attribute-losses": ("attribute_face", "attribute_background"),
            "no-discriminator": ("adversarial",),
        }
        return replace(weights, **dict.fromkeys(off.get(self.variant, ()), 0.0))

    def restrict(self, batch: Batch) -> Batch:
        """What a variant without landmarks or without masks sees: a white landmark picture; a mask that keeps
        nothing."""
        if self.variant == "no-landmarks":
            return batch._replace(landmarks=torch.ones_like(batch.landmarks))
        if self.variant == "no-mask":
            return batch._replace(mask=torch.zeros_like(batch.mask))
        return batch


def plan(config: "Config") -> list[Trial]:
    """The generators of a run, in order."""
    trials = []
    for seed in range(config.seed, config.seed + config.seeds):
        for variant in config.variants:
            shares = config.warmup and config.variants[0] == "full" and config.iterations > config.warmup
            begins = config.warmup if shares and variant in SHARED else 0
            needed = variant == "full" and set(SHARED) & set(config.variants)
            keeps = config.warmup if shares and needed else 0
            trials.append(Trial(f"{variant}-{seed}", variant, seed, config.iterations, begins, keeps))
    if not trials:
        raise UserError("--variants: name at least one")
    return trials


def names_of(trial: Trial, iteration: int | None = None) -> list[str]:
    """Names of the generators that a trial has left behind after so many iterations; None: when finished."""
    finished = iteration is None
    names = [trial.name] if finished else []
    if trial.keeps and (finished or iteration > trial.keeps):  # kept when the next iteration begins
        names.append(trial.warm)
    return names


def build(config: "Config", trial: Trial, embed: nn.Module) -> Generator:
    """The generator of a trial, freshly initialised from its seed."""
    return initialise(construct(config, trial, embed))


def construct(config: "Config", trial: Trial, embed: nn.Module) -> Generator:
    """The generator of a trial as PyTorch itself initialises it, from the trial's seed."""
    seed_everything(trial.seed)
    identity = None
    if trial.variant == "frozen-identity":
        identity = FrozenIdentity(embed, embed.dim, config.size.id_dim)
    return Generator(config.size, config.mask_pyramid, identity, config.mask_source)


class Learner:
    """What training keeps of a trial: generator, its average, discriminator, their optimisers."""

    def __init__(self, config: "Config", trial: Trial, embed: nn.Module, device: torch.device):
        weights = trial.weights(config.weights)
        self.trial, self.weights = trial, weights
        self.generator = build(config, trial, embed).to(device)
        if config.ema_start == "copy":
            self.average = deepcopy(self.generator)
        else:  # the official order: the average is taken before the networks are initialised anew
            self.average = construct(config, replace(trial, seed=trial.seed + 1_000_003), embed).to(device)
        self.average.requires_grad_(False)
        self.discriminator = None
        if weights.adversarial:
            seed_everything(trial.seed + 1)
            critic = Discriminator(config.size, conditional=trial.variant != "unconditional")
            self.discriminator = initialise(critic).to(device)
        own = list(self.generator.id_encoder.parameters())
        rest = [p for n, p in self.generator.named_parameters() if not n.startswith("id_encoder.")]
        settings = {"eps": 1e-8, "weight_decay": config.weight_decay, "fused": True}
        groups = [{"params": rest}, {"params": own}]
        self.optimisers = {"adam_g": torch.optim.Adam(groups, **settings)}
        self.models: dict[str, nn.Module] = {"generator": self.generator, "average": self.average}
        if self.discriminator is not None:
            self.optimisers["adam_d"] = torch.optim.Adam(self.discriminator.parameters(), **settings)
            self.models["discriminator"] = self.discriminator
        self.schedule(config, 0)

    def begin(self, generator: nn.Module | None = None) -> None:
        """Start the objective proper, from another generator's weights or one's own, with fresh moments and
        the average at the generator."""
        if generator is not None:
            self.generator.load_state_dict(generator.state_dict())
        self.average.load_state_dict(self.generator.state_dict())
        self.optimisers["adam_g"].state.clear()

    def schedule(self, config: "Config", iteration: int) -> None:
        """Learning rates and betas of an iteration."""
        warm = iteration < config.warmup
        falling = config.decay * self.trial.iterations
        share = min(1.0, (self.trial.iterations - iteration) / falling) if falling else 1.0
        rates = (config.warmup_lr, config.warmup_lr) if warm else (config.lr, config.id_lr)
        for optimiser in self.optimisers.values():  # the discriminator's has the first group only
            for group, rate in zip(optimiser.param_groups, rates, strict=False):
                group["lr"] = share * rate
                group["betas"] = config.warmup_betas if warm else config.betas


class PaperRecogniser(Recogniser):
    """IR-SE50 on whole crops, with the length of its embedding."""

    dim = EMBEDDING


def helpers(config: "Config") -> dict[str, nn.Module]:
    """Untrained networks that a run on drawn faces trains first: the recogniser of the loss, the recogniser
    that judges, the reader of attributes."""
    if config.data not in DRAWN:
        return {}
    width = config.judge_width
    if config.data == "simple":
        return {
            "recogniser": Embedder(width, dim=SIMPLE_DIM),
            "judge": Embedder(width + 4, dim=SIMPLE_DIM),
            "reader": SimpleReader(width),
        }
    return {
        "recogniser": Embedder(width, soft=True),
        "judge": Embedder(width + 4),
        "reader": Reader(width),
    }


def official_recogniser(config: "Config") -> nn.Module:
    """The recogniser of the loss for real faces, from its released file."""
    if config.recogniser_weights is None:
        raise UserError(
            "the identity loss needs --recogniser-weights model_ir_se50.pth (IR-SE50 of "
            "TreB1eN/InsightFace_Pytorch, linked in the official repository's README)"
        )
    return PaperRecogniser(load_official("face_model", config.recogniser_weights), crop=config.id_crop)


def load_generators(
    folder: Path, config_class: type["Config"], names: list[str] | None = None
) -> tuple[dict[str, Generator], dict[str, nn.Module], "Config"]:
    """Averaged generators of a run's finished trials by name, its helpers, and its settings.

    names: only these; default all. Raises UserError when a name is not there or nothing is finished yet.
    """
    config = load_config(folder, config_class)
    where = load_weights(folder, {})
    trials = plan(config)
    finished = trials[: where["trial"]]
    known = {name: trial for trial in finished for name in names_of(trial) if name != trial.warm}
    chosen = list(known) if names is None else names
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        there = ", ".join(known) or "none yet, let train.py finish one"
        raise UserError(f"{folder}: no generator {', '.join(missing)}; there are: {there}")
    tools = helpers(config)
    load_weights(folder, tools)
    needs_embed = any(known[name].variant == "frozen-identity" for name in chosen)
    embed = tools.get("recogniser") or (official_recogniser(config) if needs_embed else nn.Identity())
    found = {}
    for name in chosen:
        found[name] = build(config, known[name], embed).eval()
    load_weights(folder, found)
    return found, {name: tool.eval() for name, tool in tools.items()}, config


def main_name(config: "Config") -> str:
    """Name of the generator that a user of a run wants: the first trial's."""
    return plan(config)[0].name
