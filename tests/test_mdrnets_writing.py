"""MDRNets: what `ema` writes, and what the parser sees in clean pictures, kept on disk."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mdrnets import datasets
from mdrnets.datasets import picture_folder
from mdrnets.parser import BiSeNetParser
from mdrnets.train import PRESETS, train
from mdrnets.writing import ParsedParts
from shared.bisenet import BiSeNet
from shared.runtime import parse_presets

SIDE, CELLS = 16, (8, 8)
WHICH = [(0, False), (1, False), (0, True)]


class Counting(nn.Module):
    """A parser that counts the pictures it is shown."""

    def __init__(self):
        super().__init__()
        self.network, self.shown = nn.Conv2d(3, 8, 2, 2), 0

    def forward(self, x, cells):
        self.shown += len(x)
        return self.network(x)


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (20, 20, 3))
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    for i in range(4):
        save(tmp_path / "data" / f"{i}.png", i)
    return picture_folder(tmp_path / "data", SIDE, "train")


@pytest.fixture
def x(pictures):
    loaded = [pictures.load(i)[0] * 2 - 1 for i, _ in WHICH]
    return torch.stack(
        [image.flip(-1) if flip else image for image, (_, flip) in zip(loaded, WHICH, strict=True)]
    )


@pytest.fixture
def parser():
    torch.manual_seed(0)
    return Counting()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_the_parser_sees_is_computed_once_and_is_what_it_is_without_a_folder(
    tmp_path, pictures, parser, x
):
    expected = ParsedParts(parser, pictures, CELLS, None)(x, WHICH)
    assert len(expected.unique()) > 3 and not torch.equal(expected[0], expected[2])
    for shown in (3, 0):  # the second time another run reads it
        parser.shown = 0
        parsed = ParsedParts(parser, pictures, CELLS, tmp_path / "kept")
        assert torch.equal(parsed(x, WHICH), expected) and parser.shown == shown
    more = torch.cat((x, (pictures.load(2)[0] * 2 - 1)[None]))
    expected = ParsedParts(parser, pictures, CELLS, None)(more, [])
    parser.shown = 0
    assert torch.equal(parsed(more, [*WHICH, (2, False)]), expected) and parser.shown == 1
    assert len(files(tmp_path / "kept")) == 4


def test_another_picture_parser_or_precision_is_not_taken_for_what_is_kept(tmp_path, pictures, parser, x):
    def shown(circumstances: str = "", cells: tuple[int, int] = CELLS, size: int = SIDE) -> int:
        before = parser.shown
        source = picture_folder(tmp_path / "data", size, "train")
        ParsedParts(parser, source, cells, tmp_path / "kept", circumstances)(x, WHICH)
        return parser.shown - before

    assert (shown(), shown()) == (3, 0)
    assert shown("bf16") == 3 and shown(size=32) == 3 and shown(cells=(4, 16)) == 3
    save(tmp_path / "data" / "1.png", 99)  # another picture under an old name
    assert (shown(), shown()) == (1, 0)
    about = (tmp_path / "data" / "0.png").stat()
    os.utime(tmp_path / "data" / "0.png", ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert (shown(), shown()) == (2, 0)  # as it is, and mirrored
    with torch.no_grad():
        parser.network.bias[0] += 1
    assert (shown(), shown()) == (3, 0)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:20] + b"?" + b[21:]]
)
def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path, pictures, parser, x, caplog, damage):
    parsed = ParsedParts(parser, pictures, CELLS, tmp_path / "kept")
    expected, before = parsed(x, WHICH), {path: path.read_bytes() for path in files(tmp_path / "kept")}
    broken = next(iter(before))
    broken.write_bytes(damage(before[broken]))
    parser.shown = 0
    assert torch.equal(parsed(x, WHICH), expected) and parser.shown == 1
    assert caplog.text.count("computed again") == 1 and str(broken) in caplog.text
    assert {path: path.read_bytes() for path in files(tmp_path / "kept")} == before


def test_a_full_disk_costs_the_cache_and_not_the_training(tmp_path, pictures, parser, x, caplog, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(Path, "replace", full)
    parsed = ParsedParts(parser, pictures, CELLS, tmp_path / "kept")
    expected = ParsedParts(parser, pictures, CELLS, None)(x, WHICH)
    for _ in range(2):
        assert torch.equal(parsed(x, WHICH), expected)
    assert caplog.text.count("No space left on device") == 1 and "training goes on" in caplog.text
    assert files(tmp_path / "kept") == []  # nor half of a file


def test_a_folder_that_cannot_be_made_is_said(tmp_path, pictures, parser, x, caplog):
    (tmp_path / "kept").write_text("a file")
    ParsedParts(parser, pictures, CELLS, tmp_path / "kept")(x, WHICH)
    assert caplog.text.count("cannot be written") == 1


@pytest.fixture
def config(tmp_path, pictures):
    torch.manual_seed(0)
    torch.save(BiSeNet().state_dict(), tmp_path / "79999_iter.pth")
    options = [*helpers.TINY["mdrnets"], "--device", "cpu"]
    return replace(
        parse_presets(PRESETS, "", ["demo", *options]), data=("folder",), data_root=tmp_path / "data",
        parser="bisenet", parser_weights=tmp_path / "79999_iter.pth", parser_size=32, features="random",
        variants=("disentangled-ema",), copy_steps=0, unet=False, flip=True, batch_size=2, coarse_steps=1,
        parsing_cache_root=tmp_path / "kept", checkpoint_every=100, sample_every=100,
    )  # fmt: skip


def test_training_with_and_without_the_cache_learns_the_same(tmp_path, config, monkeypatch):
    seen, forward = [], BiSeNetParser.forward
    monkeypatch.setattr(
        BiSeNetParser, "forward", lambda self, *a: seen.append(len(a[0])) or forward(self, *a)
    )
    runs, parsed = {}, {}
    for name, cache in (("none", False), ("cold", True), ("warm", True)):
        seen.clear()
        folder = train(replace(config, out=tmp_path / name, parsing_cache=cache))
        runs[name], parsed[name] = (
            load_file(folder / "trained" / "folder-disentangled-ema-0.safetensors"),
            sum(seen),
        )
        if name == "none":
            assert not (tmp_path / "kept").exists()
    assert parsed["none"] > parsed["cold"] > parsed["warm"]
    kept = [path.stat().st_mtime_ns for path in files(tmp_path / "kept")]
    assert 1 <= len(kept) <= 6  # three pictures, as they are and mirrored
    for key, value in runs["none"].items():
        assert torch.equal(value, runs["cold"][key]) and torch.equal(value, runs["warm"][key]), key


def test_labels_are_read_where_they_are_needed_alone(tmp_path, config, monkeypatch):
    for i in range(4):
        save(tmp_path / "celeba" / "CelebA-HQ-img" / f"{i}.jpg", i)
        part = np.zeros((512, 512), np.uint8)
        part[100:400, 100:400] = 255
        path = tmp_path / "celeba" / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_skin.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part).save(path)
    read, whole = [], datasets.read_annotation
    monkeypatch.setattr(datasets, "read_annotation", lambda *a: read.append(a) or whole(*a))
    config = replace(config, data=("celeba-hq",), data_root=tmp_path / "celeba")
    train(replace(config, out=tmp_path / "a", variants=("full",)))
    assert read == []
    train(replace(config, out=tmp_path / "b"))
    assert len(read) == config.batch_size * config.refine_steps
    assert not (tmp_path / "kept").exists()  # the labels say it
