"""MDRNets: the page with the brush, in headless Chromium, driven over the WebDriver protocol.

Runs where chromium, chromedriver and gradio are. gradio wants an environment of its own: MDRNETS_APP_PYTHON
names its interpreter (default: the one that runs the tests).
"""

import base64
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

from mdrnets.stages import build, plan, save_stage, stage_file
from mdrnets.train import PRESETS
from shared.io import Run
from shared.runtime import REPOSITORY

PYTHON = os.environ.get("MDRNETS_APP_PYTHON", sys.executable)
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

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press at the first point, move over the others, release."""
        moves = [{"type": "pointerMove", "duration": 60, "x": round(x), "y": round(y)} for x, y in points]
        actions = [
            moves[0],
            {"type": "pointerDown", "button": 0},
            *moves[1:],
            {"type": "pointerUp", "button": 0},
        ]
        pointer = {"type": "pointer", "id": "mouse", "actions": actions}
        self.call("POST", "/actions", {"actions": [pointer]})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with one untrained network, as train.py leaves it: the page is tested, not the training."""
    from dataclasses import replace

    config = replace(PRESETS["demo"], data=("simple",), variants=("full",), unet=False, out=tmp_path / "run")
    Run("mdrnets", config).close()
    torch.manual_seed(0)
    for stage in plan(config):
        save_stage(build(config, stage.name, 6), stage_file(config.out, stage))
    return config.out


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
            "gradio is not installed (mdrnets/requirements-app.txt; MDRNETS_APP_PYTHON names its python)"
        )
    port = free_port()
    command = [PYTHON, "-m", "mdrnets.app", "--run", str(run_folder), "--port", str(port), "--device", "cpu"]
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
    assert "mouth" in browser.run("return document.querySelector('#slots').innerText")
    browser.picture(tmp_path / "done.png")
    if "MDRNETS_APP_PICTURES" in os.environ:
        for name in ("painted.png", "done.png"):
            shutil.copy(tmp_path / name, os.environ["MDRNETS_APP_PICTURES"])
