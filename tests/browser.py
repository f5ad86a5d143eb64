"""Headless Chromium, driven over the WebDriver protocol, and a paper's page for it to look at.

Pages want gradio, which wants an environment of its own: <PAPER>_APP_PYTHON names its interpreter (default:
the one that runs the tests).
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
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.runtime import REPOSITORY

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


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        urllib.request.urlopen(address, timeout=10)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile. Skips the test where chromium and chromedriver are not installed."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/status"), 30, driver)
        session = Browser(port, profile)
        yield session
        session.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)


@contextmanager
def page_of(paper: str, run: Path, *options: str) -> Iterator[str]:
    """Serve a run with the paper's app.py: its address. Skips the test where gradio is not installed."""
    name = f"{paper.upper()}_APP_PYTHON"
    python = os.environ.get(name, sys.executable)
    if subprocess.run([python, "-c", "import gradio"], capture_output=True, check=False).returncode:
        pytest.skip(f"gradio is not installed ({paper}/requirements-app.txt; {name} names its python)")
    port = free_port()
    command = [python, "-m", f"{paper}.app", "--run", str(run), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(
        [*command, *options],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(lambda: answers(address), 300, server)  # importing torch and gradio on a busy machine
        yield address
    finally:
        server.terminate()
        server.wait(20)


def keep_pictures(paper: str, *pictures: Path) -> None:
    """Copy screenshots to the folder that <PAPER>_APP_PICTURES names, if it does."""
    if folder := os.environ.get(f"{paper.upper()}_APP_PICTURES"):
        for picture in pictures:
            shutil.copy(picture, folder)
