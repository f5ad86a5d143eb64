"""MDRNets: disentangled memory and masked attention against slow references."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mdrnets import memory
from mdrnets.memory import DMM, perplexity
from mdrnets.model import composite
from mdrnets.mrem import MREM, hole_cells

# --- disentangled memory ----------------------------------------------------------------------------


def slow_read(dmm: DMM, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The equations of the class docstring as loops."""
    memory = F.normalize(dmm.memory, dim=-1)
    r = torch.zeros_like(q)
    for b in range(len(q)):
        for at in range(q.shape[1]):
            blocks = range(dmm.blocks) if dmm.routing == "soft" else [int(p[b, at].argmax())]
            for k in blocks:
                scores = torch.stack([(q[b, at] * memory[k, i]).sum() / dmm.tau for i in range(dmm.slots)])
                w = torch.exp(scores - scores.max())
                w = w / w.sum()
                if dmm.addressing == "shrink":
                    w = torch.where(w > dmm.shrink, w, 0.0)
                    w = w / w.sum()
                read = sum(w[i] * memory[k, i] for i in range(dmm.slots))
                share = p[b, at, k] if dmm.routing == "soft" and dmm.blocks > 1 else 1.0
                r[b, at] += share * read
    return r


@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("addressing", ["dense", "shrink"])
def test_reading_equals_the_loops(routing, addressing):
    torch.manual_seed(0)
    dmm = DMM(6, 3, 5, routing=routing, addressing=addressing, shrink=0.1).eval()
    features, p = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 4, 5).mul(3).softmax(1)
    with torch.no_grad():
        got = dmm(features, p)
        r = slow_read(dmm, dmm.queries(features), p.flatten(2).transpose(1, 2))
        wanted = features + dmm.fuse(torch.cat((features, r.transpose(1, 2).view_as(features)), 1))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_hard_routing_over_many_tiles_equals_soft_with_one_hot_parsing():
    torch.manual_seed(0)
    soft, hard = DMM(8, 5, 4).eval(), DMM(8, 5, 4, routing="hard").eval()
    hard.load_state_dict(soft.state_dict())
    features = torch.randn(3, 8, 20, 20)
    classes = torch.randint(0, 4, (3, 20, 20))  # the last block is never asked
    p = F.one_hot(classes, 5).movedim(-1, 1).float()
    with torch.no_grad():
        assert torch.allclose(soft(features, p), hard(features, p), atol=1e-5)


def test_hard_routing_has_the_gradients_of_soft_routing_with_one_hot_parsing():
    torch.manual_seed(0)
    soft, hard = DMM(8, 3, 4), DMM(8, 3, 4, routing="hard")
    hard.load_state_dict(soft.state_dict())
    features = torch.randn(2, 8, 6, 6)
    p = F.one_hot(torch.randint(0, 3, (2, 6, 6)), 3).movedim(-1, 1).float()
    target = torch.randn(2, 8, 6, 6)
    for dmm in (soft, hard):
        (dmm(features, p) * target).sum().backward()
    assert torch.allclose(soft.memory.grad, hard.memory.grad, atol=1e-4)
    assert torch.allclose(soft.query.weight.grad, hard.query.weight.grad, atol=1e-4)
    soft.count_reads()
    hard.count_reads()
    assert torch.allclose(soft.usage, hard.usage, atol=1e-6)
    assert torch.allclose(soft.usage.sum(1), torch.full((3,), 0.01))  # from nothing, by a hundredth a step


def test_shared_memory_has_one_softmax_over_all_slots():
    torch.manual_seed(0)
    dmm = DMM(6, 1, 12).eval()
    q = F.normalize(torch.randn(1, 9, 6), dim=-1)
    w = dmm.weights(q, torch.rand(1, 9, 1))
    assert torch.allclose(w.sum((2, 3)), torch.ones(1, 9), atol=1e-6)


def test_gradient_reaches_query_encoder_and_only_blocks_that_occur():
    torch.manual_seed(0)
    dmm = DMM(6, 3, 4)
    features = torch.randn(1, 6, 4, 4, requires_grad=True)
    p = torch.zeros(1, 3, 4, 4)
    p[:, 0, :2], p[:, 2, 2:] = 1, 1
    dmm(features, p).square().sum().backward()
    assert features.grad.abs().sum() > 0 and dmm.query.weight.grad.abs().sum() > 0
    assert dmm.memory.grad[0].abs().sum() > 0 and dmm.memory.grad[2].abs().sum() > 0
    assert dmm.memory.grad[1].abs().sum() == 0


def test_ema_memory_takes_no_gradient_but_its_reader_does():
    torch.manual_seed(0)
    dmm = DMM(6, 2, 4, update="ema")
    dmm(torch.randn(1, 6, 4, 4), torch.full((1, 2, 4, 4), 0.5)).square().sum().backward()
    assert "memory" not in dict(dmm.named_parameters())
    assert dmm.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weighted", [False, True])
def test_writing_equals_the_loops(weighted):
    torch.manual_seed(0)
    dmm = DMM(5, 3, 4, update="ema", decay=0.9, weighted_write=weighted)
    q = F.normalize(torch.randn(200, 5), dim=-1)
    block = torch.randint(0, 2, (200,))  # nothing of block 2
    before = dmm.memory.clone()
    wanted, age = before.clone(), dmm.age.clone() + 1
    slot = [int((before[k] @ v).argmax()) for k, v in zip(block.tolist(), q, strict=True)]
    for k in range(3):
        for i in range(4):
            mine = [v for v, b, s in zip(q, block.tolist(), slot, strict=True) if (b, s) == (k, i)]
            if mine:
                similarity = torch.stack([(v * before[k, i]).sum() for v in mine])
                alpha = (similarity - similarity.max()).exp() if weighted else torch.ones(len(mine))
                total = sum(a * v for a, v in zip(alpha, mine, strict=True))
                wanted[k, i] = F.normalize(0.9 * before[k, i] + 0.1 * F.normalize(total, dim=0), dim=0)
                age[k, i] = 0
    dmm.write(q, block)
    assert torch.allclose(dmm.memory, wanted, atol=1e-5)
    assert torch.equal(dmm.age, age)
    assert torch.equal(dmm.memory[2], before[2])


def test_weighted_writes_of_two_processes_are_those_of_one(monkeypatch):
    """Two threads stand for the processes: they meet in every reduction, each with every other position."""
    torch.manual_seed(0)
    q, block = F.normalize(torch.randn(60, 5), dim=-1), torch.randint(0, 3, (60,))
    whole = DMM(5, 3, 4, update="ema", decay=0.5, weighted_write=True)
    halves = [copy.deepcopy(whole) for _ in range(2)]
    whole.write(q, block)
    meeting, given = threading.Barrier(2, timeout=30), {}

    def reduced(value, operation=dist.ReduceOp.SUM):
        given[threading.get_ident()] = value
        meeting.wait()
        both = torch.stack(list(given.values()))
        meeting.wait()
        return both.sum(0) if operation == dist.ReduceOp.SUM else both.amax(0)

    monkeypatch.setattr(memory, "_reduced", reduced)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: halves[i].write(q[i::2], block[i::2]), range(2)))
    for half in halves:
        assert torch.allclose(half.memory, whole.memory, atol=1e-6)
        assert torch.equal(half.age, whole.age)


def test_slots_that_are_never_used_start_again_from_their_own_part():
    torch.manual_seed(0)
    dmm = DMM(4, 2, 3, update="ema", revive_after=2)
    q = F.normalize(torch.tensor([[1.0, 0, 0, 0]] * 5 + [[0, 1.0, 0, 0]] * 5), dim=-1)
    block = torch.tensor([0] * 5 + [1] * 5)
    for step in range(3):
        dmm.write(q, block, torch.Generator().manual_seed(step))
    for k, axis in ((0, 0), (1, 1)):
        revived = dmm.memory[k][dmm.memory[k, :, axis] > 0.999]
        assert len(revived) == 2  # both unused slots; the used one has only moved towards it
        assert (dmm.age[k] == 0).all()


def test_perplexity_counts_slots():
    usage = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert torch.allclose(perplexity(usage), torch.tensor([4.0, 1.0, 0.0, 2.0]), atol=1e-5)


# --- mask-region enhanced module --------------------------------------------------------------------


def holes_of(kind: str) -> torch.Tensor:
    h = torch.zeros(3, 1, 6, 7)
    if kind == "mixed":
        h[0, :, 1:4, 2:6], h[1, :, 0, 0] = 1, 1  # and none in the third
    elif kind == "full in one":
        h[0], h[1, :, 2:5] = 1, 1
    elif kind == "full":
        h[:] = 1
    return h


@pytest.mark.parametrize("kind", ["mixed", "full in one", "full", "none"])
def test_attention_on_hole_rows_equals_the_dense_form(kind):
    torch.manual_seed(0)
    mrem = MREM(12, 4)
    features, h = torch.randn(3, 12, 6, 7), holes_of(kind)
    fast, dense = mrem(features, h), mrem.dense(features, h)[0]
    assert (fast - dense).abs().max() < 1e-4
    assert fast.isfinite().all()
    kept = (h < 0.5).expand_as(features)
    assert torch.equal(fast[kept], features[kept])


def test_gradients_of_both_forms_agree():
    torch.manual_seed(0)
    mrem = MREM(12, 4)
    target, h = torch.randn(3, 12, 6, 7), holes_of("full in one")
    grads = []
    for form in (mrem.forward, lambda f, h: mrem.dense(f, h)[0]):
        mrem.zero_grad()
        features = torch.randn(3, 12, 6, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (form(features, h) * target).sum().backward()
        grads.append([features.grad, *(p.grad.clone() for p in mrem.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a, b, atol=1e-4)


def test_both_forms_agree_at_paper_scale():
    torch.manual_seed(0)
    mrem = MREM(256, 128)
    features, h = torch.randn(1, 256, 32, 32), torch.zeros(1, 1, 32, 32)
    h[..., 5:20, 8:28] = 1
    with torch.no_grad():
        assert (mrem(features, h) - mrem.dense(features, h)[0]).abs().max() < 1e-4


def test_attention_weights_are_split_into_kept_and_corrupted():
    torch.manual_seed(0)
    mrem, h = MREM(12, 4), holes_of("mixed")
    _, inter, intra = mrem.dense(torch.randn(3, 12, 6, 7), h)
    corrupted = h.flatten(1) > 0.5
    for b in range(2):
        assert inter[b][:, corrupted[b]].abs().max() == 0
        assert intra[b][:, ~corrupted[b]].abs().max() == 0
        assert torch.allclose(inter[b].sum(-1), torch.ones(42), atol=1e-5)
        assert torch.allclose(intra[b].sum(-1), torch.ones(42), atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan(half):
    torch.manual_seed(0)
    mrem = MREM(12, 4).to(half)
    for kind in ("mixed", "full"):
        features, h = torch.randn(3, 12, 6, 7).to(half), holes_of(kind)
        assert mrem(features, h).isfinite().all()
        assert mrem.dense(features, h)[0].isfinite().all()


def test_hole_cells_take_any_corrupted_pixel():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 4] = 1
    assert hole_cells(mask, (2, 2)).flatten().tolist() == [0, 1, 0, 0]


def test_composite_takes_each_side():
    known, filled = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    assert torch.equal(composite(known, filled, mask), mask)
