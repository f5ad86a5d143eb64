"""MDRNets: settings, training, resume and several processes in miniature; claims and their margins."""

import json
from dataclasses import replace
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdrnets import app, bench, memory_view, predict
from mdrnets import eval as evaluation
from mdrnets import train as training
from mdrnets.claims import copy_claim, make_claims
from mdrnets.objective import coarse_losses
from mdrnets.stages import TABLE_A, VARIANTS, build, plan
from mdrnets.train import PRESETS, train
from shared.io import write_image
from shared.runtime import UserError, parse, parse_presets

TINY = (*helpers.TINY["mdrnets"], "--device", "cpu")
script = partial(helpers.script, "mdrnets")


def tiny(**changes):
    one = {"data": ("simple",), "variants": ("full",), "copy_steps": 0, "unet": False, "sample_every": 100}
    return replace(parse_presets(PRESETS, "", ["demo", *TINY]), **one | changes)


def test_every_form_of_the_memory_trains_in_bf16_and_logs_in_fp32(tmp_path):
    forms = ("full+inco2", "full-hard", "full-ema", "full-shrink")
    options = "--data simple --no-unet --copy-steps 0 --image-size 32 --log-every 1 --precision bf16 "
    options += "--adversarial 0.1 --perceptual 0.05 --style 120 --tv 0.1 --features random "
    options += "--coarse-steps 2 --refine-steps 2"  # some processors only emulate bf16
    # In a process of its own: the precision of one is decided once.
    arguments = [*TINY, *options.split(), "--variants", *forms, "--out", str(tmp_path / "run")]
    script("train.py", "demo", *arguments, code=0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [(name, value) for line in lines for name, value in line.items() if name != "step"]
    assert {name.split("/")[1] for name, _ in logged} == {"coarse", *forms}
    assert np.isfinite([value for _, value in logged]).all()
    values = torch.tensor([value for name, value in logged if name.endswith("/perceptual")])
    assert not torch.equal(values, values.bfloat16().float())  # bf16 has too few digits for sums


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    arguments = ["demo", *TINY, "--data", "simple", "--variants", "full", "disentangled-ema", "--no-unet"]
    arguments += ["--coarse-steps", "60", "--refine-steps", "60", "--copy-steps", "0"]
    # In the second of three stages.
    helpers.assert_resumes("mdrnets", tmp_path, 45, *arguments)


def test_two_processes_learn_what_one_does(tmp_path):
    arguments = ["demo", *TINY, "--data", "simple", "--variants", "full", "disentangled-ema", "--no-unet"]
    arguments += ["--copy-steps", "0", "--no-flip"]
    assert script("train.py", *arguments, "--out", str(tmp_path / "one")).returncode == 0
    script("train.py", *arguments, "--out", tmp_path / "two", fresh=True, two=True, code=0)
    for path in sorted((tmp_path / "one" / "trained").iterdir()):
        a, b = load_file(path), load_file(tmp_path / "two" / "trained" / path.name)
        for key in a:
            if ".face_space." not in key:  # principal axes, whose signs are arbitrary
                assert torch.allclose(a[key].float(), b[key].float(), atol=2e-4), f"{path.name} {key}"


def test_adversarial_training_with_all_terms_and_an_average(tmp_path, capsys):
    config = tiny(
        out=tmp_path / "run", image_size=32, features="random", perceptual=0.05, style=120.0, tv=0.1,
        adversarial=0.1, joint_from=2, average=0.9, last_steps=2, lr_last=1e-4, variants=("full+inco2",),
    )  # fmt: skip
    folder = train(config)
    said = capsys.readouterr().out
    assert "simple/full+inco2/0: features of the losses: a fixed random network" in said
    assert said.count("% of the first batch") == 1
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = {name.rsplit("/", 1)[1] for name in log[-1] if name != "step"}
    terms = {
        "valid",
        "hole",
        "tv",
        "perceptual",
        "style",
        "adversarial",
        "inter",
        "intra",
        "critic",
        "coarse",
    }
    assert last == terms
    before = load_file(folder / "trained" / "simple-coarse-0.safetensors")
    after = load_file(folder / "trained" / "simple-full+inco2-0.safetensors")
    assert not torch.equal(before["coarse.decoder.last.weight"], after["coarse.decoder.last.weight"])


def test_a_coarse_network_at_rest_does_not_move(tmp_path):
    folder = train(tiny(out=tmp_path / "run"))
    before, after = (load_file(folder / "trained" / f"simple-{n}-0.safetensors") for n in ("coarse", "full"))
    for key in before:
        if key.startswith(("coarse.", "parser.body")):
            assert torch.equal(before[key], after[key]), key


def test_rates_and_rest_follow_the_schedule(tmp_path, monkeypatch):
    rates, last_biases = [], []

    def watched(optimiser, loss, learning, processes):
        rates.append(optimiser.param_groups[0]["lr"])
        last_biases.append(learning[-1].detach().clone())
        update(optimiser, loss, learning, processes)

    update = training.update
    monkeypatch.setattr(training, "update", watched)
    schedule = {"lr": 1e-3, "lr_last": 1e-4, "last_steps": 1, "lr_ratio": 0.2, "joint_from": 2}
    folder = train(tiny(out=tmp_path / "run", image_size=32, adversarial=0.1, **schedule))
    # Six steps of the coarse stage; then four of the generator and the discriminator in turn.
    assert rates == pytest.approx([1e-3] * 6 + [1e-3, 2e-4] * 3 + [1e-4, 2e-5])
    end = load_file(folder / "trained" / "simple-full-0.safetensors")["coarse.decoder.last.bias"]
    of_coarse = [*last_biases[6::2], end]
    moved = [not torch.equal(a, b) for a, b in zip(of_coarse, of_coarse[1:], strict=False)]
    assert moved == [False, False, True, True]


def test_written_memory_is_first_written_alone_and_then_every_so_often(tmp_path, monkeypatch):
    reads, writes = [], []

    def watched(net, batch, config, phi, critic, inco, read, generator):
        reads.append(read)
        return refine_losses(net, batch, config, phi, critic, inco, read, generator)

    refine_losses, write_memory = training.refine_losses, training.write_memory
    monkeypatch.setattr(training, "refine_losses", watched)
    monkeypatch.setattr(
        training, "write_memory", lambda *a: writes.append(len(reads) - 1) or write_memory(*a)
    )
    schedule = {"memory_warmup": 3, "write_every": 2, "refine_steps": 5}
    train(tiny(out=tmp_path / "a", variants=("full-ema",), **schedule))
    assert reads == [False, False, False, True, True] and writes == [0, 2, 4]
    reads.clear()
    train(tiny(out=tmp_path / "b", **schedule))  # `grad` has nothing to write: it reads from the first step
    assert reads == [True] * 5 and writes == [0, 2, 4]


def test_the_average_is_what_is_kept(tmp_path):
    kept = {}
    for decay in (0.0, 0.75):
        folder = train(tiny(out=tmp_path / f"{decay}", average=decay, refine_steps=1))
        kept[decay] = load_file(folder / "trained" / "simple-full-0.safetensors")
    coarse = load_file(tmp_path / "0.0" / "trained" / "simple-coarse-0.safetensors")
    slower = load_file(tmp_path / "0.75" / "trained" / "simple-coarse-0.safetensors")
    assert not torch.equal(coarse["coarse.decoder.last.weight"], slower["coarse.decoder.last.weight"])
    torch.manual_seed(0)
    start = build(tiny(), "full", 6).state_dict()
    for key in ("refine.decoder.last.weight", "refine.dmm.memory"):  # one step: a quarter of the way
        whole, part = (kept[decay][key] - start[key] for decay in (0.0, 0.75))
        assert whole.abs().max() > 1e-4 and part.norm() < 0.5 * whole.norm(), key


def test_the_tiny_parser_learns_from_labels_and_leaves_the_coarse_network_alone():
    torch.manual_seed(0)
    net = build(tiny(), "coarse", 6)
    x, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
    mask[..., 4:9, 3:12] = 1
    parts = torch.arange(4).repeat_interleave(4).expand(2, 16, 16)  # every cell holds one part alone
    terms = coarse_losses(net, {"image": x, "mask": mask, "parts": parts}, tiny(parsing=0.5))
    assert terms.keys() == {"valid", "hole", "parsing"}
    with torch.no_grad():
        shown = torch.where(mask > 0.5, net.coarse(x * (1 - mask), mask), x)
        chance = net.parser.logits(shown).log_softmax(1).gather(1, parts[:, None, ::2, ::2])
    assert terms["parsing"].item() == pytest.approx(-0.5 * chance.mean().item(), rel=1e-4)
    terms["parsing"].backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parser.body.parameters())
    assert all(p.grad is None for p in net.coarse.parameters())


def test_presets_and_plans():
    assert PRESETS["table-a"].variants == TABLE_A
    assert set(PRESETS["study"].variants) == set(VARIANTS)
    names = [stage.label for stage in plan(tiny(seeds=2, variants=("none",)))]
    assert names == ["simple/coarse/0", "simple/none/0", "simple/coarse/1", "simple/none/1"]
    for changes, words in (
        ({"variants": ("nothing",)}, "unknown variant"),
        ({"parser": "bisenet"}, "simple faces have parts of their own: use --parser tiny"),
        ({"image_size": 17}, "--image-size 17: networks of --size unit need a multiple of 2"),
        ({"unet": True, "image_size": 20}, "--image-size 20: the U-Net needs a multiple of 8"),
        ({"adversarial": 0.1}, "--image-size 16: the discriminator needs at least 24"),
        ({"mask_ratio": (0.6, 0.1)}, "--mask-ratio 0.6 0.1: give the smaller share first"),
        ({"mask_ratio": (0.0, 0.0)}, "--mask-ratio 0 0"),
        ({"part_labels": ((0, 1), (2,))}, "part_labels .* trained with other facial parts"),
        ({"lr_last": 1e-4, "last_steps": 4}, "--last-steps 4: all --refine-steps 4 would learn at --lr-last"),
    ):
        with pytest.raises(UserError, match=words):
            plan(tiny(**changes))


def test_presets_keep_the_numbers_of_their_setups():
    schedule = {"batch_size": 8, "coarse_steps": 100_000, "refine_steps": 400_000, "joint_from": 20_000}
    schedule |= {"lr": 2e-4, "lr_last": 5e-5, "last_steps": 100_000, "lr_ratio": 0.1, "betas": (0.5, 0.999)}
    weights = {"valid": 1, "hole": 6, "perceptual": 0.05, "style": 120, "tv": 0.1, "adversarial": 0.1}
    weights |= {"inter": 0.1, "intra": 0.1, "inco_samples": 512, "features": "vgg"}
    memory = {"tau": 0.1, "memory_decay": 0.98, "revive_after": 1000, "memory_warmup": 1000}
    paper = schedule | weights | memory | {"image_size": 256, "size": "mdrnet_256", "parser_size": 512}
    small = {"image_size": 32, "train_images": 2000, "test_images": 256, "mask_pool": 1000, "batch_size": 8}
    small |= {"coarse_steps": 1200, "refine_steps": 800, "lr": 1e-3, "lr_last": 1e-3, "copy_steps": 400}
    small |= {"valid": 1, "hole": 6, "parsing": 0.5, "inter": 0.1, "joint_from": None, "adversarial": 0}
    for names, expected in (("paper table-a", paper), ("demo study", small)):
        for name in names.split():
            assert {key: getattr(PRESETS[name], key) for key in expected} == expected, name
    assert PRESETS["study"].seeds == 2


@pytest.mark.parametrize(
    "options,said",
    [
        ("--mask-ratio 10 60", "--mask-ratio 10.0: give a number from 0 to 1"),
        ("--batch-size 0", "--batch-size 0: give 1 or more"),
        ("--log-every 0", "--log-every 0: give 1 or more"),
        ("--checkpoint-every 0", "--checkpoint-every 0"),
        ("--sample-every 0", "--sample-every 0"),
        ("--write-every 0", "--write-every 0"),
        ("--mask-pool 0", "--mask-pool 0"),
        ("--tau 0", "--tau 0.0: give a number above 0"),
        ("--train-images 0", "--train-images 0"),
        ("--image-size 0", "--image-size 0: give 16 or more"),
        ("--seeds 0", "--seeds 0"),
        ("--inco-samples 0", "--inco-samples 0"),
        ("--betas 0.5 1", "--betas 1.0: give a number from 0 to 0.999999"),
        ("--hole -1", "--hole -1.0: give 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(options, said):
    with pytest.raises(UserError, match=said):
        parse_presets(PRESETS, "", ["demo", *options.split()])


@pytest.mark.parametrize(
    "settings,options,said",
    [
        (evaluation.EvalConfig, "--batch-size 0", "--batch-size 0: give 1 or more"),
        (memory_view.ViewConfig, "--slots 0", "--slots 0"),
        (memory_view.ViewConfig, "--patches 0", "--patches 0"),
        (memory_view.ViewConfig, "--patch 0", "--patch 0"),
        (predict.PredictConfig, "f.png --box -1 0 4 4", "--box -1: give 0 or more"),
        (predict.PredictConfig, "f.png --box 0 0 4 0", "--box 0: give 1 or more"),
        (bench.BenchConfig, "--hole 1", "--hole 1.0: give a number from 0.01 to 0.99"),
        (app.AppConfig, "--port 70000", "--port 70000: give a number from 1 to 65535"),
    ],
)
def test_options_of_the_other_scripts_out_of_range_are_named(settings, options, said):
    with pytest.raises(UserError, match=said):
        parse(settings, "", options.split())


def test_a_tiny_parser_needs_labels(tmp_path):
    for i in range(3):
        write_image(tmp_path / "data" / f"{i}.png", torch.rand(3, 16, 16))
    with pytest.raises(UserError, match="--parser tiny learns from labels"):
        train(tiny(data=("folder",), data_root=tmp_path / "data", out=tmp_path / "run"))


def test_user_mistakes_end_with_one_message(tmp_path):
    for arguments, said in (
        (["train.py", "paper", "--data-root", str(tmp_path / "none")], "CelebA-HQ"),
        (["eval.py", "--run", str(tmp_path)], "not a run folder"),
    ):
        done = script(*arguments, *(["--out", str(tmp_path / "o")] if "train.py" in arguments else []))
        assert done.returncode == 2 and done.stderr.count("error:") == 1 and said in done.stderr
        assert "Traceback" not in done.stderr


def test_claims_follow_their_margins():
    psnr = {"coarse": 18.0, "none": 19.0, "shared": 19.0, "disentangled": 19.3, "full": 19.41}
    held = {claim.text: claim.holds for claim in make_claims("x", psnr, None, None, {})}
    assert len(held) == 3 and all(held.values())
    psnr["full"] = 19.35
    assert [claim.holds for claim in make_claims("x", psnr, None, None, {})] == [False, True, True]
    psnr["full+inco2"] = 19.35  # without its gaps there is no claim about InCo2
    assert len(make_claims("x", psnr, None, None, {})) == 3
    gaps = {"full": {"inter": 1.0, "intra": 1.0}, "full+inco2": {"inter": 1.005, "intra": 0.9}}
    assert make_claims("x", psnr, None, None, gaps)[-1].holds
    gaps["full+inco2"]["inter"] = 1.02
    assert not make_claims("x", psnr, None, None, gaps)[-1].holds
    assert copy_claim({"without MREM": 10.0, "with MREM": 8.0}).holds
    assert not copy_claim({"without MREM": 10.0, "with MREM": 8.1}).holds
