"""MDRNets on a user's picture, with networks that need no run: the public parser, sides of any length."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mdrnets import app
from mdrnets.inpaint import Model, attention_of, complete, fitting_mask, hiding_mask
from mdrnets.model import SIZES, CoarseNet, MDRNet, RefineNet
from mdrnets.parser import GROUPS, BiSeNetParser, TinyParser
from mdrnets.predict import PredictConfig, heat, main, painted_parsing, write_outputs
from shared.runtime import UserError


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


def unit_model(**options) -> Model:
    torch.manual_seed(0)
    size = SIZES["unit"]
    net = MDRNet(CoarseNet(size), TinyParser(8), RefineNet(size, 8, **options), size.stride).eval()
    return Model(net, tuple(GROUPS), 16, "test", torch.device("cpu"))


def test_hiding_with_the_public_parser_takes_its_own_labels_at_its_own_size():
    parser, seen = BiSeNetParser(64), []

    def network(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(x)
        logits = torch.zeros(1, 19, 64, 64)
        logits[:, 6, 20:24, 10:50], logits[:, 18, :8] = 9, 9
        return (logits,)

    parser.network.forward = network
    model = Model(SimpleNamespace(parser=parser), tuple(GROUPS), 16, "test", torch.device("cpu"))
    image = picture(128, 128)
    glasses, hat = (hiding_mask(model, image, hide, None) for hide in ("glasses", "hat"))
    # Grown by two of the parser's pixels, each two of the picture's.
    assert glasses[0, 36:52, 16:104].all() and glasses.sum() == 16 * 88
    assert hat[0, :20].all() and hat.sum() == 20 * 128
    halved = F.interpolate(image[None], (64, 64), mode="bilinear", antialias=True)
    assert torch.allclose(seen[0] * parser.deviation + parser.mean, halved, atol=1e-5)
    parser.network.forward = lambda x: (torch.zeros(1, 19, 64, 64),)
    with pytest.raises(UserError, match="--hide hat: none found"):
        hiding_mask(model, image, "hat", None)


def test_attention_of_a_picture_whose_sides_are_no_whole_cells():
    """The full-size networks halve by kernels of 4, which leave out what is beyond the last whole cell."""
    torch.manual_seed(0)
    small = {"widths": (8, 8, 8), "coarse_dilations": (1,), "before": (1,), "after": (1,)}
    size = replace(SIZES["mdrnet_256"], slots=4, keys=4, **small)
    net = MDRNet(CoarseNet(size), TinyParser(8), RefineNet(size, 8), size.stride).eval()
    model = Model(net, tuple(GROUPS), 16, "test", torch.device("cpu"))
    mask = torch.zeros(1, 16, 21)
    mask[:, 4:12, 12:] = 1
    done = complete(model, picture(16, 21), mask, seamless=False)
    asked = []
    net.refine.dmm.query.register_forward_hook(lambda layer, inputs, output: asked.append(inputs[0]))
    with torch.no_grad():
        net(*done.inputs)
    weights, slots = attention_of(model, done, (20, 8))
    assert len(asked) >= 3 and all(torch.equal(features, asked[0]) for features in asked)
    assert weights.shape == (2, 4, 6) and torch.allclose(weights.sum((1, 2)), torch.ones(2))
    assert len(slots) == 8
    with pytest.raises(UserError, match="not in the hole"):
        attention_of(model, done, (11, 8))


def test_pictures_of_attention_and_parsing_show_what_the_network_saw():
    model = unit_model()
    mask = torch.zeros(1, 40, 60)
    mask[:, 12:20, 40:48] = 1
    image = picture(40, 60)
    done, other = (complete(model, x, mask, "hole") for x in (image, torch.where(mask > 0.5, 0.9, image)))
    left, top, width, height = done.box
    outside = torch.ones(40, 60, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    weights, _ = attention_of(model, done, (44, 16))
    for each in weights:
        glow = heat(done, each)
        assert torch.equal(glow, heat(other, each))
        assert torch.equal(glow[:, outside], 0.5 * image[:, outside])
    assert torch.equal(heat(done, weights[0])[:, 14:18, 42:46], torch.full((3, 4, 4), 0.25))
    parsed = painted_parsing(done)
    assert not parsed[:, outside].any() and parsed[:, ~outside].any(0).all()
    empty = complete(model, image, 0 * mask)
    assert torch.equal(empty.damaged, image) and not painted_parsing(empty).any()


def test_a_network_without_attention_still_tells_its_slots(tmp_path):
    image, mask = picture(16, 16), torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    model = unit_model(mrem=False)
    done = complete(model, image, mask)
    weights, slots = attention_of(model, done, (8, 8))
    assert weights is None and [entry["part"] for entry in slots] == list(GROUPS)
    config = PredictConfig(picture=tmp_path / "f.png", pixel=(8, 8))
    write_outputs(tmp_path / "out", model, done, config)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["slots"] == slots and not (tmp_path / "out" / "attention.png").exists()
    with pytest.raises(UserError, match="not in the hole"):
        write_outputs(tmp_path / "other", model, done, replace(config, pixel=(1, 1)))
    assert not (tmp_path / "other").exists()
    bare = unit_model(mrem=False, memory="none")
    with pytest.raises(UserError, match="neither MREM nor a memory"):
        attention_of(bare, complete(bare, image, mask), (8, 8))


@pytest.mark.parametrize(
    "options,said",
    [
        ({}, "either --mask FILE or --hide"),
        ({"mask": "m.png", "hide": "box"}, "either --mask FILE or --hide"),
        ({"mask": "m.png", "box": (0, 0, 4, 4)}, "--box is what --hide box hides"),
        ({"hide": "hat", "box": (0, 0, 4, 4)}, "--box is what --hide box hides"),
        ({"hide": "box", "slot": 3}, "--slot 3: of which part"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        main(PredictConfig(picture=tmp_path / "f.png", **options))


def test_a_hole_that_stands_in_the_transparency_alone_is_spoken_of(tmp_path):
    values = np.zeros((8, 8, 4), np.uint8)
    values[..., 3] = 255
    for name, remarks in (("opaque", 0), ("clear", 1)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        mask, said = fitting_mask(tmp_path / f"{name}.png", (8, 8), "white-hole")
        assert not mask.any() and len(said) == remarks
        values[2:5, 2:5, 3] = 0
    assert "transparent in a mask means nothing" in said[0]


def test_a_strip_is_not_enlarged_to_a_picture_of_gigabytes():
    model, mask = unit_model(), torch.zeros(1, 3, 300)
    mask[..., 100:102] = 1
    with pytest.raises(UserError, match="a strip of 300x3 pixels.*--crop hole"):
        complete(model, picture(3, 300), mask)
    assert complete(model, picture(3, 300), mask, "hole").image.shape == (3, 3, 300)


def test_a_port_in_use_is_one_message(monkeypatch):
    def launch(**options) -> None:
        raise OSError("Cannot find empty port in range: 7860-7860")

    monkeypatch.setattr(app, "load_model", lambda *options: None)
    monkeypatch.setattr(app, "build_page", lambda model: SimpleNamespace(launch=launch))
    with pytest.raises(UserError, match="--port 7860: cannot serve there"):
        app.main(app.AppConfig(device="cpu"))
