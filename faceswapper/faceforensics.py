"""The FaceForensics++ protocol on prepared crops: 10 frames of 1,000 videos, every pair of the swap list
once.

Swaps are written as the official test code names them, `swapped_result_single/<source>_FS_<target>.png`
(post-processed in `swapped_result_afterps`, beside source and target in `swapped_result_all`), and measured
batch by batch, beside the ablations of the run and the baselines that need no training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from faceswapper import protocol
from faceswapper.align import to_arrays
from faceswapper.baselines import untrained
from faceswapper.datasets import SwapList, resized, video_of
from faceswapper.detect import open_detector
from faceswapper.fusion import forehead, fuse, keep_map
from faceswapper.losses import Batch
from faceswapper.model import Generator, load_official
from faceswapper.protocol import OnnxNetwork
from faceswapper.trials import Trial
from shared.io import progress, read_image, write_image
from shared.metrics import InceptionFeatures, fid, kid
from shared.published import Metric
from shared.ranges import Count
from shared.runtime import UserError

TABLE = "unknown (paper body not readable)"
"""Name that published.json gives the paper's table."""
PROTOCOL_PAIRS = 10_000
"""Swaps of the published protocol; with fewer a number is not comparable."""
SINGLE, AFTER, ALL = "swapped_result_single", "swapped_result_afterps", "swapped_result_all"
MEAN_OF = 500
"""Originals that the mean face is made of."""
METHOD = "FaceSwapper"
"""Name of the paper's method in tables."""
KID_SUBSET = 1000
"""Pictures in each of KID's random subsets, or all where there are fewer."""


@dataclass(frozen=True)
class FaceForensicsConfig:
    """Options of the FaceForensics++ protocol."""

    faceforensics: Path | None = None
    """Folder with ff++, ff++_lm_images, ff++_mask_images and face_swap_list.txt; see the README."""
    pictures: str = "ff++"
    """Name of the folder of pictures in it."""
    landmarks_folder: str | None = None
    """Name of the folder of landmark pictures in it; default: the pictures' sister X_lm_images."""
    masks_folder: str | None = None
    """Name of the folder of masks in it; default: the pictures' sister X_mask_images."""
    parsing_folder: str | None = None
    """Name of the folder of parsings in it; default: the pictures' sister X_parsing_images."""
    swaps: str = "face_swap_list.txt"
    """Name of the list in it."""
    recogniser: Path | None = None
    """ONNX recogniser for ID retrieval, not the one of training (the protocol's: CosFace). Crops go in on
    [-1, 1]."""
    pose: Path | None = None
    """ONNX network that gives (yaw, pitch, roll) in degrees (the protocol's: Hopenet)."""
    expression: Path | None = None
    """ONNX network that gives an expression vector."""
    fan_weights: Path | None = None
    """wing.ckpt or faceswapper.ckpt: landmarks for the proxies of pose, shape and expression, and for
    --post."""
    detector: str | None = None
    """Detector that looks for a face in every picture measured: .onnx for YuNet, mtcnn, or finder (which
    knows drawn faces alone). In how many it fails is reported; not given, nothing is looked for."""
    fid_weights: Path | None = None
    """torch-fidelity's InceptionV3 file; FID and KID are left out without it."""
    post: bool = False
    """Also the official post-processing; needs parsing pictures and --fan-weights."""
    baselines: bool = True
    """Also the baselines that need no training."""
    compare: tuple[Path, ...] = ()
    """Folders with other methods' swaps of the list, each called <source>_FS_<target>.png and resized to the
    crops' size; a folder's name is the method's in the tables."""
    batch_size: Count = 16
    """Swaps at once."""


class _Listed(Dataset):
    """Items of a swap list: source and target, prefixed."""

    def __init__(self, swaps: SwapList):
        self.swaps = swaps

    def __len__(self) -> int:
        return len(self.swaps)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        source, target = self.swaps.sources.load(i), self.swaps.targets.load(i)
        return {f"s_{k}": v for k, v in source.items()} | {f"t_{k}": v for k, v in target.items()}


class Tally:
    """Sums of per-picture numbers, failed detections, the embeddings and the Inception features of one
    method."""

    def __init__(self):
        self.count, self.sums, self.embeddings, self.features = 0, {}, [], []
        self.failed = 0

    def add(self, values: dict[str, float], count: int) -> None:
        """Means over a batch of `count` pictures."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * count

    def means(self) -> dict[str, float]:
        """Means over all pictures."""
        return {name: total / self.count for name, total in self.sums.items()}


def open_networks(config: FaceForensicsConfig) -> dict[str, OnnxNetwork]:
    """The plugged-in networks that were named."""
    named = {"recogniser": config.recogniser, "pose": config.pose, "expression": config.expression}
    return {name: OnnxNetwork(path) for name, path in named.items() if path is not None}


def differences(
    swaps: Tensor,
    target: Tensor,
    mask: Tensor,
    networks: dict[str, OnnxNetwork],
    find: Callable[[Tensor], Tensor] | None,
    known: dict[str, Tensor],
) -> dict[str, float]:
    """Everything of a batch that is measured against the target.

    find: pictures -> 98 points. known: what the networks say of the target, filled here at the first method
    of a batch.
    """
    row = protocol.picture_metrics(swaps, target, mask)
    singles = zip(swaps.split(1), target.split(1), mask.split(1), strict=True)
    # of each picture, so that the number does not depend on the batch
    row["background PSNR"] = sum(protocol.region_psnr(*one) for one in singles) / len(swaps)
    for name in ("pose", "expression"):
        if name in networks:
            mine = networks[name](swaps)
            if name not in known:
                known[name] = networks[name](target)
            row[f"{name} error"] = protocol.vector_error(mine, known[name])
    if find is not None:
        mine = find(swaps)
        if "points" not in known:
            known["points"] = find(target)
        theirs = known["points"]
        row["pose proxy (Procrustes angle)"] = protocol.procrustes_angle(mine, theirs).mean().item()
        row["shape proxy (Procrustes residual)"] = protocol.procrustes_residual(mine, theirs).mean().item()
        row["expression proxy (openings)"] = protocol.expression_proxy(mine, theirs)
    return row


@torch.inference_mode()
def measure_swaps(
    config: FaceForensicsConfig,
    generator: Generator,
    out: Path,
    trial: Trial | None = None,
    others: Mapping[str, tuple[Generator, Trial]] | None = None,
) -> tuple[list[Metric], dict[str, dict[str, float]]]:
    """All metrics of a generator, of others and of the baselines on the swap list; writes the generator's
    swaps under `out`.

    trial: what the generator was trained as, None for the released one. others: name -> generator and trial,
    e.g. ablations; each sees what it saw in training. Returns the metrics and {"methods": method -> metric ->
    value, ...}. Pictures in which a detection failed are counted and stay in all other numbers. Raises
    UserError when data or a network that an option needs is missing.
    """
    folders = config.landmarks_folder, config.masks_folder, config.parsing_folder
    swaps = SwapList(config.faceforensics, generator.size.img_size, config.pictures, config.swaps, *folders)
    if config.post and (swaps.targets.parsing is None or config.fan_weights is None):
        wanted = config.parsing_folder or f"{config.pictures}_parsing_images"
        raise UserError(f"--post needs --fan-weights and the folder {wanted}")
    for folder in config.compare:
        missing = [name for name in map(swap_name, swaps.pairs) if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(swaps)} swaps missing, first {missing[0]}")
    device = next(generator.parameters()).device
    own = METHOD if trial is None or trial.variant == "full" else trial.name
    players = {own: (generator, trial), **(others or {})}
    networks = open_networks(config)
    inception = InceptionFeatures(config.fid_weights).to(device) if config.fid_weights is not None else None
    find = None if config.fan_weights is None else point_finder(config.fan_weights, device)
    detector = None if config.detector is None else open_detector(config.detector, device)
    originals = swaps.originals
    mean_face = torch.stack([originals.load(i)["image"] for i in range(min(MEAN_OF, len(originals)))]).mean(0)
    tallies: dict[str, Tally] = {}
    unprepared = 0
    for start, batch in enumerate(progress(DataLoader(_Listed(swaps), config.batch_size), "swaps")):
        sides = (Batch(*(batch[f"{s}_{k}"] for k in ("image", "landmarks", "mask"))) for s in "st")
        source, target = sides
        unprepared += int(faceless(target).sum())
        methods = {name: swap(*player, source, target) for name, player in players.items()}
        made = [methods[own]]
        points = (find(source.picture), find(target.picture)) if find else None
        if config.post:
            made.append(post_processed(batch, made[0], *points))
            methods[f"{own}, post-processed"] = made[1]
        if config.baselines:
            # FAN counts from the edge of the first pixel, the alignment from its centre.
            centred = [p - 0.5 for p in points] if points else []
            methods |= untrained(source.picture, target.picture, target.mask, mean_face, *centred)
        pairs = swaps.pairs[start * config.batch_size :][: len(target.picture)]
        for folder in config.compare:
            if folder.name in methods:
                raise UserError(f"{folder}: another method is called {folder.name}; rename the folder")
            methods[folder.name] = finished(folder, pairs, generator.size.img_size)
        known: dict[str, Tensor] = {}
        for method, pictures in methods.items():
            pictures = as_file(pictures)
            tally = tallies.setdefault(method, Tally())
            row = differences(pictures, as_file(target.picture), target.mask, networks, find, known)
            tally.add(row, len(pictures))
            if detector is not None:
                found = detector(list(to_arrays(pictures / 2 + 0.5)), [swap_name(pair) for pair in pairs])
                tally.failed += sum(not faces for faces in found)
            if "recogniser" in networks:
                tally.embeddings.append(networks["recogniser"](pictures))
            if inception is not None:
                tally.features.append(inception((pictures / 2 + 0.5).to(device)).cpu())
        sheet = torch.cat((source.picture, target.picture, *made), 3)
        for folder, pictures in zip((SINGLE, ALL, AFTER), (made[0], sheet, *made[1:]), strict=False):
            write_swaps(out / folder, pairs, pictures)
    rows = {method: tally.means() for method, tally in tallies.items()}
    if detector is not None:
        for method, tally in tallies.items():
            rows[method]["failed detections"] = tally.failed
    print(f"targets without a face in their mask or landmark picture: {unprepared} of {len(swaps)}")
    if "recogniser" in networks:
        add_retrieval(rows, tallies, swaps, networks["recogniser"], config.batch_size)
    if inception is not None:
        batches = picture_batches(originals, config.batch_size)
        add_distances(rows, tallies, [inception((p / 2 + 0.5).to(device)).cpu() for p in batches])
    return as_metrics(rows, len(swaps), originals.name), {
        "methods": rows,
        "pairs": len(swaps),
        "targets without a face": unprepared,
    }


def faceless(prepared: Batch) -> Tensor:
    """(B,) bool: the detection failed when the files were made; nothing is marked in the mask, or nothing
    drawn in the landmark picture."""
    no_face = prepared.mask.flatten(1).amin(1) > 0.5
    return no_face | (prepared.landmarks.flatten(1).amin(1) > 0.9)


def swap(generator: Generator, trial: Trial | None, source: Batch, target: Batch) -> Tensor:
    """Swaps of a batch on the CPU, in [-1, 1]; a trial sees what it saw in training."""
    device = next(generator.parameters()).device
    if trial is not None:
        source, target = trial.restrict(source), trial.restrict(target)
    given = (x.to(device) for x in (source.picture, *target))
    return generator.swap(*given, source_mask=source.mask.to(device)).clamp(-1, 1).cpu()


def point_finder(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """FAN of a released file: pictures (B, 3, S, S) in [-1, 1] -> 98 points (B, 98, 2), see `FAN.find`."""
    fan = load_official("fan", path).to(device)
    return lambda pictures: fan.find(pictures.to(device)).cpu()


def post_processed(batch: dict[str, Tensor], result: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The official post-processing of a batch: hair, and the forehead where the source's is covered. source,
    target: their 98 points."""
    foreheads = forehead(source, batch["s_mask"]), forehead(target, batch["t_mask"])
    return fuse(result, batch["t_image"], keep_map(batch["t_parsing"][:, 0], *foreheads))


def as_file(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as their 8-bit files hold them."""
    return 2 * protocol.measured(pictures) - 1


def swap_name(pair: tuple[str, str]) -> str:
    """Official file name of a swap, from the stems of source and target."""
    return "_FS_".join(pair).replace("/", "-") + ".png"


def finished(folder: Path, pairs: list[tuple[str, str]], size: int) -> Tensor:
    """Another method's swaps of these pairs, (B, 3, size, size) in [-1, 1]."""
    return torch.stack([resized(read_image(folder / swap_name(pair)), size) * 2 - 1 for pair in pairs])


def write_swaps(folder: Path, pairs: list[tuple[str, str]], pictures: Tensor) -> None:
    """Swaps under their official names."""
    for pair, picture in zip(pairs, pictures, strict=True):
        write_image(folder / swap_name(pair), picture / 2 + 0.5, synthetic="face swap by FaceSwapper")


def picture_batches(pictures, size: int):
    """Images of a picture set, batch by batch."""
    for start in range(0, len(pictures), size):
        chosen = range(start, min(start + size, len(pictures)))
        yield torch.stack([pictures.load(i)["image"] for i in chosen])


def add_retrieval(
    rows: dict[str, dict[str, float]],
    tallies: dict[str, Tally],
    swaps: SwapList,
    recognise: OnnxNetwork,
    size: int,
) -> None:
    """ID retrieval among all originals, and cosines to source and target."""
    gallery = torch.cat([recognise(part) for part in picture_batches(swaps.originals, size)])
    at = {name: i for i, name in enumerate(swaps.originals.names)}
    videos = [video_of(name) for name in swaps.originals.names]
    wanted = [video_of(source) for source, _ in swaps.pairs]
    for method, tally in tallies.items():
        mine = torch.cat(tally.embeddings)
        rows[method]["ID retrieval"] = protocol.id_retrieval(mine, gallery, videos, wanted)
        for side, name in enumerate(("cos source", "cos target")):
            theirs = gallery[[at[pair[side]] for pair in swaps.pairs]]
            rows[method][name] = protocol.cosine(mine, theirs)


def add_distances(rows: dict[str, dict[str, float]], tallies: dict[str, Tally], real: list[Tensor]) -> None:
    """FID and KID of every method against the originals, whose features `real` come batch by batch."""
    count = sum(map(len, real))
    for method, tally in tallies.items():
        rows[method]["FID"] = fid(real, tally.features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the random subsets
            size = min(KID_SUBSET, count, tally.count)
            rows[method]["KID"] = kid(real, tally.features, size=size)[0]


def as_metrics(rows: dict[str, dict[str, float]], pairs: int, dataset: str) -> list[Metric]:
    """Rows for results.json; ID retrieval is a fraction there, as the published number is.

    A number may stand beside a published one only when it comes from as many swaps of FaceForensics++."""
    metrics = []
    for method, row in rows.items():
        for name, value in row.items():
            retrieval = name == "ID retrieval"
            same = retrieval and pairs == PROTOCOL_PAIRS and dataset == "FaceForensics++"
            unit = {
                "ID retrieval": "fraction", "pose error": "degrees", "failed detections": "pictures",
            }.get(name, "")  # fmt: skip
            metrics.append(
                Metric(
                    TABLE,
                    "main comparison",
                    name,
                    unit,
                    value / 100 if retrieval else value,
                    dataset,
                    same,
                    method,
                )
            )
    return metrics
