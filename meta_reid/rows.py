"""The rows of the result table: what each changes in the configuration, its network and its first weights."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from meta_reid.baselines import Plain
from meta_reid.model import META
from meta_reid.pretrained import TIMM, URLS, init_imagenet, init_vit, vit_state
from shared.runtime import UserError
from shared.weights import download_url, load_torch, pretrained_path

if TYPE_CHECKING:
    from meta_reid.train import Config

VARIANTS: dict[str, dict] = {
    "meta": {},
    "no-consistency": {"consistency": 0.0},
    "no-in": {"instance_norm": False},
    "episodic-grad": {"episodic_grad": True, "clip": 5.0},
    "uniformity": {"uniformity": 1.0},
    "baseline": {"method": "plain"},
    "baseline-ibn": {"method": "plain", "norm": "ibn"},
    "baseline-in": {"method": "plain", "norm": "in"},
}
"""Row of the result table -> what it changes in the configuration."""


@dataclass
class Row:
    """One training: a row of the table with one seed."""

    name: str
    config: "Config"
    model: nn.Module


def plan(config: "Config", classes_of: dict[int, list[int]]) -> list[Row]:
    """All rows of a run in their order, untrained. Raises UserError for an unknown or repeated one."""
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown or not config.variants:
        raise UserError(f"--variants: unknown variant {unknown[:1]}; there are {', '.join(VARIANTS)}")
    if len(set(config.variants)) < len(config.variants):
        raise UserError(f"--variants {' '.join(config.variants)}: give each once")
    rows = []
    for seed in run_seeds(config):
        for name in config.variants:
            changed = dataclasses.replace(config, seed=seed, **VARIANTS[name])
            rows.append(Row(f"{name}-{seed}", changed, build(changed, classes_of[seed], seed)))
    return rows


def run_seeds(config: "Config") -> range:
    """Seeds of a run."""
    return range(config.seed, config.seed + config.seeds)


def build(config: "Config", classes: list[int], seed: int) -> nn.Module:
    """The untrained network of a row, the same for the same seed."""
    pixels = None if config.pixels == "backbone" else config.pixels
    images = {"size": (config.height, config.width), "pixels": pixels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.method == "plain":
            return Plain(sum(classes), config.architecture, config.norm, **images)
        return META(
            classes,
            config.architecture,
            config.scoring,
            config.instance_norm,
            config.episodic_grad,
            config.scoring_relu,
            **images,
        )


def start_from_pretrained(model: nn.Module, config: "Config") -> None:
    """Pretrained weights into trunk and global branch (or the plain network)."""
    if not config.pretrained:
        return
    if config.architecture in TIMM:
        state, source = vit_state(config.architecture, config.weights)
        for backbone in (model.backbone, model.backbone_agg) if isinstance(model, META) else (model.vit,):
            init_vit(backbone, state, source)
        return
    if config.architecture not in URLS:
        raise UserError(f"no pretrained weights for '{config.architecture}'; use --no-pretrained")
    where = f"download {URLS[config.architecture]} and pass it with --weights, or use --no-pretrained"
    path = pretrained_path("ImageNet ResNet", config.weights, where, download_url(URLS[config.architecture]))
    state = load_torch(path)
    for backbone in (model.backbone, model.backbone_agg) if isinstance(model, META) else (model,):
        init_imagenet(backbone, state, str(path))
