"""The copy task: what MREM is for, in its simplest form.

Two squares of one random colour stand on a flat background, 21 pixels apart, and one is hidden. The colour
can only be told by reading the other square, which a shallow network without correlation mining does not
reach.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdrnets.losses import hole
from mdrnets.mrem import MREM, hole_cells
from shared.io import progress
from shared.runtime import step_generator

SIDE, SQUARE, DISTANCE, BOX = 32, 5, 21, 9


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [-1, 1] and masks (n, 1, 32, 32), 1 = corrupted."""
    background, colour = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    pad = (BOX - SQUARE) // 2
    top = torch.randint(pad, SIDE - SQUARE - pad, (count, 1, 1), generator=generator)
    left = torch.randint(pad, SIDE - SQUARE - DISTANCE - pad + 1, (count, 1, 1), generator=generator)
    hidden = left + DISTANCE * torch.randint(2, (count, 1, 1), generator=generator)
    y, x = torch.arange(SIDE).view(1, -1, 1), torch.arange(SIDE).view(1, 1, -1)

    def box(corner: Tensor, margin: int) -> Tensor:
        inside = (y >= top - margin) & (y < top + SQUARE + margin)
        return (inside & (x >= corner - margin) & (x < corner + SQUARE + margin)).unsqueeze(1)

    squares = box(left, 0) | box(left + DISTANCE, 0)
    return torch.where(squares, colour, background), box(hidden, pad).float()


class CopyNet(nn.Module):
    """Shallow network with coordinate channels: one residual block on each side of MREM (or of nothing)."""

    def __init__(self, mrem: bool):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(6, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 3, 1, 1)
            )
            for _ in range(2)
        )
        self.mrem = MREM(32, 16) if mrem else None
        self.head = nn.Sequential(nn.Conv2d(32, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 3, 3, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        axis = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(x), -1, -1, -1)
        y = self.stem(torch.cat((x * (1 - mask), mask, grid), 1))
        y = y + self.blocks[0](y)
        if self.mrem is not None:
            y = self.mrem(y, hole_cells(mask, y.shape[-2:]))
        y = y + self.blocks[1](y)
        return self.head(F.interpolate(y, scale_factor=2.0)).tanh()


def copy_task(mrem: bool, steps: int, seed: int, device: torch.device) -> float:
    """Train on fresh samples for `steps`; returns the L1 error inside the hole in % of the range, on 512
    others."""
    torch.manual_seed(seed)
    net = CopyNet(mrem).to(device)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for step in progress(range(steps), "copy task"):
        x, mask = (t.to(device) for t in draw(16, step_generator(seed, step)))
        loss = hole(net(x, mask), x, mask) * 10
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        x, mask = (t.to(device) for t in draw(512, step_generator(seed + 1, steps, stream=1)))
        error = ((net(x, mask).clamp(-1, 1) - x).abs() * mask).sum() / (3 * mask.sum())
    return float(50 * error)
