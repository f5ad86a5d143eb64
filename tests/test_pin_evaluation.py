"""PIN: the rules by which claims hold, and the half of the evaluation that `--full` adds."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pin import defenses, experiments
from pin.attacks import cw_l2
from pin.basis import fit_basis
from pin.claims import check_claims, compare_with_fixed
from pin.data import procedural
from pin.experiments import (
    LEVEL,
    Lab,
    adaptive_attacks,
    craft,
    defence_table,
    gradient_attacks,
    premise,
    selection_bounds,
    selection_quality,
    smallest_changes,
)
from pin.losses import add_noise, mask_cost
from pin.model import DAE, make_esn
from pin.pairs import random_pairs
from pin.protocol import Outcome, Verifier
from pin.recognizers import SmallRecognizer

# --- claims ---------------------------------------------------------------------------------------


def outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy, *(math.nan,) * 7)


def rows(**accuracies: dict[str, float]) -> dict:
    return {
        name.replace("_", " "): {attack: outcome(value) for attack, value in by.items()}
        for name, by in accuracies.items()
    }


HOLDING = {
    "table": rows(
        none={"clean": 0.90, "PGD 8": 0.10},
        PIN_sample={"clean": 0.85, "PGD 8": 0.65, "FGSM 8": 0.60, "MI-FGSM 8": 0.60},
        random_K={"PGD 8": 0.54},
        all_eigenfaces={"PGD 8": 0.29},
        last_K={"PGD 8": 0.59},
    )
    | {"PIN official-lambda, sample": {"clean": outcome(0.80)}},
    "quality": {
        "pin": {
            "cost": 0.2,
            "oracle": 0.2,
            "untrained": 1.0,
            "p of the first 16": 0.91,
            "p of the last half": 0.29,
        },
        "official-lambda": {"expected kept": 8},
    },
    "shift": {"top": 0.7, "rest": 1.0, "noise": 0.34},
    "adaptive": {
        f"PIN sample, PGD {levels}, mask held constant": {"attacked": outcome(value)}
        for levels, value in ((4, 0.4), (8, 0.35))
    },
    "other": rows(none={"PGD 8": 0}, PIN_sample={"PGD 8": 0.60}),
}
"""Every claim just holds."""


def test_claims_hold_at_their_margins():
    claims = check_claims(**HOLDING)
    assert [claim.id[:2] for claim in claims] == [f"C{i}" for i in range(1, 9)]
    assert all(claim.holds for claim in claims)
    fewer = copy.deepcopy(HOLDING) | {"other": {}}
    fewer["quality"].pop("official-lambda")
    assert [claim.id[:2] for claim in check_claims(**fewer)] == ["C1", "C2", "C3", "C4", "C5", "C8"]


@pytest.mark.parametrize(
    ("place", "value", "lost"),
    [
        (("table", "none", "clean"), 0.89, {"C1"}),
        (("table", "none", "PGD 8"), 0.11, {"C1"}),
        (("table", "none", "clean"), 0.91, {"C2"}),
        (("table", "PIN sample", "PGD 8"), 0.649, {"C2"}),
        (("table", "PIN sample", "FGSM 8"), 0.59, {"C2"}),
        (("table", "PIN sample", "MI-FGSM 8"), 0.59, {"C2"}),
        (("table", "random K", "PGD 8"), 0.56, {"C3"}),
        (("table", "all eigenfaces", "PGD 8"), 0.31, {"C3"}),
        (("table", "last K", "PGD 8"), 0.39, {"C3"}),
        (("table", "last K", "PGD 8"), 0.61, {"C3"}),
        (("quality", "pin", "cost"), 0.21, {"C4"}),
        (("quality", "pin", "oracle"), 0.21, {"C4"}),
        (("quality", "pin", "p of the first 16"), 0.9, {"C4"}),
        (("quality", "pin", "p of the last half"), 0.3, {"C4"}),
        (("shift", "top"), 0.71, {"C5"}),
        (("shift", "noise"), 0.35, {"C5"}),
        (("other", "PIN sample", "PGD 8"), 0.59, {"C6"}),
        (("quality", "official-lambda", "expected kept"), 8.1, {"C7"}),
        (("table", "PIN official-lambda, sample", "clean"), 0.81, {"C7"}),
        (("adaptive", "PIN sample, PGD 8, mask held constant", "attacked"), 0.36, {"C8"}),
        (("adaptive", "PIN sample, PGD 4, mask held constant", "attacked"), 0.9, set()),
    ],
)
def test_a_claim_is_lost_just_beyond_its_margin(place, value, lost):
    numbers = copy.deepcopy(HOLDING)
    at = numbers
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = outcome(value) if isinstance(at[place[-1]], Outcome) else value
    assert {claim.id[:2] for claim in check_claims(**numbers) if not claim.holds} == lost


def test_gains_over_fixed_sets_are_those_of_the_same_network():
    table = rows(none={"clean": 1}, PIN_sample={"clean": 0.75, "PGD 8": 0.5}) | {
        "fixed top-K": {"clean": outcome(0.5), "PGD 8": outcome(0.75)},
        "fixed top-K of exact": {"clean": outcome(0.25)},
        "PIN exact, sample": {"clean": outcome(1.0)},
    }
    assert compare_with_fixed(table) == {
        "pin": {"clean": 0.25, "PGD 8": -0.25},
        "exact": {"clean": 0.75},
    }


# --- experiments ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab():
    """Untrained networks on a few faces, attacked with everything."""
    torch.manual_seed(0)
    faces = procedural("simple", 6, 4, 16, 0)
    recognizers = {name: SmallRecognizer(16, 6, width=4).eval() for name in ("recognizer", "surrogate")}
    basis = fit_basis([faces.images], 24, 256, 20)
    pairs = random_pairs(faces.labels, 6, 6, 0)
    lab = Lab(
        recognizers={name: network.requires_grad_(False) for name, network in recognizers.items()},
        basis=basis,
        dae=DAE((4,)).eval().requires_grad_(False),
        esns={"pin": make_esn(16, 20, (4, 8), hidden=16).eval().requires_grad_(False)},
        prices={"pin": 1e-4},
        sees_dae={"pin": True},
        first=faces.images[pairs.first],
        second=faces.images[pairs.second],
        pairs=pairs,
        train=faces.images,
    )
    lab.attacked = craft(lab, full=True)
    lab.transferred = craft(lab, "surrogate", (lab.main,))
    return lab


def test_every_attack_of_the_full_table_keeps_its_ball(lab):
    assert set(lab.attacked) >= {"FGSM 8", "DI-TI-FGSM 8", "DeepFool 8", "PGD 16"}
    for name, images in lab.attacked.items():
        size = (images - lab.first).abs().max().item()
        assert 0 < size <= int(name.split()[-1]) * LEVEL + 1e-6, name
    table = defence_table(lab, {"pin": 8}, 2, slow=True)
    assert set(table["none"]) == {"clean", *lab.attacked, "PGD 8 from a surrogate"}
    assert "total variation" in table and "PIN topk" in table
    bounds = ("oracle of the clean face", "leading, as many as the oracle", "large coefficients")
    assert set(bounds) < set(table) and all(set(table[name]) == set(table["none"]) for name in bounds)


def test_the_oracle_keeps_its_mask_under_attack(lab):
    """Judged by hand: what lies outside the clean face's own mask is taken from the attacked one."""
    clean = lab.first
    price = lab.prices["pin"]
    noisy = add_noise(clean, lab.noise, lab.generator(13))
    q = mask_cost(lab.basis, clean, noisy, price).oracle()
    coefficients = (clean.flatten(1) - lab.basis.avg_face) @ lab.basis.eig_vec
    outside = 3 * ((1 - q) @ lab.basis.eig_vec.T)
    images = {"clean": clean, "outside": clean + outside.view_as(clean)}
    rows = selection_bounds(lab, images)
    assert rows["oracle of the clean face"]["outside"].drift == pytest.approx(
        rows["oracle of the clean face"]["clean"].drift, abs=1e-4
    )
    assert rows["large coefficients"]["outside"].drift != rows["large coefficients"]["clean"].drift
    kept = defenses.large_components(clean, lab.basis, price) - lab.basis.avg_face.view(1, 1, 16, 16)
    expected = (coefficients * (coefficients.square() > price * 256)) @ lab.basis.eig_vec.T
    torch.testing.assert_close(kept.flatten(1), expected, atol=1e-4, rtol=1e-4)


def test_the_authors_full_table_has_printed_glasses(lab):
    attacks = gradient_attacks(replace(lab, authors=True), full=True)
    assert {"DeepFool 0.04", "DI-TI-FGSM 0.04", "printed glasses"} < set(attacks)


def test_full_adaptive_attacks_are_rows_of_their_own(lab):
    table = adaptive_attacks(lab, full=True)
    assert set(adaptive_attacks(lab, full=False)) < set(table) and len(table) == 11
    for part in ("EOT of 10 masks", "APGD 8, straight-through", "EOT of 5", "quilting, PGD 8 through BPDA"):
        assert any(part in name for name in table), part


def test_smallest_changes_begin_on_the_right_side_of_their_threshold(lab, monkeypatch):
    """Also of pairs that only their fold's own threshold judges rightly."""
    begun = []
    monkeypatch.setattr(Verifier, "threshold", property(lambda self: self.clean.median().item()))
    monkeypatch.setattr(
        experiments,
        "cw_l2",
        lambda system, x, goal, **how: begun.append(goal.margin(system(x))) or cw_l2(system, x, goal, **how),
    )
    changes = smallest_changes(lab, 60, 6)
    assert len(begun) == 2 and all((margins <= 0).all() for margins in begun)
    assert set(changes) == {"none", "PIN threshold"}
    for numbers in changes.values():
        assert numbers["C&W L2, success"] > 0.5 and numbers["C&W L2, median RMS"] > 1e-3


def test_the_premise_splits_the_change(lab):
    whole = premise(lab, 20)
    assert 0 < whole["energy in top"] < 1 and all(whole[part] > 0 for part in ("top", "rest", "noise"))
    assert premise(lab, 5)["energy in top"] < whole["energy in top"]


def test_selection_quality_is_bounded_by_the_oracle(lab):
    torch.manual_seed(1)
    quality = selection_quality(lab, "pin", make_esn(16, 20, (4, 8), hidden=16).eval())
    assert quality["oracle"] < min(quality["cost"], quality["untrained"])
    assert 0 < quality["oracle kept"] < 20 and quality["lambda"] == 1e-4


def test_every_image_is_resized_and_padded_by_itself():
    x = torch.rand(8, 1, 32, 32)
    found = defenses.random_resize_pad(x, torch.Generator().manual_seed(0))
    again = torch.Generator().manual_seed(0)
    sides = torch.randint(27, 32, (8, 1), generator=again)
    corners = (torch.rand((8, 2), generator=again) * (33 - sides)).floor().int()
    assert len(set(sides.flatten().tolist())) > 2
    for i, (side, (left, top)) in enumerate(zip(sides.flatten().tolist(), corners.tolist(), strict=True)):
        small = F.interpolate(x[i : i + 1], (side, side), mode="bilinear", align_corners=False)
        expected = F.pad(small, (left, 32 - side - left, top, 32 - side - top))
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-5, rtol=0)
