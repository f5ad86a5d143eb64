"""Is the memory what the method says it is? Measurements on unseen pairs, and pictures of the slots."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from most_net.data import Pairs, pad_to, signed
from most_net.memory import usage_perplexity
from most_net.metrics import grey_bytes, ssim
from most_net.model import MostNet
from shared.io import image_grid


def padded(
    pairs: Pairs, size: int, device: torch.device | str = "cpu", multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Photos and sketches of `pairs` in [-1, 1], padded to at least `size` and to sides that are multiples of
    `multiple`, on a device."""
    height, width = (-(-max(size, n) // multiple) * multiple for n in pairs.photos.shape[-2:])
    pairs = pairs.to(device)
    return signed(pad_to(pairs.photos, height, width)), signed(pad_to(pairs.sketches, height, width))


@torch.inference_mode()
def measure(
    net: MostNet, pairs: Pairs, size: int, window: int, style: int = 0, seed: int = 0
) -> dict[str, float]:
    """What the memory of `style` knows about unseen pairs of that artist:

    cosine: mean cosine of the retrieved with the true sketch feature. ssim, ssim_permuted, ssim_zero: of the
    sketches as they are, with the values permuted against the keys, and with all values zero. slots_used:
    perplexity of the slots' hits. purity: share of positions whose semantic part is the most frequent one of
    their slot (procedural faces only).
    """
    net.eval()
    photos, sketches = padded(pairs, size, net.fuse.weight.device, 2**net.arch.downs)
    out = net(photos, sketches, style)
    truth = grey_bytes(sketches / 2 + 0.5)

    def similarity(images: Tensor) -> float:
        return float(ssim(truth, grey_bytes(images / 2 + 0.5), window=window).mean())

    found = {
        "cosine": float(F.cosine_similarity(out["retrieved"], out["features"], dim=1).mean()),
        "ssim": similarity(out["sketch"]),
        "slots_used": usage_perplexity(torch.bincount(out["slot"].flatten(), minlength=net.arch.slots)),
    }
    memory = net.memories[style]
    values = memory.values.clone()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for name, changed in (("ssim_permuted", values[order]), ("ssim_zero", torch.zeros_like(values))):
        memory.values.copy_(changed)
        found[name] = similarity(net(photos, style=style)["sketch"])
    memory.values.copy_(values)
    if pairs.parts is not None:
        step = photos.shape[-1] // out["slot"].shape[-1]
        parts = pad_to(pairs.parts[:, None], *photos.shape[-2:])[:, 0, ::step, ::step]
        found["purity"] = purity(out["slot"].cpu(), parts)
    return found


def purity(slot: Tensor, parts: Tensor) -> float:
    """Share of positions whose part is the most frequent one among the positions of their slot."""
    count = int(parts.max()) + 1
    code = slot.flatten().long() * count + parts.flatten().long()
    table = torch.bincount(code, minlength=(int(slot.max()) + 1) * count).view(-1, count)
    return float(table.amax(1).sum() / table.sum())


def slot_colours(slots: int) -> Tensor:
    """A distinct colour for each slot: (slots, 3) in [0, 1]."""
    turn = torch.arange(slots) * (math.sqrt(5) - 1) / 2 * 2 * math.pi
    level = 0.55 + 0.35 * torch.cos(torch.arange(slots) * 2.4)
    waves = torch.stack([torch.cos(turn - phase) for phase in (0, 2 * math.pi / 3, 4 * math.pi / 3)], 1)
    return (level[:, None] + 0.4 * waves).clamp(0, 1)


@torch.inference_mode()
def slot_map(net: MostNet, photos: Tensor, style: int = 0) -> Tensor:
    """False colours of the chosen slots: (B, 3, H, W) in [-1, 1] -> (B, 3, H, W) in [0, 1]."""
    slot = net(photos, style=style)["slot"]
    picture = slot_colours(net.memories[style].slots)[slot.cpu()].permute(0, 3, 1, 2)
    return F.interpolate(picture, photos.shape[-2:])


@torch.inference_mode()
def atlas(net: MostNet, pairs: Pairs, size: int, style: int = 0, slots: int = 32, nearest: int = 6) -> Tensor:
    """The memory as a sheet (3, H, W): a row for each of the most used slots. First what the decoder draws
    for the slot's value alone, then the photo patches nearest to its key, each beside the same place of the
    sketch.
    """
    net.eval()
    photos, sketches = padded(pairs, size, net.fuse.weight.device, 2**net.arch.downs)
    out = net(photos, style=style)
    step = photos.shape[-1] // out["slot"].shape[-1]
    half, side = 2 * step, 4 * step
    memory = net.memories[style]
    shown = (
        torch.bincount(out["slot"].flatten(), minlength=memory.slots).topk(min(slots, memory.slots)).indices
    )
    scores = out["scores"].unflatten(0, out["slot"].shape)  # (B, h, w, N)
    frames = [F.pad(images, (half,) * 4, mode="replicate").cpu() / 2 + 0.5 for images in (photos, sketches)]
    tiles = []
    for number in shown.tolist():
        tiles.append(_stroke(net, photos[:1], memory.values[number], side).expand(3, -1, -1))
        # The best position of each photo, then the best photos, so that one face does not fill the row.
        best, where = scores[..., number].flatten(1).max(1)
        for image in best.topk(min(nearest, len(best))).indices.tolist():
            row, column = divmod(int(where[image]), out["slot"].shape[-1])
            top, left = (int(n * step + step / 2) for n in (row, column))
            cut = [frame[image, :, top : top + side, left : left + side] for frame in frames]
            tiles += [cut[0], cut[1].expand(3, -1, -1)]
    columns = len(tiles) // len(shown)
    labels = ["slot", *(["photo", "sketch"] * nearest)][:columns]
    return image_grid(tiles, columns, [str(n) for n in shown.tolist()], labels, scale=max(1, 40 // side))


def _stroke(net: MostNet, photo: Tensor, value: Tensor, side: int) -> Tensor:
    """The decoder's picture of one value at every position: (1, side, side) from its middle."""
    f = net.photo_encoder(photo)
    style = value[None, :, None, None].expand_as(f)
    picture = net.decoder(net.fuse(torch.cat([style, style], 1)))[0] / 2 + 0.5
    top, left = ((n - side) // 2 for n in picture.shape[-2:])
    return picture[:, top : top + side, left : left + side].clamp(0, 1).cpu()


def edit_slot(net: MostNet, style: int, slot: int, like: int) -> None:
    """Let a slot draw as another slot does: its value becomes that of slot `like`, its key stays.

    Raises IndexError when there is no such slot.
    """
    with torch.no_grad():
        net.memories[style].values[slot] = net.memories[style].values[like].clone()
