"""FaceSwapper: training, ablation switches, resume after a kill, evaluation, several processes."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from curves import assert_same_curves, run_one, run_two
from test_faceswapper_data import make_set
from test_faceswapper_protocol import make_faceforensics

from faceswapper import train as training
from faceswapper.data import DrawnFaces, world
from faceswapper.eval import Config as EvalConfig
from faceswapper.eval import main, swap_all
from faceswapper.gallery import swap_grid
from faceswapper.judges import Embedder, reader_targets, train_embedder, train_reader
from faceswapper.losses import Batch, Weights
from faceswapper.model import Size
from faceswapper.pipeline import Blending
from faceswapper.predict import Networks, open_swapper
from faceswapper.train import PRESETS, Config, train, update
from faceswapper.trials import Learner, Trial, load_generators, names_of, plan
from shared.runtime import UserError, start

FOLDER = Path(__file__).resolve().parent.parent / "faceswapper"
TINY = Size(32, 128, 8, 8)


def tiny(out: Path, **changes) -> Config:
    settings = {
        "out": out,
        "size": TINY,
        "variants": ("full", "no-identity-loss", "no-landmarks"),
        "train_people": 4,
        "per_person": 2,
        "judge_people": 6,
        "judge_steps": 2,
        "judge_width": 4,
        "warmup": 2,
        "iterations": 6,
        "checkpoint_every": 1,
        "log_every": 1,
        "sample_every": 3,
        "device": "cpu",
    }
    return replace(PRESETS["demo"], preset="demo", **settings | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    torch.set_num_threads(1)
    return train(tiny(tmp_path_factory.mktemp("whole") / "run"))


# Saves: 6 of the method (warm-up to 2), 4 of a trial that goes on from there, 6 of another.
@pytest.mark.parametrize("saves", [1, 2, 5, 7])
def test_killed_and_resumed_run_is_the_same(tmp_path, whole, saves):
    program = (
        "from pathlib import Path\n"
        "from test_faceswapper_runs import tiny, train\n"
        "train(tiny(Path(sys.argv[2])))"
    )
    helpers.die_after(saves, program, tmp_path / "killed")
    torch.set_num_threads(1)
    train(tiny(tmp_path / "killed"))
    helpers.assert_same_runs(whole, tmp_path / "killed")


def test_what_a_run_leaves_behind(whole):
    generators, tools, config = load_generators(whole, Config)
    assert set(generators) == {"full-0", "no-identity-loss-0", "no-landmarks-0"}
    assert set(tools) == {"recogniser", "judge", "reader"}
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    terms = {name.split("/")[1] for line in lines for name in line if name.startswith("full-0/")}
    generator = {"reconstruction", "adversarial", "identity", "attribute_face", "attribute_background"}
    assert terms == generator | {"d_real", "d_fake", "d_r1"}
    without = {name for line in lines for name in line if name.startswith("no-identity-loss-0/")}
    assert "no-identity-loss-0/identity" not in without and "no-identity-loss-0/adversarial" in without
    assert len([n for line in lines for n in line if n == "no-identity-loss-0/d_fake"]) == 4, (
        "begins at 2 of 6"
    )
    assert helpers.is_marked(whole / "samples/full-0-train.png")
    with pytest.raises(UserError, match="no generator other; there are: full-0"):
        load_generators(whole, Config, ["other"])


def test_a_masked_source_in_training_and_evaluation():
    _, learner, _, batch = learner_of("full", mask_source=True)
    assert learner.generator.mask_source and learner.average.mask_source and not tiny(Path("x")).mask_source
    one_step("full", mask_source=True)
    sides = batch, batch._replace(picture=batch.picture.flip(0))
    bare = Trial("no-mask-0", "no-mask", 0, 4)  # whose sources have no mask either
    for trial, mask in ((learner.trial, batch.mask), (bare, 0 * batch.mask)):
        swaps = swap_all(learner.generator, trial, *sides, batch=3)
        code = learner.generator.id_encoder.code(batch.picture * (1 - mask))
        seen = trial.restrict(sides[1])
        wanted = learner.generator.swap(batch.picture, *seen, code).clamp(-1, 1)
        torch.testing.assert_close(swaps, wanted, atol=1e-5, rtol=1e-4)


def test_every_generator_of_a_run_is_measured_on_faceforensics(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    make_faceforensics(tmp_path / "data", DrawnFaces(*world(4, 1, 7), 32))
    settings = {"faceforensics": tmp_path / "data", "baselines": False, "device": "cpu"}
    assert main(EvalConfig(run=run, **settings)) == run
    results = json.loads((run / "results.json").read_text())
    assert list(results["methods"]) == ["FaceSwapper", "no-identity-loss-0", "no-landmarks-0"]
    assert len(list((run / "swapped_result_single").iterdir())) == 3, "the method's"


def test_an_ablation_of_a_run_is_used_with_what_it_saw_in_training(whole):
    batch = learner_of("full")[3]
    for variant, sees in (("no-landmarks-0", False), (None, True)):
        networks = Networks(run=whole, variant=variant, device="cpu")
        seen = open_swapper(networks, Blending(), 48).restrict(batch)
        assert torch.equal(seen.landmarks, batch.landmarks) is sees


def test_ablations_are_as_long_as_what_they_are_compared_with():
    trials = plan(tiny(Path("x")))
    assert [(t.name, t.iterations, t.begins, t.keeps) for t in trials] == [
        ("full-0", 6, 0, 2),
        ("no-identity-loss-0", 6, 2, 0),
        ("no-landmarks-0", 6, 0, 0),
    ]
    assert names_of(trials[0]) == ["full-0", "warm-0"]
    assert names_of(trials[0], 3) == ["warm-0"] and names_of(trials[0], 2) == []
    with pytest.raises(UserError, match="--variants"):
        plan(tiny(Path("x"), variants=()))


def test_presets_are_the_published_hyperparameters():
    paper, official = PRESETS["paper"], PRESETS["official"]
    for config in (paper, official):
        assert (config.iterations, config.batch_size, config.lr, config.id_lr) == (60_000, 8, 1e-4, 1e-4)
        assert (config.betas, config.weight_decay, config.ema, config.r1_every) == (
            (0.0, 0.99),
            1e-4,
            0.999,
            1,
        )
        assert config.weights == Weights(1.0, 10.0, 1.0, 2.0, 1.0, 1.0)
        assert config.size == Size() and config.variants == ("full",)
        assert config.warmup == 0 and config.decay == 0
    assert (paper.mask_pyramid, paper.ema_start) == ("direct", "copy")
    assert (official.mask_pyramid, official.ema_start, official.precision) == ("cascade", "official", "fp32")


# --- switches -------------------------------------------------------------------------------------------


def learner_of(variant: str, **changes) -> tuple[Config, Learner, Embedder, Batch]:
    config = tiny(Path("x"), warmup=0, **changes)
    embed = Embedder(4).eval().requires_grad_(False)
    learner = Learner(config, Trial(f"{variant}-0", variant, 0, 4), embed, torch.device("cpu"))
    pictures = DrawnFaces(*world(4, 1, 0), 32).batch(slice(None))
    return config, learner, embed, Batch(pictures["image"], pictures["landmarks"], pictures["mask"])


def one_step(variant: str, **changes) -> tuple[Learner, dict[str, torch.Tensor]]:
    config, learner, embed, batch = learner_of(variant, **changes)
    accelerator = start(config)
    return learner, update(config, learner, embed, learner.trial.restrict(batch), 0, accelerator)


@pytest.mark.parametrize(
    ("variant", "absent"),
    [
        ("full", set()),
        ("no-identity-loss", {"identity"}),
        ("no-attribute-losses", {"attribute_face", "attribute_background"}),
        ("no-discriminator", {"adversarial", "d_real", "d_fake", "d_r1"}),
        ("unconditional", set()),
        ("frozen-identity", set()),
    ],
)
def test_switches(variant, absent):
    learner, terms = one_step(variant)
    names = {"adversarial", "identity", "reconstruction", "attribute_face", "attribute_background"}
    assert set(terms) == (names | {"d_real", "d_fake", "d_r1"}) - absent
    assert all(torch.isfinite(value) for value in terms.values())
    trained = {name for name, p in learner.generator.named_parameters() if p.grad is not None}
    assert any(name.startswith("attr_encoder") for name in trained)
    if variant == "frozen-identity":
        assert {n for n in trained if n.startswith("id_encoder")} == {
            "id_encoder.final_layer.0.weight",
            "id_encoder.final_layer.0.bias",
        }
    else:
        assert "id_encoder.model.0.weight" in trained


def test_white_landmarks_and_empty_masks():
    _, learner, _, batch = learner_of("no-landmarks")
    blind = learner.trial.restrict(batch)
    assert blind.landmarks.unique().tolist() == [1.0] and torch.equal(blind.mask, batch.mask)
    bare = Trial("no-mask-0", "no-mask", 0, 1).restrict(batch)
    assert bare.mask.abs().max() == 0 and torch.equal(bare.landmarks, batch.landmarks)
    assert Trial("full-0", "full", 0, 1).restrict(batch) is batch


def test_rates_fall_at_the_end_and_momentum_is_for_the_warm_up():
    changes = {"warmup": 2, "iterations": 10, "decay": 0.4, "lr": 1.0, "id_lr": 2.0, "warmup_lr": 4.0}
    config = replace(tiny(Path("x")), **changes)
    learner = Learner(config, Trial("full-0", "full", 0, 10), Embedder(4), torch.device("cpu"))
    seen = []
    for iteration in range(10):
        learner.schedule(config, iteration)
        (rest, own), (critic,) = (learner.optimisers[name].param_groups for name in ("adam_g", "adam_d"))
        seen += [rest["lr"], own["lr"]]
        assert rest["betas"] == own["betas"] == ((0.9, 0.99) if iteration < 2 else (0.0, 0.99))
        assert critic["lr"] == rest["lr"]
    whole = [4.0, 4.0] * 2 + [1.0, 2.0] * 5
    assert seen == pytest.approx([*whole, 0.75, 1.5, 0.5, 1.0, 0.25, 0.5])


def test_the_average_starts_and_follows():
    learner, _ = one_step("full", ema=0.9)
    config, before, _, _ = learner_of("full", ema=0.9)
    name = "attr_encoder.model.0.weight"
    start_, now, average = (
        dict(net.named_parameters())[name] for net in (before.generator, learner.generator, learner.average)
    )
    assert not torch.equal(start_, now)
    assert torch.allclose(average, 0.9 * start_ + 0.1 * now, atol=1e-7)
    other = learner_of("full", ema_start="official")[1]
    assert not torch.equal(dict(other.average.named_parameters())[name], start_), (
        "officially from another start"
    )
    first, official_first = (net.attr_encoder.model[0] for net in (other.generator, other.average))
    assert first.bias.abs().max() == 0 < official_first.bias.abs().max(), "copied before He initialisation"
    bound = (3 * 9) ** -0.5  # of PyTorch's own uniform start
    assert official_first.weight.abs().max() <= bound < first.weight.abs().max()


def test_moments_take_the_order_of_their_parameters():
    """As when a run goes on on a GPU, where networks are channels-last."""
    p = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    optimiser = torch.optim.Adam([p], fused=True)
    p.grad = torch.randn_like(p)
    optimiser.step()
    before = {name: value.clone() for name, value in optimiser.state[p].items()}
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    training.align_state(optimiser)
    for name, value in optimiser.state[p].items():
        assert torch.equal(value, before[name])
        assert value.shape != p.shape or value.stride() == p.stride()


def test_penalty_every_other_step_counts_twice():
    config, learner, embed, batch = learner_of("full", r1_every=2)
    accelerator = start(config)
    once = one_step("full", r1_every=1)[1]["d_r1"]
    first = update(config, learner, embed, batch, 0, accelerator)
    assert first["d_r1"].item() == pytest.approx(2 * once.item(), rel=1e-4)
    assert "d_r1" not in update(config, learner, embed, batch, 1, accelerator)


# --- judges and pictures --------------------------------------------------------------------------------


def test_judges_learn_what_they_are_for():
    torch.set_num_threads(1)
    pictures = DrawnFaces(*world(150, 2, 3), 32)
    embedder, reader = train_embedder(pictures, 0, 12, 150), train_reader(pictures, 1, 12, 300)
    unseen = DrawnFaces(*world(30, 2, 99), 32)
    images = unseen.batch(slice(None))["image"]
    similar = embedder(images[0::2]) @ embedder(images[1::2]).T
    others = (similar.sum() - similar.diag().sum()) / (30 * 29)
    assert similar.diag().mean() > others + 0.3
    _, points = reader(images)
    truth = unseen.points[:, 51:96] / 32
    guess = truth.mean(0)
    assert (points - truth).norm(dim=2).mean() < 0.75 * (guess - truth).norm(dim=2).mean()
    assert reader_targets(unseen).shape == (60, 7 + 90)
    assert not any(p.requires_grad for p in embedder.parameters())


def test_grid_has_every_source_on_every_target():
    _, learner, _, batch = learner_of("full")
    sheet = swap_grid(learner.generator, batch.picture[:2], *(x[1:4] for x in batch))
    tile = 4 * 32 + 2  # enlarged to 128, and the gap
    assert sheet.shape[1:] == (18 + 3 * tile - 2, 4 * tile - 2)


# --- scripts --------------------------------------------------------------------------------------------


SMALL = [*helpers.TINY["faceswapper"], "--device", "cpu"]


def script(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return helpers.script("faceswapper", *arguments, PAPERS_RUNS=str(folder), **{"code": 0} | options)


def test_scripts_from_their_folder(tmp_path):
    folder = Path(script(tmp_path, "train.py", "demo", *SMALL, fresh=True).stdout.splitlines()[-1])
    assert folder == tmp_path / "faceswapper/demo-0"
    printed = script(
        tmp_path, "eval.py", "--test-people", "6", "--device", "cpu", fresh=True
    ).stdout.splitlines()
    assert Path(printed[-1]) == folder
    assert any(line.startswith("claims: ") for line in printed)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["claims"]) == 8
    assert {"full", "no-mask", "paste, Poisson", "mean face", "true swap"} <= set(results["scores"])
    assert not any(metric["comparable"] for metric in results["metrics"])
    samples = [folder / "samples" / f"{name}.png" for name in ("grid", "methods", "full-0-train")]
    assert all(map(helpers.is_marked, samples))


def test_a_users_mistakes(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path))
    wrong = script(tmp_path, "train.py", "paper", "--device", "cpu", code=2)
    assert wrong.stderr.startswith("error: --data celeba needs --data-root") and "prepare.py" in wrong.stderr
    with pytest.raises(UserError, match="no run in"):
        main(EvalConfig())
    with pytest.raises(UserError, match="power of two"):
        Size(48)


def test_training_on_files(tmp_path, monkeypatch):
    """A public layout, the official preset's switches, a recogniser from elsewhere."""
    make_set(tmp_path / "data", "CelebA", ["1", "2", "3"])
    with pytest.raises(UserError, match="--recogniser-weights model_ir_se50.pth"):
        train(replace(PRESETS["official"], data_root=tmp_path / "data", out=tmp_path / "run", device="cpu"))
    monkeypatch.setattr(training, "official_recogniser", lambda config: Embedder(4))
    config = replace(
        PRESETS["official"],
        data_root=tmp_path / "data",
        out=tmp_path / "run",
        size=TINY,
        batch_size=2,
        iterations=2,
        workers=0,
        device="cpu",
    )
    generators, tools, _ = load_generators(train(config), Config)
    assert set(generators) == {"full-0"} and tools == {}
    with pytest.raises(UserError, match="trained on celeba, .* --faceforensics DIR"):
        main(EvalConfig(run=tmp_path / "run"))


def test_two_processes_give_the_curves_of_one(tmp_path):
    """Adam without momentum makes whole steps of gradients that are mere rounding: the curves part slowly."""
    arguments = ["demo", *helpers.TINY["faceswapper"], "--variants", "full", "--batch-size", "2"]
    arguments += ["--iterations", "6", "--log-every", "1"]
    one, two = run_one(train, PRESETS, tmp_path, *arguments), run_two("faceswapper", tmp_path, *arguments)
    assert_same_curves(one, two, lines=6, rel=1e-3)


HOLD = {"C1", "C3", "C4", "C5", "C6", "C8"}
"""The claims that the README says hold."""


@pytest.mark.slow
def test_claims_of_the_demo(tmp_path):
    """The demo shows what the README says it shows.

    Every claim must be judged; those that the README lists as holding must hold. The others (see its table)
    do not hold in the demo's time and are not asked for.
    """
    folder = Path(last_line(tmp_path, "train.py", "demo"))
    assert Path(last_line(tmp_path, "eval.py")) == folder
    claims = {claim["id"]: claim for claim in json.loads((folder / "results.json").read_text())["claims"]}
    assert len(claims) == 8
    assert not [claims[name]["text"] for name in sorted(HOLD) if not claims[name]["holds"]]


def last_line(folder: Path, *arguments: str) -> str:
    """A script of the demo itself, which takes minutes; its last line."""
    threads = str(os.cpu_count())
    return script(folder, *arguments, timeout=None, OMP_NUM_THREADS=threads).stdout.splitlines()[-1]
