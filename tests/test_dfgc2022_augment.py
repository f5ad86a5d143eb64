"""DFGC 2022: the winner's augmentation, and blending."""

import cv2
import numpy as np
import pytest

from dfgc2022.augment import Blur, Noise, self_blend, train_transform

GREY = np.full((40, 40, 3), 128, np.uint8)


def test_noise_has_the_old_variance_and_truncates():
    noise = Noise(p=1.0)
    means, variances = [], []
    for seed in range(200):
        noise.set_random_seed(seed)
        out = noise(image=GREY)["image"].astype(float)
        means.append(out.mean())
        variances.append(out.var())
    assert np.mean(means) == pytest.approx(127.5, abs=0.05)  # truncation takes half a level
    assert np.mean(variances) == pytest.approx(30 + 1 / 12, rel=0.06)  # uniform on [10, 50]
    assert min(variances) > 9 and max(variances) < 54


def test_blur_draws_kernels_as_the_old_version_did():
    blur = Blur(p=1.0)
    kernels = []
    for seed in range(2000):
        blur.set_random_seed(seed)
        kernels.append(blur.get_params()["kernel"])
    shares = [kernels.count(k) / 2000 for k in (3, 5, 7)]
    assert np.allclose(shares, (0.2, 0.4, 0.4), atol=0.03)
    impulse = np.zeros((15, 15, 3), np.uint8)
    impulse[7, 7] = 255
    out = blur.apply(impulse, kernel=5)
    sigma = 0.3 * ((5 - 1) / 2 - 1) + 0.8
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    weights /= weights.sum()
    assert np.abs(out[5:10, 5:10, 0] - 255 * np.outer(weights, weights)).max() <= 1.5


def test_transform_order_probabilities_and_repeatability():
    transform = train_transform(24)
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ["HorizontalFlip", "Noise", "Blur", "Resize"]
    assert [step.p for step in transform.transforms[:3]] == [0.5, 0.1, 0.1]
    image = np.random.default_rng(0).integers(0, 255, (31, 31, 3), np.uint8)
    outputs = []
    for _ in range(2):
        transform.set_random_seed(5)
        outputs.append(transform(image=image)["image"])
    assert np.array_equal(*outputs) and outputs[0].shape == (24, 24, 3)
    plain = [cv2.resize(view, (24, 24), interpolation=cv2.INTER_LINEAR) for view in (image, image[:, ::-1])]
    same = 0
    for seed in range(300):
        transform.set_random_seed(seed)
        out = transform(image=image)["image"]
        same += any(np.array_equal(out, view) for view in plain)
    assert same / 300 == pytest.approx(0.81, abs=0.07)  # neither noise nor blur


def test_blending_changes_the_inside_only():
    rng = np.random.default_rng(0)
    image = np.random.default_rng(1).integers(60, 200, (64, 64, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    out = self_blend(image, rng)
    changed = np.abs(out.astype(int) - image).mean(-1)
    assert changed[24:40, 24:40].mean() > 3 and changed[0].mean() < 0.5
