"""DFGC 2022: the embedded contest, losses, recipes."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dfgc2022_data import crop
from torch import nn

from dfgc2022 import losses
from dfgc2022.data import CropFolder, read_list
from dfgc2022.datasets import dfgc2022
from dfgc2022.extract import extract_all
from dfgc2022.model import Detector
from dfgc2022.pipeline import Scorer
from dfgc2022.recipe import (
    add_adversarial,
    build_schedule,
    split_people,
    validation_loader,
    validation_loss,
)
from dfgc2022.robustness import attack
from dfgc2022.train import PRESETS, Config, plan
from dfgc2022.video import read_frames
from dfgc2022.world import CREATORS, Size, build_world, ellipse_distance, record, scenes, swap
from shared.runtime import UserError

# --- the embedded contest -------------------------------------------------------------------------------


def test_a_damaged_record_of_a_drawn_contest_is_named(tmp_path):
    (tmp_path / "world.json").write_text('{"seed": 0')
    with pytest.raises(UserError, match="world.json: not readable as a drawn contest .*; delete its folder"):
        build_world(tmp_path, 0, Size(keys=2))


def test_fakes_differ_inside_the_face_only_and_as_their_creators_do():
    size = Size(keys=2)
    scene = scenes(2, 0, size)
    rng = np.random.default_rng(0)
    filmed = record(scene, 0, size, rng)
    ideal = swap(filmed, "ideal", rng)
    border = (ideal - np.clip(filmed.target, 0, 255))[:, :8]
    assert np.abs(border).max() == 0  # the border is the target's
    gaps = {name: swap(filmed, name, rng) - ideal for name in CREATORS}
    assert all(np.abs(gap).mean() > 0.3 for gap in gaps.values())
    detail = {name: float(np.abs(np.diff(gap + ideal, axis=2)).mean()) for name, gap in gaps.items()}
    flat = float(np.abs(np.diff(ideal, axis=2)).mean())
    assert detail["lowres"] < flat and detail["smooth"] < flat < detail["sharp"] and flat < detail["checker"]
    # The camera films before the creator works: its noise is in the recording, not in a smoothed face.
    assert np.diff(filmed.target[:, :6, :6], axis=0).std() == pytest.approx(2 * 2**0.5, rel=0.2)
    again = scenes(2, 0, size)
    assert np.array_equal(again.target, scene.target) and not np.array_equal(
        scenes(2, 1, size).target, scene.target
    )


def test_plain_people_are_swapped_as_the_drawn_ones_are(tmp_path):
    size = Size(train=2, test=2, keys=2, pixels=32, people="simple")
    scene = scenes(3, 0, size)
    assert np.array_equal(scenes(3, 0, size).donor, scene.donor)
    assert not np.array_equal(scenes(3, 1, size).target, scene.target)
    face = ellipse_distance(scene.landmarks[0, 0], 32)
    gap = np.abs(scene.target[0, 0] - scene.donor[0, 0]).mean(-1)
    assert gap[face > 1.2].max() == 0 and gap[face < 0.8].mean() > 10  # the same outline and background
    skin, around = (scene.target[:, 0][:, mask].mean(1) for mask in (face < 0.3, face > 1.5))
    assert (np.abs(skin - around).max(1) > 5).all()
    rng = np.random.default_rng(0)
    filmed = record(scene, 0, size, rng)
    assert np.abs((swap(filmed, "ideal", rng) - np.clip(filmed.target, 0, 255))[0][face > 1]).max() == 0
    build_world(tmp_path, 0, size)
    assert next(read_frames(dfgc2022(tmp_path).paths[dfgc2022(tmp_path).clips[0].name]))[1].shape == (
        32,
        32,
        3,
    )


def test_world_is_read_through_the_public_layout(tmp_path):
    size = Size(train=4, test=2, keys=2)
    build_world(tmp_path, 0, size)
    found = dfgc2022(tmp_path)
    counts = {
        part: sum(clip.part == part for clip in found.clips) for part in ("Public", "Private-1", "Private-2")
    }
    assert counts == {"Public": 12, "Private-1": 12, "Private-2": 8}
    assert {clip.creator for clip in found.clips if clip.part == "Private-2" and clip.label} == {
        "checker",
        "sharp",
    }
    assert len(list(read_frames(found.paths[found.clips[0].name]))) == 4
    videos = [(path, None) for path in sorted((tmp_path / "Train").glob("*.mp4"))]
    assert extract_all(videos, tmp_path / "crops", str(tmp_path / "boxes.csv"), size.every) == []
    (tmp_path / "crops" / "d.txt").write_text((tmp_path / "Train" / "diverse.txt").read_text())
    folders, empty = read_list(tmp_path / "crops" / "d.txt")
    assert len(folders) == 8 and empty == 0 and len(list(folders[0].folder.glob("*.png"))) == 2
    stamp = found.paths[found.clips[0].name].stat().st_mtime_ns
    build_world(tmp_path, 0, size)
    assert found.paths[found.clips[0].name].stat().st_mtime_ns == stamp


# --- losses and recipes -----------------------------------------------------------------------------------


def test_losses_against_their_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    picked = log_p[torch.arange(6), labels]
    assert torch.allclose(losses.cross_entropy(logits, labels), -picked.mean())
    expected = (0.95 * -picked + 0.05 * -log_p.mean(1)).mean()
    assert torch.allclose(losses.smoothed_cross_entropy(logits, labels), expected)
    z, y = logits[:, :1], torch.tensor([0, 1, 1, 1, 0, 0])
    p = z[:, 0].sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert torch.allclose(losses.binary_cross_entropy(z, y), expected)


def rates(config, steps, epoch_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config.lr)
    schedule = build_schedule(config, optimizer, steps, epoch_steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules():
    found = rates(Config(lr=1.0, decay=0.9, decay_steps=10), 35, 7)
    assert np.allclose(found, [0.9 ** (step // 10) for step in range(35)])  # the count is not per epoch
    found = rates(Config(lr=1.0, schedule="epochs", decay=0.5, decay_steps=2), 50, 10)
    assert [found[epoch * 10] for epoch in range(5)] == [1, 0.5, 0.5, 0.25, 0.25]  # stepped before epoch 0
    assert max(rates(Config(lr=1.0, schedule="onecycle"), 30, 10)) == pytest.approx(1)


def test_the_paper_presets_are_the_winners():
    config = Config()
    assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (5e-5, 0.01, 96, 50)
    assert (config.decay, config.decay_steps, config.keep_every) == (0.9, 10_000, 10)
    assert (config.optimizer, config.schedule, config.augment, config.balance) == (
        "adamw", "decay", "winner", False
    )  # fmt: skip
    assert config.detector == "convnext_xlarge_384_in22ft1k" and config.loss == "cross_entropy"
    swin = {"detector": "swin_large_patch4_window12_384_in22k", "batch_size": 24, "epochs": 60}
    swin |= {"decay_steps": 30_000, "keep_every": 20}
    assert PRESETS["paper"] == config and PRESETS["paper-swin"] == dataclasses.replace(config, **swin)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("xception21", {
            "detector": "xception_dfgc21_baseline", "classes": 1, "loss": "binary_cross_entropy",
            "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-3, "schedule": "epochs", "decay": 0.5,
            "decay_steps": 2, "batch_size": 32, "epochs": 5, "frames_per_video": 10, "balance": True,
            "val_share": 0.2, "val_every": 500,
        }),
        ("winner21", {
            "detector": "timm/efficientnet_b3", "size": 300, "classes": 3, "loss": "smoothed",
            "optimizer": "sgd", "lr": 1e-3, "schedule": "epochs", "decay": 0.9, "decay_steps": 2,
            "batch_size": 8, "epochs": 85, "balance": True, "adversarial": 0.75, "blending": 0.5,
        }),
    ],
)  # fmt: skip
def test_the_presets_of_2021(name, values):
    assert {field: getattr(PRESETS[name], field) for field in values} == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": ("nobody",)}, "unknown member"),
        ({"competition_rules": True, "blending": 0.1}, "forbidden"),
        ({"adversarial": 0.5}, "--classes 3"),
        ({"classes": 1}, "belong together"),
    ],
)
def test_settings_that_contradict_each_other(change, message):
    with pytest.raises(UserError, match=message):
        plan(Config(**change))


class Linear(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 4 * 4, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_adversarial_fakes_move_by_epsilon_towards_real():
    network, entry = Linear(3), Detector(Linear, 4)
    images, labels = torch.randn(8, 3, 4, 4), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1])
    config = Config(classes=3, adversarial=0.75, epsilon=4.0)
    moved, marked = add_adversarial(network, images, labels, config, entry)
    assert (marked == 2).sum() == round(6 * 0.75) and torch.equal(marked[labels == 0], labels[labels == 0])
    assert torch.equal(moved[marked != 2], images[marked != 2])
    step = (moved - images)[marked == 2].abs() * torch.tensor(entry.normalise[1]).view(1, 3, 1, 1) * 255
    assert torch.allclose(step, torch.full_like(step, 4.0), atol=1e-3)
    real = lambda x: network(x).log_softmax(1)[:, 0]  # noqa: E731
    assert (real(moved)[marked == 2] > real(images)[marked == 2]).all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_attack_lowers_fakes_and_raises_reals():
    entry = Detector(Linear, 4)
    scorer = Scorer({"a": (Linear(2), entry, 4)})
    crops = np.random.default_rng(0).integers(50, 200, (5, 4, 4, 3), np.uint8)
    clean = scorer({4: crops})["a"]
    assert (attack(scorer, "a", crops, 1) < clean).all() and (attack(scorer, "a", crops, 0) > clean).all()


def test_held_out_people_are_nobody_elses(tmp_path):
    for name in ("001_a", "001_b", "002-c", "003.mp4", "004"):
        crop(tmp_path / name / "0000.png")
    (tmp_path / "l.txt").write_text("001_a 0\n001_b 1\n002-c 0\n003.mp4 1\n004 0\n")
    folders, _ = read_list(tmp_path / "l.txt")
    kept, held_out = split_people(folders, 0.5, 0)
    people = [{folder.folder.name[:3] for folder in part} for part in (kept, held_out)]
    assert not people[0] & people[1] and len(people[1]) == math.floor(4 * 0.5)
    assert len(kept) + len(held_out) == 5
    for some, share in ((folders, 0.1), (folders[:2], 0.9), (folders[2:4], 0.5)):
        with pytest.raises(UserError, match="cannot be divided so"):
            split_people(some, share, 0)


@pytest.mark.parametrize("odd", [(), ("000", "005")])
def test_nobody_of_a_fake_is_on_both_sides(odd, capsys):
    """Pairs in which each is swapped with the other, as in FaceForensics++, of which nothing is lost;
    originals, as in DFDC; and a fake of two people of different pairs, whom a division may part.
    """
    shown = [(f"{n:03}",) for n in range(8)]
    shown += [(f"{n:03}", f"{n ^ 1:03}") for n in range(8)]
    shown += [("a.mp4",), ("a.mp4",), ("b.mp4",), ("b.mp4",), *([odd] if odd else [])]
    folders = [CropFolder(Path(f"x{number}"), number % 2, people) for number, people in enumerate(shown)]
    lost = []
    for seed in range(8):
        kept, held_out = split_people(folders, 0.4, seed)
        people = [{person for folder in part for person in folder.people} for part in (kept, held_out)]
        assert not people[0] & people[1] and len(people[1]) >= 4
        lost.append(len(folders) - len(kept) - len(held_out))
        said = f"{lost[-1]} videos show people of both sides" if lost[-1] else ""
        assert said in capsys.readouterr().out
    assert any(lost) == bool(odd)


@pytest.mark.parametrize(
    ("workers", "precision"), [(0, torch.float32), (1, torch.float32), (0, torch.bfloat16)]
)
def test_validation_is_the_mean_log_loss_in_the_precision_of_the_training(tmp_path, workers, precision):
    folders = [CropFolder(tmp_path / str(number), number % 2) for number in range(5)]
    for number, folder in enumerate(folders):
        crop(folder.folder / "0000.png", 40 * number)
    network, entry, kinds = Linear(2), Detector(Linear, 4), []
    network.layer.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16),
    )
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = validation_loader(Config(workers=workers), folders, 4, torch.device("cpu"))
    loss = validation_loss(network, loader, entry, accelerator)
    assert torch.equal(torch.get_rng_state(), before) and network.training and set(kinds) == {precision}
    mean, deviation = (np.array(values) for values in entry.normalise)
    logits = [
        network(torch.tensor((40 * n / 255 - mean) / deviation).float().view(1, 3, 1, 1).expand(-1, -1, 4, 4))
        for n in range(5)
    ]
    expected = nn.functional.cross_entropy(torch.cat(logits), torch.tensor([0, 1, 0, 1, 0]))
    assert loss == pytest.approx(expected.item(), rel=1e-5 if precision == torch.float32 else 0.02)
