"""Readers of the large sets, Market-1501, MSMT17, CUHK02, CUHK03 and CUHK-SYSU, in their public layouts.

Each takes the folder that holds the sets and returns a `ReID`; nothing is decoded here. Each raises
UserError that says what was looked for, where to get it and how to lay it out.
"""

import re
from pathlib import Path

from meta_reid.cuhk03 import extract
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


def market1501(root: Path, background: bool = False) -> ReID:
    """Market-1501. background: let `everything` keep identity 0 as one more person, as the release does."""
    name, pattern = "Market-1501", re.compile(r"^(-?\d+)_c(\d)")
    base = find_folder(
        root,
        name,
        "Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}/*.jpg",
        "its authors (zheng-lab.cecs.anu.edu.au/Project/project_reid.html)",
        "Market-1501-v15.09.15",
        "market1501/Market-1501-v15.09.15",
    )

    def read(part: str) -> list[Item]:
        items = []
        for path in matching(base / part, ["*.jpg"], name):
            identity, camera = parse_name(path, pattern, name)
            if identity != -1:  # detector errors, junk by the protocol
                items.append(Item(path, identity, camera - 1))
        return items

    query, gallery = read("query"), read("bounding_box_test")
    found = ReID("Market1501", read("bounding_box_train"), [Split(query, gallery)])
    if background:
        crowd = [Item(item.path, 1502, item.camera) for item in gallery if item.identity == DISTRACTOR]
        found.train.extend(crowd)
    return found


def msmt17(root: Path, validation: bool = True) -> ReID:
    """MSMT17 V1 or V2. validation: add list_val to the training images, as when it is a source."""
    name = "MSMT17"
    base = find_folder(
        root,
        name,
        "MSMT17_V1/{train,test}/... (V2: mask_train_v2, mask_test_v2) + list_{train,val,query,gallery}.txt",
        "its authors (pkuvmc.com/dataset.html)",
        "MSMT17_V2",
        "MSMT17_V1",
        "msmt17/MSMT17_V2",
        "msmt17/MSMT17_V1",
    )
    train, test = (
        ("mask_train_v2", "mask_test_v2") if (base / "mask_train_v2").is_dir() else ("train", "test")
    )

    def read(part: str, folder: str, offset: int) -> list[Item]:
        listing, items = base / f"list_{part}.txt", []
        if not listing.is_file():
            raise UserError(f"{name}: no file {listing}; it comes with the set")
        try:
            lines = listing.read_text().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: {listing}: not readable as text ({error})") from None
        for number, line in enumerate(lines, 1):
            fields = line.split()
            parts = fields[0].split("_") if fields else []
            if len(fields) != 2 or len(parts) < 3 or not (fields[1] + parts[2]).isdigit():
                raise UserError(f"{name}: {listing}, line {number}: expected 'relative/path identity'")
            items.append(Item(base / folder / fields[0], int(fields[1]) + offset, int(parts[2]) - 1))
        return items

    images = read("train", train, 1) + (read("val", train, 1) if validation else [])
    offset = max(item.identity for item in images) + 1  # test identities begin again at 0
    return ReID("MSMT17", images, [Split(read("query", test, offset), read("gallery", test, offset))])


def cuhk03(root: Path) -> ReID:
    """CUHK03, labelled boxes, new protocol (767/700 identities).

    Reads `images_labeled`, and writes it at the first use from the release's `cuhk-03.mat`. The split comes
    from `splits_new_labeled.json` or from `cuhk03_new_protocol_config_labeled.mat`.
    """
    name = "CUHK03"
    base = find_folder(
        root,
        name,
        "cuhk03/cuhk03_release/cuhk-03.mat or cuhk03/images_labeled/{pair}_{identity:03d}_{view}_{image:02d}"
        ".png, with cuhk03_new_protocol_config_labeled.mat or splits_new_labeled.json in cuhk03",
        "its authors (www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html)",
        "cuhk03",
    )
    images = base / "images_labeled"
    if not images.is_dir():
        release = base / "cuhk03_release" / "cuhk-03.mat"
        if not release.is_file():
            raise UserError(f"{name}: neither a folder {images} nor the release's file {release}")
        extract(release, images)
    listing, config = base / "splits_new_labeled.json", base / "cuhk03_new_protocol_config_labeled.mat"
    if listing.is_file():
        split = read_json(listing, f"{name}'s list of splits")
        split = split[0] if isinstance(split, list) else split

        def read(part: str) -> list[Item]:
            offset = 0 if part == "train" else 10_000  # both parts number their identities from 0
            try:
                return [
                    Item(images / Path(path).name, int(identity) + 1 + offset, int(camera))
                    for path, identity, camera in split[part]
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{name}: {listing} has no list '{part}' of [path, identity, camera] ({error!r})"
                ) from None

    elif config.is_file():
        table = read_mat(config, name)

        def read(part: str) -> list[Item]:
            try:
                files, labels, cameras = (table[key].ravel() for key in ("filelist", "labels", "camId"))
                rows = table[f"{part}_idx"].ravel().astype(int) - 1
                return [Item(images / str(files[i][0]), int(labels[i]), int(cameras[i]) - 1) for i in rows]
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{name}: {config} holds no new protocol ({error!r})") from None

    else:
        raise UserError(f"{name}: neither {listing.name} nor {config.name} in {base}")
    return ReID("CUHK03", read("train"), [Split(read("query"), read("gallery"))])


def cuhk_sysu(root: Path) -> ReID:
    """CUHK-SYSU person crops, all for training; its scenes carry no camera labels."""
    name, pattern = "CUHK-SYSU", re.compile(r"^p(\d+)_(?:n\d+_)?s\d+")
    folder = find_folder(
        root,
        name,
        "cuhk_sysu/cropped_images/p{identity}_s{scene}_{image}.jpg or "
        "CUHK-SYSU/cropped_image/p{identity}_n{number}_s{scene}_hard{0,1}.png",
        "its authors (www.ee.cuhk.edu.hk/~xgwang/PS/dataset.html), cropped to the annotated boxes",
        "cuhk_sysu/cropped_images",
        "CUHK-SYSU/cropped_image",
    )
    paths = matching(folder, ["*.jpg", "*.png"], name)
    return ReID("CUHK-SYSU", [Item(path, *parse_name(path, pattern, name), 0) for path in paths])


def cuhk02(root: Path) -> ReID:
    """CUHK02, all five camera pairs for training; identities are numbered anew in each pair."""
    name, pattern = "CUHK02", re.compile(r"^(\d+)_")
    base = find_folder(
        root,
        name,
        "cuhk02/P{1..5}/cam{1,2}/{identity}_*.png",
        "its authors (www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html)",
        "cuhk02",
    )
    base = base / "Dataset" if (base / "Dataset").is_dir() else base
    items = []
    for pair in range(1, 6):
        for view in (1, 2):
            for path in matching(base / f"P{pair}" / f"cam{view}", ["*.png"], name):
                identity = 10_000 * pair + parse_name(path, pattern, name)[0]
                items.append(Item(path, identity, 2 * pair + view - 3))
    return ReID("CUHK02", items)
