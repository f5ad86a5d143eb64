"""PIN: images and pairs in every layout, on miniatures written here, and the embedded worlds."""

import math
import os
import pickle
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pin import defenses
from pin.basis import fit_basis
from pin.data import (
    TEMPLATE,
    align,
    celeba,
    identity_folder,
    landmarks_of,
    part_of_people,
    preprocess,
    procedural,
    read_landmarks,
)
from pin.pairs import Pairs, deal, insightface_bin, lfw_pairs, random_pairs
from pin.protocol import (
    Verifier,
    accept_above,
    decide,
    detection_scores,
    fold_thresholds,
    impostor_scores,
    perturbation_size,
    purified_quality,
)
from shared.metrics import auc
from shared.runtime import UserError


def paint(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*reversed(size), 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def test_preprocessing_of_colour_and_grey(tmp_path):
    paint(tmp_path / "a.png")
    colour = preprocess(tmp_path / "a.png", 16)
    picture = Image.open(tmp_path / "a.png").resize((16, 16), Image.Resampling.BILINEAR).convert("L")
    expected = (torch.from_numpy(np.array(picture)).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(colour[0], expected)
    paint(tmp_path / "a.pgm", mode="L")
    assert preprocess(tmp_path / "a.pgm").shape == (1, 112, 112)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.jpg"):
        preprocess(tmp_path / "broken.jpg")


def test_alignment_moves_landmarks_to_the_template(tmp_path):
    angle, scale = 0.4, 1.7
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (TEMPLATE @ rotation.T + [40, 20]).astype(np.float32)
    image = np.zeros((320, 320, 3), np.uint8)
    for number, (x, y) in enumerate(landmarks):
        cv2.circle(image, (round(float(x)), round(float(y))), 4, (50 * (number + 1),) * 3, -1)
    crop = align(image, landmarks)
    assert crop.shape == (112, 112, 3)
    for number, (x, y) in enumerate(TEMPLATE):
        assert crop[round(float(y)), round(float(x)), 0] == pytest.approx(50 * (number + 1), abs=3)


def test_landmark_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("2\nlefteye_x lefteye_y\n000001.jpg 1 2 3 4 5 6 7 8 9 10\n")
    assert read_landmarks(path)["000001.jpg"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    good = "1.jpg 1 2 3 4 5 6 7 8 9 10\n"
    for text, message in {
        "nothing\n": "no line of a file name and ten numbers",
        f"{good}2.jpg 1 2 3 4 5 6 7 8 9\n": "line 2: no ten numbers after 2.jpg",
        f"{good}2.jpg 1 2 3 4 5 6 7 8 9 x\n": "line 2: no ten numbers after 2.jpg",
        f"{good}\n2.jpg 1 2 3 4 5 6 7 8 9 nan\n": "line 3: the points of 2.jpg are no face's",
        "1.jpg 3 4 3 4 3 4 3 4 3 4\n": "line 1: the points of 1.jpg are no face's",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_landmarks(path)


def test_landmarks_are_found_by_the_longest_name():
    listed = {"a/1.jpg": 1, "1.jpg": 2, "2.jpg": 3}
    assert [landmarks_of(Path(name), listed) for name in ("/x/a/1.jpg", "/x/b/1.jpg", "2.jpg")] == [1, 2, 3]
    with pytest.raises(UserError, match=r"no landmarks for a/3\.jpg"):
        landmarks_of(Path("a/3.jpg"), listed)


def test_identity_folders_and_celeba(tmp_path):
    for person in ("s1", "s2", "s10"):
        for number in range(2):
            paint(tmp_path / "att" / person / f"{number}.pgm", number, "L")
    files = identity_folder(tmp_path / "att", 16)
    assert len(files) == 6 and sorted(set(files.labels.tolist())) == [0, 1, 2]
    paint(tmp_path / "att/s1/below/2.pgm", 2, "L")
    assert len(identity_folder(tmp_path / "att", 16)) == 7
    training = part_of_people(files, test=False)
    for path in files.paths[:4]:
        path.unlink()  # the others are read without those trained on
    test = part_of_people(files, test=True)
    assert set(training.labels.tolist()).isdisjoint(test.labels.tolist()) and len(test) == 2
    paint(tmp_path / "celeba/img_align_celeba/000001.jpg")
    paint(tmp_path / "celeba/img_align_celeba/000002.jpg")
    assert celeba(tmp_path / "celeba", 16).labels.tolist() == [-1, -1]
    (tmp_path / "celeba/identity_CelebA.txt").write_text("000001.jpg 5\n000002.jpg 7\n")
    assert celeba(tmp_path / "celeba", 16).labels.tolist() == [5, 7]
    (tmp_path / "celeba/identity_CelebA.txt").write_text("000001.jpg 5\n000002.jpg\n")
    with pytest.raises(UserError, match="identity_CelebA.txt, line 2: '000002.jpg'"):
        celeba(tmp_path / "celeba", 16)
    (tmp_path / "celeba/identity_CelebA.txt").write_text("000001.jpg 5\n")
    with pytest.raises(UserError, match=r"1 of 2 images have no line, the first is 000002\.jpg"):
        celeba(tmp_path / "celeba", 16)
    (tmp_path / "celeba/identity_CelebA.txt").unlink()
    for reader in (identity_folder, celeba):
        with pytest.raises(UserError, match="expected"):
            reader(tmp_path / "absent", 16)


def test_lfw_pairs(tmp_path):
    for name, count in (("Ann", 2), ("Bob", 2)):
        for i in range(1, count + 1):
            paint(tmp_path / name / f"{name}_{i:04d}.jpg", i)
    (tmp_path / "pairs.txt").write_text("2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nBob\t1\t2\nAnn\t2\tBob\t2\n")
    files, pairs = lfw_pairs(tmp_path, size=16)
    assert len(files) == 4
    assert pairs.same.tolist() == [True, False, True, False] and pairs.fold.tolist() == [0, 0, 1, 1]
    assert files.paths[pairs.second[1]].name == "Bob_0001.jpg"
    plain = tmp_path / "list.txt"
    plain.write_text("Ann/Ann_0001.jpg Ann/Ann_0002.jpg 1\nAnn/Ann_0001.jpg Bob/Bob_0001.jpg 0\n")
    assert lfw_pairs(tmp_path, plain, 16)[1].same.tolist() == [True, False]
    paint(tmp_path / "J.R._Doe" / "J.R._Doe_0001.png", 7)  # a dot in a name begins no ending
    plain.write_text("J.R._Doe\t1\tAnn\t1\n")
    assert lfw_pairs(tmp_path, plain, 16)[0].paths[0].name == "J.R._Doe_0001.png"
    (tmp_path / "Bob/Bob_0002.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images .*Bob_0002\.jpg"):
        lfw_pairs(tmp_path, size=16)
    plain.write_text("what is this line\n")
    with pytest.raises(UserError, match=r"list.txt, line 1: cannot read the pair"):
        lfw_pairs(tmp_path, plain, 16)


def test_lfw_development_lists_give_one_number(tmp_path):
    for name in ("Ann", "Bob"):
        for i in (1, 2):
            paint(tmp_path / name / f"{name}_{i:04d}.jpg", i)
    listed = tmp_path / "pairsDevTest.txt"
    listed.write_text("2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t1\nAnn\t2\tBob\t2\n")
    files, pairs = lfw_pairs(tmp_path, listed, 16)
    assert pairs.same.tolist() == [True, True, False, False]
    assert pairs.fold.tolist() == [0, 1, 0, 1], "folds of both kinds, not two folds by position"
    assert [files.paths[i].parent.name for i in pairs.first] == ["Ann", "Bob", "Ann", "Ann"]
    assert pairs.people[pairs.first].tolist() == [0, 1, 0, 0]


def test_people_named_by_numbers_lose_no_pair(tmp_path):
    for name in ("7", "12"):
        for i in (1, 2):
            paint(tmp_path / name / f"{name}_{i:04d}.png", i)
    listed = tmp_path / "list.txt"
    for header in ("", "1 1\n", "1\n"):
        listed.write_text(f"{header}12 1 2\n7 2 12 1\n")
        files, pairs = lfw_pairs(tmp_path, listed, 16)
        assert pairs.same.tolist() == [True, False] and files.paths[0].name == "12_0001.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 1\nAnn 1 2\nAnn 1 Bob 1\n\nBob 1 2\n", "line 5: the list ends too early: .* 4 pairs .* holds 3"),
        ("2\nAnn 1 2\n", "line 2: the list ends too early: .* 4 pairs .* holds 1"),
        ("1\nAnn 1 2\nAnn 1 Bob 1\nBob 1 2\n", "line 4: the list is too long: .* 2 pairs .* holds 3"),
        ("2 1\nAnn 1 2\nAnn 1 Bob 1\nBob 1\n", "line 4: cannot read the pair 'Bob 1'"),
        ("2 1\nAnn 1 2\nAnn 1 Bob\n", "line 3: cannot read the pair 'Ann 1 Bob'"),
        ("2 1\n", "holds no pairs"),
        ("", "holds no pairs"),
    ],
)
def test_truncated_pair_lists_name_file_and_line(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match=f"pairs.txt.*{message}"):
        lfw_pairs(tmp_path, size=16)


def test_insightface_bin(tmp_path):
    encoded = [cv2.imencode(".jpg", np.full((20, 20, 3), 40 * i, np.uint8))[1].tobytes() for i in range(4)]
    path = tmp_path / "agedb_30.bin"
    path.write_bytes(pickle.dumps((encoded, [True, False])))
    faces, pairs = insightface_bin(path, 16)
    assert faces.images.shape == (4, 1, 16, 16) and pairs.second.tolist() == [1, 3]
    assert faces.images[3].mean() == pytest.approx(120 / 127.5 - 1, abs=0.02)
    path.write_bytes(pickle.dumps((encoded, np.array([False, True]))))
    assert insightface_bin(path, 16)[1].same.tolist() == [False, True]
    path.write_bytes(pickle.dumps((encoded[:3], [True, False])))
    with pytest.raises(UserError, match=r"no InsightFace .bin"):
        insightface_bin(path)
    path.write_bytes(pickle.dumps(os.system))
    with pytest.raises(UserError, match="refused"):
        insightface_bin(path)


@pytest.mark.skipif("PAPERS_DATA" not in os.environ, reason="PAPERS_DATA names no folder of public sets")
def test_att_faces():
    files = identity_folder(Path(os.environ["PAPERS_DATA"]) / "att_faces", 32)
    assert len(files) == 400 and int(files.labels.max()) == 39
    assert files[0][0].shape == (1, 32, 32)


# --- embedded worlds ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["simple", "faces"])
def test_people_look_more_like_themselves(world):
    faces = procedural(world, 6, 8, 32, seed=0)
    again = procedural(world, 6, 8, 32, seed=0)
    assert torch.equal(faces.images, again.images)
    assert faces.images.shape == (48, 1, 32, 32) and faces.images.abs().max() <= 1
    assert not torch.equal(faces.images, procedural(world, 6, 8, 32, seed=1).images)
    flat = faces.images.flatten(1) - faces.images.flatten(1).mean(0)
    similarity = torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T
    same = faces.labels[:, None] == faces.labels
    different = similarity[~same].mean()
    assert similarity[same & ~torch.eye(48, dtype=torch.bool)].mean() > different


def test_second_population_is_transposed():
    plain, turned = (procedural("simple", 4, 2, 32, 0, transposed=share) for share in (0.0, 0.5))
    torch.testing.assert_close(turned.images[:4], plain.images[:4].transpose(2, 3))
    torch.testing.assert_close(turned.images[4:], plain.images[4:])


def test_random_pairs():
    labels = torch.arange(10).repeat_interleave(4)
    pairs = random_pairs(labels, 30, 30, seed=0)
    assert torch.equal(labels[pairs.first] == labels[pairs.second], pairs.same)
    assert len({tuple(pair) for pair in torch.stack([pairs.first, pairs.second], 1).tolist()}) == 60
    assert pairs.fold.bincount().tolist() == [6] * 10
    with pytest.raises(UserError, match="only 60 possible"):
        random_pairs(labels, 61, 10, seed=0)
    with pytest.raises(UserError, match="only 0 possible"):
        random_pairs(torch.arange(0), 1, 1, seed=0)


def test_random_pairs_are_those_of_a_draw_from_the_list_of_all():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (60,), generator=generator)
    first, second = np.triu_indices(60, 1)
    equal = (labels[first] == labels[second]).numpy()
    draw = np.random.default_rng(3)
    picked = [draw.choice(np.flatnonzero(kind), 40, replace=False) for kind in (equal, ~equal)]
    pairs = random_pairs(labels, 40, 40, seed=3)
    assert pairs.first.tolist() == first[np.concatenate(picked)].tolist()
    assert pairs.second.tolist() == second[np.concatenate(picked)].tolist()


def test_random_pairs_take_memory_for_the_pairs_drawn_alone():
    labels = torch.arange(5000).repeat_interleave(4)  # 2 * 10^8 possible pairs
    tracemalloc.start()
    pairs = random_pairs(labels, 200, 200, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(labels[pairs.first] == labels[pairs.second], pairs.same)
    assert peak < 10e6


def test_folds_hold_both_kinds():
    same = torch.arange(40) < 3
    fold = deal(same)
    assert int(fold.max()) == 2
    for k in range(3):
        assert same[fold == k].any() and not same[fold == k].all()
    assert deal(torch.ones(3, dtype=torch.bool)).tolist() == [0, 0, 0]


# --- protocol -------------------------------------------------------------------------------------


def test_thresholds_come_from_the_other_folds():
    same = torch.tensor([True, False, True, False])
    pairs = Pairs(torch.arange(4), torch.arange(4), same, torch.tensor([0, 0, 1, 1]))
    scores = torch.tensor([0.9, 0.5, 0.4, 0.1])
    thresholds = fold_thresholds(scores, pairs)
    assert 0.1 < thresholds[0] <= 0.4 and 0.5 < thresholds[1] <= 0.9
    assert decide(scores, thresholds, pairs).tolist() == [True, False, False, True]


def test_quality_of_purified_images_has_data_range_2():
    x, purified = (torch.full((2, 1, 16, 16), value) for value in (0.5, 0.3))
    quality = purified_quality(purified, x)
    assert quality["psnr"] == pytest.approx(10 * math.log10(2**2 / 0.2**2), abs=1e-3)
    c1 = (0.01 * 2) ** 2
    assert quality["ssim"] == pytest.approx((2 * 0.5 * 0.3 + c1) / (0.5**2 + 0.3**2 + c1), abs=1e-4)


def test_success_counts_only_pairs_that_were_right():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).view(4, 1, 1, 2)
    second = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.1, 1.0], [1.0, 0.1]]).view(4, 1, 1, 2)
    pairs = Pairs(
        torch.arange(4), torch.arange(4), torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1])
    )
    flat = lambda x: x.flatten(1)  # noqa: E731
    verifier = Verifier(flat, defenses.identity, first, second, pairs)
    clean = verifier.outcome(first)
    assert clean.accuracy == 1 and clean.success == 0 and clean.drift == pytest.approx(0, abs=1e-6)
    attacked = first.clone()
    attacked[0] = torch.tensor([0.0, 1.0])
    outcome = verifier.outcome(attacked)
    assert outcome.accuracy == 0.75 and outcome.success == 0.25
    assert perturbation_size(attacked, first)["max"] == 0.25


def test_true_accepts_have_the_threshold_of_clean_impostors():
    """Of 1,000 impostors with scores 0.001 ... 1, one in a hundred lies above 0.99."""
    impostors = torch.arange(1, 1001) / 1000
    assert accept_above(impostors, 1e-2) == pytest.approx(0.99)
    assert math.isnan(accept_above(impostors, 1e-3)), "10,000 are needed"
    assert math.isnan(accept_above(impostors[:999], 1e-2))
    assert accept_above(torch.arange(10_000.0), 1e-3) == 9989


def test_impostors_are_all_pairs_of_different_people_once():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(4, 5))
    people = torch.tensor([0, 0, 1, 2])
    first, second = torch.tensor([0, 2, 0, 3]), torch.tensor([1, 3, 2, 0])
    same = people[first] == people[second]
    pairs = Pairs(first, second, same, torch.zeros(4, dtype=torch.long))
    listed = impostor_scores(features[first], features[second], pairs)
    torch.testing.assert_close(listed, (features[first] * features[second]).sum(1)[1:])
    found = impostor_scores(features[first], features[second], replace(pairs, people=people))
    # First images 0, 2, 3 with second images 1, 3, 2, 0: different people, (3, 0) and (3, 2) once.
    wanted = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = torch.stack([features[i] @ features[j] for i, j in wanted])
    torch.testing.assert_close(found.sort().values, expected.sort().values)


def test_attacked_pairs_are_judged_by_the_clean_threshold():
    torch.manual_seed(0)
    people = torch.arange(60).repeat_interleave(2)
    images = torch.nn.functional.normalize(torch.randn(60, 8)).repeat_interleave(2, 0).view(120, 1, 1, 8)
    same = torch.arange(120) < 60
    first = torch.cat([torch.arange(0, 120, 2)] * 2)
    second = torch.cat([torch.arange(1, 120, 2), torch.arange(1, 120, 2).roll(1)])
    pairs = Pairs(first, second, same, torch.arange(120) % 2, people)
    verifier = Verifier(lambda x: x.flatten(1), defenses.identity, images[first], images[second], pairs)
    assert verifier.impostors == 60 * 59
    assert verifier.outcome(images[first]).tar_1e2 == 1
    attacked = verifier.outcome(-images[first])
    assert attacked.tar_1e2 == 0 and math.isnan(attacked.tar_1e3) and math.isnan(attacked.tar_1e4)
    half = torch.where((torch.arange(120) % 2 == 0).view(-1, 1, 1, 1), 1, -1) * images[first]
    assert verifier.outcome(half).tar_1e2 == 0.5


def test_detection_and_defences():
    torch.manual_seed(0)
    faces = procedural("simple", 8, 10, 32, seed=0)
    basis = fit_basis([faces.images], 80, 1024, 40)
    x = faces.images[:12]
    attacked = (x + 0.15 * torch.randn_like(x).sign()).clamp(-1, 1)
    top = defenses.top_components(basis, 20)
    scores = detection_scores(lambda image: image.flatten(1), top, x, attacked)
    assert auc(scores["distance"], np.repeat([0, 1], 12)) > 0.9
    torch.testing.assert_close(top(top(x)), top(x), atol=1e-4, rtol=1e-4)
    assert defenses.bit_reduction(x, 1).unique().numel() == 2
    bank = defenses.quilting_patches(faces.images, 5, 200, torch.Generator().manual_seed(0))
    quilt = defenses.Quilting(bank, 5, 3)
    smooth = partial(defenses.total_variation, steps=20)
    plain = (defenses.jpeg, defenses.blur, defenses.median, defenses.random_resize_pad)
    for defense in (*plain, smooth, quilt):
        assert defense(x).shape == x.shape and defense(x).isfinite().all()
    own = defenses.Quilting(torch.nn.functional.unfold(x[:1], 5, stride=3)[0].T, 5, 3)
    torch.testing.assert_close(own(x[:1]), x[:1])


def test_total_variation_gradient_is_the_energys():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 6, 6, requires_grad=True)
    start = x.detach()
    mask = (torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    z = start.clone().requires_grad_()
    energy = (mask * (z - start)).square().sum()
    energy = energy + 0.1 * (
        (z[..., 1:, :] - z[..., :-1, :]).square().sum() + (z[..., 1:] - z[..., :-1]).square().sum()
    )
    (slope,) = torch.autograd.grad(energy, z)
    moved = defenses.total_variation(start, torch.Generator().manual_seed(3), steps=1, rate=1.0)
    torch.testing.assert_close(moved, start - slope)
