"""Evaluate a run: masks, uncertainty, calibration, the paper's claims, beside the published numbers.

    python eval.py                 # the newest run
    python eval.py --run RUN

Prints the tables and writes results.json and pictures into the run folder.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from irisusformer.model import IrisUsformer
from irisusformer.pictures import overview
from irisusformer.protocol import Result, Scores, evaluate
from irisusformer.train import PAPER, VARIANTS, Config, build, test_set, variants, working_side
from irisusformer.uncertainty import ensemble, flip_disagreement, mc_dropout
from shared.bench import count_macs, count_parameters
from shared.io import find_run, load_config, load_weights, write_image
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
from shared.runtime import parse, pick_device, run_main, seed_everything

IRISPARSENET_GMACS = 263.41  # at 481x641, recounted from its published prototxt
PUBLISHED_NAMES = {
    "ubiris": "UBIRIS.v2",
    "miche": "MICHE-I",
    "casia-distance": "CASIA-Iris-Distance",
    "nir-isl/mobile": "CASIA-Iris-Mobile-V1.0",
}
# Test images of the splits behind the published numbers; other numbers are not comparable with them.
TEST_IMAGES = {"UBIRIS.v2": (445,), "MICHE-I": (429,), "CASIA-Iris-Distance": (99, 100)}

# Networks whose errors every other uncertainty looks for as well; MC dropout was made for one like dropout.
COMPARED = ("learned", "ce", "dropout", "learned_noisy")
PIXELS = 2**20  # of a batch: base has 72 channels at full resolution, 300 MB


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate."""

    run: Path | None = None
    """Run folder; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    nice_compat: bool = False
    """Report min(E1, 1 - E1) per image, as the official NICE.I script does."""


def other_scores(model: IrisUsformer, others: list[IrisUsformer]) -> Scores:
    """The baselines of uncertainty for one network (and the ensemble with others, where there are any)."""

    def scores(image: Tensor, out: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        prob = out["prob"].to(image.device)
        found = {
            "flip": (prob, flip_disagreement(model, image, prob)),
            "mc_dropout": mc_dropout(model, image),
        }
        if others:
            found["ensemble"] = ensemble(prob, others, image)
        return found

    return scores


def evaluate_run(
    config: Config, models: dict[str, IrisUsformer], device: torch.device
) -> tuple[dict[str, Result], Any]:
    """Every network of a run on the run's test set; those COMPARED with all baselines."""
    data = test_set(config)
    # procedural eyes are of one size, which may be a photo's
    batch = 1
    if config.dataset in ("eyes", "simple"):
        batch = min(50, max(1, PIXELS // (config.image_size[0] * config.image_size[1])))
    others = [model for name, model in models.items() if name.startswith("ce-")]
    results = {}
    for name, model in models.items():
        more = other_scores(model, others if name == "ce" else []) if name in COMPARED else None
        results[name] = evaluate(model, data, device, batch, more, short_side=working_side(config))
    return results, data


def mean_over_seeds(results: dict[str, Result], variant: str, value) -> float | None:
    """Mean of value(result) over the seeds of a variant; None when the run does not have it."""
    found = [value(result) for name, result in results.items() if name.split("-")[0] == variant]
    return float(np.mean(found)) if found else None


def gmacs(config: Config, height: int, width: int, uncertainty: bool = True) -> float:
    """Multiply-accumulates in 1e9: convolutions and attention products, counted on a shape-only device."""
    with torch.device("meta"):
        model, image = build(config).eval(), torch.zeros(1, 3, height, width)
    return count_macs(lambda: model(image, return_uncertainty=uncertainty)) / 1e9


def claims_of(config: Config, results: dict[str, Result]) -> list[Claim]:
    """The claims that the run's variants allow to be tested."""

    def e1(variant):
        return mean_over_seeds(results, variant, lambda r: r.segmentation()["e1"])

    def unc(variant, metric):
        return mean_over_seeds(results, variant, lambda r: r.uncertainty()[metric])

    claims = []

    def claim(name, text, margin, measured, holds):
        if None not in measured.values():
            claims.append(Claim(name, text, measured, margin, bool(holds(**measured))))

    claim(
        "position-sensitive",
        "Position-sensitive operations segment better than the plain transformer, both by cross-entropy",
        "E1 <= 0.75 x plain",
        {"e1": e1("ce"), "plain": e1("plain")},
        lambda e1, plain: e1 <= 0.75 * plain,
    )
    for suffix, labels in (("", "clean"), ("_noisy", "noisy")):
        claim(
            f"finds-errors-{labels}",
            f"The learned uncertainty finds wrong pixels ({labels} training masks)",
            "AUROC >= 0.92",
            {"auroc": unc(f"learned{suffix}", "auroc")},
            lambda auroc: auroc >= 0.92,
        )
    claim(
        "beats-discrepancy",
        "It finds them better than the two heads' discrepancy without uncertainty learning",
        "AUROC difference >= 0.15",
        {"learned": unc("learned", "auroc"), "discrepancy": unc("ce", "auroc")},
        lambda learned, discrepancy: learned - discrepancy >= 0.15,
    )
    claim(
        "no-harm",
        "Uncertainty learning costs little accuracy",
        "E1 <= 1.15 x cross-entropy alone",
        {"learned": e1("learned"), "ce": e1("ce")},
        lambda learned, ce: learned <= 1.15 * ce,
    )
    claim(
        "captures",
        "The 10 % most uncertain pixels hold most of the errors",
        "share >= 0.75",
        {"share": unc("learned", "captured_10%")},
        lambda share: share >= 0.75,
    )
    claim(
        "abstains",
        "Setting aside the 5 % most uncertain pixels removes most of the error",
        "E1 afterwards <= 0.5 x E1",
        {"after": unc("learned", "e1_abstain_5%"), "e1": e1("learned")},
        lambda after, e1: after <= 0.5 * e1,
    )
    claim(
        "edges",
        "Uncertainty gathers within 3 pixels of the true mask's edge",
        "ratio to elsewhere >= 2.5",
        {"ratio": unc("learned", "edge_ratio")},
        lambda ratio: ratio >= 2.5,
    )
    claim(
        "images",
        "Images with more uncertainty have more error",
        "Spearman >= 0.3",
        {"spearman": unc("learned", "image_spearman")},
        lambda spearman: spearman >= 0.3,
    )
    base = Config()  # the statement is about the first version, whatever the run trained
    cost = {
        "mask": gmacs(base, 480, 640, False) / IRISPARSENET_GMACS,
        "with_uncertainty": gmacs(base, 480, 640) / IRISPARSENET_GMACS,
    }
    claim(
        "cost",
        "MACs of base at 480x640 are 35 % of IrisParseNet's",
        "0.33 to 0.37",
        cost,
        lambda mask, with_uncertainty: 0.33 <= mask <= 0.37 and 0.33 <= with_uncertainty <= 0.37,
    )
    return claims


def findings(results: dict[str, Result]) -> list[str]:
    """What the numbers also say, whichever way they fall."""
    lines = []
    for name in ("learned", "learned_noisy"):
        if name in results:
            u, free = (results[name].uncertainty(score)["auroc"] for score in ("u", "confidence"))
            lines.append(f"{name}: AUROC of u {u:.3f}, of confidence 1-|2p-1| {free:.3f} ({u - free:+.3f})")
    for ours, theirs in (("learned", "ce"), ("learned_noisy", "ce_noisy"), ("learned_pupil", "ce_pupil")):
        a, b = (mean_over_seeds(results, name, lambda r: r.segmentation()["e1"]) for name in (ours, theirs))
        if a is not None and b is not None:
            lines.append(
                f"E1 of {ours} {a:.3f} %, of {theirs} {b:.3f} %: weighting changes it by {a - b:+.3f}"
            )
    return lines


def metrics_of(config: Config, results: dict[str, Result], nice: bool = False) -> list[Metric]:
    """Rows of results.json. nice: E1 of each image as min(e, 1 - e), and called so."""
    embedded = config.dataset in ("eyes", "simple")
    dataset = PUBLISHED_NAMES.get(config.dataset, config.dataset)
    table = f"Result on {dataset}" if dataset in PUBLISHED_NAMES.values() else "masks"
    tested = {len(result.images) for result in results.values()}
    # the published protocol trains on the whole training split, and knows no other metrics than these
    comparable = tested <= set(TEST_IMAGES.get(dataset, ())) and config.labels is None
    printed = ("E1", "mIoU (iris class)", "F1")
    method = "BiTrans" if config.arch == "bitrans" else "IrisUsformer"
    masks, rows = table, []

    def add(table, setting, metric, unit, value):
        theirs = comparable and table == masks and metric in printed
        rows.append(Metric(table, setting, metric, unit, float(value), dataset, theirs, method))

    for name, result in results.items():
        scores = result.segmentation()
        setting = "within-database" if not embedded and len(results) == 1 else name
        e1 = ("e1_nice", "E1, min(e, 1 - e)") if nice else ("e1", "E1")
        for metric, label in (e1, ("iou", "mIoU (iris class)"), ("f1", "F1")):
            add(table, setting, label, "%", scores[metric])
        for metric, value in result.localisation().items():
            add("localisation", name, metric, "ratio", value)
        summary = result.uncertainty()
        for metric in ("auroc", "captured_10%", "e1_abstain_5%", "aurc", "edge_ratio", "image_spearman"):
            add("uncertainty", name, metric, "%" if metric == "e1_abstain_5%" else "", summary[metric])
    if config.dataset == "eyes" and "learned" in results:
        images = results["learned"].images
        for i, look in enumerate(config.looks):  # the test set takes the looks in turn
            own = images[i :: len(config.looks)]
            add("by sensor", look, "E1", "%", np.mean([image["e1"] for image in own]))
    return rows


def is_discrepancy(name: str) -> bool:
    """Whether a network's uncertainty is the discrepancy of two segmentation heads, not a learned map."""
    return VARIANTS[name.split("-")[0]].get("mode") in ("ce", "two_head")


def uncertainty_table(results: dict[str, Result]) -> tuple[list[str], list[list]]:
    """One row per network and score: how well it finds that network's errors."""
    names = {"u": "learned u", "confidence": "confidence 1-|2p-1|", "flip": "flip disagreement"}
    names |= {"mc_dropout": "MC dropout", "ensemble": "ensemble of ce"}
    columns = ["auroc", "aupr"]
    columns += [f"{what}_{share}%" for what in ("captured", "error_in_top") for share in (1, 5, 10)]
    columns += ["aurc", "e1_abstain_5%"]
    rows = []
    for name, result in results.items():
        for score in result.detection:
            label = names[score]
            if score == "u" and is_discrepancy(name):
                label = "discrepancy of two heads"
            summary = result.uncertainty(score)
            rows.append([name, label, *(summary[column] for column in columns)])
    return ["network", "score", *columns], rows


def draw_curves(folder: Path, results: dict[str, Result]) -> None:
    """Risk-coverage and calibration, figure file samples/curves.png."""
    figure, (risk, reliability) = plt.subplots(1, 2, figsize=(10, 4))
    coverage = np.linspace(0.5, 1, 51)
    for name, result in list(results.items())[:6]:
        detector = result.detection["u"]
        label = f"{name}, {'discrepancy' if is_discrepancy(name) else 'u'}"
        risk.plot(coverage, [100 * detector.error_after_abstaining(1 - c) for c in coverage], label=label)
        c = result.calibration
        seen = c.count > 0
        reliability.plot(
            c.probability[seen] / c.count[seen], c.positive[seen] / c.count[seen], "o-", label=name
        )
    name, first = next(iter(results.items()))
    free = [100 * first.detection["confidence"].error_after_abstaining(1 - c) for c in coverage]
    risk.plot(coverage, free, "k--", label=f"{name}, confidence")
    reliability.plot([0, 1], [0, 1], "k:")
    risk.set(xlabel="share of pixels kept", ylabel="error rate of the kept pixels, %")
    reliability.set(xlabel="predicted probability of iris", ylabel="observed")
    for axes in (risk, reliability):
        axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "samples" / "curves.png", dpi=110)
    plt.close(figure)


def print_beside(config: Config, results: dict[str, Result], published: dict[str, Any], nice: bool) -> None:
    """Published rows of the same data set, and ours under them."""
    dataset = PUBLISHED_NAMES.get(config.dataset)
    if dataset is None:
        return
    metrics = ("E1", "mIoU (iris class)", "F1", "inner Hdis", "outer Hdis", "mHdis")
    table: dict[str, dict[str, float]] = {}
    for row in published["rows"]:
        if row["dataset"] == dataset and row["metric"] in metrics and row["table"].startswith("Result"):
            table.setdefault(f"{row['method']} (published)", {})[row["metric"]] = row["value"]
    for name, result in results.items():
        s, place = result.segmentation(), result.localisation()
        own = {"E1": s["e1_nice" if nice else "e1"], "mIoU (iris class)": s["iou"], "F1": s["f1"]}
        if place:
            own |= {f"{part} Hdis": 100 * place[f"{part}_hdis"] for part in ("inner", "outer")}
            own["mHdis"] = 100 * place["mhdis"]
        table[f"{name} (measured)"] = own
    rows = [[method, *(values.get(metric) for metric in metrics)] for method, values in table.items()]
    count = len(next(iter(results.values())).images)
    print(f"\n{dataset}, percent; measured on {count} images, published: {TEST_IMAGES.get(dataset, '?')}")
    print(format_table(["method", *metrics], rows))


def main() -> None:
    options = parse(EvalConfig, __doc__)
    began = time.perf_counter()
    device = pick_device(options.device)
    folder = find_run(PAPER, options.run)
    config = load_config(folder, Config)
    models = {name: build(c) for name, c in variants(config).items()}
    load_weights(folder, models)
    for model in models.values():
        model.to(device, memory_format=torch.channels_last).eval()
    seed_everything(config.seed)  # for MC dropout's draws
    results, data = evaluate_run(config, models, device)

    published = load_published(PAPER)
    claims = claims_of(config, results) if config.dataset in ("eyes", "simple") else []
    metrics = metrics_of(config, results, options.nice_compat)
    header, rows = uncertainty_table(results)
    masks = [[name, *result.segmentation().values()] for name, result in results.items()]
    print(format_table(["masks, %", *next(iter(results.values())).segmentation()], masks))
    print("\nerror detection (e1_abstain_5%: percent)")
    print(format_table(header, rows))
    print("\ncalibration of p")
    calibration = [[name, r.ece(), *r.scaled_ece()] for name, r in results.items()]
    print(format_table(["network", "ECE", "ECE, temperature-scaled", "temperature"], calibration))
    print_beside(config, results, published, options.nice_compat)
    print()
    print_claims(claims)
    notes = findings(results)
    for note in notes:
        print(f"finding: {note}")
    print()
    print_metrics(metrics, published)

    name, model = next(iter(models.items()))
    if config.dataset in ("eyes", "simple"):
        worst = np.argsort([-image["e1"] for image in results[name].images])[:4]
        shown = default_collate([data[int(i)] for i in (*range(4), *worst)])
        sheet = overview(shown["image"], shown["mask"], model.predict(shown["image"].to(device)))
        write_image(folder / "samples" / "test.png", sheet)
    draw_curves(folder, results)
    extra = {
        "segmentation": {name: result.segmentation() for name, result in results.items()},
        "uncertainty": [dict(zip(header, row, strict=True)) for row in rows],
        "calibration": calibration,
        "findings": notes,
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "options": asdict(options),
    }
    write_results(
        folder, claims, metrics, environment(config, time.perf_counter() - began, options.device), extra
    )
    print(folder)


if __name__ == "__main__":
    run_main(main)
