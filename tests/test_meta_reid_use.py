"""META evaluated, searched with and exported."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_meta_reid_runs import small

from meta_reid import eval as evaluation
from meta_reid import predict
from meta_reid.claims import claims_from
from meta_reid.data import Target, Tensors, walker_target
from meta_reid.eval import Options, protocol_metrics
from meta_reid.export import export
from meta_reid.figures import to_plot
from meta_reid.gallery import Index, fingerprint
from meta_reid.measure import Measured, measure
from meta_reid.model import META, Description
from meta_reid.protocols import Result, evaluate, rows_at
from meta_reid.rows import VARIANTS, Row, plan
from meta_reid.train import PRESETS
from shared.bench import peak_memory
from shared.io import images_of
from shared.onnxfile import run_onnx
from shared.runtime import UserError, parse


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
    path = tmp_path / f"meta.{ending}"
    assert export(model, (48, 24), path) < 1e-4
    image = torch.rand(1, 3, 48, 24) * 255  # the file takes one image as well as a batch
    found = torch.jit.load(str(path))(image) if ending == "pt" else run_onnx(path, images=image)[0]
    torch.testing.assert_close(found, model.eval()(image), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="ending"):
        export(model, (48, 24), tmp_path / "meta.zip")


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
    for picture in ("embedding_plot", "weight_bars"):
        monkeypatch.setattr(evaluation, picture, lambda *_: None)
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


def test_claims_ask_for_their_margins_with_every_seed():
    at = {"meta full:shared": 60.0, "baseline": 55.0, "meta global": 61.0, "no-in global": 57.0}
    at |= {"meta mixture:uniform": 50.0, "meta mixture:official": 45.0}
    m_ap = {f"{name} {seed}": value for name, value in at.items() for seed in (0, 1)}
    own = {"A": [0.5, 0.3, 0.2], "C": [0.2, 0.3, 0.5]}
    sources = {
        (site, 0): replace(
            measured("official"), weights=torch.tensor([w] * 4), distance=1 - torch.tensor([w] * 4)
        )
        for site, w in own.items()
    }

    def fail(m_ap, sources):
        claims = claims_from(m_ap, {}, sources, [0, 1])
        assert [claim.id for claim in claims] == list("abcde")
        return [claim.id for claim in claims if not claim.holds]

    assert fail(m_ap, sources) == []
    for name, value, claim in (
        ("baseline 1", 55.1, "a"),
        ("no-in global 1", 57.1, "b"),
        ("meta global 1", 61.1, "c"),
        ("meta mixture:official 0", 45.1, "e"),
    ):
        assert fail(m_ap | {name: value}, sources) == [claim]
    right = sources["C", 0]
    for wrong in ({"weights": torch.full((4, 3), 1 / 3)}, {"distance": right.distance.flip(1)}):
        assert fail(m_ap, sources | {("C", 0): replace(right, **wrong)}) == ["d"]


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
    # The other ways to join are the options', too.
    flat = measure(row, few, Options(aggregation=("nearest",), temperature=1e6), cpu).full("nearest")
    torch.testing.assert_close(flat, exact, rtol=1e-4, atol=1e-4)
    halves = measure(row, few, Options(aggregation=("uniform",), normalize_parts=True), cpu).full("uniform")
    torch.testing.assert_close(halves.norm(dim=1), torch.full((12,), 2**0.5))


@pytest.mark.parametrize("options", [Options, predict.Options])
def test_batches_and_workers_out_of_range_are_refused(options):
    for option, value in (("batch", "0"), ("workers", "-1"), ("temperature", "0")):
        with pytest.raises(UserError, match=rf"--{option} {value}(\.0)?: give"):
            parse(options, "", [f"--{option}", value])


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
