"""The face recogniser of the identity loss: IR-SE50 trained with ArcFace (`shared/irse.py`)."""

from torch import Tensor, nn
from torch.nn import functional as F

from shared.irse import IRSE

SIDE = 112
"""Side of its pictures."""


class IRSE50(IRSE):
    """(B, 3, 112, 112) in [-1, 1] -> embedding of length 1 (B, 512) and the outputs of its 24 units."""

    def embed(self, x: Tensor) -> Tensor:
        """The embedding alone."""
        return super().forward(x)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self.input_layer(x), []
        for unit in self.body:
            x = unit(x)
            features.append(x)
        return self.forward_head(x), features


class Recogniser(nn.Module):
    """A frozen embedding network for whole crops: (B, 3, S, S) in [-1, 1] -> (B, D) of length 1.

    The picture is resized to `side` (bilinear, corners aligned), as in the official loss. crop: share of the
    picture's side that is kept around its centre before that; 1 is the official whole picture.
    """

    def __init__(self, network: IRSE50, side: int = SIDE, crop: float = 1.0):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.side, self.crop = side, crop

    def train(self, mode: bool = True) -> "Recogniser":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.crop < 1:
            cut = round(x.shape[-1] * (1 - self.crop) / 2)
            x = x[..., cut : x.shape[-2] - cut, cut : x.shape[-1] - cut]
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=True)
        return self.network.embed(x)
