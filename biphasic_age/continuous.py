"""Does the age rise with the age that is asked for, between the groups too?

    python continuous.py        # the newest evaluated run

Test faces are translated to a row of ages across the trained range, each a mixture of neighbouring groups. An
age judge that training never used says how old they look. Writes continuous.json and continuous.png into the
run folder.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from biphasic_age import protocol
from biphasic_age.ages import AgeScale
from biphasic_age.eval import EvalConfig
from biphasic_age.faces_eval import as_kept, open_judge, open_test, teachers
from biphasic_age.stages import load_generator
from shared.io import image_grid, progress, write_image
from shared.published import format_table
from shared.ranges import Count, Within
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

ROWS = 6
"""Faces in the picture."""


@dataclass(frozen=True)
class ContinuousConfig:
    """Which network, and how finely."""

    run: Path | None = None
    """Run folder; default: the newest."""
    variant: str = "full"
    """Which network of the run."""
    data: str | None = None
    """Its set; default: the run's last."""
    ages: Annotated[int, Within(2)] = 9
    """Number of ages, from the youngest group's mean to the oldest group's."""
    faces: Count = 64
    """Number of test faces."""
    age_judge: Path | None = None
    """ONNX file of an age estimator; default: the judge that eval.py trained, or trains now."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@torch.no_grad()
def sweep(net: nn.Module, scale: AgeScale, image: Tensor, layout: Tensor, ages: Tensor) -> Tensor:
    """image (N, 3, H, W) at every age (A,) in years, without noise -> (N, A, 3, H, W)."""
    weights = scale.weights(ages).to(image.device)
    columns = [net(image, layout, row.expand(len(image), -1), noise=0) for row in progress(weights, "ages")]
    return torch.stack(columns, 1).float()


def rising(seen: Tensor, ages: Tensor) -> dict[str, float]:
    """seen (N, A) years that a judge sees, ages (A,) rising -> `spearman`: mean rank correlation of seen and
    asked ages over the faces; `rising`: share of neighbouring pairs in the right order; `slope`: years seen
    per year asked."""
    from scipy.stats import spearmanr  # takes seconds

    ranks = [spearmanr(row, ages).statistic if row.min() < row.max() else 0.0 for row in seen]
    centred = ages - ages.mean()
    slope = ((seen - seen.mean(1, keepdim=True)) * centred).sum(1) / centred.square().sum()
    return {
        "spearman": float(sum(ranks) / len(ranks)),
        "rising": (seen.diff(dim=1) > 0).float().mean().item(),
        "slope": slope.mean().item(),
    }


def main(config: ContinuousConfig) -> Path:
    """Measure, print and draw; returns the run folder."""
    device = pick_device(config.device)
    trained = load_generator(config.run, config.variant, config.data)
    if trained.data == "scene":
        raise UserError(
            "the two-head scene has four ages and no years between; name a set of faces with --data"
        )
    settings = as_kept(EvalConfig(age_judge=config.age_judge), trained.folder, trained.data)
    test = open_test(trained.config, trained.data, trained.scale.means, device)
    where = trained.config, trained.data
    source = partial(teachers, settings, *where)
    judge = open_judge(
        "age", settings, *where, trained.folder, device, len(test.source.attribute_names), source
    )
    image, layout = test.image[: config.faces], test.layout[: config.faces]
    ages = torch.linspace(trained.scale.means[0], trained.scale.means[-1], config.ages)
    made = sweep(trained.net.to(device), trained.scale, image, layout, ages)
    seen = protocol.in_batches(judge, made).cpu()
    result = rising(seen, ages)
    rows = [[round(a, 1), m, s] for a, m, s in zip(ages.tolist(), seen.mean(0), seen.std(0), strict=True)]
    print(format_table(["age asked", "mean age seen", "std"], [[a, m.item(), s.item()] for a, m, s in rows]))
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    numbers = {"ages": ages, "seen": seen.mean(0), **result}
    write_json(trained.folder / "continuous.json", numbers)
    tiles = torch.cat((image[:ROWS, None], made[:ROWS]), 1).flatten(0, 1).cpu() / 2 + 0.5
    labels = ["input", *(f"{age:.0f}" for age in ages)]
    sheet = image_grid(tiles, columns=len(labels), column_labels=labels, scale=max(1, 96 // tiles.shape[-1]))
    write_image(trained.folder / "continuous.png", sheet, f"ages by {trained.folder.name}")
    return trained.folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(ContinuousConfig, __doc__))))
