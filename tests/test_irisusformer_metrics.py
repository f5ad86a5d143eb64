"""Metrics of IrisUsformer against definitions written out."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from irisusformer.metrics import (
    Calibration,
    ErrorDetection,
    average_scores,
    boundary,
    dice,
    edge_ratio,
    hausdorff,
    image_correlation,
    localisation_scores,
    segmentation_scores,
)


def square(top, left, side, shape=(40, 50)):
    region = np.zeros(shape, bool)
    region[top : top + side, left : left + side] = True
    return region


def test_segmentation_scores_by_hand():
    truth, mask = square(0, 0, 10), square(0, 5, 10)  # 50 shared, 50 missed, 50 too much, of 2000
    scores = segmentation_scores(mask, truth)
    assert scores["e1"] == pytest.approx(5.0)
    assert scores["e2"] == pytest.approx(50 * (50 / 1900 + 50 / 100))
    assert scores["e2_ipn"] == pytest.approx(scores["e1"] / 2)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(50)
    assert scores["iou"] == pytest.approx(100 / 3)
    assert scores["miou_2"] == pytest.approx(50 * (1 / 3 + 1850 / 1950))


def test_nice_script_hides_inverted_masks():
    truth = square(3, 3, 8)
    scores = segmentation_scores(~truth, truth)
    assert scores["e1"] == 100 and scores["e1_nice"] == 0


def test_empty_masks():
    nothing, something = np.zeros((4, 4), bool), square(0, 0, 2, (4, 4))
    both = segmentation_scores(nothing, nothing)
    assert (both["iou"], both["f1"], both["e1"], both["e2"]) == (100, 100, 0, 0)
    missed = segmentation_scores(nothing, something)
    assert (missed["iou"], missed["f1"], missed["precision"]) == (0, 0, 0)
    assert missed["e2"] == pytest.approx(50)


def test_f1_with_and_without_lost_images():
    truth = square(0, 0, 5)
    mean = average_scores([segmentation_scores(truth, truth), segmentation_scores(~truth & False, truth)])
    assert mean["f1"] == 50 and mean["f1_found"] == 100 and mean["f1_std"] == 50


def test_hausdorff_equals_brute_force():
    a, b = square(5, 6, 12), square(9, 8, 20)
    points_a, points_b = np.argwhere(boundary(a)), np.argwhere(boundary(b))
    distance = np.hypot(*(points_a[:, None] - points_b[None]).transpose(2, 0, 1))
    expected = max(distance.min(0).max(), distance.min(1).max())
    assert hausdorff(a, b) == pytest.approx(expected, rel=1e-5)
    assert hausdorff(a, a) == 0
    far = square(0, 0, 5, (300, 400)), square(60, 290, 5, (300, 400))
    assert hausdorff(*far) == pytest.approx(np.hypot(60, 290), rel=1e-5)


def test_hausdorff_of_empty_regions():
    nothing = np.zeros((30, 40), bool)
    assert hausdorff(nothing, nothing) == 0
    assert hausdorff(nothing, square(0, 0, 5, (30, 40))) == 50


def test_boundary_does_not_run_along_the_picture_border():
    region = np.zeros((6, 6), bool)
    region[:, :3] = True
    assert np.argwhere(boundary(region))[:, 1].tolist() == [2] * 6


def test_localisation_is_divided_by_the_width():
    truth = np.stack([square(10, 10, 6), square(5, 5, 16)])
    moved = np.stack([square(10, 15, 6), square(5, 5, 16)])
    scores = localisation_scores(moved, truth)
    assert scores["inner_hdis"] == pytest.approx(5 / 50)
    assert scores["outer_hdis"] == 0 and scores["mhdis"] == pytest.approx(2.5 / 50)
    assert scores["dice_inner"] == pytest.approx(dice(moved[0], truth[0])) == pytest.approx(1 / 6)


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    wrong = rng.random(5000) < 0.05
    score = np.clip(rng.beta(1, 8, 5000) + 0.25 * wrong, 1e-4, 1 - 1e-4)
    return score, wrong


def detector(score, wrong):
    found = ErrorDetection.empty()
    found.add(score[:2000], wrong[:2000])
    found.add(score[2000:], wrong[2000:])
    return found


def test_auroc_and_aupr_equal_scikit_learn(pixels):
    score, wrong = pixels
    found = detector(score, wrong)
    assert found.auroc() == pytest.approx(roc_auc_score(wrong, score), abs=1e-4)
    assert found.aupr() == pytest.approx(average_precision_score(wrong, score), abs=2e-3)


def test_shares_and_risks_equal_sorting(pixels):
    score, wrong = pixels
    found = detector(score, wrong)
    ranked = wrong[np.argsort(-score)]
    assert found.captured(0.1) == pytest.approx(ranked[:500].sum() / wrong.sum(), abs=0.01)
    assert found.error_in_top(0.05) == pytest.approx(ranked[:250].mean(), abs=0.01)
    assert found.error_after_abstaining(0.05) == pytest.approx(ranked[250:].mean(), abs=1e-3)
    risks = [ranked[5000 - kept :].mean() for kept in range(25, 5001, 25)]
    assert found.aurc() == pytest.approx(np.mean(risks), abs=1e-3)


def test_ties_share_their_errors():
    found = detector(np.full(4000, 0.3), np.arange(4000) % 10 == 0)
    assert found.auroc() == 0.5
    assert found.captured(0.2) == pytest.approx(0.2)
    assert found.error_after_abstaining(0.5) == pytest.approx(0.1)


def test_nothing_wrong_gives_no_auroc():
    assert np.isnan(detector(np.linspace(0, 1, 4000), np.zeros(4000, bool)).auroc())


def test_extreme_scores_are_kept_apart():
    found = ErrorDetection.empty()
    found.add(np.array([0.0, 1e-6, 1.0]), np.array([False, False, True]))
    assert found.auroc() == 1


def test_expected_calibration_error_by_hand():
    calibration = Calibration.empty()
    calibration.add(np.array([0.02, 0.02, 0.99, 0.99]), np.array([False, True, True, True]))
    assert calibration.ece() == pytest.approx((2 * abs(0.02 - 0.5) + 2 * 0.01) / 4)


def test_edge_ratio_looks_at_a_band_of_three_pixels():
    truth = square(15, 15, 12)
    uncertainty = np.zeros(truth.shape)
    uncertainty[12:30, 12:30] = 1
    uncertainty[18:24, 18:24] = 0
    assert edge_ratio(uncertainty, truth) == (1.0, 0.0)


def test_image_correlation_ranks():
    assert image_correlation([0.1, 0.2, 0.3], [1, 5, 90]) == pytest.approx(1)
    assert np.isnan(image_correlation([0.1, 0.1], [1, 2]))
