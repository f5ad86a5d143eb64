"""META: ranking metrics against a slow reference, ranking lists, result tables."""

import numpy as np
import pytest
import torch

from meta_reid import tables
from meta_reid.data import Target, Tensors, file_target
from meta_reid.figures import BLUE, GREEN, RED, ranking_lists
from meta_reid.items import Item, Split
from meta_reid.metrics import ordered_keys, rank
from meta_reid.protocols import SETTINGS, average, evaluate
from meta_reid.tables import latex, markdown, summary
from shared.bench import peak_memory
from shared.published import Metric, load_published, write_results
from shared.runtime import UserError


def slow_rank(query, gallery, qi, gi, qc, gc):
    aps, inps, firsts, skipped = [], [], [], 0
    for q in range(len(query)):
        distance = 1 - torch.cosine_similarity(query[q : q + 1], gallery)
        order = sorted(range(len(gallery)), key=lambda g: (round(float(distance[g]), 5), g))
        order = [g for g in order if not (gi[g] == qi[q] and gc[g] == qc[q])]
        hits = [place for place, g in enumerate(order, 1) if gi[g] == qi[q]]
        if not hits:
            skipped += 1
            continue
        aps.append(sum((i + 1) / place for i, place in enumerate(hits)) / len(hits))
        inps.append(len(hits) / hits[-1])
        firsts.append(hits[0])
    cmc = [sum(first <= k for first in firsts) / len(firsts) for k in range(1, 51)]
    return cmc, sum(aps) / len(aps), sum(inps) / len(inps), skipped


def test_ranking_against_a_slow_reference(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(40, 8, generator=rng), torch.randn(300, 8, generator=rng)
    gallery[200:] = gallery[100:200]  # exact ties
    qi, gi = (torch.randint(1, 30, (n,), generator=rng) for n in (40, 300))
    qi[0], gi[:20] = 99, 0  # a query without a match, distractors
    qc, gc = (torch.randint(0, 3, (n,), generator=rng) for n in (40, 300))
    cmc, m_ap, m_inp, skipped = slow_rank(query, gallery, qi, gi, qc, gc)
    for chunk in (2**28, 40 * 300 * 7):
        monkeypatch.setattr("meta_reid.metrics.CHUNK_BYTES", chunk)
        found = rank(query, gallery, qi, gi, qc, gc)
        assert found.skipped == skipped >= 1
        torch.testing.assert_close(found.cmc, torch.tensor(cmc), rtol=0, atol=1e-6)
        assert float(found.ap.mean()) == pytest.approx(m_ap, abs=1e-5)
        assert float(found.inp.mean()) == pytest.approx(m_inp, abs=1e-5)
        summary = found.summary()
        assert summary["metric"] == pytest.approx((summary["mAP"] + summary["Rank-1"]) / 2)


def test_ranking_holds_a_part_of_the_matrix_at_a_time(monkeypatch):
    """Peak memory: a normalised copy of the gallery and a chunk, whatever the number of queries."""
    monkeypatch.setattr("meta_reid.metrics.CHUNK_BYTES", 2**20)
    rng = torch.Generator().manual_seed(0)
    sizes = (1_000, 5_000)
    features = [torch.randn(size, 16, generator=rng) for size in sizes]
    ids = [torch.randint(50, (size,), generator=rng) for size in sizes]
    cameras = [torch.randint(3, (size,), generator=rng) for size in sizes]
    peak = peak_memory(lambda: rank(*features, *ids, *cameras))
    whole = 4 * sizes[0] * sizes[1]
    assert peak < 5_000 * 16 * 4 * 2 + 1.2 * 2**20 < whole / 10


def test_ties_follow_the_gallery_and_hopeless_tests_are_refused():
    keys = ordered_keys(torch.tensor([[0.5, 0.0, -0.0, 0.5, 0.1]]))
    assert keys.argsort(1).tolist() == [[1, 2, 4, 0, 3]]
    one = torch.ones(1, 2)
    number = torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match="no query has a true match"):
        rank(one, one, number, number, number, number)
    with pytest.raises(ValueError, match="empty"):
        rank(one, one[:0], number, number[:0], number, number[:0])


def test_one_true_match_makes_map_and_minp_equal_and_splits_are_averaged():
    rng = torch.Generator().manual_seed(0)
    features, ids = torch.randn(40, 4, generator=rng), torch.arange(20).repeat(2)
    cameras = torch.arange(2).repeat_interleave(20)
    splits = []
    for _ in range(10):
        people = torch.randperm(20, generator=rng)[:10]
        splits.append((people, people + 20))
    target = Target("T", Tensors(torch.zeros(40, 3, 1, 1)), ids, cameras, splits)
    result = evaluate(features, target)
    assert result.mean["mAP"] == pytest.approx(result.mean["mINP"])
    single = [
        evaluate(features, Target("T", target.images, ids, cameras, [split])).mean["mAP"] for split in splits
    ]
    assert result.mean["mAP"] == pytest.approx(np.mean(single))
    assert result.std["mAP"] == pytest.approx(np.std(single, ddof=1))
    assert average([result, result])["mAP"] == pytest.approx(result.mean["mAP"])


def test_a_target_that_cannot_be_tested_is_named(tmp_path):
    alone, again = Item(tmp_path / "a", 1, 0), Item(tmp_path / "b", 1, 0)
    for gallery, message in (([], "test set yard: the gallery is empty"), ([again], "yard: .*other camera")):
        target = file_target("yard", [Split([alone], gallery)], (8, 4))
        with pytest.raises(UserError, match=message):
            evaluate(torch.ones(len(target.images), 4), target)


@pytest.mark.parametrize("place", [0, 3])
def test_embeddings_that_are_no_numbers_are_not_ranked(place):
    split = (torch.tensor([0, 1]), torch.tensor([2, 3]))
    target = Target("yard", None, torch.tensor([1, 2, 1, 2]), torch.arange(4), [split])
    for wrong in (torch.nan, torch.inf):
        features = torch.eye(4)
        features[place, 0] = wrong
        with pytest.raises(UserError, match="test set yard: embeddings with NaN or infinity"):
            evaluate(features, target)


def test_a_split_is_ranked_on_the_device_asked_for(monkeypatch):
    split = (torch.tensor([0, 1]), torch.tensor([2, 3]))
    target = Target("yard", None, torch.tensor([1, 2, 1, 2]), torch.arange(4), [split])
    seen = set()

    def watched(*sides):
        seen.update(side.device.type for side in sides)
        raise ValueError("seen")

    monkeypatch.setattr("meta_reid.protocols.rank", watched)
    with pytest.raises(UserError, match="seen"):
        evaluate(torch.eye(4), target, torch.device("meta"))
    assert seen == {"meta"}


def test_ranking_lists_leave_out_the_querys_own_camera():
    images = torch.arange(4).mul(60).view(4, 1, 1, 1).expand(4, 3, 8, 64).byte()
    ids, cameras = torch.tensor([1, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    target = Target("T", Tensors(images), ids, cameras, [])
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0.1], [0, 1]])
    sheet = ranking_lists(features, target, torch.tensor([0]), torch.tensor([1, 2, 3]))
    tiles = [sheet[:, 6, 70 * column + 30] for column in range(4)]  # a tile of 68 px and a gap of 2
    frames = [sheet[:, 0, 70 * column + 30] for column in range(3)]
    for frame, colour in zip(frames, (BLUE, GREEN, RED), strict=True):  # query, right match, wrong one
        torch.testing.assert_close(frame, torch.tensor(colour))
    levels = [round(float(tile[0]) * 255) for tile in tiles]
    assert levels == [0, 120, 180, 255]  # the view of the same camera is a white place at the end


def test_tables_show_deviations_and_the_published_rows_of_the_same_protocol():
    def metric(name, value, data="GRID", method="meta-0 global"):
        return Metric("Protocol-1 comparison", "M+C2+C3+CS", name, "percent", value, data, False, method)

    metrics = [metric("mAP", 50.0), metric("mAP std", 2.0), metric("Rank-1", 40.0), metric("Rank-1 std", 3.0)]
    metrics += [metric("mAP", 10.0, "average"), metric("Rank-1", 5.0, "average")]
    metrics += [metric("mAP", value, "average", "seeds") for value in (10.0, 12.0)]
    table = summary(metrics, load_published("meta_reid")["rows"])
    lines = markdown(table).splitlines()
    assert lines[0] == "| method | GRID | average |" and len({line.count("|") for line in lines}) == 1
    assert "| meta-0 global | 50.0 ± 2.0 / 40.0 ± 3.0 | 10.0 / 5.0 |" in lines
    assert "| seeds | - / - | 11.0 ± 1.4 / - |" in lines
    assert "| META, published (M) | 60.1 / 52.4 | 70.9 / 63.8 |" in lines
    assert not any("DIMN" in line for line in lines)  # other sources, another setting
    assert r"50.0 $\pm$ 2.0 / 40.0 $\pm$ 3.0 & 10.0 / 5.0 \\" in latex(table)


def test_runs_of_the_three_targets_make_the_protocols_whole_table(tmp_path):
    found = {"CUHK03": 30.0, "MSMT17": 20.0, "Market1501": 70.0}
    for (target, setting), (data, value) in zip(SETTINGS.items(), found.items(), strict=True):
        assert setting.endswith(f"->{data}")
        metrics = [
            Metric("Protocol-2 comparison", setting, name, "percent", value + shift, data, released, method)
            for name, shift in (("mAP", 0.0), ("Rank-1", 9.0), ("mINP", 1.0))
            for method, released in (("META", True), ("meta-0 global", False))
        ]
        write_results(tmp_path / target, [], metrics, {})
    runs = [tables.evaluated(tmp_path / target) for target in SETTINGS]
    lines = markdown(summary(tables.join(runs), load_published("meta_reid")["rows"])).splitlines()
    assert lines[0] == "| method | CUHK03 | MSMT17 | Market1501 | average |"
    assert "| META | 30.0 / 39.0 | 20.0 / 29.0 | 70.0 / 79.0 | 40.0 / 49.0 |" in lines
    assert "| META, published (R) | 36.3 / 35.1 | 22.5 / 49.9 | 67.5 / 86.1 | 42.1 / 57.0 |" in lines
    assert {m.method: m.comparable for m in tables.join(runs) if m.dataset == "average"} == {
        "META": True,
        "meta-0 global": False,
    }
    # The published average is one of three targets.
    assert not any(metric.dataset == "average" for metric in tables.join(runs[:2]))
    alone = [m for m in runs[0] if m.method == "META"]
    averaged = {m.method for m in tables.join([alone, *runs[1:]]) if m.dataset == "average"}
    assert averaged == {"META"}
    walkers = [Metric("walkers", "seed 0", "mAP", "%", 1.0, "walkers at T", False)]
    for wrong, message in (
        ([runs[0], runs[0]], "a target stands in two of the runs"),
        ([runs[0], walkers], "runs of one protocol on files, found Protocol-2 comparison, walkers"),
        ([walkers], "runs of one protocol on files"),
    ):
        with pytest.raises(UserError, match=message):
            tables.join(wrong)
    with pytest.raises(UserError, match=r"results.json: .*eval.py --run .* writes it"):
        tables.evaluated(tmp_path / "none")
