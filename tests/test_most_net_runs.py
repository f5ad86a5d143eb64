"""MOST-Net: training, resume after a kill, evaluation."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from curves import assert_same_curves, run_one, run_two
from safetensors.torch import load_file

from most_net import claims, figures, literal, mechanism
from most_net import eval as evaluation
from most_net.data import Batch, face_pairs, simple_pairs
from most_net.learner import learning_rate, synthesise
from most_net.model import TINY, MostNet
from most_net.pairs import Alignment
from most_net.train import PRESETS, Config, Weights, train, update
from most_net.trials import begin, build, load_network, plan, split_data
from shared.io import write_image
from shared.runtime import UserError, parse_presets, start

FOLDER = Path(__file__).resolve().parent.parent / "most_net"
SMALL = replace(TINY, base=4, slots=8)


def tiny(out: Path, **changes) -> Config:
    settings = {
        "out": out,
        "variants": ("most",),
        "extras": (),
        "pairs": (4,),
        "seeds": 1,
        "artists": (),
        "arch": SMALL,
        "size": 16,
        "load": 16,
        "batch": 2,
        "steps": 6,
        "save_every": 2,
        "device": "cpu",
    }
    return replace(PRESETS["demo"], preset="demo", **settings | changes)


EVERYTHING = {
    "variants": ("none", "most"),
    "extras": ("unet",),
    "artists": ("outline", "bold"),
    "artist_pairs": 3,
    "artist_steps": 4,
    "ema": 0.9,
    "memory_init": "kmeans",
    "flip": True,
    "size": 32,
    "load": 34,
    "weights": Weights(perceptual=0, slot=0.01, match=0.1, ssim=0.1),
}


# Saves of the whole run: 2 in each trial of 6 steps and 1 after it, 1 and 1 in the last.
@pytest.mark.parametrize("saves", [2, 5])
def test_killed_and_resumed_run_is_the_same(tmp_path, saves):
    torch.set_num_threads(1)
    config = tiny(tmp_path / "whole", **EVERYTHING)
    train(config)
    sheets = list((tmp_path / "whole/samples").iterdir())
    assert sheets and all(map(helpers.is_marked, sheets))
    program = (
        "from pathlib import Path\n"
        "from test_most_net_runs import EVERYTHING, tiny, train\n"
        "train(tiny(Path(sys.argv[2]), **EVERYTHING))"
    )
    helpers.die_after(saves, program, tmp_path / "killed")
    before = (tmp_path / "killed/log.jsonl").read_text()
    train(tiny(tmp_path / "killed", **EVERYTHING))
    assert len((tmp_path / "killed/log.jsonl").read_text()) > len(before)
    helpers.assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_scripts_from_their_folder(tmp_path):
    def script(*arguments: str, fresh: bool = False) -> str:
        options = {"code": 0, "fresh": fresh, "PAPERS_RUNS": str(tmp_path)}
        return helpers.script("most_net", *arguments, **options).stdout

    small = "--variants none most --pairs 4 8 --seeds 1 --steps 3 --artist-pairs 3 --artist-steps 3 --batch 2"
    folder = Path(script("train.py", "demo", "--device", "cpu", *small.split(), fresh=True).splitlines()[-1])
    assert folder == tmp_path / "most_net/demo-0"
    printed = script("eval.py", "--device", "cpu", "--nlda-train", "4", fresh=True).splitlines()
    assert Path(printed[-1]) == folder
    assert any(line.startswith("claims: ") for line in printed)
    results = json.loads((folder / "results.json").read_text())
    assert {"claims", "metrics", "environment", "scores", "memory", "artists"} <= results.keys()
    assert {"SSIM", "FSIM", "Scoot", "L1", "NLDA"} == {metric["metric"] for metric in results["metrics"]}
    assert not any(metric["comparable"] for metric in results["metrics"])
    assert len(results["claims"]) == 9
    names = ("comparison", "slots", "atlas", "artists", "atlas-artists", "curve")
    assert all((folder / "samples" / f"{name}.png").is_file() for name in names)
    assert all(helpers.is_marked(folder / "samples" / f"{name}.png") for name in names if name != "curve")


def test_training_on_files_with_a_discriminator(tmp_path):
    """Real layout, crops, validation and the best weights, adversarial term, warm-up: all switches once."""
    pairs = simple_pairs(8, 0, 25)
    for i in range(8):
        for kind, images in (("photos", pairs.photos), ("sketches", pairs.sketches)):
            write_image(tmp_path / "data/train" / kind / f"{i}.png", enlarged(images[i] / 255))
    config = tiny(
        tmp_path / "run",
        dataset="pairs",
        data_root=tmp_path / "data",
        pairs=(0,),
        holdout=0.25,
        select="val",
        scale=0.1,
        size=32,
        load=36,
        warmup=2,
        validate_every=2,
        variants=("most", "grad"),
        weights=Weights(perceptual=0, adversarial=1.0),
    )
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {name for line in lines for name in line}
    assert {"most-all-0/val_ssim", "most-all-0/adversarial", "grad-all-0/discriminator"} <= found
    with pytest.raises(UserError, match="--holdout 1.0: leaves none of the 8 pairs to train on"):
        split_data(replace(config, holdout=1.0))
    net, settings, trial = load_network(folder, Config)
    assert trial.name == "grad-all-0"
    assert settings.data_root == config.data_root
    assert torch.isfinite(synthesise(net, simple_pairs(2, 1, 25), 32)).all()


@pytest.mark.parametrize("styles", [True, False])
def test_every_style_of_fs2k_has_a_memory_or_all_have_one(tmp_path, monkeypatch, capsys, styles):
    drawn = face_pairs(2, 0, 25, ("outline", "pencil", "bold"))
    for i in range(6):
        style, number = i // 2 + 1, i % 2
        write_image(tmp_path / f"photo/photo{style}/image{number}.jpg", drawn.photos[i] / 255)
        write_image(tmp_path / f"sketch/sketch{style}/sketch{number}.png", drawn.sketches[i] / 255)
    for part, number in (("train", 0), ("test", 1)):
        names = [{"image_name": f"photo{style}/image{number}"} for style in (1, 2, 3)]
        (tmp_path / f"anno_{part}.json").write_text(json.dumps(names))
    config = tiny(
        tmp_path / "run",
        dataset="fs2k",
        data_root=tmp_path,
        alignment=Alignment(resize="stretch"),
        styles=styles,
        pairs=(0,),
        scale=0.1,
        size=32,
        load=32,
    )
    folder = train(config)
    net, _, _ = load_network(folder, Config)
    # Six steps of two crops of 16x16 positions; of three memories each was written twice, in turns.
    assert [int(memory.usage.sum()) for memory in net.memories] == (
        [2 * 2 * 256] * 3 if styles else [6 * 2 * 256]
    )
    examined = []
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "measure", lambda net, pairs, *rest: examined.append(pairs) or {})
    monkeypatch.setattr(evaluation, "save_figures", lambda *arguments: None)
    evaluation.evaluate(evaluation.Config(folder, device="cpu", patches=False))
    assert capsys.readouterr().out.count("training pairs") == 1  # the full size is read without a word
    # Of several memories the first knows the first style alone.
    assert [pairs.styles.tolist() for pairs in examined] == [[0] if styles else [0, 0, 0]]


def test_only_the_reconstruction_trains_in_the_warm_up(tmp_path):
    config = tiny(
        tmp_path / "run",
        size=32,
        load=32,
        warmup=1,
        weights=Weights(pixel=1, reconstruction=0, perceptual=0, adversarial=1, ssim=1, slot=1, match=1),
    )
    trial, learner, accelerator, batch = prepared(config)
    learner.perceptual = torch.nn.L1Loss()
    for step, moves in ((0, False), (1, True)):
        before = {name: value.clone() for name, value in learner.net.named_parameters()}
        keys = learner.net.memories[0].keys.clone()
        update(config, trial, learner, accelerator, batch, step)
        changed = [not torch.equal(before[name], value) for name, value in learner.net.named_parameters()]
        assert any(changed) == moves
        assert not torch.equal(learner.net.memories[0].keys, keys)  # written from the first step on


def prepared(config: Config):
    """Its first trial before the first step, with what `update` takes."""
    accelerator = start(config)
    trial = plan(config)[0]
    learner = begin(config, trial, accelerator.device)
    learner.prepare(accelerator, compiled=False)
    generator = torch.Generator().manual_seed(4)
    photo, sketch = (torch.rand(2, n, 32, 32, generator=generator) * 2 - 1 for n in (3, 1))
    return trial, learner, accelerator, Batch(photo, sketch, 0)


def test_a_step_has_the_gradients_of_the_equations_written_out(tmp_path):
    """One pass of decoder and discriminator against separate ones, from the same weights."""
    weights = Weights(pixel=1, reconstruction=1, perceptual=0, adversarial=1)
    config = tiny(tmp_path / "run", size=32, load=32, weights=weights)
    trial, learner, accelerator, batch = prepared(config)
    net, discriminator = deepcopy(learner.net), deepcopy(learner.discriminator)
    optimizers = tuple(torch.optim.SGD(module.parameters(), 0.0) for module in (net, discriminator))
    literal.literal_update(net, discriminator, optimizers, batch.photo, batch.sketch)
    learner.optimizers[0].zero_grad()
    update(replace(config, lr=0.0), trial, learner, accelerator, batch, 0)
    # The spectral norm's power iteration goes on with every pass, of which the written-out form has three.
    for ours, theirs, apart in ((learner.net, net, 1e-3), (learner.discriminator, discriminator, 0.05)):
        got, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (ours, theirs))
        assert expected.norm() > 0 and (got - expected).norm() < apart * expected.norm()
    for name, value in learner.net.memories[0].state_dict().items():
        assert torch.allclose(value, net.memories[0].state_dict()[name], atol=1e-6), name


def test_refinement_trains_and_the_rate_falls(tmp_path):
    moved = []
    for variant in ("memory", "most"):
        config = tiny(tmp_path / "run", variants=(variant,), size=32, load=32)
        trial, learner, accelerator, batch = prepared(config)
        update(config, trial, learner, accelerator, batch, 0)
        moved.append(learner.net.key_head.project.weight)
    assert not torch.equal(*moved)
    rates = []
    for step in (0, trial.steps - 1):
        update(config, trial, learner, accelerator, batch, step)
        rates += [group["lr"] for group in learner.optimizers[0].param_groups]
    assert rates == pytest.approx([config.lr, config.lr / (0.5 * trial.steps)])


def enlarged(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(image[None], (250, 200))[0]


def test_the_memory_claims_switches(tmp_path):
    """none learns without a sketch encoder, static stops writing, mispaired writes something else, and grad
    writes nothing."""
    variants = ("none", "memory", "static", "mispaired", "grad")
    folder = train(tiny(tmp_path / "run", variants=variants, steps=8, seeds=1))
    state = {v: load_file(folder / f"checkpoint/{v}-4-0.safetensors") for v in variants}
    assert not any(name.startswith(("sketch_encoder", "memories")) for name in state["none"])
    assert state["static"]["memories.0.usage"].sum() == 5 * 2 * 64
    assert state["memory"]["memories.0.usage"].sum() == 8 * 2 * 64
    assert not torch.equal(state["mispaired"]["memories.0.values"], state["memory"]["memories.0.values"])
    assert state["grad"]["memories.0.usage"].sum() == 0
    _, config, trial = load_network(folder, Config)
    begun = build(config, trial).state_dict()
    assert not torch.equal(state["grad"]["memories.0.values"], begun["memories.0.values"])  # but they move


# --- mechanism ----------------------------------------------------------------------------------------


def test_mechanism_measures_and_restores_the_memory():
    net = MostNet(SMALL)
    before = net.memories[0].values.clone()
    found = mechanism.measure(net, simple_pairs(4, 0, 16), 16, window=7)
    assert set(found) == {"cosine", "ssim", "ssim_permuted", "ssim_zero", "slots_used", "purity"}
    assert torch.equal(net.memories[0].values, before)
    odd = simple_pairs(2, 0, 25)  # larger than the crop, and not to be halved
    assert math.isfinite(mechanism.measure(net, odd, 16, window=7)["ssim"])
    assert mechanism.atlas(net, odd, 16).isfinite().all() and figures.slots(net, odd, 16).isfinite().all()
    slot, parts = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 0, 1, 1])
    assert mechanism.purity(slot, parts) == pytest.approx(4 / 5)


def test_editing_a_slot_changes_the_drawing():
    torch.manual_seed(0)
    net = MostNet(SMALL).eval()
    photos, _ = mechanism.padded(simple_pairs(1, 0, 16), 16)
    before = net.sketch(photos)
    used = int(net(photos)["slot"].flatten().mode().values)
    mechanism.edit_slot(net, 0, used, (used + 1) % 8)
    assert torch.equal(net.memories[0].values[used], net.memories[0].values[(used + 1) % 8])
    assert not torch.equal(net.sketch(photos), before)


def test_claims_are_judged_by_their_margins():
    scores = {"grey photo": {"SSIM": 0.3, "L1": 0.7}}
    for seed in range(2):
        for variant, pairs, value, l1 in (
            ("none", 8, 0.60, 0.20),
            ("memory", 8, 0.61, 0.19),
            ("most", 8, 0.604 + 0.002 * seed, 0.18),
            ("none", 32, 0.70, 0.12),
            ("most", 32, 0.71, 0.12),
        ):
            scores[f"{variant}-{pairs}-{seed}"] = {"SSIM": value, "L1": l1}
    found = claims.judge((8, 32), scores, {}, {})
    # gain 0.005 holds, L1 10 % lower holds, the order and the shrinking gain do not, the grey photo is worse
    assert [claim.holds for claim in found] == [True, True, False, False, True]
    assert found[0].measured["gain"] == pytest.approx(0.005)
    assert [claim.id for claim in found] == ["C1", "C2", "C3", "C4", "C5"]


def test_a_run_that_has_not_ended_is_judged_by_what_is_there():
    scores = {f"{name}-8-0": {"SSIM": value, "L1": 0.2} for name, value in (("none", 0.5), ("most", 0.6))}
    for extra in ({}, {"none-32-0": {"SSIM": 0.7, "L1": 0.1}}):
        found = [claim.text for claim in claims.judge((8, 32), scores | extra, {}, {})]
        assert len(found) == 2 and not any("limited data" in text for text in found)
    whole = {f"{name}-32-0": {"SSIM": 0.7, "L1": 0.1} for name in ("none", "most")}
    assert "limited data" in claims.judge((8, 32), scores | whole, {}, {})[2].text


def test_a_curve_has_its_end_at_all_pairs():
    names = ("most-all-0", "most-27-0", "most-27-1", "grey photo", "neighbour patches (241)")
    scores = {name: {"SSIM": 0.5} for name in names}
    assert claims.by_variant(scores, "SSIM", 241) == {("most", 241): [0.5], ("most", 27): [0.5, 0.5]}
    assert claims.by_variant(scores, "SSIM").keys() == {("most", 27)}


def test_learning_rate_is_constant_and_then_falls_to_zero():
    assert [learning_rate(x, 0.5) for x in (0, 0.49, 0.75, 1)] == [1, 1, 0.5, 0]
    assert learning_rate(0.99, 0.0) == 1


def test_plans():
    assert len(plan(PRESETS["study"])) == 3 * (3 * 4 + 3) + 1
    assert [trial.name for trial in plan(PRESETS["paper"])] == ["most-all-0"]
    with pytest.raises(UserError, match="--pairs: procedural faces need a number"):
        plan(replace(PRESETS["demo"], pairs=(0,)))
    for changes, words in (
        ({"size": 16}, "--size 16: .* at least 24 pixels"),
        ({"size": 48, "load": 48}, "--size 48: the U-Net needs a power of two"),
        ({"size": 64}, "--size 64: larger than --load 32"),
        ({"topk": 65}, "--topk 65: the memory has 64 slots"),
        ({"artists": ("outline", "rubens")}, "--artists rubens: there are rules, "),
        ({"artists": ("outline", "outline")}, "--artists outline outline: name each once"),
        ({"variants": (), "extras": ()}, "--variants, --pairs: nothing to train"),
        ({"pairs": ()}, "--variants, --pairs: nothing to train"),
        ({"pairs": (8, 8)}, "none-8-0 would be trained twice"),
        ({"extras": ("unet", "most")}, "most-8-0 would be trained twice"),
        ({"arch": replace(TINY, kernel=4)}, "--arch.kernel 4: give an odd number"),
        ({"arch": replace(TINY, downs=6)}, "--size 32: give a multiple of 64"),
        ({"arch": replace(TINY, dilations=(1, 16))}, "more pixels than --arch.dilations .16"),
        (
            {"arch": replace(TINY, slots=1), "weights": replace(PRESETS["demo"].weights, slot=1)},
            "--weights.slot tells the two best slots apart",
        ),
    ):
        with pytest.raises(UserError, match=words):
            plan(replace(PRESETS["demo"], **changes))


@pytest.mark.parametrize(
    "option, value",
    [("batch", "0"), ("steps", "0"), ("save-every", "0"), ("validate-every", "0"), ("seeds", "0")]
    + [("scale", "0.001"), ("scale", "-1"), ("scale", "nan"), ("holdout", "2"), ("decay", "2"), ("size", "8")]
    + [("pairs", "-1"), ("lr", "0"), ("betas", "1"), ("ema", "1.1"), ("warmup", "-1"), ("topk", "-1")]
    + [("arch.slots", "0"), ("arch.tau", "0"), ("arch.momentum", "1.1"), ("weights.align", "-1")]
    + [("alignment.eye-points", "-1")],
)
def test_settings_out_of_their_range_are_named(option, value):
    values = [value] * (2 if option in ("betas", "alignment.eye-points") else 1)
    with pytest.raises(UserError, match=f"--{option} {value}.*: give"):
        parse_presets(PRESETS, "", ["demo", f"--{option}", *values])


def test_two_processes_write_one_memory(tmp_path):
    settings = ["demo", *helpers.TINY["most_net"], "--steps", "6", "--batch", "4"]
    settings += ["--weights.adversarial", "1"]
    one, two = run_one(train, PRESETS, tmp_path, *settings), run_two("most_net", tmp_path, *settings)
    assert_same_curves(one, two, lines=1)  # of the sixth step, which the five before led to
    state = load_file(two / "checkpoint/most-4-0.safetensors")
    assert state["memories.0.usage"].sum() == 6 * 4 * 256  # steps * pairs * positions, of both processes
