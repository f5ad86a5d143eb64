"""Train FaceSwapper and its ablations.

Without a preset: the demo, on drawn faces; `study` trains more ablations of it for longer; `simple` is the
trial in a simpler world that the claims' margins come from. `official` is
`paper` with what the released code does otherwise. At the paper's size: python train.py paper --data celeba
--data-root DIR --recogniser-weights model_ir_se50.pth. Several GPUs: torchrun --nproc-per-node 8 train.py
paper ...
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from faceswapper.data import DRAWN, DrawnFaces, Pairs, PictureSet, World, open_pictures, open_world
from faceswapper.datasets import PublicSet
from faceswapper.drawing import LandmarkValues
from faceswapper.gallery import training_sheet
from faceswapper.judges import train_embedder, train_reader, train_simple_embedder, train_simple_reader
from faceswapper.losses import (
    Batch,
    Weights,
    discriminator_fake,
    discriminator_real,
    generator_terms,
    pair,
    reconstruction,
    swap_both,
)
from faceswapper.model import MaskPyramid, Size
from faceswapper.trials import Learner, Variant, build, helpers, names_of, official_recogniser, plan
from shared.io import Run, load_weights, progress
from shared.loop import average_gradients, follow
from shared.processes import means
from shared.ranges import Count, Decay, Natural, Part, Positive, Share, Weight
from shared.runtime import LoaderConfig, StepBatches, maybe_compile, run_training, start

JUDGE_PICTURES = 40
"""Simple world: pictures of each person on whom the judges are trained."""


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Data, networks, objective and schedule; the defaults are the published hyperparameters."""

    data: World | PublicSet = "celeba"
    """Drawn faces, flat ellipses (`simple`), or a public set in its layout."""
    data_root: Path | None = None
    """Where a public set lies."""
    pictures_folder: str | None = None
    """Folder of pictures below data_root, where it has another name than usual."""
    landmarks_folder: str | None = None
    """Folder of landmark pictures below data_root; default: the pictures' sister X_lm_images."""
    masks_folder: str | None = None
    """Folder of masks below data_root; default: the pictures' sister X_mask_images."""
    landmark_values: LandmarkValues = "unit"
    """Values of drawn landmark pictures: as in the official files, or the plain drawing on [-1, 1]."""
    train_people: Count = 400
    """Drawn faces: people in training."""
    per_person: Count = 4
    """Drawn faces: pictures of each."""
    judge_people: Count = 1200
    """Drawn faces: people on whom the judges are trained, one picture each; in the simple world each
    recogniser has so many of its own, with 40 pictures each."""
    judge_steps: Count = 600
    """Drawn faces: training steps of each recogniser and of the reader of attributes."""
    judge_width: Count = 16
    """Drawn faces: width of those networks."""

    size: Size = field(default_factory=Size)
    """Sizes of the networks."""
    mask_pyramid: MaskPyramid = "direct"
    """How the mask gets to the resolutions of decoder and losses: reduced from the mask itself, or each
    from the one before, beginning at 8x8, as in the official code."""
    mask_source: bool = False
    """The identity encoder sees the source's face alone, by its mask; officially the whole picture, so that
    background and hair of the source can leak."""
    variants: tuple[Variant, ...] = ("full",)
    """What is trained: the method, and the method without one of its parts."""
    seeds: Count = 1
    """Everything is trained with so many seeds, beginning with `seed`."""
    recogniser_weights: Path | None = None
    """model_ir_se50.pth, the recogniser of the identity loss for real faces."""
    id_crop: Part = 1.0
    """Share of the side of the picture, around its centre, that the recogniser sees."""

    weights: Weights = field(default_factory=Weights)
    """Weights of the objective."""
    r1_every: Count = 1
    """Iterations between gradient penalties, which then count as many times."""
    batch_size: Count = 8
    """Pairs per iteration, over all processes."""
    iterations: Count = 60_000
    """Iterations of the method and of every other variant."""
    warmup: Natural = 0
    """First iterations, in which only the reconstruction is trained. Variants that differ from the method in
    the losses alone go on from the method's own warm-up."""
    warmup_lr: Positive = 1e-4
    """Learning rate of these iterations."""
    warmup_betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Betas of Adam in these iterations: without a discriminator, momentum helps."""
    lr: Positive = 1e-4
    """Learning rate of Adam."""
    id_lr: Positive = 1e-4
    """Learning rate of the identity encoder."""
    decay: Share = 0.0
    """Share of the iterations, at their end, over which the learning rates fall to 0 in a straight line."""
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    """Betas of Adam."""
    weight_decay: Weight = 1e-4
    """Weight decay of Adam, coupled (L2)."""
    ema: Share = 0.999
    """Decay of the average of the generator's weights, which is what is used."""
    ema_start: Literal["copy", "official"] = "copy"
    """The average starts as a copy of the generator, or as another random network with PyTorch's own
    initialisation, as in the official code."""

    log_every: Count = 50
    """Iterations between lines of the log."""
    sample_every: Count = 2000
    """Iterations between pictures."""
    checkpoint_every: Count = 5000
    """Iterations between checkpoints."""


DEMO = Config(
    data="faces",
    # people rather than pictures of them: nothing looks at who it is, and more people are more to learn from
    train_people=1600,
    per_person=1,
    size=Size(img_size=64, channel_base=512, max_channels=64, id_dim=64, rgb_norm=False),
    variants=("full", "no-identity-loss", "no-landmarks", "no-attribute-losses", "no-mask"),
    weights=Weights(adversarial=0.3, identity=5.0, reconstruction=15.0, attribute_background=5.0),
    r1_every=4,
    batch_size=4,
    iterations=800,
    warmup=400,
    warmup_lr=2e-3,
    lr=1e-3,
    id_lr=2e-3,
    decay=0.25,
    ema=0.99,
    sample_every=200,
    checkpoint_every=100,
)
SIMPLE = Config(
    data="simple",
    train_people=256,
    per_person=16,
    judge_people=100,
    judge_steps=500,
    size=Size(img_size=32, channel_base=512, max_channels=64, id_dim=64),
    mask_pyramid="cascade",
    # in the order of need
    variants=(
        *("full", "no-identity-loss", "no-attribute-losses", "no-mask", "no-landmarks"),
        "no-discriminator",
    ),
    weights=Weights(reconstruction=10.0, attribute_background=5.0),
    batch_size=4,
    iterations=2000,
    lr=5e-4,
    id_lr=5e-4,
    # the published average would still hold an eighth of the random start at the end
    ema=0.99,
    sample_every=500,
    checkpoint_every=250,
)
PAPER = Config(workers=8)

PRESETS = {
    "demo": DEMO,
    "study": replace(
        DEMO,
        variants=(
            *("full", "no-identity-loss", "no-landmarks", "no-attribute-losses", "no-mask"),
            *("no-discriminator", "unconditional", "frozen-identity"),
        ),
        seeds=2,
        warmup=1000,
        iterations=4000,
    ),
    "simple": SIMPLE,
    "paper": PAPER,
    "official": replace(PAPER, mask_pyramid="cascade", ema_start="official", precision="fp32"),
}


def step(network: nn.Module, optimiser: torch.optim.Optimizer, processes: int) -> None:
    """One step of an optimiser on gradients that are there."""
    average_gradients([p for p in network.parameters() if p.grad is not None], processes)
    optimiser.step()


def update(
    config: Config, learner: Learner, embed: nn.Module, batch: Batch, iteration: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """One iteration: discriminator, generator, average. Returns the weighted terms.

    The swaps come from one forward pass: the discriminator's step does not change the generator, so the same
    graph serves the generator's loss afterwards.
    """
    generator, critic, weights = learner.generator, learner.discriminator, learner.weights
    processes = accelerator.num_processes
    if iteration < config.warmup:
        with accelerator.autocast():
            attributes, code, cache = generator.encode(batch.picture, batch.mask)
            guides = generator.org_decoder.guides(batch.landmarks, batch.mask)
            same = generator.org_decoder.decode(attributes, code, guides, cache, features=False)
            terms = {
                "reconstruction": 2 * weights.reconstruction * reconstruction(same.picture, batch.picture)
            }
        learner.optimisers["adam_g"].zero_grad()
        terms["reconstruction"].backward()
    else:
        compare = bool(weights.attribute_face or weights.attribute_background)
        with accelerator.autocast():
            swaps = swap_both(generator, batch, features=compare)
        terms = {}
        if critic is not None:
            critic.requires_grad_(True)
            learner.optimisers["adam_d"].zero_grad()
            penalty = config.r1_every if iteration % config.r1_every == 0 else 0
            with accelerator.autocast():
                terms |= discriminator_real(critic, batch, weights, penalty)
            sum(terms.values()).backward()
            with accelerator.autocast():
                fake = discriminator_fake(critic, batch, swaps)
            sum(fake.values()).backward()
            terms |= fake
            step(critic, learner.optimisers["adam_d"], processes)
            critic.requires_grad_(False)
        with accelerator.autocast():
            mine = generator_terms(generator, critic, embed, batch, swaps, weights, config.mask_pyramid)
        learner.optimisers["adam_g"].zero_grad()
        sum(mine.values()).backward()
        terms |= mine
    step(generator, learner.optimisers["adam_g"], processes)
    follow(learner.average, generator, config.ema)
    return terms


def align_state(optimiser: torch.optim.Optimizer) -> None:
    """Bring moments into their parameters' order in memory, which fused Adam demands: those of a run that
    goes on on another device are NCHW or NHWC as the networks were there."""
    for p, state in optimiser.state.items():
        for name, value in state.items():
            if value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(value)


def load_batch(items: dict[str, Tensor], device: torch.device) -> Batch:
    """A collated batch of `Pairs` on the device."""
    moved = {name: value.to(device, non_blocking=True) for name, value in items.items()}
    return pair(*(moved[f"{what}_{which}"] for what in ("image", "landmarks", "mask") for which in "ab"))


class Progress:
    """Where a run stands: finished trials and the iteration of the next."""

    def __init__(self, run: Run, done: dict[str, nn.Module]):
        self.run, self.done = run, done

    def save(self, trial: int, iteration: int, learner: Learner | None = None) -> None:
        """Write a checkpoint of everything finished and of the trial at work."""
        models = self.done | (learner.models if learner else {})
        self.run.save(models, learner.optimisers if learner else {}, {"trial": trial, "iteration": iteration})


def train_trial(
    config: Config,
    number: int,
    learner: Learner,
    embed: nn.Module,
    pictures: PictureSet,
    accelerator: Accelerator,
    saved: Progress,
    first: int,
    before: int,
) -> None:
    """One trial from iteration `first` on; its averaged generator joins what is done.

    number: of the trial in the plan. before: iterations of the trials before it, for the log.
    """
    trial, run = learner.trial, saved.run
    if accelerator.device.type == "cuda":
        for model in (*learner.models.values(), embed):
            model.to(memory_format=torch.channels_last)
    for optimiser in learner.optimisers.values():
        align_state(optimiser)
    # R1 differentiates twice, which compiled networks cannot; the generator is called by its parts.
    maybe_compile(embed, config.compile)
    if learner.discriminator is not None and not learner.weights.r1:
        maybe_compile(learner.discriminator, config.compile)
    batches = StepBatches(
        len(pictures),
        config.batch_size,
        trial.seed,
        trial.iterations,
        first,
        accelerator.process_index,
        accelerator.num_processes,
        draws=True,
    )
    loader = DataLoader(
        Pairs(pictures, trial.seed),
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for iteration, items in enumerate(progress(loader, trial.name), first):
        batch = trial.restrict(load_batch(items, accelerator.device))
        if iteration == config.warmup and iteration:
            learner.begin(saved.done[trial.warm] if trial.begins else None)
            if trial.keeps:
                saved.done[trial.warm] = deepcopy(learner.generator).cpu()
        learner.schedule(config, iteration)
        terms = update(config, learner, embed, batch, iteration, accelerator)
        count = iteration + 1
        last = count == trial.iterations
        if count % config.log_every == 0 or last:
            run.log(before + iteration, **means({f"{trial.name}/{name}": v for name, v in terms.items()}))
        if run.is_main and (count % config.sample_every == 0 or last):
            sheet = training_sheet(learner.average, batch)
            run.picture(f"{trial.name}-train", sheet, f"face swaps by {trial.name} in training")
        if last:
            saved.done[trial.name] = learner.average.cpu()
            saved.save(number + 1, 0)
        elif count % config.checkpoint_every == 0:
            saved.save(number, count, learner)


def train_helpers(config: Config, tools: dict[str, nn.Module], pictures: PictureSet) -> None:
    """Drawn faces: the recogniser of the loss learns on the training pictures, in the simple world on people
    of its own, the judges on others."""
    steps, width, seed, simple = config.judge_steps, config.judge_width, config.seed, config.data == "simple"

    def people(apart: int) -> DrawnFaces:
        drawn = open_world(config.data, config.judge_people, JUDGE_PICTURES if simple else 1, seed + apart)
        return DrawnFaces(*drawn, config.size.img_size, config.landmark_values)

    others = people(50_021)
    if simple:
        trained = {
            "recogniser": train_simple_embedder(people(50_022), seed, width, steps),
            "judge": train_simple_embedder(others, seed + 1, width + 4, steps),
            "reader": train_simple_reader(others, seed + 2, width, steps),
        }
    else:
        trained = {
            "recogniser": train_embedder(pictures, seed, width, steps, soft=True),
            "judge": train_embedder(others, seed + 1, width + 4, steps),
            "reader": train_reader(others, seed + 2, width, steps),
        }
    for name, network in trained.items():
        tools[name].load_state_dict(network.state_dict())


def train(config: Config) -> Path:
    """Train every trial of the plan; returns the run folder. Continues a run that was interrupted."""
    accelerator = start(config)
    trials = plan(config)
    pictures = open_pictures(config, config.seed)
    embed = None if config.data in DRAWN else official_recogniser(config)
    run = Run("faceswapper", config, accelerator.is_main_process)
    started = (run.folder / "checkpoint").is_dir()
    where = load_weights(run.folder, {}) if started else {"trial": 0, "iteration": 0}
    tools = helpers(config)
    if tools and not started:
        train_helpers(config, tools, pictures)
    embed = embed if embed is not None else tools["recogniser"]
    done: dict[str, nn.Module] = dict(tools)
    for number, trial in enumerate(trials[: where["trial"] + 1]):  # filled from the checkpoint below
        names = names_of(trial, None if number < where["trial"] else where["iteration"])
        done |= {name: build(config, trial, embed).requires_grad_(False) for name in names}
    saved = Progress(run, done)
    for number, trial in enumerate(trials[where["trial"] :], where["trial"]):
        first = where["iteration"] if number == where["trial"] else 0
        learner = Learner(config, trial, embed, accelerator.device)
        if number == where["trial"]:
            run.load(done | (learner.models if first else {}), learner.optimisers if first else {})
        first = max(first, trial.begins)
        embed.to(accelerator.device).eval().requires_grad_(False)
        before = sum(earlier.iterations for earlier in trials[:number])
        train_trial(config, number, learner, embed, pictures, accelerator, saved, first, before)
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
