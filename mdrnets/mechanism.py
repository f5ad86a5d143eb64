"""Does the memory do what it is for? Interventions on trained networks, and what the losses speak of,
measured."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.losses import inco2
from mdrnets.memory import DMM, perplexity
from mdrnets.model import MDRNet, composite
from mdrnets.parser import parts_on_grid
from mdrnets.protocol import psnr_of, to_bytes

Batch = dict[str, Tensor]


@contextmanager
def memory_replaced(dmm: DMM, memory: Tensor) -> Iterator[None]:
    """Within the block the memory (K, N, C) is another one."""
    before = dmm.memory.detach().clone()
    with torch.no_grad():
        dmm.memory.copy_(memory)
        try:
            yield
        finally:
            dmm.memory.copy_(before)


def hole_psnr(net: MDRNet, batch: Batch) -> float:
    """Mean PSNR over the corrupted pixels, dB."""
    x, m = batch["image"], batch["mask"]
    square = (to_bytes(net(x, m)["output"]) - to_bytes(x)).square() * m
    return psnr_of(square.sum((1, 2, 3)) / (3 * m.sum((1, 2, 3)).clamp_min(1))).mean().item()


@torch.no_grad()
def interventions(net: MDRNet, batch: Batch, seed: int = 0) -> dict[str, float]:
    """What happens when the disentangled memory of a trained network is tampered with.

    `inside/elsewhere`: how much more the refined picture changes in the pixels of a part than in the others
    when that part's block is overwritten with random slots, mean over the parts that occur. `rotation cost`:
    hole PSNR lost when every part reads its neighbour's block, dB. `permutation change`: largest change when
    the slots inside each block are reordered. `perplexity`: effective number of slots in use per block, mean.
    """
    dmm, x, m = net.refine.dmm, batch["image"], batch["mask"]
    memory, rng = dmm.memory.detach().clone(), torch.Generator().manual_seed(seed)
    before = net(x, m)
    part = before["parsing"].argmax(1, keepdim=True).float()
    part = F.interpolate(part, x.shape[-2:], mode="nearest")
    inside, elsewhere = [], []
    for k in range(dmm.blocks):
        here = (part == k).expand_as(x)
        if here.any() and not here.all():
            noise = torch.randn(memory[k].shape, generator=rng).to(memory)
            changed = memory.clone()
            changed[k] = F.normalize(noise, dim=-1)
            with memory_replaced(dmm, changed):
                change = (net(x, m)["refined"] - before["refined"]).abs()
            inside.append(change[here].mean().item())
            elsewhere.append(change[~here].mean().item())
    with memory_replaced(dmm, memory.roll(1, 0)):
        rotated = hole_psnr(net, batch)
    order = torch.randperm(dmm.slots, generator=rng)
    with memory_replaced(dmm, memory[:, order]):
        permuted = (net(x, m)["output"] - before["output"]).abs().max().item()
    return {
        "inside/elsewhere": sum(inside) / max(sum(elsewhere), 1e-12),
        "rotation cost": hole_psnr(net, batch) - rotated,
        "permutation change": permuted,
        "perplexity": perplexity(dmm.usage).mean().item(),
    }


@torch.no_grad()
def repair(net: MDRNet, batch: Batch) -> dict[str, float]:
    """On corrupted cells: the cosine of query and of what is read (r) to the query of the undamaged picture
    (q*)."""
    x, m, dmm = batch["image"], batch["mask"], net.refine.dmm
    cells = (x.shape[-2] // net.stride, x.shape[-1] // net.stride)
    out = net(x, m)
    q = dmm.queries(net.refine.features(out["coarse_comp"], m, out["parsing"]))
    w = dmm.weights(q, dmm.shares(out["parsing"]))
    read = F.normalize(w.flatten(2) @ dmm.slots_normalised().flatten(0, 1), dim=-1)
    truth = parts_on_grid(batch["parts"].clamp_min(0), out["parsing"].shape[1], cells)
    clean = dmm.queries(net.refine.features(x, torch.zeros_like(m), truth))
    corrupted = F.adaptive_max_pool2d(m, cells).flatten(1) > 0.5
    return {
        "cos(q, q*)": (q * clean).sum(-1)[corrupted].mean().item(),
        "cos(r, q*)": (read * clean).sum(-1)[corrupted].mean().item(),
    }


@torch.no_grad()
def similarity_gaps(net: MDRNet, psi: nn.Module, batch: Batch) -> dict[str, float]:
    """What InCo2 measures, on composites, with all cells: the inter and the intra gap."""
    x, m = batch["image"], batch["mask"]
    comp = composite(x, net(x, m)["refined"], m)
    inter, intra = inco2(psi(comp)[-1], psi(x)[-1], m, samples=None)
    return {"inter gap": inter.item(), "intra gap": intra.item()}


def usage_table(dmm: DMM, parts: tuple[str, ...]) -> list[list]:
    """For every block: part, effective number of slots, share of the most used slot."""
    names = parts if dmm.blocks == len(parts) else ("all",)
    effective, top = (
        perplexity(dmm.usage),
        (dmm.usage / dmm.usage.sum(1, keepdim=True).clamp_min(1e-12)).max(1).values,
    )
    return [[n, e.item(), t.item()] for n, e, t in zip(names, effective, top, strict=True)]
