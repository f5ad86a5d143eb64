"""Train biphasic facial age translation: one generator that makes faces older and younger.

The abstract alone of the paper was available to us and it has no public code: networks, losses and schedule
are a reconstruction. `demo` and `study` (every row, two seeds) draw their faces; `paper` is the full size,
`ablation` the rows at that size. Several GPUs: torchrun --nproc-per-node 8 train.py paper --data-root DIR.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from biphasic_age.ages import EDGES
from biphasic_age.data import DRAWN_LIMITS, DataName, FaceSet, TrainSet, all_faces, open_faces
from biphasic_age.datasets import LayoutOrder
from biphasic_age.frozen import age_training_loss
from biphasic_age.gallery import training_sheet
from biphasic_age.losses import Weights
from biphasic_age.objective import discriminator_backward, generator_backward
from biphasic_age.stages import (
    GUIDES,
    SCENE_RECIPE,
    TABLE,
    Recipe,
    Stage,
    about_file,
    build,
    build_critic,
    build_guides,
    guide_file,
    load_given,
    load_guides,
    people_in,
    plan,
    recipe_of,
    save_about,
    stage_file,
    weights_of,
)
from shared.io import Run, load_weights, progress, save_safetensors
from shared.loop import Position, average_gradients, follow
from shared.processes import as_one, drawn, mean
from shared.ranges import Count, Decay, Natural, Positive, Share, Within
from shared.runtime import (
    LoaderConfig,
    StepBatches,
    UserError,
    maybe_compile,
    run_training,
    start,
    step_generator,
)


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of the data, the networks and their training."""

    data: tuple[DataName, ...] = ("cacd",)
    """Drawn faces, the two-head scene, or a public set; with several, each gets its own networks."""
    data_root: Path | None = None
    """Folder of a public set."""
    list: Path | None = None
    """CSV file path,age,identity[,layout][,sex] for `--data csv`."""
    layouts: bool = True
    """Use label maps; without them every picture is one class and only the ablation makes sense."""
    layout_root: Path | None = None
    """Folder that has `parsing/<stem>.png`; default: the set's own folder."""
    layout_order: LayoutOrder = "bisenet"
    """Order of the labels in those files."""
    fold: Annotated[int, Within(1, 5)] = 1
    """Which of the five folds is kept for testing."""
    limits: tuple[Positive, ...] = EDGES
    """Highest age of every group but the last."""
    image_size: Count = 256
    """Side of the pictures in pixels, a multiple of 8."""
    flip: bool = True
    """Mirror every other picture with its layout."""
    train_images: Annotated[int, Within(2)] = 2000
    """Drawn pictures for training."""
    pictures: Count = 4
    """Drawn pictures of each person."""
    test_images: Count = 160
    """Drawn people or scenes for testing; of a public set the first so many test pictures are used, 3 MB of
    memory for each at 256x256 (`eval.py --test-images` takes another number)."""
    scene_images: Count = 600
    """Scenes for training, each at one age."""
    scene_size: Count = 32
    """Side of a scene in pixels."""
    scene_heads: Annotated[int, Within(1, 2)] = 2
    """Heads in a scene; 1 is the easy case, in which the picture says where the parts are."""

    d_layout: bool = True
    """Show the discriminator the layout."""
    two_scales: bool = False
    """A second discriminator on the picture at half size."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = Recipe()
    """How generators learn from faces."""
    scene: Recipe = SCENE_RECIPE
    """The same for the two-head scene."""
    seeds: Count = 1
    """Everything is trained with so many seeds, beginning with `seed`."""

    age_weights: Path | None = None
    """State dict of AgeNet; without it the run trains one on its own training faces."""
    identity_weights: Path | None = None
    """model_ir_se50.pth of ArcFace; without it the run trains a small network on its own subjects."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser, for --reparse and later for photographs; without it the run
    trains a small one on its own training faces."""
    age_width: Count = 64
    """Channels of the age network's first layer."""
    age_stages: Count = 6
    """Its layers."""
    identity_width: Count = 32
    """Channels of the small identity network's first layers."""
    guide_steps: Count = 20_000
    """Steps of the small networks."""
    guide_batch: Count = 64
    """Pictures in each of those steps."""
    guide_lr: Positive = 1e-4
    """Their learning rate."""

    batch_size: Count = 16
    """Pictures per step, over all processes; as many again are the real ones of the discriminator."""
    warmup: Natural = 2000
    """First steps in which only the self-driven strategy runs."""
    betas: tuple[Decay, Decay] = (0.5, 0.99)
    """Adam's moments."""
    average: Share = 0.999
    """Decay of the average of the generator's weights that is kept for use; 0: none."""
    reparse: bool = False
    """Parse the translated face anew before it is translated back."""
    recompute: bool = True
    """Compute ProjectionNet's widest layer again in the backward pass: less memory for a little time."""

    log_every: Count = 100
    """Steps between lines of the log."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints."""
    sample_every: Count = 5000
    """Steps between pictures."""


SMALL = Config(
    data=("scene", "faces"), limits=DRAWN_LIMITS, image_size=32, flip=False, age_width=24, age_stages=3,
    identity_width=16, guide_steps=400, guide_batch=32, guide_lr=2e-3, batch_size=8, warmup=0, average=0.95,
    recompute=False, log_every=25, checkpoint_every=200, sample_every=200,
    recipe=Recipe(
        size="tiny", output="residual", steps=600, lr=2e-3, critic_lr=2.0, mismatch=True, jitter=0.0,
        weights=Weights(adversarial=4.0, age=0.3, expectation=0.0, reconstruction=4.0, cycle=4.0),
    ),
    scene=replace(SCENE_RECIPE, size="keen", output="residual", variants=("full", "no-layout"), lr=1e-3),
)  # fmt: skip
STUDY = replace(
    SMALL,
    seeds=2,
    recipe=replace(SMALL.recipe, variants=TABLE),
    scene=replace(SMALL.scene, variants=TABLE),
)
PAPER = Config(workers=8, test_images=4000)

PRESETS = {
    "demo": SMALL,
    "study": STUDY,
    "paper": PAPER,
    "ablation": replace(PAPER, recipe=replace(PAPER.recipe, variants=TABLE)),
}


def faces_loader(stage: Stage, config: Config, accelerator: Accelerator, source: FaceSet, start_step: int):
    """Batches of the stage's remaining steps. A variant's batch is twice as large: its second half are the
    discriminator's real faces."""
    guides = stage.name == GUIDES
    batches = StepBatches(
        len(source),
        config.guide_batch if guides else 2 * config.batch_size,
        seed=stage.seed,
        steps=stage.steps,
        start_step=start_step,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        draws=True,
        roles=1 if guides else 2,
    )
    # Guides and variants draw different samples, all variants of a seed the same ones.
    recipe = recipe_of(config, stage.data)
    jitter = recipe.guide_jitter if guides else recipe.jitter
    samples = TrainSet(source, 2 * stage.seed + guides, config.flip, jitter)
    pin = accelerator.device.type == "cuda"
    return DataLoader(samples, batch_sampler=batches, num_workers=config.workers, pin_memory=pin)


def resume(folder: Path, position: Position, models: dict[str, nn.Module], optimisers: list) -> None:
    """Weights and optimisers of a stage that was interrupted."""
    if position.step:
        load_weights(folder, models)
        for optimiser, saved in zip(optimisers, position.optimisers, strict=True):
            optimiser.load_state_dict(saved)


def train_guides(
    stage: Stage, config: Config, accelerator: Accelerator, run: Run, position: Position, source: FaceSet
) -> dict[str, nn.Module]:
    """Stage 0: the small age, identity and parsing networks, on the training faces."""
    device = accelerator.device
    torch.manual_seed(stage.seed)
    networks = build_guides(config, stage.data, people_in(source))
    if "identity" in networks and people_in(source) == len(source):
        raise UserError(
            f"{source.name} does not say which pictures show the same person, so no identity network can be "
            "trained on it: give --identity-weights, or --weights.identity 0"
        )
    networks = {name: as_one(network.to(device), device).train() for name, network in networks.items()}
    learning = [p for network in networks.values() for p in network.parameters()]
    optimiser = torch.optim.Adam(learning, config.guide_lr)
    if "parser" in networks:
        seen, layouts = (value.to(device) for value in all_faces(source, 512))
        # Eyes are a hundredth of a face: classes weigh by the root of their rarity.
        counts = torch.bincount(layouts.flatten().long(), minlength=source.classes).float()
        rarity = (counts.sum() / counts.clamp_min(1)).sqrt() * (counts > 0)
    resume(run.folder, position, networks, [optimiser])
    loader = faces_loader(stage, config, accelerator, source, position.step)
    for batch in progress(loader, stage.label):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        terms = {}
        with accelerator.autocast():
            if "age" in networks:
                terms["age"] = age_training_loss(
                    networks["age"](batch["image"]), batch["age"], batch["group"]
                )
            if "identity" in networks:
                logits = networks["identity"](batch["image"])
                terms["identity"] = F.cross_entropy(logits, batch["identity"])
            if "parser" in networks:
                logits = networks["parser"](batch["image"])
                target = batch["layout"].long()
                share = rarity[target].sum()  # of the batch's weights, by whose sum the mean divides
                terms["parser"] = F.cross_entropy(logits, target, rarity) * (share / mean(share))
        optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        average_gradients(learning, accelerator.num_processes)
        optimiser.step()
        position.step += 1
        finish_step(stage, config, accelerator, run, position, terms, networks, [optimiser])
    if "parser" in networks:
        networks["parser"].space.learn(seen)
    return networks


def train_variant(
    stage: Stage, config: Config, accelerator: Accelerator, run: Run, position: Position, source: FaceSet
) -> nn.Module:
    """Train the generator against the discriminator, both strategies in every step; returns the generator
    for use."""
    device, processes = accelerator.device, accelerator.num_processes
    torch.manual_seed(stage.seed)
    net = build(config, stage.data, stage.name).to(device, memory_format=torch.channels_last)
    critic = build_critic(config, stage.data, stage.name).to(device, memory_format=torch.channels_last)
    net = as_one(net, device)
    guides = load_guides(config, stage, run.folder, source, device)
    recipe, weights = recipe_of(config, stage.data), weights_of(config, stage.data, stage.name)
    average = copy.deepcopy(net).requires_grad_(False) if config.average else None
    models = {"net": net, "critic": critic} | ({"average": average} if average is not None else {})
    learning = {name: list(models[name].parameters()) for name in ("net", "critic")}
    rates = (recipe.lr, recipe.lr * recipe.critic_lr)
    adam = partial(torch.optim.Adam, betas=config.betas, fused=device.type == "cuda")
    optimisers = [adam(learning[k], rate) for k, rate in zip(("net", "critic"), rates, strict=True)]
    resume(run.folder, position, models, optimisers)
    net.train()
    for part in (*net.children(), critic):  # a step calls the generator's parts, not its forward
        maybe_compile(part, config.compile)

    for batch in progress(faces_loader(stage, config, accelerator, source, position.step), stage.label):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        image, real_image = batch["image"].chunk(2)
        layout, real_layout = batch["layout"].chunk(2)
        group, real_group = batch["group"].chunk(2)
        # Everything random in a step depends on the step alone, so that a resumed run draws the same.
        chance = step_generator(stage.seed, position.step, stream=1)
        torch.manual_seed(int(torch.randint(2**62, (), generator=chance)))
        target = other_groups(group, len(config.limits) + 1, chance)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * schedule(position.step, stage.steps)

        # Generator: reconstruct at the own age; translate to the target age and back.
        critic.requires_grad_(False)
        optimisers[0].zero_grad(set_to_none=True)
        both = position.step >= config.warmup
        terms, made = generator_backward(
            net, critic, guides, image, layout, group, target, weights, both, accelerator.autocast
        )
        average_gradients(learning["net"], processes)
        optimisers[0].step()

        # Discriminator: real faces of their ages, translated ones of their target ages.
        if made.translated is not None and weights.adversarial:
            critic.requires_grad_(True)
            optimisers[1].zero_grad(set_to_none=True)
            real, fakes = (real_image, real_layout, real_group), [(made.translated, layout, target)]
            if weights.adversarial_self:
                fakes.append((made.restored, layout, group))
            wrong = other_groups(real_group, len(config.limits) + 1, chance) if recipe.mismatch else None
            terms["critic"] = discriminator_backward(critic, real, fakes, wrong, accelerator.autocast)
            average_gradients(learning["critic"], processes)
            optimisers[1].step()
        if average is not None:
            follow(average, net, config.average)

        position.step += 1
        if position.step % config.sample_every == 0 or position.step == stage.steps:
            sheet = training_sheet(average or net, image, layout, config)
            run.picture(stage.slug, sheet, f"faces translated to other ages by {stage.label} in training")
            net.train()
        finish_step(stage, config, accelerator, run, position, terms, models, optimisers)
    return net if average is None else average


def schedule(step: int, steps: int) -> float:
    """Of the learning rates: 1 in the first half of a training, then falling linearly to 0."""
    return min(1.0, 2 * (1 - step / steps))


def other_groups(groups: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Groups (B,) -> for each another one, uniform."""
    shift = drawn(partial(torch.randint, 1, count, generator=generator), groups.shape)
    # From pageable memory as well, this does not make the host wait for the device.
    return (groups + shift.to(groups.device, non_blocking=True)) % count


def finish_step(
    stage: Stage,
    config: Config,
    accelerator: Accelerator,
    run: Run,
    position: Position,
    terms: dict[str, Tensor],
    models: dict[str, nn.Module],
    optimisers: list[torch.optim.Optimizer],
) -> None:
    """Add a step's losses to the sums on the device, log their means now and then, save now and then."""
    final = position.step == stage.steps
    position.add(terms)
    if position.step % config.log_every == 0 or final:
        total = sum(s.steps for s in plan(config)[: position.stage]) + position.step
        run.log(total, **position.means(accelerator, stage.label))
    if position.step % config.checkpoint_every == 0 and not final:
        position.optimisers = [optimiser.state_dict() for optimiser in optimisers]
        run.save(models, {"position": position}, {"stage": stage.label, "step": position.step})


def train(config: Config) -> Path:
    """Run all stages of `config`; returns the run folder. Continues a run that was interrupted."""
    stages = plan(config)
    accelerator = start(config)
    # Before there is a folder, which would be the newest run: are all files there, and the right ones?
    opened = (stages[0].data, stages[0].seed)
    source = open_faces(config, stages[0].data, "train", stages[0].seed)
    for data in config.data:
        for name in ("age", "identity", "parser"):
            if getattr(config, f"{name}_weights") is not None:
                load_given(config, data, name)
    run = Run("biphasic_age", config, accelerator.is_main_process)
    position = Position()
    run.load({}, {"position": position})
    about = None
    while position.stage < len(stages):
        stage = stages[position.stage]
        if opened != (stage.data, stage.seed):
            opened = (stage.data, stage.seed)
            source = open_faces(config, stage.data, "train", stage.seed)
        if about != opened and accelerator.is_main_process:
            save_about(source, about_file(run.folder, stage.data))
        about = opened
        arguments = (stage, config, accelerator, run, position, source)
        if stage.name == GUIDES:
            trained = {guide_file(run.folder, stage, k): net for k, net in train_guides(*arguments).items()}
        else:
            trained = {stage_file(run.folder, stage): train_variant(*arguments)}
        if accelerator.is_main_process:
            for path, network in trained.items():
                save_safetensors(path, network)
        accelerator.wait_for_everyone()
        position.next_stage()
        run.save({}, {"position": position}, {"stage": stage.label, "step": stage.steps})
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
