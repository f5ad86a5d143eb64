"""AnyFace in use: faces from captions, inversion, editing, sheets, bad input, export, bias report."""

import json
import subprocess
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from anyface import export, safety, use
from anyface import predict as predicting
from anyface.align import align_face
from anyface.attention import picture, word_weights
from anyface.bundle import Model, load_model, save_model
from anyface.clip import BPETokenizer
from anyface.encoder import E4E
from anyface.gallery import grid, write_page
from anyface.model import Stream
from anyface.parts import small_clip, small_generator
from shared.io import write_image
from shared.onnxfile import run_onnx
from shared.runtime import UserError, parse

SYNTHETIC = "trainedAlgorithmicMedia"


def make_model(words: bool = False, wide: bool = False) -> Model:
    """An untrained model of the demo's networks: what is tested does not depend on the training."""
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    text = Stream(64, (2,), 8, 64, layers=1, heads=2, feedforward=64, dropout=0.0, lr_mul=1.0)
    mean = 0.1 * torch.randn(1, 8, 64)
    model = Model(clip, tokenizer, small_generator(32), text, mean, words=words)
    model.wide = small_generator(64) if wide else None
    for part in (model.clip, model.generator, model.text):
        part.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("anyface") / "model"
    save_model(path, make_model(wide=True))
    return path


def call(script: str, *arguments, expect: int = 0) -> subprocess.CompletedProcess:
    """A script of the paper's folder, from there, as a user calls it."""
    done = helpers.script("anyface", script, *arguments, code=expect)
    assert expect != 2 or "Traceback" not in done.stderr
    return done


def predict(*arguments) -> None:
    """predict.py's work in this process, from its command line on."""
    predicting.main(parse(predicting.PredictConfig, "", [str(argument) for argument in arguments]))


# --- faces from captions --------------------------------------------------------------------------


def test_draws_differ_by_their_noise_alone(model):
    codes = use.caption_codes(model, ["red hair", "a hat"])
    pictures, drawn = use.draw(model, codes, 3, seed=1)
    assert pictures.shape == (2, 3, 3, 32, 32) and drawn.shape == (2, 3, 8, 64)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(drawn[0, :, :4], drawn[1, :, :4])
    assert torch.equal(drawn[0, 0, 4:], drawn[0, 1, 4:]) and not torch.equal(drawn[0, 0], drawn[0, 1])
    again, _ = use.draw(model, codes, 3, seed=1)
    assert torch.equal(pictures, again)
    assert not torch.equal(pictures, use.draw(model, codes, 3, seed=2)[0])
    certain, _ = use.draw(model, codes, 2, m=0)
    assert torch.equal(certain[:, 0], certain[:, 1])
    half, cut = use.draw(model, codes, 1, psi=0.0)
    assert torch.allclose(cut[0, 0, :4], model.mean[0, :4])
    _, first = use.draw(model, codes, 3, seed=1, psi=0.0, cutoff=1)
    assert torch.allclose(first[0, 0, :1], model.mean[0, :1]) and torch.equal(
        first[0, 0, 1:], drawn[0, 0, 1:]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "0 faces of 32 px for each of 1 captions"),
        ({"count": 400_000}, "1 to 349525 go"),
        ({"m": 9}, "0 to 8 layers"),
        ({"m": -1}, "not -1"),
        ({"cutoff": -1}, "--cutoff counts layers"),
    ],
)
def test_draw_refuses(model, changes, message):
    with pytest.raises(UserError, match=message):
        use.draw(model, model.mean, **({"count": 1} | changes))


def test_any_number_of_captions_gives_one_code(model):
    captions = ["red hair", "a hat", "pale skin"]
    one = use.combined_code(model, captions[:1])
    assert torch.allclose(one, use.caption_codes(model, captions[:1]), atol=1e-5)
    three = use.combined_code(model, captions)
    assert three.shape == (1, 8, 64) and torch.allclose(
        three, use.combined_code(model, captions[::-1]), atol=1e-4
    )
    for work in (use.combined_code, use.caption_codes):
        with pytest.raises(UserError, match="at least one caption"):
            work(model, [])


def test_a_stream_across_the_batch_reads_one_caption_at_a_time():
    """As in the released inference: the other captions of a call change nothing."""
    model = make_model()
    released = Stream(**model.text.sizes | {"batch_as_sequence": True}).eval()
    released.load_state_dict(model.text.state_dict())
    model.text = released
    alone = torch.cat([model.codes([caption]) for caption in ("red hair", "a hat")])
    assert torch.allclose(use.caption_codes(model, ["red hair", "a hat"]), alone, atol=1e-5)


def test_notices(model):
    assert use.notices(model, "red hair") == []
    assert "empty caption" in use.notices(model, "  ")[0]
    assert "words that this model does not know: zebra" in use.notices(model, "red hair and zebra zebra")[0]
    found = use.notices(model, "\u4e2d\u6587 \U0001f642")
    assert len(found) == 1 and "no word of it" in found[0]
    long = use.notices(model, "red " * 2500)
    assert "cut to its first 26 tokens, 2474 left out" in long[0] and len(long[0]) < 200
    model = make_model()
    model.tokenizer = BPETokenizer()
    assert use.notices(model, "\u4e2d\u6587 \U0001f642") == []
    assert "cut to its first 75 tokens" in use.notices(model, "smile " * 1700)[0]


def test_captions_of_one_face_are_cut_only_where_they_are_read_as_one_text(model, tmp_path, capsys):
    half = "red hair " * 12  # 24 of 26 tokens
    assert use.notices_of(model, [half, half], True) == []
    words = make_model(words=True)
    assert use.notices(words, half) == []
    assert "cut to its first 26 tokens, 22 left out" in use.notices_of(words, [half, half], True)[0]
    save_model(tmp_path / "model", model)
    predict(half, half, "--together", "--run", tmp_path / "model", "--out", tmp_path / "out")
    assert "left out" not in capsys.readouterr().out + (tmp_path / "out" / "index.html").read_text("utf-8")
    save_model(tmp_path / "words", words)
    predict(half, half, "--together", "--run", tmp_path / "words", "--out", tmp_path / "all")
    assert "22 left out" in capsys.readouterr().out
    assert "22 left out" in (tmp_path / "all" / "index.html").read_text("utf-8")
    assert json.loads((tmp_path / "all" / "result.json").read_text())["notices"]
    # What is looked at is the text that was read, and that picture too says where it comes from.
    assert [path.name for path in (tmp_path / "all").glob("attention_*")] == ["attention_000.png"]
    assert SYNTHETIC in Image.open(tmp_path / "all" / "attention_000.png").text["DigitalSourceType"]


def test_clip_score_is_the_cosine(model):
    pictures = torch.rand(2, 3, 32, 32)
    cosine = F.cosine_similarity(model.see(pictures * 2 - 1), model.features(["red hair", "a hat"]))
    scores = use.clip_scores(model, pictures, ["red hair", "a hat"])
    assert scores == pytest.approx((100 * cosine.clamp_min(0)).tolist(), abs=1e-3)


# --- inversion and editing ------------------------------------------------------------------------


def test_inversion_finds_a_face_of_the_generator(model):
    torch.manual_seed(1)
    w = model.generator.mapping(torch.randn(1, 64))[:, None].expand(-1, 8, -1)
    face = use.paint(model, w)[0]
    start = use.invert(model, face, steps=1)
    found = use.invert(model, face, steps=80)
    assert found.explained > 0.8 > start.explained
    assert found.code.shape == (1, 8, 64) and not found.warnings and 0.3 < found.distance < 1.5


def test_inversion_far_from_the_faces_is_said(model, monkeypatch):
    """Codes three times as far from the mean as w are no faces of the generator, however well they fit."""
    torch.manual_seed(1)
    centre, radius = use.typical(model)
    w = model.generator.mapping(torch.randn(2000, 64))
    assert torch.allclose(w.mean(0), centre, atol=0.2)
    assert (w - centre).norm(dim=1).median().item() == pytest.approx(radius.item(), rel=0.1)
    direction = F.normalize(torch.randn(1, 8, 64), dim=-1)
    picture = use.paint(model, centre + 3 * radius * direction)[0]
    far = Model(**{**vars(model), "mean": (centre + 3 * radius * direction)})
    monkeypatch.setattr(use, "EXPLAINED", -1e9)  # an untrained generator's picture does not fit [0, 1]
    found = use.invert(far, picture, steps=1, lr=1e-6)
    assert found.distance == pytest.approx(3, abs=0.01)
    assert any("3.0 times as far" in text for text in found.warnings)


def test_inversion_warns_of_what_is_no_face_and_no_square(model):
    torch.manual_seed(0)
    found = use.invert(model, torch.rand(3, 40, 64), steps=30)
    assert found.explained < 0.5
    assert any("reproduces only" in text for text in found.warnings)
    assert any("64 x 40 is no square" in text for text in found.warnings)
    plain = use.invert(model, torch.full((3, 32, 32), 0.5), steps=2)
    assert any("nearly of one colour" in text for text in plain.warnings)
    with pytest.raises(UserError, match="at least one step"):
        use.invert(model, torch.rand(3, 32, 32), steps=0)


def test_inversion_by_an_encoder(model):
    torch.manual_seed(0)
    blocks = ((8, 1), (8, 1), (8, 1), (8, 1))
    encoder = E4E(8, 64, 32, blocks).eval()
    face = torch.rand(3, 32, 32)
    found = use.invert(model, face, steps=0, encoder=(encoder, model.mean))
    assert torch.allclose(found.code, encoder(face[None] * 2 - 1) + model.mean, atol=1e-5)
    with pytest.raises(UserError, match="different generators"):
        use.invert(model, face, encoder=(encoder, torch.zeros(1, 18, 512)))


def test_degrees_run_from_the_caption_to_the_source(model):
    source, wanted = model.mean, use.combined_code(model, ["red hair"])
    pictures, degrees = use.strip(model, source, wanted)
    assert degrees == list(range(9))
    assert torch.allclose(pictures[-1], use.paint(model, source)[0], atol=1e-5)
    assert torch.allclose(pictures[0], use.paint(model, wanted)[0], atol=1e-5)
    for degree in (-1, 9):
        with pytest.raises(UserError, match="--degree is 0 to 8"):
            use.edited(model, source, wanted, degree)
    with pytest.raises(UserError, match="--alpha"):
        use.edited(model, source, wanted, 3, 1.5)


def test_stored_codes(model, tmp_path):
    codes = torch.randn(5, 8, 64)
    torch.save(codes, tmp_path / "latents.pt")
    assert torch.equal(use.read_code(model, tmp_path / "latents.pt", 3), codes[3:4])
    with pytest.raises(UserError, match="row 5 asked for, it has 5"):
        use.read_code(model, tmp_path / "latents.pt", 5)
    torch.save(torch.randn(5, 18, 512), tmp_path / "other.pt")
    with pytest.raises(UserError, match="made for another generator"):
        use.read_code(model, tmp_path / "other.pt")
    torch.save({"weights": codes}, tmp_path / "none.pt")
    with pytest.raises(UserError, match="no codes"):
        use.read_code(model, tmp_path / "none.pt")


def disc(points, size, radius=2.5):
    """White discs on black at (x, y) points."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    image = torch.zeros(size, size)
    for px, py in points:
        image = torch.maximum(image, ((x - px) ** 2 + (y - py) ** 2 < radius**2).float())
    return image.expand(3, -1, -1)


def test_alignment_undoes_turning_shifting_and_scaling():
    face = torch.tensor([[-20.0, -15], [20, -15], [0, 5], [-14, 25], [14, 25]])
    upright = align_face(disc((face + 64).tolist(), 128), face + 64, 64)
    angle = torch.tensor(0.5)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    moved = 1.5 * face @ turn.T + torch.tensor([120.0, 140.0])
    turned = align_face(disc(moved.tolist(), 256, 3.75), moved, 64)
    assert (upright - turned).abs().mean() < 0.02
    # FFHQ: the square is four eye distances or 3.6 eye-mouth distances wide, centred a tenth below the eyes.
    half = max(2 * 40, 1.8 * 40)
    eye = 32 + 32 * torch.tensor([-20.0, -15 - (-15 + 4)]) / half
    assert upright[0, int(eye[1]), int(eye[0])] > 0.5
    with pytest.raises(UserError, match="no face"):
        align_face(torch.rand(3, 64, 64), torch.zeros(5, 2), 32)
    with pytest.raises(UserError, match="far outside the photo of 64 x 64"):
        align_face(torch.rand(3, 64, 64), 1000 * face, 32)
    with pytest.raises(UserError, match="five points"):
        align_face(torch.rand(3, 64, 64), torch.zeros(4, 2), 32)


# --- the command ----------------------------------------------------------------------------------


def test_predict_makes_marked_faces_of_any_sentences(folder, tmp_path):
    captions = ["a person with red hair", "", "\u7ea2\u53d1 \U0001f642", "long hair " * 1000]
    done = call("predict.py", *captions, "--run", folder, "--count", 2, "--out", tmp_path / "out")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    for text in ("empty caption", "no word of it", "cut to its first 26 tokens, 1974 left out"):
        assert f"{text}" in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["faces"]) == 8 and len(result["notices"]) == 3
    assert all(0 <= face["clip_score"] <= 100 for face in result["faces"])
    files = [face["file"] for face in result["faces"]]
    for name in [*files, "grid.png"]:
        picture = Image.open(tmp_path / "out" / name)
        assert SYNTHETIC in picture.text["DigitalSourceType"]
    assert Image.open(tmp_path / "out" / files[0]).size == (64, 64)
    codes = load_file(tmp_path / "out" / "codes.safetensors")["codes"]
    assert codes.shape == (8, 8, 64)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 8 and "synthetic" in page and "http" not in page


def test_predict_builds_one_face_from_all_captions(folder, tmp_path):
    lines = tmp_path / "captions.txt"
    lines.write_text("a hat\npale skin\n", encoding="utf-8-sig")  # with the mark of a spreadsheet
    predict("red hair", "--file", lines, "--together", "--run", folder, "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {face["caption"] for face in result["faces"]} == {"red hair + a hat + pale skin"}
    assert Image.open(tmp_path / "out" / "captions.png").width >= 3 * 64


def test_predict_edits_a_picture_and_then_its_code(folder, tmp_path, capsys):
    write_image(tmp_path / "noise.png", torch.rand(3, 48, 48))
    arguments = ("red hair", "--edit", tmp_path / "noise.png", "--steps", 20, "--run", folder)
    predict(*arguments, "--degree", 8, "--out", tmp_path / "out")
    assert "is it one face" in capsys.readouterr().out
    for name in ("source", "edited", "strip", "inverted"):
        assert SYNTHETIC in Image.open(tmp_path / "out" / f"{name}.png").text["DigitalSourceType"]
    before, after = (np.asarray(Image.open(tmp_path / "out" / f"{n}.png")) for n in ("source", "edited"))
    assert np.array_equal(before, after)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["degree"] == 8 and result["explained_variance"] < 0.5
    code = tmp_path / "out" / "codes.safetensors"
    predict("red hair", "--code", code, "--run", folder, "--out", tmp_path / "again")
    again = np.asarray(Image.open(tmp_path / "again" / "source.png"))
    assert np.array_equal(before, again)
    assert not np.array_equal(again, np.asarray(Image.open(tmp_path / "again" / "edited.png")))
    before = code.read_bytes()
    with pytest.raises(UserError, match="codes.safetensors would be overwritten.*another --out"):
        predict("red hair", "--code", code, "--row", 1, "--run", folder, "--out", tmp_path / "out")
    assert code.read_bytes() == before
    picture = tmp_path / "out" / "edited.png"
    before = picture.read_bytes()
    with pytest.raises(UserError, match="edited.png would be overwritten by a result: give another --out"):
        predict("red hair", "--edit", picture, "--run", folder, "--out", tmp_path / "out")
    assert picture.read_bytes() == before


def test_predict_says_what_is_wrong(folder, tmp_path):
    torch.save(small_generator(64).state_dict(), tmp_path / "wide.pt")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    write_image(tmp_path / "face.png", torch.rand(3, 32, 32))
    base = ("--run", folder, "--out", tmp_path / "out")
    cases = {
        "at least one caption": base,
        "a generator of 64 px": ("x", *base, "--generator", tmp_path / "wide.pt"),
        "not a readable image": ("x", *base, "--edit", tmp_path / "broken.png"),
        "no such image": ("x", *base, "--edit", tmp_path / "absent.png"),
        "either --edit PICTURE or --code FILE": ("x", *base, "--edit", "a.png", "--code", "b.pt"),
        "--landmarks takes ten numbers": ("x", *base, "--edit", tmp_path / "face.png", "--landmarks", 1, 2),
        r"AnyFace\+\+ needs --checkpoint with --memory": (
            "x",
            *base,
            "--checkpoint",
            "c.pt",
            "--clip",
            "l.pt",
        ),
        "not a run folder": ("x", "--run", tmp_path, "--out", tmp_path / "out"),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message):
            predict(*arguments)
    for option, value in (("--degree", 9), ("--alpha", 1.5)):  # known before the face is looked for
        with pytest.raises(UserError, match=f"{option} (is 0 to|1.5: give a number from 0 to 1)"):
            predict("x", *base, "--edit", tmp_path / "face.png", option, value)
    for option in ("--degree 2", "--alpha 0.5", "--landmarks 1 2 3", "--steps 2", "--e4e a.pt", "--row 1"):
        with pytest.raises(UserError, match=f"{option.split()[0]} means nothing without --edit or --code"):
            predict("x", *base, *option.split())
    for option in ("--count 2", "--m 0", "--psi 0.5", "--cutoff 2", "--seed 1"):
        with pytest.raises(UserError, match=f"{option.split()[0]} means nothing with --edit or --code"):
            predict("x", *base, "--code", "codes.pt", *option.split())
    for option in ("--landmarks 1 2 3", "--steps 2", "--e4e a.pt"):
        with pytest.raises(UserError, match=f"{option.split()[0]} means nothing without --edit$"):
            predict("x", *base, "--code", "codes.pt", *option.split())
    with pytest.raises(UserError, match="--row means nothing without --code$"):
        predict("x", *base, "--edit", tmp_path / "face.png", "--row", 1)
    for option in ("--memory a.pt", "--clip a.pt", "--bf16"):
        with pytest.raises(UserError, match=f"{option.split()[0]} means nothing without --checkpoint"):
            predict("x", *base, *option.split())
    for option in ("--seed -1", "--psi nan", "--count 0", "--m -1"):
        with pytest.raises(UserError, match=f"^{option.split()[0]} .*: give "):
            predict("x", *base, *option.split())
    with pytest.raises(UserError, match="no UTF-8 text"):
        predict("a \udcff face", *base)
    assert not (tmp_path / "out" / "inverted.png").exists()
    done = call("predict.py", *base, expect=2)
    assert done.stderr.startswith("error: give at least one caption")


# --- sheets, words, export, report ----------------------------------------------------------------


def test_sheet_and_page(tmp_path, monkeypatch):
    pictures = torch.rand(2, 3, 3, 32, 32)
    assert grid(pictures, ["a", "<b>"]).shape[0] == 3
    written, plain = [], Path.write_text

    def noted(self, text, encoding=None, **options):
        written.append(encoding)
        return plain(self, text, encoding, **options)

    monkeypatch.setattr(Path, "write_text", noted)
    labels = ["a", "b", "\u4e2d\u6587 \U0001f642"]
    write_page(tmp_path / "p.html", "T", "M", [("<script>", ["<note>"], pictures[0], labels)])
    assert written == ["utf-8"]  # as the page says of itself, whatever the locale
    text = (tmp_path / "p.html").read_text("utf-8")
    assert labels[2] in text
    assert "&lt;script&gt;" in text and "<script>" not in text and "<note>" not in text


def test_stream_that_reads_words():
    model = make_model(words=True)
    codes = model.codes(["a person with red hair", "red hair"])
    assert codes.shape == (2, 8, 64)
    assert torch.allclose(codes[1:], model.codes(["red hair"]), atol=1e-5)
    words, weights = word_weights(model, "a person with red hair")
    assert words == ["(start)", "a", "person", "with", "red", "hair", "(end)"]
    figure = picture(words, weights)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == words
    assert weights.shape == (1, 7) and weights.sum().item() == pytest.approx(1, abs=1e-4)
    assert use.combined_code(model, ["red hair", "a hat"]).shape == (1, 8, 64)
    with pytest.raises(UserError, match="one feature per caption"):
        word_weights(make_model(), "red hair")


def test_export_computes_the_same(tmp_path, model):
    found = export.export(model, tmp_path)
    assert set(found) == {"clip_text.onnx", "text.onnx", "generator.onnx"}
    assert max(found.values()) < export.TOLERANCE

    caption = "someone who has long hair and a hat"
    (feature,) = run_onnx(tmp_path / "clip_text.onnx", tokens=model.tokenizer([caption]))
    (codes,) = run_onnx(tmp_path / "text.onnx", feature=feature)
    (picture,) = run_onnx(tmp_path / "generator.onnx", codes=codes)
    wanted = model.paint(model.codes([caption]))
    assert torch.allclose(picture, wanted, atol=1e-3)
    assert torch.equal(load_model(tmp_path / "model").codes([caption]), model.codes([caption]))


def test_export_keeps_no_file_that_differs(tmp_path, model, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="not kept"):
        export.export(model, tmp_path)
    assert not (tmp_path / "clip_text.onnx").exists()


def test_bias_report(tmp_path, model, folder, capsys, monkeypatch):
    assert safety.balance(torch.tensor([0.5, 0.5])) == pytest.approx(1)
    assert safety.balance(torch.tensor([1.0, 0.0])) == 0
    # Features that are those of the phrases themselves are read as what they say.
    values = {"red": ("red hair",), "long": ("long hair",), "hat": ("a hat",)}
    seen = model.features(["a hat", "red hair"])
    assert safety.classify(model, seen, values).tolist() == [2, 0]
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"hair": {"red": ["red hair"], "blond": ["blond hair"]}}))
    config = safety.SafetyConfig(folder, ("someone",), groups, 8, out=tmp_path)
    safety.main(config)
    printed = capsys.readouterr().out
    assert "hair" in printed and "nothing about people" in printed
    (row,) = json.loads((tmp_path / "safety.json").read_text())["rows"]
    assert sum(row["shares"].values()) == pytest.approx(1) and 0 <= row["balance"] <= 1
    # Captions are drawn one after the other: their pictures need not all fit into memory together.
    monkeypatch.setattr(use, "MOST_BYTES", 8 * 12 * 64 * 64)
    safety.main(safety.SafetyConfig(folder, ("someone", "a face"), groups, 8, out=tmp_path))
    again = json.loads((tmp_path / "safety.json").read_text())["rows"]
    assert len(again) == 2 and again[0] == row
    form = r"groups\.json: not readable as \{attribute: \{value: \[phrases\]\}\}"
    # A phrase that stands where a list of phrases should would be read letter by letter.
    for foreign in ([1, 2], {"hair": {"red": "red hair", "blond": "blond hair"}}, {"hair": {"red": ["red"]}}):
        groups.write_text(json.dumps(foreign))
        with pytest.raises(UserError, match=form):
            safety.read_groups(model, groups)
