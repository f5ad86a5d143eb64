"""FaceSwapper: settings that cannot be, refused in one message before any work."""

import subprocess
import sys

import pytest

from faceswapper.bench import BenchConfig
from faceswapper.eval import Config as EvalConfig
from faceswapper.export import ExportConfig
from faceswapper.export import main as export
from faceswapper.model import Size
from faceswapper.predict import PredictConfig, predict
from faceswapper.prepare import PrepareConfig
from faceswapper.train import PRESETS
from shared.runtime import UserError, parse, parse_presets

IN_OUT = ("--source", "a.png", "--target", "b.png")
RANGES = (
    *((name, "demo", option, value) for name, option, value in (
        ("train", "--batch-size", "0"), ("train", "--r1-every", "0"), ("train", "--weights.r1", "nan"),
        ("train", "--size.max-channels", "0"), ("train", "--ema", "1.5"), ("train", "--id-crop", "0"),
    )),
    *((PredictConfig, IN_OUT, option, value) for option, value in (
        ("--strength", "nan"), ("--strength", "5"), ("--strength", "-1"), ("--mix", "inf nan"),
        ("--mix", "-1 2"), ("--blending.keep-share", "7"), ("--blending.feather", "nan"),
        ("--blending.feather", "2"), ("--eyes", "0 0.5"), ("--eyes", "-0.3 0.5"),
        ("--strip", "-3"), ("--batch-size", "0"),
    )),
    *((PrepareConfig, ("photos",), option, value) for option, value in (
        ("--size", "0"), ("--batch-size", "0"), ("--eyes", "0.3 nan"),
    )),
    *((EvalConfig, (), option, value) for option, value in (("--test-people", "1"), ("--batch-size", "0"))),
    (BenchConfig, (), "--frames", "0"),
)  # fmt: skip


@pytest.mark.parametrize(("command", "given", "option", "value"), RANGES)
def test_numbers_outside_their_range_are_refused(command, given, option, value):
    with pytest.raises(UserError, match=rf"^{option} \S+: give "):
        if command == "train":
            parse_presets(PRESETS, "", [given, option, *value.split()])
        else:
            parse(command, "", [*given, option, *value.split()])


def test_a_network_without_channels():
    with pytest.raises(UserError, match="channel_base 32: give at least img_size, 64"):
        Size(64, 32)


def test_places_for_results_that_cannot_be(tmp_path):
    """Found before any network is opened: there is no run here."""
    with pytest.raises(UserError, match="this is a folder; --out takes the name of a file"):
        export(ExportConfig(run=tmp_path / "none", out=tmp_path))
    photo = tmp_path / "a.png"
    photo.touch()
    with pytest.raises(FileExistsError):
        predict(PredictConfig((photo,), photo, photo))


def test_opencv_writes_nothing_of_its_own():
    """It reads the setting when it is imported, which `faceswapper` must come before."""
    code = "import faceswapper, cv2; print(cv2.utils.logging.getLogLevel())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 2, "errors alone"
