"""shared/: networks and pieces of training loops that several papers have."""

import pytest
import torch

from shared.irse import IRSE, Trunk

SMALL = ((8, 1), (8, 2), (16, 1), (16, 1))


# --- irse -----------------------------------------------------------------------------------------


def test_levels_are_the_maps_after_each_group():
    torch.manual_seed(0)
    net = IRSE(32, SMALL, 12).eval()
    x = torch.randn(2, 3, 32, 32)
    levels = net.levels(x)
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 16, 16),
        (2, 8, 8, 8),
        (2, 16, 4, 4),
        (2, 16, 2, 2),
    ]
    assert torch.equal(levels[-1], net.forward_features(x))
    assert torch.equal(levels[1], net.body[:3](net.input_layer(x)))
    embedding = net(x)
    assert embedding.shape == (2, 12) and torch.equal(embedding, net.forward_head(levels[-1]))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("se", [True, False])
def test_variants_of_the_unit(se):
    """By hand: the first unit has stride 2 at equal channels, the second keeps the side."""
    for variant in ("insightface_pytorch", "pin"):
        torch.manual_seed(0)
        unit, second = Trunk(((8, 2),), se, variant).eval().body
        x = torch.randn(2, 8, 6, 6)
        y = unit.res_layer[0](x)
        for layer in unit.res_layer[1:]:
            y = layer(y)
        shortcut = unit.shortcut_layer[0](x) if variant == "pin" else x[..., ::2, ::2]
        scale = (1 + unit.shortcut_layer[1].eps) ** -0.5 if variant == "pin" else 1
        torch.testing.assert_close(unit(x), y + shortcut * scale)
        torch.testing.assert_close(second(x), second.res_layer(x) + x)
        assert len(unit.res_layer) == 5 + se + (variant == "pin")
        assert hasattr(unit.res_layer[-1], "fc1") == se
