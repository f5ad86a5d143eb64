"""Readers of the four small test sets, VIPeR, PRID2011, GRID and i-LIDS, each with ten splits."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from meta_reid.items import (
    DISTRACTOR,
    Item,
    ReID,
    Split,
    find_folder,
    matching,
    parse_name,
    read_mat,
)
from shared.records import read_json
from shared.runtime import UserError

SPLITS = 10


def _halves(identities: list[int], test: int, name: str) -> list[list[int]]:
    """Ten random choices of test identities, the same on every machine."""
    rng = random.Random(f"{name} splits")
    return [sorted(rng.sample(identities, test)) for _ in range(SPLITS)]


def viper(root: Path) -> ReID:
    """VIPeR: camera A searched in camera B, ten splits of 316 test identities.

    Reads `VIPeR/` with its splits.json or seeded random splits, or the ten prepared `viper/split_{n}a`.
    """
    name, pattern = "VIPeR", re.compile(r"^p?(\d+)_")
    base = find_folder(
        root,
        name,
        "VIPeR/{cam_a,cam_b}/*.bmp or viper/split_{1..10}a/{query,gallery}/*.png",
        "its authors (users.soe.ucsc.edu/~manduchi)",
        "VIPeR",
        "viper",
    )

    def read(folder: Path, camera: int) -> list[Item]:
        paths = matching(folder, ["*.bmp", "*.png", "*.jpg"], name)
        return [Item(path, parse_name(path, pattern, name)[0] + 1, camera) for path in paths]

    if (base / "split_1a").is_dir():
        folders = [base / f"split_{number}a" for number in range(1, SPLITS + 1)]
        return ReID(
            "VIPeR", [], [Split(read(folder / "query", 0), read(folder / "gallery", 1)) for folder in folders]
        )
    first, second = read(base / "cam_a", 0), read(base / "cam_b", 1)
    if (base / "splits.json").is_file():
        # Twenty entries, each split with either camera as the query; those with camera A count.
        names = read_json(
            base / "splits.json",
            f"{name}'s list of splits",
            lambda splits: [{Path(entry[0]).name for entry in split["query"]} for split in splits],
        )
        bases = {item.path.name: item.identity for item in first}
        chosen = [[bases[n] for n in part] for part in names if part <= bases.keys()][:SPLITS]
        if len(chosen) < SPLITS:
            raise UserError(f"{name}: {base / 'splits.json'} has fewer than ten splits that query camera A")
    else:
        people = sorted({item.identity for item in first} & {item.identity for item in second})
        chosen = _halves(people, len(people) // 2, name)
    return ReID("VIPeR", [], [_pair(first, second, set(part)) for part in chosen])


def _pair(query: list[Item], gallery: list[Item], chosen: set[int], extra: Iterable[Item] = ()) -> Split:
    """Query and gallery of the chosen identities; extra: gallery images that are always there."""
    return Split(
        [item for item in query if item.identity in chosen],
        [item for item in gallery if item.identity in chosen] + list(extra),
    )


def prid(root: Path) -> ReID:
    """PRID2011 single-shot: 100 of the 200 shared identities searched among them and 549 others."""
    name, pattern = "PRID2011", re.compile(r"person_(\d+)")
    base = find_folder(
        root,
        name,
        "prid2011/single_shot/{cam_a,cam_b}/person_0001.png, optionally splits_single_shot.json",
        "its authors (www.tugraz.at/institute/icg/research/team-bischof/lrs/downloads/prid11)",
        "prid2011/single_shot",
        "prid_2011/single_shot",
        "single_shot",
    )

    def read(view: str, camera: int) -> list[Item]:
        paths = matching(base / view, ["*.png"], name)
        return [Item(path, parse_name(path, pattern, name)[0], camera) for path in paths]

    first, second = read("cam_a", 0), read("cam_b", 1)
    listing = next(
        (
            p
            for p in (base / "splits_single_shot.json", base.parent / "splits_single_shot.json")
            if p.is_file()
        ),
        None,
    )
    if listing:
        chosen = read_json(
            listing,
            f"{name}'s list of splits",
            lambda splits: [[parse_name(Path(n), pattern, name)[0] for n in s["test"]] for s in splits],
        )
        there = {item.identity for item in first} & {item.identity for item in second}
        if len(chosen) < SPLITS or not all(part and there.issuperset(part) for part in chosen):
            raise UserError(f"{name}: {listing} does not hold ten splits of the persons in {base}")
    else:
        shared = sorted({i.identity for i in first if i.identity <= 200} & {i.identity for i in second})
        chosen = _halves(shared, len(shared) // 2, name)
    others = [item for item in second if item.identity > 200]
    return ReID("PRID", [], [_pair(first, second, set(part), others) for part in chosen[:SPLITS]])


def grid(root: Path) -> ReID:
    """QMUL GRID: 125 test identities searched among them and 775 distractors, the ten fixed splits."""
    name, pattern = "GRID", re.compile(r"^(\d+)_(\d+)_")
    base = find_folder(
        root,
        name,
        "grid/{probe,gallery}/{identity}_{camera}_*.jpeg with features_and_partitions.mat",
        "its authors (personal.ie.cuhk.edu.hk/~ccloy/downloads_qmul_underground_reid.html)",
        "grid",
        "GRID",
    )
    base = base / "underground_reid" if (base / "underground_reid").is_dir() else base

    def read(part: str) -> list[Item]:
        paths = matching(base / part, ["*.jpeg", "*.jpg"], name)
        return [Item(path, *parse_name(path, pattern, name)) for path in paths]

    probe, gallery = read("probe"), read("gallery")
    partitions = base / "features_and_partitions.mat"
    people = {item.identity for item in probe}
    if not partitions.is_file():
        raise UserError(f"{name}: no file {partitions}; it comes with the set and holds the ten splits")
    table = read_mat(partitions, name)
    try:  # each split is a record whose third field lists the training identities
        cells = table["trainIdxAll"].ravel()[:SPLITS]
        trained = [set(np.ravel(cell[0][0][2]).astype(int).tolist()) for cell in cells]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {partitions} holds no list of splits ({error!r})") from None
    chosen = [people - train for train in trained]
    if len(chosen) < SPLITS or not all(chosen):
        raise UserError(f"{name}: {partitions} does not hold ten splits of the persons in {base}")
    others = [item for item in gallery if item.identity == DISTRACTOR]
    return ReID("GRID", [], [_pair(probe, gallery, part, others) for part in chosen])


def ilids(root: Path) -> ReID:
    """QMUL i-LIDS: ten random splits, 60 identities, one image of each as query and another as gallery.

    The sequence number stands in for the camera, so camera filtering removes nothing but the query itself.
    """
    name, pattern = "i-LIDS", re.compile(r"^(\d{4})(\d{3})")
    folder = find_folder(
        root,
        name,
        "i-LIDS_Pedestrian/Persons/{identity:04d}{sequence:03d}.jpg",
        "its authors (www.eecs.qmul.ac.uk/~sgg)",
        "i-LIDS_Pedestrian/Persons",
        "ilids/i-LIDS_Pedestrian/Persons",
    )
    people: dict[int, list[Item]] = {}
    for path in matching(folder, ["*.jpg"], name):
        identity, sequence = parse_name(path, pattern, name)
        people.setdefault(identity + 1, []).append(Item(path, identity + 1, sequence))
    able = sorted(identity for identity, items in people.items() if len(items) > 1)
    rng, splits = random.Random(f"{name} images"), []
    for chosen in _halves(able, min(60, len(able)), name):
        pairs = [rng.sample(people[identity], 2) for identity in chosen]
        splits.append(Split([a for a, _ in pairs], [b for _, b in pairs]))
    return ReID("iLIDs", [], splits)
