"""FaceSwapper: from the videos of FaceForensics++ to the frames and swaps of its protocol."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_faceswapper_scenes import scene
from test_faceswapper_video import film

from faceswapper import datasets
from faceswapper.align import DEMO_FRAMING
from faceswapper.prepare import PrepareConfig, prepare
from faceswapper.video import sampled
from shared.runtime import UserError


def test_frames_are_the_middles_of_equal_parts(tmp_path):
    clip = film(tmp_path / "v.mp4", [np.full((32, 32, 3), 20 * k, np.uint8) for k in range(12)])
    assert [round(frame.mean() / 20) for frame in sampled(clip, 3)] == [2, 6, 10]
    assert len(list(sampled(clip, 50))) == 12, "each once"


def test_a_video_that_ends_early_is_said(tmp_path, monkeypatch):
    clip = film(tmp_path / "v.mp4", [scene()] * 4)
    monkeypatch.setattr("faceswapper.video.cv2.VideoCapture.get", lambda self, what: 40.0, raising=False)
    with pytest.raises(UserError, match="v.mp4: 4 of 40 frames can be read"):
        list(sampled(clip, 2))


def test_prepare_makes_the_frames_and_the_list_of_the_protocol(tmp_path, capsys):
    videos, splits = tmp_path / "videos", tmp_path / "train.json"
    videos.mkdir()
    film(videos / "000.mp4", [scene((0,))] * 4)
    film(videos / "003.mp4", [scene((1,))] * 4)
    film(videos / "004.mp4", [scene((2,))] * 2 + [scene((), ())] * 2)
    Image.fromarray(scene((3,))).save(videos / "photo.png")
    splits.write_text(json.dumps([["000", "003"], ["004", "000"]]))
    eyes = (DEMO_FRAMING.eye_distance, DEMO_FRAMING.eye_row)
    config = PrepareConfig(videos, tmp_path / "data", "ff++", 64, frames=2, pairs=(splits,), eyes=eyes)
    swaps = datasets.SwapList(prepare(config), 64)
    assert swaps.originals.names == [
        "photo", "raw_000_0", "raw_000_1", "raw_003_0", "raw_003_1", "raw_004_0",
    ]  # fmt: skip
    both = [("raw_000_0", "raw_003_0"), ("raw_000_1", "raw_003_1")]
    back = [(target, source) for source, target in both]
    assert swaps.pairs == [*both, *back, ("raw_004_0", "raw_000_0"), ("raw_000_0", "raw_004_0")]
    said = capsys.readouterr().out
    assert f"left out: {videos / '004.mp4'}, frame 1 of 2: no face" in said
    assert "left out: the swap raw_004_1.png raw_000_1.png: a crop is missing" in said
    splits.write_text(json.dumps([["000"]]))
    with pytest.raises(UserError, match="train.json: not readable as pairs of videos"):
        prepare(replace(config, out=tmp_path / "more"))
    assert not (tmp_path / "more").exists(), "said before the work"
