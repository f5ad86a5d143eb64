"""Measure generators on faces: ages, identity, attributes, truth where faces were drawn, change by part."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from biphasic_age import protocol
from biphasic_age.baselines import Prototypes, copy
from biphasic_age.data import (
    JUDGE_SEED,
    TEST_SEED,
    FaceSet,
    MemoryFaces,
    all_faces,
    draw_people,
    drawn_faces,
    open_faces,
)
from biphasic_age.judges import (
    AgeJudge,
    IdentityJudge,
    OnnxJudge,
    load_judge,
    train_age_judge,
    train_identity_judge,
)
from biphasic_age.layouts import CLASSES
from shared import metrics as shared_metrics
from shared.io import save_safetensors
from shared.records import write_json
from shared.runtime import UserError

if TYPE_CHECKING:
    from biphasic_age.eval import EvalConfig
    from biphasic_age.train import Config

AGEING = tuple(CLASSES.index(name) for name in ("skin", "hair"))
KEPT = tuple(CLASSES.index(name) for name in ("background", "cloth", "l_eye", "r_eye"))
"""Where age may show, and where change is leakage."""
CALIBRATION_PEOPLE, CALIBRATION_PICTURES, CALIBRATION_FACES = 200, 4, 2000
JUDGE_PICTURES = 4
DRAWN_FAR = 0.01
PROTOTYPE_FACES = 800
TEACHING = ("judge_width", "judge_people", "judge_steps", "judge_batch")


@dataclass(frozen=True)
class Judges:
    """The judging networks and what they reach on real test faces."""

    age: nn.Module
    attributes: AgeJudge | None
    """Judge of attributes; None when the user's own age estimator is used and none was trained."""
    identity: nn.Module
    verifier: protocol.Verifier
    mae: float
    """Mean absolute error of the age judge, years."""
    attribute_accuracy: dict[str, float]


@dataclass
class TestFaces:
    """Test faces in memory, and what is known of them."""

    __test__ = False  # not a test class

    image: Tensor
    """(N, 3, S, S) in [-1, 1]."""
    layout: Tensor
    group: Tensor
    source: FaceSet
    truth: Tensor | None
    """(N, K, 3, S, S): the same people drawn at the mean age of every group; None for photographs."""


def open_test(config: "Config", data: str, means: tuple[float, ...], device: torch.device) -> TestFaces:
    """The first `test_images` test faces. means: mean age of each group in training."""
    source = open_faces(config, data, "test", config.seed)
    image, layout = (value.to(device) for value in all_faces(source, config.test_images))
    group, truth = source.groups[: len(image)].to(device), None
    if isinstance(source, MemoryFaces) and source.params is not None:
        at_age = [draw_people(source.params.replace(age=age), config.image_size)[0] for age in means]
        truth = (torch.stack(at_age, 1)[: len(image)] * 2 - 1).to(device)
    return TestFaces(image, layout, group, source, truth)


def teaching(settings: "EvalConfig") -> dict[str, int]:
    """The options that make a judge what it is."""
    return {name: getattr(settings, name) for name in TEACHING}


def judge_record(folder: Path, data: str, name: str) -> Path:
    """Where a run keeps how a judge was taught; its weights lie beside it."""
    return folder / "judges" / f"{data}-{name}.json"


def read_record(path: Path) -> dict[str, int] | None:
    """How a kept judge was taught; None where there is no such judge."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def as_kept(settings: "EvalConfig", folder: Path, data: str) -> "EvalConfig":
    """Settings that take the age judge that an evaluation of the run taught, whatever its options were."""
    kept = read_record(judge_record(folder, data, "age")) or {}
    return replace(settings, **{name: value for name, value in kept.items() if name in TEACHING})


def teachers(settings: "EvalConfig", config: "Config", data: str) -> FaceSet:
    """Whom judges learn from: drawn people that no training saw, or the training fold."""
    if data != "faces":
        return open_faces(config, data, "train", config.seed)
    size, limits = config.image_size, config.limits
    return drawn_faces(settings.judge_people, JUDGE_SEED, size, JUDGE_PICTURES, limits)


def open_judge(
    name: Literal["age", "identity"],
    settings: "EvalConfig",
    config: "Config",
    data: str,
    folder: Path,
    device: torch.device,
    attributes: int,
    source: Callable[[], FaceSet],
) -> nn.Module:
    """A judge from the user's file, as an earlier evaluation of the run taught it with the same options, or
    taught now and kept.

    attributes: how many the age judge learns. source: gives the faces to learn from. UserError when they do
    not say who is who, which the identity judge must learn.
    """
    given = settings.age_judge if name == "age" else settings.identity_judge
    if given is not None:
        return OnnxJudge(given, embeds=name == "identity")
    width, stages = settings.judge_width, max(2, config.image_size.bit_length() - 3)
    torch.manual_seed(JUDGE_SEED)
    if name == "age":
        network, teach = AgeJudge(width, stages, attributes), train_age_judge
    else:
        network, teach = IdentityJudge(3 * width // 2, stages - 1), train_identity_judge
    record = judge_record(folder, data, name)
    path = record.with_suffix(".safetensors")
    if path.is_file() and read_record(record) == teaching(settings):
        return load_judge(path, network, device)
    faces = source()
    if name == "identity" and len(faces.people.unique()) == len(faces):
        raise UserError(
            f"{data} does not say which pictures show the same person, so no identity judge can learn "
            "from it: give --identity-judge FILE.onnx"
        )
    record.unlink(missing_ok=True)
    network = network.to(device)
    teach(network, faces, settings.judge_steps, settings.judge_batch, device, JUDGE_SEED)
    save_safetensors(path, network)
    write_json(record, teaching(settings))
    return network


def open_judges(
    settings: "EvalConfig", config: "Config", data: str, folder: Path, device: torch.device
) -> Judges:
    """Both judges, and what they reach on real test faces; see `open_judge`."""
    drawn = data == "faces"
    test = (
        drawn_faces(CALIBRATION_PEOPLE, TEST_SEED + 1, config.image_size, CALIBRATION_PICTURES, config.limits)
        if drawn
        else open_faces(config, data, "test", config.seed)
    )
    if len(test.people[:CALIBRATION_FACES].unique()) < 2:
        raise UserError(
            f"{data}: the test fold shows one person alone, and the identity judge's threshold needs pairs "
            "of different people: use a larger set"
        )
    source = cache(partial(teachers, settings, config, data))
    age, identity = (
        open_judge(name, settings, config, data, folder, device, len(test.attribute_names), source)
        for name in ("age", "identity")
    )
    trained = age if isinstance(age, AgeJudge) else None
    image = all_faces(test, CALIBRATION_FACES)[0].to(device)
    count = len(image)
    mae = (protocol.in_batches(age, image).cpu() - test.ages[:count]).abs().mean().item()
    far = settings.far if settings.far is not None else DRAWN_FAR if drawn else protocol.FAR
    verifier = protocol.calibrate(protocol.in_batches(identity, image), test.people[:count], far)
    accuracy = {}
    if trained is not None:
        seen = protocol.in_batches(lambda x: trained.both(x)[1], image).cpu() > 0
        for a, name in enumerate(test.attribute_names):
            known = test.attributes[:count, a] >= 0
            if known.any():
                right = seen[known, a] == (test.attributes[:count, a][known] > 0)
                accuracy[name] = right.float().mean().item()
    return Judges(age, trained, identity, verifier, mae, accuracy)


def prototypes(config: "Config", data: str, device: torch.device) -> Prototypes:
    """Mean training face of each group, from at most `PROTOTYPE_FACES` pictures."""
    source = open_faces(config, data, "train", config.seed)
    count = len(config.limits) + 1
    chosen = [(source.groups == k).nonzero().flatten()[: PROTOTYPE_FACES // count] for k in range(count)]
    means = [torch.stack([source.load(int(i))[0] for i in part]).mean(0) * 2 - 1 for part in chosen]
    return Prototypes(torch.stack(means).to(device))


def as_method(net: nn.Module) -> protocol.Method:
    """A generator as a method: its deterministic output, without noise."""
    return lambda image, layout, source, target: net(image, layout, target, 0.0)


def baselines(config: "Config", data: str, device: torch.device) -> dict[str, protocol.Method]:
    """Methods that need no training of their own."""
    return {"copy": copy, "prototypes": prototypes(config, data, device)}


class Measured(NamedTuple):
    """What there is to say of one method."""

    numbers: dict[str, float]
    ages: list[protocol.AgeRow]
    made: Tensor
    """(N, K, 3, S, S), every test face at every age."""
    years: Tensor
    """(N, K), the judge's ages of them."""


@torch.inference_mode()
def measure(
    method: protocol.Method, net: nn.Module | None, faces: TestFaces, judges: Judges, parser: nn.Module | None
) -> Measured:
    """All numbers of one method. net: the generator, for noise and cycle; None for methods without one."""
    image, layout, group, limits = faces.image, faces.layout, faces.group, faces.source.limits
    count = len(limits) + 1
    made = protocol.translate_all(method, image, layout, group, count)
    result: dict[str, float] = {}

    real, years = protocol.in_batches(judges.age, image), protocol.in_batches(judges.age, made)
    rows = protocol.age_rows(years, real, group, limits)
    for direction in protocol.DIRECTIONS:
        here = [row for row in rows if row.direction == direction]
        if here:
            result[f"age error {direction}"] = sum(row.error for row in here) / len(here)
            result[f"hit rate {direction}"] = sum(row.hit for row in here) / len(here)
            start = 0 if direction == "older" else count - 1
            result[f"rising {direction}"] = protocol.rising_share(years, group, start)

    inputs, outputs = protocol.in_batches(judges.identity, image), protocol.in_batches(judges.identity, made)
    kept = protocol.identity_kept(outputs, inputs, judges.verifier.threshold)
    confidence = protocol.at_extremes(kept["confidence"], group)
    result["verification rate"] = protocol.at_extremes(kept["verified"], group).float().mean().item()
    result["confidence"], result["confidence std"] = confidence.mean().item(), confidence.std().item()
    result["confidence between outputs"] = kept["between"].mean().item()
    result["confidence between outputs std"] = kept["between"].std().item()
    if judges.attributes is not None:
        before = protocol.in_batches(lambda x: judges.attributes.both(x)[1], image) > 0
        after = protocol.in_batches(lambda x: judges.attributes.both(x)[1], made) > 0
        same = after == before[:, None]
        for a, name in enumerate(faces.source.attribute_names):
            result[f"kept: {name}"] = protocol.translated_only(same[..., a], group).float().mean().item()

    own = made[torch.arange(len(image), device=made.device), group]
    result["self PSNR"] = protocol.psnr(own, image).mean().item()
    result["self SSIM"] = protocol.ssim(own, image)
    if faces.truth is not None:
        result["true PSNR"] = protocol.translated_only(protocol.psnr(made, faces.truth), group).mean().item()
    result["change"] = protocol.pooled_change(made, image, layout, group, AGEING)
    result["leak"] = protocol.pooled_change(made, image, layout, group, KEPT)
    if result["leak"] > 0:
        result["change/leak"] = result["change"] / result["leak"]
    if parser is not None:
        found = protocol.in_batches(parser.labels, made).long()
        every = layout[:, None].expand_as(found)
        result["parsing mIoU"] = protocol.mean_iou(found.flatten(0, 1), every.flatten(0, 1), len(CLASSES))
    if net is not None:
        chance, cycle, diversity = torch.Generator().manual_seed(0), [], []
        of_class = 0
        for x, S, a in zip(image.split(16), layout.split(16), group.split(16), strict=True):
            target = (a + 1) % count
            back = net(net(x, S, target, 0.0), S, a, 0.0)
            cycle.append((back - x).abs().mean((1, 2, 3)))
            one, other = (net(x, S, target, None, chance) for _ in range(2))
            difference = (one - other).abs().mean(1)
            diversity.append(difference.mean((1, 2)))
            everywhere = torch.ones_like(difference)
            of_class = of_class + protocol.class_sums(difference, everywhere, S, len(CLASSES))
        result["cycle error"] = torch.cat(cycle).mean().item()
        result["noise diversity"] = torch.cat(diversity).mean().item()
        for name, total, pixels in zip(CLASSES, *of_class.tolist(), strict=True):
            if pixels:
                result[f"noise diversity: {name}"] = total / pixels
    return Measured(result, rows, made, years)


def distances(
    made: Tensor, faces: TestFaces, inception: nn.Module, names: tuple[str, ...]
) -> dict[str, float]:
    """FID (2 faces suffice to compute it, thousands to trust it) and, from 100 faces on, KID of the outputs
    of each target group against the real test faces of that group."""
    result = {}
    for k, name in enumerate(names):
        real = faces.image[faces.group == k] / 2 + 0.5
        fake = made[faces.group != k, k] / 2 + 0.5
        if min(len(real), len(fake)) < 2:
            continue
        result[f"FID to {name}"] = shared_metrics.fid(real.split(64), fake.split(64), inception)
        size = min(len(real), len(fake), 1000)
        if size >= 100:
            result[f"KID to {name}"] = shared_metrics.kid(
                real.split(64), fake.split(64), inception, size=size
            )[0]
    return result
