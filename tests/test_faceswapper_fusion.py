"""FaceSwapper: the official post-processing against closed forms, and the blend into the photo."""

import pytest
import torch
from torch.nn import functional as F

from faceswapper import fusion


def points_98() -> torch.Tensor:
    """A face with contour on an ellipse and level brows, at 256 pixels."""
    points = torch.zeros(1, 98, 2)
    turn = torch.linspace(0, torch.pi, 33)
    points[0, :33] = torch.stack((128 - 60 * turn.cos(), 120 + 80 * turn.sin()), -1)
    points[0, 33:38] = torch.stack((torch.linspace(75, 115, 5), torch.full((5,), 100.0)), -1)
    points[0, 42:47] = torch.stack((torch.linspace(140, 180, 5), torch.full((5,), 100.0)), -1)
    return points


def test_the_hull_encloses_contour_and_lifted_brows():
    outside = fusion.outside_hull(points_98(), 256)[0, 0]
    assert outside[150, 128] == 0 and outside[70, 128] == 0 and outside[62, 66] == 0
    assert outside[50, 128] == 1 and outside[150, 60] == 1 and outside[210, 128] == 1
    half = fusion.outside_hull(points_98() / 2, 128)[0, 0]
    assert (half - outside[::2, ::2]).abs().mean() < 0.02


def test_the_forehead_is_the_masks_face_outside_the_hull():
    mask = torch.ones(1, 1, 256, 256)
    mask[..., 30:200, 68:188] = 0
    found = fusion.forehead(points_98(), mask)[0, 0]
    assert found[40, 128] == 1 and found[150, 128] == 0 and found[40, 20] == 0


def test_the_targets_forehead_stays_when_the_sources_is_covered():
    labels = torch.ones(2, 256, 256, dtype=torch.uint8)
    labels[:, :20] = 17
    labels[:, 20:25] = 18
    target = torch.zeros(2, 1, 256, 256)
    target[..., 30:60, 100:150] = 1  # 2 n = 3000
    bare, covered = target.clone(), target.clone()
    covered[..., 35:] = 0
    free = fusion.keep_map(labels, bare, target)
    assert (free[..., :20, :] == 0).all() and (free[..., 20:, :] == 1).all()
    kept = fusion.keep_map(labels, covered[:1], target)
    assert (kept[..., 30:60, 100:150] == 0).all() and (kept[..., 60:, :] == 1).all()
    small = torch.zeros_like(target)
    small[..., 30:40, 100:140] = 1  # 2 n = 800 < 1000
    assert (fusion.keep_map(labels, torch.zeros_like(small), small)[..., 20:, :] == 1).all()
    hats = fusion.keep_map(labels, bare, target, (fusion.HAIR, fusion.HAT))
    assert (hats[..., :25, :] == 0).all()


def official_erosion(x: torch.Tensor) -> torch.Tensor:
    """The official soft erosion, whose maximum is that of the batch."""
    axis = torch.arange(17.0)
    distance = ((axis[:, None] - 8) ** 2 + (axis - 8) ** 2).sqrt()
    kernel = distance.max() - distance
    kernel = (kernel / kernel.sum())[None, None]
    for _ in range(6):
        x = torch.min(x, F.conv2d(x, kernel, padding=8))
    x = F.conv2d(x, kernel, padding=8)
    high = x >= 0.9
    x[high] = 1
    x[~high] /= x[~high].max()
    return x


def test_soft_erosion_and_its_independence_of_the_batch():
    torch.manual_seed(0)
    blobs = F.interpolate(torch.rand(2, 1, 8, 8), (256, 256), mode="bilinear").gt(0.45).float()
    blobs[1] *= 0.5
    torch.testing.assert_close(fusion.soft_erosion(blobs, whole_batch=True), official_erosion(blobs.clone()))
    each = torch.cat([official_erosion(b[None].clone()) for b in blobs])
    torch.testing.assert_close(fusion.soft_erosion(blobs), each)
    ones = torch.ones(1, 1, 256, 256)
    target, swap = torch.zeros(1, 3, 256, 256), torch.ones(1, 3, 256, 256)
    fused = fusion.fuse(swap, target, ones)
    assert fused[0, 0, 128, 128] == 1 and fused[0, 0, 0, 0] < 0.5  # the frame is the target's


def test_feathering_falls_from_inside_to_the_edge():
    mask = torch.ones(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 0
    soft = fusion.feather(mask)[0, 0]
    assert soft[32, 32] == pytest.approx(1, abs=1e-5) and soft[15, 32] == 0 and 0 < soft[17, 32] < 1
    assert (soft[16:33, 32].diff() >= -1e-6).all()
    assert fusion.feather(torch.zeros(1, 1, 64, 64))[0, 0, 0].max() == 0  # nor at the crop's border


def test_colour_transfer_takes_over_mean_and_deviation_inside():
    torch.manual_seed(0)
    swap, target = torch.rand(1, 3, 16, 16) * 0.3, torch.rand(1, 3, 16, 16) * 0.4 + 0.3
    weight = torch.zeros(1, 1, 16, 16)
    weight[..., 4:12, 4:12] = 1
    inside = (slice(None), slice(None), slice(4, 12), slice(4, 12))
    out = fusion.colour_transfer(swap, target, weight)
    torch.testing.assert_close(out[inside].mean((2, 3)), target[inside].mean((2, 3)))
    wanted = target[inside].std((2, 3), correction=0)
    torch.testing.assert_close(out[inside].std((2, 3), correction=0), wanted, atol=1e-4, rtol=1e-3)
