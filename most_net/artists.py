"""One network with a memory per artist, on unseen faces; and a new artist taught by writing alone."""

import torch
from torch import Tensor

from most_net.adapt import learn_artist
from most_net.data import Pairs, face_pairs
from most_net.learner import synthesise
from most_net.mechanism import padded
from most_net.metrics import grey_bytes, ssim
from most_net.model import MostNet
from shared.faces import ARTISTS
from shared.io import image_grid

TEST_SEED, TEST_FACES, TAUGHT_PAIRS, SHOWN = 998, 48, 8, 6


def measure_artists(net: MostNet, names: tuple[str, ...], size: int) -> tuple[dict[str, float], Tensor]:
    """Numbers and a sheet (3, H, W) for a network with one memory per artist in `names`.

    Numbers: SSIM of every memory's sketches with every artist's (`b from a's memory`), whether an artist's
    are matched best from the own memory (`own a`, 1 = yes), and for the first artist of `shared.faces` that
    the network does not know, SSIM with the best old memory and with one written from 8 pairs.
    """
    test = {name: face_pairs(TEST_FACES, TEST_SEED, size, (name,)) for name in names}
    drawn = {name: synthesise(net, with_style(test[name], number), size) for number, name in enumerate(names)}
    found: dict[str, float] = {}
    for of in names:
        values = {by: similarity(test[of], drawn[by]) for by in names}
        found |= {f"{of} from {by}'s memory": value for by, value in values.items()}
        found[f"own {of}"] = float(max(values, key=values.get) == of)

    new = next((artist for artist in ARTISTS if artist not in names), None)
    rows = {"photo": test[names[0]].photos[:SHOWN] / 255}
    for name in names:
        rows |= {name: test[name].sketches[:SHOWN] / 255, f"{name}, ours": drawn[name][:SHOWN]}
    if new is not None:
        pairs = face_pairs(TAUGHT_PAIRS, TEST_SEED + 1, size, (new,))
        unseen = face_pairs(TEST_FACES, TEST_SEED, size, (new,))
        found["new artist, best old memory"] = max(
            similarity(unseen, sketches) for sketches in drawn.values()
        )
        net.memories.append(learn_artist(net, *padded(pairs, size)))
        taught = synthesise(net, with_style(unseen, len(names)), size)
        del net.memories[-1]
        found["new artist, taught"] = similarity(unseen, taught)
        rows |= {f"{new} (new)": unseen.sketches[:SHOWN] / 255, f"{new}, taught": taught[:SHOWN]}
    tiles = [tile.expand(3, -1, -1) for row in rows.values() for tile in row]
    return found, image_grid(tiles, SHOWN, list(rows), scale=max(1, 128 // size))


def with_style(pairs: Pairs, style: int) -> Pairs:
    """The same pairs, to be drawn from memory number `style`."""
    return Pairs(pairs.photos, pairs.sketches, pairs.names, torch.full_like(pairs.styles, style), pairs.parts)


def similarity(truth: Pairs, sketches: Tensor) -> float:
    """Mean SSIM of sketches (N, 1, H, W) in [0, 1] with the drawn ones."""
    return float(ssim(truth.sketches.float(), grey_bytes(sketches)).mean())
