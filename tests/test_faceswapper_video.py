"""FaceSwapper in use: videos, and the commands that read and write files."""

import csv
import errno
import json
import subprocess

import cv2
import helpers
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from test_faceswapper_scenes import eyes_of, scene, small_swapper

from faceswapper import datasets, detect, video
from faceswapper import predict as predicting
from faceswapper.align import DEMO_FRAMING, cut, to_tensor
from faceswapper.detect import open_detector
from faceswapper.export import export
from faceswapper.model import Size
from faceswapper.photo import Photo
from faceswapper.pipeline import Swapper
from faceswapper.predict import Networks, PredictConfig, predict, swap_photos, swap_video
from faceswapper.prepare import COLUMNS, PrepareConfig, prepare
from faceswapper.video import VideoReader, VideoWriter, describe, in_batches
from shared.io import SYNTHETIC_SOURCE, image_grid
from shared.runtime import UserError, run_main


@pytest.fixture(scope="module")
def swapper():
    return small_swapper()


# --- videos -----------------------------------------------------------------------------------------


def film(path, frames, sound=False, rate=10, size=None):
    """A test video through ffmpeg."""
    height, width = frames[0].shape[:2]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
    ]
    command += ["-s", f"{width}x{height}", "-r", str(rate), "-i", "-"]
    if sound:
        command += ["-f", "lavfi", "-i", "sine=frequency=440", "-shortest", "-c:a", "aac"]
    command += ["-c:v", "libx264", "-g", "2", "-bf", "0", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=b"".join(f.tobytes() for f in frames), check=True)
    return path


def moving(count=6):
    return [scene((0,), ((30 + k, 20),)) for k in range(count)]


def test_a_video_keeps_its_length_rate_size_and_sound(tmp_path, swapper):
    clip = film(tmp_path / "v.mp4", moving(), sound=True)
    config = PredictConfig((tmp_path / "s.png",), clip, tmp_path / "out", batch_size=4)
    source = swapper.source([Photo("s.png", scene((1,)))])
    record = swap_video(config, swapper, source, "by a test")
    assert record["v.mp4"] == {"frames": 6, "swapped": 6, "remark": None}
    made = tmp_path / "out" / "s_FS_v.mp4"
    said = describe(made)
    assert "Audio: aac" in said and "synthetic video: by a test" in said and SYNTHETIC_SOURCE in said
    back = VideoReader(made)
    frames = list(back)
    assert len(frames) == 6 and back.rate == pytest.approx(10, abs=0.1) and back.size == (200, 160)
    difference = np.abs(frames[3].astype(int) - moving()[3]).mean(-1)
    assert difference[:18].mean() < 4 and difference[40:100, 50:110].mean() > 8
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["s_FS_v.mp4"]


def test_batches_of_frames_equal_frame_by_frame(tmp_path, swapper):
    clip = film(tmp_path / "v.mp4", moving(5))
    table = tmp_path / "eyes.csv"
    (lx, ly), (rx, ry) = eyes_of(0)
    table.write_text(f"file,left_x,left_y,right_x,right_y\nv.mp4,{lx},{ly},{rx},{ry}\n")
    given = Swapper(
        swapper.generator, open_detector(str(table)), swapper.landmarker, swapper.parser, DEMO_FRAMING
    )
    source = swapper.source([Photo("s.png", scene((1,)))])
    runs = [[r.photo for r in given.video(VideoReader(clip), source, batch_size=size)] for size in (1, 3)]
    for a, b in zip(*runs, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert [len(g) for g in in_batches(iter(moving(5)), 2)] == [2, 2, 1]


def test_whole_frames_are_searched_until_a_face_is_found_and_crops_read_once(tmp_path, monkeypatch):
    swapper, whole, passes = small_swapper(), [], []
    source = swapper.source([Photo("s.png", scene((1,)))])
    find, read = detect.FinderDetector.__call__, detect.read_crops
    monkeypatch.setattr(
        detect.FinderDetector, "__call__", lambda self, p, n: whole.append(len(p)) or find(self, p, n)
    )
    monkeypatch.setattr(detect, "read_crops", lambda *a: passes.append(len(a[0])) or read(*a))
    clip = film(tmp_path / "v.mp4", [scene((), ())] * 2 + moving(4))
    results = list(swapper.video(VideoReader(clip), source))
    assert [r.face is not None for r in results] == [False] * 2 + [True] * 4
    assert whole == [1, 1, 1] and passes == [4]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_pictures_a_few_at_a_time_equal_all_at_once(strength):
    swapper = small_swapper()
    assert swapper.at_once > 5
    source = swapper.source([Photo("s.png", scene((1,)))])
    face = swapper.detector([scene()], ["t"])[0][0]
    crops = swapper.describe(to_tensor([swapper.aligned(frame, face)[0] for frame in moving(5)]))
    whole = swapper.swap(crops, source, strength)
    swapper.at_once = 2
    torch.testing.assert_close(swapper.swap(crops, source, strength), whole, atol=1e-4, rtol=1e-4)
    swapper.generator.size = Size()
    assert swapper._at_once() == 1


def test_frames_without_a_face_pass_and_the_same_person_is_followed(tmp_path, swapper):
    frames = (
        [scene((0, 1), ((2, 30), (102, 40)))] * 2 + [scene((), ())] + [scene((0, 1), ((2, 30), (102, 40)))]
    )
    clip = film(tmp_path / "v.mp4", frames)
    source = swapper.source([Photo("s.png", scene((2,)))])
    results = list(swapper.video(VideoReader(clip), source, choice=1, batch_size=2))
    assert [r.face is not None for r in results] == [True, True, False, True]
    assert all(r.face.box[0] > 90 for r in results if r.face)
    nothing = film(tmp_path / "w.mp4", [scene((), ())] * 3)
    config = PredictConfig((tmp_path / "s.png",), nothing, tmp_path / "out")
    with pytest.raises(UserError, match="no frame shows a usable face"):
        swap_video(config, swapper, source, "x")
    assert not list((tmp_path / "out").iterdir())


def test_videos_of_changing_size_and_damaged_ones(tmp_path):
    large = film(tmp_path / "a.ts", moving(4))
    small = film(tmp_path / "b.ts", [cv2.resize(f, (100, 80)) for f in moving(4)])
    (tmp_path / "both.ts").write_bytes(large.read_bytes() + small.read_bytes())
    reader = VideoReader(tmp_path / "both.ts")
    frames = list(reader)
    assert len(frames) >= 6 and {f.shape for f in frames} == {(*reader.size[::-1], 3)}
    clip = film(tmp_path / "v.mp4", moving(40))
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 4
    middle = (start + len(content)) // 2
    content[middle : middle + 300] = bytes(300)  # damage inside
    (tmp_path / "damaged.mp4").write_bytes(content)
    damaged = VideoReader(tmp_path / "damaged.mp4")
    count = sum(1 for _ in damaged)
    assert count >= 30 and (count == 40 or damaged.remarks)
    (tmp_path / "cut.ts").write_bytes(large.read_bytes()[: large.stat().st_size * 2 // 3])
    assert 1 <= sum(1 for _ in VideoReader(tmp_path / "cut.ts")) <= 4
    for name, content in (
        ("empty.mp4", b""),
        ("text.mp4", b"no video"),
        ("half.mp4", clip.read_bytes()[:2000]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="no frame can be read"):
            VideoReader(tmp_path / name)
    with pytest.raises(UserError, match="no such video"):
        VideoReader(tmp_path / "none.mp4")


class ScriptedCapture:
    """Stands for OpenCV's capture: a frame, one that cannot be decoded, one of another size."""

    def __init__(self):
        self.left = [np.full((8, 8, 3), 10, np.uint8), None, np.full((4, 4, 3), 20, np.uint8)]

    def grab(self):
        return bool(self.left)

    def retrieve(self):
        frame = self.left.pop(0)
        return frame is not None, frame

    def release(self):
        pass


def test_what_a_reader_does_with_single_bad_frames(tmp_path):
    reader = VideoReader(film(tmp_path / "v.mp4", [np.zeros((8, 8, 3), np.uint8)] * 2))
    reader.capture, reader.announced = ScriptedCapture(), 100
    frames = list(reader)
    assert [f.shape for f in frames] == [(8, 8, 3)] * 4
    assert [int(f.max()) for f in frames[1:]] == [10, 10, 20]
    assert [r.split(" ")[0] for r in reader.remarks] == ["1", "1", "the"]


def test_sound_that_mp4_cannot_hold_is_converted_and_errors_leave_nothing(tmp_path):
    clip = tmp_path / "v.avi"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "lavfi", "-i"]
    command += [
        "testsrc=size=64x48:rate=5:duration=1",
        "-f",
        "lavfi",
        "-i",
        "sine=duration=1",
        "-c:a",
        "adpcm_ms",
    ]
    subprocess.run([*command, "-c:v", "mpeg4", str(clip)], check=True)
    with VideoWriter(tmp_path / "o.mp4", (65, 49), 5.0, "x", clip) as writer:  # odd sides lose a row
        for _ in range(5):
            writer.write(np.zeros((49, 65, 3), np.uint8))
    assert "Audio:" in describe(tmp_path / "o.mp4") and VideoReader(tmp_path / "o.mp4").size == (64, 48)
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "p.mp4", (64, 48), 5.0, "x", None):
        raise ZeroDivisionError
    assert {p.name for p in tmp_path.iterdir()} == {"v.avi", "o.mp4"}
    with pytest.raises(UserError, match="written as .mp4"):
        VideoWriter(tmp_path / "p.gif", (64, 48), 5.0, "x", None)


def test_a_full_disk_is_a_full_disk(tmp_path, monkeypatch):
    """ffmpeg ends, and the pipe to it breaks."""
    full = ["sh", "-c", "echo 'av_interleaved_write_frame(): No space left on device' >&2; exit 1", "sh"]
    monkeypatch.setattr(video, "_ffmpeg", lambda: full)
    frame = np.zeros((480, 640, 3), np.uint8)
    with pytest.raises(OSError) as raised, VideoWriter(tmp_path / "o.mp4", (640, 480), 5.0, "x", None) as out:
        for _ in range(20):
            out.write(frame)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "o.mp4")
    assert not list(tmp_path.iterdir())


# --- commands ---------------------------------------------------------------------------------------


def test_photos_of_one_name_in_a_folder_have_results_of_their_own(tmp_path, swapper):
    targets = tmp_path / "targets"
    targets.mkdir()
    Image.fromarray(scene()).save(targets / "t.png")
    Image.fromarray(scene((2,))).save(targets / "t.jpg", quality=95)
    Image.fromarray(scene((3,))).save(targets / "u.png")
    config = PredictConfig((tmp_path / "s.png",), targets, tmp_path / "out", strip=0)
    swap_photos(config, swapper, swapper.source([Photo("s.png", scene((1,)))]), "by a test")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["s_FS_t.jpg.png", "s_FS_t.png.png", "s_FS_u.png"]


def test_strips_of_a_grey_photo_are_grey(tmp_path, swapper):
    Image.fromarray(scene()).convert("L").save(tmp_path / "t.png")
    config = PredictConfig((tmp_path / "s.png",), tmp_path / "t.png", tmp_path / "out", strip=2, levels=True)
    swap_photos(config, swapper, swapper.source([Photo("s.png", scene((1,)))]), "by a test")
    for kind in ("", "_strip", "_levels"):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"s_FS_t{kind}.png").convert("RGB"))
        assert (pixels == pixels[..., :1]).all(), kind


def test_the_levels_are_named_by_their_sides_and_the_last_is_the_swap(tmp_path, swapper, monkeypatch):
    """The finest side picture has the swap's own side: two columns of one name would not tell them apart."""
    Image.fromarray(scene()).save(tmp_path / "t.png")
    named = []
    monkeypatch.setattr(
        predicting, "image_grid", lambda x, **how: named.append(how["column_labels"]) or image_grid(x, **how)
    )
    config = PredictConfig((tmp_path / "s.png",), tmp_path / "t.png", tmp_path / "out", strip=0, levels=True)
    swap_photos(config, swapper, swapper.source([Photo("s.png", scene((1,)))]), "by a test")
    assert named == [["32 px", "64 px", "swap"]]


def test_a_face_by_its_number_is_said_to_be_missing_by_its_option(tmp_path, swapper):
    source = swapper.source([Photo("s.png", scene((1,)))])
    with pytest.raises(UserError, match="s.png: --source-face 1: there is 1 face"):
        swapper.source([Photo("s.png", scene((1,)))], 1)
    Image.fromarray(scene()).save(tmp_path / "t.png")
    Image.fromarray(scene((0, 1), ((2, 30), (102, 40)))).save(tmp_path / "u.png")
    config = PredictConfig((tmp_path / "s.png",), tmp_path, tmp_path / "out", face=1, strip=0)
    records = swap_photos(config, swapper, source, "by a test")
    assert records["u.png"]["remark"] is None
    said = "shows no face number 1: there is 1 face, numbered from 0 from the left"
    assert records["t.png"]["remark"] == said
    for name, synthetic in (("t", False), ("u", True)):  # a copy of a photo is no synthetic picture
        with Image.open(tmp_path / "out" / f"s_FS_{name}.png") as made:
            assert ("DigitalSourceType" in made.text) is synthetic


def test_prepare_writes_what_the_loader_reads(tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    Image.fromarray(scene()).save(photos / "a.png")
    Image.fromarray(scene((1, 2), ((2, 30), (102, 40)))).save(photos / "more" / "a.png")
    Image.fromarray(scene((), ())).save(photos / "b.png")
    eyes = (DEMO_FRAMING.eye_distance, DEMO_FRAMING.eye_row)
    out = prepare(PrepareConfig(photos, tmp_path / "data", "mine", 64, "all", eyes=eyes, batch_size=2))
    with open(out / "index.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS) and [r["file"] for r in rows] == ["a.png", "a_2.png", "a_3.png"]
    for suffix in ("", "_lm_images", "_mask_images", "_parsing_images"):
        assert len(list((out / f"mine{suffix}").iterdir())) == 3
    drawn = np.asarray(Image.open(out / "mine_lm_images" / "a.png").convert("RGB"))
    assert drawn.min() >= 127  # light colours: 128 is a full one
    mask = np.asarray(Image.open(out / "mine_mask_images" / "a.png").convert("L"))
    assert mask[40, 32] == 255 and mask[2, 2] == 0 and set(np.unique(mask)) == {0, 255}
    labels = np.asarray(Image.open(out / "mine_parsing_images" / "a.png").convert("L"))
    assert labels.max() < 19 and labels[36, 32] in (1, 10)
    matrix = np.array([float(rows[0][c]) for c in "abcdef"]).reshape(2, 3)
    crop = np.asarray(Image.open(out / "mine" / "a.png"))
    assert np.abs(cut(scene(), matrix, 64).astype(int) - crop).max() <= 1
    item = datasets.open_set("folder", out, 64, "mine", None, None).load(0)
    assert item["mask"][0, 40, 32] == 0 and item["mask"][0, 2, 2] == 1
    assert item["landmarks"].min() >= -0.01 and item["landmarks"].max() == 1
    with pytest.raises(UserError, match="no face was found"):
        prepare(PrepareConfig(photos / "b.png", tmp_path / "none"))
    with pytest.raises(UserError, match="no such picture or folder"):
        prepare(PrepareConfig(tmp_path / "nowhere", tmp_path / "unmade"))
    assert not (tmp_path / "unmade").exists()


def test_prepare_tells_given_faces_of_one_name_apart(tmp_path):
    photos, table = tmp_path / "photos", tmp_path / "boxes.csv"
    for place in ("p1", "p2"):
        (photos / place).mkdir(parents=True)
        Image.fromarray(scene()).save(photos / place / "a.png")
    header = "file,left,top,right,bottom\n"
    table.write_text(f"{header}p1/a.png,30,20,110,100\np2/a.png,40,20,140,120\n")
    config = PrepareConfig(photos, tmp_path / "data", "mine", 64, detector=str(table))
    with open(prepare(config) / "index.csv") as file:
        assert [row["side"] for row in csv.DictReader(file)] == ["112", "140"]  # 1.4 of each box
    table.write_text(f"{header}a.png,30,20,110,100\n")
    with pytest.raises(UserError, match=r"a\.png could be p1/a\.png or p2/a\.png"):
        prepare(config)


def test_export_computes_the_same(tmp_path, swapper):
    assert export(swapper.generator, tmp_path / "f.onnx") < 1e-3
    assert (tmp_path / "f.onnx").stat().st_size > 10_000


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the real training script, a few steps long."""
    folder = tmp_path_factory.mktemp("run") / "run"
    options = "--variants full --iterations 2 --warmup 1 --judge-steps 2 "
    options += "--judge-people 16 --train-people 8 --per-person 2 --size.channel-base 256 --weights.side 1"
    arguments = ["demo", *options.split(), "--out", folder]
    helpers.script("faceswapper", "train.py", *arguments, code=0)
    return folder


def test_the_command_swaps_photos_folders_and_videos(tmp_path, run_folder, capsys):
    rgba = np.dstack((scene(), np.full((160, 200), 255, np.uint8)))
    rgba[:10, :, 3] = 0
    targets = tmp_path / "targets"
    targets.mkdir()
    Image.fromarray(scene((1,))).save(tmp_path / "face.jpg", quality=95)
    Image.fromarray(rgba).save(targets / "t.png")
    Image.fromarray(scene((), ())).save(targets / "u.png")
    options = ["--source", tmp_path / "face.jpg", "--run", run_folder, "--device", "cpu"]
    options += ["--out", tmp_path / "out", "--target", targets / "t.png", "--levels"]
    done = helpers.script("faceswapper", "predict.py", *options, code=0)
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    stem = "face_FS_t"
    made = {f"{stem}{end}" for end in (".png", "_strip.png", "_strip.gif", "_levels.png")}
    assert names == {*made, "result.json"}
    with Image.open(tmp_path / "out" / f"{stem}_levels.png") as levels:
        assert levels.text["DigitalSourceType"] == SYNTHETIC_SOURCE and levels.width > 3 * 128
    with pytest.raises(UserError, match="side heads of this generator were not trained"):
        predict(
            PredictConfig(
                (tmp_path / "face.jpg",),
                targets,
                levels=True,
                networks=Networks(weights=tmp_path / "faceswapper.ckpt"),
            )
        )
    with Image.open(tmp_path / "out" / f"{stem}.png") as made:
        assert made.mode == "RGBA" and made.text["DigitalSourceType"] == SYNTHETIC_SOURCE
        assert (np.asarray(made)[..., 3] == rgba[..., 3]).all()
    with Image.open(tmp_path / "out" / f"{stem}_strip.gif") as animation:
        assert animation.n_frames == 10 and b"synthetic" in animation.info["comment"]
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["synthetic"] is True and record["results"]["t.png"]["faces"] == 1

    networks = Networks(run=run_folder, device="cpu")
    common = {"source": (tmp_path / "face.jpg",), "out": tmp_path / "more", "networks": networks, "strip": 0}
    predict(PredictConfig(target=targets, **common))
    record = json.loads((tmp_path / "more" / "result.json").read_text())["results"]
    assert record["u.png"]["remark"].startswith("shows no face") and record["t.png"]["box"]
    untouched = Image.open(tmp_path / "more" / "face_FS_u.png").convert("RGB")
    assert (np.asarray(untouched) == scene((), ())).all()
    clip = film(tmp_path / "v.mp4", moving(3))
    predict(PredictConfig(target=clip, **common))
    assert (tmp_path / "more" / "face_FS_v.mp4").is_file()
    for target, message in ((targets / "u.png", "the target shows no face"), (tmp_path / "none", "no such")):
        with pytest.raises(UserError, match=message):
            predict(PredictConfig(target=target, **common))
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: predict(PredictConfig(target=tmp_path / "none.png", **common)))
    assert stopped.value.code == 2 and "none.png: no such photo" in capsys.readouterr().err
