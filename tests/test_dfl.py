"""dfl: networks, objective, the two engines, what is said of the numbers."""

import re
import subprocess
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import conftest
import pytest
import torch
from federations import TOY, distance, federation, small, trained
from torch import nn

from dfl import convex
from dfl.baselines import BASELINES, build_method
from dfl.claims import domain_claims, skew_claims
from dfl.client import Client, global_part, local_part, local_round
from dfl.engine import Draws, clip
from dfl.eval import limits
from dfl.federation import evaluate
from dfl.model import TwoBranch, build_backbone
from dfl.train import PRESETS
from dfl.trials import TRIALS, plan
from shared.bench import count_parameters
from shared.runtime import REPOSITORY, UserError, parse_presets

# --- what is shared -------------------------------------------------------------------------------


def test_branches_share_nothing_and_parts_cover_the_state():
    net = TwoBranch(lambda: build_backbone("digit_cnn", None, (3, 28, 28)), 10, 512)
    assert (
        count_parameters(net) - count_parameters(net.critic_min) - count_parameters(net.critic_max)
        == 28_438_410
    )
    specific = {value.data_ptr() for value in net.specific.state_dict().values()}
    assert not specific & {value.data_ptr() for value in net.invariant.state_dict().values()}
    state = net.state_dict()
    for share_head in (True, False):
        config = replace(TOY, backbone="digit_cnn", share_head=share_head, style="coloured")
        method = build_method(config, small(28))
        shared, own = global_part(state, method.shared), local_part(state, method.shared)
        assert shared.keys() | own.keys() == state.keys() and not shared.keys() & own.keys()
        assert ("head.weight" in shared) == share_head
        assert not any(name.startswith(("specific", "critic")) for name in shared)
        assert not any("num_batches_tracked" in name for name in shared)


def test_bn_of_the_invariant_branch_may_stay_local():
    config = replace(TOY, backbone="digit_cnn", aggregate="invariant_bnlocal")
    shared = build_method(config, small(28)).shared
    assert shared("invariant.conv1.weight") and not shared("invariant.bn1.weight")
    assert not shared("invariant.bn1.running_mean") and shared("head.bias")


def test_control_variates_are_the_mean_of_the_clients():
    """SCAFFOLD with everyone present: c = mean of c_k, and c_k is the gradient at the received model."""
    made = federation(replace(TOY, **TRIALS["scaffold"]))
    start = {name: value.clone() for name, value in made.shared.items()}
    made.run_round()
    for name, value in made.extra.items():
        own = torch.stack([client.memory[name] for client in made.clients])
        assert torch.allclose(value, own.mean(0), atol=1e-6)
    made.net.load_state_dict(start)
    samples = made.data.clients[1].train
    made.net.zero_grad()
    nn.functional.cross_entropy(made.net(made.data.prepare(samples.images)), samples.labels).backward()
    for name, parameter in made.net.named_parameters():
        assert torch.allclose(parameter.grad, made.clients[1].memory[name], atol=1e-6)


# --- which part moves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        (
            {},
            {"S": {"specific", "head", "critic_min"}, "C": {"invariant", "head", "critic_min", "critic_max"}},
        ),
        ({"mi": "none"}, {"S": {"specific", "head"}, "C": {"invariant", "head"}}),
        (
            {"schedule": "joint"},
            {"J": {"specific", "invariant", "head", "critic_min", "critic_max"}},
        ),
    ],
)
def test_each_stage_moves_its_own_parameters(change, moves):
    config = replace(TOY, **change)
    made = trained(config, 1)  # a round later the bank is filled
    method = made.method
    seen = {}
    for stage in method.stages:
        one = replace(method, stages=(stage,))
        before = made.clients[0].state
        clients, _ = local_round(
            one, config, made.net, [made.clients[0]], [made.data.clients[0]], [made.download(0)], made.data
        )
        start = {**before, **made.shared}
        after = clients[0].state
        seen[stage.name] = {name.split(".")[0] for name in after if not torch.equal(after[name], start[name])}
    assert seen == moves


def test_passes_of_the_schedules():
    """Alternating stages see the data twice and move each extractor in one of the passes; `joint` moves both
    in both, `joint_once` both in one."""
    passes = {}
    for trial in ("dfl", "dfl-one-stage", "dfl-one-pass", "dfl-two-epochs"):
        stages = build_method(replace(TOY, **TRIALS[trial]), small(8)).stages
        passes[trial] = [(stage.name, stage.epochs) for stage in stages]
    assert passes == {
        "dfl": [("S", 1), ("C", 1)],
        "dfl-one-stage": [("J", 2)],
        "dfl-one-pass": [("J", 1)],
        "dfl-two-epochs": [("S", 2), ("C", 2)],
    }


def test_switches_change_what_they_name_only():
    base = trained(TOY, 8)  # the hinge of L_min is inactive until its critic has learnt something
    for trial in ("dfl-no-min-mi", "dfl-no-max-mi", "dfl-no-diversity", "dfl-shuffle", "dfl-local-head"):
        other = trained(replace(TOY, **TRIALS[trial]), 8)
        assert distance(base.clients[0].state, other.clients[0].state) > 0, trial
    # Without a bank there is nothing to lend: round 1 is the same with and without diversity transferring.
    first, none = (trained(replace(TOY, source=source), 1) for source in ("models", "none"))
    assert distance(first.shared, none.shared) == 0
    # Lambda 0 leaves only the other terms, as no estimator does.
    off = trained(replace(TOY, lambda_min=0.0, lambda_max=0.0))
    none = trained(replace(TOY, mi="none"))
    assert distance(off.shared, none.shared) < 1e-6


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trial", [*BASELINES, "dfl", "dfl-shuffle", "dfl-prototypes", "dfl-club", "dfl-one-stage"]
)
def test_vectorised_clients_equal_the_plain_loop(trial):
    config = replace(TOY, **TRIALS[trial])
    fast = trained(replace(config, engine="vectorised"))
    slow = trained(replace(config, engine="sequential"))
    assert distance(fast.shared, slow.shared) < 2e-5 if fast.shared else True
    for a, b in zip(fast.clients, slow.clients, strict=True):
        assert distance(a.state, b.state) < 2e-5
    for name, value in evaluate(fast, full=True).items():
        assert value == pytest.approx(evaluate(slow, full=True)[name], abs=2)


def test_frozen_features_cached_or_not_give_the_same():
    data = small(8)
    plain = trained(TOY, data=data)
    uncached = trained(TOY, data=replace(data, augment=lambda images, view: images))
    assert distance(plain.shared, uncached.shared) < 1e-5


def test_clipping_is_per_client():
    grads = [torch.ones(2, 3) * torch.tensor([[1.0], [100.0]])]
    clip(grads, 5.0)
    assert grads[0][0].tolist() == [1, 1, 1] and grads[0][1].norm().item() == pytest.approx(5, rel=1e-4)


def test_draws_cover_each_epoch():
    draws = Draws.of(10, 4, 3, torch.Generator().manual_seed(0))
    assert draws.index.shape == (6, 4) and draws.shift.min() >= 1 and draws.shift.max() <= 3
    for epoch in range(3):
        assert len(set(draws.index[2 * epoch : 2 * epoch + 2].flatten().tolist())) == 8


@pytest.mark.parametrize("size", [2, 3, 20])
def test_shuffle_pairs_each_sample_with_another(size):
    draws = Draws.of(2 * size, size, 100, torch.Generator().manual_seed(0))
    own = torch.arange(size).expand_as(draws.mixed)
    assert draws.mixed.shape == draws.index.shape == (200, size)
    assert (draws.mixed != own).all() and torch.equal(draws.mixed.sort(1).values, own)
    assert all(draws.mixed[:, i].unique().numel() == size - 1 for i in range(size))
    # The pairs take as many random numbers as a plain order would: what follows them is what it was.
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        torch.randperm(2 * size, generator=generator)
    torch.randint(1, size, (200,), generator=generator)
    torch.rand(200, size, generator=generator)
    assert torch.equal(draws.lent, torch.rand(200, size, generator=generator))


def test_engine_reaches_a_known_optimum():
    gaps = convex.run()
    assert gaps[-1] < 1e-10 and all(b - a < 1e-12 for a, b in zip(gaps, gaps[1:], strict=False))
    assert convex.run(fraction=0.5, rounds=300)[-1] < 1e-4


# --- numbers and settings ---


def test_claims_hold_at_their_margin_and_need_their_trials():
    table = {"dfl": {"in_domain": 90.0, "worst": 70.0}, "fedavg": {"in_domain": 86.0, "worst": 71.0}}
    assert skew_claims(table) == []  # C1 needs fedavg-wide as well
    table["fedavg-wide"] = {"in_domain": 87.5}
    (c1,) = skew_claims(table)
    assert c1.id == "C1" and c1.holds and c1.margin == "dfl - fedavg >= 4; dfl - fedavg-wide >= 2.5"
    table["fedavg-wide"] = {"in_domain": 87.6}
    assert not skew_claims(table)[0].holds
    assert [(claim.id, claim.holds) for claim in domain_claims(table)] == [("D1", True), ("D2", False)]


def test_limits_state_numbers_and_no_verdict():
    row = {"in_domain": 90.0, "counterfactual": 60.0, "counterfactual_transfer": 70.0, "unseen": 65.0}
    table = {"dfl": row, "fedavg": row, "dfl-no-max-mi": row | {"in_domain": 40.0}, "dfl-one-stage": row}
    table["dfl-one-pass"] = row | {"in_domain": 89.0, "counterfactual": 50.0}
    lines = limits(table, {})
    assert "Without the max-MI term in-domain accuracy is 40.0 %, with it 90.0 %." in lines[1]
    assert lines[2] == (
        "One joint stage with as many passes over the data gives 90.0 % in-domain and 60.0 % counterfactual, "
        "alternating stages 90.0 and 60.0 %."
    )
    assert lines[3].startswith("One joint pass") and "gives 89.0 % in-domain and 50.0 % counter" in lines[3]
    assert not any(word in line for line in lines for word in ("nothing", "worth"))
    half = {"in_domain": {"dfl": {0.0: 80.0, 0.9: 92.0}, "fedavg": {0.9: 85.0}}}  # a run that has not ended
    assert limits({}, half) == [
        "In-domain accuracy of DFL against FedAvg by strength of the skew, first seed: "
        "rho 0.9: 92.0 against 85.0."
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-size 1", "2 or more"),
        ("--fraction nan", "a number above 0 to 1"),
        ("--fraction 0", "a number above 0 to 1"),
        ("--fractions 0.5 2", "a number above 0 to 1"),
        ("--sweep 0.5 -1", "a number from 0 to 1"),
        ("--rho 5", "a number from 0 to 1"),
        ("--dropout -0.1", "a number from 0 to 1"),
        ("--strength 2", "a number from 0 to 1"),
        ("--momentum -1", "a number from 0 to 1"),
        ("--noise -1", "0 or more"),
        ("--lambda-div -1", "0 or more"),
        ("--bank-per-round -1", "0 or more"),
        ("--widths -1 4", "1 or more"),
        ("--widths 0 0", "1 or more"),
        ("--image-size 0", "1 or more"),
        ("--min-clients 0", "1 or more"),
        ("--digit-parts 11", "a number from 1 to 10"),
        ("--lr nan", "a number above 0"),
        ("--critic-lr 0", "a number above 0"),
        ("--clip -1", "a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(option, message):
    name, *values = option.split()
    refused = re.escape(name) + rf" ({'|'.join(map(re.escape, values))}).*: give .*{message}"
    with pytest.raises(UserError, match=refused):
        parse_presets(PRESETS, "", ["demo", name, *values])


def test_presets_are_within_their_ranges():
    assert all(parse_presets(PRESETS, "", [name]).preset == name for name in PRESETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": ()}, "--trials: name at least one of dfl, local"),
        ({"trials": ("dfl", "dfl")}, "they name dfl/0 twice"),
        ({"sweep": (0.5, 0.5)}, "they name dfl@0.5/0 twice"),
        ({"trials": ("nonsense",)}, "unknown trial 'nonsense'"),
    ],
)
def test_a_plan_has_every_training_once(change, message):
    with pytest.raises(UserError, match=message):
        plan(replace(TOY, **change))


def test_skewed_digits_have_no_domain_to_hold_out():
    with pytest.raises(UserError, match="--hold-out x: skewed digits have no domains"):
        federation(replace(TOY, hold_out="x"))


def test_widths_and_images_that_fit_a_backbone():
    wide = build_method(replace(TOY, method="fedavg", wide=True), small(8)).build()
    assert count_parameters(wide) == 192 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    with pytest.raises(UserError, match="alexnet_bn takes images of 63x63 or more, the data are 62x62"):
        build_backbone("alexnet_bn", None, (3, 62, 62))
    with pytest.raises(UserError, match="digit_cnn has fixed ones"):
        build_method(replace(TOY, method="fedavg", wide=True, backbone="digit_cnn"), small(28))


def test_batch_norm_cannot_be_vectorised():
    with pytest.raises(UserError, match="--norm group or --engine sequential"):
        trained(replace(TOY, backbone="digit_cnn", engine="vectorised"), 1, data=small(28))


@pytest.mark.parametrize(
    ("asked", "installed", "skipped"), [("", False, True), ("", True, False), ("flower", False, False)]
)
def test_flower_is_passed_over_only_where_it_is_not_and_nobody_asks(monkeypatch, asked, installed, skipped):
    class Item:
        def __init__(self, marker):
            self.marker, self.added = marker, []

        def get_closest_marker(self, name):
            return name == self.marker

        def add_marker(self, mark):
            self.added.append(mark.mark.name)

    monkeypatch.setattr(conftest, "find_spec", lambda name: installed or None)
    items = [Item("flower"), Item("slow")]
    options = SimpleNamespace(option=SimpleNamespace(markexpr=asked))
    conftest.pytest_collection_modifyitems(options, items)
    assert [item.added for item in items] == [["skip"] if skipped else [], []]


def test_flower_s_extra_is_what_its_app_and_the_makefile_install():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extra = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]["flower"]
    assert extra == {"file": ["dfl/requirements-flower.txt"]}
    app = tomllib.loads((REPOSITORY / "dfl" / "pyproject.toml").read_text())
    wanted = (REPOSITORY / "dfl" / "requirements-flower.txt").read_text().split()
    assert app["project"]["dependencies"] == wanted
    plan = subprocess.run(["make", "-n", "test"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    steps = ("-r dfl/requirements-flower.txt", "-m flower tests/test_dfl_flower.py", "not flower")
    places = [plan.stdout.index(step) for step in steps]
    assert places == sorted(places) and "-r requirements-dev.txt" in plan.stdout


def test_readme_names_every_trial():
    text = (REPOSITORY / "dfl" / "README.md").read_text()
    assert all(f"| {trial} " in text or f"| **{trial}** " in text for trial in TRIALS)


def test_clients_start_alike():
    made = federation(TOY)
    states = [client.state for client in made.clients]
    assert all(distance(states[0], state) == 0 for state in states)
    assert isinstance(made.clients[0], Client)
