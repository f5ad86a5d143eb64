"""Faces from any sentences, one face from several, or an edited face, with a trained run or released weights.

    python predict.py "a young woman with red hair" "a man with glasses" --count 6
    python predict.py "someone with a hat" "red hair" --together
    python predict.py "a person with blond hair" --edit photo.png --degree 4

Writes each face as a picture, a grid (or the editing strip, or the strip of captions added one by one),
index.html, the codes and result.json. Every picture says in its metadata that it is synthetic.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from anyface import use
from anyface.align import align_face
from anyface.attention import picture, word_weights
from anyface.bundle import Model, load_model, load_plus_plus
from anyface.gallery import grid, labelled_row, write_page
from anyface.weights import load_e4e, load_generator
from shared.io import SYNTHETIC_SOURCE, keep_inputs, read_image, read_utf8, write_image
from shared.ranges import Count, Natural, Seed, Share, Weight
from shared.records import write_json, write_tensors
from shared.runtime import UserError, parse, pick_device, run_main


@dataclass(frozen=True)
class PredictConfig:
    """Captions, what to do with them, and with which networks."""

    captions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Sentences, any number, in free words; "" is legal."""
    count: Count = 4
    """Faces for each caption."""
    together: bool = False
    """All captions describe one face; also writes how it builds up caption by caption."""
    file: Path | None = None
    """Text file with further captions, one a line."""
    edit: Path | None = None
    """Picture of a face to edit towards the caption; it is first found in the generator."""
    code: Path | None = None
    """Instead of --edit: a stored inversion, .pt or the codes.safetensors of an earlier call."""
    row: Natural = 0
    """Which row of --code."""
    degree: int | None = None
    """Editing: layers of the source that stay, 0 (caption alone) to all (source). Default: a third."""
    alpha: Share = 1.0
    """Editing: how far the other layers go towards the caption, 0 to 1."""
    landmarks: tuple[float, ...] = ()
    """x y of left eye, right eye, nose, left and right mouth corner in the photo: aligns it as FFHQ does."""
    steps: Natural = 300
    """Steps of the inversion by optimisation; 0 with --e4e trusts the encoder alone."""
    e4e: Path | None = None
    """Weights of the e4e encoder for the inversion (e4e_ffhq_encode.pt)."""
    m: Natural | None = None
    """Layers that come from noise; 0 makes one certain face. Default: as trained."""
    psi: Weight | None = None
    """Truncation of the noise, 1 is none. Default: as trained."""
    cutoff: Natural = 8
    """Layers, from the first on, whose noise is truncated."""
    seed: Seed = 0
    """Seed of the noise."""
    run: Path | None = None
    """Run folder; default: the newest."""
    generator: Path | None = None
    """Another generator (.pt or .pkl) of the same size instead of the run's; required for AnyFace++."""
    checkpoint: Path | None = None
    """AnyFace++: iteration_N.pt of the release, with --memory, --clip and --generator."""
    memory: Path | None = None
    """AnyFace++: memory_N.pt of the release."""
    clip: Path | None = None
    """AnyFace++: OpenAI's ViT-L-14-336px.pt."""
    bf16: bool = False
    """AnyFace++: keep the mapper's weights in bfloat16, 2.7 GB instead of 5.5."""
    out: Path = Path("faces")
    """Folder for the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""

    @property
    def editing(self) -> bool:
        """Whether a given face is edited, rather than faces made."""
        return self.edit is not None or self.code is not None


EDITING = ("degree", "alpha", "landmarks", "steps", "e4e", "row")
INVERTING = ("landmarks", "steps", "e4e")
DRAWING = ("count", "m", "psi", "cutoff", "seed")
PLUS_PLUS = ("memory", "clip", "bf16")


def require_used(config: PredictConfig) -> None:
    """UserError when an option is given that would change nothing."""
    idle = [(DRAWING, "with --edit or --code")] if config.editing else [(EDITING, "without --edit or --code")]
    idle += [(INVERTING, "without --edit")] if config.edit is None else [(("row",), "without --code")]
    idle += [(PLUS_PLUS, "without --checkpoint")] if config.checkpoint is None else []
    for names, why in idle:
        for name in names:
            if getattr(config, name) != getattr(PredictConfig, name):
                raise UserError(f"--{name} means nothing {why}")


def open_model(config: PredictConfig) -> Model:
    """The run's model, or AnyFace++ from its files. UserError when some of these are missing."""
    device = pick_device(config.device)
    if config.checkpoint is not None:
        needed = {"--memory": config.memory, "--clip": config.clip, "--generator": config.generator}
        missing = [name for name, path in needed.items() if path is None]
        if missing:
            raise UserError(
                f"AnyFace++ needs --checkpoint with {', '.join(missing)} too; README, 'Weights of others'"
            )
        files = (config.checkpoint, config.memory, config.clip, config.generator)
        return load_plus_plus(*files, device, config.bf16)
    model = load_model(config.run, device)
    if config.generator is not None:
        network, _ = load_generator(config.generator)
        if (network.size, network.style_dim) != (model.generator.size, model.generator.style_dim):
            raise UserError(
                f"{config.generator}: a generator of {network.size} px with codes of {network.style_dim}; "
                f"the streams were trained with {model.generator.size} px and {model.generator.style_dim}"
            )
        model.generator, model.wide = network.to(device), None
    return model


def read_captions(config: PredictConfig) -> list[str]:
    """Captions of the command line and of --file. UserError when there are none or the file is unreadable."""
    captions = list(config.captions)
    if config.file is not None:
        captions += read_utf8(config.file, "captions").splitlines()
    for caption in captions:
        if any(
            "\ud800" <= letter <= "\udfff" for letter in caption
        ):  # bytes of the command line that are no text
            raise UserError(f"the caption {caption!r} is no UTF-8 text")
    if not captions:
        raise UserError("give at least one caption, for instance: a young woman with brown hair")
    return captions


def write_faces(folder: Path, model: Model, pictures: Tensor, captions: list[str]) -> list[str]:
    """One file per face of (N, K, 3, S, S); returns their names."""
    names = []
    for i, row in enumerate(pictures):
        for k, face in enumerate(row):
            names.append(f"face_{i:03d}_{k:03d}.png")
            write_image(folder / names[-1], face, f"{model.name}, caption: {captions[i]}")
    return names


def generate(config: PredictConfig, model: Model, captions: list[str]) -> dict:
    """Faces of each caption, or of all together; writes pictures, sheet and page, returns the record."""
    made_by, sections = model.name, []
    if config.together:
        code = use.combined_code(model, captions)
        titles = [" + ".join(captions)]
    else:
        code, titles = use.caption_codes(model, captions), captions
    pictures, codes = use.draw(model, code, config.count, config.seed, config.m, config.psi, config.cutoff)
    names = write_faces(config.out, model, pictures, titles)
    write_image(config.out / "grid.png", grid(pictures, titles), made_by)
    for title, row in zip(titles, pictures, strict=True):
        labels = [f"draw {k}" for k in range(len(row))]
        remarks = use.notices_of(model, captions if config.together else [title], config.together)
        sections.append((title or "(no words)", remarks, row, labels))
    if config.together:
        steps = [use.combined_code(model, captions[: i + 1]) for i in range(len(captions))]
        built, _ = use.draw(model, torch.cat(steps), 1, config.seed, config.m, config.psi, config.cutoff)
        labels = [("+ " if i else "") + use.shortened(text, 24) for i, text in enumerate(captions)]
        write_image(config.out / "captions.png", labelled_row(built[:, 0], labels), made_by)
        sections.append(("caption by caption", [], built[:, 0], labels))
    write_page(config.out / "index.html", "Faces from captions", made_by, sections)
    write_tensors(config.out / "codes.safetensors", {"codes": codes.flatten(0, 1)})
    if model.words:
        said = {
            "DigitalSourceType": SYNTHETIC_SOURCE,
            "Description": f"synthetic image: {made_by}, attention",
        }
        for i, text in enumerate([use.joined(captions)] if config.together else captions):
            picture(*word_weights(model, text)).savefig(config.out / f"attention_{i:03d}.png", metadata=said)
    scored = [title for title in titles for _ in range(config.count)]
    scores = use.clip_scores(model, pictures.flatten(0, 1), scored)
    faces = [
        {"file": n, "caption": c, "clip_score": s} for n, c, s in zip(names, scored, scores, strict=True)
    ]
    return {"together": config.together, "seed": config.seed, "faces": faces}


def find_source(config: PredictConfig, model: Model) -> tuple[Tensor, dict, list[str]]:
    """The code (1, L, D) of the face to edit, what is known of it, and warnings."""
    if config.code is not None:
        return use.read_code(model, config.code, config.row), {"code": str(config.code)}, []
    image = read_image(config.edit)
    if config.landmarks:
        if len(config.landmarks) != 10:
            raise UserError(f"--landmarks takes ten numbers, x y of five points, not {len(config.landmarks)}")
        image = align_face(image, torch.tensor(config.landmarks).view(5, 2), model.generator.size)
    encoder = load_e4e(config.e4e) if config.e4e is not None else None
    found = use.invert(model, image, config.steps, encoder)
    write_image(config.out / "inverted.png", found.picture, f"{model.name}, inversion of {config.edit.name}")
    record = {"picture": str(config.edit), "explained_variance": found.explained, "distance": found.distance}
    return found.code, record, found.warnings


def manipulate(config: PredictConfig, model: Model, captions: list[str]) -> dict:
    """Edit one face towards the captions together; writes strip, face and page, returns the record.
    UserError when that would overwrite the codes or the picture it begins with."""
    codes = config.out / "codes.safetensors"
    results = [codes, *(config.out / f"{name}.png" for name in ("inverted", "source", "edited", "strip"))]
    keep_inputs([path for path in (config.code, config.edit) if path is not None], results)
    degree = max(1, model.generator.n_latent // 3) if config.degree is None else config.degree
    use.check_edit(model, degree, config.alpha)  # before minutes of inversion
    source, record, warnings = find_source(config, model)
    wanted = use.combined_code(model, captions)
    code = use.edited(model, source, wanted, degree, config.alpha)
    title = " + ".join(captions)
    made = use.paint(model, torch.cat((source, code)))
    write_image(config.out / "source.png", made[0], f"{model.name}, reconstruction of the source")
    write_image(config.out / "edited.png", made[1], f"{model.name}, edited towards: {title}")
    pictures, degrees = use.strip(model, source, wanted, config.alpha)
    labels = [str(degree) for degree in degrees]
    write_image(config.out / "strip.png", labelled_row(pictures, labels), f"{model.name}, editing strip")
    sections = [
        (f"towards: {title}", warnings, made, ["source", f"degree {degree}"]),
        ("all degrees: the larger, the more of the source stays", [], pictures, labels),
    ]
    write_page(config.out / "index.html", "An edited face", model.name, sections)
    write_tensors(codes, {"codes": torch.cat((source, code))})
    scores = use.clip_scores(model, made, [title, title])
    record |= {"degree": degree, "alpha": config.alpha, "warnings": warnings}
    return record | {"clip_score_source": scores[0], "clip_score_edited": scores[1]}


def main(config: PredictConfig) -> Path:
    """Generate or edit; returns the folder with the results."""
    if config.edit is not None and config.code is not None:
        raise UserError("give either --edit PICTURE or --code FILE")
    require_used(config)
    captions = read_captions(config)
    model = open_model(config)
    config.out.mkdir(parents=True, exist_ok=True)
    remarks = use.notices_of(model, captions, config.together or config.editing)
    record = (manipulate if config.editing else generate)(config, model, captions)
    for remark in [*remarks, *record.get("warnings", [])]:
        print(f"warning: {remark}")
    write_json(
        config.out / "result.json", {"model": model.name, "captions": captions, "notices": remarks} | record
    )
    return config.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(PredictConfig, __doc__))))
