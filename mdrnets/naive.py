"""The training step in the textbook form, with the same weights: what `bench.py` measures against.

The whole correlation matrix, a loop over memory slots, three VGG calls, PyTorch's own instance norm, and the
discriminator sees true and completed pictures one after the other.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets import losses
from mdrnets.memory import DMM
from mdrnets.model import MDRNet, RefineNet, composite
from mdrnets.train import Config
from shared.norms import with_plain_norms
from shared.runtime import own_type


def read_by_loops(dmm: DMM, features: Tensor, parsing: Tensor) -> Tensor:
    """DMM's forward, a slot at a time."""
    q, memory = dmm.queries(features), dmm.slots_normalised()
    p, r = parsing.flatten(2).transpose(1, 2), torch.zeros_like(q)
    for k in range(dmm.blocks):
        scores = torch.stack([(q * memory[k, i]).sum(-1) for i in range(dmm.slots)], -1)
        w = (scores / dmm.tau).softmax(-1)
        for i in range(dmm.slots):
            r = r + (p[..., k] * w[..., i]).unsqueeze(-1) * memory[k, i]
    r = r.transpose(1, 2).reshape(features.shape).to(features.dtype)
    return features + dmm.fuse(torch.cat((features, r), 1))


class Refine(nn.Module):
    """RefineNet's weights, used in the plain forms."""

    def __init__(self, refine: RefineNet):
        super().__init__()
        self.refine = refine

    def forward(self, comp: Tensor, mask: Tensor, parsing: Tensor, read: bool = True) -> Tensor:
        features = self.refine.features(comp, mask, parsing)
        holes = F.adaptive_max_pool2d(mask, features.shape[-2:])
        features = read_by_loops(self.refine.dmm, features, parsing)
        return comp + self.refine.decoder(self.refine.mrem.dense(features, holes)[0])


def made_plain(net: MDRNet) -> MDRNet:
    """A network, changed: PyTorch's instance norm and both modules in the plain forms."""
    with_plain_norms(net)
    return MDRNet(net.coarse, net.parser, Refine(net.refine), net.stride)


def refine_losses(
    net: MDRNet, batch: dict[str, Tensor], config: Config, phi: nn.Module, critic: nn.Module
) -> tuple[Tensor, Tensor]:
    """The sum of all terms of the second stage, with three calls of phi: refined, composite and truth; and
    the composite (B, 3, H, W)."""
    x, m = batch["image"], batch["mask"]
    y = net(x, m)["refined"].float()
    comp = composite(x, y, m)
    of_y, of_comp, of_x = phi(y), phi(comp), phi(x)
    total = config.valid * losses.valid(y, x, m) + config.hole * losses.hole(y, x, m)
    total = total + config.tv * losses.total_variation(comp, m)
    total = total + config.perceptual * losses.perceptual(of_y, of_comp, of_x)
    with own_type(x):
        total = total + config.style * losses.style(of_y, of_comp, of_x)
        inter, intra = losses.inco2(of_comp[-1], of_x[-1], m, config.inco_samples)
    total = total + config.inter * inter + config.intra * intra
    return total + config.adversarial * losses.hinge_generator(critic(comp).float()), comp


def critic_loss(critic: nn.Module, image: Tensor, comp: Tensor) -> Tensor:
    """The discriminator's loss with a call for each kind of picture."""
    return losses.hinge_discriminator(critic(image), critic(comp.detach()))
