"""What training keeps of a network besides its step: optimisers, average, best weights; and how it is
applied."""

from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from most_net.data import Pairs, crop_to, pad_to, signed
from most_net.metrics import grey_bytes, ssim, window_of
from shared.runtime import maybe_compile


@torch.inference_mode()
def synthesise(net: nn.Module, pairs: Pairs, size: int, batch: int = 32) -> Tensor:
    """Sketches (N, 1, H, W) in [0, 1] of the photos of `pairs`, padded to `size` and cropped back."""
    net.eval()
    height, width = pairs.photos.shape[-2:]
    device = next(net.parameters()).device
    out = torch.empty(len(pairs), 1, height, width)
    for style in sorted(set(pairs.styles.tolist())):
        for chosen in (pairs.styles == style).nonzero()[:, 0].cpu().split(batch):
            photos = pad_to(pairs.photos[chosen], max(size, height), max(size, width)).to(device)
            sketches = net.sketch(signed(photos), min(style, styles_in(net) - 1))
            out[chosen] = crop_to(sketches, height, width).cpu() / 2 + 0.5
    net.train()
    return out.clamp(0, 1)


def styles_in(net: nn.Module) -> int:
    """Number of memories of a network, 1 for those without."""
    return len(net.memories) if hasattr(net, "memories") else 1


class Learner:
    """What a trial trains: network, discriminator, optimisers, the average and the best weights so far."""

    def __init__(
        self,
        name: str,
        net: nn.Module,
        discriminator: nn.Module | None,
        lr: float,
        betas: tuple[float, float],
        average: bool,
        keep_best: bool,
    ):
        def adam(module: nn.Module) -> torch.optim.Adam:
            return torch.optim.Adam(module.parameters(), lr, betas, fused=True)

        self.net, self.discriminator = net, discriminator
        self.wrapped, self.wrapped_d = net, discriminator
        self.optimizers = [adam(net)]
        self.models: dict[str, nn.Module] = {name: net}
        self.holders: dict[str, object] = {"optimizer": self.optimizers[0]}
        if discriminator is not None:
            self.optimizers.append(adam(discriminator))
            self.models["discriminator"] = discriminator
            self.holders["optimizer_d"] = self.optimizers[1]
        self.perceptual: nn.Module | None = None
        self.average = deepcopy(net) if average else None
        self.best = deepcopy(net) if keep_best else None
        self.models |= {"average": self.average} if average else {}
        self.models |= {"best": self.best} if keep_best else {}
        self.best_ssim = float("-inf")

    def prepare(self, accelerator: Accelerator, compiled: bool) -> None:
        """Wrap networks and optimisers for the device, precision and number of processes."""
        self.wrapped = accelerator.prepare(maybe_compile(self.net, compiled))
        if self.discriminator is not None:
            self.wrapped_d = accelerator.prepare(self.discriminator)
        self.optimizers = [accelerator.prepare(optimizer) for optimizer in self.optimizers]

    @property
    def current(self) -> nn.Module:
        """The weights to validate and to keep: the average, where there is one."""
        return self.average or self.net

    def validate(self, pairs: Pairs, size: int) -> float:
        """SSIM on held-out pairs; remembers the best weights."""
        window = window_of(pairs.photos.shape[-2])
        truth, got = pairs.sketches.float().cpu(), grey_bytes(synthesise(self.current, pairs, size))
        value = float(ssim(truth, got, window=window).mean())
        if self.best is not None and value > self.best_ssim:
            self.best_ssim = value
            self.best.load_state_dict(self.current.state_dict())
        return value


def learning_rate(done: float, decay: float) -> float:
    """Factor of the learning rate when the share `done` of the steps is over: 1, then linearly to 0."""
    return 1.0 if done < 1 - decay else (1 - done) / decay
