"""Biphasic ageing: metrics against closed forms, judges, baselines, claims."""

import math
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from biphasic_age import faces_eval, protocol
from biphasic_age.baselines import PlainGenerator, Prototypes, copy
from biphasic_age.claims import face_claims, scene_claims
from biphasic_age.data import drawn_faces
from biphasic_age.eval import EvalConfig
from biphasic_age.faces_eval import as_kept, open_judge, open_judges
from biphasic_age.judges import AgeJudge, IdentityJudge, OnnxJudge, train_age_judge, train_identity_judge
from biphasic_age.model import SIZES
from biphasic_age.scene import draw_scenes
from biphasic_age.scene_eval import SceneTest, measure_scene
from biphasic_age.train import PRESETS
from shared.published import load_published
from shared.runtime import UserError

LIMITS = (30.0, 40.0, 50.0)


# --- ageing accuracy --------------------------------------------------------------------------------------


def test_age_rows_against_a_closed_form():
    source = torch.tensor([0, 0, 1, 2, 3])
    real = torch.tensor([20.0, 24.0, 36.0, 46.0, 60.0])
    years = torch.tensor([[22.0, 33, 44, 55], [24, 39, 46, 49], [0, 0, 0, 0], [0, 0, 0, 0], [26, 41, 47, 60]])
    rows = {(row.direction, row.target): row for row in protocol.age_rows(years, real, source, LIMITS)}
    assert set(rows) == {("older", 1), ("older", 2), ("older", 3)} | {("younger", k) for k in (0, 1, 2)}
    row = rows["older", 3]
    assert (row.mean, row.std, row.real_mean, row.error, row.hit) == (52.0, 3.0, 60.0, 8.0, 0.5)
    assert rows["younger", 0].error == 4.0 and rows["younger", 1].hit == 0.0
    assert rows["younger", 0].real_std == 2.0
    assert protocol.rising_share(years, source, 0) == 1.0
    assert protocol.rising_share(torch.tensor([[1.0, 2, 2, 3], [1, 2, 3, 4]]), torch.zeros(2), 0) == 0.5


def test_a_direction_without_inputs_has_no_rows():
    rows = protocol.age_rows(torch.ones(2, 4), torch.ones(2), torch.tensor([0, 3]), LIMITS)
    assert {(r.direction, r.target) for r in rows} == {("older", 3), ("younger", 0)}


# --- identity -----------------------------------------------------------------------------------------------


def test_threshold_is_the_laxest_at_the_rate():
    generator = torch.Generator().manual_seed(0)
    centres = nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    people = torch.arange(40).repeat_interleave(3)
    faces = nn.functional.normalize(centres[people] + 0.15 * torch.randn(120, 8, generator=generator), dim=1)
    verifier = protocol.calibrate(faces, people)
    scores = faces @ faces.T
    upper = torch.ones_like(scores).triu(1).bool()
    same = people[:, None] == people[None]
    impostor, genuine = scores[~same & upper], scores[same & upper]
    assert verifier.impostor == len(impostor) == 120 * 119 // 2 - 120 and verifier.genuine == 120
    accepted = (impostor >= verifier.threshold).sum().item()
    assert accepted <= 10 and verifier.far == pytest.approx(accepted / len(impostor))
    assert verifier.tar == pytest.approx((genuine >= verifier.threshold).float().mean().item())
    laxer = torch.cat((impostor, genuine))
    laxer = laxer[laxer < verifier.threshold].max()
    assert (impostor >= laxer).sum() > 10 or (genuine >= laxer).sum() > verifier.tar * len(genuine)
    alone = protocol.calibrate(faces[::3], people[::3])  # nobody twice: the threshold is that of the others
    others = (faces[::3] @ faces[::3].T)[torch.ones(40, 40).triu(1).bool()]
    assert alone.genuine == 0 and math.isnan(alone.tar) and alone.impostor == len(others) == 780
    assert (others >= alone.threshold).sum() == 10 and alone.far == pytest.approx(10 / 780)
    with pytest.raises(ValueError, match="calibration"):
        protocol.calibrate(faces[:3], people[:3])  # one person


def test_identity_numbers():
    inputs = torch.tensor([[1.0, 0.0]])
    made = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    kept = protocol.identity_kept(made, inputs, 0.5)
    assert torch.allclose(kept["confidence"], torch.tensor([[1.0, 0.0, 0.6]]))
    assert kept["verified"].tolist() == [[True, False, True]]
    assert kept["between"].item() == pytest.approx((0 + 0.6 + 0.8) / 3)


def test_only_translations_count():
    values = torch.arange(12.0).view(3, 4)
    source = torch.tensor([0, 1, 3])
    assert protocol.translated_only(values, source).tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert protocol.at_extremes(values, source).tolist() == [1, 2, 3, 8, 9, 10]


# --- change -------------------------------------------------------------------------------------------------


def test_change_by_part():
    image = torch.zeros(1, 3, 2, 2)
    layout = torch.tensor([[[0, 1], [1, 2]]], dtype=torch.uint8)
    made = torch.zeros(1, 2, 3, 2, 2)
    made[:, 0] = 9  # the own age is not a translation
    made[0, 1, :, 0, 0], made[0, 1, :, 0, 1], made[0, 1, :, 1, 0] = 0.1, 0.2, 0.4
    change = protocol.part_change(made, image, layout, torch.tensor([0]), 4)
    assert torch.allclose(change[:3], torch.tensor([0.1, 0.3, 0.0])) and math.isnan(change[3])
    assert protocol.pooled_change(made, image, layout, torch.tensor([0]), (0, 2)) == pytest.approx(0.05)


def test_change_is_counted_beyond_what_single_precision_counts():
    """As many pixels as two hundred faces have at 256x256."""
    image = torch.zeros(1).expand(40, 3, 700, 700)
    layout, source = torch.zeros(1, dtype=torch.uint8).expand(40, 700, 700), torch.zeros(40)
    made = torch.full((1,), 0.1).expand(40, 2, 3, 700, 700)
    total, pixels = protocol.changes(made, image, layout, source, 2)
    assert pixels.tolist() == [40 * 700 * 700, 0] and 40 * 700 * 700 > 2**24
    assert total[0].item() == pytest.approx(0.1 * 40 * 700 * 700, rel=1e-6)


def test_mean_iou_and_psnr():
    found = torch.tensor([[[0, 1], [1, 1]]])
    wanted = torch.tensor([[[0, 0], [1, 1]]])
    assert protocol.mean_iou(found, wanted, 5) == pytest.approx((1 / 2 + 2 / 3) / 2)
    a = torch.zeros(2, 3, 4, 4)
    assert torch.allclose(protocol.psnr(a, a + 0.2), torch.full((2,), 20.0))


def test_translate_all_asks_for_every_age():
    def method(image, layout, source, target):
        return image + (10 * source + target).view(-1, 1, 1, 1)

    source = torch.tensor([0, 2, 1])
    made = protocol.translate_all(method, torch.zeros(3, 3, 2, 2), torch.zeros(3, 2, 2), source, 4, batch=8)
    expected = 10 * source[:, None] + torch.arange(4)
    assert torch.equal(made[:, :, 0, 0, 0], expected.float())
    years = protocol.in_batches(lambda x: x.mean((1, 2, 3)), made, batch=5)
    assert torch.equal(years, expected.float())


# --- judges and baselines --------------------------------------------------------------------------------


def test_judges_learn_and_ignore_no_part():
    source = drawn_faces(16, 1, 16, 4)
    torch.manual_seed(0)
    judges = {"age": AgeJudge(8, 2, 3), "identity": IdentityJudge(8, 2)}
    image = source.images * 2 - 1
    before = {
        "age": (judges["age"](image) - source.ages).abs().mean(),
        "identity": judges["identity"].loss(image, source.people),
    }
    train_age_judge(judges["age"], source, 60, 32, torch.device("cpu"), 0)
    train_identity_judge(judges["identity"], source, 60, 32, torch.device("cpu"), 0)
    with torch.no_grad():
        assert (judges["age"](image) - source.ages).abs().mean() < 0.8 * before["age"]
        assert judges["identity"].loss(image, source.people) < 0.9 * before["identity"]
        embedded = judges["identity"](image)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(64), atol=1e-5)
    assert not any(p.requires_grad for judge in judges.values() for p in judge.parameters())


def test_judges_are_kept_until_they_are_asked_for_differently(tmp_path, monkeypatch):
    """What an option says holds, whatever judges an earlier evaluation left; `continuous.py` takes those."""
    taught = []
    for kind in ("age", "identity"):
        monkeypatch.setattr(
            faces_eval, f"train_{kind}_judge", lambda *given, kind=kind: taught.append((kind, given[2]))
        )
    settings = EvalConfig(judge_width=4, judge_people=4, judge_steps=3, device="cpu")
    config, device = replace(PRESETS["demo"], image_size=16), torch.device("cpu")
    monkeypatch.setattr(faces_eval, "CALIBRATION_PEOPLE", 4)
    for asked, steps in ((settings, 3), (settings, None), (replace(settings, judge_steps=5), 5)):
        taught.clear()
        open_judges(asked, config, "faces", tmp_path, device)
        assert taught == ([] if steps is None else [("age", steps), ("identity", steps)])
    (tmp_path / "judges" / "faces-identity.json").unlink()
    taught.clear()
    asked = replace(settings, judge_steps=5)
    open_judge("age", asked, config, "faces", tmp_path, device, 3, None)  # what `continuous.py` needs
    assert taught == []
    kept = as_kept(EvalConfig(judge_width=8), tmp_path, "faces")
    assert (kept.judge_width, kept.judge_steps) == (4, 5)
    assert as_kept(EvalConfig(), tmp_path, "morph") == EvalConfig()


def test_one_person_alone_gives_no_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(faces_eval, "CALIBRATION_PEOPLE", 1)
    for kind in ("age", "identity"):
        monkeypatch.setattr(faces_eval, f"train_{kind}_judge", lambda *given: None)
    settings = EvalConfig(judge_width=4, judge_people=4, device="cpu")
    with pytest.raises(UserError, match="the test fold shows one person alone"):
        open_judges(settings, replace(PRESETS["demo"], image_size=16), "faces", tmp_path, torch.device("cpu"))


def onnx_file(path, output: str, size: int | str = "S") -> None:
    """A network that averages the picture over its pixels: (N, 3); or over all numbers: (N, 1)."""
    axes = [2, 3] if output == "embedding" else [1, 2, 3]
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=0)
    graph = helper.make_graph(
        [node],
        "judge",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        str(path),
    )


def test_an_estimator_of_the_user(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    onnx_file(tmp_path / "age.onnx", "age", 4)
    assert torch.allclose(OnnxJudge(tmp_path / "age.onnx", False)(images), images.mean((1, 2, 3)), atol=0.05)
    onnx_file(tmp_path / "id.onnx", "embedding")
    embedded = OnnxJudge(tmp_path / "id.onnx", True)(images)
    assert torch.allclose(embedded, nn.functional.normalize(images.mean((2, 3)), dim=1), atol=1e-5)
    with pytest.raises(UserError, match="embeddings must be"):
        OnnxJudge(tmp_path / "age.onnx", True)(images)
    with pytest.raises(UserError, match="one age per picture"):
        OnnxJudge(tmp_path / "id.onnx", False)(images)
    with pytest.raises(UserError, match="none.onnx: no such file"):
        OnnxJudge(tmp_path / "none.onnx", False)
    (tmp_path / "bad.onnx").write_text("no network")
    with pytest.raises(UserError, match="not an ONNX network"):
        OnnxJudge(tmp_path / "bad.onnx", False)


def test_prototypes_add_the_difference_of_the_means():
    images = torch.zeros(4, 3, 2, 2)
    images[1:3] = 0.5
    proto = Prototypes.of(images, torch.tensor([0, 1, 1, 0]), 2)
    made = proto(torch.full((1, 3, 2, 2), 0.1), None, torch.tensor([0]), torch.tensor([1]))
    assert torch.allclose(made, torch.full((1, 3, 2, 2), 0.6))
    assert copy(images, None, None, None) is images


def test_plain_generator_sees_the_age_and_not_the_layout():
    torch.manual_seed(0)
    net = PlainGenerator(SIZES["unit"], 4, "residual").eval()
    nn.init.normal_(net.last.weight)
    nn.init.normal_(net.join.weight)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    layout = torch.zeros(2, 16, 16, dtype=torch.long)
    young, old = (net(image, layout, torch.full((2,), k)) for k in (0, 3))
    assert young.shape == image.shape and not torch.equal(young, old)
    assert torch.equal(young, net(image, layout + 1, torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ValueError, match="gate"):
        PlainGenerator(SIZES["unit"], 4, "gated")


# --- the scene and the claims ----------------------------------------------------------------------------


class KnowsAges(nn.Module):
    """Reads the true age of a scene: the wrinkles' strength in the given phase, in four steps."""

    def __init__(self, scenes):
        super().__init__()
        self.truth = scenes.image.flatten(0, 1) * 2 - 1

    def forward(self, image):
        nearest = torch.cdist(image.flatten(1), self.truth.flatten(1)).argmin(1)
        return 25.0 + 10 * (nearest % 4)


def test_the_truth_holds_every_claim_on_the_scene_and_a_copy_does_not():
    scenes = draw_scenes(12, 0, 16)
    test = SceneTest(scenes, KnowsAges(scenes), LIMITS)
    truth = scenes.image * 2 - 1

    def perfect(image, layout, source, target):
        nearest = torch.cdist(image.flatten(1), truth.flatten(0, 1).flatten(1)).argmin(1)
        return truth[nearest // 4, target]

    device = torch.device("cpu")
    best, copied = measure_scene(perfect, test, device), measure_scene(copy, test, device)
    assert best["true PSNR"] > 80 and best["age accuracy"] == 1 and best["leak"] == 0
    assert best["hair rising older"] == best["wrinkles rising younger"] == 1
    assert copied["change"] == 0 and copied["age accuracy"] == 0
    best["change/leak"] = 1e3
    claims = scene_claims({"full": best, "copy": copied, "no-layout": best | {"change/leak": 3.0}})
    assert [claim.holds for claim in claims] == [True] * 6
    same = copied | {"change/leak": 1.0}
    claims = scene_claims({"full": same, "copy": copied, "no-layout": same, "no-self": same})
    # A copy reconstructs itself, and nothing else.
    assert [claim.holds for claim in claims] == [False, True, False, False, False, False, False]


FACE = {
    "age error older": 3.0, "age error younger": 4.0, "rising older": 0.9, "rising younger": 0.9,
    "verification rate": 0.95, "true PSNR": 22.0, "change/leak": 6.0,
}  # fmt: skip
COPY = FACE | {"age error older": 30.0, "age error younger": 28.0, "true PSNR": 20.0}


def test_claims_on_faces_can_fail_one_by_one():
    others = {
        "copy": COPY,
        "plain": FACE | {"change/leak": 2.0},
        "prototypes": FACE | {"age error older": 9.0},
    }
    good = face_claims("faces", {"full": FACE, **others}, {"TAR": 0.9})
    assert len(good) == 6 and all(claim.holds for claim in good)
    for change, failing in (
        ({"age error older": 16.0}, {0, 5}),
        ({"rising younger": 0.5}, {1}),
        ({"verification rate": 0.8}, {2}),
        ({"true PSNR": 20.4}, {3}),
        ({"change/leak": 1.5}, {4}),
    ):
        claims = face_claims("faces", {"full": FACE | change, **others}, {"TAR": 0.9})
        assert {i for i, claim in enumerate(claims) if not claim.holds} == failing, change
    assert not face_claims("faces", {"copy": COPY}, {"TAR": 0.9})


def test_published_numbers_are_context_only():
    published = load_published("biphasic_age")
    assert "no row here is a result of the paper" in published["note"]
    assert len(published["rows"]) == 8 and all(
        row["source"][:3] in ("[R]", "[M]") for row in published["rows"]
    )
