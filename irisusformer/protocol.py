"""Run a network over a test set and collect every metric; used by eval.py and cross_database.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from irisusformer.data import enlarged, shrunk
from irisusformer.losses import IGNORE
from irisusformer.metrics import (
    Calibration,
    ErrorDetection,
    average_scores,
    edge_ratio,
    image_correlation,
    localisation_scores,
    segmentation_scores,
)
from irisusformer.model import IrisUsformer
from irisusformer.uncertainty import confidence, fit_temperature
from shared.io import progress

# Other scores of the same picture: name -> (probability whose errors are to be found, score).
Scores = Callable[[Tensor, dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]


@dataclass
class Result:
    """Everything measured on one test set. `segmentation` and `localisation` are means over images."""

    images: list[dict[str, float]] = field(default_factory=list)
    boundaries: list[dict[str, float]] = field(default_factory=list)
    detection: dict[str, ErrorDetection] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration.empty)
    edges: list[tuple[float, float]] = field(default_factory=list)
    mean_uncertainty: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)

    def segmentation(self) -> dict[str, float]:
        """Means of `segmentation_scores`, percent."""
        return average_scores(self.images)

    def localisation(self) -> dict[str, float]:
        """Means of `localisation_scores`; empty without boundary heads or their truth."""
        return average_boundaries(self.boundaries)

    def uncertainty(self, score: str = "u") -> dict[str, float]:
        """Metrics of one score as an error detector; of u also the edge ratio and the image level."""
        summary = self.detection[score].summary()
        if score == "u":
            inside, outside = np.nanmean(np.array(self.edges), 0)
            summary["edge_ratio"] = float(inside / outside)
            e1 = [image["e1"] for image in self.images]
            summary["image_spearman"] = image_correlation(self.mean_uncertainty, e1)
        return summary

    def ece(self) -> float:
        """Expected calibration error of p, in [0, 1]."""
        return self.calibration.ece()

    def scaled_ece(self) -> tuple[float, float]:
        """ECE after temperature scaling, and the mean temperature: each half of the images is scaled with
        the temperature fitted on the other half. One image has no other half: nan."""
        if len(self.logits) < 2:
            return float("nan"), float("nan")
        calibration, temperatures = Calibration.empty(), []
        for fold in (0, 1):
            logits, truth = torch.cat(self.logits[1 - fold :: 2]), torch.cat(self.truth[1 - fold :: 2])
            temperatures.append(fit_temperature(logits, truth))
            held_out = torch.cat(self.logits[fold::2]) / temperatures[-1]
            calibration.add(held_out.sigmoid().numpy(), torch.cat(self.truth[fold::2]).numpy())
        return calibration.ece(), float(np.mean(temperatures))


def average_boundaries(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over images; empty when there are none."""
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]} if scores else {}


@torch.no_grad()
def evaluate(
    model: IrisUsformer,
    data: Dataset,
    device: torch.device,
    batch_size: int = 1,
    more: Scores | None = None,
    sampled: int = 4096,
    short_side: int | None = None,
) -> Result:
    """Evaluate a network on a data set of samples (see data.py); pictures of different sizes: batch_size 1.

    more: further uncertainty scores for each batch. sampled: pixels per image kept for temperature scaling.
    short_side: larger images are shrunk to it for the network, and its maps enlarged again.
    """
    model.eval()
    result = Result()
    for batch in progress(DataLoader(data, batch_size), "evaluating"):
        image = shrunk(batch["image"].to(device, memory_format=torch.channels_last), short_side)
        found, size = model.predict(image), batch["image"].shape[-2:]
        others = more(image, found) if more else {}
        out = {name: enlarged(value, size).cpu() for name, value in found.items()}
        scores = {
            "u": (out["prob"], out["uncertainty"]),
            "confidence": (out["prob"], confidence(out["prob"])),
        }
        scores |= {
            name: tuple(enlarged(value, size).cpu() for value in pair) for name, pair in others.items()
        }
        truth = (batch["mask"] == 1).numpy()  # only augmented samples have pixels to ignore
        for name, (prob, score) in scores.items():
            wrong = (prob >= 0.5).numpy() != truth
            detector = result.detection.setdefault(name, ErrorDetection.empty())
            detector.add(score.numpy(), wrong)
        result.calibration.add(out["prob"].numpy(), truth)
        for i in range(len(image)):
            mask, u = out["prob"][i, 0].numpy() >= 0.5, out["uncertainty"][i, 0].numpy()
            result.images.append(segmentation_scores(mask, truth[i, 0]))
            result.edges.append(edge_ratio(u, truth[i, 0]))
            result.mean_uncertainty.append(float(u.mean()))
            prob = out["prob"][i].flatten()
            step = max(1, prob.numel() // sampled)
            result.logits.append(torch.logit(prob.double()[::step], 1e-12).float())
            result.truth.append(torch.from_numpy(truth[i].ravel()[::step].copy()))
            regions = batch["regions"][i]
            if "pupil" in out and not (regions == IGNORE).any():
                found = torch.cat([out["pupil"][i], out["outer"][i]]).numpy() >= 0.5
                result.boundaries.append(localisation_scores(found, regions.numpy().astype(bool)))
    return result
