"""What each stage minimises: the terms of `losses.py` put together with their weights."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets import losses
from mdrnets.model import MDRNet, composite
from mdrnets.parser import TinyParser, parts_on_grid
from shared.runtime import own_type

if TYPE_CHECKING:
    from mdrnets.train import Config


def needs_features(config: "Config", inco: bool) -> bool:
    """Whether any term of the second stage looks at features."""
    return bool(config.perceptual or config.style or inco)


FEATURES: dict[losses.FeatureKind, str] = {
    "vgg": "VGG-16, ImageNet's weights",
    "coarse": "the frozen encoder of the coarse network",
    "random": "a fixed random network",
}
"""What --features names, as training says it."""


def feature_network(config: "Config", net: MDRNet) -> nn.Module:
    """phi, frozen: also against training of the network that it may be a part of."""
    if config.features == "vgg":
        phi = losses.load_vgg(config.vgg_weights)
    elif config.features == "random":
        phi = losses.RandomFeatures()
    else:
        phi = losses.CoarseFeatures(copy.deepcopy(net.coarse.encoder))
    return phi.requires_grad_(False).eval()


def coarse_losses(net: MDRNet, batch: dict[str, Tensor], config: "Config") -> dict[str, Tensor]:
    """First stage: pixel losses of the coarse result, and the tiny parser's cross entropy on its
    composite."""
    x, m, parts = batch["image"], batch["mask"], batch["parts"]
    coarse = net.coarse(x * (1 - m), m).float()
    terms = {
        "valid": config.valid * losses.valid(coarse, x, m),
        "hole": config.hole * losses.hole(coarse, x, m),
    }
    if isinstance(net.parser, TinyParser):
        logits = net.parser.logits(composite(x, coarse, m).detach()).float()
        share = parts_on_grid(parts, logits.shape[1], logits.shape[-2:])
        terms["parsing"] = config.parsing * F.cross_entropy(logits, share.argmax(1))
    return terms


def refine_losses(
    net: MDRNet,
    batch: dict[str, Tensor],
    config: "Config",
    phi: nn.Module | None,
    critic: nn.Module | None,
    inco: bool,
    read: bool,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Second stage: all terms of the objective, and comp(refined) (B, 3, H, W) for the discriminator.

    phi runs once on the truth, without gradient, and once on refined and composite together; InCo2 takes its
    psi from the same passes.
    """
    x, m = batch["image"], batch["mask"]
    out = net(x, m, read=read)
    refined = out["refined"].float()
    comp = composite(x, refined, m)
    terms = {
        "valid": config.valid * losses.valid(refined, x, m),
        "hole": config.hole * losses.hole(refined, x, m),
    }
    if any(p.requires_grad for p in net.coarse.parameters()):
        coarse = out["coarse"].float()
        terms["coarse"] = config.valid * losses.valid(coarse, x, m) + config.hole * losses.hole(coarse, x, m)
    if config.tv:
        terms["tv"] = config.tv * losses.total_variation(comp, m)
    if phi is not None:
        with torch.no_grad():
            of_x = phi(x)
        of_both = phi(torch.cat((comp, refined)) if config.perceptual or config.style else comp)
        of_comp = [f[: len(x)] for f in of_both]
        if config.perceptual or config.style:
            of_y = [f[len(x) :] for f in of_both]
            terms["perceptual"] = config.perceptual * losses.perceptual(of_y, of_comp, of_x)
            with own_type(x):
                terms["style"] = config.style * losses.style(of_y, of_comp, of_x)
        if inco:
            with own_type(x):
                pair = losses.inco2(
                    of_comp[-1], of_x[-1], m, config.inco_samples, generator, config.inco_form
                )
            terms["inter"], terms["intra"] = config.inter * pair[0], config.intra * pair[1]
    if critic is not None:
        terms["adversarial"] = config.adversarial * losses.hinge_generator(critic(comp).float())
    return terms, comp


def unet_losses(net: nn.Module, batch: dict[str, Tensor], config: "Config") -> dict[str, Tensor]:
    """The baseline: the pixel losses alone."""
    x, m = batch["image"], batch["mask"]
    y = net(x, m)["refined"].float()
    return {"valid": config.valid * losses.valid(y, x, m), "hole": config.hole * losses.hole(y, x, m)}
