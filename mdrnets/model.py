"""The networks of ShowFace / MDRNets: coarse network, refinement network with DMM and MREM, discriminator.

Every size below is a reconstruction: of the paper only the abstract, the teaser and the first lines of the
introduction were available to us, and its authors published no code. The topology of coarse network,
refinement backbone and discriminator is EdgeConnect's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from mdrnets.memory import DMM, Addressing, Routing, Update
from mdrnets.mrem import MREM, hole_cells
from mdrnets.parser import load_bisenet_state
from shared.bisenet import BiSeNet
from shared.norms import InstanceNorm
from shared.runtime import UserError, own_type

Memory = Literal["none", "shared", "disentangled"]
Order = Literal["dmm>mrem", "mrem>dmm", "parallel"]


@dataclass(frozen=True)
class Size:
    """Widths and depths of the networks."""

    widths: tuple[int, ...]
    """Channels at full size, half size, and so on; the last is C, the width of the memory."""
    kernel: int
    """Kernel of the first and last convolution."""
    norm: bool
    """Instance norm, ReLU and transposed convolutions; otherwise no norm, leaky ReLU and resizing."""
    coarse_dilations: tuple[int, ...]
    """First dilation of each residual block of the coarse network."""
    before: tuple[int, ...]
    """The same for the refinement blocks before the modules."""
    after: tuple[int, ...]
    """The same for those after them."""
    slots: int
    """Memory slots N of each facial part."""
    keys: int
    """Width of MREM's correlation."""

    @property
    def stride(self) -> int:
        """Pixels per memory cell."""
        return 2 ** (len(self.widths) - 1)


SIZES = {
    "mdrnet_256": Size((64, 128, 256), 7, True, (2,) * 8, (2,) * 4, (2,) * 4, 64, 128),
    "tiny": Size((16, 32), 3, False, (1, 2, 4), (1,), (1,), 16, 16),
    "unit": Size((8, 8), 3, False, (1,), (1,), (1,), 4, 4),
}
SizeName = Literal["mdrnet_256", "tiny", "unit"]


def _activation(norm: bool) -> nn.Module:
    return nn.ReLU() if norm else nn.LeakyReLU(0.2)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: bool) -> nn.Sequential:
    """Convolution with reflection at stride 1, then norm (if any) and activation."""
    conv = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        (kernel - 1) // 2,
        padding_mode="reflect" if stride == 1 else "zeros",
    )
    return nn.Sequential(conv, *([InstanceNorm()] if norm else []), _activation(norm))


class ResidualBlock(nn.Module):
    """Dilated 3x3, norm, activation, 3x3, norm; the input is added and nothing follows the sum."""

    def __init__(self, channels: int, dilation: int, norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, padding_mode="reflect")
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, padding_mode="reflect")
        self.norm = InstanceNorm() if norm else nn.Identity()
        self.activation = _activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.activation(self.norm(self.conv1(x)))))


class Up(nn.Module):
    """Twice the size: a transposed convolution, or nearest neighbours and a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, norm: bool):
        super().__init__()
        self.norm = norm
        self.conv = (
            nn.Sequential(
                nn.ConvTranspose2d(inputs, outputs, 4, 2, 1),
                InstanceNorm(),
                _activation(True),
            )
            if norm
            else _conv(inputs, outputs, 3, 1, False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.norm else F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """(B, inputs, H, W) -> (B, C, H/stride, W/stride)."""

    def __init__(self, size: Size, dilations: tuple[int, ...], inputs: int = 4):
        super().__init__()
        widths, norm = size.widths, size.norm
        self.stem = _conv(inputs, widths[0], size.kernel, 1, norm)
        down = [_conv(a, b, 4 if norm else 3, 2, norm) for a, b in zip(widths, widths[1:], strict=False)]
        self.down = nn.Sequential(*down)
        self.blocks = nn.Sequential(*(ResidualBlock(widths[-1], d, norm) for d in dilations))

    def levels(self, x: Tensor) -> list[Tensor]:
        """Feature maps after the first layer, after each halving, and after the blocks."""
        maps = [self.stem(x)]
        for layer in (*self.down, self.blocks):
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(self.stem(x)))


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, H, W), linear."""

    def __init__(self, size: Size, dilations: tuple[int, ...]):
        super().__init__()
        widths, norm = size.widths[::-1], size.norm
        self.blocks = nn.Sequential(*(ResidualBlock(widths[0], d, norm) for d in dilations))
        self.up = nn.Sequential(*(Up(a, b, norm) for a, b in zip(widths, widths[1:], strict=False)))
        self.last = nn.Conv2d(widths[-1], 3, size.kernel, 1, (size.kernel - 1) // 2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.blocks(x)))


def initialise(module: nn.Module) -> None:
    """EdgeConnect's initialisation, normal(0, 0.02), of all convolutions and linear layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class CoarseNet(nn.Module):
    """First completion: masked image and mask -> whole image (B, 3, H, W) in [-1, 1]."""

    def __init__(self, size: Size):
        super().__init__()
        self.encoder = Encoder(size, size.coarse_dilations)
        self.decoder = Decoder(size, ())
        if size.norm:
            initialise(self)

    def forward(self, x_in: Tensor, mask: Tensor) -> Tensor:
        """x_in (B, 3, H, W) with holes 0, mask (B, 1, H, W)."""
        return self.decoder(self.encoder(torch.cat((x_in, mask), 1))).tanh()


class RefineNet(nn.Module):
    """Second completion, from the composite of the first, with the paper's two modules in its middle.

    memory: "none", "shared" (one block of all slots) or "disentangled" (a block per part). mrem: with MREM or
    without. order: of the two modules. seg_input: give the parsing as extra input channels, the baseline
    "parsing without memory"; otherwise the parsing enters through the DMM alone. output: "residual" adds to
    the composite, "direct" replaces it (tanh). extra_blocks: residual blocks added as a control of capacity.
    """

    def __init__(
        self,
        size: Size,
        parts: int,
        memory: Memory = "disentangled",
        mrem: bool = True,
        order: Order = "dmm>mrem",
        seg_input: bool = False,
        output: Literal["residual", "direct"] = "residual",
        extra_blocks: int = 0,
        tau: float = 0.1,
        update: Update = "grad",
        routing: Routing = "soft",
        addressing: Addressing = "dense",
        decay: float = 0.98,
        revive_after: int = 1000,
        weighted_write: bool = False,
    ):
        super().__init__()
        channels = size.widths[-1]
        self.order, self.seg_input, self.output = order, seg_input, output
        self.encoder = Encoder(size, size.before + (1,) * extra_blocks, 4 + (parts if seg_input else 0))
        self.dmm = None
        if memory != "none":
            blocks, slots = (parts, size.slots) if memory == "disentangled" else (1, parts * size.slots)
            options = (tau, update, routing, addressing)
            self.dmm = DMM(
                channels,
                blocks,
                slots,
                *options,
                decay=decay,
                revive_after=revive_after,
                weighted_write=weighted_write,
            )
        self.mrem = MREM(channels, size.keys, tau) if mrem else None
        self.decoder = Decoder(size, size.after)
        if size.norm:
            initialise(self)
        if output == "residual":
            with torch.no_grad():
                self.decoder.last.weight.mul_(0.1)
                self.decoder.last.bias.zero_()

    def features(self, comp: Tensor, mask: Tensor, parsing: Tensor) -> Tensor:
        """Encoder's F (B, C, h, w), before the modules."""
        parts = [comp, mask]
        if self.seg_input:
            parts.append(F.interpolate(parsing, size=comp.shape[-2:], mode="nearest"))
        return self.encoder(torch.cat(parts, 1))

    def modules_of(self, features: Tensor, holes: Tensor, parsing: Tensor, read: bool = True) -> Tensor:
        """DMM and MREM in the configured order; either may be absent."""

        def remember(x: Tensor) -> Tensor:
            return x if self.dmm is None else self.dmm(x, parsing, read)

        def enhance(x: Tensor) -> Tensor:
            return x if self.mrem is None else self.mrem(x, holes)

        if self.order == "parallel":
            return remember(features) + enhance(features) - features
        if self.order == "mrem>dmm":
            return remember(enhance(features))
        return enhance(remember(features))

    def forward(self, comp: Tensor, mask: Tensor, parsing: Tensor, read: bool = True) -> Tensor:
        """comp (B, 3, H, W): composite of the coarse result; parsing (B, K, h, w) -> (B, 3, H, W)."""
        features = self.features(comp, mask, parsing)
        holes = hole_cells(mask, features.shape[-2:])
        delta = self.decoder(self.modules_of(features, holes, parsing.to(features.dtype), read))
        return comp + delta if self.output == "residual" else delta.tanh()


class Discriminator(nn.Module):
    """70x70 patch discriminator with spectral norm: (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self, width: int = 64):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 8 * width, 1)
        strides = (2, 2, 2, 1, 1)
        convs = (
            nn.Conv2d(a, b, 4, s, 1, bias=False) for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.layers = nn.ModuleList(convs)
        initialise(self)
        for layer in self.layers:
            spectral_norm(layer)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Activations of the four hidden layers (for feature matching), then the logits."""
        with own_type(x):
            weights = [layer.weight for layer in self.layers]  # the spectral norm's products stay in fp32
        maps = []
        for layer, weight in zip(self.layers, weights, strict=True):
            x = F.conv2d(x, weight, None, layer.stride, layer.padding)
            maps.append(x if layer is self.layers[-1] else F.leaky_relu(x, 0.2))
            x = maps[-1]
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[-1]


def composite(known: Tensor, filled: Tensor, mask: Tensor) -> Tensor:
    """x (1 - m) + y m: kept pixels of `known`, corrupted ones of `filled`."""
    return torch.where(mask > 0.5, filled, known)


class MDRNet(nn.Module):
    """Coarse network, parser and refinement as one: what inference calls."""

    def __init__(self, coarse: CoarseNet, parser: nn.Module, refine: RefineNet, stride: int):
        super().__init__()
        self.coarse, self.parser, self.refine, self.stride = coarse, parser, refine, stride

    def padded(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x and mask, (B, 3, H, W) and (B, 1, H, W), reflected on the right and below to whole cells."""
        pad = (0, -x.shape[-1] % self.stride, 0, -x.shape[-2] % self.stride)
        return F.pad(x, pad, mode="reflect"), F.pad(mask, pad, mode="reflect")

    def forward(
        self, x: Tensor, mask: Tensor, parsing: Tensor | None = None, read: bool = True
    ) -> dict[str, Tensor]:
        """x (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) with 1 = corrupted; what x holds there is not looked
        at.

        H and W: any size; other than multiples of the stride are padded by reflection and cut back. parsing
        (B, K, h, w) replaces the parser's (only for the oracle experiment). Returns `coarse`, `coarse_comp`,
        `parsing`, `refined` and `output`, which equals x bit for bit wherever the mask is 0.
        """
        height, width = (int(n) for n in x.shape[-2:])
        if height % self.stride or width % self.stride:
            out = self(*self.padded(x, mask), parsing, read)
            return {k: v if k == "parsing" else v[..., :height, :width] for k, v in out.items()}
        x_in = x.masked_fill(mask > 0.5, 0.0)
        coarse = self.coarse(x_in, mask)
        comp = composite(x_in, coarse, mask)
        cells = (height // self.stride, width // self.stride)
        if parsing is None:
            parsing = self.parser(comp.detach(), cells)  # the parser guides, it is not trained through
        refined = self.refine(comp, mask, parsing, read)
        output = composite(x, refined.clamp(-1, 1).to(x.dtype), mask)
        return {
            "coarse": coarse,
            "coarse_comp": comp,
            "parsing": parsing,
            "refined": refined,
            "output": output,
        }


OFFICIAL: dict[str, Callable[[], nn.Module]] = {"BiSeNet(n_classes=19)": BiSeNet}


def official(name: str) -> nn.Module:
    """A network whose weights are public, with exactly their names and shapes. ShowFace itself released none;
    the parser that it needs is `BiSeNet(n_classes=19)`. Raises UserError on another name."""
    if name not in OFFICIAL:
        raise UserError(f"no official network is called {name!r}; there are: {', '.join(OFFICIAL)}")
    return OFFICIAL[name]()


def load_official(name: str, path: Path | str) -> nn.Module:
    """`official(name)` with the weights of a released file, in eval mode. UserError says what does not
    fit."""
    network = official(name)
    load_bisenet_state(network, path)
    return network.eval()
