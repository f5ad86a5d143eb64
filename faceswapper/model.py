"""FaceSwapper's networks: disentangled representation, semantic-guided fusion, discriminator.

The disentangled representation module is an attribute encoder (a spatial map of the target) and an identity
encoder (a vector of the source, trained with the rest). The semantic-guided fusion module is the decoder: it
writes identity and landmarks inside the face region of a mask and restores what lies outside from the
target's features, resolution after resolution. Names, shapes and arithmetic are the released ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faceswapper.blocks import SLOPE, AdainResBlk, AffineInstanceNorm, Guide, ResBlk
from faceswapper.landmarks import FAN
from faceswapper.recognizer import IRSE50
from faceswapper.weights import read_official
from shared.ranges import Count
from shared.runtime import UserError

MaskPyramid = Literal["cascade", "direct"]
Cache = dict[int, Tensor]
BOTTOM = 8
"""Side of the attribute map, whatever the size of the picture."""


@dataclass(frozen=True)
class Size:
    """Sizes of generator and discriminator; the defaults are the paper's networks."""

    img_size: int = 256
    """Side of the pictures: a power of two, at least 32."""
    channel_base: int = 2**14
    """A level at resolution r has min(channel_base / r, max_channels) channels."""
    max_channels: Count = 512
    """The widest level."""
    id_dim: Count = 512
    """Length of the identity code."""
    skips: tuple[int, ...] = (32, 64, 128)
    """Resolutions at which the target's features are restored outside the face."""
    rgb_norm: bool = True
    """Instance norm before RGB, as released. It takes away the level of every channel, which a small network
    brings back with a few extreme pixels; False leaves it out."""

    def __post_init__(self):
        if self.img_size < 32 or self.img_size & (self.img_size - 1):
            raise UserError(f"img_size {self.img_size}: use a power of two of at least 32")
        if self.channel_base < self.img_size:
            raise UserError(
                f"channel_base {self.channel_base}: give at least img_size, {self.img_size}, so that every "
                "level has a channel"
            )

    def channels(self, r: int) -> int:
        """Width of the level at resolution r."""
        return min(self.channel_base // r, self.max_channels)

    def levels(self, last: int) -> list[int]:
        """Resolutions from img_size down to `last`."""
        return [self.img_size >> i for i in range(int(math.log2(self.img_size // last)) + 1)]

    @property
    def restored(self) -> tuple[int, ...]:
        """The resolutions of `skips` that occur on the way up."""
        return tuple(r for r in sorted(self.skips) if BOTTOM < r <= self.img_size)


class AttributeEncoder(nn.Module):
    """Target picture (B, 3, S, S) -> attribute map (B, C, 8, 8)."""

    def __init__(self, size: Size):
        super().__init__()
        self.kept = size.restored
        levels = size.levels(BOTTOM)
        layers: list[nn.Module] = [nn.Conv2d(3, size.channels(levels[0]), 3, 1, 1)]
        for r, half in zip(levels, levels[1:], strict=False):
            layers.append(ResBlk(size.channels(r), size.channels(half), norm=True, down=True))
        layers += [ResBlk(size.channels(BOTTOM), size.channels(BOTTOM), norm=True) for _ in range(2)]
        self.model = nn.ModuleList(layers)

    def encode(self, x: Tensor) -> tuple[Tensor, Cache]:
        """The map and the features that the decoder restores, by resolution."""
        cache = {}
        for layer in self.model:
            if int(x.shape[-1]) in self.kept:  # the input of the last layer entered at a resolution remains
                cache[int(x.shape[-1])] = x
            x = layer(x)
        return x, cache

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor], Cache]:
        """Map, the output of every layer, cache. The mask's content is not looked at; without a mask the
        cache is empty, as in the official code."""
        outputs, cache = [], {}
        for layer in self.model:
            if mask is not None and x.shape[-1] in self.kept:
                cache[x.shape[-1]] = x
            x = layer(x)
            outputs.append(x)
        return x, outputs, cache


def _to_vector(size: Size, inputs: int) -> list[nn.Module]:
    """Layers common to identity encoder and discriminator: (B, inputs, S, S) -> (B, C, 1, 1)."""
    levels = size.levels(4)
    layers: list[nn.Module] = [nn.Conv2d(inputs, size.channels(levels[0]), 3, 1, 1)]
    for r, half in zip(levels, levels[1:], strict=False):
        layers.append(ResBlk(size.channels(r), size.channels(half), down=True))
    c = size.channels(4)
    return [*layers, nn.LeakyReLU(SLOPE), nn.Conv2d(c, c, 4), nn.LeakyReLU(SLOPE)]


class IdentityEncoder(nn.Module):
    """Source picture (B, 3, S, S), unmasked -> identity code (B, id_dim), not normalised."""

    def __init__(self, size: Size):
        super().__init__()
        self.model = nn.ModuleList(_to_vector(size, 3))
        self.final_layer = nn.Sequential(nn.Linear(size.channels(4), size.id_dim))

    def code(self, x: Tensor) -> Tensor:
        """The identity code alone."""
        for layer in self.model:
            x = layer(x)
        return self.final_layer(x.flatten(1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Code and the output of every layer."""
        outputs = []
        for layer in self.model:
            x = layer(x)
            outputs.append(x)
        return self.final_layer(x.flatten(1)), outputs


class FrozenIdentity(nn.Module):
    """Ablation: a frozen recogniser's embedding and one learned linear layer in place of the identity
    encoder.

    embed: (B, 3, S, S) in [-1, 1] -> (B, dim). It is called without gradient and is no part of the weights.
    """

    def __init__(self, embed: nn.Module, dim: int, id_dim: int):
        super().__init__()
        self.embed = (embed,)  # in a tuple, so that the module is not registered
        self.final_layer = nn.Sequential(nn.Linear(dim, id_dim))

    def code(self, x: Tensor) -> Tensor:
        """Identity code (B, id_dim)."""
        with torch.no_grad():  # not registered, so `to` does not take it along
            embedding = self.embed[0].to(x.device)(x)
        return self.final_layer(embedding)


class Decoded(NamedTuple):
    """What the decoder returns."""

    picture: Tensor
    """(B, 3, S, S), unbounded."""
    features: list[Tensor]
    """After every block, skips included."""
    side: list[Tensor]
    """RGB pictures at the resolutions of the skips; no loss of the paper uses them."""


class Decoder(nn.Module):
    """The semantic-guided fusion module: attribute map, identity code, landmark picture, mask -> picture."""

    def __init__(self, size: Size, mask_pyramid: MaskPyramid = "cascade"):
        super().__init__()
        self.mask_pyramid = mask_pyramid
        self.resolutions = size.levels(BOTTOM)[::-1]
        self.restored = size.restored
        c = size.channels
        blocks = [AdainResBlk(c(BOTTOM), c(BOTTOM), size.id_dim) for _ in range(2)]
        for r, twice in zip(self.resolutions, self.resolutions[1:], strict=False):
            blocks.append(AdainResBlk(c(r), c(twice), size.id_dim, up=True))
        self.model = nn.ModuleList(blocks)
        self.to_rgb = _rgb(c(size.img_size), size.rgb_norm)
        self.rgb_converters = nn.ModuleList(_rgb(c(r), size.rgb_norm) for r in self.restored)
        self.skip_connects = nn.ModuleList(nn.Sequential(nn.Conv2d(c(r), c(r), 1)) for r in self.restored)

    def guides(self, landmarks: Tensor, mask: Tensor) -> dict[int, Guide]:
        """Landmark picture (B, 3, S, S) and mask (B, 1, S, S) at every resolution of the decoder.

        `cascade` is the official pyramid: the mask is reduced to 8x8 and each level enlarged from the former,
        so no level knows more than 8x8 cells, and reducing takes single pixels; released weights expect it.
        `direct` averages both pictures over the pixels that a cell of each resolution covers.
        """
        if self.mask_pyramid == "direct":
            return {r: Guide(averaged(mask, r), averaged(landmarks, r), {}) for r in self.resolutions}
        found, level = {}, mask
        for r in self.resolutions:
            level = _resize(level, r)
            found[r] = Guide(level, _resize(landmarks, r), {})
        return found

    def forward(
        self, attributes: Tensor, code: Tensor, landmarks: Tensor, cache: Cache, mask: Tensor
    ) -> Decoded:
        """Everything the official decoder returns, see `decode`."""
        return self.decode(attributes, code, self.guides(landmarks, mask), cache, side=True)

    def decode(
        self,
        attributes: Tensor,
        code: Tensor,
        guides: dict[int, Guide],
        cache: Cache,
        features: bool = True,
        side: bool = False,
    ) -> Decoded:
        """attributes (B, C, 8, 8), guides and cache of B targets; code (K * B, id_dim): K identities for each
        target, code number k * B + i for target i; or (1, id_dim), one identity for all.

        features, side: whether to keep them. Returns K * B pictures.
        """
        pictures = len(attributes)
        times = max(1, len(code) // pictures)
        if len(code) not in (1, times * pictures):
            raise ValueError(f"{len(code)} codes for {pictures} targets")
        x = attributes.repeat(times, 1, 1, 1) if times > 1 else attributes
        skips = {
            r: skip(guides[r].mask.to(cache[r].dtype) * cache[r])
            for r, skip in zip(self.restored, self.skip_connects, strict=True)
            if r in cache
        }
        kept, sides = [], []
        for block in self.model:
            x = block(x, code, guides)
            r = int(x.shape[-1])  # a tensor while it is traced
            if block.up and r in skips:
                skip = skips[r]
                x = (x.unflatten(0, (times, pictures)) + skip).flatten(0, 1) if times > 1 else x + skip
            if features:
                kept.append(x)
            if side and block.up and r in self.restored:
                sides.append(self.rgb_converters[self.restored.index(r)](x))
        return Decoded(self.to_rgb(x), kept, sides)


def _rgb(channels: int, norm: bool) -> nn.Sequential:
    first = AffineInstanceNorm(channels) if norm else nn.Identity()
    return nn.Sequential(first, nn.LeakyReLU(SLOPE), nn.Conv2d(channels, 3, 1))


def averaged(x: Tensor, r: int) -> Tensor:
    """(B, C, S, S) -> (B, C, r, r), r a divisor of S: means over the S / r x S / r pixels of every cell, the
    cells of which the networks' own averaging and doubling make features."""
    return F.avg_pool2d(x, int(x.shape[-1]) // r) if x.shape[-1] != r else x


def _resize(x: Tensor, r: int) -> Tensor:
    return F.interpolate(x, (r, r), mode="bilinear", align_corners=True)


class Encoded(NamedTuple):
    """A picture, taken apart."""

    attributes: Tensor
    code: Tensor
    cache: Cache


class Generator(nn.Module):
    """Both encoders and the decoder. `swap` is what inference needs; `forward` is the official one.

    mask_source: the identity encoder sees a source's face alone, its surroundings are 0; officially it sees
    the whole picture.
    """

    def __init__(
        self,
        size: Size,
        mask_pyramid: MaskPyramid = "cascade",
        identity: nn.Module | None = None,
        mask_source: bool = False,
    ):
        super().__init__()
        self.size, self.mask_source = size, mask_source
        self.id_encoder = IdentityEncoder(size) if identity is None else identity
        self.attr_encoder = AttributeEncoder(size)
        self.org_decoder = Decoder(size, mask_pyramid)

    def code(self, picture: Tensor, mask: Tensor | None = None) -> Tensor:
        """Identity codes (B, id_dim) of pictures (B, 3, S, S). mask (B, 1, S, S): of the same pictures; with
        `mask_source` it is needed (ValueError), otherwise not looked at."""
        if not self.mask_source:
            return self.id_encoder.code(picture)
        if mask is None:
            raise ValueError("this generator looks at faces alone: give the sources' masks")
        return self.id_encoder.code(picture * (1 - mask))

    def encode(self, picture: Tensor, mask: Tensor | None = None) -> Encoded:
        """(B, 3, S, S) and masks as for `code` -> attribute map, identity code, cache."""
        attributes, cache = self.attr_encoder.encode(picture)
        return Encoded(attributes, self.code(picture, mask), cache)

    def swap(
        self,
        source: Tensor,
        target: Tensor,
        landmarks: Tensor,
        mask: Tensor,
        code: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Pictures with the source's identity and everything else of the target, (B, 3, S, S).

        source (B or 1, 3, S, S), ignored when its code is given (a video needs it once); target, landmarks
        (B, 3, S, S) and mask (B, 1, S, S) of the target; source_mask as for `code`.
        """
        code = self.code(source, source_mask) if code is None else code
        attributes, cache = self.attr_encoder.encode(target)
        guides = self.org_decoder.guides(landmarks, mask)
        return self.org_decoder.decode(attributes, code, guides, cache, features=False).picture

    def forward(self, a: Tensor, b: Tensor, lm_a: Tensor, lm_b: Tensor, mask_a: Tensor, mask_b: Tensor):
        """Both directions: (x_ba, x_ab, features_ba, features_ab, side_ba, side_ab); x_ba has the identity of
        a and the attributes of b."""
        both = self.encode(torch.cat((a, b)), torch.cat((mask_a, mask_b)))
        id_a, id_b = both.code.chunk(2)
        guides = self.org_decoder.guides(torch.cat((lm_b, lm_a)), torch.cat((mask_b, mask_a)))
        attributes, cache = swapped(both.attributes), {r: swapped(x) for r, x in both.cache.items()}
        out = self.org_decoder.decode(attributes, torch.cat((id_a, id_b)), guides, cache, side=True)
        x_ba, x_ab = out.picture.chunk(2)
        (f_ba, f_ab), (s_ba, s_ab) = (
            zip(*(x.chunk(2) for x in maps), strict=True) for maps in (out.features, out.side)
        )
        return x_ba, x_ab, list(f_ba), list(f_ab), list(s_ba), list(s_ab)


def swapped(x: Tensor) -> Tensor:
    """The two halves of a batch in the other order."""
    return torch.cat(x.chunk(2)[::-1])


class Discriminator(nn.Module):
    """Picture and its landmark picture, (B, 3, S, S) each -> one logit per sample (B, 1).

    conditional=False is the ablation that does not see the landmark picture.
    """

    def __init__(self, size: Size, conditional: bool = True):
        super().__init__()
        self.conditional = conditional
        layers = _to_vector(size, 6 if conditional else 3)
        self.main = nn.Sequential(*layers, nn.Conv2d(size.channels(4), 1, 1))

    def forward(self, picture: Tensor, landmarks: Tensor) -> Tensor:
        x = torch.cat((picture, landmarks.to(picture.dtype)), 1) if self.conditional else picture
        return self.main(x).flatten(1)


def initialise(module: nn.Module) -> nn.Module:
    """The official start: kaiming normal (fan in, ReLU gain) for convolutions and linear layers, zero
    biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "generator": lambda: Generator(Size()),
    "discriminator": lambda: Discriminator(Size()),
    "face_model": IRSE50,
    "fan": FAN,
}


def official(name: str) -> nn.Module:
    """A released network with exactly its names and shapes: generator, discriminator, face_model (IR-SE50) or
    fan (landmarks). Raises UserError on another name."""
    if name not in OFFICIAL:
        raise UserError(f"no official network is called {name!r}; there are: {', '.join(OFFICIAL)}")
    return OFFICIAL[name]()


def load_official(name: str, path: Path | str) -> nn.Module:
    """`official(name)` with the weights of a released file, in eval mode.

    Takes faceswapper.ckpt and training checkpoints (entries `generator`, `discriminator`, `fan`), the flat
    model_ir_se50.pth, and wing.ckpt (entry `state_dict`, four stacks of which the first is taken). Raises
    UserError that lists names that are missing or of another shape; surplus names are left alone, see
    `faceswapper.weights.compare`.
    """
    network = official(name)
    network.load_state_dict(read_official(name, network, path))
    return network.eval()
