"""PIN: what the scripts refuse before they begin, the schedule of the rate, and official weights in use."""

import json
from dataclasses import replace

import helpers
import pytest
import torch

from pin import train as training
from pin.bench import Options as Bench
from pin.eval import Options as Evaluation
from pin.export import Options as Export
from pin.export import export
from pin.model import official
from pin.predict import Options as Purify
from pin.predict import predict
from pin.train import PRESETS, train
from shared.io import write_image
from shared.onnxfile import run_onnx
from shared.runtime import UserError, parse, parse_presets

TINY = helpers.TINY["pin"]
ALONE = ("--variants", "pin", "--recognizers", "--no-dae")


def parsed(*arguments):
    return parse_presets(PRESETS, "", [*map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--components", 60], "60 eigenfaces cannot be had from 48 images"),
        (["--keep", 21], r"--keep 21: it must lie in 1..20"),
        (["--size", 18], "--size 18: the DAE of 2 levels needs multiples of 4"),
        (["--esn-widths"], "--dae-widths and --esn-widths: give the channels of at least one level"),
        (["--dae-widths"], "--dae-widths and --esn-widths: give the channels of at least one level"),
        (["--variants", "pin", "pin"], "--variants: one of them is named twice"),
        (["--basis", "a.pth", "--basis-root", "b"], "--basis and --basis-root: .* give one of them"),
        (["--variants", "best"], "no variant 'best'"),
        (["--data", "folder"], "needs --data-root"),
        (["--data", "folder", "--data-root", "/nowhere"], "/nowhere: no such folder"),
        (["--basis", "/nowhere/eig.pth"], "/nowhere/eig.pth: no such file"),
        (["--variants", "pin", "ais", "--recognizers"], "needs a recogniser"),
    ],
)
def test_mistakes_get_one_message(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        train(parsed("demo", *TINY, *arguments, "--out", tmp_path / "run"))
    assert not (tmp_path / "run/checkpoint").exists()


@pytest.mark.parametrize(
    "given",
    """--people 0, --images-per-person 0, --test-people 0, --test-images 0, --transposed 2, --transposed -1
    --size 0, --components 0, --basis-batch 0, --dae-widths 4 0, --esn-widths 0, --hidden 0, --noise -0.1
    --noise nan, --samples 0, --lamb-sparse -1, --lamb-sparse nan, --keep 0, --entropy -1, --dae-steps -1
    --dae-batch 0, --dae-rate 0, --dae-epochs -1, --esn-steps -1, --esn-batch 0, --esn-epochs -1, --esn-rate 0
    --halve-epochs -1, --clip -1, --save-every 0, --log-every 0, --recognizer-epochs -1, --workers -1
    --adversarial-eps -1, --adversarial-steps -1, --seed -1""".replace("\n", ",").split(","),
)
def test_numbers_out_of_range_are_refused(given):
    option, *values = given.split()
    with pytest.raises(UserError, match=rf"{option} {float(values[-1]):g}\S*: give "):
        parsed("demo", option, *values)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        *((Evaluation, f"--{name} 0") for name in ("pairs", "repeats", "queries")),
        *((Purify, given) for given in ("--images a.png --k 0", "--images a.png --seed -1")),
        *((Bench, f"--{name} 0") for name in ("batch", "seconds", "pairs", "attack-batches")),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_other_scripts(options, given):
    with pytest.raises(UserError, match=f"--{given.rpartition('--')[2]}\\S*: give "):
        parse(options, "", given.split())


def test_recognisers_have_the_names_that_the_evaluation_knows(capsys):
    with pytest.raises(SystemExit):
        parsed("demo", "--recognizers", "recogniser")
    assert "surrogate" in capsys.readouterr().err


def test_the_rate_is_first_halved_in_the_22nd_epoch(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(training, "set_rate", lambda _, rate: rates.append(rate))
    config = parsed(
        "demo", *TINY, "--out", tmp_path / "run", "--variants", "pin", "--recognizers", "--no-dae"
    )
    train(replace(config, esn_batch=48, esn_epochs=43, halve_epochs=20, save_every=100))
    assert rates == [0.01] * 21 + [0.005] * 20 + [0.0025] * 2


@pytest.mark.parametrize(("price", "warned"), [(100.0, True), (0.0, False)])
def test_a_price_that_empties_the_masks_is_told(tmp_path, capsys, price, warned):
    config = parsed(
        "demo", *TINY, "--out", tmp_path / "run", "--variants", "pin", "--recognizers", "--no-dae"
    )
    train(
        replace(config, lamb_sparse=price, estimator="exact", optimizer="adam", esn_rate=0.05, esn_steps=12)
    )
    assert ("warning: esn-pin keeps only" in capsys.readouterr().err) == warned


def test_the_follow_ups_file_purifies(tmp_path):
    torch.manual_seed(0)
    parts = {part: official(f"ais_{part}").state_dict() for part in ("encoder", "pca_layer")}
    torch.save(parts, tmp_path / "ais.pth")
    vectors = torch.eye(112 * 112, 1500)
    torch.save({"eig_vec": vectors, "avg_face": torch.zeros(112 * 112)}, tmp_path / "eig.pth")
    write_image(tmp_path / "a.png", torch.rand(3, 120, 100))
    paths = {"ais": tmp_path / "ais.pth", "eigenfaces": tmp_path / "eig.pth"}
    predict(Purify(images=(tmp_path / "a.png",), output=tmp_path / "out", device="cpu", **paths))
    (score,) = json.loads((tmp_path / "out/scores.json").read_text())["images"]
    assert 0 < score["kept"] < 1500 and (tmp_path / "out/a.png").is_file()
    onnx = export(Export(tmp_path / "ais.onnx", **paths))
    (purified,) = run_onnx(onnx, x=torch.zeros(1, 1, 112, 112))
    assert purified.shape == (1, 1, 112, 112)
    with pytest.raises(UserError, match="--ais goes with --eigenfaces"):
        predict(Purify(images=(tmp_path / "a.png",), output=tmp_path / "out", ais=tmp_path / "ais.pth"))
    torch.save({"eig_vec": torch.eye(64 * 64, 1500), "avg_face": torch.zeros(64 * 64)}, tmp_path / "eig.pth")
    with pytest.raises(
        UserError, match="eig.pth: eigenfaces of 4096 pixels, and the networks take 112 x 112"
    ):
        predict(Purify(images=(tmp_path / "a.png",), output=tmp_path / "out", **paths))
