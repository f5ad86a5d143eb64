"""The experiments of the evaluation: defences against attacks, adaptive attacks, the premise, the lambda
curve."""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pin import defenses
from pin.attacks import BPDA, apgd, cw_l2, deepfool, eyeglass_region, fgsm, mi_fgsm, pgd
from pin.basis import Basis
from pin.losses import add_noise, mask_cost
from pin.model import PIN, Defended
from pin.pairs import Pairs
from pin.protocol import Outcome, Verifier, attack_in_batches, in_batches
from pin.query_attacks import evolutionary, square
from shared.io import progress

LEVEL = 2 / 255
"""One grey level on the scale [-1, 1]."""


class Remembered(nn.Module):
    """An ESN (behind the DAE) that keeps the p of every batch it has seen, so that mask modes and seeds
    share one pass. For tables over fixed image sets: batches are known by their place in memory and must
    stay unchanged."""

    def __init__(self, probabilities):
        super().__init__()
        self.probabilities, self.seen = probabilities, {}

    def forward(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape)
        if key not in self.seen:
            self.seen[key] = self.probabilities(x)
        return self.seen[key]


@dataclass
class Lab:
    """What is evaluated: recognisers (frozen), basis, DAE, ESNs by variant, faces and pairs on one device.

    dae: None where no ESN sees one. prices: lambda of each ESN. sees_dae: whether it looks at the DAE's
    output or at the image itself.
    first, second: (P, 1, H, W), the images of the pairs. train: images that baselines may look at (quilting).
    authors: attacks as the authors' later code has them, 0.04 in [-1, 1] (5.1 grey levels) and 40 steps of
    1/255, for public sets; otherwise the demo's, 8 and 16 grey levels in ten steps. attacked: first images by
    attack on the recogniser. transferred: by the main attack on the surrogate, where there is one.
    """

    recognizers: dict[str, nn.Module]
    basis: Basis
    dae: nn.Module | None
    esns: dict[str, nn.Module]
    prices: dict[str, float]
    sees_dae: dict[str, bool]
    first: Tensor
    second: Tensor
    pairs: Pairs
    train: Tensor
    noise: float = 0.04
    seed: int = 0
    authors: bool = False
    attacked: dict[str, Tensor] = field(default_factory=dict)
    transferred: dict[str, Tensor] = field(default_factory=dict)

    @property
    def recognizer(self) -> nn.Module:
        """The attacked one."""
        return self.recognizers["recognizer"]

    @property
    def main(self) -> str:
        """The attack of the experiments that take one."""
        return "PGD 0.04" if self.authors else "PGD 8"

    @property
    def eps(self) -> float:
        """Its ball, in [-1, 1]."""
        return 0.04 if self.authors else 8 * LEVEL

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.first.device

    def generator(self, number: int = 0) -> torch.Generator:
        """Fresh CPU generator of this seed."""
        return torch.Generator().manual_seed(1000 * self.seed + number)

    def pin(self, variant: str = "pin", mode: str = "sample", number: int = 0, **options) -> PIN:
        """The defence with one of the ESNs."""
        dae, esn = self.dae if self.sees_dae[variant] else None, self.esns[variant]
        return PIN(self.basis, dae, esn, mode, generator=self.generator(number), **options).eval()

    def verifier(self, defense, recognizer: str = "recognizer") -> Verifier:
        """The pairs behind a defence."""
        return Verifier(self.recognizers[recognizer], defense, self.first, self.second, self.pairs)


def gradient_attacks(lab: Lab, full: bool) -> dict:
    """The transfer table's attacks by name, which gives the ball. full: the slower ones too.

    The demo's take ten steps, with a random start for PGD. The authors' keep the values of their functions;
    printed glasses have any amplitude.
    """
    smooth = {"diversity": 0.7, "kernel": 3, "generator": lab.generator(2)}
    if lab.authors:
        attacks = {"FGSM 0.04": fgsm, "PGD 0.04": pgd, "MI-FGSM 0.04": mi_fgsm, "DeepFool 0.04": deepfool}
        if full:
            glasses = eyeglass_region(*lab.first.shape[-2:]).to(lab.device)
            attacks["DI-TI-FGSM 0.04"] = partial(mi_fgsm, **smooth)
            attacks["printed glasses"] = partial(pgd, eps=2.0, steps=100, step=0.04, region=glasses)
        return attacks
    attacks = {"FGSM 8": partial(fgsm, eps=8 * LEVEL)}
    for levels in (8, 16):
        eps = levels * LEVEL
        attacks[f"PGD {levels}"] = partial(pgd, eps=eps, steps=10, step=eps / 4, generator=lab.generator(1))
        attacks[f"MI-FGSM {levels}"] = partial(mi_fgsm, eps=eps, steps=10)
    if full:
        attacks["DI-TI-FGSM 8"] = partial(mi_fgsm, eps=8 * LEVEL, steps=10, **smooth)
        attacks["DeepFool 8"] = partial(deepfool, eps=8 * LEVEL)
    return attacks


def craft(
    lab: Lab, recognizer: str = "recognizer", names: tuple[str, ...] | None = None, full: bool = False
) -> dict[str, Tensor]:
    """First images attacked with the gradients of a bare recogniser; the defence is unknown to the
    attacker."""
    verifier = lab.verifier(defenses.identity, recognizer)
    network, goal = lab.recognizers[recognizer], verifier.goal()
    return {
        name: attack_in_batches(attack, network, lab.first, goal)
        for name, attack in progress(gradient_attacks(lab, full).items(), f"attacks on the {recognizer}")
        if names is None or name in names
    }


def classical_defenses(lab: Lab, kept: int, slow: bool) -> dict:
    """Everything PIN is compared with by name. kept: eigenfaces that PIN keeps. slow: 1000-step TVM too."""
    size, basis = lab.first.shape[-1], lab.basis
    width = max(round(size * 11 / 112), 3)
    patches = defenses.quilting_patches(lab.train, width, 500, lab.generator(3))
    table = {
        "none": defenses.identity,
        "bit reduction (4 bits)": partial(defenses.bit_reduction, bits=4),
        "JPEG 75": partial(defenses.jpeg, quality=75),
        "Gaussian blur 0.6": partial(defenses.blur, sigma=0.6),
        "Gaussian blur 1.0": partial(defenses.blur, sigma=1.0),
        "median 3x3": defenses.median,
        "random resize and pad": partial(defenses.random_resize_pad, generator=lab.generator(4)),
        "quilting": defenses.Quilting(patches, width, max(width - 2, 1)),
        **({"DAE alone": lambda x: lab.dae(x)[1]} if lab.dae is not None else {}),
        "all eigenfaces": defenses.top_components(basis, basis.size[1]),
        "fixed top-K": defenses.top_components(basis, kept),
        "random K": defenses.random_components(basis, kept, lab.generator(5)),
        "last K": defenses.last_components(basis, kept),
    }
    if slow:
        table["total variation"] = partial(defenses.total_variation, generator=lab.generator(6))
    return table


def mean_outcome(outcomes: list[Outcome]) -> Outcome:
    """Average over repetitions of a random defence."""
    values = {name: sum(vars(o)[name] for o in outcomes) / len(outcomes) for name in vars(outcomes[0])}
    return Outcome(**values)


def outcomes(verifiers: list[Verifier], images: dict[str, Tensor]) -> dict[str, Outcome]:
    """Each attack's outcome, averaged over the verifiers (repetitions of a random defence)."""
    return {name: mean_outcome([v.outcome(x) for v in verifiers]) for name, x in images.items()}


def defence_table(lab: Lab, kept: dict[str, int], repeats: int, slow: bool) -> dict[str, dict[str, Outcome]]:
    """Defence -> attack -> outcome for classical defences, adversarial training and PIN in every mask mode.

    kept: eigenfaces that each ESN keeps, for fixed sets of as many.
    """
    images = {"clean": lab.first} | lab.attacked
    images |= {f"{name} from a surrogate": made for name, made in lab.transferred.items()}
    rows = {}
    for name, defense in progress(classical_defenses(lab, kept["pin"], slow).items(), "defences"):
        count = repeats if name == "random resize and pad" else 1  # each goes on drawing
        rows[name] = outcomes([lab.verifier(defense) for _ in range(count)], images)
    rows |= selection_bounds(lab, images)
    for variant in progress(lab.esns, "PIN"):
        modes = (
            ("sample", "threshold", "mean", "expected", "topk")
            if variant == "pin"
            else ("sample", "threshold")
        )
        if variant != "pin":
            fixed = defenses.top_components(lab.basis, kept[variant])
            rows[f"fixed top-K of {variant}"] = outcomes([lab.verifier(fixed)], images)
        remembered = Remembered(lab.pin(variant).probabilities)
        for mode in modes:
            name = f"PIN {mode}" if variant == "pin" else f"PIN {variant}, {mode}"
            count = repeats if mode == "sample" else 1
            pins = [
                PIN(lab.basis, None, remembered, mode, kept[variant], generator=lab.generator(n))
                for n in range(count)
            ]
            rows[name] = outcomes([lab.verifier(pin) for pin in pins], images)
    if "robust" in lab.recognizers:
        own = {"clean": lab.first} | craft(lab, "robust", full=slow)
        rows["adversarial training (attacked itself)"] = outcomes(
            [lab.verifier(defenses.identity, "robust")], own
        )
    return rows


@torch.no_grad()
def selection_bounds(lab: Lab, images: dict[str, Tensor]) -> dict[str, dict[str, Outcome]]:
    """What choosing for each image could give: the best mask of the clean face (known to its owner alone)
    beside as many leading eigenfaces for all, and the choice by the size of the coefficients seen."""
    basis, price = lab.basis, lab.prices["pin"]

    def best(x: Tensor) -> Tensor:
        return mask_cost(basis, x, add_noise(x, lab.noise, lab.generator(13)), price).oracle()

    q, other = best(lab.first), best(lab.second)
    project = partial(defenses.fixed_components, basis=basis)
    parts = project(lab.first, kept=q), project(lab.second, kept=other)
    verifier = Verifier(lab.recognizer, defenses.identity, *parts, lab.pairs)
    verifier.plain = in_batches(lab.recognizer, lab.first)
    leading = defenses.top_components(basis, max(round(q.sum(1).mean().item()), 1))
    large = partial(defenses.large_components, basis=basis, price=price)
    return {
        "oracle of the clean face": {
            name: verifier.outcome(project(x, kept=q)) for name, x in images.items()
        },
        "leading, as many as the oracle": outcomes([lab.verifier(leading)], images),
        "large coefficients": outcomes([lab.verifier(large)], images),
    }


def plug_and_play(lab: Lab, repeats: int) -> dict[str, dict[str, Outcome]]:
    """A second recogniser behind the same PIN, not retrained, attacked with its own gradients."""
    images = {"clean": lab.first} | lab.transferred
    rows = {"none": outcomes([lab.verifier(defenses.identity, "surrogate")], images)}
    verifiers = [lab.verifier(lab.pin("pin", "sample", n), "surrogate") for n in range(repeats)]
    return rows | {"PIN sample": outcomes(verifiers, images)}


# --- attackers who know the defence ---------------------------------------------------------------


def adaptive_attacks(lab: Lab, full: bool) -> dict[str, dict[str, Outcome]]:
    """Attack on the defended system -> outcome. full: EOT, APGD, expected mask and BPDA on other defences
    too."""
    rows: dict[str, dict[str, Outcome]] = {}

    def attacked(label: str, defense, seen, attack, draws: int = 1) -> None:
        verifier = lab.verifier(defense)
        system = Defended(lab.recognizer, seen)
        crafted = attack_in_batches(partial(attack, draws=draws), system, lab.first, verifier.goal())
        rows[label] = {"clean": verifier.outcome(lab.first), "attacked": verifier.outcome(crafted)}

    def steps(eps: float):
        if lab.authors:
            return partial(pgd, eps=eps)
        return partial(pgd, eps=eps, steps=10, step=eps / 4, generator=lab.generator(7))

    half, whole = ("0.02", "0.04") if lab.authors else ("4", "8")
    sample, threshold = partial(lab.pin, "pin", "sample"), partial(lab.pin, "pin", "threshold")
    attacked(f"PIN sample, PGD {half}, mask held constant", sample(), sample(number=8), steps(lab.eps / 2))
    attacked(f"PIN sample, PGD {whole}, mask held constant", sample(), sample(number=8), steps(lab.eps))
    straight = partial(lab.pin, "pin", gradient="straight_through", number=8)
    attacked(f"PIN sample, PGD {whole}, straight-through", sample(), straight(mode="sample"), steps(lab.eps))
    if full:
        attacked(f"PIN threshold, PGD {whole}, mask held constant", threshold(), threshold(), steps(lab.eps))
        name = f"PIN sample, PGD {whole}, EOT of 10 masks"
        attacked(name, sample(), sample(number=8), steps(lab.eps), draws=10)
        auto = partial(apgd, eps=lab.eps, steps=40)
        name = f"PIN threshold, APGD {whole}, straight-through"
        attacked(name, threshold(), straight(mode="threshold"), auto)
        name = f"PIN sample, APGD {whole}, EOT of 5 masks"
        attacked(name, sample(), sample(number=8), auto, draws=5)
        for name in ("JPEG 75", "bit reduction (4 bits)", "quilting"):
            defense = classical_defenses(lab, 1, slow=False)[name]
            attacked(f"{name}, PGD {whole} through BPDA", defense, BPDA(defense), steps(lab.eps))
        blur = partial(defenses.blur, sigma=1.0)
        attacked(f"Gaussian blur 1.0, PGD {whole} through it", blur, blur, steps(lab.eps))
    return rows


def query_attack(lab: Lab, queries: int, count: int) -> dict[str, dict[str, float]]:
    """Square attack on the first `count` pairs of each kind, which sees only the defended scores."""
    chosen = torch.cat([(lab.pairs.same == kind).nonzero().squeeze(1)[:count] for kind in (True, False)])
    rows = {}
    for name, defense in {"none": defenses.identity, "PIN threshold": lab.pin("pin", "threshold")}.items():
        verifier = lab.verifier(defense)
        goal = verifier.goal().part(chosen.to(lab.device))
        system = Defended(lab.recognizer, defense)
        before = goal.margin(system(lab.first[chosen])) <= 0
        after, used = square(system, lab.first[chosen], goal, lab.eps, queries, generator=lab.generator(9))
        right = goal.margin(in_batches(system, after)) <= 0
        rows[name] = {
            "clean": before.float().mean().item(),
            "attacked": right.float().mean().item(),
            "median queries": used.float().median().item(),
        }
    return rows


# --- what PIN rests on ----------------------------------------------------------------------------


@torch.no_grad()
def premise(lab: Lab, top: int) -> dict[str, float]:
    """Feature shift (1 - cosine) of the main attack's part inside the first `top` eigenfaces and of the rest,
    both scaled to the whole attack's length, and of Gaussian noise of that length."""
    change = (lab.attacked[lab.main] - lab.first).flatten(1)
    vectors = lab.basis.eig_vec[:, :top]
    inside = change @ vectors @ vectors.T
    noise = torch.randn(change.shape, generator=lab.generator(10)).to(lab.device)
    length = change.norm(dim=1, keepdim=True)
    plain = in_batches(lab.recognizer, lab.first)
    shift = {}
    for name, part in {"whole": change, "top": inside, "rest": change - inside, "noise": noise}.items():
        scaled = part / part.norm(dim=1, keepdim=True) * length
        moved = in_batches(lab.recognizer, lab.first + scaled.view_as(lab.first))
        shift[name] = (1 - F.cosine_similarity(moved, plain)).mean().item()
    shift["energy in top"] = (inside.square().sum() / change.square().sum()).item()
    return shift


@torch.no_grad()
def selection_quality(lab: Lab, variant: str, untrained: nn.Module) -> dict[str, float]:
    """Expected cost of a trained ESN on test faces beside the oracle's and an untrained one's; kept
    eigenfaces."""
    x = lab.first
    noisy = add_noise(x, lab.noise, lab.generator(11))
    cost = mask_cost(lab.basis, x, noisy, lab.prices[variant])
    pin = lab.pin(variant)
    p = in_batches(pin.probabilities, noisy)
    kept = in_batches(lambda part: lab.pin(variant).mask(pin.probabilities(part)), x).sum(1)
    fresh = in_batches(PIN(lab.basis, pin.dae, untrained).probabilities, noisy)
    half = p.shape[1] // 2
    return {
        "lambda": lab.prices[variant],
        "cost": cost(p).mean().item(),
        "oracle": cost(cost.oracle()).mean().item(),
        "untrained": cost(fresh).mean().item(),
        "expected kept": p.sum(1).mean().item(),
        "kept": kept.mean().item(),
        "kept sd": kept.std().item(),
        "oracle kept": cost.oracle().sum(1).mean().item(),
        "sd of p over images": p.std(0).mean().item(),
        "p of the first 16": p[:, :16].mean().item(),
        "p of the last half": p[:, half:].mean().item(),
    }


def smallest_changes(lab: Lab, queries: int, count: int) -> dict[str, dict[str, float]]:
    """Median RMS change in grey levels that turns a decision: C&W with gradients, evolutionary with
    decisions."""
    chosen = torch.cat([(lab.pairs.same == kind).nonzero().squeeze(1)[:count] for kind in (True, False)])
    rows = {}
    for name, defense in {"none": defenses.identity, "PIN threshold": lab.pin("pin", "threshold")}.items():
        verifier = lab.verifier(defense)
        system = Defended(lab.recognizer, defense)
        # Right by the fold's threshold and by the one that the attack has to cross.
        margins = verifier.goal().margin(verifier.features(lab.first)).cpu()
        right = chosen[verifier.right[chosen] & (margins[chosen] <= 0)]
        goal = verifier.goal().part(right.to(lab.device))
        x, other = lab.first[right], lab.second[right]
        quick = {} if lab.authors else {"rate": 0.01, "iterations": 50, "bisections": 4}
        carlini = cw_l2(system, x, goal, **quick)
        evolved = evolutionary(system, x, goal, other, queries, generator=lab.generator(12))
        rows[name] = {}
        for label, (images, success) in {"C&W L2": carlini, "evolutionary": evolved}.items():
            rms = (images - x)[success].square().mean((1, 2, 3)).sqrt() / LEVEL
            rows[name][f"{label}, median RMS"] = rms.median().item() if len(rms) else float("nan")
            rows[name][f"{label}, success"] = success.float().mean().item()
    return rows
