"""DFGC 2022: realism predicted on the DFGC-VRA clips: layout, the 2023 split, agreement with the raters."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dfgc2022 import pipeline, realism, vra
from dfgc2022.model import detector
from dfgc2022.pipeline import Scorer, Settings
from dfgc2022.predict import load_detectors
from dfgc2022.protocol import Clip
from dfgc2022.realism import features_with_faces, predict_unrated
from dfgc2022.video import VideoError, read_frames, write_clips
from dfgc2022.vra import RatedClip, assess, read_vra
from shared.published import load_published
from shared.runtime import UserError

GROUPS = [number for number in range(1, 23) if number not in (11, 17)]


def all_clips() -> list[RatedClip]:
    """The 35 submissions of the published realism scores, on the 40 identities of their round."""
    found = []
    for row in load_published("dfgc2022")["rows"]:
        if row["table"] == "MOS per submission":
            number = int("".join(c for c in row["method"].split()[-1] if c.isdigit()))
            for group in GROUPS:
                for _ in (1, 2):
                    found.append(RatedClip(Path(), int(row["setting"][-1]), group, number, row["value"]))
    return found


def test_the_2023_split_has_its_published_sizes():
    splits = [clip.split for clip in all_clips()]
    assert {name: splits.count(name) for name in sorted(set(splits))} == {
        "test-1": 300, "test-2": 280, "test-3": 120, "train": 700,
    }  # fmt: skip


def test_realism_that_is_in_the_features_is_found():
    clips = all_clips()
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(clips), 24))
    features[:, 5] += 3 * np.array([clip.mos for clip in clips])
    found = {(m.setting, m.metric): m.value for m in assess(clips, features)}
    for name in ("test-1", "test-2"):
        what = vra.TESTS[name]
        assert found[f"{name}, {what}, per clip", "PLCC"] > 0.8
        fitted = found[f"{name}, {what}, per clip", "RMSE after a logistic fit"]
        assert fitted <= found[f"{name}, {what}, per clip", "RMSE"] + 1e-3
        assert found[f"{name}, {what}, per submission", "PLCC"] > 0.95
    pairs = [found[f"{n}, {w}, per clip", k] for n, w in vra.TESTS.items() for k in ("PLCC", "SRCC")]
    assert found["final score", "mean of PLCC and SRCC"] == pytest.approx(np.mean(pairs))
    assert all(
        not m.comparable and m.method == "predicted realism"
        for m in assess(clips[:400] + clips[900:], features[: 400 + len(clips) - 900])
    )


@pytest.fixture
def release(tmp_path):
    clip = np.random.default_rng(0).integers(60, 200, (3, 48, 48, 3), np.uint8)
    names = {1: "1-1-3-submit-73479", 2: "3-2-1-submit-82495", 3: "3-1-6-submit-00000"}
    (tmp_path / "metadata").mkdir()
    (tmp_path / "crop").mkdir()
    for number, name in names.items():
        write_clips([tmp_path / f"C{number}" / f"{name}.mp4"], [clip], 10)
        blanks = ",," if number == 1 else ""
        (tmp_path / "metadata" / f"C{number}-mos.csv").write_text(
            f"name,{blanks}mos\n{name}-crop,{blanks}3.2\n"
        )
        (tmp_path / "crop" / f"C{number}_crop_video.csv").write_text(
            f"video_name,x,y,w,h\n{name}.mp4,0.5,0.5,0.6,0.6\n"
        )
    return tmp_path


def test_reading_the_release_and_its_features(release):
    clips = read_vra(release)
    assert [(c.round, c.group, c.submission, c.mos, c.split) for c in clips] == [
        (1, 1, 73479, 3.2, "test-2"), (2, 3, 82495, 3.2, "test-1"), (3, 3, 0, 3.2, "test-3"),
    ]  # fmt: skip
    entry = detector("convnext_micro")
    scorer = Scorer({"a": (entry.build(), entry, entry.size)})
    config = vra.Config(release, every=1)
    first = vra.features_of(clips, scorer, config, release / "out")
    assert first.shape == (3, 2 * 96) and np.isfinite(first).all()
    for path in (release / "C1").iterdir():
        path.unlink()  # the second call reads what the first one kept
    assert np.array_equal(vra.features_of(clips, scorer, config, release / "out"), first)
    with pytest.raises(UserError, match="no clip of train"):
        assess(clips, first)


def test_features_of_other_weights_or_boxes_are_computed_anew(release):
    clips, entry = read_vra(release), detector("convnext_micro")
    first, second = (Scorer({"a": (entry.build(), entry, entry.size)}) for _ in range(2))
    config = vra.Config(release, every=1)
    settings = [(first, config), (second, config), (second, vra.Config(release, every=1, boxes="crops"))]
    found = [vra.features_of(clips, scorer, config, release / "out") for scorer, config in settings]
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])
    table = release / "crop" / "C1_crop_video.csv"
    table.write_text(table.read_text().replace("0.6,0.6", "0.3,0.3"))
    corrected = vra.features_of(clips, second, config, release / "out")
    assert not np.allclose(corrected[0], found[1][0]) and np.array_equal(corrected[1:], found[1][1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,mos\n1-1-3-submit-73479-crop,5.2\n", "line 2"),
        ("name,mos\n1-1-3-submit-73479-crop,nan\n", "line 2"),
        ("name,mos\nsomething,3\n", "not a clip and a score"),
        ("name,mos\n1-1-9-submit-73479-crop,3\n", "rated in C1-mos.csv but not there"),
    ],
)
def test_bad_scores_are_named(release, text, message):
    (release / "metadata" / "C1-mos.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_vra(release)


def test_a_missing_table_and_unequal_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="C1-mos.csv: not readable"):
        read_vra(tmp_path)
    with pytest.raises(UserError, match="names 1 networks, --weights 0 files"):
        load_detectors(None, (), ("xception_dfgc21_baseline",), ())


def test_a_clip_without_a_face_is_left_out_with_a_warning(release, capsys):
    clips, entry = read_vra(release), detector("convnext_micro")
    scorer = Scorer({"a": (entry.build(), entry, entry.size)})
    clips[1].path.write_bytes(b"no film")
    found = vra.features_of(clips, scorer, vra.Config(release, every=1), release / "out")
    assert np.isfinite(found).all(1).tolist() == [True, False, True]
    assert f"{clips[1].path.name} is left out" in capsys.readouterr().out
    for clip in clips:
        clip.path.write_bytes(b"no film")
    with pytest.raises(UserError, match="no clip with a face"):
        vra.features_of(clips, scorer, vra.Config(release, every=1), release / "other")


def test_realism_of_the_unrated_goes_without_clips_that_have_no_face(tmp_path, capsys):
    entry = detector("convnext_micro")
    scorer = Scorer({"a": (entry.build(), entry, entry.size)})
    rng, clips, paths, rated = np.random.default_rng(0), [], {}, {}
    for number in range(24):
        name, creator = f"{number}.mp4", ("rated", "unrated", "gone")[(number > 20) + (number > 22)]
        clips.append(Clip(name, 1, "Public", creator))
        paths[name] = tmp_path / name
        write_clips([paths[name]], [rng.integers(0, 255, (1, 48, 48, 3), np.uint8)], 10)
        if creator == "rated":
            rated[name] = float(rng.uniform(1, 5))
    for number in (3, 22, 23):
        paths[f"{number}.mp4"].write_bytes(b"no film")
    settings = Settings("crops", every=1, crop="frame")
    creators = ("unrated", "gone")
    found = predict_unrated(clips, paths, rated, creators, scorer, settings)
    assert set(found) == {"unrated"} and 1 <= found["unrated"] <= 5
    said = capsys.readouterr().out
    assert all(f"warning: {number}.mp4 takes no part in predicted realism" in said for number in (3, 22, 23))
    paths["4.mp4"].write_bytes(b"no film")
    assert predict_unrated(clips, paths, rated, creators, scorer, settings) == {}
    assert "needs 20 rated clips with a face, there are 19" in capsys.readouterr().out
    assert predict_unrated(clips, paths, rated, (), scorer, settings) == {}
    assert capsys.readouterr().out == ""  # nobody asked for a prediction


def test_only_a_missing_face_leaves_a_clip_out_of_predicted_realism(tmp_path, monkeypatch, capsys):
    entry = detector("convnext_micro")
    scorer = Scorer({"a": (entry.build(), entry, entry.size)})
    write_clips([tmp_path / "a.mp4"], [np.full((5, 48, 48, 3), 90, np.uint8)], 10)

    def fails(name, indices, frames):
        raise UserError("no memory for the face detector")

    monkeypatch.setattr(realism, "box_source", lambda choice: fails)
    with pytest.raises(UserError, match="no memory for the face detector"):
        features_with_faces([tmp_path / "a.mp4"], scorer, Settings("crops", every=1))
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "read_frames", broken_off)
    kept, found = features_with_faces([tmp_path / "a.mp4"], scorer, Settings("crops", every=1, crop="frame"))
    assert kept == [0] and found.shape == (1, 2 * 96)
    assert "warning: a.mp4: truncated; realism is judged by the frames before" in capsys.readouterr().out


def test_the_features_of_a_long_clip_take_the_memory_of_a_short_one(tmp_path, monkeypatch):
    entry, seen, whole = detector("convnext_micro"), [], realism.pooled_features
    scorer = Scorer({"a": (entry.build(), entry, entry.size)})
    clip = np.random.default_rng(0).integers(0, 255, (70, 48, 48, 3), np.uint8)
    write_clips([tmp_path / "a.mp4"], [clip], 10)

    def pooled(network, images, vra_compat):
        seen.append(whole(network, images, vra_compat))
        return seen[-1]

    monkeypatch.setattr(realism, "pooled_features", pooled)
    settings = Settings("crops", every=1, crop="frame")
    found = realism.clip_features(tmp_path / "a.mp4", scorer, settings)
    assert [len(part) for part in seen] == [32, 32, 6]
    joined = torch.cat(seen).numpy()
    assert np.allclose(found, np.concatenate([joined.mean(0), joined.std(0, ddof=1)]), atol=1e-5)
    scorer.bf16 = True
    rough = realism.clip_features(tmp_path / "a.mp4", scorer, settings)
    assert not np.array_equal(rough, found) and np.allclose(rough, found, atol=0.1)


def broken_off(path, every):
    yield from itertools.islice(read_frames(path, every), 2)
    raise VideoError(f"{path.name}: truncated")
