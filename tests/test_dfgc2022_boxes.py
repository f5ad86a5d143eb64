"""DFGC 2022: the winner's crop to the pixel, and every source of face boxes."""

import sys
import types

import cv2
import numpy as np
import pytest
from PIL import Image

from dfgc2022 import boxes as box_sources
from dfgc2022.boxes import MtcnnBoxes, TableBoxes, box_source, crop_face, crop_square
from shared.runtime import UserError

# --- the crop ---------------------------------------------------------------------------------------


def winner_reference(box, width, height):
    """The winner's arithmetic, step by step, from a half-size box."""
    x1, y1, x2, y2 = (int(2 * value) for value in box)
    w, h = x2 - x1, y2 - y1
    s = int(max(w, h) * 1.3)
    cx, cy = (x1 + x2) // 2, (y1 + y2) // 2
    x, y = max(int(cx - s // 2), 0), max(int(cy - s // 2), 0)
    s = min(width - x, s)
    s = min(height - y, s)
    return x, y, s


def test_winner_crop_to_the_pixel():
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(v) for v in rng.integers(40, 400, 2))
        x1, y1 = rng.uniform(-20, 150, 2)
        half = (x1, y1, x1 + rng.uniform(3, 90), y1 + rng.uniform(3, 90))
        x, y, w, h = crop_square([2 * value for value in half], width, height)
        assert (x, y, w) == winner_reference(half, width, height) and w == h


def test_crop_by_hand_and_at_borders():
    assert crop_square((100.9, 60.2, 150.7, 131.9), 640, 480) == (79, 49, 92, 92)
    assert crop_square((-30.5, -10.5, 40.0, 60.0), 640, 480) == (0, 0, 91, 91)  # int() cuts towards zero
    assert crop_square((600.0, 100.0, 700.0, 200.0), 640, 480) == (585, 85, 55, 55)  # cut, not moved
    # Without cutting the corners first, the 2021 baseline's centre and side differ by a pixel.
    assert crop_square((10.9, 10.9, 41.7, 41.7), 200, 200, "winner") == (5, 5, 40, 40)
    assert crop_square((10.9, 10.9, 41.9, 41.9), 200, 200, "baseline21") == (6, 6, 40, 40)
    assert crop_square((5.5, 6.5, 20.5, 30.5), 100, 25, "box") == (5, 6, 15, 19)
    assert crop_face(np.zeros((40, 40, 3), np.uint8), (90, 90, 120, 120)) is None


# --- boxes ------------------------------------------------------------------------------------------


def test_table_of_boxes_in_all_layouts(tmp_path):
    frames = [np.zeros((100, 200, 3), np.uint8)] * 2
    own = tmp_path / "own.csv"
    own.write_text("video,frame,x1,y1,x2,y2,probability\na.mp4,10,1,2,3,4,0.5\na.mp4,10,5,6,7,8,0.9\n")
    capitals = tmp_path / "OWN.CSV"
    capitals.write_bytes(own.read_bytes())
    assert box_source(str(capitals)).boxes == TableBoxes(own).boxes
    assert TableBoxes(own)("a.mp4", [0, 10], frames) == [
        [],
        [(5, 6, 7, 8, 0.9), (1, 2, 3, 4, 0.5)],
    ]
    (tmp_path / "vra.csv").write_text("video_name,x,y,w,h\na,0.5,0.5,0.2,0.4\n")
    assert np.allclose(
        TableBoxes(tmp_path / "vra.csv")("a.mp4", [7], frames[:1])[0][0][:4], (80, 30, 120, 70)
    )
    (tmp_path / "kit.csv").write_text(
        "file,X_left-top,Y_left-top,X_right-bottom,Y_right-bottom\na.mp4,0.1,0.2,0.3,0.4\n"
    )
    assert np.allclose(TableBoxes(tmp_path / "kit.csv")("a.mp4", [7], frames[:1])[0][0][:4], (20, 20, 60, 40))


def test_tables_of_spreadsheets_begin_with_a_mark(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("video,frame,x1,y1,x2,y2\na,0,1,2,3,4\n", encoding="utf-8-sig")
    assert TableBoxes(path)("a", [0], [np.zeros((9, 9, 3), np.uint8)]) == [[(1, 2, 3, 4, 1.0)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "b.csv: holds no boxes"),
        ("video,frame,x1,y1,x2,y2\n", "b.csv: holds no boxes"),
        ("a,b\n1,2\n", "unknown header"),
        ("video,frame,x1,y1,x2,y2\na,0,1,2,x,4\n", "line 2: could not convert"),
        (
            "video,frame,x1,y1,x2,y2\na,0,1,2,nan,4\n",
            "line 2: a,0,1,2,nan,4: a number of the box is not finite",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        TableBoxes(tmp_path / "b.csv")
    with pytest.raises(UserError, match="absent.csv"):
        TableBoxes(tmp_path / "absent.csv")


def test_mtcnn_gets_half_size_frames_and_the_winners_thresholds(monkeypatch):
    seen = {}

    class MTCNN:
        def __init__(self, **options):
            seen.update(options)

        def detect(self, images):
            seen["sizes"] = [image.size for image in images]
            assert all(isinstance(image, Image.Image) for image in images)
            found = np.array([[1.25, 2.25, 9.75, 9.75], [0, 0, 5, 5]], np.float32)
            return [found, None], [np.array([0.7, 0.95]), [None]]

    module = types.ModuleType("facenet_pytorch")
    module.MTCNN, module.__spec__ = MTCNN, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    found = MtcnnBoxes()("a", [0, 10], [np.zeros((51, 81, 3), np.uint8)] * 2)
    assert seen["sizes"] == [(40, 25)] * 2
    assert (seen["margin"], seen["thresholds"]) == (0, [0.6, 0.7, 0.7])
    assert [box[:4] for box in found[0]] == [(0, 0, 10, 10), (2.5, 4.5, 19.5, 19.5)] and found[1] == []


def test_sources_that_are_absent_say_so(monkeypatch, capsys):
    box_sources._opened.cache_clear()
    monkeypatch.setattr(box_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs facenet-pytorch"):
        box_source("mtcnn")
    assert type(box_source("auto")).__name__ == "SkinBoxes"
    assert "warning: --boxes auto: facenet-pytorch is not installed" in capsys.readouterr().out
    assert box_source("skin") and not capsys.readouterr().out
    with pytest.raises(UserError, match="give auto"):
        box_source("nonsense")
    if not hasattr(cv2, "CascadeClassifier"):
        with pytest.raises(UserError, match="OpenCV 4"):
            box_source("haar")
    with pytest.raises(UserError, match="no such file"):
        box_source("absent.onnx")


def test_opencvs_detectors_are_read_as_corners_the_most_probable_first(tmp_path, monkeypatch):
    """Stand-ins with what YuNet (x, y, w, h, ten landmarks, score) and OpenCV 4's cascade return."""
    frame = np.zeros((30, 50, 3), np.uint8)
    frame[..., 0] = 200  # red in RGB

    class Yunet:
        def setInputSize(self, size):
            assert size == (50, 30)

        def detect(self, image):
            assert image[0, 0].tolist() == [0, 0, 200]  # OpenCV's order
            rows = np.zeros((2, 15), np.float32)
            rows[:, :4], rows[:, -1] = [[1, 2, 3, 4], [10, 5, 8, 6]], [0.7, 0.9]
            return 1, rows

    class Cascade:
        def __init__(self, path):
            assert path == "folder/haarcascade_frontalface_default.xml"

        def detectMultiScale3(self, grey, scale, neighbours, outputRejectLevels):
            assert grey.shape == (30, 50) and outputRejectLevels
            return np.array([[1, 2, 3, 4], [10, 5, 8, 6]]), np.array([9, 9]), np.array([[1.5], [2.5]])

    (tmp_path / "yunet.onnx").touch()
    create = types.SimpleNamespace(create=lambda *given: Yunet())
    monkeypatch.setattr(cv2, "FaceDetectorYN", create)
    monkeypatch.setattr(cv2, "CascadeClassifier", Cascade, raising=False)
    monkeypatch.setattr(cv2, "data", types.SimpleNamespace(haarcascades="folder/"), raising=False)
    for source, scores in (
        (box_sources.YunetBoxes(tmp_path / "yunet.onnx"), (0.9, 0.7)),
        (box_sources.HaarBoxes(), (2.5, 1.5)),
    ):
        found = source("a", [0], [frame])
        assert [box[:4] for box in found[0]] == [(10, 5, 18, 11), (1, 2, 4, 6)]
        assert [box[4] for box in found[0]] == pytest.approx(scores)


def test_skin_finds_a_face_coloured_ellipse_and_nothing_in_a_grey_frame():
    frame = np.full((90, 121, 3), 90, np.uint8)
    cv2.ellipse(frame, (60, 40), (20, 26), 0, 0, 360, (222, 170, 140), -1)
    (box,) = box_source("skin")("a", [0], [frame])[0]
    assert np.allclose(box[:4], (40, 14, 81, 67), atol=4)
    assert box_source("skin")("a", [0], [np.full((90, 121, 3), 90, np.uint8)]) == [[]]


def test_mtcnn_is_asked_for_one_size_at_a_time_and_never_for_tiny_frames(monkeypatch):
    """facenet-pytorch raises on images of several sizes, and on those without any scale of 20 pixel faces."""

    class MTCNN:
        def __init__(self, **options):
            pass

        def detect(self, images):
            if len({image.size for image in images}) > 1:
                raise Exception("MTCNN batch processing only compatible with equal-dimension images.")
            if min(images[0].size) < 20:
                raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
            return [np.array([[0, 0, 5, image.width]], np.float32) for image in images], [[0.9]] * len(images)

    module = types.ModuleType("facenet_pytorch")
    module.MTCNN = MTCNN
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    frames = [np.zeros((*shape, 3), np.uint8) for shape in ((60, 80), (39, 80), (40, 50), (60, 80), (1, 1))]
    found = MtcnnBoxes()("a", range(5), frames)
    assert [[box[3] for box in boxes] for boxes in found] == [[80], [], [50], [80], []]
