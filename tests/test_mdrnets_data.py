"""MDRNets: masks, drawn faces and every public layout, on miniatures written here; and blending."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mdrnets import blend, masks
from mdrnets.baselines import CLASSICAL, UNet
from mdrnets.blend import membrane, paste, shrink_known
from mdrnets.data import DrawnFaces, TestSet, TrainSet, masks_by_bin, open_pictures, training_masks
from mdrnets.datasets import celeba_hq, ffhq, picture_folder, picture_list, read_annotation
from mdrnets.masks import BINS, BoxMasks, MaskFiles, StrokeMasks, measure_masks, mixed, ratio, read_mask
from mdrnets.parser import GROUPS
from mdrnets.simple import PARTS, draw_simple_faces
from mdrnets.train import Config
from shared.faces import BISENET_CLASSES
from shared.runtime import UserError

SMALL = Config(image_size=16, train_images=6, test_images=4, parser="tiny")


def save(path, array, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path)


def picture(seed: int, size: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3))


# --- masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [StrokeMasks, BoxMasks])
@pytest.mark.parametrize("limits", [(0.01, 0.1), *BINS])
def test_drawn_masks_are_in_their_bin_and_depend_on_seed_and_key(source, limits):
    low, high = limits
    masks = source(32, low, high, 5)
    drawn = [masks.mask(key) for key in range(20)]
    for m in drawn:
        assert m.shape == (1, 32, 32) and set(m.unique().tolist()) <= {0.0, 1.0}
        assert low < ratio(m) <= high
    assert torch.equal(drawn[3], source(32, low, high, 5).mask(3))
    assert not torch.equal(drawn[3], drawn[4])
    assert not torch.equal(drawn[3], source(32, low, high, 6).mask(3))


def test_narrow_bins_end():
    assert 0.5 < ratio(StrokeMasks(32, 0.5, 0.501, 0).mask(0)) <= 0.501


def test_a_pool_repeats():
    masks = StrokeMasks(16, 0.1, 0.6, 0, pool=3)
    assert torch.equal(masks.mask(1), masks.mask(4))


def test_mask_files_polarity_bins_and_warning(tmp_path, caplog):
    for i, white in enumerate((2, 5, 9)):
        values = np.zeros((10, 10))
        values[:white] = 255
        save(tmp_path / f"{i}.png", values)
    measured = measure_masks(tmp_path, 10, "white-hole")
    assert [share for _, share in measured] == pytest.approx([0.2, 0.5, 0.9])
    assert [p.name for p in MaskFiles(measured, 10, 0.4, 0.6, "white-hole").files] == ["1.png"]
    assert [p.name for p in MaskFiles(measured, 10, 0.1, 0.2, "white-hole").files] == ["0.png"]
    black = measure_masks(tmp_path, 10, "black-hole")
    assert [share for _, share in black] == pytest.approx([0.8, 0.5, 0.1])
    with pytest.raises(UserError, match="mask-polarity"):
        MaskFiles(measured, 10, 0.3, 0.35, "white-hole")
    for i in range(3):
        save(tmp_path / f"{i}.png", np.full((10, 10), 255))
    with caplog.at_level(logging.WARNING):
        measure_masks(tmp_path, 10, "white-hole")
    assert "look inverted" in caplog.text


def test_mask_files_are_measured_once(tmp_path, monkeypatch):
    for rows in (3, 4, 6, 7, 9):
        save(tmp_path / f"{rows}.png", np.repeat(255 * (np.arange(16) < rows), 16).reshape(16, 16))
    read = []
    monkeypatch.setattr(masks, "read_mask", lambda *file: read.append(file) or read_mask(*file))
    config = replace(SMALL, masks="files", mask_root=tmp_path, test_mask_root=tmp_path)
    for seed in range(2):
        assert len(training_masks(config, seed).files) == 5
        assert [len(source.files) for source in masks_by_bin(config).values()] == [1] * 5
    assert len(read) == 5


def test_masks_are_binned_at_the_size_of_use(tmp_path):
    fine = np.zeros((64, 64))
    fine[::2, ::2] = 255  # a quarter, which a nearest-neighbour reduction by two may see as none or all
    save(tmp_path / "m.png", fine)
    (_, at_64), (_, at_32) = (
        measure_masks(tmp_path, 64, "white-hole")[0],
        measure_masks(tmp_path, 32, "white-hole")[0],
    )
    assert at_64 == 0.25 and at_32 in (0.0, 1.0)
    assert ratio(read_mask(tmp_path / "m.png", (32, 32))) == at_32


# --- drawn sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world,parts", [("simple", PARTS), ("faces", tuple(GROUPS))])
def test_drawn_faces_are_reproducible_and_labelled(world, parts):
    a, b = DrawnFaces(world, 8, 3, 32), DrawnFaces(world, 8, 3, 32)
    assert torch.equal(a.images, b.images) and a.parts == parts
    assert a.images.shape == (8, 3, 32, 32) and a.images.min() >= 0 and a.images.max() <= 1
    assert set(a.labels.unique().tolist()) <= set(range(len(parts)))
    assert len(a.labels.unique()) >= 5
    assert not torch.equal(a.images, DrawnFaces(world, 8, 4, 32).images)


def test_both_eyes_of_a_simple_face_have_one_colour():
    images, parts = draw_simple_faces(50, 0, 64)
    means = []
    for image, part in zip(images, parts, strict=True):
        columns = (part == 3).any(0).nonzero()[:, 0]
        middle = int(columns.min() + columns.max() + 1) // 2
        eyes = [(part == 3) & ((torch.arange(64) < middle) == left) for left in (True, False)]
        means.append(torch.stack([image[:, side].mean(1) for side in eyes]))
    left, right = torch.stack(means).unbind(1)  # (50, 3) each
    assert (left - right).abs().max() < 0.06  # the rims fall differently on the pixels
    assert (left - right.roll(1, 0)).abs().amax(1).median() > 0.1  # faces differ


def test_training_samples_are_a_function_of_the_draw():
    pictures = DrawnFaces("simple", 6, 0, 16)
    samples = TrainSet(pictures, StrokeMasks(16, 0.1, 0.6, 0), 0, flip=True)
    a, b = samples[2, 17], samples[2, 17]
    assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert a["image"].min() >= -1 and a["image"].shape == (3, 16, 16)
    mirrored = [torch.equal(samples[2, d]["image"], pictures.load(2)[0].flip(-1) * 2 - 1) for d in range(20)]
    assert 0 < sum(mirrored) < 20
    assert [(samples[2, d]["index"], samples[2, d]["mirrored"]) for d in range(20)] == [
        (2, m) for m in mirrored
    ]
    turns = set()
    for d in range(20):  # masks turn without it
        drawn = samples.masks.mask(mixed(0, d))
        every = [torch.rot90(m, k, (1, 2)) for m in (drawn, drawn.flip(-1)) for k in range(4)]
        turns.add((mirrored[d], [torch.equal(samples[2, d]["mask"], m) for m in every].index(True)))
    assert len({turn for _, turn in turns}) > 4 and len(turns) > 8
    for d in range(20):  # labels turn with the picture
        expected = pictures.load(2)[1].flip(-1) if mirrored[d] else pictures.load(2)[1]
        assert torch.equal(samples[2, d]["parts"], expected)


def test_test_pairs_are_fixed():
    pictures = DrawnFaces("simple", 4, 1, 16)
    sets = [TestSet(pictures, masks, 9) for masks in masks_by_bin(SMALL).values()]
    assert len(sets) == 5
    again = [TestSet(pictures, masks, 9) for masks in masks_by_bin(SMALL).values()]
    for a, b in zip(sets, again, strict=True):
        assert torch.equal(a[2]["mask"], b[2]["mask"])
    assert not torch.equal(sets[0][2]["mask"], sets[0][3]["mask"])
    for pairs, tests in zip((s.pairing() for s in sets), sets, strict=True):
        assert [name for name, _ in pairs] == [f"seed 1, face {i}" for i in range(4)]
        assert len({mask for _, mask in pairs}) == 4
        assert pairs[2][1] == tests.masks.label(tests.mask_key(2))


def test_a_mask_says_which_it_is(tmp_path):
    for i in range(3):
        save(tmp_path / "irregular" / f"{i}.png", np.full((10, 10), 255) * (np.arange(10) < 2 + i))
    files = MaskFiles(measure_masks(tmp_path, 10, "white-hole"), 10, 0.1, 0.6, "white-hole")
    for key in range(4):
        shown = read_mask(tmp_path / files.label(key), None)
        assert torch.equal(files.mask(key), shown)
    pool = StrokeMasks(16, 0.1, 0.6, 0, pool=3)
    assert pool.label(1) == pool.label(4) != pool.label(2)
    assert BoxMasks(16, 0.1, 0.6, 0).label(1) != BoxMasks(16, 0.1, 0.6, 0).label(2)


# --- public layouts ---------------------------------------------------------------------------------


@pytest.fixture
def celeba(tmp_path):
    for i in range(30):
        save(tmp_path / "CelebA-HQ-img" / f"{i}.jpg", picture(i))
        skin, hat = np.zeros((8, 8)), np.zeros((8, 8))
        skin[2:6], hat[0] = 225, 225
        save(tmp_path / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_skin.png", skin)
        save(tmp_path / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_hat.png", hat)
    rows = [f"{i} {9 * i} {[100, 170000, 190000][i % 3] + i:06d}.jpg" for i in range(30)]
    (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx orig_file\n" + "\n".join(rows))
    return tmp_path


def test_celeba_hq_splits_and_labels(celeba):
    train, test = celeba_hq(celeba, 16, "train"), celeba_hq(celeba, 16, "test")
    assert len(train) == 28 and [test.label(i) for i in range(2)] == ["28.jpg", "29.jpg"]
    image, parts = test.load(0)
    assert image.shape == (3, 16, 16) and parts.shape == (16, 16)
    names = list(GROUPS)
    assert (parts[5:11] == names.index("skin")).all() and (parts[0] == names.index("hair")).all()
    assert parts[14:].unique().tolist() == [0]
    labels = read_annotation(celeba / "CelebAMask-HQ-mask-anno", 3)
    assert BISENET_CLASSES[labels[0, 0]] == "hat" and BISENET_CLASSES[labels[3, 3]] == "skin"
    official_train, official_test = (celeba_hq(celeba, 16, part, "celeba") for part in ("train", "test"))
    assert len(official_train) == len(official_test) == 10
    assert official_test.label(0) == "2.jpg"


def test_celeba_hq_without_labels_and_with_missing_parts(celeba):
    with pytest.raises(UserError, match="part files 01999"):
        read_annotation(celeba / "CelebAMask-HQ-mask-anno", 1999)
    (celeba / "CelebAMask-HQ-mask-anno").rename(celeba / "elsewhere")
    assert (celeba_hq(celeba, 16, "test").load(0)[1] == -1).all()
    (celeba / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    with pytest.raises(UserError, match="CelebA-HQ-to-CelebA-mapping.txt"):
        celeba_hq(celeba, 16, "test", "celeba")
    with pytest.raises(UserError, match="CelebA-HQ-img"):
        celeba_hq(celeba / "nowhere", 16, "test")


@pytest.mark.parametrize("folder", ["images1024x1024", "thumbnails128x128", "."])
def test_ffhq_layouts(tmp_path, folder):
    for i in range(14):
        save(tmp_path / folder / f"{i // 5 * 1000:05d}" / f"{i:05d}.png", picture(i))
    train, test = ffhq(tmp_path, 16, "train"), ffhq(tmp_path, 16, "test")
    assert len(train) == 12 and [test.label(i) for i in range(2)] == ["00012.png", "00013.png"]
    assert (test.load(0)[1] == -1).all()
    with pytest.raises(UserError, match="ffhq-dataset"):
        ffhq(tmp_path / "missing", 16, "train")


def test_celeba_hq_by_lists_keeps_its_labels(celeba):
    for part, names in (("train", "3 5"), ("test", "4")):
        lines = [f"CelebA-HQ-img/{name}.jpg" for name in names.split()]
        (celeba / f"{part}.txt").write_text("\n".join(lines))
    lists = {"train_list": celeba / "train.txt", "test_list": celeba / "test.txt"}
    config = replace(SMALL, data_root=celeba, **lists)
    train, test = (open_pictures(config, "celeba-hq", part) for part in ("train", "test"))
    assert [train.label(i) for i in range(2)] == ["3.jpg", "5.jpg"] and test.label(0) == "4.jpg"
    assert train.labelled and torch.equal(train.load(1)[1], celeba_hq(celeba, 16, "train").load(5)[1])
    for part in ("train", "test"):
        with pytest.raises(UserError, match="--train-list and --test-list go together"):
            open_pictures(replace(config, **{f"{part}_list": None}), "celeba-hq", "train")
    save(celeba / "me.png", picture(0))
    (celeba / "train.txt").write_text("me.png")
    with pytest.raises(UserError, match="names .*me.png, whose labels"):
        open_pictures(config, "celeba-hq", "train")


@pytest.mark.parametrize("layout,folder", [(celeba_hq, "CelebA-HQ-img"), (ffhq, "images1024x1024")])
def test_pictures_without_a_number_are_said_to_be_left_out(tmp_path, caplog, layout, folder):
    save(tmp_path / folder / "me.png", picture(0))
    with pytest.raises(UserError, match="no numbered pictures"):
        layout(tmp_path, 16, "train")
    for i in range(3):
        save(tmp_path / folder / f"{i}.png", picture(i))
    with caplog.at_level(logging.WARNING):
        assert len(layout(tmp_path, 16, "train")) == 2
    assert "1 of 4 pictures left out" in caplog.text and "me.png" in caplog.text


def test_plain_folders_and_lists(tmp_path):
    for i in range(10):
        save(tmp_path / "a" / "deep" / f"{i}.png", picture(i))
    assert len(picture_folder(tmp_path / "a", 16, "train")) == 9
    for part in ("train", "test"):
        save(tmp_path / "b" / part / "x.png", picture(1))
    assert len(picture_folder(tmp_path / "b", 16, "test")) == 1
    (tmp_path / "list.txt").write_text("deep/3.png\ndeep/4.png\n")
    assert picture_list(tmp_path / "list.txt", tmp_path / "a", 16).label(1) == "4.png"
    (tmp_path / "list.txt").write_text("deep/33.png\n")
    with pytest.raises(UserError, match="33.png"):
        picture_list(tmp_path / "list.txt", tmp_path / "a", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        picture_folder(tmp_path / "empty", 16, "train")


def test_a_damaged_picture_names_its_file(tmp_path):
    save(tmp_path / "0.png", picture(0))
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    pictures = picture_folder(tmp_path, 16, "test")
    with pytest.raises(UserError, match="1.png"):
        pictures.load(0)


def test_configuration_asks_for_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="--data-root"):
        open_pictures(SMALL, "celeba-hq", "train")
    with pytest.raises(UserError, match="--mask-root"):
        training_masks(Config(masks="files"), 0)


# --- baselines and blending -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSICAL)
def test_fillers_keep_what_is_known(name):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 4:9, 4:9] = 1
    out = CLASSICAL[name](x, mask)
    kept = (mask < 0.5).expand_as(x)
    assert torch.equal(out[kept], x[kept]) and not torch.equal(out, x)
    flat = torch.full((1, 3, 16, 16), 0.2)
    assert (CLASSICAL[name](flat, mask[:1]) - flat).abs().max() < 0.03  # 8-bit steps


def test_unet_keeps_what_is_known():
    x, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 4:9] = 1
    out = UNet()(x, mask)["output"]
    assert torch.equal(out * (1 - mask), x * (1 - mask))


def test_membrane_solves_laplace():
    side = 9
    rng = torch.Generator().manual_seed(0)
    known = torch.rand(1, side, side, generator=rng)
    hole = torch.zeros(1, side, side)
    hole[:, 2:7, 3:8] = 1
    cells = [(y, x) for y in range(side) for x in range(side) if hole[0, y, x]]
    number = {cell: i for i, cell in enumerate(cells)}
    matrix, right = np.zeros((len(cells),) * 2), np.zeros(len(cells))
    for (y, x), i in number.items():
        for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            matrix[i, i] += 1
            if cell in number:
                matrix[i, number[cell]] -= 1
            else:
                right[i] += known[0][cell].item()
    exact = np.linalg.solve(matrix, right)
    got = membrane(known, hole, sweeps=400)
    assert np.abs([got[0][cell].item() - exact[i] for cell, i in number.items()]).max() < 1e-3
    assert torch.equal(got[hole < 0.5], known[hole < 0.5])


def test_seamless_paste_removes_a_constant_offset_and_keeps_the_rest():
    image = torch.rand(3, 1, 1).expand(3, 40, 40).clone()
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:30, 12:33] = 1
    done = paste(image, mask, (image + 0.2).clamp(0, 1), seamless=True)
    assert (done - image).abs().max() < 0.01
    rough = paste(image, mask, (image + 0.2).clamp(0, 1), seamless=False)
    assert (rough - image).abs().max() > 0.1
    assert torch.equal(done[:, mask[0] == 0], image[:, mask[0] == 0])
    assert torch.equal(paste(image, torch.ones(1, 40, 40), image * 0.5), image * 0.5)


def test_a_small_hole_in_a_large_photo_costs_what_the_hole_does(monkeypatch):
    y, x = torch.meshgrid(torch.linspace(0, 3, 200), torch.linspace(0, 4, 300), indexing="ij")
    image = (0.5 + 0.2 * torch.sin(x + y)).expand(3, -1, -1).clone()
    filled, mask = image + 0.1 * torch.cos(x - 2 * y), torch.zeros(1, 200, 300)
    mask[:, 50:70, 270:300] = 1
    whole = torch.where(mask > 0.5, filled + membrane((image - filled) * (1 - mask), mask), image)
    shapes = []

    def watched(difference, hole, *options):
        shapes.append(tuple(difference.shape))
        return membrane(difference, hole, *options)

    monkeypatch.setattr(blend, "membrane", watched)
    done = paste(image, mask, filled)
    assert max(shapes) == (3, 28, 34)
    assert (done - whole).abs().max() < 2e-3 < (filled - image)[:, mask[0] > 0].abs().max()
    assert torch.equal(done[:, mask[0] == 0], image[:, mask[0] == 0])
    assert torch.equal(paste(image, 0 * mask, filled), image)


def test_shrinking_lets_nothing_of_the_hole_through():
    image = torch.full((3, 32, 32), 0.25)
    mask = torch.zeros(1, 32, 32)
    mask[:, 5:14, 7:20] = 1
    image[:, mask[0] > 0] = 1.0
    small, small_mask = shrink_known(image, mask, (8, 8))
    assert (small[:, small_mask[0] == 0] - 0.25).abs().max() < 1e-5
    assert small_mask[0, 1, 1] == 1  # one corrupted pixel is enough
