"""MREM, the mask-region enhanced module: attention into the corrupted region.

The paper's abstract speaks of masked correlation mining that strengthens the relations into the corrupted
region and restores the correlation across facial parts; the form below is our reconstruction. `MREM` computes
only the rows that are needed, with fused attention; `dense` is the textbook form that the tests and
`bench.py` compare it with and that pictures of the attention are made of.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hole_cells(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    """mask (B, 1, H, W), 1 = corrupted -> h (B, 1, h, w): 1 where any corrupted pixel falls into the cell."""
    return F.adaptive_max_pool2d(mask, (int(cells[0]), int(cells[1])))


class MREM(nn.Module):
    """F' (B, C, h, w), h (B, 1, h, w) -> F'' = F' + h out([F' ; inter ; intra]).

    theta, phi = normalize(linear(F')), g = linear(F'), A = theta^T phi / tau. `inter` reads the kept cells
    and `intra` the corrupted ones, each through its own softmax, across all facial parts. Kept cells pass
    unchanged. Without a kept cell `inter` is zero; without a corrupted one the module is the identity.
    """

    def __init__(self, channels: int, keys: int, tau: float = 0.1):
        super().__init__()
        if channels % keys:
            raise ValueError(f"{channels} channels are not a multiple of {keys} key channels")
        self.tau, self.heads = tau, channels // keys
        self.theta = nn.Linear(channels, keys)
        self.phi = nn.Linear(channels, keys)
        self.g = nn.Linear(channels, channels)
        self.out = nn.Linear(3 * channels, channels)
        self.static = False
        """Use the form whose shapes do not depend on the mask (for export)."""

    def forward(self, features: Tensor, holes: Tensor) -> Tensor:
        if self.static:
            return self.dense(features, holes)[0]
        tokens = features.flatten(2).transpose(1, 2)  # (B, P, C)
        h = holes.flatten(1) > 0.5  # (B, P)
        count = h.sum(1)
        # Corrupted cells first. The number of rows depends on the masks, which costs one look at them.
        order = h.byte().argsort(dim=1, descending=True, stable=True)
        least, most = torch.stack(count.aminmax()).tolist()
        if most == 0:
            return features
        rows, places = order[:, :most], h.shape[1]
        corrupted = _take(tokens, rows)
        valid = torch.arange(most, device=h.device) < count[:, None]  # (B, rows)
        even = most == least  # no row is padding, every key counts
        query = F.normalize(self.theta(corrupted), dim=-1)
        key, value = F.normalize(self.phi(tokens), dim=-1), self.g(tokens)
        kept = order[:, least:]
        is_kept = torch.arange(least, places, device=h.device) >= count[:, None]
        inter = self._read(query, _take(key, kept), _take(value, kept), None if even else is_kept)
        intra = self._read(query, _take(key, rows), _take(value, rows), None if even else valid)
        delta = self.out(torch.cat((corrupted, inter, intra), -1)) * valid.unsqueeze(-1)
        index = rows.unsqueeze(-1).expand_as(delta)
        return features + torch.zeros_like(tokens).scatter(1, index, delta.to(tokens.dtype)).transpose(
            1, 2
        ).reshape(features.shape)

    def _read(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention of query (B, R, d) over the allowed (B, S) keys (B, S, d) and values (B, S, C) -> (B, R,
        C); allowed None: over all.

        The values are cut into heads as wide as the keys, because fused kernels want equal widths; all heads
        share the same weights. Without an allowed key the result is zero.
        """
        if key.shape[1] == 0:
            return torch.zeros_like(query).repeat(1, 1, self.heads)
        any_key = mask = None
        if allowed is not None:
            any_key = allowed.any(1)
            mask = (allowed | ~any_key[:, None])[:, None, None]
        query, key = (x.unsqueeze(1).expand(-1, self.heads, -1, -1) for x in (query, key))
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read = F.scaled_dot_product_attention(query, key, value.to(query.dtype), mask, scale=1 / self.tau)
        read = read.transpose(1, 2).flatten(2)
        return read if any_key is None else torch.where(any_key[:, None, None], read, 0.0)

    def dense(self, features: Tensor, holes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the whole P x P correlation: F'' (B, C, h, w), and the weights of both reads (B, P,
        P)."""
        tokens = features.flatten(2).transpose(1, 2)
        h = holes.flatten(1) > 0.5
        theta, phi = (F.normalize(layer(tokens), dim=-1) for layer in (self.theta, self.phi))
        correlation = theta @ phi.transpose(1, 2) / self.tau
        value = self.g(tokens)
        inter, intra = _masked_softmax(correlation, ~h), _masked_softmax(correlation, h)
        delta = self.out(torch.cat((tokens, inter @ value, intra @ value), -1)) * h.unsqueeze(-1)
        return features + delta.transpose(1, 2).reshape(features.shape), inter, intra


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _masked_softmax(scores: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the allowed keys (B, P) of scores (B, P, P); zero rows where there is none."""
    allowed = keys.unsqueeze(1)
    weights = scores.float().masked_fill(~allowed, -1e4).softmax(-1)
    return (weights * allowed).to(scores.dtype)
