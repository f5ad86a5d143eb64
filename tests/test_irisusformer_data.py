"""IrisUsformer: data sets in their public layouts, bad files, augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image

from irisusformer.data import Augmentation, IrisFiles
from irisusformer.datasets import NIR_ISL, find_pairs, read_eye, read_pair
from irisusformer.draw import DrawConfig, draw
from irisusformer.eyes import LOOKS, draw_eye
from irisusformer.iris import identity
from irisusformer.losses import IGNORE
from shared.runtime import UserError

# ------------------------------------------------------------------------------------------------ data sets


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(shape=(24, 32)):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def mask_array(shape=(24, 32), top=255):
    array = np.zeros(shape, np.uint8)
    array[8:16, 10:20] = top
    return array


def write_folders(base, names, image="image", mask="SegmentationClass", regions=True, ending=".jpg"):
    for name in names:
        save(base / image / f"{name}{ending}", picture())
        save(base / mask / f"{name}.png", mask_array())
        if regions:
            outline = np.zeros((24, 32), np.uint8)
            outline[6:18, 8:22] = 255
            hollow = outline.copy()
            hollow[7:17, 9:21] = 0
            save(base / "iris_edge_mask" / f"{name}.png", hollow)
            save(base / "pupil_edge_mask" / f"{name}.png", mask_array() // 255)


@pytest.mark.parametrize("dataset", ["casia-distance", "ubiris", "miche"])
def test_irisparsenet_release(tmp_path, dataset):
    write_folders(tmp_path / "train", ["S4090L04_03311", "S4001L01_00001"], "JPEGImages", ending=".JPEG")
    write_folders(tmp_path / "test", ["001_IP5_IN_R_RI_01_2"])
    train, test = (find_pairs(dataset, tmp_path, split) for split in ("train", "test"))
    assert [pair.name for pair in train] == ["S4001L01_00001", "S4090L04_03311"] and len(test) == 1
    image, mask, regions = read_pair(train[0])
    assert image.shape == (3, 24, 32) and mask.sum() == 80
    assert regions[1].sum() == 12 * 14  # an outline is filled
    assert regions[0].sum() == 80


@pytest.mark.parametrize("order", ["split first", "set first"])
@pytest.mark.parametrize("name", NIR_ISL)
def test_nir_isl(tmp_path, name, order):
    base = (
        tmp_path / "train" / NIR_ISL[name] if order == "split first" else tmp_path / NIR_ISL[name] / "train"
    )
    write_folders(base, ["a", "b"])
    assert len(find_pairs(f"nir-isl/{name}", tmp_path, "train")) == 2


def test_irisseg_with_flat_names_and_subject_split(tmp_path):
    for subject in range(1, 6):
        for shot in (1, 2):
            name = f"S100{subject}L0{shot}"
            save(tmp_path / "images" / f"S100{subject}" / f"{name}.jpg", picture())
            save(tmp_path / "masks" / f"OperatorA_{name}.tiff", mask_array(top=1))
            save(tmp_path / "masks" / f"OperatorB_{name}.tiff", mask_array())
    train, test = (find_pairs("casia-interval", tmp_path, split) for split in ("train", "test"))
    assert len(train) == 8 and [pair.subject for pair in test] == ["S1005"] * 2
    assert find_pairs("casia-interval", tmp_path, "train", "B")[0].mask.name.startswith("OperatorB_")


def test_irisseg_where_stems_repeat_in_every_subject(tmp_path):
    for subject in ("001", "002"):
        save(tmp_path / "images" / subject / "01_L.bmp", picture())
        save(tmp_path / "masks" / f"OperatorA_{subject}-01_L.tiff", mask_array())
    (tmp_path / "train.txt").write_text("001-01_L\n002-01_L.bmp\n")
    pairs = find_pairs("iitd", tmp_path, "train")
    assert [(pair.image.parent.name, pair.mask.stem) for pair in pairs] == [
        ("001", "OperatorA_001-01_L"),
        ("002", "OperatorA_002-01_L"),
    ]


def test_masks_in_folders_of_their_own_and_masks_twice(tmp_path):
    for subject in ("001", "002"):
        save(tmp_path / "images" / subject / "left.png", picture())
        save(tmp_path / "masks" / subject / "left.png", mask_array())
    (tmp_path / "train.txt").write_text("001_left\n002_left\n")
    pairs = find_pairs("folder", tmp_path, "train")
    assert [(p.image.parent.name, p.mask.parent.name) for p in pairs] == [("001", "001"), ("002", "002")]
    save(tmp_path / "masks/001/left.bmp", mask_array())
    with pytest.raises(UserError, match=r"left.bmp and .*left.png are masks of one image"):
        find_pairs("folder", tmp_path, "train")


def test_nice(tmp_path):
    write_folders(tmp_path / "test", ["C1_S1_I1"], "images", "masks", False, ".tiff")
    assert len(find_pairs("nice", tmp_path, "test")) == 1


def test_openeds(tmp_path):
    save(tmp_path / "train/images/000001.png", picture()[..., 0])
    labels = np.zeros((24, 32), np.uint8)
    labels[4:20, 4:28], labels[6:18, 8:24], labels[9:14, 12:18] = 1, 2, 3
    (tmp_path / "train/labels").mkdir()
    np.save(tmp_path / "train/labels/000001.npy", labels)
    image, mask, regions = read_pair(find_pairs("openeds", tmp_path, "train")[0])
    assert image.shape == (3, 24, 32)
    assert mask.sum() == 12 * 16 - 30 and regions.sum((1, 2)).tolist() == [30, 12 * 16]


def test_generic_folder_splits_every_fifth(tmp_path):
    write_folders(tmp_path, [f"eye{i}" for i in range(10)], "images", "masks", False)
    train, test = (find_pairs("folder", tmp_path, split) for split in ("train", "test"))
    assert [pair.name for pair in test] == ["eye4", "eye9"] and len(train) == 8
    assert (read_pair(train[0])[2] == IGNORE).all()


def test_lists_of_one_split_leave_the_rest_to_the_other(tmp_path):
    names = [*(f"eye{i}" for i in range(6)), "left eye", "eye.2"]
    write_folders(tmp_path, names, "images", "masks", False)
    (tmp_path / "train.txt").write_text("eye4\nleft eye\neye.2\neye0.jpg\n")
    train, test = ({pair.name for pair in find_pairs("folder", tmp_path, s)} for s in ("train", "test"))
    assert train == {"eye4", "left eye", "eye.2", "eye0"} and test == set(names) - train
    (tmp_path / "test.txt").write_text("eye1\n")
    assert [pair.name for pair in find_pairs("folder", tmp_path, "test")] == ["eye1"]


@pytest.mark.parametrize("dataset", ["miche", "ubiris", "casia-distance", "nice"])
def test_lists_split_the_named_sets_and_do_not_compete_with_folders(tmp_path, dataset):
    write_folders(tmp_path, ["a", "b", "c"])
    with pytest.raises(UserError, match="no folder .*train and no list .*train.txt; get it"):
        find_pairs(dataset, tmp_path, "train")
    (tmp_path / "train.txt").write_text("c\na\n")
    train, test = (
        [pair.name for pair in find_pairs(dataset, tmp_path, split)] for split in ("train", "test")
    )
    assert train == ["c", "a"] and test == ["b"]
    write_folders(tmp_path / "train", ["a", "b"])
    with pytest.raises(UserError, match=r"train and .*train.txt both say how"):
        find_pairs(dataset, tmp_path, "train")


def test_csv_with_and_without_split(tmp_path):
    for i in range(5):
        save(tmp_path / f"pictures/{i}.png", picture())
        save(tmp_path / f"truth/{i}.png", mask_array())
    rows = [f"pictures/{i}.png,truth/{i}.png" for i in range(5)]
    table = tmp_path / "eyes.csv"
    table.write_text("image,mask\n" + "\n".join(rows))
    assert [pair.name for pair in find_pairs("csv", table, "test")] == ["4"]
    splits = ["train", "test", "train", "train", "test"]
    table.write_text("image,mask,split\n" + "\n".join(f"{r},{s}" for r, s in zip(rows, splits, strict=True)))
    assert [pair.name for pair in find_pairs("csv", table, "test")] == ["1", "4"]
    table.write_text("image,mask,split\n" + "\n".join(f"{r}, Test" for r in rows), encoding="utf-8-sig")
    assert len(find_pairs("csv", table, "test")) == 5
    for line, message in (
        ("pictures/1.png", "line 2: no value in the column mask"),
        ("pictures/1.png,truth/1.png,tset", "line 2: split 'tset' is neither train nor test"),
        ("pictures/1.png,truth/1.png,", "line 2: split '' is neither"),
    ):
        table.write_text(f"image,mask,split\n{line}\n")
        with pytest.raises(UserError, match=message):
            find_pairs("csv", table, "train")
    table.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UserError, match="eyes.csv: not readable as a table"):
        find_pairs("csv", table, "train")
    table.write_text("picture,mask\n")
    with pytest.raises(UserError, match="columns image and mask"):
        find_pairs("csv", table, "train")
    table.write_text("image,mask\npictures/9.png,truth/0.png\n")
    with pytest.raises(UserError, match=r"line 2: no file .*9.png"):
        find_pairs("csv", table, "train")


def test_all_takes_what_is_there(tmp_path):
    write_folders(tmp_path / "ubiris/train", ["u"])
    write_folders(tmp_path / "nir-isl/train" / NIR_ISL["mobile"], ["m"])
    assert [pair.name for pair in find_pairs("all", tmp_path, "train")] == ["u", "m"]
    with pytest.raises(UserError, match="no folder named after a data set"):
        find_pairs("all", tmp_path / "ubiris", "train")


# ------------------------------------------------------------------------------------------------ bad input


def test_unknown_or_absent_data_sets(tmp_path):
    with pytest.raises(UserError, match="none of casia-distance"):
        find_pairs("ubris", tmp_path, "train")
    with pytest.raises(UserError, match="does not exist; get it: UBIRIS.v2"):
        find_pairs("ubiris", tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no folder .*train and no list .*train.txt; get it"):
        find_pairs("miche", tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds none of the folders image, images, JPEGImages"):
        find_pairs("miche", tmp_path, "train")


def test_missing_partners_are_named(tmp_path):
    write_folders(tmp_path / "train", ["a", "b"], regions=False)
    (tmp_path / "train/SegmentationClass/b.png").rename(tmp_path / "train/SegmentationClass/c.png")
    with pytest.raises(
        UserError, match=r"1 images without a partner and 1 masks without an image: .*b.jpg .*c.png"
    ):
        find_pairs("ubiris", tmp_path, "train")


def test_two_images_of_one_name_are_named(tmp_path):
    write_folders(tmp_path, ["a", "b"], "images", "masks", False)
    (tmp_path / "images" / "a.bmp").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.bmp and .*a\.jpg share a name"):
        find_pairs("folder", tmp_path, "train")


def test_openeds_images_of_one_name_are_named_or_told_apart_by_folder(tmp_path):
    for folder in ("x", "y"):
        save(tmp_path / f"train/images/{folder}/1.png", picture()[..., 0])
        (tmp_path / f"train/labels/{folder}").mkdir(parents=True)
        np.save(tmp_path / f"train/labels/{folder}/1.npy", np.zeros((24, 32), np.uint8))
    pairs = find_pairs("openeds", tmp_path, "train")
    assert [(pair.name, pair.labels.parent.name) for pair in pairs] == [("x/1", "x"), ("y/1", "y")]
    save(tmp_path / "train/images/x/1.bmp", picture()[..., 0])
    with pytest.raises(UserError, match="share a name"):
        find_pairs("openeds", tmp_path, "train")


def test_missing_boundary_masks_are_named(tmp_path):
    write_folders(tmp_path / "train", ["a", "b"])
    (tmp_path / "train/iris_edge_mask/b.png").unlink()
    with pytest.raises(UserError, match=r"b.jpg \(outer\)"):
        find_pairs("ubiris", tmp_path, "train")


def broken_pair(tmp_path, mask=None, image=None):
    save(tmp_path / "images/eye.png", picture() if image is None else image)
    save(tmp_path / "masks/eye.png", mask_array() if mask is None else mask)
    (tmp_path / "train.txt").write_text("eye\n")
    return find_pairs("folder", tmp_path, "train")[0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_array(top=128), r"eye.png: not a binary mask"),
        (mask_array((24, 30)), r"eye.png: the mask has 30x24 pixels, its image 32x24"),
        (np.zeros((24, 32), np.uint8), r"eye.png: the mask is empty"),
    ],
)
def test_bad_masks(tmp_path, mask, message):
    with pytest.raises(UserError, match=message):
        read_pair(broken_pair(tmp_path, mask))


@pytest.mark.parametrize("kind", ["class colours", "black on white first", "16 bit"])
def test_masks_that_grey_would_change(tmp_path, kind):
    pair = broken_pair(tmp_path)
    truth = mask_array(top=1)
    if kind == "16 bit":
        stored = Image.fromarray(truth.astype(np.uint16))
    else:  # VOC colours its classes; an optimised file numbers its colours as it likes
        stored = Image.fromarray(truth if kind == "class colours" else 1 - truth).convert("P")
        stored.putpalette([0, 0, 0, 128, 0, 0] if kind == "class colours" else [255, 255, 255, 0, 0, 0])
    stored.save(pair.mask)
    assert (read_pair(pair)[1][0].numpy() == truth).all()


def test_a_pupil_that_a_lid_covers_has_an_empty_mask(tmp_path):
    write_folders(tmp_path / "train", ["a"])
    save(tmp_path / "train/pupil_edge_mask/a.png", mask_array(top=0))
    regions = read_pair(find_pairs("ubiris", tmp_path, "train")[0])[2]
    assert not regions[0].any() and regions[1].sum() == 12 * 14


def test_damaged_files_are_named(tmp_path):
    pair = broken_pair(tmp_path)
    pair.image.write_bytes(pair.image.read_bytes()[:60])
    with pytest.raises(UserError, match="eye.png"):
        read_pair(pair)


@pytest.mark.parametrize(
    "image",
    [
        picture()[..., 0],
        np.dstack([picture(), np.full((24, 32), 9, np.uint8)]),
        picture()[..., 0].astype(np.uint16) * 257,
    ],
    ids=["grey", "RGBA", "16 bit"],
)
def test_other_pixel_formats_are_converted(tmp_path, image):
    tensor = read_pair(broken_pair(tmp_path, image=image))[0]
    assert tensor.shape == (3, 24, 32)
    expected = torch.from_numpy(picture()[..., 0].astype(np.float32)) / 255
    torch.testing.assert_close(tensor[0], expected, atol=0.01, rtol=0)


def test_one_pixel_is_no_eye(tmp_path):
    save(tmp_path / "dot.png", picture((1, 1)))
    with pytest.raises(UserError, match=r"dot.png: 1x1 pixels are too few"):
        read_eye(tmp_path / "dot.png")


# --------------------------------------------------------------------------------------------- augmentation


def sample():
    image = torch.zeros(3, 120, 160)
    mask = torch.zeros(1, 120, 160, dtype=torch.uint8)
    image[:, 40:80, 60:100], mask[:, 40:80, 60:100] = 1, 1
    return {"image": image, "mask": mask, "regions": mask.repeat(2, 1, 1)}


def test_augmentation_is_a_function_of_seed_and_draw():
    augment = Augmentation(96, seed=3)
    first, other, again = augment(sample(), 5), augment(sample(), 6), augment(sample(), 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert first["image"].shape == (3, 96, 96) and first["mask"].shape == (1, 96, 96)


def test_augmentation_keeps_masks_binary_and_together():
    augment = Augmentation(200, seed=0)
    seen = [augment(sample(), draw) for draw in range(12)]
    for s in seen:
        assert set(s["mask"].unique().tolist()) <= {0, 1, IGNORE}
        assert torch.equal(s["mask"], s["regions"][:1]) and torch.equal(s["mask"], s["regions"][1:])
        assert s["image"].min() >= 0 and s["image"].max() <= 1
    assert any((s["mask"] == IGNORE).any() for s in seen)  # from outside the picture


def test_augmented_mask_follows_its_image():
    augment = Augmentation(160, seed=1)
    for number in range(8):
        s = augment(sample(), number)
        bright = s["image"].mean(0)
        if (s["mask"] == 1).sum() > 50:
            assert bright[s["mask"][0] == 1].mean() > bright[s["mask"][0] == 0].mean() + 0.3


def test_files_are_read_and_augmented(tmp_path):
    write_folders(tmp_path / "train", ["a"])
    data = IrisFiles(find_pairs("ubiris", tmp_path, "train"), Augmentation(32, 0))
    assert data[0, 4]["image"].shape == (3, 32, 32)


def test_large_files_are_shrunk_with_their_masks(tmp_path):
    write_folders(tmp_path / "train", ["a"])
    pairs = find_pairs("ubiris", tmp_path, "train")
    whole, small = IrisFiles(pairs)[0], IrisFiles(pairs, short_side=12)[0]
    assert small["image"].shape == (3, 12, 16) and small["regions"].shape == (2, 12, 16)
    assert torch.equal(small["mask"].repeat_interleave(2, 1).repeat_interleave(2, 2), whole["mask"])
    assert (
        small["mask"].dtype == torch.uint8
        and (IrisFiles(pairs, short_side=24)[0]["image"] == whole["image"]).all()
    )


def test_drawn_eyes_are_a_data_set_on_disk(tmp_path):
    draw(DrawConfig(tmp_path / "train", count=2, pictures=2, height=48, width=64))
    pairs = find_pairs("casia-distance", tmp_path, "train")
    assert len(pairs) == 4 and (tmp_path / "train/sheet.png").exists()
    eye = draw_eye(identity(1), 1, 48, 64, LOOKS[3])
    image, mask, regions = read_pair(next(pair for pair in pairs if pair.name == "000001_1_phone"))
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), eye.image, atol=0.003)
    assert (mask[0].numpy() == eye.mask).all() and (regions[1].numpy() == eye.outer).all()
    with pytest.raises(UserError, match="--looks: give at least one of nir"):
        draw(DrawConfig(tmp_path, looks=()))
