"""Measure a run: ages by target group and direction, identity, attributes, truth, change by part, claims.

The numbers of the paper's own tables could not be read, and its judge is a commercial service: nothing here
stands under a published number as if comparable.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from biphasic_age import protocol
from biphasic_age.baselines import copy
from biphasic_age.claims import face_claims, scene_claims
from biphasic_age.faces_eval import (
    TestFaces,
    as_method,
    baselines,
    distances,
    measure,
    open_judges,
    open_test,
)
from biphasic_age.figures import distributions
from biphasic_age.frozen import freeze, load_parser
from biphasic_age.gallery import strip_sheet
from biphasic_age.judges import OnnxJudge
from biphasic_age.layouts import CLASSES
from biphasic_age.scene import GROUPS
from biphasic_age.scene_eval import SceneTest, judge_accuracy, measure_scene, open_scene_test
from biphasic_age.stages import (
    GUIDES,
    Stage,
    about_file,
    build_guides,
    guide_file,
    learned_guides,
    load_about,
    load_variant,
    plan,
)
from biphasic_age.train import Config
from shared import metrics as shared_metrics
from shared.io import find_run, image_grid, load_config, load_safetensors, progress, write_image
from shared.published import (
    Claim,
    Metric,
    environment,
    format_table,
    load_published,
    print_claims,
    print_metrics,
    write_results,
)
from shared.ranges import Count, Part
from shared.runtime import UserError, parse, pick_device, run_main

STRIPS = 6
"""Faces in a picture of strips."""
Table = dict[str, dict[int, dict[str, float]]]
"""method -> seed -> metric -> value."""


@dataclass(frozen=True)
class EvalConfig:
    """Which run to measure, and who judges."""

    run: Path | None = None
    """Run folder; default: the newest."""
    test_images: Count | None = None
    """Test pictures, people or scenes; default: as many as the run's settings say."""
    age_judge: Path | None = None
    """ONNX file of an age estimator, (N, 3, H, W) in [-1, 1] to years; without it one is trained."""
    identity_judge: Path | None = None
    """ONNX file of a face embedding; without it one is trained."""
    judge_width: Count = 16
    """Channels of the trained judges' first layer, a multiple of 4; 32 suits 256x256."""
    judge_people: Count = 1200
    """Drawn people whom the judges learn from; public sets use the training fold."""
    judge_steps: Count = 400
    """Steps of each judge."""
    judge_batch: Count = 64
    """Pictures in each of those steps."""
    scene_judge_steps: Count = 1200
    """Steps of the two-head scene's judge, 32 pictures each."""
    far: Part | None = None
    """False accept rate at the identity judge's threshold; default 1e-2 on drawn faces, elsewhere 1e-5. Where
    the impostor pairs are too few for it, the smallest that they support."""
    parser_weights: Path | None = None
    """79999_iter.pth of the public face parser, for the parsing consistency of public sets."""
    fid_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth; FID and KID are left out without it."""
    lpips_weights: Path | None = None
    """torchvision's alexnet-owt-7be5be79.pth; LPIPS is left out without it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def unit(metric: str) -> str:
    """Unit of a metric, empty for rates, cosines and ratios; `change` and `leak` are of a range of 2."""
    if "age error" in metric:
        return "years"
    return "dB" if metric.endswith("PSNR") else ""


def trained_nets(
    config: Config, folder: Path, data: str, device: torch.device
) -> dict[str, dict[int, nn.Module]]:
    """Generators of a run on one set: variant -> seed -> network in evaluation mode. UserError when one is
    not trained yet."""
    nets: dict[str, dict[int, nn.Module]] = {}
    for stage in plan(config):
        if stage.data != data or stage.name == GUIDES:
            continue
        nets.setdefault(stage.name, {})[stage.seed] = load_variant(config, folder, stage).to(device)
    return nets


def means(table: Table) -> dict[str, dict[str, float]]:
    """method -> metric -> mean over seeds."""
    return {
        method: {k: sum(row[k] for row in seeds.values()) / len(seeds) for k in next(iter(seeds.values()))}
        for method, seeds in table.items()
    }


def evaluate_scene(
    settings: EvalConfig, config: Config, folder: Path, device: torch.device
) -> tuple[list[Claim], Table]:
    """Table, claims and a picture of the two-head scene."""
    # First, so that a damaged file is known before the judge learns for half a minute.
    nets = trained_nets(config, folder, "scene", device)
    seeds = range(config.seed, config.seed + config.seeds)
    helpers = {seed: own_guide(config, folder, "scene", "age", seed, device) for seed in seeds}
    count, steps = min(config.test_images, 100), settings.scene_judge_steps
    test = open_scene_test(count, config.scene_size, config.scene_heads, steps, device)
    table: Table = {"copy": {config.seed: measure_scene(copy, test, device, helpers[config.seed])}}
    for name, of_seed in progress(nets.items(), "scene"):
        table[name] = {
            seed: measure_scene(as_method(net), test, device, helpers[seed]) for seed, net in of_seed.items()
        }
    columns = ("true PSNR", "self PSNR", "change", "leak", "change/leak", "age accuracy", "helper accuracy")
    signs = ("hair rising", "wrinkles rising")
    columns += tuple(f"{sign} {direction}" for direction in protocol.DIRECTIONS for sign in signs)
    print("\n=== two-head scene ===\n")
    print(f"age judge: tells the age of {100 * judge_accuracy(test, device):.1f} % of the true scenes\n")
    print(summary(table, columns))
    shown = {name: next(iter(seeds.values())) for name, seeds in nets.items()}
    sheet = scene_sheet(test, shown, device)
    write_image(folder / "samples" / "test-scene.png", sheet, f"scenes translated by {folder.name}")
    return scene_claims(means(table)), table


def scene_sheet(test: SceneTest, nets: dict[str, nn.Module], device: torch.device, count: int = 3) -> Tensor:
    """The first scenes, made the oldest from the youngest: input, layout, truth, and every network; then the
    oldest made the youngest."""
    tiles, labels = [], ["input", "layout", "truth", *nets]
    for source, target in ((0, GROUPS - 1), (GROUPS - 1, 0)):
        for i in range(count):
            image = test.scenes.image[i, source].to(device)
            layout = test.scenes.layout[i : i + 1].to(device)
            goal = torch.tensor([target], device=device)
            tiles += [image, layout[0].float() / 5, test.scenes.image[i, target].to(device)]
            made = [net(image[None] * 2 - 1, layout, goal, 0.0)[0] for net in nets.values()]
            tiles += [picture / 2 + 0.5 for picture in made]
    return image_grid(tiles, len(labels), column_labels=labels, scale=3)


class Given(NamedTuple):
    """Networks whose files may be given."""

    parser: nn.Module | None
    inception: nn.Module | None
    perceptual: nn.Module | None


def open_given(settings: EvalConfig, device: torch.device) -> Given:
    """Those whose files are given. UserError when one is missing, damaged or another, of the judges' too."""
    for path, embeds in ((settings.age_judge, False), (settings.identity_judge, True)):
        if path is not None:
            OnnxJudge(path, embeds=embeds)
    opening = (
        (settings.parser_weights, load_parser),
        (settings.fid_weights, shared_metrics.InceptionFeatures),
        (settings.lpips_weights, partial(shared_metrics.perceptual_network, "alex")),
    )
    return Given(*(None if path is None else load(path).to(device) for path, load in opening))


def evaluate_faces(
    settings: EvalConfig,
    config: Config,
    folder: Path,
    data: str,
    given: Given,
    device: torch.device,
) -> tuple[list[Claim], Table, dict]:
    """Tables, claims and pictures of one set of faces."""
    scale = load_about(about_file(folder, data))[0]
    faces = open_test(config, data, scale.means, device)
    judges = open_judges(settings, config, data, folder, device)
    verifier, names = judges.verifier, scale.names
    nets = trained_nets(config, folder, data, device)
    print(f"\n=== {faces.source.name}: {len(faces.image)} test faces ===\n")
    print(f"age judge: mean absolute error {judges.mae:.1f} years on real test faces")
    print(
        f"identity judge: accepts {100 * verifier.tar:.1f} % of {verifier.genuine:,} real pairs of a person, "
        f"at a false accept rate of {verifier.far:.1e} on {verifier.impostor:,} pairs (threshold "
        f"{verifier.threshold:.3f}; papers use 1e-5 of a commercial service)"
    )
    for name, accuracy in judges.attribute_accuracy.items():
        print(f"attribute judge, {name}: {100 * accuracy:.1f} % right on real test faces")

    inception, perceptual = given.inception, given.perceptual
    parser = given.parser or own_guide(config, folder, data, "parser", config.seed, device)
    jobs = [(name, config.seed, method, None) for name, method in baselines(config, data, device).items()]
    jobs += [(name, seed, as_method(net), net) for name, seeds in nets.items() for seed, net in seeds.items()]
    table: Table = {}
    rows: dict[str, list[protocol.AgeRow]] = {}
    extremes = {g: (faces.group == g).nonzero().flatten()[:STRIPS] for g in (0, len(names) - 1)}
    shown: dict[str, dict[int, Tensor]] = {}
    changes: dict[str, list[float]] = {}
    seen_ages: dict[str, Tensor] = {}
    for name, seed, method, net in progress(jobs, data):
        numbers, of_ages, made, years = measure(method, net, faces, judges, parser)
        if inception is not None:
            numbers |= distances(made, faces, inception, names)
        if perceptual is not None:
            own = made[torch.arange(len(made), device=device), faces.group]
            numbers["self LPIPS"] = shared_metrics.lpips(own / 2 + 0.5, faces.image / 2 + 0.5, perceptual)
        table.setdefault(name, {})[seed] = numbers
        if name not in rows:
            rows[name], seen_ages[name] = of_ages, years.cpu()
            if name in ("full", "plain", "prototypes"):
                shown[name] = {group: made[rows].cpu() for group, rows in extremes.items()}
                changes[name] = protocol.part_change(
                    made, faces.image, faces.layout, faces.group, len(CLASSES)
                ).tolist()
        del made  # before the next method's are there too

    print("\nages that the judge sees, mean ± deviation:")
    print(age_table(rows, names))
    between = ("confidence between outputs", "confidence between outputs std")
    identity = ("verification rate", "confidence", "confidence std", *between)
    kept = tuple(f"kept: {name}" for name in judges.attribute_accuracy)
    print("\n" + summary(table, ("age error older", "age error younger", *identity)))
    print("\n" + summary(table, ("rising older", "rising younger", "true PSNR", *kept)))
    quality = ("self PSNR", "self SSIM", "self LPIPS", "cycle error")
    print("\n" + summary(table, (*quality, "change", "leak", "change/leak", "parsing mIoU")))
    print("\nby part: mean |y - x|, and mean difference of two outputs by their noise alone (both of 2):")
    seen = [i for i, value in enumerate(next(iter(changes.values()))) if not math.isnan(value)]
    average = means(table)
    noisy = [name for name in changes if "noise diversity" in average[name]]
    lines = [
        [CLASSES[i], *(values[i] for values in changes.values())]
        + [average[name][f"noise diversity: {CLASSES[i]}"] for name in noisy]
        for i in seen
    ]
    lines.append(["all", *[None] * len(changes), *(average[name]["noise diversity"] for name in noisy)])
    print(format_table(["part", *changes, *(f"{name}, by noise" for name in noisy)], lines))
    if inception is not None:
        print("\n" + summary(table, tuple(k for k in next(iter(table["copy"].values())) if "ID to" in k)))
    write_strips(folder, data, faces, shown, extremes, names)
    distributions(seen_ages, faces.group.cpu(), names, folder / "samples" / f"test-{data}-ages.png")
    claims = face_claims(faces.source.name, means(table), {"TAR": verifier.tar})
    extra = {"judges": {"mae": judges.mae, "attributes": judges.attribute_accuracy, "verifier": verifier}}
    extra["ages"] = {n: [vars(row) | {"error": row.error} for row in some] for n, some in rows.items()}
    extra["change by part"] = {n: dict(zip(CLASSES, values, strict=True)) for n, values in changes.items()}
    return claims, table, extra


def own_guide(
    config: Config, folder: Path, data: str, name: str, seed: int, device: torch.device
) -> nn.Module | None:
    """A small network that a run trained, frozen; None when the run has none of that name."""
    if name not in learned_guides(config, data):
        return None
    network = build_guides(config, data, people=1)[name]
    load_safetensors(guide_file(folder, Stage(data, GUIDES, seed, 0), name), network)
    return freeze(network).to(device)


def age_table(rows: dict[str, list[protocol.AgeRow]], names: tuple[str, ...]) -> str:
    """Direction, target, what real faces of the group look like, and every method with its error."""
    some = next(iter(rows.values()))
    lines = []
    for i, row in enumerate(some):
        line = [row.direction, names[row.target], f"{row.real_mean:.1f} ± {row.real_std:.1f}"]
        for entries in rows.values():
            entry = entries[i]
            line.append(f"{entry.mean:.1f} ± {entry.std:.1f} ({entry.error:.1f}, {100 * entry.hit:.0f} %)")
        lines.append(line)
    return format_table(["", "to", "real faces", *(f"{name} (error, hits)" for name in rows)], lines)


def summary(table: Table, columns: tuple[str, ...]) -> str:
    """Every method with some of its metrics, means over seeds; a dash where it has none."""
    columns = tuple(name for name in columns if any(name in row for row in means(table).values()))
    rows = [[name, *(row.get(column) for column in columns)] for name, row in means(table).items()]
    header = [f"{name} [{unit(name)}]" if unit(name) else name for name in columns]
    return format_table(["method", *header], rows)


def write_strips(
    folder: Path,
    data: str,
    faces: TestFaces,
    made: dict[str, dict[int, Tensor]],
    extremes: dict[int, Tensor],
    names: tuple[str, ...],
) -> None:
    """Strips young to old and old to young: of the method, of baselines, and the truth where it is known.
    extremes: youngest and oldest group -> which test faces are shown; made: their translations."""
    scale = max(1, 144 // faces.image.shape[-1])
    for group, rows in extremes.items():
        if not len(rows):
            continue
        title = "young-to-old" if group == 0 else "old-to-young"
        everything = {name: strips[group] for name, strips in made.items()}
        if faces.truth is not None:
            everything["truth"] = faces.truth[rows].cpu()
        order = names if group == 0 else names[::-1]
        for name, strips in everything.items():
            strips = strips if group == 0 else strips.flip(1)
            sheet = strip_sheet(faces.image[rows].cpu(), strips, order, scale=scale)
            made_by = None if name == "truth" else f"{name}, {title}"
            write_image(folder / "samples" / f"test-{data}-{title}-{name}.png", sheet, made_by)


def to_metrics(table: Table, data: str, setting: str) -> list[Metric]:
    """Means over seeds as rows; none is comparable with published numbers, whose judge is a service."""
    return [
        Metric("ablation", setting, metric, unit(metric), value, data, False, method)
        for method, row in means(table).items()
        for metric, value in row.items()
    ]


def main(settings: EvalConfig) -> Path:
    """Evaluate a run: tables, claims, pictures; returns the run folder."""
    began = time.perf_counter()
    folder = find_run("biphasic_age", settings.run)
    config, device = load_config(folder, Config), pick_device(settings.device)
    if settings.judge_width % 4:
        raise UserError(f"--judge-width {settings.judge_width}: give a multiple of 4")
    if settings.test_images is not None:
        config = replace(config, test_images=settings.test_images)
    given = open_given(settings, device)  # before the judges learn
    claims, metrics, extra = [], [], {}
    for data in config.data:
        if data == "scene":
            found, table = evaluate_scene(settings, config, folder, device)
            extra[data] = {"by seed": table}
        else:
            found, table, about = evaluate_faces(settings, config, folder, data, given, device)
            extra[data] = {"by seed": table, **about}
        claims += found
        seeds = f"{config.seeds} seed" + ("s" if config.seeds > 1 else "")
        metrics += to_metrics(table, data, f"{seeds}, own judges")
    claims = [replace(claim, id=f"C{i}") for i, claim in enumerate(claims, start=1)]
    headline = ("age error older", "age error younger", "verification rate", "true PSNR", "change/leak")
    print()
    print_metrics([m for m in metrics if m.metric in headline], load_published("biphasic_age"))
    print()
    print_claims(claims)
    write_results(
        folder, claims, metrics, environment(config, time.perf_counter() - began, settings.device), extra
    )
    return folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(EvalConfig, __doc__))))
