"""MDRNets: the page with the brush, in headless Chromium (tests/browser.py says what that needs)."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import keep_pictures, page_of, wait_for

from mdrnets.train import PRESETS, train


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """The demo's run that MDRNETS_APP_RUN names; without one the demo's networks after their first steps."""
    if "MDRNETS_APP_RUN" in os.environ:
        return Path(os.environ["MDRNETS_APP_RUN"]).resolve()
    first_steps = {"train_images": 32, "coarse_steps": 8, "refine_steps": 4, "copy_steps": 0, "unet": False}
    demo = replace(PRESETS["demo"], data=("simple",), variants=("full",), device="cpu", **first_steps)
    return train(replace(demo, out=tmp_path / "run"))


@pytest.fixture
def page(run_folder) -> Iterator[str]:
    with page_of("mdrnets", run_folder) as address:
        yield address


def test_painting_completing_and_asking_for_attention(page, browser, tmp_path):
    browser.call("POST", "/url", {"url": page})
    wait_for(lambda: browser.rectangle("#example"), 60)
    browser.run("document.querySelector('#example').click()")
    canvas = wait_for(lambda: browser.rectangle("#editor canvas"), 60)
    time.sleep(2)  # the editor lays its canvas out again when a picture arrives
    canvas = browser.rectangle("#editor canvas")
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    browser.drag([(x - 30 + 10 * i, y) for i in range(7)])
    time.sleep(1)
    browser.picture(tmp_path / "painted.png")
    browser.run("document.querySelector('#complete').click()")
    wait_for(lambda: browser.rectangle("#completed img"), 60)
    message = wait_for(lambda: browser.run("return document.querySelector('#message').innerText"), 10)
    assert "of the picture completed by" in message and not message.startswith("0.0 %")

    shown = wait_for(lambda: browser.rectangle("#completed img"), 10)
    centre = (shown["x"] + shown["width"] / 2, shown["y"] + shown["height"] / 2)
    browser.drag([centre, centre])
    wait_for(lambda: browser.rectangle("#kept img"), 60)
    wait_for(lambda: browser.run("return document.querySelector('#kept img').complete"), 10)
    middle = browser.run(
        "const i = document.querySelector('#kept img'), c = document.createElement('canvas');"
        "c.width = i.naturalWidth; c.height = i.naturalHeight; const p = c.getContext('2d');"
        "p.drawImage(i, 0, 0); return [...p.getImageData(c.width / 2, c.height / 2, 1, 1).data];"
    )
    # A darkened grey hole: what the picture held there is not shown, as the network did not see it.
    assert all(abs(value - 64) < 8 for value in middle[:3])
    assert "mouth" in browser.run("return document.querySelector('#slots').innerText")
    browser.picture(tmp_path / "done.png")
    keep_pictures("mdrnets", tmp_path / "painted.png", tmp_path / "done.png")
