"""AnyFace: the page, in headless Chromium (tests/browser.py says what that needs)."""

import io
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import keep_pictures, page_of, wait_for
from PIL import Image

from anyface.bundle import Model, save_model
from anyface.model import Stream
from anyface.parts import small_clip, small_generator
from shared.io import write_image


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """An untrained model of the demo's networks: the page is tested, not the training."""
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    text = Stream(64, (2, 4), 8, 64, layers=1, heads=2, feedforward=64, lr_mul=1.0)
    model = Model(clip, tokenizer, small_generator(32), text, 0.1 * torch.randn(1, 8, 64))
    save_model(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def page(run_folder) -> Iterator[str]:
    with page_of("anyface", run_folder, "--steps", "20") as address:
        yield address


def test_sentence_to_faces_to_an_edited_face(page, browser, tmp_path):
    browser.call("POST", "/url", {"url": page})
    wait_for(lambda: browser.rectangle("#caption textarea"), 60)
    browser.write("#caption textarea", "a person with red hair and a zebra")
    browser.write("#count input[type=number]", "3")
    browser.write("#seed input", "5\ue003")  # typed and taken back: an empty field
    browser.run("document.querySelector('#make').click()")
    images = "return document.querySelectorAll('#faces .grid-wrap img, #faces button img').length"
    wait_for(lambda: browser.run(images) == 3, 60)
    message = wait_for(lambda: browser.run("return document.querySelector('#message').innerText"), 10)
    assert "3 synthetic faces" in message and "does not know: " in message and "zebra" in message
    browser.picture(tmp_path / "faces.png")

    source = browser.run("return document.querySelector('#faces img').src")
    with urllib.request.urlopen(source, timeout=20) as reply:
        picture = Image.open(io.BytesIO(reply.read()))
    assert picture.text["DigitalSourceType"].endswith("trainedAlgorithmicMedia")

    browser.run("document.querySelectorAll('button[role=tab]')[1].click()")
    wait_for(lambda: browser.rectangle("#edit"), 20)
    face = tmp_path / "upload.png"
    write_image(face, torch.rand(3, 40, 40))
    browser.upload("#upload input[type=file]", face)
    wait_for(lambda: browser.rectangle("#upload img"), 30)
    browser.run("document.querySelector('#edit').click()")
    wait_for(lambda: browser.rectangle("#strip img"), 90)
    top_left = (
        "const i = document.querySelector('#strip img'); i.scrollIntoView({block: 'center'});"
        "const r = i.getBoundingClientRect(); return document.elementFromPoint(r.left + 20, r.top + 8) === i"
    )
    assert browser.run(top_left), "nothing covers the number of the first degree"
    told = browser.run("return document.querySelector('#told').innerText")
    assert "degree 2 of 8" in told and "reproduces only" in told
    browser.picture(tmp_path / "edited.png")
    keep_pictures("anyface", tmp_path / "faces.png", tmp_path / "edited.png")
