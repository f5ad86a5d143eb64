"""IrisUsformer: procedural eyes, their annotations, and the world made of them."""

import numpy as np
import pytest
import torch

from irisusformer.data import EyeWorld, noisy_annotation, pupil_annotation
from irisusformer.eyes import LOOKS, draw_eye, draw_simple_eye
from irisusformer.iris import identity


@pytest.mark.parametrize("look", LOOKS)
def test_eye_is_consistent_with_its_ellipses(look):
    eye = draw_eye(identity(7), 3, 96, 128, look)
    assert eye.image.shape == (96, 128, 3) and eye.image.dtype == np.float32
    assert eye.image.min() >= 0 and eye.image.max() <= 1
    assert eye.mask.any() and not (eye.mask & eye.pupil).any() and not (eye.mask & ~eye.outer).any()
    assert not (eye.mask & ~eye.opening).any()
    for region, (x, y, a, b, angle) in ((eye.pupil, eye.pupil_ellipse), (eye.outer, eye.outer_ellipse)):
        rows, columns = np.mgrid[:96, :128] + 0.5
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        inside = np.hypot(u / a, v / b) <= 1
        assert (inside != region).sum() <= 0.08 * region.sum()


def test_infrared_eyes_are_grey_and_visible_ones_are_not():
    for look in LOOKS:
        spread = np.ptp(draw_eye(identity(1), 0, 64, 64, look).image, axis=2).mean()
        assert (spread == 0) == (look in ("nir", "distance"))


def test_the_same_seeds_give_the_same_picture_and_other_seeds_another():
    first, again, other = (draw_eye(identity(2), seed, 64, 64).image for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()


def test_simple_eye_matches_its_ellipse():
    for seed in range(5):
        eye = draw_simple_eye(seed)
        *_, a, b, _ = eye.outer_ellipse
        assert eye.outer.sum() == pytest.approx(np.pi * a * b, rel=0.05)
        assert 0.02 < eye.mask.mean() < 0.4


def test_a_threshold_on_brightness_is_no_solution():
    eyes = [draw_eye(identity(i), 0, 64, 64, LOOKS[i % 4]) for i in range(24)]
    brightness = np.stack([eye.image.mean(2) for eye in eyes])
    masks = np.stack([eye.mask for eye in eyes])
    ranges = [(a, b) for a in np.linspace(0, 0.8, 9) for b in np.linspace(0.1, 1, 10) if b > a]
    best = min(((brightness > a) & (brightness < b) != masks).mean() for a, b in ranges)
    assert best > 0.06  # the demo's network is at about 0.015


def test_noisy_annotations_are_wrong_by_the_stated_amount():
    eye = draw_simple_eye(3)
    drawn = [noisy_annotation(eye, np.random.default_rng(i)) for i in range(60)]
    untouched = sum((mask == eye.mask).all() for mask in drawn)
    assert 3 <= untouched <= 25  # a fifth of 60, give or take
    assert all(not (mask & eye.pupil).any() and not (mask & ~eye.opening).any() for mask in drawn)
    with_pupil = [pupil_annotation(eye, np.random.default_rng(i)) for i in range(60)]
    assert 3 <= sum((mask & eye.pupil).any() for mask in with_pupil) <= 25


def test_world_shares_nobody_between_splits_and_mirrors_by_draw():
    train, test = (EyeWorld("simple", split, 4, (64, 64)) for split in ("train", "test"))
    assert not set(train.names) & set(test.names)
    plain = train[1]
    assert plain["image"].shape == (3, 64, 64) and plain["regions"].shape == (2, 64, 64)
    drawn = [train[1, draw] for draw in range(12)]
    mirrored = [bool((sample["image"] != plain["image"]).any()) for sample in drawn]
    assert 0 < sum(mirrored) < 12
    for sample, flipped in zip(drawn, mirrored, strict=True):
        for name in plain:
            expected = plain[name].flip(-1) if flipped else plain[name]
            assert torch.equal(sample[name], expected)
