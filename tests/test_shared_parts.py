"""shared/: networks and pieces of training loops that several papers have."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
import tyro
from accelerate import Accelerator
from torch import nn

from shared import runtime
from shared.io import load_safetensors, save_safetensors
from shared.irse import IRSE, Trunk
from shared.loop import Position, average_gradients, follow
from shared.norms import InstanceNorm, PlainInstanceNorm, with_plain_norms
from shared.onnxfile import open_onnx, require_close, run_onnx, write_onnx
from shared.ranges import Count, Natural, Positive, Share, Weight
from shared.records import replacing
from shared.runtime import RunConfig, UserError, parse, parse_presets, run_main

SMALL = ((8, 1), (8, 2), (16, 1), (16, 1))


# --- irse -----------------------------------------------------------------------------------------


def test_levels_are_the_maps_after_each_group():
    torch.manual_seed(0)
    net = IRSE(32, SMALL, 12).eval()
    x = torch.randn(2, 3, 32, 32)
    levels = net.levels(x)
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 16, 16),
        (2, 8, 8, 8),
        (2, 16, 4, 4),
        (2, 16, 2, 2),
    ]
    assert torch.equal(levels[-1], net.forward_features(x))
    assert torch.equal(levels[1], net.body[:3](net.input_layer(x)))
    embedding = net(x)
    assert embedding.shape == (2, 12) and torch.equal(embedding, net.forward_head(levels[-1]))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("se", [True, False])
def test_variants_of_the_unit(se):
    """By hand: the first unit has stride 2 at equal channels, the second keeps the side."""
    for variant in ("insightface_pytorch", "pin"):
        torch.manual_seed(0)
        unit, second = Trunk(((8, 2),), se, variant).eval().body
        x = torch.randn(2, 8, 6, 6)
        y = unit.res_layer[0](x)
        for layer in unit.res_layer[1:]:
            y = layer(y)
        shortcut = unit.shortcut_layer[0](x) if variant == "pin" else x[..., ::2, ::2]
        scale = (1 + unit.shortcut_layer[1].eps) ** -0.5 if variant == "pin" else 1
        torch.testing.assert_close(unit(x), y + shortcut * scale)
        torch.testing.assert_close(second(x), second.res_layer(x) + x)
        assert len(unit.res_layer) == 5 + se + (variant == "pin")
        assert hasattr(unit.res_layer[-1], "fc1") == se


# --- loop -----------------------------------------------------------------------------------------


def test_position_goes_through_a_checkpoint_and_means_start_anew():
    accelerator = Accelerator(cpu=True)
    position = Position()
    position.stage, position.step = 2, 7
    for value in (1.0, 3.0):
        position.add({"a": torch.tensor(value, requires_grad=True), "b": torch.tensor(-value)})
    again = Position()
    again.load_state_dict(position.state_dict())
    assert (again.stage, again.step) == (2, 7)
    assert again.means(accelerator, "here") == {"here/a": 2.0, "here/b": -2.0}
    again.add({"c": torch.tensor(5.0)})
    assert again.means(accelerator, "there") == {"there/c": 5.0}
    again.optimisers = [{"state": {}}]
    again.next_stage()
    assert (again.stage, again.step, again.optimisers) == (3, 0, [])


def test_average_follows_weights_and_copies_buffers():
    new = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    old = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    new[1].running_mean.fill_(4)
    new[1].num_batches_tracked.fill_(5)
    wanted = 0.9 * old[0].weight + 0.1 * new[0].weight.detach()
    follow(old, new, 0.9)
    torch.testing.assert_close(old[0].weight, wanted)
    assert torch.equal(old[1].running_mean, new[1].running_mean) and old[1].num_batches_tracked == 5


def test_gradients_of_two_processes(monkeypatch):
    """The other process has twice the gradients, and some where this one has none; frozen ones are left."""
    layers = [nn.Linear(2, 2) for _ in range(3)]
    layers[2].requires_grad_(False)
    learning = [p for layer in layers for p in layer.parameters()]
    layers[0](torch.ones(1, 2)).sum().backward()
    own = [p.grad.clone() for p in layers[0].parameters()]
    average_gradients(learning, 1)
    assert all(torch.equal(p.grad, g) for p, g in zip(layers[0].parameters(), own, strict=True))

    def reduce(flat: torch.Tensor) -> None:
        assert len(flat) == 12
        flat += torch.cat((2 * flat[:6], torch.full((6,), 8.0)))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    average_gradients(learning, 2)
    for p, g in zip(layers[0].parameters(), own, strict=True):
        torch.testing.assert_close(p.grad, 1.5 * g)
    assert all(bool((p.grad == 4).all()) for p in layers[1].parameters())
    assert all(p.grad is None for p in layers[2].parameters())


# --- processes and precision ------------------------------------------------------------------------


def test_one_of_several_processes_prints(monkeypatch, capsys):
    for number in (0, 1, 2):
        monkeypatch.setattr(runtime, "rank", lambda number=number: number)
        monkeypatch.setattr("sys.argv", ["train.py", "--seed", str(7 + number)])
        runtime.run_training(lambda config: f"folder of {config.seed}", {"demo": runtime.RunConfig()}, "")
    assert capsys.readouterr().out == "folder of 7\n"


def test_types_are_kept_whatever_autocast_says():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with runtime.own_type(x):
            assert (x @ x).dtype == torch.float32
    with runtime.own_type(x.to("meta")):  # where costs are counted
        assert (x.to("meta") @ x.to("meta")).dtype == torch.float32


# --- files of networks ----------------------------------------------------------------------------


class Product(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


def test_onnx_files_run_at_the_free_lengths_only(tmp_path):
    example = (torch.rand(2, 3), torch.rand(2, 3))
    path = tmp_path / "new" / "product.onnx"
    with replacing(path) as file:
        write_onnx(Product(), example, file, ["a", "b"], ["product"], free={0: "batch"})
    assert list(path.parent.iterdir()) == [path]
    a, b = torch.rand(5, 3), torch.rand(5, 3)
    (found,) = run_onnx(path, a=a, b=b)
    torch.testing.assert_close(found, a * b)
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(path, a=torch.rand(5, 4), b=torch.rand(5, 4))


def test_onnx_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="gone.onnx: no such file"):
        open_onnx(tmp_path / "gone.onnx")
    (tmp_path / "odd.onnx").write_bytes(b"odd")
    with pytest.raises(UserError, match="odd.onnx: damaged or not an ONNX network"):
        open_onnx(tmp_path / "odd.onnx")


@pytest.mark.parametrize("difference", [1e-2, float("nan")])
def test_an_export_that_differs_is_not_kept(tmp_path, difference):
    path = tmp_path / "n.onnx"
    with replacing(path) as file:
        file.write_text("good")
        require_close(path, 1e-4, 1e-3)
    with pytest.raises(UserError, match="n.onnx: would differ.*not kept"), replacing(path) as file:
        file.write_text("bad")
        require_close(path, difference, 1e-3)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["good"]


def test_weights_of_a_module_come_back_and_leave_no_other_file(tmp_path):
    """Tied weights and another memory format too."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    net[1].weight = net[0].weight
    path = tmp_path / "trained" / "net.safetensors"
    for _ in range(2):
        save_safetensors(path, net)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    load_safetensors(path, again)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["net.safetensors"]


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("side", [6, 40])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_and_its_gradient_are_the_textbooks_in_either_order(count, side, order):
    """PyTorch's own gives a wrong gradient for one picture, on a CPU, where the gradient is channels-last."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(count, 8, side, side, dtype=torch.float64) for _ in range(2))
    variance, mean = torch.var_mean(x.requires_grad_(), (2, 3), correction=0, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt()
    (of_x,) = torch.autograd.grad(expected, x, gradient)
    for arrives in (torch.contiguous_format, torch.channels_last):
        mine = x.detach().clone(memory_format=order).requires_grad_()
        y = InstanceNorm()(mine)
        y.backward(gradient.contiguous(memory_format=arrives))
        assert y.is_contiguous(memory_format=order)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(mine.grad, of_x)
        torch.testing.assert_close(InstanceNorm()(mine.detach()), expected)


def test_plain_norms_take_the_place_of_ours_and_give_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(InstanceNorm(), nn.ReLU()), InstanceNorm())
    x = torch.randn(2, 3, 8, 8)
    ours = net(x)
    assert with_plain_norms(net) is net
    assert [type(m) for m in net.modules()].count(PlainInstanceNorm) == 2
    assert not any(isinstance(m, InstanceNorm) for m in net.modules())
    torch.testing.assert_close(net(x), ours)


@dataclass(frozen=True)
class Term:
    weight: Weight = 1.0
    """Of the term."""


@dataclass(frozen=True)
class Bare:
    ends: tuple[Share, Share] = (0.0, 1.0)
    """Of two."""


@dataclass(frozen=True)
class Settings(RunConfig):
    """Of every kind of range."""

    lr: Positive = 1.0
    """A rate."""
    sizes: tuple[Count, ...] = (1, 2)
    """Several."""
    pair: tuple[Share, Natural] = (0.5, 0)
    """Of two kinds."""
    limit: Count | None = None
    """Optional."""
    box: tuple[Natural, Count] | None = None
    """Several, optional."""
    shift: float = 0.0
    """Any."""
    term: Term = Term()
    """Nested."""
    window: tuple[Share, Share] | None = None
    """Optional, of two."""
    bare: Annotated[Bare, tyro.conf.arg(name="")] = Bare()
    """Nested, without a prefix."""


@pytest.mark.parametrize(
    "given, message",
    [
        (["--lr", "0"], "--lr 0.0: give a number above 0"),
        (["--lr", "nan"], "--lr nan: give a number above 0"),
        (["--sizes", "1", "0"], "--sizes 0: give 1 or more"),
        (["--pair", "1.5", "0"], "--pair 1.5: give a number from 0 to 1"),
        (["--pair", "1", "-1"], "--pair -1: give 0 or more"),
        (["--limit", "0"], "--limit 0: give 1 or more"),
        (["--box", "0", "0"], "--box 0: give 1 or more"),
        (["--shift", "nan"], "--shift nan: give a number"),
        (["--term.weight", "-1"], "--term.weight -1.0: give 0 or more"),
        (["--window", "0.5", "2"], "--window 2.0: give a number from 0 to 1"),
        (["--ends", "0.5", "2"], "--ends 2.0: give a number from 0 to 1"),
        (["--seed", "-1"], "--seed -1: give a number from 0 to 4294967295"),
        (["--lr", "1e-9", "--sizes", "--pair", "1", "0", "--limit", "1", "--shift", "-inf"], None),
    ],
)
def test_numbers_out_of_their_range_are_refused_by_the_option(given, message):
    for read in (parse, lambda kind, doc, argv: parse_presets({"demo": kind()}, doc, argv)):
        if message is None:
            read(Settings, "A script.", given)
            continue
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            read(Settings, "A script.", given)


@pytest.mark.parametrize("act", [Path.mkdir, Path.read_text], ids=["a file is there", "a folder is there"])
def test_a_path_that_cannot_be_used_is_one_message(tmp_path, capsys, act):
    place = tmp_path / "place"
    place.touch() if act is Path.mkdir else place.mkdir()
    with pytest.raises(SystemExit, match="2"):
        run_main(lambda: act(place))
    assert re.fullmatch(
        rf"error: {re.escape(str(place))}: [^\n]+; give another path\n", capsys.readouterr().err
    )
