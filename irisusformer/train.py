"""Train IrisUsformer: iris masks and an uncertainty map learned from the prediction's discrepancy.

    python train.py                      # demo: procedural eyes, 2 CPU cores, minutes
    python train.py study                # the whole comparison of the README, over its seeds
    python train.py study-simple         # the same on flat discs and parabolas
    python train.py paper --dataset ubiris --data-root /datasets/ubiris
    python train.py paper --init RUN_OR_FILE --labels 20 --steps 500 --warmup 50 ...   # few labels: fine-tune

A run that was killed continues with the same command.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from irisusformer.data import Augmentation, EyeWorld, IrisFiles, Side
from irisusformer.datasets import Pair, find_pairs
from irisusformer.eyes import LOOKS, Look
from irisusformer.losses import objective
from irisusformer.model import IrisUsformer
from irisusformer.pictures import overview
from shared.io import Run, find_run, load_config, load_safetensors, load_weights, progress
from shared.loop import follow
from shared.processes import as_one, means
from shared.ranges import Count, Natural, Positive, Share, Weight, Within
from shared.runtime import (
    LoaderConfig,
    StepBatches,
    UserError,
    maybe_compile,
    one_opencv_thread,
    run_training,
    seed_everything,
    start,
)

PAPER = "irisusformer"


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of a run; the defaults are the paper-scale ones."""

    dataset: str = "ubiris"
    """eyes or simple (procedural), or a data set of datasets.py: ubiris, miche, casia-distance, folder..."""
    data_root: Path | None = None
    """Folder of the data set (csv: the file)."""
    operator: str = "A"
    """Whose annotation of IRISSEG-EP to take."""
    labels: Count | None = None
    """Use the first so many training images only."""
    init: Path | None = None
    """Begin with the weights of this run folder or .safetensors file."""

    train_images: Count = 300
    """Procedural eyes to train on."""
    test_images: Count = 200
    """Procedural eyes to test on."""
    image_size: tuple[Side, Side] = (64, 64)
    """Height and width of procedural eyes, pixels."""
    looks: tuple[Look, ...] = LOOKS
    """Sensors of the procedural eyes."""

    size: Literal["tiny", "small", "lite", "base"] = "base"
    """Width of the network; base has the paper's 35 % of IrisParseNet's MACs."""
    arch: Literal["irisusformer", "bitrans"] = "irisusformer"
    """bitrans: the second version of the paper."""
    position_sensitive: bool = True
    """False: the plain transformer, whose operations do not know positions."""
    aux_at: Literal["fine", "d2"] = "fine"
    """Where the auxiliary head sits: full resolution, or the quarter-resolution decoder map."""
    mixer: Literal["attention", "conv"] = "attention"
    """conv: depthwise 7x7 convolutions instead of attention."""
    pos_embed: Literal["none", "learned"] = "none"
    """Learned position embeddings, for the plain transformer."""
    boundaries: bool = False
    """Add the pupil and outer-boundary heads."""
    fast_up: bool = False
    """Convolve before up-sampling in the decoder: cheaper, another function."""
    dropout: Annotated[float, Within(0, 0.99)] = 0.0
    """Channel dropout in the decoder, for MC dropout."""

    mode: Literal["learned", "two_head", "free", "ce"] = "learned"
    """What the auxiliary head learns, see losses.py. free knows no weighting, beta and lambda_unc."""
    weighting: Literal["attenuate", "emphasize", "none"] | None = None
    """How uncertainty weighs the segmentation loss. Default: attenuate, in mode ce none."""
    beta: Weight = 1.0
    """Strength of the weighting."""
    lambda_unc: Weight = 0.4
    """Weight of the auxiliary head's own loss."""
    lambda_reg: Weight = 0.0
    """Weight of mean uncertainty (the regulariser of the paper's second version: 0.01)."""
    lambda_d: Weight = 0.1
    """Weight of the discrepancy in mode two_head."""
    lambda_dice: Weight = 0.0
    """Weight of soft Dice."""
    plain_start: Share = 0.1
    """Share of the steps before the weighting begins."""
    annotation: Literal["mask", "noisy", "with_pupil"] = "mask"
    """Which annotation of procedural eyes to learn from."""

    steps: Count = 30_000
    """Training steps."""
    batch_size: Count = 8
    """Images per step, over all processes."""
    crop: Side = 320
    """Side of the training window for data from files."""
    short_side: Side = 960
    """Images from files whose shorter side is longer are shrunk to this, for training and for the network."""
    lr: Positive = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.01
    """Decay of matrices and kernels; norms and biases have none."""
    warmup: Natural = 500
    """Steps of linear warm-up, then polynomial decay of power 0.9 to 0."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    ema: Share = 0.999
    """Decay of the weights' average that is evaluated; 0: the weights themselves."""

    variants: tuple[str, ...] = ("learned",)
    """What to train side by side, on the same batches: keys of VARIANTS."""
    seeds: Count = 1
    """Initialisations of each variant."""
    ensemble: Natural = 1
    """At least so many initialisations of variant ce, the ensemble that uncertainty is compared with."""
    log_every: Count = 20
    """Steps between log lines."""
    save_every: Count = 1000
    """Steps between checkpoints and pictures."""


# Differences from the run's own settings. "learned" is the method.
VARIANTS: dict[str, dict] = {
    "learned": {},
    "ce": {"mode": "ce", "weighting": "none"},
    "plain": {"mode": "ce", "weighting": "none", "position_sensitive": False},
    "plain_pos": {"mode": "ce", "weighting": "none", "position_sensitive": False, "pos_embed": "learned"},
    "conv": {"mixer": "conv"},
    "bitrans": {"arch": "bitrans"},
    "d2": {"aux_at": "d2"},
    "two_head": {"mode": "two_head"},
    "free": {"mode": "free"},
    "dropout": {"dropout": 0.1},
    "regularised": {"lambda_reg": 0.01},
    "learned_noisy": {"annotation": "noisy"},
    "d2_noisy": {"annotation": "noisy", "aux_at": "d2"},
    "emphasize_noisy": {"annotation": "noisy", "weighting": "emphasize"},
    "ce_noisy": {"mode": "ce", "weighting": "none", "annotation": "noisy"},
    "two_head_noisy": {"mode": "two_head", "annotation": "noisy"},
    "two_head_1_noisy": {"mode": "two_head", "lambda_d": 1.0, "annotation": "noisy"},
    "ce_attenuate_noisy": {"mode": "ce", "weighting": "attenuate", "annotation": "noisy"},
    "ce_emphasize_noisy": {"mode": "ce", "weighting": "emphasize", "annotation": "noisy"},
    "free_noisy": {"mode": "free", "annotation": "noisy"},
    "learned_pupil": {"annotation": "with_pupil"},
    "ce_pupil": {"mode": "ce", "weighting": "none", "annotation": "with_pupil"},
}
DEMO = Config(
    dataset="eyes",
    size="tiny",
    steps=400,
    lr=2e-3,
    warmup=20,
    ema=0.0,
    save_every=100,
    variants=("learned", "ce", "plain", "learned_noisy"),
    ensemble=3,
)
PRESETS = {
    "demo": DEMO,
    "study": replace(DEMO, variants=tuple(VARIANTS), seeds=2, save_every=200),
    "study-simple": replace(DEMO, dataset="simple", variants=tuple(VARIANTS), seeds=2, save_every=200),
    "paper": Config(workers=8),
}


SHAPE = ("size", "arch", "position_sensitive", "aux_at", "mixer", "pos_embed", "boundaries", "fast_up")
"""Settings that decide which weights a network has."""


def build(config: Config) -> IrisUsformer:
    """The network that a configuration describes."""
    shape = {name: getattr(config, name) for name in SHAPE}
    return IrisUsformer(mode=config.mode, dropout=config.dropout, **shape)


def variants(config: Config) -> dict[str, Config]:
    """The networks of a run: name -> its configuration; further seeds are called NAME-1, NAME-2..."""
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown or not config.variants:
        raise UserError(f"--variants {' '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    return {
        name if not k else f"{name}-{k}": replace(config, **VARIANTS[name], seed=config.seed + k)
        for name in config.variants
        for k in range(max(config.seeds, config.ensemble) if name == "ce" else config.seeds)
    }


def training_set(config: Config) -> Dataset:
    if config.dataset in ("eyes", "simple"):
        count = config.labels or config.train_images
        return EyeWorld(config.dataset, "train", count, config.image_size, config.looks, config.seed)
    pairs = file_pairs(config, "train")[: config.labels]
    for role, files in (("pupil", "pupil_edge_mask"), ("outer", "iris_edge_mask")):
        if config.boundaries and not any(pair.labels or getattr(pair, role) for pair in pairs):
            raise UserError(
                f"--boundaries: {config.dataset} has no {files} to learn from; add the masks or leave the "
                "option out"
            )
    return IrisFiles(pairs, Augmentation(config.crop, config.seed), config.short_side)


def file_pairs(config: Config, split: str) -> list[Pair]:
    """The pairs of a split, with boundary masks only for networks that have the heads: nothing else uses
    these files, and reading masks takes most of the time."""
    pairs = find_pairs(config.dataset, config.data_root, split, config.operator)
    return pairs if config.boundaries else [replace(pair, pupil=None, outer=None) for pair in pairs]


def loaded(data: Dataset, batches: StepBatches, config: Config) -> DataLoader:
    """Batches by the run's data-loading processes, each with one OpenCV thread: they share the cores."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=one_opencv_thread,
    )


def test_set(config: Config) -> Dataset:
    if config.dataset in ("eyes", "simple"):
        return EyeWorld(
            config.dataset, "test", config.test_images, config.image_size, config.looks, config.seed
        )
    return IrisFiles(file_pairs(config, "test"))


def working_side(config: Config) -> int:
    """Shorter side to which larger images are shrunk for a run's networks: the procedural eyes' own, for
    other data --short-side."""
    return min(config.image_size) if config.dataset in ("eyes", "simple") else config.short_side


def load_init(path: Path, model: nn.Module, name: str, config: Config) -> None:
    """Weights to begin with: a file, or the same (otherwise the first) network of a run folder. UserError
    where that is of another shape than `config` describes."""
    if path.is_file():
        load_safetensors(path, model)
        return
    folder = find_run(PAPER, path)
    named = variants(load_config(folder, Config))
    chosen = name if name in named else next(iter(named))
    pairs = {key: (getattr(named[chosen], key), getattr(config, key)) for key in SHAPE}
    other = [f"{key} {its}, not {ours}" for key, (its, ours) in pairs.items() if its != ours]
    if other:
        raise UserError(f"--init {path}: its network has {', '.join(other)}; train one of the same shape")
    load_weights(folder, {chosen: model})


def learning_rate(config: Config, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    return config.lr * warm * (1 - step / config.steps) ** 0.9


class Learner:
    """One network with its optimiser and the average of its weights."""

    def __init__(self, name: str, config: Config, device: torch.device):
        seed_everything(config.seed)
        self.name, self.config = name, config
        self.model = build(config)
        if config.init:
            load_init(config.init, self.model, name, config)
        self.model = as_one(self.model.to(device, memory_format=torch.channels_last), device)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=0.0, fused=True)

    @property
    def result(self) -> IrisUsformer:
        """The network to evaluate."""
        return self.average if self.average is not None else self.model

    def update(
        self, forward: Callable, batch: dict[str, Tensor], step: int, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """One step through `forward` (the model, perhaps wrapped): weigh, descend, average. Returns the terms
        of the loss and the gradient's norm."""
        c = self.config
        self.model.train()
        weighting = c.weighting or ("none" if c.mode == "ce" else "attenuate")
        weighting = weighting if step >= c.plain_start * c.steps else "none"
        with accelerator.autocast():
            out = forward(batch["image"])
        terms = objective(
            out,
            batch[c.annotation],
            c.mode,
            weighting,
            beta=c.beta,
            lambda_unc=c.lambda_unc,
            lambda_reg=c.lambda_reg,
            lambda_d=c.lambda_d,
            lambda_dice=c.lambda_dice,
            regions=batch["regions"],
        )
        self.optimizer.zero_grad()
        accelerator.backward(terms["loss"])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, step)
        self.optimizer.step()
        if self.average is not None:
            # Early steps count more.
            follow(self.average, self.model, min(c.ema, (step + 1) / (step + 10)))
        return {name: value.detach() for name, value in (*terms.items(), ("norm", norm))}


@torch.no_grad()
def set_tau(model: IrisUsformer, batches: Iterator[Tensor]) -> None:
    """tau: half the 99th percentile of the uncertainty on training images."""
    model.eval()
    values = torch.cat([model.predict(image)["uncertainty"].flatten().cpu() for image in batches])
    model.tau.fill_(0.5 * values.kthvalue(max(1, int(0.99 * len(values)))).values)


def train(config: Config) -> Path:
    """Train every variant of a run side by side and return the run folder.

    Raises UserError for unknown variants and for what is wrong with the data.
    """
    named = variants(config)
    data = training_set(config)
    accelerator = start(config)
    run = Run(PAPER, config, accelerator.is_main_process)
    learners = [Learner(name, c, accelerator.device) for name, c in named.items()]
    models = {learner.name: learner.result for learner in learners}
    objects = {f"{learner.name}-optimizer": learner.optimizer for learner in learners}
    objects |= {f"{learner.name}-model": learner.model for learner in learners if learner.average is not None}
    saved = run.load(models, objects) or {"step": 0}
    forwards = [
        accelerator.prepare_model(maybe_compile(learner.model, config.compile)) for learner in learners
    ]

    sampler = StepBatches(
        len(data),
        config.batch_size,
        config.seed,
        config.steps,
        saved["step"],
        accelerator.process_index,
        accelerator.num_processes,
        draws=True,
    )
    bar = progress(loaded(data, sampler, config), "training", len(sampler))
    for step, batch in enumerate(bar, saved["step"]):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        pairs = zip(learners, forwards, strict=True)
        terms = {
            learner.name: learner.update(forward, batch, step, accelerator) for learner, forward in pairs
        }
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            run.log(
                done, **means({f"{name}/{term}": v for name, t in terms.items() for term, v in t.items()})
            )
        if done % config.save_every == 0 or done == config.steps:
            if done == config.steps:
                for learner in learners:
                    set_tau(learner.result, tau_batches(data, config, accelerator.device))
            first = learners[0].result.eval()
            run.picture(
                f"step-{done:06d}", overview(batch["image"], batch["mask"], first.predict(batch["image"]))
            )
            run.save(models, objects, {"step": done})
    run.close()
    return run.folder


def tau_batches(data: Dataset, config: Config, device: torch.device) -> Iterator[Tensor]:
    """Images of up to 32 training batches, the same whatever was trained before."""
    for batch in loaded(data, StepBatches(len(data), config.batch_size, config.seed, 32, draws=True), config):
        yield batch["image"].to(device, memory_format=torch.channels_last)


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
