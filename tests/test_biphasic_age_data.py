"""Biphasic ageing: age groups, public layouts in miniature, folds, sampling, drawn worlds, bad input."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from biphasic_age import datasets
from biphasic_age.ages import AgeScale, age2group, as_weights, group_names
from biphasic_age.data import (
    DRAWN_LIMITS,
    TEST_SEED,
    FileFaces,
    PairSet,
    TrainSet,
    all_faces,
    drawn_faces,
    jittered,
    open_faces,
    scene_faces,
)
from biphasic_age.layouts import CELEBAMASK_CLASSES, CLASSES, SIDES
from biphasic_age.scene import AGEING_PARTS, PARTS, ageing_signs, draw_scenes
from biphasic_age.train import Config
from biphasic_age.translate import read_layout
from shared.runtime import UserError


def picture(path: Path, colour: tuple[int, int, int] = (120, 90, 70), size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


# --- ages -----------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_papers():
    ages = torch.tensor([1.0, 30.0, 31.0, 40.0, 41.0, 50.0, 50.5, 51.0, 90.0])
    assert age2group(ages).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert group_names() == ("30-", "31-40", "41-50", "51+")


def test_continuous_ages_are_mixtures_of_neighbours():
    scale = AgeScale((30.0, 40.0, 50.0), (24.0, 35.0, 45.0, 60.0), 16.0, 77.0)
    weights = scale.weights(torch.tensor([16.0, 24.0, 29.5, 45.0, 52.5, 77.0]))
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    assert torch.allclose(weights, torch.tensor(expected))
    # In the middle the mixture's mean age is the age that was asked for.
    inner = torch.tensor([30.0, 50.0])
    assert torch.allclose(scale.weights(inner) @ torch.tensor(scale.means), inner)
    with pytest.raises(UserError, match="age 78 lies outside the ages 16 to 77"):
        scale.weights(torch.tensor([50.0, 78.0]))
    with pytest.raises(UserError, match="age nan lies outside"):
        scale.weights(torch.tensor([float("nan")]))


def test_scale_needs_faces_of_every_group():
    scale = AgeScale.of(torch.tensor([20.5, 23.5, 35.0, 45.0, 69.5]))
    assert scale.means == (22.0, 35.0, 45.0, 69.5) and (scale.low, scale.high) == (20.0, 70.0)
    with pytest.raises(UserError, match="age group 41-50"):
        AgeScale.of(torch.tensor([20.0, 35.0, 70.0]))


def test_targets_as_groups_or_weights():
    assert as_weights(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    weights = torch.tensor([[0.25, 0.75]])
    assert as_weights(weights, 2) is weights
    with pytest.raises(ValueError, match="target"):
        as_weights(torch.zeros(2), 3)


# --- public layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "age", "identity", "sex"),
    [
        ("morph", "009055_1M54.JPG", 54, "009055", "M"),
        ("morph", "Album2/012345_10F16.jpg", 16, "012345", "F"),
        ("cacd", "40_Charlotte_Gainsbourg_0011.jpg", 40, "Charlotte_Gainsbourg", ""),
        ("cacd", "14_Aaron_Johnson_0001.jpg", 14, "Aaron_Johnson", ""),
        ("utkface", "25_0_1_2017011617452.jpg.chip.jpg", 25, "25_0_1_2017011617452.jpg.chip.jpg", "M"),
        ("utkface", "61_1_20170109142408075.jpg", 61, "61_1_20170109142408075.jpg", "F"),
        ("utkface", "55_0_0_20170116232725357jpg.chip.jpg", 55, "55_0_0_20170116232725357jpg.chip.jpg", "M"),
        ("utkface", "44_1_4_20170116235150272.pg.chip.jpg", 44, "44_1_4_20170116235150272.pg.chip.jpg", "F"),
        ("fgnet", "046A10.JPG", 10, "046", ""),
        ("fgnet", "001A43b.JPG", 43, "001", ""),
    ],
)  # fmt: skip
def test_file_names_tell_age_and_person(tmp_path, name, file, age, identity, sex):
    picture(tmp_path / file)
    (record,) = datasets.READERS[name](tmp_path)
    assert (record.age, record.identity, record.sex) == (age, identity, sex)


def test_an_unknown_age_in_a_file_name_is_named(tmp_path):
    picture(tmp_path / "40_Some_Body_0001.jpg")
    picture(tmp_path / "holiday.jpg")
    with pytest.raises(UserError, match=r"holiday\.jpg: the name does not tell .*Gainsbourg"):
        datasets.read_source("cacd", tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere.*UNCW"):
        datasets.read_source("morph", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no pictures"):
        datasets.read_source("morph", tmp_path)


def test_a_set_below_a_folder_called_parsing_is_found(tmp_path):
    root = tmp_path / "parsing" / "morph"
    picture(root / "009055_1M54.JPG")
    picture(root / "parsing" / "009055_1M54.png")
    (record,) = datasets.read_source("morph", root)
    assert record.path == root / "009055_1M54.JPG"


def ffhq(root: Path, rows: list[str]) -> Path:
    (root / "ffhq_aging_labels.csv").write_text(
        "image_number,age_group,age_group_confidence,gender\n" + "\n".join(rows)
    )
    return root


def test_ffhq_aging(tmp_path):
    for number in range(3):
        picture(tmp_path / "ffhq_aging256x256" / "00000" / f"{number:05d}.png")
    ffhq(tmp_path, ["0,0-2,0.9,male", "1,20-29,1,female", "2,70-120,1,male"])
    records = datasets.read_ffhq_aging(tmp_path)
    assert [(r.age, r.sex) for r in records] == [(1.0, "M"), (24.5, "F"), (95.0, "M")]
    ffhq(tmp_path, ["0,0-2,0.9,male", "7,20-29,1,female"])
    with pytest.raises(UserError, match="line 3: picture 7 is not there"):
        datasets.read_ffhq_aging(tmp_path)
    picture(tmp_path / "thumbnails128x128" / "00001.png")
    with pytest.raises(
        UserError, match=r"picture 1 is there twice: .*00000.00001.png and .*128x128.00001.png"
    ):
        datasets.read_ffhq_aging(tmp_path)
    (tmp_path / "thumbnails128x128" / "00001.png").unlink()
    ffhq(tmp_path, ["0,young,0.9,male"])
    with pytest.raises(UserError, match="line 2: expected a picture number and a range"):
        datasets.read_ffhq_aging(tmp_path)


def test_csv_list_and_its_faults(tmp_path):
    picture(tmp_path / "a" / "1.png")
    Image.new("L", (8, 8), 1).save(tmp_path / "a" / "map.png")
    path = tmp_path / "list.csv"
    path.write_text("path,age,identity,layout\na/1.png,33.5,Ann,a/map.png\na/1.png,60,Ann,\n")
    first, second = datasets.read_list(path)
    assert (first.age, first.identity, first.layout) == (33.5, "Ann", tmp_path / "a" / "map.png")
    assert second.layout is None
    path.write_text("path,age,identity,sex\na/1.png,30,Ann,f\na/1.png,60,Ann,\n")
    assert [record.sex for record in datasets.read_list(path)] == ["F", ""]
    for text, message in (
        ("path,age\na/1.png,3\n", "no column identity"),
        ("path,age,identity\na/2.png,3,Ann\n", r"line 2: no file .*2\.png"),
        ("path,age,identity\na/1.png,old,Ann\n", "line 2: age 'old' is not a number of years"),
        ("path,age,identity\na/1.png,,Ann\n", "line 2: .* must all be given"),
        ("path,age,identity\n", "lists no picture"),
        ("path,age,identity,sex\na/1.png,3,Ann,female\n", "line 2: sex 'female' is neither M nor F"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            datasets.read_list(path)
    path.write_bytes("\ufeffpath,age,identity\na/1.png,30,Zoë\n".encode())  # as spreadsheets write it
    assert datasets.read_list(path)[0].identity == "Zoë"
    path.write_bytes("path,age,identity\na/1.png,30,Zoë\n".encode("latin-1"))
    with pytest.raises(UserError, match="list.csv: not readable as CSV in UTF-8"):
        datasets.read_list(path)


def records(people: int, pictures: int) -> list[datasets.Record]:
    return [
        datasets.Record(Path(f"{p:03d}_{n}.png"), 20.0 + n, f"{p:03d}")
        for p in range(people)
        for n in range(pictures)
    ]


def test_folds_share_nobody_and_cover_everybody():
    everything = records(23, 3)
    tested = []
    for fold in range(1, 6):
        test = datasets.split(everything, fold, "test")
        train = datasets.split(everything[::-1], fold, "train")  # whatever the order
        assert {r.identity for r in test}.isdisjoint(r.identity for r in train)
        assert len(test) + len(train) == 69 and 12 <= len(test) <= 15
        tested += test
    assert sorted(map(str, (r.path for r in tested))) == sorted(str(r.path) for r in everything)
    with pytest.raises(UserError, match="folds 1 to 5"):
        datasets.split(everything, 6, "test")
    with pytest.raises(UserError, match="too few for 5 folds"):
        datasets.split(records(4, 2), 1, "test")


def test_the_first_few_of_a_fold_are_a_fair_sample_of_ages_and_people():
    """CACD's and UTKFace's names begin with the age, MORPH's with the person."""
    names = [(Path(f"{age}_{p:02d}_0001.jpg"), age, f"{p:02d}") for age in range(14, 63) for p in range(40)]
    everything = [datasets.Record(path, float(age), person) for path, age, person in names]
    for part in ("train", "test"):
        few = datasets.split(everything, 1, part)[:60]
        ages = torch.tensor([record.age for record in few])
        assert torch.bincount(age2group(ages), minlength=4).min() >= 5
        assert len({record.identity for record in few}) >= 8


def test_summary_stands_beside_the_published_counts():
    text = datasets.summary("morph", records(3, 2), torch.tensor([0, 0, 1, 1, 2, 3]), group_names())
    assert "6 pictures of 3 people; 30-: 2, 31-40: 2, 41-50: 1, 51+: 1" in text
    assert "55,134 pictures of 13,617 people" in text


def test_layout_files(tmp_path):
    labels = torch.arange(19).repeat(19, 1).byte()
    Image.fromarray(labels.numpy()).save(tmp_path / "map.png")
    assert torch.equal(datasets.read_layout(tmp_path / "map.png", 19), labels)
    other = datasets.read_layout(tmp_path / "map.png", 19, "celebamask")
    assert [CLASSES[i] for i in other[0].tolist()] == list(CELEBAMASK_CLASSES)
    assert datasets.read_layout(tmp_path / "map.png", 38).unique().tolist() == list(range(19))  # nearest only
    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match="holds the value 200"):
        datasets.read_layout(tmp_path / "grey.png", 8)
    with pytest.raises(UserError, match=r"no layout .*none\.png.*parse\.py"):
        datasets.read_layout(tmp_path / "none.png", 8)


def test_two_pictures_of_one_name_cannot_share_a_layout(tmp_path):
    layout = tmp_path / "parsing" / "1.png"
    layout.parent.mkdir()
    Image.new("L", (8, 8), 1).save(layout)
    pair = [datasets.Record(tmp_path / place / "1.png", 30.0, place) for place in "ab"]
    with pytest.raises(UserError, match=r"a.1\.png and .*b.1\.png would share the layout 1\.png"):
        datasets.with_layouts(pair, tmp_path)
    own = [replace(record, layout=layout) for record in pair]  # said in a list, so it is meant
    assert [record.layout for record in datasets.with_layouts(own, tmp_path)] == [layout] * 2
    twice = [pair[0], replace(pair[0], age=31.0)]  # one picture listed twice
    assert len(datasets.with_layouts(twice, tmp_path)) == 2


def test_a_layout_with_a_palette_holds_its_numbers_not_its_colours(tmp_path):
    numbered = Image.fromarray(torch.arange(19).repeat(19, 1).byte().numpy(), "P")
    numbered.putpalette([value for k in range(19) for value in (200, 10 * k, 90)])
    numbered.save(tmp_path / "map.png")
    assert datasets.read_layout(tmp_path / "map.png", 19)[0].tolist() == list(range(19))
    assert read_layout(tmp_path / "map.png", (19, 19))[0].tolist() == list(range(19))


def morph(root: Path, layouts: bool = True) -> Path:
    ages = (18, 35, 45, 60)
    for person in range(10):
        for n, age in enumerate(ages):
            file = picture(root / f"{person:06d}_{n}{'MF'[person % 2]}{age}.JPG", (20 * person, 90, 70))
            if layouts:
                (root / "parsing").mkdir(exist_ok=True)
                Image.new("L", (8, 8), person % 3).save(root / "parsing" / f"{file.stem}.png")
    return root


def test_a_public_set_as_training_faces(tmp_path, capsys):
    config = Config(data=("morph",), data_root=morph(tmp_path), image_size=16, fold=2)
    train, test = (open_faces(config, "morph", part) for part in ("train", "test"))
    assert isinstance(train, FileFaces) and len(train) == 32 and len(test) == 8
    assert "40 pictures of 10 people; 30-: 10" in capsys.readouterr().out
    image, layout = train.load(0)
    assert image.shape == (3, 16, 16) and layout.shape == (16, 16) and layout.dtype == torch.uint8
    assert [train.names[int(p)] for p in train.people] == [r.identity for r in train.records]
    assert train.attribute_names == ("male",) and set(train.attributes.flatten().tolist()) == {0.0, 1.0}
    assert torch.bincount(train.groups).tolist() == [8, 8, 8, 8]
    assert all_faces(test, 3)[0].shape == (3, 3, 16, 16)


def test_missing_layouts_are_said_before_training(tmp_path):
    config = Config(data=("morph",), data_root=morph(tmp_path, layouts=False), image_size=16)
    with pytest.raises(UserError, match=r"no layout .*parsing"):
        open_faces(config, "morph", "train")
    without = Config(data=("morph",), data_root=tmp_path, image_size=16, layouts=False)
    assert int(open_faces(without, "morph", "train").load(0)[1].max()) == 0
    with pytest.raises(UserError, match="needs --data-root"):
        open_faces(Config(data=("cacd",)), "cacd", "train")
    with pytest.raises(UserError, match="needs --list"):
        open_faces(Config(data=("csv",)), "csv", "train")


# --- samples --------------------------------------------------------------------------------------------


def test_training_samples_are_balanced_over_ages_and_pure():
    source = drawn_faces(12, 3, 16, 2)
    samples = TrainSet(source, seed=5, flip=True, jitter=0.1)
    drawn = [samples[0, draw] for draw in range(40)]
    present = len(source.groups.unique())
    assert torch.bincount(torch.stack([s["group"] for s in drawn])).max() <= 40 // present + 1
    again = samples[7, 11]
    assert all(torch.equal(again[key], drawn[11][key]) for key in again)
    assert drawn[0]["image"].min() >= -1 and drawn[0]["image"].max() <= 1


def test_pairs_are_two_pictures_of_one_person():
    source = drawn_faces(6, 3, 8, 3)
    source.people[:2] = torch.tensor([7, 8])  # one person has a single picture left, two have no other
    pairs, seen = PairSet(source, 0), set()
    for n in range(60):
        a, b = pairs.pick(2 * n), pairs.pick(2 * n + 1)
        assert a != b and source.people[a] == source.people[b]
        seen |= {a, b}
    assert seen == set(range(3, 18))
    assert torch.equal(pairs[(0, 4)]["image"], source.images[pairs.pick(4)] * 2 - 1)


def test_a_mirrored_sample_has_a_mirrored_layout():
    source = drawn_faces(8, 3, 24)
    plain, flipped = TrainSet(source, 1), TrainSet(source, 1, flip=True)
    changed = 0
    for draw in range(16):
        a, b = plain[0, draw], flipped[0, draw]
        if torch.equal(a["image"], b["image"]):
            assert torch.equal(a["layout"], b["layout"])
            continue
        changed += 1
        assert torch.equal(a["image"].flip(-1), b["image"])
        for left, right in SIDES:
            i, j = CLASSES.index(left), CLASSES.index(right)
            assert torch.equal((a["layout"] == i).flip(-1), b["layout"] == j)
    assert 0 < changed < 16


def test_jitter_changes_colour_a_little():
    image = torch.rand(3, 8, 8)
    changed = jittered(image, 0.05, torch.Generator().manual_seed(0))
    assert not torch.equal(changed, image) and (changed - image).abs().max() < 0.2
    assert torch.allclose(jittered(image, 0.0, torch.Generator()), image, atol=1e-6)


# --- drawn worlds -----------------------------------------------------------------------------------------


def test_drawn_people_have_ages_people_and_the_parsers_labels():
    source = drawn_faces(6, 0, 32, 3)
    assert len(source) == 18 and source.people.tolist() == [p for p in range(6) for _ in range(3)]
    assert torch.equal(source.groups, age2group(source.ages, DRAWN_LIMITS))
    share = [(source.layouts == CLASSES.index(name)).float().mean().item() for name in ("skin", "hair")]
    assert share[0] > 0.15 and share[1] > 0.05
    again = drawn_faces(6, 0, 32, 3)
    assert torch.equal(source.images, again.images)
    assert not torch.equal(source.images, drawn_faces(6, TEST_SEED, 32, 3).images)


def test_age_changes_only_the_subjects_hair_and_skin_in_a_scene():
    scenes = draw_scenes(20, 0)
    assert scenes.image.shape == (20, 4, 3, 32, 32)
    change = (scenes.image[:, 3] - scenes.image[:, 0]).abs().amax(1)
    ageing = torch.isin(scenes.layout, torch.tensor(AGEING_PARTS, dtype=torch.uint8))
    assert change[~ageing].max() == 0 and change[ageing].mean() > 0.1
    # The poster is there, and nothing in the layout tells it.
    halves = (scenes.layout > 0).flatten(1).view(20, 32, 32)
    left, right = halves[..., :16].any((1, 2)), halves[..., 16:].any((1, 2))
    assert (left ^ right).all() and 0 < left.float().mean() < 1
    assert set(scenes.layout.unique().tolist()) == set(range(len(PARTS)))


def test_hair_leaves_the_face_of_a_scene_free():
    layout = draw_scenes(50, 2).layout
    eyes = layout == PARTS.index("eyes")
    beside = (eyes.roll(1, 2) | eyes.roll(-1, 2)) & ~eyes
    assert (layout[beside] == PARTS.index("skin")).all()
    areas = torch.bincount(layout.flatten().long(), minlength=len(PARTS))
    assert areas[PARTS.index("skin")] > 0.8 * areas[PARTS.index("hair")]


def test_signs_of_age_are_read_without_a_network():
    scenes = draw_scenes(30, 1)
    signs = [ageing_signs(scenes.image[:, k], scenes.layout, scenes.skin_y) for k in range(4)]
    for name in ("hair", "wrinkles"):
        means = torch.stack([sign[name] for sign in signs]).mean(1)
        assert (means.diff() > 0.1).all()
    assert signs[3]["wrinkles"].mean() == pytest.approx(1, abs=0.15)
    assert signs[0]["wrinkles"].mean() == pytest.approx(0, abs=0.1)


def test_one_head_is_the_easy_case():
    scenes = draw_scenes(4, 0, heads=1)
    assert (scenes.layout[:, :, 12:20] > 0).any((1, 2)).all()


def test_scene_as_training_faces():
    source = scene_faces(40, 0)
    assert torch.bincount(source.groups).tolist() == [10, 10, 10, 10] and source.classes == 6
    k = int(source.groups[5])
    assert torch.equal(source.images[5], draw_scenes(40, 0).image[5, k])
