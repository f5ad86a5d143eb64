"""DFGC 2022: creation scores, predicted realism, and the published tables of both."""

import numpy as np
import pytest
from test_dfgc2022_protocol import clips_of

from dfgc2022 import contest as scoring
from dfgc2022.creation import (
    DEFINITIONS,
    TERMS,
    Row,
    anti_detection,
    correlations,
    published_rows,
    ranking,
    read_ratings,
)
from dfgc2022.protocol import (
    PARTS,
    Clip,
)
from dfgc2022.realism import RealismModel, agreement
from shared.published import load_published
from shared.runtime import UserError

PUBLISHED = load_published("dfgc2022")


# --- creation ---------------------------------------------------------------------------------------


def test_all_19_published_totals_are_plain_sums():
    gaps = []
    for number in (1, 2, 3):
        rows, sums = published_rows(PUBLISHED, f"creation round {number}")
        gaps += [abs(row.total - sums[row.submission]) for row in rows]
    assert len(gaps) == 19 and max(gaps) <= 0.001


def test_ranks_and_correlations_of_round_3():
    rows, sums = published_rows(PUBLISHED, "creation round 3")
    assert [row.submission for row in ranking(rows)] == sorted(sums, key=lambda name: -sums[name])
    found = correlations(rows)
    assert found["total ~ anti-detection"] == pytest.approx(0.94, abs=0.005)
    assert found["total ~ realism"] == pytest.approx(0.57, abs=0.006)
    assert found["total ~ ID"] == pytest.approx(0.33, abs=0.006)
    assert found["ID ~ anti-detection, 12 best"] == pytest.approx(-0.70, abs=0.006)
    subjective = sorted(rows, key=lambda row: -sum(row.terms.values()))
    first = [row.submission for row in subjective[:5]]
    assert first == ["JoyFang #7", "JoyFang #8", "organizer-baseline", "Lio #2", "wany #1"]
    assert max(row.anti_detection for row in rows) > 5  # the announced 5 (1 - s_d) cannot give that


def test_anti_detection_in_every_definition():
    clips = [*clips_of(2, {"a": 2, "b": 1}), Clip("elsewhere.mp4", 0, PARTS[1])]
    first = {
        "elsewhere.mp4": 1.0,  # a real clip of a part without the creator's fakes: does not count
        "Public-r0.mp4": 0.1,
        "Public-r1.mp4": 0.6,
        "Public-a0.mp4": 0.5,
        "Public-a1.mp4": 0.9,
        "Public-b0.mp4": 0.0,
    }
    second = dict.fromkeys(first, 0.5)
    scores = {"x": first, "y": second}
    s_auc, s_probability = (0.75 + 0.5) / 2, (0.7 + 0.5) / 2
    expected = {"auc10": 10 * (1 - s_auc), "auc5": 5 * (1 - s_auc), "auc2": 2 * (1 - s_auc)}
    expected |= {"probability10": 10 * (1 - s_probability), "probability5": 5 * (1 - s_probability)}
    assert set(expected) == set(DEFINITIONS)
    for definition, number in expected.items():
        assert anti_detection(clips, scores, "a", definition) == pytest.approx(number)
    with pytest.raises(UserError, match="anti-detection of c"):
        anti_detection(clips, scores, "c")


def test_published_mos_equals_the_realism_column():
    mos = [row["value"] for row in PUBLISHED["rows"] if row["table"] == "MOS per submission"]
    rows, _ = published_rows(PUBLISHED, "creation round 3")
    assert len(mos) == 35
    assert all(any(abs(row.terms["realism"] - found) < 1e-9 for found in mos) for row in rows)


def test_ratings_are_averaged_and_checked(tmp_path):
    header = "submission,clip,rater,realism,mouth,quality,expression,ID\n"
    path = tmp_path / "r.csv"
    path.write_text(header + "s,a,1,5,4,3,2,1\ns,a,2,4,4,4,4,4\nt,a,1,1,1,1,1,1\n")
    assert read_ratings(path)["s"] == {"realism": 4.5, "mouth": 4, "quality": 3.5, "expression": 3, "ID": 2.5}
    path.write_text(header + "s,a,1,5,4,3,2,1\n", encoding="utf-8-sig")
    assert read_ratings(path)["s"]["realism"] == 5
    for lines, message in (
        ("s,a,1,6,4,3,2,1\n", "line 2: ratings are whole numbers"),
        ("s,a,1,4.5,4,3,2,1\n", "whole numbers"),
        ("s,a,1,4,4,3,2\n", "whole numbers"),
        ("s,a,1,5,4,3,2,1\ns,a,1,5,4,3,2,1\n", "rated a of s twice"),
    ):
        path.write_text(header + lines)
        with pytest.raises(UserError, match=message):
            read_ratings(path)
    path.write_text("submission,clip,rater,realism\n")
    with pytest.raises(UserError, match="column mouth is missing"):
        read_ratings(path)


def test_creators_without_ratings_are_named(capsys):
    clips = clips_of(3, {"a": 3, "b": 3})
    contest = scoring.Contest(clips, {"x": {clip.name: clip.label * 0.5 for clip in clips}}, "test")
    rows, _ = scoring.score_creation(contest, {"a": dict.fromkeys(TERMS, 3.0)})
    assert [row.submission for row in rows] == ["a"]
    assert "warning: no ratings of b;" in capsys.readouterr().out


def test_creators_without_real_clips_beside_them_do_not_end_the_creation_track(capsys):
    clips = clips_of(3, {"a": 3}) + clips_of(0, {"b": 3}, "Private-2")
    contest = scoring.Contest(clips, {"x": {clip.name: clip.label * 0.5 for clip in clips}}, "test")
    terms = dict.fromkeys("ab", dict.fromkeys(TERMS, 3.0))
    rows, _ = scoring.score_creation(contest, terms)
    assert [row.submission for row in rows] == ["a"]
    assert "warning: no real clips beside the fakes of b;" in capsys.readouterr().out
    rows, _ = scoring.score_creation(contest, terms, "probability10")  # which needs none
    assert {row.submission for row in rows} == {"a", "b"}


def test_creation_table_says_what_was_predicted_and_how(capsys):
    clips = clips_of(3, {"a": 3, "b": 3})
    contest = scoring.Contest(clips, {"x": {clip.name: clip.label * 0.5 for clip in clips}}, "test")
    terms = {"a": dict.fromkeys(TERMS, 3.0)}
    rows, metrics = scoring.score_creation(contest, terms, "auc5", {"b": 2.5})
    said = capsys.readouterr().out
    assert "announced formula" in said and "b (realism predicted)" in said
    assert [(row.submission, row.predicted) for row in rows] == [("a", False), ("b", True)]
    sums = {metric.method for metric in metrics if metric.metric == "sum"}
    assert sums == {"a"} and "2     b (realism" not in said  # two terms are ranked by no sum of six
    terms = {"b": dict.fromkeys(TERMS, 0.1)}
    rows, _ = scoring.score_creation(contest, terms, "auc10", {"a": 5.0})
    assert [row.submission for row in rows] == ["b", "a"]  # though realism alone is more than five of b
    assert isinstance(rows[0], Row) and not any(metric.comparable for metric in metrics)


# --- predicted realism --------------------------------------------------------------------------------


def test_realism_model_finds_the_features_that_matter():
    rng = np.random.default_rng(7)
    features = rng.normal(size=(120, 40))
    mos = np.clip(3 + features[:, 3] - 0.5 * features[:, 17], 1, 5)
    model = RealismModel(keep=6).fit(features[:90], mos[:90])
    assert {3, 17} <= set(model.chosen)
    assert agreement(model.predict(features[90:]), mos[90:])["PLCC"] > 0.9


def test_agreement_of_a_line_and_of_a_curve():
    mos = np.linspace(1, 5, 30)
    assert agreement(mos, mos) == {
        "PLCC": pytest.approx(1),
        "SRCC": pytest.approx(1),
        "KRCC": pytest.approx(1),
        "RMSE": 0,
    }
    bent = np.log(mos / (6 - mos))
    assert agreement(bent, mos, logistic=True)["RMSE"] < agreement(bent, mos)["RMSE"]
    assert agreement(mos[:3], mos[:3], logistic=True) == {}
