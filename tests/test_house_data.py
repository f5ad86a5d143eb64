"""Data sets of all papers in their public layouts (`layouts.py`): files damaged at random places, pictures of
other kinds, folders that may only be read, names beyond ASCII. What cannot be read is named, and nothing is
written."""

import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from PIL import Image

from shared.report import PAPERS
from shared.runtime import UserError

TEXT = (".txt", ".csv", ".json", ".flist")
"""A list that is cut may still be one; everything else that is damaged must be refused."""


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def state_of(root: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, path.stat()) for path in (root, *root.rglob("*")))
    return {path: (about.st_mtime_ns, about.st_size) for path, about in found}


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "Größe 雪 data"


@pytest.mark.parametrize("name", LAYOUTS)
def test_reading_leaves_a_folder_that_may_only_be_read_as_it_is(name, data):
    """For a superuser, who may write everywhere, it is the folder's state that says so."""
    LAYOUTS[name].make(data)
    before = LAYOUTS[name].read(data)
    assert len(before) and all(value.numel() for value in before)
    for path in (data, *data.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    state = state_of(data)
    try:
        after = LAYOUTS[name].read(data)
        assert state_of(data) == state
    finally:
        for path in (data, *data.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_files_at_random_places(name, data):
    """One file after the other, emptied, cut, or overwritten with noise."""
    LAYOUTS[name].make(data)
    LAYOUTS[name].read(data)
    rng = random.Random(name)
    files = [path for path in files_of(data) if path.suffix != ".mp4"]  # not decoded by a data set
    for path in rng.sample(files, min(len(files), 10)):
        whole = path.read_bytes()
        noise = bytes([255, 254, 0]) + rng.randbytes(len(whole))
        damages = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": noise}
        if path.suffix == ".json":
            damages["other JSON"] = b"[[1], {}]"
        for kind, content in damages.items():
            path.write_bytes(content)
            try:
                LAYOUTS[name].read(data)
            except UserError as error:
                named = path.name in str(error) or path.stem in str(error)
                assert named or path.suffix in TEXT, f"{kind} {path.name}: {error}"
            else:
                assert path.suffix in TEXT and kind != "noise", f"{kind} {path.name}: read all the same"
        path.write_bytes(whole)
    LAYOUTS[name].read(data)


MODES = {".png": ("L", "RGBA", "P", "I;16", "1"), ".jpg": ("L", "CMYK"), ".JPG": ("L", "CMYK")}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("pin, bin", "dfl, MNIST")])
def test_pictures_of_other_kinds(name, data):
    """Grey, transparent, with a palette, 16 bits, CMYK: read to the same shapes and types, or refused by
    name."""
    LAYOUTS[name].make(data)
    before = LAYOUTS[name].read(data)
    rng = random.Random(name)
    pictures = [path for path in files_of(data) if path.suffix in MODES]
    for path in rng.sample(pictures, min(len(pictures), 6)):
        whole = path.read_bytes()
        for mode in MODES[path.suffix]:
            with Image.open(path) as opened:
                if mode == "I;16":
                    changed = Image.fromarray(np.asarray(opened.convert("L")).astype(np.uint16) * 257)
                else:
                    changed = opened.convert(mode)
            changed.save(path)
            try:
                after = LAYOUTS[name].read(data)
            except UserError as error:
                assert path.name in str(error), f"{mode} {path.name}: {error}"
            else:
                assert [(v.shape, v.dtype) for v in after] == [(v.shape, v.dtype) for v in before], mode
            path.write_bytes(whole)


def test_every_paper_with_data_of_its_own_is_here():
    assert {name.split(",")[0] for name in LAYOUTS} == set(PAPERS)
