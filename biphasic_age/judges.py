"""Who judges the results: age, attribute and identity networks that no training ever used.

Papers of this line ask a commercial service (Face++) for ages and verification confidence. In its place stand
two networks of another form than those in the losses, trained on other data where there are any (drawn people
that training never sees) and otherwise on the training fold; or any ONNX file of the user's. Their own errors
on real test faces stand beside every number. Absolute values cannot be compared with Face++'s.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biphasic_age.data import FaceSet, TrainSet
from shared.io import load_safetensors, progress
from shared.onnxfile import open_onnx
from shared.runtime import StepBatches, UserError


class Trunk(nn.Module):
    """Residual network with group normalisation and average pooling: image (B, 3, H, W) in [-1, 1] to (B, D).

    width: channels before the first of `stages` stages, each half as large as the one before and, up to the
    third, twice as wide.
    """

    def __init__(self, width: int, stages: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, 2, 2)
        blocks, inputs = [], width
        for stage in range(stages):
            outputs = width * 2 ** min(stage + 1, 3)
            blocks.append(JudgeBlock(inputs, outputs))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.features = inputs * 9

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        for block in self.blocks:
            h = block(h)
        return F.adaptive_avg_pool2d(h, 3).flatten(1)


class JudgeBlock(nn.Module):
    """Half the size: 2x2 mean of (two 3x3 convolutions plus a 1x1 skip)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
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
        self.trunk = Trunk(width, stages)
        self.out = nn.Linear(self.trunk.features, 1 + attributes)

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Years (B,) and attribute logits (B, A)."""
        out = self.out(self.trunk(image)).float()
        return 45 + 15 * out[:, 0], out[:, 1:]

    def forward(self, image: Tensor) -> Tensor:
        return self.both(image)[0]


class IdentityJudge(nn.Module):
    """Unit embeddings (B, D), learned with an additive margin on the cosine (CosFace)."""

    def __init__(self, width: int, stages: int, people: int, embedding: int = 96):
        super().__init__()
        self.trunk = Trunk(width, stages)
        self.out = nn.Linear(self.trunk.features, embedding)
        self.centres = nn.Parameter(torch.randn(people, embedding))

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.out(self.trunk(image)).float(), dim=1)

    def loss(self, image: Tensor, people: Tensor, margin: float = 0.2, scale: float = 20.0) -> Tensor:
        cosine = self(image) @ F.normalize(self.centres, dim=1).T
        return F.cross_entropy(scale * (cosine - margin * F.one_hot(people, cosine.shape[1])), people)


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


def train_judges(
    networks: dict[str, nn.Module],
    source: FaceSet,
    steps: int,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> None:
    """Teach `age` (an `AgeJudge`) and `identity` (an `IdentityJudge`), or one of them, on faces of all groups
    equally often; AdamW with one cycle, slight colour changes and mirroring of the picture."""
    parameters = [p for network in networks.values() for p in network.train().parameters()]
    optimiser = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    batches = StepBatches(len(source), batch_size, seed, steps, draws=True)
    samples = TrainSet(source, seed, flip=True, jitter=0.1)
    for batch in progress(torch.utils.data.DataLoader(samples, batch_sampler=batches), "judges"):
        batch = {k: v.to(device) for k, v in batch.items()}
        loss = torch.zeros((), device=device)
        if "age" in networks:
            years, logits = networks["age"].both(batch["image"])
            loss = loss + F.smooth_l1_loss(years / 15, batch["age"] / 15, beta=0.2)
            known = batch["attributes"] >= 0
            if known.any():
                loss = loss + F.binary_cross_entropy_with_logits(logits[known], batch["attributes"][known])
        if "identity" in networks:
            loss = loss + networks["identity"].loss(batch["image"], batch["identity"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    for network in networks.values():
        network.eval().requires_grad_(False)


def load_judge(path: Path, network: nn.Module, device: torch.device) -> nn.Module:
    """A judge that an earlier evaluation of the run trained."""
    load_safetensors(path, network)
    return network.to(device).eval().requires_grad_(False)
