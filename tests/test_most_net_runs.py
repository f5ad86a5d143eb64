"""MOST-Net: training, resume after a kill, evaluation, prediction and teaching a new artist."""

import json
import time
from dataclasses import replace
from pathlib import Path

import cv2
import helpers
import pytest
import torch
import torch.nn.functional as F
from curves import assert_same_curves, run_one, run_two
from safetensors.torch import load_file

from most_net import adapt, claims, mechanism, predict
from most_net import eval as evaluation
from most_net.data import Batch, face_pairs, simple_pairs
from most_net.learner import learning_rate, synthesise
from most_net.memory import Memory
from most_net.model import TINY, MostNet
from most_net.pairs import Alignment
from most_net.train import PRESETS, Config, Weights, train, update
from most_net.trials import begin, load_network, plan
from shared.io import read_image, write_image
from shared.runtime import UserError, start

FOLDER = Path(__file__).resolve().parent.parent / "most_net"
SMALL = replace(TINY, base=4, slots=8)


def tiny(out: Path, **changes) -> Config:
    settings = {
        "out": out,
        "variants": ("most",),
        "extras": (),
        "pairs": (4,),
        "seeds": 1,
        "artists": (),
        "arch": SMALL,
        "size": 16,
        "load": 16,
        "batch": 2,
        "steps": 6,
        "save_every": 2,
        "device": "cpu",
    }
    return replace(PRESETS["demo"], preset="demo", **settings | changes)


EVERYTHING = {
    "variants": ("none", "most"),
    "extras": ("unet",),
    "artists": ("outline", "bold"),
    "artist_pairs": 3,
    "artist_steps": 4,
    "ema": 0.9,
    "memory_init": "kmeans",
    "flip": True,
    "size": 32,
    "load": 34,
    "weights": Weights(perceptual=0, slot=0.01, match=0.1, ssim=0.1),
}


# Saves of the whole run: 2 in each trial of 6 steps and 1 after it, 1 and 1 in the last.
@pytest.mark.parametrize("saves", [2, 5])
def test_killed_and_resumed_run_is_the_same(tmp_path, saves):
    torch.set_num_threads(1)
    config = tiny(tmp_path / "whole", **EVERYTHING)
    train(config)
    sheets = list((tmp_path / "whole/samples").iterdir())
    assert sheets and all(map(helpers.is_marked, sheets))
    program = (
        "from pathlib import Path\n"
        "from test_most_net_runs import EVERYTHING, tiny, train\n"
        "train(tiny(Path(sys.argv[2]), **EVERYTHING))"
    )
    helpers.die_after(saves, program, tmp_path / "killed")
    before = (tmp_path / "killed/log.jsonl").read_text()
    train(tiny(tmp_path / "killed", **EVERYTHING))
    assert len((tmp_path / "killed/log.jsonl").read_text()) > len(before)
    helpers.assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_scripts_from_their_folder(tmp_path):
    def script(*arguments: str) -> str:
        return helpers.script("most_net", *arguments, code=0, PAPERS_RUNS=str(tmp_path)).stdout

    small = "--variants none most --pairs 4 8 --seeds 1 --steps 3 --artist-pairs 3 --artist-steps 3 --batch 2"
    folder = Path(script("train.py", "demo", "--device", "cpu", *small.split()).splitlines()[-1])
    assert folder == tmp_path / "most_net/demo-0"
    printed = script("eval.py", "--device", "cpu", "--nlda-train", "4").splitlines()
    assert Path(printed[-1]) == folder
    assert any(line.startswith("claims: ") for line in printed)
    results = json.loads((folder / "results.json").read_text())
    assert {"claims", "metrics", "environment", "scores", "memory", "artists"} <= results.keys()
    assert {"SSIM", "FSIM", "Scoot", "L1", "NLDA"} == {metric["metric"] for metric in results["metrics"]}
    assert not any(metric["comparable"] for metric in results["metrics"])
    assert len(results["claims"]) == 9
    names = ("comparison", "slots", "atlas", "artists", "atlas-artists", "curve")
    assert all((folder / "samples" / f"{name}.png").is_file() for name in names)
    assert all(helpers.is_marked(folder / "samples" / f"{name}.png") for name in names if name != "curve")


def test_training_on_files_with_a_discriminator(tmp_path):
    """Real layout, crops, validation and the best weights, adversarial term, warm-up: all switches once."""
    pairs = simple_pairs(8, 0, 25)
    for i in range(8):
        for kind, images in (("photos", pairs.photos), ("sketches", pairs.sketches)):
            write_image(tmp_path / "data/train" / kind / f"{i}.png", _enlarged(images[i] / 255))
    config = tiny(
        tmp_path / "run",
        dataset="pairs",
        data_root=tmp_path / "data",
        pairs=(0,),
        holdout=0.25,
        select="val",
        scale=0.1,
        size=32,
        load=36,
        warmup=2,
        validate_every=2,
        variants=("most", "grad"),
        weights=Weights(perceptual=0, adversarial=1.0),
    )
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {name for line in lines for name in line}
    assert {"most-all-0/val_ssim", "most-all-0/adversarial", "grad-all-0/discriminator"} <= found
    net, settings, trial = load_network(folder, Config)
    assert trial.name == "grad-all-0"
    assert settings.data_root == config.data_root
    assert torch.isfinite(synthesise(net, simple_pairs(2, 1, 25), 32)).all()


def test_every_style_of_fs2k_has_a_memory(tmp_path, monkeypatch):
    drawn = face_pairs(2, 0, 25, ("outline", "pencil", "bold"))
    for i in range(6):
        style, number = i // 2 + 1, i % 2
        write_image(tmp_path / f"photo/photo{style}/image{number}.jpg", drawn.photos[i] / 255)
        write_image(tmp_path / f"sketch/sketch{style}/sketch{number}.png", drawn.sketches[i] / 255)
    for part, number in (("train", 0), ("test", 1)):
        names = [{"image_name": f"photo{style}/image{number}"} for style in (1, 2, 3)]
        (tmp_path / f"anno_{part}.json").write_text(json.dumps(names))
    config = tiny(
        tmp_path / "run",
        dataset="fs2k",
        data_root=tmp_path,
        alignment=Alignment(resize="stretch"),
        styles=True,
        pairs=(0,),
        scale=0.1,
        size=32,
        load=32,
    )
    folder = train(config)
    net, _, _ = load_network(folder, Config)
    # Six steps in turns: every artist's memory was written twice, from two crops each of 16x16 positions.
    assert [int(memory.usage.sum()) for memory in net.memories] == [2 * 2 * 256] * 3
    examined = []
    monkeypatch.setattr(evaluation, "measure", lambda net, pairs, *rest: examined.append(pairs) or {})
    monkeypatch.setattr(evaluation, "save_figures", lambda *arguments: None)
    evaluation.evaluate(evaluation.Config(folder, device="cpu", patches=False))
    assert [pairs.styles.tolist() for pairs in examined] == [[0]]  # the first memory knows the first style


def test_only_the_reconstruction_trains_in_the_warm_up(tmp_path):
    config = tiny(
        tmp_path / "run",
        size=32,
        load=32,
        warmup=1,
        weights=Weights(pixel=1, reconstruction=0, perceptual=0, adversarial=1, ssim=1, slot=1, match=1),
    )
    accelerator = start(config)
    (trial,) = plan(config)
    learner = begin(config, trial, accelerator.device)
    learner.perceptual = torch.nn.L1Loss()
    learner.prepare(accelerator, compiled=False)
    photo, sketch = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    for step, moves in ((0, False), (1, True)):
        before = {name: value.clone() for name, value in learner.net.named_parameters()}
        keys = learner.net.memories[0].keys.clone()
        update(config, trial, learner, accelerator, Batch(photo, sketch, 0), step)
        changed = [not torch.equal(before[name], value) for name, value in learner.net.named_parameters()]
        assert any(changed) == moves
        assert not torch.equal(learner.net.memories[0].keys, keys)  # written from the first step on


def _enlarged(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(image[None], (250, 200))[0]


def test_the_memory_claims_switches(tmp_path):
    """none learns without a sketch encoder, static stops writing, mispaired writes something else."""
    folder = train(
        tiny(tmp_path / "run", variants=("none", "memory", "static", "mispaired"), steps=8, seeds=1)
    )
    state = {
        v: load_file(folder / f"checkpoint/{v}-4-0.safetensors")
        for v in ("none", "memory", "static", "mispaired")
    }
    assert not any(name.startswith(("sketch_encoder", "memories")) for name in state["none"])
    assert state["static"]["memories.0.usage"].sum() == 5 * 2 * 64
    assert state["memory"]["memories.0.usage"].sum() == 8 * 2 * 64
    assert not torch.equal(state["mispaired"]["memories.0.values"], state["memory"]["memories.0.values"])


# --- mechanism ----------------------------------------------------------------------------------------


def test_mechanism_measures_and_restores_the_memory():
    net = MostNet(SMALL)
    before = net.memories[0].values.clone()
    found = mechanism.measure(net, simple_pairs(4, 0, 16), 16, window=7)
    assert set(found) == {"cosine", "ssim", "ssim_permuted", "ssim_zero", "slots_used", "purity"}
    assert torch.equal(net.memories[0].values, before)
    slot, parts = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 0, 1, 1])
    assert mechanism.purity(slot, parts) == pytest.approx(4 / 5)


def test_editing_a_slot_changes_the_drawing():
    torch.manual_seed(0)
    net = MostNet(SMALL).eval()
    photos, _ = mechanism.padded(simple_pairs(1, 0, 16), 16)
    before = net.sketch(photos)
    used = int(net(photos)["slot"].flatten().mode().values)
    mechanism.edit_slot(net, 0, used, (used + 1) % 8)
    assert torch.equal(net.memories[0].values[used], net.memories[0].values[(used + 1) % 8])
    assert not torch.equal(net.sketch(photos), before)


def test_claims_are_judged_by_their_margins():
    scores = {"grey photo": {"SSIM": 0.3, "L1": 0.7}}
    for seed in range(2):
        for variant, pairs, value, l1 in (
            ("none", 8, 0.60, 0.20),
            ("memory", 8, 0.61, 0.19),
            ("most", 8, 0.604 + 0.002 * seed, 0.18),
            ("none", 32, 0.70, 0.12),
            ("most", 32, 0.71, 0.12),
        ):
            scores[f"{variant}-{pairs}-{seed}"] = {"SSIM": value, "L1": l1}
    found = claims.judge((8, 32), scores, {}, {})
    # gain 0.005 holds, L1 10 % lower holds, the order and the shrinking gain do not, the grey photo is worse
    assert [claim.holds for claim in found] == [True, True, False, False, True]
    assert found[0].measured["gain"] == pytest.approx(0.005)
    assert [claim.id for claim in found] == ["C1", "C2", "C3", "C4", "C5"]


def test_a_curve_has_its_end_at_all_pairs():
    names = ("most-all-0", "most-27-0", "most-27-1", "grey photo", "neighbour patches (241)")
    scores = {name: {"SSIM": 0.5} for name in names}
    assert claims.by_variant(scores, "SSIM", 241) == {("most", 241): [0.5], ("most", 27): [0.5, 0.5]}
    assert claims.by_variant(scores, "SSIM").keys() == {("most", 27)}


def test_the_comparison_shows_the_first_seed_whatever_it_is(run, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "save_figures", lambda *arguments: shown.append(arguments))
    folder = train(tiny(run.parent / "seeds", variants=("none", "most"), seed=1, seeds=2))
    evaluation.evaluate(evaluation.Config(folder, device="cpu", patches=False))
    assert set(shown[0][3]) == {"grey photo", "dodge sketch", "none-4-1", "most-4-1"}
    with pytest.raises(UserError, match="--nlda-train 127: between 2 and 126 of 128 people"):
        evaluation.evaluate(evaluation.Config(folder, device="cpu", patches=False, nlda_train=127))


def test_learning_rate_is_constant_and_then_falls_to_zero():
    assert [learning_rate(x, 0.5) for x in (0, 0.49, 0.75, 1)] == [1, 1, 0.5, 0]
    assert learning_rate(0.99, 0.0) == 1


def test_plans():
    assert len(plan(PRESETS["study"])) == 3 * (3 * 4 + 3) + 1
    assert [trial.name for trial in plan(PRESETS["paper"])] == ["most-all-0"]
    with pytest.raises(UserError, match="--pairs: procedural faces need a number"):
        plan(replace(PRESETS["demo"], pairs=(0,)))
    for changes, words in (
        ({"size": 16}, "--size 16: .* at least 24 pixels"),
        ({"size": 48, "load": 48}, "--size 48: the U-Net needs a power of two"),
        ({"size": 64}, "--size 64: larger than --load 32"),
        ({"topk": 65}, "--topk 65: the memory has 64 slots"),
        ({"artists": ("outline", "rubens")}, "--artists rubens: there are rules, "),
    ):
        with pytest.raises(UserError, match=words):
            plan(replace(PRESETS["demo"], **changes))


# --- use ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    options = {"variants": ("none", "most"), "artists": ("outline", "bold")}
    return train(tiny(out / "run", artist_pairs=3, artist_steps=4, **options))


def draw_photo(path: Path, height: int, width: int) -> torch.Tensor:
    photo = torch.nn.functional.interpolate(
        face_pairs(1, 3, 64).photos / 255, (height, width), mode="bilinear"
    )[0]
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


def test_a_new_artist_is_taught_and_drawn_with(run, tmp_path):
    pairs = simple_pairs(3, 4, 25)
    for i in range(3):
        write_image(tmp_path / "p" / f"{i}.png", _enlarged(pairs.photos[i] / 255))
        write_image(tmp_path / "s" / f"{i}.png", _enlarged(pairs.sketches[i] / 255))
    config = adapt.Config(tmp_path / "p", tmp_path / "s", tmp_path / "artist.safetensors", run)
    adapt.main(config)
    use = predict.Config((tmp_path / "p" / "0.png",), tmp_path / "new", run, memory=config.out, device="cpu")
    predict.predict(use)
    predict.predict(replace(use, memory=None, out=tmp_path / "old"))
    assert not torch.equal(read_image(tmp_path / "new/0.png"), read_image(tmp_path / "old/0.png"))
    adapt.main(replace(config, merge=True))
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
    cosine = torch.nn.functional.cosine_similarity
    means = [cosine(out["retrieved"], out["features"], dim=1).mean() for out in (before, after)]
    assert means[1] > means[0] + 0.2


def test_two_processes_write_one_memory(tmp_path):
    settings = ["demo", *helpers.TINY["most_net"], "--steps", "6", "--batch", "4"]
    settings += ["--weights.adversarial", "1"]
    one, two = run_one(train, PRESETS, tmp_path, *settings), run_two("most_net", tmp_path, *settings)
    assert_same_curves(one, two, lines=1)  # of the sixth step, which the five before led to
    state = load_file(two / "checkpoint/most-4-0.safetensors")
    assert state["memories.0.usage"].sum() == 6 * 4 * 256  # steps * pairs * positions, of both processes
