"""shared/: files of pretrained parts, whole, damaged, foreign and hostile."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared import weights
from shared.runtime import UserError


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_pickles_do_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"state": Hostile(trace)}, tmp_path / "new.pth")
    torch.save({"state": Hostile(trace)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with open(tmp_path / "plain.pkl", "wb") as file:
        pickle.dump(Hostile(trace), file)
    for name, load in [
        ("new.pth", weights.load_torch),
        ("old.pth", weights.load_torch),
        ("plain.pkl", weights.load_torch),
        ("plain.pkl", weights.load_pickle),
    ]:
        with pytest.raises(UserError, match=name) as refused:
            load(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # PyTorch's advice to run what is in the file
    assert not trace.exists()


def test_damaged_weights_are_named(tmp_path):
    torch.save({"a": torch.rand(100, 100)}, tmp_path / "whole.pth")
    save_file({"a": torch.rand(100, 100)}, tmp_path / "whole.safetensors")
    for whole in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / whole).read_bytes()
        for length in (0, 5, 300, len(content) - 100):
            cut = tmp_path / f"cut{length}{os.path.splitext(whole)[1]}"
            cut.write_bytes(content[:length])
            with pytest.raises(UserError, match=cut.name):
                weights.load_torch(cut)
    with pytest.raises(UserError, match="no such file"):
        weights.load_torch(tmp_path / "absent.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_files_with_wrong_bytes_are_named(tmp_path, form):
    """Bytes changed at random places: whatever the reader stumbles over, it is one message."""
    path, rng = tmp_path / "changed.pth", np.random.default_rng(0)
    state = {"model": {"a.weight": torch.rand(4, 4), "b": torch.rand(3)}, "epoch": 3, "names": ["x", None]}
    if form == "pickle":
        path.write_bytes(pickle.dumps(([b"abc" * 30] * 3, [True, False], {"a": 1.5, "b": ("x", 2**70)})))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    load = weights.load_pickle if form == "pickle" else weights.load_torch
    whole, named = path.read_bytes(), 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 1500))] = rng.integers(256)
        path.write_bytes(content)
        try:
            load(path)
        except UserError as error:
            assert path.name in str(error)
            named += 1
    assert named > 50


def test_restricted_pickle_loads_what_is_allowed(tmp_path):
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump((np.arange(4), ["x"]), file)
    names = {
        "numpy.dtype",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.numeric._frombuffer",
    }
    array, words = weights.load_pickle(tmp_path / "a.pkl", names)
    assert array.tolist() == [0, 1, 2, 3] and words == ["x"]
    with pytest.raises(UserError, match="refused, the pickle asks for numpy"):
        weights.load_pickle(tmp_path / "a.pkl")


def test_state_of_another_model_is_described():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    weights.load_state(target, {f"module.{k}": v for k, v in source.state_dict().items()}, "x.pth")
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(
        UserError, match=r"x.pth: made for another model than Linear: weight has shape \(2, 4\)"
    ):
        weights.load_state(target, nn.Linear(4, 2).state_dict(), "x.pth")
    with pytest.raises(UserError, match="bias is missing; other is unexpected"):
        weights.load_state(target, {"weight": torch.zeros(2, 3), "other": torch.zeros(1)}, "x.pth")
    with pytest.raises(UserError, match="no state dict"):
        weights.load_state(target, {"weight": 3}, "x.pth")


def test_numbers_of_another_type():
    """Half precision is read; whole numbers for weights, or weights for a counter, are another model's. A run
    that goes on needs its own precision, or it would end with other numbers."""
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.uniform_(source.weight)
    state = source.state_dict()
    weights.load_state(
        target, {name: v.half() if v.is_floating_point() else v for name, v in state.items()}, "x"
    )
    assert torch.allclose(target.weight, source.weight, atol=1e-3)
    whole, counted = state | {"weight": torch.ones(2, dtype=torch.int64)}, "num_batches_tracked"
    with pytest.raises(UserError, match="x: made for another model .*weight holds int64 instead of float32"):
        weights.load_state(target, whole, "x")
    with pytest.raises(UserError, match=f"{counted} holds float32 instead of int64"):
        weights.load_state(target, state | {counted: torch.tensor(1.5)}, "x")
    with pytest.raises(UserError, match="weight holds float64 instead of float32"):
        weights.load_state(target, state | {"weight": torch.ones(2).double()}, "x", exact=True)


def test_pretrained_parts_have_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="Thing: weights needed; give --thing"):
        weights.pretrained_path("Thing", None, "give --thing")
    with pytest.raises(UserError, match="Thing: no file .*absent.pth; give --thing"):
        weights.pretrained_path("Thing", tmp_path / "absent.pth", "give --thing")

    def offline():
        raise OSError("no network")

    with pytest.raises(UserError, match="could not be downloaded .no network.; give --thing"):
        weights.pretrained_path("Thing", None, "give --thing", offline)
