"""DFGC 2022: from video files to scores: decoding, batches, resume, and bad files."""

import json
import subprocess
import time

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import nn

from dfgc2022 import boxes as box_sources
from dfgc2022 import pipeline
from dfgc2022.bench import reference_path
from dfgc2022.boxes import crop_square
from dfgc2022.model import Detector
from dfgc2022.pipeline import Scorer, Settings, frames_to_video, score_videos
from dfgc2022.video import VideoError, batched, list_videos, read_frames, write_clips
from shared.runtime import UserError


def film(frames: int = 12, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A moving gradient; its brightness tells the frame."""
    y, x = np.mgrid[:height, :width]
    clip = [np.stack([x + 5 * t, y + 5 * t, x + y + 5 * t], -1) + 3 * seed for t in range(frames)]
    return np.clip(np.array(clip), 0, 255).astype(np.uint8)


class Brightness(nn.Module):
    """A detector whose probability grows with the mean of the crop: two logits."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def scorer(size: int = 16) -> Scorer:
    return Scorer({"brightness": (Brightness(), Detector(Brightness, size), size)})


def table(path, rows) -> str:
    lines = ["video,frame,x1,y1,x2,y2,probability", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# --- video ------------------------------------------------------------------------------------------


def test_sampled_frames_are_those_of_a_full_decode(tmp_path):
    write_clips([tmp_path / "a.mp4"], [film(23)], crf=10)
    every = dict(read_frames(tmp_path / "a.mp4"))
    some = dict(read_frames(tmp_path / "a.mp4", 10))
    assert list(every) == list(range(23)) and list(some) == [0, 10, 20]
    assert all(np.array_equal(some[index], every[index]) for index in some)
    assert np.abs(every[20].astype(int) - film(23)[20]).mean() < 6


def test_libraries_say_nothing_of_a_bad_video(tmp_path, capfd):
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    with pytest.raises(VideoError, match="not a video"):
        list(read_frames(tmp_path / "bad.mp4"))
    assert not capfd.readouterr().err


def test_a_file_cut_in_its_header_is_called_so_whatever_its_name(tmp_path):
    write_clips([tmp_path / "whole.mp4"], [film(3)], 10)
    (tmp_path / "smoove.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:200])
    with pytest.raises(VideoError) as caught:
        list(read_frames(tmp_path / "smoove.mp4"))
    assert str(caught.value) == f"{tmp_path / 'smoove.mp4'}: truncated or not a video (no pictures in it)"


def test_many_clips_through_one_encoder_are_their_own_files(tmp_path):
    clips = [film(9, seed=seed) for seed in range(3)]
    paths = [tmp_path / f"{name}.mp4" for name in "abc"]
    write_clips(paths, clips, crf=5)
    for path, clip in zip(paths, clips, strict=True):
        frames = [frame for _, frame in read_frames(path)]
        assert len(frames) == 9
        assert np.abs(np.array(frames).astype(int) - clip).mean() < 6
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="even"):
        write_clips(paths, [film(2, height=47)] * 3, crf=5)


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        ("x: No space left on device", OSError, "No space left"),
        ("first\nUnknown encoder", UserError, "Unknown enc"),
    ],
)
def test_an_encoder_that_dies_is_one_message(tmp_path, monkeypatch, says, error, message):
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!/bin/sh\nprintf '{says}\\n' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(broken))
    with pytest.raises(error, match=message) as caught:
        write_clips([tmp_path / "a.mp4"], [film(100)], 10)
    assert "a.mp4" in str(caught.value)


def test_groups_are_bounded_in_bytes_and_keep_what_was_read():
    frame = np.zeros((10, 10, 3), np.uint8)

    def frames():
        yield from ((index, frame) for index in range(70))
        raise VideoError("broken")

    sizes = []
    with pytest.raises(VideoError):
        for group in batched(frames()):
            sizes.append(len(group))
    assert sizes == [32, 32, 6]
    assert [len(group) for group in batched(iter([(0, frame), (1, frame)]), budget=300)] == [1, 1]


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *map(str, arguments)], check=True)


@pytest.fixture
def contest(tmp_path):
    """A folder with good and bad videos, and their boxes."""
    folder = tmp_path / "clips"
    write_clips(
        [folder / f"good{number}.mp4" for number in range(3)], [film(21, seed=s) for s in range(3)], 10
    )
    write_clips([folder / "one-frame.mp4"], [film(1)], 10)
    write_clips([folder / "no-face.mp4"], [film(5)], 10)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video at all")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", folder / "sound.mp4")
    write_clips(
        [folder / "cut.mp4"], [np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8)], 10
    )
    whole = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "headless.mp4").write_bytes(whole[: len(whole) // 2][200:])
    odd = folder / "odd.avi"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=75x53:duration=0.2:rate=25", "-c:v", "ffv1", odd)
    names = ["good0", "good1", "good2", "one-frame", "cut", "odd"]
    rows = [(name, frame, 10, 8, 40, 40, 0.9) for name in names for frame in range(0, 60, 10)]
    return folder, table(tmp_path / "boxes.csv", rows)


def test_bad_videos_are_named_and_do_not_stop_the_rest(contest):
    folder, boxes = contest
    found = {clip.name: clip for clip in score_videos(list_videos(folder), scorer(), Settings(boxes))}
    notes = {name: clip.note for name, clip in found.items()}
    assert all(
        notes[name] == "" for name in ("good0.mp4", "good1.mp4", "good2.mp4", "one-frame.mp4", "odd.avi")
    )
    assert "an empty file" in notes["empty.mp4"]
    assert "sound but no pictures" in notes["sound.mp4"]
    assert "not a video" in notes["text.mp4"] and "not a video" in notes["headless.mp4"]
    assert "no face in the 1 frames" in notes["no-face.mp4"]
    assert "truncated or damaged" in notes["cut.mp4"] and "of 60 frames" in notes["cut.mp4"]
    for name in ("empty.mp4", "sound.mp4", "text.mp4", "no-face.mp4"):
        assert found[name].score == {"brightness": 0.5}
        assert name in notes[name]
    assert found["cut.mp4"].frames[:2] == [0, 10]  # what could be read is scored
    assert found["one-frame.mp4"].frames == [0]


def test_score_is_the_mean_over_sampled_frames(contest):
    """Against a slow path: every frame decoded, cropped, resized, normalised and scored alone."""
    folder, boxes = contest
    (clip,) = score_videos([folder / "good1.mp4"], scorer(), Settings(boxes))
    expected = []
    for index, frame in read_frames(folder / "good1.mp4"):
        if index % 10 == 0:
            x, y, side, _ = crop_square((10, 8, 40, 40), 64, 48)
            crop = cv2.resize(frame[y : y + side, x : x + side], (16, 16), interpolation=cv2.INTER_LINEAR)
            pixels = (crop / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            expected.append(1 / (1 + np.exp(-2 * pixels.mean())))
    assert clip.frames == [0, 10, 20]
    assert np.allclose(clip.probabilities["brightness"], expected, atol=1e-5)
    assert clip.score["brightness"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_pipeline_scores_like_the_every_frame_reference(contest, tmp_path):
    """What bench.py times: every frame cropped, written and read back, against sampled frames in memory."""
    folder, boxes = contest
    videos = [folder / f"good{number}.mp4" for number in range(3)]
    reference = reference_path(videos, scorer(), boxes, tmp_path / "crops")
    fast = [clip.score["brightness"] for clip in score_videos(videos, scorer(), Settings(boxes))]
    assert np.allclose(reference, fast, atol=1e-6) and len(set(reference)) == 3
    assert len(list((tmp_path / "crops" / "good0.mp4").iterdir())) == 3  # frames with a box in the table


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_across_videos_change_nothing(contest, workers):
    folder, boxes = contest
    videos = list_videos(folder)
    one = [score_videos([path], scorer(), Settings(boxes), batch=1)[0] for path in videos]
    together = score_videos(videos, scorer(), Settings(boxes), batch=7, workers=workers)
    assert [clip.name for clip in together] == [path.name for path in videos]
    for a, b in zip(one, together, strict=True):
        assert a.frames == b.frames and a.note == b.note
        assert a.score["brightness"] == pytest.approx(b.score["brightness"], abs=1e-6)


def test_an_interrupted_contest_goes_on(contest, tmp_path, monkeypatch):
    folder, boxes = contest
    videos, out = list_videos(folder), tmp_path / "scores.jsonl"
    whole = score_videos(videos, scorer(), Settings(boxes), out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of a line
    seen = []
    monkeypatch.setattr(
        "dfgc2022.pipeline.read_frames", lambda path, every: seen.append(path) or read_frames(path, every)
    )
    again = score_videos(videos, scorer(), Settings(boxes), out)
    assert again == whole and len(seen) == len(videos) - 3
    assert sorted(out.read_text().splitlines()) == sorted(line.strip() for line in lines)
    with pytest.raises(UserError, match="other detectors, boxes or settings"):
        score_videos(videos, scorer(), Settings(boxes, every=5), out)
    out.write_text("hello\n")
    with pytest.raises(UserError, match="not a file of scores"):
        score_videos(videos, scorer(), Settings(boxes), out)
    out.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="scores.jsonl: not readable as scores of videos"):
        score_videos(videos, scorer(), Settings(boxes), out)
    with pytest.raises(UserError, match="not readable as scores of videos"):
        score_videos(videos, scorer(), Settings(boxes), tmp_path)


def test_scores_of_another_video_or_other_weights_are_not_taken_over(tmp_path):
    out = tmp_path / "scores.jsonl"
    for name, seed in (("one", 0), ("two", 1)):
        write_clips([tmp_path / name / "a.mp4"], [film(11, seed=seed)], 10)
    boxes = table(tmp_path / "b.csv", [("a", 0, 10, 8, 40, 40, 0.9)])
    one, two = ([tmp_path / name / "a.mp4"] for name in ("one", "two"))
    expected = [score_videos(path, scorer(), Settings(boxes)) for path in (one, two)]
    assert expected[0][0].score != expected[1][0].score
    found = [score_videos(path, scorer(), Settings(boxes), out) for path in (one, two, two)]
    assert [clips[0].score for clips in found] == [clips[0].score for clips in (*expected, expected[1])]
    trained_on = scorer()
    for network, _, _ in trained_on.networks.values():
        network.register_buffer("bias", torch.ones(1))
    with pytest.raises(UserError, match="other detectors, boxes or settings"):
        score_videos(two, trained_on, Settings(boxes), out)


def test_scores_of_other_boxes_are_not_taken_over(tmp_path, monkeypatch):
    videos = [tmp_path / "a.mp4"]
    write_clips(videos, [film(1)], 10)
    found = []
    for number, corner in enumerate((40, 20)):  # the table is corrected under its own name
        boxes = table(tmp_path / "b.csv", [("a", 0, 0, 0, corner, corner, 0.9)])
        found.append(score_videos(videos, scorer(), Settings(boxes), tmp_path / f"{number}.jsonl")[0].score)
    assert found[0] != found[1]
    with pytest.raises(UserError, match="other detectors, boxes or settings"):
        score_videos(videos, scorer(), Settings(boxes), tmp_path / "0.jsonl")
    score_videos(videos, scorer(), Settings("auto"), tmp_path / "auto.jsonl")
    monkeypatch.setattr(box_sources, "source_mark", lambda choice: "mtcnn")  # installed since
    monkeypatch.setattr(pipeline, "source_mark", lambda choice: "mtcnn")
    monkeypatch.setitem(box_sources.NAMED, "mtcnn", box_sources.SkinBoxes)
    with pytest.raises(UserError, match="other detectors, boxes or settings"):
        score_videos(videos, scorer(), Settings("auto"), tmp_path / "auto.jsonl")


def test_several_faces(tmp_path):
    write_clips([tmp_path / "a.mp4"], [film(1)], 10)
    boxes = table(tmp_path / "b.csv", [("a", 0, 0, 0, 15, 15, 0.9), ("a", 0, 30, 20, 45, 40, 0.5)])
    best, largest, mean = (
        score_videos([tmp_path / "a.mp4"], scorer(), Settings(boxes, faces=faces))[0].score["brightness"]
        for faces in ("best", "max", "mean")
    )
    assert largest > best and mean == pytest.approx((best + largest) / 2, abs=1e-6)


@pytest.mark.parametrize("faces", ["max", "mean"])
def test_an_hour_of_frames_with_two_faces_each_is_merged_at_once(faces):
    values = np.random.default_rng(0).random(2 * 30_000)
    frames = np.repeat(np.arange(30_000), 2)
    clip = pipeline.ClipScore("a.mp4", frames.tolist(), {"a": values.tolist()})
    start = time.perf_counter()
    pipeline._finish(clip, Settings("crops", faces=faces), "")
    assert time.perf_counter() - start < 10  # work per pair of frames takes minutes
    assert clip.frames == list(range(30_000))
    assert np.allclose(clip.probabilities["a"], getattr(values.reshape(-1, 2), faces)(1))


def test_frames_to_video():
    assert frames_to_video([0.2, 0.9, 0.5]) == pytest.approx(1.6 / 3)
    assert frames_to_video([0.2, 0.9, 0.5], "confident") == pytest.approx((0.6 * 0.2 + 0.8 * 0.9) / 1.4)
    assert frames_to_video([], "mean") == frames_to_video([], "confident") == 0.5
    assert frames_to_video([0.5, 0.5], "confident") == 0.5


def test_folders_of_saved_crops_use_every_tenth_number(tmp_path):
    folder = tmp_path / "a.mp4"
    folder.mkdir()
    for index in (0, 5, 10, 10_000):
        cv2.imwrite(str(folder / f"{index:04d}.png"), np.full((20, 20, 3), 100, np.uint8))
    assert list_videos(folder, crops=True) == list_videos(tmp_path, crops=True) == [folder]
    with pytest.raises(UserError, match="holds no video"):
        list_videos(folder)
    out = tmp_path / "scores.jsonl"
    (clip,) = score_videos([folder], scorer(), Settings("skin"), out)  # crops need no boxes
    assert clip.frames == [0, 10, 10_000]
    cv2.imwrite(str(folder / "0010.png"), np.full((20, 20, 3), 200, np.uint8))
    (again,) = score_videos([folder], scorer(), Settings("skin"), out)
    assert again.score["brightness"] > clip.score["brightness"]
    (folder / "0020.png").write_text("x")
    (clip,) = score_videos([folder], scorer(), Settings())
    assert "0020.png: not a readable image" in clip.note
    (folder / "face.png").write_text("x")
    assert "frame number" in score_videos([folder], scorer(), Settings("crops"))[0].note


def test_mistakes_of_the_user(tmp_path, contest):
    folder, boxes = contest
    with pytest.raises(UserError, match="no such video or folder"):
        list_videos(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no video"):
        (tmp_path / "nothing").mkdir()
        list_videos(tmp_path / "nothing")
    (tmp_path / "nothing" / "._clip.mp4").write_bytes(b"what macOS leaves beside a clip")
    with pytest.raises(UserError, match="holds no video"):
        list_videos(tmp_path / "nothing")
    with pytest.raises(UserError, match="two videos are called good0.mp4"):
        score_videos([folder / "good0.mp4"] * 2, scorer(), Settings(boxes))
    with pytest.raises(VideoError, match="no such video"):
        list(read_frames(tmp_path / "absent.mp4"))


def test_4k(tmp_path):
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "color=c=gray:size=3840x2160:duration=0.08:rate=25",
        "-preset",
        "ultrafast",
        tmp_path / "k.mp4",
    )
    boxes = table(tmp_path / "b.csv", [("k", 0, 1000, 500, 2000, 1500, 0.9)])
    (clip,) = score_videos([tmp_path / "k.mp4"], scorer(), Settings(boxes))
    assert clip.frames == [0] and clip.note == ""


def test_score_file_is_json_lines(contest, tmp_path):
    folder, boxes = contest
    score_videos([folder / "good0.mp4"], scorer(), Settings(boxes), tmp_path / "s.jsonl")
    header, line = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert header["settings"]["every"] == 10
    assert line["name"] == "good0.mp4" and line["frames"] == [0, 10, 20]
