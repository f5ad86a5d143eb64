"""Biphasic ageing: what `measure` says of methods whose outputs are known, distances, ages between groups."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from biphasic_age import continuous, scene_eval
from biphasic_age.data import MemoryFaces, open_faces
from biphasic_age.faces_eval import Judges, TestFaces, as_method, distances, measure
from biphasic_age.layouts import CLASSES
from biphasic_age.protocol import Verifier
from biphasic_age.scene import draw_scenes
from biphasic_age.scene_eval import SceneTest, measure_scene, open_scene_test
from biphasic_age.train import PRESETS, train
from shared.runtime import parse_presets

HAIR, SKIN = CLASSES.index("hair"), CLASSES.index("skin")
LIMITS = (30.0, 40.0, 50.0)


class Hair(nn.Module):
    """Returns the picture, made dark where the target is the oldest group; noise changes the hair alone."""

    def forward(self, image, layout, target, noise=None, generator=None):
        made = image - (target == 3).float().view(-1, 1, 1, 1)
        if noise is not None:
            return made
        drawn = torch.rand(len(image), 1, *image.shape[-2:], generator=generator)
        return made + 0.1 * drawn * (layout == HAIR)[:, None]


class Bright(nn.Module):
    """One attribute: a bright picture."""

    def both(self, image):
        return image.mean((1, 2, 3)), image.mean((1, 2, 3))[:, None]


def four_faces() -> TestFaces:
    """One bright face of each group, skin above and hair below."""
    image = torch.full((4, 3, 16, 16), 0.5)
    layout = torch.full((4, 16, 16), SKIN, dtype=torch.uint8)
    layout[:, 8:] = HAIR
    ages = torch.tensor([20.0, 35.0, 45.0, 60.0])
    about = {"people": torch.arange(4), "limits": LIMITS, "classes": len(CLASSES)}
    source = MemoryFaces(image, layout, name="four", ages=ages, attributes=torch.ones(4, 1), **about)
    source.attribute_names = ("bright",)
    return TestFaces(image, layout, source.groups, source, None)


def judges() -> Judges:
    return Judges(
        lambda x: 40 + 10 * x.mean((1, 2, 3)),
        Bright(),
        lambda x: nn.functional.normalize(x.mean((2, 3)), dim=1),
        Verifier(0.5, 0.01, 1.0, 1, 1),
        0.0,
        {},
    )


def test_attributes_that_are_kept_and_what_noise_changes_in_each_part():
    net, faces = Hair(), four_faces()
    numbers = measure(as_method(net), net, faces, judges(), None).numbers
    # Three of the twelve translations, those to the oldest group, are no longer bright.
    assert numbers["kept: bright"] == pytest.approx(9 / 12)
    assert numbers["verification rate"] == pytest.approx(5 / 6)  # of the protocol's six, one is turned over
    by_part = {name: numbers[f"noise diversity: {name}"] for name in ("skin", "hair")}
    assert by_part["skin"] == 0 and by_part["hair"] == pytest.approx(0.1 / 3, rel=0.1)
    assert numbers["noise diversity"] == pytest.approx(by_part["hair"] / 2)
    assert "noise diversity: cloth" not in numbers  # no face shows any
    assert numbers["self PSNR"] < 100 and numbers["self SSIM"] < 1  # the oldest is not given back


class Corner(nn.Module):
    """Two features of a picture."""

    num_features = 2

    def forward(self, image):
        return image[:, :2, 0, 0] * 10


def test_distances_are_those_of_outputs_to_real_faces_of_the_target_group():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(400, 3, 4, 4, generator=generator) * 2 - 1
    group = torch.arange(400) % 2
    image[group == 1] = image[group == 1] / 4 + 0.5
    faces = replace(four_faces(), image=image, group=group)
    copy = image[:, None].expand(-1, 2, -1, -1, -1)
    aged = copy.clone()
    aged[group == 0, 1] = image[group == 1]  # outputs of the older group are its real faces
    names = ("30-", "31+")
    kept, right = (distances(made, faces, Corner(), names) for made in (copy, aged))
    assert set(kept) == {f"{kind} to {name}" for kind in ("FID", "KID") for name in names}
    assert right["FID to 31+"] < 1e-3 and kept["FID to 31+"] > 1
    assert right["FID to 30-"] == kept["FID to 30-"] and right["KID to 31+"] < kept["KID to 31+"]
    few = replace(faces, image=image[:3], group=group[:3])  # one face alone is of the older group
    assert distances(copy[:3], few, Corner(), names) == {}


def test_the_helpers_accuracy_is_the_age_networks_own_and_not_the_judges():
    class Says(nn.Module):
        def forward(self, image):
            return type("Seen", (), {"groups": torch.eye(4)[[3]].expand(len(image), -1)})

    def painted(image, layout, source, target):
        return torch.zeros_like(image) + target.view(-1, 1, 1, 1) / 8

    device, scenes = torch.device("cpu"), draw_scenes(3, 0, 16)
    test = SceneTest(scenes, lambda x: 25 + 80 * x.mean((1, 2, 3)), LIMITS)
    numbers = measure_scene(painted, test, device, Says())
    # Every age is made the three others: an answer that is always the oldest is right in a quarter.
    assert numbers["helper accuracy"] == pytest.approx(1 / 4) and numbers["age accuracy"] == 1
    assert "helper accuracy" not in measure_scene(painted, test, device)


def test_a_scene_with_one_head_is_trained_and_judged(monkeypatch):
    taught = []
    monkeypatch.setattr(scene_eval, "train_age_judge", lambda judge, source, *_, **__: taught.append(source))
    for heads in (1, 2):
        config = replace(PRESETS["demo"], scene_heads=heads, scene_images=4)
        test = open_scene_test(4, 32, config.scene_heads, 1, torch.device("cpu"))
        learned = open_faces(config, "scene", "train")
        for layout in (learned.layouts, test.scenes.layout, taught[-1].layouts[:4]):
            # The head is in the middle, where two leave a gap.
            assert (layout[:, :, 15:17] > 0).any((1, 2)).all() == (heads == 1)


def test_ages_between_the_groups_are_asked_of_a_judge(tmp_path, monkeypatch, capsys):
    options = (
        "demo", "--data", "faces", "--variants", "full", "--image-size", "16", "--size", "unit",
        "--train-images", "24", "--test-images", "4", "--steps", "1", "--guide-steps", "1",
        "--age-width", "4", "--age-stages", "2", "--identity-width", "4", "--batch-size", "4",
        "--device", "cpu", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    folder = train(parse_presets(PRESETS, "", options))
    monkeypatch.setattr(continuous, "open_judge", lambda *given: lambda x: 50 + 10 * x.mean((1, 2, 3)))
    continuous.main(continuous.ContinuousConfig(folder, ages=3, faces=2, device="cpu"))
    numbers = json.loads((folder / "continuous.json").read_text())
    assert len(numbers["ages"]) == len(numbers["seen"]) == 3
    assert set(numbers) == {"ages", "seen", "spearman", "rising", "slope"}
    assert -1 <= numbers["spearman"] <= 1  # nan is not
    assert numbers["ages"] == sorted(numbers["ages"]) and "mean age seen" in capsys.readouterr().out
    with Image.open(folder / "continuous.png") as picture:
        assert "DigitalSourceType" in picture.text
