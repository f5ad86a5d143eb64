"""Batches of one source domain, P identities x k images, the domains in turn."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from shared.runtime import UserError


class IdentityStream:
    """Endless groups of `images` indices of one identity, drawn as in the official identity sampler.

    P identities are chosen without replacement among those still available. Each keeps a shuffled list of
    its images (drawn with replacement up to `images` if it has fewer), gives `images` at a time, and leaves
    when fewer remain. When fewer than P identities are available, all come back with fresh lists.

    members: the indices of each identity. Memory is O(number of indices).
    """

    def __init__(self, members: Sequence[Sequence[int]], identities: int, images: int, rng: random.Random):
        self.members, self.identities, self.images, self.rng = members, identities, images, rng
        self.refill()

    def refill(self) -> None:
        """Every identity available again."""
        self.available = list(range(len(self.members)))
        self.left: dict[int, list[int]] = {}

    def batch(self) -> list[int]:
        """Next identities x images indices, those of one identity in a row."""
        if len(self.available) < self.identities:
            self.refill()
        chosen = self._choose()
        batch = []
        for identity in chosen:
            if identity not in self.left:
                self.left[identity] = self._shuffled(self.members[identity])
            batch += [self.left[identity].pop() for _ in range(self.images)]
        # The chosen stand at the end of the list, so an exhausted one leaves without a search.
        stay = [identity for identity in chosen if len(self.left[identity]) >= self.images]
        self.available[len(self.available) - self.identities :] = stay
        return batch

    def _choose(self) -> list[int]:
        """Swap P random identities to the end of the list of available ones."""
        pool = self.available
        for end in range(len(pool) - 1, len(pool) - 1 - self.identities, -1):
            other = self.rng.randrange(end + 1)
            pool[end], pool[other] = pool[other], pool[end]
        return pool[len(pool) - self.identities :]

    def _shuffled(self, members: Sequence[int]) -> list[int]:
        if len(members) < self.images:
            return self.rng.choices(members, k=self.images)
        return self.rng.sample(members, len(members))


class DomainBatches(Sampler):
    """Batch sampler of a run of `steps` steps: step t holds images of domain t mod K alone.

    identities: for each image its identity, numbered in the union of all domains; domains: its domain,
    0..K-1 (give 0 everywhere for mixed batches). people x images: one batch.
    Yields lists of (index, draw), draw being the running number of the sample in the whole run. A function
    of (seed, step): a resumed run skips to start_step without loading anything.

    A step has world x shares batches, of which a process yields its `shares` one after another. They hold
    the same domain and other identities: each has a stream over its own share of the identities, which is
    dealt anew after every nominal epoch of the domain, so no process generates another one's stream.
    Raises UserError when a domain has fewer identities than a step asks for.
    """

    def __init__(
        self,
        identities: Sequence[int],
        domains: Sequence[int],
        people: int,
        images: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        names: Sequence[str] | None = None,
        shares: int = 1,
    ):
        self.people, self.images, self.seed = people, images, seed
        self.steps, self.start_step = steps, start_step
        self.parts, self.own = world * shares, range(rank * shares, (rank + 1) * shares)
        grouped: dict[int, dict[int, list[int]]] = {}
        for index, (identity, domain) in enumerate(zip(identities, domains, strict=True)):
            grouped.setdefault(domain, {}).setdefault(identity, []).append(index)
        self.members = [list(grouped[domain].values()) for domain in sorted(grouped)]
        for domain, members in enumerate(self.members):
            if len(members) < people * self.parts:
                name = names[domain] if names else f"number {domain}"
                where = f"{world} processes" + (f" and {shares} shares" if shares > 1 else "")
                raise UserError(
                    f"source domain {name} has {len(members)} identities, a step asks for "
                    f"{people * self.parts} ({people} for each of {where}): lower --people or leave the "
                    "domain out"
                )

    def __len__(self) -> int:
        return (self.steps - self.start_step) * len(self.own)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        domains = range(len(self.members))
        streams = {part: [self._stream(domain, part) for domain in domains] for part in self.own}
        size = self.people * self.images
        for step in range(self.steps):
            for part in self.own:
                batch = next(streams[part][step % len(domains)])
                if step >= self.start_step:
                    first = (step * self.parts + part) * size
                    yield list(zip(batch, range(first, first + size), strict=True))

    def _stream(self, domain: int, part: int) -> Iterator[list[int]]:
        members = self.members[domain]
        count = sum(map(len, members))
        visits = max(count // (self.people * self.images * self.parts), 1)
        deal = 0
        while True:
            share = members
            if self.parts > 1:
                order = list(range(len(members)))
                random.Random(f"{self.seed} {domain} {deal}").shuffle(order)
                share = [members[identity] for identity in order[part :: self.parts]]
            rng = random.Random(f"{self.seed} {domain} {deal} {part}")
            stream = IdentityStream(share, self.people, self.images, rng)
            for _ in range(visits) if self.parts > 1 else iter(int, 1):
                yield stream.batch()
            deal += 1
