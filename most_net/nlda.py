"""Face recognition from sketches with null-space linear discriminant analysis.

The protocol of the sketch-synthesis literature: random partitions of the test people; the classifier learns
from two samples per training person (drawn and synthesised sketch, raw grey pixels); then the drawn
sketches of the other people are searched among their synthesised ones. All of it needs inner products of
images only, so one Gram matrix serves every partition.
"""

from dataclasses import dataclass

import numpy as np

from shared.io import progress


@dataclass(frozen=True)
class Recognition:
    """Rank-1 accuracy in [0, 1] averaged over the partitions, for 1, 2, ... dimensions."""

    curve: np.ndarray
    partitions: int

    @property
    def best(self) -> float:
        """The published number: the maximum over the dimensions."""
        return float(self.curve.max())


def recognition(
    drawn: np.ndarray,
    synthesised: np.ndarray,
    train_people: int,
    partitions: int = 20,
    seed: int = 0,
) -> Recognition:
    """NLDA recognition rate of synthesised sketches.

    drawn, synthesised: (N, D) pixels, row i of both is person i. train_people: 150 on CUFS (of 338), 300 on
    CUFSF (of 944), where it keeps 2 * train_people - 1 principal components, all that there are (the
    literature says 300 and 600). Raises ValueError when too few people are left to be searched.
    """
    people = len(drawn)
    if not 2 <= train_people <= people - 2:
        raise ValueError(f"{train_people} training people of {people} leave nobody to train on or to search")
    images = np.concatenate([drawn, synthesised]).astype(np.float64)
    gram = images @ images.T
    rng = np.random.default_rng(seed)
    curves = []
    for _ in progress(range(partitions), "NLDA"):
        order = rng.permutation(people)
        train, test = order[:train_people], order[train_people:]
        curves.append(_accuracy(gram, people, train, test))
    return Recognition(np.mean(curves, axis=0), partitions)


def _accuracy(gram: np.ndarray, people: int, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Rank-1 accuracy of one partition for every number of discriminant dimensions, (train - 1,)."""
    n = len(train)
    chosen = np.concatenate([train, train + people])
    components = _principal(gram[np.ix_(chosen, chosen)], 2 * n - 1)
    # Coordinates of any image: its inner products with the centred training images, through the components.
    mean = gram[:, chosen].mean(1, keepdims=True)
    centre = gram[np.ix_(chosen, chosen)].mean(0) - gram[np.ix_(chosen, chosen)].mean()
    coordinates = (gram[:, chosen] - mean - centre) @ components
    first, second = coordinates[train], coordinates[train + people]
    projection = null_space_directions(first, second)
    probe, gallery = coordinates[test] @ projection, coordinates[test + people] @ projection
    # Squared distances for 1, 2, ... dimensions are running sums over the dimensions.
    distance = np.zeros((len(test), len(test)))
    accuracy = np.empty(projection.shape[1])
    for d in range(projection.shape[1]):
        distance += (probe[:, d, None] - gallery[None, :, d]) ** 2
        accuracy[d] = np.mean(distance.argmin(1) == np.arange(len(test)))
    return np.pad(accuracy, (0, n - 1 - len(accuracy)), mode="edge")


def _principal(gram: np.ndarray, dimensions: int) -> np.ndarray:
    """Principal components as combinations of the centred training images: (n, dimensions)."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
    solid = values > 1e-10 * values[0]
    return vectors[:, solid] / np.sqrt(values[solid])


def null_space_directions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Directions that tell people apart and map both samples of a person to one point.

    first, second: (n, d), the two samples of each person. Returns an orthonormal (d, at most n - 1), the
    largest between-class variance first: the null space of the within-class scatter, then its principal axes.
    Raises ValueError when the within-class scatter has no null space.
    """
    within = first - second
    _, values, axes = np.linalg.svd(within, full_matrices=True)
    rank = int((values > 1e-10 * max(values.max(), 1e-300)).sum())
    null = axes[rank:].T
    if null.shape[1] == 0:
        raise ValueError("the within-class scatter has no null space: more dimensions are needed")
    means = (first + second) / 2 @ null
    _, values, axes = np.linalg.svd(means - means.mean(0), full_matrices=False)
    keep = min(len(first) - 1, null.shape[1])
    return null @ axes[:keep].T
