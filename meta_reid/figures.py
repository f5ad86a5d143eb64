"""Pictures of an evaluation: ranking lists, weights per domain, a map of the embeddings."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.data import Dataset

from meta_reid.data import Labels, Target, Tensors
from meta_reid.model import META
from meta_reid.protocols import rows_at
from shared.io import image_grid

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend must be chosen first

GREEN, RED, BLUE = (0.1, 0.7, 0.2), (0.85, 0.1, 0.1), (0.2, 0.3, 0.8)
PLOTTED = 150
"""Embeddings of a domain in a plot."""
PEOPLE = 10
"""People in a plot of one target."""


def framed(image: Tensor, colour: tuple[float, float, float], width: int = 2) -> Tensor:
    """(3, H, W) in [0, 1] -> the image inside a coloured frame."""
    framed = pad(image, (width,) * 4)
    mask = pad(torch.zeros(image.shape[-2:]), (width,) * 4, value=1.0)
    return framed + mask * torch.tensor(colour)[:, None, None]


def ranking_lists(
    features: Tensor,
    target: Target,
    queries: Tensor,
    gallery: Tensor,
    top: int = 10,
    row_labels: list[str] | None = None,
) -> Tensor:
    """One row per query: the query in blue, then its nearest gallery images, right ones in green.

    features: embeddings of all the target's images; queries, gallery: their indices. Items of the query's
    identity and camera are left out, as in the metrics.
    """
    scale = 2 if target.images[0][0].shape[-1] < 64 else 1
    known = rows_at(features, gallery)
    similarity = normalize(features[queries]) @ known.T / known.norm(dim=1).clamp_min(1e-12)
    same = target.identities[queries, None] == target.identities[gallery]
    own = same & (target.cameras[queries, None] == target.cameras[gallery])
    order = similarity.masked_fill(own, -2).argsort(dim=1, descending=True, stable=True)[:, :top]
    tiles = []
    for row, query in enumerate(queries.tolist()):
        tiles.append(framed(target.images[query][0] / 255, BLUE))
        for column in order[row].tolist():
            shown = framed(target.images[int(gallery[column])][0] / 255, GREEN if same[row, column] else RED)
            # A short gallery leaves the last places of a row empty.
            tiles.append(torch.ones_like(shown) if own[row, column] else shown)
    return image_grid(tiles, columns=order.shape[1] + 1, row_labels=row_labels, scale=scale)


@torch.no_grad()
def training_sheet(
    model: nn.Module, images: Dataset, labels: Labels, device: torch.device, people: int = 4, views: int = 4
) -> Tensor:
    """What a network in training makes of some of its own images, without augmentation: ranking lists of two
    persons of each source, for META with the experts' weights of the query.

    people, views: how many persons of each source and images of each are ranked. The network is evaluated and
    left in training as it was.
    """
    union, chosen, queries = labels.union.cpu(), [], []
    for domain in range(len(labels.names)):
        for number, person in enumerate(union[labels.domain == domain].unique()[:people].tolist()):
            if number < 2:
                queries.append(len(chosen))
            chosen += (union == person).nonzero().squeeze(1)[:views].tolist()
    pixels = torch.stack([images[index][0] for index in chosen])
    everyone = torch.arange(len(chosen))
    target = Target("sources", Tensors(pixels), union[chosen], everyone, [])
    model.eval()
    names = [labels.names[int(labels.domain[chosen[query]])] for query in queries]
    on_device = pixels.to(device, memory_format=torch.channels_last).float()
    if isinstance(model, META):
        described = model.describe(on_device)
        features, weights = model.joined(described), model.expert_weights(described).tolist()
        for row, query in enumerate(queries):
            shares = zip(labels.names, weights[query], strict=True)
            names[row] += ": " + " ".join(f"{name} {share:.2f}" for name, share in shares)
    else:
        features = model.embed(on_device)
    model.train()
    others = torch.tensor([index for index in everyone.tolist() if index not in queries])
    return ranking_lists(features.cpu(), target, torch.tensor(queries), others, row_labels=names)


def weight_bars(weights: dict[str, Tensor], experts: list[str], path: Path) -> None:
    """Mean weight of each expert on the images of each domain, domain name -> (K,), as bars."""
    wide = max(1.5 + 1.2 * len(weights), 1 + 1.5 * len(experts))  # bars; the legend's names
    figure, axes = plt.subplots(figsize=(wide, 3), layout="constrained")
    width = 0.8 / len(experts)
    for k, name in enumerate(experts):
        places = [i + (k - (len(experts) - 1) / 2) * width for i in range(len(weights))]
        axes.bar(places, [float(w[k]) for w in weights.values()], width, label=f"expert {name}")
    axes.set_xticks(range(len(weights)), [f"images of {name}" for name in weights])
    axes.set_ylabel("mean weight")
    axes.set_ylim(0, 1.15)
    axes.legend(loc="upper center", ncols=len(experts), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def to_plot(embeddings: Tensor, target: Target, alone: bool) -> dict[str, Tensor]:
    """What `embedding_plot` shows of a target's embeddings, (N, D): its first images beside those of other
    sites or, where it is alone, the `PEOPLE` people with most images."""
    if not alone:
        return {target.name: embeddings[:PLOTTED].clone()}
    # Distractors are no query's identity.
    queried = torch.isin(target.identities, target.identities[target.splits[0][0]])
    found, counts = target.identities[queried].unique(return_counts=True)
    most = found[counts.argsort(descending=True, stable=True)[:PEOPLE]].tolist()
    return {str(person): embeddings[target.identities == person] for person in most}


def embedding_plot(features: dict[str, Tensor], path: Path, of: str = "site") -> None:
    """t-SNE of embeddings, (N, D), by the name of their site or of `of`; at most `PLOTTED` of each."""
    from sklearn.manifold import TSNE  # takes seconds, and training needs this module too

    parts = {name: normalize(feature[:PLOTTED]) for name, feature in features.items()}
    joined = torch.cat(list(parts.values())).numpy()
    perplexity = min(30, max(1, (len(joined) - 1) // 3))
    points = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=300).fit_transform(joined)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    start = 0
    for name, part in parts.items():
        chosen = points[start : start + len(part)]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=8, label=name)
        start += len(part)
    axes.legend(title=of)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.savefig(path, dpi=120)
    plt.close(figure)
