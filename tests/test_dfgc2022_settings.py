"""DFGC 2022: mistakes on the command line and in settings, each of which is one message."""

import dataclasses
import re
from pathlib import Path

import helpers
import pytest
import torch

from dfgc2022 import eval as evaluation
from dfgc2022 import export, extract, model, predict, train, vra
from dfgc2022.world import Size, build_world
from shared.runtime import UserError, parse, parse_presets


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: train.train(train.Config(lists=(Path("absent.txt"),), out=out)), "absent.txt"),
        (lambda out: train.train(train.Config(members=("nobody",), out=out)), "unknown member"),
        *(
            (lambda out, change=change: train.train(demo(out, **change)), message)
            for change, message in (
                ({"train_creators": "single"}, "--train-creators: diverse-swin sets it to diverse"),
                ({"detector": "convnext_tiny"}, "--detector: diverse-swin sets it to swin_micro"),
                ({"lr": 9.0}, "--lr: diverse-swin sets it to 0.001"),
                ({"preset": "study", "members": ("one-frame",), "frames_per_video": 2}, "sets it to 1"),
            )
        ),
        *(
            (
                lambda out, name=name: train.train(
                    dataclasses.replace(train.PRESETS[name], preset=name, out=out)
                ),
                f"{name} trains on public sets: give --lists",
            )
            for name in ("paper", "paper-swin", "xception21", "winner21")
        ),
        *(
            (lambda out, given=given: evaluation.main(evaluation.Config(**given)), "needs --dfgc")
            for given in ({"preds": (Path("a.txt"),)}, {"out": Path("o")}, {"boxes": "skin"}, {"every": 5})
        ),
        (lambda out: evaluation.main(evaluation.Config(dfgc=out, preds=(Path("a.txt"),))), "Meta.csv"),
        (lambda out: predict.main(predict.Config(out / "absent.mp4")), "absent.mp4"),
        (lambda out: extract.main(extract.Config(out / "absent", out)), "absent"),
        (lambda out: export.main(export.Config(out, official="xception_dfgc21_baseline")), "--weights"),
        (lambda out: export.main(export.Config(out.parent)), "a folder; --out is the file to write"),
        (lambda out: build_world(out, 0, Size(pixels=33)), "--world.pixels 33: give an even number"),
    ],
)
def test_mistakes_get_one_message(call, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call(tmp_path / "run")


def demo(out, **change):
    return dataclasses.replace(train.PRESETS["demo"], **{"preset": "demo", "out": out, **change})


@pytest.mark.parametrize(
    ("script", "given"),
    [
        *((train, f"demo --{name} 0") for name in (
            "log-every", "checkpoint-every", "val-every", "batch-size", "decay-steps", "frames-per-video",
            "steps", "epochs", "samples-per-video", "size", "world.train", "world.test", "world.keys", "lr",
        )),
        *((train, f"demo --{name} -1") for name in (
            "batch-size", "frames-per-video", "keep-every", "blending", "weight-decay", "world.gap",
        )),
        (train, "demo --lr nan"),
        (train, "demo --val-share 1"),
        (train, "demo --adversarial 2"),
        (train, "demo --world.pixels 8"),
        *((evaluation, f"--{name} -1") for name in ("draws", "every", "workers")),
        (evaluation, "--draws 0"),
        (predict, "--input a --every 0"),
        (predict, "--input a --workers -1"),
        (extract, "--videos a --out b --every 0"),
        (vra, "--root a --every 0"),
    ],
)  # fmt: skip
def test_numbers_out_of_their_range(script, given):
    *_, name, value = given.split()
    read = parse_presets if script is train else parse
    settings = train.PRESETS if script is train else script.Config
    with pytest.raises(UserError, match=f"^{re.escape(name)} {re.escape(value)}.*: give "):
        read(settings, "", given.split())


@pytest.mark.parametrize(
    ("detector", "size", "fits"),
    [
        ("swin_micro", 48, True),
        ("timm/vit_tiny_patch16_224", 32, True),
        ("convnext_micro", 7, False),
        ("timm/vit_tiny_patch16_224", 7, False),
    ],
)
def test_another_side_of_the_input(detector, size, fits):
    entry = model.detector(detector)
    if fits:
        assert entry.at(size)(torch.zeros(1, 3, size, size)).shape == (1, 2)
    else:
        with pytest.raises(UserError, match=f"--size {size}: the detector takes no such side"):
            entry.at(size)


def test_a_missing_weight_file_leaves_no_folder(tmp_path):
    clip, out = tmp_path / "a.mp4", tmp_path / "out"
    clip.write_bytes(b"x")
    given = {"official": ("xception_dfgc21_baseline",), "weights": (tmp_path / "absent.pth",)}
    with pytest.raises(UserError, match="absent.pth: no such file"):
        predict.main(predict.Config(clip, out, **given))
    assert not out.exists()


def test_a_mistake_on_the_command_line_exits_with_2(tmp_path):
    arguments = ("train.py", "demo", "--members", "nobody", "--out", tmp_path / "x")
    result = helpers.script("dfgc2022", *arguments, code=2)
    assert result.stderr.startswith("error: unknown member") and "Traceback" not in result.stderr
