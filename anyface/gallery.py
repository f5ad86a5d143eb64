"""Sheets and a page of generated faces: caption grid, editing and build-up strips, a gallery in HTML."""

import base64
import io
from pathlib import Path

from jinja2 import Template
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from anyface.use import shortened
from shared.io import SYNTHETIC_SOURCE, image_grid, to_pil

PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: 0 .6em .8em 0; } figcaption { font-size: 12px; color: #555; }
img { width: 128px; image-rendering: {{ rendering }}; } .note { color: #8a4b00; }
</style></head><body>
<h1>{{ title }}</h1>
<p>Every picture here is synthetic: made by {{ maker }}. It shows nobody and proves no identity.</p>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% for note in section.notes %}<p class="note">{{ note }}</p>
{% endfor %}{% for picture in section.pictures %}<figure><img alt="{{ picture.label }}"
 src="data:image/png;base64,{{ picture.data }}"><figcaption>{{ picture.label }}</figcaption></figure>
{% endfor %}{% endfor %}</body></html>
""",
    autoescape=True,
)


def scale_for(size: int, wanted: int = 128) -> int:
    """Whole-number enlargement that brings small pictures to about `wanted` px."""
    return max(1, wanted // size)


def grid(pictures: Tensor, captions: list[str]) -> Tensor:
    """(N, K, 3, S, S) -> one sheet: a row of K draws for each caption."""
    labels = [shortened(caption, 48) or "(no words)" for caption in captions]
    scale = scale_for(pictures.shape[-1])
    return image_grid(pictures.flatten(0, 1), columns=pictures.shape[1], row_labels=labels, scale=scale)


def labelled_row(pictures: Tensor, labels: list[str]) -> Tensor:
    """(K, 3, S, S) -> one row with a label above each."""
    scale = scale_for(pictures.shape[-1])
    return image_grid(pictures, columns=len(pictures), column_labels=labels, scale=scale)


def _embedded(picture: Tensor, maker: str) -> str:
    # Marked like the files, for those who save a picture from the page.
    stream, info = io.BytesIO(), PngInfo()
    info.add_text("DigitalSourceType", SYNTHETIC_SOURCE)
    info.add_text("Description", f"synthetic image: {maker}")
    to_pil(picture).save(stream, "PNG", pnginfo=info)
    return base64.b64encode(stream.getvalue()).decode()


def write_page(
    path: Path, title: str, maker: str, sections: list[tuple[str, list[str], Tensor, list[str]]]
) -> None:
    """One HTML file without outside parts. sections: (title, notes, pictures (K, 3, S, S), label of each)."""
    shown = [
        {
            "title": name,
            "notes": notes,
            "pictures": [
                {"label": label, "data": _embedded(picture, maker)}
                for label, picture in zip(labels, pictures, strict=True)
            ],
        }
        for name, notes, pictures, labels in sections
    ]
    small = sections[0][2].shape[-1] < 128
    rendering = "pixelated" if small else "auto"
    path.write_text(PAGE.render(title=title, maker=maker, sections=shown, rendering=rendering), "utf-8")
