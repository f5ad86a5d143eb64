"""Train MOST-Net, its ablations and the pix2pix baseline.

Without a preset: the demo, on procedural faces; `study` has three seeds, more sizes and baselines, `cuhk` is
the demo's network on a small folder of real pairs. The full size on real pairs, on one GPU or with torchrun
on several: python train.py paper --dataset cufs --data-root DIR
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from most_net import losses
from most_net.data import Batch, Pairs, batches
from most_net.learner import Learner, learning_rate
from most_net.model import FULL, TINY, Architecture, MostNet, flatten
from most_net.pairs import Alignment, Layout
from most_net.trials import Trial, Variant, begin, build, plan, split_data, styles_of, trial_pairs
from shared.io import Run, image_grid, load_weights, progress
from shared.loop import follow
from shared.processes import means
from shared.ranges import Count, Natural, Positive, Share, Weight, Within
from shared.runtime import (
    RunConfig,
    run_training,
    start,
    step_generator,
)

Beta = Annotated[float, Within(0, 0.99999)]
"""Of Adam's averages, which never move at 1."""


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the objective."""

    pixel: Weight = 10.0
    """L1 of the sketch."""
    reconstruction: Weight = 10.0
    """L1 of the sketch decoded from the true style."""
    ssim: Weight = 0.0
    """1 - SSIM. It optimises the headline metric directly: say so when you report."""
    perceptual: Weight = 1.0
    """VGG-19 activations; needs its ImageNet weights."""
    adversarial: Weight = 1.0
    """Least-squares GAN on (photo, sketch)."""
    align: Weight = 0.5
    """Memory refinement: retrieved feature against the true sketch feature, in all variants with a memory
    but `memory`."""
    slot: Weight = 0.0
    """Memory refinement: compactness and separation of the slots."""
    match: Weight = 0.0
    """Memory refinement: the true sketch feature names the slot that the photo chose."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Data, networks to train, objective and schedule; the defaults are the full size."""

    dataset: Literal["simple", "faces", "cufs", "cufsf", "fs2k", "pairs"] = "cufs"
    """faces: procedural. cufs, cufsf, fs2k: with the standard split. pairs: any folder of pairs."""
    data_root: Path | None = None
    """Folder of the data set."""
    layout: Layout = "auto"
    """How the files lie: see the README. auto: recognised by what is there."""
    train_list: Path | None = None
    """List of the training pairs (layout list), relative to the folder."""
    test_list: Path | None = None
    """List of the test pairs (layout list)."""
    alignment: Alignment = field(default_factory=Alignment)
    """What to do with pairs that are not 250x200."""
    holdout: Share = 0.1
    """Share of the training pairs held out: for model selection, or as the test set when there is no
    other."""
    select: Literal["last", "val"] = "val"
    """Weights that are kept: the last ones, or those with the best SSIM on the held-out pairs."""
    variants: tuple[Variant, ...] = ("most",)
    """What is trained: none (no memory), memory (without MR loss), most (memory and MR loss), static (writes
    the first 5 steps only), grad (slots by gradient), mispaired (writes the wrong sketches), unet
    (pix2pix)."""
    pairs: tuple[Natural, ...] = (0,)
    """Numbers of training pairs, 0 for all: each variant is trained with each."""
    extras: tuple[Variant, ...] = ()
    """Variants trained with the first number of pairs only."""
    seeds: Count = 1
    """Repetitions: seed, seed + 1, ..."""
    artists: tuple[str, ...] = ()
    """faces: also train one `most` on several artists, with a memory each, at twice the size."""
    artist_pairs: Count = 48
    """faces: people that every artist has drawn."""
    artist_steps: Count = 600
    """Steps of that training."""
    styles: bool = False
    """fs2k: one memory per style; otherwise one for all."""
    arch: Architecture = FULL
    """Sizes of the networks."""
    topk: Natural = 0
    """Read from the k best slots only; 0: from all."""
    weighting: Literal["mean", "mnad"] = "mean"
    """Weights of the queries that hit a slot."""
    memory_init: Literal["random", "kmeans"] = "random"
    """First content of the slots."""
    weights: Weights = field(default_factory=Weights)
    """Weights of the objective."""
    vgg: Path | None = None
    """torchvision's VGG-19 file for the perceptual term. Default: torchvision's download."""
    size: Annotated[int, Within(16)] = 256
    """Side of a training crop in pixels, a multiple of 2**downs."""
    load: Count = 286
    """Side to which photo and sketch are padded before the crop."""
    flip: bool = True
    """Mirror half of the crops."""
    scale: Annotated[float, Within(0.1, 10)] = 1.0
    """Resize real pairs by this factor first; for small machines."""
    batch: Count = 4
    """Pairs per step, of all processes together."""
    steps: Count = 54000
    """Steps. 54,000 are about 800 epochs of 268 pairs at batch 4."""
    decay: Share = 0.5
    """Share of the steps at the end in which the learning rate falls linearly to 0."""
    lr: Positive = 2e-4
    """Learning rate of Adam."""
    betas: tuple[Beta, Beta] = (0.5, 0.999)
    """Betas of Adam."""
    warmup: Natural = 200
    """First steps, in which the memory is written but the sketch read from it is not trained."""
    ema: Share = 0.0
    """Decay of an average of the weights that replaces them in the end, e.g. 0.999; 0: none."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    validate_every: Count = 1650
    """Steps between validations, about 25 epochs of 268 pairs at batch 4."""


DEMO = Config(
    dataset="faces",
    select="last",
    holdout=0.0,
    variants=("none", "memory", "most"),
    pairs=(8, 32),
    seeds=1,
    extras=("unet",),
    artists=("outline", "pencil", "charcoal"),
    arch=TINY,
    weights=Weights(pixel=1, reconstruction=1, perceptual=0, adversarial=0),
    size=32,
    load=32,
    flip=False,
    batch=6,
    steps=800,
    decay=0.5,
    lr=1e-3,
    betas=(0.9, 0.999),
    warmup=0,
    save_every=200,
    validate_every=200,
)

PRESETS = {
    "demo": DEMO,
    "study": replace(DEMO, seeds=3, pairs=(8, 4, 16, 32), extras=("static", "mispaired", "unet")),
    "cuhk": replace(
        DEMO,
        dataset="pairs",
        holdout=20 / 88,
        pairs=(0,),
        seeds=1,
        extras=("unet",),
        artists=(),
        scale=0.5,
        size=128,
        load=143,
        flip=True,
        batch=4,
        steps=300,
    ),
    "paper": Config(),
}
STATIC_AFTER = 5
LOG_EVERY = 50
ALIGNED = ("most", "static", "grad", "mispaired")


def trained_share(config: Config, out: dict[str, Tensor], step: int) -> float:
    """0 in the warm-up of a network with a memory, where only the reconstruction trains; then 1. A factor
    instead of a branch keeps the graph whole for distributed training."""
    return 0.0 if "recon" in out and step < config.warmup else 1.0


def objective(
    config: Config, trial: Trial, net: nn.Module, out: dict[str, Tensor], batch: Batch, step: int
) -> dict:
    """The weighted terms of the generator, except the adversarial one: name -> scalar."""
    w, y = config.weights, batch.sketch
    if trial.variant == "unet":
        return {"pixel": 100 * losses.pixel_loss(out["sketch"], y)}
    live = trained_share(config, out, step)
    terms = {"pixel": live * w.pixel * losses.pixel_loss(out["sketch"], y)}
    if w.ssim:
        terms["ssim"] = live * w.ssim * losses.ssim_loss(out["sketch"], y)
    if "recon" in out:
        terms["reconstruction"] = w.reconstruction * losses.pixel_loss(out["recon"], y)
    if trial.variant in ALIGNED:
        terms["align"] = live * w.align * losses.mr_align_loss(out["retrieved"], out["features"])
        if w.slot:
            terms["slot"] = live * w.slot * losses.mr_slot_loss(out["scores"])
        if w.match:
            true, slot = flatten(out["features"]), out["scores"].argmax(1)
            values = net.memories[batch.style].values
            terms["match"] = live * w.match * losses.mr_match_loss(true, values, slot, config.arch.tau)
    return terms


def update(
    config: Config, trial: Trial, learner: Learner, accelerator: Accelerator, batch: Batch, step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step: generator, memory, discriminator. Returns the terms and what the network gave."""
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / trial.steps, config.decay)

    out = learner.wrapped(batch.photo, batch.sketch, batch.style)
    terms = objective(config, trial, learner.net, out, batch, step)
    live = trained_share(config, out, step)
    if learner.perceptual is not None:
        with accelerator.autocast():
            distance = learner.perceptual(out["sketch"], batch.sketch)
        terms["perceptual"] = live * config.weights.perceptual * distance
    loss = sum(terms.values())
    if learner.discriminator is not None:
        # One pass of the discriminator serves both players, because the generator moves first and the
        # discriminator's weights stay: its gradient with respect to the sketch goes to the generator.
        fake = out["sketch"].detach().requires_grad_()
        logits = learner.wrapped_d(batch.photo.repeat(2, 1, 1, 1), torch.cat([batch.sketch, fake]))
        real_logits, fake_logits = logits.chunk(2)
        weight = 1.0 if trial.variant == "unet" else config.weights.adversarial
        terms["adversarial"] = live * weight * losses.adversarial_loss(fake_logits)
        (slope,) = torch.autograd.grad(terms["adversarial"], fake, retain_graph=True)
        loss = loss + (out["sketch"] * slope).sum()
    learner.optimizers[0].zero_grad()
    accelerator.backward(loss)
    learner.optimizers[0].step()

    if "features" in out and not (trial.variant == "static" and step >= STATIC_AFTER):
        remember(config, trial, learner.net, out, batch.style, step)
    if learner.discriminator is not None:
        terms["discriminator"] = losses.discriminator_loss(real_logits, fake_logits)
        learner.optimizers[1].zero_grad()
        accelerator.backward(terms["discriminator"])
        learner.optimizers[1].step()
    if learner.average is not None:
        follow(learner.average, learner.net, config.ema)  # the memory is a buffer: copied
    return terms, out


def remember(
    config: Config, trial: Trial, net: MostNet, out: dict[str, Tensor], style: int, step: int
) -> None:
    """Write the step's pairs into the memory; the first batch of an artist may start it instead."""
    generator = step_generator(trial.seed, step)
    if trial.variant == "mispaired":
        out = out | {"features": out["features"].roll(1, 0)}
    if config.memory_init == "kmeans" and step < len(net.memories):
        net.memories[style].fit(out["queries"].detach(), flatten(out["features"].detach()), generator)
    else:
        net.write(out, style, generator)


def train_trial(
    config: Config,
    trial: Trial,
    learner: Learner,
    pairs: Pairs,
    held_out: Pairs | None,
    accelerator: Accelerator,
    run: Run,
    first: int,
    before: int,
    save: Callable[[int], None],
) -> nn.Module:
    """One trial from step `first` on; returns the network with the weights that are kept.

    before: steps of the trials before this one, for the log. save: writes a checkpoint at a step.
    """
    if config.weights.perceptual and trial.variant != "unet":
        learner.perceptual = losses.Perceptual(config.vgg).to(accelerator.device)
    learner.prepare(accelerator, config.compile)
    stream = batches(
        pairs.to(accelerator.device),
        config.batch,
        trial.steps,
        trial.seed,
        trial.load,
        trial.size,
        config.flip,
        first,
        accelerator.process_index,
        accelerator.num_processes,
    )
    for step, batch in enumerate(progress(stream, trial.name, trial.steps - first), first):
        terms, out = update(config, trial, learner, accelerator, batch, step)
        last = step + 1 == trial.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            run.log(before + step, **means({f"{trial.name}/{name}": v for name, v in terms.items()}))
        if held_out is not None and ((step + 1) % config.validate_every == 0 or last):
            run.log(before + step, **{f"{trial.name}/val_ssim": learner.validate(held_out, trial.size)})
        if (step + 1) % config.save_every == 0 and not last:
            shown = torch.cat([batch.sketch, out["sketch"].detach().float()]).cpu() / 2 + 0.5
            sheet = image_grid(shown.clamp(0, 1), len(batch.sketch))
            run.picture(f"{trial.name}-train", sheet, f"sketches by {trial.name} in training")
            save(step + 1)
    accelerator.free_memory()
    return learner.best if learner.best is not None and held_out is not None else learner.current


def train(config: Config) -> Path:
    """Train every trial of the plan; returns the run folder."""
    accelerator = start(config, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    trials = plan(config)
    train_pairs, held_out, _ = split_data(config)
    run = Run("most_net", config, accelerator.is_main_process)
    started = (run.folder / "checkpoint").is_dir()
    at = load_weights(run.folder, {}) if started else {"trial": 0, "step": 0, "best_ssim": None}
    done = {t.name: build(config, t, styles_of(config, t)) for t in trials[: at["trial"]]}
    for number, trial in enumerate(trials[at["trial"] :], at["trial"]):
        pairs = trial_pairs(config, trial, train_pairs)
        learner = begin(config, trial, accelerator.device)
        first = at["step"] if number == at["trial"] else 0
        if number == at["trial"]:
            run.load(done | (learner.models if first else {}), learner.holders if first else {})
            learner.best_ssim = at["best_ssim"] if first else learner.best_ssim

        def save(step: int, number: int = number, learner: Learner = learner) -> None:
            where = {"trial": number, "step": step, "best_ssim": learner.best_ssim}
            run.save(done | learner.models, learner.holders, where)

        before = sum(earlier.steps for earlier in trials[:number])
        net = train_trial(config, trial, learner, pairs, held_out, accelerator, run, first, before, save)
        done[trial.name] = net.cpu()
        run.save(done, {}, {"trial": number + 1, "step": 0, "best_ssim": None})
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
