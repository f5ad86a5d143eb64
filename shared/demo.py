"""Run the demos of the papers named on the command line, one after another, and say how they went."""

import subprocess
import sys
import time
from pathlib import Path

from shared.io import find_run
from shared.published import format_table
from shared.records import read_json
from shared.report import write_report
from shared.runtime import REPOSITORY, UserError, run_main


def run_demo(paper: str) -> int:
    """`train.py demo` and `eval.py` in the paper's folder; the first exit code that is not 0, or 0."""
    for script in (["train.py", "demo"], ["eval.py"]):
        print(f"== {paper}: python {' '.join(script)}", flush=True)
        code = subprocess.run([sys.executable, *script], cwd=REPOSITORY / paper, check=False).returncode
        if code:
            return code
    return 0


def summarise(paper: str, code: int, seconds: float) -> list[str]:
    """A row of the closing table: paper, outcome, claims held / made, time, where the pictures are."""
    time_taken = f"{seconds:.0f} s"
    if code:
        return [paper, f"failed (exit code {code})", "-", time_taken, "-"]
    folder = find_run(paper)
    claims = read_json(folder / "results.json", "results", lambda found: found["claims"])
    held = sum(claim["holds"] for claim in claims)
    return [paper, "done", f"{held} / {len(claims)}", time_taken, shown(folder / "samples")]


def shown(path: Path) -> str:
    """A path relative to the repository where it lies in it."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def main() -> None:
    papers = sys.argv[1:]
    missing = [paper for paper in papers if not (REPOSITORY / paper / "train.py").is_file()]
    if missing:
        raise UserError(f"no paper called {', '.join(missing)} here; plain `make` lists the papers")
    rows, codes = [], []
    for number, paper in enumerate(papers, 1):
        print(f"\n[{number}/{len(papers)}] {paper}", flush=True)
        start = time.perf_counter()
        codes.append(run_demo(paper))
        rows.append(summarise(paper, codes[-1], time.perf_counter() - start))
    print()
    print(format_table(["paper", "demo", "claims held / made", "time", "pictures"], rows))
    print(f"report: {shown(write_report())}")
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    run_main(main)
