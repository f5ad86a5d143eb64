"""Where the faces are: the winner's crop arithmetic and the sources of face boxes it is applied to.

A box is (x1, y1, x2, y2, probability) in pixels of the full frame. A source maps the video's name and some of
its frames to the boxes of each frame, most probable first.
"""

import csv
import functools
import importlib.util
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from shared.runtime import UserError

Box = tuple[float, float, float, float, float]
Rule = Literal["winner", "baseline21", "box", "frame"]


def crop_square(
    box: Sequence[float], width: int, height: int, rule: Rule = "winner"
) -> tuple[int, int, int, int]:
    """Where a frame is cropped for a box: (x, y, w, h), w or h <= 0 when the box lies outside.

    winner: corners truncated to integers, side int(1.3 max(w, h)), cut (not moved) at the right and lower
    border, so that it stays square (winner's extraction script). baseline21: the same without truncating the
    corners first (2021 baseline). box: the corners as they are. frame: the whole frame.
    """
    if rule == "frame":
        return 0, 0, width, height
    x1, y1, x2, y2 = box[:4]
    if rule == "box":
        left, top = max(int(x1), 0), max(int(y1), 0)
        return left, top, min(int(x2), width) - left, min(int(y2), height) - top
    if rule == "winner":
        x1, y1, x2, y2 = int(x1), int(y1), int(x2), int(y2)
    side = int(max(x2 - x1, y2 - y1) * 1.3)
    x = max(int((x1 + x2) // 2 - side // 2), 0)
    y = max(int((y1 + y2) // 2 - side // 2), 0)
    side = min(height - y, min(width - x, side))
    return x, y, side, side


def crop_face(frame: np.ndarray, box: Sequence[float], rule: Rule = "winner") -> np.ndarray | None:
    """The crop (s, s, 3) of a frame (H, W, 3), a view; None when nothing of the box lies in the frame."""
    x, y, w, h = crop_square(box, frame.shape[1], frame.shape[0], rule)
    return frame[y : y + h, x : x + w] if w > 0 and h > 0 else None


class TableBoxes:
    """Boxes given in a CSV file, read by its header.

    video,frame,x1,y1,x2,y2[,probability]: pixels, one line per face and frame. video_name,x,y,w,h: relative
    centre and size, for all frames of the video (VRA release). file,X_left-top,...: relative corners, already
    enlarged (VRA starter kit; use it with the crop rule "box"). Videos are found with or without ending.
    Raises UserError on a missing or empty file, another header or a value that is no number.
    """

    def __init__(self, path: Path):
        self.boxes: dict[str, dict[int | None, list[tuple[bool, Box]]]] = {}
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
                rows = list(csv.reader(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as a table of boxes ({error})") from None
        header = [name.strip().lower() for name in rows[0]] if rows else []
        for line, row in enumerate(rows[1:], 2):
            if not row:
                continue
            try:
                name, frame, relative, box = self._parse(header, row)
                if not np.isfinite(box).all():
                    raise ValueError(f"{','.join(row)}: a number of the box is not finite")
            except (ValueError, IndexError) as error:
                raise UserError(f"{path}, line {line}: {error}") from None
            self.boxes.setdefault(_stem(name), {}).setdefault(frame, []).append((relative, box))
        if not self.boxes:
            raise UserError(f"{path}: holds no boxes")

    @staticmethod
    def _parse(header: list[str], row: list[str]) -> tuple[str, int | None, bool, Box]:
        if header[:6] == ["video", "frame", "x1", "y1", "x2", "y2"]:
            corners = [float(value) for value in row[2:6]]
            probability = float(row[6]) if len(header) > 6 else 1.0
            return row[0], int(row[1]), False, (*corners, probability)
        if header[:5] == ["video_name", "x", "y", "w", "h"]:
            x, y, w, h = (float(value) for value in row[1:5])
            return row[0], None, True, (x - w / 2, y - h / 2, x + w / 2, y + h / 2, 1.0)
        if len(header) == 5 and header[0] == "file" and header[1].startswith("x_left"):
            x1, y1, x2, y2 = (float(value) for value in row[1:5])
            return row[0], None, True, (x1, y1, x2, y2, 1.0)
        raise ValueError(
            f"unknown header {','.join(header)}; known: video,frame,x1,y1,x2,y2,probability and VRA's two"
        )

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        known = self.boxes.get(_stem(name), {})
        found = []
        for index, frame in zip(indices, frames, strict=True):
            height, width = frame.shape[:2]
            scale = np.array([width, height, width, height, 1.0])
            rows = known.get(index, known.get(None, []))
            found.append(_sorted([tuple(np.multiply(box, scale)) if rel else box for rel, box in rows]))
        return found


class MtcnnBoxes:
    """facenet-pytorch's MTCNN as the winner ran it: on half-size frames, thresholds 0.6, 0.7, 0.7, margin 0.

    Frames whose half is smaller than its least face, 20 pixels, hold no face. Raises UserError when
    facenet-pytorch is not installed.
    """

    LEAST = 20

    def __init__(self, device: str = "cpu"):
        if importlib.util.find_spec("facenet_pytorch") is None:
            raise UserError(
                "--boxes mtcnn needs facenet-pytorch: pip install --no-deps facenet-pytorch (otherwise it "
                "brings an old PyTorch), or give --boxes CSV"
            )
        from facenet_pytorch import MTCNN

        self.network = MTCNN(
            margin=0, thresholds=[0.6, 0.7, 0.7], keep_all=True, device=device, selection_method="probability"
        )

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        halves = []
        for frame in frames:
            height, width = frame.shape[:2]
            halves.append(Image.fromarray(frame).resize((max(width // 2, 1), max(height // 2, 1))))
        result: list[list[Box]] = [[] for _ in frames]
        for size in dict.fromkeys(half.size for half in halves):
            # It takes images of one size, and fails on those that are too small for its first scale.
            numbers = [number for number, half in enumerate(halves) if half.size == size]
            if min(size) < self.LEAST:
                continue
            corners, probabilities = self.network.detect([halves[number] for number in numbers])
            for number, boxes, ps in zip(numbers, corners, probabilities, strict=True):
                if boxes is not None:
                    pairs = zip(boxes, ps, strict=True)
                    result[number] = _sorted([(*map(float, 2 * box), float(p)) for box, p in pairs])
        return result


class YunetBoxes:
    """OpenCV's YuNet with the user's ONNX file. Raises UserError when the file is missing or not YuNet."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; YuNet's ONNX file is in the OpenCV model zoo")
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), 0.6)
        except cv2.error as error:
            raise UserError(f"{path}: not readable as YuNet ({error.err})") from None

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        found = []
        for frame in frames:
            self.network.setInputSize(frame.shape[1::-1])
            rows = self.network.detect(frame[..., ::-1].copy())[1]
            rows = [] if rows is None else rows.astype(float)
            found.append(_sorted([(x, y, x + w, y + h, row[-1]) for row in rows for x, y, w, h in [row[:4]]]))
        return found


class HaarBoxes:
    """OpenCV's frontal face cascade. Raises UserError with OpenCV 5, which ships without cascades."""

    def __init__(self) -> None:
        if not hasattr(cv2, "CascadeClassifier"):
            raise UserError(
                "--boxes haar needs OpenCV 4 (version 5 has no cascades); use skin, mtcnn, YuNet or a CSV"
            )
        self.cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        found = []
        for frame in frames:
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            boxes, _, weights = self.cascade.detectMultiScale3(grey, 1.1, 5, outputRejectLevels=True)
            pairs = zip(boxes, np.ravel(weights), strict=True)
            found.append(_sorted([(x, y, x + w, y + h, float(p)) for (x, y, w, h), p in pairs]))
        return found


class SkinBoxes:
    """The largest skin-coloured region: coarse, without any model file; for trials, not for a contest.

    Regions below 1 % of the frame do not count. The probability is the region's share of its box.
    """

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        return [self._find(frame) for frame in frames]

    @staticmethod
    def _find(frame: np.ndarray) -> list[Box]:
        height, width = frame.shape[:2]
        scale = max(1.0, max(height, width) / 160)
        small = cv2.resize(
            frame, (max(int(width / scale), 1), max(int(height / scale), 1)), interpolation=cv2.INTER_AREA
        )
        _, red, blue = cv2.split(cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb))
        skin = ((red > 136) & (red < 180) & (blue > 80) & (blue < 124)).astype(np.uint8)
        skin = cv2.morphologyEx(skin, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        count, _, stats, _ = cv2.connectedComponentsWithStats(skin)
        if count < 2:
            return []
        x, y, w, h, area = (float(value) for value in stats[1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))])
        if area < 0.01 * skin.size:
            return []
        h = min(h, 1.4 * w)  # a bare neck is not part of the face
        return [(x * scale, y * scale, (x + w) * scale, (y + h) * scale, area / (w * h))]


class WholeFrame:
    """Frames that are face crops already: the box is the frame."""

    def __call__(self, name: str, indices: Sequence[int], frames: Sequence[np.ndarray]) -> list[list[Box]]:
        return [[(0.0, 0.0, float(frame.shape[1]), float(frame.shape[0]), 1.0)] for frame in frames]


NAMED = {"mtcnn": MtcnnBoxes, "haar": HaarBoxes, "skin": SkinBoxes, "crops": WholeFrame}
READERS = {".csv": TableBoxes, ".onnx": YunetBoxes}


def box_source(choice: str) -> Callable[..., list[list[Box]]]:
    """auto, mtcnn, haar, skin, crops, or the path of a .csv (boxes) or .onnx (YuNet) file -> source of boxes.

    auto: MTCNN when installed, otherwise, with a warning, the skin-coloured region. Raises UserError on
    anything else.
    """
    return _opened(choice, source_mark(choice))


def source_mark(choice: str) -> str:
    """What a choice stands for now, to tell boxes that have changed under the same name: mtcnn or skin for
    auto, and a file's size and time of change with its name.
    """
    if choice == "auto":
        return "mtcnn" if importlib.util.find_spec("facenet_pytorch") else "skin"
    path = Path(choice)
    if choice in NAMED or not path.is_file():
        return choice
    return f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"


@functools.cache
def _opened(choice: str, mark: str) -> Callable[..., list[list[Box]]]:
    name = mark if choice == "auto" else choice
    if name == "skin" != choice and parent_process() is None:  # once, not by every worker
        print(
            "warning: --boxes auto: facenet-pytorch is not installed, faces are looked for by skin colour: "
            "good for a trial, not for a contest"
        )
    if name in NAMED:
        return NAMED[name]()
    path = Path(choice)
    if path.suffix.lower() not in READERS:
        raise UserError(
            f"--boxes {choice}: give auto, {', '.join(NAMED)}, or the path of a .csv or .onnx file"
        )
    return READERS[path.suffix.lower()](path)


def _stem(name: str) -> str:
    name = Path(name).name
    return name.rsplit(".", 1)[0] if "." in name else name


def _sorted(boxes: list[Box]) -> list[Box]:
    return sorted(boxes, key=lambda box: -box[4])
