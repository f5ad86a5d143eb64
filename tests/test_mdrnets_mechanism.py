"""MDRNets: interventions on the memory and what is measured of it, on networks whose parsing is given."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.mechanism import hole_psnr, interventions, repair, similarity_gaps, usage_table
from mdrnets.model import SIZES, CoarseNet, MDRNet, RefineNet


class Halves(nn.Module):
    """A parser to which the left half is part 0 and the right half part 1."""

    def forward(self, image: Tensor, cells: tuple[int, int]) -> Tensor:
        right = (torch.arange(cells[1]) >= cells[1] // 2).expand(len(image), *cells)
        return F.one_hot(right.long(), 2).movedim(-1, 1).float()


def halved(**options) -> tuple[MDRNet, dict[str, Tensor]]:
    torch.manual_seed(0)
    size = SIZES["unit"]
    net = MDRNet(CoarseNet(size), Halves(), RefineNet(size, 2, mrem=False, **options), size.stride).eval()
    nn.init.normal_(net.refine.decoder.last.weight, 0, 0.3)
    nn.init.normal_(net.refine.dmm.fuse.weight, 0, 0.5)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 4:28, 2:30] = 1
    parts = (torch.arange(32) >= 16).long().expand(2, 32, 32)
    return net, {"image": torch.rand(2, 3, 32, 32) * 2 - 1, "mask": mask, "parts": parts}


def test_tampering_is_seen_where_the_block_is_read():
    net, batch = halved()
    before = net.refine.dmm.memory.clone()
    with torch.no_grad():
        untouched = hole_psnr(net, batch)
        net.refine.dmm.memory.copy_(before.roll(1, 0))
        rotated = hole_psnr(net, batch)
        net.refine.dmm.memory.copy_(before)
    found = interventions(net, batch)
    assert found["inside/elsewhere"] > 5 and found["permutation change"] < 1e-4
    assert found["rotation cost"] == untouched - rotated != 0
    assert torch.equal(net.refine.dmm.memory, before)
    with torch.no_grad():
        net.refine.dmm.fuse.weight[:, 8:] = 0  # a memory that is not listened to
    deaf = interventions(net, batch)
    assert deaf["inside/elsewhere"] == deaf["rotation cost"] == deaf["permutation change"] == 0


def test_repair_compares_with_the_query_of_the_undamaged_picture():
    net, batch = halved(update="ema")
    dmm = net.refine.dmm
    with torch.no_grad():
        clean = net.refine.features(batch["image"], 0 * batch["mask"], torch.zeros(2, 2, 16, 16))
        q = dmm.queries(clean).view(2, 16, 16, 8)
        dmm.memory[0], dmm.memory[1] = q[:, :, :8].mean((0, 1, 2)), q[:, :, 8:].mean((0, 1, 2))
        slots = dmm.slots_normalised()[:, 0]  # all slots of a part are alike: what is read is known
        hole = F.max_pool2d(batch["mask"], 2)[:, 0] > 0.5
        wanted = torch.cat((q[:, :, :8] @ slots[0], q[:, :, 8:] @ slots[1]), 2)[hole].mean()
    found = repair(net, batch)
    assert abs(found["cos(r, q*)"] - wanted.item()) < 1e-5
    assert found["cos(q, q*)"] < 0.999
    with torch.no_grad():  # nothing was damaged: the query is the undamaged one
        net.coarse.forward = lambda x, m: batch["image"]
        net.refine.encoder.stem[0].weight[:, 3] = 0
    assert abs(repair(net, batch)["cos(q, q*)"] - 1) < 1e-5


def test_gaps_are_those_of_the_composite():
    net, batch = halved()
    net.refine.forward = lambda comp, *rest: batch["image"]
    gaps = similarity_gaps(net, lambda x: [F.avg_pool2d(x, 4)], batch)
    assert gaps == {"inter gap": 0, "intra gap": 0}
    net.refine.forward = lambda comp, *rest: batch["image"].flip(-1)
    assert min(similarity_gaps(net, lambda x: [F.avg_pool2d(x, 4)], batch).values()) > 0.01


def test_usage_names_parts_or_all():
    dmm = halved()[0].refine.dmm
    dmm.usage.copy_(torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]))
    rows = usage_table(dmm, ("left", "right"))
    assert [[name, round(used, 4), round(top, 4)] for name, used, top in rows] == [
        ["left", 2, 0.5],
        ["right", 1, 1],
    ]
    shared = halved(memory="shared")[0].refine.dmm
    assert [row[0] for row in usage_table(shared, ("left", "right"))] == ["all"]
