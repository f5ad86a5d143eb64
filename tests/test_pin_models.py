"""PIN: networks under their official names, the defence built from them, and the reading of released
files."""

import json
from pathlib import Path

import pytest
import torch

import pin
from pin import bench
from pin.ais import AISEncoder, AISSelection
from pin.basis import Basis, load_basis
from pin.data import preprocess
from pin.model import (
    DAE,
    NETWORKS,
    PIN,
    Defended,
    Encoder,
    PCASelection,
    ir_variant,
    load_official,
    make_esn,
    official,
)
from pin.recognizers import ColourIn, adapt
from shared.bench import count_macs, count_parameters
from shared.io import read_image, write_image
from shared.irse import IRSE
from shared.runtime import UserError

KEYS = json.loads((Path(pin.__file__).parent / "keys.json").read_text())


def expected_shapes(name: str) -> dict[str, list[int]]:
    shapes = {}
    for key, shape in KEYS[name].items():
        if not key.endswith(".bn"):
            shapes[key] = shape
            continue
        base = key.removesuffix(".bn")
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{base}.{entry}"] = [shape]
        shapes[f"{base}.num_batches_tracked"] = []
    return shapes


def meta(name: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return official(name, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_official_names_and_shapes(name):
    found = {key: list(value.shape) for key, value in meta(name).state_dict().items()}
    assert found == expected_shapes(name)


def test_every_listed_network_is_there():
    assert set(KEYS) - {"_about"} == set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dae", 4_576_512),
        ("encoder", 11_514_240),
        ("pca_layer", 14_128_580),
        ("arcface_ir_se50", 43_813_568),
        ("arcface_ir50", 43_590_848),
        ("ais_encoder", 11_525_760),
        ("ais_pca_layer", 13_685_140),
    ],
)
def test_parameter_counts(name, parameters):
    assert count_parameters(meta(name)) == parameters


def test_light_cnn_parameters_without_the_classifier():
    network = meta("lightcnn29")
    assert count_parameters(network) - count_parameters(network.fc2) == 12_573_280


@pytest.mark.parametrize(
    ("name", "shape", "gmacs"),
    [
        ("dae", (1, 1, 112, 112), 3.266),
        ("encoder", (1, 1, 112, 112), 2.634),
        ("pca_layer", (1, 512, 7, 7), 0.0141),
        ("arcface_ir_se50", (1, 3, 112, 112), 6.310),
        ("lightcnn29", (1, 1, 128, 128), 3.619),
    ],
)
def test_cost_at_full_size(name, shape, gmacs):
    macs = count_macs(meta(name).eval(), torch.zeros(shape, device="meta"))
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.005)


def test_probabilities_keep_their_digits_under_autocast():
    esn = make_esn(16, 64, (4, 8), 16)
    torch.nn.init.constant_(esn.pca_layer.fc2[0].bias, 6.5)  # p = 0.9985
    with torch.autocast("cpu", torch.bfloat16):
        p = esn(torch.rand(4, 1, 16, 16))
    assert p.dtype == torch.float32
    assert ((p > 0.9965) & (p < 0.9999)).all(), "bf16 has no number there"
    (slope,) = torch.autograd.grad(p.sum(), esn.pca_layer.fc2[0].bias)
    torch.testing.assert_close(slope, (p * (1 - p)).sum(0), rtol=0.02, atol=1e-6)


def test_bench_of_attack_and_basis(monkeypatch):
    monkeypatch.setattr(bench, "SIZE", 8)
    linear = torch.nn.Linear(3 * 8 * 8, 4, bias=False)
    monkeypatch.setattr(bench, "official", lambda _: torch.nn.Sequential(torch.nn.Flatten(), linear))
    monkeypatch.setattr(bench, "adapt", lambda _, network: lambda x: network(x.expand(-1, 3, -1, -1)))
    options = bench.Options(seconds=0, pairs=5, attack_batches=(2, 3))
    rows = {row["what"]: row for row in bench.attack_rows(torch.device("cpu"), options)}
    assert len(rows) == 6 and all(row["per_second"] > 0 for row in rows.values())
    one = rows["gradient of IR-SE50, fp32, batch 3"]["gmacs"]
    assert one == pytest.approx(2 * linear.weight.numel() / 1e9), "forward and the image's gradient"
    whole = next(row for what, row in rows.items() if what.startswith("PGD-40 on 5 pairs, IR-SE50, bf16"))
    assert whole["gmacs"] == pytest.approx(40 * one)
    stream, solved = bench.basis_rows(torch.device("cpu"), images=100, block=30)
    assert stream["per_second"] > 0 and solved["what"] == "all 64 eigenfaces, float64"


@pytest.mark.parametrize(
    ("name", "shape", "output"),
    [
        ("encoder", (2, 1, 112, 112), (2, 512, 7, 7)),
        ("pca_layer", (2, 512, 7, 7), (2, 2500)),
        ("ais_encoder", (2, 1, 112, 112), (2, 512, 7, 7)),
        ("ais_pca_layer", (2, 512, 7, 7), (2, 1500)),
        ("arcface_ir_se50", (2, 3, 112, 112), (2, 512)),
        ("lightcnn9", (2, 1, 128, 128), (2, 256)),
        ("lightcnn29", (2, 1, 128, 128), (2, 256)),
        ("lightcnn29_v2", (2, 1, 128, 128), (2, 256)),
    ],
)
def test_output_shapes_at_full_size(name, shape, output):
    assert meta(name).eval()(torch.zeros(shape, device="meta")).shape == output


def test_dae_uses_its_first_stage_twice():
    torch.manual_seed(0)
    shared = DAE((4, 8)).eval()
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    x1, x2 = shared(x)
    assert torch.equal(shared(x1)[0], x2)
    separate = DAE((4, 8), second_stage="separate").eval()
    separate.load_state_dict(shared.state_dict())
    assert torch.equal(separate(x)[0], x1)
    assert not torch.allclose(separate(x)[1], x2)
    assert all(not parameter.requires_grad for parameter in shared.encoder2.parameters())


def test_unit_features_and_adapters():
    torch.manual_seed(0)
    network = official("lightcnn9", classes=3).eval()
    x = torch.rand(2, 1, 112, 112) * 2 - 1
    seen = []
    network.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    adapt("lightcnn9", network)(x)
    adapt("lightcnn9", network, legacy=True)(x)
    assert seen[0].shape == (2, 1, 128, 128)
    assert seen[0].min() >= 0 > seen[1].min()
    torch.testing.assert_close(seen[0] * 2 - 1, seen[1])
    arc = adapt("arcface_ir50", meta("arcface_ir50").eval())
    assert arc(torch.zeros(1, 1, 112, 112, device="meta")).shape == (1, 512)


def test_colour_enters_as_the_luma_that_files_are_read_with(tmp_path):
    image = torch.rand(3, 16, 16)
    write_image(tmp_path / "a.png", image)
    seen = ColourIn(lambda x: x)(read_image(tmp_path / "a.png")[None] * 2 - 1)
    torch.testing.assert_close(seen[0], preprocess(tmp_path / "a.png", 16), atol=1 / 127, rtol=0)


# --- released files -------------------------------------------------------------------------------


def zeros(name: str, **options) -> dict[str, torch.Tensor]:
    return {
        key: torch.zeros(value.shape, dtype=value.dtype)
        for key, value in meta(name, **options).state_dict().items()
    }


def test_files_in_every_wrapper(tmp_path):
    state = zeros("dae") | {"encoder1.0.nolinear1.weight": torch.full((64,), 0.5)}
    forms = {
        "bare": state,
        "model": {"model": state},
        "module": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "combined": {f"dae.{key}": value for key, value in state.items()}
        | {"pca_layer.fc1.1.bias": torch.zeros(512)},
        "trainer": {"model": state, "optimizer": {"lr": 0.1}, "epoches": 3},
    }
    for form, content in forms.items():
        path = tmp_path / f"{form}.pth"
        torch.save(content, path)
        assert load_official("dae", path).encoder1[0].nolinear1.weight[0] == 0.5, form


SMALL = {
    "dae": lambda: DAE((2, 4)),
    "encoder": lambda: Encoder((2, 4)),
    "pca_layer": lambda: PCASelection(16, 4, 6),
    "ais_encoder": lambda: AISEncoder((2, 4)),
    "ais_pca_layer": lambda: AISSelection(16, 4, 6, items=3),
    "arcface_ir50": lambda variant: IRSE(16, ((4, 1), (8, 1)), se=False, variant=variant),
}


def with_prefix(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("own", [("ais_encoder", "ais_pca_layer"), ("dae", "encoder", "pca_layer")])
def test_every_part_of_a_combined_file_in_every_form(tmp_path, monkeypatch, own):
    """AIS' one file with both parts as entries, or a whole DefenseModel's state with prefixes; wrapped or
    not."""
    names = (*own, "arcface_ir50")
    for name in names:
        monkeypatch.setitem(NETWORKS, name, SMALL[name])
    states = {name: official(name).state_dict() for name in own}
    states["arcface_ir50"] = official("arcface_ir50", variant="pin").state_dict()
    parts = {name: name.removeprefix("ais_") for name in own} | {"arcface_ir50": "reg_model"}
    entries = {parts[name]: states[name] for name in names}
    processes = {part: with_prefix("module.", state) for part, state in entries.items()}
    flat = lambda parts: dict(  # noqa: E731
        item for part, state in parts.items() for item in with_prefix(f"{part}.", state).items()
    )
    forms = {
        "entries": entries | {"epoches": 3},
        "wrapped entries": {"model": entries},
        "wrapped in the entries": {part: {"model": state} for part, state in entries.items()},
        "of several processes": processes,
        "prefixes": flat(entries),
        "wrapped prefixes": {"state_dict": with_prefix("module.", flat(entries))},
        "of several processes, prefixes": flat(processes),
    }
    for form, content in forms.items():
        torch.save(content, tmp_path / "combined.pth")
        for name in names:
            loaded = load_official(name, tmp_path / "combined.pth").state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in states[name].items()), (form, name)


def test_the_follow_ups_file_at_full_size(tmp_path):
    constants = {"encoder": 0.25, "pca_layer": 0.5}
    content = {
        part: {
            key: torch.full((), value, dtype=of.dtype).expand(of.shape)
            for key, of in meta(f"ais_{part}").state_dict().items()
        }
        for part, value in constants.items()
    }
    torch.save(content, tmp_path / "ais.pth")
    assert (load_official("ais_encoder", tmp_path / "ais.pth").block8.conv2.weight == 0.25).all()
    memory = load_official("ais_pca_layer", tmp_path / "ais.pth").memory.units.weight
    assert memory.shape == (128, 512) and (memory == 0.5).all()


def test_ir_variants_are_told_apart(tmp_path):
    for variant in ("pin", "insightface_pytorch"):
        state = zeros("arcface_ir_se50", variant=variant)
        assert ir_variant(state) == variant
        torch.save(state, tmp_path / "ir.pth")
        loaded = load_official("arcface_ir_se50", tmp_path / "ir.pth")
        assert set(loaded.state_dict()) == set(state)
    other = official("arcface_ir_se50", variant="insightface_pytorch").state_dict()
    assert "body.0.res_layer.5.fc1.weight" in other and "body.0.shortcut_layer.0.weight" not in other


def test_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "dae.pth"
    torch.save(zeros("dae"), path)
    with pytest.raises(UserError, match="in_layer.0.weight is missing"):
        load_official("encoder", path)
    with pytest.raises(UserError, match="no network"):
        official("vgg")
    torch.save({"epoches": 3}, path)
    with pytest.raises(UserError, match="holds no weights"):
        load_official("dae", path)
    for content in (torch.zeros(3), [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match="dae.pth: holds no weights"):
            load_official("dae", path)
        with pytest.raises(UserError, match="dae.pth: no eigenfaces"):
            load_basis(path)


# --- the defence ----------------------------------------------------------------------------------


@pytest.fixture
def small():
    torch.manual_seed(0)
    basis = Basis(torch.randn(64) * 0.1, torch.linalg.qr(torch.randn(64, 20)).Q)
    return basis, DAE((4,)).eval(), make_esn(8, 20, (4, 8), hidden=16).eval()


@pytest.fixture
def x():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_projection_is_the_definition(small, x):
    basis, dae, esn = small
    q = (torch.rand(5, 20) > 0.5).float()
    result = PIN(basis, dae, esn).project(x, q)
    for image, mask, projected in zip(x, q, result, strict=True):
        kept = basis.eig_vec[:, mask.bool()]
        slow = basis.avg_face + kept @ (kept.T @ (image.flatten() - basis.avg_face))
        torch.testing.assert_close(projected.flatten(), slow, atol=1e-5, rtol=1e-5)


def test_no_eigenface_gives_the_mean_face_and_all_give_the_span(small, x):
    basis, dae, esn = small
    pin_ = PIN(basis, dae, esn)
    torch.testing.assert_close(
        pin_.project(x, torch.zeros(5, 20)), basis.avg_face.view(1, 1, 8, 8).expand_as(x)
    )
    full = Basis(basis.avg_face, torch.linalg.qr(torch.randn(64, 64)).Q)
    torch.testing.assert_close(PIN(full, dae, esn).project(x, torch.ones(5, 64)), x, atol=1e-5, rtol=1e-5)


def test_mask_modes(small, x):
    basis, dae, esn = small
    p = torch.tensor([[0.9, 0.6, 0.4, 0.1], [0.2, 0.1, 0.05, 0.01]])
    mask = lambda mode, **options: PIN(basis, dae, esn, mode, **options).mask(p)  # noqa: E731
    assert mask("threshold").tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert mask("mean").tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]  # one mean for the whole batch
    assert mask("topk", k=2).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask("topk", k=99).sum() == 8 and mask("topk", k=0).sum() == 0
    assert torch.equal(mask("expected"), p)
    draw = lambda seed: mask("sample", generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    frequency = torch.stack([draw(seed) for seed in range(2000)]).mean(0)
    torch.testing.assert_close(frequency, p, atol=0.05, rtol=0)


def test_gradients_of_the_two_attackers(small, x):
    basis, dae, esn = small
    x = x.requires_grad_()
    g = torch.randn(x.shape)
    constant = PIN(basis, dae, esn, "threshold")
    (gradient,) = torch.autograd.grad((constant(x) * g).sum(), x)
    q = constant.mask(constant.probabilities(x))
    expected = ((g.flatten(1) @ basis.eig_vec) * q) @ basis.eig_vec.T
    torch.testing.assert_close(gradient.flatten(1), expected, atol=1e-5, rtol=1e-4)
    through = PIN(basis, dae, esn, "threshold", gradient="straight_through")
    torch.testing.assert_close(through(x), constant(x))
    (other,) = torch.autograd.grad((through(x) * g).sum(), x)
    p = through.probabilities(x)
    coefficients = basis.coefficients(x).detach()
    (extra,) = torch.autograd.grad((p * coefficients * (g.flatten(1) @ basis.eig_vec)).sum(), x)
    torch.testing.assert_close(other, gradient + extra, atol=1e-5, rtol=1e-4)


def test_defended_averages_draws_of_unit_features(small, x):
    basis, dae, esn = small
    pin_ = PIN(basis, dae, esn, "sample", generator=torch.Generator().manual_seed(3))
    recognizer = lambda image: image.flatten(1) * 7  # noqa: E731
    features = Defended(recognizer, pin_, draws=4)(x)
    assert features.shape == (5, 64) and (features.norm(dim=1) <= 1 + 1e-5).all()
    assert Defended(recognizer, pin_)(x).norm(dim=1).max() > 1


def test_wrong_size_and_short_basis_are_clear(small, x):
    basis, dae, esn = small
    with pytest.raises(UserError, match="do not fit eigenfaces of 8 x 8 pixels"):
        basis.coefficients(torch.zeros(1, 1, 9, 9))
    with pytest.raises(UserError, match="do not fit eigenfaces of 8 x 8 pixels"):
        PIN(basis, dae, esn)(torch.zeros(1, 1, 9, 9))
    with pytest.raises(UserError, match="20 eigenfaces and 30 are asked"):
        Basis(basis.avg_face, basis.eig_vec, components=30)
    with pytest.raises(UserError, match="unit length"):
        Basis(basis.avg_face, basis.eig_vec * 3)


def test_official_eigenfaces_file_and_hash(small, tmp_path):
    basis = small[0]
    path = tmp_path / "lfw_eig.pth"
    torch.save({"eig_vec": basis.eig_vec, "avg_face": basis.avg_face}, path)
    loaded = load_basis(path, 12)
    assert loaded.size == (64, 12)
    with pytest.raises(UserError, match="another basis"):
        loaded.check(basis.fingerprint(), "this ESN")
    basis.save(tmp_path / "basis.safetensors")
    load_basis(tmp_path / "basis.safetensors").check(basis.fingerprint(), "this ESN")
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="no eigenfaces"):
        load_basis(path)
