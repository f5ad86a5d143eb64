"""StyleGAN2 from NVIDIA's pickles, which are read without running them; hostile ones are refused."""

import collections
import io
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_anyface_weights import KEYS, same_weights
from torch import nn

from anyface.parts import small_generator
from anyface.stylegan2 import Generator
from anyface.weights import (
    load_generator,
    nvidia_to_rosinality,
    read_nvidia,
)
from shared.runtime import UserError


def nvidia_names(state):
    """rosinality's names and shapes -> NVIDIA's, written from the published rules the other way round."""
    out = {}
    for key, value in state.items():
        part = key.split(".")
        if part[0] == "style":
            out[f"mapping.fc{int(part[1]) - 1}.{part[2]}"] = value
            continue
        if key == "input.input":
            out["synthesis.b4.const"] = value[0]
            continue
        if part[0] == "noises":
            number = int(part[1].removeprefix("noise_"))
            level, layer = (2, "conv1") if number == 0 else ((number + 5) // 2, f"conv{(number + 5) % 2}")
            out[f"synthesis.b{2**level}.{layer}.noise_const"] = value[0, 0]
            continue
        if part[-1] == "kernel":
            continue
        if part[0] in ("convs", "to_rgbs"):
            index, rest = int(part[1]), ".".join(part[2:])
            level = 3 + (index // 2 if part[0] == "convs" else index)
            layer = f"conv{index % 2}" if part[0] == "convs" else "torgb"
        else:
            level, layer, rest = 2, "conv1" if part[0] == "conv1" else "torgb", ".".join(part[1:])
        name = {
            "conv.weight": "weight",
            "conv.modulation.weight": "affine.weight",
            "conv.modulation.bias": "affine.bias",
            "activate.bias": "bias",
            "noise.weight": "noise_strength",
            "bias": "bias",
        }[rest]
        if rest == "conv.weight":
            value = value[0]
        elif rest in ("bias", "noise.weight"):
            value = value.flatten() if rest == "bias" else value[0]
        out[f"synthesis.b{2**level}.{layer}.{name}"] = value
    return out


def test_nvidia_names_of_the_official_list():
    tensors = {
        name: torch.empty(shape, device="meta") for name, shape in KEYS["nvidia_generator_256"].items()
    }
    state = nvidia_to_rosinality(tensors, Path("ffhq.pkl"))
    assert state.pop("latent_avg").shape == (512,)
    wanted = {k: v for k, v in KEYS["stylegan2_generator_256"].items() if not k.endswith("kernel")}
    assert {k: list(v.shape) for k, v in state.items()} == wanted
    with pytest.raises(UserError, match="has no counterpart"):
        nvidia_to_rosinality({"synthesis.b4.skip.weight": torch.zeros(1)}, Path("x.pkl"))


@pytest.fixture
def nvidia_modules(monkeypatch):
    """The names that NVIDIA's pickles refer to, so that a file of their form can be written."""

    def reconstruct(meta):
        raise AssertionError("the loader must not call what the pickle names")

    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    reconstruct.__module__, reconstruct.__qualname__ = (
        "torch_utils.persistence",
        "_reconstruct_persistent_obj",
    )
    persistence._reconstruct_persistent_obj = reconstruct
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    util.EasyDict = easy
    for name, module in (
        ("torch_utils", types.ModuleType("torch_utils")),
        ("torch_utils.persistence", persistence),
        ("dnnlib", types.ModuleType("dnnlib")),
        ("dnnlib.util", util),
    ):
        monkeypatch.setitem(sys.modules, name, module)

    class Persistent:
        def __init__(self, class_name, parameters=None, buffers=None, modules=None, **attributes):
            ordered = collections.OrderedDict
            self.class_name = class_name
            self.state = {
                "_parameters": ordered((k, nn.Parameter(v)) for k, v in (parameters or {}).items()),
                "_buffers": ordered((buffers or {}).items()),
                "_modules": ordered((modules or {}).items()),
                "_non_persistent_buffers_set": set(),
                "_init_kwargs": easy(z_dim=16),
                "training": False,
                **attributes,
            }

        def __reduce__(self):
            meta = easy(
                type="class",
                version=6,
                module_src="raise SystemExit",
                class_name=self.class_name,
                state=self.state,
            )
            return reconstruct, (meta,)

    return Persistent


def tree(persistent, tensors, w_avg):
    """NVIDIA's module tree around the tensors: Generator, mapping and synthesis, blocks, layers, affines."""
    buffers = ("noise_const", "w_avg", "resample_filter")
    tensors = {**tensors, "mapping.w_avg": w_avg, "synthesis.b4.resample_filter": torch.ones(4, 4)}

    def build(name, level):
        own = {k: v for k, v in level.items() if "." not in k}
        inner: dict = {}
        for key, value in level.items():
            if "." in key:
                first, rest = key.split(".", 1)
                inner.setdefault(first, {})[rest] = value
        return persistent(
            name or "Generator",
            {k: v for k, v in own.items() if k not in buffers},
            {k: v for k, v in own.items() if k in buffers},
            {k: build(k, v) for k, v in inner.items()},
            img_resolution=32,
            scale=np.float64(0.5),
            c_dim=0,
        )

    return build("", tensors)


@pytest.mark.parametrize("protocol", [3, 4])
def test_nvidia_pickle_without_running_it(tmp_path, nvidia_modules, protocol):
    torch.manual_seed(0)
    network = Generator(32, 16, 2, channels={4: 8, 8: 8, 16: 6, 32: 4})
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("noise.weight"):
                p.fill_(0.1)
    w_avg = torch.randn(16)
    content = {
        "G": None,
        "D": None,
        "G_ema": tree(nvidia_modules, nvidia_names(network.state_dict()), w_avg),
        "training_set_kwargs": {"resolution": 32, "mean": np.arange(3.0)},
        "augment_pipe": None,
    }
    (tmp_path / "ffhq.pkl").write_bytes(pickle.dumps(content, protocol))
    loaded, mean = load_generator(tmp_path / "ffhq.pkl")
    assert same_weights(loaded, network)
    assert torch.equal(mean, w_avg.expand(1, 8, 16))
    codes = torch.randn(2, 8, 16)
    assert torch.equal(loaded.synthesis(codes), network.synthesis(codes))


def test_numpy_values_of_a_pickle_are_not_made(tmp_path, nvidia_modules):
    """Nothing needs them, and numpy builds arrays from what a pickle says of its memory."""
    network = small_generator(32)
    whole = tree(nvidia_modules, nvidia_names(network.state_dict()), torch.zeros(64))
    content = {"G_ema": whole, "training_set_kwargs": {"mean": np.arange(3.0), "scale": np.float64(2)}}
    (tmp_path / "ffhq.pkl").write_bytes(pickle.dumps(content, 4))
    entries = read_nvidia(tmp_path / "ffhq.pkl")
    made = [*entries["training_set_kwargs"].values(), entries["G_ema"].state["scale"]]
    assert not any(isinstance(value, np.ndarray | np.generic) for value in made)


def test_an_nvidia_pickle_of_odd_insides_is_a_message(tmp_path, nvidia_modules):
    for state in (None, {"_parameters": {}}, {"_parameters": {"w": 1}, "_buffers": {}, "_modules": {}}):
        whole = tree(nvidia_modules, nvidia_names(small_generator(32).state_dict()), torch.zeros(64))
        whole.state = state
        (tmp_path / "odd.pkl").write_bytes(pickle.dumps({"G_ema": whole}))
        with pytest.raises(UserError, match="odd.pkl: G_ema in it is no network"):
            load_generator(tmp_path / "odd.pkl")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('gone off')",)


def test_hostile_pickles_are_refused(tmp_path, nvidia_modules):
    mark = tmp_path / "mark"
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps({"G_ema": Bomb(mark)}))
    with pytest.raises(UserError, match=r"bomb.pkl: refused, the pickle asks for builtins.exec"):
        load_generator(tmp_path / "bomb.pkl")
    storage = pickle.dumps({"G_ema": 1})
    hidden = b"".join(
        [
            b"\x80\x02ctorch.storage\n_load_from_bytes\nB",
            len(storage).to_bytes(4, "little"),
            storage,
            b"\x85R.",
        ]
    )
    (tmp_path / "inner.pkl").write_bytes(hidden)
    with pytest.raises(UserError, match=r"inner.pkl"):
        read_nvidia(tmp_path / "inner.pkl")
    inner = io.BytesIO()
    torch.save(Bomb(mark), inner)
    nested = inner.getvalue()
    data = (
        b"\x80\x02ctorch.storage\n_load_from_bytes\nB"
        + len(nested).to_bytes(4, "little")
        + nested
        + b"\x85R."
    )
    (tmp_path / "nested.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"nested.pkl"):
        read_nvidia(tmp_path / "nested.pkl")
    torch.save({"g_ema": Bomb(mark)}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="refused"):
        load_generator(tmp_path / "bomb.pt")
    assert not mark.exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"G": 1}))
    with pytest.raises(UserError, match="no NVIDIA network pickle"):
        read_nvidia(tmp_path / "plain.pkl")
    labels = tree(nvidia_modules, nvidia_names(small_generator(32).state_dict()), torch.zeros(64))
    labels.state["c_dim"] = 10
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps({"G_ema": labels}))
    with pytest.raises(UserError, match="class labels"):
        load_generator(tmp_path / "labels.pkl")
