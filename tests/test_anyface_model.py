"""AnyFace's networks: official names, StyleGAN2 against plain forms, CLIP, tokenizers, streams, memory."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from anyface.clip import (
    BPETokenizer,
    WordTokenizer,
    area_resize,
    clip_from_state,
    clip_pixels,
    image_features,
    text_features,
    text_token_features,
    too_long,
    vit_b32,
)
from anyface.encoder import E4E, IRSE50
from anyface.layers import Blur, EqualLinear, ModulatedConv2d, StyledConv, Upsample, fir_kernel
from anyface.lightcnn import LightCNN9, LightCNN29v2, grey_faces
from anyface.model import (
    OFFICIAL,
    CANet,
    FlatMapper,
    Memory,
    Stream,
    assemble,
    average_captions,
    edit,
    official,
)
from anyface.parts import small_clip, small_generator
from anyface.stylegan2 import Discriminator, Generator
from shared.bench import count_macs, count_parameters
from shared.runtime import REPOSITORY, UserError

KEYS = json.loads((REPOSITORY / "anyface" / "keys.json").read_text())


def larger_discriminator() -> dict[str, list[int]]:
    """Names and shapes at 1024 px, which the list leaves out: two blocks more before those of 256."""
    wanted, at_256 = {}, KEYS["stylegan2_discriminator_256"]
    for key, shape in at_256.items():
        part = key.split(".")
        if part[0] == "convs" and part[1] != "0":
            part[1] = str(int(part[1]) + 2)
        wanted[".".join(part)] = list(shape)
    wanted |= {"convs.0.0.weight": [32, 3, 1, 1], "convs.0.1.bias": [32]}
    for block, (before, after) in (("1", (32, 64)), ("2", (64, 128))):
        for key, shape in at_256.items():
            if key.startswith("convs.1."):  # from 128 to 256 channels
                renamed = [{128: before, 256: after}.get(side, side) for side in shape]
                wanted[key.replace("convs.1.", f"convs.{block}.")] = renamed
    return wanted


SMALL = {4: 8, 8: 8, 16: 8, 32: 4}


def small_stream(**changes) -> Stream:
    sizes = {"ladder": (2,), "n_latent": 8, "style_dim": 16, "layers": 2, "heads": 2, "feedforward": 32}
    return Stream(16, **(sizes | changes))


# --- official names -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes(name):
    with torch.device("meta"):
        network = official(name)
    wanted = larger_discriminator() if name == "stylegan2_discriminator_1024" else KEYS[name]
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == wanted


def test_every_official_list_has_a_network():
    assert set(OFFICIAL) - {"stylegan2_discriminator_1024"} == set(KEYS) - {"nvidia_generator_256"}
    with pytest.raises(UserError, match="no official network"):
        official("anyface_v3")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("anyface_T_map", 157_915_136),
        ("anyfacepp_I_map", 1_373_248_512),
        ("anyfacepp_CA_NET", 3_936_256),
        ("stylegan2_generator_1024", 30_370_060),
        ("stylegan2_generator_256", 30_034_338),
        ("stylegan2_discriminator_256", 28_864_129),
        ("ir_se50_112", 43_797_696),
        ("openai_clip_vit_b32", 151_277_313),
        ("e4e_encoder_1024", 267_136_704),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert count_parameters(official(name)) == parameters


def test_full_size_networks_compute_on_meta():
    with torch.device("meta"):
        codes, phi = Stream()(torch.empty(2, 512))
        assert codes.shape == (2, 18, 512) and phi.shape == (2, 512)
        assert Generator(1024).synthesis(codes).shape == (2, 3, 1024, 1024)
        assert Discriminator(1024)(torch.empty(4, 3, 1024, 1024)).shape == (4, 1)
        assert E4E()(torch.empty(1, 3, 256, 256)).shape == (1, 18, 512)
        assert IRSE50().eval().embed(torch.empty(2, 3, 1024, 1024)).shape == (2, 512)
        assert LightCNN9()(torch.empty(1, 1, 128, 128)).shape == (1, 256)
        assert LightCNN29v2()(torch.empty(1, 1, 128, 128)).shape == (1, 256)
        assert CANet()(torch.empty(2, 768))[0].shape == (2, 512)
        # Multiply-accumulates as counted for the public code.
        assert count_macs(
            Generator(256).requires_grad_(False).synthesis, torch.empty(1, 14, 512)
        ) / 1e9 == pytest.approx(45.1, rel=0.01)
        assert count_macs(vit_b32().encode_image, torch.empty(1, 3, 224, 224)) / 1e9 == pytest.approx(
            4.4, rel=0.02
        )


# --- StyleGAN2 ------------------------------------------------------------------------------------


def upfirdn(x, kernel, up, pad):
    """Zeros between pixels, padding, correlation with the flipped kernel: the original filter, in words."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height * up, width * up)
    spread[..., ::up, ::up] = x
    spread = F.pad(spread, (*pad, *pad))
    return F.conv2d(spread, kernel.flip(0, 1).expand(channels, 1, 4, 4), groups=channels)


@pytest.mark.parametrize(("upsample", "kernel"), [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("width", [6, 70])
def test_scaled_convolution_equals_the_grouped_form(upsample, demodulate, kernel, width):
    torch.manual_seed(0)
    forms = [
        ModulatedConv2d(width, 5, kernel, 16, demodulate, upsample, form) for form in ("scaled", "grouped")
    ]
    forms[1].load_state_dict(forms[0].state_dict())
    x, style = torch.randn(3, width, 8, 8, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    outs = [form(x, style) for form in forms]
    assert outs[0].shape[-1] == (16 if upsample else 8)
    assert torch.allclose(*outs, atol=1e-4)
    grads = [
        torch.autograd.grad(out.square().sum(), (x, style, form.weight))
        for out, form in zip(outs, forms, strict=True)
    ]
    for fast, plain in zip(*grads, strict=True):
        assert torch.allclose(fast, plain, atol=1e-3, rtol=1e-3)


def test_generator_forms_agree():
    torch.manual_seed(0)
    fast = small_generator(32)
    plain = Generator(32, 64, 3, lr_mlp=1.0, channels=fast.sizes["channels"], modulation="grouped")
    with torch.no_grad():  # a new generator has neither noise nor biases
        for name, parameter in fast.named_parameters():
            if name.endswith(("noise.weight", "activate.bias")):
                parameter.normal_()
    plain.load_state_dict(fast.state_dict())
    codes = torch.randn(2, 8, 64, requires_grad=True)
    for noise in (None, fast.fresh_noise(2)):
        pictures = [g.synthesis(codes, noise) for g in (fast, plain)]
        assert torch.allclose(*pictures, atol=1e-4)
        # In the scale of the gradient: activations are deeper here than in one convolution.
        to_codes = [torch.autograd.grad(picture.square().mean(), codes)[0] for picture in pictures]
        assert torch.allclose(*to_codes, atol=1e-4 * to_codes[1].abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("draws", [1, 2])
def test_pictures_stay_in_the_order_of_the_convolutions(upsample, draws):
    """Channels last between layers: another order costs a pass of its own, and one slow one."""
    torch.manual_seed(0)
    layer = StyledConv(6, 5, 16, upsample, "scaled")
    plain = StyledConv(6, 5, 16, upsample, "grouped")
    torch.nn.init.normal_(layer.noise.weight), torch.nn.init.normal_(layer.activate.bias)
    plain.load_state_dict(layer.state_dict())
    side = 16 if upsample else 8
    x, style, noise = torch.randn(2, 6, 8, 8), torch.randn(2, 16), torch.randn(draws, 1, side, side)
    out = layer(x, style, noise)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, plain(x, style, noise), atol=1e-4)


def test_filters_equal_the_original_filter():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    assert torch.allclose(Upsample()(x), upfirdn(x, fir_kernel(4), 2, (2, 1)), atol=1e-5)
    for gain, pad in ((4, 1), (1, 2)):
        expected, blur = upfirdn(x, fir_kernel(gain), 1, (pad, pad)), Blur(gain, pad)
        # A GPU takes two passes, a CPU one.
        for made in (blur(x), blur.one_pass(x), blur.two_passes(x), Blur(gain, pad, "grouped")(x)):
            assert torch.allclose(made, expected, atol=1e-5)


def test_equal_linear_closed_form():
    layer = EqualLinear(4, 3, bias_init=2, lr_mul=0.01, activate=True)
    x = torch.randn(5, 4)
    y = F.linear(x, layer.weight * 0.01 / 2, layer.bias * 0.01)
    assert torch.allclose(layer(x), F.leaky_relu(y, 0.2) * math.sqrt(2), atol=1e-6)
    assert EqualLinear(64, 64, lr_mul=0.01).weight.std().item() == pytest.approx(100, rel=0.1)


def test_generator_inputs():
    torch.manual_seed(0)
    g = small_generator(32)
    z = torch.randn(2, 64)
    image, codes = g([z])
    assert image.shape == (2, 3, 32, 32) and codes.shape == (2, 8, 64)
    assert torch.allclose(g([codes], input_is_latent=True)[0], image)
    assert torch.allclose(g.from_stylespace(g.stylespace(codes)), image, atol=1e-5)
    mixed, both = g([z, torch.randn(2, 64)], inject_index=3)
    assert torch.equal(both[:, :3], codes[:, :3]) and not torch.equal(both[:, 3:], codes[:, 3:])
    mean = g.mean_latent(64)
    assert torch.allclose(g([z], truncation=0.0, truncation_latent=mean)[1], mean[:, None].expand(2, 8, -1))
    with pytest.raises(ValueError, match=r"takes codes \(B, 8, 64\)"):
        g.synthesis(torch.randn(1, 18, 64))
    with pytest.raises(ValueError, match="truncation needs the latent"):
        g([z], truncation=0.5)
    with pytest.raises(ValueError, match="style space has 11 layers"):
        g.from_stylespace(g.stylespace(codes)[:-1])


def test_noise_changes_the_picture_only_with_a_strength():
    torch.manual_seed(0)
    g = small_generator(32)
    codes = torch.randn(1, 8, 64)
    assert torch.equal(g.synthesis(codes), g.synthesis(codes, "random"))
    with torch.no_grad():
        g.convs[-1].noise.weight.fill_(1)
    assert torch.equal(g.synthesis(codes), g.synthesis(codes))
    assert not torch.equal(g.synthesis(codes), g.synthesis(codes, "random"))
    fresh = g.fresh_noise(1)
    assert torch.equal(g.synthesis(codes, fresh), g.synthesis(codes, fresh))


def test_layers_read_the_latents_of_the_official_table():
    """Code i reaches exactly the layers of the table: to-RGB shares its latent with the next convolution."""
    g = small_generator(32)
    codes = torch.randn(1, 8, 64, requires_grad=True)
    styles = g.stylespace(codes)
    reads = []
    for style in styles:
        grad = torch.autograd.grad(style.sum(), codes, retain_graph=True)[0]
        reads.append(grad[0].abs().sum(1).nonzero().flatten().tolist())
    assert reads == [[0], [1], [1], [2], [3], [3], [4], [5], [5], [6], [7]]


def test_discriminator_sees_the_batch():
    torch.manual_seed(0)
    d = Discriminator(32, channels=SMALL)
    x = torch.randn(8, 3, 32, 32)
    assert d(x).shape == (8, 1) and d(x[:2]).shape == (2, 1)
    alone, same = d(x[:1]), d(x[:1].expand(4, -1, -1, -1))
    assert torch.allclose(same, alone.expand(4, -1), atol=1e-4)
    assert not torch.allclose(d(x)[0], alone[0], atol=1e-4)


# --- CLIP and tokenizers --------------------------------------------------------------------------


def test_clip_features_and_gradient_to_the_picture():
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    image = torch.rand(3, 3, 64, 64, requires_grad=True)
    features = image_features(clip, image)
    assert features.shape == (3, 64)
    features.sum().backward()
    assert image.grad.abs().sum() > 0
    tokens = tokenizer(["a person with red hair", "someone", ""])
    every, padding = text_token_features(clip, tokens)
    assert torch.allclose(every[torch.arange(3), tokens.argmax(1)], text_features(clip, tokens), atol=1e-5)
    assert (~padding).sum(1).tolist() == [7, 3, 2]


def test_quick_gelu_and_sizes_from_a_state_dict():
    clip, _ = small_clip()
    x = torch.randn(5)
    assert torch.allclose(clip.transformer.resblocks[0].mlp.gelu(x), x * torch.sigmoid(1.702 * x))
    with torch.device("meta"):
        full = vit_b32()
        again = clip_from_state(full.state_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }


@pytest.mark.parametrize("size", [64, 256])
def test_area_pooling_is_the_released_pooling(size):
    """Nearest enlargement by 7, then the mean of size / 32 pixels in either direction."""
    image = torch.randn(1, 3, size, size)
    released = F.avg_pool2d(F.interpolate(image, scale_factor=7, mode="nearest"), size // 32)
    assert torch.allclose(area_resize(image, 224), released, atol=1e-5)


def test_clip_input_modes():
    image = torch.full((1, 3, 32, 32), -1.0)
    assert torch.equal(clip_pixels(image, 32, "official"), image)
    assert clip_pixels(image, 32)[0, 0, 0, 0].item() == pytest.approx(-0.48145466 / 0.26862954, abs=1e-5)


def test_bpe_tokenizer_against_known_ids():
    """OpenAI's ids, its cleaning, and captions that are empty, too long or no English."""
    tokenizer = BPETokenizer()
    tokens = tokenizer(["a diagram", "", "  A&amp;amp;A\n\tDIAGRAM ", "\U0001f642 \u4e2d\u6587 n\u0303"])
    assert tokens.shape == (4, 77) and tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert tokens[1, :3].tolist() == [49406, 49407, 0]
    assert tokenizer.words("  A&amp;amp;A\n\tDIAGRAM ") == ["a", "&", "a", "diagram"]
    assert (tokens.max(1).values == 49407).all()
    long = "smiling " * 5000
    packed = tokenizer([long])
    assert packed[0, 0] == 49406 and packed[0, -1] == 49407 and (packed[0] > 0).all()
    assert too_long(tokenizer, long) == 5000 - 75 and too_long(tokenizer, "a face") == 0


def test_word_tokenizer():
    tokenizer = WordTokenizer.from_captions(["red hair", "Red lips"], context_length=6)
    assert tokenizer.vocabulary == ["red", "hair", "lips"] and tokenizer.vocab_size == 7
    assert tokenizer(["RED zebra", "", "red red red red red red"]).tolist() == [
        [5, 2, 1, 6, 0, 0],
        [5, 6, 0, 0, 0, 0],
        [5, 2, 2, 2, 2, 6],
    ]


# --- streams and codes ----------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch_unless_asked():
    torch.manual_seed(0)
    f = torch.randn(4, 16)
    stream = small_stream().eval()
    assert torch.allclose(stream(f)[0][:1], stream(f[:1])[0], atol=1e-5)
    released = small_stream(batch_as_sequence=True).eval()
    released.load_state_dict(stream.state_dict())
    assert not torch.allclose(released(f)[0][:1], released(f[:1])[0], atol=1e-2)
    # Alone, both forms are the same function.
    assert torch.allclose(released(f[:1])[0], stream(f[:1])[0], atol=1e-5)


def test_token_features_as_a_sequence():
    torch.manual_seed(0)
    stream = small_stream().eval()
    f, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    codes, phi = stream(f, padding)
    assert codes.shape == (2, 8, 16) and phi.shape == (2, 16)
    changed = f.clone()
    changed[1, 3:] += 1
    assert torch.allclose(stream(changed, padding)[1], phi, atol=1e-5)
    changed[1, 0] += 1
    assert not torch.allclose(stream(changed, padding)[1][1], phi[1], atol=1e-3)
    weights = stream.attention(f, padding)
    assert weights.shape == (2, 2, 5) and torch.allclose(weights.sum(-1), torch.ones(2, 2), atol=1e-5)
    assert weights[:, 1, 3:].abs().max() == 0


def test_stream_layers_are_the_released_ones():
    layer = Stream(layers=1, ladder=(1,)).transformer_encoder.layers[0]
    assert not layer.norm_first and layer.dropout.p == 0.1 and layer.activation is F.relu
    assert layer.self_attn.num_heads == 8


def test_noise_injection_and_truncation():
    w_z, w_t, mean = torch.randn(2, 4), torch.randn(2, 8, 4), torch.randn(1, 8, 4)
    code = assemble(w_z, w_t, 3)
    assert torch.equal(code[:, :3], w_z[:, None].expand(-1, 3, -1)) and torch.equal(code[:, 3:], w_t[:, 3:])
    assert torch.equal(assemble(w_z, w_t, 0), w_t)
    cut = assemble(w_z, w_t, 3, psi=0.5, cutoff=2, mean=mean)
    assert torch.allclose(cut[:, :2], (mean[:, :2] + w_z[:, None]) / 2)
    assert torch.equal(cut[:, 2], w_z)
    with pytest.raises(ValueError, match="mean"):
        assemble(w_z, w_t, 3, psi=0.5)


def test_editing():
    w, w_t = torch.randn(1, 8, 4), torch.randn(1, 8, 4)
    assert torch.equal(edit(w, w_t, 8), w) and torch.allclose(edit(w, w_t, 0), w_t)
    half = edit(w, w_t, 3, alpha=0.5)
    assert torch.equal(half[:, :3], w[:, :3]) and torch.allclose(half[:, 3:], (w + w_t)[:, 3:] / 2)


def test_average_of_captions_keeps_their_length():
    f = torch.randn(3, 16)
    mean = average_captions(f)
    assert mean.shape == (1, 16)
    assert mean.norm().item() == pytest.approx(f.norm(dim=1).mean().item(), rel=1e-5)
    assert torch.allclose(F.normalize(mean), F.normalize(f.mean(0, keepdim=True)), atol=1e-6)


# --- AnyFace++ ------------------------------------------------------------------------------------


def plain_memory(banks, f):
    """A loop over banks, as released: hard nearest slot by cosine, added to the feature."""
    rows = []
    for bank in banks:
        best = (F.normalize(f, dim=-1) @ F.normalize(bank, dim=-1).T).argmax(1)
        rows.append(f + bank[best])
    return torch.stack(rows, 1)


def test_memory_reads_like_the_loop_over_banks():
    torch.manual_seed(0)
    banks = [torch.randn(k, 12) for k in (3, 1, 5)]
    memory, f = Memory(banks), torch.randn(4, 12)
    assert torch.equal(memory(f), plain_memory(banks, f))
    for kept, bank in zip(memory.banks(), banks, strict=True):
        assert torch.equal(kept, bank)
    assert {"slots", "used"} == memory.state_dict().keys()


def test_memory_moves_hit_slots_alone_and_only_on_request():
    torch.manual_seed(0)
    banks = [torch.randn(4, 12), torch.randn(2, 12)]
    memory, f = Memory(banks), torch.randn(3, 12)
    before = memory.slots.clone()
    memory(f)
    assert torch.equal(memory.slots, before)
    hit = memory.nearest(f)
    memory.update(f, rate=0.1)
    for n in range(2):
        for k in range(len(banks[n])):
            rows = f[hit[:, n] == k]
            wanted = 0.9 * before[n, k] + 0.1 * rows.mean(0) if len(rows) else before[n, k]
            assert torch.allclose(memory.slots[n, k], wanted, atol=1e-6)
    released = Memory(banks)
    released.update(f[:1], rate=0.1, decay_all=True)
    missed = [k for k in range(4) if k != Memory(banks).nearest(f[:1])[0, 0]]
    assert torch.allclose(released.slots[0, missed], 0.9 * before[0, missed], atol=1e-6)


def test_flat_mapper_and_condition_augmentation():
    torch.manual_seed(0)
    mapper = FlatMapper(3 * 12, n_latent=8, style_dim=16, depth=3)
    assert mapper(torch.randn(2, 3, 12)).shape == (2, 8, 16)
    sample, mean, log_variance = CANet(12, 10, 2)(torch.randn(2, 12), torch.ones(2, 5))
    assert torch.allclose(sample, mean + (log_variance / 2).exp())


# --- encoders -------------------------------------------------------------------------------------


def test_small_identity_network_and_encoder():
    torch.manual_seed(0)
    blocks = ((8, 1), (8, 2), (16, 1), (16, 1))
    network = IRSE50(32, blocks, 12).eval()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    embedding = network.embed(image)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)
    embedding[:, 0].sum().backward()
    assert image.grad[..., :3, :].abs().max() == 0 and image.grad.abs().sum() > 0
    encoder = E4E(8, 16, 64, blocks).eval()
    alone = E4E(8, 16, 64, blocks, offsets=False).eval()
    alone.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    codes, styles = encoder(x), alone(x)
    assert codes.shape == (1, 8, 16) and torch.allclose(codes[:, 3], styles[:, 0] + styles[:, 3], atol=1e-5)


def test_grey_faces():
    image = torch.ones(1, 3, 64, 64)
    assert torch.allclose(grey_faces(image), torch.ones(1, 1, 128, 128), atol=1e-5)
    assert grey_faces(-image).abs().max() < 1e-6
