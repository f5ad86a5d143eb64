"""What a stream that reads all tokens looks at: a weight for each word of a caption."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from anyface.bundle import Model
from anyface.clip import text_token_features
from shared.runtime import UserError


@torch.no_grad()
def word_weights(model: Model, caption: str) -> tuple[list[str], Tensor]:
    """The words of a caption and (layers, words + 2): the end token's attention, start and end included.

    UserError for a model whose stream reads one feature per caption.
    """
    if not model.words:
        raise UserError("this model's text stream reads one feature per caption: no words to look at")
    tokens = model.tokenizer([caption]).to(model.device)
    features, padding = text_token_features(model.clip, tokens)
    weights = model.text.attention(features, padding)[:, 0]
    length = int((~padding).sum())
    words = ["(start)", *model.tokenizer.words(caption)[: length - 2], "(end)"]
    return words, weights[:, :length].cpu()


def picture(words: list[str], weights: Tensor) -> Figure:
    """A matplotlib figure: layers in rows, words in columns."""
    figure = Figure(figsize=(1.5 + 0.5 * len(words), 1.4 + 0.25 * len(weights)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(weights.numpy(), cmap="magma", vmin=0, aspect="auto")
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axes.set_yticks(range(len(weights)), range(1, len(weights) + 1))
    axes.set_ylabel("layer")
    figure.colorbar(shown, ax=axes, label="attention")
    return figure
