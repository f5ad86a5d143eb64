"""META: data set layouts, protocols, manifests."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from meta_reid import datasets, small_sets
from meta_reid.cuhk03 import extract
from meta_reid.data import Files, resize
from meta_reid.items import manifest
from meta_reid.protocols import manifest_sources, source_items, sources_of
from shared.io import write_image
from shared.runtime import UserError


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpeg", ".bmp"):
        Image.new("RGB", (4, 8)).save(path)
    else:
        write_image(path, torch.zeros(3, 8, 4))


def market(root):
    base = root / "Market-1501-v15.09.15"
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c3s1_000451_03.jpg"],
        "query": ["0001_c2s1_000451_03.jpg"],
        "bounding_box_test": ["0001_c1s1_1_00.jpg", "0000_c2s1_1_00.jpg", "-1_c2s1_1_00.jpg"],
    }
    for folder, files in names.items():
        for file in files:
            image(base / folder / file)


def msmt(root):
    base = root / "MSMT17_V1"
    lists = {"train": "0000/0000_000_01_a.jpg 0", "val": "0001/0001_000_15_a.jpg 1"}
    lists |= {"query": "0000/0000_000_02_a.jpg 0", "gallery": "0000/0000_001_03_a.jpg 0"}
    for part, line in lists.items():
        folder = "train" if part in ("train", "val") else "test"
        image(base / folder / line.split()[0])
        (base / f"list_{part}.txt").write_text(line + "\n")


def cuhk(root):
    for name in ("p1_s1_1.jpg", "p2_s1_2.jpg", "p2_s3_1.jpg"):
        image(root / "cuhk_sysu" / "cropped_images" / name)
    names = [f"1_{i:03d}_{1 + i % 2}_01.png" for i in range(1, 7)]
    for name in names:
        image(root / "cuhk03" / "images_labeled" / name)
    cells = np.empty((6, 1), dtype=object)
    cells[:, 0] = names
    table = {"filelist": cells, "labels": np.array([1, 1, 2, 2, 3, 3]), "camId": np.array([1, 2] * 3)}
    table |= {"train_idx": np.array([1, 2]), "query_idx": np.array([3, 5]), "gallery_idx": np.array([4, 6])}
    savemat(root / "cuhk03" / "cuhk03_new_protocol_config_labeled.mat", table)


def test_market1501(tmp_path):
    market(tmp_path)
    found = datasets.market1501(tmp_path)
    assert [(i.identity, i.camera) for i in found.train] == [(2, 0), (7, 2)]
    assert [(i.identity, i.camera) for i in found.splits[0].query] == [(1, 1)]
    assert [i.identity for i in found.splits[0].gallery] == [0, 1]  # -1 dropped, 0 kept as distractor
    assert [i.identity for i in found.everything()] == [2, 7, 1, 1]
    assert 1502 in {i.identity for i in datasets.market1501(tmp_path, background=True).everything()}
    image(tmp_path / "Market-1501-v15.09.15" / "query" / "odd.jpg")
    with pytest.raises(UserError, match="odd.jpg is not named as expected"):
        datasets.market1501(tmp_path)


def test_msmt17(tmp_path):
    msmt(tmp_path)
    found = datasets.msmt17(tmp_path)
    assert [(i.identity, i.camera) for i in found.train] == [(1, 0), (2, 14)]
    assert [(i.identity, i.camera) for i in found.splits[0].query] == [(3, 1)]
    assert len(datasets.msmt17(tmp_path, validation=False).train) == 1
    assert all(i.path.is_file() for i in found.everything())
    (tmp_path / "MSMT17_V1" / "list_val.txt").write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1"):
        datasets.msmt17(tmp_path)
    (tmp_path / "MSMT17_V1" / "list_val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="list_val.txt: not readable"):
        datasets.msmt17(tmp_path)


def test_cuhk03_from_either_list(tmp_path):
    cuhk(tmp_path)
    found = datasets.cuhk03(tmp_path)
    assert [(i.identity, i.camera) for i in found.train] == [(1, 0), (1, 1)]
    assert [(i.identity, i.camera) for i in found.splits[0].gallery] == [(2, 1), (3, 1)]
    assert len({i.identity for i in found.everything()}) == 3
    lists = {"train": [["x/1_001_2_01.png", 0, 0]], "query": [["1_003_2_01.png", 0, 0]]}
    lists["gallery"] = [["1_004_1_01.png", 0, 1]]
    listing = tmp_path / "cuhk03" / "splits_new_labeled.json"
    listing.write_text(json.dumps([lists]))
    found = datasets.cuhk03(tmp_path)
    assert len({i.identity for i in found.everything()}) == 2  # train and test count from 0 each
    for broken in ([lists | {"query": [["only a path"]]}], [{"train": []}], 3):
        listing.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="splits_new_labeled.json has no list"):
            datasets.cuhk03(tmp_path)
    listing.write_text("{")
    with pytest.raises(UserError, match="not readable"):
        datasets.cuhk03(tmp_path)
    listing.unlink()
    savemat(tmp_path / "cuhk03" / "cuhk03_new_protocol_config_labeled.mat", {"labels": np.array([1])})
    with pytest.raises(UserError, match="config_labeled.mat holds no new protocol"):
        datasets.cuhk03(tmp_path)


def released_cuhk03(path, pictures, people=(2, 1, 1, 1, 1)):
    """cuhk-03.mat as MATLAB 7.3 writes it: cells are references, dimensions reversed, [] a marked vector."""
    import h5py

    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:

        def cell(name, rows, columns):
            return file.create_dataset(name, (columns, rows), h5py.ref_dtype)

        for boxes in ("detected", "labeled"):
            pairs = cell(boxes, 5, 1)
            for pair, count in enumerate(people):
                table = cell(f"#refs#/{boxes}{pair}", count, 10)
                pairs[0, pair] = table.ref
                for person in range(count):
                    for number in range(10):
                        name = f"#refs#/{boxes}{pair}-{person}-{number}"
                        picture = pictures.get((boxes, pair + 1, person + 1, number + 1))
                        if picture is None:
                            value = file.create_dataset(name, data=np.zeros(2, "uint64"))
                            value.attrs["MATLAB_empty"] = np.uint8(1)
                        else:
                            value = file.create_dataset(name, data=picture.transpose(2, 1, 0))
                        table[number, person] = value.ref


def test_cuhk03_from_the_release(tmp_path):
    rng = np.random.default_rng(0)
    keys = [(pair, person, number) for pair, person in ((1, 1), (1, 2), (4, 1)) for number in (1, 5, 6, 10)]
    shown = {("labeled", *key): rng.integers(0, 256, (9, 4 + key[2], 3), dtype=np.uint8) for key in keys}
    base = tmp_path / "cuhk03"
    with pytest.raises(UserError, match="no folder .*cuhk-03.mat or cuhk03/images_labeled"):
        datasets.cuhk03(tmp_path)
    release = base / "cuhk03_release" / "cuhk-03.mat"
    released_cuhk03(release, shown | {("detected", 1, 1, 1): np.zeros((3, 3, 3), np.uint8)})
    lists = {"train": [["1_002_1_05.png", 0, 0]], "query": [["1_001_1_01.png", 0, 0]]}
    lists["gallery"] = [["1_001_2_06.png", 0, 1], ["4_001_2_10.png", 1, 1]]
    (base / "splits_new_labeled.json").write_text(json.dumps([lists]))
    found = datasets.cuhk03(tmp_path)
    names = {f"{a}_{b:03d}_{1 if c <= 5 else 2}_{c:02d}.png": (a, b, c) for a, b, c in keys}
    assert {path.name for path in (base / "images_labeled").iterdir()} == names.keys()
    items = found.train + found.splits[0].query + found.splits[0].gallery
    for (image, _), item in zip((Files(items, (9, 9))[i] for i in range(4)), items, strict=True):
        exact = torch.from_numpy(shown["labeled", *names[item.path.name]]).permute(2, 0, 1)
        assert torch.equal(resize(exact, (9, 9)), image)
    extract(release, base / "images_labeled")  # as a second process does, which comes too late
    assert {path.name for path in base.iterdir()} == {
        "cuhk03_release",
        "images_labeled",
        "splits_new_labeled.json",
    }
    release.unlink()
    assert datasets.cuhk03(tmp_path) == found  # from the folder, which is written once


@pytest.mark.parametrize("content", [None, b"MATLAB 5.0 MAT-file", {"detected": 1}, {"labeled": [[1, 2]]}])
def test_a_release_of_cuhk03_that_cannot_be_read(content, tmp_path):
    import h5py

    base = tmp_path / "cuhk03"
    release = base / "cuhk03_release" / "cuhk-03.mat"
    release.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        release.write_bytes(content)
    elif content:
        with h5py.File(release, "w") as file:
            for name, value in content.items():
                file[name] = value
    message = "CUHK03: cannot extract .*cuhk-03.mat" if content else "neither a folder .*images_labeled nor"
    with pytest.raises(UserError, match=message):
        datasets.cuhk03(tmp_path)
    assert [path.name for path in base.iterdir()] == ["cuhk03_release"]


def test_cuhk_sysu_and_cuhk02(tmp_path):
    cuhk(tmp_path)
    assert [i.identity for i in datasets.cuhk_sysu(tmp_path).train] == [1, 2, 2]
    other = tmp_path / "other"
    image(other / "CUHK-SYSU" / "cropped_image" / "p00007_n01_s00001_hard0.png")
    assert datasets.cuhk_sysu(other).train[0].identity == 7
    for pair in range(1, 6):
        for view in (1, 2):
            image(tmp_path / "cuhk02" / f"P{pair}" / f"cam{view}" / "001_01.png")
    found = datasets.cuhk02(tmp_path)
    assert len(found.train) == 10 and len({i.identity for i in found.train}) == 5
    assert [i.camera for i in found.train] == list(range(10))


def test_viper(tmp_path):
    for person in range(6):
        image(tmp_path / "VIPeR" / "cam_a" / f"{person:03d}_45.bmp")
        image(tmp_path / "VIPeR" / "cam_b" / f"{person:03d}_90.bmp")
    found = small_sets.viper(tmp_path)
    assert len(found.splits) == 10
    for split in found.splits:
        assert len(split.query) == len(split.gallery) == 3
        assert {i.identity for i in split.query} == {i.identity for i in split.gallery}
        assert {i.camera for i in split.query} == {0} and {i.camera for i in split.gallery} == {1}
    assert small_sets.viper(tmp_path).splits == found.splits and len({str(s) for s in found.splits}) > 1
    listed = [{"query": [[f"cam_a/00{n % 6}_45.bmp", 0, 0]]} for n in range(10)]
    listed += [{"query": [[f"cam_b/00{n % 6}_90.bmp", 0, 0]]} for n in range(10)]
    (tmp_path / "VIPeR" / "splits.json").write_text(json.dumps(listed))
    assert [split.query[0].identity for split in small_sets.viper(tmp_path).splits][:3] == [1, 2, 3]
    for broken in ([{"gallery": []}] * 10, {"query": 1}, listed[:9]):
        (tmp_path / "VIPeR" / "splits.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="splits.json"):
            small_sets.viper(tmp_path)
    prepared = tmp_path / "prepared"
    for number in range(1, 11):
        for part, camera in (("query", 1), ("gallery", 2)):
            image(prepared / "viper" / f"split_{number}a" / part / f"p00{number % 9}_c{camera}_d045.png")
    assert len(small_sets.viper(prepared).splits) == 10


def test_prid_grid_and_ilids(tmp_path):
    single = tmp_path / "prid2011" / "single_shot"
    for person in (1, 2, 3, 4, 300):
        image(single / "cam_a" / f"person_{person:04d}.png")
    for person in (1, 2, 3, 4, 250, 251):
        image(single / "cam_b" / f"person_{person:04d}.png")
    split = small_sets.prid(tmp_path).splits[0]
    assert len(split.query) == 2 and len(split.gallery) == 4
    listed = [{"train": [], "test": ["person_0003"]}] * 10
    (single / "splits_single_shot.json").write_text(json.dumps(listed))
    assert [i.identity for i in small_sets.prid(tmp_path).splits[9].query] == [3]
    for broken in (listed[:9], [{"train": []}] * 10, {"test": 1}, [{"test": ["person_0099"]}] * 10):
        (single / "splits_single_shot.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="splits_single_shot.json"):
            small_sets.prid(tmp_path)

    for person in range(1, 5):
        image(tmp_path / "grid" / "probe" / f"{person:04d}_1_25023_119_47_70_262.jpeg")
        image(tmp_path / "grid" / "gallery" / f"{person:04d}_5_25023_119_47_70_262.jpeg")
    image(tmp_path / "grid" / "gallery" / "0000_2_1_1_1_1_1.jpeg")
    with pytest.raises(UserError, match="features_and_partitions.mat"):
        small_sets.grid(tmp_path)
    cells = np.empty((1, 10), dtype=object)
    for n in range(10):
        cells[0, n] = {"first": [0], "second": [0], "third": np.array([[1, 2 + n % 2]])}
    savemat(tmp_path / "grid" / "features_and_partitions.mat", {"trainIdxAll": cells})
    splits = small_sets.grid(tmp_path).splits
    assert [i.identity for i in splits[0].query] == [3, 4] and [i.identity for i in splits[1].query] == [2, 4]
    assert [i.identity for i in splits[0].gallery] == [3, 4, 0]
    everybody = np.empty((1, 10), dtype=object)
    everybody[0, :] = [{"first": [0], "second": [0], "third": np.array([[1, 2, 3, 4]])} for _ in range(10)]
    for broken in (cells[:, :9], everybody):
        savemat(tmp_path / "grid" / "features_and_partitions.mat", {"trainIdxAll": broken})
        with pytest.raises(UserError, match="features_and_partitions.mat does not hold ten splits"):
            small_sets.grid(tmp_path)

    for person, count in ((1, 3), (2, 2), (3, 1)):
        for sequence in range(count):
            image(tmp_path / "i-LIDS_Pedestrian" / "Persons" / f"{person:04d}{sequence:03d}.jpg")
    for split in small_sets.ilids(tmp_path).splits:
        assert [i.identity for i in split.query] == [i.identity for i in split.gallery] == [2, 3]
        assert all(a.path != b.path for a, b in zip(split.query, split.gallery, strict=True))


@pytest.mark.parametrize(
    "reader",
    [datasets.market1501, datasets.msmt17, datasets.cuhk02, datasets.cuhk03, datasets.cuhk_sysu]
    + [small_sets.viper, small_sets.prid, small_sets.grid, small_sets.ilids],
)
def test_a_missing_set_says_where_to_get_it(reader, tmp_path):
    with pytest.raises(UserError, match="Get it from .* and lay it out as"):
        reader(tmp_path)


def test_protocols(tmp_path):
    assert sources_of(1, "") == ["C2", "C3", "CS", "M"]
    assert sources_of(2, "MS") == ["C3", "CS", "M"] and sources_of(3, "M") == ["C3", "CS", "MS"]
    with pytest.raises(UserError, match="C3, MS or M"):
        sources_of(2, "CS")
    market(tmp_path), cuhk(tmp_path)
    names, parts = source_items(2, "MS", tmp_path)
    assert [len(part) for part in parts] == [2, 3, 2] and names == ["C3", "CS", "M"]
    assert [len(part) for part in source_items(3, "MS", tmp_path)[1]] == [6, 3, 4]
    assert len(source_items(3, "MS", tmp_path, background=True)[1][2]) == 5
    assert len(source_items(2, "MS", tmp_path, background=True)[1][2]) == 2
    msmt(tmp_path)
    # MSMT17's validation images are trained on where its test images are too.
    for protocol, sizes in ((2, [2, 3, 1]), (3, [6, 3, 4])):
        assert [len(part) for part in source_items(protocol, "M", tmp_path)[1]] == sizes


def test_manifest(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [["path", "id", "camera", "domain"]]
    for domain in ("gate", "hall", "yard"):
        for person in "xy":
            name = f"{domain}{person}.png"
            image(tmp_path / name)
            rows.append([name, person, "cam1", domain])

    def write(rows):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)

    write(rows)
    found = manifest(path)
    assert list(found) == ["gate", "hall", "yard"] and [i.identity for i in found["hall"]] == [1, 2]
    files, labels = manifest_sources(path, "yard", (8, 4), 0)
    assert labels.names == ["gate", "hall"] and len(files) == 4
    with pytest.raises(UserError, match="no domain 'roof'"):
        manifest_sources(path, "roof", (8, 4), 0)
    write(rows[:5])
    with pytest.raises(UserError, match="at least two"):
        manifest_sources(path, "hall", (8, 4), 0)
    for broken, message in (
        ([["path", "id"]], "no column"),
        (rows[:1], "no rows"),
        ([*rows, ["", "x", "c", "gate"]], "line 8: path is empty"),
        ([*rows, ["gone.png", "x", "c", "gate"]], "no image"),
    ):
        write(broken)
        with pytest.raises(UserError, match=message):
            manifest(path)
    write([*rows, ["x" * 200_000, "x", "c", "gate"]])
    with pytest.raises(UserError, match="mine.csv, line 8: not readable as CSV .*field larger"):
        manifest(path)
    write(rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert manifest(path) == found
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    with pytest.raises(UserError, match="mine.csv: not UTF-8"):
        manifest(path)
    with pytest.raises(UserError, match="no such manifest"):
        manifest(tmp_path / "none.csv")
