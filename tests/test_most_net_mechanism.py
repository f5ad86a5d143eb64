"""MOST-Net: what is measured and shown of a memory, and the claims that rest on it."""

import pytest
import torch
import torch.nn.functional as F

from most_net import claims, mechanism
from most_net.baselines import neighbour_patches
from most_net.data import simple_pairs
from most_net.memory import usage_perplexity
from most_net.metrics import grey_bytes, ssim
from most_net.model import Architecture, MostNet

SMALL = Architecture(base=4, downs=1, kernel=3, dilations=(1,), decoder_blocks=1, slots=8)


@pytest.fixture
def net() -> MostNet:
    torch.manual_seed(0)
    net = MostNet(SMALL).eval()
    net.memories[0].values.mul_(20)  # of the size of features, as a trained memory has them
    return net


@torch.inference_mode()
def test_measurements_are_what_they_are_called(net):
    pairs = simple_pairs(3, 0, 16)
    found = mechanism.measure(net, pairs, 16, window=7)
    photos, sketches = mechanism.padded(pairs, 16)
    out = net(photos)
    true = net.sketch_encoder(sketches)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(out["retrieved"], true).mean()))
    hits = torch.tensor([float((out["slot"] == slot).sum()) for slot in range(8)])
    assert found["slots_used"] == pytest.approx(usage_perplexity(hits))
    labels = pairs.parts[:, ::2, ::2]
    kept = sum(int(labels[out["slot"] == slot].bincount().max()) for slot in out["slot"].unique())
    assert found["purity"] == pytest.approx(kept / labels.numel())
    memory, truth = net.memories[0], pairs.sketches.float()

    def similarity() -> float:
        return float(ssim(truth, grey_bytes(net.sketch(photos) / 2 + 0.5), window=7).mean())

    assert found["ssim"] == pytest.approx(similarity(), abs=1e-3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whole = memory.values.clone()
    memory.values.copy_(whole[order])
    assert found["ssim_permuted"] == pytest.approx(similarity(), abs=1e-3)
    memory.values.zero_()
    assert found["ssim_zero"] == pytest.approx(similarity(), abs=1e-3)
    assert len({round(found[name], 3) for name in ("ssim", "ssim_permuted", "ssim_zero")}) == 3


def test_the_atlas_shows_the_used_slots_and_their_nearest_patches(net, monkeypatch):
    sheets = []
    monkeypatch.setattr(mechanism, "image_grid", lambda *arguments, **options: sheets.append(arguments))
    pairs = simple_pairs(4, 0, 16)
    mechanism.atlas(net, pairs, 16, slots=3, nearest=2)
    tiles, columns, rows, labels = sheets[0]
    assert labels == ["slot", "photo", "sketch", "photo", "sketch"] and columns == 5
    photos, sketches = mechanism.padded(pairs, 16)
    with torch.inference_mode():
        out = net(photos)
    hits = torch.bincount(out["slot"].flatten(), minlength=8)
    assert sorted(hits[[int(row) for row in rows]]) == sorted(hits.topk(3).values)
    scores = out["scores"].view(4, 8, 8, 8)  # (photo, row, column, slot)
    for row, number in enumerate(map(int, rows)):
        best = sorted(range(4), key=lambda i: -float(scores[i, ..., number].max()))[:2]
        for place, image in enumerate(best):
            y, x = divmod(int(scores[image, ..., number].argmax()), 8)
            for kind, images in enumerate((photos, sketches)):
                frame = F.pad(images, (4,) * 4, mode="replicate")[image] / 2 + 0.5
                tile = tiles[5 * row + 1 + 2 * place + kind]
                expected = frame[:, 2 * y + 1 : 2 * y + 9, 2 * x + 1 : 2 * x + 9]
                assert torch.allclose(tile, expected.expand(3, -1, -1), atol=1e-6)


def test_every_slot_has_a_colour_of_its_own_on_the_map(net):
    assert len(mechanism.slot_colours(64).unique(dim=0)) == 64
    photos, _ = mechanism.padded(simple_pairs(1, 0, 16), 16)
    with torch.inference_mode():
        slot = net(photos)["slot"][0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = mechanism.slot_colours(8)[slot].permute(2, 0, 1)
    assert torch.equal(mechanism.slot_map(net, photos)[0], expected)


def test_neighbour_patches_are_combined_as_the_photo_is():
    """A photo between two known ones is drawn between their sketches, with the same shares."""
    generator = torch.Generator().manual_seed(0)
    photos, sketches = (torch.rand(2, n, 36, 30, generator=generator) for n in (3, 1))
    share = torch.tensor([0.4, 0.6])[:, None, None, None]
    got = neighbour_patches((share * photos).sum(0, keepdim=True), photos, sketches, patch=12, neighbours=2)
    assert torch.allclose(got, (share * sketches).sum(0, keepdim=True), atol=1e-3)


# --- claims -------------------------------------------------------------------------------------------

KNOWN = {"cosine": 0.96, "ssim": 0.6, "ssim_permuted": 0.45, "ssim_zero": 0.49}
KNOWN |= {"slots_used": 40.0, "purity": 0.72}


@pytest.mark.parametrize(
    "variant, changes, expected",
    [
        ("most", {}, [True] * 4),
        ("most", {"cosine": 0.94}, [False, True, True, True]),
        ("static", {"cosine": 0.80}, [False, True, True, True]),
        ("most", {"ssim_permuted": 0.55}, [True, False, True, True]),
        ("most", {"ssim_zero": 0.51}, [True, False, True, True]),
        ("most", {"slots_used": 31.0}, [True, True, False, True]),
        ("most", {"purity": 0.69}, [True, True, False, True]),
        ("most", {"SSIM": 0.594}, [True, True, True, False]),
    ],
)
def test_claims_of_the_memory_are_judged_by_their_margins(variant, changes, expected):
    memories = {"most-8-0": KNOWN, "static-8-0": KNOWN | {"cosine": 0.5}, "most-32-0": KNOWN | {"cosine": 0}}
    memories[f"{variant}-8-0"] = memories[f"{variant}-8-0"] | changes
    scores = {
        f"{name}-8-0": {"SSIM": value, "L1": 0.2} for name, value in (("most", 0.6), ("mispaired", 0.59))
    }
    scores["most-8-0"]["SSIM"] = changes.get("SSIM", 0.6)
    assert [claim.holds for claim in claims.judge((8, 32), scores, memories, {})] == expected


@pytest.mark.parametrize("own, taught, expected", [(1.0, 0.7, [True, True]), (0.0, 0.6, [False, False])])
def test_claims_of_the_artists(own, taught, expected):
    artists = {"own outline": 1.0, "own pencil": own}
    artists |= {"new artist, best old memory": 0.65, "new artist, taught": taught}
    assert [claim.holds for claim in claims.judge((8,), {}, {}, artists)] == expected
