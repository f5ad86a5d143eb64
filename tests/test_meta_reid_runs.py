"""META: schedules, training, resume, evaluation and search as a user runs them."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from curves import assert_same_curves, furthest_weights, run_one, run_two
from safetensors.torch import load_file, save_file

from meta_reid import eval as evaluation
from meta_reid import predict
from meta_reid.claims import claims_from
from meta_reid.data import Target, Tensors, walker_target
from meta_reid.eval import Options, protocol_metrics, rows_of
from meta_reid.export import export
from meta_reid.figures import to_plot
from meta_reid.gallery import Index, fingerprint
from meta_reid.losses import objective
from meta_reid.measure import Measured, measure
from meta_reid.model import META, Description
from meta_reid.protocols import Result, evaluate, rows_at
from meta_reid.rows import VARIANTS, Row, plan
from meta_reid.train import PRESETS, learning_rate, optimiser, train
from meta_reid.walkers import draw
from shared.bench import peak_memory
from shared.io import Run, images_of, write_image
from shared.runtime import UserError, parse, parse_presets


def script(name: str, *arguments: str, runs: Path) -> subprocess.CompletedProcess:
    return helpers.script("meta_reid", name, *arguments, PAPERS_RUNS=str(runs))


def test_schedule():
    config = PRESETS["paper"]
    per_epoch, steps = 857, 857 * 120
    rate = [learning_rate(step, steps, per_epoch, config) for step in range(0, steps)]
    assert rate[0] == pytest.approx(0.004) and rate[499] == pytest.approx(0.04 * 0.9982, rel=1e-5)
    assert all(a >= b for a, b in zip(rate[500:], rate[501:], strict=False))
    assert rate[857] == rate[2 * 857 - 1] > rate[2 * 857]  # the cosine moves once an epoch
    assert rate[-1] == pytest.approx(4e-5, rel=1e-3)


def test_presets_and_weight_decay():
    assert PRESETS["paper"].people * PRESETS["paper"].images == 64 and PRESETS["paper"].epochs == 120
    assert PRESETS["protocol1"].protocol == "1"
    row = plan(replace(PRESETS["demo"], seeds=1, variants=("meta",)), {0: [3, 3, 3]})[0]
    groups = optimiser(row.model, row.config).param_groups
    names = {id(p): name for name, p in row.model.named_parameters()}
    assert [group["weight_decay"] for group in groups] == [5e-4, 0]
    assert all("bias" in names[id(p)] for p in groups[1]["params"])
    assert not any("F_final" in names[id(p)] for group in groups for p in group["params"])
    with pytest.raises(UserError, match=r"unknown variant \['x'\]"):
        plan(replace(PRESETS["demo"], seeds=1, variants=("x",)), {0: [3, 3, 3]})


def test_inactive_experts_stay_still(tmp_path):
    config = replace(
        PRESETS["demo"],
        seeds=1,
        steps=1,
        warmup=0,
        variants=("meta",),
        out=tmp_path / "run",
        device="cpu",
        save_every=20,
    )
    before = plan(config, {0: [40, 40, 40]})[0].model.state_dict()
    folder = train(config)
    after = load_file(folder / "checkpoint" / "meta-0.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "backbone.bn11.weight" in moved and "backbone.bn14.weight" in moved
    assert not any("bn12." in name or "bn13." in name for name in moved if name.startswith("backbone."))
    assert not any("Expert2.classifier" in name for name in moved)


def small(**changes):
    return replace(
        PRESETS["demo"], preset="demo", seeds=1, steps=40, save_every=20, people=4, device="cpu", **changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"variants": ("meta", "baseline")},
        {"variants": ("meta",), "architecture": "vit-mini", "optimizer": "adamw"},
    ],
)
def test_a_killed_run_continues_to_the_same_weights_and_log(changes, tmp_path):
    whole = train(small(out=tmp_path / "whole", **changes))
    killed = tmp_path / "killed"
    arguments = ["demo", *helpers.TINY["meta_reid"], "--device", "cpu"]
    for name, value in changes.items():
        arguments += [f"--{name}", *([value] if isinstance(value, str) else value)]
    helpers.kill_when((killed / "checkpoint").is_dir, "meta_reid", *arguments, "--out", killed)
    train(small(out=killed, **changes))
    helpers.assert_same_runs(killed, whole)


def test_pictures_while_it_trains_change_nothing(tmp_path):
    rows = ("meta", "baseline")
    without = train(small(variants=rows, sample_every=1000, out=tmp_path / "without"))
    written = tmp_path / "with" / "samples"
    seen = []

    def watch(self, name, image):
        seen.append((name, image.shape))
        picture(self, name, image)

    with pytest.MonkeyPatch.context() as patch:
        picture = Run.picture
        patch.setattr(Run, "picture", watch)
        pictured = train(small(variants=rows, sample_every=10, out=tmp_path / "with"))
    helpers.assert_same_runs(pictured, without)
    assert [name for name, _ in seen] == ["training-meta-0"] * 4 + ["training-baseline-0"] * 4
    for name in rows:
        assert (written / f"training-{name}-0.png").stat().st_size > 0
        assert (without / "samples" / f"training-{name}-0.png").exists()  # of the last step
    # Six queries, each with its ten nearest; the weights stand left of them.
    assert seen[0][1][1] == 6 * (2 * 52 + 2) - 2 and seen[0][1][2] > 11 * (2 * 28 + 2) + 60


def test_train_evaluate_and_search_from_the_folder(tmp_path, monkeypatch):
    trained = script("train.py", "demo", "--seeds", "1", "--steps", "2", runs=tmp_path)
    assert trained.returncode == 0, trained.stderr
    folder = Path(trained.stdout.splitlines()[-1])
    assert folder == (tmp_path / "meta_reid" / "demo-0").resolve()
    evaluated = script("eval.py", runs=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    printed = evaluated.stdout.splitlines()
    assert printed[-1] == str(folder) and len(printed) < 50
    assert sum(line.startswith("meta ") for line in printed) == 11  # global, five mixtures, five whole ones
    assert [line[0] for line in printed if line[1:3] == ": "] == list("abcdef")
    results = json.loads((folder / "results.json").read_text())
    assert [claim["id"] for claim in results["claims"]] == list("abcdef")
    assert results["claims"][-1]["measured"]["official, seed 0"] == 0
    assert not any(metric["comparable"] for metric in results["metrics"])
    for name in (
        "samples/ranking.png",
        "samples/weights.png",
        "samples/embedding.png",
        "table.md",
        "table.tex",
    ):
        assert (folder / name).stat().st_size > 0

    for name in "abc":
        write_image(tmp_path / "gallery" / f"{name}.png", torch.rand(3, 48, 24))
    arguments = ["--gallery", str(tmp_path / "gallery"), "--query", str(tmp_path / "gallery" / "b.png")]
    arguments += ["--index", str(tmp_path / "i.safetensors"), "--out", str(tmp_path / "out"), "--top", "2"]
    found = script("predict.py", *arguments, runs=tmp_path)
    assert found.returncode == 0, found.stderr
    answer = json.loads((tmp_path / "out" / "results.json").read_text())["queries"][0]
    assert answer["found"][0]["path"].endswith("b.png") and len(answer["found"]) == 2
    assert answer["looks_like"] in "ABC" and sum(answer["weight"].values()) == pytest.approx(1, abs=1e-4)
    assert list((tmp_path / "out").glob("*.png"))
    # What another aggregation made is not compared, and where nothing can be written nothing is computed.
    (tmp_path / "file").touch()
    index = ["--index", str(tmp_path / "i.safetensors")]
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path))

    def refused(error: type[Exception], message: str, *wrong: str) -> None:
        monkeypatch.setattr(sys, "argv", ["predict.py", *wrong])
        with pytest.raises(error, match=message):
            predict.main()

    refused(UserError, "another --aggregation", *arguments[2:], "--aggregation", "learned")
    refused(UserError, "shared, temperature 2, normalized parts", *arguments[2:], "--temperature", "2",
            "--normalize-parts")  # fmt: skip
    refused(UserError, "a folder; give the name of a", *arguments[:2], "--index", str(tmp_path))
    refused(FileExistsError, "file", "--query", arguments[1], *index, "--out", str(tmp_path / "file"))
    # A gallery picture that is gone costs the pictures, not the answers.
    (tmp_path / "gallery" / "b.png").rename(tmp_path / "b.png")
    gone = ["--query", str(tmp_path / "b.png"), *index, "--out", str(tmp_path / "gone")]
    refused(UserError, "gallery/b.png: no such image", *gone)
    assert (tmp_path / "gone" / "results.json").exists()
    said = f"b.png: looks like source {answer['looks_like']}; nearest {answer['found'][0]['path']} (1.00)"
    assert found.stdout.splitlines()[-2].endswith(said)


def test_a_manifest_of_the_users_own_domains_is_trained_and_evaluated(tmp_path, capsys):
    lines = ["path,id,camera,domain"]
    for domain in "ABT":
        drawn = draw(domain, people=4, views=4, seed=1)
        for i, picture in enumerate(drawn.images):
            write_image(tmp_path / domain / f"{i}.png", picture / 255)
            lines.append(f"{domain}/{i}.png,{drawn.identities[i]},{i},{domain}")
    lines.append("T/0.png,alone,0,T")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    changes = {"architecture": "mini", "pretrained": False, "height": 48, "width": 24, "workers": 0}
    config = replace(
        PRESETS["manifest"], preset="manifest", manifest=tmp_path / "mine.csv", target="T", people=4, steps=2,
        save_every=20, device="cpu", out=tmp_path / "run", **changes,
    )  # fmt: skip
    folder = train(config)
    metrics = protocol_metrics(config, rows_of(config, folder), Options(device="cpu"), folder)
    found = {metric.method for metric in metrics}
    assert {"meta-0 global", "meta-0 full:shared", "meta-0 mixture:official"} <= found
    assert not any("learned" in method for method in found)  # its scoring networks were not trained
    assert all(0 <= metric.value <= 100 and not metric.comparable for metric in metrics)
    assert capsys.readouterr().out.splitlines() == ["T: queries without a true match, left out: 1"]
    with pytest.raises(UserError, match="mine.csv: no domain 'yard'; it has A, B, T"):
        evaluation.target_sets(replace(config, target="yard"))
    for name in ("ranking-T-meta-0.png", "weights-meta-0.png", "embedding-meta-0.png"):
        assert (folder / "samples" / name).stat().st_size > 0
    shutil.rmtree(tmp_path / "A")
    (tmp_path / "mine.csv").unlink()
    assert predict.load_model(predict.Options(run=folder))[1] == ["A", "B"]  # the run alone is enough
    (folder / "sources.json").write_text("{}")
    with pytest.raises(UserError, match="sources.json: not readable as the sources of a run"):
        predict.load_model(predict.Options(run=folder))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "paper"], "--data-root is missing"),
        (["train.py", "paper", "--data-root", "nowhere"], "Get it from"),
        (["train.py", "manifest"], "--manifest is missing"),
        (["train.py", "demo", "--people", "50"], "40 identities"),
        (["eval.py"], "run train.py first"),
        (["predict.py"], "nothing to do"),
    ],
)
def test_mistakes_get_one_message(arguments, message, tmp_path):
    done = script(*arguments, runs=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_index(tmp_path):
    features = torch.randn(5, 4)
    index = Index.of(features, ["a\nb", *"bcde"], "weights", "maker")
    index.save(tmp_path / "i.safetensors")
    loaded = Index.load(tmp_path / "i.safetensors")
    assert loaded.paths == index.paths and (loaded.model, loaded.maker) == ("weights", "maker")
    similarity, order = loaded.search(features[2:3] * 7, top=9)
    assert order[0, 0] == 2 and similarity[0, 0] == pytest.approx(1, abs=1e-5) and order.shape == (1, 5)
    with pytest.raises(UserError, match="same weights"):
        loaded.search(torch.randn(1, 3))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "i.safetensors").read_bytes()[:40])
    for name in ("torn", "none"):
        with pytest.raises(UserError, match=name):
            Index.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="no pictures in this folder"):
        images_of(tmp_path)
    index.save(tmp_path / "new" / "folder" / "i.safetensors")
    save_file(
        {"features": features}, tmp_path / "foreign.safetensors", {"paths": '["a", "b", "c", "d", "e"]'}
    )
    with pytest.raises(UserError, match="foreign.safetensors: damaged or not a gallery index"):
        Index.load(tmp_path / "foreign.safetensors")


class FlatIndex:
    """What the search uses of FAISS's IndexFlatIP, for machines without FAISS."""

    def __init__(self, dimensions: int):
        self.known = np.empty((0, dimensions), np.float32)

    def add(self, vectors: np.ndarray) -> None:
        self.known = np.concatenate([self.known, vectors])

    def search(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        products = queries @ self.known.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(products, order, 1), order


def test_faiss_finds_the_same_and_its_absence_is_said(monkeypatch):
    index = Index.of(torch.randn(50, 8), [str(i) for i in range(50)], "weights", "maker")
    queries = torch.randn(4, 8)
    whole = index.search(queries, 10)
    monkeypatch.setattr("meta_reid.gallery.QUERIES", 3)
    assert torch.equal(index.search(queries, 10)[1], whole[1])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"FAISS is not installed \(pip install faiss-cpu\)"):
        index.search(queries, 10, faiss=True)
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=FlatIndex))
    for top in (10, 80):
        exact, found = index.search(queries, top), index.search(queries, top, faiss=True)
        assert torch.equal(found[1], exact[1])
        torch.testing.assert_close(found[0], exact[0])


@pytest.mark.parametrize("ending", ["pt", "onnx"])
def test_export_reproduces_the_network(ending, tmp_path, monkeypatch):
    monkeypatch.setattr("meta_reid.norms.IMAGE", 0)  # as for large maps, which a graph leaves whole
    model = META((3, 3, 3), "mini", scoring="shared")
    model.aggregation, model.temperature, model.normalize_parts = "nearest", 0.5, True
    assert export(model, (48, 24), tmp_path / f"meta.{ending}") < 1e-4
    with pytest.raises(UserError, match="ending"):
        export(model, (48, 24), tmp_path / "meta.zip")


def test_every_variant_is_a_setting():
    settings = {field.name for field in fields(PRESETS["demo"])}
    for changes in VARIANTS.values():
        assert changes.keys() <= settings


def in_one_go(model, images, domain, labels, union, consistency, uniformity, warm, autocast, go_back):
    """`losses.backward` with one backward for both halves, as several processes have it."""
    with autocast():
        terms = objective(model(images, domain, warm), labels, union, consistency, uniformity)
    go_back(sum(terms.values()))
    return {name: term.detach() for name, term in terms.items()}


def test_two_processes_give_the_curves_of_two_shares(tmp_path, monkeypatch):
    """The halves' gradients are tested in double precision; in 22 steps this small training makes their other
    rounding large."""
    monkeypatch.setattr("meta_reid.train.backward", in_one_go)
    arguments = ["demo", "--seeds", "1", "--variants", "meta", "baseline", "--people", "4", "--steps", "22"]
    arguments += ["--warmup", "5", "--freeze", "4"]
    one = run_one(train, PRESETS, tmp_path, *arguments, "--shares", "2")
    two = run_two("meta_reid", tmp_path, *arguments)
    assert_same_curves(one, two, lines=4)
    assert furthest_weights(one / "checkpoint", two / "checkpoint") < 1e-3


def measured(*modes: str) -> Measured:
    """A META row on a target of four images, with made-up embeddings of these modes."""
    rng = torch.Generator().manual_seed(0)
    values = {"mAP": 1.0, "Rank-1": 2.0}
    results = {f"full:{mode}": Result(values, dict.fromkeys(values, 0.0), 0) for mode in modes}
    parts = {"global": torch.rand(4, 6, generator=rng)}
    parts |= {f"mixture:{mode}": torch.rand(4, 6, generator=rng) for mode in modes}
    return Measured(results, parts, False, None, torch.zeros(4, 3))


def test_only_the_method_itself_stands_beside_the_published_numbers(tmp_path, monkeypatch):
    ids, cameras = torch.tensor([1, 2, 1, 2]), torch.arange(4)
    split = (torch.tensor([0, 1]), torch.tensor([2, 3]))
    target = Target("Market1501", Tensors(torch.zeros(4, 3, 8, 4)), ids, cameras, [split])
    monkeypatch.setattr(evaluation, "target_sets", lambda config: [target])
    monkeypatch.setattr(evaluation, "measure", lambda *_: measured("official", "shared"))
    config = replace(PRESETS["paper"], preset="paper", target="M")
    rows = {name: Row(name, replace(config, **VARIANTS[name[:-2]]), None) for name in ("meta-0", "no-in-0")}

    def beside(**options) -> set[str]:
        found = protocol_metrics(config, rows, Options(device="cpu", **options), tmp_path)
        assert {metric.method for metric in found if metric.comparable} <= {"META"}
        return {metric.method for metric in found}

    own = {"meta-0 full:shared", "no-in-0 full:shared", "no-in-0 full:official"}
    assert beside() == own | {"META"}
    assert beside(normalize_parts=True) == own | {"meta-0 full:official"}
    whole = config
    for changes in ({"steps": 10}, {"pretrained": False}, {"lr": 9.0}, {"people": 2}, {"height": 64}):
        rows["meta-0"] = Row("meta-0", replace(whole, **changes), None)
        assert beside() == own | {"meta-0 full:official"}, changes
    for changes in ({"shares": 4}, {"seed": 3}, {"protocol": "3"}, {"scoring": "separate"}):
        rows["meta-0"] = Row("meta-0", replace(whole, **changes), None)
        assert beside() == own | {"META"}, changes


def test_one_target_alone_is_plotted_by_its_people():
    identities = torch.tensor([7, 7, -1, 7, 3, 3, 0, 9])
    target = Target("T", None, identities, None, [(torch.tensor([0, 4]), torch.arange(8))])
    embeddings = torch.arange(8.0)[:, None]
    shown = to_plot(embeddings, target, alone=True)
    assert {name: part.flatten().tolist() for name, part in shown.items()} == {"7": [0, 1, 3], "3": [4, 5]}
    assert torch.equal(to_plot(embeddings, target, alone=False)["T"], embeddings)


def test_protocol_1_has_means_and_deviations_over_splits_and_the_targets_average(tmp_path, monkeypatch):
    cameras = torch.tensor([0, 0, 1, 1])
    splits = [(torch.tensor([i]), torch.tensor([2, 3])) for i in (0, 1)]
    targets = [
        Target(name, Tensors(torch.zeros(4, 3, 8, 4)), torch.tensor([1, 2, 1, 2]), cameras, splits)
        for name in ("PRID", "GRID")
    ]
    features = {"PRID": torch.eye(4)[[0, 1, 0, 1]], "GRID": torch.eye(4)[[0, 0, 0, 1]]}

    def known(row, target, options, device):
        found = measured("official")
        return replace(found, results={"full:official": evaluate(features[target.name], target)})

    monkeypatch.setattr(evaluation, "target_sets", lambda config: targets)
    monkeypatch.setattr(evaluation, "measure", known)
    config = replace(PRESETS["protocol1"], preset="protocol1")
    metrics = protocol_metrics(
        config, {"meta-0": Row("meta-0", config, None)}, Options(device="cpu"), tmp_path
    )
    assert (tmp_path / "samples" / "embedding-meta-0.png").stat().st_size > 0
    found = {(m.dataset, m.metric): m for m in metrics if m.metric.startswith("mAP")}
    # In GRID the second split finds the wrong person first.
    assert {key: m.value for key, m in found.items()} == {
        ("PRID", "mAP"): 100,
        ("PRID", "mAP std"): 0,
        ("GRID", "mAP"): 75,
        ("GRID", "mAP std"): pytest.approx(50 / 2**0.5),
        ("average", "mAP"): 87.5,
    }
    assert {key for key, m in found.items() if m.comparable} == {
        (name, "mAP") for name in ("PRID", "GRID", "average")
    }
    assert all(m.method == "META" and m.setting == "M+C2+C3+CS" for m in metrics)


def test_modes_that_a_run_has_no_scores_for(tmp_path):
    row = plan(small(variants=("meta",), scoring="shared"), {0: [3, 3, 3]})[0]
    with pytest.raises(UserError, match="'learned'.*was trained with the 'shared' scoring"):
        measure(row, None, Options(aggregation=("learned",)), torch.device("cpu"))
    # Claim (f) compares the modes that are there.
    rows = {"meta-0": measured("official", "shared"), "no-consistency-0": measured("official", "shared")}
    rows["no-consistency-0"].parts["mixture:shared"].zero_()
    (claim,) = claims_from({}, rows, {}, [0])
    assert claim.id == "f" and claim.holds and list(claim.measured) == ["official, seed 0", "shared, seed 0"]


def test_embeddings_in_bf16_and_by_loading_processes():
    row = plan(small(variants=("meta",)), {0: [3, 3, 3]})[0]
    target = walker_target("T", 0)
    few = replace(
        target, images=Tensors(target.images.images[:12]), splits=[(torch.arange(2), torch.arange(2, 12))]
    )
    cpu = torch.device("cpu")
    exact = measure(row, few, Options(aggregation=("uniform",)), cpu).full("uniform")
    options = Options(aggregation=("uniform",), bf16=True, workers=1, batch=4)
    rough = measure(row, few, options, cpu).full("uniform")
    assert torch.cosine_similarity(exact, rough).min() > 0.99 and not torch.equal(exact, rough)


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("people", "1", "2 or more"), ("images", "0", "1 or more"), ("epochs", "0", "1 or more"),
        ("steps", "0", "1 or more"), ("seeds", "0", "1 or more"), ("sample-every", "0", "1 or more"),
        ("save-every", "0", "1 or more"), ("shares", "0", "1 or more"), ("height", "0", "1 or more"),
        ("workers", "-1", "0 or more"), ("warmup", "-3", "0 or more"), ("freeze", "-1", "0 or more"),
        ("lr", "nan", "a number above 0"), ("lr", "0", "a number above 0"), ("clip", "0", "a number above 0"),
        ("momentum", "1.5", "a number from 0 to 1"), ("weight-decay", "-1", "0 or more"),
        ("consistency", "-1", "0 or more"), ("uniformity", "nan", "0 or more"),
        ("final-lr", "-1", "0 or more"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(option, value, allowed):
    with pytest.raises(UserError, match=rf"--{option} {value}(\.0)?: give {allowed}"):
        parse_presets(PRESETS, "", ["demo", f"--{option}", value])


@pytest.mark.parametrize("options", [Options, predict.Options])
def test_batches_and_workers_out_of_range_are_refused(options):
    for option, value in (("batch", "0"), ("workers", "-1"), ("temperature", "0")):
        with pytest.raises(UserError, match=rf"--{option} {value}(\.0)?: give"):
            parse(options, "", [f"--{option}", value])


def test_without_momentum_there_is_no_nesterov():
    row = plan(small(variants=("meta",), momentum=0.0), {0: [3, 3, 3]})[0]
    assert not optimiser(row.model, row.config).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": ()}, "--variants"),
        ({"variants": ("meta", "meta")}, "--variants meta meta: give each once"),
        ({"save_every": 30}, "multiple of 20"),
        ({"height": 96}, "--height 96 --width 24: walkers are drawn with --height 48"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(replace(small(variants=("meta",), out=tmp_path / "run"), **changes))


def test_a_row_that_is_not_trained_yet_is_not_searched_with(monkeypatch):
    config = small(variants=("meta", "no-in"))
    monkeypatch.setattr(predict, "find_run", lambda *_: Path("run"))
    monkeypatch.setattr(predict, "load_config", lambda *_: config)
    monkeypatch.setattr(predict, "load_weights", lambda *_: {"row": 1, "step": 20})
    assert predict.load_model(predict.Options())[3] == "run meta-0"
    asked = predict.Options(aggregation="nearest", temperature=2, normalize_parts=True)
    joined = predict.load_model(asked)[0]
    assert (joined.aggregation, joined.temperature, joined.normalize_parts) == ("nearest", 2, True)
    with pytest.raises(UserError, match="no-in-0 is not trained yet"):
        predict.load_model(predict.Options(row="no-in-0"))


def test_sources_of_an_official_checkpoint_are_named_by_their_identities():
    for classes, names in (
        ((1467, 11934, 1502), ["CUHK03", "CUHK-SYSU", "Market1501"]),
        ((767, 11934, 1041), ["CUHK03", "CUHK-SYSU", "MSMT17"]),
        ((767, 5, 751), ["CUHK03", "expert 2", "Market1501"]),
        ((751, 11934, 1501), ["expert 1", "expert 2", "expert 3"]),
    ):
        with torch.device("meta"):
            assert predict.official_sources(META(classes, "mini")) == names


def test_only_rows_of_meta_are_searched_with(monkeypatch):
    monkeypatch.setattr(predict, "find_run", lambda *_: Path("run"))
    monkeypatch.setattr(predict, "load_weights", lambda *_: {"row": 9, "step": 0})
    for variants, row, message in (
        (("meta", "baseline"), "baseline-0", "--row baseline-0: META's rows in the run are meta-0$"),
        (("baseline",), None, "a run without a row of META; it has baseline-0"),
    ):
        monkeypatch.setattr(predict, "load_config", lambda *_, v=variants: small(variants=v))
        with pytest.raises(UserError, match=message):
            predict.load_model(predict.Options(row=row))


def test_whole_embeddings_are_made_one_at_a_time_and_give_the_same_results(monkeypatch):
    """The results are those of all embeddings at once, but never is there more than the parts, one whole
    embedding, the gallery of its ranking and a little."""
    monkeypatch.setattr("meta_reid.metrics.CHUNK_BYTES", 2**18)
    n, c, modes = 900, 256, ("nearest", "uniform", "official")
    rng = torch.Generator().manual_seed(0)
    halves = torch.randn(n, len(modes) + 1, c, generator=rng)

    class Known(torch.nn.Module):
        """Looks embeddings up; the number of an image stands in its first pixel."""

        scorings = ()

        def describe(self, images):
            number = images[:, 0, 0, 0].long()
            return Description(number, number, torch.ones(len(number), 3, 2))

        def mixture(self, described, mode):
            return halves[described.experts, modes.index(mode)]

        def parts(self, described, mode):
            return self.mixture(described, mode), halves[described.universal, -1]

    images = Tensors(torch.arange(n, dtype=torch.int32).view(n, 1, 1, 1).expand(n, 3, 1, 1))
    people, cameras = torch.arange(n) % 40, torch.arange(n) % 7
    target = Target("T", images, people, cameras, [(torch.arange(60), torch.arange(60, n))])
    row = Row("meta-0", small(), Known())
    found = []
    peak = peak_memory(
        lambda: found.append(measure(row, target, Options(aggregation=modes), torch.device("cpu")))
    )
    for i, mode in enumerate(modes):
        whole = torch.cat([halves[:, i], halves[:, -1]], 1)
        assert torch.equal(found[0].full(mode), whole)
        assert found[0].results[f"full:{mode}"] == evaluate(whole, target)
        assert found[0].results[f"mixture:{mode}"] == evaluate(halves[:, i].contiguous(), target)
    parts, whole = 4 * n * c * (len(modes) + 1), 4 * n * 2 * c
    assert peak < 1.1 * (parts + 2 * whole)


def test_rows_that_follow_one_another_are_not_copied():
    x = torch.randn(6, 2)
    for index in (torch.arange(2, 5), torch.tensor([3, 1]), torch.tensor([], dtype=torch.long)):
        assert torch.equal(rows_at(x, index), x[index])
    assert rows_at(x, torch.arange(2, 5)).data_ptr() == x[2].data_ptr()


def test_a_fingerprint_tells_weights_and_aggregation():
    model = plan(small(variants=("meta",)), {0: [3, 3, 3]})[0].model
    one = fingerprint(model, "shared")
    assert one == fingerprint(model.to(memory_format=torch.channels_last), "shared")
    assert one != fingerprint(model, "learned")
    model.backbone.bn11.running_mean += 1
    assert one != fingerprint(model, "shared")
