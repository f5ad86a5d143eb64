"""The objective of IrisUsformer: closed forms, and which gradients reach what."""

import math

import pytest
import torch
import torch.nn.functional as F

from irisusformer import losses
from irisusformer.losses import IGNORE, cross_entropy, dice_loss, discrepancy, objective, weight


def outputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda c: torch.randn(2, c, 4, 5, generator=generator).requires_grad_()  # noqa: E731
    return {"logits": make(1), "aux": make(1), "regions": make(2)}


TARGET = torch.tensor([0, 1, 1, 0, 1] * 8).view(2, 1, 4, 5)


def mask_only(out):
    return {"logits": out["logits"], "aux": out["aux"]}


def test_learned_mode_in_closed_form():
    out = outputs()
    p, u = out["logits"].sigmoid(), out["aux"].sigmoid()
    y = TARGET.float()
    l_pixel = -(y * p.log() + (1 - y) * (1 - p).log())
    t = (p - y).abs()
    unc = -(t * u.log() + (1 - t) * (1 - u).log()).mean()
    seg = (torch.exp(-2.0 * u) * l_pixel).mean()
    found = objective(mask_only(out), TARGET, "learned", "attenuate", beta=2.0, lambda_reg=0.01)
    torch.testing.assert_close(found["loss"], seg + 0.4 * unc + 0.01 * u.mean())


def test_two_head_mode_in_closed_form():
    out = outputs()
    p, q = out["logits"].sigmoid(), out["aux"].sigmoid()
    y = TARGET.float()
    d = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    l_pixel = -(y * p.log() + (1 - y) * (1 - p).log())
    other = -(y * q.log() + (1 - y) * (1 - q).log()).mean()
    found = objective(mask_only(out), TARGET, "two_head", lambda_d=0.1)["loss"]
    torch.testing.assert_close(found, (torch.exp(-d) * l_pixel).mean() + 0.1 * d.mean() + 0.4 * other)


def test_free_mode_in_closed_form():
    out = outputs()
    u = (1 + (out["aux"] - 2).exp()).log()
    l_pixel = F.binary_cross_entropy(out["logits"].sigmoid(), TARGET.float(), reduction="none")
    found = objective(mask_only(out), TARGET, "free")["loss"]
    torch.testing.assert_close(found, (torch.exp(-u) * l_pixel).mean() + 0.1 * u.mean())


def test_cross_entropy_mode_is_two_segmentation_heads():
    out = outputs()
    bce = F.binary_cross_entropy_with_logits
    y = TARGET.float()
    expected = bce(out["logits"], y) + 0.4 * bce(out["aux"], y)
    torch.testing.assert_close(objective(mask_only(out), TARGET, "ce", "none")["loss"], expected)


def test_segmentation_loss_does_not_reach_the_auxiliary_head():
    out = outputs()
    objective(mask_only(out), TARGET, "learned")["seg"].backward()
    assert out["aux"].grad is None
    assert out["logits"].grad.abs().sum() > 0


def test_uncertainty_loss_does_not_change_the_prediction():
    out = outputs()
    objective(mask_only(out), TARGET, "learned")["unc"].backward()
    assert out["logits"].grad is None
    assert out["aux"].grad.abs().sum() > 0


def test_regulariser_is_not_detached():
    out = outputs()
    objective(mask_only(out), TARGET, "learned")["reg"].backward()
    assert (out["aux"].grad > 0).all()


def test_two_head_discrepancy_has_a_gradient_on_both_heads_and_ce_mode_none():
    out = outputs()
    d = discrepancy(out["logits"], out["aux"])
    d.mean().backward()
    assert out["logits"].grad.abs().sum() > 0 and out["aux"].grad.abs().sum() > 0
    out = outputs()
    objective(mask_only(out), TARGET, "ce", "attenuate")["seg"].backward()
    assert out["aux"].grad is None


def test_ignored_pixels_do_not_count():
    out = outputs()
    target = TARGET.clone()
    target[0] = IGNORE
    half = objective({k: v[1:] for k, v in mask_only(out).items()}, TARGET[1:])["loss"]
    torch.testing.assert_close(objective(mask_only(out), target, lambda_dice=0.0)["loss"], half)
    whole = objective(mask_only(out), target, lambda_dice=1.0)["dice"]
    torch.testing.assert_close(
        whole, objective({k: v[1:] for k, v in mask_only(out).items()}, TARGET[1:], lambda_dice=1.0)["dice"]
    )
    objective(mask_only(out), target)["loss"].backward()
    assert (out["logits"].grad[0] == 0).all() and (out["aux"].grad[0] == 0).all()


def test_everything_ignored_gives_zero():
    assert objective(mask_only(outputs()), torch.full_like(TARGET, IGNORE))["loss"] == 0


def test_weighting_schemes():
    u = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(weight(u, "attenuate", 1.0), torch.tensor([1.0, math.exp(-0.5), math.exp(-1)]))
    torch.testing.assert_close(weight(u, "emphasize", 2.0), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(weight(u, "none", 2.0), torch.ones(3))


def test_dice():
    logits = torch.tensor([[[[40.0, -40.0]]]])
    y, valid = torch.tensor([[[[1.0, 1.0]]]]), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert dice_loss(logits, y, valid).item() == pytest.approx(1 - 3 / 4)


def test_region_heads_add_their_cross_entropy_where_known():
    out = outputs()
    regions = torch.randint(0, 2, (2, 2, 4, 5))
    regions[:, 0] = IGNORE
    found = objective(out, TARGET, regions=regions)
    expected = F.binary_cross_entropy_with_logits(out["regions"][:, 1], regions[:, 1].float())
    torch.testing.assert_close(found["regions"], expected)
    torch.testing.assert_close(found["loss"] - expected, objective(mask_only(out), TARGET)["loss"])


def test_extreme_logits_stay_finite():
    big = torch.tensor([[[[1e4, -1e4, 0.0]]]], requires_grad=True)
    for mode in ("learned", "two_head", "free", "ce"):
        out = {"logits": big, "aux": -big}
        loss = objective(out, torch.tensor([[[[0, 1, 1]]]]), mode)["loss"]
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(big.grad).all()


def test_bf16_outputs_are_computed_in_fp32():
    out = {name: value.detach().bfloat16() for name, value in mask_only(outputs()).items()}
    assert objective(out, TARGET)["loss"].dtype == torch.float32


def test_discrepancy_is_kl_of_the_second_from_the_first_and_zero_for_equal_heads():
    a, b = torch.randn(50), torch.randn(50)
    p, q = (torch.stack([x.sigmoid(), 1 - x.sigmoid()]) for x in (a, b))
    torch.testing.assert_close(
        discrepancy(a, b), F.kl_div(p.log(), q, reduction="none").sum(0), atol=1e-6, rtol=1e-4
    )
    assert (discrepancy(a, a) == 0).all()


def test_cross_entropy_takes_soft_targets():
    assert cross_entropy(torch.zeros(1), torch.tensor([0.3])).item() == pytest.approx(math.log(2))


def test_the_mean_of_two_processes_shares_is_the_whole_batchs(monkeypatch):
    values, valid = (
        torch.rand(4, 1, 6, 6),
        torch.rand(4, 1, 6, 6) < torch.tensor([0.1, 0.2, 0.9, 1]).view(4, 1, 1, 1),
    )
    whole = losses.valid_mean(values, valid)
    monkeypatch.setattr(losses, "world", lambda: 2)
    monkeypatch.setattr(losses, "total", lambda count: valid.sum())
    shares = [losses.valid_mean(values[rows], valid[rows]) for rows in (slice(2), slice(2, 4))]
    assert (shares[0] + shares[1]).item() / 2 == pytest.approx(whole.item())
