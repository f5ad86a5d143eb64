"""Re-identification metrics in bounded memory: CMC, mAP and mINP with camera filtering."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

CMC_LENGTH = 50
CHUNK_BYTES = 2**28
BYTES_PER_PAIR = 40
"""What one (query, gallery) pair costs while it is ranked: distance, key, position and masks."""


@dataclass(frozen=True)
class Ranking:
    """Per-query results. Queries without a true match left have no entry and are counted in `skipped`."""

    cmc: Tensor
    """(50,): share of queries with a true match in the first k, k = 1..50."""
    ap: Tensor
    """(valid queries,): average precision, without interpolation."""
    inp: Tensor
    """(valid queries,): true matches / rank of the last one."""
    skipped: int
    """Queries without a true match after filtering."""

    def summary(self) -> dict[str, float]:
        """Percentages: mAP, Rank-1, Rank-5, Rank-10, mINP and the official (mAP + Rank-1) / 2."""
        m_ap, rank1 = 100 * float(self.ap.mean()), 100 * float(self.cmc[0])
        return {
            "mAP": m_ap,
            "Rank-1": rank1,
            "Rank-5": 100 * float(self.cmc[4]),
            "Rank-10": 100 * float(self.cmc[9]),
            "mINP": 100 * float(self.inp.mean()),
            "metric": (m_ap + rank1) / 2,
        }


def ordered_keys(distances: Tensor) -> Tensor:
    """(Q, G) distances >= 0 -> int64 keys in the same order, ties broken by the gallery's order.

    The bits of a non-negative float32 are ordered like the number; the gallery index fills the low half.
    """
    bits = (distances.float().clamp_min(0) + 0.0).view(torch.int32).long()
    return (bits << 32) | torch.arange(distances.shape[1], device=distances.device)


@torch.no_grad()
def rank(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
) -> Ranking:
    """Rank a gallery for every query by 1 - cosine.

    query (Q, D), gallery (G, D), any scale; ids and cameras are integers. Gallery items with the query's
    identity and the query's camera are removed. Nothing of size Q x G is kept: queries go in chunks, and the
    rank of a true match is 1 + the number of kept items closer to the query, so no list is sorted in full.
    Raises ValueError when the gallery is empty, no query has a true match, or an embedding holds NaN or
    infinity, which would be ranked too.
    """
    if not len(gallery):
        raise ValueError("the gallery is empty")
    lengths = gallery.float().norm(dim=1)
    if not (lengths.isfinite().all() and query.float().norm(dim=1).isfinite().all()):
        raise ValueError("embeddings with NaN or infinity: the training diverged; train with a lower --lr")
    lengths = lengths.clamp_min(1e-12)
    gallery_t = gallery.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(lengths)
    chunk = max(1, CHUNK_BYTES // (BYTES_PER_PAIR * len(gallery)))
    cmc = torch.zeros(CMC_LENGTH, device=gallery.device)
    aps, inps, skipped = [], [], 0
    for start in range(0, len(query), chunk):
        part = slice(start, start + chunk)
        ids, cameras = query_ids[part, None], query_cameras[part, None]
        same = ids == gallery_ids
        removed = same & (cameras == gallery_cameras)
        true = same & ~removed
        keys = ordered_keys(1 - normalize(query[part].float()) @ gallery_t)
        keys.masked_fill_(removed, torch.iinfo(torch.int64).max)
        counts = true.sum(1)
        valid = counts > 0
        skipped += int((~valid).sum())
        if not valid.any():
            continue
        keys, true, counts = keys[valid], true[valid], counts[valid]
        ranks, width = match_ranks(keys, true, counts)
        order = torch.arange(1, width + 1, device=keys.device)
        present = order <= counts[:, None]
        precision = torch.where(present, order / ranks, 0)
        aps.append(precision.sum(1) / counts)
        last = ranks.gather(1, counts[:, None] - 1).squeeze(1)
        inps.append(counts / last)
        first = ranks[:, 0]
        cmc += torch.bincount(first[first <= CMC_LENGTH] - 1, minlength=CMC_LENGTH).cumsum(0)
    if not aps:
        raise ValueError("no query has a true match in the gallery, the same person seen by another camera")
    ap, inp = torch.cat(aps).cpu(), torch.cat(inps).cpu()
    return Ranking((cmc / len(ap)).cpu(), ap, inp, skipped)


def match_ranks(keys: Tensor, true: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Ranks of the true matches among the kept items.

    keys (Q, G) of kept items, removed ones at the maximum; true (Q, G); counts (Q,) its row sums.
    Returns (Q, M) ranks from 1, ascending, padded after a query's own matches, and M.
    """
    width = int(counts.max())
    top = torch.iinfo(torch.int64).max
    rows, columns = true.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    matches = torch.full((len(keys), width), top, device=keys.device)
    matches[rows, torch.arange(len(rows), device=keys.device) - starts[rows]] = keys[rows, columns]
    matches = matches.sort(1).values
    # An item before the i-th match falls into bin <= i: the running sum of the bins is the match's rank.
    bins = torch.searchsorted(matches, keys)
    bins += torch.arange(len(keys), device=keys.device)[:, None] * (width + 1)
    histogram = torch.bincount(bins.flatten(), minlength=len(keys) * (width + 1))
    return histogram.view(len(keys), width + 1)[:, :width].cumsum(1), width
