"""MDRNets: networks, memory and attention against slow references."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdrnets.model import (
    SIZES,
    CoarseNet,
    Discriminator,
    MDRNet,
    RefineNet,
    load_official,
    official,
)
from mdrnets.parser import GROUPS, BiSeNetParser, FaceSpace, TinyParser, group_of_label, merge, parts_on_grid
from mdrnets.simple import draw_simple_faces
from shared.bench import count_macs, count_parameters
from shared.bisenet import BiSeNet
from shared.runtime import REPOSITORY, UserError

UNIT = SIZES["unit"]


def make_net(parts: int = 4, **options) -> MDRNet:
    torch.manual_seed(0)
    net = MDRNet(CoarseNet(UNIT), TinyParser(parts), RefineNet(UNIT, parts, **options), UNIT.stride)
    nn.init.normal_(net.refine.decoder.last.weight, 0, 0.1)
    return net


def sample(size: int = 16, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(batch, 3, size, size, generator=rng) * 2 - 1
    mask = torch.zeros(batch, 1, size, size)
    mask[0, :, 3:9, 4:11] = 1
    mask[1, :, 0:5, 0:16] = 1
    mask[2:, :, 7:8, 7:8] = 1
    return x, mask


# --- official parser --------------------------------------------------------------------------------


def test_bisenet_has_the_public_names_and_shapes():
    wanted = json.loads((REPOSITORY / "mdrnets" / "keys.json").read_text())
    for name, shapes in wanted.items():
        found = {key: list(value.shape) for key, value in official(name).state_dict().items()}
        assert found == shapes


def test_bisenet_gives_three_maps_of_the_input_size():
    with torch.no_grad():
        maps = BiSeNet().eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 19, 64, 96)] * 3


def slow_bisenet(p: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The public network's forward pass in eval mode, step by step from its parameters."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (p[f"{name}.{k}"].view(1, -1, 1, 1) for k in names)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def conv_bn_relu(name: str, x: torch.Tensor) -> torch.Tensor:
        return norm(f"{name}.bn", conv(f"{name}.conv", x)).relu()

    def layer(name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        for i, s in enumerate((stride, 1)):
            block = f"cp.resnet.{name}.{i}"
            y = norm(f"{block}.bn1", conv(f"{block}.conv1", x, s)).relu()
            y = norm(f"{block}.bn2", conv(f"{block}.conv2", y))
            if f"{block}.downsample.0.weight" in p:
                x = norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, s))
            x = (x + y).relu()
        return x

    def average(x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)

    def refined(name: str, x: torch.Tensor) -> torch.Tensor:
        x = conv_bn_relu(f"cp.{name}.conv", x)
        return x * norm(f"cp.{name}.bn_atten", conv(f"cp.{name}.conv_atten", average(x))).sigmoid()

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def between(n: int, wanted: int) -> torch.Tensor:
        """(wanted, n): linear interpolation whose first and last samples are those of the map."""
        places = torch.arange(wanted).double() * (n - 1) / (wanted - 1)
        return (1 - (places[:, None] - torch.arange(n)).abs()).clamp_min(0)

    def head(name: str, features: torch.Tensor) -> torch.Tensor:
        y = conv(f"{name}.conv_out", conv_bn_relu(f"{name}.conv", features))
        (h, w), (height, width) = y.shape[-2:], x.shape[-2:]
        return between(h, height) @ y @ between(w, width).T

    f = norm("cp.resnet.bn1", conv("cp.resnet.conv1", x, 2)).relu()
    f8 = layer("layer2", layer("layer1", F.max_pool2d(f, 3, 2, 1), 1), 2)
    f16 = layer("layer3", f8, 2)
    f32 = layer("layer4", f16, 2)
    context32 = refined("arm32", f32) + conv_bn_relu("cp.conv_avg", average(f32))
    context32 = conv_bn_relu("cp.conv_head32", doubled(context32))
    context16 = conv_bn_relu("cp.conv_head16", doubled(refined("arm16", f16) + context32))
    fused = conv_bn_relu("ffm.convblk", torch.cat((f8, context16), 1))
    gate = conv("ffm.conv2", conv("ffm.conv1", average(fused)).relu()).sigmoid()
    return [
        head("conv_out", fused * gate + fused),
        head("conv_out16", context16),
        head("conv_out32", context32),
    ]


def test_bisenet_computes_what_the_public_network_does():
    rng = torch.Generator().manual_seed(0)
    network = BiSeNet().double().eval()
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=rng)
        elif value.ndim == 4:
            nn.init.kaiming_normal_(value, generator=rng)
        elif name.endswith("running_var") or (value.ndim == 1 and value.is_floating_point()):
            value.uniform_(0.5, 1.5, generator=rng)
    x = torch.randn(2, 3, 64, 96, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        maps, wanted = network(x), slow_bisenet(network.state_dict(), x)
    for got, expected in zip(maps, wanted, strict=True):
        assert torch.allclose(got, expected, atol=1e-9) and expected.std() > 1e-3


def test_the_public_parser_is_asked_as_it_was_trained():
    """RGB normalised with ImageNet's numbers at 512x512; the first output; labels in the public order."""
    parser, seen = BiSeNetParser(), []

    def network(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(x)
        nose = torch.zeros(1, 19, *x.shape[-2:]).index_fill_(1, torch.tensor(10), 50.0)
        return nose, -nose, -nose

    parser.network.forward = network
    colour = torch.tensor((0.2, 0.5, 0.9)).view(1, 3, 1, 1)
    parts = parser((colour * 2 - 1).expand(1, 3, 256, 256), (64, 64))
    normal = (colour - torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)) / torch.tensor(
        (0.229, 0.224, 0.225)
    ).view(1, 3, 1, 1)
    assert torch.allclose(seen[0], normal.expand(1, 3, 512, 512), atol=1e-5)
    assert parts.shape == (1, 8, 64, 64) and (parts.argmax(1) == list(GROUPS).index("nose")).all()


@pytest.mark.parametrize("wrap", ["bare", "module", "state_dict"])
def test_official_weights_load_with_known_wrappers(tmp_path, wrap):
    torch.manual_seed(3)
    source = official("BiSeNet(n_classes=19)")
    state = source.state_dict()
    if wrap == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    path = tmp_path / "79999_iter.pth"
    torch.save({"state_dict": state} if wrap == "state_dict" else state, path)
    loaded = load_official("BiSeNet(n_classes=19)", path)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], source.eval()(x)[0])


def test_official_says_what_does_not_fit(tmp_path):
    state = official("BiSeNet(n_classes=19)").state_dict()
    state["conv_out.conv_out.weight"] = torch.zeros(11, 256, 1, 1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="conv_out.conv_out.weight has shape"):
        load_official("BiSeNet(n_classes=19)", tmp_path / "other.pth")
    with pytest.raises(UserError, match="BiSeNet"):
        official("ShowFace")


def test_merge_sums_groups_averages_cells_and_normalises():
    logits = torch.randn(2, 19, 8, 8)
    p = merge(logits.softmax(1), (4, 4))
    assert p.shape == (2, 8, 4, 4)
    assert torch.allclose(p.sum(1), torch.ones(2, 4, 4), atol=1e-6)
    brows = logits.softmax(1)[:, [2, 3]].sum(1)[:, :2, :2].mean((1, 2))
    assert torch.allclose(p[:, list(GROUPS).index("brows"), 0, 0], brows, atol=1e-6)


def test_every_label_has_one_group():
    table = group_of_label()
    assert len(table) == 19
    assert table[17] == table[18] == list(GROUPS).index("hair")


# --- sizes ------------------------------------------------------------------------------------------


def test_paper_scale_parameters():
    size = SIZES["mdrnet_256"]
    coarse = CoarseNet(size)
    assert count_parameters(coarse) == 10_774_595
    spreads = [p.std().item() for p in coarse.parameters() if p.ndim == 4]
    assert spreads == pytest.approx([0.02] * 22, rel=0.05)  # EdgeConnect's initialisation
    plain = RefineNet(size, 8, memory="none", mrem=False)
    full = RefineNet(size, 8)
    assert count_parameters(plain) == 10_774_595
    assert count_parameters(full) == 10_774_595 + 525_568 + 8 * 64 * 256
    shared = RefineNet(size, 8, memory="shared", mrem=False)
    assert shared.dmm.memory.numel() == full.dmm.memory.numel()
    critic = Discriminator()
    assert count_parameters(critic) == 2_763_776
    assert count_parameters(BiSeNet()) == 13_300_416
    with torch.no_grad():
        assert critic(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_paper_scale_cost():
    net = CoarseNet(SIZES["mdrnet_256"]).to("meta")
    x, mask = torch.zeros(1, 3, 256, 256, device="meta"), torch.zeros(1, 1, 256, 256, device="meta")
    assert count_macs(net, x, mask) == pytest.approx(48.68e9, rel=0.01)


# --- the whole --------------------------------------------------------------------------------------


def test_kept_pixels_are_returned_bit_for_bit():
    net, (x, mask) = make_net().eval(), sample()
    with torch.no_grad():
        out = net(x, mask)
    kept = (mask < 0.5).expand_as(x)
    assert torch.equal(out["output"][kept], x[kept])
    assert (out["output"] - x)[~kept].abs().max() > 1e-3
    assert out["output"].abs().max() <= 1


def test_what_the_hole_held_is_not_looked_at():
    net, (x, mask) = make_net().eval(), sample()
    other = torch.where(mask > 0.5, torch.full_like(x, float("nan")), x)
    with torch.no_grad():
        assert torch.equal(net(x, mask)["refined"], net(other, mask)["refined"])


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_empty_and_full_masks(fill):
    net, (x, _) = make_net().eval(), sample()
    with torch.no_grad():
        out = net(x, torch.full((3, 1, 16, 16), fill))
    assert out["output"].isfinite().all()
    if fill == 0:
        assert torch.equal(out["output"], x)


@pytest.mark.parametrize("height,width", [(17, 22), (16, 19), (13, 16)])
def test_any_size_is_padded_and_cut_back(height, width):
    net = make_net().eval()
    x, mask = torch.rand(1, 3, height, width), torch.zeros(1, 1, height, width)
    mask[..., 4:9, 5:12] = 1
    with torch.no_grad():
        out = net(x, mask)
    assert out["output"].shape == x.shape and out["coarse"].shape == x.shape
    assert torch.equal(out["output"] * (1 - mask), x * (1 - mask))


def test_round_trip_of_the_state_is_exact(tmp_path):
    for update in ("grad", "ema"):
        net, (x, mask) = make_net(update=update), sample()
        torch.save(net.state_dict(), tmp_path / "net.pt")
        torch.manual_seed(5)
        other = MDRNet(CoarseNet(UNIT), TinyParser(4), RefineNet(UNIT, 4, update=update), UNIT.stride)
        other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
        with torch.no_grad():
            a, b = net.eval()(x, mask), other.eval()(x, mask)
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert {"refine.dmm.memory", "refine.dmm.usage"} <= net.state_dict().keys()
        assert ("refine.dmm.age" in net.state_dict()) == (update == "ema")


def test_residual_output_starts_near_the_coarse_result():
    torch.manual_seed(0)
    comp, mask = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    parsing = torch.full((2, 4, 8, 8), 0.25)
    with torch.no_grad():
        assert (RefineNet(UNIT, 4)(comp, mask, parsing) - comp).abs().mean() < 0.1
        assert RefineNet(UNIT, 4, output="direct")(comp, mask, parsing).abs().max() <= 1
    lasts = []
    for output in ("residual", "direct"):
        torch.manual_seed(0)
        lasts.append(RefineNet(UNIT, 4, output=output).decoder.last.weight)
    assert torch.allclose(lasts[0], 0.1 * lasts[1]) and lasts[1].abs().max() > 0


def test_switches_change_what_they_name():
    comp, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    p = torch.randn(1, 4, 8, 8).softmax(1)
    q = p.roll(1, 1)

    def output(parsing, **options):
        torch.manual_seed(0)
        net = RefineNet(UNIT, 4, **options).eval()
        with torch.no_grad():
            return net(comp, mask, parsing)

    without_parsing = {
        "none": dict(memory="none", mrem=False),
        "shared": dict(memory="shared", mrem=False),
        "mrem": dict(memory="none"),
    }
    for name, options in without_parsing.items():
        assert torch.equal(output(p, **options), output(q, **options)), name
    for options in ({"mrem": False}, {}, {"memory": "none", "mrem": False, "seg_input": True}):
        assert not torch.equal(output(p, **options), output(q, **options))
    orders = [output(p, order=order) for order in ("dmm>mrem", "mrem>dmm", "parallel")]
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_discriminator_is_spectrally_normalised():
    torch.manual_seed(0)
    critic = Discriminator(8).train()
    for _ in range(30):
        critic(torch.rand(1, 3, 64, 64))
    for layer in critic.eval().layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.03)
    assert len(critic.forward_features(torch.rand(1, 3, 64, 64))) == 5


def test_evaluation_never_writes():
    net, (x, mask) = make_net(), sample()
    before = {k: v.clone() for k, v in net.eval().state_dict().items()}
    with torch.no_grad():
        net(x, mask)
    net.refine.dmm.count_reads()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_warm_up_reads_nothing():
    net, (x, mask) = make_net(update="ema"), sample()
    with torch.no_grad():
        net.eval()
        a = net(x, mask, read=False)["refined"]
        net.refine.dmm.memory.normal_()
        assert torch.equal(a, net(x, mask, read=False)["refined"])
        assert not torch.equal(a, net(x, mask)["refined"])


# --- tiny parser ------------------------------------------------------------------------------------


def test_face_space_tells_faces_from_other_pictures():
    rng = torch.Generator().manual_seed(0)
    space = FaceSpace()
    assert space.contains(torch.rand(2, 3, 32, 32)).all()  # knows nothing, says nothing
    space.learn(draw_simple_faces(400, 0)[0])
    faces = draw_simple_faces(100, 1)[0]
    assert space.contains(faces).float().mean() > 0.9
    others = {
        "noise": torch.rand(3, 32, 32, generator=rng),
        "flat": torch.full((3, 32, 32), 0.5),
        "a face that nobody sees": 0.5 + 0.1 * faces[space.contains(faces)][0],
        "stripes": (torch.arange(32) // 4 % 2).float().expand(3, 32, 32),
        "checks": ((torch.arange(32)[:, None] // 8 + torch.arange(32) // 8) % 2).float().expand(3, 32, 32),
    }
    for name, picture in others.items():
        assert not space.contains(picture[None]).any(), name


def test_the_tiny_parser_gives_probabilities():
    with torch.no_grad():
        parts = TinyParser(4)(torch.rand(2, 3, 16, 16) * 2 - 1, (4, 4))
    assert parts.min() >= 0 and torch.allclose(parts.sum(1), torch.ones(2, 4, 4))


def test_parts_on_grid_are_shares():
    parts = torch.tensor([[[0, 0], [1, 2]]])
    share = parts_on_grid(parts, 3, (1, 1)).flatten()
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25]))


def test_module_files_stay_short():
    for path in Path(REPOSITORY / "mdrnets").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_public_parser_asks_for_skin_and_features():
    parser, image = BiSeNetParser(64), torch.zeros(2, 3, 64, 64)
    parsing = torch.zeros(2, 8, 4, 4)
    parsing[:, 0], parsing[0, 0, 1:3], parsing[0, 1, 1:3], parsing[0, 3, 1, 1:3] = 1, 0, 0.9, 0.1
    assert parser.is_face(image, parsing).tolist() == [True, False]
    assert parser.train().network.training is False
    with torch.no_grad():
        assert torch.allclose(parser(image, (4, 4)).sum(1), torch.ones(2, 4, 4), atol=1e-5)
