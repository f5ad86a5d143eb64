"""What the streams train on and are measured on: captions, codes and CLIP features of faces.

CLIP, generator and codes are constants of the training, so features are computed once. A text stream whose
losses need no picture then trains without decoding one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anyface.clip import ClipInput, Tokenizer, image_features, text_features, text_token_features
from anyface.datasets import Part, choose_captions, open_set, read_codes
from anyface.model import Stream
from anyface.stylegan2 import Generator
from anyface.world import World, make_world
from shared.io import progress
from shared.runtime import UserError, step_generator

if TYPE_CHECKING:
    from anyface.train import Config

DataName = Literal["world", "auto", "mm-celeba-hq", "celebatext-hq", "anyface", "face-list"]

COARSE = 4
"""Layers of the small generator that coarse traits steer; noise is injected into as many."""

TEST_SEED = 1_000_003
"""Distance of a test world's seed from its training world's."""


@dataclass(frozen=True)
class Faces:
    """One part of a data set.

    captions: those of each face; unseen: captions in wordings the streams never train on (world only);
    codes (N, L, D); values (N, 7): true traits (world only); picture: (faces' numbers, size) -> the true
    pictures (B, 3, size, size) in [-1, 1].
    """

    title: str
    names: list[str]
    captions: list[list[str]]
    codes: Tensor
    picture: Callable[[Tensor, int], Tensor]
    unseen: list[list[str]] | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def world_codes(generator: Generator, world: World) -> Tensor:
    """Exact codes (N, L, D) of drawn faces: coarse layers from `z_coarse`, the others from `z_fine`."""
    device = generator.input.input.device
    coarse, fine = generator.mapping(world.z_coarse.to(device)), generator.mapping(world.z_fine.to(device))
    return mixed(coarse, fine, generator.n_latent).cpu()


def mixed(coarse: Tensor, fine: Tensor, layers: int) -> Tensor:
    """Latents (B, D) for the coarse and the fine layers -> code (B, layers, D)."""
    code = torch.cat(
        (coarse[:, None].expand(-1, COARSE, -1), fine[:, None].expand(-1, layers - COARSE, -1)), 1
    )
    return code.contiguous()


def open_faces(config: "Config", part: Part, generator: Generator) -> Faces:
    """The training or test part of the configured data. UserError when files or codes do not fit."""
    if config.data == "world":
        count = config.train_faces if part == "train" else config.test_faces
        world = make_world(count, config.seed + TEST_SEED * (part == "test"))
        names, codes = [str(i) for i in range(count)], world_codes(generator, world)
        title = f"drawn faces {generator.size}x{generator.size}"
        return Faces(title, names, world.captions, codes, world.pictures, world.unseen, world.values)
    found = open_set(config.data_root, part, config.data)
    if part == "test" and config.test_faces < len(found):
        found = found.first(config.test_faces)
    codes = read_codes(config.codes, found.names, config.data_root)
    if codes.shape[1:] != (generator.n_latent, generator.style_dim):
        raise UserError(
            f"codes of shape {tuple(codes.shape[1:])} do not fit a generator of {generator.size} px, which "
            f"takes {(generator.n_latent, generator.style_dim)}; give the one that the codes were made with"
        )

    def picture(index: Tensor, size: int) -> Tensor:
        return torch.stack([found.picture(i, size) for i in index.tolist()])

    return Faces(found.title, found.names, found.captions, codes, picture)


@dataclass(frozen=True)
class Cache:
    """Everything constant that a training step needs, on the device.

    codes w (N, L, D); image features f_i (N, F) of the reconstructions G(w); text features f_t (N, K, F),
    rows beyond a face's own captions empty; counts (N,) of captions; mean code (1, L, D); tokens (N, K, T),
    only for a text stream that reads words; ids (N,) of `face_ids`, None for row numbers.
    """

    codes: Tensor
    image: Tensor
    text: Tensor
    counts: np.ndarray
    mean: Tensor
    tokens: Tensor | None = None
    ids: np.ndarray | None = None


def face_ids(names: list[str]) -> np.ndarray:
    """The number (N,) that each face is called by, which chooses its caption in the released code; of a name
    that is no number, its place in the list."""
    return np.array([int(name) if name.isdecimal() else i for i, name in enumerate(names)])


def one_caption_each(faces: Faces) -> Faces:
    """Captions reduced to number id mod count, the only one that the released test script uses."""
    ids = face_ids(faces.names).tolist()
    chosen = [[own[i % len(own)]] for i, own in zip(ids, faces.captions, strict=True)]
    return replace(faces, captions=chosen)


@torch.no_grad()
def encode_captions(
    clip: nn.Module, tokenizer: Tokenizer, captions: list[str], device: torch.device, batch: int = 256
) -> Tensor:
    """CLIP features (N, F) of captions, each different caption encoded once."""
    distinct = list(dict.fromkeys(captions))
    starts = range(0, len(distinct), batch)
    features = torch.cat(
        [
            text_features(clip, tokenizer(distinct[i : i + batch]).to(device))
            for i in progress(starts, "captions")
        ]
    )
    row = {caption: i for i, caption in enumerate(distinct)}
    return features[torch.tensor([row[caption] for caption in captions], device=device)]


def at_once(generator: Generator, most: int = 64) -> int:
    """Pictures that a generator may make at once: `most` up to 256 px, so many fewer as theirs are larger."""
    return min(most, max(4, 2**22 // generator.size**2))


@torch.no_grad()
def reconstruction_features(
    faces: Faces,
    clip: nn.Module,
    generator: Generator,
    clip_input: ClipInput,
    device: torch.device,
    batch: int = 64,
) -> Tensor:
    """CLIP features f_i (N, F) of all reconstructions G(w)."""
    batch = at_once(generator, batch)
    starts = progress(range(0, len(faces), batch), "reconstructions")
    made = (generator.synthesis(faces.codes[i : i + batch].to(device)) for i in starts)
    return torch.cat([image_features(clip, pictures, clip_input) for pictures in made])


@torch.no_grad()
def build_cache(
    faces: Faces,
    clip: nn.Module,
    tokenizer: Tokenizer,
    generator: Generator,
    clip_input: ClipInput,
    device: torch.device,
    batch: int = 64,
    words: bool = False,
    images: bool = True,
) -> Cache:
    """Features of all captions and of all reconstructions G(w), as the released trainer takes them at every
    step, here once. words: keep the tokens; images: without them, `image` is empty."""
    counts = np.array([len(own) for own in faces.captions])
    captions = [caption for own in faces.captions for caption in own]
    own = torch.from_numpy(np.arange(counts.max()) < counts[:, None]).to(device)
    flat = encode_captions(clip, tokenizer, captions, device)
    text = flat.new_zeros(len(faces), counts.max(), flat.shape[1])
    text[own] = flat
    tokens = None
    if words:
        encoded = tokenizer(captions).to(device)
        tokens = encoded.new_zeros(len(faces), counts.max(), encoded.shape[1])
        tokens[own] = encoded
    image = text.new_empty(0, text.shape[2])
    if images:
        image = reconstruction_features(faces, clip, generator, clip_input, device, batch)
    codes = faces.codes.to(device)
    return Cache(codes, image, text, counts, codes.mean(0, keepdim=True), tokens, face_ids(faces.names))


def draw_pairs(
    cache: Cache, pairs: list[tuple[int, int]], seed: int, step: int, choice: Literal["sample", "id"]
) -> dict[str, Tensor]:
    """A step's samples: for (face, draw) pairs the code, both features and a mismatched caption's.

    w (B, L, D), f_i, f_t, f_other (B, F), face, other (B,), and where the cache has them tokens,
    tokens_other (B, T). The mismatched caption is one of another face, never of the same. A pure function of
    its arguments.
    """
    faces, draws = (np.array(column) for column in zip(*pairs, strict=True))
    n = len(cache.codes)
    if n < 2:
        raise UserError("a mismatched caption needs at least two faces")
    rng = step_generator(seed, step, stream=11)
    jump = torch.randint(1, n, (len(faces),), generator=rng).numpy()
    other = (faces + jump) % n
    own_caption = choose_captions(cache.counts, faces, draws, seed, choice, cache.ids)
    other_caption = choose_captions(cache.counts, other, draws, seed + 1, choice, cache.ids)
    # One copy to the device that the loop does not wait for.
    drawn = torch.from_numpy(np.stack((faces, own_caption, other, other_caption)))
    face, own, other, others = drawn.to(cache.codes.device, non_blocking=True)
    batch = {
        "w": cache.codes[face],
        "f_i": cache.image[face],
        "f_t": cache.text[face, own],
        "f_other": cache.text[other, others],
        "face": face,
        "other": other,
    }
    if cache.tokens is not None:
        batch["tokens"] = cache.tokens[face, own]
        batch["tokens_other"] = cache.tokens[other, others]
    return batch


def read_text(
    text: Stream, clip: nn.Module, features: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and hidden features of captions: from their CLIP features (B, F), or from those of all tokens
    (B, T), which are computed here because for a whole set they are too many to keep."""
    if tokens is None:
        return text(features)
    with torch.no_grad():
        words = text_token_features(clip, tokens)
    return text(*words)


def cut(batch: dict[str, Tensor], rank: int, processes: int) -> dict[str, Tensor]:
    """A process's share of a batch that every process drew whole."""
    return {name: rows.chunk(processes)[rank] for name, rows in batch.items()}
