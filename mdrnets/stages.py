"""The stages of a run: which networks are trained, on what they build, and where their weights lie."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mdrnets.baselines import UNet
from mdrnets.data import TrainSet
from mdrnets.model import SIZES, CoarseNet, MDRNet, RefineNet
from mdrnets.parser import GROUPS, load_bisenet, make_parser
from shared.io import load_safetensors
from shared.runtime import UserError

if TYPE_CHECKING:
    from mdrnets.train import Config

VARIANTS: dict[str, dict] = {
    "none": {"memory": "none", "mrem": False},
    "deeper": {"memory": "none", "mrem": False, "extra_blocks": 1},
    "shared": {"memory": "shared", "mrem": False},
    "mrem": {"memory": "none"},
    "disentangled": {"mrem": False},
    "full": {},
    "full+inco2": {},
    "concat": {"memory": "none", "mrem": False, "seg_input": True},
    "disentangled-ema": {"mrem": False, "update": "ema"},
    "full-ema": {"update": "ema"},
    "full-hard": {"routing": "hard"},
    "full-shrink": {"addressing": "shrink"},
    "full-mrem-first": {"order": "mrem>dmm"},
    "full-parallel": {"order": "parallel"},
    "full-direct": {"output": "direct"},
}
"""Row of the result table -> what it changes in the refinement network. `+inco2` adds the InCo2 losses."""

TABLE_A = ("none", "shared", "disentangled", "full", "full+inco2")
"""The ablation: no memory, shared memory, disentangled memory, + MREM, + InCo2."""


@dataclass(frozen=True)
class Stage:
    """One training: the coarse network with its parser, a refinement network on it, or a baseline."""

    data: str
    name: str
    seed: int
    steps: int

    @property
    def label(self) -> str:
        return f"{self.data}/{self.name}/{self.seed}"

    @property
    def slug(self) -> str:
        return self.label.replace("/", "-")


def plan(config: "Config") -> list[Stage]:
    """The stages of a run in their order. UserError for an unknown variant, settings that do not fit, and
    other facial parts than this version's."""
    if config.part_labels != tuple(GROUPS.values()):
        raise UserError(
            f"part_labels {config.part_labels}: trained with other facial parts than this version's {GROUPS}"
        )
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown or not config.variants:
        raise UserError(f"unknown variant {unknown[:1]}; there are {', '.join(VARIANTS)}")
    if config.parser == "bisenet" and "simple" in config.data:
        raise UserError("--data simple: the simple faces have parts of their own: use --parser tiny")
    stride = SIZES[config.size].stride
    if config.image_size % stride:
        raise UserError(
            f"--image-size {config.image_size}: networks of --size {config.size} need a multiple of {stride}"
        )
    if config.unet and config.image_size % UNet.multiple:
        raise UserError(f"--image-size {config.image_size}: the U-Net needs a multiple of {UNet.multiple}")
    if config.adversarial and config.image_size < 24:
        raise UserError(f"--image-size {config.image_size}: the discriminator needs at least 24")
    low, high = config.mask_ratio
    if low >= high:
        raise UserError(f"--mask-ratio {low:g} {high:g}: give the smaller share first; 0.1 0.6 is 10 to 60 %")
    if config.lr_last != config.lr and config.last_steps >= config.refine_steps:
        raise UserError(
            f"--last-steps {config.last_steps}: all --refine-steps {config.refine_steps} would learn at "
            "--lr-last; give fewer (the paper preset: a quarter)"
        )
    stages = []
    for data in config.data:
        for seed in range(config.seed, config.seed + config.seeds):
            both = config.coarse_steps + config.refine_steps
            stages.append(Stage(data, "coarse", seed, config.coarse_steps))
            stages += [Stage(data, name, seed, config.refine_steps) for name in config.variants]
            stages += [Stage(data, "unet", seed, both)] if config.unet else []
    return stages


def stage_file(folder: Path, stage: Stage) -> Path:
    """Weights of a finished stage in a run folder."""
    return folder / "trained" / f"{stage.slug}.safetensors"


def build(config: "Config", name: str, parts: int) -> nn.Module:
    """The untrained network of a stage: MDRNet for "coarse" and the variants, or the U-Net."""
    if name == "unet":
        return UNet()
    size = SIZES[config.size]
    options = {"routing": config.routing, "addressing": config.addressing, "update": config.memory_update}
    options |= {"order": config.order, "tau": config.tau, "weighted_write": config.weighted_write}
    options |= {"decay": config.memory_decay, "revive_after": config.revive_after}
    refine = RefineNet(size, parts, **options | VARIANTS.get(name, {}))
    parser = make_parser(config.parser, parts, config.parser_size)
    return MDRNet(CoarseNet(size), parser, refine, size.stride)


def prepare(stage: Stage, config: "Config", folder: Path, parts: int) -> nn.Module:
    """The stage's network at its start: seeded, on the finished coarse stage, with what rests frozen."""
    torch.manual_seed(stage.seed)
    net = build(config, stage.name, parts)
    if stage.name == "unet":
        return net
    if config.parser == "bisenet":
        load_bisenet(net.parser, config.parser_weights)
    if stage.name == "coarse":
        net.refine.requires_grad_(False)
    else:
        start = build(config, "coarse", parts)
        load_safetensors(stage_file(folder, replace(stage, name="coarse")), start)
        net.coarse, net.parser = start.coarse.requires_grad_(False), start.parser.requires_grad_(False)
    return net


@torch.no_grad()
def learn_faces(net: MDRNet, samples: TrainSet, device: torch.device, count: int = 512) -> None:
    """Teach the tiny parser what damaged training pictures look like once they are coarsely completed."""
    net.eval()
    completed = []
    for i in range(min(count, len(samples))):
        sample = samples[i, i]
        x, mask = (sample[name][None].to(device) for name in ("image", "mask"))
        completed.append(net(x, mask)["coarse_comp"])
    net.parser.face_space.learn(torch.cat(completed))
