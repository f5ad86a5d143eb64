"""FSIM, feature similarity of two grey images (Zhang et al., IEEE TIP 2011), batched.

Phase congruency after Kovesi with 4 scales and 4 orientations, gradients with the Scharr kernel, constants
0.85 and 160, as the authors' own implementation has them. The filters depend on the image size alone and are
kept; the transforms of a whole batch run together.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES, ORIENTATIONS = 4, 4
MIN_WAVELENGTH, MULTIPLE, SIGMA_ON_F, D_THETA_ON_SIGMA = 6, 2, 0.55, 1.2
NOISE_DEVIATIONS, NOISE_DIVISOR, EPSILON = 2.0, 1.7, 1e-4
CUTOFF, SHARPNESS = 0.45, 15
T1, T2 = 0.85, 160.0


def fsim(first: Tensor, second: Tensor) -> Tensor:
    """FSIM of grey images (B, 1, H, W) on 0..255: (B,), at most 1, 1 when equal. Symmetric."""
    return fsim_of_features(features(first), features(second))


def features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Phase congruency and gradient magnitude of (B, 1, H, W) on 0..255, each (B, h, w), h = H / reduction.

    To compare many predictions with the same truth, compute the truth's once.
    """
    small = _reduce(images.double())
    return phase_congruency(small[:, 0]), _gradient(small)[:, 0]


def fsim_of_features(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """FSIM from two results of `features`: (B,)."""
    (pc1, g1), (pc2, g2) = first, second
    similar_pc = (2 * pc1 * pc2 + T1) / (pc1.square() + pc2.square() + T1)
    similar_g = (2 * g1 * g2 + T2) / (g1.square() + g2.square() + T2)
    weight = torch.maximum(pc1, pc2)
    # Two pages without any structure have no weight: every pixel counts alike.
    weight = torch.where(weight.sum((1, 2), keepdim=True) > 0, weight, 1.0)
    return (similar_pc * similar_g * weight).sum((1, 2)) / weight.sum((1, 2))


def _reduce(images: Tensor) -> Tensor:
    """Average over F x F pixels and keep every F-th, F = max(1, round(shorter side / 256))."""
    factor = max(1, math.floor(min(images.shape[-2:]) / 256 + 0.5))
    if factor == 1:
        return images
    kernel = torch.full((1, 1, factor, factor), 1 / factor**2, dtype=images.dtype, device=images.device)
    # A 'same' convolution with an even kernel starts (factor - 1) // 2 to the left, as MATLAB's does.
    before, after = (factor - 1) // 2, factor // 2
    averaged = F.conv2d(F.pad(images, (before, after, before, after)), kernel)
    return averaged[..., ::factor, ::factor]


def _gradient(images: Tensor) -> Tensor:
    kernel = torch.tensor([[3.0, 0, -3], [10, 0, -10], [3, 0, -3]], dtype=images.dtype) / 16
    kernels = torch.stack([kernel, kernel.T])[:, None].to(images.device)
    return F.conv2d(images, kernels, padding=1).square().sum(1, keepdim=True).sqrt()


def phase_congruency(images: Tensor) -> Tensor:
    """Phase congruency of (B, H, W): (B, H, W), within [0, 1]."""
    height, width = images.shape[-2:]
    filters, noise = (x.to(images.device) for x in _filters(height, width))
    transformed = torch.fft.fft2(images)
    energy_all, amplitude_all = torch.zeros_like(images), torch.zeros_like(images)
    for o in range(ORIENTATIONS):
        # (B, S, H, W) complex: even and odd response of every scale
        response = torch.fft.ifft2(transformed[:, None] * filters[o])
        amplitude = response.abs()
        total = response.sum(1)
        length = total.abs() + EPSILON
        # E cos + O sin summed over the scales is |total|^2 / length; the rest is its perpendicular part.
        across = (response * total.conj()[:, None]).imag.abs().sum(1) / length
        energy = total.abs().square() / length - across
        median = _median(amplitude[:, 0].flatten(1).square())
        energy_all += (energy - (median * noise[o]).sqrt()[:, None, None]).clamp(min=0)
        amplitude_all += amplitude.sum(1)
    return energy_all / amplitude_all.clamp(min=torch.finfo(amplitude_all.dtype).tiny)  # flat: 0


def _median(x: Tensor) -> Tensor:
    """Median along the last axis, the mean of the two middle values when their number is even."""
    n = x.shape[-1]
    upper = x.kthvalue(n // 2 + 1).values
    return upper if n % 2 else (upper + x.kthvalue(n // 2).values) / 2


@lru_cache(maxsize=8)
def _filters(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Log-Gabor filters (O, S, H, W) in the order of the FFT, and per orientation the factor (O,) from the
    median squared amplitude of the finest scale to the squared noise threshold T^2."""
    y, x = torch.meshgrid(_frequencies(height), _frequencies(width), indexing="ij")
    radius, theta = (
        torch.fft.ifftshift((x.square() + y.square()).sqrt()),
        torch.fft.ifftshift(torch.atan2(-y, x)),
    )
    lowpass = 1 / (1 + (radius / CUTOFF) ** (2 * SHARPNESS))
    radius[0, 0] = 1  # its logarithm is taken; the filters are 0 there
    radial = []
    for s in range(SCALES):
        centre = 1 / (MIN_WAVELENGTH * MULTIPLE**s)
        radial.append(torch.exp(-((radius / centre).log() ** 2) / (2 * math.log(SIGMA_ON_F) ** 2)) * lowpass)
        radial[-1][0, 0] = 0
    sigma = math.pi / ORIENTATIONS / D_THETA_ON_SIGMA
    filters = torch.empty(ORIENTATIONS, SCALES, height, width, dtype=torch.float64)
    for o in range(ORIENTATIONS):
        angle = o * math.pi / ORIENTATIONS
        distance = torch.atan2((theta - angle).sin(), (theta - angle).cos()).abs()
        filters[o] = torch.stack(radial) * torch.exp(-distance.square() / (2 * sigma**2))
    # Noise: 2 p sum_s f_s^2 + 4 p sum_{s<t} f_s f_t = 2 p (sum_s f_s)^2 for p the noise power and f_s the
    # filters in space, summed over the image; T^2 is that over 2, times a constant.
    spatial = torch.fft.ifft2(filters).real * math.sqrt(height * width)
    summed = spatial.sum(1).square().sum((1, 2))
    power = 1 / (math.log(2) * filters[:, 0].square().sum((1, 2)))
    constant = (math.sqrt(math.pi / 2) + NOISE_DEVIATIONS * math.sqrt(2 - math.pi / 2)) / NOISE_DIVISOR
    return filters, summed * power * constant**2


def _frequencies(n: int) -> Tensor:
    """-0.5 .. 0.5 in the order of an image; with an odd number of samples both ends are reached."""
    half = n // 2
    if n % 2:
        return torch.arange(-half, half + 1, dtype=torch.float64) / (n - 1)
    return torch.arange(-half, half, dtype=torch.float64) / n
