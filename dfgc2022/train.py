"""Train detectors of the DeepFake Game Competition 2022.

A preset names the members to train. `demo` draws its own contest (people, creators of fakes, video files),
cuts the faces out through the pipeline and trains two teams of three: on diverse fakes and on a single
method; `study` trains every member. `paper` and `paper-swin` are the winner's recipes, `xception21` and
`winner21` those of the 2021 baseline and winner, all to be started with --lists. Several GPUs: torchrun
--nproc-per-node 4 train.py paper --lists ...
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from dfgc2022.data import CropFolder
from dfgc2022.losses import LOSSES
from dfgc2022.model import Detector, detector
from dfgc2022.pipeline import normalise
from dfgc2022.recipe import (
    add_adversarial,
    build,
    build_optimizer,
    build_schedule,
    prepare_world,
    split_people,
    training_folders,
    training_loader,
    validation_loader,
    validation_loss,
)
from dfgc2022.world import Size
from shared.io import Run, image_grid, load_safetensors, progress, save_safetensors
from shared.loop import Standing
from shared.processes import as_one, means
from shared.ranges import Count, Natural, Positive, Share, Weight, Within
from shared.runtime import (
    LoaderConfig,
    UserError,
    maybe_compile,
    run_training,
    seed_everything,
    start,
)

CX, SWIN = {"detector": "convnext_micro"}, {"detector": "swin_micro", "lr": 1e-3}
MEMBERS: dict[str, dict] = {
    "diverse-swin": {**SWIN, "train_creators": "diverse"},
    "diverse-convnext-0": {**CX, "train_creators": "diverse"},
    "diverse-convnext-1": {**CX, "train_creators": "diverse", "member_seed": 1},
    "single-swin": {**SWIN, "train_creators": "single"},
    "single-convnext-0": {**CX, "train_creators": "single"},
    "single-convnext-1": {**CX, "train_creators": "single", "member_seed": 1},
    "shuffled": {**CX, "train_creators": "diverse", "shuffle_labels": True},
    "augmented": {**CX, "train_creators": "diverse", "augment": "winner"},
    "one-frame": {**CX, "train_creators": "diverse", "frames_per_video": 1},
    "blended": {**CX, "train_creators": "diverse", "blending": 0.3},
    "three-class": {**CX, "train_creators": "diverse", "classes": 3, "adversarial": 0.75, "balance": True},
}
"""Member of the embedded contest -> what it changes in the configuration. Teams keep the winner's order."""
TEAMS = {
    name: tuple(f"{name}-{part}" for part in ("swin", "convnext-0", "convnext-1"))
    for name in ("diverse", "single")
}


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of a contest's detectors and their training."""

    lists: tuple[Path, ...] = ()
    """List files of crop folders, `<folder> <0 or 1>`. Without any, and without DFDC, the embedded
    contest.
    """
    dfdc: Path | None = None
    """DFDC crops: folder of dfdc_train_part_0 ... 49 with metadata.json."""
    world: Size = Size()
    """Size of the embedded contest."""
    members: tuple[str, ...] = ()
    """Members of the embedded contest to train, by their names in MEMBERS, which set some of the fields below
    themselves. None: one detector, `detector`, with the fields as they are.
    """
    train_creators: Literal["diverse", "single"] = "diverse"
    """Embedded contest: fakes of three creators, or of one. The members' names say theirs."""

    detector: str = "convnext_xlarge_384_in22ft1k"
    """Detector to train: a name of model.DETECTORS, or timm/NAME."""
    size: Count | None = None
    """Side of the input. None: the detector's own."""
    classes: Literal[1, 2, 3] = 2
    """Logits: 1 (fake), 2 (real, fake) or 3 (real, fake, adversarial fake)."""
    init: str = "imagenet"
    """Weights to start from: imagenet, none, or the path of a detector's weights."""
    imagenet: Path | None = None
    """File of the ImageNet weights; without it timm downloads them."""
    grad_checkpointing: bool = False
    """Compute activations twice to save memory (timm's networks)."""
    member_seed: Natural = 0
    """Added to the seed for initialisation and order."""

    augment: Literal["winner", "flips"] = "winner"
    """Flip, noise and blur with the winner's probabilities, or flips alone."""
    frames_per_video: Count | None = None
    """Use so many evenly spaced crops of each video; None: all."""
    samples_per_video: Count = 1
    """Samples that an epoch draws from each video."""
    balance: bool = False
    """Draw real and fake with equal chance instead of every video in turn."""
    blending: Share = 0.0
    """Share of real crops that are turned into self-blended fakes. The contest forbids it."""
    adversarial: Share = 0.0
    """Share of fakes that get adversarial noise against the detector itself, class 2 of three classes."""
    epsilon: Weight = 4.0
    """Largest change of a pixel by adversarial noise, of 255."""
    shuffle_labels: bool = False
    """Control: labels in random order."""
    competition_rules: bool = False
    """Refuse what the contest forbade: blending augmentation, and its own clips as training data."""

    loss: Literal["cross_entropy", "binary_cross_entropy", "smoothed"] = "cross_entropy"
    """Objective; `smoothed`: label smoothing 0.05."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimiser; SGD has momentum 0.9."""
    lr: Positive = 5e-5
    """Learning rate (one-cycle: its largest)."""
    weight_decay: Weight = 0.01
    """Weight decay, on all parameters."""
    schedule: Literal["decay", "epochs", "onecycle"] = "decay"
    """decay: x decay every decay_steps iterations. epochs: x decay every decay_steps epochs, stepped before
    each epoch. onecycle: PyTorch's default shape.
    """
    decay: Positive = 0.9
    """Factor of the schedule."""
    decay_steps: Count = 10_000
    """Iterations (or epochs) between two factors."""
    batch_size: Count = 96
    """Batch of all processes together."""
    epochs: Count = 50
    """Passes over the training videos, when steps is not given."""
    steps: Count | None = None
    """Iterations; None: from epochs."""
    keep_every: Natural = 10
    """Keep the weights of every epoch whose index is divisible by this. 0: only the last."""
    val_share: Annotated[float, Within(0, 0.9)] = 0.0
    """Share of the people held out for validation, as the public sets name them; in other lists the first
    part of a folder's name does.
    """
    val_every: Count = 500
    """Iterations between validations; the weights with the lowest validation loss become the member's."""
    log_every: Count = 50
    """Iterations between log lines."""
    checkpoint_every: Count = 250
    """Iterations between checkpoints."""


SMALL = {
    "init": "none", "augment": "flips", "schedule": "onecycle", "lr": 2e-3, "batch_size": 32, "steps": 700,
    "keep_every": 0,
}  # fmt: skip
PRESETS = {
    "demo": Config(members=(*TEAMS["diverse"], *TEAMS["single"], "shuffled"), **SMALL),
    "study": Config(members=tuple(MEMBERS), **SMALL),
    "paper": Config(),
    "paper-swin": Config(
        detector="swin_large_patch4_window12_384_in22k", batch_size=24, epochs=60, decay_steps=30_000,
        keep_every=20
    ),
    "xception21": Config(
        detector="xception_dfgc21_baseline", classes=1, loss="binary_cross_entropy", optimizer="adam",
        lr=1e-4, weight_decay=1e-3, schedule="epochs", decay=0.5, decay_steps=2, batch_size=32, epochs=5,
        frames_per_video=10, samples_per_video=10, balance=True, augment="flips", val_share=0.2,
        keep_every=0,
    ),
    "winner21": Config(
        detector="timm/efficientnet_b3", size=300, classes=3, loss="smoothed", optimizer="sgd", lr=1e-3,
        weight_decay=0.0, schedule="epochs", decay=0.9, decay_steps=2, batch_size=8, epochs=85, balance=True,
        adversarial=0.75, blending=0.5, keep_every=10,
    ),
}  # fmt: skip


def plan(config: Config) -> list[tuple[str, Config]]:
    """Members of a run and their settings, in order. UserError for an unknown one or broken rules."""
    unknown = sorted(set(config.members) - MEMBERS.keys())
    if unknown:
        raise UserError(f"unknown member {unknown[0]!r}; there are {', '.join(MEMBERS)}")
    if config.members and (config.lists or config.dfdc):
        raise UserError(
            "members belong to the embedded contest; leave --members empty to train on your lists"
        )
    members = [(name, dataclasses.replace(config, **MEMBERS[name])) for name in config.members]
    members = members or [(config.detector.replace("/", "-"), config)]
    for _, member in members:
        if member.competition_rules and member.blending:
            raise UserError("--competition-rules: blending augmentation was forbidden; set --blending 0")
        if member.adversarial and member.classes != 3:
            raise UserError("--adversarial needs --classes 3")
        if (member.loss == "binary_cross_entropy") != (member.classes == 1):
            raise UserError("--loss binary_cross_entropy and --classes 1 belong together")
    return members


def require_effect(config: Config) -> None:
    """Raises UserError on a setting that a member sets otherwise, which would have no effect, and on a recipe
    of the paper's scale without data.
    """
    given = PRESETS.get(config.preset, Config())
    for name in config.members:
        for field, value in MEMBERS[name].items() if name in MEMBERS else ():
            if getattr(config, field) not in (getattr(given, field), value):
                raise UserError(
                    f"--{field.replace('_', '-')}: {name} sets it to {value}; choose other --members, or "
                    "none, which trains one --detector"
                )
    needs_lists = config.preset not in ("demo", "study", "custom")
    if needs_lists and not (config.members or config.lists or config.dfdc):
        raise UserError(
            f"{config.preset} trains on public sets: give --lists (extract.py writes them) or --dfdc; the "
            "README has where to get them, `train.py demo` has data of its own"
        )


class Position(Standing):
    """Where a run stands, for its checkpoint: the member in training, its step and all that it needs to go
    on.
    """

    def __init__(self) -> None:
        self.member = 0
        self.step = 0
        self.best = float("inf")
        self.state: dict | None = None

    def next_member(self) -> None:
        self.member, self.step, self.best, self.state = self.member + 1, 0, float("inf"), None


def member_path(folder: Path, name: str) -> Path:
    """Weights of a member in a run folder."""
    return folder / "members" / f"{name}.safetensors"


def train(config: Config) -> Path:
    """Train all members of `config`; returns the run folder. Continues a run that was interrupted."""
    require_effect(config)
    members = plan(config)
    accelerator = start(config)
    run = Run("dfgc2022", config, accelerator.is_main_process)
    world = run.folder / "world"
    if not config.lists and not config.dfdc and accelerator.is_main_process:
        prepare_world(world, config)
    accelerator.wait_for_everyone()
    position = Position()
    run.load({}, {"position": position})
    offset = 0
    for number, (name, settings) in enumerate(members):
        folders = training_folders(settings, world)
        if number >= position.member:
            train_member(name, settings, folders, run, accelerator, position, offset)
        offset += total_steps(settings, len(folders))[0]
    run.close()
    return run.folder


def load_members(folder: Path, config: Config) -> dict[str, tuple[nn.Module, Detector, int]]:
    """Trained members of a run: name -> (network, its list entry, side of its input), those kept at an
    epoch too.

    Raises UserError when training has not finished.
    """
    found = {}
    for name, settings in plan(config):
        entry = detector(settings.detector)
        epochs = sorted(member_path(folder, name).parent.glob(f"{name}-epoch*.safetensors"))
        if not member_path(folder, name).exists():
            raise UserError(f"{folder}: {name} is not trained yet; run the same train.py command again")
        for path in (member_path(folder, name), *epochs):
            network = entry.sized(settings.size, num_classes=settings.classes)
            load_safetensors(path, network)
            found[path.stem] = (network, entry, settings.size or entry.size)
    return found


def total_steps(config: Config, videos: int) -> tuple[int, int]:
    """(iterations of a training, iterations of an epoch); incomplete batches do not count."""
    per_epoch = max(1, videos * config.samples_per_video // config.batch_size)
    return config.steps or config.epochs * per_epoch, per_epoch


def train_member(
    name: str,
    config: Config,
    folders: list[CropFolder],
    run: Run,
    accelerator: Accelerator,
    position: Position,
    offset: int,
) -> None:
    """Train one detector from where `position` stands to its end, and write its weights."""
    entry = detector(config.detector)
    size, seed, device = config.size or entry.size, config.seed * 100 + config.member_seed, accelerator.device
    held_out: list[CropFolder] = []
    if config.val_share:
        folders, held_out = split_people(folders, config.val_share, config.seed)
    steps, epoch_steps = total_steps(config, len(folders))
    if position.state is None:
        seed_everything(seed)
    # A resumed run must not spend random numbers on weights that are loaded anyway.
    with torch.random.fork_rng(devices=[], enabled=position.state is not None):
        network = build(config if position.state is None else dataclasses.replace(config, init="none"), entry)
    network = as_one(network.to(device, memory_format=torch.channels_last), device)
    optimizer = build_optimizer(config, network)
    schedule = build_schedule(config, optimizer, steps, epoch_steps)
    if position.state is not None:
        network.load_state_dict(position.state["network"])
        optimizer.load_state_dict(position.state["optimizer"])
        schedule.load_state_dict(position.state["schedule"])
    model, optimizer = accelerator.prepare(maybe_compile(network, config.compile), optimizer)
    loader = training_loader(config, folders, size, seed, steps, position.step, accelerator)
    validation = validation_loader(config, held_out, size, device) if held_out else None
    total, loss_of = torch.zeros((), device=device), LOSSES[config.loss]
    if position.state is not None:
        total += position.state["total"]
    model.train()
    bar = progress(loader, name, len(loader))
    for step, (crops, labels) in enumerate(bar, position.step + 1):
        labels = labels.to(device, non_blocking=True)
        images = normalise(crops.to(device, non_blocking=True), entry)
        images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            if config.adversarial:
                images, labels = add_adversarial(network, images, labels, config, entry)
            loss = loss_of(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % config.log_every == 0:
            values = means({f"{name}/loss": total / config.log_every})
            run.log(offset + step, **values, **{f"{name}/lr": schedule.get_last_lr()[0]})
            total.zero_()
        if step == config.log_every and accelerator.is_main_process:
            run.picture(f"batch-{name}", image_grid(crops[:32].permute(0, 3, 1, 2) / 255, 8))
        if validation is not None and step % config.val_every == 0:
            _validate(name, network, validation, entry, run, offset + step, position, accelerator)
        epoch, rest = divmod(step, epoch_steps)
        if rest == 0 and config.keep_every and (epoch - 1) % config.keep_every == 0 and run.is_main:
            save_safetensors(member_path(run.folder, f"{name}-epoch{epoch - 1}"), network)
        if step % config.checkpoint_every == 0 and step < steps:
            position.step = step
            position.state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "total": means({"total": total})["total"],  # each process goes on from the mean
            }
            run.save({}, {"position": position}, {"member": name, "step": step})
    if run.is_main and position.best == float("inf"):
        save_safetensors(member_path(run.folder, name), network)
    position.next_member()
    run.save({}, {"position": position}, {"member": name, "step": steps})


def _validate(
    name: str,
    network: nn.Module,
    held_out: DataLoader,
    entry: Detector,
    run: Run,
    step: int,
    position: Position,
    accelerator: Accelerator,
) -> None:
    loss = validation_loss(network, held_out, entry, accelerator)
    run.log(step, **{f"{name}/validation_loss": loss})
    if loss < position.best:
        position.best = loss
        if run.is_main:
            save_safetensors(member_path(run.folder, name), network)


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
