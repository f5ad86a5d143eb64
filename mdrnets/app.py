"""A page with a brush: paint over part of a face and see it completed. Run `python -m mdrnets.app`.

Needs the optional packages of requirements-app.txt. The page shows the completed picture, the coarse result,
the parsing and, after a click on a completed pixel, where the network looked for it and which memory slots it
read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from mdrnets.data import DataName
from mdrnets.inpaint import Completed, Crop, Model, attention_of, complete, load_model
from mdrnets.predict import heat, painted_parsing
from shared import faces
from shared.ranges import Within
from shared.runtime import REPOSITORY, UserError, parse, pick_device, run_main

EXAMPLE_SIZE = 256


@dataclass(frozen=True)
class AppConfig:
    """Which network the page uses, and where it is served."""

    run: Path | None = None
    """Run folder; default: the newest."""
    data: DataName | None = None
    """Networks trained on this set; default: the run's last."""
    variant: str | None = None
    """Which refinement network; default: the most complete one."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Within(1, 65535)] = 7860
    """Port to serve at."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def to_array(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return image.mul(255).round().byte().permute(1, 2, 0).numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """(H, W, 3 or 4) uint8 -> (3, H, W) in [0, 1], on white, as in `shared.io.read_photo`."""
    values = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 255
    alpha = values[3:] if len(values) == 4 else 1.0
    return values[:3] * alpha + (1 - alpha)


def brushed(layers: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """The editor's layers (H, W, 4) uint8 -> mask (1, H, W): 1 where anything was painted."""
    mask = torch.zeros(1, *size)
    for layer in layers:
        mask = torch.maximum(mask, (torch.from_numpy(layer[..., 3].copy()) > 0).float()[None])
    return mask


def build_page(model: Model):
    """The page as gradio Blocks. UserError when gradio is not installed."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError(
            f"the page needs gradio: install {REPOSITORY / 'requirements.txt'}, then "
            f"{Path(__file__).with_name('requirements-app.txt')}, with python -m pip install -r in an "
            "environment of its own (gradio asks for an older Pillow than this project)"
        ) from None

    def example(number: int) -> np.ndarray:
        drawn = faces.draw(faces.sample(1, seed=7, start=int(number)), EXAMPLE_SIZE)
        return to_array(drawn.image[0])

    def run(editor: dict, crop: Crop, blend: bool) -> tuple:
        if editor is None or editor["background"] is None:
            raise gr.Error("load a picture first")
        image = to_tensor(editor["background"])
        mask = brushed(editor["layers"], tuple(image.shape[-2:]))
        try:
            done = complete(model, image, mask, crop, blend)
        except UserError as error:
            raise gr.Error(str(error)) from None
        note = f"{100 * done.hole_ratio:.1f} % of the picture completed by {model.name}."
        message = "\n\n".join([note, *(f"**Warning:** {warning}" for warning in done.warnings)])
        pictures = (done.image, done.coarse, painted_parsing(done))
        return *(to_array(picture) for picture in pictures), message, done

    def look(done: Completed | None, event: gr.SelectData) -> tuple:
        if done is None:
            raise gr.Error("complete a picture first")
        try:
            weights, slots = attention_of(model, done, tuple(event.index))
        except UserError as error:
            raise gr.Error(str(error)) from None
        kept, inside = (None, None) if weights is None else (to_array(heat(done, each)) for each in weights)
        return kept, inside, slots

    with gr.Blocks(title="MDRNets: face inpainting") as page:
        gr.Markdown(
            "# Face inpainting with disentangled memory\nPaint over what is to be replaced, then complete."
        )
        state = gr.State()
        with gr.Row():
            with gr.Column():
                editor = gr.ImageEditor(
                    type="numpy",
                    image_mode="RGBA",
                    label="picture",
                    elem_id="editor",
                    brush=gr.Brush(colors=["#ff2080"], color_mode="fixed", default_size=28),
                )
                with gr.Row():
                    number = gr.Number(0, label="example number", precision=0, minimum=0)
                    load = gr.Button("Load example", elem_id="example")
                crop = gr.Radio(["picture", "hole"], value="picture", label="the network sees the whole ...")
                blend = gr.Checkbox(True, label="no seam")
                go = gr.Button("Complete", variant="primary", elem_id="complete")
            with gr.Column():
                completed = gr.Image(label="completed: click it", elem_id="completed", interactive=False)
                message = gr.Markdown(elem_id="message")
                with gr.Row():
                    coarse = gr.Image(label="coarse", interactive=False)
                    parsing = gr.Image(label="parsing", elem_id="parsing", interactive=False)
                with gr.Row():
                    kept = gr.Image(label="attention to kept cells", elem_id="kept", interactive=False)
                    inside = gr.Image(label="attention inside the hole", interactive=False)
                slots = gr.JSON(label="memory slots read", elem_id="slots")
        load.click(example, number, editor)
        go.click(run, [editor, crop, blend], [completed, coarse, parsing, message, state])
        completed.select(look, state, [kept, inside, slots])
    return page


def main(config: AppConfig) -> None:
    """Serve the page until interrupted."""
    model = load_model(config.run, config.data, config.variant, None, pick_device(config.device))
    page = build_page(model)
    try:
        page.launch(server_name=config.host, server_port=config.port, share=False)
    except OSError as error:  # gradio's own, of an address that is in use or none of this machine's
        raise UserError(
            f"--host {config.host} --port {config.port}: cannot serve there ({error}); give another"
        ) from None


if __name__ == "__main__":
    run_main(lambda: main(parse(AppConfig, __doc__)))
