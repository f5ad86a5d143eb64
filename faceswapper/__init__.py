"""FaceSwapper: one-shot progressive face swapping with disentangled identity and attributes."""

import os

# OpenCV reads these when it is imported; a file that is no video gets one message, ours.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
