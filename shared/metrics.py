"""Metrics that several papers share. Images are float in [0, 1] everywhere here.

scikit-learn and torchmetrics are imported where they are used: they take longer to import than PyTorch, and
every command that may need a metric would wait for them.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.runtime import UserError
from shared.weights import download_url, load_torch, pretrained_path

# --- image quality --------------------------------------------------------------------------------


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of (B, C, H, W), data range 1, mean over images; inf when equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(prediction, target, data_range=1.0, dim=(1, 2, 3)).item()


def ssim(prediction: Tensor, target: Tensor) -> float:
    """Structural similarity of (B, C, H, W), at most 1, data range 1, mean over images. Gaussian window of
    11x11 pixels, sigma 1.5 (Wang et al., 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(prediction, target, data_range=1.0).item()


def perceptual_network(net: str = "alex", weights: Path | None = None) -> nn.Module:
    """The network of LPIPS (Zhang et al., 2018), version 0.1: an ImageNet backbone and its linear heads.

    net: alex or vgg. weights: torchvision's ImageNet state dict of that backbone; None downloads it. The
    heads come with torchmetrics. Raises UserError when the weights are not to be had, or other ones.
    """
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    source = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[net].IMAGENET1K_V1
    path = pretrained_path(
        f"LPIPS backbone ({net})",
        weights,
        f"get {source.url.rsplit('/', 1)[1]} from torchvision's model list and give its path",
        download_url(source.url),
    )
    state = load_torch(path)
    network = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    for name, parameter in network.net.named_parameters():
        layer = "features." + name.split(".", 1)[1]  # slice3.6.weight -> features.6.weight
        if layer not in state or state[layer].shape != parameter.shape:
            raise UserError(
                f"{path}: not torchvision's {net} weights ({layer} is missing or of another shape)"
            )
        parameter.data.copy_(state[layer])
    return network


def lpips(prediction: Tensor, target: Tensor, network: nn.Module) -> float:
    """LPIPS distance of (B, 3, H, W), at least 0, mean over images. network: of `perceptual_network`."""
    with torch.inference_mode():
        return network(prediction * 2 - 1, target * 2 - 1).mean().item()


# --- distances between distributions ----------------------------------------------------------------


INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class InceptionFeatures(nn.Module):
    """The 2,048 pool features of the TensorFlow InceptionV3 that FID and KID are defined on.

    weights: torch-fidelity's file `weights-inception-2015-12-05-6726825d.pth`; None downloads it. Raises
    UserError when it is not to be had.
    """

    num_features = 2048

    def __init__(self, weights: Path | None = None):
        from torchmetrics.image.fid import NoTrainInceptionV3

        super().__init__()
        path = pretrained_path(
            "InceptionV3 for FID and KID",
            weights,
            f"get {INCEPTION_URL.rsplit('/', 1)[1]} from torch-fidelity's releases and give its path",
            download_url(INCEPTION_URL),
        )
        load_torch(path)  # names a damaged file, and runs nothing that it may hold
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not torch-fidelity's weights of InceptionV3 ({reason})") from None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 2048). The network takes bytes and resizes by itself."""
        return self.network(images.mul(255).round().byte())


def fid(real: Iterable[Tensor], fake: Iterable[Tensor], network: nn.Module | None = None) -> float:
    """Frechet distance between the features of two sets of images (Heusel et al., 2017), lower is better.

    real, fake: batches (B, 3, H, W). network: (B, 3, H, W) -> (B, D) with an attribute `num_features` D;
    only `InceptionFeatures` gives what papers call FID. Without network, real and fake are batches (B, D) of
    features that are computed already.
    """
    from torchmetrics.image import FrechetInceptionDistance

    network, real = _extractor(network, real)
    return _distance(FrechetInceptionDistance(feature=network), real, fake).item()


def kid(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    network: nn.Module | None = None,
    subsets: int = 100,
    size: int = 1000,
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al., 2018): mean and deviation over random subsets of `size` images.

    Arguments as for `fid`. Raises ValueError when a set has fewer than `size` images.
    """
    from torchmetrics.image import KernelInceptionDistance

    network, real = _extractor(network, real)
    metric = KernelInceptionDistance(feature=network, subsets=subsets, subset_size=size)
    mean, deviation = _distance(metric, real, fake)
    return mean.item(), deviation.item()


def _extractor(network: nn.Module | None, real: Iterable[Tensor]) -> tuple[nn.Module, Iterable[Tensor]]:
    """The network for torchmetrics, which asks it for its number of features, and the batches of one set."""
    if network is None:
        network, real = nn.Identity(), list(real)
        network.num_features = real[0].shape[1]
    return network, real


def _distance(metric: nn.Module, real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    with torch.inference_mode():
        for batches, is_real in ((real, True), (fake, False)):
            for images in batches:
                metric.to(images.device).update(images, real=is_real)
        return metric.compute()


# --- verification -----------------------------------------------------------------------------------
# scores: higher means "same" (positive). labels: 1 for a genuine pair, 0 for an impostor.


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False accept rate, true accept rate and threshold at every distinct score, from strict to lax."""
    from sklearn.metrics import roc_curve

    return roc_curve(labels, scores, drop_intermediate=False)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, in [0, 1]; ties count half. ValueError when only one class is there."""
    if len(np.unique(labels)) != 2:
        raise ValueError("AUC needs genuine and impostor scores")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def eer(scores: np.ndarray, labels: np.ndarray) -> float:
    """Equal error rate in [0, 1]: where false accepts and false rejects cross, interpolated on the ROC."""
    far, tar, _ = roc(scores, labels)
    gap = far - (1 - tar)  # rises from -1 to 1
    after = int(np.searchsorted(gap, 0))
    if gap[after] == 0:
        return float(far[after])
    weight = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(far[after - 1] + weight * (far[after] - far[after - 1]))


def tar_at_far(scores: np.ndarray, labels: np.ndarray, far: float) -> float:
    """True accept rate in [0, 1] at the laxest threshold whose false accept rate is at most `far`."""
    rates, tar, _ = roc(scores, labels)
    return float(tar[rates <= far].max())


def best_threshold_accuracy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy in [0, 1], threshold) of the threshold that decides most pairs rightly, "same" from it on."""
    far, tar, thresholds = roc(scores, labels)
    positive = np.mean(labels)
    accuracy = tar * positive + (1 - far) * (1 - positive)
    best = int(np.argmax(accuracy))
    return float(accuracy[best]), float(thresholds[best])
