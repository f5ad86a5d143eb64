"""A page for faces from sentences. Run `python -m anyface.app`.

Needs the optional packages of requirements-app.txt. One tab makes faces from one caption or several, the
other edits a face: one made before, or an uploaded picture, which is first found in the generator. Pictures
are served as files that say in their metadata that they are synthetic.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anyface import use
from anyface.bundle import Model, load_model
from anyface.gallery import labelled_row, scale_for
from shared.io import image_grid, write_image
from shared.ranges import Count
from shared.runtime import REPOSITORY, UserError, parse, pick_device, run_main

MOST = 16
"""Faces per click."""


@dataclass(frozen=True)
class AppConfig:
    """Which model the page uses, and where it is served."""

    run: Path | None = None
    """Run folder; default: the newest."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to serve at."""
    steps: Count = 200
    """Steps of the inversion of an uploaded picture."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


class Saved:
    """Writes pictures as marked files of one folder, enlarged when they are small; gives their paths."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.count = folder, name, 0

    def __call__(self, pictures: Tensor, what: str) -> list[str]:
        paths = []
        for picture in pictures:
            path = self.folder / f"face_{self.count:05d}.png"
            self.count += 1
            shown = image_grid([picture], scale=scale_for(picture.shape[-1], 256))
            write_image(path, shown, f"{self.name}, {what}")
            paths.append(str(path))
        return paths


def captions_of(text: str) -> list[str]:
    """One caption per line that is not blank; no line at all is the empty caption."""
    return [line for line in (text or "").splitlines() if line.strip()] or [""]


def to_tensor(array: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(array[..., :3])).permute(2, 0, 1).float() / 255


def remarks(model: Model, captions: list[str], together: bool, more: list[str] = ()) -> str:
    """Notices of all captions, of one face each or of one together, as Markdown."""
    found = [*use.notices_of(model, captions, together), *more]
    return "\n\n".join(f"**Note:** {notice}" for notice in found)


def build_page(model: Model, folder: Path, steps: int):
    """The page as gradio Blocks; pictures go to `folder`. UserError when gradio is not installed."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError(
            f"the page needs gradio: install {REPOSITORY / 'requirements.txt'}, then "
            f"{Path(__file__).with_name('requirements-app.txt')}, with python -m pip install -r in an "
            "environment of its own (gradio asks for an older Pillow than this project)"
        ) from None

    layers = model.generator.n_latent
    save = Saved(folder, model.name)

    def told(work, *arguments):
        try:
            return work(*arguments)
        except UserError as error:
            raise gr.Error(str(error)) from None

    def generate(text: str, together: bool, count: float, seed: float | None, m: float, psi: float) -> tuple:
        captions = captions_of(text)

        def work():
            codes = use.combined_code(model, captions) if together else use.caption_codes(model, captions)
            return use.draw(model, codes, int(count), int(seed or 0), int(m), psi)  # an emptied field: None

        pictures, codes = told(work)
        titles = [" + ".join(captions)] if together else captions
        files = [
            (path, use.shortened(title, 40))
            for title, row in zip(titles, pictures, strict=True)
            for path in save(row, f"caption: {title}")
        ]
        scored = [title for title in titles for _ in range(int(count))]
        scores = use.clip_scores(model, pictures.flatten(0, 1), scored)
        note = f"{len(files)} synthetic faces, mean CLIP score {sum(scores) / len(scores):.1f}."
        return files, "\n\n".join([note, remarks(model, captions, together)]), codes.flatten(0, 1), 0

    def choose(event: gr.SelectData) -> int:
        return event.index

    def find(picture: np.ndarray | None, codes: Tensor | None, chosen: int) -> tuple:
        if picture is None:
            if codes is None:
                raise gr.Error("make faces first and click one, or upload a picture")
            return codes[chosen : chosen + 1], []
        found = told(use.invert, model, to_tensor(picture), steps)
        return found.code, found.warnings

    def start(picture, codes, chosen, text, degree, alpha) -> tuple:
        source, warnings = find(picture, codes, chosen)
        return (*change(source, text, degree, alpha, warnings), source)

    def change(source: Tensor | None, text: str, degree: float, alpha: float, warnings=()) -> tuple:
        if source is None:
            raise gr.Error("press Edit first")
        captions = captions_of(text)
        wanted = use.combined_code(model, captions)
        title = " + ".join(captions)
        code = told(use.edited, model, source, wanted, int(degree), alpha)
        before, after = save(use.paint(model, torch.cat((source, code))), f"edited towards: {title}")
        pictures, degrees = use.strip(model, source, wanted, alpha)
        row = folder / f"strip_{save.count:05d}.png"
        write_image(row, labelled_row(pictures, [str(d) for d in degrees]), f"{model.name}, editing strip")
        note = f"degree {int(degree)} of {layers}: the larger, the more of the source stays."
        return before, after, str(row), "\n\n".join([note, remarks(model, captions, True, list(warnings))])

    with gr.Blocks(title="AnyFace: faces from text") as page:
        gr.Markdown(
            "# Faces from text\nEvery face is synthetic: it shows nobody and is no evidence of an identity."
        )
        codes, chosen, source = gr.State(), gr.State(0), gr.State()
        with gr.Tab("Faces"):
            text = gr.Textbox(
                label="captions, one a line", lines=3, elem_id="caption", value="a person with long hair"
            )
            together = gr.Checkbox(False, label="all lines describe one face", elem_id="together")
            with gr.Row():
                count = gr.Slider(1, MOST, 4, step=1, label="faces", elem_id="count")
                seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
                m = gr.Slider(0, layers, model.m, step=1, label="layers from noise (M)")
                psi = gr.Slider(0, 1, model.psi, step=0.05, label="truncation of the noise (psi)")
            go = gr.Button("Make faces", variant="primary", elem_id="make")
            gallery = gr.Gallery(label="faces", elem_id="faces", columns=4, height="auto")
            message = gr.Markdown(elem_id="message")
        with gr.Tab("Edit", elem_id="edit-tab"):
            with gr.Row():
                picture = gr.Image(
                    label="picture (or none: the face clicked last)", elem_id="upload", height=256
                )
                before = gr.Image(label="source as the generator has it", elem_id="before", type="filepath")
                after = gr.Image(label="edited", elem_id="after", type="filepath")
            wish = gr.Textbox(label="caption", value="a person with red hair", elem_id="wish")
            with gr.Row():
                degree = gr.Slider(0, layers, max(1, layers // 3), step=1, label="degree", elem_id="degree")
                alpha = gr.Slider(0, 1, 1, step=0.05, label="alpha")
            edit = gr.Button("Edit", variant="primary", elem_id="edit")
            gr.Markdown("All degrees:")  # a label of the picture would lie over its first number
            row = gr.Image(show_label=False, elem_id="strip", type="filepath")
            told_edit = gr.Markdown(elem_id="told")
        go.click(generate, [text, together, count, seed, m, psi], [gallery, message, codes, chosen])
        gallery.select(choose, None, chosen)
        shown = [before, after, row, told_edit]
        edit.click(start, [picture, codes, chosen, wish, degree, alpha], [*shown, source])
        for slider in (degree, alpha):
            slider.release(change, [source, wish, degree, alpha], shown)
    return page


def main(config: AppConfig) -> None:
    """Serve the page until interrupted; its pictures live as long."""
    model = load_model(config.run, pick_device(config.device))
    with tempfile.TemporaryDirectory(prefix="anyface-") as folder:
        page = build_page(model, Path(folder), config.steps)
        page.launch(
            server_name=config.host, server_port=config.port, share=False, allowed_paths=[str(Path(folder))]
        )


if __name__ == "__main__":
    run_main(lambda: main(parse(AppConfig, __doc__)))
