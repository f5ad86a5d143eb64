"""The stages of a run: which networks are taught, on what they build, and where their weights lie."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyface import parts
from anyface.bundle import Model
from anyface.clip import BPETokenizer, Tokenizer
from anyface.judges import Judge
from anyface.losses import BEHAVIOUR, Behaviour
from anyface.model import Stream, load_official
from anyface.stylegan2 import Generator
from anyface.weights import load_clip, load_generator
from shared.io import load_safetensors, save_safetensors
from shared.runtime import UserError

if TYPE_CHECKING:
    from anyface.train import Config

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-dt": {"dt": False},
    "no-cmd": {"cmd": False},
    "cmd-0.1": {"lambda_cmd": 0.1},
    "no-clip": {"clip_loss": False},
    "one-stream": {"one_stream": True},
    "no-norm": {"norm_weight": 0.0},
    "neg-all": {"negatives": "all"},
    "neg-official": {"negatives": "official"},
    "clip-official": {"clip_input": "official"},
    "all-pairs": {"clip_pairs": "official"},
    "no-gradient": {"through_generator": False},
    "one-caption": {"all_captions": False},
    "batch-sequence": {"batch_as_sequence": True},
    "frozen-transformers": {"train_transformers": False},
    "words": {"words": True},
    "released": {field.name: getattr(BEHAVIOUR["official"], field.name) for field in fields(Behaviour)},
}
"""Name of a pair of streams -> what it changes in the configuration or in its `behaviour`."""

PARTS = ("half", "generator", "clip", "judge", "wide")
"""What a run of the tiny size teaches first, in this order."""


@dataclass(frozen=True)
class Stage:
    """One training: a part of the demo's constants, or a pair of streams. seed: of its random draws."""

    name: str
    seed: int
    steps: int
    part: bool = False

    @property
    def label(self) -> str:
        return self.name if self.part else f"{self.name}/{self.seed}"


@dataclass(frozen=True)
class Constants:
    """What the streams' training leaves as it is, frozen on the device.

    wide: the generator of twice the side; judge: reads the world's traits; identity: IR-SE50.
    """

    clip: nn.Module
    tokenizer: Tokenizer
    generator: Generator
    wide: Generator | None = None
    judge: Judge | None = None
    identity: nn.Module | None = None


def plan(config: "Config") -> list[Stage]:
    """The stages of a run in their order. UserError for an unknown variant."""
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown or not config.variants:
        raise UserError(f"unknown variant {unknown[:1]}; there are {', '.join(VARIANTS)}")
    stages = []
    if config.size == "tiny":
        steps = {name: getattr(config, f"{name}_steps") for name in PARTS}
        stages = [Stage(name, config.seed, steps[name], part=True) for name in PARTS if steps[name]]
    for seed in range(config.seed, config.seed + config.seeds):
        stages += [Stage(name, seed, config.steps) for name in config.variants]
    return stages


def variant_config(config: "Config", name: str) -> "Config":
    """The configuration with the changes of a variant."""
    changes = VARIANTS[name]
    inner = {key: value for key, value in changes.items() if key in {f.name for f in fields(Behaviour)}}
    outer = {key: value for key, value in changes.items() if key not in inner}
    return replace(config, behaviour=replace(config.behaviour, **inner), **outer)


def reads_words(config: "Config") -> bool:
    """Whether any of the run's text streams reads all tokens of a caption."""
    return any(variant_config(config, stage.name).words for stage in plan(config) if not stage.part)


def part_learner(stage: Stage, config: "Config", folder: Path, device: torch.device) -> parts.Learner:
    """The learner of one of `PARTS`, seeded, on the finished parts that it builds on."""
    torch.manual_seed(stage.seed)
    if stage.name == "clip":
        faces = 2 * config.train_faces  # others than the streams' own
        return parts.clip_learner(*parts.small_clip(), stage.steps, stage.seed, device, faces)
    if stage.name == "judge":
        return parts.judge_learner(Judge(), stage.steps, stage.seed, device)
    if stage.name == "half":
        half = parts.small_generator(16).to(device)
        parts.teach_mapping(half, config.mapping_steps, stage.seed)
        return parts.generator_learner("half", half, stage.steps, stage.seed, device)
    generator = parts.small_generator()
    if stage.name == "generator":
        if config.half_steps:
            half = parts.small_generator(16)
            load_safetensors(stage_file(folder, "half"), half)
            parts.grow(generator, half)
        return parts.generator_learner("generator", generator, stage.steps, stage.seed, device)
    load_safetensors(stage_file(folder, "generator"), generator)
    generator.to(device).requires_grad_(False)
    return parts.wide_learner(parts.small_generator(64), generator, stage.steps, stage.seed, device)


def load_constants(config: "Config", folder: Path, device: torch.device) -> Constants:
    """The frozen networks of a run: its own small ones, or the user's files. UserError for a missing one."""
    identity = None
    if config.lambda_id:
        if config.identity_weights is None:
            raise UserError("--lambda-id needs --identity-weights model_ir_se50.pth (of InsightFace_Pytorch)")
        identity = load_official("ir_se50_112", config.identity_weights)
    if config.size == "tiny":
        clip, tokenizer = parts.small_clip()
        networks = {"clip": clip, "generator": parts.small_generator()}
        networks |= {"wide": parts.small_generator(64)} if config.wide_steps else {}
        networks |= {"judge": Judge()} if config.judge_steps else {}
        for name, network in networks.items():
            # Without steps of their own, networks stay as they were initialised.
            if getattr(config, f"{name}_steps"):
                load_safetensors(stage_file(folder, name), network)
        found = Constants(tokenizer=tokenizer, identity=identity, **networks)
    else:
        if config.clip_weights is None or config.generator_weights is None:
            raise UserError(
                "the streams need --clip-weights (OpenAI's ViT-B-32.pt, or a state dict in its names) and "
                "--generator-weights (rosinality's stylegan2-ffhq-config-f.pt, or NVIDIA's ffhq.pkl)"
            )
        clip = load_clip(config.clip_weights)
        generator = load_generator(config.generator_weights)[0]
        found = Constants(clip, BPETokenizer(clip.context_length), generator, identity=identity)
    for network in (found.clip, found.generator, found.wide, found.judge, found.identity):
        if network is not None:
            network.to(device).eval().requires_grad_(False)
    return found


def make_streams(config: "Config", constants: Constants, seed: int) -> tuple[Stream, Stream]:
    """Untrained text and image stream for the constants' widths."""
    torch.manual_seed(seed)
    generator = constants.generator
    sizes = {"width": constants.clip.visual.output_dim, "n_latent": generator.n_latent}
    sizes |= {"style_dim": generator.style_dim, "batch_as_sequence": config.behaviour.batch_as_sequence}
    if config.size == "tiny":
        sizes |= {"ladder": (2, 4, 8), "layers": 2, "heads": 4, "feedforward": 256, "dropout": 0.0}
        sizes |= {"lr_mul": 1.0}
    return Stream(**sizes), Stream(**sizes)


def stage_file(folder: Path, label: str, network: str | None = None) -> Path:
    """Weights of a finished stage: of a part, or of a stage's `text` or `image` stream."""
    name = label.replace("/", "-") + (f"-{network}" if network else "")
    return folder / "trained" / f"{name}.safetensors"


def save_stage(folder: Path, stage: Stage, models: dict[str, nn.Module]) -> None:
    """Weights of a finished stage."""
    for network, model in models.items():
        save_safetensors(stage_file(folder, stage.label, None if stage.part else network), model)


def load_streams(config: "Config", folder: Path, constants: Constants, stage: Stage) -> tuple[Stream, Stream]:
    """A finished stage's text and image stream, frozen, on the constants' device. UserError without them."""
    config = variant_config(config, stage.name)
    streams = make_streams(config, constants, stage.seed)
    for name, stream in zip(("text", "image"), streams, strict=True):
        load_safetensors(stage_file(folder, stage.label, name), stream)
        stream.to(constants.generator.input.input.device).eval().requires_grad_(False)
    return streams


def whole_model(config: "Config", folder: Path, constants: Constants, mean: Tensor) -> Model:
    """The run's first variant as one model for predict.py and the page. mean: (1, L, D)."""
    first = next(stage for stage in plan(config) if not stage.part)
    text, image = load_streams(config, folder, constants, first)
    files = {"clip": config.clip_weights, "generator": config.generator_weights}
    return Model(
        constants.clip,
        constants.tokenizer,
        constants.generator,
        text,
        mean,
        image=image,
        wide=constants.wide,
        m=config.noise_layers,
        words=variant_config(config, first.name).words,
        clip_input=config.behaviour.clip_input,
        files={name: path.resolve() for name, path in files.items() if path is not None},
    )
