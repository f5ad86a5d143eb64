"""PIN: the eigenface solvers and the objective, against literal definitions written here."""

import tracemalloc
from dataclasses import replace
from functools import partial

import pytest
import torch

from pin.basis import Basis, CovarianceSolver, RandomizedSolver, fit_basis, load_basis, pick_solver
from pin.losses import (
    add_noise,
    arcface_logits,
    calibrate_lambda,
    cosine_logits,
    distill,
    exact,
    mask_cost,
    mask_entropy,
    reinforce,
)
from pin.recognition import attack_training_batch
from pin.recognizers import SmallRecognizer
from pin.train import PRESETS
from shared.bench import peak_memory
from shared.runtime import UserError

D, K = 36, 12
LAMBDA = 0.003


@pytest.fixture
def world():
    """Basis, clean and noisy images, and keep-probabilities."""
    torch.manual_seed(0)
    faces = torch.randn(80, 1, 6, 6) * torch.linspace(0.6, 0.02, 36).view(1, 1, 6, 6) + 0.2
    basis = fit_basis([faces], 80, D, K)
    x = faces[:4]
    noisy = x + 0.1 * torch.randn_like(x)
    return basis, x, noisy, torch.rand(4, K) * 0.8 + 0.1


def literal_cost(basis, x, noisy, q, lamb):
    """The pixel definition, image by image, with masked bases."""
    costs = []
    for clean, dirty, mask in zip(x, noisy, q, strict=True):
        masked = basis.eig_vec * mask
        restored = masked @ (masked.T @ (dirty.flatten() - basis.avg_face))
        error = (restored - (clean.flatten() - basis.avg_face)).square().mean()
        costs.append(error + lamb * mask.sum())
    return torch.stack(costs)


def literal_reinforce(basis, x, noisy, p, masks, lamb, per_image):
    """The official loss: every sample's cost, one baseline, log|1 - q - p| summed over the eigenfaces."""
    costs = torch.stack([literal_cost(basis, x, noisy, q, lamb) for q in masks])
    b = costs.mean(0) if per_image else costs.mean()
    log_likelihood = torch.stack([(1 - q - p).abs().log().sum(1) for q in masks])
    return ((costs - b) * log_likelihood).sum(0).mean()


# --- cost -----------------------------------------------------------------------------------------


def test_parseval_cost_is_the_pixel_cost(world):
    basis, x, noisy, _ = world
    cost = mask_cost(basis, x, noisy, LAMBDA)
    for q in (torch.zeros(4, K), torch.ones(4, K), (torch.rand(4, K) > 0.5).float()):
        torch.testing.assert_close(cost(q), literal_cost(basis, x, noisy, q, LAMBDA), atol=1e-6, rtol=1e-5)


def test_no_mask_at_all_costs_the_whole_image(world):
    basis, x, noisy, _ = world
    expected = basis.center(x).square().mean(1)
    torch.testing.assert_close(mask_cost(basis, x, noisy, LAMBDA)(torch.zeros(4, K)), expected)


def test_expected_cost_is_the_cost_of_p(world):
    basis, x, noisy, p = world
    cost = mask_cost(basis, x, noisy, LAMBDA)
    masks = (torch.rand(20000, 4, K) < p).float()
    torch.testing.assert_close(cost(masks).mean(0), cost(p), rtol=0.02, atol=0)


def test_the_oracle_bounds_every_mask(world):
    basis, x, noisy, _ = world
    small = 8
    cost = mask_cost(basis, x, noisy, LAMBDA)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * small)  # (256, 8)
    masks = torch.cat([every, torch.zeros(len(every), K - small)], 1)
    best = cost(masks[:, None].expand(-1, 4, -1)).min(0).values
    oracle = cost.oracle()
    oracle[:, small:] = 0
    torch.testing.assert_close(cost(oracle), best)
    assert (cost(cost.oracle()) <= best + 1e-7).all()


# --- estimators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [False, True])
def test_reinforce_is_the_literal_loss(world, per_image):
    basis, x, noisy, p = world
    p = p.clone().requires_grad_()
    cost = mask_cost(basis, x, noisy, LAMBDA)
    loss, mean = reinforce(p, cost, 30, "image" if per_image else "batch", torch.Generator().manual_seed(5))
    masks = (p.detach() > torch.rand((30, *p.shape), generator=torch.Generator().manual_seed(5))).float()
    expected = literal_reinforce(basis, x, noisy, p, masks, LAMBDA, per_image)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean, cost(masks).mean())
    gradients = [torch.autograd.grad(value, p)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("baseline", "factor"), [("batch", 6 - 1 / 4), ("image", 5)])
def test_what_the_policy_gradient_estimates(world, baseline, factor):
    """Mean over many draws = (S - 1/B) (or S - 1) times the closed form's gradient."""
    basis, x, noisy, p = world
    cost = mask_cost(basis, x, noisy, LAMBDA)
    p = p.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    total = sum(
        torch.autograd.grad(reinforce(p, cost, 6, baseline, generator)[0], p)[0] for _ in range(draws)
    )
    (closed,) = torch.autograd.grad(exact(p, cost, samples=1)[0], p)
    torch.testing.assert_close(closed, -cost.worth / 4)
    estimate = total / draws
    slope = (estimate * closed).sum() / closed.square().sum()
    correlation = torch.corrcoef(torch.stack([estimate.flatten(), closed.flatten()]))[0, 1]
    assert slope.item() == pytest.approx(factor, rel=0.05)
    assert correlation > 0.99


def test_saturated_probabilities_stay_finite(world):
    basis, x, noisy, _ = world
    p = torch.cat([torch.zeros(4, K // 2), torch.ones(4, K // 2)], 1).requires_grad_()
    cost = mask_cost(basis, x, noisy, LAMBDA)
    for loss in (reinforce(p, cost)[0], distill(p, cost)[0], mask_entropy(p)):
        assert loss.isfinite()
        assert torch.autograd.grad(loss, p)[0].isfinite().all()


def test_distillation_is_least_at_the_oracle(world):
    basis, x, noisy, p = world
    cost = mask_cost(basis, x, noisy, LAMBDA)
    assert distill(cost.oracle(), cost)[0] < 1e-4 < distill(p, cost)[0]
    assert mask_entropy(torch.full((2, K), 0.5)).item() == pytest.approx(0.6931, abs=1e-3)


def test_lambda_calibration(world):
    basis, x, noisy, _ = world
    clean = basis.coefficients(x)
    noise = basis.coefficients(noisy) - clean
    lamb = calibrate_lambda(clean, noise, D, keep=5)
    assert lamb == pytest.approx((clean[:, 4] ** 2 - noise[:, 4] ** 2).mean().item() / D)
    with pytest.raises(ValueError, match="keep"):
        calibrate_lambda(clean, noise, D, keep=K + 1)


def test_noise_levels():
    x = torch.stack([torch.ones(1, 6, 6), torch.full((1, 6, 6), 0.1)])
    batch = add_noise(x, 0.04, torch.Generator().manual_seed(0)) - x
    assert (batch.norm() / x.norm()).item() == pytest.approx(0.04, rel=1e-4)
    image = add_noise(x, 0.04, torch.Generator().manual_seed(0), norm="image") - x
    torch.testing.assert_close(image.flatten(1).norm(dim=1), 0.04 * x.flatten(1).norm(dim=1))
    assert batch[1].norm() > 3 * image[1].norm()  # a dark image gets its bright neighbour's noise


def test_arcface_head():
    angle = torch.tensor([0.3, 1.2, 3.0])
    features = torch.stack([angle.cos(), angle.sin()], 1)
    logits = arcface_logits(features, torch.eye(2), torch.zeros(3, dtype=torch.long), scale=1.0)
    expected = torch.stack(
        [(angle[0] + 0.5).cos(), (angle[1] + 0.5).cos(), angle[2].cos() - 0.5 * torch.tensor(0.5).sin()]
    )
    torch.testing.assert_close(logits[:, 0], expected)
    torch.testing.assert_close(logits[:, 1], angle.sin())


# --- eigenfaces -----------------------------------------------------------------------------------


def reference(faces, k):
    centered = (faces.flatten(1) - faces.flatten(1).mean(0)).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(faces))
    return values.flip(0)[:k].float(), vectors.flip(1)[:, :k].float()


@pytest.mark.parametrize("solver", ["covariance", "gram", "randomized"])
def test_solvers_agree_with_a_dense_one(solver):
    torch.manual_seed(0)
    faces = (
        torch.randn(30 if solver == "gram" else 200, 1, 6, 6) * torch.linspace(1, 0.1, 36).view(6, 6) + 0.3
    )
    basis = fit_basis(list(faces.split(13)), len(faces), D, 8, solver)
    values, vectors = reference(faces, 8)
    torch.testing.assert_close(basis.avg_face, faces.flatten(1).mean(0))
    torch.testing.assert_close(basis.eig_val, values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(basis.eig_vec.T @ basis.eig_vec, torch.eye(8), atol=1e-5, rtol=0)
    alignment = (basis.eig_vec * vectors).sum(0).abs()
    torch.testing.assert_close(alignment, torch.ones(8), atol=1e-3, rtol=0)
    assert (basis.eig_val.diff() <= 0).all()


def test_randomized_finds_the_leading_space_of_a_wide_matrix():
    torch.manual_seed(0)
    faces = (torch.randn(300, 20) * torch.linspace(3, 0.5, 20)) @ torch.randn(20, 400) + 0.01 * torch.randn(
        300, 400
    )
    faces = faces.view(300, 1, 20, 20)
    basis = fit_basis(list(faces.split(50)), 300, 400, 10, "randomized")
    _, vectors = reference(faces, 10)
    assert torch.linalg.svdvals(basis.eig_vec.T @ vectors).min() > 0.999


def test_solver_choice_and_too_few_images():
    assert type(pick_solver("auto", 10, 36, 4)).__name__ == "GramSolver"
    assert isinstance(pick_solver("auto", 100, 36, 4), CovarianceSolver)
    with pytest.raises(UserError, match="12 eigenfaces cannot be had from 10 images"):
        pick_solver("auto", 10, 36, 12)


@pytest.mark.parametrize("name", ["covariance", "gram", "randomized"])
def test_a_solver_continues_from_its_state(name):
    torch.manual_seed(0)
    batches = list(torch.randn(60, 1, 6, 6).split(20))
    whole = fit_basis(batches, 60, D, 5, name)
    first = pick_solver(name, 60, D, 5)
    steps = [(p, x) for p in range(first.passes) for x in batches]
    for pass_index, x in steps[:2]:
        first.add(x, pass_index)
    second = pick_solver(name, 60, D, 5)
    second.load_state_dict(first.state_dict())
    for pass_index, x in steps[2:]:
        second.add(x, pass_index)
    assert second.solve().fingerprint() == whole.fingerprint()


def test_hash_depends_on_the_order_of_the_eigenfaces():
    torch.manual_seed(0)
    basis = fit_basis([torch.randn(60, 1, 6, 6)], 60, D, 5)
    before = basis.fingerprint()
    basis.eig_vec.copy_(basis.eig_vec[:, [1, 0, 2, 3, 4]])
    assert basis.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "images", "components", "most", "found"),
    [
        ("gram", 390, 80, 4.3, 0.7),
        ("gram", 390, 389, 4.3, 2.3),
        ("covariance", 500, 80, 3.3, 0.7),
        ("covariance", 500, 400, 3.3, 2.4),
    ],
)
def test_the_dense_solvers_take_few_matrices(name, images, components, most, found):
    """Of D x D numbers in float32, 0.63 GB at 112 x 112 pixels, PyTorch's (`most`) and SciPy's (`found`): the
    whole stays under 4 GB there."""
    unit = 4 * 400**2
    batches = torch.randn(images, 1, 20, 20).split(10)
    fit = partial(fit_basis, batches, images, 400, components, name)
    assert 2 * unit < peak_memory(fit) < most * unit
    tracemalloc.start()
    fit()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 * components / images * unit < peak < found * unit


def test_randomized_memory_is_thin():
    solver = RandomizedSolver(12544, 100, device="meta")
    assert max(tensor.numel() for tensor in solver.tensors.values()) == 12544 * 164


def test_files_of_no_eigenfaces_are_told(tmp_path):
    path, good, mean = tmp_path / "eig.pth", torch.linalg.qr(torch.randn(64, 20)).Q, torch.zeros(64)
    for vectors, avg_face, message in (
        (good[:, 0], mean, "eig_vec must be a real matrix"),
        (good.tolist(), mean, "eig_vec must be a real matrix"),
        (good, mean.tolist(), "eig_vec must be a real matrix"),
        (good.to(torch.complex64), mean, "eig_vec must be a real matrix"),
        (torch.full((64, 20), torch.nan), mean, "unit length"),
        (good, mean + torch.inf, "unit length"),
    ):
        torch.save({"eig_vec": vectors, "avg_face": avg_face}, path)
        with pytest.raises(UserError, match=message):
            load_basis(path)


def test_a_basis_that_is_not_orthonormal_is_told_before_training(world):
    world[0].require_orthonormal()
    skew = torch.nn.functional.normalize(torch.randn(64, 20), dim=0)
    with pytest.raises(UserError, match="not orthonormal"):
        Basis(torch.zeros(64), skew).require_orthonormal()
    wide = torch.nn.functional.normalize(torch.randn(12544, 300), dim=0)  # nearly at right angles each
    with pytest.raises(UserError, match="not orthonormal"):
        Basis(torch.zeros(12544), wide).require_orthonormal()


# --- adversarial training --------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", ["pgd", "trades"])
def test_a_process_attacks_its_rows_as_one_process_does(adversarial, monkeypatch):
    """In double precision, where no sign of a gradient is left to rounding."""
    torch.manual_seed(0)
    network = SmallRecognizer(16, 5).double().eval()
    x, label = torch.rand(8, 1, 16, 16).double() * 2 - 1, torch.arange(8) % 5
    config = replace(PRESETS["demo"], adversarial=adversarial)

    def attack(rank, world):
        monkeypatch.setattr("shared.processes.rank", lambda: rank)
        monkeypatch.setattr("shared.processes.world", lambda: world)
        rows, generator = slice(rank * 8 // world, (rank + 1) * 8 // world), torch.Generator().manual_seed(1)
        return attack_training_batch(network, x[rows], label[rows], config, cosine_logits, generator)

    whole = attack(0, 1)
    assert (whole - x).abs().max() <= config.adversarial_eps + 1e-12
    assert (whole - x).abs().mean() > config.adversarial_eps / 2
    torch.testing.assert_close(torch.cat([attack(0, 2), attack(1, 2)]), whole, rtol=0, atol=1e-12)
