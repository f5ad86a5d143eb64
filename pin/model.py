"""PIN's own networks (DAE, ESN), the defence that they form with the eigenfaces, and the official weights.

Layer names are those of the official code, so that released weights load as they are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pin.ais import AISEncoder, AISSelection
from pin.basis import Basis
from pin.recognizers import LightCNN9, LightCNN29
from shared.irse import IRSE
from shared.runtime import UserError
from shared.weights import load_state, load_torch

MaskMode = Literal["sample", "threshold", "mean", "expected", "topk"]


class EncoderBlock(nn.Module):
    """conv 3x3, PReLU, conv 3x3 of the given stride, PReLU; plus a 1x1 convolution of the input when
    `shortcut`.

    There is no bias and no normalisation, and nothing follows the sum.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: bool = True):
        super().__init__()
        if shortcut:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.nolinear1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.nolinear2 = nn.PReLU(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.nolinear2(self.conv2(self.nolinear1(self.conv1(x))))
        return y + self.shortcut_layer(x) if self.shortcut else y


class DecoderBlock(nn.Module):
    """Transposed conv 3x3 (twice the size), PReLU, conv 3x3, PReLU or, at the output, tanh."""

    def __init__(self, inputs: int, outputs: int, output: bool = False):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(inputs, inputs, 3, 2, 1, output_padding=1, bias=False)
        self.nolinear1 = nn.PReLU(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.nolinear2 = nn.Tanh() if output else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.nolinear2(self.conv2(self.nolinear1(self.conv1(x))))


class DAE(nn.Module):
    """Denoising autoencoder of two cascaded stages: (B, 1, H, W) -> (x1, x2), H and W divisible by
    2^len(widths).

    The official code holds weights for a second stage and runs the first one twice. `second_stage="shared"`
    does the same, as the released weights were trained so; "separate" uses both.
    """

    def __init__(
        self, widths: tuple[int, ...] = (64, 128, 256), second_stage: Literal["shared", "separate"] = "shared"
    ):
        super().__init__()
        self.second_stage = second_stage
        self.encoder1, self.decoder1 = self._encoder(widths), self._decoder(widths)
        self.encoder2, self.decoder2 = self._encoder(widths), self._decoder(widths)
        if second_stage == "shared":  # never used: kept in the state, away from the optimiser
            self.encoder2.requires_grad_(False)
            self.decoder2.requires_grad_(False)

    @staticmethod
    def _encoder(widths: tuple[int, ...]) -> nn.Sequential:
        pairs = zip((1, *widths), widths, strict=False)
        return nn.Sequential(*(EncoderBlock(a, b, 2, shortcut=False) for a, b in pairs))

    @staticmethod
    def _decoder(widths: tuple[int, ...]) -> nn.Sequential:
        down = (*reversed(widths), 1)
        last = len(widths) - 1
        return nn.Sequential(*(DecoderBlock(down[i], down[i + 1], i == last) for i in range(len(widths))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.decoder1(self.encoder1(x))
        if self.second_stage == "shared":
            return x1, self.decoder1(self.encoder1(x1))
        return x1, self.decoder2(self.encoder2(x1))


class Encoder(nn.Module):
    """Trunk of the eigenvector selection network: (B, 1, H, W) -> (B, widths[-1], H / 2^n, W / 2^n)."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.in_layer = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.PReLU(widths[0]))
        self.depth = 2 * len(widths)
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            self.add_module(f"block{2 * i + 1}", EncoderBlock(before, width, 2))
            self.add_module(f"block{2 * i + 2}", EncoderBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_layer(x)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"block{i}")(x)
        return x


class PCASelection(nn.Module):
    """Head of the ESN: trunk features -> keep-probability of each eigenface, (B, K) in (0, 1)."""

    def __init__(self, features: int = 25088, hidden: int = 512, components: int = 2500):
        super().__init__()
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.PReLU(hidden))
        self.fc2 = nn.Sequential(nn.Linear(hidden, components), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        logits, sigmoid = self.fc2
        # In float32 whatever autocast says: bf16 has no number between 0.996 and 1, and at 1 no gradient.
        return sigmoid(logits(self.fc1(features)).float())


class ESN(nn.Module):
    """Eigenvector selection network: trunk and head, image (B, 1, H, W) -> p (B, K)."""

    def __init__(self, encoder: nn.Module, pca_layer: nn.Module):
        super().__init__()
        self.encoder, self.pca_layer = encoder, pca_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.pca_layer(self.encoder(x)).float()


def make_esn(
    size: int, components: int, widths: tuple[int, ...] = (64, 128, 256, 512), hidden: int = 512
) -> ESN:
    """ESN for square images of `size` pixels (112 with the default widths is the official one)."""
    side = size
    for _ in widths:
        side = (side + 1) // 2
    return ESN(Encoder(widths), PCASelection(widths[-1] * side * side, hidden, components))


class PIN(nn.Module):
    """Perturbation inactivation: x -> m + U diag(q) U^T (x - m), with q drawn from p = ESN(DAE(x)).

    x: (B, 1, H, W) in [-1, 1]; the result has the same shape and may leave that range (`clamp` cuts it).

    mode: how p becomes the mask q. "sample": q = 1[p > u], u uniform (official). "threshold": q = p > 0.5.
    "mean": q = p > mean of p over the whole batch (in the official code, unused there). "expected": q = p.
    "topk": the `k` largest of each p.
    gradient: what an attacker who differentiates through the defence gets. "constant": q does not depend on x
    (the authors' own self-attack). "straight_through": dq = dp, on through ESN and DAE.
    dae=None: the ESN sees the input itself.
    """

    def __init__(
        self,
        basis: Basis,
        dae: nn.Module | None,
        esn: nn.Module,
        mode: MaskMode = "sample",
        k: int | None = None,
        gradient: Literal["constant", "straight_through"] = "constant",
        clamp: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.basis, self.dae, self.esn = basis, dae, esn
        self.mode, self.k, self.gradient, self.clamp, self.generator = mode, k, gradient, clamp, generator

    def probabilities(self, x: Tensor) -> Tensor:
        """Keep-probabilities p (B, K). UserError for images of another size than the eigenfaces'."""
        self.basis.require_fit(x)
        return self.esn(x if self.dae is None else self.dae(x)[1])

    def mask(self, p: Tensor) -> Tensor:
        """q (B, K) by `mode`, without gradient except in "expected"."""
        if self.mode == "expected":
            return p
        hard = p.detach()
        if self.mode == "sample":
            device = self.generator.device if self.generator is not None else p.device
            uniform = torch.rand(p.shape, generator=self.generator, device=device, dtype=p.dtype)
            return (hard > uniform.to(p.device)).to(p.dtype)
        if self.mode == "threshold":
            return (hard > 0.5).to(p.dtype)
        if self.mode == "mean":
            return (hard > hard.mean()).to(p.dtype)
        k = min(self.k if self.k is not None else p.shape[1], p.shape[1])
        return torch.zeros_like(p).scatter_(1, hard.topk(k, dim=1).indices, 1.0)

    def project(self, x: Tensor, q: Tensor) -> Tensor:
        """m + U diag(q) U^T (x - m). q (B, K); q = 0 gives the mean face, q = 1 the whole span."""
        return self.basis.reconstruct(self.basis.coefficients(x) * q, x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient == "straight_through":
            p = self.probabilities(x)
            q = self.mask(p)
            q = q + p - p.detach() if self.mode != "expected" else q
        else:
            with torch.no_grad():
                q = self.mask(self.probabilities(x))
        purified = self.project(x, q)
        return purified.clamp(-1, 1) if self.clamp else purified


class Defended(nn.Module):
    """recognizer(defense(x)), features averaged over `draws` masks (unit length each) when more than one.

    recognizer: anything that maps images (B, 1, H, W) to features (B, d): a module, a function around an ONNX
    session, a call to a web service.
    """

    def __init__(
        self, recognizer: Callable[[Tensor], Tensor], defense: Callable[[Tensor], Tensor], draws: int = 1
    ):
        super().__init__()
        self.recognizer, self.defense, self.draws = recognizer, defense, draws

    def forward(self, x: Tensor) -> Tensor:
        features = self.recognizer(self.defense(x))
        if self.draws == 1:
            return features
        features = F.normalize(features)
        for _ in range(self.draws - 1):
            features = features + F.normalize(self.recognizer(self.defense(x)))
        return features / self.draws


NETWORKS = {
    "dae": DAE,
    "encoder": Encoder,
    "pca_layer": PCASelection,
    "arcface_ir_se50": partial(IRSE, dropout=0.4, variant="pin"),
    "arcface_ir50": partial(IRSE, dropout=0.4, se=False, variant="pin"),
    "lightcnn9": LightCNN9,
    "lightcnn29": LightCNN29,
    "lightcnn29_v2": lambda **options: LightCNN29(v2=True, **options),
    "ais_encoder": AISEncoder,
    "ais_pca_layer": AISSelection,
}
PARTS = {
    "dae": "dae",
    "encoder": "encoder",
    "pca_layer": "pca_layer",
    "ais_encoder": "encoder",
    "ais_pca_layer": "pca_layer",
}
"""Names inside one combined file, PIN's (the official DefenseModel) or AIS'; recognisers are `reg_model`."""


def official(name: str, **options) -> nn.Module:
    """A network of the official code at full size, freshly initialised.

    name: a key of `NETWORKS`. options: of its class, for example `variant="insightface_pytorch"` for the IR
    networks or `classes=` for Light CNN. Raises UserError on an unknown name.
    """
    if name not in NETWORKS:
        raise UserError(f"no network {name!r} in PIN; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](**options)


def load_official(name: str, path: Path) -> nn.Module:
    """The network `name` with the weights of a released file, in evaluation mode.

    Understands a bare state dict, wrappers (`model`, `state_dict`), a `module.` prefix, one combined file
    with `dae`, `encoder`, `pca_layer`, `reg_model` as entries or prefixes (PIN's and AIS'), both IR variants
    and other numbers of Light CNN classes. Raises UserError that lists what does not fit.
    """
    options = {}
    state = _unwrap(name, load_torch(path), path)
    if name.startswith("arcface"):
        options["variant"] = ir_variant(state)
    if name.startswith("lightcnn") and "fc2.weight" in state:
        options["classes"] = state["fc2.weight"].shape[0]
    network = official(name, **options)
    load_state(network, state, str(path))
    return network.eval()


def ir_variant(state: dict[str, Tensor]) -> str:
    """Which of the two public IR(-SE) layouts a state dict has, told from its keys alone."""
    return "pin" if "body.0.shortcut_layer.0.weight" in state else "insightface_pytorch"


def _unwrap(name: str, content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no weights but a {type(content).__name__}")
    part = PARTS.get(name, "reg_model")
    wrappers = (part, "model", "state_dict")
    while inner := next((content[key] for key in wrappers if isinstance(content.get(key), dict)), None):
        content = inner
    state = {
        str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)
    }
    own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    if own:
        state = {key.removeprefix("module."): value for key, value in own.items()}
    if not state:
        raise UserError(f"{path}: holds no weights; its entries are {', '.join(map(str, list(content)[:8]))}")
    return state
