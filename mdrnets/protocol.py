"""How results are measured: on the composited 8-bit picture, in RGB, averaged over pictures.

Numbers of one protocol must not be set beside those of another. `ours`: PSNR and SSIM (11x11 Gaussian at
every pixel, pictures mirrored at their borders as torchmetrics does) in RGB, L1 in percent of the range.
`edgeconnect`: that project's script, grey pictures, 51x51 uniform SSIM window, relative error.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import metrics as shared_metrics
from shared.runtime import UserError

Protocol = Literal["ours", "edgeconnect"]
PROTOCOL_NAMES = {
    "ours": "8-bit RGB composite, SSIM 11x11 Gaussian",
    "edgeconnect": "EdgeConnect: grey, SSIM 51x51 uniform, relative L1",
}
GREY = torch.tensor((0.2125, 0.7154, 0.0721)).view(1, 3, 1, 1)
"""Luminance weights that scikit-image uses, and with it EdgeConnect's script."""
FEWEST_FOR_FID = 2000

Method = Callable[[Tensor, Tensor], Tensor]
"""(x (B, 3, H, W) in [-1, 1], mask (B, 1, H, W)) -> completed image of the same shape."""


def to_bytes(image: Tensor) -> Tensor:
    """[-1, 1] -> what an 8-bit file would hold, in [0, 1]."""
    return (image.float() / 2 + 0.5).clamp(0, 1).mul(255).round() / 255


def psnr_of(error: Tensor) -> Tensor:
    """Mean squared error on [0, 1] -> dB."""
    return -10 * error.clamp_min(1e-10).log10()


def measure(output: Tensor, truth: Tensor, mask: Tensor, protocol: Protocol = "ours") -> dict[str, Tensor]:
    """Scores of each picture, (B,) each. output, truth: (B, 3, H, W) in [0, 1], already 8-bit; mask: 1 =
    corrupted.

    ours: `PSNR` and `PSNR hole` (over corrupted pixels alone) in dB, `SSIM`, `L1` and `L1 hole` in %.
    edgeconnect: `PSNR`, `SSIM`, `relative L1`. Raises UserError when pictures are smaller than EdgeConnect's
    window.
    """
    if protocol == "edgeconnect":
        a, b = ((image * GREY.to(image)).sum(1, keepdim=True) for image in (output, truth))
        return {
            "PSNR": psnr_of((a - b).square().mean((1, 2, 3))),
            "SSIM": uniform_ssim(a, b, 51),
            "relative L1": (a - b).abs().sum((1, 2, 3)) / (a + b).sum((1, 2, 3)).clamp_min(1e-8),
        }
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

    area = 3 * mask.sum((1, 2, 3)).clamp_min(1)
    square, absolute = (output - truth).square(), (output - truth).abs()
    return {
        "PSNR": psnr_of(square.mean((1, 2, 3))),
        "PSNR hole": psnr_of((square * mask).sum((1, 2, 3)) / area),
        "SSIM": structural_similarity_index_measure(
            output, truth, gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none"
        ).reshape(len(output)),
        "L1": 100 * absolute.mean((1, 2, 3)),
        "L1 hole": 100 * (absolute * mask).sum((1, 2, 3)) / area,
    }


def uniform_ssim(a: Tensor, b: Tensor, window: int) -> Tensor:
    """SSIM of (B, 1, H, W) with a uniform window and unbiased variances, borders cut, (B,). Wang et al.
    (2004) in scikit-image's default form."""
    if min(a.shape[-2:]) < window:
        raise UserError(
            f"this protocol needs pictures of at least {window} pixels, not {tuple(a.shape[-2:])}"
        )
    correction = window**2 / (window**2 - 1)
    a, b = a.double(), b.double()
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, window, 1) for x in (a, b, a * a, b * b, a * b))
    var_a, var_b = correction * (aa - mean_a**2), correction * (bb - mean_b**2)
    covariance = correction * (ab - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3)).float()


class Scores:
    """Scores of one method on one mask bin, collected batch by batch; also FID and LPIPS where weights are
    given.

    lpips: a network of `shared.metrics.perceptual_network`, or None. inception: `InceptionFeatures`, or None.
    """

    def __init__(
        self, protocol: Protocol, lpips: nn.Module | None = None, inception: nn.Module | None = None
    ):
        self.protocol, self.lpips = protocol, lpips
        self.values: dict[str, list[Tensor]] = {}
        self.count = 0
        self.inception, self.frechet = inception, None
        if inception is not None:
            from torchmetrics.image import FrechetInceptionDistance  # takes seconds

            given = nn.Identity()  # the features are computed here
            given.num_features = inception.num_features
            self.frechet = FrechetInceptionDistance(feature=given)

    def add(self, output: Tensor, x: Tensor, mask: Tensor, features: Tensor | None = None) -> None:
        """A batch in [-1, 1]. features: what `inception` makes of `to_bytes(x)`, where it is known already.
        Raises ValueError when a kept pixel was changed: the composite must be exact."""
        kept = mask < 0.5
        if not torch.equal(output.masked_select(kept), x.masked_select(kept)):
            raise ValueError("the completed picture differs from the input outside the hole")
        output, truth = to_bytes(output), to_bytes(x)
        scores = measure(output, truth, mask, self.protocol)
        if self.lpips is not None:
            with torch.inference_mode():
                scores["LPIPS"] = self.lpips(output * 2 - 1, truth * 2 - 1).flatten()
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value.cpu())
        self.count += len(output)
        if self.frechet is not None:
            self.frechet.to(output.device)
            self.frechet.update(self.inception(truth) if features is None else features, real=True)
            self.frechet.update(self.inception(output), real=False)

    def means(self) -> dict[str, float]:
        """Mean over pictures of every score; FID over all of them, from 2,000 pictures on."""
        result = {name: torch.cat(values).mean().item() for name, values in self.values.items()}
        if self.frechet is not None and self.count >= FEWEST_FOR_FID:
            result["FID"] = self.frechet.compute().item()
        return result


UNITS = {"PSNR": "dB", "PSNR hole": "dB", "L1": "%", "L1 hole": "%"}


def optional_networks(
    lpips_weights: Path | None, fid_weights: Path | None, device: torch.device
) -> tuple[nn.Module | None, nn.Module | None]:
    """The networks of LPIPS and FID, each None unless its weights file is given: nothing replaces them."""
    lpips = shared_metrics.perceptual_network("alex", lpips_weights).to(device) if lpips_weights else None
    inception = shared_metrics.InceptionFeatures(fid_weights).to(device) if fid_weights else None
    return lpips, inception


def mean(values: list[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
