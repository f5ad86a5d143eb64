"""Video files: frames out of them, only the wanted ones decoded to pixels, and clips into them."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

from shared.io import VIDEO_ENDINGS, find_images
from shared.runtime import UserError

# What is wrong with a video is said once, in our words. OpenCV reads its own variable when it is imported,
# which may have been long ago, and ffmpeg's when a file is opened.
if "OPENCV_LOG_LEVEL" not in os.environ:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class VideoError(UserError):
    """A video that cannot be read, or not to its end. The message names it."""


def read_frames(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Frames 0, every, 2 every, ... of a video as (index, (H, W, 3) uint8 RGB), one at a time.

    The frames between are read but never converted to pixels. Raises VideoError on a file that holds no
    readable video, and after the last readable frame of a file that ends before its own header says.
    """
    if not path.is_file():
        raise VideoError(f"{path}: no such video")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: an empty file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise VideoError(f"{path}: {what_is_wrong(path)}")
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        count = 0
        while capture.grab():
            if count % every == 0:
                read, frame = capture.retrieve()
                if not read:
                    raise VideoError(f"{path}: frame {count} is damaged")
                yield count, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            count += 1
    finally:
        capture.release()
    if count == 0:
        raise VideoError(f"{path}: {what_is_wrong(path)}")
    # Containers estimate their length; what is missing beyond 2 % is missing.
    if announced > 0 and count < announced * 0.98 - 2:
        raise VideoError(f"{path}: truncated or damaged, {count} of {announced} frames can be read")


def what_is_wrong(path: Path) -> str:
    """Why a file shows no frames, in words, from what ffmpeg says about it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stderr
    if "Audio:" in said and "Video:" not in said:
        return "holds sound but no pictures"
    if "Video:" in said:
        return "no frame can be read"
    reasons = ("moov atom not found", "Invalid data found")
    return f"truncated or not a video ({next((r for r in reasons if r in said), 'no pictures in it')})"


def write_clips(
    paths: Sequence[Path], clips: Sequence[np.ndarray], crf: int, fps: int = 25, audio: bool = False
) -> None:
    """Write clips of equal shape (F, H, W, 3) uint8 RGB as H.264 files, all through one ffmpeg process.

    crf: constant rate factor of x264, 0 to 51; 23 and 40 are FaceForensics++'s c23 and c40. H and W must be
    even. audio: add a silent track. Raises OSError when the disk is full, UserError with ffmpeg's last word
    when it fails otherwise.
    """
    frames, height, width, _ = clips[0].shape
    if any(clip.shape != clips[0].shape for clip in clips) or height % 2 or width % 2:
        raise ValueError("clips written together have one shape, with even height and width")
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    pattern = folder / f".{os.getpid()}-%06d.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    if audio:
        command += ["-f", "lavfi", "-i", "anullsrc", "-shortest", "-c:a", "aac"]
    command += [
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
        "-crf",
        str(crf),
        "-pix_fmt",
        "yuv420p",
        "-threads",
        "1",
    ]
    if len(paths) == 1:
        command += ["-movflags", "+faststart", "-f", "mp4", str(pattern) % 0]
    else:
        # Every clip begins with a key frame of its own, so that the stream can be cut there.
        command += ["-g", str(frames), "-keyint_min", str(frames), "-sc_threshold", "0", "-bf", "0"]
        cuts = ",".join(str(frames * number) for number in range(1, len(paths)))
        command += ["-f", "segment", "-segment_frames", cuts, "-reset_timestamps", "1", str(pattern)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    broken = False
    try:
        for clip in clips:
            for frame in clip:  # one at a time, so that no clip is copied whole
                process.stdin.write(frame.tobytes())
    except BrokenPipeError:
        broken = True  # ffmpeg ended early; why stands in what it said
    said = process.communicate()[1].decode(errors="replace").strip()
    if process.returncode or broken:
        for part in folder.glob(f".{os.getpid()}-*.mp4"):
            part.unlink()
        if os.strerror(errno.ENOSPC) in said or shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[0]))
        raise UserError(f"{paths[0]}: ffmpeg could not write it ({(said or 'no message').splitlines()[-1]})")
    for number, path in enumerate(paths):
        Path(str(pattern) % number).replace(path)


def list_videos(path: Path, crops: bool = False) -> list[Path]:
    """A video, or all videos below a folder in the order of their names. crops: folders of crops `NNNN.png`,
    as extract.py writes them, are videos as well. UserError when there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such video or folder")
    if crops and _holds_crops(path):
        return [path.resolve()]  # for its name, also where the path is "."
    videos = find_images(path, endings=VIDEO_ENDINGS)
    if crops:
        videos = sorted([*videos, *(inside for inside in path.rglob("*") if _holds_crops(inside))])
    if not videos:
        also = " or folder of crops (NNNN.png)" if crops else ""
        raise UserError(f"{path}: holds no video ({', '.join(VIDEO_ENDINGS)}){also}")
    return videos


def _holds_crops(folder: Path) -> bool:
    return folder.is_dir() and any(path.stem.isdigit() for path in folder.glob("*.png"))


def batched(frames: Iterator[tuple[int, np.ndarray]], budget: int = 2**28) -> Iterator[list]:
    """Groups of consecutive (index, frame) pairs, at most 32 and at most `budget` bytes together.

    What was read before a VideoError is given out before the error goes on.
    """
    group: list[tuple[int, np.ndarray]] = []
    try:
        for pair in frames:
            group.append(pair)
            if len(group) >= max(1, min(32, budget // pair[1].nbytes)):
                yield group
                group = []
    except VideoError:
        if group:
            yield group
        raise
    if group:
        yield group
