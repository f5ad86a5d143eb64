"""AnyFace: the page, in headless Chromium, driven over the WebDriver protocol.

Runs where chromium, chromedriver and gradio are. gradio wants an environment of its own: ANYFACE_APP_PYTHON
names its interpreter (default: the one that runs the tests).
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from anyface.bundle import Model, save_model
from anyface.model import Stream
from anyface.parts import small_clip, small_generator
from shared.io import write_image
from shared.runtime import REPOSITORY

PYTHON = os.environ.get("ANYFACE_APP_PYTHON", sys.executable)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1400",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: Callable, seconds: float, process: subprocess.Popen | None = None):
    """The first true answer of `what`; asks until the time is over or the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended early: {process.stdout.read().decode()[-2000:]}")
        answer = what()
        if answer:
            return answer
        time.sleep(0.2)
    pytest.fail(f"waited {seconds:.0f} s in vain")


class Browser:
    """The few WebDriver commands that the test needs."""

    def __init__(self, port: int, profile: Path):
        self.base = f"http://127.0.0.1:{port}"
        arguments = [*FLAGS, f"--user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")}}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.base += f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        request.method = method
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def run(self, script: str, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def rectangle(self, selector: str) -> dict | None:
        """Position of an element's centre and its size in the window, once it is visible."""
        return self.run(
            "const e = document.querySelector(arguments[0]); if (!e) return null;"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return r.width > 20 ? {x: r.x, y: r.y, width: r.width, height: r.height} : null;",
            selector,
        )

    def find(self, selector: str) -> str:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def write(self, selector: str, text: str) -> None:
        """Replace what a field holds, by keys."""
        element = self.find(selector)
        self.call("POST", f"/element/{element}/clear")
        self.call("POST", f"/element/{element}/value", {"text": text + "\ue004"})

    def upload(self, selector: str, path: Path) -> None:
        """Hand a file to a file field."""
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": str(path)})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


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
def browser(tmp_path) -> Iterator[Browser]:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def ready() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5)
        except urllib.error.URLError:
            return False
        return True

    try:
        wait_for(ready, 30, driver)
        session = Browser(port, tmp_path / "profile")
        yield session
        session.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)


@pytest.fixture
def page(run_folder) -> Iterator[str]:
    if subprocess.run([PYTHON, "-c", "import gradio"], capture_output=True, check=False).returncode:
        pytest.skip(
            "gradio is not installed (anyface/requirements-app.txt; ANYFACE_APP_PYTHON names its python)"
        )
    port = free_port()
    command = [PYTHON, "-m", "anyface.app", "--run", str(run_folder), "--port", str(port), "--device", "cpu"]
    command += ["--steps", "20"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}/"

    def ready() -> bool:
        try:
            urllib.request.urlopen(address, timeout=10)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    try:
        wait_for(ready, 90, server)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def test_sentence_to_faces_to_an_edited_face(page, browser, tmp_path):
    browser.call("POST", "/url", {"url": page})
    wait_for(lambda: browser.rectangle("#caption textarea"), 60)
    browser.write("#caption textarea", "a person with red hair and a zebra")
    browser.write("#count input[type=number]", "3")
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
    told = browser.run("return document.querySelector('#told').innerText")
    assert "degree 2 of 8" in told and "reproduces only" in told
    browser.picture(tmp_path / "edited.png")
    if "ANYFACE_APP_PICTURES" in os.environ:
        for name in ("faces.png", "edited.png"):
            shutil.copy(tmp_path / name, os.environ["ANYFACE_APP_PICTURES"])
