"""Everything that turns a caption into a face, as one folder: CLIP, its tokenizer, generator, streams.

train.py writes `model/` into its run folder; predict.py, the page and the export read that and nothing else.
Networks that came from files of the user's are named by their path instead of being copied.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyface.clip import (
    BPETokenizer,
    ClipInput,
    Tokenizer,
    build_clip,
    image_features,
    text_features,
    text_token_features,
    tokenizer_from,
    tokenizer_settings,
)
from anyface.model import FlatMapper, Memory, Stream
from anyface.stylegan2 import Generator
from anyface.weights import load_clip, load_generator, load_memory, load_release
from shared.io import find_run, load_safetensors, save_safetensors
from shared.records import read_json, write_json, write_tensors
from shared.runtime import UserError
from shared.weights import load_torch


@dataclass
class Model:
    """The networks of one AnyFace.

    text: the text stream; image: the image stream, if it was trained; mean: the mean face code (1, L, D); m:
    layers whose codes come from noise; psi: truncation of those. wide: a generator of a larger side that has
    `generator`'s layers, for pictures. memory: AnyFace++ alone, whose `text` is the flat mapper. words: the
    text stream reads all tokens. files: where parts came from, by name, when they are not to be copied.
    """

    clip: nn.Module
    tokenizer: Tokenizer
    generator: Generator
    text: Stream | FlatMapper
    mean: Tensor
    image: Stream | None = None
    wide: Generator | None = None
    memory: Memory | None = None
    m: int = 4
    psi: float = 1.0
    clip_input: ClipInput = "correct"
    words: bool = False
    name: str = "AnyFace"
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def painter(self) -> Generator:
        """The generator that makes pictures."""
        return self.wide or self.generator

    @torch.no_grad()
    def features(self, captions: list[str]) -> Tensor:
        """Captions -> CLIP features (N, E)."""
        return text_features(self.clip, self.tokenizer(captions).to(self.device))

    @torch.no_grad()
    def codes(self, captions: list[str]) -> Tensor:
        """One code (N, L, D) for each caption."""
        if self.words:
            tokens = self.tokenizer(captions).to(self.device)
            return self.text(*text_token_features(self.clip, tokens))[0]
        return self.codes_of(self.features(captions))

    @torch.no_grad()
    def codes_of(self, features: Tensor) -> Tensor:
        """CLIP features (N, E) -> codes (N, L, D). AnyFace++ completes them from its memory first; a stream
        that attends across its batch gets one at a time, as in the released inference."""
        if self.memory is not None:
            return self.text(self.memory(features))
        if self.text.batch_as_sequence:
            return torch.cat([self.text(one)[0] for one in features.split(1)])
        return self.text(features)[0]

    def paint(self, codes: Tensor) -> Tensor:
        """Codes (N, L, D) -> pictures (N, 3, S, S), about [-1, 1]; S is the painter's side."""
        missing = self.painter.n_latent - codes.shape[1]
        if missing:
            codes = torch.cat((codes, codes[:, -1:].expand(-1, missing, -1)), 1)
        return self.painter.synthesis(codes)

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) in [-1, 1] -> CLIP features (N, E)."""
        return image_features(self.clip, pictures, self.clip_input)


def save_model(folder: Path, model: Model) -> None:
    """Write model.json and one safetensors file for each network that `files` does not name."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"text": model.text, "image": model.image, "generator": model.generator, "wide": model.wide}
    parts["clip"] = model.clip
    record: dict[str, Any] = {
        name: {"sizes": part.sizes, "file": str(model.files[name]) if name in model.files else None}
        for name, part in parts.items()
        if part is not None
    }
    for name in ("m", "psi", "clip_input", "words", "name"):
        record[name] = getattr(model, name)
    record["tokenizer"] = tokenizer_settings(model.tokenizer)
    for name, part in parts.items():
        if part is not None and name not in model.files:
            save_safetensors(folder / f"{name}.safetensors", part)
    write_tensors(folder / "mean.safetensors", {"mean": model.mean})
    # Last, so that a folder with it is whole.
    write_json(folder / "model.json", record)


def load_model(run: Path | None = None, device: torch.device | str = "cpu") -> Model:
    """The model of a run folder, or of a folder that `save_model` wrote; default: the newest run.

    All networks frozen and in eval mode. UserError says what is missing or does not fit.
    """
    folder = run if run is not None and (run / "model.json").is_file() else find_run("anyface", run) / "model"
    if not (folder / "model.json").is_file():
        raise UserError(f"{folder}: no trained model yet; let train.py finish, or give another --run")
    record = read_json(folder / "model.json", "a model", advice="train again or give another --run")

    def part(name: str, build, loader=None):
        entry = record.get(name)
        if entry is None:
            return None
        if entry["file"] is not None:
            return loader(Path(entry["file"]))
        network = build(**entry["sizes"])
        load_safetensors(folder / f"{name}.safetensors", network)
        return network

    def build_generator(**sizes) -> Generator:
        channels = {int(resolution): width for resolution, width in sizes.pop("channels").items()}
        return Generator(**sizes, channels=channels)

    def from_file(path: Path) -> Generator:
        return load_generator(path)[0]

    model = Model(
        clip=part("clip", build_clip, load_clip),
        tokenizer=tokenizer_from(record["tokenizer"]),
        generator=part("generator", build_generator, from_file),
        text=part("text", Stream),
        image=part("image", Stream),
        wide=part("wide", build_generator, from_file),
        mean=load_torch(folder / "mean.safetensors")["mean"].to(device),
        **{name: record[name] for name in ("m", "psi", "clip_input", "words", "name")},
    )
    return _ready(model, device)


def load_plus_plus(
    checkpoint: Path, memory: Path, clip: Path, generator: Path, device="cpu", bf16: bool = False
) -> Model:
    """AnyFace++ from its released files: `iteration_N.pt`, `memory_N.pt`, CLIP ViT-L/14@336px, and `ffhq.pkl`
    or rosinality's generator. bf16: the mapper's weights in bfloat16, half the memory. UserError when their
    widths do not fit each other."""
    network, mean = load_generator(generator)
    mapper, banks, sees = load_release(checkpoint, bf16), load_memory(memory), load_clip(clip)
    width = sees.sizes["embed_dim"]
    if banks.slots.shape[2] != width or banks.slots.shape[0] * width != mapper.mapping[0].weight.shape[1]:
        raise UserError(
            f"{checkpoint}, {memory}, {clip}: their widths do not fit: {mapper.mapping[0].weight.shape[1]} "
            f"inputs, {tuple(banks.slots.shape[::2])} banks and widths, CLIP {width}"
        )
    if mapper.n_latent != network.n_latent:
        raise UserError(
            f"{generator}: a {network.size} px generator takes {network.n_latent} codes; "
            f"{checkpoint} makes {mapper.n_latent}"
        )
    tokenizer = BPETokenizer(sees.context_length)
    model = Model(
        sees, tokenizer, network, mapper, mean.to(device), memory=banks, m=2, psi=0.5, name="AnyFace++"
    )
    return _ready(model, device)


def _ready(model: Model, device: torch.device | str) -> Model:
    for part in (model.clip, model.generator, model.text, model.image, model.wide, model.memory):
        if part is not None:
            part.to(device).eval().requires_grad_(False)
    made, wanted = model.text.n_latent, model.generator.n_latent
    if made != wanted or model.text.style_dim != model.generator.style_dim:
        raise UserError(
            f"the streams make codes of {made} x {model.text.style_dim}, the generator of "
            f"{model.generator.size} px takes {wanted} x {model.generator.style_dim}: give the one that they "
            "were trained with"
        )
    return model
