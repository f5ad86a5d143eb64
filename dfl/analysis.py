"""What a trained federation's representations hold: linear probes, and maps of what each branch looks at."""

import math
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from dfl.client import Method
from dfl.data import Federated, Samples
from dfl.engine import State

DIRECTIONS = 64
"""Backward passes that a map of sensitivity may take."""


def probe_score(features: Tensor, targets: Tensor) -> float:
    """Accuracy in per cent of a multinomial logistic regression (standardised features, C = 0.1).

    Fitted on the first half of features (n, d), targets (n,), scored on the second; NaN if only one class.
    """
    x, y = features.float().cpu().numpy(), targets.cpu().numpy()
    half = len(y) // 2
    if len(np.unique(y[:half])) < 2:
        return math.nan
    from sklearn.linear_model import LogisticRegression  # these take seconds
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return probe.fit(x[:half], y[:half]).score(x[half:], y[half:]) * 100


def probe_samples(data: Federated, limit: int = 2000) -> Samples:
    """What the probes read: the counterfactual set, or all clients' test images mixed and at most `limit`."""
    if data.counterfactual is not None:
        return data.counterfactual
    parts = [client.test for client in data.clients]
    fields = ("images", "labels", "attributes")
    pooled = Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))
    order = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))[:limit]
    return pooled[order]


@torch.inference_mode()
def probes(method: Method, net: nn.Module, states: list[State], data: Federated) -> dict[str, float]:
    """Scores "<representation> label" and "<representation> attribute", mean over clients.

    A representation that all clients share is probed once. data: on the device of net and states.
    """
    samples = probe_samples(data)
    result = {}
    for name, represent in method.representations.items():
        features: list[Tensor] = []
        for state in states:
            z = torch.cat([represent(net, state, data.prepare(x)) for x in samples.images.split(512)])
            features.append(z)
        if all(torch.equal(z, features[0]) for z in features):
            features = features[:1]
        for target, values in (("label", samples.labels), ("attribute", samples.attributes)):
            result[f"{name} {target}"] = sum(probe_score(z, values) for z in features) / len(features)
    return result


def sensitivity(
    represent: Callable[[nn.Module, State, Tensor], Tensor], net: nn.Module, state: State, x: Tensor
) -> Tensor:
    """How much each pixel moves a representation: root of the sum over channels and features of the squared
    derivative of z by the input. x (B, 3, H, W) -> (B, H, W).

    Of more than `DIRECTIONS` features an unbiased estimate of the sum (its root is then nearly so): the mean
    over so many random vectors v of signs of the squared derivative of v.z. A backward pass for each of a
    photo network's 4096 features takes an hour on a CPU.
    """
    x = x.detach().requires_grad_()
    z = represent(net, state, x)
    d = z.shape[1]
    directions = torch.eye(d)
    if d > DIRECTIONS:
        signs = torch.randint(0, 2, (DIRECTIONS, d), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        directions = signs / math.sqrt(DIRECTIONS)
    each = directions.to(z)[:, None].expand(-1, len(z), -1)  # (directions, B, d)
    squares = torch.zeros_like(x)
    # Some at a time: the whole derivative has `directions` times the size of the images.
    for features in each.split(32):
        (slopes,) = torch.autograd.grad(z, x, features, retain_graph=True, is_grads_batched=True)
        squares += slopes.square().sum(0)
    return squares.sum(1).sqrt()


def background_share(maps: Tensor, ink: Tensor) -> float:
    """Share of a map's squared mass (B, H, W) that falls on the background, weighted by 1 - ink (B, H, W)."""
    mass = maps.square()
    return ((mass * (1 - ink)).sum() / mass.sum()).item()


# --- figures ----------------------------------------------------------------------------------------


def to_image(figure: plt.Figure) -> Tensor:
    """A matplotlib figure as (3, H, W) in [0, 1]; closes it."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def curves_figure(curves: dict[str, list[float]], sizes: tuple[float, float] = (8, 4.6)) -> Tensor:
    """In-domain accuracy over rounds, one line per method."""
    figure, axes = plt.subplots(figsize=sizes, dpi=110, layout="constrained")
    axes.set_prop_cycle(color=plt.cm.tab20.colors)  # more lines than the default cycle has colours
    for name, values in curves.items():
        look = {"linewidth": 2.4, "zorder": 3} if name == "dfl" else {"linewidth": 1.2}  # above the others
        axes.plot(range(1, len(values) + 1), values, label=name, **look)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(80, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="round", ylabel="in-domain accuracy [%]", title="Convergence (mean over seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return to_image(figure)


def sweep_figure(sweep: dict[str, dict[float, float]], title: str, setting: str) -> Tensor:
    """Accuracy over the values of a setting, one line per method."""
    figure, axes = plt.subplots(figsize=(5.6, 4), dpi=110, layout="constrained")
    for name, points in sweep.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xlabel=setting, ylabel="accuracy [%]", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_image(figure)


def bars_figure(rows: dict[str, dict[str, float]], title: str) -> Tensor:
    """Grouped bars, one below the other: thirty names can be read so. {group: {bar: value}}."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.36 * len(rows)), dpi=110, layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(rows))]
        axes.barh(places, [row.get(name, math.nan) for row in rows.values()], width, label=name)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set(xlabel="accuracy [%]", title=title, xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return to_image(figure)


def matrix_figure(rows: dict[str, dict[str, float]], title: str) -> Tensor:
    """Numbers on a coloured grid: {row: {column: value}} in per cent."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = np.array([[row.get(name, math.nan) for name in columns] for row in rows.values()])
    size = (1.6 + 1.15 * len(columns), 1.2 + 0.42 * len(rows))
    figure, axes = plt.subplots(figsize=size, dpi=110, layout="constrained")
    axes.imshow(table, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(table):
        text = "" if math.isnan(value) else f"{value:.0f}"
        axes.text(x, y, text, ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_title(title, fontsize=10)
    return to_image(figure)


def heat(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B, 3, H, W): each map scaled to its maximum, in colours."""
    scaled = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()
    return torch.from_numpy(matplotlib.colormaps["inferno"](scaled)[..., :3]).permute(0, 3, 1, 2).float()
