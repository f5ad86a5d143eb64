"""AnyFace: training, its switches, resume, several processes and evaluation in miniature."""

import csv
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from anyface import bench
from anyface import eval as evaluation
from anyface import train as training
from anyface.bundle import load_model
from anyface.clip import build_clip, image_features
from anyface.data import Cache, build_cache, draw_pairs, open_faces
from anyface.judges import Judge
from anyface.losses import BEHAVIOUR, Behaviour
from anyface.parts import constant, small_clip, small_generator, warm_cosine
from anyface.ranger import Ranger
from anyface.stages import VARIANTS, Constants, Stage, load_constants, make_streams, plan, variant_config
from anyface.train import PRESETS, stream_learner, stream_terms, train
from shared.io import write_image
from shared.runtime import UserError, parse, parse_presets, start

TINY = (*helpers.TINY["anyface"], "--device", "cpu")
script = partial(helpers.script, "anyface")


def tiny(**changes):
    config = replace(
        PRESETS["demo"], train_faces=24, test_faces=12, half_steps=0, generator_steps=1, clip_steps=1,
        judge_steps=1, wide_steps=0, steps=2, batch_size=8, decode_batch=2, log_every=1,
        checkpoint_every=100, sample_every=100, variants=("full",), device="cpu",
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def constants() -> Constants:
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    found = Constants(clip, tokenizer, small_generator(), judge=Judge())
    for network in (found.clip, found.generator, found.judge):
        network.eval().requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def cache(constants) -> Cache:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(20, 8, 64, generator=rng)
    tokens = constants.tokenizer(["a person with a hat", "a face"] * 20).view(20, 2, -1)
    text, image = torch.randn(20, 2, 64, generator=rng), torch.randn(20, 64, generator=rng)
    return Cache(codes, image, text, np.full(20, 2), codes.mean(0, keepdim=True), tokens)


def terms_and_gradients(constants, cache, words=False, **changes):
    config = replace(tiny(), **changes)
    text, image = make_streams(config, constants, 0)
    batch = draw_pairs(cache, [(i, i) for i in range(8)], 0, 0, "sample")
    if not words:
        batch = {name: rows for name, rows in batch.items() if not name.startswith("tokens")}
    terms = stream_terms(text, image, batch, torch.randn(8, 64), cache, constants, config)
    gradients = {}
    for name, term in terms.items():
        for net in (text, image):
            net.zero_grad(set_to_none=True)
        if term.requires_grad:
            term.backward(retain_graph=True)
        gradients[name] = {
            f"{which}.{part}"
            for which, net in (("text", text), ("image", image))
            for part in ("transformer_encoder", "mapping")
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(net, part).parameters())
        }
    return terms, gradients


TEXT = {"text.transformer_encoder", "text.mapping"}
IMAGE = {"image.transformer_encoder", "image.mapping"}


def test_gradients_reach_what_they_should(constants, cache):
    _, reached = terms_and_gradients(constants, cache)
    assert reached == {
        "dt": TEXT,
        "norm": TEXT,
        "mse": IMAGE,
        "cmd": {"text.transformer_encoder", "image.transformer_encoder"},
        "clip": TEXT,
        "rec": IMAGE,
    }
    for network in (constants.clip, constants.generator):
        assert all(p.grad is None for p in network.parameters())


def test_the_released_trainer_gets_no_gradient_through_the_generator(constants, cache):
    _, reached = terms_and_gradients(constants, cache, behaviour=BEHAVIOUR["official"])
    assert reached["clip"] == reached["rec"] == set()
    assert reached["dt"] == TEXT and reached["mse"] == IMAGE


def test_switches_leave_out_their_terms(constants, cache):
    def names(**changes):
        return set(terms_and_gradients(constants, cache, **changes)[0])

    everything = {"dt", "norm", "mse", "cmd", "clip", "rec"}
    assert names() == everything
    assert names(dt=False) == everything - {"dt", "norm"} | {"text_mse"}
    assert names(cmd=False) == everything - {"cmd"}
    assert names(clip_loss=False) == everything - {"clip"}
    assert names(one_stream=True) == {"dt", "norm", "clip"}
    assert names(lambda_rec=0.0) == everything - {"rec"}


def test_weights_scale_their_terms_alone(constants, cache):
    every = {"clip_loss": True, "one_stream": False}
    plain, _ = terms_and_gradients(constants, cache, **every)
    for field, name in (("dt", "dt"), ("mse", "mse"), ("cmd", "cmd"), ("clip", "clip"), ("rec", "rec")):
        twice = {f"lambda_{field}": 2 * getattr(tiny(), f"lambda_{field}")}
        terms, _ = terms_and_gradients(constants, cache, **every, **twice)
        assert terms.keys() == plain.keys()
        for key, value in plain.items():
            assert torch.allclose(terms[key], value * (2 if key == name else 1), rtol=1e-4), (field, key)
    heavy = replace(tiny().behaviour, norm_weight=0.5)
    terms, _ = terms_and_gradients(constants, cache, behaviour=heavy)
    assert torch.allclose(terms["norm"], plain["norm"] * 5, rtol=1e-4)


def test_the_image_stream_reads_the_picture_of_a_caption_again(constants, cache):
    terms, reached = terms_and_gradients(constants, cache, lambda_cycle=0.5)
    assert reached["cycle"] == TEXT | IMAGE
    text, image = make_streams(tiny(), constants, 0)
    batch = draw_pairs(cache, [(i, i) for i in range(8)], 0, 0, "sample")
    w_t = text(batch["f_t"][:2])[0]
    again = image(image_features(constants.clip, constants.generator.synthesis(w_t)))[0]
    assert torch.allclose(terms["cycle"], 0.5 * (w_t - again).abs().mean(), rtol=1e-4)
    alone, _ = terms_and_gradients(constants, cache, lambda_cycle=0.5, one_stream=True)
    assert "cycle" not in alone


def test_the_identity_of_the_captions_picture_is_that_of_the_face(constants, cache):
    class Embedder(torch.nn.Module):
        def embed(self, pictures):
            return pictures.flatten(1)

    known = replace(constants, identity=Embedder())
    terms, reached = terms_and_gradients(known, cache, lambda_id=0.5, noise_layers=0)
    assert reached["id"] == TEXT
    text, _ = make_streams(tiny(), constants, 0)
    batch = draw_pairs(cache, [(i, i) for i in range(8)], 0, 0, "sample")
    codes = (text(batch["f_t"][:2])[0], batch["w"][:2])
    cosine = torch.cosine_similarity(*(constants.generator.synthesis(w).flatten(1) for w in codes))
    assert torch.allclose(terms["id"], 0.5 * (1 - cosine.mean()), rtol=1e-4)


def test_the_layers_of_noise_are_those_asked_for(constants, cache):
    clip = [terms_and_gradients(constants, cache, noise_layers=m)[0]["clip"].item() for m in (0, 4, 8)]
    assert len(set(clip)) == 3
    with pytest.raises(UserError, match="--noise-layers 9: the generator has 8 layers"):
        stream_learner(Stage("full", 0, 2), tiny(noise_layers=9), Accelerator(cpu=True), cache, constants, 0)


@pytest.mark.parametrize("schedule, used", [("constant", constant), ("cosine", warm_cosine)])
def test_mapping_and_transformers_have_their_rates_and_the_schedule(constants, cache, schedule, used):
    config = tiny(lr=0.3, lr_transformer=0.002, schedule=schedule)
    learner = stream_learner(Stage("full", 0, 2), config, Accelerator(cpu=True), cache, constants, 0)
    assert learner.schedule is used
    rates = {id(p): group["lr"] for group in learner.optimiser.param_groups for p in group["params"]}
    for net in learner.models.values():
        assert {rates.pop(id(p)) for p in net.mapping.parameters()} == {0.3}
        assert {rates.pop(id(p)) for p in net.transformer_encoder.parameters()} == {0.002}
    assert not rates


def test_training_captions_are_in_the_wordings_for_training(constants):
    """What the claim about free style rests on."""
    faces = open_faces(tiny(), "train", constants.generator)
    trained = {caption for own in faces.captions for caption in own}
    assert trained.isdisjoint(caption for own in faces.unseen for caption in own)


@pytest.mark.parametrize(
    "given",
    [
        "--seeds 0", "--log-every 0", "--checkpoint-every 0", "--sample-every 0", "--batch-size 0", "--lr 0",
        "--train-faces 0", "--test-faces 0", "--noise-layers -1", "--lambda-cmd -1", "--steps -1",
        "--decode-batch 0", "--lr-transformer nan",
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(given):
    with pytest.raises(UserError, match=f"^{given.split()[0]} "):
        parse_presets(PRESETS, "", ["demo", *given.split()])


@pytest.mark.parametrize("given", ["--compared 1", "--psi nan", "--study -2", "--optimise-steps -1"])
def test_measurements_out_of_range_are_named(given):
    with pytest.raises(UserError, match=f"^{given.split()[0]} "):
        parse(evaluation.EvalConfig, "", given.split())


def test_files_for_the_evaluation_are_opened_before_it_begins(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "build_cache", None)  # the first long computation
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"of": torch.zeros(1)}, tmp_path / "other.pt")
    for option in ("fid_weights", "lightcnn_weights", "identity_weights", "lpips_weights", "second_clip"):
        for name in ("text.pt", "other.pt"):
            with pytest.raises(UserError, match=name):
                evaluation.main(evaluation.EvalConfig(run=run_folder, **{option: tmp_path / name}))


def test_no_picture_is_decoded_where_no_loss_needs_one(constants, cache, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(constants.generator, "synthesis", refuse)
    monkeypatch.setattr(constants.clip, "encode_image", refuse)
    terms, _ = terms_and_gradients(constants, cache, clip_loss=False, lambda_rec=0.0)
    assert set(terms) == {"dt", "norm", "mse", "cmd"}
    with pytest.raises(AssertionError, match="decoded"):
        terms_and_gradients(constants, cache, lambda_rec=0.0)


def test_the_official_optimiser_leaves_the_transformers_as_they_were(constants, cache):
    for name, trained in (("paper", True), ("official", False)):
        config = tiny(optimiser="ranger", lr=0.5, behaviour=BEHAVIOUR[name])
        learner = stream_learner(plan(config)[-1], config, start(config), cache, constants, 0)
        assert isinstance(learner.optimiser, Ranger)
        before = {k: v.clone() for k, v in learner.models["text"].state_dict().items()}
        for step in range(2):
            learner.optimiser.zero_grad()
            sum(learner.terms(step).values()).backward()
            learner.optimiser.step()
        after = learner.models["text"].state_dict()
        moved = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
        assert moved == ({"transformer_encoder", "mapping"} if trained else {"mapping"})


def test_variants_change_what_they_name():
    for name in VARIANTS:
        config = variant_config(PRESETS["study"], name)
        assert (config == PRESETS["study"]) == (name == "full")
    assert variant_config(PRESETS["study"], "released").behaviour == BEHAVIOUR["official"]
    assert PRESETS["official"].behaviour == BEHAVIOUR["official"]
    assert PRESETS["paper"].behaviour == Behaviour()
    paper = PRESETS["paper"]
    assert (paper.optimiser, paper.lr, paper.batch_size, paper.steps) == ("ranger", 0.5, 8, 20_000)
    assert (paper.lambda_dt, paper.lambda_cmd, paper.lambda_clip, paper.noise_layers) == (10, 0.5, 1, 4)
    with pytest.raises(UserError, match="unknown variant"):
        plan(replace(PRESETS["demo"], variants=("fll",)))


def test_a_variant_of_the_pictures_normalisation_changes_the_image_features_too(tmp_path, monkeypatch):
    seen = {}

    def learner(stage, config, accelerator, cache, *rest):
        seen[stage.name] = cache.image
        return stream_learner(stage, config, accelerator, cache, *rest)

    monkeypatch.setattr(training, "stream_learner", learner)
    config = tiny(out=tmp_path / "run", variants=("full", "clip-official", "no-cmd"), steps=1)
    folder = train(config)
    assert torch.equal(seen["full"], seen["no-cmd"])
    assert not torch.allclose(seen["full"], seen["clip-official"], atol=1e-3)
    evaluation.main(evaluation.EvalConfig(run=folder, compared=4, optimise_steps=0, device="cpu"))
    effects = json.loads((folder / "results.json").read_text())["effects"]
    assert set(effects) == {"full", "clip-official", "no-cmd"}


def test_a_second_clip_reads_captions_in_its_own_tokens(tmp_path, constants, cache):
    torch.manual_seed(0)
    second = build_clip(64, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    torch.save(second.state_dict(), tmp_path / "second.pt")
    settings = evaluation.EvalConfig(second_clip=tmp_path / "second.pt")
    config = tiny()
    networks = evaluation.make_networks(settings, config, constants, torch.device("cpu"))
    faces = open_faces(replace(config, test_faces=6), "test", constants.generator)
    known = (constants.clip, constants.tokenizer, constants.generator, "correct", torch.device("cpu"))
    test = (faces, build_cache(faces, *known))
    said = evaluation.caption_features(*test, networks, 6)
    methods = {
        "a": lambda index: faces.picture(index, 32),
        "b": lambda index: torch.zeros(len(index), 3, 32, 32),
    }
    rows = evaluation.compare(methods, faces, said, networks, None)
    (metric,) = [
        m for m in evaluation.to_metrics(rows, "", "") if m.metric.endswith("second CLIP") and m.method == "a"
    ]
    assert metric.unit == "%" and 0 <= metric.value <= 100


def test_an_identity_loss_needs_its_network():
    with pytest.raises(UserError, match="--identity-weights"):
        load_constants(tiny(lambda_id=0.1, generator_steps=0, clip_steps=0, judge_steps=0), Path(), "cpu")


# --- runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    variants = ("--variants", "full", "no-dt", "no-cmd", "words")
    done = script("train.py", "demo", *TINY, *variants, "--out", str(folder), fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(folder)
    return folder


def test_training_leaves_the_run_folder_described(run_folder):
    trained = {path.stem for path in (run_folder / "trained").iterdir()}
    streams = {f"{v}-0-{s}" for v in ("full", "no-dt", "no-cmd", "words") for s in ("text", "image")}
    assert trained == {"half", "clip", "generator", "judge", "wide"} | streams
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 + 3 + 3 + 2 + 1 + 4 * 4
    assert any("no-dt/0/text_mse" in row for row in log) and not any("no-cmd/0/cmd" in row for row in log)
    with Image.open(run_folder / "samples" / "full-0.png") as picture:
        assert picture.text["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    model = load_model(run_folder)
    codes = model.codes(["a person with a hat", ""])
    assert codes.shape == (2, 8, 64) and model.paint(codes).shape == (2, 3, 64, 64)
    kept = load_file(run_folder / "trained" / "full-0-text.safetensors")
    assert torch.equal(model.text.state_dict()["mapping.0.weight"], kept["mapping.0.weight"])


def test_evaluation_prints_claims_and_writes_results(run_folder):
    held = run_folder.parent / "rows.csv"
    held.write_text("method,dataset,metric,value,protocol\nX,CelebA-HQ,FID,50.5,a table I hold\n")
    done = script(
        "eval.py", "--run", str(run_folder), "--device", "cpu", "--optimise-steps", "2", "--study", "2",
        "--rows", str(held), fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "50.5   a table I hold" in done.stdout
    assert re.search("TediGAN .* FID +106.4 +TediGAN paper's protocol, 256 px", done.stdout)
    assert done.stdout.strip().splitlines()[-1] == str(run_folder)
    assert "claims:" in done.stdout and "no row here is a result of AnyFace" in done.stdout
    results = json.loads((run_folder / "results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == [f"C{i}" for i in range(1, 10)]
    assert not any(metric["comparable"] for metric in results["metrics"])
    methods = {metric["method"] for metric in results["metrics"]}
    assert methods >= {
        "full",
        "no-dt",
        "words",
        "nearest training caption",
        "latent optimisation",
        "mean face",
    }
    shares = [m["value"] for m in results["metrics"] if m["metric"].startswith("RFRR")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    names = {metric["metric"] for metric in results["metrics"]}
    assert "frechet_judge" in names and not names & {"FID", "LPIPS"}
    for name in ("captions", "captions-64", "editing", "unseen", "build-up"):
        assert (run_folder / "samples" / f"test-{name}.png").is_file()
    key = (run_folder / "study" / "key.csv").read_text().splitlines()[1:]
    ranked = {"full", "full, noise", "no-dt", "no-cmd", "words", "latent optimisation"}
    assert {row["method"] for row in csv.DictReader(["question,position,method", *key])} == ranked


def run_here(*arguments: str) -> Path:
    """train.py with these arguments, in this process."""
    return train(parse_presets(PRESETS, "", list(arguments)))


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path, one_thread):
    arguments = ["demo", *TINY, "--wide-steps", "0", "--steps", "16", "--variants", "full"]
    run_here(*arguments, "--out", str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    # In the middle of the streams.
    middle = partial(helpers.has_logged, killed, 8)
    helpers.kill_when(middle, "anyface", *arguments, "--out", killed)
    run_here(*arguments, "--out", str(killed))
    helpers.assert_same_runs(killed, tmp_path / "whole")


def test_two_processes_learn_what_one_does(tmp_path, one_thread):
    arguments = ["demo", *TINY, "--wide-steps", "0", "--decode-batch", "None", "--variants", "full"]
    run_here(*arguments, "--out", str(tmp_path / "one"))
    script("train.py", *arguments, "--out", tmp_path / "two", fresh=True, two=True, code=0)
    for path in sorted((tmp_path / "one" / "trained").iterdir()):
        a, b = load_file(path), load_file(tmp_path / "two" / "trained" / path.name)
        for key in a:
            x, y = a[key], b[key]
            if ".self_attn.in_proj" in key and path.stem.startswith("full"):
                # A sequence of one needs no queries and keys: Adam enlarges their gradients' rounding.
                x, y = x.chunk(3)[2], y.chunk(3)[2]
            assert torch.allclose(x, y, atol=3e-4), f"{path.name} {key}"


def test_every_variant_trains(tmp_path):
    config = tiny(out=tmp_path / "run", variants=tuple(VARIANTS), steps=1, decode_batch=2)
    folder = train(config)
    log = (folder / "log.jsonl").read_text()
    assert all(f'"{name}/0/' in log for name in VARIANTS)
    assert "NaN" not in log and "Infinity" not in log


def test_the_paper_preset_runs_on_a_public_layout_with_files_of_weights(tmp_path):
    root = tmp_path / "set"
    for part, count in (("train", 9), ("test", 4)):
        (root / "data" / f"{part}_caps").mkdir(parents=True)
        for i in range(count):
            number = i + 20 * (part == "test")
            lines = "\n".join(f"caption {k} of face {number}, smiling" for k in range(10))
            (root / "data" / f"{part}_caps" / f"{number}.txt").write_text(lines)
            write_image(root / "images" / f"{number}.jpg", torch.rand(3, 16, 16))
    torch.manual_seed(0)
    generator = small_generator()
    clip = build_clip(64, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    torch.save(torch.randn(24, 8, 64), root / "latents.pt")
    torch.save({"g_ema": generator.state_dict(), "latent_avg": torch.zeros(64)}, tmp_path / "g.pt")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    config = replace(
        PRESETS["paper"], data_root=root, generator_weights=tmp_path / "g.pt", out=tmp_path / "run",
        clip_weights=tmp_path / "clip.pt", steps=2, batch_size=4, log_every=1, device="cpu",
    )  # fmt: skip
    folder = train(config)
    model = load_model(folder)
    assert model.codes(["any words at all"]).shape == (1, 8, 64)
    assert not (folder / "model" / "clip.safetensors").exists()  # named by its path instead of copied
    evaluation.main(evaluation.EvalConfig(run=folder, optimise_steps=1, device="cpu"))
    results = json.loads((folder / "results.json").read_text())
    assert not results["claims"] and {m["metric"] for m in results["metrics"]} >= {
        "frechet_clip",
        "L1 to truth",
    }
    assert not any(m["metric"].startswith("RFRR") for m in results["metrics"])  # no face network was given


def test_user_mistakes_are_messages(tmp_path):
    with pytest.raises(UserError, match="--clip-weights .*ViT-B-32.pt"):
        train(replace(PRESETS["paper"], data_root=tmp_path, out=tmp_path / "paper", device="cpu"))
    assert not (tmp_path / "paper").exists()  # it would be the newest run, for eval.py and predict.py
    with pytest.raises(UserError, match="not a run folder"):
        evaluation.main(evaluation.EvalConfig(run=tmp_path / "none"))
    done = script("train.py", "demo", *TINY, "--variants", "fll", "--out", str(tmp_path / "demo"))
    assert done.returncode == 2 and done.stderr.startswith("error: unknown variant"), done.stderr


@pytest.mark.slow
def test_the_demo_shows_the_claims(tmp_path):
    done = script("train.py", "demo", "--out", str(tmp_path / "run"), timeout=None)
    assert done.returncode == 0, done.stderr
    assert script("eval.py", "--run", str(tmp_path / "run")).returncode == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    failed = [claim["text"] for claim in results["claims"] if not claim["holds"]]
    assert not failed


def test_bench_says_where_the_time_goes():
    sizes = {"size": 16, "style_dim": 64, "n_mlp": 1, "channels": {4: 64, 8: 64, 16: 64}}
    for form, generator in bench.both_forms(**sizes).items():
        codes = bench.some_codes(generator, 8, torch.device("cpu"))
        total, shares = bench.where_time_goes(
            lambda g=generator, c=codes: bench.picture(g.synthesis, c, nullcontext)
        )
        assert total > 0 and sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0, f"{form}: none of the three goes unseen"


def test_bench_steps_train_both_streams_through_either_form():
    tiny_generator = {"size": 32, "style_dim": 64, "n_mlp": 3, "lr_mlp": 1.0, "channels": bench.CHANNELS}
    clip = small_clip()[0].requires_grad_(False)
    forms = {name: Constants(clip, None, g) for name, g in bench.both_forms(**tiny_generator).items()}
    steps = bench.training_steps(PRESETS["demo"], forms, 8, torch.device("cpu"), nullcontext)
    fast, grouped = (bench.count_macs(steps[form], training=True) for form in ("fast", "grouped"))
    # Per face: 83 million, 16 a value for the filter's single pass. Grouped weights depend on the sample, so
    # they ask for a gradient too.
    assert fast / 8 == pytest.approx(83.4e6, rel=0.01)
    assert grouped > fast
