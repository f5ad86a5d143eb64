"""Bookkeeping of a run of several stages: what is done, where the current stage stands, what to
checkpoint."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shared.io import Run, progress
from shared.processes import means
from shared.runtime import LoaderConfig, StepBatches, step_generator


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network moved to a device; on a GPU in the memory format that convolutions are fastest in."""
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last)
    return network.to(device)


def with_bf16(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with its passes under bf16 autocast and its results in fp32."""
    reduced = torch.autocast(device.type, torch.bfloat16)(network.forward)
    network.forward = convert_outputs_to_fp32(reduced)
    return network


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Job:
    """One run's stages: which are done, where the current one stands, and what of it goes into the
    checkpoint."""

    def __init__(
        self, config: LoaderConfig, accelerator: Accelerator, run: Run, networks: dict[str, nn.Module]
    ):
        self.config, self.accelerator, self.run, self.networks = config, accelerator, run, networks
        self.objects: dict = {}
        self.waiting: dict = {}
        self.standing = run.load(networks, {"stage": self}) or {
            "done": [],
            "stage": "",
            "step": 0,
            "logged": 0,
            "facts": {},
        }

    def state_dict(self) -> dict:
        """Of the current stage's optimiser and the like."""
        return {name: holder.state_dict() for name, holder in self.objects.items()}

    def load_state_dict(self, state: dict) -> None:
        """Keep a stage's state until the stage begins and builds its objects."""
        self.waiting = state

    @property
    def facts(self) -> dict:
        """Small results of stages, kept in the checkpoint: the basis' hash, lambdas."""
        return self.standing["facts"]

    def done(self, stage: str) -> bool:
        """Whether a stage's result is there."""
        return stage in self.standing["done"]

    def steps(
        self,
        stage: str,
        total: int,
        dataset: Dataset,
        batch: int,
        in_order: bool = False,
        shuffle: int = 0,
        **objects,
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(step, (images, labels) on the device) of a stage from where it stands, with checkpoints between.

        objects: what else the stage's state consists of (optimiser, scheduler, sums); they are restored here.
        in_order: every image once per pass, unshuffled, on this process alone. shuffle: another order.
        """
        self.objects = objects
        first = 0
        if self.standing["stage"] == stage:
            first = self.standing["step"]
            for name, state in self.waiting.items():
                objects[name].load_state_dict(state)
        self.standing |= {"stage": stage, "step": first}
        device, images = self.accelerator.device, len(dataset)
        if in_order:
            starts = range(0, images, batch)
            blocks = (starts[step % len(starts)] for step in range(first, total))
            sampler = [range(begin, min(begin + batch, images)) for begin in blocks]
        else:
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            sampler = StepBatches(images, batch, self.config.seed + 1000 * shuffle, total, first, rank, world)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=self.config.workers, pin_memory=device.type == "cuda"
        )
        for step, (x, label) in enumerate(progress(loader, stage), first):
            yield step, (x.to(device, non_blocking=True), label.to(device, non_blocking=True))
            self.standing["step"] = step + 1
            if (step + 1) % self.config.save_every == 0 and step + 1 < total:
                self.save()

    def generator(self, step: int, stream: int) -> torch.Generator:
        """A generator on the run's device that depends on seed, step and stream alone.

        On a GPU, where drawing a step's noise and masks on the CPU takes as long as the step.
        """
        seed = step_generator(self.config.seed, step, stream).initial_seed()
        return torch.Generator(self.accelerator.device).manual_seed(seed)

    def finish(self, stage: str, steps: int) -> None:
        """Mark a stage as done."""
        self.objects = {}
        logged = self.standing["logged"] + steps
        self.standing |= {"done": [*self.standing["done"], stage], "stage": "", "step": 0, "logged": logged}
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        self.run.save(self.networks, {"stage": self}, self.standing)

    def due(self, step: int, total: int) -> bool:
        """Whether a step has a line in the log: every `log_every`th, and the last."""
        return step % self.config.log_every == 0 or step == total - 1

    def log(self, step: int, total: int, **scalars: Tensor | float) -> None:
        """The line of a step that is due, means over the processes; nothing waits for the device between."""
        if self.due(step, total):
            self.run.log(self.standing["logged"] + step, **means(scalars))
