"""MDRNets: every term of the objective, and the metrics, against closed forms and slow references."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

from mdrnets import eval as evaluation
from mdrnets import losses, naive
from mdrnets.baselines import CLASSICAL
from mdrnets.copytask import CopyNet, draw
from mdrnets.data import DrawnFaces
from mdrnets.model import SIZES, CoarseNet, Discriminator, MDRNet, RefineNet
from mdrnets.objective import feature_network, refine_losses
from mdrnets.parser import TinyParser
from mdrnets.protocol import Scores, measure, to_bytes, uniform_ssim
from mdrnets.train import Config
from shared import metrics as shared_metrics
from shared.runtime import UserError

UNIT = SIZES["unit"]


def sample(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(3, 1, size, size)
    mask[0, :, 3:9, 4:11], mask[1, :, :5] = 1, 1
    return x, mask


def test_pixel_losses_split_the_error():
    x, m = sample()
    y = x + 0.5
    assert losses.hole(y, x, m).item() == pytest.approx(0.5 * m.mean().item(), abs=1e-6)
    assert losses.valid(y, x, m).item() == pytest.approx(0.5 * (1 - m.mean().item()), abs=1e-6)


def test_total_variation_counts_pairs_that_touch_the_hole():
    comp, m = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    comp[..., 1, 1], m[..., 1, 1] = 2, 1
    assert losses.total_variation(comp, m).item() == pytest.approx(2 * (2 + 2) / 12)
    m[..., 1, 1], m[..., 3, 3] = 0, 1
    assert losses.total_variation(comp, m).item() == 0


def test_perceptual_and_style_of_known_features():
    a, b = [torch.full((1, 2, 3, 3), 1.0)], [torch.full((1, 2, 3, 3), 4.0)]
    x = [torch.full((1, 2, 3, 3), 2.0)]
    assert losses.perceptual(a, b, x).item() == pytest.approx(1 + 2)
    # Gram of a constant c: every entry is c^2 * 9 / (2 * 9).
    assert losses.style(a, b, x).item() == pytest.approx(abs(1 - 4) / 2 + abs(16 - 4) / 2)
    f = torch.randn(2, 3, 4, 5)
    slow = torch.einsum("bchw,bdhw->bcd", f, f) / (3 * 20)
    assert torch.allclose(losses.gram(f), slow, atol=1e-6)


def test_hinge():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(0.5 + 0.75)
    assert losses.hinge_generator(fake).item() == pytest.approx(1.25)


# --- InCo2 ------------------------------------------------------------------------------------------


def slow_inco2(out: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """The two sums of the docstring, pair by pair."""
    inter, intra = [], []
    for o, t, m in zip(out, x, mask, strict=True):
        h = F.adaptive_max_pool2d(m[None], out.shape[-2:])[0, 0].flatten() > 0.5
        o, t = o.flatten(1).T, t.flatten(1).T
        hidden, kept = h.nonzero().flatten().tolist(), (~h).nonzero().flatten().tolist()

        def gap(i: int, j: int, o=o, t=t) -> float:
            cos = F.cosine_similarity
            return abs((cos(o[i], o[j], dim=0) - cos(t[i], t[j], dim=0)).item())

        pairs = [gap(i, j) for i in hidden for j in kept]
        inter.append(sum(pairs) / len(pairs) if pairs else 0.0)
        pairs = [gap(i, j) for i in hidden for j in hidden]
        intra.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return sum(inter) / len(inter), sum(intra) / len(intra)


def test_inco2_equals_the_sums():
    torch.manual_seed(0)
    out, x = torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4)
    mask = sample()[1]
    mask[2] = 1  # no kept cell: contributes nothing to inter
    got = losses.inco2(out, x, mask, samples=None)
    assert [v.item() for v in got] == pytest.approx(slow_inco2(out, x, mask), abs=1e-5)
    zero = losses.inco2(out, x, torch.zeros(3, 1, 16, 16), samples=None)
    assert [v.item() for v in zero] == [0, 0]


def test_inco2_sampling_is_unbiased():
    torch.manual_seed(0)
    out, x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :5] = 1
    whole = losses.inco2(out, x, mask, samples=None)
    rng = torch.Generator().manual_seed(1)
    draws = torch.tensor([[v.item() for v in losses.inco2(out, x, mask, 6, rng)] for _ in range(1500)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert (draws.mean(0) - torch.stack(whole)).abs().lt(4 * error).all()


def test_inco2_is_zero_for_the_truth_and_the_truth_gets_no_gradient():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 3:9, 3:9] = 1
    assert max(v.item() for v in losses.inco2(x, x, mask)) < 1e-6
    out = torch.randn(2, 4, 8, 8, requires_grad=True)
    sum(losses.inco2(out, x, mask)).backward()
    assert x.grad is None and out.grad.abs().sum() > 0


def test_direct_form_compares_each_cell_with_itself():
    out, x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3:5, 3:5] = 1
    inter, intra = losses.inco2(out, x, mask, form="direct")
    distance = 1 - F.cosine_similarity(out, x, dim=1)[0]
    assert intra.item() == pytest.approx(distance[3:5, 3:5].mean().item(), abs=1e-6)
    ring = distance[1:7, 1:7].sum() - distance[3:5, 3:5].sum()
    assert inter.item() == pytest.approx(ring.item() / 32, abs=1e-6)


# --- feature networks and the whole objective --------------------------------------------------------


def small_net() -> MDRNet:
    torch.manual_seed(0)
    net = MDRNet(CoarseNet(UNIT), TinyParser(4), RefineNet(UNIT, 4), UNIT.stride)
    net.coarse.requires_grad_(False)
    net.parser.requires_grad_(False)
    return net


def test_vgg_features_are_the_three_pools(tmp_path):
    torch.manual_seed(0)
    layers = make_layers([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512])
    state = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(4096)}, tmp_path / "vgg.pth")
    features = losses.load_vgg(tmp_path / "vgg.pth").eval()
    with torch.no_grad():
        maps = features(torch.zeros(1, 3, 64, 64))
    assert [tuple(f.shape) for f in maps] == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]
    normal = (torch.full((1, 3, 64, 64), 0.5) - features.mean) / features.deviation
    with torch.no_grad():
        assert torch.allclose(maps[2], layers[:17](normal), atol=1e-5)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torchvision's VGG-16"):
        losses.load_vgg(tmp_path / "other.pth")
    with pytest.raises(UserError, match="--vgg-weights"):
        losses.load_vgg(tmp_path / "missing.pth")


def test_random_features_are_the_same_every_time():
    x = torch.rand(1, 3, 16, 16)
    torch.manual_seed(1)
    a = losses.RandomFeatures()(x)
    torch.manual_seed(2)
    b = losses.RandomFeatures()(x)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert [f.shape[1] for f in a] == [32, 64, 128]


@pytest.mark.parametrize("kind", ["coarse", "random"])
def test_features_are_frozen_and_not_part_of_the_network(kind):
    net = small_net()
    phi = feature_network(Config(features=kind), net)
    assert not any(p.requires_grad for p in phi.parameters())
    mine = {id(p) for p in net.parameters()}
    assert not any(id(p) in mine for p in phi.parameters())


def test_every_term_is_there_and_reaches_the_refinement():
    net, (x, m) = small_net(), sample(32)
    config = Config(features="random", parser="tiny")
    phi = feature_network(config, net)
    critic = torch.nn.Conv2d(3, 1, 4)
    batch = {"image": x, "mask": m}
    arguments = (net, batch, config, phi, critic)
    terms, comp = refine_losses(*arguments, True, True, torch.Generator())
    names = {"valid", "hole", "tv", "perceptual", "style", "inter", "intra", "adversarial"}
    assert terms.keys() == names
    for name in names:
        net.zero_grad()
        terms[name].backward(retain_graph=True)
        reached = net.refine.decoder.last.weight.grad
        assert reached is not None and reached.abs().sum() > 0, name
        assert all(p.grad is None for p in net.coarse.parameters())
    kept = (m < 0.5).expand_as(x)
    assert torch.equal(comp[kept], x[kept])
    without, _ = refine_losses(*arguments, False, True, torch.Generator())
    assert without.keys() == names - {"inter", "intra"}
    net.coarse.requires_grad_(True)
    assert "coarse" in refine_losses(*arguments, False, True, torch.Generator())[0]


def test_features_of_one_pass_equal_those_of_three():
    net, (x, m) = small_net(), sample(32)
    phi = feature_network(Config(features="random"), net)
    config = Config(parser="tiny")
    terms, comp = refine_losses(
        net, {"image": x, "mask": m}, config, phi, None, False, True, torch.Generator()
    )
    y = net(x, m)["refined"]
    separate = losses.perceptual(phi(y), phi(comp), phi(x))
    assert terms["perceptual"].item() == pytest.approx(config.perceptual * separate.item(), rel=1e-4)
    separate = losses.style(phi(y), phi(comp), phi(x))
    assert terms["style"].item() == pytest.approx(config.style * separate.item(), rel=1e-3)


# --- copy task --------------------------------------------------------------------------------------


def test_copy_task_hides_one_of_two_equal_squares():
    x, mask = draw(20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 3, 32, 32) and mask.sum((1, 2, 3)).eq(81).all()
    for image, m in zip(x, mask, strict=True):
        values = image.flatten(1).T.unique(dim=0)
        assert len(values) == 2
        background = image[:, 0, 0]
        square = (image - background[:, None, None]).abs().sum(0) > 1e-6
        assert square.sum() == 50 and (square & (m[0] > 0.5)).sum() == 25
    with torch.no_grad():
        assert CopyNet(True)(x, mask).shape == x.shape


# --- metrics ----------------------------------------------------------------------------------------


def test_metrics_against_closed_forms():
    truth = torch.full((2, 3, 16, 16), 0.5)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :4, :] = 1
    output = truth + 0.1 * mask
    scores = measure(output, truth, mask)
    assert scores["PSNR hole"][0].item() == pytest.approx(20, abs=1e-3)
    assert scores["PSNR"][0].item() == pytest.approx(20 + 10 * math.log10(4), abs=1e-3)
    assert scores["L1"][0].item() == pytest.approx(2.5, abs=1e-4)
    assert scores["L1 hole"][0].item() == pytest.approx(10, abs=1e-4)
    assert measure(truth, truth, mask)["SSIM"].tolist() == pytest.approx([1, 1])


def slow_ssim(a: np.ndarray, b: np.ndarray, weights: np.ndarray, unbiased: float = 1.0) -> float:
    """Wang et al.'s definition at every window that lies inside the pictures."""
    w, values = len(weights), []
    for y in range(a.shape[0] - w + 1):
        for x in range(a.shape[1] - w + 1):
            p, q = a[y : y + w, x : x + w], b[y : y + w, x : x + w]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            pairs = ((p - mp, p - mp), (q - mq, q - mq), (p - mp, q - mq))
            vp, vq, cov = (unbiased * (weights * s * t).sum() for s, t in pairs)
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / (mp**2 + mq**2 + 1e-4) / (vp + vq + 9e-4))
    return float(np.mean(values))


def test_ssim_of_both_protocols_equals_a_loop():
    a, b = torch.rand(2, 1, 3, 16, 14, generator=torch.Generator().manual_seed(0)).double()
    got, uniform = uniform_ssim(a[:, :1], b[:, :1], 7).item(), np.full((7, 7), 1 / 49)
    assert got == pytest.approx(slow_ssim(a[0, 0].numpy(), b[0, 0].numpy(), uniform, 49 / 48), abs=1e-5)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    bell = np.outer(bell, bell) / bell.sum() ** 2
    wide = (np.pad(pair[0].numpy(), ((0, 0), (5, 5), (5, 5)), "reflect") for pair in (a, b))
    channels = [slow_ssim(p, q, bell) for p, q in zip(*wide, strict=True)]
    got = measure(a.float(), b.float(), torch.ones(1, 1, 16, 14))["SSIM"].item()
    assert got == pytest.approx(np.mean(channels), abs=1e-5)


def test_edgeconnect_protocol_is_grey_and_needs_large_pictures():
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    mask = torch.ones(1, 1, 64, 64)
    scores = measure(a, b, mask, "edgeconnect")
    weights = torch.tensor((0.2125, 0.7154, 0.0721)).view(1, 3, 1, 1)
    x, y = (a * weights).sum(1), (b * weights).sum(1)
    assert scores["relative L1"].item() == pytest.approx(
        ((x - y).abs().sum() / (x + y).sum()).item(), rel=1e-4
    )
    assert scores["PSNR"].item() == pytest.approx(-10 * math.log10((x - y).square().mean().item()), rel=1e-4)
    with pytest.raises(UserError, match="51 pixels"):
        measure(a[..., :32, :32], b[..., :32, :32], mask[..., :32, :32], "edgeconnect")


def test_scores_refuse_a_changed_kept_pixel():
    x, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    scores = Scores("ours")
    scores.add(torch.where(mask > 0, 0.5, x), x, mask)
    assert scores.means()["L1 hole"] == pytest.approx(100 * 63 / 255, abs=0.01)
    with pytest.raises(ValueError, match="outside the hole"):
        scores.add(x + 0.01, x, mask)


class Brightness(torch.nn.Module):
    """Stands in for LPIPS' network; counts its calls."""

    calls = 0

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_takes_a_batch_at_once_and_is_averaged_over_pictures():
    x, mask = torch.zeros(3, 3, 16, 16), torch.ones(3, 1, 16, 16)
    output = x + torch.tensor((0.2, 0.4, 0.6)).view(3, 1, 1, 1)
    network = Brightness()
    scores = Scores("ours", lpips=network)
    scores.add(output[:2], x[:2], mask[:2])
    scores.add(output[2:], x[2:], mask[2:])
    assert network.calls == 2 and scores.means()["LPIPS"] == pytest.approx(0.4, abs=0.01)


def test_the_coarse_row_is_the_first_stage_alone():
    torch.manual_seed(0)
    size = SIZES["unit"]
    net = MDRNet(CoarseNet(size), TinyParser(4), RefineNet(size, 4), size.stride).eval()
    x, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
    mask[..., 4:9, 3:11] = 1
    with torch.no_grad():
        wanted = net(x, mask)["coarse_comp"]
        net.refine = net.parser = None
        got = evaluation.complete(net, "coarse", {"image": x, "mask": mask}, 4, oracle=False)
    assert torch.equal(got, torch.where(mask > 0.5, wanted, x))


class Colours(torch.nn.Module):
    """Stands in for InceptionV3: three features."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_fid_is_collected_batch_by_batch(monkeypatch):
    """Pictures are not kept: a test set of thousands for each of a dozen methods would not fit."""
    monkeypatch.setattr("mdrnets.protocol.FEWEST_FOR_FID", 8)
    x, mask = torch.rand(12, 3, 16, 16) * 2 - 1, torch.ones(12, 1, 16, 16)
    output = (x + 0.3).clamp(-1, 1)
    scores = Scores("ours", inception=Colours())
    scores.add(output[:4], x[:4], mask[:4])
    assert "FID" not in scores.means()
    scores.add(output[4:], x[4:], mask[4:])
    expected = shared_metrics.fid([to_bytes(x)], [to_bytes(output)], Colours())
    assert scores.means()["FID"] == pytest.approx(expected, rel=1e-4)
    kept = [value for value in vars(scores).values() if isinstance(value, list)]
    assert not any(kept)


def test_features_of_the_truth_are_computed_once_for_all_methods(monkeypatch):
    network, seen = Colours(), []
    network.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    monkeypatch.setattr(evaluation, "optional_networks", lambda *options: (None, network))
    pictures = DrawnFaces("simple", 4, 1, 16)
    evaluation.evaluate(evaluation.EvalConfig(device="cpu"), Config(image_size=16), pictures, {})
    assert len(seen) == 5 * (1 + len(CLASSICAL))


def test_to_bytes_rounds_as_a_file_does():
    assert to_bytes(torch.tensor([-1.0, 1.0, 0.0, 3.0])).tolist() == pytest.approx([0, 1, 128 / 255, 1])


@pytest.mark.parametrize("count", [1, 2])
def test_plain_form_of_the_bench_minimises_the_same(count):
    """Channels-last against PyTorch's usual order; networks with norms, which the small sizes lack."""
    size = replace(UNIT, norm=True, kernel=7)
    config = Config(inco_samples=None)
    x, mask = (value[:count] for value in sample(32))
    batch, found = {"image": x, "mask": mask}, {}
    for form in ("fast", "plain"):
        torch.manual_seed(0)
        net = MDRNet(CoarseNet(size), TinyParser(8), RefineNet(size, 8), size.stride)
        net.requires_grad_(False).refine.requires_grad_(True)
        phi, critic = losses.VGGFeatures().requires_grad_(False), Discriminator(8)
        refine = net.refine
        if form == "plain":
            net = naive.made_plain(net)
            loss, comp = naive.refine_losses(net, batch, config, phi, critic)
        else:
            for module in (net, phi, critic):
                module.to(memory_format=torch.channels_last)
            terms, comp = refine_losses(net, batch, config, phi, critic, True, True, torch.Generator())
            loss = sum(terms.values())
        loss.backward()
        found[form] = loss, comp, {name: p.grad for name, p in refine.named_parameters()}
    (loss, comp, gradients), (other, other_comp, others) = found.values()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(comp, other_comp, atol=1e-5, rtol=0)
    largest = max(gradient.norm() for gradient in others.values())  # those of biases before a norm are noise
    for name, gradient in gradients.items():
        distance = (gradient - others[name]).norm()
        assert distance < 1e-3 * others[name].norm() + 1e-5 * largest, f"{name}: {distance}"
