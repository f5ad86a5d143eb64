"""Does a picture look like the training faces? A check for runs whose own small parser cannot tell: it has
seen nothing but faces."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, AXES = 12, 20
SLACK = 1.5
"""How many times the distance of nearly all training pictures a new face may have."""


class FaceSpace(nn.Module):
    """Distance from face space (Turk and Pentland, 1991): the Mahalanobis distance of a small grey version,
    mean 0 and deviation 1, under probabilistic PCA of the training pictures.

    `limits`: distances between which a picture is taken for a face; everything is one until `learn`.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(SIDE * SIDE))
        self.register_buffer("precision", torch.eye(SIDE * SIDE))
        self.register_buffer("limits", torch.tensor((float("-inf"), float("inf"))))

    def small(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 144); a flat picture gives zeros."""
        grey = F.adaptive_avg_pool2d(image.float().mean(1, keepdim=True), SIDE).flatten(1)
        grey = grey - grey.mean(1, keepdim=True)
        return grey / grey.std(1, keepdim=True).clamp_min(1e-2)

    def distance(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in any range -> squared distance (B,)."""
        offset = self.small(image) - self.mean
        return ((offset @ self.precision) * offset).sum(1)

    def learn(self, images: Tensor) -> None:
        """Set the space and its limits from training pictures (n, 3, H, W), n at least 2. Half a percent of
        them may lie below the lower limit, where pictures without structure are."""
        from sklearn.decomposition import PCA  # takes seconds, and only training needs it

        data = self.small(images)
        space = PCA(min(AXES, len(data) - 1)).fit(data.cpu().double().numpy())
        self.mean.copy_(torch.from_numpy(space.mean_))
        self.precision.copy_(torch.from_numpy(space.get_precision()))
        low, high = self.distance(images).quantile(torch.tensor((0.005, 0.995)).to(images)).tolist()
        self.limits.copy_(torch.tensor((low / SLACK, high * SLACK)))

    def contains(self, image: Tensor) -> Tensor:
        """Whether each picture (B, 3, H, W) looks like a training picture, (B,) bool."""
        distance = self.distance(image)
        return (distance >= self.limits[0]) & (distance <= self.limits[1])
