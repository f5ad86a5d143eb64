"""Fixtures that the tests of several papers use."""

import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("browser", "curves", "helpers", "layouts")  # before they are imported

from browser import Browser, chromium  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain pytest passes Flower's tests over where it is not installed; who asks for them alone, as `make
    test-flower` does, gets them."""
    if config.option.markexpr == "flower" or find_spec("flwr"):
        return
    for item in items:
        if item.get_closest_marker("flower"):
            item.add_marker(pytest.mark.skip(reason="Flower is not installed here; run make test-flower"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the order of a single thread, as in a script with OMP_NUM_THREADS=1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """size, as mount takes it -> the folder of a file system so small; needs the right to mount one."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            disk.rmdir()
            pytest.skip("no right to mount a small disk here; tests/test_runs.py has the libraries' errors")
        return disk

    yield mount
    if disk.exists():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    """Headless Chromium."""
    with chromium(tmp_path / "profile") as session:
        yield session
