"""A ViT or CLIP-ViT trunk whose layer norms have one affine per source domain, and the global branch's tail.

Not in META, whose networks are residual (`backbone.py`); trunk and tail are used as those are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_reid.backbone import ARCHITECTURES, Architecture, FrozenPass
from shared.runtime import UserError


@dataclass(frozen=True)
class VitArchitecture:
    """A vision transformer with norms before attention and MLP."""

    width: int
    """Channels of a token."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    patch: int = 16
    """Side of a patch in pixels; patches do not overlap."""
    clip: bool = False
    """CLIP's form: a norm before the first block, QuickGELU, a patch embedding without bias."""
    pixels: str = "half"
    """Pixel statistics (a name in `backbone.PIXELS`) of the images that its weights were trained on."""

    signed: bool = True
    """The last map has values below zero, so it is pooled by its mean."""

    @property
    def features(self) -> int:
        """Channels of the last map."""
        return self.width

    @property
    def eps(self) -> float:
        """The norms' epsilon."""
        return 1e-5 if self.clip else 1e-6

    @property
    def shared(self) -> int:
        """Blocks that the global branch shares with the experts: half, as in the residual network."""
        return self.depth // 2

    @property
    def last(self) -> int:
        """First block of the part in which the global branch has instance norms: the last quarter."""
        return self.depth - max(self.depth // 4, 1)


VITS = {
    # For pictures of 48x24: 12x6 patches, like the last map of the residual "mini".
    "vit-mini": VitArchitecture(64, 4, 4, patch=4, pixels="imagenet"),
    "vit-s16": VitArchitecture(384, 12, 6),
    "vit-b16": VitArchitecture(768, 12, 12),
    "clip-b16": VitArchitecture(768, 12, 12, clip=True, pixels="clip"),
}


def architecture_of(name: str | Architecture | VitArchitecture) -> Architecture | VitArchitecture:
    """An architecture by its name in `ARCHITECTURES` or `VITS`; what is one already, itself."""
    return (ARCHITECTURES | VITS)[name] if isinstance(name, str) else name


def token_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the tokens, (..., N, C) -> two (..., C), in float32 or better."""
    n = x.shape[-2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-2)
    return mean, ((x.square().sum(-2) - n * mean.square()) / max(n - 1, 1)).clamp_min(0)


class TokenNorm(nn.Module):
    """The affine that one set has after a layer norm's standardisation.

    Experts also keep `running_mean` and `running_var`, (C,), of the standardised tokens that reached the
    affine in training, as a BN does of its input. No norm uses them; images are compared with them.
    """

    def __init__(self, channels: int, tracked: bool, momentum: float = 0.1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.momentum = momentum
        if tracked:
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    @torch.no_grad()
    def observe(self, patches: Tensor) -> None:
        """Move the running statistics towards those of a batch's standardised patches, (B, N, C)."""
        mean, variance = token_moments(patches.flatten(0, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


Norm = Callable[[nn.ModuleList, Tensor], Tensor]
"""(the sets of a place, tokens (N, T, C)) -> normalised tokens."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, c)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers, GELU or CLIP's x sigmoid(1.702 x) between them."""

    def __init__(self, width: int, quick: bool):
        super().__init__()
        self.quick = quick
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class VitBlock(nn.Module):
    """Attention and MLP with their norms before them, chosen at each call; names are timm's."""

    def __init__(self, architecture: VitArchitecture, make_norms: Callable[[], nn.ModuleList]):
        super().__init__()
        self.norm1, self.attn = make_norms(), Attention(architecture.width, architecture.heads)
        self.norm2, self.mlp = make_norms(), Mlp(architecture.width, architecture.clip)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        x = x + self.attn(norm(self.norm1, x))
        return x + self.mlp(norm(self.norm2, x))


def initialise(module: nn.Module) -> None:
    """Linear layers as in ViT: weights from a truncated normal of deviation 0.02, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class VitTrunk(nn.Module):
    """Linear layers shared by K experts and, in the first half, by the global branch.

    A set of norms is chosen by its number: 0..K-1 the experts, K the global branch (universal: False builds
    none). size: (H, W) of the images. The class token takes part in attention as in the weights to start
    from; maps and statistics are those of the patches. Raises UserError when patches do not fill the size.
    """

    def __init__(
        self, architecture: VitArchitecture, experts: int, size: tuple[int, int], universal: bool = True
    ):
        super().__init__()
        width, patch = architecture.width, architecture.patch
        if size[0] % patch or size[1] % patch:
            raise UserError(f"images of {size[0]}x{size[1]} do not divide into patches of {patch}x{patch}")
        self.experts, self.eps, self.shape = experts, architecture.eps, (width,)
        self.grid = (size[0] // patch, size[1] // patch)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch, bias=not architecture.clip)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid[0] * self.grid[1], width) * 0.02)

        def norms(sets: int) -> nn.ModuleList:
            return nn.ModuleList(TokenNorm(width, tracked=k < experts) for k in range(sets))

        shared, everyone = architecture.shared, experts + universal
        self.norm_pre = norms(everyone) if architecture.clip else None
        self.blocks = nn.ModuleList(
            VitBlock(architecture, lambda b=b: norms(everyone if b < shared else experts))
            for b in range(architecture.depth)
        )
        self.norm = norms(experts)
        self.shared_blocks = shared
        initialise(self.blocks)
        places = [self.norm_pre] if architecture.clip else []
        places += [place for block in self.blocks for place in (block.norm1, block.norm2)]
        self.units: list[nn.ModuleList] = [*places, self.norm]
        self.channels = [width] * len(self.units)

    def set_warm(self, warm: bool) -> None:
        """Freeze (True) or release all that is shared, and the global set."""
        own = {id(p) for place in self.units for norm in place[: self.experts] for p in norm.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(not warm)

    def first(self, pixels: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> tokens (B, 1 + patches, C), which all sets have in common."""
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], 1)

    def standardised(self, x: Tensor) -> Tensor:
        """A layer norm without its affine, in float32 or better."""
        return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.shape, eps=self.eps)

    def map_of(self, x: Tensor) -> Tensor:
        """Tokens (N, T, C) -> the patches' map (N, C, h, w)."""
        return x[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def live(self, stem: Tensor, chosen: int, learn: bool) -> Tensor:
        """One set with gradients; learn: update the running statistics of an expert.

        stem: (B, T, C), from `first`. An expert gives its last map (B, C, h, w), the global set the tokens
        (B, T, C) where its branch leaves the trunk.
        """
        watched = learn and chosen < self.experts

        def norm(place: nn.ModuleList, x: Tensor) -> Tensor:
            one = place[chosen]
            if watched:
                with torch.no_grad():
                    one.observe(self.standardised(x)[:, 1:])
            return F.layer_norm(x, self.shape, one.weight, one.bias, self.eps)

        expert = chosen < self.experts
        x = norm(self.norm_pre, stem) if self.norm_pre is not None else stem
        for block in self.blocks if expert else self.blocks[: self.shared_blocks]:
            x = block(x, norm)
        return self.map_of(norm(self.norm, x)) if expert else x

    def frozen(self, stem: Tensor, experts: Sequence[int], universal: bool = False) -> FrozenPass:
        """Several experts, and the global set if asked for, as one batch.

        Each shared linear layer runs once, on S*B images; the affines of the S sets are stacked. They are
        constants here: gradients, if enabled, reach only the linear layers. `shared` of what is returned are
        the tokens (B, T, C) where the global branch leaves the trunk.
        """
        k = len(experts)
        probed: list[tuple[Tensor, Tensor]] = []

        def norm_of(sets: Sequence[int]) -> Norm:
            def norm(place: nn.ModuleList, x: Tensor) -> Tensor:
                with torch.no_grad():
                    weight = torch.stack([place[s].weight for s in sets])[:, None, None]  # (S, 1, 1, C)
                    bias = torch.stack([place[s].bias for s in sets])[:, None, None]
                x = self.standardised(x).unflatten(0, (len(sets), -1))  # (S, B, T, C)
                with torch.no_grad():
                    probed.append(token_moments(x[:k, :, 1:]))
                return torch.addcmul(bias, x, weight).flatten(0, 1)

            return norm

        sets = [*experts, self.experts] if universal else list(experts)
        norm = norm_of(sets)
        x = torch.cat([stem] * len(sets))
        x = norm(self.norm_pre, x) if self.norm_pre is not None else x
        for block in self.blocks[: self.shared_blocks]:
            x = block(x, norm)
        x = x.unflatten(0, (len(sets), -1))
        shared = x[k] if universal else None
        x, norm = x[:k].flatten(0, 1), norm_of(experts)
        for block in self.blocks[self.shared_blocks :]:
            x = block(x, norm)
        maps = self.map_of(norm(self.norm, x)).unflatten(0, (k, -1))

        def running(name: str) -> Tensor:
            rows = [[getattr(place[s], name) for place in self.units] for s in experts]
            return torch.stack([torch.cat(row) for row in rows])

        means, variances = (torch.cat(which, -1) for which in zip(*probed, strict=True))
        return FrozenPass(maps, shared, running("running_mean"), running("running_var"), means, variances)


class VitTail(nn.Module):
    """The global branch after it leaves the trunk: own blocks, instance norms in the last quarter.

    There the patches go on alone. Each image's channels get mean 0 and variance 1 over its patches, once
    where that part begins, as in the residual branch's shortcut, and again before every attention and MLP. A
    layer norm of each patch stands last: after an instance norm all means would be alike.
    instance_norm: False is the ablation with layer norms there too. size: (H, W) of the images.
    """

    def __init__(self, architecture: VitArchitecture, size: tuple[int, int], instance_norm: bool = True):
        super().__init__()
        width, self.eps, self.instance_norm = architecture.width, architecture.eps, instance_norm
        self.shape = (width,)
        self.grid = (size[0] // architecture.patch, size[1] // architecture.patch)
        self.last = architecture.last

        def norms() -> nn.ModuleList:
            return nn.ModuleList([TokenNorm(width, tracked=False)])

        # Numbered as in the whole network, whose weights they start from.
        numbers = range(architecture.shared, architecture.depth)
        self.blocks = nn.ModuleDict({str(b): VitBlock(architecture, norms) for b in numbers})
        self.entry, self.norm = norms(), norms()
        initialise(self.blocks)

    def layer(self, place: nn.ModuleList, x: Tensor) -> Tensor:
        """Layer norm of each token."""
        return F.layer_norm(x, self.shape, place[0].weight, place[0].bias, self.eps)

    def instance(self, place: nn.ModuleList, x: Tensor) -> Tensor:
        """Instance norm: each image's channels over its tokens, (B, T, C), in float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.instance_norm(x.transpose(1, 2), weight=place[0].weight, bias=place[0].bias, eps=self.eps)
        return x.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, C) where the branch leaves the trunk -> map (B, C, h, w)."""
        norm = self.layer
        for number, block in self.blocks.items():
            if int(number) == self.last:
                norm = self.instance if self.instance_norm else self.layer
                x = norm(self.entry, x[:, 1:])
            x = block(x, norm)
        return self.layer(self.norm, x).transpose(1, 2).unflatten(2, self.grid)
