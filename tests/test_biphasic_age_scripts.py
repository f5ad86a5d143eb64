"""Biphasic face ageing: predict.py, parse.py, augment.py and bench.py as a user calls them."""

import json
import subprocess
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from biphasic_age import augment, bench, parse, predict
from biphasic_age.align import EYES, find_eyes, to_pixels
from biphasic_age.data import drawn_faces
from biphasic_age.frozen import ArcFace
from biphasic_age.layouts import CLASSES
from biphasic_age.train import PRESETS, train
from shared.io import SYNTHETIC_SOURCE, read_image, write_image
from shared.runtime import UserError, parse_presets


def portrait(size: int, seed: int = 11) -> torch.Tensor:
    """A face (3, S, S) as the drawn training set has them."""
    return drawn_faces(1, seed, size).images[0]


def call(script: str, *arguments: str, runs=None) -> subprocess.CompletedProcess:
    environment = {} if runs is None else {"PAPERS_RUNS": str(runs)}
    return helpers.script("biphasic_age", script, *arguments, **environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of very few steps, with a parser that has learned what skin is."""
    root = tmp_path_factory.mktemp("runs")
    options = (
        "demo", "--data", "faces", "--variants", "full", "--image-size", "32", "--size", "unit",
        "--train-images", "120", "--test-images", "8", "--steps", "2", "--guide-steps", "60",
        "--age-width", "4", "--age-stages", "2", "--identity-width", "4", "--batch-size", "4",
        "--device", "cpu", "--out", str(root / "biphasic_age" / "demo-0"),
    )  # fmt: skip
    train(parse_presets(PRESETS, "", options))
    return root


def test_predict_writes_strip_pictures_and_numbers_marked_as_synthetic(runs, tmp_path):
    photo = tmp_path / "anna.png"
    write_image(photo, portrait(80))
    out = tmp_path / "out"
    done = call("predict.py", str(photo), "--ages", "25,40", "60", "--aligned", "--out", str(out), runs=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(out)
    result = json.loads((out / "result.json").read_text())
    assert [entry["age"] for entry in result["ages"]] == [25, 40, 60] and result["synthetic"]
    assert {"skin", "background"} <= result["ages"][0]["mean_change"].keys()
    for entry in result["ages"]:
        with Image.open(out / entry["file"]) as picture:
            assert picture.size == (80, 80)
            assert picture.text["DigitalSourceType"] == SYNTHETIC_SOURCE
    with Image.open(out / "strip.png") as strip:
        assert strip.width > 4 * 160 and "DigitalSourceType" in strip.text
    assert read_image(out / "layout.png").shape == (3, 32, 32)


def test_results_do_not_take_the_place_of_what_they_are_made_from(runs, tmp_path, monkeypatch):
    """A result translated once more, for example, with the same --out; another age is another file."""
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    result, layout = tmp_path / "age_30.png", tmp_path / "layout.png"
    write_image(result, portrait(48))
    Image.fromarray(np.ones((48, 48), np.uint8)).save(layout)
    before = result.read_bytes(), layout.read_bytes()
    config = predict.PredictConfig(result, ages=("30",), aligned=True, out=tmp_path)
    for given, name in ((config, "age_30.png"), (replace(config, ages=("40",), layout=layout), "layout.png")):
        with pytest.raises(UserError, match=f"{name} would be overwritten by a result: give another --out"):
            predict.main(given)
    assert (result.read_bytes(), layout.read_bytes()) == before
    predict.main(replace(config, ages=("40",)))
    assert (tmp_path / "age_40.png").is_file() and result.read_bytes() == before[0]


def test_predict_goes_through_a_folder_and_names_what_failed(runs, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    for seed in (13, 14):
        write_image(folder / f"p{seed}.png", portrait(48, seed))
    write_image(folder / "grass.png", torch.rand(3, 48, 48) * torch.tensor([0.1, 0.5, 0.1]).view(3, 1, 1))
    out = tmp_path / "out"
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    with pytest.raises(
        UserError, match="1 of 3 pictures were not translated: grass.png: the parser found no"
    ):
        predict.main(predict.PredictConfig(folder, ages=("30",), aligned=True, out=out))
    assert (out / "p13" / "strip.png").is_file() and (out / "p14" / "age_30.png").is_file()
    assert not (out / "grass").exists()


def test_pictures_of_one_name_in_a_folder_have_results_of_their_own(runs, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    for name, seed in (("p.png", 13), ("p.jpg", 14), ("q.png", 15)):
        write_image(folder / name, portrait(48, seed))
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    predict.main(predict.PredictConfig(folder, ages=("30",), aligned=True, out=tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p.jpg", "p.png", "q"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ages": ("7",)}, "outside"),
        ({"ages": ("old",)}, "not numbers of years"),
        ({"ages": (",",)}, "not numbers of years"),
        ({"strength": ("hair",)}, "write PART=SHARE"),
        ({"strength": ("skin=1", "hair=nan")}, "--strength hair=nan: write PART=SHARE"),
        ({"strength": ("hair=-50",)}, "a share from 0 to 2"),
        ({"picture": "photos", "layout": "photos/photo.png"}, "give a folder of layouts"),
        ({"picture": "absent.png"}, "no such picture or folder"),
        ({"picture": "."}, "no pictures in this folder"),
        ({"layout": "absent.png"}, "no layout"),
        ({"variant": "no-layout"}, "no-layout"),
    ],
)
def test_mistakes_are_messages(settings, message, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    photos = tmp_path / "photos"
    write_image(photos / "photo.png", portrait(40))
    (tmp_path / "empty").mkdir()
    places = {"absent.png": tmp_path / "absent.png", ".": tmp_path / "empty"}
    places |= {"photos": photos, "photos/photo.png": photos / "photo.png"}
    settings = {
        key: places.get(value, value) if key in ("picture", "layout") else value
        for key, value in settings.items()
    }
    settings = {"picture": photos / "photo.png", "out": tmp_path / "out", "aligned": True, **settings}
    with pytest.raises(UserError, match=message):
        predict.main(predict.PredictConfig(**settings))


def test_a_mistake_is_one_line_and_code_2(tmp_path):
    done = call("predict.py", str(tmp_path / "absent.png"), runs=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no run in ")
    assert "Traceback" not in done.stderr


def test_parse_writes_a_layout_for_every_picture(runs, tmp_path, monkeypatch):
    write_image(tmp_path / "a" / "one.png", portrait(50))
    write_image(tmp_path / "two.png", portrait(64, 12))
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    config = parse.ParseConfig(tmp_path)
    assert parse.main(config) == tmp_path / "parsing"
    for name, side in (("one", 50), ("two", 64)):
        with Image.open(tmp_path / "parsing" / f"{name}.png") as layout:
            assert layout.mode == "L" and layout.size == (side, side)
            assert (np.array(layout) == 1).mean() > 0.05
    write_image(tmp_path / "b" / "one.png", portrait(50))
    with pytest.raises(UserError, match="would share the layout one.png"):
        parse.main(config)


class Painted(nn.Module):
    """A parser of pictures in which the left eye is red, the right one green and skin blue."""

    size = 96
    names = ("l_eye", "r_eye", "skin")

    def labels(self, image):
        shares = image / 2 + 0.5
        found = torch.tensor([CLASSES.index(name) for name in self.names])[shares.argmax(1)]
        return torch.where(shares.amax(1) > 0.5, found, 0)


def test_a_folder_is_cut_out_by_the_eyes_and_parsed(tmp_path, monkeypatch):
    """Under the names of the pictures; what has no eyes is named, and nothing is written for it."""
    places = tmp_path / "raw", tmp_path / "crops"
    face = torch.zeros(3, 120, 160)
    face[2, 20:110, 50:120] = 1.0
    write_image(places[0] / "a" / "009055_2M57.png", face)
    for channel, column in enumerate((70, 98)):
        face[:, 50:56, column : column + 6] = torch.eye(3)[channel].view(3, 1, 1)
    write_image(places[0] / "a" / "009055_1M54.png", face)
    monkeypatch.setattr(parse, "load_parser", lambda path: Painted())
    config = parse.ParseConfig(places[0], align=places[1], size=64, parser_weights=tmp_path, device="cpu")
    with pytest.raises(UserError, match="1 of 2 pictures: .*009055_2M57.png: the eyes were not found"):
        parse.main(config)
    assert [path.name for path in places[1].glob("**/*.png")] == ["009055_1M54.png"] * 2
    eyes = find_eyes(torch.from_numpy(np.array(Image.open(places[1] / "parsing" / "009055_1M54.png"))))
    for (x, y), wanted in zip(eyes, to_pixels(EYES, 64), strict=True):
        assert (x, y) == pytest.approx(wanted, abs=0.7)
    assert read_image(places[1] / "009055_1M54.png").shape == (3, 64, 64)
    for changes, message in (
        ({"parser_weights": None}, "--align needs --parser-weights"),
        ({"align": places[0]}, "give another folder"),
        ({"masks": tmp_path}, "--masks are of aligned pictures"),
    ):
        with pytest.raises(UserError, match=message):
            parse.main(replace(config, **changes))


def test_aligned_eyes_are_where_arcface_looks_for_them():
    left, top, right, bottom = ArcFace().crop
    for (x, y), wanted in zip(EYES, ((38.29, 51.70), (73.53, 51.50)), strict=True):  # ArcFace's template
        found = 112 * (x - left) / (right - left), 112 * (y - top) / (bottom - top)
        assert found == pytest.approx(wanted, abs=0.5)


def test_celebamask_hqs_part_files_become_layouts(tmp_path):
    pictures, masks = tmp_path / "CelebA-HQ-img", tmp_path / "CelebAMask-HQ-mask-anno"
    write_image(pictures / "2001.png", torch.rand(3, 16, 16))
    (masks / "1").mkdir(parents=True)
    for name, start, end, value in (("skin", 2, 8, 255), ("hair", 0, 4, 225), ("l_eye", 5, 6, 1)):
        part = np.zeros((8, 8), np.uint8)
        part[start:end] = value
        Image.fromarray(part).save(masks / "1" / f"02001_{name}.png")
    out = parse.main(parse.ParseConfig(pictures, masks=masks))
    column = np.array(Image.open(out / "2001.png"))[:, 0].tolist()
    names = ("hair", "hair", "hair", "hair", "skin", "l_eye", "skin", "skin")
    assert [CLASSES[k] for k in column] == list(names)
    write_image(pictures / "2002.png", torch.rand(3, 16, 16))
    with pytest.raises(UserError, match=r"2002\.png: no part files of it, like .*1.02002_skin\.png"):
        parse.main(parse.ParseConfig(pictures, masks=masks))


def test_a_given_layout_is_read_in_its_order(runs, tmp_path, monkeypatch):
    """13 is hair in CelebAMask-HQ's order, and the lower lip in BiSeNet's."""
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    write_image(tmp_path / "photo.png", portrait(48))
    labels = np.ones((48, 48), np.uint8)
    labels[:16] = 13
    Image.fromarray(labels).save(tmp_path / "map.png")
    config = predict.PredictConfig(
        tmp_path / "photo.png", ages=("30",), layout=tmp_path / "map.png", out=tmp_path / "out", device="cpu"
    )
    for order, parts in (("bisenet", {"skin", "l_lip"}), ("celebamask", {"skin", "hair"})):
        predict.main(replace(config, layout_order=order))
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert set(result["ages"][0]["mean_change"]) == parts


def test_augment_reports_before_and_after_and_writes_the_copies(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERS_RUNS", str(runs))
    config = augment.AugmentConfig(people=6, pictures=4, steps=3, batch_size=4, width=4, write=tmp_path / "c")
    folder = augment.main(config)
    results = json.loads((folder / "augment.json").read_text())["results"]
    assert set(results) == {"own pictures", "with aged copies"}
    own, more = (results[name]["training_pictures"] for name in results)
    assert more == 4 * own and "with aged copies" in capsys.readouterr().out
    listed = (tmp_path / "c" / "list.csv").read_text().splitlines()
    assert listed[0] == "path,age,identity" and len(listed) == 1 + 3 * own
    with Image.open(tmp_path / "c" / "000000.png") as copy:
        assert "DigitalSourceType" in copy.text


def test_bench_measures_all_forms(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path))
    made, orders = bench.make_step, []

    def watched(config, device, memory=torch.contiguous_format):
        orders.append(memory)
        return made(config, device, memory)

    monkeypatch.setattr(bench, "make_step", watched)
    bench.main(bench.BenchConfig(size="unit", image_size=64, seconds=0.0, rounds=1))
    assert orders.count(torch.channels_last) == 2  # both fast forms, as in train.py
    rows = json.loads((tmp_path / "biphasic_age" / "bench.json").read_text())["rows"]
    steps = {row["form"]: row for row in rows if row["what"] == "training step"}
    assert set(steps) == {"plain fp32", "fast fp32", "fast bf16"}
    assert steps["fast fp32"]["peak_mib"] < 0.8 * steps["plain fp32"]["peak_mib"]
    assert "x the speed" in capsys.readouterr().out
