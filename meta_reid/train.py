"""Train META, its ablations and plain baselines for generalizable person re-identification.

`demo` draws its own walkers and needs nothing else, `study` trains every row on them, `demo-vit` a small ViT.
`paper` is Protocol 2 or 3 with three sources (--protocol, --target), `protocol1` the one with four, `vit` is
`paper` with a ViT (--architecture clip-b16: CLIP's), `manifest` your own domains.
The paper's four GPUs: torchrun --nproc-per-node 4 train.py paper --data-root DIR; the same on one GPU:
train.py paper --shares 4 ...
"""

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meta_reid.data import Labels, batches, walker_sources
from meta_reid.figures import training_sheet
from meta_reid.losses import backward, objective, smoothed_cross_entropy, triplet
from meta_reid.model import META
from meta_reid.protocols import (
    file_sources,
    manifest_sources,
    remember_sources,
    remembered_sources,
    source_items,
)
from meta_reid.rows import VARIANTS, Row, plan, run_seeds, start_from_pretrained
from meta_reid.samplers import DomainBatches
from meta_reid.shares import Statistics
from meta_reid.walkers import HEIGHT, WIDTH
from shared.io import Run, progress
from shared.processes import means
from shared.ranges import Count, Natural, Positive, Share, Weight, Within
from shared.runtime import LoaderConfig, UserError, maybe_compile, run_training, start


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of META and of the rows of the result table to train."""

    protocol: Literal["walkers", "1", "2", "3", "manifest"] = "walkers"
    """Which data: drawn walkers, a published protocol, or the user's own domains from a CSV."""
    target: str = "M"
    """Held-out test set of Protocols 2 and 3 (C3, MS or M), or the manifest's held-out domain."""
    data_root: Path | None = None
    """Folder that holds the public sets (Protocols 1 to 3)."""
    manifest: Path | None = None
    """CSV with the columns path, id, camera, domain (protocol `manifest`)."""
    market_background: bool = False
    """Protocols 1 and 3: count Market-1501's background boxes as one more person, as the release does."""

    variants: tuple[str, ...] = ("meta",)
    """Rows to train: meta, no-consistency, no-in (BN for IN), episodic-grad, uniformity; plain networks:
    baseline (BN), baseline-ibn, baseline-in.
    """
    seeds: Count = 1
    """Every row is trained with so many seeds, beginning with `seed`."""
    method: Literal["meta", "plain"] = "meta"
    """META, or one plain network on mixed batches. Variants set it."""
    norm: Literal["bn", "ibn", "in"] = "bn"
    """Norms of the plain network."""
    architecture: Literal[
        "r18", "r34", "r50", "r101", "r152", "mini", "vit-s16", "vit-b16", "clip-b16", "vit-mini"
    ] = "r50"
    """Backbone: a ResNet as in the paper, or a ViT with the experts' layer norms (not in META)."""
    height: Count = 256
    """Image height in pixels."""
    width: Count = 128
    """Image width in pixels."""
    pixels: Literal["backbone", "imagenet", "half", "clip"] = "backbone"
    """Mean and deviation by which pixels are normalised: those of the backbone's pretraining, or by name
    (`imagenet` for DeiT's weights in a ViT).
    """
    pretrained: bool = True
    """Start from ImageNet weights, for `clip-b16` from CLIP's."""
    weights: Path | None = None
    """File with those weights, torchvision's, timm's or open_clip's; default: the library's own download."""

    instance_norm: bool = True
    """IN in the last stage of the global branch; False is the ablation with BN there."""
    scoring: Literal["shared", "separate", "both"] = "shared"
    """Scoring network: one for all experts, one each as released, or both side by side."""
    scoring_relu: bool = False
    """ReLU between the two layers of the scoring networks."""
    consistency: Weight = 1.0
    """Weight of the consistency loss."""
    episodic_grad: bool = False
    """Let the consistency loss reach the shared convolutions through the other experts."""

    uniformity: Weight = 0.0
    """Weight of a uniformity loss on the global branch's feature (not in META)."""

    people: Annotated[int, Within(2)] = 16
    """Identities P in a batch of one share; with a single one no anchor has a negative."""
    images: Count = 4
    """Images of each identity in a batch."""
    shares: Count = 1
    """Batches, each normalised and mined by itself, that a process runs one after another in a step. The
    paper's four GPUs are 4 shares of one process or 1 of each of four.
    """
    epochs: Count = 120
    """Passes over as many images as the sources have."""
    steps: Count | None = None
    """Iterations; instead of `epochs`."""
    lr: Positive = 0.04
    """Base learning rate."""
    final_lr: Weight = 4e-5
    """Learning rate at the end of the cosine."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum as in the paper, or AdamW, which a ViT that starts from nothing needs."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    weight_decay: Weight = 5e-4
    """Weight decay of everything but biases."""
    warmup: Natural = 500
    """Iterations of linear warm-up from a tenth of the rate."""
    freeze: Natural = 500
    """Iterations with frozen shared convolutions and global BN set."""
    clip: Positive | None = None
    """Largest gradient norm; None does not clip."""
    save_every: Count = 1000
    """Iterations between checkpoints."""
    sample_every: Count = 1000
    """Iterations between pictures (`samples/training-*.png`) of what the network makes of training images."""


WALKERS = Config(
    architecture="mini", height=48, width=24, pretrained=False, scoring="both", people=8, steps=200, lr=0.05,
    final_lr=5e-5, warmup=30, freeze=0, save_every=100, sample_every=100, seeds=3,
    variants=("meta", "no-consistency", "no-in", "baseline"),
)  # fmt: skip

PRESETS = {
    "demo": WALKERS,
    "demo-vit": dataclasses.replace(
        WALKERS,
        architecture="vit-mini",
        optimizer="adamw",
        lr=1e-3,
        final_lr=1e-5,
        weight_decay=0.05,
        seeds=1,
    ),
    "study": dataclasses.replace(WALKERS, variants=tuple(VARIANTS)),
    "paper": Config(protocol="2", workers=8),
    "protocol1": Config(protocol="1", workers=8),
    "manifest": Config(protocol="manifest", workers=8),
    "vit": Config(
        protocol="2", architecture="vit-b16", lr=0.008, final_lr=8e-6, weight_decay=1e-4, workers=8
    ),
}


def load_sources(config: Config, seed: int) -> tuple[Dataset, Labels]:
    """Training images and labels of a configuration. Raises UserError when data are missing."""
    size = (config.height, config.width)
    if config.protocol == "walkers":
        if size != (HEIGHT, WIDTH):
            asked = f"--height {config.height} --width {config.width}"
            raise UserError(f"{asked}: walkers are drawn with --height {HEIGHT} --width {WIDTH}")
        return walker_sources(seed)
    if config.protocol == "manifest":
        if config.manifest is None:
            raise UserError("--manifest is missing: a CSV with the columns path, id, camera, domain")
        return manifest_sources(config.manifest, config.target, size, seed)
    if config.data_root is None:
        raise UserError("--data-root is missing: the folder that holds the public sets (see README.md)")
    names, items = source_items(
        int(config.protocol), config.target, config.data_root, config.market_background
    )
    return file_sources(names, items, size, seed)


def trained_on(folder: Path, config: Config) -> tuple[list[str], dict[int, list[int]]]:
    """Names of a run's sources and, by seed, their class counts. The run keeps them: whoever applies it needs
    no training images. A folder that has none of this gets it from the images."""
    known = remembered_sources(folder)
    if known is None:
        labels = {seed: load_sources(config, seed)[1] for seed in run_seeds(config)}
        known = labels[config.seed].names, {seed: found.classes for seed, found in labels.items()}
    return known


def optimiser(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW; no weight decay on names with "bias". Sets without gradient stay still."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["bias" in name].append(parameter)
    split = [{"params": groups[False], "weight_decay": config.weight_decay}]
    split.append({"params": groups[True], "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(split, lr=config.lr)
    return torch.optim.SGD(split, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(step: int, steps: int, per_epoch: int, config: Config) -> float:
    """Linear warm-up per iteration, then the cosine per epoch.

    The warm-up goes from 0.1 of the base rate and stops one iteration short of all of it, as the official
    schedule does; the cosine counts the epochs after the warm-up.
    """
    if step < config.warmup:
        return config.lr * (0.1 + 0.9 * step / config.warmup)
    epochs = math.ceil(steps / per_epoch) - math.ceil(config.warmup / per_epoch)
    epoch = max(step // per_epoch - math.ceil(config.warmup / per_epoch) + 1, 0)
    share = min(epoch / max(epochs, 1), 1.0)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * share)) / 2


def step_back(
    net: nn.Module,
    row: Row,
    labels: Labels,
    images: Tensor,
    index: Tensor,
    warm: bool,
    accelerator: Accelerator,
    shares: int,
) -> dict[str, Tensor]:
    """Forward and backward of one of the shares of a batch; returns the terms of its objective.

    net: the model, wrapped.
    """

    def go_back(loss: Tensor) -> None:
        accelerator.backward(loss / shares)

    config, model = row.config, row.model
    domain = int(labels.domain[index[0]])
    index = index.to(images.device, non_blocking=True)
    union, local = labels.union[index], labels.local[index]
    meta = isinstance(model, META)
    # Several processes exchange their gradients in one backward, and compiled is the network as a whole.
    if meta and accelerator.num_processes == 1 and not config.compile:
        return backward(
            model, images, domain, local, union, config.consistency, config.uniformity, warm,
            accelerator.autocast, go_back,
        )  # fmt: skip
    with accelerator.autocast():
        if meta:
            out = net(images, domain, warm)
            terms = objective(out, local, union, config.consistency, config.uniformity)
        else:
            pooled, logits = net(images)
            terms = {"ce": smoothed_cross_entropy(logits, union), "triplet": triplet(pooled, union)}
    go_back(sum(terms.values()))
    return {name: term.detach() for name, term in terms.items()}


def train_row(
    row: Row,
    data: tuple[Dataset, Labels],
    accelerator: Accelerator,
    run: Run,
    rows: list[Row],
    position: dict[str, int],
    saved: dict | None,
) -> None:
    """META's training of one row: a domain in each iteration plays the unseen one."""
    config, model = row.config, row.model
    images, labels = data
    # The domain of a batch stays on the CPU: it says which part of the network runs.
    labels = dataclasses.replace(
        labels, local=labels.local.to(accelerator.device), union=labels.union.to(accelerator.device)
    )
    model.to(accelerator.device, memory_format=torch.channels_last).train()
    optim = optimiser(model, config)
    if saved is not None:
        optim.load_state_dict(saved)
    else:
        start_from_pretrained(model, config)
    mixed = config.method == "plain"
    shares = config.shares
    batch = config.people * config.images * accelerator.num_processes * shares
    per_epoch = max(len(images) // batch, 1)
    steps = config.epochs * per_epoch if config.steps is None else config.steps
    sampler = DomainBatches(
        labels.union.tolist(),
        [0] * len(images) if mixed else labels.domain.tolist(),
        config.people,
        config.images,
        config.seed,
        steps,
        position["step"],
        accelerator.process_index,
        accelerator.num_processes,
        ["all"] if mixed else labels.names,
        shares,
    )
    loader = DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    net = accelerator.prepare_model(maybe_compile(model, config.compile))
    if isinstance(model, META):  # after the wrapping, which must know every parameter that will learn
        model.set_warm(position["step"] < config.freeze)
    statistics = Statistics(model, shares)
    logged: dict[str, Tensor] = {}
    feed = progress(batches(loader), row.name, len(loader))
    for number, (pixels, index) in enumerate(feed, position["step"] * shares):
        step, share = divmod(number, shares)
        warm, last = step < config.freeze, share == shares - 1
        if share == 0:
            if step == config.freeze and isinstance(model, META):
                model.set_warm(False)
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, steps, per_epoch, config)
            optim.zero_grad(set_to_none=True)
        pixels = pixels.to(accelerator.device, non_blocking=True, memory_format=torch.channels_last).float()
        statistics.begin(share)
        with nullcontext() if last else accelerator.no_sync(net):
            terms = step_back(net, row, labels, pixels, index, warm, accelerator, shares)
        for name, value in terms.items():
            logged[name] = logged.get(name, 0) + value / shares
        if not last:
            continue
        statistics.finish()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optim.step()
        done = step + 1
        if done % 20 == 0 or done == steps:
            count = (done - 1) % 20 + 1
            scalars = means({f"{row.name}/{name}": value / count for name, value in logged.items()})
            run.log(position["row"] * steps + done, **scalars)
            logged.clear()
        if (done % config.sample_every == 0 or done == steps) and accelerator.is_main_process:
            sheet = training_sheet(model, images, labels, accelerator.device)
            run.picture(f"training-{row.name}", sheet)
        if done == steps:
            position.update(row=position["row"] + 1, step=0)
        if done == steps or done % config.save_every == 0:
            position["step"] = 0 if done == steps else done
            models = {other.name: other.model for other in rows}
            run.save(models, {"optimiser": optim}, dict(position))


class Saved:
    """Holds the optimiser's state of a checkpoint until its row is built."""

    def __init__(self) -> None:
        self.state: dict | None = None

    def load_state_dict(self, state: dict) -> None:
        """Keep a state."""
        self.state = state


def train(config: Config) -> Path:
    """Train all rows of `config`; returns the run folder. Continues a run that was interrupted."""
    if config.save_every % 20:
        raise UserError(f"--save-every {config.save_every}: must be a multiple of 20, the logging interval")
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = start(config, kwargs_handlers=[parallel])
    data = {seed: load_sources(config, seed) for seed in run_seeds(config)}
    rows = plan(config, {seed: labels.classes for seed, (_, labels) in data.items()})
    run = Run("meta_reid", config, accelerator.is_main_process)
    saved = Saved()
    models = {row.name: row.model for row in rows}
    position = run.load(models, {"optimiser": saved}) or {"row": 0, "step": 0}
    if accelerator.is_main_process:  # once the checkpoint is known to fit them
        remember_sources(run.folder, {seed: labels for seed, (_, labels) in data.items()})
    while position["row"] < len(rows):
        row = rows[position["row"]]
        state = saved.state if position["step"] else None
        train_row(row, data[row.config.seed], accelerator, run, rows, position, state)
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
