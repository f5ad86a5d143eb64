"""Loaders of released files, on small files of the same formats written here."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anyface import bundle, model, weights
from anyface.bundle import Model, load_model, load_plus_plus, save_model
from anyface.clip import BPETokenizer, build_clip
from anyface.encoder import E4E
from anyface.lightcnn import LightCNN9, LightCNN29v2
from anyface.model import CANet, FlatMapper, Stream
from anyface.parts import small_clip, small_generator
from anyface.stylegan2 import Discriminator, Generator
from anyface.weights import (
    clip_state,
    load_clip,
    load_e4e,
    load_generator,
    load_light_cnn,
    load_memory,
    load_release,
)
from shared.runtime import REPOSITORY, UserError

KEYS = json.loads((REPOSITORY / "anyface" / "keys.json").read_text())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- StyleGAN2 ------------------------------------------------------------------------------------


def test_rosinality_file_with_and_without_filters(tmp_path):
    torch.manual_seed(0)
    network = small_generator(32)
    state = network.state_dict()
    mean = torch.randn(64)
    torch.save({"g_ema": state, "g": state, "latent_avg": mean}, tmp_path / "full.pt")
    bare = {key: value for key, value in state.items() if not key.endswith("kernel")}
    torch.save({"g_ema": bare, "latent_avg": mean}, tmp_path / "bare.pt")
    for name in ("full.pt", "bare.pt"):
        loaded, center = load_generator(tmp_path / name)
        # The learning-rate multiplier of the mapping is no weight: the file's is the official 0.01.
        assert same_weights(loaded, network) and loaded.size == 32 and not loaded.training
        assert torch.equal(center, mean.expand(1, 8, 64))
    torch.save(state, tmp_path / "plain.pt")
    assert load_generator(tmp_path / "plain.pt")[1].shape == (1, 8, 64)


def test_rosinality_file_of_something_else(tmp_path):
    torch.save({"g_ema": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt: no StyleGAN2 generator"):
        load_generator(tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(UserError, match="damaged.pt"):
        load_generator(tmp_path / "damaged.pt")
    with pytest.raises(UserError, match="no such file"):
        load_generator(tmp_path / "absent.pt")
    state = small_generator(32).state_dict()
    state["to_rgb1.bias"] = torch.zeros(1, 4, 1, 1)
    torch.save(state, tmp_path / "shape.pt")
    with pytest.raises(UserError, match=r"to_rgb1.bias has shape \(1, 4, 1, 1\)"):
        load_generator(tmp_path / "shape.pt")


# --- CLIP -----------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A TorchScript archive as OpenAI publishes them: CLIP's parameters and three notes, in half."""

    def __init__(self, state):
        super().__init__()
        self.names = list(state)
        self.holder = nn.Module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def as_archive(state, path):
    """Nested modules that hold the parameters by their names, scripted and saved."""
    root = Scripted(state)
    del root.holder
    for key, value in state.items():
        *parents, leaf = key.split(".")
        place = root
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        if value.is_floating_point():
            place.register_parameter(leaf, nn.Parameter(value.half()))
        else:
            place.register_buffer(leaf, value)
    torch.jit.script(root).save(str(path))


@pytest.fixture(scope="module")
def tiny_openai():
    torch.manual_seed(0)
    return build_clip(16, 16, 1, 64, 8, 12, 50, 64, 1, 1)


def test_clip_files(tmp_path, tiny_openai):
    state = tiny_openai.state_dict()
    torch.save(state, tmp_path / "open_clip.pt")
    loaded = load_clip(tmp_path / "open_clip.pt")
    assert same_weights(loaded, tiny_openai) and loaded.sizes["image_resolution"] == 16
    notes = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(12)}
    as_archive({**state, **notes, "vocab_size": torch.tensor(50)}, tmp_path / "ViT.pt")
    assert clip_state(tmp_path / "ViT.pt").keys() == state.keys()
    half = load_clip(tmp_path / "ViT.pt")
    assert half.logit_scale.dtype == torch.float32
    assert torch.equal(half.token_embedding.weight, tiny_openai.token_embedding.weight.half().float())
    # What is called safetensors is read as safetensors, never as an archive of code.
    save_file(state, tmp_path / "clip.safetensors")
    assert same_weights(load_clip(tmp_path / "clip.safetensors"), tiny_openai)
    (tmp_path / "archive.safetensors").write_bytes((tmp_path / "ViT.pt").read_bytes())
    with pytest.raises(UserError, match=r"archive.safetensors: truncated or not a checkpoint"):
        load_clip(tmp_path / "archive.safetensors")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"resnet.pt: no CLIP with a vision transformer"):
        load_clip(tmp_path / "resnet.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ViT.pt").read_bytes()[:2000])
    with pytest.raises(UserError, match="cut.pt"):
        load_clip(tmp_path / "cut.pt")
    with pytest.raises(UserError, match="no such file"):
        load_clip(tmp_path / "absent.pt")


# --- other official files -------------------------------------------------------------------------


def small_official(monkeypatch, name, build):
    monkeypatch.setitem(model.OFFICIAL, name, build)


def test_load_official_takes_the_release_apart(tmp_path, monkeypatch):
    """iteration_N.pt: one dict with three networks under prefixes, and the options."""
    torch.manual_seed(0)
    parts = {
        "T_map": Stream(16, (2,), 4, 8, 1, 2, 16),
        "I_map": FlatMapper(24, 1, 512, 2),
        "CA_NET": CANet(8, 8, 2),
    }
    state = {f"{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}
    torch.save({"state_dict": state, "opts": {"lr": 0.5}}, tmp_path / "iteration_1.pt")
    small_official(monkeypatch, "anyface_T_map", lambda: Stream(16, (2,), 4, 8, 1, 2, 16))
    small_official(monkeypatch, "anyfacepp_CA_NET", lambda: CANet(8, 8, 2))
    loaded = model.load_official("anyface_T_map", tmp_path / "iteration_1.pt")
    assert same_weights(loaded, parts["T_map"]) and not loaded.training
    assert same_weights(model.load_official("anyfacepp_CA_NET", tmp_path / "iteration_1.pt"), parts["CA_NET"])
    mapper = load_release(tmp_path / "iteration_1.pt")
    assert same_weights(mapper, parts["I_map"]) and mapper.n_latent == 1
    small_official(monkeypatch, "anyface_T_map", lambda: Stream(16, (2,), 4, 8, 2, 2, 16))
    with pytest.raises(UserError, match="transformer_encoder.layers.1.*is missing"):
        model.load_official("anyface_T_map", tmp_path / "iteration_1.pt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="no AnyFace"):
        load_release(tmp_path / "empty.pt")
    half = load_release(tmp_path / "iteration_1.pt", bf16=True)
    h = torch.randn(2, 3, 8)
    assert half.mapping[0].weight.dtype == torch.bfloat16 and half(h).dtype == torch.float32
    assert (half(h) - mapper(h)).abs().max() < 0.03 * mapper(h).abs().max()
    # A file of another network with layers of the same names.
    torch.save(Stream(512, (1,), 4, 512, 1, 2, 16).state_dict(), tmp_path / "stream.pt")
    with pytest.raises(UserError, match="stream.pt: no AnyFace.. checkpoint .its I_map is more than"):
        load_release(tmp_path / "stream.pt")


@pytest.mark.parametrize("newer", [True, False])
def test_the_release_is_mapped_into_memory_where_its_form_allows_it(tmp_path, monkeypatch, newer):
    state = {"state_dict": {"I_map.mapping.0.weight": torch.randn(512, 24)}}
    state["state_dict"]["I_map.mapping.0.bias"] = torch.randn(512)
    torch.save(state, tmp_path / "iteration.pt", _use_new_zipfile_serialization=newer)
    mapped, plain = [], torch.load

    def noted(*given, mmap=None, **options):
        mapped.append(mmap)
        return plain(*given, mmap=mmap, **options)

    monkeypatch.setattr(torch, "load", noted)
    mapper = load_release(tmp_path / "iteration.pt")
    assert torch.equal(mapper.mapping[0].weight, state["state_dict"]["I_map.mapping.0.weight"])
    assert mapped == [newer]


def test_files_of_something_else_are_messages(tmp_path, monkeypatch):
    channels = {4: 8, 8: 8, 16: 8, 32: 4}
    small_official(monkeypatch, "stylegan2_discriminator_256", lambda: Discriminator(32, channels=channels))
    small_official(monkeypatch, "stylegan2_generator_256", lambda: Generator(32, 16, 2, channels=channels))
    small_official(monkeypatch, "anyface_T_map", lambda: Stream(16, (2,), 4, 8, 1, 2, 16))
    small_official(monkeypatch, "lightcnn9", lambda: LightCNN9(classes=5))
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for name in ("stylegan2_discriminator_256", "stylegan2_generator_256", "anyface_T_map", "lightcnn9"):
        with pytest.raises(UserError, match=r"list.pt: holds no state dict"):
            model.load_official(name, tmp_path / "list.pt")
    for content in ({"g_ema": [1]}, {"g_ema": {"w": 1}}, {"state_dict": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=r"odd.pt: holds no state dict"):
            load_generator(tmp_path / "odd.pt")
    state = small_generator(32).state_dict()
    torch.save({"g_ema": state, "latent_avg": torch.zeros(7)}, tmp_path / "mean.pt")
    with pytest.raises(UserError, match=r"mean.pt: latent_avg is no mean code of 64 numbers"):
        load_generator(tmp_path / "mean.pt")
    torch.save({**state, "input.input": torch.zeros(3)}, tmp_path / "flat.pt")
    with pytest.raises(UserError, match=r"flat.pt: no StyleGAN2 generator"):
        load_generator(tmp_path / "flat.pt")
    for banks in ([], [torch.zeros(2, 3), torch.zeros(2, 4)]):
        torch.save(banks, tmp_path / "memory.pt")
        with pytest.raises(UserError, match=r"memory.pt: no memory"):
            load_memory(tmp_path / "memory.pt")


def test_load_official_light_cnn_discriminator_and_generator(tmp_path, monkeypatch):
    torch.manual_seed(0)
    light = LightCNN9(classes=5)
    state = {f"module.{key}": value for key, value in light.state_dict().items()}
    torch.save({"epoch": 80, "state_dict": state, "prec1": 98.0}, tmp_path / "LightCNN_9.pth.tar")
    small_official(monkeypatch, "lightcnn9", lambda: LightCNN9(classes=5))
    assert same_weights(model.load_official("lightcnn9", tmp_path / "LightCNN_9.pth.tar"), light)
    assert same_weights(load_light_cnn(tmp_path / "LightCNN_9.pth.tar"), light)
    torch.save(
        {"state_dict": {"module.conv1.filter.weight": torch.zeros(1)}}, tmp_path / "LightCNN_29.pth.tar"
    )
    small_official(monkeypatch, "lightcnn29v2", lambda: LightCNN29v2(classes=5))
    with pytest.raises(UserError, match="another model than LightCNN29v2"):
        load_light_cnn(tmp_path / "LightCNN_29.pth.tar")
    channels = {4: 8, 8: 8, 16: 8, 32: 4}
    critic, network = Discriminator(32, channels=channels), Generator(32, 16, 2, channels=channels)
    torch.save({"g_ema": network.state_dict(), "d": critic.state_dict()}, tmp_path / "both.pt")
    small_official(monkeypatch, "stylegan2_discriminator_256", lambda: Discriminator(32, channels=channels))
    small_official(monkeypatch, "stylegan2_generator_256", lambda: Generator(32, 16, 2, channels=channels))
    assert same_weights(model.load_official("stylegan2_discriminator_256", tmp_path / "both.pt"), critic)
    assert same_weights(model.load_official("stylegan2_generator_256", tmp_path / "both.pt"), network)


def test_e4e_file_holds_encoder_generator_and_mean(tmp_path, monkeypatch):
    torch.manual_seed(0)
    blocks = ((8, 1), (8, 1), (8, 1), (8, 1))
    monkeypatch.setattr(weights, "E4E", lambda n: E4E(n, 512, 32, blocks))
    encoder, network = E4E(8, 512, 32, blocks), Generator(32, 512, 1, channels={4: 8, 8: 8, 16: 8, 32: 4})
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in network.state_dict().items()}
    mean = torch.randn(8, 512)
    torch.save({"state_dict": state, "latent_avg": mean, "opts": {"size": 32}}, tmp_path / "e4e.pt")
    loaded, center = load_e4e(tmp_path / "e4e.pt")
    assert same_weights(loaded, encoder) and torch.equal(center[0], mean)
    decoder, center = load_generator(tmp_path / "e4e.pt")
    assert same_weights(decoder, network) and torch.equal(center[0], mean)
    torch.save(encoder.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="not an e4e checkpoint"):
        load_e4e(tmp_path / "bare.pt")


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_memory_file(tmp_path, form):
    banks = [torch.randn(3, 8) for _ in range(4)]
    torch.save(banks if form == "list" else torch.stack(banks), tmp_path / "memory.pt")
    memory = load_memory(tmp_path / "memory.pt")
    assert all(torch.equal(a, b) for a, b in zip(memory.banks(), banks, strict=True))
    torch.save([torch.zeros(3)], tmp_path / "flat.pt")
    with pytest.raises(UserError, match="no memory"):
        load_memory(tmp_path / "flat.pt")


# --- a whole model in a folder --------------------------------------------------------------------


def small_model() -> Model:
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    text = Stream(64, (2,), 8, 64, 1, 2, 32, lr_mul=1.0)
    image = Stream(64, (2,), 8, 64, 1, 2, 32, lr_mul=1.0)
    return Model(
        clip, tokenizer, small_generator(32), text, torch.randn(1, 8, 64), image, small_generator(64)
    )


def test_model_folder_round_trip(tmp_path):
    made = small_model()
    for part in (made.clip, made.text, made.image):
        part.eval()
    save_model(tmp_path / "model", made)
    loaded = load_model(tmp_path / "model")
    for name in ("clip", "generator", "text", "image", "wide"):
        assert same_weights(getattr(loaded, name), getattr(made, name)), name
        assert not any(p.requires_grad for p in getattr(loaded, name).parameters())
    assert torch.equal(loaded.codes(["red hair"]), made.codes(["red hair"]))
    assert loaded.paint(loaded.codes(["red hair"])).shape == (1, 3, 64, 64)
    whole = (tmp_path / "model" / "mean.safetensors").read_bytes()
    (tmp_path / "model" / "mean.safetensors").write_bytes(whole[:20])
    with pytest.raises(UserError, match="mean.safetensors: truncated"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "mean.safetensors").write_bytes(whole)
    (tmp_path / "model" / "text.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="text.safetensors"):
        load_model(tmp_path / "model")
    with pytest.raises(UserError, match="not a run folder"):
        load_model(tmp_path)


def test_model_folder_names_the_users_files(tmp_path):
    made = small_model()
    other = Generator(64, 64, 2, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 4})
    torch.save(small_generator(32).state_dict(), tmp_path / "g.pt")
    made.files = {"generator": tmp_path / "g.pt"}
    save_model(tmp_path / "model", made)
    assert not (tmp_path / "model" / "generator.safetensors").exists()
    assert load_model(tmp_path / "model").generator.size == 32
    torch.save(other.state_dict(), tmp_path / "g.pt")
    with pytest.raises(
        UserError, match="the streams make codes of 8 x 64, the generator of 64 px takes 10 x 64"
    ):
        load_model(tmp_path / "model")


def test_anyface_plus_plus_from_its_files(tmp_path, tiny_openai, monkeypatch):
    torch.manual_seed(0)
    network = Generator(8, 512, 1, channels={4: 4, 8: 4})
    torch.save({"g_ema": network.state_dict(), "latent_avg": torch.zeros(512)}, tmp_path / "g.pt")
    mapper = FlatMapper(3 * 16, 4, 512, 2)
    state = {f"I_map.{k}": v for k, v in mapper.state_dict().items()}
    torch.save({"state_dict": state, "opts": {}}, tmp_path / "iteration.pt")
    torch.save([torch.randn(2, 16) for _ in range(3)], tmp_path / "memory.pt")
    torch.save(tiny_openai.state_dict(), tmp_path / "clip.pt")
    files = [tmp_path / name for name in ("iteration.pt", "memory.pt", "clip.pt", "g.pt")]
    loaded = load_plus_plus(*files)
    assert isinstance(loaded.tokenizer, BPETokenizer) and loaded.m == 2 and loaded.psi == 0.5
    f = torch.randn(2, 16)
    assert torch.allclose(loaded.codes_of(f), mapper(loaded.memory(f)), atol=1e-5)
    torch.save([torch.randn(2, 12) for _ in range(3)], tmp_path / "memory.pt")
    with pytest.raises(UserError, match="their widths do not fit"):
        load_plus_plus(*files)
    assert bundle.load_plus_plus is load_plus_plus
