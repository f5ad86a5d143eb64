"""MDRNets: training, resume, several processes, evaluation and prediction in miniature."""

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from mdrnets import eval as evaluation
from mdrnets import predict
from mdrnets.app import to_tensor
from mdrnets.data import open_pictures
from mdrnets.inpaint import Model, attention_of, complete, crop_box, hiding_mask, load_model
from mdrnets.model import SIZES, CoarseNet, MDRNet, RefineNet
from mdrnets.parser import GROUPS, TinyParser
from mdrnets.train import PRESETS, Config
from shared.io import load_config, read_image, write_image
from shared.onnxfile import run_onnx
from shared.runtime import UserError, parse_presets

TINY = (*helpers.TINY["mdrnets"], "--device", "cpu")
VARIANTS_HERE = ("none", "disentangled", "full", "full+inco2", "disentangled-ema")
script = partial(helpers.script, "mdrnets")


def tiny(**changes):
    one = {"data": ("simple",), "variants": ("full",), "copy_steps": 0, "unet": False, "sample_every": 100}
    return replace(parse_presets(PRESETS, "", ["demo", *TINY]), **one | changes)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = script("train.py", "demo", *TINY, "--variants", *VARIANTS_HERE, "--out", str(folder), fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(folder)
    return folder


def test_training_leaves_the_run_folder_described(run_folder):
    trained = {path.stem for path in (run_folder / "trained").iterdir()}
    names = ("coarse", "unet", *VARIANTS_HERE)
    assert trained == {f"{data}-{name}-0" for data in ("simple", "faces") for name in names}
    steps = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2 * (6 + 5 * 4 + 10)
    assert any("simple/full+inco2/0/inter" in entry for entry in steps)
    assert not any("simple/full/0/inter" in entry for entry in steps)
    assert json.loads((run_folder / "copy_task.json").read_text()).keys() == {"without MREM", "with MREM"}
    assert helpers.is_marked(run_folder / "samples" / "faces-full-0.png")


def test_evaluation_prints_claims_and_writes_results(run_folder):
    done = script("eval.py", "--run", str(run_folder), "--device", "cpu", fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(run_folder)
    said = ("claims:", "no row here is a ShowFace result", "test pictures in every bin; 8-bit RGB composite")
    tables = (f"{name}, hole of" for name in ("PSNR [dB]", "PSNR hole [dB]", "SSIM", "L1 [%]"))
    assert all(words in done.stdout for words in (*said, *tables))
    results = json.loads((run_folder / "results.json").read_text())
    ids = [claim["id"] for claim in results["claims"]]
    assert ids == [f"C{i}" for i in range(1, len(ids) + 1)]
    assert not any(metric["comparable"] for metric in results["metrics"])
    settings = {metric["setting"] for metric in results["metrics"]}
    assert all("SSIM 11x11" in setting for setting in settings) and len(settings) == 6
    assert {m["method"] for m in results["metrics"]} >= {"coarse", "unet", "Telea (OpenCV)", *VARIANTS_HERE}
    slots = results["faces"]["slots"]["full"]
    assert list(slots) == list(GROUPS) and all(1 <= entry["effective"] <= 4.01 for entry in slots.values())
    assert helpers.is_marked(run_folder / "samples" / "test-faces.png")
    holes = json.loads((run_folder / results["simple"]["test_masks"]).read_text())
    assert len(holes) == 5 and all(len(pairs) == 10 for pairs in holes.values())
    picture_of_first, mask_of_first = holes["10-20 %"][0]
    assert picture_of_first.endswith("face 0") and mask_of_first.startswith("strokes of seed 1000033, number")


def test_oracle_parsing_and_a_fid_of_too_few_are_reported(run_folder, capsys):
    options = {"oracle_parsing": True, "fid_weights": run_folder / "any.pth"}
    evaluation.main(evaluation.EvalConfig(run=run_folder, device="cpu", **options))
    assert "FID: not available, 10 test pictures of at least 2000" in capsys.readouterr().out
    results = json.loads((run_folder / "results.json").read_text())
    assert results["oracle_parsing"] is True
    assert results["faces"]["not_available"].keys() == {"LPIPS", "FID"}
    assert all("TRUE PARSING GIVEN" in metric["setting"] for metric in results["metrics"])


# --- prediction -------------------------------------------------------------------------------------


@pytest.fixture
def model(run_folder):
    return load_model(run_folder, "faces", "full", None, torch.device("cpu"))


def picture(height: int = 50, width: int = 60) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return (torch.rand(3, height, width, generator=rng) * 255).round() / 255


def hole(height: int = 50, width: int = 60, top: int = 20) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, top : top + 13, top + 5 : top + 21] = 1
    return mask


@pytest.mark.parametrize("crop", ["picture", "hole"])
def test_completion_keeps_known_pixels_at_full_size(model, crop):
    image, mask = picture(), hole()
    done = complete(model, image, mask, crop)
    kept = (mask < 0.5).expand_as(image)
    assert torch.equal(done.image[kept], image[kept]) and torch.equal(done.coarse[kept], image[kept])
    assert not torch.equal(done.image, image)
    assert done.image.min() >= 0 and done.image.max() <= 1


def test_a_picture_that_is_no_face_is_said_to_be_none(model):
    warnings = complete(model, picture(), hole()).warnings
    assert any("does not look like an aligned face" in warning for warning in warnings)


def test_crop_is_inside_and_around_the_hole():
    assert crop_box(hole(), "picture") == (0, 0, 60, 50)
    left, top, width, height = crop_box(hole(), "hole")
    assert width == height == 32 and left <= 25 and left + width >= 41 and top <= 20 and top + height >= 33
    corner = torch.zeros(1, 50, 60)
    corner[:, :6, 54:] = 1
    assert crop_box(corner, "hole") == (48, 0, 12, 12)
    wide = torch.zeros(1, 50, 60)
    wide[:, 10:12] = 1
    assert crop_box(wide, "hole") == (0, 0, 60, 50)


def test_empty_full_and_inverted_masks(model, caplog):
    image = picture()
    empty = complete(model, image, torch.zeros(1, 50, 60))
    assert torch.equal(empty.image, image) and "empty" in empty.warnings[0]
    full = complete(model, image, torch.ones(1, 50, 60))
    assert full.image.isfinite().all() and "whole picture" in full.warnings[0]
    assert not any("inverted" in warning for warning in full.warnings)
    inverted = complete(model, image, 1 - hole())
    assert any("look inverted" in warning for warning in inverted.warnings)
    assert not any("look inverted" in warning for warning in complete(model, image, hole()).warnings)
    assert not caplog.text  # predict.py and the page print the warnings: each is said once


def save(path: Path, image: torch.Tensor) -> str:
    write_image(path, image)
    return str(path)


def run_predict(run_folder: Path, tmp_path: Path, **options) -> dict:
    config = predict.PredictConfig(
        run=run_folder, data="faces", variant="full", out=tmp_path / "out", **options
    )
    predict.main(replace(config, device="cpu"))
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_predict_writes_pictures_attention_and_slots(run_folder, tmp_path):
    face, mask = save(tmp_path / "f.png", picture()), save(tmp_path / "m.png", hole())
    done = script(
        "predict.py", face, "--mask", mask, "--run", str(run_folder), "--out", str(tmp_path / "out"),
        "--variant", "full", "--pixel", "30", "25", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("completed.png", "coarse.png", "parsing.png", "sheet.png", "attention.png", "result.json")
    }
    kept = (hole() < 0.5).expand(3, -1, -1)
    assert torch.equal(read_image(tmp_path / "out" / "completed.png")[kept], picture()[kept])
    assert Image.open(tmp_path / "out" / "completed.png").info["DigitalSourceType"]
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [entry["part"] for entry in record["slots"]][1] == "skin" and len(record["slots"]) == 8
    assert record["hole_ratio"] == pytest.approx(13 * 16 / 3000)


def test_masks_of_other_sizes_and_polarity(run_folder, tmp_path):
    face = Path(save(tmp_path / "f.png", picture()))
    double = hole().repeat_interleave(2, 1).repeat_interleave(2, 2)
    record = run_predict(run_folder, tmp_path, picture=face, mask=Path(save(tmp_path / "m.png", double)))
    assert any("scaled from 120x100" in warning for warning in record["warnings"])
    assert record["hole_ratio"] == pytest.approx(13 * 16 / 3000)
    square = Path(save(tmp_path / "s.png", torch.zeros(1, 50, 50)))
    with pytest.raises(UserError, match="50x50 and the picture 60x50"):
        run_predict(run_folder, tmp_path, picture=face, mask=square)
    black = Path(save(tmp_path / "b.png", 1 - hole()))
    record = run_predict(run_folder, tmp_path, picture=face, mask=black)
    assert any("look inverted" in warning for warning in record["warnings"])
    record = run_predict(run_folder, tmp_path, picture=face, mask=black, mask_polarity="black-hole")
    assert record["hole_ratio"] == pytest.approx(13 * 16 / 3000)


def test_grey_transparent_and_damaged_pictures(run_folder, tmp_path):
    mask = Path(save(tmp_path / "m.png", hole()))
    grey = Path(save(tmp_path / "g.png", picture()[:1]))
    record = run_predict(run_folder, tmp_path, picture=grey, mask=mask)
    assert any("grey" in warning for warning in record["warnings"])
    clear = Image.new("RGBA", (60, 50), (255, 0, 0, 0))
    clear.save(tmp_path / "c.png")
    record = run_predict(run_folder, tmp_path, picture=tmp_path / "c.png", mask=mask)
    assert any("transparent" in warning for warning in record["warnings"])
    assert read_image(tmp_path / "out" / "completed.png")[:, 0, 0].tolist() == [1, 1, 1]
    (tmp_path / "d.png").write_bytes(grey.read_bytes()[:60])
    with pytest.raises(UserError, match="d.png"):
        run_predict(run_folder, tmp_path, picture=tmp_path / "d.png", mask=mask)


def test_a_completed_picture_is_not_replaced_by_what_is_made_of_it(run_folder, tmp_path):
    face, mask = (
        Path(save(tmp_path / "out" / f"{n}.png", x)) for n, x in (("sheet", picture()), ("m", hole()))
    )
    before = face.read_bytes()
    with pytest.raises(UserError, match="sheet.png would be overwritten by a result: give another --out"):
        run_predict(run_folder, tmp_path, picture=face, mask=mask)
    assert face.read_bytes() == before and not (tmp_path / "out" / "completed.png").exists()


def test_an_empty_mask_returns_the_picture_unmarked(run_folder, tmp_path):
    face, mask = Path(save(tmp_path / "f.png", picture())), Path(save(tmp_path / "m.png", 0 * hole()))
    record = run_predict(run_folder, tmp_path, picture=face, mask=mask)
    assert record["hole_ratio"] == 0 and any("empty" in warning for warning in record["warnings"])
    assert torch.equal(read_image(tmp_path / "out" / "completed.png"), picture())
    assert "DigitalSourceType" not in Image.open(tmp_path / "out" / "completed.png").info


def test_the_page_lays_transparent_pictures_on_white():
    array = np.zeros((2, 2, 4), np.uint8)
    array[0, :, :3], array[0, :, 3] = 100, 255
    assert to_tensor(array)[0].tolist() == [[pytest.approx(100 / 255)] * 2, [1, 1]]
    assert torch.equal(to_tensor(array[..., :3])[0, 1], torch.zeros(2))


def test_hiding_a_box_and_its_mistakes(run_folder, tmp_path):
    face = Path(save(tmp_path / "f.png", picture()))
    record = run_predict(run_folder, tmp_path, picture=face, hide="box", box=(5, 6, 10, 8))
    assert record["hole_ratio"] == pytest.approx(80 / 3000)
    assert run_predict(run_folder, tmp_path, picture=face, hide="box")["hole_ratio"] > 0.1
    with pytest.raises(UserError, match="not inside"):
        run_predict(run_folder, tmp_path, picture=face, hide="box", box=(55, 6, 10, 8))
    with pytest.raises(UserError, match="either --mask"):
        run_predict(run_folder, tmp_path, picture=face)
    with pytest.raises(UserError, match="not in the hole"):
        run_predict(run_folder, tmp_path, picture=face, hide="box", box=(5, 6, 10, 8), pixel=(50, 40))


def test_hiding_glasses_takes_both_eyes_though_skin_is_more_probable(model):
    probable = torch.full((1, 8, 8, 8), 0.01)
    skin, eyes, hair = (model.parts.index(name) for name in ("skin", "eyes", "hair"))
    probable[:, skin], probable[:, hair, :2] = 0.6, 0.8
    probable[:, eyes, 4, 2], probable[:, eyes, 4, 6] = 0.3, 0.1
    net = SimpleNamespace(parser=lambda x, cells: probable, stride=2)
    small = Model(net, model.parts, 16, "test", torch.device("cpu"))
    glasses = hiding_mask(small, picture(16, 16), "glasses", None)
    assert glasses[0, 8, 5] == glasses[0, 8, 13] == 1 and glasses[0, :6].sum() == glasses[0, 12:].sum() == 0
    hat = hiding_mask(small, picture(16, 16), "hat", None)
    assert hat[0, :4].all() and not hat[0, 8:].any()


def test_a_folder_of_pictures_needs_a_mask_for_each(run_folder, tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.png", picture())
        save(tmp_path / "masks" / f"{name}.png", hole())
    config = predict.PredictConfig(
        picture=tmp_path / "in", mask=tmp_path / "masks", run=run_folder, out=tmp_path / "out", device="cpu"
    )
    predict.main(config)
    assert (tmp_path / "out" / "b" / "completed.png").is_file()
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(UserError, match="no mask b.png"):
        predict.main(config)


def test_pictures_of_one_name_in_two_folders_are_kept_apart(run_folder, tmp_path):
    for name in ("a/x.png", "b/x.png", "x.png"):
        save(tmp_path / "in" / name, picture())
    config = predict.PredictConfig(
        picture=tmp_path / "in", hide="box", run=run_folder, out=tmp_path / "out", device="cpu"
    )
    predict.main(config)
    for name in ("a/x", "b/x", "x"):
        assert (tmp_path / "out" / name / "completed.png").is_file()
    save(tmp_path / "in" / "x.jpg", picture())
    with pytest.raises(UserError, match="x.jpg and .*x.png: their results would have one name"):
        predict.main(config)


@pytest.mark.parametrize("options", [{}, {"order": "mrem>dmm"}, {"order": "parallel"}, {"routing": "hard"}])
def test_reported_slots_are_those_that_the_network_reads(options):
    torch.manual_seed(0)
    size = SIZES["unit"]
    net = MDRNet(CoarseNet(size), TinyParser(8), RefineNet(size, 8, **options), size.stride).eval()
    model = Model(net, tuple(GROUPS), 16, "test", torch.device("cpu"))
    done = complete(model, picture(16, 16), hole(16, 16, 4), seamless=False)
    asked = []
    net.refine.dmm.query.register_forward_hook(lambda layer, inputs, output: asked.append(inputs[0]))
    weights, slots = attention_of(model, done, (8, 8))
    assert len(asked) >= 2 and all(torch.equal(features, asked[0]) for features in asked)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(2))
    read = [sum(entry["slots"].values()) > 0 for entry in slots]
    assert sum(read) == (1 if options.get("routing") == "hard" else 8)


def test_one_slot_of_a_part_and_its_mistakes(run_folder, tmp_path, model):
    face = Path(save(tmp_path / "f.png", picture()))
    options = {"picture": face, "hide": "box"}
    before = model.net.refine.dmm.memory.clone()
    with predict.one_slot(model, "mouth", 2):
        changed, mouth = model.net.refine.dmm.memory.clone(), model.parts.index("mouth")
    assert torch.equal(changed[mouth], before[mouth, 2:3].expand_as(before[mouth]))
    changed[mouth] = before[mouth]
    assert torch.equal(changed, before) and torch.equal(model.net.refine.dmm.memory, before)
    run_predict(run_folder, tmp_path, **options, part="mouth", slot=2)
    seen = read_image(tmp_path / "out" / "completed.png")
    run_predict(run_folder, tmp_path, **options)
    assert not torch.equal(seen, read_image(tmp_path / "out" / "completed.png"))
    with pytest.raises(UserError, match="--slot is 0 to 3"):
        run_predict(run_folder, tmp_path, **options, part="mouth", slot=4)
    with pytest.raises(UserError, match="no finished network"):
        load_model(run_folder, "faces", "parallel", None, torch.device("cpu"))


def test_run_folder_is_reread_as_it_was_written(run_folder):
    config = load_config(run_folder, type(PRESETS["demo"]))
    assert config.data == ("simple", "faces") and config.variants == VARIANTS_HERE


def test_memory_view_shows_patches_of_every_part(run_folder):
    from mdrnets import memory_view

    config = memory_view.ViewConfig(run=run_folder, data="simple", variant="full", pictures=8, device="cpu")
    memory_view.main(config)
    record = json.loads((run_folder / "memory.json").read_text())
    assert len(record) == 6 and all(len(entry["most_used"]) == 4 for entry in record.values())
    assert (run_folder / "samples" / "memory.png").is_file()
    faces_of_run = replace(config, data="faces")
    model = load_model(run_folder, "faces", "full", None, torch.device("cpu"))
    pictures = open_pictures(load_config(run_folder, Config), "faces", "train", 0)
    patches, _ = memory_view.nearest_patches(model, pictures, faces_of_run)
    assert (patches.flatten(3).amax(-1) > 0).all()  # none left empty, of small parts neither
    with pytest.raises(UserError, match="no memory for each part"):
        memory_view.main(replace(config, variant="none"))


def test_exported_file_gives_what_the_network_gives(run_folder, tmp_path, model, caplog):
    from mdrnets import export

    config = export.ExportConfig(
        run=run_folder, data="faces", variant="full", out=tmp_path / "net.onnx", int8=True
    )
    with caplog.at_level(logging.WARNING):
        export.main(config)
    assert not caplog.messages
    image, mask = export.example(model.size, seed=5)
    (output,) = run_onnx(config.out, image=image, mask=mask)
    kept = (mask < 0.5).expand_as(image)
    assert torch.equal(output[kept], image[kept])
    with torch.no_grad():
        assert (output - model.net(image, mask)["output"]).abs().max() < 1e-3
    (small,) = run_onnx(tmp_path / "net.int8.onnx", image=image, mask=mask)
    assert (small - output).abs().mean() < 0.05


def test_networks_with_norms_are_exported(tmp_path):
    """The demo's have none."""
    from mdrnets import export

    torch.manual_seed(0)
    size = replace(SIZES["unit"], norm=True)
    net = MDRNet(CoarseNet(size), TinyParser(8), RefineNet(size, 8), size.stride).eval()
    model = Model(net, tuple(GROUPS), 16, "with norms", torch.device("cpu"))
    assert export.export(model, tmp_path / "net.onnx") < export.TOLERANCE


def test_an_exported_file_that_differs_is_not_kept(tmp_path, model, monkeypatch):
    from mdrnets import export

    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    (tmp_path / "net.onnx").write_text("the file of before")
    with pytest.raises(UserError, match="net.onnx: would differ from the network"):
        export.export(model, tmp_path / "net.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the file of before"]


def test_bench_compares_fast_and_plain_forms(tmp_path):
    arguments = ["--size", "unit", "--image-size", "32", "--seconds", "0.01", "--device", "cpu"]
    done = script("bench.py", *arguments, code=0, PAPERS_RUNS=str(tmp_path))
    assert all(f"{name}, forward and backward, fast:" in done.stdout for name in ("MREM", "DMM", "InCo2"))
    assert [done.stdout.count(f"x the memory of plain{end}") for end in ("\n", " fp32\n")] == [3, 2]
    rows = json.loads((tmp_path / "mdrnets" / "bench.json").read_text())["rows"]
    steps = {row["form"]: row for row in rows if row["what"] == "training step"}
    assert list(steps) == ["plain fp32", "fast fp32", "fast bf16"]
    priced = {row["what"] for row in rows if row.get("gmacs") and row["per_second"] > 0}
    networks = {"coarse network", "refinement network", "discriminator", "inference, all"}
    assert priced == networks | {"training step"}
