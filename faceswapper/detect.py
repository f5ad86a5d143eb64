"""Who finds faces, landmarks and facial parts in photos: released networks from the user's files, or the
small finder of this folder, which needs no download.

A *detector* maps photos to faces, a *landmarker* aligned crops to 98 points, a *parser* aligned crops to
BiSeNet's labels. Anything that can be called like these takes their place.
"""

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper.align import Face, Framing, box_of_eyes, crop_matrix, cut, to_tensor
from faceswapper.drawing import ibug_to_wflw
from faceswapper.finder import DISTANCE, find_faces, find_pairs, load_finder, read_crops
from faceswapper.model import load_official
from shared.bisenet import BiSeNet
from shared.runtime import UserError
from shared.weights import load_state, load_torch

Detector = Callable[[list[np.ndarray], list[str]], list[list[Face]]]
"""Photos (H, W, 3) uint8 RGB and their file names (or paths below a folder) -> the faces of each."""
Landmarker = Callable[[Tensor], Tensor]
"""Crops (B, 3, S, S) in [0, 1] -> points (B, 98, 2) in pixels of the crop."""
Parser = Callable[[Tensor], Tensor]
"""Crops (B, 3, S, S) in [0, 1] -> labels (B, S, S) uint8."""

PROFILE_EYES = 0.15
"""Eyes nearer to each other than this share of the box are a profile's; from the front it is about 0.34."""

# --- detectors --------------------------------------------------------------------------------------


class FinderDetector:
    """`faceswapper.finder`: upright, nearly frontal faces; trained on procedural faces alone."""

    def __init__(self, device: torch.device | str = "cpu", side: int = 320):
        self.net, self.device, self.side = load_finder(str(device)), device, side

    def __call__(self, photos: list[np.ndarray], names: list[str]) -> list[list[Face]]:
        found: list[list[Face]] = [[] for _ in photos]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for number, photo in enumerate(photos):
            shapes.setdefault(photo.shape, []).append(number)
        for (height, width, _), numbers in shapes.items():
            # Large photos are reduced once: eyes closer than 10 reduced pixels are not looked for.
            scale = min(1.0, self.side / min(height, width))
            small = max(16, round(width * scale)), max(16, round(height * scale))
            reduced = [cv2.resize(photos[n], small, interpolation=cv2.INTER_AREA) for n in numbers]
            fx, fy = width / small[0], height / small[1]
            for n, faces in zip(numbers, find_faces(to_tensor(reduced, self.device), self.net), strict=True):
                for face in faces:
                    eyes = tuple(((x + 0.5) * fx - 0.5, (y + 0.5) * fy - 0.5) for x, y in face[:2])
                    found[n].append(Face(box_of_eyes(*eyes), eyes, face.score))
        return found

    def near(self, frames: list[np.ndarray], last: Face) -> list[Face | None]:
        """Frames of a video -> the face near where it last was, looked for in one small window at one
        size."""
        size = 96
        matrix = crop_matrix(last, size, Framing(DISTANCE / size, 0.5))
        found = find_pairs(to_tensor([cut(f, matrix, size) for f in frames], self.device), self.net)
        back = cv2.invertAffineTransform(matrix)
        faces: list[Face | None] = []
        for pairs in found:
            if not pairs:
                faces.append(None)
                continue
            score, pair = max(pairs, key=lambda each: each[0])
            eyes = tuple(tuple(map(float, back @ (x, y, 1))) for x, y in pair)
            faces.append(Face(box_of_eyes(*eyes), eyes, score))
        return faces


def with_eyes(box: Iterable[float], eyes: Iterable[Iterable[float]], score: float) -> Face:
    """A detector's face. In a profile one eye lies nearly behind the other, and their distance says nothing
    of the face's size: the box alone is used then."""
    face = Face(tuple(box), tuple(sorted(tuple(map(float, eye)) for eye in eyes)), score)
    near = math.dist(*face.eyes) < max(1.0, PROFILE_EYES * face.size)
    return face._replace(eyes=None) if near else face


class YunetDetector:
    """OpenCV's YuNet from its ONNX file. UserError when the file is missing or not YuNet."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; YuNet's ONNX file is in the OpenCV model zoo")
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), 0.6)
        except cv2.error as error:
            raise UserError(f"{path}: not readable as YuNet ({error.err})") from None

    def __call__(self, photos: list[np.ndarray], names: list[str]) -> list[list[Face]]:
        found = []
        for photo in photos:
            self.network.setInputSize(photo.shape[1::-1])
            rows = self.network.detect(photo[..., ::-1].copy())[1]
            faces = []
            for row in [] if rows is None else rows.astype(float).tolist():
                x, y, w, h = row[:4]
                faces.append(with_eyes((x, y, x + w, y + h), [row[4:6], row[6:8]], row[-1]))
            found.append(faces)
        return found


class MtcnnDetector:
    """facenet-pytorch's MTCNN, the detector that the paper's author names. UserError when not installed."""

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from facenet_pytorch import MTCNN  # noqa: PLC0415 - optional
        except ImportError:
            raise UserError("--detector mtcnn needs facenet-pytorch (pip install facenet-pytorch)") from None
        self.network = MTCNN(keep_all=True, device=device)

    def __call__(self, photos: list[np.ndarray], names: list[str]) -> list[list[Face]]:
        found = []
        for photo in photos:
            boxes, scores, points = self.network.detect(photo, landmarks=True)
            rows = [] if boxes is None else zip(boxes, scores, points, strict=True)
            found.append([with_eyes(map(float, box), five[:2], float(s)) for box, s, five in rows])
        return found


class TableDetector:
    """Faces given in a CSV file, by its header: `file,left,top,right,bottom` (boxes) or
    `file,left_x,left_y,right_x,right_y` (eyes), in pixels, a line per face. A file is called by its name, or
    by its path below the folder where two have one name. In a video all frames use the line of the video's
    file name. UserError on a missing file, another header, a value that is no number, an
    empty box or eyes at one place."""

    BOX = ["file", "left", "top", "right", "bottom"]
    EYES = ["file", "left_x", "left_y", "right_x", "right_y"]

    def __init__(self, path: Path):
        self.path, self.faces, self.asked = path, {}, {}
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as a table of faces ({error})") from None
        if not rows or rows[0] not in (self.BOX, self.EYES):
            raise UserError(f"{path}: the first line must be {','.join(self.BOX)} or {','.join(self.EYES)}")
        for line, row in enumerate(rows[1:], 2):
            try:
                name, (a, b, c, d) = row[0], map(float, row[1:])
            except ValueError:
                raise UserError(f"{path}, line {line}: expected a file name and four numbers") from None
            finite = all(map(math.isfinite, (a, b, c, d)))
            if rows[0] == self.EYES:
                if not finite or math.dist((a, b), (c, d)) < 1:
                    raise UserError(f"{path}, line {line}: {name} has no two eyes at {a:g},{b:g},{c:g},{d:g}")
                eyes = tuple(sorted([(a, b), (c, d)]))
                face = Face(box_of_eyes(*eyes), eyes)
            else:
                if not finite or c <= a or d <= b:
                    raise UserError(f"{path}, line {line}: {name} has no box at {a:g},{b:g},{c:g},{d:g}")
                face = Face((a, b, c, d), None)
            self.faces.setdefault(name, []).append(face)

    def __call__(self, photos: list[np.ndarray], names: list[str]) -> list[list[Face]]:
        return [self._of(name) for name in names]

    def _of(self, name: str) -> list[Face]:
        """The faces of one file. UserError when another file is called by the same line."""
        line = name if name in self.faces else Path(name).name
        other = self.asked.setdefault(line, name)
        if other != name and line in self.faces:
            raise UserError(f"{self.path}: {line} could be {other} or {name}; write its folder too")
        return self.faces.get(line, [])


def whole_picture(photos: list[np.ndarray], names: list[str]) -> list[list[Face]]:
    """For pictures that are aligned crops already: the crop is the picture."""
    found = []
    for photo in photos:
        height, width = photo.shape[:2]
        side = max(height, width) / 1.4  # crop_matrix enlarges it again
        x, y = width / 2, height / 2
        found.append([Face((x - side / 2, y - side / 2, x + side / 2, y + side / 2), None)])
    return found


def open_detector(choice: str, device: torch.device | str = "cpu") -> Detector:
    """finder, mtcnn, crops, or the path of a .csv (given faces) or .onnx (YuNet) file. UserError
    otherwise."""
    if choice == "finder":
        return FinderDetector(device)
    if choice == "mtcnn":
        return MtcnnDetector(device)
    if choice == "crops":
        return whole_picture
    readers = {".csv": TableDetector, ".onnx": YunetDetector}
    if Path(choice).suffix not in readers:
        raise UserError(f"--detector {choice}: give finder, mtcnn, crops, or a .csv or .onnx file")
    return readers[Path(choice).suffix](Path(choice))


# --- crops ------------------------------------------------------------------------------------------


def finder_reading(crops: Tensor) -> tuple[Tensor, Tensor]:
    """98 points from the finder's 68, and BiSeNet's labels from the finder, in one pass."""
    points, labels = read_crops(crops, load_finder(str(crops.device)))
    return ibug_to_wflw(points), labels


def finder_points(crops: Tensor) -> Tensor:
    """The landmarker of `finder_reading`."""
    return finder_reading(crops)[0]


def finder_labels(crops: Tensor) -> Tensor:
    """The parser of `finder_reading`."""
    return finder_reading(crops)[1]


def open_landmarker(path: Path | None, device: torch.device | str = "cpu") -> Landmarker:
    """wing.ckpt or faceswapper.ckpt (FAN); None: the finder. UserError on a file that does not fit."""
    if path is None:
        return finder_points
    fan = load_official("fan", path).requires_grad_(False).to(device)
    # FAN counts from the edge of the first pixel, drawing from its centre.
    return lambda crops: fan.find(crops * 2 - 1) - 0.5


class BiSeNetParser(nn.Module):
    """The public face parser (79999_iter.pth) at 512 pixels. UserError on another file."""

    def __init__(self, path: Path):
        super().__init__()
        self.net = BiSeNet()
        load_state(self.net, load_torch(path), path)
        self.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False
        )

    @torch.inference_mode()
    def forward(self, crops: Tensor) -> Tensor:
        side = crops.shape[-1]
        x = F.interpolate(crops, (512, 512), mode="bilinear", antialias=True)
        logits = self.net((x - self.mean) / self.deviation)[0]
        return F.interpolate(logits, (side, side), mode="bilinear").argmax(1).to(torch.uint8)


def open_parser(path: Path | None, device: torch.device | str = "cpu") -> Parser:
    """79999_iter.pth (BiSeNet); None: the finder."""
    return finder_labels if path is None else BiSeNetParser(path).to(device)
