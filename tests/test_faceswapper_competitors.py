"""FaceSwapper: swaps of other methods, measured as one's own are."""

import json

import helpers
import pytest
from test_faceswapper_protocol import SIZE, make_faceforensics
from torch.nn import functional as F

from faceswapper import eval as evaluation
from faceswapper.data import DrawnFaces, world
from faceswapper.faceforensics import FaceForensicsConfig, measure_swaps
from faceswapper.model import Generator, Size
from shared.io import read_image, write_image
from shared.runtime import UserError


def test_other_methods_swaps_stand_in_the_same_table(tmp_path):
    """Targets of twice the size come back to what they were; one's own swaps measure as one's own."""
    make_faceforensics(tmp_path / "data", DrawnFaces(*world(4, 1, 7), SIZE))
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    config = {"faceforensics": tmp_path / "data", "batch_size": 2}
    measure_swaps(FaceForensicsConfig(**config), generator, tmp_path / "out")
    mine, large = tmp_path / "out/swapped_result_single", tmp_path / "TwiceTheSize"
    assert all(map(helpers.is_marked, mine.iterdir()))
    for path in mine.iterdir():
        target = read_image(tmp_path / "data/ff++" / path.name.split("_FS_")[1])
        write_image(large / path.name, F.interpolate(target[None], scale_factor=2.0, mode="nearest")[0])
    named = FaceForensicsConfig(**config, compare=(mine, large))
    rows = measure_swaps(named, generator, tmp_path / "again")[1]["methods"]
    assert rows[mine.name] == pytest.approx(rows["FaceSwapper"])
    assert rows["TwiceTheSize"]["background L1"] < 0.05
    assert rows["TwiceTheSize"]["SSIM to target"] > 0.95 > rows["paste"]["SSIM to target"]
    with pytest.raises(UserError, match="another method is called TwiceTheSize; rename"):
        measure_swaps(FaceForensicsConfig(**config, compare=(large, large)), generator, tmp_path / "again")
    next(large.glob("raw_001_1*")).unlink()
    with pytest.raises(
        UserError, match="TwiceTheSize: 1 of 3 swaps missing, first raw_001_1_FS_raw_000_1.png"
    ):
        measure_swaps(named, generator, tmp_path / "again")


def test_the_released_generator_is_measured_into_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    make_faceforensics(tmp_path / "data", DrawnFaces(*world(4, 1, 7), SIZE))
    small = Generator(Size(SIZE, 128, 8, 8)).eval()
    monkeypatch.setattr(evaluation, "load_official", lambda name, path: small)
    config = evaluation.Config(
        official=tmp_path / "faceswapper.ckpt", faceforensics=tmp_path / "data", out=tmp_path / "out",
        baselines=False, device="cpu",
    )  # fmt: skip
    assert evaluation.main(config) == tmp_path / "out"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["methods"]) == ["FaceSwapper"] and results["claims"] == []
    assert "0.9448" in capsys.readouterr().out, "the published number is printed beside"
