"""META: relevance, aggregation, losses."""

import math

import pytest
import torch
from test_meta_reid import pictures, tiny

from meta_reid.aggregation import MODES, moments, relevance, weights
from meta_reid.losses import (
    batch_hard,
    consistency,
    objective,
    smoothed_cross_entropy,
    triplet,
    uniformity,
)
from meta_reid.model import META
from shared.runtime import UserError


def test_relevance_against_its_definition():
    rng = torch.Generator().manual_seed(0)
    channels = [3, 5]
    m, v = torch.randn(2, 8, generator=rng), torch.rand(2, 8, generator=rng)
    mu, s = torch.randn(2, 4, 8, generator=rng), torch.rand(2, 4, 8, generator=rng)
    found = relevance(m, v, mu, s, channels)
    assert found.shape == (4, 2, 2)
    for k in range(2):
        for b in range(4):
            for layer, span in enumerate((range(0, 3), range(3, 8))):
                total = sum(
                    (m[k, c] - mu[k, b, c]) ** 2 + (math.sqrt(v[k, c]) - math.sqrt(s[k, b, c])) ** 2
                    for c in span
                )
                assert found[b, k, layer] == pytest.approx(math.sqrt(total), rel=1e-5)


def test_moments_are_the_mean_and_the_unbiased_variance():
    x = torch.randn(2, 3, 4, 5) * 3 + 2
    mean, variance = moments(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(variance, x.var((2, 3)), rtol=1e-4, atol=1e-5)
    assert (moments(torch.ones(1, 2, 1, 1))[1] == 0).all()
    assert moments(x.bfloat16())[0].dtype == torch.float32


def test_aggregation_modes():
    r = torch.tensor([[[1.0, 2.0], [4.0, 1.0], [0.5, 0.5]]])
    sums = torch.tensor([[3.0, 5.0, 1.0]])
    torch.testing.assert_close(weights("official", r), sums.softmax(1))
    torch.testing.assert_close(weights("nearest", r), (-sums).softmax(1))
    torch.testing.assert_close(weights("nearest", r, temperature=2.0), (-sums / 2).softmax(1))
    torch.testing.assert_close(weights("uniform", r), torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(weights("shared", r, sums), sums.softmax(1))
    with pytest.raises(ValueError, match="scores"):
        weights("learned", r)
    with pytest.raises(ValueError, match="none of"):
        weights("best", r)


def test_modes_of_a_network_and_its_options():
    model = tiny().eval()
    described = model.describe(pictures())
    for mode in MODES:
        w = model.expert_weights(described, mode)
        torch.testing.assert_close(w.sum(1), torch.ones(6).double())
        mixture, universal = model.parts(described, mode)
        assert mixture.shape == universal.shape == (6, 96)
    model.normalize_parts = True
    torch.testing.assert_close(model(pictures()).norm(dim=1), torch.full((6,), math.sqrt(2)).double())
    with pytest.raises(UserError, match="learned"):
        single = META((2, 2), "mini", scoring="shared").eval()
        single.expert_weights(single.describe(pictures(2).float()), "learned")
    with pytest.raises(ValueError, match="two source domains"):
        META((5,), "mini")


def test_a_shared_scoring_network_starts_near_uniform_weights():
    model = META((3, 3, 3), "mini", scoring="both").eval()
    described = model.describe(pictures().float())
    assert (model.expert_weights(described, "shared") - 1 / 3).abs().max() < 0.1
    # All experts are scored by one network, on their distances per channel and layer.
    r, layers = described.relevance, torch.tensor(model.backbone.channels).sqrt() * len(model.backbone.units)
    for k in range(3):
        alone = model.affine2_shared(model.affine1_shared(r[:, k] / layers)).squeeze(-1)
        torch.testing.assert_close(model.scores("shared", r, range(3))[:, k], alone)
    model.scoring_relu = True
    alone = model.affine2_shared(model.affine1_shared(r[:, 1] / layers).relu()).squeeze(-1)
    torch.testing.assert_close(model.scores("shared", r, range(3))[:, 1], alone)


def test_smoothed_cross_entropy_against_its_definition():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 2, 4, 1])
    log_p = logits.log_softmax(1)
    target = torch.full((4, 5), 0.1 / 4)
    target[range(4), labels] = 0.9
    expected = -(target * log_p).sum() / 4
    assert smoothed_cross_entropy(logits, labels) == pytest.approx(float(expected), rel=1e-5)
    nobody = torch.zeros(4, dtype=torch.long)
    assert smoothed_cross_entropy(logits[:, :1], nobody) == 0
    # Divided by the samples that have a loss, here one of two.
    half = smoothed_cross_entropy(torch.tensor([[200.0, 0.0], [0.0, 0.0]]), nobody[:2], epsilon=0.0)
    assert float(half) == pytest.approx(math.log(2))


def test_metric_losses_against_loops():
    features, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 2])
    other = torch.randn(6, 3)

    def hard(x):
        ap = [max(float((x[i] - x[j]).norm()) for j in range(6) if labels[j] == labels[i]) for i in range(6)]
        an = [min(float((x[i] - x[j]).norm()) for j in range(6) if labels[j] != labels[i]) for i in range(6)]
        return ap, an

    ap, an = hard(features)
    found = batch_hard(features, labels)
    torch.testing.assert_close(found[0], torch.tensor(ap), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(found[1], torch.tensor(an), atol=1e-4, rtol=1e-4)
    expected = sum(max(0, p - n + 0.3) for p, n in zip(ap, an, strict=True)) / 6
    assert float(triplet(features, labels)) == pytest.approx(expected, abs=2e-3)
    ap_s, an_s = hard(other)
    expected = sum(max(0, s - t) for s, t in zip(ap_s, ap, strict=True)) / 6
    expected += sum(max(0, t - s) for s, t in zip(an_s, an, strict=True)) / 6
    assert float(consistency(features, other, labels)) == pytest.approx(expected, abs=3e-3)
    assert consistency(features, features, labels) == 0


def test_uniformity_prefers_spread_features():
    spread = torch.eye(4)
    assert float(uniformity(spread)) == pytest.approx(-4.0)  # all pairs at squared distance 2
    assert float(uniformity(torch.ones(4, 3))) == pytest.approx(0, abs=1e-5)
    out = tiny().train()(pictures(), 0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert "uniformity" not in objective(out, labels, labels)
    assert "uniformity" in objective(out, labels, labels, uniformity_weight=1.0)


def test_the_consistency_loss_trains_the_scoring_network_alone():
    model = tiny().train()
    images, labels = pictures(8), torch.arange(8) // 2
    scoring = [p for name, p in model.named_parameters() if name.startswith("affine")]
    optimiser = torch.optim.Adam(scoring, lr=1e-2)

    def value() -> torch.Tensor:
        out = model(images, 0)
        return consistency(out.expert.detach(), out.mixtures["shared"], labels)

    first = value().item()
    for _ in range(40):
        optimiser.zero_grad()
        loss = value()
        loss.backward()
        optimiser.step()
    assert loss.item() < first - 1e-3


def test_distances_stay_exact_under_autocast():
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) + 5
    labels = torch.arange(16) // 4
    wanted = [part.clone() for part in batch_hard(x, labels)]
    spread = uniformity(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, batch_hard(x, labels), wanted))
        assert torch.equal(uniformity(x), spread)
