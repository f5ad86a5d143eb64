"""The house as a user meets it: make, the papers' furniture, documented command lines, messages."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from helpers import TINY

from shared import benchmarks, demo
from shared.benchmarks import TITLE, write_section
from shared.report import PAPERS
from shared.runtime import REPOSITORY, processor
from shared.strip import CELLS

HERE = [paper for paper in PAPERS if (REPOSITORY / paper / "train.py").is_file()]
SCRIPTS = ("train.py", "eval.py", "predict.py", "bench.py")


def make(*arguments: str) -> subprocess.CompletedProcess:
    """`make` with the interpreter that runs the tests, so that nothing is installed."""
    binary = Path(sys.executable).parent
    return subprocess.run(
        ["make", f"VENV={binary.parent}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MAKEFLAGS": ""},
    )


def test_plain_make_prints_the_targets_and_papers():
    shown = make()
    assert shown.returncode == 0
    for target in ("demo", "test", "test-all", "bench", "report", "lint", "setup", "clean"):
        assert f"make {target}" in shown.stdout
    assert f"papers here: {' '.join(HERE)}\n" in shown.stdout


SLOW = ("torchvision", "torchmetrics", "sklearn", "scipy.stats")
"""What takes longer to import than PyTorch; torchvision brings torch._dynamo along."""
ON_TIMM = ("anyface", "dfgc2022")
"""Papers whose networks are timm's or open_clip's, which need torchvision."""


@pytest.mark.parametrize(
    ("papers", "absent"),
    [([paper for paper in HERE if paper not in ON_TIMM], SLOW), (ON_TIMM, ("torchmetrics",))],
    ids=["without timm", "on timm"],
)
def test_scripts_begin_without_what_is_slow_to_import(papers, absent):
    names = [f"{paper}.{script}" for paper in papers for script in ("train", "eval", "predict")]
    look = f"import sys, {', '.join(names)}; print([name for name in {absent!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_make_knows_all_ten_names():
    line = next(
        line for line in (REPOSITORY / "Makefile").read_text().splitlines() if line.startswith("PAPERS")
    )
    assert line.split(":=")[1].split() == list(PAPERS)


def test_every_list_of_papers_names_all():
    """The places that the front page tells who adds a paper."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.removesuffix("*") for name in packages} == {"shared", *PAPERS}
    assert set(CELLS) == set(TINY) == set(PAPERS)
    page = (REPOSITORY / "README.md").read_text()
    for paper in HERE:
        assert page.count(f"[{paper}]({paper}/README.md)") == 1


@cache
def options_of(paper: str) -> set[str]:
    """Fields of all dataclasses of a paper, as the command line writes them."""
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / paper).glob("*.py")]
    fields = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {f"--{ast.unparse(field.target).replace('_', '-')}" for field in fields}


def test_options_in_the_tables_of_the_front_page_exist():
    """Data and weights: each option is one of a paper in its row, and each paper there has one of them."""
    page = (REPOSITORY / "README.md").read_text()
    tables = page[page.index("## Real data") : page.index("## At the paper's scale")]
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    checked = 0
    for *_, said, last in rows:
        wanted = set(re.findall(r"--[a-z-]+", said))
        papers = re.findall("|".join(PAPERS), last) or (HERE if wanted else [])
        known = {paper: options_of(paper) for paper in papers}
        assert wanted <= set().union(*known.values()), (said, last)
        if re.findall("|".join(PAPERS), last) and wanted:
            assert all(wanted & options for options in known.values()), (said, last)
        checked += len(wanted)
    assert checked > 20


def test_unknown_paper_is_a_message_and_code_2():
    asked = subprocess.run(
        [sys.executable, "-m", "shared.demo", "nonsense"], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 2
    assert asked.stderr.startswith("error: no paper called nonsense here")


def test_benchmarks_keep_one_section_per_machine(tmp_path):
    page = tmp_path / "BENCHMARKS.md"
    write_section(page, "A", "first")
    write_section(page, "B", "### x\n\nother")
    write_section(page, "A", "second")
    assert page.read_text() == TITLE + "\n## B\n\n### x\n\nother\n\n## A\n\nsecond\n"


def test_a_section_is_called_after_the_processor(tmp_path):
    table = tmp_path / "cpuinfo"
    core = "processor : {}\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Some CPU @ 2 GHz\nflags : a: b\n\n"
    table.write_text(core.format(0) + core.format(1))
    assert processor(table) == "Some CPU @ 2 GHz (cpu family 6, model 143)"
    assert processor(tmp_path / "none")  # a system without that table


def test_only_a_bench_of_all_papers_is_written_down(tmp_path, monkeypatch, capsys):
    """Two papers' tables must not take the place of all ten's; a failure is said and kept in its place."""
    monkeypatch.setattr(
        benchmarks, "run_bench", lambda paper: (int(paper == "pin"), f"table of {REPOSITORY}/{paper}")
    )
    written = []
    monkeypatch.setattr(benchmarks, "write_section", lambda path, title, body: written.append(body))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "dfl", "mdrnets"])
    benchmarks.main()
    assert not written
    monkeypatch.setattr(sys, "argv", ["benchmarks", *HERE])
    with pytest.raises(SystemExit) as ended:
        benchmarks.main()
    assert ended.value.code == 1 and "failed: pin\n" in capsys.readouterr().out
    (body,) = written
    for paper in HERE:
        assert f"### {paper}\n\n`cd {paper} && python bench.py`\n\n```\ntable of {paper}\n" in body
    assert "table of pin\nfailed (exit code 1)\n```" in body


def test_demos_go_on_when_one_fails(tmp_path, monkeypatch, capsys):
    """The table at the end has a row for each, the report is written, and the exit code says it."""
    folders = {}

    def run_demo(paper: str) -> int:
        if paper == "dfl":
            return 3
        folders[paper] = tmp_path / paper
        folders[paper].mkdir()
        claims = [{"holds": True}, {"holds": True}, {"holds": paper != "pin"}]
        (folders[paper] / "results.json").write_text(json.dumps({"claims": claims}))
        return 0

    monkeypatch.setattr(demo, "run_demo", run_demo)
    monkeypatch.setattr(demo, "find_run", folders.__getitem__)
    monkeypatch.setattr(demo, "write_report", lambda: tmp_path / "index.html")
    monkeypatch.setattr(sys, "argv", ["demo", "pin", "dfl", "most_net"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[1/3] pin", "[2/3] dfl", "[3/3] most_net"]
    rows = {line.split()[0]: line for line in lines if "  " in line}
    assert (
        "done" in rows["pin"] and "2 / 3" in rows["pin"] and str(tmp_path / "pin" / "samples") in rows["pin"]
    )
    assert "failed (exit code 3)" in rows["dfl"] and "3 / 3" in rows["most_net"]
    assert lines[-1] == f"report: {tmp_path / 'index.html'}"


@pytest.mark.parametrize("paper", HERE)
def test_furniture(paper):
    folder = REPOSITORY / paper
    for name in ("README.md", "model.py", "losses.py", "data.py", "published.json", *SCRIPTS):
        assert (folder / name).is_file(), f"{paper}/{name} is missing"
    published = json.loads((folder / "published.json").read_text())
    assert isinstance(published["note"], str)
    for row in published["rows"]:
        assert row["source"], f"{paper}: a published number without its source"
    readme = (folder / "README.md").read_text()
    assert "Implementation notes" in readme
    for other in set(PAPERS) - {paper}:
        for path in folder.glob("*.py"):
            assert f"from {other}" not in path.read_text(), f"{path} imports another paper"


@pytest.mark.parametrize("paper", HERE)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_documented(paper, script):
    tree = ast.parse((REPOSITORY / paper / script).read_text())
    assert ast.get_docstring(tree), "a script says what it does"
    assert re.search(r"^class \w*(Config|Options)", (REPOSITORY / paper / script).read_text(), re.M)
    for node in ast.walk(tree):
        # A script's command line is its dataclass called ...Config or Options.
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options")):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{paper}/{script}: {ast.unparse(field.target)} has no docstring"


def test_commands_in_a_scripts_help_keep_their_lines():
    """--help joins the lines of a docstring, but for indented ones."""
    for path in [path for paper in (*HERE, "shared") for path in (REPOSITORY / paper).glob("*.py")]:
        source = path.read_text()
        if '__name__ == "__main__"' in source:
            text = ast.get_docstring(ast.parse(source)) or ""
            assert not re.search(r"^python .*\n\w", text, re.M), path


def test_the_project_speaks_of_itself_alone():
    """No path of a machine it was written on in anything that is shipped."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".html", "") and path.is_file():
            text = path.read_text()
            for word in ("/work" + "/", "/tmp" + "/house", "/opt" + "/venv"):
                assert word not in text, f"{name} names {word}"
