"""Measure generators on the two-head scene, where every output has its truth."""

from dataclasses import dataclass

import torch
from torch import nn

from biphasic_age import protocol
from biphasic_age.data import JUDGE_SEED, TEST_SEED, scene_faces
from biphasic_age.frozen import AgeNet
from biphasic_age.judges import AgeJudge, train_age_judge
from biphasic_age.scene import AGEING_PARTS, GROUPS, PARTS, Scenes, ageing_signs, draw_scenes

KEPT_PARTS = tuple(k for k in range(len(PARTS)) if k not in AGEING_PARTS)
"""Everything else, and with the background the poster's head."""


def scene_judge(size: int, heads: int, steps: int, device: torch.device) -> AgeJudge:
    """An age judge on scenes that no training used. It sees all heads of a picture, like everybody."""
    torch.manual_seed(JUDGE_SEED)
    judge = AgeJudge(16, 3, 0).to(device)
    scenes = scene_faces(2400, JUDGE_SEED, size, heads)
    train_age_judge(judge, scenes, steps, 32, device, JUDGE_SEED, jitter=0.0)
    return judge


@dataclass(frozen=True)
class SceneTest:
    """Test scenes and their judge."""

    scenes: Scenes
    judge: nn.Module
    limits: tuple[float, ...]


@torch.inference_mode()
def judge_accuracy(test: SceneTest, device: torch.device) -> float:
    """Share of true scenes of all ages whose age the judge tells."""
    years = protocol.in_batches(test.judge, test.scenes.image.to(device) * 2 - 1)
    right = protocol.age2group(years, test.limits) == torch.arange(GROUPS, device=device)
    return right.float().mean().item()


def open_scene_test(count: int, size: int, heads: int, steps: int, device: torch.device) -> SceneTest:
    """`count` test scenes, and a judge that learns for `steps` steps."""
    limits = scene_faces(4, 0, size, heads).limits
    scenes = draw_scenes(count, TEST_SEED, size, heads)
    return SceneTest(scenes, scene_judge(size, heads, steps, device), limits)


@torch.inference_mode()
def measure_scene(
    method: protocol.Method, test: SceneTest, device: torch.device, helper: AgeNet | None = None
) -> dict[str, float]:
    """Mean numbers of a method over all scenes, source and target ages. helper: the age network of the
    losses.

    `true PSNR`: outputs against the true scene at the target age; `self PSNR`: own age; `change`, `leak`:
    mean |y - x| on the subject's hair and skin and elsewhere; `age accuracy`: judge's, `helper accuracy`:
    that of `helper`, which a generator can fool without ageing anything; `hair rising older`:
    share of inputs of the youngest group whose hair greys from target to target (`younger`: of the oldest
    group; `wrinkles`: whose wrinkles deepen); `hair older 2`: that sign's mean in the outputs of target 2.
    """
    scenes, n = test.scenes, len(test.scenes.layout)
    layout = scenes.layout.to(device)
    truth = scenes.image.to(device) * 2 - 1
    sums: dict[str, list[float]] = {}
    signs = {}
    for k in range(GROUPS):
        source = torch.full((n,), k, device=device)
        image = truth[:, k]
        made = protocol.translate_all(method, image, layout, source, GROUPS)
        quality = protocol.psnr(made, truth)
        years = protocol.in_batches(test.judge, made)
        right = protocol.age2group(years, test.limits) == torch.arange(GROUPS, device=device)
        entries = {
            "true PSNR": protocol.translated_only(quality, source).mean().item(),
            "self PSNR": quality[:, k].mean().item(),
            "change": protocol.pooled_change(made, image, layout, source, AGEING_PARTS),
            "leak": protocol.pooled_change(made, image, layout, source, KEPT_PARTS),
            "age accuracy": protocol.translated_only(right, source).float().mean().item(),
        }
        if helper is not None:
            told = protocol.in_batches(lambda x: helper(x).groups.argmax(1), made)
            told = told == torch.arange(GROUPS, device=device)
            entries["helper accuracy"] = protocol.translated_only(told, source).float().mean().item()
        for name, value in entries.items():
            sums.setdefault(name, []).append(value)
        if k in (0, GROUPS - 1):
            flat = made.flatten(0, 1).cpu() / 2 + 0.5
            repeated = (value.repeat_interleave(GROUPS, 0) for value in (scenes.layout, scenes.skin_y))
            signs[k] = {name: v.view(n, GROUPS) for name, v in ageing_signs(flat, *repeated).items()}
    result = {name: sum(values) / len(values) for name, values in sums.items()}
    if result["leak"] > 0:
        result["change/leak"] = result["change"] / result["leak"]
    for k, direction in ((0, "older"), (GROUPS - 1, "younger")):
        for name, value in signs[k].items():
            result[f"{name} rising {direction}"] = (value.diff(dim=1) > 0).all(1).float().mean().item()
            for target in range(GROUPS):
                result[f"{name} {direction} {target}"] = value[:, target].mean().item()
    return result
