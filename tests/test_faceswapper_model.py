"""FaceSwapper: networks against the official names, the official arithmetic and closed forms."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from faceswapper import bench, literal
from faceswapper.blocks import Guide, MaskedModulation, ResBlk, conv_down, fold, instance_norm, up_conv
from faceswapper.drawing import draw_landmarks, to_file
from faceswapper.landmarks import FAN, CoordConv, HourGlass, points_of
from faceswapper.losses import pair, swap_both
from faceswapper.model import (
    AttributeEncoder,
    Discriminator,
    FrozenIdentity,
    Generator,
    Size,
    initialise,
    load_official,
    official,
)
from faceswapper.recognizer import IRSE50, Recogniser
from faceswapper.weights import CheckConfig, compare, states_of
from faceswapper.weights import main as check_files
from shared.bench import count_macs
from shared.runtime import REPOSITORY, UserError

KEYS = json.loads((REPOSITORY / "faceswapper" / "keys.json").read_text())
TINY = Size(img_size=64, channel_base=256, max_channels=16, id_dim=12)


def scene(size: int = 64, batch: int = 2, seed: int = 0):
    """Pictures, landmark pictures and masks of `batch` pairs, in the official order of arguments."""
    rng = torch.Generator().manual_seed(seed)
    pictures = [torch.rand(batch, 3, size, size, generator=rng) * 2 - 1 for _ in range(2)]
    drawn = [torch.rand(batch, 3, size, size, generator=rng) for _ in range(2)]
    masks = [(torch.rand(batch, 1, size, size, generator=rng) > 0.5).float() for _ in range(2)]
    return (*pictures, *drawn, *masks)


def make(size: Size = TINY, **options) -> Generator:
    torch.manual_seed(0)
    net = initialise(Generator(size, **options))
    for p in net.parameters():  # no zero biases: a bias used wrongly must show
        if p.ndim == 1:
            nn.init.normal_(p, 0, 0.3)
    return net


# --- official names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_official_networks_have_the_released_names_and_shapes(name):
    with torch.device("meta"):
        found = {key: list(value.shape) for key, value in official(name).state_dict().items()}
    assert found == KEYS[name]


def test_another_size_costs_what_it_should():
    with torch.device("meta"):
        counts = {
            s: [
                sum(p.numel() for p in net.parameters()) / 1e6
                for net in (Generator(Size(s)), Discriminator(Size(s)))
            ]
            for s in (128, 64, 512)
        }
    assert counts[128] == pytest.approx([69.55, 20.74], abs=0.01)
    # The official 64 px network carries a third skip and side head that it never uses.
    assert counts[64] == pytest.approx([67.71, 20.27], abs=0.03)
    assert counts[512] == pytest.approx([70.30, 20.88], abs=0.01)


def test_cost_of_one_swap_and_of_its_parts():
    macs = {}
    with torch.device("meta"):
        g, d = official("generator"), official("discriminator")
        x, drawn, mask = torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
        macs["identity"] = count_macs(literal.identity_encoder, g.id_encoder, x)
        macs["attributes"] = count_macs(literal.attribute_encoder, g.attr_encoder, x)
        macs["discriminator"] = count_macs(literal.discriminator, d, x, drawn)
        macs["recogniser"] = count_macs(official("face_model").eval().embed, torch.zeros(1, 3, 112, 112))
        macs["fan"] = count_macs(official("fan").eval(), x)
        plain = count_macs(literal.generator, g, x, x, drawn, drawn, mask, mask) / 2
        fast = count_macs(g.swap, x, x, drawn, mask)
    giga = {name: value / 1e9 for name, value in macs.items()}
    wanted = dict(identity=16.56, attributes=16.97, discriminator=16.68, recogniser=6.30, fan=8.73)
    assert giga == pytest.approx(wanted, rel=0.01)
    assert plain / 1e9 == pytest.approx(63.4, rel=0.01)
    assert fast < 0.7 * plain


# --- fast forms -------------------------------------------------------------------------------------


def test_folded_convolutions_equal_the_plain_ones_with_their_gradients():
    conv = nn.Conv2d(3, 5, 3, 1, 1).double()
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    for fast, plain in (
        (conv_down(x, conv), F.avg_pool2d(conv(x), 2)),
        (up_conv(x, conv), conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))),
    ):
        torch.testing.assert_close(fast, plain)
        weigh = torch.randn_like(plain)
        wanted = torch.autograd.grad((plain * weigh).sum(), (x, conv.weight, conv.bias))
        found = torch.autograd.grad((fast * weigh).sum(), (x, conv.weight, conv.bias))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_instance_norm_is_biased_over_all_positions():
    x = torch.randn(2, 3, 4, 4) * 3 + 1
    scale, shift = torch.randn(2, 3), torch.randn(2, 3)
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    wanted = (x - mean) / (var + 1e-5).sqrt() * scale[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(instance_norm(x, scale, shift), wanted)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_the_instance_norm_in_either_order_in_memory(count, order):
    """On a CPU that of a view of one picture is wrong if the gradient comes in another order."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, count, 4, 6, 6)
    scale, shift = torch.rand(4) + 0.5, torch.randn(4)
    variance, mean = torch.var_mean(x.requires_grad_(), (2, 3), correction=0, keepdim=True)
    wanted = (x - mean) / (variance + 1e-5).sqrt() * scale.view(4, 1, 1) + shift.view(4, 1, 1)
    (of_x,) = torch.autograd.grad(wanted, x, gradient)
    for arrives in (torch.contiguous_format, torch.channels_last):
        mine = x.detach().clone(memory_format=order).requires_grad_()
        instance_norm(mine, scale, shift).backward(gradient.contiguous(memory_format=arrives))
        torch.testing.assert_close(mine.grad, of_x, atol=1e-4, rtol=1e-4)


def test_folding_changes_neither_result_nor_names():
    net, (a, b, _, lm, _, mask) = make(), scene()
    names, before = list(net.state_dict()), net.swap(a, b, lm, mask).detach()
    fold(net)
    assert list(net.state_dict()) == names
    torch.testing.assert_close(net.swap(a, b, lm, mask), before)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_residual_block_equals_the_official_one(norm, down):
    torch.manual_seed(0)
    block, x = ResBlk(4, 6, norm, down), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), literal.res_blk(block, x), atol=1e-5, rtol=1e-5)


def test_the_background_passes_the_modulation_untouched_and_the_face_does_not():
    torch.manual_seed(0)
    norm, x, code = MaskedModulation(5, 4), torch.randn(2, 4, 8, 8), torch.randn(2, 5)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    out = norm(x, code, Guide(mask, torch.rand(2, 3, 8, 8), {}))
    assert torch.equal(out[..., :4], x[..., :4])
    assert (out[..., 4:] - x[..., 4:]).abs().mean() > 0.1
    assert torch.equal(norm(x, code, Guide(torch.ones_like(mask), torch.rand(2, 3, 8, 8), {})), x)


@pytest.mark.parametrize("pyramid", ["cascade", "direct"])
def test_generator_equals_the_official_arithmetic(pyramid):
    net, batch = make(mask_pyramid=pyramid), scene()
    x_ba, x_ab, f_ba, f_ab, side_ba, side_ab = net(*batch)
    wanted = literal.generator(net, *batch)
    torch.testing.assert_close((x_ba, x_ab), (wanted.x_ba, wanted.x_ab), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(f_ba, wanted.features_ba, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(f_ab, wanted.features_ab, atol=2e-4, rtol=2e-4)
    assert [s.shape[-1] for s in side_ba] == [s.shape[-1] for s in side_ab] == [32, 64]
    assert len(f_ba) == 5
    a, b, _, lm_b, _, mask_b = batch
    torch.testing.assert_close(net.swap(a, b, lm_b, mask_b), x_ba, atol=1e-5, rtol=1e-5)


def test_mask_pyramids():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 31:] = 1
    drawn = torch.rand(1, 3, 64, 64)
    cascade, direct = (make(mask_pyramid=p).org_decoder.guides(drawn, mask) for p in ("cascade", "direct"))
    assert list(cascade) == list(direct) == [8, 16, 32, 64]
    level = mask
    for r in cascade:
        level = F.interpolate(level, (r, r), mode="bilinear", align_corners=True)
        assert torch.equal(cascade[r].mask, level)
    assert torch.equal(direct[64].mask, mask) and torch.equal(direct[64].landmarks, drawn)
    assert direct[32].mask[0, 0, 0, 14:17].tolist() == [0, 0.5, 1], "the mean over a cell of 2x2 pixels"
    torch.testing.assert_close(
        direct[8].landmarks, drawn.unflatten(3, (8, 8)).unflatten(2, (8, 8)).mean((3, 5))
    )
    assert ((cascade[64].mask > 0.1) & (cascade[64].mask < 0.9)).float().mean() > 0.05


def test_encoders_return_what_the_official_ones_do():
    net, x = make(), scene()[0]
    code, outputs = net.id_encoder(x)
    assert code.shape == (2, 12) and len(outputs) == len(net.id_encoder.model)
    torch.testing.assert_close(code, literal.identity_encoder(net.id_encoder, x), atol=1e-4, rtol=1e-4)
    encoder: AttributeEncoder = net.attr_encoder
    attributes, outputs, cache = encoder(x, torch.ones(2, 1, 64, 64))
    assert attributes.shape[-2:] == (8, 8) and len(outputs) == len(encoder.model)
    assert cache[64] is outputs[0] and cache[32] is outputs[1] and set(cache) == {32, 64}
    assert encoder(x)[2] == {}


def test_the_official_cache_is_that_of_the_blocks_1_to_3():
    with torch.device("meta"):
        encoder = AttributeEncoder(Size())
        attributes, outputs, cache = encoder(torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256))
    assert attributes.shape == (1, 512, 8, 8)
    assert cache[128] is outputs[1] and cache[64] is outputs[2] and cache[32] is outputs[3]
    assert [cache[r].shape[1] for r in (128, 64, 32)] == [128, 256, 512]


def test_several_identities_in_one_pass_equal_one_at_a_time():
    # In double precision: the size of a batch decides how a CPU rounds sums.
    net, (a, b, _, lm_b, _, mask_b) = make().double(), (part.double() for part in scene(batch=3))
    attributes, _, cache = net.encode(b)
    codes = net.id_encoder.code(a)
    guides = net.org_decoder.guides(lm_b, mask_b)
    grid = net.org_decoder.decode(attributes, codes.repeat_interleave(3, 0), guides, cache).picture
    for k in range(3):
        one = net.swap(a[k : k + 1], b, lm_b, mask_b)  # one identity for all targets
        torch.testing.assert_close(grid[3 * k : 3 * k + 3], one, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="2 codes for 3 targets"):
        net.org_decoder.decode(attributes, codes[:2], guides, cache)


def test_512_pixels_work_where_the_official_decoder_has_no_mask():
    net = make(Size(512, 1024, 8, 8))
    a, b, _, lm, _, mask = scene(512, 1)
    assert net.swap(a, b, lm, mask).shape == (1, 3, 512, 512)
    with pytest.raises(UserError, match="power of two"):
        Size(96)


def test_identity_reaches_only_the_face_when_the_mask_is_exact():
    """With the direct pyramid and no instance norm over colours in the way, features outside stay."""
    net = make(mask_pyramid="direct")
    a, b, _, lm, _, _ = scene()
    everything = torch.ones(2, 1, 64, 64)
    features = [
        net.org_decoder.decode(
            *(net.encode(b)[0], net.id_encoder.code(source)),
            net.org_decoder.guides(lm, everything),
            net.encode(b)[2],
        ).features
        for source in (a, b)
    ]
    torch.testing.assert_close(*features)


def test_without_the_last_norm_the_level_of_a_channel_reaches_the_picture():
    with_norm, without = make(), make(replace(TINY, rgb_norm=False))
    gone = with_norm.state_dict().keys() - without.state_dict().keys()
    heads = ("to_rgb.0.", *(f"rgb_converters.{n}.0." for n in range(2)))
    assert gone == {f"org_decoder.{head}{which}" for head in heads for which in ("weight", "bias")}
    assert without.state_dict().keys() < with_norm.state_dict().keys()
    x = torch.rand(2, 4, 64, 64)
    for net, kept in ((with_norm, False), (without, True)):
        low, high = (net.org_decoder.to_rgb(x + level).mean() for level in (0, 3))
        assert (high - low).abs().item() > 0.1 if kept else (high - low).abs().item() < 1e-3


def test_frozen_identity_is_no_part_of_the_weights():
    embedder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7))
    net = make(identity=FrozenIdentity(embedder, 7, 12))
    assert {k for k in net.state_dict() if k.startswith("id_encoder")} == {
        "id_encoder.final_layer.0.weight",
        "id_encoder.final_layer.0.bias",
    }
    a, b, _, lm, _, mask = scene()
    net.swap(a, b, lm, mask).sum().backward()
    assert embedder[1].weight.grad is None and net.id_encoder.final_layer[0].weight.grad is not None


def test_frozen_identity_computes_where_its_pictures_are():
    """A generator that is moved leaves the recogniser, which is no part of it, where it was."""
    embedder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7))
    net = make(identity=FrozenIdentity(embedder, 7, 12)).to("meta")
    a, b, _, lm, _, mask = (x.to("meta") for x in scene())
    assert net.swap(a, b, lm, mask).device.type == "meta"


def test_of_a_masked_source_the_face_alone_counts():
    net, (a, b, lm_a, lm_b, mask_a, mask_b) = make(mask_source=True), scene()
    swap = net.swap(a, b, lm_b, mask_b, source_mask=mask_a)
    torch.testing.assert_close(swap, make().swap(a * (1 - mask_a), b, lm_b, mask_b))
    elsewhere = torch.where(mask_a > 0, -a, a)
    assert torch.equal(net.swap(elsewhere, b, lm_b, mask_b, source_mask=mask_a), swap)
    assert not torch.allclose(net.swap(-a, b, lm_b, mask_b, source_mask=mask_a), swap)
    both = net(a, b, lm_a, lm_b, mask_a, mask_b)
    torch.testing.assert_close(both[0], swap, atol=1e-5, rtol=1e-5)
    trained = swap_both(net, pair(a, b, lm_a, lm_b, mask_a, mask_b)).swap.picture
    torch.testing.assert_close(trained, torch.cat((both[1], both[0])), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="give the sources' masks"):
        net.swap(a, b, lm_b, mask_b)


def test_discriminator_equals_the_official_one_and_sees_the_landmarks():
    torch.manual_seed(0)
    net, (a, _, lm, other, _, _) = initialise(Discriminator(TINY)), scene()
    torch.testing.assert_close(net(a, lm), literal.discriminator(net, a, lm), atol=1e-5, rtol=1e-4)
    assert net(a, lm).shape == (2, 1)
    assert not torch.allclose(net(a, lm), net(a, other))
    blind = initialise(Discriminator(TINY, conditional=False))
    assert torch.equal(blind(a, lm), blind(a, other))


# --- recogniser and landmarks -----------------------------------------------------------------------


def test_recogniser_returns_unit_embeddings_and_24_features_and_stays_frozen():
    torch.manual_seed(0)
    net = Recogniser(IRSE50())
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    net.train()
    assert not any(m.training for m in net.modules())
    embedding, features = net.network(F.interpolate(x, (112, 112), mode="bilinear", align_corners=True))
    torch.testing.assert_close(net(x), embedding)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert len(features) == 24 and features[-1].shape == (2, 512, 7, 7)
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    half = Recogniser(net.network, crop=0.5)(x)
    torch.testing.assert_close(half, net(x[..., 16:48, 16:48]), atol=1e-5, rtol=1e-5)


def test_coordinates_run_down_then_right_then_outwards():
    layer = CoordConv(1, 3)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.zero_()
        for i in range(3):
            layer.conv.weight[i, 1 + i] = 1
    out = layer(torch.zeros(1, 1, 5, 5))[0].detach()
    axis = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(out[0], axis.view(-1, 1).expand(5, 5))
    torch.testing.assert_close(out[1], axis.expand(5, 5))
    assert out[2].max() == 1 and out[2, 2, 2] == 0 and float(out[2, 0, 2]) == pytest.approx(0.5**0.5)


class OfficialFAN:
    """FAN's arithmetic spelled out over the released names, in the order of the official code."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def bn_relu(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kept = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, var, weight, bias = (value.view(1, -1, 1, 1) for value in kept)
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """Row, column, distance from the centre as three more channels."""
        height, width = x.shape[-2:]
        rows = torch.arange(height).view(-1, 1).expand(height, width) / (height - 1) * 2 - 1
        columns = torch.arange(width).view(1, -1).expand(height, width) / (width - 1) * 2 - 1
        radius = (rows**2 + columns**2).sqrt()
        return torch.cat((x, torch.stack((rows, columns, radius / radius.max()))[None]), 1)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        one = self.conv(f"{name}.conv1", self.bn_relu(f"{name}.bn1", x))
        two = self.conv(f"{name}.conv2", self.bn_relu(f"{name}.bn2", one))
        three = self.conv(f"{name}.conv3", self.bn_relu(f"{name}.bn3", two))
        if f"{name}.downsample.2.weight" in self.state:
            x = self.conv(f"{name}.downsample.2", self.bn_relu(f"{name}.downsample.0", x))
        return torch.cat((one, two, three), 1) + x

    def hourglass(self, level: int, x: torch.Tensor) -> torch.Tensor:
        up = self.block(f"m0.b1_{level}", x)
        low = self.block(f"m0.b2_{level}", F.avg_pool2d(x, 2))
        low = self.hourglass(level - 1, low) if level > 1 else self.block("m0.b2_plus_1", low)
        low = self.block(f"m0.b3_{level}", low)
        return up + low.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn_relu("bn1", self.conv("conv1.conv", self.place(x), 2))
        x = F.avg_pool2d(self.block("conv2", x), 2)
        x = self.block("conv4", self.block("conv3", x))
        x = self.hourglass(4, self.conv("m0.coordconv.conv", self.place(x)))
        x = self.bn_relu("bn_end0", self.conv("conv_last0", self.block("top_m_0", x)))
        return self.conv("l0", x)


def test_fan_equals_the_official_arithmetic():
    torch.manual_seed(0)
    fan = FAN().eval()
    for module in fan.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight.data, 0.5), (module.running_var, 0.5)):
                value.uniform_(low, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.normal_(0, 0.3)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = OfficialFAN(fan.state_dict())(x)
        torch.testing.assert_close(fan(x), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_fan_gives_maps_and_points_at_any_size():
    torch.manual_seed(0)
    fan = FAN().eval()
    with torch.no_grad():
        assert fan(torch.zeros(1, 3, 256, 256)).shape == (1, 99, 64, 64)
    x = torch.rand(1, 3, 128, 64) * 2 - 1
    points = fan.find(x)
    assert points.shape == (1, 98, 2) and (points >= 0).all()
    assert points[..., 0].max() <= 64 and points[..., 1].max() <= 128 and points.std() > 0
    assert HourGlass(8).eval()(torch.zeros(1, 8, 16, 16)).shape == (1, 8, 16, 16)


def test_points_are_the_peaks_and_the_quirk_moves_only_the_first_quarter():
    grid = torch.arange(64.0)
    centres = torch.tensor([[10.0, 12.0], [50.0, 40.0]])
    dx, dy = grid - centres[:, :1], grid - centres[:, 1:]
    maps = torch.exp(-(dx[:, None, :] ** 2 + dy[:, :, None] ** 2) / 8)[None]
    scale = 255 / 63  # corners aligned
    plain, quirk = points_of(maps)[0], points_of(maps, quirk=True)[0]
    assert (plain - (centres * scale + 0.5)).abs().max() < 0.8
    assert torch.equal(plain[0], quirk[0])
    assert (quirk[1] - 0.5 == (quirk[1] - 0.5).round()).all()
    assert (plain[1] - quirk[1]).abs().max() == 0.25


def test_landmark_picture_shows_coloured_lines_on_white():
    points = torch.full((1, 98, 2), -100.0)
    for first, last, y in ((60, 68, 50), (76, 88, 120), (88, 96, 200)):
        points[0, first:last, 0] = torch.linspace(40, 200, last - first)
        points[0, first:last, 1] = y
    drawn = draw_landmarks(points, 256)[0]
    for y, colour in ((50, (1, 0, 0)), (120, (0, 128 / 255, 0)), (200, (0, 0, 1))):
        torch.testing.assert_close(drawn[:, y, 100], torch.tensor(colour, dtype=torch.float32))
        ink = (1 - drawn[:, y - 5 : y + 6, 100]).amax(0).sum()
        assert ink == pytest.approx(2 / 72 * 100, abs=0.3)  # thickness in pixels
    assert torch.equal(drawn[:, 80], torch.ones(3, 256))
    signed = draw_landmarks(points, 256, "signed")[0]
    torch.testing.assert_close(signed, 2 * drawn - 1)
    # What a loader makes of the file is the picture again.
    torch.testing.assert_close((to_file(drawn) - 0.5) / 0.5, drawn)
    with pytest.raises(ValueError, match="98, 2"):
        draw_landmarks(points[:, :5], 64)


def test_lines_of_the_landmark_picture_stay_open():
    points = torch.full((1, 98, 2), -100.0)
    turn = torch.linspace(0, 2 * torch.pi * 7 / 8, 8)
    points[0, 60:68] = torch.stack((128 + 60 * turn.cos(), 128 + 60 * turn.sin()), -1)
    drawn = draw_landmarks(points, 256)[0]
    middle = points[0, [60, 67]].mean(0).round().int()
    assert drawn[:, middle[1], middle[0]].min() == 1
    middle = points[0, 60:62].mean(0).round().int()
    assert drawn[1, middle[1], middle[0]] < 0.5


# --- files ------------------------------------------------------------------------------------------


def test_released_files_load_whatever_their_wrapper(tmp_path):
    torch.manual_seed(0)
    fan = FAN()
    four_stacks = {
        **fan.state_dict(),
        "m1.coordconv.conv.bias": torch.zeros(256),
        "bl0.weight": torch.zeros(1),
    }
    torch.save({"state_dict": four_stacks}, tmp_path / "wing.ckpt")
    torch.save({"fan": {f"module.{k}": v for k, v in fan.state_dict().items()}}, tmp_path / "nets.ckpt")
    for name in ("wing.ckpt", "nets.ckpt"):
        loaded = load_official("fan", tmp_path / name)
        assert not loaded.training
        assert torch.equal(loaded.l0.weight, fan.l0.weight)
    assert len(compare(fan, states_of(tmp_path / "wing.ckpt")[""]).unexpected) == 2
    check_files(CheckConfig((tmp_path / "wing.ckpt", tmp_path / "nets.ckpt")))


def test_files_that_do_not_fit_say_why(tmp_path, capsys):
    state = FAN().state_dict()
    del state["l0.bias"]
    state["l0.weight"] = torch.zeros(68, 256, 1, 1)
    torch.save({"fan": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"l0.bias is missing; l0.weight has shape \(68"):
        load_official("fan", tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no entry 'generator'; it holds fan"):
        load_official("generator", tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"do not fit: a.ckpt \(fan\)"):
        check_files(CheckConfig((tmp_path / "a.ckpt",)))
    assert "other shape" in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="holds no tensors"):
        load_official("fan", tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="generator, discriminator, face_model, fan"):
        official("unet")


def test_bench_calls_both_forms_of_a_network_in_turn(monkeypatch):
    """A busy minute would otherwise slow one form alone."""
    together = []

    def noted(runs, *_):
        together.append(sorted(runs))
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(bench, "in_turn", noted)
    rows = bench.networks(Size(32, 256, 8, 8), torch.device("cpu"), 0.0, 1)
    assert together.count(["fast", "official"]) == 3  # identity encoder, discriminator, one swap
    cost = {(row["what"], row["form"]): row["gmacs"] for row in rows}
    assert cost["one swap", "fast"] < 0.5 * cost["one swap", "official"]
