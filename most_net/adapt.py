"""Teach a trained network a new artist from a few pairs, by writing a memory. No gradient, seconds.

    python -m most_net.adapt --photos DIR --sketches DIR --out artist.safetensors [--run RUN]
    python -m most_net.predict photo.jpg --memory artist.safetensors

Pairs have equal file names. `--merge` keeps the slots of the run's own memory beside the new ones.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from most_net.align import HEIGHT
from most_net.data import pad_to, signed
from most_net.memory import Memory, merge
from most_net.metrics import image_files, result_file
from most_net.model import MostNet, flatten
from most_net.pairs import Alignment, load, match
from most_net.train import Config as TrainConfig
from most_net.trials import frame_of, load_network
from shared.io import find_run, save_safetensors
from shared.ranges import Count
from shared.runtime import UserError, parse, run_main, step_generator


@dataclass(frozen=True)
class Config:
    """Write a memory for a new artist."""

    photos: Path
    """Folder of photos."""
    sketches: Path
    """Folder of the artist's sketches of them, with equal names."""
    out: Path = Path("artist.safetensors")
    """Where the memory is written, a .safetensors file."""
    run: Path | None = None
    """Run folder. Default: the newest run."""
    trial: str | None = None
    """Network of the run. Default: its last one that has a memory."""
    rounds: Count = 10
    """Rounds of k-means over the pairs' queries."""
    merge: bool = False
    """Keep the slots of the run's own first memory as well."""
    alignment: Alignment = Alignment(colour="grey")
    """What to do with pairs that are not 250 rows by 200 columns; a colour scan of a sketch becomes grey."""


@torch.no_grad()
def learn_artist(net: MostNet, photos: Tensor, sketches: Tensor, rounds: int = 10, seed: int = 0) -> Memory:
    """A memory for the artist of these pairs: photos (N, 3, H, W) and sketches (N, 1, H, W) in [-1, 1].

    The slots start from the queries of the pairs and are refined as k-means does; the values are the mean
    sketch features at the positions that hit a slot.
    """
    old = net.memories[0]
    net.eval()
    queries = flatten(net.key_head(net.photo_encoder(photos)))
    features = flatten(net.sketch_encoder(sketches))
    memory = Memory(queries.shape[1], old.slots, old.tau, old.momentum, old.revive_after, old.topk)
    memory.to(queries.device).fit(queries, features, step_generator(seed, 0), rounds)
    return memory


def main(config: Config) -> None:
    """Read the pairs, write the memory, and say how large it is."""
    if config.out.suffix != ".safetensors":  # by which predict.py knows how to read it
        raise UserError(f"--out {config.out}: give a name that ends in .safetensors")
    result_file(config.out)
    net, settings, trial = load_network(find_run("most_net", config.run), TrainConfig, config.trial)
    if not hasattr(net, "memories"):
        raise UserError(f"--trial {trial.name}: a network without a memory cannot be taught")
    files = [image_files(folder) for folder in (config.photos, config.sketches)]
    found = match(*files, config.photos, config.sketches)
    pairs = load(found, config.alignment, frame_of(settings, trial)[0] / HEIGHT)
    height, width = pairs.photos.shape[-2:]
    side = max(trial.size, height, width)
    photos, sketches = (signed(pad_to(images, side, side)) for images in (pairs.photos, pairs.sketches))
    memory = learn_artist(net, photos, sketches, config.rounds)
    if config.merge:
        memory = merge(net.memories[0], memory)
    save_safetensors(config.out, memory)
    print(f"{len(pairs)} pairs, {memory.slots} slots: {config.out}")


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
