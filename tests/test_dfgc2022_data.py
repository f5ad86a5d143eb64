"""DFGC 2022: list files, the layouts of the public sets, extraction."""

import dataclasses
import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dfgc2022 import extract
from dfgc2022.data import CropFolders, Middle, read_list
from dfgc2022.datasets import (
    DATASETS,
    FF_METHODS,
    celeb_df,
    deeperforensics,
    dfdc,
    dfdc_crops,
    dfgc2022,
    faceforensics,
)
from dfgc2022.extract import extract_all
from dfgc2022.video import write_clips
from shared.runtime import UserError


def touch(path, content: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def crop(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((30, 30, 3), level, np.uint8))


# --- lists and layouts ----------------------------------------------------------------------------------


def test_list_files(tmp_path):
    for name in ("a.mp4", "b c"):
        crop(tmp_path / name / "0000.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "l.txt").write_text("a.mp4 1\nb c\t0\n\nx_landmarks 1\nempty 1\n")
    folders, empty = read_list(tmp_path / "l.txt")
    assert [(f.folder.name, f.label) for f in folders] == [("a.mp4", 1), ("b c", 0)] and empty == 1
    (tmp_path / "l.txt").write_text("a.mp4 1\n", encoding="utf-8-sig")
    assert [f.folder.name for f in read_list(tmp_path / "l.txt")[0]] == ["a.mp4"]
    for text, message in (
        ("a.mp4 2\n", "line 1"),
        ("gone 1\n", "no folder"),
        ("a.mp4\n", "line 1"),
        ("", "no folder with"),
    ):
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / "l.txt")


def test_one_random_crop_per_video_and_draw(tmp_path):
    for video, levels in (("a", (10, 20, 30)), ("b", (200,))):
        for index, level in enumerate(levels):
            crop(tmp_path / video / f"{index:04d}.png", level)
    (tmp_path / "l.txt").write_text("a 0\nb 1\n")
    folders, _ = read_list(tmp_path / "l.txt")
    dataset = CropFolders(folders, 16, seed=0, flips_only=True, cache=True)
    seen = {int(dataset[0, draw][0][0, 0, 0]) for draw in range(40)}
    assert seen == {10, 20, 30} and len(dataset) == 2
    assert torch.equal(dataset[0, 7][0], dataset[0, 7][0]) and dataset[1, 0][1] == 1
    few = CropFolders(folders, 16, seed=0, flips_only=True, frames=2)
    assert {int(few[0, draw][0][0, 0, 0]) for draw in range(20)} == {10, 30}
    balanced = CropFolders([*folders, *folders[1:] * 9], 16, seed=0, flips_only=True, balance=True)
    assert np.mean([balanced[0, draw][1] for draw in range(300)]) == pytest.approx(0.5, abs=0.1)
    blended = CropFolders(folders, 16, seed=0, blending=1.0)
    assert blended[0, 0][1] == 1
    assert int(Middle(folders, 16)[0][0][0, 0, 0]) == 20
    (tmp_path / "b" / "0000.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="0000.png: not a readable image"):
        CropFolders(folders, 16, seed=0)[1, 0]
    (tmp_path / "b" / "first.png").write_bytes(b"x")
    with pytest.raises(UserError, match="frame number"):
        CropFolders(folders, 16, seed=0)[1, 0]


def test_faceforensics(tmp_path, capsys):
    touch(tmp_path / "original_sequences/youtube/c23/videos/071.mp4")
    touch(tmp_path / "manipulated_sequences/Deepfakes/c23/videos/071_054.mp4")
    touch(tmp_path / "splits/test.json", json.dumps([["054", "071"]]).encode())
    found = faceforensics(tmp_path, "c23", ["Deepfakes"])
    assert not capsys.readouterr().out and faceforensics(tmp_path, "c23") == found
    assert "without Face2Face, FaceSwap, FaceShifter, NeuralTextures" in capsys.readouterr().out
    assert [(v.path.name, v.label, v.split) for v in found] == [
        ("071.mp4", 0, "test"),
        ("071_054.mp4", 1, "test"),
    ]
    with pytest.raises(UserError, match="FaceSwap"):
        faceforensics(tmp_path, "c23", ["FaceSwap"])


def test_deepfakedetection_has_its_own_reals(tmp_path):
    for film in (
        "original_sequences/actors/c23/videos/01__hugging",
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__hugging__YVGY8LOK",
    ):
        touch(tmp_path / f"{film}.mp4")
    found = DATASETS["deepfakedetection-c23"](tmp_path)  # the films of YouTube are not there, nor missed
    assert [(v.source, v.label) for v in found] == [
        ("FaceForensics++/actors/c23", 0),
        ("FaceForensics++/DeepFakeDetection/c23", 1),
    ]
    assert [v.people for v in found] == [("01",), ("01", "02")]
    touch(tmp_path / "original_sequences/youtube/c23/videos/071.mp4")
    assert DATASETS["deepfakedetection-c23"](tmp_path) == found


def test_celeb_df(tmp_path):
    for name in ("Celeb-real/id0_0000", "YouTube-real/00170", "Celeb-synthesis/id0_id1_0000"):
        touch(tmp_path / f"{name}.mp4")
    with pytest.raises(UserError, match="List_of_testing_videos"):
        celeb_df(tmp_path)
    (tmp_path / "List_of_testing_videos.txt").write_text("1 YouTube-real/00170.mp4\n")
    assert [(v.label, v.split) for v in celeb_df(tmp_path)] == [(0, "train"), (0, "test"), (1, "train")]
    assert [v.people for v in celeb_df(tmp_path)] == [("id0",), ("00170",), ("id0", "id1")]


def test_dfdc_videos_and_crops(tmp_path, capsys):
    part = tmp_path / "dfdc_train_part_3"
    entries = {"a.mp4": {"label": "FAKE", "original": "b.mp4"}, "b.mp4": {"label": "REAL"}}
    touch(part / "metadata.json", json.dumps(entries).encode())
    for name in entries:
        touch(part / name)
    assert [(v.path.name, v.label) for v in dfdc(tmp_path)] == [("a.mp4", 1), ("b.mp4", 0)]
    assert [v.people for v in dfdc(tmp_path)] == [("b.mp4",), ("b.mp4",)]  # the fake's original
    (part / "a.mp4").unlink()
    with pytest.raises(UserError, match="a.mp4: named in metadata.json"):
        dfdc(tmp_path)
    crop(part / "a.mp4" / "0000.png")
    folders, empty = dfdc_crops(tmp_path)
    assert [(f.folder.name, f.label, f.people) for f in folders] == [("a.mp4", 1, ("b.mp4",))]
    assert empty == 1
    assert "49 of 50 parts of DFDC are not there" in capsys.readouterr().out
    for content, message in (
        (b"{", "metadata.json: not readable as DFDC's labels"),
        (b"[]", "metadata.json: not readable as DFDC's labels"),
        (b'{"a.mp4": {"split": "train"}}', "metadata.json: a.mp4 has no label FAKE or REAL"),
        (b'{"a.mp4": {"label": "fake"}}', "metadata.json: a.mp4 has no label FAKE or REAL"),
    ):
        touch(part / "metadata.json", content)
        for reader in (dfdc, dfdc_crops):
            with pytest.raises(UserError, match=message):
                reader(tmp_path)


def test_deeperforensics(tmp_path, capsys):
    touch(tmp_path / "manipulated_videos/end_to_end_mix_4_distortions/000_M101.mp4")
    touch(tmp_path / "source_videos/M101/light_up/a.mp4")
    touch(tmp_path / "lists/splits/test.txt", b"000_M101.mp4\n")
    assert [(v.label, v.split) for v in deeperforensics(tmp_path)] == [(0, ""), (1, "test")]
    assert [v.people for v in deeperforensics(tmp_path)] == [("M101",), ("000", "M101")]
    extract.main(extract.Config(tmp_path, tmp_path / "crops", "deeperforensics", split="test", boxes="skin"))
    assert "1 videos stand in no split and are left out, 1 of them real" in capsys.readouterr().out


@pytest.fixture
def release(tmp_path):
    base = tmp_path / "Detection Dataset"
    rows = [
        "VideoName , LABEL,split,target,compression,face-swap method",
        "aaaaaaaaaa,1,Public,1/1/3,c40,JoyFang-2",
        "bbbbbbbbbb.mp4,0,Public,2/1,none,",
        "cccccccccc.mp4,1,Private,3/1/2,,x",
    ]
    touch(base / "Detection Dataset Meta.csv", "\n".join(rows).encode("utf-8-sig"))
    touch(base / "Public Label.json", b'{"aaaaaaaaaa.mp4": 1, "bbbbbbbbbb.mp4": 0}')
    touch(base / "Private Label.json", b'{"cccccccccc.mp4": 1}')
    for name in ("Public/aaaaaaaaaa", "Public/bbbbbbbbbb", "Private/cccccccccc"):
        touch(base / f"{name}.mp4")
    return tmp_path


def test_dfgc2022_release(release):
    found = dfgc2022(release)
    fake, real, private = found.clips
    assert (fake.creator, fake.compression, fake.target) == (
        "JoyFang-2",
        "c40",
        "1/1/3",
    )  # no date made of it
    assert (real.label, real.creator, private.part, private.compression) == (0, "", "Private-1", "none")
    assert found.paths["cccccccccc.mp4"].is_file()
    video = release / "Detection Dataset/Public/aaaaaaaaaa.mp4"
    video.unlink()
    crop(video / "0000.png")
    assert dfgc2022(release).clips == found.clips  # a folder of crops stands for its video
    assert len(dfgc2022(release / "Detection Dataset", ["Public"]).clips) == 2


def test_rounds_come_from_the_creation_tracks_lists(release):
    touch(release / "Result Clips" / "metadata_C1.txt", b"1/1/3\n1/1/7\n")
    touch(release / "Result Clips" / "metadata_C2.txt", b"3/1/2\n")
    assert [clip.round for clip in dfgc2022(release).clips] == ["1", "", "2"]
    touch(release / "Result Clips" / "metadata_C3.txt", b"1/1/3\n")
    with pytest.raises(UserError, match="1/1/3 is a target of round 1 already"):
        dfgc2022(release)


def test_clips_that_the_table_lacks_are_counted(release, capsys):
    touch(release / "Detection Dataset/Public/dddddddddd.mp4")
    touch(release / "Detection Dataset/Public Label.json", b'{"dddddddddd.mp4": 1, "bbbbbbbbbb.mp4": 0}')
    found = dfgc2022(release)
    assert found.clips[0].creator == "" and len(found.clips) == 3
    assert "1 clips are not in the table (dddddddddd.mp4)" in capsys.readouterr().out


def test_no_release_says_what_was_expected_and_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"no DFGC 2022 clips.*Detection Dataset Meta.csv.*NiCE-X/DFGC-2022"):
        dfgc2022(tmp_path / "absent")


def test_extraction_leaves_no_crops_of_an_earlier_call_and_loses_none(tmp_path):
    write_clips([tmp_path / "a.mp4"], [np.full((11, 48, 64, 3), 90, np.uint8)], 10)
    part = tmp_path / "out" / ".a.mp4.part"
    crop(part / "0007.png")  # of a call that was killed, with another --every
    videos = [(tmp_path / "a.mp4", 0)]
    assert extract_all(videos, tmp_path / "out", "crops", every=10, crop="frame") == []
    names = sorted(path.name for path in (tmp_path / "out" / "a.mp4").glob("*.png"))
    assert names == ["0000.png", "0010.png"]


def test_a_second_extraction_says_what_the_first_one_said_and_mixes_no_settings(tmp_path, capsys):
    write_clips([tmp_path / "in" / "a.mp4"], [np.full((11, 48, 64, 3), 90, np.uint8)], 10)
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no film")
    config = extract.Config(tmp_path / "in", tmp_path / "out", label=0, boxes="crops", crop="frame")
    for _ in range(2):
        extract.main(config)
        said = capsys.readouterr().out
        assert "bad.mp4: truncated or not a video" in said and "1 of 2 videos without a remark" in said
    for change in ({"every": 5}, {"boxes": "skin"}, {"crop": "box"}):
        with pytest.raises(UserError, match="a.mp4: holds crops made with other boxes or settings"):
            extract.main(dataclasses.replace(config, **change))
    crop(tmp_path / "own" / "a.mp4" / "0000.png")  # crops of another origin are taken as they are
    videos = [(tmp_path / "in" / "a.mp4", 0)]
    assert extract_all(videos, tmp_path / "own", "crops", every=1) == []


def test_forgeries_of_one_name_by_several_methods_are_all_extracted(tmp_path):
    places = ["original_sequences/youtube/c23/videos/000.mp4"]
    places += [f"manipulated_sequences/{method}/c23/videos/000_003.mp4" for method in FF_METHODS]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True)
        write_clips([tmp_path / place], [np.full((2, 48, 64, 3), 90, np.uint8)], 10)
    extract.main(
        extract.Config(tmp_path, tmp_path / "crops", "faceforensics-c23", boxes="crops", crop="frame")
    )
    folders, empty = read_list(tmp_path / "crops" / "list.txt")
    found = {(folder.folder.relative_to(tmp_path / "crops").as_posix(), folder.label) for folder in folders}
    assert found == {(place, int("manipulated" in place)) for place in places} and empty == 0
    assert {folder.people for folder in folders} == {("000",), ("000", "003")}
    (tmp_path / "crops" / "people.json").write_text("[]")
    with pytest.raises(UserError, match="people.json: not readable as people of videos"):
        read_list(tmp_path / "crops" / "list.txt")


def test_a_crop_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """OpenCV says no more than False when the disk is full."""
    write_clips([tmp_path / "a.mp4"], [np.full((3, 48, 64, 3), 90, np.uint8)], 10)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(cv2, "imwrite", lambda path, image: False)
    with pytest.raises(OSError, match="No space left"):
        extract_all([(tmp_path / "a.mp4", 0)], tmp_path / "out", "crops", every=1, crop="frame")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Public Label.json", b'{"aaaaaaaaaa.mp4": 0}', "label 0 in Public Label.json, 1 in the table"),
        ("Public Label.json", b'{"aaaaaaaaaa.mp4": "fake"}', "neither 0 nor 1"),
        ("Public Label.json", b'{"zzzzzzzzzz.mp4": 1}', "labelled but not there"),
        ("Public Label.json", b"[", "Label.json: not readable as labels of videos"),
        ("Detection Dataset Meta.csv", b"a,b\n1,2\n", "column videoName is missing"),
        ("Detection Dataset Meta.csv", b"videoName\na.mp4\na\n", "a stands there twice"),
    ],
)
def test_contradictions_in_a_release_are_named(release, name, content, message):
    (release / "Detection Dataset" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        dfgc2022(release)
