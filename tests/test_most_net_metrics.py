"""MOST-Net: the metrics against their definitions written out, and the command that applies them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from most_net import fsim, literal, metrics, nlda, scoot
from shared.io import write_image
from shared.runtime import UserError

ROOT = Path(__file__).resolve().parent.parent


def sketchlike(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth shapes with lines and paper grain on 0..255, whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    images = []
    for _ in range(count):
        a, b, c = torch.rand(3, generator=generator)
        face = ((x / (0.5 + 0.3 * a)) ** 2 + (y / (0.6 + 0.3 * b)) ** 2 - 1).abs()
        lines = 0.5 + 0.5 * torch.cos((20 + 20 * c) * (x + y))
        grain = 0.05 * torch.randn(height, width, generator=generator)
        images.append(torch.where(face < 0.15, 0.1, 0.6 + 0.3 * lines) + grain)
    return metrics.grey_bytes(torch.stack(images)[:, None])


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return metrics.grey_bytes((images + strength * noise) / 255)


@pytest.mark.parametrize("size", [(48, 40), (37, 51), (25, 40)])
def test_fsim_equals_the_literal_form(size):
    first = sketchlike(2, *size)
    second = noisy(first, 25)
    expected = [
        literal.literal_fsim(a[0].double().numpy(), b[0].double().numpy())
        for a, b in zip(first, second, strict=True)
    ]
    assert fsim.fsim(first, second).tolist() == pytest.approx(expected, abs=1e-6)


def test_fsim_reduces_large_images_first():
    image = sketchlike(1, 400, 420)
    other = noisy(image, 30)
    halved = [torch.nn.functional.avg_pool2d(x.double(), 2) for x in (image, other)]
    # An even averaging kernel, centred as MATLAB does, covers pixels 2i and 2i + 1.
    assert fsim.fsim(image, other).item() == pytest.approx(fsim.fsim(*halved).item(), abs=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (250, 200)])
def test_fsim_of_a_blank_page_is_a_number(size):
    """A collapsed network draws one, and a NaN would be the mean of the whole test set."""
    drawn = noisy(sketchlike(1, *size), 25)
    for level in (0.0, 255.0):
        blank = torch.full_like(drawn, level)
        assert fsim.fsim(blank, blank).item() == 1
        assert 0 <= fsim.fsim(drawn, blank).item() < 0.5


@pytest.mark.parametrize("size", [(48, 40), (37, 51), (250, 200)])
def test_scoot_equals_the_literal_form(size):
    first = sketchlike(2, *size)
    second = noisy(first, 25)
    expected = [literal.literal_scoot(a[0].numpy(), b[0].numpy()) for a, b in zip(first, second, strict=True)]
    assert scoot.scoot(first, second).tolist() == pytest.approx(expected, abs=1e-9)


def test_scoot_of_flat_images():
    """One level everywhere: no contrast, energy 1 in all blocks, whatever the level is."""
    features = scoot.features(torch.full((1, 1, 40, 40), 200.0))
    assert features[0].tolist() == [0.0] * 16 + [1.0] * 16


def test_ssim_equals_the_definition_at_every_window():
    a, b = sketchlike(1, 24, 19).double(), noisy(sketchlike(1, 24, 19), 20).double()
    offsets = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weights = np.outer(offsets, offsets) / sum(offsets) ** 2
    values = []
    for y in range(24 - 10):
        for x in range(19 - 10):
            p, q = (z[0, 0, y : y + 11, x : x + 11].numpy() for z in (a, b))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert metrics.ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-9)


def test_identical_images_give_one_and_damage_counts():
    truth = sketchlike(3, 250, 200) / 255
    same = metrics.quality(truth, truth)
    assert all(value.tolist() == pytest.approx([1.0] * 3, abs=1e-9) for value in same.values())

    def blurred(radius: int) -> Tensor:
        padded = torch.nn.functional.pad(truth, (radius,) * 4, mode="replicate")
        return torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, 1)

    for series in (
        [noisy(truth * 255, s) / 255 for s in (5, 15, 40)],
        [blurred(radius) for radius in (1, 2, 4)],
    ):
        rows = [metrics.quality(truth, damaged) for damaged in series]
        for name in ("SSIM", "FSIM", "Scoot"):
            means = [1.0, *(float(row[name].mean()) for row in rows)]
            assert means == sorted(means, reverse=True), (name, means)


def test_metrics_are_symmetric_and_independent_of_the_batch():
    a, b = sketchlike(3, 60, 48), noisy(sketchlike(3, 60, 48), 20)
    for metric in (metrics.ssim, fsim.fsim, scoot.scoot):
        a64, b64 = a.double(), b.double()
        assert metric(a64, b64).tolist() == pytest.approx(metric(b64, a64).tolist(), abs=1e-12)
        assert metric(a64, b64)[1].item() == pytest.approx(metric(a64[1:2], b64[1:2]).item(), abs=1e-12)


def literal_nlda(drawn, synthesised, order, n):
    """NLDA in pixel space, by the definitions: PCA, null space of S_w, largest between-class scatter."""
    train, test = order[:n], order[n:]
    samples = np.concatenate([drawn[train], synthesised[train]])
    mean = samples.mean(0)
    values, axes = np.linalg.eigh(np.cov(samples.T))
    pca = axes[:, values > 1e-9 * values.max()]
    a, b = (drawn[train] - mean) @ pca, (synthesised[train] - mean) @ pca
    means = (a + b) / 2
    within = (a - means).T @ (a - means) + (b - means).T @ (b - means)
    values, axes = np.linalg.eigh(within)
    null = axes[:, values < 1e-9 * values.max()]
    between = null.T @ np.cov(means.T) @ null
    values, axes = np.linalg.eigh(between)
    directions = pca @ null @ axes[:, ::-1]
    probe, gallery = (drawn[test] - mean) @ directions, (synthesised[test] - mean) @ directions
    curve = []
    for d in range(1, n):
        distance = ((probe[:, None, :d] - gallery[None, :, :d]) ** 2).sum(-1)
        curve.append(np.mean(distance.argmin(1) == np.arange(len(test))))
    return np.array(curve)


def people(count: int, pixels: int, spoil: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    person = rng.normal(size=(count, pixels))
    style = rng.normal(size=pixels)
    return person + 0.1 * rng.normal(size=person.shape), person + style + spoil * rng.normal(
        size=person.shape
    )


def test_nlda_equals_the_pixel_space_form():
    drawn, synthesised = people(40, 60, 1.0)
    order = np.random.default_rng(3).permutation(40)
    expected = np.mean([literal_nlda(drawn, synthesised, order, 12)], axis=0)
    got = nlda.recognition(drawn, synthesised, 12, partitions=1, seed=3)
    assert got.curve.tolist() == pytest.approx(expected.tolist())
    assert got.best == got.curve.max()


def test_nlda_directions_join_the_two_samples_of_a_person():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 11)), rng.normal(size=(6, 11))
    directions = nlda.null_space_directions(first, second)
    assert directions.shape == (11, 5)
    assert np.allclose(directions.T @ directions, np.eye(5))
    assert np.allclose(first @ directions, second @ directions)


def test_nlda_ranks_good_sketches_above_bad_ones():
    rates = [nlda.recognition(*people(60, 500, spoil), 25, partitions=4).best for spoil in (0.1, 3.0, 30.0)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[2] < 0.5


def test_nlda_refuses_when_nobody_is_left():
    drawn, synthesised = people(10, 30, 0.1)
    with pytest.raises(ValueError, match="9 training people of 10"):
        nlda.recognition(drawn, synthesised, 9)


# --- the command --------------------------------------------------------------------------------------


def run_metrics(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "most_net.metrics", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def write_folder(folder: Path, images: Tensor, names=None) -> Path:
    for i, image in enumerate(images):
        write_image(folder / f"{names[i] if names else i}.png", image / 255)
    return folder


def test_command_measures_two_folders(tmp_path):
    truth = write_folder(tmp_path / "gt", sketchlike(8, 50, 40))
    made = write_folder(tmp_path / "pred", noisy(sketchlike(8, 50, 40), 10))
    done = run_metrics(truth, made, "--nlda-train", 4, "--partitions", 3, "--out", tmp_path / "n.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "n.json").read_text())
    assert set(found["means"]) == {"SSIM", "FSIM", "Scoot", "NLDA"}
    assert len(found["images"]) == 8
    curve = found["NLDA by dimensions"]
    assert len(curve) == 3 and found["means"]["NLDA"] == max(curve) > 1  # per cent
    assert "NLDA [%]" in done.stdout
    expected = metrics.quality(sketchlike(8, 50, 40) / 255, noisy(sketchlike(8, 50, 40), 10) / 255)
    assert found["means"]["FSIM"] == pytest.approx(float(expected["FSIM"].mean()), abs=1e-9)


def test_command_names_what_is_wrong(tmp_path):
    truth = write_folder(tmp_path / "gt", sketchlike(3, 50, 40))
    unpaired = write_folder(tmp_path / "unpaired", sketchlike(3, 50, 40), ["0", "1", "7"])
    padded = write_folder(tmp_path / "padded", sketchlike(3, 56, 56))
    small = write_folder(tmp_path / "small", sketchlike(3, 30, 8))
    for arguments, words in (
        ((truth, unpaired), "unpaired: no image called 2 .1 missing"),
        ((truth, padded), "56x56 pixels, expected 40x50"),
        ((truth, tmp_path / "nowhere"), "nowhere: no such folder"),
        ((small, small), "0.png: 8x30 pixels; the metrics need 11 on every side"),
        ((truth, truth, 3), "--nlda-train: 3 training people of 3"),
    ):
        with pytest.raises(UserError, match=words):
            metrics.main(metrics.Config(*arguments))
    with pytest.raises(UserError, match="gt: a folder; give the name of a file"):
        metrics.main(metrics.Config(truth, truth, out=truth))
    for metric in ("lpips", "fid"):
        options = {metric: True, f"{metric}_weights": tmp_path / "none.pth"}
        with pytest.raises(UserError, match="no file .*none.pth"):
            metrics.main(metrics.Config(truth, truth, **options))
    done = run_metrics(truth, unpaired)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
