"""The same network written the obvious way: what the speed of model.py is measured against.

Attention with its whole score matrix, separate key and value convolutions, LayerNorm that copies the map to
channels-last and back, BatchNorm left unfolded. Same weights, same output.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irisusformer.model import Attention, LayerNorm2d


class NaiveAttention(Attention):
    """The whole score matrix, and keys and values by convolutions of their own."""

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        context = y if context is None else context
        conv, norm = self.key_value_map
        maps = []
        for part in (0, 1):
            weight = conv.weight[part::2].contiguous()
            x = F.conv2d(context, weight, None, conv.stride, conv.padding, groups=conv.groups)
            statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            maps.append(F.batch_norm(x, *(s[part::2] for s in statistics), eps=norm.eps))
        y = self.query_map(y)
        q, k, v = self.query(y), self.key(maps[0]), self.value(maps[1])
        b, c, height, width = q.shape
        q, k, v = (x.reshape(b, self.heads, c // self.heads, -1).transpose(2, 3) for x in (q, k, v))
        scores = (q @ k.transpose(2, 3) / (c // self.heads) ** 0.5).softmax(-1)  # (B, heads, HW, HW/R^2)
        return self.out((scores @ v).transpose(2, 3).reshape(b, c, height, width))


class NaiveLayerNorm2d(LayerNorm2d):
    """Copies the map to channels-last and back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        return nn.LayerNorm.forward(self, x).permute(0, 3, 1, 2).contiguous()


SWAPS = {Attention: NaiveAttention, LayerNorm2d: NaiveLayerNorm2d}


def naive(model: nn.Module) -> nn.Module:
    """A copy of a position-sensitive network in evaluation mode whose modules compute the obvious way."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
    for module in model.modules():
        module.__class__ = SWAPS.get(type(module), type(module))  # same parameters, another forward
    return model
