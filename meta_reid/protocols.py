"""Protocols 1, 2 and 3: which sets are trained on, which are tested, and how results are averaged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meta_reid import datasets, small_sets
from meta_reid.data import Files, Labels, Target, batches, file_target, label
from meta_reid.items import Item, ReID, manifest
from meta_reid.metrics import Ranking, rank
from shared.io import progress
from shared.records import read_json, write_json
from shared.runtime import UserError

READERS: dict[str, Callable[..., ReID]] = {
    "M": datasets.market1501,
    "MS": datasets.msmt17,
    "C2": datasets.cuhk02,
    "C3": datasets.cuhk03,
    "CS": datasets.cuhk_sysu,
    "PRID": small_sets.prid,
    "GRID": small_sets.grid,
    "VIPeR": small_sets.viper,
    "iLIDs": small_sets.ilids,
}
"""Readers by the protocols' short names."""

CPU = torch.device("cpu")
SMALL = ("PRID", "GRID", "VIPeR", "iLIDs")
SETTINGS = {"C3": "M+MS+CS->CUHK03", "MS": "M+CS+C3->MSMT17", "M": "MS+CS+C3->Market1501"}
"""Rows of published.json for Protocols 2 and 3, by target."""


def sources_of(protocol: int, target: str) -> list[str]:
    """Short names of the source sets, in the order in which the trainer visits them.

    Protocol 1: Market-1501, CUHK02, CUHK03, CUHK-SYSU, tested on the four small sets. Protocols 2 and 3:
    CUHK-SYSU and two of Market-1501, MSMT17, CUHK03; the third is the target.
    """
    if protocol == 1:
        return ["C2", "C3", "CS", "M"]
    if target not in SETTINGS:
        raise UserError(f"--target {target}: Protocols 2 and 3 test on C3, MS or M")
    return [name for name in ("C3", "CS", "M", "MS") if name != target]


def source_items(
    protocol: int, target: str, root: Path, background: bool = False
) -> tuple[list[str], list[list[Item]]]:
    """Names and training images of the sources.

    Protocol 2 takes their training parts, 1 and 3 everything. background: keep Market-1501's background
    boxes as one more identity, as the released code does in Protocol 3.
    """
    names, items = sources_of(protocol, target), []
    for name in names:
        if name == "MS":
            found = READERS[name](root, validation=protocol != 2)
        elif name == "M":
            found = READERS[name](root, background=background and protocol != 2)
        else:
            found = READERS[name](root)
        items.append(found.train if protocol == 2 else found.everything())
    return names, items


def file_sources(
    names: Sequence[str], items: Sequence[Sequence[Item]], size: tuple[int, int], seed: int
) -> tuple[Files, Labels]:
    """Training images of several domains as one data set with its labels."""
    labels = label([[item.identity for item in part] for part in items], names)
    return Files([item for part in items for item in part], size, seed), labels


def manifest_domains(path: Path, held_out: str) -> dict[str, list[Item]]:
    """Items of each domain of a manifest. Raises UserError when the one to be held out is not there."""
    domains = manifest(path)
    if held_out not in domains:
        raise UserError(f"{path}: no domain '{held_out}'; it has {', '.join(domains)}")
    return domains


def manifest_sources(path: Path, held_out: str, size: tuple[int, int], seed: int):
    """The user's own domains; `held_out` is left out for testing. UserError with fewer than two left."""
    domains = manifest_domains(path, held_out)
    names = sorted(name for name in domains if name != held_out)
    if len(names) < 2:
        raise UserError(f"{path}: {len(names)} source domain(s); META needs at least two")
    return file_sources(names, [domains[name] for name in names], size, seed)


def remember_sources(folder: Path, labels: Mapping[int, Labels]) -> None:
    """Keep the sources' names and, for each seed, their class counts in a run's folder."""
    names = next(iter(labels.values())).names
    classes = {seed: found.classes for seed, found in labels.items()}
    write_json(folder / "sources.json", {"names": names, "classes": classes})


def remembered_sources(folder: Path) -> tuple[list[str], dict[int, list[int]]] | None:
    """What `remember_sources` kept; None when it kept nothing. Raises UserError on a damaged file."""
    path = folder / "sources.json"
    if not path.is_file():
        return None
    return read_json(
        path,
        "the sources of a run",
        lambda known: (known["names"], {int(seed): n for seed, n in known["classes"].items()}),
        "the train command writes it anew",
    )


def targets_of(protocol: int, target: str, root: Path, size: tuple[int, int]) -> list[Target]:
    """The test sets of a protocol."""
    names = SMALL if protocol == 1 else (target,)
    found = [READERS[name](root) for name in names]
    return [file_target(one.name, one.splits, size) for one in found]


@dataclass(frozen=True)
class Result:
    """Metrics of one target: mean over its splits, and the deviation between them (0 for one split)."""

    mean: dict[str, float]
    std: dict[str, float]
    skipped: int
    """Queries without a true match, over all splits: excluded, as the protocol says."""


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index], without a copy where the rows follow one another, as queries and gallery of one split do."""
    first = int(index[0]) if len(index) else 0
    if torch.equal(index, torch.arange(first, first + len(index))):
        return x[first : first + len(index)]
    return x[index]


def evaluate(embeddings: Tensor, target: Target, device: torch.device = CPU) -> Result:
    """Embeddings of all images of a target, (N, D) -> metrics in percent, averaged over its splits.

    device: where a split is ranked, its queries and gallery at a time. Raises UserError that names a target
    without a gallery or without any true match, or whose embeddings are no numbers.
    """
    rankings: list[Ranking] = []
    for query, gallery in target.splits:
        ids, cameras = target.identities, target.cameras
        sides = [rows_at(side, part) for side in (embeddings, ids, cameras) for part in (query, gallery)]
        try:
            rankings.append(rank(*(side.to(device) for side in sides)))
        except ValueError as error:
            raise UserError(f"test set {target.name}: {error}") from None
    summaries = [ranking.summary() for ranking in rankings]
    keys = summaries[0].keys()
    return Result(
        {key: mean(s[key] for s in summaries) for key in keys},
        {key: stdev([s[key] for s in summaries]) if len(summaries) > 1 else 0.0 for key in keys},
        sum(ranking.skipped for ranking in rankings),
    )


def average(results: Sequence[Result]) -> dict[str, float]:
    """Unweighted mean over the targets, the protocol tables' last column."""
    return {key: mean(result.mean[key] for result in results) for key in results[0].mean}


@torch.inference_mode()
def embed(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    images: Dataset,
    device: torch.device,
    batch: int,
    workers: int = 0,
    bf16: bool = False,
) -> tuple[Tensor, ...]:
    """Apply a network's function to all images in evaluation mode; its outputs for all of them, in float32 on
    the CPU. They are written where they stay, so that nothing is held twice."""
    loader = DataLoader(images, batch, num_workers=workers, pin_memory=device.type == "cuda")
    outputs: tuple[Tensor, ...] = ()
    done = 0
    for pixels, _ in progress(batches(loader), "images", len(loader)):
        pixels = pixels.to(device, non_blocking=True, memory_format=torch.channels_last).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = function(pixels)
        result = result if isinstance(result, tuple) else (result,)
        outputs = outputs or tuple(torch.empty(len(images), *part.shape[1:]) for part in result)
        for whole, part in zip(outputs, result, strict=True):
            whole[done : done + len(part)] = part
        done += len(pixels)
    return outputs


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """Evaluation mode, device and memory layout."""
    return model.eval().to(device, memory_format=torch.channels_last)
