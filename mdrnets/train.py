"""Train the coordinated face inpainting of ShowFace (MDRNets): coarse network and parser, then refinement.

Only the abstract and the opening of the paper were available to us and it has no public code: sizes, weights
and schedule are a reconstruction, and no number of the paper's tables is known. `demo` and `study` (every
variant, two seeds) draw their faces; `paper` is the full size, `table-a` the ablations at that size. Several
GPUs: torchrun --nproc-per-node 8 train.py paper --data-root DIR.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mdrnets import losses
from mdrnets.copytask import copy_task
from mdrnets.data import DataName, Pictures, TrainSet, open_pictures, training_masks
from mdrnets.datasets import Split
from mdrnets.gallery import training_sheet
from mdrnets.masks import Polarity, show_ratio
from mdrnets.memory import Addressing, Routing, Update
from mdrnets.model import Discriminator, MDRNet, Order, SizeName
from mdrnets.objective import (
    FEATURES,
    coarse_losses,
    feature_network,
    needs_features,
    refine_losses,
    unet_losses,
)
from mdrnets.parser import GROUPS, ParserKind, TinyParser
from mdrnets.stages import TABLE_A, VARIANTS, Stage, learn_faces, plan, prepare, stage_file
from mdrnets.writing import ParsedParts, parsing_of, write_memory
from shared.io import Run, load_weights, progress, runs_root, save_safetensors
from shared.loop import Position, average_gradients
from shared.ranges import Count, Decay, Natural, Positive, Share, Weight, Within
from shared.records import write_json
from shared.runtime import (
    LoaderConfig,
    StepBatches,
    maybe_compile,
    run_training,
    start,
    step_generator,
)


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of the data, the networks and their training."""

    data: tuple[DataName, ...] = ("celeba-hq",)
    """Procedural faces, the simpler flat ones, a public set, or any folder of pictures; with several, each
    gets its own networks."""
    data_root: Path | None = None
    """Where a public set or the folder lies."""
    split: Split = "index"
    """CelebA-HQ: by number, or CelebA's official partition."""
    train_list: Path | None = None
    """Text file of training pictures, relative to data_root, instead of the split; together with
    test_list."""
    test_list: Path | None = None
    """The same for testing."""
    image_size: Annotated[int, Within(16)] = 256
    """Side of the pictures in pixels."""
    train_images: Count = 2000
    """Procedural faces for training."""
    test_images: Count = 256
    """Procedural faces for testing."""

    masks: Literal["strokes", "boxes", "files"] = "strokes"
    """Training masks: free-form strokes, rectangles, or files such as NVIDIA's irregular masks."""
    mask_root: Path | None = None
    """Folder of training mask files."""
    test_mask_root: Path | None = None
    """Folder of test mask files; without it test masks are drawn: boxes if `masks` says so, else strokes."""
    mask_polarity: Polarity = "white-hole"
    """Which colour of a mask file means corrupted."""
    mask_ratio: tuple[Share, Share] = (0.1, 0.6)
    """Least and greatest share of corrupted pixels in training masks; 0.1 0.6 is 10 to 60 %."""
    mask_pool: Count | None = None
    """Number of different training masks that are drawn; None: a new one for every sample."""
    flip: bool = True
    """Mirror pictures; mirror and turn masks."""

    size: SizeName = "mdrnet_256"
    """Widths and depths of the networks."""
    parser: ParserKind = "bisenet"
    """`bisenet`: the public parser from --parser-weights; `tiny`: trained here (needs labels)."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser."""
    parser_size: Annotated[int, Within(32)] = 512
    """Side at which the public parser works."""
    part_labels: tyro.conf.Suppress[tyro.conf.Fixed[tuple[tuple[int, ...], ...]]] = tuple(GROUPS.values())
    """Labels of the public parser in each facial part; a run's memory belongs to the parts it was trained
    with."""
    variants: tuple[str, ...] = ("full+inco2",)
    """Refinement networks to train on the same coarse network, by their names in VARIANTS."""
    seeds: Count = 1
    """Everything is trained with so many seeds, beginning with `seed`."""
    unet: bool = False
    """Also train a plain U-Net for as many steps as both networks together, as a baseline."""
    copy_steps: Natural = 0
    """Steps of the copy task with and without MREM; 0 leaves it out."""

    routing: Routing = "soft"
    """Memory reads: blocks mixed by the parsing, or the block of the most probable part."""
    addressing: Addressing = "dense"
    """Weights of slots: softmax, or MemAE's sparse addressing."""
    memory_update: Update = "grad"
    """Memory slots learn by gradient, or are written from clean features."""
    order: Order = "dmm>mrem"
    """Order of the two modules."""
    tau: Positive = 0.1
    """Temperature of both modules."""
    memory_decay: Share = 0.98
    """`ema`: share of a slot that a write keeps."""
    revive_after: Natural = 1000
    """`ema`: a slot unused for more writes than this starts again from a random query of its part."""
    weighted_write: bool = False
    """`ema`: weight positions by their similarity, as MNAD does."""
    write_every: Count = 1
    """`ema`: steps between writes."""
    parsing_cache: bool = True
    """`ema`: keep on disk what the public parser sees in training pictures without labels, for later steps
    and runs."""
    parsing_cache_root: Path | None = None
    """Folder for that; default: runs/mdrnets/parsing-cache."""
    memory_warmup: Natural = 1000
    """`ema`: steps in which the memory is written and not yet read."""

    batch_size: Count = 8
    """Images per step, over all processes."""
    coarse_steps: Count = 100_000
    """Steps of the first stage."""
    refine_steps: Count = 400_000
    """Steps of the second stage."""
    joint_from: Natural | None = 20_000
    """Step of the second stage from which the coarse network learns again; None: never."""
    lr: Positive = 2e-4
    """Learning rate of Adam."""
    lr_last: Positive = 5e-5
    """Learning rate of the last `last_steps` of the second stage."""
    last_steps: Natural = 100_000
    """How many steps those are."""
    betas: tuple[Decay, Decay] = (0.5, 0.999)
    """Adam's moments."""
    lr_ratio: Positive = 0.1
    """Learning rate of the discriminator relative to the generator's."""
    average: Decay = 0.0
    """Decay of an average of the weights that is kept for evaluation; 0: none. 0.999 suits long runs."""

    valid: Weight = 1.0
    """Weight of the loss on kept pixels."""
    hole: Weight = 6.0
    """Weight of the loss on corrupted pixels."""
    perceptual: Weight = 0.05
    """Weight of the perceptual loss."""
    style: Weight = 120.0
    """Weight of the style loss."""
    tv: Weight = 0.1
    """Weight of the total variation."""
    adversarial: Weight = 0.1
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    inter: Weight = 0.1
    """Weight of InCo2's loss between corrupted and kept regions, in `+inco2` variants."""
    intra: Weight = 0.1
    """Weight of InCo2's loss inside the corrupted region."""
    inco_samples: Count | None = 512
    """Cells of each region that InCo2 compares in an image; None: all."""
    inco_form: Literal["similarity", "direct"] = "similarity"
    """InCo2 on similarities between cells, or on each cell's own cosine."""
    parsing: Weight = 0.5
    """Weight of the cross entropy of the tiny parser."""
    features: losses.FeatureKind = "vgg"
    """Frozen network of the perceptual, style and InCo2 losses: VGG-16, the coarse encoder, or a random
    one."""
    vgg_weights: Path | None = None
    """torchvision's vgg16-397923af.pth; without it the library downloads it."""

    log_every: Count = 100
    """Steps between lines of the log."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints."""
    sample_every: Count = 5000
    """Steps between pictures."""


SMALL = Config(
    data=("simple", "faces"), image_size=32, size="tiny", parser="tiny", mask_pool=1000, flip=False,
    coarse_steps=1200, refine_steps=800, joint_from=None, lr=1e-3, lr_last=1e-3, betas=(0.9, 0.999),
    perceptual=0.0, style=0.0, tv=0.0, adversarial=0.0, features="coarse", inco_samples=None,
    revive_after=50, memory_warmup=0, copy_steps=400, unet=True, variants=TABLE_A, log_every=50,
    checkpoint_every=400, sample_every=400,
)  # fmt: skip
PAPER = Config(workers=8)

PRESETS = {
    "demo": SMALL,
    "study": replace(SMALL, variants=tuple(VARIANTS), seeds=2),
    "paper": PAPER,
    "table-a": replace(PAPER, variants=TABLE_A),
}


def parsed_parts(config: Config, accelerator: Accelerator, pictures: Pictures, net: MDRNet) -> ParsedParts:
    """What the parser sees in undamaged pictures, kept on disk if they have no labels to learn it from."""
    folder = config.parsing_cache_root or runs_root() / "mdrnets" / "parsing-cache"
    folder = folder if config.parsing_cache and not pictures.labelled else None
    circumstances = f"{config.parser} at {config.parser_size}, {accelerator.mixed_precision}"
    cells = (config.image_size // net.stride,) * 2
    return ParsedParts(net.parser, pictures, cells, folder, circumstances)


def update(optimiser: torch.optim.Optimizer, loss: Tensor, learning: list[nn.Parameter], processes: int):
    """One step of an optimiser on a loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(learning, processes)
    optimiser.step()


def train_stage(
    stage: Stage, config: Config, accelerator: Accelerator, run: Run, position: Position, pictures: Pictures
) -> nn.Module:
    """Train one stage from where `position` stands; returns the network to keep."""
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    refining = stage.name in VARIANTS
    inco = stage.name.endswith("+inco2") and bool(config.inter or config.intra)
    net = prepare(stage, config, run.folder, len(pictures.parts)).to(device)
    phi = feature_network(config, net) if refining and needs_features(config, inco) else None
    if phi is not None:
        phi = phi.to(device, memory_format=torch.channels_last)
        if accelerator.is_main_process:
            print(f"{stage.label}: features of the losses: {FEATURES[config.features]}")
    critic = Discriminator().to(device) if refining and config.adversarial else None
    average = copy.deepcopy(net).requires_grad_(False) if config.average else None
    models = {"net": net, "critic": critic, "average": average}
    models = {name: model for name, model in models.items() if model is not None}
    joint = refining and config.joint_from is not None
    learning = [p for p in net.parameters() if p.requires_grad]
    learning += list(net.coarse.parameters()) if joint else []
    adam = partial(torch.optim.Adam, betas=config.betas, fused=device.type == "cuda")
    optimisers = [adam(learning, config.lr)]
    optimisers += [adam(critic.parameters(), config.lr * config.lr_ratio)] if critic is not None else []
    if position.step:
        load_weights(run.folder, models)
        for optimiser, saved in zip(optimisers, position.optimisers, strict=True):
            optimiser.load_state_dict(saved)
    for model in models.values():
        maybe_compile(model.to(memory_format=torch.channels_last), config.compile)

    dmm = net.refine.dmm if refining else None
    writes = dmm is not None and dmm.update == "ema"
    parsed = parsed_parts(config, accelerator, pictures, net) if writes else None
    labels = writes or (stage.name == "coarse" and isinstance(net.parser, TinyParser))
    samples = TrainSet(pictures, training_masks(config, stage.seed), stage.seed, config.flip, labels)
    batches = StepBatches(
        len(samples),
        config.batch_size,
        seed=2 * stage.seed + refining,
        steps=stage.steps,
        start_step=position.step,
        rank=rank,
        world=processes,
        draws=True,
    )
    loader = DataLoader(
        samples, batch_sampler=batches, num_workers=config.workers, pin_memory=device.type == "cuda"
    )
    net.train()
    for batch in progress(loader, stage.label):
        which = list(zip(batch.pop("index").tolist(), batch.pop("mirrored").tolist(), strict=True))
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        if accelerator.is_main_process and position.stage == position.step == 0:
            show_ratio(batch["mask"])
        chance = step_generator(stage.seed, position.step, stream=1 + rank)
        last = refining and position.step >= stage.steps - config.last_steps
        for optimiser, factor in zip(optimisers, (1.0, config.lr_ratio), strict=False):
            optimiser.param_groups[0]["lr"] = factor * (config.lr_last if last else config.lr)
        if joint:
            net.coarse.requires_grad_(position.step >= config.joint_from)

        # Generator: all losses at once.
        if critic is not None:
            critic.requires_grad_(False)
        with accelerator.autocast():
            if refining:
                read = not writes or position.step >= config.memory_warmup
                terms, comp = refine_losses(net, batch, config, phi, critic, inco, read, chance)
            elif stage.name == "coarse":
                terms = coarse_losses(net, batch, config)
            else:
                terms = unet_losses(net, batch, config)
        update(optimisers[0], sum(terms.values()), learning, processes)

        # Memory: written from clean features, or only observed.
        if writes and position.step % config.write_every == 0:
            parsing = parsing_of(batch, which, pictures, parsed, accelerator.autocast)
            write_memory(net, batch["image"], parsing, chance, accelerator.autocast)
        if dmm is not None:
            dmm.count_reads()

        # Discriminator: on the detached composite.
        if critic is not None:
            critic.requires_grad_(True)
            with accelerator.autocast():
                real, fake = critic(torch.cat((batch["image"], comp.detach()))).float().chunk(2)
                terms["critic"] = losses.hinge_discriminator(real, fake)
            update(optimisers[1], terms["critic"], list(critic.parameters()), processes)
        if average is not None:
            follow(average, net, config.average)

        position.step += 1
        record(stage, config, accelerator, run, position, terms)
        final = position.step == stage.steps
        if position.step % config.sample_every == 0 or final:
            run.picture(
                stage.slug, training_sheet(net, batch), f"faces completed by {stage.label} in training"
            )
            net.train()
        if position.step % config.checkpoint_every == 0 and not final:
            position.optimisers = [optimiser.state_dict() for optimiser in optimisers]
            run.save(models, {"position": position}, {"stage": stage.label, "step": position.step})
    net = net if average is None else average
    if stage.name == "coarse" and isinstance(net.parser, TinyParser):
        learn_faces(net, samples, device)
    return net


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the average of the weights towards the weights; what is not a number with a fraction is copied."""
    for kept, now in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        kept.lerp_(now, 1 - decay) if kept.is_floating_point() else kept.copy_(now)


def record(
    stage: Stage,
    config: Config,
    accelerator: Accelerator,
    run: Run,
    position: Position,
    terms: dict[str, Tensor],
) -> None:
    """Add a step's losses to the sums on the device; at every `log_every` steps log their means."""
    position.add(terms)
    if position.step % config.log_every == 0 or position.step == stage.steps:
        total = sum(s.steps for s in plan(config)[: position.stage]) + position.step
        run.log(total, **position.means(accelerator, stage.label))


def train(config: Config) -> Path:
    """Run all stages of `config`; returns the run folder. Continues a run that was interrupted."""
    stages = plan(config)
    accelerator = start(config)
    run = Run("mdrnets", config, accelerator.is_main_process)
    position = Position()
    run.load({}, {"position": position})
    pictures, opened = None, None
    while position.stage < len(stages):
        stage = stages[position.stage]
        if opened != (stage.data, stage.seed):
            opened = (stage.data, stage.seed)
            pictures = open_pictures(config, stage.data, "train", stage.seed)
        net = train_stage(stage, config, accelerator, run, position, pictures)
        if accelerator.is_main_process:
            save_safetensors(stage_file(run.folder, stage), net)
        accelerator.wait_for_everyone()
        position.next_stage()
        run.save({}, {"position": position}, {"stage": stage.label, "step": stage.steps})
    record_file = run.folder / "copy_task.json"
    if config.copy_steps and accelerator.is_main_process and not record_file.exists():
        errors = {
            name: copy_task(mrem, config.copy_steps, config.seed, accelerator.device)
            for name, mrem in (("without MREM", False), ("with MREM", True))
        }
        write_json(record_file, errors)
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
