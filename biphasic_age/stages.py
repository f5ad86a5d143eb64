"""The stages of a run: which networks are trained, what each leaves out, and where their weights lie."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from biphasic_age.ages import AgeScale
from biphasic_age.align import mean_eyes
from biphasic_age.baselines import PlainGenerator
from biphasic_age.discriminator import Discriminator, TwoScales
from biphasic_age.frozen import AgeNet, IdentityNet, SmallParser, freeze, load_age, load_identity, load_parser
from biphasic_age.layouts import CLASSES
from biphasic_age.losses import Weights
from biphasic_age.model import SIZES, Generator, Output, SizeName, Switches
from biphasic_age.objective import Guides
from biphasic_age.projection import ProjectionNet
from biphasic_age.scene import PARTS
from shared.io import find_run, load_config, load_safetensors, load_weights
from shared.ranges import Count, Positive, Share
from shared.records import read_json, write_json
from shared.runtime import UserError

if TYPE_CHECKING:
    from biphasic_age.data import FaceSet
    from biphasic_age.train import Config

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-layout": {"layout": False},
    "no-projection": {"projection": False},
    "no-constraint": {"constraint": False},
    "no-attention": {"attention": False},
    "no-noise": {"noise": False},
    "no-self": {"weights": {"reconstruction": 0.0}},
    "no-cycle": {"weights": {"cycle": 0.0}},
    "no-adversarial": {"weights": {"adversarial": 0.0}},
    "no-age": {"weights": {"age": 0.0}},
    "no-identity": {"weights": {"identity": 0.0}},
    "d-image": {"d_layout": False},
    "plain": {"plain": True, "d_layout": False},
}
"""Row of the ablation table -> what it changes. `no-...`: without that part, noise, strategy or loss.
`no-layout`: neither network is told where the parts are. `d-image`: only the discriminator is not told.
`plain`: the baseline, a conditional network on whole images."""
TABLE = tuple(VARIANTS)
GUIDES = "guides"
"""Name of the stage that trains the small networks: age, identity, face parser."""


@dataclass(frozen=True)
class Recipe:
    """How generators learn from one kind of pictures."""

    size: SizeName = "paper"
    """Widths and depths of the networks."""
    output: Output = "direct"
    """What the generator paints: the picture, a change of the input, or a gated mixture."""
    variants: tuple[str, ...] = ("full",)
    """Rows of the ablation table to train; see VARIANTS in stages.py."""
    steps: Count = 200_000
    """Steps, each one of the generator and one of the discriminator."""
    lr: Positive = 1e-4
    """Learning rate of Adam, falling linearly to 0 in the second half."""
    critic_lr: Positive = 1.0
    """Learning rate of the discriminator relative to that."""
    weights: Weights = Weights()
    """Weights of the losses."""
    mismatch: bool = False
    """The discriminator also learns that a real face under a wrong age is false."""
    jitter: Share = 0.05
    """Random change of brightness, contrast and colour."""
    guide_jitter: Share = 0.15
    """The same for the small networks: an age network that goes by exact colours is easily fooled."""


SCENE_RECIPE = Recipe(steps=600, weights=Weights(identity=0.0, expectation=0.0), jitter=0.0, guide_jitter=0.0)
"""For the two-head scene, where nobody appears twice, the ages are four and colour is their sign."""


def recipe_of(config: "Config", data: str) -> Recipe:
    """How generators learn from a set."""
    return config.scene if data == "scene" else config.recipe


@dataclass(frozen=True)
class Stage:
    """One training: the guides, or a variant of the method on them."""

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
    """The stages of a run in their order. Raises UserError for an unknown variant, or a size that cannot be
    halved often enough."""
    stages = []
    for option, side in (("--image-size", config.image_size), ("--scene-size", config.scene_size)):
        if side < 8 or side % 8:
            raise UserError(f"{option} {side}: use a multiple of 8")
    if any(high <= low for low, high in zip(config.limits, config.limits[1:], strict=False)):
        raise UserError(f"--limits {' '.join(f'{age:g}' for age in config.limits)}: give rising ages")
    if "scene" in config.data and len(config.limits) != 3:
        raise UserError("the two-head scene has four ages: give three --limits")
    for data in config.data:
        recipe = recipe_of(config, data)
        unknown = [name for name in recipe.variants if name not in VARIANTS]
        if unknown or not recipe.variants:
            raise UserError(f"unknown variant {unknown[:1]}; there are {', '.join(VARIANTS)}")
        for seed in range(config.seed, config.seed + config.seeds):
            if learned_guides(config, data):
                stages.append(Stage(data, GUIDES, seed, config.guide_steps))
            stages += [Stage(data, name, seed, recipe.steps) for name in recipe.variants]
    return stages


def weights_of(config: "Config", data: str, name: str = "full") -> Weights:
    """Weights of a stage's losses."""
    changes = VARIANTS[name].get("weights", {})
    return replace(recipe_of(config, data).weights, **changes)


def learned_guides(config: "Config", data: str) -> list[str]:
    """Which small networks a run trains itself: those whose weights are needed and not given."""
    weights = weights_of(config, data)
    needed = {
        "age": weights.age > 0 and config.age_weights is None,
        "identity": (weights.identity > 0 or weights.perceptual > 0) and config.identity_weights is None,
        # Translating a bare photograph later needs a layout.
        "parser": data != "scene" and config.layouts and config.parser_weights is None,
    }
    return [name for name, yes in needed.items() if yes]


def age_stages(config: "Config", data: str) -> int:
    """Layers of the age network; a scene is too small for many."""
    return min(config.age_stages, 3) if data == "scene" else config.age_stages


def load_given(config: "Config", data: str, name: str) -> nn.Module:
    """The age, identity or parsing network from the user's file, frozen. UserError when there is none, or it
    is damaged or of another network."""
    if name == "identity":
        return load_identity(config.identity_weights)
    if name == "parser":
        return load_parser(config.parser_weights)
    groups = len(config.limits) + 1
    return load_age(config.age_weights, groups, config.age_width, age_stages(config, data))


def build_guides(config: "Config", data: str, people: int) -> dict[str, nn.Module]:
    """The untrained small networks of `learned_guides`."""
    make = {
        "age": lambda: AgeNet(config.age_width, age_stages(config, data), len(config.limits) + 1),
        "identity": lambda: IdentityNet(people, config.identity_width),
        "parser": lambda: SmallParser(len(CLASSES)),
    }
    return {name: make[name]() for name in learned_guides(config, data)}


def load_guides(
    config: "Config", stage: Stage, folder: Path, source: "FaceSet", device: torch.device
) -> Guides:
    """The frozen networks of a stage: trained by this run or given as files."""
    weights = weights_of(config, stage.data, stage.name)
    networks = build_guides(config, stage.data, people_in(source))
    for name, network in networks.items():
        load_safetensors(guide_file(folder, stage, name), network)
        networks[name] = freeze(network).to(device)
    needed = {
        "age": weights.age,
        "identity": weights.identity or weights.perceptual,
        "parser": config.reparse and stage.data != "scene",
    }
    for name, yes in needed.items():
        if yes and name not in networks:
            networks[name] = load_given(config, stage.data, name).to(device)
    parse = networks["parser"].labels if needed["parser"] else None
    means = torch.tensor(AgeScale.of(source.ages, source.limits).means, device=device)
    return Guides(networks.get("age"), networks.get("identity"), means, parse)


def people_in(source: "FaceSet") -> int:
    return int(source.people.max()) + 1


def build(config: "Config", data: str, name: str) -> nn.Module:
    """The untrained generator of a variant, or the plain network."""
    changes = VARIANTS[name]
    classes, ages = len(PARTS if data == "scene" else CLASSES), len(config.limits) + 1
    recipe = recipe_of(config, data)
    size = SIZES[recipe.size]
    if changes.get("plain"):
        return PlainGenerator(size, ages, "direct" if recipe.output == "direct" else "residual")
    parts = ("layout", "projection", "constraint", "attention", "noise")
    switches = Switches(**{part: changes[part] for part in parts if part in changes})
    net = Generator(size, classes, ages, recipe.output, switches)
    if isinstance(net.projection, ProjectionNet):
        net.projection.recompute = config.recompute
    return net


def build_critic(config: "Config", data: str, name: str) -> nn.Module:
    """The discriminator that goes with a variant."""
    changes, size = VARIANTS[name], SIZES[recipe_of(config, data).size]
    options = {
        "width": size.critic_width,
        "stages": size.critic_stages,
        "classes": len(PARTS if data == "scene" else CLASSES),
        "groups": len(config.limits) + 1,
        "gain": size.gain,
        "layout": config.d_layout and changes.get("d_layout", True) and changes.get("layout", True),
    }
    return TwoScales(**options) if config.two_scales else Discriminator(**options)


def stage_file(folder: Path, stage: Stage) -> Path:
    """Weights of a finished stage in a run folder."""
    return folder / "trained" / f"{stage.slug}.safetensors"


def guide_file(folder: Path, stage: Stage, name: str) -> Path:
    return folder / "trained" / f"{stage.data}-{name}-{stage.seed}.safetensors"


def about_file(folder: Path, data: str) -> Path:
    """What a run notes of its training faces: their ages and where their eyes are."""
    return folder / "trained" / f"{data}-about.json"


@torch.no_grad()
def save_about(source: "FaceSet", path: Path, count: int = 512) -> None:
    """Write the ages of the training faces, and for sets with layouts the mean places of both eyes (of the
    first `count` faces), which photographs are aligned to later."""
    path.parent.mkdir(exist_ok=True)
    about: dict[str, Any] = {"ages": AgeScale.of(source.ages, source.limits), "eyes": None}
    if source.classes == len(CLASSES):
        layouts = torch.stack([source.load(i)[1] for i in range(min(count, len(source)))])
        if layouts.any():
            about["eyes"] = mean_eyes(layouts)
    write_json(path, about)


def load_variant(config: "Config", folder: Path, stage: Stage) -> nn.Module:
    """The generator of a stage in evaluation mode: finished, or as its last checkpoint has it. UserError when
    there is neither."""
    net, finished = build(config, stage.data, stage.name), stage_file(folder, stage)
    if finished.is_file():
        load_safetensors(finished, net)
        return net.eval()
    progress = load_weights(folder, {})
    if progress["stage"] != stage.label:
        raise UserError(f"{folder}: {stage.label} is not trained yet; let train.py run on")
    load_weights(folder, {"average" if config.average else "net": net})
    return net.eval()


@dataclass(frozen=True)
class Trained:
    """A run's generator for use, with what it needs around it."""

    net: nn.Module
    """The generator in evaluation mode."""
    scale: AgeScale
    """The ages it was trained on."""
    eyes: tuple[tuple[float, float], tuple[float, float]] | None
    """Mean places (x, y) of the left and the right eye in its training pictures, as shares of the side."""
    parser: SmallParser | None
    """The run's own face parser; None when it used the public one's layouts."""
    config: "Config"
    data: str
    folder: Path


def load_generator(run: Path | None = None, name: str = "full", data: str | None = None) -> Trained:
    """The generator of a run for use.

    run: its folder; None takes the newest. name: the variant. data: None takes the last set of the run (the
    demo's faces). Raises UserError when the run has no such network.
    """
    from biphasic_age.train import Config  # here, because train.py imports this module

    folder = find_run("biphasic_age", run)
    config = load_config(folder, Config)
    data = data or config.data[-1]
    stages = [stage for stage in plan(config) if (stage.data, stage.name) == (data, name)]
    if not stages:
        raise UserError(f"{folder}: a run without the variant {name} on {data}")
    net = load_variant(config, folder, stages[0])
    parser = None
    if "parser" in learned_guides(config, data):
        parser = SmallParser(len(CLASSES))
        load_safetensors(guide_file(folder, stages[0], "parser"), parser)
        freeze(parser)
    return Trained(net, *load_about(about_file(folder, data)), parser, config, data, folder)


def load_about(path: Path) -> tuple[AgeScale, tuple | None]:
    """What `save_about` wrote. UserError when it is missing or damaged."""

    def form(values: dict) -> tuple[AgeScale, tuple | None]:
        ages, eyes = values["ages"], values["eyes"]
        scale = AgeScale(tuple(ages["limits"]), tuple(ages["means"]), ages["low"], ages["high"])
        return scale, eyes and tuple(tuple(eye) for eye in eyes)

    return read_json(path, "what a run notes of its faces", form)
