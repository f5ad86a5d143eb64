"""Ellipses, rubber sheet, quality, and the other uncertainties of IrisUsformer."""

import cv2
import numpy as np
import pytest
import torch

from irisusformer import recognition
from irisusformer.eyes import draw_eye
from irisusformer.geometry import Ellipse, fit_boundaries, quality, robust_ellipse, rubber_sheet
from irisusformer.iris import identity
from irisusformer.model import IrisUsformer
from irisusformer.pictures import outlined, with_ellipse
from irisusformer.recognition import (
    Picture,
    RecognitionConfig,
    code_mask,
    compare,
    distances,
    equal_error_rate,
    iris_code,
    pictures_of,
)
from irisusformer.train import DEMO
from irisusformer.uncertainty import (
    DRAWS,
    confidence,
    ensemble,
    fit_temperature,
    flip_disagreement,
    mc_dropout,
)
from shared.runtime import UserError


def drawn(ellipse: Ellipse, shape=(240, 320)):
    canvas = np.zeros(shape, np.uint8)
    axes = (2 * ellipse.a, 2 * ellipse.b)
    cv2.ellipse(canvas, ((ellipse.x, ellipse.y), axes, np.degrees(ellipse.angle)), 1, -1)
    return canvas.astype(bool)


def deviation(found: Ellipse, true: Ellipse) -> float:
    """Largest distance between boundaries, as a share of the radius."""
    return float(np.abs(true.level(*found.points(np.linspace(0, 2 * np.pi, 90))) - 1).max())


LIMBUS, PUPIL = Ellipse(160, 120, 80, 70, 0.4), Ellipse(163, 118, 32, 29, 0.4)


def test_points_of_an_ellipse_lie_on_it():
    theta = np.linspace(0, 6.2, 17)
    x, y = LIMBUS.points(theta)
    np.testing.assert_allclose(LIMBUS.level(x, y), 1)
    np.testing.assert_allclose(np.arctan2(y - 120, x - 160) % (2 * np.pi), theta, atol=1e-9)
    assert LIMBUS.scaled(2) == Ellipse(320, 240, 160, 140, 0.4)


def test_boundaries_of_a_clean_mask():
    pupil, limbus = fit_boundaries(drawn(LIMBUS) & ~drawn(PUPIL))
    assert deviation(limbus, LIMBUS) < 0.03 and deviation(pupil, PUPIL) < 0.06


def test_boundaries_behind_lids_lashes_and_lights():
    mask = drawn(LIMBUS) & ~drawn(PUPIL)
    mask[:85] = False  # upper lid
    mask[175:] = False  # lower lid
    for x in range(110, 220, 14):
        mask[85:103, x : x + 3] = False  # lashes
    mask[drawn(Ellipse(190, 105, 9, 9, 0))] = False  # a light across the pupil's edge
    pupil, limbus = fit_boundaries(mask)
    assert deviation(limbus, LIMBUS) < 0.08 and deviation(pupil, PUPIL) < 0.12


def test_boundaries_from_the_heads_are_preferred():
    pupil, limbus = fit_boundaries(np.zeros((240, 320), bool), drawn(PUPIL), drawn(LIMBUS))
    assert deviation(limbus, LIMBUS) < 0.03 and deviation(pupil, PUPIL) < 0.06


def test_boundaries_of_procedural_eyes():
    errors = []
    for seed in range(6):
        eye = draw_eye(identity(200 + seed), 0, 120, 160, "nir", 1)
        found = fit_boundaries(eye.mask)[1]
        errors.append(deviation(found, Ellipse(*eye.outer_ellipse)))
    assert np.median(errors) < 0.06


def test_small_and_half_covered_pupils_are_found():
    errors = []
    for seed in (200, 206, 208, 214):  # half an outline: it lies on many a long ellipse as well
        eye = draw_eye(identity(seed), 0, 120, 160, "visible", 1)
        found = fit_boundaries(eye.mask)[0]
        errors.append(deviation(found, Ellipse(*eye.pupil_ellipse)))
    assert max(errors) < 0.3


def test_no_iris_gives_no_ellipse():
    assert fit_boundaries(np.zeros((60, 60), bool)) == (None, None)
    assert robust_ellipse(np.empty(0), np.empty(0)) is None
    line = np.zeros((60, 60), bool)
    line[30, 5:50] = True
    assert fit_boundaries(line) == (None, None)


@pytest.mark.parametrize(("height", "least", "most"), [(240, 0.6, 2.5), (2400, 5, 10)])
def test_ellipses_and_contours_are_drawn_wide_enough_to_be_seen(height, least, most):
    image = torch.zeros(3, height, height)
    circle = Ellipse(height / 2, height / 2, height / 4, height / 4, 0)
    y, x = np.mgrid[:height, :height] + 0.5
    for drawn_in in (
        with_ellipse(image, circle, (255, 255, 255)),
        outlined(image, torch.from_numpy(circle.level(x, y) <= 1), (255, 255, 255)),
    ):
        across = float(drawn_in[0, height // 2, : height // 2].sum())
        assert least <= across <= most


def test_rubber_sheet_unrolls_radius_and_angle():
    pupil, limbus = Ellipse(160, 120, 30, 30, 0), Ellipse(160, 120, 90, 90, 0)
    y, x = np.mgrid[:240, :320] + 0.5
    radius, angle = np.hypot(x - 160, y - 120), np.arctan2(y - 120, x - 160) % (2 * np.pi)
    mask = angle < np.pi  # the lower half of the picture
    sheet = rubber_sheet(np.stack([radius, angle, radius], 2), mask, np.full((240, 320), 0.25), pupil, limbus)
    assert sheet["image"].shape == (64, 512, 3) and sheet["mask"].shape == (64, 512)
    expected = 30 + 60 * (np.arange(64) + 0.5) / 64
    np.testing.assert_allclose(sheet["image"][:, 100, 0], expected, atol=0.3)
    np.testing.assert_allclose(sheet["image"][40, 20:490, 1], 2 * np.pi * np.arange(20, 490) / 512, atol=0.02)
    assert sheet["mask"][:, 5:250].all() and not sheet["mask"][:, 262:508].any()
    np.testing.assert_allclose(sheet["reliability"][:, 5:250], 0.75, atol=1e-5)
    assert (sheet["reliability"][~sheet["mask"]] == 0).all()


def test_rubber_sheet_is_black_outside_the_picture():
    pupil, limbus = Ellipse(5, 20, 4, 4, 0), Ellipse(5, 20, 15, 15, 0)
    sheet = rubber_sheet(np.ones((40, 40, 3)), np.ones((40, 40), bool), np.zeros((40, 40)), pupil, limbus)
    assert not sheet["mask"][40:, 256].any() and sheet["mask"][40:, 0].all()


def test_quality():
    mask, u = np.array([[True, False]]), np.array([[0.2, 0.9]])
    assert quality(mask, u, np.array([True, True, False, False])) == {"score": 0.8, "usable": 0.5}
    assert quality(~mask & mask, u, None) == {"score": 0.0, "usable": 0.0}


# ------------------------------------------------------------------------------------ other uncertainties


@pytest.fixture
def model():
    torch.manual_seed(0)
    return IrisUsformer("tiny").eval()


def test_confidence_is_zero_when_sure():
    torch.testing.assert_close(confidence(torch.tensor([0.0, 0.5, 1.0, 0.9])), torch.tensor([0, 1.0, 0, 0.2]))


def test_flip_disagreement_is_zero_on_the_mirror_axis_of_symmetric_predictions(model):
    image = torch.rand(1, 3, 32, 64)
    prob = model.predict(image)["prob"]
    mirrored = model.predict(image.flip(-1))["prob"].flip(-1)
    torch.testing.assert_close(flip_disagreement(model, image, prob), (prob - mirrored).abs())


def test_mc_dropout_varies_and_leaves_the_model_alone(model):
    image = torch.rand(1, 3, 40, 33)
    before = model.predict(image)["prob"]
    encoded = []
    model.stem.register_forward_hook(lambda *rest: encoded.append(1))
    torch.manual_seed(2)
    mean, score = mc_dropout(model, image)
    assert len(encoded) == 1, "the encoder has no dropout"
    assert not torch.equal(mean, before) and not model.drop.training and model.drop.p == 0
    torch.manual_seed(2)
    model.drop.p, _ = 0.1, model.drop.train()
    passes = [model(image)["logits"].sigmoid() for _ in range(DRAWS)]
    model.drop.p, _ = 0.0, model.drop.eval()
    torch.testing.assert_close(mean, torch.stack(passes).mean(0))
    torch.testing.assert_close(score, confidence(mean))
    torch.testing.assert_close(model.predict(image)["prob"], before)


def test_ensemble_averages_probabilities(model):
    torch.manual_seed(1)
    other = IrisUsformer("tiny").eval()
    image = torch.rand(1, 3, 32, 32)
    mean, _ = ensemble(model.predict(image)["prob"], [other], image)
    torch.testing.assert_close(mean, (model.predict(image)["prob"] + other.predict(image)["prob"]) / 2)


def test_temperature_is_recovered():
    torch.manual_seed(0)
    logits = torch.randn(40_000) * 2
    truth = torch.rand(40_000) < logits.sigmoid()
    assert fit_temperature(logits * 3, truth) == pytest.approx(3, rel=0.12)


# ---------------------------------------------------------------------------------------------- recognition


def test_code_distance_equals_counting_bits():
    rng = np.random.default_rng(0)
    codes = rng.random((3, 2, 16, 256)) < 0.5
    codes[1] = np.roll(codes[0], 5, 2)  # the same eye, rotated
    masks = rng.random((3, 16, 256)) < 0.7
    masks[2] = False
    found = distances(codes, masks, 6)

    def count(i, j, shift):
        other, mask = np.roll(codes[j], shift, 2), np.roll(masks[j], shift, 1) & masks[i]
        return (codes[i] ^ other)[:, mask].mean()

    assert found[0, 1] == pytest.approx(0, abs=1e-6) and found[1, 0] == pytest.approx(0, abs=1e-6)
    assert (found[2] == 0.5).all()
    masks[2] = True
    expected = min(count(0, 2, shift) for shift in range(-3, 4))
    assert distances(codes, masks, 3)[0, 2] == pytest.approx(expected, abs=1e-5)


def test_codes_of_one_eye_agree_and_of_two_do_not():
    sheets = []
    for person in (1, 1, 2):
        eye = draw_eye(identity(person), len(sheets), 240, 320, "nir", 1)
        pupil, limbus = Ellipse(*eye.pupil_ellipse), Ellipse(*eye.outer_ellipse)
        sheets.append(rubber_sheet(eye.image, eye.mask, np.zeros(eye.mask.shape), pupil, limbus))
    codes = np.stack([iris_code(sheet["image"].mean(2)) for sheet in sheets])
    masks = np.stack([code_mask(sheet["mask"]) for sheet in sheets])
    found = distances(codes, masks, 12)
    assert found[0, 1] < 0.4 < found[0, 2]


def test_recognition_with_true_boundaries_separates_people(monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.setattr(recognition, "load_network", lambda *rest: (IrisUsformer("tiny").eval(), DEMO))
    monkeypatch.setattr("sys.argv", ["recognition.py", "--people", "3", "--pictures", "2", "--device", "cpu"])
    recognition.main()
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first == "6 pictures of 3 eyes" and second.startswith("boundaries were found in ")
    assert table[-1].split() == ["true", "boundaries", "and", "mask", "6", "0"]


def test_recognition_without_pictures_or_boundaries_says_so(tmp_path):
    with pytest.raises(UserError, match="no pictures in this folder"):
        pictures_of(RecognitionConfig(data_root=tmp_path))
    blank = [Picture("a", torch.zeros(3, 32, 32))] * 2
    with pytest.raises(UserError, match="no boundaries were found in any of 2 pictures"):
        compare(IrisUsformer("tiny").eval(), blank, 32, 0.5, 0)


def test_recognition_needs_two_eyes():
    entry = ("a", np.zeros((2, 16, 256), bool), np.ones((16, 256), bool))
    with pytest.raises(UserError, match="at least two eyes"):
        equal_error_rate([entry, entry], 2)
