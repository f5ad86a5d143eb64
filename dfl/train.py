"""Train Disentangled Federated Learning, its baselines and its ablations.

A preset names the federation and the trials (rows of the result table) to run on it. `demo` needs nothing
but scikit-learn's handwritten digits; `study` runs every trial on them; the others are called after their
data. Several processes: torchrun --nproc-per-node 2 train.py demo.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dfl.baselines import build_method
from dfl.data import contact_sheet, load_data
from dfl.federation import Federation, evaluate
from dfl.trials import CLAIMS, TRIALS, plan, save_trial
from shared.io import Run, foreign_state, progress
from shared.loop import Standing
from shared.ranges import Count, Natural, Part, Positive, Share, Weight, Within
from shared.runtime import LoaderConfig, UserError, run_training, start


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of a federation, of DFL and of the trials to run."""

    data: Literal["digits", "mnist", "digits5", "office", "domainnet", "pacs", "folder"] = "digits"
    """Base of the federation: skewed digits (scikit-learn's or MNIST), a public multi-domain set, or a
    folder."""
    data_root: Path | None = None
    """Where the data lie. `mnist` also looks into $PAPERS_DATA/mnist; `digits` needs nothing."""
    hold_out: str | None = None
    """Domain that no client gets and that is tested as the unseen one (multi-domain sets)."""
    style: Literal["coloured", "rotated", "inverted", "textured", "corrupted"] = "coloured"
    """What the attribute of a skewed digit is."""
    rho: Share = 0.9
    """Share of the samples whose attribute follows the client's own rule (skewed digits)."""
    strength: Share = 0.8
    """How visible the attribute is, 0 to 1 (skewed digits)."""
    noise: Weight = 0.2
    """Standard deviation of the pixel noise (skewed digits)."""
    clients: Count = 8
    """Clients of a federation of skewed digits."""
    per_client: Count = 150
    """Training images of each (skewed digits)."""
    test_images: Count = 597
    """Digits kept for testing (skewed digits)."""
    digit_parts: Annotated[int, Within(1, 10)] = 1
    """How many of the ten training parts of each Digits-5 set a client has."""
    image_size: Count = 256
    """Side to which photographs are resized (office, domainnet, pacs, folder)."""

    method: tyro.conf.Suppress[
        tyro.conf.Fixed[
            Literal[
                "dfl",
                "local",
                "fedavg",
                "fedprox",
                "fedbn",
                "fedper",
                "fedrep",
                "scaffold",
                "moon",
                "ditto",
                "fedproto",
            ]
        ]
    ] = "dfl"
    """Federated method. Only trials set it: with another one the row "dfl" would not be DFL."""
    trials: tuple[str, ...] = ("dfl",)
    """Rows of the result table to run, by their names in TRIALS (trials.py)."""
    seeds: Count = 1
    """Every trial runs with so many seeds, beginning with `seed`."""
    sweep: tuple[Share, ...] = ()
    """Values of rho at which `sweep_trials` run as well, with the first seed."""
    fractions: tuple[Part, ...] = ()
    """Shares of participating clients at which `sweep_trials` run as well, with the first seed."""
    sweep_trials: tuple[str, ...] = ("dfl", "fedavg", "fedavg-wide")
    """Trials of the sweeps over rho and over the share of participants."""

    backbone: Literal["mlp", "digit_cnn", "alexnet_bn", "resnet18", "resnet18_cifar"] = "mlp"
    """Architecture of each extractor."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation layers of the backbone (mlp has none). Clients with `batch` cannot be vectorised."""
    widths: tuple[Count, Count] = (64, 32)
    """Hidden widths of `mlp`."""
    wide: bool = False
    """Single-branch methods: double the widths of `mlp`, for about as many parameters as DFL."""
    init: Path | None = None
    """State dict from which all extractors start, e.g. torchvision's resnet18 file."""

    rounds: Count = 20
    """Communication rounds R."""
    fraction: Part = 1.0
    """Share of the clients that take part in a round."""
    local_epochs: Count = 1
    """Epochs per stage. Methods without the two stages do twice as many."""
    batch_size: Annotated[int, Within(2)] = 20
    """Batch of a client, two images at least for negative pairs; the last incomplete one of an epoch is
    dropped."""
    lr: Positive = 0.05
    """Learning rate of SGD; the optimiser is new in each stage."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    clip: Positive = 5.0
    """Largest gradient norm of a client's update."""
    critic_optimiser: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the critics (SGD without momentum)."""
    critic_lr: Positive = 0.1
    """Learning rate of the critics."""
    weighting: Literal["samples", "uniform"] = "samples"
    """Weights of the average: by number of training images, or all equal."""
    mu: tyro.conf.Suppress[tyro.conf.Fixed[float]] = 0.1
    """Weight of the extra term of fedprox, moon, ditto and fedproto. Their trials set it."""

    mi: Literal["jsd", "club", "none"] = "jsd"
    """Estimator of the mutual information between z_s and z_c; none trains without both MI terms."""
    lambda_min: Weight = 0.1
    """Weight of L_min, the information shared by z_s and z_c."""
    lambda_max: Weight = 0.1
    """Weight of L_max, the information shared by z_c and the global z_g."""
    lambda_div: Weight = 0.3
    """Weight of L_div, the diversity transferring."""
    pairing: Literal["same", "shuffle"] = "same"
    """L_div: a lent extractor reads the sample itself, or another sample of the batch."""
    source: Literal["models", "prototypes", "none"] = "models"
    """What clients lend: their specific extractor, its class means, or nothing."""
    lend_half: bool = False
    """Lend in 16 bits."""
    lend_every: Count = 1
    """Lend in every so many rounds."""
    bank_per_round: Natural | None = 2
    """Largest number of lent extractors that a client receives in a round; None for all."""
    share_head: bool = True
    """Average the head with the invariant extractor. False is the literal reading of the paper's Figure 2."""
    aggregate: Literal["invariant", "invariant_bnlocal", "all", "none"] = "invariant"
    """What is averaged: E_c, E_c without its normalisation layers, both branches, or nothing."""
    schedule: Literal["alternate", "joint", "joint_once"] = "alternate"
    """Stage S then stage C; or all parameters at once, in as many passes over the data (joint: each extractor
    moves twice as often) or in half as many (joint_once: as often)."""

    engine: Literal["auto", "vectorised", "sequential", "flower"] = "auto"
    """How clients run: stacked under vmap, one by one, or as a Flower simulation. auto: stacked if
    possible."""
    min_clients: Count = 1
    """Fewest answers with which a round counts."""
    dropout: Share = 0.0
    """Probability that a client vanishes in a round (simulated)."""
    checkpoint_every: Count = 10
    """Rounds between checkpoints."""


TOY = {"seeds": 3, "bank_per_round": None, "weighting": "uniform"}
CNN = {
    "backbone": "digit_cnn", "rounds": 100, "batch_size": 32, "lr": 0.01, "critic_optimiser": "adam",
    "critic_lr": 1e-3, "trials": ("dfl", "local", "fedavg", "fedprox", "fedbn"), "min_clients": 2,
}  # fmt: skip
PHOTOS = {**CNN, "backbone": "alexnet_bn", "rounds": 300}

PRESETS = {
    "demo": Config(trials=(*CLAIMS, "local", "fedprox"), sweep=(0.0, 0.5, 0.8), **TOY),
    "study": Config(
        trials=tuple(TRIALS), sweep=(0.0, 0.5, 0.8), fractions=(0.25, 0.5, 0.75), **{**TOY, "seeds": 5}
    ),
    "mnist": Config(data="mnist", trials=(*CLAIMS, "local", "fedprox"), sweep=(0.0, 0.5, 0.8), **TOY),
    "digits5": Config(data="digits5", **CNN),
    "office": Config(data="office", **PHOTOS),
    "domainnet": Config(data="domainnet", **PHOTOS),
    "pacs": Config(data="pacs", **{**PHOTOS, "backbone": "resnet18", "image_size": 224, "batch_size": 64}),
    "folder": Config(data="folder", **{**PHOTOS, "backbone": "resnet18", "image_size": 224, "rounds": 100}),
}


class Position(Standing):
    """Where a run stands, for its checkpoint: the trial and the federation in the middle of it."""

    def __init__(self) -> None:
        self.trial = 0
        self.federation: dict | None = None

    def load_state_dict(self, saved: dict) -> None:
        """Raises KeyError for the state of something else."""
        self.trial, self.federation = int(saved["trial"]), saved["federation"]


def train(config: Config) -> Path:
    """Run all trials of `config`; returns the run folder. Continues a run that was interrupted (on Flower:
    from the last finished trial). Raises UserError for settings that cannot be met."""
    if config.compile:
        raise UserError("--compile: clients train under torch.func, which torch.compile does not serve here")
    if config.engine == "flower" and (config.device == "cuda" or config.precision == "bf16"):
        raise UserError(
            "--engine flower: its clients compute on the CPU in fp32; leave out --device and --precision"
        )
    trials = plan(config)
    accelerator = start(config)
    if config.backbone == "mlp":
        torch.set_num_threads(1)  # its matrices are so small that more threads only wait for each other
    run = Run("dfl", config, accelerator.is_main_process)
    position = Position()
    run.load({}, {"position": position})
    steps = progress(desc="rounds", total=len(trials) * config.rounds)
    while position.trial < len(trials):
        trial = trials[position.trial]
        data = load_data(trial.config, trial.config.seed).to(accelerator.device)
        federation = Federation(
            build_method(trial.config, data),
            trial.config,
            data,
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.autocast,
            report=accelerator.print,
        )
        if position.federation is not None:
            with foreign_state(run.folder / "checkpoint" / "state.pt"):
                federation.load_state_dict(position.federation)
        elif position.trial == 0:
            run.picture("federation", contact_sheet(data))
        first = position.trial * config.rounds

        def record(
            federation: Federation, scalars: dict[str, float], first: int = first, label: str = trial.label
        ) -> None:
            named = {f"{label}/{name}": value for name, value in scalars.items()}
            run.log(first + federation.round, round=federation.round, **named)
            steps.update()

        if config.engine == "flower":
            federation = flower(trial.config, record)
            found = evaluate(federation, full=True)
            # The nodes have measured their own test sets in every round, the last one included.
            record(federation, {name: found[name] for name in found.keys() - {"in_domain", "worst"}})
        steps.update(first + federation.round - steps.n)
        steps.set_postfix_str(trial.label)
        while federation.round < config.rounds:
            scalars = federation.run_round()
            if accelerator.is_main_process:
                scalars |= evaluate(federation, full=config.rounds - federation.round < 3)
            record(federation, scalars)
            if federation.round % config.checkpoint_every == 0 and federation.round < config.rounds:
                position.federation = federation.state_dict()
                run.save({}, {"position": position}, {"trial": trial.label, "round": federation.round})
        if accelerator.is_main_process:
            save_trial(run.folder, trial, federation)
        position.trial, position.federation = position.trial + 1, None
        run.save({}, {"position": position}, {"trial": trial.label, "round": federation.round})
    run.close()
    return run.folder


def flower(config: Config, record: Callable[[Federation, dict[str, float]], None]) -> Federation:
    """A trial as a Flower simulation. Raises UserError when Flower is not installed."""
    try:
        from dfl.flower_app import simulate
    except ModuleNotFoundError as error:
        raise UserError(
            f"--engine flower: {error}; `make setup-flower` makes an environment that has it (README.md, "
            "'Flower')"
        ) from None
    return simulate(config, record)


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
