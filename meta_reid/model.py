"""META: K experts that share all but their batch normalisations, a global branch with instance
normalisation, and weights read from normalisation statistics that mix the experts for each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from meta_reid.aggregation import Aggregation, mix, relevance, scoring_layers, weights
from meta_reid.backbone import Architecture, GlobalTail, Probe, Trunk, register_pixels
from meta_reid.vit import VitArchitecture, VitTail, VitTrunk, architecture_of
from shared.runtime import UserError, own_type
from shared.weights import load_state, load_torch

RELEASED_CLASSES = (1467, 11934, 1502)
PROBE_ROWS = 64


class Head(nn.Module):
    """Pooling, BNNeck without a learned shift, linear classifier.

    classes: None builds no classifier. released: adds the release's unused `mask_layer`. signed: pool by the
    mean, not by GeM.
    """

    def __init__(self, features: int, classes: int | None, released: bool = False, signed: bool = False):
        super().__init__()
        self.pool = positional_mean if signed else gem
        if released:
            self.mask_layer = nn.Linear(features, 1, bias=False)
        self.bottleneck = nn.Sequential(nn.BatchNorm2d(features))
        self.bottleneck[0].bias.requires_grad_(False)
        if classes is not None:
            self.classifier = nn.Linear(features, classes, bias=False)
            nn.init.normal_(self.classifier.weight, std=0.001)

    def neck(self, pooled: Tensor) -> Tensor:
        """Pooled feature (B, C) -> BN feature (B, C)."""
        return self.bottleneck(pooled[..., None, None]).flatten(1)

    def feature(self, feature_map: Tensor) -> Tensor:
        """(B, C, H, W) -> BN feature (B, C)."""
        return self.neck(self.pool(feature_map))

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> pooled feature (B, C), for the metric losses, and logits (B, classes)."""
        pooled = self.pool(feature_map)
        return pooled, self.classifier(self.neck(pooled))


def positional_mean(x: Tensor) -> Tensor:
    """Mean over the positions in float32, (B, C, H, W) -> (B, C), for maps with values below zero, which GeM
    cuts off."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean((-2, -1))


def gem(x: Tensor, p: float = 3.0, eps: float = 1e-6) -> Tensor:
    """Generalised-mean pooling in float32, (B, C, H, W) -> (B, C)."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind).clamp(min=eps).pow(p).mean((-2, -1)).pow(1 / p)


class Training(NamedTuple):
    """What the losses of one batch of one domain need."""

    expert: Tensor
    """e, (B, C): pooled feature of the domain's own expert."""
    expert_logits: Tensor
    """(B, identities of the domain)."""
    universal: Tensor
    """u, (B, C): pooled feature of the global branch."""
    universal_logits: Tensor
    """(B, identities of all domains)."""
    mixtures: dict[str, Tensor]
    """q, (B, C): pooled mixture of the other experts, one for each scoring network."""


@dataclass(frozen=True)
class Description:
    """What the network says about images, before the parts are mixed into an embedding."""

    experts: Tensor
    """(K, B, C, H, W): maps f_k."""
    universal: Tensor
    """(B, C, H, W): map g of the global branch."""
    relevance: Tensor
    """(B, K, L): distances r_{k,l}; small = the image looks like domain k at layer l."""


class META(nn.Module):
    """The whole network. Images are float32 RGB in 0..255, (B, 3, H, W).

    classes: identities of each source domain, in the domains' order; K = len(classes) >= 2.
    scoring: "separate" has one scoring network for each expert, as released, and serves aggregation
    `learned`; "shared" has one for all, on r / (L sqrt(C_l)), and serves `shared`; "both" has both.
    instance_norm: False puts BN where the global branch has IN (ablation).
    episodic_grad: let the consistency loss reach the shared convolutions through the other experts.
    scoring_relu: a ReLU between the two layers of the scoring networks.
    released: also build what the release holds and never uses, under its names.
    size: (H, W) of the images, which a ViT's positions need. pixels: name of the pixel statistics in
    `backbone.PIXELS`; None for those of the architecture.
    Raises ValueError with fewer than two domains, UserError when patches do not fill the size.
    """

    def __init__(
        self,
        classes: Sequence[int],
        architecture: str | Architecture | VitArchitecture = "r50",
        scoring: Literal["shared", "separate", "both"] = "shared",
        instance_norm: bool = True,
        episodic_grad: bool = False,
        scoring_relu: bool = False,
        released: bool = False,
        size: tuple[int, int] = (256, 128),
        pixels: str | None = None,
    ):
        super().__init__()
        if len(classes) < 2:
            raise ValueError("META needs at least two source domains")
        arch = architecture_of(architecture)
        self.K, self.features = len(classes), arch.features
        self.episodic_grad, self.scoring_relu = episodic_grad, scoring_relu
        self.aggregation: Aggregation = "learned" if scoring == "separate" else "shared"
        self.temperature, self.normalize_parts = 1.0, False
        register_pixels(self, pixels or arch.pixels)
        if isinstance(arch, VitArchitecture):
            self.backbone = VitTrunk(arch, self.K, size)
            self.backbone_agg = VitTail(arch, size, instance_norm)
        else:
            self.backbone = Trunk(arch, self.K, PROBE_ROWS if released else 0)
            self.backbone_agg = GlobalTail(arch, instance_norm)

        def head(count: int | None) -> Head:
            return Head(arch.features, count, released, arch.signed)

        self.heads_agg = head(sum(classes))
        if released:
            self.heads_F_final = head(sum(classes))
        # No loss reaches this neck, in the release too: it divides by sqrt(1 + eps), no more.
        self.heads_F_finals = head(sum(classes) if released else None)
        self.heads_F_finals.requires_grad_(False)
        for k, count in enumerate(classes, 1):
            if released:
                self.add_module(f"heads_F_final_Expert{k}", head(count))
            self.add_module(f"heads_Expert{k}", head(count))

        suffixes = [f"Expert{k}" for k in range(1, self.K + 1)] if scoring != "shared" else []
        self.scorings = ["learned"] if suffixes else []
        if scoring != "separate":
            suffixes.append("shared")
            self.scorings.append("shared")
        for suffix in suffixes:
            first, last = scoring_layers(len(self.backbone.units), small=suffix == "shared")
            self.add_module(f"affine1_{suffix}", first)
            self.add_module(f"affine2_{suffix}", last)
        # Over the layers the scores are a mean, not a sum: with a sum one step of SGD moves them by more than
        # a softmax bears, and which expert ends up with all the weight is left to chance.
        scale = len(self.backbone.units) * torch.tensor(self.backbone.channels, dtype=torch.float).sqrt()
        self.register_buffer("layer_norms", scale, persistent=False)

    def set_warm(self, warm: bool) -> None:
        """Freeze (True) or release what the warm-up freezes: shared layers and the global branch's set."""
        self.backbone.set_warm(warm)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> the stem's output, common to all passes."""
        return self.backbone.first((images - self.pixel_mean) / self.pixel_std)

    def scores(self, kind: str, distances: Tensor, experts: Sequence[int]) -> Tensor:
        """Scores z_k of a scoring network ("learned" or "shared"), (B, len(experts)), from r (B, ., L)."""
        with own_type(distances):
            if kind == "shared":
                return self._score("shared", distances / self.layer_norms)
            columns = [self._score(f"Expert{k + 1}", distances[:, i]) for i, k in enumerate(experts)]
            return torch.stack(columns, 1)

    def _score(self, suffix: str, distances: Tensor) -> Tensor:
        hidden = getattr(self, f"affine1_{suffix}")(distances)
        if self.scoring_relu:
            hidden = hidden.relu()
        return getattr(self, f"affine2_{suffix}")(hidden).squeeze(-1)

    def forward(self, images: Tensor, domain: int | None = None, warm: bool = False) -> Training | Tensor:
        """Training: a batch of one domain -> `Training`. Otherwise the embedding, see `embed`.

        domain: 0..K-1, the batch's source domain, which plays the unseen one for the other experts.
        warm: keep the global BN set at its running statistics (see `set_warm`).
        """
        if domain is None:
            return self.embed(images)
        stem = self.normalise(images)
        e, e_logits, mixtures = self.expert_half(stem, domain)
        return Training(e, e_logits, *self.global_half(stem, warm), mixtures)

    def expert_half(self, stem: Tensor, domain: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Training, from the stem's output: e, its logits and the mixtures of the other experts."""
        others = [k for k in range(self.K) if k != domain]
        with torch.set_grad_enabled(self.episodic_grad):
            frozen = self.backbone.frozen(stem, others)
        distances = self._relevance(frozen)
        mixtures = {}
        for kind in self.scorings:
            w = weights(kind, distances, self.scores(kind, distances, others))
            mixtures[kind] = self.heads_F_finals.pool(mix(w, frozen.maps))
        own = self.backbone.live(stem, domain, learn=True)
        return *getattr(self, f"heads_Expert{domain + 1}")(own), mixtures

    def global_half(self, stem: Tensor, warm: bool = False) -> tuple[Tensor, Tensor]:
        """Training, from the stem's output: u and its logits."""
        return self.heads_agg(self.backbone_agg(self.backbone.live(stem, self.K, learn=not warm)))

    def _relevance(self, frozen) -> Tensor:
        return relevance(
            frozen.domain_mean, frozen.domain_var, frozen.image_mean, frozen.image_var, self.backbone.channels
        )

    def describe(self, images: Tensor) -> Description:
        """All K experts, the global branch and the relevance, in evaluation mode, one pass."""
        frozen = self.backbone.frozen(self.normalise(images), range(self.K), universal=True)
        return Description(frozen.maps, self.backbone_agg(frozen.shared), self._relevance(frozen))

    def expert_weights(self, description: Description, mode: Aggregation | None = None) -> Tensor:
        """Weights of the experts, (B, K). Raises UserError when the mode's scoring network is not there."""
        mode = mode or self.aggregation
        scores = None
        if mode in ("shared", "learned"):
            if mode not in self.scorings:
                raise UserError(
                    f"aggregation '{mode}': this network was trained with the '{self.scorings[0]}' scoring; "
                    f"choose {self.scorings[0]}, nearest, uniform or official"
                )
            scores = self.scores(mode, description.relevance, range(self.K))
        return weights(mode, description.relevance, scores, self.temperature)

    def mixture(self, description: Description, mode: Aggregation | None = None) -> Tensor:
        """First half of the embedding: feature of the experts' mixture, (B, C)."""
        return self.heads_F_finals.feature(mix(self.expert_weights(description, mode), description.experts))

    def parts(self, description: Description, mode: Aggregation | None = None) -> tuple[Tensor, Tensor]:
        """The two halves of the embedding: mixture and global feature, (B, C) each."""
        return self.mixture(description, mode), self.heads_agg.feature(description.universal)

    def joined(self, description: Description, mode: Aggregation | None = None) -> Tensor:
        """The embedding of what `describe` gave, (B, 2C); see `embed`."""
        halves = self.parts(description, mode)
        if self.normalize_parts:
            halves = tuple(nn.functional.normalize(half) for half in halves)
        return torch.cat(halves, 1)

    def embed(self, images: Tensor, mode: Aggregation | None = None) -> Tensor:
        """Embedding [mixture | global], (B, 2C), to be compared by the cosine distance.

        `aggregation` (or mode), `temperature` and `normalize_parts` of this object apply; the last gives
        each half length 1, where the release lets the larger one dominate.
        """
        return self.joined(self.describe(images), mode)


NETWORKS = ("meta_r50_3experts",)


def official(name: str, classes: Sequence[int] = RELEASED_CLASSES) -> META:
    """The released training network, every name and shape of its state dict: "meta_r50_3experts".

    It evaluates as the release does (aggregation `official`). classes: identities of the three sources,
    (CUHK03, CUHK-SYSU, Market-1501) as configured in the release. Raises ValueError on another name.
    """
    if name not in NETWORKS:
        raise ValueError(f"no official network '{name}'; there is {', '.join(NETWORKS)}")
    model = META(classes, "r50", scoring="separate", released=True)
    model.aggregation = "official"
    return model.eval()


def load_official(name: str, path: Path | str) -> META:
    """A checkpoint written by the official trainer -> `official(name)` with its class counts.

    Takes the file with or without the trainer's wrapper (key `model`) and the prefix `module.`; the scratch
    buffers `mean_in`, `var_in` are ignored whatever their batch size. Every head has the classes that its
    classifier has in the file: in the release those of the experts are configured and those of the union may
    be counted, so one need not be the sum of the others. Raises UserError that lists what does not fit, or
    says that the file is no such checkpoint.
    """
    state = load_torch(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no state dict; expected a checkpoint of the official META trainer")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    names = [f"heads_Expert{k}.classifier.weight" for k in (1, 2, 3)]
    missing = [key for key in names if key not in state]
    if missing:
        raise UserError(f"{path}: no META checkpoint with three experts, {missing[0]} is missing")
    model = official(name, [len(state[key]) for key in names])
    for scope, module in model.named_modules():
        classifier = state.get(f"{scope}.classifier.weight")
        if isinstance(module, Head) and isinstance(classifier, Tensor):
            learns = module.classifier.weight.requires_grad
            module.classifier = nn.Linear(model.features, len(classifier), bias=False).requires_grad_(learns)
        if isinstance(module, Probe):
            for key, value in module.named_buffers():
                state[f"{scope}.{key}"] = value
    load_state(model, state, path)
    return model
