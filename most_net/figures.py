"""The pictures that `eval.py` leaves in a run's samples folder."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from most_net.claims import Scores, by_variant
from most_net.data import Pairs
from most_net.mechanism import atlas, padded, slot_map
from shared.io import image_grid, write_image

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first

DRAWN_BY = "sketches drawn by trained networks"
"""What the metadata of sheets with synthetic sketches say."""


def comparison(test: Pairs, methods: dict[str, Tensor], shown: int = 8) -> Tensor:
    """Photo, every method's sketch and the drawn one: (3, H, W), a column per face."""
    rows = {"photo": test.photos.cpu() / 255, **methods, "drawn": test.sketches.cpu() / 255}
    tiles = [tile.expand(3, -1, -1) for images in rows.values() for tile in images[:shown]]
    scale = max(1, 96 // test.photos.shape[-1])
    return image_grid(tiles, min(shown, len(test)), list(rows), scale=scale)


@torch.inference_mode()
def slots(net: nn.Module, test: Pairs, size: int, shown: int = 8) -> Tensor:
    """Photo, false colours of the slots, sketch: (3, H, W)."""
    chosen = test.select(list(range(min(shown, len(test)))))
    photos, _ = padded(chosen, size, net.fuse.weight.device, 2**net.arch.downs)
    rows = [photos / 2 + 0.5, slot_map(net, photos), net.sketch(photos) / 2 + 0.5]
    tiles = [tile.expand(3, -1, -1).clamp(0, 1) for row in rows for tile in row]
    return image_grid(tiles, len(photos), ["photo", "slots", "sketch"], scale=max(1, 96 // photos.shape[-1]))


def curve(table: dict[tuple[str, int], list[float]], path: Path) -> None:
    """SSIM, as `by_variant` gives it, against the number of training pairs: a line per variant, a point per
    seed."""
    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for number, variant in enumerate(("none", "memory", "most")):
        counts = sorted(pairs for name, pairs in table if name == variant)
        if not counts:
            continue
        means = [sum(table[variant, n]) / len(table[variant, n]) for n in counts]
        axes.plot(counts, means, marker="o", color=f"C{number}", label=variant)
        for n in counts:
            axes.plot([n] * len(table[variant, n]), table[variant, n], ".", color=f"C{number}", alpha=0.5)
    axes.set(xscale="log", xlabel="training pairs", ylabel="SSIM", title="limited data")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def save_figures(
    folder: Path,
    nets: dict[str, tuple[nn.Module, int]],
    test: Pairs,
    methods: dict[str, Tensor],
    scores: Scores,
    everything: int | None,
) -> None:
    """comparison.png of `methods`; slots.png and atlas.png of the last network with a memory; curve.png.

    everything: number of training pairs of the networks that had all of them.
    """
    write_image(folder / "comparison.png", comparison(test, methods), DRAWN_BY)
    remembering = [(net, size) for net, size in nets.values() if hasattr(net, "memories")]
    if remembering:
        net, size = remembering[-1]
        write_image(folder / "slots.png", slots(net, test, size), DRAWN_BY)
        write_image(folder / "atlas.png", atlas(net, test, size), DRAWN_BY)
    table = by_variant(scores, "SSIM", everything)
    if len({pairs for _, pairs in table}) > 1:
        curve(table, folder / "curve.png")
