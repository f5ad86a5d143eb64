"""DFGC 2022: submissions, AUC and its intervals, matrix, fusion, and the published tables."""

import itertools

import numpy as np
import pytest

from dfgc2022 import contest as scoring
from dfgc2022.creation import anti_detection
from dfgc2022.eval import RELEASED
from dfgc2022.protocol import (
    FUSION,
    PARTS,
    POOLED,
    Clip,
    area,
    arrays,
    bootstrap_auc,
    breakdown,
    fuse,
    leaderboard,
    matrix,
    part_areas,
    read_submission,
    scaled,
    search_weights,
    temperature,
    winner_metrics,
    write_submission,
)
from shared.metrics import auc
from shared.published import load_published
from shared.runtime import UserError

PUBLISHED = load_published("dfgc2022")


def clips_of(reals: int, creators: dict[str, int], part: str = "Public") -> list[Clip]:
    fakes = [(name, number) for name, count in creators.items() for number in range(count)]
    found = [Clip(f"{part}-r{number}.mp4", 0, part) for number in range(reals)]
    return found + [Clip(f"{part}-{name}{number}.mp4", 1, part, creator=name) for name, number in fakes]


def value(
    table: str, method: str, metric: str, dataset: str | None = None, protocol: str | None = None
) -> float:
    (row,) = [
        row
        for row in PUBLISHED["rows"]
        if row["table"] == table
        and (row["method"], row["metric"]) == (method, metric)
        and dataset in (None, row["dataset"])
        and protocol in (None, row["protocol"])
    ]
    return row["value"]


# --- submissions ------------------------------------------------------------------------------------


def test_a_submission_survives_the_file(tmp_path):
    write_submission(tmp_path / "s.txt", {"a.mp4": 0.25, "b,c.mp4": 1 / 3})
    assert (tmp_path / "s.txt").read_text() == "a.mp4, 0.250000\nb,c.mp4, 0.333333\n"
    scores, warnings = read_submission(tmp_path / "s.txt", ["b,c.mp4", "d.mp4"])
    assert scores == {"b,c.mp4": 0.333333, "d.mp4": 0.5}
    assert "1 clips are missing and count 0.5 (d.mp4)" in warnings[0]
    assert "1 clips are not in this test set (a.mp4)" in warnings[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4, 1.5", r"line 2: score 1.5 of a.mp4 is not in \[0, 1\]"),
        ("a.mp4, -0.1", "not in"),
        ("a.mp4, nan", "score nan of a.mp4"),
        ("a.mp4, inf", "not in"),
        ("a.mp4 0.5", "is not 'name, probability'"),
        ("0.5", "is not 'name, probability'"),
        (", 0.5", "is not 'name, probability'"),
        ("a.mp4, high", "is not 'name, probability'"),
        ("x.mp4, 0.1", "x.mp4 stands there twice"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "s.txt").write_text(f"x.mp4, 0.5\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_submission(tmp_path / "s.txt")


def test_the_mark_of_an_editor_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "s.txt").write_text("a.mp4, 0.9\n", encoding="utf-8-sig")
    assert read_submission(tmp_path / "s.txt", ["a.mp4"]) == ({"a.mp4": 0.9}, [])


def test_one_bad_submission_does_not_stop_the_contest(tmp_path, capsys):
    (tmp_path / "good.txt").write_text("Public-r0.mp4, 0.5\n")
    (tmp_path / "bad.txt").write_text("Public-r0.mp4, 7\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    read = scoring.read_submissions(sorted(tmp_path.iterdir()), clips_of(1, {"x": 1}))
    assert list(read) == ["good"]
    said = capsys.readouterr().out
    assert "not scored" in said and "bad.txt" in said and "binary.txt" in said
    assert scoring.read_submissions([tmp_path / "absent.txt"], []) == {}
    assert "absent.txt" in capsys.readouterr().out


# --- AUC --------------------------------------------------------------------------------------------


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, 60) / 4, rng.integers(0, 2, 60)
    pairs = [(f > r) + (f == r) / 2 for f in scores[labels == 1] for r in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))


def test_bootstrap_is_that_of_resampled_clips():
    """Same multinomial draws, but with the clips written out and the AUC computed anew."""
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 9, 50) / 8, np.repeat([0, 1], [30, 20])
    same = np.random.default_rng(5)
    real, fake = np.sort(scores[labels == 0]), scores[labels == 1]
    values = []
    for _ in range(100):
        f = np.repeat(fake, same.multinomial(20, np.full(20, 1 / 20)))
        r = np.repeat(real, same.multinomial(30, np.full(30, 1 / 30)))
        values.append(auc(np.concatenate([r, f]), labels))
    expected = np.quantile(values, [0.025, 0.975])
    assert np.allclose(bootstrap_auc(scores, labels, draws=100, seed=5), expected)


def test_bootstrap_width_matches_theory():
    """Normal scores: the interval's half width is about 1.96 standard errors of Hanley and McNeil."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 200)
    scores = rng.normal(labels * 1.0)
    low, high = bootstrap_auc(scores, labels)
    a = auc(scores, labels)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 199 * (q2 - a * a)) / 200**2)
    assert low < a < high and (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_winner_metrics_by_hand():
    scores, labels = np.array([0.9, 0.5, 0.2, 0.5, 0.1, 0.3]), np.array([1, 1, 1, 0, 0, 0])
    found = winner_metrics(scores, labels)  # 0.5 counts as fake: 2 hits, 1 false alarm, 1 miss
    assert found["recall"] == pytest.approx(2 / 3) and found["precision"] == pytest.approx(2 / 3)
    assert found["F1"] == pytest.approx(2 / 3) and found["accuracy"] == pytest.approx(4 / 6)
    assert found["AUC"] == pytest.approx((3 + 2.5 + 1) / 9) and found["EER"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="AUC needs"):
        winner_metrics(scores, np.ones(6, int))
    equal = winner_metrics(np.full(6, 0.5), labels)
    assert equal["AUC"] == 0.5 and equal["EER"] == 0  # as the winner's code has it


def test_pooling_can_cost_auc_although_each_part_keeps_its_own():
    rng = np.random.default_rng(3)
    clips = clips_of(50, {"a": 50}, "Private-1") + clips_of(50, {"a": 50}, "Private-2")
    even = {clip.name: float(np.clip(rng.normal(0.4 + 0.15 * clip.label, 0.1), 0, 0.6)) for clip in clips}
    shifted = {clip.name: even[clip.name] + 0.4 * (clip.part == "Private-2") for clip in clips}
    before, after = part_areas(clips, even, 10), part_areas(clips, shifted, 10)
    for part in ("Private-1", "Private-2"):
        assert after[part].value == pytest.approx(before[part].value)
    assert after[POOLED].value < before[POOLED].value - 0.1
    assert [name for name, _ in leaderboard(clips, {"shifted": shifted, "even": even}, 10)] == [
        "even",
        "shifted",
    ]


def test_the_published_private_auc_is_no_mean_of_its_parts():
    for method in ("HanChen (1st)", "guanjz (3rd)"):
        first, second, pooled = (
            value("detection top-3", method, "AUC", d) for d in ("Private-1", "Private-2", POOLED)
        )
        weighted = (2166 * first + 895 * second) / (2166 + 895)
        for mean in ((first + second) / 2, weighted):
            assert abs(mean - pooled) > 0.001
    ranks = sorted(
        ("HanChen (1st)", "OPDAI (2nd)", "guanjz (3rd)"),
        key=lambda m: -value("detection top-3", m, "AUC", POOLED),
    )
    assert ranks == ["HanChen (1st)", "OPDAI (2nd)", "guanjz (3rd)"]


def test_matrix_and_margins_against_loops():
    rng = np.random.default_rng(4)
    clips = clips_of(12, {"a": 7, "b": 5}) + clips_of(9, {"b": 3}, "Private-2")
    submissions = {name: {clip.name: float(rng.random()) for clip in clips} for name in ("x", "y")}
    crossed = matrix(clips, submissions, draws=20)
    parts = {"a": {"Public"}, "b": {"Public", "Private-2"}}  # where the creator's fakes lie
    for (row, creator), (column, name) in itertools.product(enumerate("ab"), enumerate("xy")):
        chosen = [c for c in clips if c.creator == creator or (c.label == 0 and c.part in parts[creator])]
        expected = auc(*arrays(chosen, submissions[name]))
        assert crossed.auc[row, column] == pytest.approx(expected)
        assert crossed.low[row, column] <= expected <= crossed.high[row, column]
    assert np.allclose(crossed.detection_score, crossed.auc.mean(0))
    assert np.allclose(crossed.evasion, (1 - crossed.auc).mean(1))
    assert crossed.pooled[0] == pytest.approx(auc(*arrays(clips, submissions["x"])))
    for row, creator in enumerate("ab"):
        anti = anti_detection(clips, submissions, creator, "auc10")
        assert 10 * crossed.evasion[row] == pytest.approx(anti)
    for some in (clips_of(3, {}), clips_of(3, {}) + clips_of(0, {"a": 3}, "Private-2")):
        with pytest.raises(UserError, match="a matrix needs"):
            matrix(some, submissions)


def test_the_matrix_goes_without_creators_that_have_no_real_clips_beside_them(capsys):
    clips = clips_of(3, {"a": 3}) + clips_of(0, {"b": 3}, "Private-2")
    contest = scoring.Contest(clips, {"x": {clip.name: clip.label * 0.5 for clip in clips}}, "test")
    metrics, crossed = scoring.score_detection(contest, 10)
    assert crossed.creators == ["a"] and "no real clips beside the fakes of b:" in capsys.readouterr().out
    cells = {m.setting: m.value for m in metrics if m.table == "by creator and part"}
    assert cells == {"a, Public": 1}


def test_breakdown_by_compression_uses_reals_of_the_same():
    clips = [
        Clip(f"{c}{label}{n}.mp4", label, "Public", "a" * label, c, "3/1/2")
        for c in ("none", "c40")
        for label in (0, 1)
        for n in range(3)
    ]
    scores = {
        clip.name: (clip.label if clip.compression == "none" else 1 - clip.label) * 1.0 for clip in clips
    }
    found = breakdown(clips, scores, "compression", 5)
    assert found["none"].value == 1 and found["c40"].value == 0 and found["none"].reals == 3
    assert breakdown(clips, scores, "creator", 5)["a"].reals == 6
    assert list(breakdown(clips, scores, "identity group", 5)) == ["3"]
    assert area([clip for clip in clips if clip.label], scores) is None


def test_the_2021_matrix_row_means():
    """S_D of all published detectors is the mean of their three published cells."""
    table, creators = "DFGC-2021 D1 matrix", ("Team_DFGC_SYSU", "organizer_baseline", "hlb01")
    methods = {row["method"] for row in PUBLISHED["rows"] if row["table"] == table}
    assert len(methods) == 12
    for method in methods:
        cells = [value(table, method, "AUC", protocol=f"creator {creator}") for creator in creators]
        mean = value(table, method, "AUC", protocol="mean over creators (detection score)")
        assert np.mean(cells) == pytest.approx(mean, abs=2e-6)


def test_the_2021_creation_scores_add_up():
    """S_ID + S_SSIM + S_noise + 2 (1 - AUC), the noise term since the second phase."""
    sums = 0
    for table in ("DFGC-2021 C1", "DFGC-2021 C2 re-score"):
        cells = {}
        for row in PUBLISHED["rows"]:
            if row["table"] == table:
                cells.setdefault(row["method"], {})[row["metric"].split()[0]] = row["value"]
        for cell in cells.values():
            terms = sum(cell.get(name, 0) for name in ("ID", "SSIM", "noise", "anti-detection"))
            assert terms == pytest.approx(cell["sum"], abs=2e-6)
            sums += 1
    baseline = value(
        "DFGC-2021 D1 matrix", "organizer_baseline (Xception)", "AUC", protocol="creator Team_DFGC_SYSU"
    )
    metric = "anti-detection score (2x(1-AUC), Xception baseline)"
    anti = value("DFGC-2021 C1", "Team_DFGC_SYSU", metric)
    assert sums == 5 and 2 * (1 - baseline) == pytest.approx(anti, abs=2e-6)


def test_table_1_adds_up():
    rows = [row for row in PUBLISHED["rows"] if row["table"] == "Table 1"]
    counts = {part: {r["metric"]: r["value"] for r in rows if r["dataset"] == part} for part in PARTS}
    for part in PARTS:
        assert counts[part]["real clips"] + counts[part]["fake clips"] == counts[part]["all clips"]
    released = [counts[part] for part in PARTS[:2]]
    assert sum(count["all clips"] for count in released) == 4394
    assert sum(count["fake clips"] for count in released) == 2799 == 35 * 80 - 1
    mos = [row["setting"] for row in PUBLISHED["rows"] if row["table"] == "MOS per submission"]
    assert [mos.count(name) for name in sorted(set(mos))] == [6, 13, 16]
    assert {
        part: (c["real clips"], c["fake clips"]) for part, c in zip(PARTS[:2], released, strict=True)
    } == RELEASED


# --- fusion -----------------------------------------------------------------------------------------


def test_fusion_is_a_weighted_mean_over_the_union():
    fused, warnings = fuse([{"a": 0.1, "b": 0.4}, {"a": 0.5}, {"a": 0.9, "b": 1.0}], FUSION)
    assert fused == {
        "a": pytest.approx(0.2 * 0.1 + 0.3 * 0.5 + 0.5 * 0.9),
        "b": pytest.approx(0.08 + 0.15 + 0.5),
    }
    assert len(warnings) == 1 and "member 2" in warnings[0]
    for weights in ((0.5, 0.5), (0.5, 0.6, -0.1), (0.2, 0.2, 0.2)):
        with pytest.raises(UserError, match="weights"):
            fuse([{"a": 1.0}] * 3, weights)


def test_weight_search_and_temperature_find_what_is_there():
    rng = np.random.default_rng(6)
    clips = clips_of(80, {"a": 80})
    good = {clip.name: float(1 / (1 + np.exp(-rng.normal(2 * clip.label - 1)))) for clip in clips}
    noise = {clip.name: float(rng.random()) for clip in clips}
    weights = search_weights(clips, [noise, good])
    assert weights[1] > 0.7 and sum(weights) == pytest.approx(1)
    values, _ = arrays(clips, good)
    sharp = dict(zip(good, scaled(values, 0.25), strict=True))
    assert temperature(clips, sharp) == pytest.approx(4 * temperature(clips, good), rel=0.05)
