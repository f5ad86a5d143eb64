"""Do aged copies help to recognise people after years? Trains a face recogniser with and without them.

    python augment.py                       # the newest run, its own set
    python augment.py --write copies/       # also the copies, as pictures and a list path,age,identity

Every training person keeps the pictures of the youngest age group alone. One recogniser learns from those,
another one, for as many steps, also from their translations to the other groups. Both are then asked about
people that neither the generator nor they have seen: pairs of pictures at least two age groups apart.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from biphasic_age.data import FaceSet, all_faces, drawn_faces, open_faces
from biphasic_age.frozen import IdentityNet
from biphasic_age.stages import Trained, load_generator
from shared.io import progress, write_image
from shared.metrics import auc, tar_at_far
from shared.published import format_table
from shared.ranges import Count, Positive, Seed
from shared.records import write_json
from shared.runtime import StepBatches, UserError, parse, pick_device, run_main, seed_everything

PEOPLE_SEEDS = 3_000_003, 4_000_003
"""Seeds of the drawn people that recognisers learn from, and that they are asked about."""
APART = 2
FAR = 0.01


@dataclass(frozen=True)
class AugmentConfig:
    """Which generator, and how the recognisers are trained."""

    run: Path | None = None
    """Run folder; default: the newest."""
    variant: str = "full"
    """Which network of the run."""
    data: str | None = None
    """Its set; default: the run's last. Public sets need the places that the run was trained with."""
    people: Count = 120
    """Drawn people to learn from, and as many to be asked about."""
    pictures: Count = 6
    """Pictures of each drawn person."""
    limit: Count = 4000
    """Of a public set at most so many pictures of each part."""
    steps: Count = 400
    """Training steps of each recogniser."""
    batch_size: Count = 32
    """Pictures per step."""
    lr: Positive = 1e-3
    """Learning rate of AdamW."""
    width: Count = 16
    """Channels of the recogniser's first stage."""
    write: Path | None = None
    """Folder for the aged copies and their list.csv."""
    seed: Seed = 0
    """Seed of the recognisers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


@dataclass
class Faces:
    """Pictures in memory: images (N, 3, S, S) in [-1, 1], layouts (N, S, S), groups and people (N,); names of
    the people by number."""

    images: Tensor
    layouts: Tensor
    groups: Tensor
    people: Tensor
    names: list[str]

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.layouts, self.groups, self.people

    def chosen(self, keep: Tensor) -> "Faces":
        return Faces(*(value[keep] for value in self._tensors()), self.names)

    def joined(self, other: "Faces") -> "Faces":
        """These and other pictures of the same people."""
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return Faces(*map(torch.cat, pairs), self.names)


def faces_of(source: FaceSet, limit: int) -> Faces:
    """The first `limit` pictures of a set."""
    return Faces(*all_faces(source, limit), source.groups[:limit], source.people[:limit], source.names)


def youngest(known: Faces) -> Faces:
    """The pictures of every person's youngest age group, people renumbered."""
    first = torch.full((int(known.people.max()) + 1,), 10**6)
    first = first.scatter_reduce(0, known.people, known.groups, "amin")
    kept = known.chosen(known.groups == first[known.people])
    there, kept.people = kept.people.unique(return_inverse=True)
    kept.names = [known.names[k] for k in there.tolist()]
    return kept


@torch.no_grad()
def aged_copies(trained: Trained, known: Faces, device: torch.device, batch: int = 64) -> Faces:
    """Every picture translated to every group but its own, without noise."""
    groups = len(trained.scale.means)
    which = torch.arange(len(known.images)).repeat_interleave(groups)
    target = torch.arange(groups).repeat(len(known.images))
    other = target != known.groups[which]
    which, target = which[other], target[other]
    net, made = trained.net.to(device), []
    for rows, targets in progress(list(zip(which.split(batch), target.split(batch), strict=True)), "copies"):
        x, layout = known.images[rows].to(device), known.layouts[rows].to(device)
        made.append(net(x, layout, targets.to(device), noise=0).float().cpu())
    return Faces(torch.cat(made), known.layouts[which], target, known.people[which], known.names)


def train_recogniser(known: Faces, config: AugmentConfig, device: torch.device) -> IdentityNet:
    """A recogniser of the people in `known`; mirrored every other time."""
    seed_everything(config.seed)
    net = IdentityNet(int(known.people.max()) + 1, config.width).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), config.lr)
    batches = StepBatches(len(known.images), config.batch_size, config.seed, config.steps)
    for step, rows in enumerate(progress(batches, "recogniser")):
        x = known.images[rows]
        loss = F.cross_entropy(net((x.flip(-1) if step % 2 else x).to(device)), known.people[rows].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def cross_age(net: IdentityNet, asked: Faces, device: torch.device) -> dict[str, float]:
    """TAR at FAR 1 % and AUC over all pairs of pictures at least `APART` groups apart. UserError when there
    are no such pairs of one person."""
    embedding = torch.cat([net.embed(x.to(device)).cpu() for x in asked.images.split(256)])
    scores = embedding @ embedding.T
    apart = (asked.groups[:, None] - asked.groups[None]) >= APART
    same = asked.people[:, None] == asked.people[None]
    if not (apart & same).any():
        raise UserError(f"no person has pictures {APART} age groups apart to be recognised by")
    scores, labels = scores[apart].numpy(), same[apart].int().numpy()
    return {
        "tar": tar_at_far(scores, labels, FAR),
        "auc": auc(scores, labels),
        "genuine_pairs": int(labels.sum()),
        "impostor_pairs": int((1 - labels).sum()),
    }


def write_copies(folder: Path, copies: Faces, trained: Trained) -> None:
    """The copies as pictures that say they are synthetic, and list.csv."""
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "age", "identity"))
        for number, (image, group, person) in enumerate(
            zip(copies.images, copies.groups.tolist(), copies.people.tolist(), strict=True)
        ):
            name = f"{number:06d}.png"
            write_image(folder / name, image / 2 + 0.5, f"aged copy by {trained.folder.name}")
            rows.writerow((name, round(trained.scale.means[group], 1), copies.names[person]))


def main(config: AugmentConfig) -> Path:
    """Train and ask both recognisers; returns the run folder, in which augment.json has the numbers."""
    device = pick_device(config.device)
    if config.write is not None:
        config.write.mkdir(parents=True, exist_ok=True)
    trained = load_generator(config.run, config.variant, config.data)
    settings = trained.config
    if trained.data == "scene":
        raise UserError("the two-head scene has no people; name a set of faces with --data")
    if trained.data == "faces":
        known, asked = (
            drawn_faces(config.people, seed, settings.image_size, config.pictures, settings.limits)
            for seed in PEOPLE_SEEDS
        )
    else:
        known, asked = (open_faces(settings, trained.data, part) for part in ("train", "test"))
    asked, known = faces_of(asked, config.limit), youngest(faces_of(known, config.limit))
    copies = aged_copies(trained, known, device)
    results = {}
    for name, learned in (("own pictures", known), ("with aged copies", known.joined(copies))):
        net = train_recogniser(learned, config, device)
        results[name] = {"training_pictures": len(learned.images), **cross_age(net, asked, device)}
    rows = [[name, *values.values()] for name, values in results.items()]
    print(format_table(["learned from", *next(iter(results.values()))], rows))
    gain = results["with aged copies"]["tar"] - results["own pictures"]["tar"]
    print(f"TAR at FAR {FAR:.0%}, pictures {APART} age groups apart: {gain:+.3f} with aged copies")
    write_json(trained.folder / "augment.json", {"config": config, "far": FAR, "results": results})
    if config.write is not None:
        write_copies(config.write, copies, trained)
    return trained.folder


if __name__ == "__main__":
    run_main(lambda: print(main(parse(AugmentConfig, __doc__))))
