"""The objective, one function per term. Weights and exact forms are our decisions (the paper's could not be
read); valid/hole/perceptual/style/TV follow PConv and RFR, the adversarial term is hinge, InCo2 is described
below.

Symbols: x ground truth, y refined result, m mask with 1 = corrupted, comp(y) = x (1 - m) + y m; all images
(B, 3, H, W) in [-1, 1]. phi and psi are frozen feature networks; psi is the last level of phi.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.mrem import hole_cells
from shared.runtime import UserError
from shared.weights import download_url, load_torch, pretrained_path

FeatureKind = Literal["vgg", "coarse", "random"]
TO_POOL3 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M"]
"""VGG-16 up to its third pooling, in torchvision's notation."""

# --- feature networks -------------------------------------------------------------------------------


class VGGFeatures(nn.Module):
    """VGG-16 up to pool3: (B, 3, H, W) in [-1, 1] -> pool1 (64, H/2), pool2 (128, H/4), pool3 (256, H/8).

    Untrained; `load_vgg` gives it ImageNet's weights.
    """

    def __init__(self):
        from torchvision.models.vgg import make_layers  # takes seconds, and other features do without

        super().__init__()
        layers = make_layers(TO_POOL3)
        self.levels = nn.ModuleList((layers[:5], layers[5:10], layers[10:17]))
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = (x / 2 + 0.5 - self.mean) / self.deviation, []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def load_vgg(weights: Path | None) -> VGGFeatures:
    """VGG-16 features with ImageNet weights: torchvision's `vgg16-397923af.pth`; None downloads it. UserError
    when it is not to be had, or another file."""
    from torchvision.models import VGG16_Weights

    source = VGG16_Weights.IMAGENET1K_V1.url
    where = f"get {source.rsplit('/', 1)[1]} from torchvision's model list and give it with --vgg-weights"
    path = pretrained_path("VGG-16 of the perceptual losses", weights, where, download_url(source))
    state, features = load_torch(path), VGGFeatures()
    for level in features.levels:
        for name, parameter in level.named_parameters():  # the levels keep the numbers of the whole
            value = state.get(f"features.{name}") if isinstance(state, dict) else None
            if value is None or value.shape != parameter.shape:
                raise UserError(f"{path}: not torchvision's VGG-16 weights; {where}")
            parameter.data.copy_(value)
    return features


class RandomFeatures(nn.Module):
    """A fixed random pyramid (seed 0): three levels of convolution, ReLU and 2x2 average, 32/64/128
    channels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in ((3, 32), (32, 64), (64, 128)))
        for conv in self.convs:
            conv.weight.data.normal_(0, (2 / (9 * conv.in_channels)) ** 0.5, generator=generator)
            conv.bias.data.zero_()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = F.avg_pool2d(F.relu(conv(x)), 2)
            maps.append(x)
        return maps


class CoarseFeatures(nn.Module):
    """The frozen encoder of the coarse network, asked with an empty mask: its levels from fine to coarse."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder.levels(torch.cat((x, torch.zeros_like(x[:, :1])), 1))


# --- pixels -----------------------------------------------------------------------------------------


def valid(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """mean |(1 - m)(y - x)| over all elements."""
    return ((y - x).abs() * (1 - m)).mean()


def hole(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """mean |m (y - x)| over all elements."""
    return ((y - x).abs() * m).mean()


def total_variation(comp: Tensor, m: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, both directions, counting the pairs that touch the hole."""
    down = (comp[..., 1:, :] - comp[..., :-1, :]).abs() * torch.maximum(m[..., 1:, :], m[..., :-1, :])
    right = (comp[..., 1:] - comp[..., :-1]).abs() * torch.maximum(m[..., 1:], m[..., :-1])
    return down.mean() + right.mean()


# --- features ---------------------------------------------------------------------------------------


def perceptual(of_y: list[Tensor], of_comp: list[Tensor], of_x: list[Tensor]) -> Tensor:
    """sum_l mean |phi_l(y) - phi_l(x)| + mean |phi_l(comp y) - phi_l(x)|, in fp32."""
    levels = zip(of_y, of_comp, of_x, strict=True)
    levels = ((features.float() for features in level) for level in levels)
    return sum((a - x).abs().mean() + (b - x).abs().mean() for a, b, x in levels)


def gram(features: Tensor) -> Tensor:
    """(B, C, H, W) -> F F^T / (C H W), (B, C, C) in fp32."""
    f = features.float().flatten(2)
    return f @ f.transpose(1, 2) / (f.shape[1] * f.shape[2])


def style(of_y: list[Tensor], of_comp: list[Tensor], of_x: list[Tensor]) -> Tensor:
    """The perceptual pairs on Gram matrices; autocast must be off around it."""
    return perceptual(*([gram(f) for f in levels] for levels in (of_y, of_comp, of_x)))


# --- adversarial ------------------------------------------------------------------------------------


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(comp y))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """- mean D(comp y)."""
    return -fake.mean()


# --- InCo2 ------------------------------------------------------------------------------------------


def inco2(
    psi_out: Tensor,
    psi_x: Tensor,
    mask: Tensor,
    samples: int | None = 512,
    generator: torch.Generator | None = None,
    form: Literal["similarity", "direct"] = "similarity",
) -> tuple[Tensor, Tensor]:
    """The pair of coordination losses (inter, intra).

    psi_out, psi_x: features of comp(y) and of x, (B, C, h, w). mask (B, 1, H, W); H are the cells with any
    corrupted pixel, V the others. S_ij = cos(psi_i, psi_j).

        L_inter = 1/(|H||V|) sum_{i in H, j in V} |S_ij(out) - S_ij(x)|
        L_intra = 1/(|H||H|) sum_{i, j in H}      |S_ij(out) - S_ij(x)|

    x's side carries no gradient; the mean is over the batch; an empty H or V contributes 0. samples: use at
    most that many cells of H and of V of each image, drawn without replacement, without bias (None: all).
    form="direct": 1 - cos(psi_i(out), psi_i(x)) over H (intra) and over a ring of two cells around H (inter).
    """
    cells = psi_out.shape[-2:]
    h = hole_cells(mask, cells)
    out, x = (F.normalize(f.float(), dim=1) for f in (psi_out, psi_x.detach()))
    if form == "direct":
        ring = F.max_pool2d(h, 5, 1, 2) - h
        distance = 1 - (out * x).sum(1, keepdim=True)
        return _mean_where(distance, ring), _mean_where(distance, h)
    out, x, h = out.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2), h.flatten(1) > 0.5
    draw = torch.rand(h.shape, generator=generator).to(h.device, non_blocking=True)
    count_h, count_v = h.sum(1), (~h).sum(1)
    rows_h, in_h = _draw_cells(h, draw, samples)
    rows_v, in_v = _draw_cells(~h, draw, samples)
    out_h, x_h, out_v, x_v = (_take(f, rows) for rows in (rows_h, rows_v) for f in (out, x))
    inter = (
        (out_h @ out_v.transpose(1, 2) - x_h @ x_v.transpose(1, 2)).abs() * in_h[:, :, None] * in_v[:, None]
    )
    intra = (
        (out_h @ out_h.transpose(1, 2) - x_h @ x_h.transpose(1, 2)).abs() * in_h[:, :, None] * in_h[:, None]
    )
    n_h, n_v = in_h.sum(1), in_v.sum(1)
    inter = inter.sum((1, 2)) / (n_h * n_v).clamp_min(1)
    # The diagonal is 0 in truth and takes a larger share of a sample than of the whole: estimate without it.
    intra = intra - torch.diag_embed(intra.diagonal(dim1=1, dim2=2))
    intra = intra.sum((1, 2)) / (n_h * (n_h - 1)).clamp_min(1) * (count_h - 1) / count_h.clamp_min(1)
    both = (count_h > 0) & (count_v > 0)
    return torch.where(both, inter, 0.0).mean(), torch.where(count_h > 0, intra, 0.0).mean()


def _mean_where(value: Tensor, where: Tensor) -> Tensor:
    per_image = (value * where).sum((1, 2, 3)) / where.sum((1, 2, 3)).clamp_min(1)
    return per_image.mean()


def _draw_cells(member: Tensor, draw: Tensor, samples: int | None) -> tuple[Tensor, Tensor]:
    """Up to `samples` random members of each row of `member` (B, P): indices (B, n) and which are members."""
    n = member.shape[1] if samples is None else min(samples, member.shape[1])
    rows = (draw + member).topk(n, dim=1).indices
    return rows, member.gather(1, rows).float()


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
