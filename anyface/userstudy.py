"""A user study: a page with the methods' faces of a caption side by side, in random order and without names,
and the mean ranks from people's answers.

    python -m anyface.userstudy answers-1.json answers-2.json --key RUN/study/key.csv

`eval.py --study 50` writes the page. key.csv says which face is whose: give the folder away without it.
"""

import csv
import html
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from shared.io import write_image
from shared.published import format_table
from shared.records import read_json
from shared.runtime import UserError, parse, run_main, step_generator


@dataclass(frozen=True)
class StudyOptions:
    """Answers of a study and its key."""

    answers: tyro.conf.Positional[tuple[Path, ...]]
    """answers.json of every person who took part."""
    key: Path = Path("key.csv")
    """key.csv that was written with the page."""


_PAGE = """<!doctype html><meta charset="utf-8"><title>Which face fits the text?</title>
<style>body{{font:16px sans-serif;max-width:1100px;margin:2em auto}}figure{{display:inline-block;margin:.4em;
text-align:center}}img{{width:160px;image-rendering:auto}}.caption{{font-size:1.2em;margin-top:2em}}</style>
<h1>Which face fits the text, and which looks real?</h1>
<p>All pictures are synthetic. For each text give every picture a rank, 1 for the best, once for how well it
fits the text and once for how real it looks. Then press the button and send the file that is saved.</p>
<form id="form">{questions}</form><p><button type="button" onclick="store()">Save answers</button></p>
<script>function store(){{const answers=Object.fromEntries(new FormData(document.getElementById('form')));
const a=document.createElement('a');a.href=URL.createObjectURL(new Blob([JSON.stringify(answers)]));
a.download='answers.json';a.click()}}</script>
"""


def write_study(folder: Path, captions: list[str], methods: dict[str, Tensor], seed: int) -> Path:
    """Write index.html, the pictures under neutral names, and key.csv (question, position, method).

    methods: name -> pictures (N, 3, S, S) in [-1, 1]. The key stays with the experimenter. Returns the page.
    """
    names = list(methods)
    questions, key = [], []
    for i, caption in enumerate(captions):
        order = torch.randperm(len(names), generator=step_generator(seed, i, 25)).tolist()
        choices = []
        for position, which in enumerate(order):
            file = f"q{i:03d}_{position}.png"
            picture = methods[names[which]][i].clamp(-1, 1) / 2 + 0.5
            # The picture says that it is synthetic, and not by which method: the study is blind.
            write_image(folder / file, picture, synthetic="user study")
            key.append((i, position, names[which]))
            fields = "".join(
                f'<br>{label} <input type="number" min="1" max="{len(names)}" name="q{i}_{position}_{label}">'
                for label in ("fit", "real")
            )
            choices.append(f'<figure><img src="{file}" alt="">{fields}</figure>')
        questions.append(f'<p class="caption">{html.escape(caption)}</p>{"".join(choices)}')
    with open(folder / "key.csv", "w", newline="") as file:
        csv.writer(file).writerows([("question", "position", "method"), *key])
    page = folder / "index.html"
    page.write_text(_PAGE.format(questions="".join(questions)), encoding="utf-8")
    return page


def read_study(key: Path, answers: list[Path]) -> dict[str, dict[str, float]]:
    """key.csv and answers.json files -> method -> {"fit", "real"}: mean rank over people and questions.

    UserError on a file that is missing or of another form or study.
    """
    try:
        with open(key, newline="") as file:
            methods = {(row["question"], row["position"]): row["method"] for row in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: no key of a study, which `eval.py --study` writes ({error})") from None
    ranks: dict[str, dict[str, list[float]]] = {}
    highest = len(set(methods.values()))

    def answered(fields: dict[str, str]) -> None:
        for field, value in fields.items():
            if value:
                question, position, kind = field.removeprefix("q").split("_")
                method = methods[question, position]
                if not 1 <= float(value) <= highest:
                    raise ValueError(f"{field}: a rank of {value}, of 1 to {highest}")
                ranks.setdefault(method, {}).setdefault(kind, []).append(float(value))

    for path in answers:
        read_json(path, "answers to this study, as its page saves them", answered)
    return {m: {kind: sum(v) / len(v) for kind, v in kinds.items()} for m, kinds in ranks.items()}


def print_study(options: StudyOptions) -> None:
    """The methods' mean ranks, 1 for the best, as a table."""
    if not options.answers:
        raise UserError("give the answers.json of at least one person")
    ranks = read_study(options.key, list(options.answers))
    rows = [
        [method, *(f"{kinds[kind]:.2f}" if kind in kinds else None for kind in ("fit", "real"))]
        for method, kinds in sorted(ranks.items())
    ]
    print(format_table(["mean rank, 1 is best", "fits the text", "looks real"], rows))


if __name__ == "__main__":
    run_main(lambda: print_study(parse(StudyOptions, __doc__)))
