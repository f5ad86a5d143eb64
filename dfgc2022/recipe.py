"""Pieces of the training recipes: crops and batches, start weights, optimiser, schedule, adversarial
fakes.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from dfgc2022.data import CropFolder, CropFolders, Middle, read_list
from dfgc2022.datasets import dfdc_crops
from dfgc2022.extract import extract_all
from dfgc2022.model import Detector, fake_probability, load_detector_state, load_imagenet
from dfgc2022.pipeline import normalise, per_channel
from dfgc2022.video import list_videos
from dfgc2022.world import build_world
from shared.io import runs_root
from shared.processes import gathered, mean, rank, world
from shared.runtime import REPOSITORY, StepBatches, UserError, one_opencv_thread
from shared.weights import load_torch

if TYPE_CHECKING:
    from dfgc2022.train import Config


FORBIDDEN = re.compile(r"dfgc-?2022|detection dataset|result clips|resource clips", re.IGNORECASE)


def of_the_contest(folder: Path) -> bool:
    """Whether a path looks like one into the contest's own clips. This project's folders, which are called
    dfgc2022 as well, are no sign of it.
    """
    path = folder.resolve()
    for own in (runs_root() / "dfgc2022", REPOSITORY / "dfgc2022", REPOSITORY):
        if path.is_relative_to(own.resolve()):
            path = path.relative_to(own.resolve())
            break
    return FORBIDDEN.search(str(path)) is not None


def training_folders(config: "Config", world: Path) -> list[CropFolder]:
    """Crop folders of a member, in the order of its lists."""
    lists = config.lists or (() if config.dfdc else (world / "crops" / f"{config.train_creators}.txt",))
    parts = [read_list(path) for path in lists] + ([dfdc_crops(config.dfdc)] if config.dfdc else [])
    empty = sum(count for _, count in parts)
    if empty:
        print(f"warning: {empty} folders without crops are left out")
    folders = [folder for found, _ in parts for folder in found]
    if config.competition_rules:
        for folder in folders:
            if of_the_contest(folder.folder):
                raise UserError(
                    f"--competition-rules: {folder.folder} looks like a clip of the contest itself"
                )
    if len({folder.label for folder in folders}) < 2:
        raise UserError("training needs real and fake videos; the lists hold only one of them")
    return folders


def prepare_world(folder: Path, config: "Config") -> None:
    """Draw the embedded contest into a folder and cut the training crops out of its videos."""
    build_world(folder, config.seed, config.world)
    crops = folder / "crops"
    if not (crops / "single.txt").exists():
        videos = [(path, None) for path in list_videos(folder / "Train")]
        notes = extract_all(
            videos, crops, str(folder / "boxes.csv"), config.world.every, workers=config.workers
        )
        if notes:
            raise RuntimeError(f"the embedded contest holds a bad video: {notes[0]}")
        for name in ("diverse", "single"):
            (crops / f"{name}.txt").write_text((folder / "Train" / f"{name}.txt").read_text())


def training_loader(
    config: "Config",
    folders: list[CropFolder],
    size: int,
    seed: int,
    steps: int,
    first: int,
    accelerator: Accelerator,
) -> DataLoader:
    """Batches of (crops (B, S, S, 3) uint8, labels (B,)) from iteration `first` on."""
    dataset = CropFolders(
        folders,
        size,
        seed,
        flips_only=config.augment == "flips",
        blending=config.blending,
        cache=bool(config.members),
        frames=config.frames_per_video,
        balance=config.balance,
        shuffle_labels=config.shuffle_labels,
    )
    batches = StepBatches(
        len(dataset),
        config.batch_size,
        seed,
        steps,
        first,
        accelerator.process_index,
        accelerator.num_processes,
        draws=True,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=config.workers > 0,
        generator=torch.Generator().manual_seed(seed),  # otherwise it draws from the global one
        multiprocessing_context="spawn" if config.workers else None,  # OpenCV's threads do not survive a fork
        worker_init_fn=one_opencv_thread,
    )


def build(config: "Config", entry: Detector) -> nn.Module:
    """A fresh detector with the weights that training starts from. Raises UserError on a --size that it does
    not take.
    """
    network = entry.at(config.size, num_classes=config.classes)
    if config.init == "imagenet":
        load_imagenet(network, config.detector, config.imagenet)
    elif config.init != "none":
        load_detector_state(network, load_torch(config.init), config.init)
    if config.grad_checkpointing:
        if not hasattr(network, "set_grad_checkpointing"):
            raise UserError(f"--grad-checkpointing: {config.detector} does not support it")
        network.set_grad_checkpointing()
    return network


def build_optimizer(config: "Config", network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters, fused on CUDA."""
    fused = next(network.parameters()).is_cuda
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=fused
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(network.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)


def build_schedule(
    config: "Config", optimizer: torch.optim.Optimizer, steps: int, epoch_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate per iteration; the count never restarts with an epoch."""
    if config.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps)
    if config.schedule == "decay":
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.decay ** (step // config.decay_steps)
        )
    # The baseline steps its schedule before an epoch trains, so that epoch 0 counts already.
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: config.decay ** ((step // epoch_steps + 1) // config.decay_steps)
    )


def add_adversarial(
    network: nn.Module, images: Tensor, labels: Tensor, config: "Config", entry: Detector
) -> tuple[Tensor, Tensor]:
    """Turn the first `adversarial` share of the fakes into class 2: one signed gradient step of `epsilon`/255
    towards "real" (FGSM). The share is of the fakes of all processes."""
    fakes = torch.nonzero(gathered(labels) == 1)[:, 0]
    chosen = fakes[: round(len(fakes) * config.adversarial)]
    here = chosen - rank() * len(labels)
    here = here[(here >= 0) & (here < len(labels))]
    # Batch norm over all processes waits for each of them, also for one without such a fake.
    waited_for = any(isinstance(module, _BatchNorm) for module in network.modules())
    if len(chosen if waited_for else here) == 0:
        return images, labels
    attacked = images[here].detach().requires_grad_()
    towards = nn.functional.cross_entropy(network(attacked), torch.zeros_like(labels[here]), reduction="sum")
    (gradient,) = torch.autograd.grad(towards, attacked)
    std = per_channel(entry.normalise[1], images.device)
    images, labels = images.clone(), labels.clone()
    images[here] = attacked.detach() - gradient.sign() * config.epsilon / 255 / std
    labels[here] = 2
    return images, labels


def validation_loader(
    config: "Config", held_out: list[CropFolder], size: int, device: torch.device
) -> DataLoader:
    """Batches of (crops, labels) of this process's share of the held-out videos, in their order."""
    return DataLoader(
        Middle(held_out[rank() :: world()], size),
        batch_size=64,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
        generator=torch.Generator(),  # training's random numbers are not for it
        multiprocessing_context="spawn" if config.workers else None,
        worker_init_fn=one_opencv_thread,
    )


@torch.no_grad()
def validation_loss(
    network: nn.Module, loader: DataLoader, entry: Detector, accelerator: Accelerator
) -> float:
    """Mean log loss of the probability of fake over the held-out videos of all processes, in the precision
    of the training.
    """
    network.eval()
    sums = torch.zeros(2, device=accelerator.device)
    for crops, labels in loader:
        images = normalise(crops.to(accelerator.device, non_blocking=True), entry)
        with accelerator.autocast():
            logits = network(images.contiguous(memory_format=torch.channels_last))
        p = fake_probability(logits).clamp(1e-6, 1 - 1e-6)
        true = labels.to(accelerator.device, non_blocking=True).float()
        loss = nn.functional.binary_cross_entropy(p, true, reduction="sum")
        sums += torch.stack([loss, loss.new_tensor(len(true))])
    network.train()
    loss, count = mean(sums).tolist()
    return loss / count


def split_people(
    folders: list[CropFolder], share: float, seed: int
) -> tuple[list[CropFolder], list[CropFolder]]:
    """(training, validation) folders without a common person; where a set does not name people, the first
    part of a folder's name does. Videos of people of both sides are in neither, which a warning says.

    Raises UserError when that leaves one side empty, or only real or only fake videos to train on.
    """
    shown = [set(f.people or re.split(r"[-_.]", f.folder.name)[:1]) for f in folders]
    # Whoever shares a video is held out together: of FaceForensics++'s pairs nothing is lost.
    pairs = {tuple(sorted(people)) for people in shown if len(people) > 1}
    everyone, paired = set().union(*shown), set().union(*pairs)
    together, held_out = sorted(pairs | {(person,) for person in everyone - paired}), set()
    for number in np.random.default_rng((seed, 1)).permutation(len(together)):
        if len(held_out) >= round(share * len(everyone)):
            break
        held_out.update(together[number])
    kept = [f for f, people in zip(folders, shown, strict=True) if not people & held_out]
    validation = [f for f, people in zip(folders, shown, strict=True) if people <= held_out]
    if not validation or len({folder.label for folder in kept}) < 2:
        raise UserError(
            f"--val-share {share}: {len(everyone)} people cannot be divided so; give another share"
        )
    lost = len(folders) - len(kept) - len(validation)
    if lost:
        print(f"warning: --val-share: {lost} videos show people of both sides and are left out")
    return kept, validation
