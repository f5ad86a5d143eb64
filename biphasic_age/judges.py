"""Who judges the results: age, attribute and identity networks that no training ever used.

Papers of this line ask a commercial service (Face++) for ages and verification confidence. In its place stand
two networks of another form than those in the losses, trained on other data where there are any (drawn people
that training never sees) and otherwise on the training fold; or any ONNX file of the user's. Their own errors
on real test faces stand beside every number. Absolute values cannot be compared with Face++'s.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.data import FaceSet, PairSet, TrainSet
from shared.io import load_safetensors, progress
from shared.onnxfile import open_onnx
from shared.runtime import StepBatches, UserError


class Trunk(nn.Module):
    """Residual network with average pooling: image (B, 3, H, W) in [-1, 1] to (B, D).

    width: channels before the first of `stages` stages, each half as large as the one before and, up to the
    third, twice as wide. grid: side of the pooled maps. norm: channels -> normalisation.
    """

    def __init__(self, width: int, stages: int, grid: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, 2, 2)
        blocks, inputs = [], width
        for stage in range(stages):
            outputs = width * 2 ** min(stage + 1, 3)
            blocks.append(JudgeBlock(inputs, outputs, norm))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.grid, self.features = grid, inputs * grid**2

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        for block in self.blocks:
            h = block(h)
        return F.adaptive_avg_pool2d(F.silu(h), self.grid).flatten(1)


class JudgeBlock(nn.Module):
    """Half the size: 2x2 mean of (two 3x3 convolutions plus a 1x1 skip)."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Averaging first: what a pooled 1x1 convolution gives is the 1x1 convolution of the mean.
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.avg_pool2d(F.silu(self.norm2(h)), 2))
        return h + self.skip(F.avg_pool2d(x, 2))


class AgeJudge(nn.Module):
    """Age in years by regression, and attributes. attributes: how many."""

    def __init__(self, width: int, stages: int, attributes: int):
        super().__init__()
        self.trunk = Trunk(width, stages, 3, partial(nn.GroupNorm, 4))
        self.out = nn.Linear(self.trunk.features, 1 + attributes)

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Years (B,) and attribute logits (B, A)."""
        out = self.out(self.trunk(image)).float()
        return 45 + 15 * out[:, 0], out[:, 1:]

    def forward(self, image: Tensor) -> Tensor:
        return self.both(image)[0]


class IdentityJudge(nn.Module):
    """Unit embeddings (B, D), in which pictures of one person are nearer to each other than to anybody's.

    It pools less than the age judge: where a feature lies says more about who it is than about how old.
    """

    def __init__(self, width: int, stages: int, embedding: int = 96):
        super().__init__()
        self.trunk = Trunk(width, stages, 5, nn.BatchNorm2d)
        features = self.trunk.features
        self.out = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, embedding))

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.out(self.trunk(image)).float(), dim=1)

    def loss(self, image: Tensor, people: Tensor, temperature: float = 0.07) -> Tensor:
        """Supervised contrastive loss of a batch (B,) that has several pictures of each person: the cross
        entropy of finding them among all others."""
        embedding = self(image)
        itself = torch.eye(len(people), dtype=torch.bool, device=image.device)
        scores = (embedding @ embedding.T / temperature).masked_fill(itself, -1e4)
        same = (people[:, None] == people[None]) & ~itself
        return -scores.log_softmax(1)[same].mean()


class OnnxJudge(nn.Module):
    """The user's own estimator as an ONNX file: float32 (N, 3, H, W) RGB in [-1, 1], resized to the size that
    the file asks for -> its first output: (N,) or (N, 1) years, or (N, D) embeddings, which are normalised.

    Raises UserError when the file is missing or no such network.
    """

    def __init__(self, path: Path, embeds: bool):
        super().__init__()
        self.session = open_onnx(path)
        entry = self.session.get_inputs()[0]
        if len(entry.shape) != 4 or (isinstance(entry.shape[1], int) and entry.shape[1] != 3):
            raise UserError(f"{path}: expected an input (N, 3, H, W), found {entry.shape}")
        self.path, self.embeds, self.entry = path, embeds, entry.name
        height, width = entry.shape[2:]
        self.size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, image: Tensor) -> Tensor:
        if self.size and tuple(image.shape[-2:]) != self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True, align_corners=False)
        out = self.session.run(None, {self.entry: image.float().cpu().numpy().astype(np.float32)})[0]
        out = torch.from_numpy(np.asarray(out)).to(image.device)
        if self.embeds:
            if out.ndim != 2:
                raise UserError(f"{self.path}: embeddings must be (N, D), found {tuple(out.shape)}")
            return F.normalize(out, dim=1)
        if out.numel() != len(image):
            raise UserError(f"{self.path}: one age per picture expected, found {tuple(out.shape)}")
        return out.reshape(-1)


def train_age_judge(
    judge: AgeJudge,
    source: FaceSet,
    steps: int,
    batch_size: int,
    device: torch.device,
    seed: int,
    jitter: float = 0.1,
) -> None:
    """Teach ages and attributes, on pictures of all age groups equally often, mirrored every other time."""
    samples = TrainSet(source, seed, flip=True, jitter=jitter)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        years, logits = judge.both(batch["image"])
        total = F.smooth_l1_loss(years / 15, batch["age"] / 15, beta=0.2)
        known = batch["attributes"] >= 0
        if known.any():
            answers = F.binary_cross_entropy_with_logits(logits[known], batch["attributes"][known])
            total = total + answers
        return total

    _train(judge, samples, loss, steps, batch_size, 2e-3, device, seed)


def train_identity_judge(
    judge: IdentityJudge, source: FaceSet, steps: int, batch_size: int, device: torch.device, seed: int
) -> None:
    """Teach who is who, on two pictures of each person, whatever age, pose and light they have."""
    samples = PairSet(source, seed, jitter=0.1)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return judge.loss(batch["image"], batch["identity"])

    _train(judge, samples, loss, steps, batch_size - batch_size % 2, 3e-3, device, seed)


def _train(
    judge: nn.Module,
    samples: TrainSet,
    loss: Callable[[dict[str, Tensor]], Tensor],
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
    seed: int,
) -> None:
    """AdamW with one cycle; leaves the judge frozen."""
    judge.train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    batches = StepBatches(len(samples), batch_size, seed, steps, draws=True)
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches)
    for batch in progress(loader, type(judge).__name__):
        value = loss({k: v.to(device) for k, v in batch.items()})
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()
    judge.eval().requires_grad_(False)


def load_judge(path: Path, network: nn.Module, device: torch.device) -> nn.Module:
    """A judge that an earlier evaluation of the run trained."""
    load_safetensors(path, network)
    return network.to(device).eval().requires_grad_(False)
