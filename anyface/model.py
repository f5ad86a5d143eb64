"""AnyFace's own networks: two streams, how codes are put together, and AnyFace++'s memory and mapper.

A stream maps a CLIP feature f (B, 512) through a transformer to the hidden feature phi (B, 512), and phi
through five linear layers to codes (B, L, 512) in the W+ space of a frozen StyleGAN2. The text stream T reads
captions, the image stream I photos; I exists in training alone. Names are those of the released code.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyface.clip import vit_b32
from anyface.encoder import E4E, IRSE50
from anyface.layers import EqualLinear
from anyface.lightcnn import LightCNN9, LightCNN29v2
from anyface.stylegan2 import Discriminator, Generator
from shared.runtime import UserError


class Stream(nn.Module):
    """CLIP feature -> (codes, phi); text and image stream are two of these.

    width: of the CLIP feature and of phi. ladder: widths of the four hidden linear layers over `width`.
    batch_as_sequence: let the samples of a batch attend to each other, as the released forward does;
    otherwise each sample is a sequence of its own, of one feature or of all its token features.
    """

    def __init__(
        self,
        width: int = 512,
        ladder: Sequence[int] = (2, 4, 8, 16),
        n_latent: int = 18,
        style_dim: int = 512,
        layers: int = 12,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        lr_mul: float = 0.01,
        batch_as_sequence: bool = False,
    ):
        super().__init__()
        self.sizes = {
            "width": width,
            "ladder": list(ladder),
            "n_latent": n_latent,
            "style_dim": style_dim,
            "layers": layers,
            "heads": heads,
            "feedforward": feedforward,
            "dropout": dropout,
            "lr_mul": lr_mul,
            "batch_as_sequence": batch_as_sequence,
        }
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        widths = [width, *(width * step for step in ladder), n_latent * style_dim]
        self.mapping = nn.Sequential(
            *(
                EqualLinear(a, b, lr_mul=lr_mul, activate=True)
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )
        self.n_latent, self.style_dim, self.batch_as_sequence = n_latent, style_dim, batch_as_sequence

    def forward(self, features: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, width), or of all tokens (B, T, width) with padding (B, T) true after the end token.

        Returns codes (B, n_latent, style_dim) and phi (B, width). With tokens, phi is read at the last one
        that is not padding, CLIP's end token.
        """
        if features.ndim == 3:
            hidden = self.transformer_encoder(features, src_key_padding_mask=padding)
            last = (~padding).sum(1) - 1 if padding is not None else torch.full((len(features),), -1)
            phi = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        elif self.batch_as_sequence:
            phi = self.transformer_encoder(features[None])[0]
        else:
            phi = self.transformer_encoder(features[:, None])[:, 0]
        return self.mapping(phi).view(-1, self.n_latent, self.style_dim), phi

    @torch.no_grad()
    def attention(self, features: Tensor, padding: Tensor) -> Tensor:
        """Token features (B, T, width) -> (layers, B, T): how much the end token's row attends to each token.

        Mean over the heads. For pictures of what the stream reads in a caption.
        """
        rows, x = [], features
        last = (~padding).sum(1) - 1
        for layer in self.transformer_encoder.layers:
            _, weights = layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=True)
            rows.append(weights[torch.arange(len(x)), last])
            x = layer(x, src_key_padding_mask=padding)
        return torch.stack(rows)


# --- codes ----------------------------------------------------------------------------------------


def assemble(
    w_z: Tensor, w_t: Tensor, m: int, psi: float = 1.0, cutoff: int = 8, mean: Tensor | None = None
) -> Tensor:
    """Noise injection: the first `m` layers from w_z (B, D), the others from w_t (B, L, D).

    psi: truncation of w_z towards `mean` (broadcasts to (1, L, D)) on the first `cutoff` layers. The released
    v1 trainer uses m 4 and no truncation, AnyFace++'s inference m 2 and psi 0.5.
    """
    noise = w_z[:, None].expand(-1, w_t.shape[1], -1)
    if psi != 1:
        if mean is None:
            raise ValueError("truncation needs the mean code")
        kept = mean + psi * (noise - mean)
        noise = torch.cat((kept[:, :cutoff], noise[:, cutoff:]), 1)
    return torch.cat((noise[:, :m].to(w_t.dtype), w_t[:, m:]), 1)


def edit(w: Tensor, w_t: Tensor, degree: int, alpha: float = 1.0) -> Tensor:
    """Manipulation of a face w (B, L, D) towards a caption's code w_t: layers below `degree` stay.

    The larger the degree, the more of the source remains; 0 takes the caption's code alone, L gives w back.
    alpha: how far the other layers go, 1 all the way.
    """
    return torch.cat((w[:, :degree], torch.lerp(w[:, degree:], w_t[:, degree:], alpha)), 1)


def average_captions(features: Tensor) -> Tensor:
    """Text features of several captions of one face (N, E) -> one (1, E), at the mean of their norms."""
    mean = features.mean(0, keepdim=True)
    return F.normalize(mean, dim=-1) * features.norm(dim=-1).mean()


# --- AnyFace++ ------------------------------------------------------------------------------------


class FlatMapper(nn.Module):
    """AnyFace++: memory-completed features (B, banks, E) -> codes (B, L, D) float32 through 15 linear layers,
    in the arithmetic of their weights."""

    def __init__(
        self,
        inputs: int = 26 * 768,
        n_latent: int = 18,
        style_dim: int = 512,
        depth: int = 15,
        lr_mul: float = 0.01,
    ):
        super().__init__()
        width = n_latent * style_dim
        self.mapping = nn.Sequential(
            *(EqualLinear(width if i else inputs, width, lr_mul=lr_mul, activate=True) for i in range(depth))
        )
        self.n_latent, self.style_dim = n_latent, style_dim

    def forward(self, h: Tensor) -> Tensor:
        codes = self.mapping(h.flatten(1).to(self.mapping[0].weight.dtype))
        return codes.float().view(-1, self.n_latent, self.style_dim)


class CANet(nn.Module):
    """AnyFace++: condition augmentation (B, E) -> sample, mean, log-variance, each (B, width / 2)."""

    def __init__(self, inputs: int = 768, width: int = 1024, depth: int = 4, lr_mul: float = 0.01):
        super().__init__()
        self.fc = nn.Sequential(
            *(EqualLinear(width if i else inputs, width, lr_mul=lr_mul, activate=True) for i in range(depth))
        )

    def forward(self, f: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.fc(f).chunk(2, 1)
        noise = torch.randn_like(mean) if noise is None else noise
        return mean + (log_variance / 2).exp() * noise, mean, log_variance


class Memory(nn.Module):
    """AnyFace++: one bank of slots per kind of attribute; a feature is completed with the nearest of each.

    banks: list of (K_i, E). Kept as one padded buffer `slots` (banks, K, E) and `used` (banks, K) bool, so
    that reading is one product. The banks of the release are a plain list of tensors, read by
    `anyface.weights.load_memory`.
    """

    def __init__(self, banks: Sequence[Tensor]):
        super().__init__()
        longest = max(len(bank) for bank in banks)
        slots = torch.stack([F.pad(bank.float(), (0, 0, 0, longest - len(bank))) for bank in banks])
        used = torch.arange(longest) < torch.tensor([len(bank) for bank in banks])[:, None]
        self.register_buffer("slots", slots)
        self.register_buffer("used", used)

    def banks(self) -> list[Tensor]:
        """The slots of each bank (K_i, E), without padding."""
        return [slots[used] for slots, used in zip(self.slots, self.used, strict=True)]

    def nearest(self, f: Tensor) -> Tensor:
        """(B, E) -> (B, banks): index of the slot with the largest cosine in every bank."""
        scores = torch.einsum("be,nke->bnk", F.normalize(f, dim=-1), F.normalize(self.slots, dim=-1))
        return scores.masked_fill(~self.used, -torch.inf).argmax(-1)

    def forward(self, f: Tensor) -> Tensor:
        """(B, E) -> (B, banks, E): f plus its nearest slot of every bank."""
        hit = self.nearest(f)
        return f[:, None] + self.slots[torch.arange(len(self.slots), device=f.device), hit]

    @torch.no_grad()
    def update(self, f: Tensor, rate: float = 0.001, decay_all: bool = False) -> None:
        """Move every slot that was hit by `rate` towards the mean of the features (B, E) assigned to it.

        decay_all: also shrink the slots that were not hit by 1 - rate, as the released code does at every
        call, inference included.
        """
        hit = F.one_hot(self.nearest(f), self.slots.shape[1]).to(f.dtype)  # (B, banks, K)
        count = hit.sum(0)
        mean = torch.einsum("bnk,be->nke", hit, f) / count.clamp_min(1)[..., None]
        moved = (1 - rate) * self.slots + rate * mean
        self.slots.copy_(moved if decay_all else torch.where((count > 0)[..., None], moved, self.slots))


# --- official networks ----------------------------------------------------------------------------

OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "anyface_T_map": Stream,
    "anyfacepp_I_map": FlatMapper,
    "anyfacepp_CA_NET": CANet,
    "stylegan2_generator_256": lambda: Generator(256),
    "stylegan2_generator_1024": lambda: Generator(1024),
    "stylegan2_discriminator_256": lambda: Discriminator(256),
    "stylegan2_discriminator_1024": lambda: Discriminator(1024),
    "ir_se50_112": IRSE50,
    "lightcnn9": LightCNN9,
    "lightcnn29v2": LightCNN29v2,
    "openai_clip_vit_b32": vit_b32,
    "e4e_encoder_1024": E4E,
}


def official(name: str) -> nn.Module:
    """A network of the release or one it needs, with its names and shapes. UserError on another name."""
    if name not in OFFICIAL:
        raise UserError(f"no official network is called {name!r}; there are: {', '.join(OFFICIAL)}")
    return OFFICIAL[name]()


def load_official(name: str, path: Path | str) -> nn.Module:
    """`official(name)` with a released file's weights, in eval mode; UserError says what does not fit."""
    from anyface.weights import load_into  # weights.py builds networks of this module

    network = official(name)
    load_into(network, name, Path(path))
    return network.eval()
