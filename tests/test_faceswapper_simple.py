"""FaceSwapper: the simple world of flat ellipses, and a run in it."""

import json
from dataclasses import replace

import pytest
import torch

from faceswapper.claims import judge
from faceswapper.data import DrawnFaces, true_swap, unseen_pairs
from faceswapper.eval import Config as EvalConfig
from faceswapper.eval import main
from faceswapper.judges import SimpleReader, train_simple_embedder, train_simple_reader
from faceswapper.predict import Networks, open_swapper
from faceswapper.simple import ATTRIBUTES, IDENTITY, SimpleParams, draw_simple, simple_world
from faceswapper.train import PRESETS, train
from shared.runtime import UserError

SIZE = 32


def test_the_same_seed_draws_the_same():
    (one, person), (again, _), (other, _) = (simple_world(3, 4, seed) for seed in (5, 5, 6))
    assert one.identity.shape == (12, 12) and one.attributes.shape == (12, 11)
    assert person.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(one.identity.unique(dim=0)) == 3 and len(one.attributes.unique(dim=0)) == 12
    for a, b in zip(draw_simple(one, SIZE), draw_simple(again, SIZE), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(draw_simple(one, SIZE)[0], draw_simple(other, SIZE)[0])
    assert torch.equal(draw_simple(one[3:5], SIZE)[0], draw_simple(one, SIZE)[0][3:5]), "of any batch"


def middle(**attributes: float) -> SimpleParams:
    """One face with every number in the middle of its range but the named ones."""
    values = torch.full((1, len(ATTRIBUTES)), 0.5)
    for name, value in attributes.items():
        values[:, ATTRIBUTES.index(name)] = value
    return SimpleParams(torch.full((1, len(IDENTITY)), 0.5), values)


def test_mask_and_points_lie_where_the_face_is_drawn():
    for x, y in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        _, points, face = draw_simple(middle(shift_x=x, shift_y=y), 64)
        rows, columns = face[0].nonzero(as_tuple=True)
        place = torch.stack((columns, rows), 1).float().mean(0)
        wanted = torch.tensor((0.15 * (2 * x - 1), 0.10 * (2 * y - 1) + 0.05))
        torch.testing.assert_close((place + 0.5) / 32 - 1, wanted, atol=0.01, rtol=0)
        inner = points[0, 33:].round().long()
        assert face[0, inner[:, 1], inner[:, 0]].all()
        assert points[0, 60, 0] < points[0, 64, 0] < points[0, 68, 0] < points[0, 72, 0]
        assert points[0, 62, 1] < points[0, 66, 1] < points[0, 79, 1] < points[0, 85, 1]
    shut, open_ = (draw_simple(middle(eye=v, mouth=v), 64)[1][0] for v in (0.0, 1.0))
    for upper, lower in ((62, 66), (70, 74), (79, 85), (90, 94)):
        assert (open_[lower] - open_[upper])[1] > 1.5 * (shut[lower] - shut[upper])[1]
    white = DrawnFaces(middle(), torch.zeros(1), SIZE).lines[0]
    assert (white.amin(0) < 0.9).any() and not (white.amin(0) < 0.9)[:8].any(), "eyes and lips alone"


def test_the_true_swap_is_the_sources_person_on_the_targets_picture():
    source, target = unseen_pairs(SIZE, 6, 3, "unit", "simple")
    assert not (source.person == target.person).any()
    truth = DrawnFaces(true_swap(source.params, target.params), source.person, SIZE)
    assert torch.equal(truth.params.identity, source.params.identity)
    assert torch.equal(truth.params.attributes, target.params.attributes)
    assert torch.equal(truth.points, target.points) and torch.equal(truth.masks, target.masks)
    change = (truth.images.float() - target.images.float()).abs().amax(1, keepdim=True)
    assert change[target.masks.bool()].max() == 0, "outside the face nothing of a person"
    assert (change.amax((1, 2, 3)) > 20).all()


def test_every_number_shows():
    plain = SimpleParams(torch.full((1, len(IDENTITY)), 0.8), middle().attributes)
    less = -0.4 * torch.eye(len(IDENTITY)), -0.4 * torch.eye(len(ATTRIBUTES))
    people = SimpleParams(plain.identity + less[0], plain.attributes.expand(len(IDENTITY), -1))
    others = SimpleParams(plain.identity.expand(len(ATTRIBUTES), -1), plain.attributes + less[1])
    for changed in (people, others):
        change = draw_simple(changed, SIZE)[0] - draw_simple(plain, SIZE)[0]
        assert (change.abs().amax((1, 2, 3)) > 0.01).all()


def test_the_judges_learn_to_tell_people_apart_and_to_read():
    torch.set_num_threads(1)
    people = DrawnFaces(*simple_world(20, 12, 1), SIZE)
    unseen = DrawnFaces(*simple_world(20, 2, 2), SIZE).batch(slice(None))["image"]
    recogniser, reader = (learn(people, 0, 8, 80) for learn in (train_simple_embedder, train_simple_reader))
    with torch.no_grad():
        codes = recogniser(unseen)
        errors = reader.errors(unseen[::2], unseen[1::2])
        blind = SimpleReader(8).eval().errors(unseen[::2], unseen[1::2])
    cosines = codes[::2] @ codes[1::2].T
    assert cosines.diag().mean() > cosines.mean() + 0.3
    assert set(errors) == {"position", "expression"}
    assert 0.2 < errors["position"] < 0.45 and blind["position"] < 0.1, "a third apart, by chance"


def test_a_run_in_the_simple_world(tmp_path):
    torch.set_num_threads(1)
    config = replace(
        PRESETS["simple"], preset="simple", out=tmp_path / "run", variants=("full", "no-identity-loss"),
        train_people=4, per_person=2, judge_people=4, judge_steps=2, judge_width=4, iterations=2,
        device="cpu",
    )  # fmt: skip
    assert main(EvalConfig(run=train(config), test_people=6, device="cpu")) == tmp_path / "run"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == ["S1", "S2", "S3", "S4"]
    assert all(claim["text"].startswith("Simple world: ") for claim in results["claims"])
    rows = {(m["method"], m["metric"]): m for m in results["metrics"]}
    assert rows["copy target", "position"]["value"] == 0 and ("full", "pose") not in rows
    assert {m["table"] for m in results["metrics"]} == {"simple world"}
    with pytest.raises(UserError, match="no photographs"):
        open_swapper(Networks(run=tmp_path / "run", device="cpu"), None, 48)


def test_the_preset_is_the_trial_of_the_spec():
    config = PRESETS["simple"]
    assert (config.iterations, config.batch_size, config.lr, config.id_lr) == (2000, 4, 5e-4, 5e-4)
    assert (config.betas, config.weight_decay, config.r1_every) == ((0.0, 0.99), 1e-4, 1)
    w = config.weights
    assert (w.identity, w.reconstruction, w.attribute_background, w.attribute_face) == (10, 10, 5, 2)
    assert (config.train_people, config.judge_people, config.judge_steps) == (256, 100, 500)
    assert config.size.rgb_norm and config.mask_pyramid == "cascade", "as the official modules"


def test_the_simple_worlds_claims_are_the_spec_s():
    row = {"cos source": 0.7, "cos target": 0.1, "face L1": 0.2, "position": 0.1, "background L1": 0.2}
    scores = {
        "full": row,
        "no-identity-loss": row | {"cos source": 0.03},
        "no-attribute-losses": row | {"background L1": 0.37},
        "no-mask": row | {"background L1": 0.47},
        "no-landmarks": row | {"position": 0.13},
        "copy target": row | {"face L1": 0.27},
        "paste": row | {"face L1": 0.31, "position": 0.28},
    }
    claims = judge(scores, "simple")
    assert [claim.id for claim in claims] == [f"S{n}" for n in range(1, 7)]
    assert all(claim.holds for claim in claims)
    scores["no-identity-loss"] = row | {"cos source": 0.3}
    assert [claim.id for claim in judge(scores, "simple") if not claim.holds] == ["S2"]
