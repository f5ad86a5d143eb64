"""AnyFace's objective: closed forms, slow references, gradients, the official switches; Ranger."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from anyface import losses
from anyface.data import build_cache, open_faces
from anyface.effects import code_effects
from anyface.losses import BEHAVIOUR, code_distance, diverse_triplet
from anyface.model import Stream
from anyface.parts import small_clip, small_generator
from anyface.ranger import Ranger
from anyface.stages import Constants, Stage
from anyface.train import PRESETS, stream_learner

B, L, D = 10, 4, 6


@pytest.fixture
def codes():
    torch.manual_seed(0)
    w, w_t, w_other = torch.randn(3, B, L, D)
    return w, w_t.requires_grad_(), w_other.requires_grad_(), torch.randn(1, L, D)


def d(a, b):
    """One pair of codes, layer by layer."""
    return sum(1 - F.cosine_similarity(a[i], b[i], dim=0) for i in range(L))


def test_code_distance_by_its_words(codes):
    w, w_t, _, mean = codes
    assert torch.allclose(code_distance(w, w_t)[3], d(w[3], w_t[3]), atol=1e-5)
    assert torch.allclose(code_distance(w, mean)[2], d(w[2], mean[0]), atol=1e-5)
    assert code_distance(w, w).abs().max() < 1e-5
    assert torch.allclose(code_distance(w, -w), torch.full((B,), 2.0 * L), atol=1e-5)


def test_triplet_with_paired_negatives_by_loops(codes):
    w, w_t, w_other, mean = codes
    terms = []
    for b in range(B):
        positive = d(w[b], w_t[b]) / d(w_t[b], mean[0])
        negative = d(w[b], w_other[b]) / d(w_other[b], mean[0])
        terms.append(torch.clamp(positive - negative + 0.2, min=0))
    assert torch.allclose(diverse_triplet(*codes), sum(terms) / B, atol=1e-5)


def test_triplet_with_all_negatives_by_loops(codes):
    w, w_t, _, mean = codes
    same = torch.zeros(B, B, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    terms = []
    for b in range(B):
        for j in range(B):
            if j != b and not same[b, j]:
                positive = d(w[b], w_t[b]) / d(w_t[b], mean[0])
                negative = d(w[b], w_t[j]) / d(w_t[j], mean[0])
                terms.append(torch.clamp(positive - negative + 0.2, min=0))
    found = diverse_triplet(w, w_t, None, mean, negatives="all", same=same)
    assert torch.allclose(found, sum(terms) / len(terms), atol=1e-5)
    assert diverse_triplet(w[:1], w_t[:1], None, mean, negatives="all") == 0


def test_triplet_as_released_by_loops(codes):
    """The first eight rows j as negatives of every anchor b, with b's denominator."""
    w, w_t, w_other, mean = codes
    terms = []
    for b in range(B):
        positive = d(w[b], w_t[b]) / d(w_t[b], mean[0])
        negative = sum(d(w[b], w_other[j]) / d(w_other[b], mean[0]) for j in range(8)) / 8
        terms.append(torch.clamp(positive - negative + 0.2, min=0))
    assert torch.allclose(diverse_triplet(*codes, negatives="official"), sum(terms) / B, atol=1e-5)
    with pytest.raises(ValueError, match="at least 8"):
        diverse_triplet(w[:7], w_t[:7], w_other[:7], mean, negatives="official")
    with pytest.raises(ValueError, match="mismatched"):
        diverse_triplet(w, w_t, None, mean)


def test_triplet_pulls_to_the_face_and_away_from_the_mean(codes):
    w, w_t, w_other, mean = codes
    diverse_triplet(w, w_t, w_other, mean, margin=5.0).backward()
    assert w_t.grad.abs().sum() > 0 and w_other.grad.abs().sum() > 0
    moved = (w_t - 1e-2 * w_t.grad / w_t.grad.norm()).detach()
    before = code_distance(w, w_t) / code_distance(w_t, mean)
    assert (code_distance(w, moved) / code_distance(moved, mean)).mean() < before.mean()
    # Directions alone: the length of a code changes nothing.
    assert torch.allclose(diverse_triplet(w, 3 * w_t, w_other, mean), diverse_triplet(w, w_t, w_other, mean))


def test_distillation_is_both_divergences_and_reaches_both_sides():
    phi_t, phi_i = torch.randn(2, 5, 8).unbind()
    phi_t.requires_grad_(), phi_i.requires_grad_()
    found = losses.cross_modal_distillation(phi_t, phi_i)
    p, q = phi_t.log_softmax(1), phi_i.log_softmax(1)
    both = F.kl_div(p, q.exp(), reduction="batchmean") + F.kl_div(q, p.exp(), reduction="batchmean")
    assert torch.allclose(found, both / 2, atol=1e-6)
    found.backward()
    assert phi_t.grad.abs().sum() > 0 and phi_i.grad.abs().sum() > 0
    assert losses.cross_modal_distillation(phi_t, phi_t).abs() < 1e-7


def test_clip_loss_takes_own_pairs_or_all():
    image, text = torch.randn(2, 4, 8).unbind()
    cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    assert torch.allclose(losses.clip_loss(image, text), 1 - cosine.diag().mean(), atol=1e-6)
    assert torch.allclose(losses.clip_loss(image, text, pairs="official"), 1 - cosine.mean(), atol=1e-6)
    half = losses.clip_loss(image, text, torch.tensor(math.log(50.0)))
    assert torch.allclose(half, 1 - cosine.diag().mean() / 2, atol=1e-6)
    assert losses.clip_loss(image, image).abs() < 1e-6


def test_small_terms():
    a, b = torch.randn(2, 3, L, D).unbind()
    assert torch.allclose(losses.code_mse(a, b), ((a - b) ** 2).mean())
    assert torch.allclose(losses.norm_loss(2 * a, a), (a.norm(dim=-1) ** 2).mean())
    assert torch.allclose(losses.reconstruction(a, b), (a - b).abs().mean())
    assert torch.allclose(losses.cycle(a, b), (a - b).abs().mean())
    mean, log_variance = torch.randn(2, 5, 7).unbind()
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)
    ).mean()
    assert torch.allclose(losses.condition_kl(mean, log_variance), wanted, atol=1e-5)


def test_relation_by_loops():
    source, target = torch.randn(2, 4, 6).unbind()

    def rows(x):
        return torch.stack(
            [
                torch.stack([F.cosine_similarity(x[i], x[j], dim=0) for j in range(4) if j != i])
                for i in range(4)
            ]
        )

    wanted = 1000 * nn.KLDivLoss(reduction="mean")(rows(source).log_softmax(1), rows(target).softmax(1))
    assert torch.allclose(losses.relation(source, target), wanted, atol=1e-4)
    assert losses.relation(source, source).abs() < 1e-4


class Embedder(nn.Module):
    def embed(self, x):
        return x.flatten(1)[:, :5]


def test_identity_loss_holds_the_source_constant():
    made, source = torch.randn(2, 3, 3, 4, 4, requires_grad=True).unbind()
    made, source = made.detach().requires_grad_(), source.detach().requires_grad_()
    found = losses.identity_loss(Embedder(), made, source)
    wanted = (1 - F.cosine_similarity(made.flatten(1)[:, :5], source.flatten(1)[:, :5])).mean()
    assert torch.allclose(found, wanted)
    found.backward()
    assert made.grad is not None and source.grad is None


def test_picture_losses_reach_the_stream_through_frozen_networks():
    """L_CLIP and L_rec are not constants: gradients arrive at every trained weight, none at G or CLIP."""
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    generator = small_generator(32)
    for part in (clip, generator):
        part.eval().requires_grad_(False)
    stream = Stream(64, (2,), 8, 64, layers=1, heads=2, feedforward=64, lr_mul=1.0)
    from anyface.clip import image_features, text_features

    features = text_features(clip, tokenizer(["red hair", "a hat"]))
    w_t, _ = stream(features)
    picture = generator.synthesis(w_t)
    total = losses.clip_loss(image_features(clip, picture), features) + losses.reconstruction(
        picture, torch.zeros_like(picture)
    )
    total.backward()
    silent = [name for name, p in stream.named_parameters() if p.grad is None]
    assert not silent
    moved = {name for name, p in stream.named_parameters() if p.grad.abs().sum() > 0}
    assert {"mapping.0.weight", "mapping.1.weight", "transformer_encoder.layers.0.linear1.weight"} <= moved
    assert all(p.grad is None for part in (clip, generator) for p in part.parameters())


def test_the_triplet_keeps_captions_from_the_mean_face_and_mse_does_not():
    """The demo's first two claims in short: they live in code space, where untrained networks are enough."""
    torch.manual_seed(0)
    (clip, tokenizer), generator, steps = small_clip(), small_generator(), 100
    for network in (clip, generator):
        network.eval().requires_grad_(False)
    config = replace(
        PRESETS["demo"], train_faces=150, test_faces=60, steps=steps, one_stream=True, clip_loss=False,
        device="cpu",
    )  # fmt: skip
    known = (clip, tokenizer, generator, "correct", torch.device("cpu"))
    train, test = (build_cache(open_faces(config, part, generator), *known) for part in ("train", "test"))
    found = {}
    for name in ("full", "no-dt"):
        made = Constants(clip, tokenizer, generator)
        learner = stream_learner(Stage(name, 0, steps), config, Accelerator(cpu=True), train, made, 0)
        for step in range(steps):
            for group in learner.optimiser.param_groups:
                group["lr"] = 1e-3 * learner.schedule(step / steps)
            learner.optimiser.zero_grad(set_to_none=True)
            sum(learner.terms(step).values()).backward()
            learner.optimiser.step()
        pair = (learner.models["text"], learner.models["image"])
        found[name] = code_effects(pair, test, train.mean, clip, False)
    assert found["full"]["collapse index"] > 3 * found["no-dt"]["collapse index"]
    assert found["full"]["spread"] > 2 * found["no-dt"]["spread"]


def test_presets_differ_where_the_release_does():
    paper, official = BEHAVIOUR["paper"], BEHAVIOUR["official"]
    assert all(getattr(paper, name) != getattr(official, name) for name in vars(paper))
    assert paper.through_generator and not official.train_transformers and official.norm_weight == 0


# --- Ranger ---------------------------------------------------------------------------------------


def plain_ranger(weight, gradients, lr, k=6, alpha=0.5, betas=(0.95, 0.999), eps=1e-5):
    """Rectified Adam on centred gradients with lookahead, one formula after the other."""
    m, v, slow = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    longest = 2 / (1 - betas[1]) - 1
    for t, g in enumerate(gradients, 1):
        g = g - g.mean(1, keepdim=True)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        rho = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        step = lr * m / (1 - betas[0] ** t)
        if rho > 5:
            rectified = math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
            step = step * rectified * math.sqrt(1 - betas[1] ** t) / (v.sqrt() + eps)
        weight = weight - step
        if t % k == 0:
            slow = slow + alpha * (weight - slow)
            weight = slow.clone()
    return weight


def test_ranger_by_its_formulas():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4), torch.randn(14, 3, 4)
    weight = nn.Parameter(start.clone())
    optimiser = Ranger([weight], lr=0.05)
    for g in gradients:
        weight.grad = g.clone()
        optimiser.step()
    assert torch.allclose(weight, plain_ranger(start, gradients, 0.05), atol=1e-5)


def test_ranger_continues_from_its_state():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4), torch.randn(20, 3, 4)

    def run(weight, optimiser, some):
        for g in some:
            weight.grad = g.clone()
            optimiser.step()

    whole = nn.Parameter(start.clone())
    run(whole, Ranger([whole], lr=0.05), gradients)
    first = nn.Parameter(start.clone())
    before = Ranger([first], lr=0.05)
    run(first, before, gradients[:8])
    second = nn.Parameter(first.detach().clone())
    after = Ranger([second], lr=0.05)
    after.load_state_dict(before.state_dict())
    run(second, after, gradients[8:])
    assert torch.equal(whole, second)
