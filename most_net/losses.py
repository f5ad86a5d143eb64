"""The objective: pixels, reconstruction, perceptual, adversarial, and memory refinement (MR).

The paper names the MR loss and says what it is for; the three forms here are readings of that (see the
README).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from most_net.metrics import ssim
from shared.weights import download_url, load_state, load_torch, pretrained_path


def pixel_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference; also the reconstruction term, with `recon` as the prediction."""
    return F.l1_loss(prediction.float(), target)


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM on [-1, 1]. Off by default: it would optimise the headline metric directly."""
    return 1 - ssim(prediction.float(), target, data_range=2.0).mean()


def mr_align_loss(retrieved: Tensor, features: Tensor) -> Tensor:
    """MR align: mean over positions of 1 - cos(v_p, sg[f_s(p)]), both (B, C, h, w).

    What the memory answers for a photo position shall be what the artist drew there.
    """
    return 1 - F.cosine_similarity(retrieved.float(), features.detach().float(), dim=1).mean()


def mr_slot_loss(scores: Tensor, margin: float = 0.2) -> Tensor:
    """MR slot: compactness 1 - s_1 plus separation max(0, s_2 - s_1 + margin) of the best and second-best
    slot scores of every position, from (M, N), averaged."""
    best, second = scores.topk(2, dim=1).values.unbind(1)
    return (1 - best).mean() + F.relu(second - best + margin).mean()


def mr_match_loss(features: Tensor, values: Tensor, slot: Tensor, tau: float) -> Tensor:
    """MR match: the true sketch feature (M, C) shall name, among the values (N, C), the slot (M,) that the
    photo chose."""
    scores = F.normalize(features.float(), dim=1) @ F.normalize(values, dim=1).T
    return F.cross_entropy(scores / tau, slot)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares: real patches to 1, synthesised to 0."""
    return 0.5 * ((real.float() - 1).square().mean() + fake.float().square().mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """Least squares: synthesised patches shall pass for real."""
    return (fake.float() - 1).square().mean()


class Perceptual(nn.Module):
    """Sum over relu1_1 .. relu5_1 of VGG-19 of the mean absolute difference of activations.

    weights: torchvision's ImageNet state dict; None downloads it. Raises UserError when it is not to be had.
    """

    LAYERS = (1, 6, 11, 20, 29)

    def __init__(self, weights: Path | None = None):
        from torchvision.models import VGG19_Weights  # takes seconds, and other losses do without
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        url = VGG19_Weights.IMAGENET1K_V1.url
        where = "give torchvision's vgg19 file with --vgg, or leave the term out with --weights.perceptual 0"
        path = pretrained_path("VGG-19 (perceptual loss)", weights, where, download_url(url))
        features = make_layers(cfgs["E"])
        state = {k: v for k, v in load_torch(path).items() if not k.startswith("classifier.")}
        load_state(features, state, path, prefixes=("features.",))
        self.features = features[: self.LAYERS[-1] + 1].requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def activations(self, sketch: Tensor) -> list[Tensor]:
        """(B, 1, H, W) in [-1, 1] -> activations of the five layers."""
        x = (sketch.float().expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.deviation
        kept = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.LAYERS:
                kept.append(x)
        return kept

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted: Sequence[Tensor] = self.activations(target)
        got = self.activations(prediction)
        return torch.stack([F.l1_loss(a.float(), b.float()) for a, b in zip(got, wanted, strict=True)]).sum()
