"""CLIP (Radford et al., 2021) through open_clip: the network at any size, its tokenizer, its picture input.

`build_clip` makes open_clip's own class with QuickGELU and OpenAI's parameter names; the real ViT-B/32 and
the small networks of the demo differ in sizes alone. A caption becomes int64 tokens (start, words, end,
zeros), and its feature is read at the end token, the largest id of the vocabulary.
"""

import re
from collections import Counter
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

ClipInput = Literal["correct", "official"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(
    embed_dim: int,
    image_resolution: int,
    vision_layers: int,
    vision_width: int,
    vision_patch_size: int,
    context_length: int,
    vocab_size: int,
    transformer_width: int,
    transformer_heads: int,
    transformer_layers: int,
    vision_heads: int | None = None,
) -> CLIP:
    """CLIP with a vision transformer; arguments in OpenAI's order. vision_heads: default width / 64."""
    sizes = dict(locals())
    vision = CLIPVisionCfg(
        layers=vision_layers,
        width=vision_width,
        head_width=vision_width // (vision_heads or vision_width // 64),
        patch_size=vision_patch_size,
        image_size=image_resolution,
    )
    text = CLIPTextCfg(
        context_length=context_length,
        vocab_size=vocab_size,
        width=transformer_width,
        heads=transformer_heads,
        layers=transformer_layers,
    )
    # OpenAI's weights need QuickGELU; open_clip's plain "ViT-B-32" has the exact GELU.
    clip = CLIP(embed_dim, vision, text, quick_gelu=True)
    clip.sizes = sizes
    return clip


def vit_b32() -> CLIP:
    """The CLIP of AnyFace: 151,277,313 parameters, features of 512."""
    return build_clip(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)


def clip_from_state(state: dict[str, Tensor]) -> CLIP:
    """An empty CLIP of the sizes that a state dict in OpenAI's names tells. Raises KeyError on another."""
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    context, width = state["positional_embedding"].shape

    def count(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})

    return build_clip(
        state["text_projection"].shape[1],
        patch * grid,
        count("visual.transformer.resblocks."),
        vision_width,
        patch,
        context,
        state["token_embedding.weight"].shape[0],
        width,
        width // 64,
        count("transformer.resblocks."),
    )


@lru_cache(maxsize=32)
def _area_weights(size: int, target: int, device: torch.device) -> Tensor:
    """(target, size): weight of every source pixel in the mean over each target pixel's area."""
    # A tensor made in inference mode would stay unusable for gradients.
    with torch.inference_mode(False):
        edges = torch.arange(target + 1, dtype=torch.float64) * size / target
        left, right = edges[:-1, None], edges[1:, None]
        pixel = torch.arange(size, dtype=torch.float64)
        overlap = (torch.minimum(right, pixel + 1) - torch.maximum(left, pixel)).clamp_min(0)
        return (overlap * target / size).float().to(device)


@lru_cache(maxsize=8)
def _mean_and_std(device: torch.device) -> Tensor:
    """(2, 3, 1, 1), copied to a device once: every copy makes a GPU's queue wait."""
    with torch.inference_mode(False):
        return torch.tensor((MEAN, STD), device=device).view(2, 3, 1, 1)


def area_resize(image: Tensor, target: int) -> Tensor:
    """(B, C, S, S) -> (B, C, target, target): the mean over each target pixel's area.

    The released trainer's way to CLIP's resolution (enlarge 7 times, then average S / 32 pixels in either
    direction) is this function for target 224; here it is two products with a small matrix.
    """
    if image.shape[-1] == target:
        return image
    weights = _area_weights(image.shape[-1], target, image.device).to(image.dtype)
    return weights @ image @ weights.T


def clip_pixels(image: Tensor, resolution: int, mode: ClipInput = "correct") -> Tensor:
    """RGB (B, 3, S, S) in [-1, 1] -> CLIP's input (B, 3, resolution, resolution).

    correct: to [0, 1], then CLIP's mean and standard deviation. official: the released trainer's, which
    hands [-1, 1] over as it is.
    """
    image = area_resize(image, resolution)
    if mode == "official":
        return image
    mean, std = _mean_and_std(image.device).to(image.dtype)
    return ((image + 1) / 2 - mean) / std


def image_features(clip: CLIP, image: Tensor, mode: ClipInput = "correct") -> Tensor:
    """RGB (B, 3, S, S) in [-1, 1] -> features (B, E), not normalised."""
    return clip.encode_image(clip_pixels(image, clip.visual.image_size[0], mode)).float()


def text_features(clip: CLIP, tokens: Tensor) -> Tensor:
    """Tokens (B, T) -> features of the end token (B, E), not normalised."""
    return clip.encode_text(tokens).float()


def text_token_features(clip: CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) -> features of every token (B, T, E) and which of them are padding (B, T) bool.

    The feature at the end token is `text_features`. For streams that read the caption word by word.
    """
    x = clip.token_embedding(tokens) + clip.positional_embedding
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask)) @ clip.text_projection
    padding = torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(1, keepdim=True)
    return x.float(), padding


# --- tokenizers -----------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """Captions -> tokens: (N, context_length) int64, start, words, end, zeros; too long ones keep the end."""

    context_length: int
    vocab_size: int

    def encode(self, caption: str) -> list[int]: ...

    def words(self, caption: str) -> list[str]: ...

    def __call__(self, captions: list[str]) -> Tensor: ...


def _pack(encoded: list[list[int]], context_length: int, start: int, end: int) -> Tensor:
    tokens = torch.zeros(len(encoded), context_length, dtype=torch.long)
    for row, ids in zip(tokens, encoded, strict=True):
        ids = [start, *ids[: context_length - 2], end]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def too_long(tokenizer: Tokenizer, caption: str) -> int:
    """How many tokens of a caption do not fit the context; 0 when all do."""
    return max(0, len(tokenizer.encode(caption)) + 2 - tokenizer.context_length)


class BPETokenizer:
    """CLIP's byte-pair tokenizer of 49,408 ids (open_clip's, which cleans text with ftfy and regex)."""

    vocab_size = 49408

    def __init__(self, context_length: int = 77):
        self.context_length = context_length

    @cached_property
    def bpe(self) -> open_clip.tokenizer.SimpleTokenizer:
        # Reading 49,000 merges takes a moment, so it waits for the first caption.
        return open_clip.tokenizer.SimpleTokenizer(context_length=self.context_length)

    def encode(self, caption: str) -> list[int]:
        """Ids without start and end."""
        return self.bpe.encode(caption)

    def words(self, caption: str) -> list[str]:
        """The text of each id, for labels."""
        return [self.bpe.decode([i]).strip() for i in self.encode(caption)]

    def __call__(self, captions: list[str]) -> Tensor:
        encoded = [self.encode(caption) for caption in captions]
        return _pack(encoded, self.context_length, self.bpe.sot_token_id, self.bpe.eot_token_id)


class WordTokenizer:
    """Lower-case words of a small vocabulary; ids: 0 padding, 1 unknown, words, start, end (the largest)."""

    def __init__(self, vocabulary: list[str], context_length: int = 28):
        self.vocabulary, self.context_length = list(vocabulary), context_length
        self.ids = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        self.vocab_size = len(self.vocabulary) + 4

    @classmethod
    def from_captions(cls, captions: list[str], context_length: int = 28) -> "WordTokenizer":
        """The words of all captions, the most frequent first."""
        counts = Counter(word for caption in captions for word in cls.split(caption))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered, context_length)

    @staticmethod
    def split(caption: str) -> list[str]:
        """Lower-case words, apostrophes and hyphens inside them kept."""
        return re.findall(r"\w+(?:['’-]\w+)*", caption.lower())

    def encode(self, caption: str) -> list[int]:
        """Ids without start and end; 1 for a word that the vocabulary lacks."""
        return [self.ids.get(word, 1) for word in self.split(caption)]

    def words(self, caption: str) -> list[str]:
        """The words that `encode` gives ids to."""
        return self.split(caption)

    def __call__(self, captions: list[str]) -> Tensor:
        encoded = [self.encode(caption) for caption in captions]
        return _pack(encoded, self.context_length, self.vocab_size - 2, self.vocab_size - 1)


def tokenizer_from(settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer_settings` described."""
    if settings["kind"] == "bpe":
        return BPETokenizer(settings["context_length"])
    return WordTokenizer(settings["vocabulary"], settings["context_length"])


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """What JSON needs to rebuild a tokenizer."""
    kind = "bpe" if isinstance(tokenizer, BPETokenizer) else "words"
    settings = {"kind": kind, "context_length": tokenizer.context_length}
    if isinstance(tokenizer, WordTokenizer):
        settings["vocabulary"] = tokenizer.vocabulary
    return settings
