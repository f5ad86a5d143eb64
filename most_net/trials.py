"""The networks of a run: which ones, how they begin, what they train on, and how they are read back."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from most_net.align import HEIGHT, WIDTH
from most_net.baselines import UNet
from most_net.data import RULES, Pairs, face_pairs, simple_pairs
from most_net.learner import Learner
from most_net.model import Discriminator, MostNet, initialise
from most_net.pairs import load_dataset
from shared.faces import ARTISTS
from shared.io import load_config, load_weights
from shared.runtime import UserError, seed_everything, step_generator

if TYPE_CHECKING:
    from most_net.train import Config

Variant = Literal["none", "memory", "most", "static", "grad", "mispaired", "unet"]
DRAWN = ("simple", "faces")
"""Data sets that are drawn, not read."""


@dataclass(frozen=True)
class Trial:
    """One network to train."""

    name: str
    variant: Variant
    pairs: int
    seed: int
    size: int
    load: int
    steps: int
    artists: tuple[str, ...]


def plan(config: "Config") -> list[Trial]:
    """The networks of a run, in order. UserError when the settings do not fit the data set or each other."""
    trials = []
    for seed in range(config.seed, config.seed + config.seeds):
        for number, pairs in enumerate(config.pairs):
            for variant in config.variants + (config.extras if number == 0 else ()):
                name = f"{variant}-{pairs or 'all'}-{seed}"
                size = (config.size, config.load, config.steps)
                trials.append(Trial(name, variant, pairs, seed, *size, (RULES,)))
    if not trials:
        raise UserError("--variants, --pairs: nothing to train; give at least one of each")
    names = [trial.name for trial in trials]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--variants, --extras, --pairs: {twice} would be trained twice; name it once")
    if config.dataset in DRAWN and min(config.pairs) < 1:
        raise UserError("--pairs: procedural faces need a number of pairs, there is no end to them")
    unet = "unet" in config.variants + config.extras
    if config.size < 24 and (config.weights.adversarial or unet):
        raise UserError(f"--size {config.size}: the discriminator needs crops of at least 24 pixels")
    if unet and config.size & (config.size - 1):
        raise UserError(f"--size {config.size}: the U-Net needs a power of two")
    halved, rest = divmod(config.size, 2**config.arch.downs)
    if rest or halved <= max((1, *config.arch.dilations)):
        raise UserError(
            f"--size {config.size}: give a multiple of {2**config.arch.downs} (--arch.downs), of which the "
            f"features keep more pixels than --arch.dilations ({halved})"
        )
    if config.arch.kernel % 2 == 0:
        raise UserError(f"--arch.kernel {config.arch.kernel}: give an odd number")
    if config.size > config.load:
        raise UserError(f"--size {config.size}: larger than --load {config.load}, which crops are cut from")
    if config.topk > config.arch.slots:
        raise UserError(f"--topk {config.topk}: the memory has {config.arch.slots} slots")
    if config.weights.slot and config.arch.slots < 2:
        raise UserError("--weights.slot tells the two best slots apart: give --arch.slots 2 or more")
    strangers = set(config.artists) - {RULES, *ARTISTS}
    if strangers:
        raise UserError(f"--artists {min(strangers)}: there are {', '.join((RULES, *ARTISTS))}")
    if len(set(config.artists)) < len(config.artists):
        raise UserError(f"--artists {' '.join(config.artists)}: name each once")
    if config.dataset in DRAWN and config.artists:
        size = (2 * config.size, 2 * config.load, config.artist_steps)
        trials.append(Trial("artists", "most", config.artist_pairs, config.seed, *size, config.artists))
    return trials


def build(config: "Config", trial: Trial, styles: int = 1) -> nn.Module:
    """The network of a trial, freshly initialised from its seed."""
    seed_everything(trial.seed)
    if trial.variant == "unet":
        return UNet(trial.size, config.arch.base)
    kind = trial.variant if trial.variant in ("none", "grad") else "dynamic"
    net = MostNet(config.arch, kind, styles, config.topk, config.weighting)
    # The common small start needs the normalisation after every convolution.
    return initialise(net) if config.arch.instance_norm else net


def styles_of(config: "Config", trial: Trial) -> int:
    """Number of memories of a trial's network."""
    return 3 if config.dataset == "fs2k" and config.styles else len(trial.artists)


def split_data(config: "Config") -> tuple[Pairs | None, Pairs | None, Pairs | None]:
    """Real training, held-out and test pairs; (None, None, None) for procedural faces. The held-out pairs are
    spread evenly over the sorted names. Where there is no test set they are it."""
    if config.dataset in DRAWN:
        return None, None, None
    train, test = load_dataset(
        config.dataset,
        config.data_root,
        config.layout,
        config.train_list,
        config.test_list,
        config.alignment,
        config.scale,
    )
    if not config.styles:  # one memory for all artists
        train, test = (
            pairs and replace(pairs, styles=torch.zeros_like(pairs.styles)) for pairs in (train, test)
        )
    count = round(config.holdout * len(train))
    held = sorted({int((i + 0.5) * len(train) / count) for i in range(count)})
    kept = [i for i in range(len(train)) if i not in set(held)]
    if not kept:
        raise UserError(f"--holdout {config.holdout}: leaves none of the {len(train)} pairs to train on")
    held_out = train.select(held) if held else None
    return train.select(kept), held_out, test or held_out


def drawn_pairs(config: "Config", trial: Trial, n: int, seed: int) -> Pairs:
    """n procedural faces of the world that a trial lives in."""
    if config.dataset == "simple" and trial.artists == (RULES,):
        return simple_pairs(n, seed, trial.size)
    return face_pairs(n, seed, trial.size, trial.artists)


def trial_pairs(config: "Config", trial: Trial, train: Pairs | None) -> Pairs:
    """The training pairs of a trial: the first ones of a shuffled order, so that small sets lie in large
    ones."""
    if train is None:
        return drawn_pairs(config, trial, trial.pairs, 1000 + trial.seed)
    if trial.pairs > len(train):
        raise UserError(f"--pairs {trial.pairs}: only {len(train)} training pairs are there")
    order = torch.randperm(len(train), generator=step_generator(trial.seed, 0)).tolist()
    return train.select(order[: trial.pairs or None])


def begin(config: "Config", trial: Trial, device: torch.device) -> Learner:
    """A trial before its first step."""
    layout = torch.channels_last
    net = build(config, trial, styles_of(config, trial)).to(device, memory_format=layout)
    discriminator = None
    if config.weights.adversarial or trial.variant == "unet":
        discriminator = Discriminator(config.arch.base).to(device, memory_format=layout)
    keep_best = config.select == "val"
    return Learner(trial.name, net, discriminator, config.lr, config.betas, config.ema > 0, keep_best)


def frame_of(config: "Config", trial: Trial) -> tuple[int, int]:
    """Height and width of the photos that a trial was trained on."""
    if config.dataset in DRAWN:
        return trial.size, trial.size
    return round(HEIGHT * config.scale), round(WIDTH * config.scale)


def load_network(
    folder: Path, config_class: type["Config"], name: str | None = None
) -> tuple[nn.Module, "Config", Trial]:
    """A trained network of a run folder, its run's settings and its trial.

    config_class: `train.Config`. name: the trial's; None is the last one that has a memory. Raises UserError
    when there is none so called or it is not trained yet.
    """
    config = load_config(folder, config_class)
    trials = plan(config)
    finished = trials[: load_weights(folder, {})["trial"]]
    named = [t for t in finished if (t.variant not in ("none", "unet") if name is None else t.name == name)]
    if not named:
        there = ", ".join(t.name for t in finished) or "none yet"
        raise UserError(f"{folder}: no trained network {name or 'with a memory'}; there are: {there}")
    net = build(config, named[-1], styles_of(config, named[-1]))
    load_weights(folder, {named[-1].name: net})
    return net.eval(), config, named[-1]
