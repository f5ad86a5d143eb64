"""PIN: the scripts as a user runs them, resume after a kill, and what they say about mistakes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import helpers
import onnxruntime
import pytest
import torch
from curves import assert_same_curves, furthest_weights, run_one, run_two
from safetensors.torch import load_file

from pin import eval as evaluation
from pin import predict as predict_script
from pin.basis import load_basis
from pin.eval import Options as Evaluation
from pin.eval import evaluate, open_lab
from pin.experiments import LEVEL, classical_defenses, craft
from pin.export import Options as Export
from pin.export import export
from pin.figures import eigenface_picture, picture_row
from pin.immune import identity_cost
from pin.predict import Options as Purify
from pin.predict import load_defense, predict
from pin.recognizers import OnnxRecognizer
from pin.train import PRESETS, Config, train
from shared.io import load_config, write_image
from shared.onnxfile import write_onnx
from shared.runtime import UserError, parse_presets

TINY = helpers.TINY["pin"]


def script(name: str, *arguments: object, check: int = 0, fresh: bool = False) -> str:
    done = helpers.script("pin", f"{name}.py", *arguments, code=check, fresh=fresh)
    return done.stdout if check == 0 else done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pin") / "run"
    printed = script("train", "demo", *TINY, "--out", out, fresh=True)
    assert printed.splitlines()[-1] == str(out)
    return out


def test_a_trained_run_is_skipped_stage_by_stage(run):
    before = {path.name: path.read_bytes() for path in (run / "checkpoint").glob("*.safetensors")}
    script("train", "demo", *TINY, "--out", run)
    after = {path.name: path.read_bytes() for path in (run / "checkpoint").glob("*.safetensors")}
    assert before == after and "esn-distill.safetensors" in after


def test_stages_of_no_steps_leave_networks_as_they_begin(tmp_path):
    options = [*TINY]
    for stage in ("--dae-steps", "--esn-steps"):
        options[options.index(stage) + 1] = "0"
    out = tmp_path / "untrained"
    script("train", "demo", *options, "--variants", "pin", "--recognizers", "--out", out)
    assert (out / "checkpoint" / "esn-pin.safetensors").is_file()


def test_a_killed_run_ends_the_same(run, tmp_path):
    out = tmp_path / "killed"

    def last_network() -> bool:
        return helpers.has_logged(out, 1) and "esn-pin" in (out / "log.jsonl").read_text()

    helpers.kill_when(last_network, "pin", "demo", *TINY, "--out", out)
    script("train", "demo", *TINY, "--out", out)
    helpers.assert_same_runs(out, run)


def test_evaluation_and_results(run):
    printed = script("eval", "--run", run, "--pairs", "10", "--repeats", "1", "--queries", "5", fresh=True)
    assert printed.splitlines()[-1] == str(run)
    results = json.loads((run / "results.json").read_text())
    assert [claim["id"][:2] for claim in results["claims"]] == [f"C{i}" for i in range(1, 9)]
    assert not any(metric["comparable"] for metric in results["metrics"])
    for picture in ("purified", "eigenfaces", "probabilities", "trade-off"):
        assert (run / "samples" / f"{picture}.png").stat().st_size > 0
    assert helpers.is_marked(run / "samples/purified.png") and helpers.is_marked(run / "samples/esn-pin.png")


def test_public_pairs_are_attacked_as_the_authors_do_and_judge_no_claim(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in "ABCD":
        for number in (1, 2):
            write_image(tmp_path / f"lfw/{name}/{name}_{number:04d}.jpg", torch.rand(1, 24, 24))
    same = "".join(f"{name} 1 2\n" for name in "ABCD")
    different = "".join(f"{one} 1 {two} 1\n" for one, two in ("AB", "BC", "CD", "DA"))
    (tmp_path / "lfw/pairs.txt").write_text(f"4\n{same}{different}")
    made = []

    def small(name, path):
        made.append((name, path.name))
        torch.manual_seed(len(made))
        return torch.nn.Sequential(torch.nn.AvgPool2d(14), torch.nn.Flatten(), torch.nn.Linear(192, 16))

    monkeypatch.setattr(evaluation, "load_official", small)
    options = Evaluation(
        run=folder,
        lfw=tmp_path / "lfw",
        recognizer=Path("a.pth"),
        surrogate=Path("b.pth"),
        repeats=1,
        queries=5,
        device="cpu",
    )
    evaluate(options)
    assert made == [("arcface_ir_se50", "a.pth"), ("arcface_ir50", "b.pth")]
    results = json.loads((folder / "results.json").read_text())
    assert results["claims"] == []
    rows = {(metric["table"], metric["setting"]) for metric in results["metrics"]}
    for attack in ("FGSM", "PGD", "MI-FGSM", "DeepFool"):
        assert ("defences", f"{attack} 0.04") in rows
    assert ("defences", "PGD 0.04 from a surrogate") in rows and ("second recogniser", "PGD 0.04") in rows
    assert not any(" 8" in setting or " 16" in setting for _, setting in rows)
    sizes = {
        metric["setting"]: metric["value"]
        for metric in results["metrics"]
        if metric["setting"].startswith("size of") and metric["metric"] == "max"
    }
    assert len(sizes) == 4 and all(0.01 < size <= 0.04 + 1e-6 for size in sizes.values())
    assert sizes["size of PGD 0.04"] > 0.039
    printed = capsys.readouterr().out
    assert "claims:" not in printed and "TAR at FAR 1e-03 is left out" in printed
    assert not any("TAR" in metric["metric"] for metric in results["metrics"])
    (tmp_path / "lfw/pairs.txt").write_text("1\nA 1 2\nA 1 B 1\n")
    with pytest.raises(UserError, match="1 pairs of the same person and 1 of two people in 1 folds"):
        evaluate(options)
    for changes, message in (
        ({"bin": tmp_path / "x.bin"}, "--lfw and --bin are two sets"),
        ({"lfw": None, "landmarks": tmp_path / "list.txt"}, "--landmarks belong to --lfw"),
        ({"lfw": None, "pair_list": tmp_path / "list.txt"}, "--landmarks belong to --lfw"),
        ({"recognizer": None, "surrogate": None, "legacy": True}, "--legacy is about official weights"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(replace(options, **changes))


def test_prediction(run, tmp_path):
    for number in range(2):
        write_image(tmp_path / "faces" / f"{number}.png", torch.rand(3, 20, 24))
    script("predict", "--run", run, "--images", tmp_path / "faces", "--output", tmp_path / "out")
    scores = json.loads((tmp_path / "out/scores.json").read_text())["images"]
    assert len(scores) == 2 and set(scores[0]) == {"image", "purified", "distance", "kept", "cosine_distance"}
    assert helpers.is_marked(tmp_path / "out/rows.png") and helpers.is_marked(tmp_path / "out/0.png")
    assert (tmp_path / "out/scores.csv").read_text().count("\n") == 3


def test_clean_pictures_are_aligned_like_the_attacked_ones(run, tmp_path, monkeypatch):
    image = torch.rand(3, 40, 30)
    for folder in ("faces", "clean"):
        write_image(tmp_path / folder / "a.png", image)
    (tmp_path / "list.txt").write_text("a.png 8 12 20 11 15 19 9 27 19 26\n")
    seen = []
    whole = predict_script.picture_row
    monkeypatch.setattr(predict_script, "picture_row", lambda *parts: seen.append(parts) or whole(*parts))
    options = {"output": tmp_path / "out", "run": run, "device": "cpu", "landmarks": tmp_path / "list.txt"}
    predict(Purify(images=(tmp_path / "faces",), clean=tmp_path / "clean", **options))
    _, clean, attacked, *_ = seen[0]
    assert torch.equal(clean, attacked)


@pytest.mark.parametrize("options", [{"mode": "topk"}, {"k": 5}])
def test_top_k_and_its_k_belong_together(run, options):
    with pytest.raises(UserError, match="--mode topk and --k"):
        load_defense(Purify(images=(), run=run, **options), torch.device("cpu"))


def test_no_more_eigenfaces_are_kept_than_there_are(run):
    with pytest.raises(UserError, match="--k 21: the basis holds 20 eigenfaces"):
        load_defense(Purify(images=(), run=run, mode="topk", k=21), torch.device("cpu"))


def test_large_folders_are_scored_whole_and_shown_in_part(run, tmp_path, monkeypatch):
    for number in range(7):
        write_image(tmp_path / "faces" / f"{number}.png", torch.rand(3, 16, 16))
    monkeypatch.setattr(predict_script, "BATCH", 3)
    monkeypatch.setattr(predict_script, "SHOWN", 2)
    drawn = []
    whole = predict_script.picture_row
    monkeypatch.setattr(predict_script, "picture_row", lambda *parts: drawn.append(parts) or whole(*parts))
    out = predict(Purify(images=(tmp_path / "faces",), output=tmp_path / "out", run=run, device="cpu"))
    scores = json.loads((out / "scores.json").read_text())["images"]
    assert [score["purified"] for score in scores] == [f"{number}.png" for number in range(7)]
    assert all((out / score["purified"]).is_file() for score in scores) and len(drawn) == 2
    one = tmp_path / "faces/5.png"
    alone = predict(Purify(images=(one,), output=tmp_path / "one", run=run, device="cpu"))
    (score,) = json.loads((alone / "scores.json").read_text())["images"]
    assert score["distance"] == pytest.approx(scores[5]["distance"], rel=1e-4)
    assert score["kept"] == scores[5]["kept"]
    with pytest.raises(UserError, match="--images: give image files or folders"):
        predict(Purify(images=(), output=tmp_path / "none", run=run))
    assert not (tmp_path / "none").exists()


def test_what_was_not_kept_is_not_shown(run):
    basis = load_basis(run / "basis.safetensors")
    q = torch.zeros(20)
    q[7] = 1
    faces = picture_row(basis, None, torch.rand(1, 16, 16), torch.rand(1, 16, 16), q)[3:]
    torch.testing.assert_close(faces[0], eigenface_picture(basis.eig_vec[:, 7:8], 16)[0])
    assert len(faces) == 4 and all((face == 1).all() for face in faces[1:])


def test_images_of_one_name_are_all_written(run, tmp_path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/rows.png", "b/y.png")]
    for path in paths:
        write_image(path, torch.rand(3, 20, 24))
    predict(Purify(images=tuple(paths), output=tmp_path / "out", run=run, device="cpu"))
    scores = json.loads((tmp_path / "out/scores.json").read_text())["images"]
    names = [score["purified"] for score in scores]
    assert [score["image"] for score in scores] == [str(path) for path in paths]
    assert len(set(names)) == 5 and names[4] == "y.png" and "rows.png" not in names
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_purified_faces_do_not_take_the_place_of_the_faces(run, tmp_path):
    write_image(tmp_path / "x.png", torch.rand(3, 20, 24))
    before = (tmp_path / "x.png").read_bytes()
    for changes in ({}, {"clean": tmp_path, "images": (tmp_path / "a" / "x.png",)}):
        write_image(tmp_path / "a" / "x.png", torch.rand(3, 20, 24))
        options = {"images": (tmp_path,), "output": tmp_path, "run": run, "device": "cpu"} | changes
        with pytest.raises(UserError, match="x.png would be overwritten by a result: give another --output"):
            predict(Purify(**options))
    assert (tmp_path / "x.png").read_bytes() == before


def test_evaluation_needs_the_variant_that_the_claims_are_about(run):
    config = run / "config.json"
    before = config.read_text()
    record = json.loads(before)
    record["config"]["variants"].remove("pin")
    config.write_text(json.dumps(record))
    with pytest.raises(UserError, match="without the variant pin"):
        evaluate(Evaluation(run=run, pairs=10))
    config.write_text(before)


def test_an_esn_with_another_basis_is_refused(run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    basis = load_basis(broken / "basis.safetensors")
    basis.eig_vec.copy_(basis.eig_vec[:, torch.arange(20).flip(0)])
    basis.save(broken / "basis.safetensors")
    with pytest.raises(UserError, match="another basis"):
        load_defense(Purify(images=(), run=broken), torch.device("cpu"))
    with pytest.raises(UserError, match="another basis"):
        train(parsed(tmp_path))
    with pytest.raises(UserError, match="another basis"):
        evaluate(Evaluation(run=broken, pairs=10))


def parsed(tmp_path, *arguments):
    return parse_presets(PRESETS, "", ["demo", *TINY, *map(str, arguments), "--out", str(tmp_path / "run")])


def test_mistakes_end_with_code_2(tmp_path):
    error = script("train", "demo", *TINY, "--data", "folder", "--out", tmp_path / "run", check=2)
    assert error.startswith("error: --data folder needs --data-root")


def test_switches_change_what_is_trained(tmp_path):
    """Every ablation switch reaches the result."""
    weights = {}
    for name, arguments in {
        "pin": [],
        "baseline": ["--baseline", "image"],
        "samples": ["--samples", 1],
        "noise": ["--noise", 0.2],
        "noise-norm": ["--noise-norm", "image"],
        "lambda": ["--lamb-sparse", 0.1],
        "estimator": ["--estimator", "exact"],
        "dae": ["--no-dae"],
        "entropy": ["--entropy", 5],
        "clip": ["--clip", 0.01],
    }.items():
        small = ("--esn-steps", 6, "--esn-batch", 8, "--variants", "pin", "--recognizers")
        folder = train(parsed(tmp_path / name, *arguments, *small))
        weights[name] = load_file(folder / "checkpoint/esn-pin.safetensors")["pca_layer.fc2.0.weight"]
    names = list(weights)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            assert not torch.equal(weights[one], weights[two]), (one, two)


def test_an_esn_sees_what_it_was_trained_on(run, tmp_path):
    """--no-dae holds for evaluation and prediction too, and nothing is trained that no ESN sees."""
    bare = train(parsed(tmp_path, "--no-dae", "--variants", "pin", "--recognizers", "recognizer"))
    assert not (bare / "checkpoint/dae.safetensors").exists()
    assert "dae/loss" not in (bare / "log.jsonl").read_text()
    for folder, seen in ((run, True), (bare, False)):
        defense, _ = load_defense(Purify(images=(), run=folder), torch.device("cpu"))
        lab, _ = open_lab(Evaluation(run=folder, pairs=10), folder, load_config(folder, Config))
        assert [part.dae is not None for part in (defense, lab.pin())] == [seen, seen]
        assert ("DAE alone" in classical_defenses(lab, 3, slow=False)) == seen


def test_networks_are_evaluated_in_the_arithmetic_asked_for(run):
    labs = {}
    for precision in ("auto", "fp32", "bf16"):
        options = Evaluation(run=run, pairs=10, precision=precision, device="cpu")
        labs[precision], _ = open_lab(options, run, load_config(run, Config))
    x = labs["fp32"].first

    def results(lab):
        return (
            lab.dae(x)[1],
            *(esn(x) for esn in lab.esns.values()),
            *(one(x) for one in lab.recognizers.values()),
        )

    exact, rounded = results(labs["fp32"]), results(labs["bf16"])
    assert all(torch.equal(*both) for both in zip(results(labs["auto"]), exact, strict=True))
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32 and 0 < (one - other).abs().max() < 0.05
    attacked = craft(labs["bf16"], names=("PGD 8",))["PGD 8"]
    assert attacked.dtype == torch.float32 and 0 < (attacked - x).abs().max() <= 8 * LEVEL + 1e-6


def test_ready_eigenfaces_and_an_image_folder(tmp_path, run):
    for person in range(4):
        for number in range(12):
            write_image(tmp_path / f"faces/p{person}/{number}.png", torch.rand(1, 16, 16))
    folder = train(
        parsed(
            tmp_path,
            "--data",
            "folder",
            "--data-root",
            tmp_path / "faces",
            "--basis",
            run / "basis.safetensors",
        )
    )
    assert (folder / "basis.safetensors").read_bytes() == (run / "basis.safetensors").read_bytes()
    skew = load_basis(run / "basis.safetensors")
    skew.eig_vec[:, 1] = skew.eig_vec[:, 0]
    skew.save(tmp_path / "skew.safetensors")
    with pytest.raises(UserError, match="not orthonormal"):
        train(parsed(tmp_path / "skew", "--basis", tmp_path / "skew.safetensors"))
    other = parsed(tmp_path / "other", "--size", 32, "--basis", run / "basis.safetensors")
    with pytest.raises(UserError, match="eigenfaces of 256 pixels, and the networks take 32 x 32 = 1024"):
        train(other)


def test_onnx_file_does_what_the_defence_does(run, tmp_path):
    path = export(Export(tmp_path / "pin.onnx", run))
    x = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    defense, recognizer = load_defense(Purify(images=(), run=run), torch.device("cpu"))
    (purified,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(purified), defense(x).detach(), atol=1e-5, rtol=1e-4)
    other = OnnxRecognizer(path)  # any image-to-vector file will do: the grey channel goes in as it is
    assert other(x).shape == x.shape
    with pytest.raises(UserError, match="config.json: damaged or not an ONNX network"):
        OnnxRecognizer(run / "config.json")
    with pytest.raises(UserError, match="absent.onnx: no such file; an ONNX network belongs there"):
        OnnxRecognizer(tmp_path / "absent.onnx")
    write_onnx(torch.nn.Flatten(), (torch.zeros(2, 16, 16, 3),), tmp_path / "last.onnx", ["x"], ["y"])
    with pytest.raises(UserError, match=r"last.onnx: takes \[2, 16, 16, 3\], not images \(N, C, H, W\)"):
        OnnxRecognizer(tmp_path / "last.onnx")
    assert recognizer(x).norm(dim=1).mean().item() == pytest.approx(1, abs=1e-4)


def test_identity_cost_of_ais(run):
    defense, recognizer = load_defense(Purify(images=(), run=run), torch.device("cpu"))
    x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    masks = (torch.rand(4, 3, 20) > 0.5).float()
    costs = identity_cost(recognizer, defense.basis, x, x, masks)
    for s in range(4):
        features = recognizer(defense.project(x, masks[s]))
        expected = 8 * (1 - torch.nn.functional.cosine_similarity(features, recognizer(x)))
        torch.testing.assert_close(costs[s], expected, atol=1e-4, rtol=1e-4)


def test_two_processes_give_the_curves_of_one(tmp_path):
    """Adversarial training attacks with its random start alone: steps follow signs, which rounding turns."""
    arguments = ["demo", *TINY, "--variants", "pin", "ais", "--recognizers", "recognizer", "robust"]
    arguments += ["--adversarial", "trades", "--adversarial-steps", "0"]
    arguments += ["--recognizer-epochs", "7", "--log-every", "1"]
    a = run_one(train, PRESETS, tmp_path, *arguments)
    b = run_two("pin", tmp_path, *arguments)
    assert_same_curves(a, b, lines=25)
    assert furthest_weights(a / "checkpoint", b / "checkpoint") < 1e-3
