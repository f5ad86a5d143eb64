"""The discriminator, which sees the layout and the age.

Its form is PFA-GAN's and MTLFace's conditional PatchGAN; that it sees the layout is SPADE's. What the paper's
looks like could not be read.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from biphasic_age.ages import as_weights
from biphasic_age.layouts import CLASSES, one_hot, to_labels
from biphasic_age.model import initialise, strengthen
from shared.runtime import own_type


class Discriminator(nn.Module):
    """D(x, S, t): conditional PatchGAN, (B, 3, H, W) image, layout and age -> patch scores (B, 1, h, w).

    The one-hot layout joins the image (`layout`), the one-hot age the first layer's output. `stages`
    convolutions, the first without and the others with spectral norm; the last of them has stride 1.
    """

    def __init__(
        self,
        width: int = 64,
        stages: int = 4,
        classes: int = len(CLASSES),
        groups: int = 4,
        layout: bool = True,
        gain: float | None = None,
    ):
        super().__init__()
        self.classes, self.groups, self.layout = classes, groups, layout
        self.first = nn.Conv2d(3 + (classes if layout else 0), width, 4, 2, 1)
        inputs, layers = width + groups, []
        for stage in range(1, stages):
            stride = 2 if stage < stages - 1 else 1
            layers.append(nn.Conv2d(inputs, inputs := width * 2**stage, 4, stride, 1))
        self.layers = nn.ModuleList(layers)
        self.last = nn.Conv2d(inputs, 1, 4, 1, 1)
        initialise(self)
        if gain is not None:
            strengthen(self, gain)
        for layer in self.layers:
            spectral_norm(layer)

    def forward(self, image: Tensor, layout: Tensor, target: Tensor) -> Tensor:
        """layout and target as for the generator; the layout is not looked at without `layout`."""
        if self.layout:
            planes = one_hot(to_labels(layout, self.classes), self.classes).to(image.dtype)
            image = torch.cat((image, planes), 1)
        h = F.leaky_relu(self.first(image), 0.2, inplace=True)
        age = as_weights(target, self.groups).to(h.dtype)[:, :, None, None].expand(-1, -1, *h.shape[-2:])
        h = torch.cat((h, age), 1)
        with own_type(h):  # spectral norms in fp32
            weights = [layer.weight for layer in self.layers]
        for layer, weight in zip(self.layers, weights, strict=True):
            h = F.leaky_relu(F.conv2d(h, weight, layer.bias, layer.stride, layer.padding), 0.2, inplace=True)
        return self.last(h)


class TwoScales(nn.Module):
    """Two discriminators, the second on the picture at half size: a list of their scores."""

    def __init__(self, **options):
        super().__init__()
        self.scales = nn.ModuleList((Discriminator(**options), Discriminator(**options)))

    def forward(self, image: Tensor, layout: Tensor, target: Tensor) -> list[Tensor]:
        """Arguments as for `Discriminator`."""
        labels = to_labels(layout, self.scales[0].classes)
        return [
            self.scales[0](image, labels, target),
            self.scales[1](F.avg_pool2d(image, 2), labels[:, ::2, ::2], target),
        ]
