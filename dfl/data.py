"""Federations with attributes skew: handwritten digits whose style depends on the client and on the label.

In every client an attribute (the background colour, say) follows the label by a rule of that client's own, on
a share rho of the samples. Within a client the attribute predicts the label, between clients the rules
contradict each other: predictive, only locally valid, and not causal. The attribute of every sample is
recorded. Real domains and folders of images are read in `domains.py`. Both are our choice: the text that
names the paper's data sets was not available to us.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.io import image_grid
from shared.runtime import UserError, step_generator

if TYPE_CHECKING:
    from dfl.train import Config


@dataclass(frozen=True)
class Samples:
    """images (n, 3, H, W): uint8, or float32 about [0, 1]; labels (n,) int64; attributes (n,) int64."""

    images: Tensor
    labels: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Samples":
        return Samples(self.images[index], self.labels[index], self.attributes[index])

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.images.to(device), self.labels.to(device), self.attributes.to(device))


@dataclass(frozen=True)
class ClientData:
    """What one client owns. `number` is its place in the federation."""

    number: int
    name: str
    train: Samples
    test: Samples


@dataclass(frozen=True)
class Federated:
    """All clients, what no client sees, and how an image becomes the networks' input.

    counterfactual: attributes drawn independently of the labels (None where nobody can draw them).
    unseen: a domain that no client has. mean, std: the input is (image - mean) / std, per channel.
    """

    name: str
    classes: int
    attributes: int
    clients: list[ClientData]
    counterfactual: Samples | None = None
    unseen: Samples | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    augment: Callable[[Tensor, Tensor], Tensor] | None = None
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.clients[0].test.images.shape[1:])

    def prepare(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) raw -> float32 network input."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        return (x - _per_channel(self.mean, x.device)) / _per_channel(self.std, x.device)

    def to(self, device: torch.device) -> "Federated":
        """All images on `device`, so that no loader stands between it and the networks."""
        return replace(
            self,
            clients=[
                replace(client, train=client.train.to(device), test=client.test.to(device))
                for client in self.clients
            ],
            counterfactual=self.counterfactual and self.counterfactual.to(device),
            unseen=self.unseen and self.unseen.to(device),
        )


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: a copy to a GPU in every batch would wait for all that the GPU still has to do.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


# --- digits ---------------------------------------------------------------------------------------


def sklearn_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled handwritten digits: (1797, 8, 8) in [0, 1], labels (1797,)."""
    from sklearn.datasets import load_digits  # takes a second, and other sets do without

    bundle = load_digits()
    return torch.from_numpy(bundle.images).float() / 16, torch.from_numpy(bundle.target).long()


def mnist(root: Path) -> tuple[Tensor, Tensor]:
    """MNIST from its IDX files, packed (.gz) or not: (n, 28, 28) in [0, 1], labels (n,).

    root: holds the four files, or those of the 10,000 test images alone; then only these are used. Raises
    UserError when neither pair is there, or a file is damaged.
    """
    pairs = []
    for kind in ("train", "t10k"):
        found = [_idx_file(root, f"{kind}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if all(found):
            images, labels = read_idx(found[0]), read_idx(found[1])
            if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
                raise UserError(
                    f"{root}: {found[0].name} holds {tuple(images.shape)} and {found[1].name} "
                    f"{tuple(labels.shape)}, expected images (n, 28, 28) and labels (n,); the files do not "
                    "belong together"
                )
            pairs.append((images, labels))
    if not pairs:
        raise UserError(
            f"{root}: no MNIST files; expected train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and "
            "the two t10k files (or the t10k files alone), as distributed by LeCun, Cortes and Burges"
        )
    images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return images.float() / 255, labels.long()


def _idx_file(root: Path, stem: str) -> Path | None:
    return next((root / name for name in (f"{stem}.gz", stem) if (root / name).is_file()), None)


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzip-packed if its name ends in .gz -> uint8 tensor of its shape."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({error}); get the file again") from None
    dims = content[3] if len(content) > 4 else 0
    shape = np.frombuffer(content, ">i4", dims, 4) if len(content) >= 4 + 4 * dims else np.zeros(0)
    data = content[4 + 4 * dims :]
    if content[:3] != b"\0\0\x08" or len(data) != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path}: not a whole IDX file of unsigned bytes; get the file again")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(tuple(shape)).copy())


# --- styles: how an attribute is drawn over a digit -----------------------------------------------


def hue(h: Tensor) -> Tensor:
    """Hue in [0, 1) -> fully saturated RGB (..., 3)."""
    offsets = torch.tensor([0.0, 4.0, 2.0])
    return ((h[..., None] * 6 + offsets) % 6 - 3).abs().sub(1).clamp(0, 1)


def coloured(m: Tensor, a: Tensor, strength: float) -> Tensor:
    """Background in one of ten colours: m + (1 - m) * strength * colour."""
    return m + (1 - m) * strength * hue(a / 10)[:, :, None, None]


def rotated(m: Tensor, a: Tensor, strength: float) -> Tensor:
    """Turned by one of ten angles between -75 and 75 degrees times strength."""
    angle = (a / 4.5 - 1) * strength * math.radians(75)
    rows = torch.stack([angle.cos(), -angle.sin(), angle * 0, angle.sin(), angle.cos(), angle * 0], -1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(m.shape), align_corners=False)
    return F.grid_sample(m, grid, align_corners=False).expand(-1, 3, -1, -1)


def inverted(m: Tensor, a: Tensor, strength: float) -> Tensor:
    """Attribute 1 exchanges ink and paper, blended by strength."""
    return (m + a.view(-1, 1, 1, 1) * strength * (1 - 2 * m)).expand(-1, 3, -1, -1)


def textured(m: Tensor, a: Tensor, strength: float) -> Tensor:
    """One of ten gratings (five directions, two frequencies) on the background."""
    height, width = m.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = (a % 5).float()[:, None, None] * (math.pi / 5)
    frequency = torch.where(a < 5, 1.0, 1.8)[:, None, None] * math.pi
    grating = 0.5 + 0.5 * torch.sin(frequency * (x * angle.cos() + y * angle.sin()))
    return (m + (1 - m) * strength * grating[:, None]).expand(-1, 3, -1, -1)


def corrupted(m: Tensor, a: Tensor, strength: float) -> Tensor:
    """One of five corruptions: none, blur, lower half hidden, low contrast, every second column missing."""
    height, width = m.shape[-2:]
    keep = torch.ones(5, 1, height, width)
    keep[2, :, height // 2 :] = 1 - strength
    keep[4, :, :, ::2] = 1 - strength
    blurred = F.avg_pool2d(m, 3, 1, 1, count_include_pad=False)
    a = a.view(-1, 1, 1, 1)
    x = torch.where(a == 1, m + strength * (blurred - m), m)
    x = torch.where(a == 3, 0.5 + (x - 0.5) * (1 - 0.8 * strength), x)
    return (x * keep[a.flatten()]).expand(-1, 3, -1, -1)


STYLES: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], int]] = {
    "coloured": (coloured, 10),
    "rotated": (rotated, 10),
    "inverted": (inverted, 2),
    "textured": (textured, 10),
    "corrupted": (corrupted, 5),
}
"""Style -> how to draw it and its number of attribute values. m (n, 1, H, W), a (n,) -> (n, 3, H, W)."""


def skewed(
    images: Tensor,
    labels: Tensor,
    style: str = "coloured",
    clients: int = 8,
    per_client: int = 150,
    test: int = 597,
    rho: float = 0.9,
    strength: float = 0.8,
    noise: float = 0.2,
    seed: int = 0,
) -> Federated:
    """A federation over images (n, H, W) in [0, 1]: the first `test` after shuffling test everyone.

    Each client, and one that nobody has, draws its own random rule from label to attribute; a sample follows
    the rule with probability rho and has a uniform attribute otherwise. noise: standard deviation of what the
    camera adds to every channel. Raises UserError when there are too few images.
    """
    draw, values = STYLES[style]
    if test + clients * per_client > len(labels):
        raise UserError(
            f"{len(labels)} digits cannot give {test} test images and {clients} clients x {per_client}; "
            "lower --clients, --per-client or --test-images"
        )
    generator = step_generator(seed, 0, stream=0)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order, None], labels[order]
    classes = int(labels.max()) + 1
    rules = [torch.randperm(max(classes, values), generator=generator) % values for _ in range(clients + 1)]

    def sample(index: slice, rule: Tensor | None) -> Samples:
        m, y = images[index], labels[index]
        a = torch.randint(values, (len(y),), generator=generator)
        if rule is not None:
            a = torch.where(torch.rand(len(y), generator=generator) < rho, rule[y], a)
        x = draw(m, a, strength)
        return Samples(x + noise * torch.randn(x.shape, generator=generator), y, a)

    held_out = slice(0, test)
    members = []
    for k in range(clients):
        own = slice(test + k * per_client, test + (k + 1) * per_client)
        members.append(ClientData(k, f"client{k}", sample(own, rules[k]), sample(held_out, rules[k])))
    return Federated(
        style,
        classes,
        values,
        members,
        counterfactual=sample(held_out, None),
        unseen=sample(held_out, rules[clients]),
        class_names=tuple(str(label) for label in range(classes)),
    )


def contact_sheet(data: Federated, clients: int = 8, classes: int = 10) -> Tensor:
    """A picture of the federation (3, H, W): a row per client, its first training image of each class."""
    members = [client for client in data.clients if len(client.train)][:clients]
    blank = torch.ones(data.image_shape)
    tiles = []
    for client in members:
        for label in range(min(data.classes, classes)):
            index = (client.train.labels == label).nonzero()
            image = client.train.images[index[0, 0]].float().cpu() if len(index) else blank
            tiles.append(image / 255 if client.train.images.dtype == torch.uint8 and len(index) else image)
    names = [client.name for client in members]
    columns = min(data.classes, classes)
    return image_grid(tiles, columns, row_labels=names, scale=max(1, 48 // data.image_shape[-1]))


def load_data(config: "Config", seed: int, own: Collection[int] | None = None) -> Federated:
    """The federation that a configuration names. Raises UserError for settings and files that give none.

    own: numbers of the clients whose images are read; the others have a name and no samples. None: all.
    Skewed digits are drawn from one set, so everyone has them.
    """
    # Imported here because it builds on this module's classes.
    from dfl import domains

    if config.data in ("digits", "mnist"):
        if config.hold_out is not None:
            raise UserError(
                f"--hold-out {config.hold_out}: skewed digits have no domains; they have an unseen client "
                "anyway"
            )
        base = sklearn_digits() if config.data == "digits" else mnist(mnist_root(config.data_root))
        return skewed(
            *base,
            config.style,
            config.clients,
            config.per_client,
            config.test_images,
            config.rho,
            config.strength,
            config.noise,
            seed,
        )
    if config.data_root is None:
        raise UserError(f"--data {config.data} needs --data-root FOLDER (layouts: README.md, 'Data')")
    return domains.LOADERS[config.data](config, own)


def mnist_root(data_root: Path | None) -> Path:
    """--data-root, or the folder mnist/ in the environment's PAPERS_DATA. UserError when neither is given."""
    if data_root is not None:
        return data_root
    if "PAPERS_DATA" not in os.environ:
        raise UserError(
            "--data mnist needs --data-root FOLDER with the IDX files, or PAPERS_DATA with mnist/ in it"
        )
    return Path(os.environ["PAPERS_DATA"]) / "mnist"
