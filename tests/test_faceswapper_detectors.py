"""FaceSwapper in use: who finds faces, landmarks and parts."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_faceswapper_scenes import eyes_of, scene, small_swapper

from faceswapper.align import (
    Face,
    crop_matrix,
    crop_side,
)
from faceswapper.data import world
from faceswapper.detect import (
    BiSeNetParser,
    FinderDetector,
    TableDetector,
    YunetDetector,
    open_detector,
    open_parser,
    with_eyes,
)
from faceswapper.drawing import face_mask
from faceswapper.finder import read_crops
from faceswapper.pipeline import nearest
from shared import faces
from shared.bisenet import BiSeNet
from shared.runtime import UserError


@pytest.fixture(scope="module")
def swapper():
    return small_swapper()


def test_the_finder_finds_drawn_faces_points_and_parts():
    photos = [
        scene((0, 1), ((2, 30), (100, 40))),
        scene((2,), ((60, 50),)),
        scene((), ()),
    ]
    found = open_detector("finder")(photos, ["a", "b", "c"])
    assert [len(f) for f in found] == [2, 1, 0]
    for n, place, photo in ((0, (2, 30), 0), (1, (100, 40), 0), (2, (60, 50), 1)):
        wanted = np.array(eyes_of(n, place))
        distance = np.linalg.norm(wanted[1] - wanted[0])
        assert min(np.abs(np.array(f.eyes) - wanted).max() for f in found[photo]) < 0.15 * distance
    params, _ = world(16, 1, 77)
    drawn = faces.draw(params, 64)
    points, labels = read_crops(drawn.image)
    assert (points - drawn.landmarks).norm(dim=-1).mean() < 2.5
    truth, mine = face_mask(faces.to_bisenet(drawn.semantics)), face_mask(labels)
    assert (truth & mine).sum() / (truth | mine).sum() > 0.85


def test_the_finder_near_the_last_place():
    detector = FinderDetector()
    frames = [scene((0,), ((30 + 3 * k, 20),)) for k in range(2)] + [scene((), ())]
    last = detector([frames[0]], ["v"])[0][0]
    near = detector.near(frames, last)
    assert near[2] is None
    for k in range(2):
        wanted = np.array(eyes_of(0, (30 + 3 * k, 20)))
        assert np.abs(np.array(near[k].eyes) - wanted).max() < 5


def test_which_of_several_faces(swapper):
    several = [
        Face((50, 0, 60, 10), None, 0.9),
        Face((0, 0, 20, 20), None, 0.5),
        Face((80, 0, 95, 15), None, 0.7),
    ]
    assert swapper.choose(several, "largest") is several[1]
    assert swapper.choose(several, "surest") is several[0]
    assert [swapper.choose(several, n) for n in range(3)] == [several[1], several[0], several[2]]
    assert swapper.choose([], "largest") is None
    with pytest.raises(UserError, match="there are 3 faces"):
        swapper.choose(several, 3)
    assert nearest(several, Face((52, 1, 62, 11), None)) is several[0]
    assert nearest(several, Face((500, 1, 510, 11), None)) is None


def test_given_faces(tmp_path):
    eyes, boxes, bad = (tmp_path / name for name in ("eyes.csv", "boxes.csv", "bad.csv"))
    eyes.write_text("file,left_x,left_y,right_x,right_y\na.png,60,50,40,51\n")
    boxes.write_text("file,left,top,right,bottom\na.png,1,2,3,4\na.png,5,6,7,8\n")
    detector = open_detector(str(eyes))
    assert isinstance(detector, TableDetector)
    assert detector([None, None], ["a.png", "b.png"])[0][0].eyes == ((40, 51), (60, 50))
    assert detector([None], ["b.png"]) == [[]]
    assert len(open_detector(str(boxes))([None], ["a.png"])[0]) == 2
    for text, message in (("x,y\n", "first line"), ("file,left,top,right,bottom\na,1,2\n", "line 2")):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            open_detector(str(bad))
    for header, numbers in (
        ("file,left,top,right,bottom", "5,5,5,5"),
        ("file,left,top,right,bottom", "9,2,3,40"),
        ("file,left,top,right,bottom", "1,2,nan,4"),
        ("file,left_x,left_y,right_x,right_y", "5,5,5.5,5"),
        ("file,left_x,left_y,right_x,right_y", "5,5,inf,5"),
    ):
        bad.write_text(f"{header}\na.png,{numbers}\n")
        with pytest.raises(UserError, match="bad.csv, line 2: .* (no box|no two eyes)"):
            open_detector(str(bad))
    for choice, message in (
        ("eyes", "give finder"),
        ("none.onnx", "model zoo"),
        ("none.csv", "not readable"),
    ):
        with pytest.raises(UserError, match=message):
            open_detector(choice)


def test_a_detectors_profile_is_cut_by_its_box():
    """Where the eyes coincide, they give no crop at all."""
    box, front = (10.0, 20.0, 80.0, 120.0), [[62, 50], [28, 52]]
    face = with_eyes(box, front, 0.9)
    assert face.eyes == ((28, 52), (62, 50)) and face.box == box and face.score == 0.9
    for eyes in ([[62, 50], [62, 50]], [[62, 50], [54, 52]]):
        turned = with_eyes(box, eyes, 0.9)
        assert turned.eyes is None and crop_side(crop_matrix(turned, 64), 64) == pytest.approx(140)


def test_yunets_rows_become_faces(tmp_path):
    """Box, eyes (the right one first), three more points, score."""

    class Network:
        def setInputSize(self, size):  # noqa: N802 - OpenCV's name
            self.size = size

        def detect(self, photo):
            assert photo.shape[1::-1] == self.size and photo[0, 0].tolist() == [3, 2, 1], "BGR"
            rows = [
                [10, 20, 70, 100, 62, 50, 28, 52, *range(6), 0.9],
                [0, 0, 70, 100, 9, 9, 9, 9, *range(6), 0.8],
            ]
            return 1, np.array(rows, np.float32)

    detector = object.__new__(YunetDetector)
    detector.network = Network()
    photo = np.tile(np.array([1, 2, 3], np.uint8), (120, 90, 1))
    ((front, turned),) = detector([photo], ["x"])
    assert front.box == (10, 20, 80, 120) and front.eyes == ((28, 52), (62, 50))
    assert turned.eyes is None and turned.score == pytest.approx(0.8)


def test_mtcnns_faces_and_its_absence(monkeypatch):
    """The optional package, whose answer for a picture without faces is None."""
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="--detector mtcnn needs facenet-pytorch"):
        open_detector("mtcnn")

    class Network:
        def __init__(self, keep_all, device):
            assert keep_all, "every face, not the first alone"

        def detect(self, photo, landmarks):
            if not photo.any():
                return None, [None], None
            points = np.array([[[28, 52], [62, 50], [45, 70], [30, 90], [60, 90]]], np.float32)
            return np.array([[10, 20, 80, 120]], np.float32), np.array([0.9], np.float32), points

    monkeypatch.setitem(sys.modules, "facenet_pytorch", SimpleNamespace(MTCNN=Network))
    photos = [np.full((120, 90, 3), value, np.uint8) for value in (7, 0)]
    (face,), none = open_detector("mtcnn")(photos, ["x", "y"])
    assert face.box == (10, 20, 80, 120) and face.eyes == ((28, 52), (62, 50)) and none == []
    assert face.score == pytest.approx(0.9)


def test_the_public_parser_loads_its_file(tmp_path):
    torch.manual_seed(0)
    net = BiSeNet()
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "79999_iter.pth")
    parser = open_parser(tmp_path / "79999_iter.pth")
    assert isinstance(parser, BiSeNetParser)
    labels = parser(torch.rand(1, 3, 64, 64))
    assert labels.shape == (1, 64, 64) and labels.dtype == torch.uint8 and labels.max() < 19
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="made for another model"):
        open_parser(tmp_path / "other.pth")
