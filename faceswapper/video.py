"""Video files: frames out in batches, results in with the sound of the original."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

from shared.io import SYNTHETIC_SOURCE
from shared.runtime import UserError


class VideoReader:
    """The frames of a video, one after the other.

    size (width, height), rate (frames per second) and announced (number of frames by the header) are known at
    once; `remarks` fills while reading. Frames of another size than the first are scaled to it; a frame that
    cannot be decoded is replaced by the one before it, so that sound and picture stay together; both are
    counted in the remarks. Raises UserError on a file that shows no frame at all.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such video")
        self.capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        grabbed, first = self.capture.read() if self.capture.isOpened() else (False, None)
        if not grabbed:
            raise UserError(f"{path}: empty, truncated or not a video; no frame can be read")
        self._first = cv2.cvtColor(first, cv2.COLOR_BGR2RGB)
        self.size = first.shape[1], first.shape[0]
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.announced = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.resized = self.damaged = self.count = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, all of one size."""
        last = self._first
        self.count = 1
        yield last
        while self.capture.grab():
            readable, frame = self.capture.retrieve()
            if not readable or frame is None:
                self.damaged += 1
                frame = last
            else:
                if (frame.shape[1], frame.shape[0]) != self.size:
                    self.resized += 1
                    frame = cv2.resize(frame, self.size, interpolation=cv2.INTER_AREA)
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            last = frame
            self.count += 1
            yield frame
        self.capture.release()

    @property
    def remarks(self) -> list[str]:
        """What was not as it should be, after reading."""
        found = []
        if self.resized:
            found.append(
                f"{self.resized} frames of another size were scaled to {self.size[0]}x{self.size[1]}"
            )
        if self.damaged:
            found.append(f"{self.damaged} damaged frames were replaced by the frame before")
        # Containers estimate their length; what is missing beyond 2 % is missing.
        if self.announced and self.count < self.announced * 0.98 - 2:
            found.append(f"the file ends early: {self.count} of {self.announced} frames can be read")
        return found


def sampled(path: Path, count: int) -> Iterator[np.ndarray]:
    """The middle frames of `count` equally long parts of a video, (H, W, 3) uint8 RGB; of a video with fewer
    frames all. UserError when one of them cannot be read."""
    reader = VideoReader(path)
    frames = reader.announced or sum(1 for _ in VideoReader(path))  # not every container says it
    wanted = {int((k + 0.5) * frames / count) for k in range(count)}
    for number, frame in enumerate(reader):
        if number in wanted:
            yield frame
            wanted.discard(number)
            if not wanted:
                return
    raise UserError(f"{path}: {reader.count} of {frames} frames can be read")


def in_batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Consecutive frames in lists of at most `size`."""
    group: list[np.ndarray] = []
    for frame in frames:
        group.append(frame)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class VideoWriter:
    """H.264 in a .mp4 file, written through ffmpeg; a context manager.

    The sound of `sound_of`, if it has any, is copied (or turned into AAC where mp4 cannot hold it), and the
    metadata say that the video is synthetic. On an error nothing is left at `path`; raises OSError when the
    disk is full. Odd sides lose their last row or column, which the format cannot hold.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float, synthetic: str, sound_of: Path | None):
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: videos are written as .mp4")
        self.path, self.sound_of, self.synthetic = path, sound_of, synthetic
        self.width, self.height = size[0] // 2 * 2, size[1] // 2 * 2
        path.parent.mkdir(parents=True, exist_ok=True)
        self.silent = path.with_name(f".{path.stem}-silent.mp4")
        command = [*_ffmpeg(), "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}"]
        command += ["-r", f"{rate:.6f}", "-i", "-", "-an", "-c:v", "libx264", "-preset", "veryfast"]
        command += ["-crf", "18", "-pix_fmt", "yuv420p", str(self.silent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    def write(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB."""
        self.process.stdin.write(np.ascontiguousarray(frame[: self.height, : self.width]).data)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        said = self.process.communicate()[1].decode(errors="replace")
        try:
            if kind is not None and not issubclass(kind, BrokenPipeError):
                return
            if self.process.returncode:
                raise self._failed("write", said)
            self._finish()
        finally:
            self.silent.unlink(missing_ok=True)

    def _finish(self) -> None:
        done = self.path.with_name(f".{self.path.stem}-done.mp4")
        said = ""
        for codec in ("copy", "aac"):
            command = [*_ffmpeg(), "-i", str(self.silent)]
            if self.sound_of is not None:
                command += [
                    "-i",
                    str(self.sound_of),
                    "-map",
                    "0:v",
                    "-map",
                    "1:a?",
                    "-c:a",
                    codec,
                ]
            command += ["-c:v", "copy", "-movflags", "+faststart+use_metadata_tags"]
            command += ["-metadata", f"comment=synthetic video: {self.synthetic}"]
            command += ["-metadata", f"DigitalSourceType={SYNTHETIC_SOURCE}", str(done)]
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if ran.returncode == 0:
                done.replace(self.path)
                return
            said = ran.stderr
        done.unlink(missing_ok=True)
        raise self._failed("finish", said)

    def _failed(self, what: str, said: str) -> Exception:
        if "No space left on device" in said:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return RuntimeError(f"ffmpeg could not {what} {self.path}: {said}")


def _ffmpeg() -> list[str]:
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]


def describe(path: Path) -> str:
    """What ffmpeg says about a file's streams and metadata."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stderr
