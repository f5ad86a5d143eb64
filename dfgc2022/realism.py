"""Predicted realism of fakes (video realism assessment, arXiv:2302.00918): the creation score without raters.

Features of the detectors on each frame, mean and deviation over the frames, selection by the weights of a
linear support vector regression over repeated splits, min-max scaling, RBF support vector regression. A
predicted value is never shown as a rating.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVR, LinearSVR

from dfgc2022.boxes import box_source
from dfgc2022.model import pooled_features
from dfgc2022.pipeline import Scorer, Settings, normalise, pieces
from dfgc2022.protocol import Clip
from shared.io import progress
from shared.runtime import UserError

ENOUGH = 20
"""Rated clips that a prediction of realism is learnt from, at least."""


class NoFaceError(UserError):
    """A video that shows no face: there is none, or it cannot be read. The message names the video."""


def clip_features(video: Path, scorer: Scorer, settings: Settings, vra_compat: bool = False) -> np.ndarray:
    """Features (2 D,) of a video: mean and deviation (n - 1; 0 for one frame) over its frames of the members'
    pooled features, concatenated. Crops of 32 frames at a time are in memory.

    vra_compat: as the releases did it: pixels in [0, 1] without ImageNet normalisation, ConvNeXt before its
    last norm. Raises NoFaceError on a video without any face; one that can be read in part is named in a
    warning.
    """
    rows, note = [], ""
    for piece in pieces(video, 0, box_source(settings.boxes), scorer.sizes, settings):
        note = piece.note
        if piece.frames:
            rows.append(_frame_features(scorer, piece.crops, vra_compat))
    if not rows:
        raise NoFaceError(note or f"{video}: no face found")
    if note:
        print(f"warning: {note}; realism is judged by the frames before")
    joined = np.concatenate(rows)
    deviation = joined.std(0, ddof=1) if len(joined) > 1 else np.zeros(joined.shape[1], joined.dtype)
    return np.concatenate([joined.mean(0), deviation])


@torch.inference_mode()
def _frame_features(scorer: Scorer, crops: dict[int, np.ndarray], vra_compat: bool) -> np.ndarray:
    """Crops (n, S, S, 3) uint8 per side -> (n, D)."""
    features = []
    for network, entry, size in scorer.networks.values():
        images = torch.from_numpy(crops[size]).to(scorer.device)
        images = images.permute(0, 3, 1, 2).float() / 255 if vra_compat else normalise(images, entry)
        with torch.autocast(scorer.device.type, torch.bfloat16, enabled=scorer.bf16):
            pooled = pooled_features(network, images, vra_compat)
        features.append(pooled.float().cpu().numpy())
    return np.concatenate(features, 1)


def features_with_faces(
    videos: Sequence[Path], scorer: Scorer, settings: Settings
) -> tuple[list[int], np.ndarray]:
    """(numbers of the videos in which a face was found, their features (n, 2 D)); the others are named in
    warnings.
    """
    kept, rows = [], []
    for number, video in enumerate(progress(videos, "features")):
        try:
            rows.append(clip_features(video, scorer, settings))
            kept.append(number)
        except NoFaceError as error:
            print(f"warning: {video.name} takes no part in predicted realism: {error}")
    return kept, np.array(rows)


def select(
    features: np.ndarray, mos: np.ndarray, keep: int = 360, splits: int = 10, seed: int = 0
) -> np.ndarray:
    """Indices (keep,) of the features with the largest mean weight of a linear SVR (C = 2^6) over repeated
    80 % samples of the clips (n, D).
    """
    scaled = MinMaxScaler().fit_transform(features)
    rng, weight = np.random.default_rng(seed), np.zeros(features.shape[1])
    for _ in range(splits):
        chosen = rng.permutation(len(mos))[: max(2, int(0.8 * len(mos)))]
        regression = LinearSVR(C=64, dual=True, random_state=seed)
        with warnings.catch_warnings():
            # Which weights are large settles long before the solver does.
            warnings.simplefilter("ignore", ConvergenceWarning)
            weight += np.abs(regression.fit(scaled[chosen], mos[chosen]).coef_)
    return np.sort(np.argsort(-weight)[:keep])


class RealismModel:
    """Features of clips (n, D) -> realism on the raters' scale. The scaler fitted on the training clips is
    applied to the test clips as well, unlike in the 2023 starter kit.

    wide: search C in 2^1..10 and gamma in 2^-8..1 as the authors did; otherwise every third value.
    """

    def __init__(self, keep: int = 360, wide: bool = False, seed: int = 0):
        self.keep, self.seed, self.step = keep, seed, 1 if wide else 3
        self.chosen = np.empty(0, int)
        self.model: Pipeline | GridSearchCV = make_pipeline(MinMaxScaler(), SVR())

    def fit(self, features: np.ndarray, mos: np.ndarray) -> "RealismModel":
        """Choose features and settings, by three-fold search, on clips (n, D) and their scores (n,)."""
        self.chosen = select(features, mos, min(self.keep, features.shape[1]), seed=self.seed)
        grid = {
            "svr__C": [2.0**k for k in range(1, 11, self.step)],
            "svr__gamma": [2.0**k for k in range(-8, 2, self.step)],
        }
        search = GridSearchCV(make_pipeline(MinMaxScaler(), SVR()), grid, cv=3)
        self.model = search.fit(features[:, self.chosen], mos)
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Clips (n, D) -> realism (n,), cut to 1..5."""
        return np.clip(self.model.predict(features[:, self.chosen]), 1, 5)


def predict_unrated(
    clips: Sequence[Clip],
    paths: Mapping[str, Path],
    rated: Mapping[str, float],
    creators: Collection[str],
    scorer: Scorer,
    settings: Settings,
) -> dict[str, float]:
    """Realism predicted for `creators`, whom nobody rated: creator -> mean over its clips.

    rated: clip -> mean realism of the raters; these clips train the model. Clips without a face are left out,
    with a warning; with fewer than 20 clips to train on nothing is predicted, which a warning says as well.
    """
    known = [clip for clip in clips if clip.label == 1 and clip.name in rated]
    unknown = [clip for clip in clips if clip.label == 1 and clip.creator in creators]
    if not unknown:
        return {}
    if len(known) < ENOUGH:
        print(
            f"warning: realism is not predicted: that needs {ENOUGH} rated clips of this test set, the "
            f"ratings name {len(known)}"
        )
        return {}
    learnt, train = features_with_faces([paths[clip.name] for clip in known], scorer, settings)
    if len(learnt) < ENOUGH:
        print(
            f"warning: realism is not predicted: that needs {ENOUGH} rated clips with a face, there are "
            f"{len(learnt)}"
        )
        return {}
    asked, test = features_with_faces([paths[clip.name] for clip in unknown], scorer, settings)
    if not asked:
        return {}
    model = RealismModel().fit(train, np.array([rated[known[number].name] for number in learnt]))
    values, names = model.predict(test), np.array([unknown[number].creator for number in asked])
    return {name: float(values[names == name].mean()) for name in dict.fromkeys(names.tolist())}


def agreement(predicted: np.ndarray, mos: np.ndarray, logistic: bool = False) -> dict[str, float]:
    """PLCC, SRCC, KRCC and RMSE between predicted and human scores.

    logistic: fit y = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)) before PLCC and RMSE, on the test scores
    themselves, as the VRA code does: an optimistic habit. Empty where that fit does not converge or there are
    fewer values than its four parameters.
    """
    fitted = predicted
    if logistic:
        try:
            fitted = _logistic_fit(predicted, mos)
        except (RuntimeError, TypeError):  # no convergence, too few values
            return {}
    return {
        "PLCC": float(pearsonr(fitted, mos).statistic),
        "SRCC": float(spearmanr(predicted, mos).statistic),
        "KRCC": float(kendalltau(predicted, mos).statistic),
        "RMSE": float(np.sqrt(np.mean((fitted - mos) ** 2))),
    }


def _logistic_fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def curve(x: np.ndarray, b1: float, b2: float, b3: float, b4: float) -> np.ndarray:
        return b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4)))

    start = (y.max(), y.min(), float(np.median(x)), float(x.std()) or 1.0)
    with warnings.catch_warnings(), np.errstate(over="ignore"):  # a steep curve
        warnings.simplefilter("ignore", OptimizeWarning)  # the parameters' covariance is not asked for
        return curve(x, *curve_fit(curve, x, y, p0=start, maxfev=20_000)[0])
