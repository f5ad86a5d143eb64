"""MOST-Net: pairs in every public layout, alignment, batches, the procedural worlds, and bad input."""

import json
import math
from pathlib import Path

import pytest
import torch

import most_net.pairs
from most_net import eyes
from most_net.align import EYES, align_to_eyes, read_eyes
from most_net.data import batches, crop_to, face_pairs, pad_to, signed, simple_pairs
from most_net.pairs import Alignment, load_dataset, normalise, split_standard
from most_net.pairs import Pair as Files
from shared.faces import draw, make_params, neutral_attributes, sample_identities
from shared.io import write_image
from shared.runtime import UserError

GREY = torch.full((1, 250, 200), 0.5)


def put(path: Path, value: float = 0.5, size=(250, 200), channels: int = 3) -> None:
    write_image(path, torch.full((channels, *size), value))


def put_pairs(
    folder: Path, names, photos: str = "photos", sketches: str = "sketches", first: int = 0
) -> None:
    for i, name in enumerate(names, first):
        put(folder / photos / f"{name}.png", (i + 1) / 40)
        put(folder / sketches / f"{name}.png", (i + 1) / 40, channels=1)


def values(pairs) -> list[int]:
    """The grey value of each photo, after a check that its sketch has the same."""
    photo, sketch = (x.float().flatten(1).mean(1) for x in (pairs.photos, pairs.sketches))
    assert torch.allclose(photo, sketch, atol=1.01)
    return [round(v / 255 * 40) - 1 for v in photo.tolist()]


# --- layouts ------------------------------------------------------------------------------------------


def test_lists(tmp_path):
    put_pairs(tmp_path / "AR", ["1", "2"])
    put_pairs(tmp_path / "CUHK", ["00"], first=2)
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text(
        "AR/photos/1.png||AR/sketches/1.png||AR/mat/1.mat||27\n\nCUHK/photos/00.png||CUHK/sketches/00.png\n"
    )
    test.write_text("AR/photos/2.png||AR/sketches/2.png\n")
    got, held = load_dataset("pairs", tmp_path, train_list=train, test_list=test)
    assert got.names == ("AR-1", "CUHK-00")
    assert values(got) == [0, 2]
    assert values(held) == [1]
    first, second = (f"AR/photos/{i}.png||AR/sketches/{i}.png\n" for i in (1, 2))
    for lines, words in (
        ("AR/photos/1.png AR/sketches/1.png\n", r"train.txt, line 1: expected photo\|\|sketch"),
        (first + "||AR/sketches/1.png\n", r"train.txt, line 2: expected photo\|\|sketch"),
        ("AR/photos/1.png||\n", r"train.txt, line 1: expected photo\|\|sketch"),
        ("\n", "train.txt: lists no pair"),
        (first + first, "1.png: twice in the lists"),
        (first + second, "2.png: twice in the lists"),
    ):
        train.write_text(lines)
        with pytest.raises(UserError, match=words):
            load_dataset("pairs", tmp_path, train_list=train, test_list=test)
    for lists, layout in (({"test_list": test}, "auto"), ({}, "list")):
        with pytest.raises(UserError, match="name the list of the training pairs with --train-list"):
            load_dataset("pairs", tmp_path, layout, **lists)
    with pytest.raises(UserError, match="--train-list is for layout list, not original"):
        load_dataset("pairs", tmp_path, "original", train)


@pytest.mark.parametrize("join", ["{}_{}", "{}/{}"])
def test_folders(tmp_path, join):
    for part, first in (("train", 0), ("test", 5)):
        names = [join.format(part, kind) for kind in ("photos", "sketches")]
        put_pairs(tmp_path, ["a", "b"], *names, first=first)
    train, test = load_dataset("pairs", tmp_path)
    assert values(train) == [0, 1]
    assert values(test) == [5, 6]


def test_original_names_of_all_subsets(tmp_path):
    people = {
        "CUHK_student": [
            ("f-005-01", "f2-005-01-sz1"),
            ("f1-005-01", "f1-005-01-sz1"),
            ("m-008-01", "M2-008-01-sz1"),
        ],
        "AR": [("m-002-1", "Mp-002-1-sz1"), ("w-001-1", "Wp-001-1-sz1")],
        "XM2VTS": [("000_1_1", "000_1_1_sz1")],
        "CUFSF": [("00001fb010_930831", "00001")],
    }
    number = 0
    for subset, members in people.items():
        for photo, sketch in members:
            put(tmp_path / subset / "photo" / f"{photo}.jpg", (number + 1) / 40)
            put(tmp_path / subset / "sketch" / f"{sketch}.jpg", (number + 1) / 40, channels=1)
            number += 1
    train, test = load_dataset("pairs", tmp_path)
    assert test is None
    assert sorted(values(train)) == list(range(7))
    assert normalise("f1-005-01-sz1") != normalise("f2-005-01-sz1") == normalise("f-005-01")
    (tmp_path / "AR/sketch").rename(tmp_path / "AR/sktech")
    with pytest.raises(UserError, match=r"AR/photo: no folder sketch\(es\)/ beside it"):
        load_dataset("pairs", tmp_path)


def test_standard_split_counts():
    subsets = {"CUHK_student": 188, "AR": 123, "XM2VTS": 295}
    files = [Files(f"{s}-{i:03d}", Path("p"), Path("s"), s) for s, n in subsets.items() for i in range(n)]
    train, test = split_standard(files, "cufs")
    assert (len(train), len(test)) == (268, 338)
    counts = [(sum(p.subset == s for p in train), sum(p.subset == s for p in test)) for s in subsets]
    assert counts == [(88, 100), (80, 43), (100, 195)]
    warped = [Files(f"{i:03d}", Path("p"), Path("s"), "XM2VTS_warped") for i in range(295)]
    assert [len(part) for part in split_standard(warped, "cufs")] == [100, 195]  # not AR's 80
    faces = [Files(f"{i:05d}", Path("p"), Path("s")) for i in range(1194)]
    assert [len(part) for part in split_standard(faces, "cufsf")] == [250, 944]


def test_an_incomplete_standard_set_is_told_once(tmp_path, capsys, monkeypatch, recwarn):
    put_pairs(tmp_path / "AR", ["1", "2"])
    put_pairs(tmp_path / "CUHK_student", ["00"])
    with pytest.warns(UserWarning, match="3 training and 0 test pairs; the standard split has 268 and 338"):
        load_dataset("cufs", tmp_path)
    assert "cufs: 3 (AR 2, CUHK_student 1) training pairs, 0 test pairs" in capsys.readouterr().out
    monkeypatch.setattr("most_net.pairs.rank", lambda: 1)
    load_dataset("cufs", tmp_path)
    assert not capsys.readouterr().out and not recwarn


@pytest.mark.parametrize("moved, warned", [(0, False), (1, True)])
def test_the_sums_of_the_standard_split_are_not_enough(recwarn, moved, warned):
    """268 and 338 pairs in all, of which one that should be AR's is CUHK's."""
    counts = {"CUHK": (88 + moved, 100), "AR": (80 - moved, 43), "XM2VTS": (100, 195)}
    train, test = (
        [Files(f"{i}", Path("p"), Path("s"), s) for s, n in counts.items() for i in range(n[half])]
        for half in (0, 1)
    )
    most_net.pairs._compare_with_standard("cufs", train, test)
    assert [str(w.message).count("(cuhk 88 and 100, ar 80 and 43, xm2vts 100 and 195)") for w in recwarn] == (
        [1] if warned else []
    )
    together = [[Files(pair.name, pair.photo, pair.sketch) for pair in half] for half in (train, test)]
    recwarn.clear()
    most_net.pairs._compare_with_standard("cufs", *together)  # nothing tells the subsets apart
    assert not recwarn


def test_side_by_side(tmp_path):
    write_image(tmp_path / "1.png", torch.cat([GREY, GREY], 2).expand(3, -1, -1))
    train, _ = load_dataset("pairs", tmp_path)
    assert train.photos.shape == (1, 3, 250, 200)
    write_image(tmp_path / "2.png", torch.zeros(3, 250, 401))
    with pytest.raises(UserError, match="2.png: 401 columns do not halve"):
        load_dataset("pairs", tmp_path)


def test_fs2k(tmp_path):
    for style in (1, 3):
        put(tmp_path / "photo" / f"photo{style}" / "image0001.jpg", style / 40, size=(250, 250))
        put(tmp_path / "sketch" / f"sketch{style}" / "sketch0001.png", style / 40, (250, 250), channels=1)
    names = [{"image_name": "photo1/image0001"}, {"image_name": "photo3/image0001"}]
    (tmp_path / "anno_train.json").write_text(json.dumps(names[:1]))
    (tmp_path / "anno_test.json").write_text(json.dumps(names[1:]))
    train, test = load_dataset("fs2k", tmp_path, alignment=Alignment(resize="stretch"))
    assert (values(train), train.styles.tolist()) == ([0], [0])
    assert (values(test), test.styles.tolist()) == ([2], [2])
    for entries, words in (
        ([{"image_name": "photo2/image0009"}], "photo2: no such folder"),
        ([{"image_name": "photo0/image0001"}], "'photo0/image0001', expected .* k from 1 to 3"),
        ([{"image_name": 7}], "anno_test.json: not readable as FS2K's annotations"),
        ([], "anno_test.json: names no image"),
    ):
        (tmp_path / "anno_test.json").write_text(json.dumps(entries))
        with pytest.raises(UserError, match=words):
            load_dataset("fs2k", tmp_path, alignment=Alignment(resize="stretch"))


# --- bad input ----------------------------------------------------------------------------------------


def test_missing_folder_and_unknown_layout(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder. CUFS: .*README"):
        load_dataset("cufs", tmp_path / "nowhere")
    (tmp_path / "stuff").mkdir()
    with pytest.raises(UserError, match="no known layout. Expected one of: train_photos"):
        load_dataset("pairs", tmp_path)


def test_unpaired_names_are_listed(tmp_path):
    put_pairs(tmp_path, ["a", "b"], "train/photos", "train/sketches")
    put(tmp_path / "train/photos/c.png")
    put(tmp_path / "train/sketches/d.png", channels=1)
    with pytest.raises(UserError, match="without a partner of the same name: photos/c.png, sketches/d.png"):
        load_dataset("pairs", tmp_path)


def test_sizes_that_do_not_fit(tmp_path):
    photo, sketch = tmp_path / "photos/a.png", tmp_path / "sketches/a.png"
    put(photo, size=(300, 240))
    put(sketch, channels=1)
    with pytest.raises(UserError, match="a.png: photo 240x300 but sketch 200x250 pixels"):
        load_dataset("pairs", tmp_path)
    put(sketch, size=(300, 240), channels=1)
    with pytest.raises(UserError, match=r"a.png: 240x300 pixels, expected 200x250"):
        load_dataset("pairs", tmp_path)
    stretch = Alignment(resize="stretch")
    assert load_dataset("pairs", tmp_path, alignment=stretch)[0].photos.shape[-2:] == (250, 200)
    put(photo, size=(240, 300))
    put(sketch, size=(240, 300), channels=1)
    with pytest.raises(UserError, match="a.png: a landscape picture of 300x240 would be squeezed"):
        load_dataset("pairs", tmp_path, alignment=stretch)


def test_colour_sketches_and_damaged_files(tmp_path):
    put(tmp_path / "photos/a.png")
    write_image(tmp_path / "sketches/a.png", torch.tensor([0.9, 0.5, 0.2])[:, None, None].expand(3, 250, 200))
    with pytest.raises(UserError, match="a.png: the sketch is in colour.*swapped"):
        load_dataset("pairs", tmp_path)
    grey = load_dataset("pairs", tmp_path, alignment=Alignment(colour="grey"))[0].sketches
    assert grey.float().mean().item() == pytest.approx(255 * (0.299 * 0.9 + 0.587 * 0.5 + 0.114 * 0.2), abs=1)
    (tmp_path / "sketches/a.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match="a.png: not a readable image"):
        load_dataset("pairs", tmp_path)


# --- alignment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance, angle", [(30, 0.3), (50, 0.0), (240, -0.2)])
def test_alignment_brings_the_eyes_to_their_places(distance, angle):
    size = 8 * distance
    middle = size / 2
    dx, dy = distance / 2 * math.cos(angle), distance / 2 * math.sin(angle)
    points = ((middle - dx, middle - dy), (middle + dx, middle + dy))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dots = [torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (distance / 10) ** 2)) for px, py in points]
    got = align_to_eyes(torch.stack([dots[0], dots[1], dots[0]]), points)
    assert got.shape == (3, 250, 200)
    for channel, (px, py) in enumerate(EYES):
        heat = got[channel] / got[channel].sum()
        assert (heat.sum(0) * torch.arange(200)).sum().item() == pytest.approx(px, abs=0.7)
        assert (heat.sum(1) * torch.arange(250)).sum().item() == pytest.approx(py, abs=0.7)


def test_landmark_files(tmp_path):
    lines = [f"{i} {100 + i}" for i in range(35)]
    (tmp_path / "a.dat").write_text("\n".join(lines))
    assert read_eyes(tmp_path / "a.dat") == ((16, 116), (18, 118))
    (tmp_path / "b.3pts").write_text("120.5 80\n70 81\n95 130\n")
    assert read_eyes(tmp_path / "b.3pts") == ((70, 81), (120.5, 80))
    for text, words in (("1 2 3", "3 numbers"), ("10 10\n11 10\n", "no two eyes")):
        (tmp_path / "c.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            read_eyes(tmp_path / "c.txt")
    with pytest.raises(UserError, match="not readable as landmarks"):
        read_eyes(tmp_path)


def test_alignment_of_a_data_set_by_landmarks(tmp_path):
    for kind, channels in (("photos", 3), ("sketches", 1)):
        put(tmp_path / kind / "a.png", size=(400, 300), channels=channels)
    alignment = Alignment(resize="eyes")
    with pytest.raises(UserError, match="photos: no landmark file a.dat"):
        load_dataset("pairs", tmp_path, alignment=alignment)
    for kind in ("photos", "sketches"):
        (tmp_path / kind / "a.txt").write_text("100 200\n200 200\n")
    assert load_dataset("pairs", tmp_path, alignment=alignment)[0].photos.shape == (1, 3, 250, 200)


def test_eye_finder_finds_eyes_and_no_face():
    params = make_params(sample_identities(6, seed=77), neutral_attributes(6))
    faces = draw(params, (250, 200))
    net = eyes.load_finder()
    for image, marks in zip(faces.image, faces.landmarks, strict=True):
        found = eyes.find_eyes(image, net)
        truth = marks[36:42].mean(0).tolist(), marks[42:48].mean(0).tolist()
        distance = math.dist(*truth)
        assert all(math.dist(a, b) < 0.2 * distance for a, b in zip(found, truth, strict=True))
    generator = torch.Generator().manual_seed(0)
    assert eyes.find_eyes(torch.rand(3, 250, 200, generator=generator), net) is None
    assert eyes.find_eyes(torch.full((3, 250, 200), 0.5), net) is None


# --- batches ------------------------------------------------------------------------------------------


def test_padding_is_the_papers_and_reversible():
    images = torch.randint(0, 255, (1, 1, 250, 200), dtype=torch.uint8)
    padded = pad_to(images, 256, 256)
    assert torch.equal(padded[..., 3:253, 28:228], images)
    assert torch.equal(padded[..., 0, 28:228], images[..., 0, :])
    assert torch.equal(crop_to(padded, 250, 200), images)


def test_batches_cut_photo_and_sketch_alike_and_resume():
    pairs = face_pairs(4, 0, 16, ("outline", "pencil"))
    position = torch.arange(16 * 16, dtype=torch.uint8).view(1, 1, 16, 16).repeat(8, 1, 1, 1)
    pairs = type(pairs)(position.repeat(1, 3, 1, 1), position, pairs.names, pairs.styles)
    whole = list(batches(pairs, 2, 8, seed=3, load=20, size=12, flip=True))
    assert [batch.style for batch in whole] == [0, 1] * 4
    for batch in whole:
        assert batch.photo.shape == (2, 3, 12, 12)
        assert torch.equal(batch.photo[:, :1], batch.sketch)
    resumed = list(batches(pairs, 2, 8, seed=3, load=20, size=12, flip=True, start_step=5))
    assert all(torch.equal(a.photo, b.photo) for a, b in zip(whole[5:], resumed, strict=True))
    mirrored = [bool((b.sketch[i].diff(dim=-1)[..., 6] < 0).any()) for b in whole for i in range(2)]
    assert any(mirrored) and not all(mirrored)


def test_procedural_worlds():
    for pairs in (simple_pairs(3, 5, 16), face_pairs(3, 5, 16)):
        assert pairs.photos.shape == (3, 3, 16, 16)
        assert pairs.sketches.shape == (3, 1, 16, 16)
        assert pairs.parts.shape == (3, 16, 16)
        assert signed(pairs.sketches).mean() > 0  # mostly paper
    assert torch.equal(simple_pairs(5, 5, 16).photos[:3], simple_pairs(3, 5, 16).photos)
    assert not torch.equal(simple_pairs(3, 6, 16).photos, simple_pairs(3, 5, 16).photos)
    several = face_pairs(2, 5, 16, ("outline", "bold"))
    assert several.styles.tolist() == [0, 0, 1, 1]
    assert torch.equal(several.photos[:2], several.photos[2:])
    with pytest.raises(ValueError, match="unknown artist 'rubens'"):
        face_pairs(1, 0, 16, ("rubens",))
