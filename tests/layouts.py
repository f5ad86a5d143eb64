"""A miniature of the public layouts of every paper's data sets, and how the paper reads all of it."""

import json
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from anyface.captions import NOUNS
from anyface.datasets import open_set as open_texts
from biphasic_age.data import open_faces
from biphasic_age.train import Config as AgeConfig
from dfgc2022 import datasets as contest
from dfgc2022.data import Middle, read_list
from dfl.data import load_data
from dfl.domains import OFFICE, PACS
from dfl.train import PRESETS as FEDERATIONS
from faceswapper import datasets as swaps
from irisusformer.datasets import find_pairs, read_pair
from mdrnets import datasets as holes
from meta_reid import datasets as persons
from meta_reid import small_sets
from meta_reid.data import Files
from meta_reid.items import ReID, manifest
from most_net.pairs import Alignment, load_dataset
from pin.data import celeba, identity_folder
from pin.pairs import insightface_bin, lfw_pairs

Read = Callable[[Path], Iterable[Tensor]]


def paint(path: Path, seed: int = 0, size: tuple[int, int] = (24, 16), grey: bool = False) -> None:
    """A picture of noise, (height, width) = size, in the format that its ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def labels(path: Path, size: tuple[int, int] = (24, 16)) -> None:
    """A label map or mask: a square of 1 on 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(size, np.uint8)
    array[6:18, 4:12] = 1
    Image.fromarray(array).save(path)


def pin_people(root: Path) -> None:
    for person in "ab":
        paint(root / person / "1.jpg")
        paint(root / person / "2.pgm", grey=True)


def pin_celeba(root: Path) -> None:
    for n in (1, 2):
        paint(root / "img_align_celeba" / f"{n:06d}.jpg", n)
    put(root / "identity_CelebA.txt", "000001.jpg 5\n000002.jpg 7\n")


def pin_lfw(root: Path) -> None:
    for name in ("Ann", "Bob"):
        for n in (1, 2):
            paint(root / name / f"{name}_{n:04d}.jpg", n)
    put(root / "pairs.txt", "2\t1\nAnn\t1\t2\nBob\t1\tAnn\t2\nBob\t1\t2\nAnn\t1\tBob\t2\n")


def pin_bin(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    encoded = [cv2.imencode(".jpg", noise)[1].tobytes() for _ in range(4)]
    put(root / "agedb_30.bin", pickle.dumps((encoded, [True, False])))


def dfgc_crops(root: Path) -> None:
    for video in ("real clip", "fake"):
        paint(root / video / "0000.png")
    put(root / "list.txt", "real clip 0\nfake 1\n")


def read_crops(root: Path) -> list[Tensor]:
    folders, _ = read_list(root / "list.txt")
    crops = Middle(folders, 16)
    return [crops[i][0] for i in range(len(crops))]


def dfgc_lists(root: Path) -> None:
    put(root / "ff/splits/test.json", json.dumps([["071", "054"]]))
    for place in ("original_sequences/youtube", "manipulated_sequences/Deepfakes"):
        put(root / "ff" / place / "c23/videos/071.mp4", b"x")
    put(root / "celeb/List_of_testing_videos.txt", "1 YouTube-real/00170.mp4\n")
    for name in ("Celeb-real/a", "YouTube-real/00170", "Celeb-synthesis/b"):
        put(root / "celeb" / f"{name}.mp4", b"x")
    part = root / "dfdc/dfdc_train_part_0"
    put(part / "metadata.json", json.dumps({"a.mp4": {"label": "FAKE"}}))
    put(part / "a.mp4", b"x")
    put(root / "deeper/lists/splits/test.txt", "000_M101.mp4\n")
    put(root / "deeper/manipulated_videos/end_to_end_mix_4_distortions/000_M101.mp4", b"x")
    put(root / "deeper/source_videos/M101/a.mp4", b"x")
    base = root / "dfgc/Detection Dataset"
    put(base / "Detection Dataset Meta.csv", "videoName,label,target\na.mp4,1,1/1/3\nb.mp4,0,2/1\n")
    for name, label in (("Public", {"a.mp4": 1}), ("Private", {"b.mp4": 0})):
        put(base / f"{name} Label.json", json.dumps(label))
        put(base / name / next(iter(label)), b"x")
    put(root / "dfgc/Result Clips/metadata_C1.txt", "1/1/3\n")


def read_lists(root: Path) -> list[Tensor]:
    found = [
        contest.faceforensics(root / "ff", "c23", ["Deepfakes"]),
        contest.celeb_df(root / "celeb"),
        contest.dfdc(root / "dfdc"),
        contest.deeperforensics(root / "deeper"),
        contest.dfgc2022(root / "dfgc").clips,
    ]
    return [torch.tensor([clip.label for clip in clips]) for clips in found]


def dfl_mnist(root: Path) -> None:
    rng = np.random.default_rng(0)
    for stem, array in (
        ("images-idx3-ubyte", rng.integers(0, 256, (400, 28, 28))),
        ("labels-idx1-ubyte", np.arange(400) % 10),
    ):
        header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
        put(root / f"t10k-{stem}", header + array.astype(np.uint8).tobytes())


def dfl_office(root: Path) -> None:
    for name in OFFICE:
        for split, count in (("train", 4), ("test", 1)):
            paths = [f"office_caltech_10/{name}/{split}{i}.jpg" for i in range(count)]
            put(root / "office_caltech_10" / f"{name}_{split}.pkl", pickle.dumps((paths, ["mug"] * count)))
            for path in paths[: count // 2 or 1]:
                paint(root / path)


def dfl_pacs(root: Path) -> None:
    for name in PACS:
        for split in ("train", "test"):
            paint(root / "raw_images" / name / "dog" / f"{split}.png")
            put(root / "label" / f"{name}_{split}_kfold.txt", f"{name}/dog/{split}.png 1\n")


def dfl_folder(root: Path) -> None:
    rows = ["file,attribute"]
    for client in ("sensor a", "b"):
        for split in ("train", "test"):
            for kind in ("genuine", "attack"):
                paint(root / client / split / kind / "0.png")
                rows.append(f"{client}/{split}/{kind}/0.png,{kind}")
    put(root / "attributes.csv", "\n".join(rows))


def read_federation(preset: str) -> Read:
    def read(root: Path) -> list[Tensor]:
        small = {"image_size": 16, "workers": 0, "per_client": 20, "clients": 2, "test_images": 100}
        data = load_data(replace(FEDERATIONS[preset], data_root=root, **small), 0)
        return [part.images for client in data.clients for part in (client.train, client.test)]

    return read


def celebamask(root: Path) -> None:
    for n in range(3):
        paint(root / "CelebA-HQ-img" / f"{n}.jpg", n)
        labels(root / "CelebAMask-HQ-mask-anno/0" / f"{n:05d}_skin.png")
    rows = [f"{n} {n} {(100, 170_000, 190_000)[n]:06d}.jpg" for n in range(3)]
    put(root / "CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file\n" + "\n".join(rows))


def read_celebamask(root: Path) -> list[Tensor]:
    sets = [holes.celeba_hq(root, 16, part, "celeba") for part in ("train", "test")]
    every = holes.celeba_hq(root, 16, "train"), holes.celeba_hq(root, 16, "test")
    return [value for faces in (*sets, *every) for i in range(len(faces)) for value in faces.load(i)]


def mdr_list(root: Path) -> None:
    paint(root / "deep/é 1.png")
    paint(root / "deep/2.webp")
    put(root / "list.txt", "deep/é 1.png\ndeep/2.webp\n")


def read_mdr_list(root: Path) -> list[Tensor]:
    faces = holes.picture_list(root / "list.txt", root, 16)
    return [faces.load(i)[0] for i in range(len(faces))]


def captions(root: Path) -> None:
    for n in range(3):
        paint(root / "image" / f"{n}.jpg", n)
        put(root / "celeba-caption" / f"{n}.txt", f"a face {n}\nthe same\n")
    for part, stems in (("train", ["0", "1"]), ("test", ["2"])):
        put(root / part / "filenames.pickle", pickle.dumps(stems))


def attributes(root: Path) -> None:
    for n in (7, 12):
        paint(root / "CelebAimg" / f"{n}.jpg", n)
    put(root / "data_flist/train.flist", "/data/7.jpg\n")
    put(root / "data_flist/test.flist", "/data/12.jpg\n")
    names = list(NOUNS)[:3]
    rows = ["2", " ".join(names), "7.jpg 1 -1 1", "12.jpg -1 1 -1"]
    put(root / "CelebAMask-HQ-attribute-anno.txt", "\n".join(rows))


def read_texts(root: Path) -> list[Tensor]:
    sets = [open_texts(root, part) for part in ("train", "test")]
    return [faces.picture(i, 16) for faces in sets for i in range(len(faces))]


def swapping(root: Path) -> None:
    for stem in ("raw_000_0", "raw_003_0"):
        paint(root / "ff++" / f"{stem}.png")
        paint(root / "ff++_lm_images" / f"{stem}.png")
        for sister in ("mask", "parsing"):
            labels(root / f"ff++_{sister}_images" / f"{stem}.png")
    put(root / "face_swap_list.txt", "raw_003_0.png raw_000_0.png\nraw_000_0.png raw_003_0.png\n")


def read_swaps(root: Path) -> list[Tensor]:
    found = swaps.SwapList(root, 16)
    sets = found.targets, found.originals
    return [value for s in sets for i in range(len(s)) for value in s.load(i).values()]


def sketches(root: Path) -> None:
    for n in range(2):
        paint(root / "AR/photos" / f"{n}.png", n, (250, 200))
        paint(root / "AR/sketches" / f"{n}.png", n, (250, 200), grey=True)
    put(root / "train.txt", "AR/photos/0.png||AR/sketches/0.png\n")
    put(root / "test.txt", "AR/photos/1.png||AR/sketches/1.png\n")


def read_sketches(root: Path) -> list[Tensor]:
    lists = {"train_list": root / "train.txt", "test_list": root / "test.txt"}
    return [
        value for pairs in load_dataset("pairs", root, **lists) for value in (pairs.photos, pairs.sketches)
    ]


def fs2k(root: Path) -> None:
    for part, n in (("train", 1), ("test", 3)):
        paint(root / "photo" / f"photo{n}" / "image0001.jpg", n, (250, 200))
        paint(root / "sketch" / f"sketch{n}" / "sketch0001.png", n, (250, 200), grey=True)
        put(root / f"anno_{part}.json", json.dumps([{"image_name": f"photo{n}/image0001"}]))


def read_fs2k(root: Path) -> list[Tensor]:
    sets = load_dataset("fs2k", root, alignment=Alignment(resize="stretch"))
    return [value for pairs in sets for value in (pairs.photos, pairs.sketches)]


def reid(root: Path) -> None:
    base = root / "Market-1501-v15.09.15"
    for place in ("bounding_box_train/0002_c1s1_000451_03", "query/0001_c2s1_000451_03"):
        paint(base / f"{place}.jpg")
    paint(base / "bounding_box_test/0001_c1s1_000451_03.jpg")
    lists = {"train": "0000/0000_000_01_a.jpg 0", "val": "0001/0001_000_15_a.jpg 1"}
    lists |= {"query": "0000/0000_000_02_a.jpg 0", "gallery": "0000/0000_001_03_a.jpg 0"}
    for part, line in lists.items():
        folder = "train" if part in ("train", "val") else "test"
        paint(root / "MSMT17_V1" / folder / line.split()[0])
        put(root / "MSMT17_V1" / f"list_{part}.txt", line + "\n")
    names = [f"1_{i:03d}_{1 + i % 2}_01.png" for i in range(1, 7)]
    for name in names:
        paint(root / "cuhk03/images_labeled" / name)
    cells = np.empty((6, 1), dtype=object)
    cells[:, 0] = names
    table = {"filelist": cells, "labels": np.array([1, 1, 2, 2, 3, 3]), "camId": np.array([1, 2] * 3)}
    table |= {"train_idx": np.array([1, 2]), "query_idx": np.array([3, 5]), "gallery_idx": np.array([4, 6])}
    savemat(root / "cuhk03/cuhk03_new_protocol_config_labeled.mat", table)
    for person in (1, 2):
        for view, name in (("probe", "1_25023_119_47_70_262"), ("gallery", "5_25023_119_47_70_262")):
            paint(root / "grid" / view / f"{person:04d}_{name}.jpeg")
    cells = np.empty((1, 10), dtype=object)
    for n in range(10):
        cells[0, n] = {"first": [0], "second": [0], "third": np.array([[99]])}
    savemat(root / "grid/features_and_partitions.mat", {"trainIdxAll": cells})


def images_of(sets: Iterable[ReID]) -> list[Tensor]:
    items = [
        item
        for found in sets
        for item in (*found.train, *(i for split in found.splits[:1] for i in (*split.query, *split.gallery)))
    ]
    files = Files(items, (16, 8))
    return [files[i][0] for i in range(len(files))]


def read_reid(root: Path) -> list[Tensor]:
    readers = persons.market1501, persons.msmt17, persons.cuhk03
    grid = small_sets.grid(root)
    every = sorted({item.path for split in grid.splits for item in (*split.query, *split.gallery)})
    assert every
    return images_of([*(reader(root) for reader in readers), grid])


def own_cameras(root: Path) -> None:
    rows = ["path,id,camera,domain"]
    for domain in ("gate", "höf"):
        for person in "xy":
            paint(root / f"{domain} {person}.png")
            rows.append(f"{domain} {person}.png,{person},cam,{domain}")
    put(root / "mine.csv", "\n".join(rows))


def read_cameras(root: Path) -> list[Tensor]:
    files = Files([item for items in manifest(root / "mine.csv").values() for item in items], (16, 8))
    return [files[i][0] for i in range(len(files))]


def irises(root: Path) -> None:
    for name in ("eye1", "eye 2"):
        paint(root / "images" / f"{name}.jpg")
        labels(root / "masks" / f"{name}.png")
    put(root / "train.txt", "eye1\neye 2\n")


def openeds(root: Path) -> None:
    paint(root / "train/images/000001.png", grey=True)
    maps = np.zeros((24, 16), np.uint8)
    maps[4:20, 2:14], maps[8:16, 4:12], maps[10:13, 6:9] = 1, 2, 3
    (root / "train/labels").mkdir()
    np.save(root / "train/labels/000001.npy", maps)


def iris_table(root: Path) -> None:
    paint(root / "pictures/1.png")
    labels(root / "truth/1.png")
    put(root / "eyes.csv", "image,mask,split\npictures/1.png,truth/1.png,train\n")


def read_irises(dataset: str, place: str = "") -> Read:
    def read(root: Path) -> list[Tensor]:
        pairs = find_pairs(dataset, root / place, "train")
        return [value for pair in pairs for value in read_pair(pair)]

    return read


def morph(root: Path) -> None:
    for person in range(5):
        name = f"{person:06d}_1{'MF'[person % 2]}{(18, 35, 45, 60)[person % 4]}"
        paint(root / f"{name}.JPG", person)
        labels(root / "parsing" / f"{name}.png")


def ffhq_aging(root: Path) -> None:
    for n in range(5):
        paint(root / "ffhq_aging256x256/00000" / f"{n:05d}.png", n)
        labels(root / "parsing" / f"{n:05d}.png")
    rows = [f"{n},20-29,male" for n in range(5)]
    put(root / "ffhq_aging_labels.csv", "image_number,age_group,gender\n" + "\n".join(rows))


def age_list(root: Path) -> None:
    rows = ["path,age,identity,layout"]
    for n in range(5):
        paint(root / f"{n}.png", n)
        labels(root / f"map {n}.png")
        rows.append(f"{n}.png,{20 + 10 * n},Zoë {n},map {n}.png")
    put(root / "list.csv", "\n".join(rows))


def read_ages(name: str) -> Read:
    def read(root: Path) -> list[Tensor]:
        config = AgeConfig(data=(name,), data_root=root, list=root / "list.csv", image_size=16)
        sets = [open_faces(config, name, part) for part in ("train", "test")]
        return [value for faces in sets for i in range(len(faces)) for value in faces.load(i)]

    return read


class Layout(NamedTuple):
    make: Callable[[Path], None]
    read: Read


def each(open_files: Callable[[Path], Iterable]) -> Read:
    """Pictures of a data set that gives (picture, label)."""

    def read(root: Path) -> list[Tensor]:
        files = open_files(root)
        return [files[i][0] for i in range(len(files))]

    return read


LAYOUTS = {
    "pin, people": Layout(pin_people, each(lambda root: identity_folder(root, 16))),
    "pin, CelebA": Layout(pin_celeba, each(lambda root: celeba(root, 16))),
    "pin, LFW": Layout(pin_lfw, each(lambda root: lfw_pairs(root, size=16)[0])),
    "pin, bin": Layout(pin_bin, each(lambda root: insightface_bin(root / "agedb_30.bin", 16)[0])),
    "dfgc2022, crops": Layout(dfgc_crops, read_crops),
    "dfgc2022, releases": Layout(dfgc_lists, read_lists),
    "dfl, MNIST": Layout(dfl_mnist, read_federation("mnist")),
    "dfl, Office": Layout(dfl_office, read_federation("office")),
    "dfl, PACS": Layout(dfl_pacs, read_federation("pacs")),
    "dfl, folder": Layout(dfl_folder, read_federation("folder")),
    "mdrnets, CelebAMask-HQ": Layout(celebamask, read_celebamask),
    "mdrnets, list": Layout(mdr_list, read_mdr_list),
    "anyface, captions": Layout(captions, read_texts),
    "anyface, attributes": Layout(attributes, read_texts),
    "faceswapper, FaceForensics++": Layout(swapping, read_swaps),
    "most_net, lists": Layout(sketches, read_sketches),
    "most_net, FS2K": Layout(fs2k, read_fs2k),
    "meta_reid, public sets": Layout(reid, read_reid),
    "meta_reid, manifest": Layout(own_cameras, read_cameras),
    "irisusformer, folders": Layout(irises, read_irises("folder")),
    "irisusformer, OpenEDS": Layout(openeds, read_irises("openeds")),
    "irisusformer, table": Layout(iris_table, read_irises("csv", "eyes.csv")),
    "biphasic_age, MORPH": Layout(morph, read_ages("morph")),
    "biphasic_age, FFHQ-Aging": Layout(ffhq_aging, read_ages("ffhq-aging")),
    "biphasic_age, list": Layout(age_list, read_ages("csv")),
}
