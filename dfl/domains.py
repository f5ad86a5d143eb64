"""Federations of real domains, one client per domain, in the layouts in which the public sets are
distributed: Digits-5, Office-Caltech10 and DomainNet as prepared by FedBN, PACS, and any folder of images.

All images are decoded once into uint8 tensors. Training subsets are the first n of each list, as in FedBN's
scripts, so the order in the files matters. A loader reads the images of the clients `own` alone, for a site
that has no others'; the other clients then have a name and no samples. None: everyone's.
"""

import csv
import io
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dfl.data import ClientData, Federated, Samples
from shared.io import IMAGE_ENDINGS, find_images, progress, read_image, read_utf8
from shared.runtime import UserError
from shared.weights import load_pickle

if TYPE_CHECKING:
    from dfl.train import Config

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

NUMPY_PICKLE = {
    f"numpy.{package}.{name}"
    for package in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
} | {"numpy.ndarray", "numpy.dtype", "numpy.str_", "_codecs.encode"}
"""What a pickle of NumPy arrays, lists, strings and numbers may name."""

DIGITS = ("MNIST", "SVHN", "USPS", "SynthDigits", "MNIST_M")
OFFICE = ("amazon", "caltech", "dslr", "webcam")
OFFICE_CLASSES = (
    "back_pack", "bike", "calculator", "headphones", "keyboard",
    "laptop_computer", "monitor", "mouse", "mug", "projector",
)  # fmt: skip
DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DOMAINNET_CLASSES = (
    "bird", "feather", "headphones", "ice_cream", "teapot",
    "tiger", "whale", "windmill", "wine_glass", "zebra",
)  # fmt: skip
PACS = ("photo", "art_painting", "cartoon", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def augment(
    images: Tensor, view: Tensor, degrees: float = 0.0, zoom: float = 1.0, jitter: float = 0.0
) -> Tensor:
    """Random flip, rotation, crop and brightness in one resampling; a pure function of the numbers in `view`.

    images (..., 3, H, W) uint8 or float in [0, 1] -> float of that shape. view (..., 6) in [0, 1): flip,
    angle, side, centre x, centre y, brightness. degrees: largest rotation. zoom: smallest area of the crop.
    jitter: largest relative change of brightness.
    """
    shape = images.shape
    x = images.flatten(0, -4).float() / (255 if images.dtype == torch.uint8 else 1)
    flip, angle, side, cx, cy, bright = view.flatten(0, -2).unbind(-1)
    sign = torch.where(flip < 0.5, -1.0, 1.0)
    angle = (2 * angle - 1) * math.radians(degrees)
    scale = (zoom + (1 - zoom) * side).sqrt()
    room = 1 - scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([sign * cos, -sin, room * (2 * cx - 1), sign * sin, cos, room * (2 * cy - 1)], -1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    return (x * (1 + jitter * (2 * bright - 1)).view(-1, 1, 1, 1)).clamp(0, 1).view(shape)


def read_by(config: "Config", names: Sequence[str], own: Collection[int] | None) -> Collection[str]:
    """Of the domains `names` those whose images are read: the clients' of the numbers `own`, or all."""
    if own is None:
        return names
    clients = [name for name in names if name != config.hold_out]
    return [clients[k] for k in own if k < len(clients)]


def read_images(paths: list[Path], size: int, desc: str, workers: int) -> Tensor:
    """Image files -> (n, 3, size, size) uint8. UserError names a missing or damaged one."""

    def read(path: Path) -> Tensor:
        image = read_image(path)[None]
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return image[0].mul(255).round().clamp(0, 255).byte()

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        images = list(progress(pool.map(read, paths), desc, len(paths)))
    return torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def federate(
    config: "Config",
    name: str,
    domains: dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    classes: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    change: Callable[[Tensor, Tensor], Tensor] | None,
    whole: bool = True,
) -> Federated:
    """Domains {name: ((train images, labels), (test images, labels))} -> one client each.

    The attribute of a sample is the number of its domain. `config.hold_out` becomes the unseen domain. Raises
    UserError when no domain has that name, or, if the `whole` federation was read, nobody is left to train.
    """
    if config.hold_out is not None and config.hold_out not in domains:
        raise UserError(f"--hold-out {config.hold_out}: the domains are {', '.join(domains)}")
    clients, unseen = [], None
    for domain, sets in domains.items():
        number = len(clients)
        train, test = (Samples(x, y, torch.full_like(y, number)) for x, y in sets)
        if domain == config.hold_out:
            unseen = test
        else:
            clients.append(ClientData(number, domain, train, test))
    if whole and not any(len(client.train) for client in clients):
        raise UserError(f"{config.data_root}: no client has training images")
    return Federated(
        name, len(classes), len(clients), clients, None, unseen, mean, std, change, class_names=classes
    )


# --- Digits-5 -------------------------------------------------------------------------------------


def digits5(config: "Config", own: Collection[int] | None = None) -> Federated:
    """MNIST, SVHN, USPS, SynthDigits, MNIST_M in FedBN's layout; `digit_parts` of ten training parts each.

    root/<set>/partitions/train_part{0..9}.pkl and root/<set>/test.pkl: pairs (uint8 images, labels).
    """
    nothing = (torch.zeros(0, 3, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    domains = {name: (nothing, nothing) for name in DIGITS}
    for name in read_by(config, DIGITS, own):
        folder = config.data_root / name
        parts = [_digits(folder / "partitions" / f"train_part{i}.pkl") for i in range(config.digit_parts)]
        train = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        domains[name] = (train, _digits(folder / "test.pkl"))
    return federate(config, "digits5", domains, tuple("0123456789"), HALF, HALF, None, own is None)


def _digits(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{path}: not found. Digits-5 is FedBN's digit_dataset.zip: <root>/<set>/test.pkl and "
            "<root>/<set>/partitions/train_part0..9.pkl for MNIST, SVHN, USPS, SynthDigits, MNIST_M; "
            "give <root> as --data-root"
        )
    images, labels = _pair(path)
    grey_or_colour = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not grey_or_colour or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: expected uint8 images (n, H, W) or (n, H, W, 1 or 3) and whole numbers as labels, "
            f"found {images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > 10:
        wrong = labels[(labels < 0) | (labels > 10)][0]
        raise UserError(f"{path}: label {wrong}; they are 0 to 9, or 1 to 10 with 10 for the digit 0")
    x = torch.from_numpy(images)
    x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    if x.shape[-2:] != (28, 28):
        small = F.interpolate(x.float(), (28, 28), mode="bilinear", antialias=True, align_corners=False)
        x = small.round().clamp(0, 255).byte()
    return x.contiguous(), torch.from_numpy(labels.astype(np.int64)) % 10  # SVHN writes 0 as 10


def _pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = load_pickle(path, NUMPY_PICKLE)
    pair = [np.asarray(part) for part in content] if isinstance(content, tuple | list) else []
    if len(pair) != 2 or min(part.ndim for part in pair) < 1 or not len(pair[0]) == len(pair[1]) > 0:
        raise UserError(f"{path}: expected a pair of equally long lists, not empty")
    return pair[0], pair[1]


# --- photographs ----------------------------------------------------------------------------------


def office(config: "Config", own: Collection[int] | None = None) -> Federated:
    """Office-Caltech10: root/office_caltech_10/{amazon,caltech,dslr,webcam}_{train,test}.pkl and the
    images."""
    return _listed(config, "office_caltech_10", OFFICE, OFFICE_CLASSES, 0.5, own)


def domainnet(config: "Config", own: Collection[int] | None = None) -> Federated:
    """DomainNet, ten classes: root/DomainNet/{clipart,...,sketch}_{train,test}.pkl and the images."""
    return _listed(config, "DomainNet", DOMAINNET, DOMAINNET_CLASSES, 0.05, own)


def _listed(
    config: "Config",
    folder: str,
    names: tuple[str, ...],
    classes: tuple[str, ...],
    share: float,
    own: Collection[int] | None,
) -> Federated:
    # The lists of all, also where others' images are missing: the shortest says how much everyone trains on.
    lists = {
        (name, split): _paths(config.data_root, folder, f"{name}_{split}.pkl", classes)
        for name in names
        for split in ("train", "test")
    }
    first = int(share * min(len(lists[name, "train"][0]) for name in names))
    read, domains = read_by(config, names, own), {}
    for name in names:
        sets = []
        for split, most in (("train", first), ("test", None)):
            paths, labels = lists[name, split]
            count = most if name in read else 0
            images = read_images(paths[:count], config.image_size, f"{name} {split}", config.workers)
            sets.append((images, labels[:count]))
        domains[name] = tuple(sets)
    return federate(
        *(config, config.data, domains, classes, (0.0,) * 3, (1.0,) * 3),
        partial(augment, degrees=30.0),
        own is None,
    )


def _paths(root: Path, folder: str, name: str, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    path = root / folder / name
    if not path.is_file():
        raise UserError(
            f"{path}: not found; --data-root is the folder that holds {folder}/ as FedBN distributes it"
        )
    images, labels = _pair(path)
    unknown = sorted(set(labels.tolist()) - set(classes))
    if unknown:
        raise UserError(f"{path}: unknown class '{unknown[0]}'; the classes are {', '.join(classes)}")
    # The lists name images from the data root; some copies name them from inside the folder.
    base = root if (root / str(images[0])).is_file() else root / folder
    return [base / str(image) for image in images], torch.tensor([classes.index(label) for label in labels])


def pacs(config: "Config", own: Collection[int] | None = None) -> Federated:
    """PACS: root/raw_images/<domain>/<class>/*, root/label/<domain>_{train,crossval,test}_kfold.txt.

    Each line is `path label` with labels 1..7. A client trains on the train list and is tested on the test
    list.
    """
    read, domains = read_by(config, PACS, own), {}
    for name in PACS:
        sets = []
        for split in ("train", "test"):
            path = config.data_root / "label" / f"{name}_{split}_kfold.txt"
            if not path.is_file():
                raise UserError(
                    f"{path}: not found; --data-root is the PACS folder with raw_images/ and label/"
                )
            try:
                lines = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
                labels = torch.tensor([int(label) - 1 for _, label in lines], dtype=torch.int64)
            except ValueError:
                raise UserError(f"{path}: expected lines 'path label' with labels 1..7") from None
            if not len(labels) or labels.min() < 0 or labels.max() >= len(PACS_CLASSES):
                raise UserError(f"{path}: empty, or a label outside 1..7")
            count = None if name in read else 0
            files = [config.data_root / "raw_images" / image for image, _ in lines[:count]]
            images = read_images(files, config.image_size, f"{name} {split}", config.workers)
            sets.append((images, labels[:count]))
        domains[name] = tuple(sets)
    change = partial(augment, zoom=0.7, jitter=0.2)
    return federate(config, "pacs", domains, PACS_CLASSES, IMAGENET_MEAN, IMAGENET_STD, change, own is None)


# --- the user's own images ------------------------------------------------------------------------


def folder(config: "Config", own: Collection[int] | None = None) -> Federated:
    """root/<client>/<train|test>/<class>/*: a client is a sensor, a database, a site.

    root/attributes.csv (columns file, attribute; paths relative to root) may name an attribute of each image;
    otherwise the client's number is the attribute. A client without training images stays in the federation
    and is left out of each round by name. Of clients that are not `own` only the folders are read: they name
    clients and classes. Raises UserError on another layout and for a client without test images.
    """
    root = config.data_root
    names = [path.name for path in subfolders(root)]
    halves = [name for name in names if (root / name / "train").is_dir() > (root / name / "test").is_dir()]
    if halves:
        raise UserError(f"{root / halves[0]}: has train/ and no test/, so nothing could be measured there")
    names = [name for name in names if (root / name / "test").is_dir()]
    if not names:
        raise UserError(f"{root}: no clients; expected <client>/train/<class>/* and <client>/test/<class>/*")
    places = {(name, split): subfolders(root / name / split) for name in names for split in ("train", "test")}
    classes = tuple(sorted({path.name for folders in places.values() for path in folders}))
    read, domains, files = read_by(config, names, own), {}, {}
    for name in names:
        sets = []
        for split in ("train", "test"):
            kinds = places[name, split] if name in read else []
            found = [path for kind in kinds for path in find_images(kind, subfolders=False)]
            files[name, split] = found
            labels = torch.tensor([classes.index(path.parent.name) for path in found], dtype=torch.int64)
            sets.append((read_images(found, config.image_size, f"{name} {split}", config.workers), labels))
        if name in read and not len(sets[1][1]):
            raise UserError(f"{root / name / 'test'}: no test images ({', '.join(IMAGE_ENDINGS)})")
        domains[name] = tuple(sets)
    data = federate(config, "folder", domains, classes, HALF, HALF, None, own is None)
    table = root / "attributes.csv"
    return _with_attributes(data, table, root, files, config.hold_out) if table.is_file() else data


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; empty when it is none."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _with_attributes(
    data: Federated, table: Path, root: Path, files: dict[tuple[str, str], list[Path]], held_out: str | None
) -> Federated:
    rows = list(csv.DictReader(io.StringIO(read_utf8(table, "a table of attributes"), newline="")))
    if not rows or not {"file", "attribute"} <= rows[0].keys():
        raise UserError(f"{table}: expected a header with the columns file and attribute")
    short = next((row for row in rows if not row["file"] or row["attribute"] is None), None)
    if short is not None:
        raise UserError(f"{table}: no attribute in the line of {short['file']!r}")
    values = sorted({row["attribute"] for row in rows})
    known = {row["file"]: values.index(row["attribute"]) for row in rows}

    def named(samples: Samples, paths: list[Path]) -> Samples:
        missing = [path for path in paths if str(path.relative_to(root)) not in known]
        if missing:
            raise UserError(f"{table}: no attribute for {missing[0].relative_to(root)}")
        attributes = torch.tensor([known[str(path.relative_to(root))] for path in paths], dtype=torch.int64)
        return Samples(samples.images, samples.labels, attributes)

    clients = [
        replace(
            client,
            train=named(client.train, files[client.name, "train"]),
            test=named(client.test, files[client.name, "test"]),
        )
        for client in data.clients
    ]
    unseen = data.unseen and named(data.unseen, files[held_out, "test"])
    return replace(data, attributes=len(values), clients=clients, unseen=unseen)


LOADERS: dict[str, Callable[["Config", Collection[int] | None], Federated]] = {
    "digits5": digits5,
    "office": office,
    "domainnet": domainnet,
    "pacs": pacs,
    "folder": folder,
}
