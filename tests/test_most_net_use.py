"""MOST-Net: what a finished run is used for: comparison, prediction, teaching a new artist."""

import json
import time
from dataclasses import replace
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_most_net_runs import SMALL, enlarged, tiny

import shared.metrics
from most_net import adapt, mechanism, metrics, predict
from most_net import eval as evaluation
from most_net.data import face_pairs, simple_pairs
from most_net.memory import Memory
from most_net.model import MostNet
from most_net.train import train
from shared.io import read_image, write_image
from shared.runtime import UserError, parse


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    options = {"variants": ("none", "most"), "artists": ("outline", "bold")}
    return train(tiny(out / "run", artist_pairs=3, artist_steps=4, **options))


def test_the_comparison_shows_the_first_seed_whatever_it_is(run, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "save_figures", lambda *arguments: shown.append(arguments))
    loaded = []

    class Network(torch.nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            loaded.append(arguments)

        def forward(self, *images):
            return sum(x.mean((2, 3)) for x in images)  # (B, 3)

    monkeypatch.setattr(shared.metrics, "perceptual_network", Network)
    monkeypatch.setattr(shared.metrics, "InceptionFeatures", Network)
    folder = train(tiny(run.parent / "seeds", variants=("none", "most"), seed=1, seeds=2))
    config = evaluation.Config(folder, device="cpu", patches=False, lpips=True, fid=True, write=True)
    evaluation.evaluate(config)
    assert len(loaded) == 2  # not for every method again
    results = json.loads((folder / "results.json").read_text())
    scores, curves = results["scores"], results["NLDA by dimensions"]
    assert all({"LPIPS", "FID", "KID"} <= row.keys() for row in scores.values())
    assert scores.keys() == curves.keys()
    assert all(len(curve) == 56 and max(curve) == scores[name]["NLDA"] for name, curve in curves.items())
    # The files that --write leaves give the command the same numbers.
    made = folder / "predictions/most-4-2"
    _, truth, got = metrics.load_folders(folder / "truth", made)
    fsim = float(metrics.quality(truth, got)["FSIM"].mean())
    assert len(truth) == 128 and fsim == pytest.approx(scores["most-4-2"]["FSIM"], abs=1e-9)
    assert helpers.is_marked(next(made.iterdir()))
    assert set(shown[0][3]) == {"grey photo", "dodge sketch", "none-4-1", "most-4-1"}
    with pytest.raises(UserError, match="--nlda-train 127: between 2 and 126 of 128 people"):
        evaluation.evaluate(evaluation.Config(folder, device="cpu", patches=False, nlda_train=127))


@pytest.mark.parametrize("people, expected", [(338, (150, 20)), (944, (300, 20)), (20, (9, 20)), (3, None)])
def test_recognition_trains_on_the_people_of_the_protocol(monkeypatch, people, expected):
    asked = []

    def recognise(drawn, made, train_people, partitions):
        asked.append((train_people, partitions))
        return metrics.Recognition(np.array([0.5, 0.75]), partitions)

    monkeypatch.setattr(metrics, "recognition", recognise)
    monkeypatch.setattr(evaluation, "quality", lambda *arguments: {})
    images = torch.zeros(people, 1, 2, 2)
    values, curve = evaluation.score(evaluation.Config(), images, images, lambda got: {})
    assert asked == ([expected] if expected else [])
    assert values == ({"L1": 0.0, "NLDA": 75.0} if expected else {"L1": 0.0})
    assert curve == ([50.0, 75.0] if expected else [])
    assert metrics.Config(Path(), Path()).partitions == 20  # of the command, too


def draw_photo(path: Path, height: int, width: int) -> torch.Tensor:
    photo = F.interpolate(face_pairs(1, 3, 64).photos / 255, (height, width), mode="bilinear")[0]
    write_image(path, photo)
    return photo


def test_predict_draws_at_the_photos_own_size(run, tmp_path):
    draw_photo(tmp_path / "in/upright.png", 90, 70)
    draw_photo(tmp_path / "in/landscape.png", 60, 110)
    for changes in (
        {},
        {"resolution": "own", "tile": 48},
        {"strength": 0.5, "style": 1},
        {"white_background": True},
    ):
        config = predict.Config((tmp_path / "in",), tmp_path / "out", run, device="cpu", **changes)
        out = predict.predict(config)
        assert read_image(out / "upright.png", "L").shape == (1, 90, 70)
        assert read_image(out / "landscape.png", "L").shape == (1, 60, 110)
    records = json.loads((out / "sketches.json").read_text())
    assert records["network"] == "artists"
    assert records["sketches"]["landscape.png"]["size"] == [110, 60]


def test_what_predict_is_asked_for_reaches_the_drawing(run, tmp_path):
    draw_photo(tmp_path / "face.png", 64, 64)
    config = predict.Config((tmp_path / "face.png",), tmp_path / "as-trained", run, device="cpu")
    predict.predict(config)
    file = tmp_path / "as-trained/face.png"
    assert Image.open(file).mode == "L" and helpers.is_marked(file)
    drawn = [read_image(file, "L")]
    for changes in ({"strength": 0.0}, {"strength": 2.0}, {"style": 1}, {"trial": "none-4-0"}):
        out = predict.predict(replace(config, out=tmp_path / "out", **changes))
        drawn.append(read_image(out / "face.png", "L"))
    assert len({tuple(sketch.flatten().tolist()) for sketch in drawn}) == 5
    out = predict.predict(replace(config, out=tmp_path / "white", white_background=True))
    white = read_image(out / "face.png", "L")
    assert white[0, 0].min() == 1 and torch.equal(white[0, 24:40, 28:36], drawn[0][0, 24:40, 28:36])


def test_tiles_leave_no_seams():
    """A network that copies the photo's luminance must give it back, whatever the tiles are."""

    class Copy(torch.nn.Module):
        def sketch(self, photo, style, strength):
            return photo.mean(1, keepdim=True)

    y, x = torch.meshgrid(torch.linspace(0, 1, 150), torch.linspace(0, 1, 220), indexing="ij")
    photo = (0.5 + 0.2 * torch.sin(6 * x) + 0.2 * y).expand(3, -1, -1)
    got = predict.draw(Copy(), photo, 16, 0, 1.0, tile=64)
    assert (got - photo[:1]).abs().max() < 0.02


@pytest.mark.parametrize(("shape", "radius"), [((61, 50), 9), ((7, 40), 3), ((8, 8), 100)])
def test_the_box_blur_is_the_mean_of_each_box(shape, radius):
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    got = predict._smooth(image, radius)
    radius = min(radius, (min(shape) - 1) // 2)
    padded = F.pad(image[None], (radius,) * 4, mode="replicate")
    torch.testing.assert_close(got, F.avg_pool2d(padded, 2 * radius + 1, 1)[0])


def test_a_large_photo_costs_no_box_and_no_cut_at_its_own_size(monkeypatch):
    """Both took most of a minute on a photo of a megapixel, and grew with the square of its size."""
    begin = time.process_time()
    predict._smooth(torch.rand(1, 600, 600), 200)
    assert time.process_time() - begin < 5  # by pooling 45 s
    seen = []
    cut = cv2.grabCut

    def grab_cut(image, *rest):
        seen.append(image.shape[:2])
        return cut(image, *rest)

    monkeypatch.setattr(cv2, "grabCut", grab_cut)
    photo = torch.zeros(3, 1000, 700)
    photo[:, 300:, 150:550] = 0.9  # a bright person before a dark wall
    mask = predict.person_mask(photo)
    assert seen == [(400, 280)] and mask.shape == (1, 1000, 700)
    assert mask[0, 350:950, 200:500].min() > 0.99 and mask[0, :250].max() < 0.01


def test_predict_aligns_by_eyes(run, tmp_path):
    draw_photo(tmp_path / "face.png", 240, 240)
    out = tmp_path / "out"
    config = predict.Config((tmp_path / "face.png",), out, run, align="auto", device="cpu")
    predict.predict(config)
    assert read_image(out / "face.png", "L").shape == (1, 250, 200)
    (x1, _), (x2, _) = json.loads((out / "sketches.json").read_text())["sketches"]["face.png"]["eyes"]
    assert 60 < x1 < x2 < 180
    predict.predict(replace(config, align="eyes", eyes=(90, 110, 150, 110)))
    assert read_image(out / "face.png", "L").shape == (1, 250, 200)


def test_predict_names_what_is_wrong(run, tmp_path):
    draw_photo(tmp_path / "face.png", 60, 60)
    write_image(tmp_path / "noise.png", torch.rand(3, 200, 160, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    torch.save({"keys": torch.zeros(3, 3)}, tmp_path / "odd.pt")
    base = predict.Config((tmp_path / "face.png",), tmp_path / "out", run, device="cpu")
    for changes, words in (
        ({"inputs": (tmp_path / "noise.png",), "align": "auto"}, "noise.png: no upright frontal face found"),
        ({"inputs": (tmp_path / "broken.png",)}, "broken.png: not a readable image"),
        ({"inputs": (tmp_path / "gone.png",)}, "gone.png: no such image"),
        ({"inputs": (tmp_path / "face.png",) * 2}, "two photos called face"),
        ({"inputs": ()}, "no photo named"),
        ({"align": "eyes"}, "needs --eyes X Y X Y"),
        ({"align": "eyes", "eyes": (1.0, 1.0, 900.0, 1.0)}, "lie outside the photo"),
        ({"align": "eyes", "eyes": (10.0, 10.0, 10.3, 10.0)}, "at least 2 pixels to its right"),
        ({"style": 7}, "--style 7: artists has 2 of them"),
        ({"style": 1, "trial": "none-4-0"}, "--style 1: none-4-0 has 1 of them"),
        ({"eyes": (1.0, 1.0, 9.0, 1.0)}, "--eyes is for --align eyes"),
        ({"trial": "other"}, "no trained network other"),
        ({"memory": tmp_path / "odd.pt"}, "odd.pt: made for another model than Memory"),
        ({"run": tmp_path}, "not a run folder"),
        ({"out": tmp_path}, "face.png would be overwritten by a result: give another --out"),
    ):
        with pytest.raises(UserError, match=words):
            predict.predict(replace(base, **changes))


@pytest.mark.parametrize(
    "config_class, arguments, option",
    [
        (predict.Config, ["a.png", "--tile", "0"], "--tile"),
        (predict.Config, ["a.png", "--strength", "nan"], "--strength"),
        (predict.Config, ["a.png", "--style", "-1"], "--style"),
        (adapt.Config, ["--photos", "p", "--sketches", "s", "--rounds", "0"], "--rounds"),
        (metrics.Config, ["a", "b", "--partitions", "0"], "--partitions"),
        (metrics.Config, ["a", "b", "--nlda-train", "-1"], "--nlda-train"),
        (evaluation.Config, ["--nlda-train", "-1"], "--nlda-train"),
    ],
)
def test_options_out_of_their_range_are_named(config_class, arguments, option):
    with pytest.raises(UserError, match=f"{option} .*: give"):
        parse(config_class, "", arguments)


def test_a_new_artist_is_taught_and_drawn_with(run, tmp_path):
    pairs = simple_pairs(3, 4, 25)
    for i in range(3):
        write_image(tmp_path / "p" / f"{i}.png", enlarged(pairs.photos[i] / 255))
        write_image(tmp_path / "s" / f"{i}.png", enlarged(pairs.sketches[i] / 255))
    config = adapt.Config(tmp_path / "p", tmp_path / "s", tmp_path / "artist.safetensors", run)
    adapt.main(config)
    use = predict.Config((tmp_path / "p" / "0.png",), tmp_path / "new", run, memory=config.out, device="cpu")
    predict.predict(use)
    predict.predict(replace(use, memory=None, out=tmp_path / "old"))
    assert not torch.equal(read_image(tmp_path / "new/0.png"), read_image(tmp_path / "old/0.png"))
    for out, words in (("art.png", "ends in .safetensors"), ("d.safetensors", "a folder; give the name")):
        (tmp_path / "d.safetensors").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=words):
            adapt.main(replace(config, out=tmp_path / out))
    # What the message of pairs of another size names are options of this command.
    write_image(tmp_path / "p" / "0.png", torch.rand(3, 64, 48))
    write_image(tmp_path / "s" / "0.png", torch.rand(1, 64, 48))
    with pytest.raises(UserError, match="48x64 pixels, .* --alignment.resize eyes .* or stretch"):
        adapt.main(config)
    files = ["--photos", str(tmp_path / "p"), "--sketches", str(tmp_path / "s"), "--out", str(config.out)]
    adapt.main(
        parse(adapt.Config, "", [*files, "--run", str(run), "--alignment.resize", "stretch", "--merge"])
    )
    assert len(load_file(config.out)["keys"]) == 16
    predict.predict(use)


def test_learning_an_artist_recalls_its_features():
    """On the very pairs it was taught, the memory answers with nearly their own features."""
    torch.manual_seed(0)
    net = MostNet(replace(SMALL, slots=64))
    photos, sketches = mechanism.padded(simple_pairs(2, 0, 16), 16)
    before = net.eval()(photos, sketches)
    net.memories[0] = adapt.learn_artist(net, photos, sketches)
    assert isinstance(net.memories[0], Memory)
    after = net(photos, sketches)
    cosine = F.cosine_similarity
    means = [cosine(out["retrieved"], out["features"], dim=1).mean() for out in (before, after)]
    assert means[1] > means[0] + 0.2
