"""IrisUsformer (arXiv:2110.10334v1) and, as an option, BiTrans (the v2 of the same paper).

Only the abstracts of the paper were available, so the layer list is a reconstruction: it follows every
statement of the abstract (U-shaped, position-sensitive operations, a re-packaged transformer block, an
auxiliary head for high- and low-uncertainty regions) and meets its one number, 35 % of IrisParseNet's MACs.
The README says which part comes from where.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irisusformer.losses import discrepancy

STRIDE = 32  # every input is padded to a multiple of this
IRIS_PRIOR = 0.1  # share of iris pixels assumed by the initial bias of the heads

Mode = Literal["learned", "two_head", "free", "ce"]


@dataclass(frozen=True)
class Size:
    """Widths and depths of a network, from the finest to the coarsest level."""

    dims: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    reductions: tuple[int, int, int, int]
    encoder_depths: tuple[int, int, int, int]
    decoder_depths: tuple[int, int, int]
    ratio: int
    stem: int
    fine: int


_HEADS, _REDUCTIONS = (1, 2, 4, 8), (16, 8, 4, 2)
SIZES = {
    "base": Size((56, 112, 224, 448), _HEADS, _REDUCTIONS, (2, 2, 2, 2), (2, 2, 2), 4, 16, 32),
    "lite": Size((40, 80, 160, 320), _HEADS, _REDUCTIONS, (2, 2, 2, 2), (2, 2, 2), 4, 16, 32),
    "small": Size((24, 48, 96, 192), _HEADS, _REDUCTIONS, (2, 2, 2, 2), (2, 2, 2), 4, 16, 24),
    "tiny": Size((16, 32, 64, 128), (1, 2, 2, 4), (8, 4, 2, 1), (1, 1, 1, 1), (1, 1, 1), 2, 8, 16),
}


def conv_bn_gelu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution (no bias), batch norm, GELU; the size stays, or halves with stride 2."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.GELU())


def depthwise_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Depthwise convolution (no bias), `outputs / inputs` maps per channel, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel; with channels_last memory both permutes are free views."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head attention between two maps, with positions carried by overlapping depthwise convolutions.

    `position_sensitive=False` is the plain counterpart: keys and values are averaged over R x R cells and all
    projections are pointwise, so the map is a set of tokens without a place.
    """

    def __init__(self, dim: int, heads: int, reduction: int, position_sensitive: bool = True):
        super().__init__()
        self.heads, self.position_sensitive = heads, position_sensitive
        if position_sensitive:
            self.query_map = depthwise_bn(dim, dim, 3)
            # keys and values share one call: output channels 2c and 2c+1 are the two maps of channel c
            self.key_value_map = depthwise_bn(dim, 2 * dim, reduction + 1 if reduction > 1 else 3, reduction)
        else:
            self.pool = nn.AvgPool2d(reduction) if reduction > 1 else nn.Identity()
        self.query, self.key, self.value, self.out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """y (B, C, H, W) asks, context (B, C, H, W; y itself by default) answers; returns (B, C, H, W)."""
        context = y if context is None else context
        if self.position_sensitive:
            y = self.query_map(y)
            key, value = self.key_value_map(context).unflatten(1, (-1, 2)).unbind(2)  # (B, C, H/R, W/R) each
        else:
            key = value = self.pool(context)
        size = y.shape[-2:]
        q, k, v = self._tokens(self.query(y)), self._tokens(self.key(key)), self._tokens(self.value(value))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        out = out.transpose(1, 2).flatten(2).unflatten(1, size).permute(0, 3, 1, 2)  # back to (B, C, H, W)
        return self.out(out)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, HW, C/heads)."""
        return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class SpatialMix(nn.Sequential):
    """BiTrans's spatial branch: mixing at full resolution, without reduction."""

    def __init__(self, dim: int, kernel: int = 3):
        super().__init__(depthwise_bn(dim, dim, kernel), nn.GELU(), nn.Conv2d(dim, dim, 1))


class FeedForward(nn.Module):
    """Pointwise to `ratio` times the channels, depthwise 3x3 where positions count, GELU, pointwise back."""

    def __init__(self, dim: int, ratio: int, position_sensitive: bool = True):
        super().__init__()
        hidden = dim * ratio
        self.expand, self.shrink = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.place = (
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if position_sensitive else nn.Identity()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.shrink(F.gelu(self.place(self.expand(z))))


class Block(nn.Module):
    """Position-sensitive transformer block (PSTB); the map never leaves its (B, C, H, W) form.

    Each of the two sub-layers is norm -> position-sensitive map -> mixing -> pointwise map -> residual.
    `bilateral` adds BiTrans's spatial branch beside the attention; `mixer="conv"` replaces the attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int,
        ratio: int,
        position_sensitive: bool = True,
        bilateral: bool = False,
        mixer: Literal["attention", "conv"] = "attention",
    ):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim), LayerNorm2d(dim)
        attention = mixer == "attention"
        self.mix = Attention(dim, heads, reduction, position_sensitive) if attention else SpatialMix(dim, 7)
        self.spatial = SpatialMix(dim) if bilateral else None
        self.ffn = FeedForward(dim, ratio, position_sensitive)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.mix(y)
        if self.spatial is not None:
            x = x + self.spatial(y)
        return x + self.ffn(self.norm2(x))


class ConcatFusion(nn.Module):
    """Skip connection of a U-Net: concatenate, then convolve."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.conv = conv_bn_gelu(2 * dim, dim, kernel)

    def forward(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        return self.conv(torch.cat([decoder, encoder], 1))


class CrossFusion(nn.Module):
    """BiTrans's hierarchical fusion: decoder queries, encoder keys and values, and the encoder's details."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.norm_decoder, self.norm_encoder = LayerNorm2d(dim), LayerNorm2d(dim)
        self.visual, self.spatial = Attention(dim, heads, reduction), SpatialMix(dim)

    def forward(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        context = self.norm_encoder(encoder)
        return decoder + self.visual(self.norm_decoder(decoder), context) + self.spatial(context)


class Up(nn.Module):
    """Bilinear x2, then convolution; `fast` convolves first, on a quarter of the pixels (other maths)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, fast: bool):
        super().__init__()
        self.conv, self.fast = conv_bn_gelu(inputs, outputs, kernel), fast

    def forward(self, x: Tensor) -> Tensor:
        return upsample(self.conv(x)) if self.fast else self.conv(upsample(x))


def upsample(x: Tensor) -> Tensor:
    """Bilinear, twice the size."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def pad_to_stride(x: Tensor) -> Tensor:
    """Pad right and bottom to a multiple of 32: by reflection, by repetition where the image is too small."""
    height, width = x.shape[-2:]
    bottom, right = -height % STRIDE, -width % STRIDE
    # an exported graph cannot choose: it always reflects, which needs at least 17 pixels a side
    reflect = torch.jit.is_tracing() or (bottom < height and right < width)
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if reflect else "replicate")


class IrisUsformer(nn.Module):
    """Iris mask, uncertainty and, optionally, pupil and outer-boundary regions of an eye image.

    Input: (B, 3, H, W), RGB in [0, 1], any H and W. `forward` returns logits at the input's size:
    `logits` (B, 1, H, W) of the mask, `aux` (B, 1, H, W) of the auxiliary head (absent when
    `return_uncertainty=False`), and with `boundaries` also `regions` (B, 2, H, W): the pupil and everything
    inside the outer boundary. `predict` turns them into probabilities, mask and uncertainty.

    Args:
        size: one of SIZES ("base" is the paper's 35 %) or a Size.
        mode: what the auxiliary head is, see losses.py.
        arch: "irisusformer" (v1) or "bitrans" (v2).
        position_sensitive: False gives the plain transformer that the paper argues against.
        aux_at: "fine", on the full-resolution maps, or "d2", on the quarter-resolution decoder map.
        mixer: "conv" replaces every attention by a depthwise 7x7 convolution.
        pos_embed: "learned" adds a 16x16 grid of position vectors, interpolated, at each encoder level.
        boundaries: add the pupil and outer-boundary heads.
        fast_up: convolve before up-sampling (fewer MACs, not the same function).
        dropout: channel dropout after each decoder stage, for MC dropout.
    """

    def __init__(
        self,
        size: str | Size = "base",
        mode: Mode = "learned",
        arch: Literal["irisusformer", "bitrans"] = "irisusformer",
        position_sensitive: bool = True,
        aux_at: Literal["fine", "d2"] = "fine",
        mixer: Literal["attention", "conv"] = "attention",
        pos_embed: Literal["none", "learned"] = "none",
        boundaries: bool = False,
        fast_up: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        s = SIZES[size] if isinstance(size, str) else size
        self.mode, self.aux_at = mode, aux_at
        bilateral = arch == "bitrans"
        kernel = 3 if position_sensitive else 1

        def stage(level: int, depth: int) -> nn.Sequential:
            width = s.dims[level], s.heads[level], s.reductions[level], s.ratio
            return nn.Sequential(*(Block(*width, position_sensitive, bilateral, mixer) for _ in range(depth)))

        def fusion(level: int) -> nn.Module:
            if bilateral:
                return CrossFusion(s.dims[level], s.heads[level], s.reductions[level])
            return ConcatFusion(s.dims[level], kernel)

        def embed(inputs: int, outputs: int) -> nn.Sequential:
            if position_sensitive:
                return conv_bn_gelu(inputs, outputs, 3, 2)
            return nn.Sequential(nn.Conv2d(inputs, outputs, 2, 2), nn.GELU())

        self.stem = conv_bn_gelu(3, s.stem)
        self.embeds = nn.ModuleList(embed(a, b) for a, b in zip((s.stem, *s.dims), s.dims, strict=False))
        self.encoder = nn.ModuleList(stage(level, s.encoder_depths[level]) for level in range(4))
        self.places = None
        if pos_embed == "learned":
            self.places = nn.ParameterList(nn.Parameter(torch.randn(1, d, 16, 16) * 0.02) for d in s.dims)
        coarse_to_fine = (2, 1, 0)
        self.ups = nn.ModuleList(Up(s.dims[i + 1], s.dims[i], kernel, fast_up) for i in coarse_to_fine)
        self.fusions = nn.ModuleList(fusion(i) for i in coarse_to_fine)
        self.decoder = nn.ModuleList(stage(i, s.decoder_depths[i]) for i in coarse_to_fine)
        self.drop = nn.Dropout2d(dropout)

        full = s.dims[0] + s.stem
        self.fine = conv_bn_gelu(full, s.fine, kernel)
        self.head = nn.Conv2d(s.fine, 1, 1)
        self.region_head = nn.Conv2d(s.fine, 2, 1) if boundaries else None
        aux_in, aux_width = (full, 16) if aux_at == "fine" else (s.dims[1], s.dims[0])
        self.aux_head = nn.Sequential(conv_bn_gelu(aux_in, aux_width, kernel), nn.Conv2d(aux_width, 1, 1))
        self.register_buffer("tau", torch.tensor(0.5))  # uncertainty above tau is the high region
        self.apply(initialise)
        for head in (self.head, self.aux_head[-1]):
            nn.init.constant_(head.bias, math.log(IRIS_PRIOR / (1 - IRIS_PRIOR)))

    def encode(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1], H and W multiples of 32 -> f0 at its size, e1 at half... e4 at 1/16."""
        x = self.stem(x)
        maps = [x]
        for level, (embed, blocks) in enumerate(zip(self.embeds, self.encoder, strict=True)):
            x = embed(x)
            if self.places is not None:
                x = x + F.interpolate(self.places[level], x.shape[-2:], mode="bilinear", align_corners=False)
            x = blocks(x)
            maps.append(x)
        return maps

    def decode(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of `encode` -> full-resolution maps and d2 at a quarter of the resolution."""
        f0, *skips, x = maps
        stages = []
        for up, fuse, blocks, skip in zip(self.ups, self.fusions, self.decoder, skips[::-1], strict=True):
            x = self.drop(blocks(fuse(up(x), skip)))
            stages.append(x)
        return torch.cat([upsample(x), f0], 1), stages[1]

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1], H and W multiples of 32 -> full-resolution maps and d2 at a quarter."""
        return self.decode(self.encode(x))

    def forward_head(self, full: Tensor, d2: Tensor, return_uncertainty: bool = True) -> dict[str, Tensor]:
        """Maps of `forward_features` -> logits at the padded size; see the class."""
        fine = self.drop(self.fine(full))
        out = {"logits": self.head(fine)}
        if self.region_head is not None:
            out["regions"] = self.region_head(fine)
        if return_uncertainty:
            aux = self.aux_head(full if self.aux_at == "fine" else d2)
            out["aux"] = aux if self.aux_at == "fine" else upsample(upsample(aux))
        return out

    def forward(self, image: Tensor, return_uncertainty: bool = True) -> dict[str, Tensor]:
        height, width = image.shape[-2:]
        full, d2 = self.forward_features(pad_to_stride(image * 2 - 1))
        out = self.forward_head(full, d2, return_uncertainty)
        return {name: value[..., :height, :width] for name, value in out.items()}

    @torch.no_grad()
    def predict(self, image: Tensor, tau: float | None = None) -> dict[str, Tensor]:
        """Mask and uncertainty of a batch of images.

        Returns `logits` (B, 1, H, W), `prob` and `uncertainty` in [0, 1], `mask` (uint8) and `high_region`
        (bool; uncertainty above `tau`, by default the one stored at the end of training), and with boundary
        heads `pupil` and `outer`, probabilities of the two filled regions.
        """
        out = {name: value.float() for name, value in self(image).items()}
        result = readout(self.mode, out["logits"], out["aux"])
        result["high_region"] = result["uncertainty"] > (self.tau if tau is None else tau)
        if "regions" in out:
            result["pupil"], result["outer"] = out["regions"].sigmoid().split(1, 1)
        return result


def readout(mode: Mode, logits: Tensor, aux: Tensor) -> dict[str, Tensor]:
    """Probability, mask and uncertainty from the logits of the two heads (B, 1, H, W), and the mask's logits.

    The uncertainty is sigmoid(a) where the head learned the discrepancy, 1 - exp(-u) of the attenuation
    mode, and 1 - exp(-KL(q || p)) where the auxiliary head is a second segmentation head.
    """
    prob = logits.sigmoid()
    if mode == "learned":
        uncertainty = aux.sigmoid()
    elif mode == "free":
        uncertainty = 1 - torch.exp(-F.softplus(aux - 2))
    else:
        uncertainty = 1 - torch.exp(-discrepancy(logits, aux))
    mask = (prob >= 0.5).to(torch.uint8)
    return {"logits": logits, "prob": prob, "mask": mask, "uncertainty": uncertainty}


def initialise(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for the pointwise maps of blocks and heads, Kaiming for the other
    convolutions, zero biases."""
    if isinstance(module, nn.Conv2d):
        # the plain network's conv_bn_gelu is pointwise too, without a bias
        if module.kernel_size == (1, 1) and module.bias is not None:
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            module.weight.data.mul_(math.sqrt(module.groups))  # fan_out of torch ignores the groups
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm behind a convolution into it, in place, for inference; returns the model."""
    model.eval()
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            if isinstance(module[i], nn.Conv2d) and isinstance(module[i + 1], nn.BatchNorm2d):
                module[i] = nn.utils.fusion.fuse_conv_bn_eval(module[i], module[i + 1])
                module[i + 1] = nn.Identity()
    return model
