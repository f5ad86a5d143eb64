"""Run bench.py of the papers named on the command line; with all papers, write BENCHMARKS.md.

BENCHMARKS.md has one section per machine; measuring again replaces the section of this machine.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from shared.report import PAPERS
from shared.runtime import REPOSITORY, UserError, processor, run_main

TITLE = (
    "# Benchmarks\n\nMeasured by `make bench` where a section says nothing else. "
    "Every table comes from one run of one script on one machine.\n"
)


def machine() -> str:
    """The hardware that the numbers depend on, as a section's title."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads, {platform.machine()}"


def commit() -> str:
    """The commit of the code, with a mark when the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def run_bench(paper: str) -> tuple[int, str]:
    """Exit code and output of a paper's bench.py, which is printed as it comes."""
    print(f"== {paper}", flush=True)
    command = [sys.executable, "bench.py"]
    lines = []
    with subprocess.Popen(command, cwd=REPOSITORY / paper, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, "\n".join(lines)


def write_section(path: Path, title: str, body: str) -> None:
    """Put the section `title` into the file, in place of the one of that title if there is one."""
    text = path.read_text() if path.is_file() else TITLE
    head, *sections = re.split(r"^(?=## )", text, flags=re.M)
    kept = [section for section in sections if section.splitlines()[0] != f"## {title}"]
    before = "".join([head.rstrip() + "\n\n", *kept]).rstrip()
    path.write_text(f"{before}\n\n## {title}\n\n{body.rstrip()}\n")


def main() -> None:
    papers = sys.argv[1:]
    missing = [paper for paper in papers if not (REPOSITORY / paper / "bench.py").is_file()]
    if missing:
        raise UserError(f"no paper called {', '.join(missing)} here; plain `make` lists the papers")
    failed = []
    body = f"Commit {commit()}, torch {torch.__version__}, Python {platform.python_version()}.\n\n"
    for paper in papers:
        code, text = run_bench(paper)
        if code:
            failed.append(paper)
            text += f"\nfailed (exit code {code})"
        text = text.replace(f"{REPOSITORY}/", "")
        body += f"### {paper}\n\n`cd {paper} && python bench.py`\n\n```\n{text.strip()}\n```\n\n"
    if set(papers) >= {paper for paper in PAPERS if (REPOSITORY / paper / "bench.py").is_file()}:
        write_section(REPOSITORY / "BENCHMARKS.md", machine(), body)
        print("written: BENCHMARKS.md")
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
