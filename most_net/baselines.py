"""What a photo-to-sketch network has to beat: the grey photo, the dodge sketch, patches of neighbours,
pix2pix."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.io import progress


def grey(photos: Tensor) -> Tensor:
    """Luminance of (B, 3, H, W) in [0, 1]: (B, 1, H, W)."""
    return (photos * photos.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def dodge(photos: Tensor, sigma: float = 0.03) -> Tensor:
    """The photo editor's pencil: luminance divided by its blur, (B, 3, H, W) in [0, 1] -> (B, 1, H, W).

    sigma: of the blur, as a share of the height.
    """
    light = grey(photos)
    radius = max(1, math.ceil(2 * sigma * photos.shape[-2]))
    x = torch.arange(-radius, radius + 1, device=photos.device) / (sigma * photos.shape[-2])
    weights = torch.exp(-x.square() / 2)
    weights = weights / weights.sum()
    padded = F.pad(light, (radius,) * 4, mode="replicate")
    smooth = F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return (light / smooth.clamp(min=1e-3)).clamp(0, 1)


def neighbour_patches(
    photos: Tensor,
    train_photos: Tensor,
    train_sketches: Tensor,
    patch: int,
    neighbours: int = 5,
) -> Tensor:
    """Locally linear embedding of patches (Liu et al., CVPR 2005): no training, only the pairs.

    photos (B, 3, H, W), train_photos (T, 3, H, W), train_sketches (T, 1, H, W), all in [0, 1] and aligned.
    Each photo patch is written as a combination, weights summing to 1, of the nearest training photo patches
    within half a patch of its place; the same combination of their sketch patches is averaged where patches
    overlap. patch: even side in pixels. Returns (B, 1, H, W). Raises ValueError when a photo is too small.
    """
    height, width = photos.shape[-2:]
    step = patch // 2
    if patch % 2 or min(height, width) < patch:
        raise ValueError(f"patches of {patch} pixels need an even side and photos of at least that size")
    extra = (-(height - patch) % step, -(width - patch) % step)
    # Border replication: room for the patches beyond the right and lower border, and for the search.
    queries = F.pad(grey(photos), (0, extra[1], 0, extra[0]), mode="replicate")
    grown = (step, step + extra[1], step, step + extra[0])
    sources = [F.pad(x, grown, mode="replicate") for x in (grey(train_photos), train_sketches)]
    rows, columns = ((n - patch) // step + 1 for n in queries.shape[-2:])
    # Candidates are taken at shifts of half a step around each place, one row of places at a time.
    shifts = range(0, 2 * step + 1, max(1, step // 2))
    out = []
    for row in progress(range(rows), "neighbour patches"):
        wanted = _patches(queries[..., row * step :, :], 0, 0, patch, columns)
        bands = [x[..., row * step :, :] for x in sources]
        candidates, drawn = (
            torch.cat([_patches(band, dy, dx, patch, columns) for dy in shifts for dx in shifts], 1)
            for band in bands
        )
        out.append(_combine(wanted, candidates, drawn, neighbours))
    patches = torch.cat(out).permute(1, 2, 0)  # (B, P, L)
    total = F.fold(patches, queries.shape[-2:], patch, stride=step)
    count = F.fold(torch.ones_like(patches), queries.shape[-2:], patch, stride=step)
    return (total / count)[..., :height, :width].clamp(0, 1)


def _patches(images: Tensor, top: int, left: int, patch: int, columns: int) -> Tensor:
    """Patches in the row that begins at `top`, from `left` on, half a patch apart.

    (B, 1, H, W) -> (L, B, P)."""
    width = (columns - 1) * (patch // 2) + patch
    band = images[..., top : top + patch, left : left + width]
    return F.unfold(band, patch, stride=patch // 2).permute(2, 0, 1)


def _combine(wanted: Tensor, candidates: Tensor, drawn: Tensor, neighbours: int) -> Tensor:
    """wanted (L, B, P), candidates and drawn (L, C, P) -> combined sketch patches (L, B, P)."""
    k = min(neighbours, candidates.shape[1])
    nearest = torch.cdist(wanted, candidates).topk(k, largest=False).indices  # (L, B, k)
    place = torch.arange(len(wanted), device=wanted.device)[:, None, None]
    offsets = candidates[place, nearest] - wanted[:, :, None]  # (L, B, k, P)
    gram = offsets @ offsets.transpose(-1, -2)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    gram = gram + (1e-3 * trace + 1e-6) * torch.eye(k, device=gram.device)
    weights = torch.linalg.solve(gram, torch.ones_like(gram[..., :1]))
    weights = weights / weights.sum(-2, keepdim=True)
    return (weights * drawn[place, nearest]).sum(-2)


class UNet(nn.Module):
    """The generator of pix2pix (Isola et al., CVPR 2017): (B, 3, size, size) -> (B, 1, size, size).

    size: a power of two; log2(size) halvings down to one pixel, skip connections, 64 to 512 channels at the
    full `base`, tanh. Dropout in the innermost three up-steps that have 512 channels.
    """

    def __init__(self, size: int, base: int = 64):
        super().__init__()
        depth = int(math.log2(size))
        if 2**depth != size or depth < 4:
            raise ValueError(f"the U-Net needs a side that is a power of two from 16 on, got {size}")
        widths = [base * min(2**level, 8) for level in range(depth)]
        self.size = size
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inner = level == depth - 1
            steps: list[nn.Module] = [nn.LeakyReLU(0.2)] if level else []
            steps.append(nn.Conv2d(widths[level - 1] if level else 3, width, 4, 2, 1))
            self.downs.append(nn.Sequential(*steps, *([] if inner or not level else [nn.BatchNorm2d(width)])))
            outer = widths[level - 1] if level else 1
            up: list[nn.Module] = [nn.ReLU(), nn.ConvTranspose2d(width * (1 if inner else 2), outer, 4, 2, 1)]
            if level:
                up.append(nn.BatchNorm2d(outer))
                if depth - 4 <= level < depth - 1 and width == 8 * base:
                    up.append(nn.Dropout(0.5))
            self.ups.append(nn.Sequential(*up))

    def forward(self, photo: Tensor, sketch: Tensor | None = None, style: int = 0) -> dict[str, Tensor]:
        """photo (B, 3, size, size) in [-1, 1] -> `sketch`; the other arguments are those of `MostNet`."""
        kept, x = [], photo
        for down in self.downs:
            x = down(x)
            kept.append(x)
        for level in reversed(range(len(self.ups))):
            inner = level == len(self.ups) - 1
            x = self.ups[level](x if inner else torch.cat([x, kept[level]], 1))
        return {"sketch": x.tanh()}

    def sketch(self, photo: Tensor, style: int = 0, strength: float = 1.0) -> Tensor:
        """The sketch alone, (B, 3, H, W) -> (B, 1, H, W) in [-1, 1]; padded to whole multiples of `size`."""
        height, width = photo.shape[-2:]
        padded = F.pad(photo, (0, -width % self.size, 0, -height % self.size), mode="replicate")
        return self(padded)["sketch"][..., :height, :width].float()
