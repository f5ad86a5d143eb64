"""Measurements of what the method's parts are for: codes that do not collapse to the mean face, streams that
agree, one caption with many faces, continuous editing, any number of captions."""

import time

import torch
from torch import Tensor, nn

from anyface.clip import image_features
from anyface.data import Cache, Faces, encode_captions, read_text
from anyface.judges import accuracy, read
from anyface.losses import code_distance
from anyface.model import Stream, assemble, average_captions, edit
from anyface.protocol import clip_score, mean_rank
from anyface.stages import Constants
from anyface.stylegan2 import Generator
from anyface.world import TRAITS, describe, mentioned
from shared.runtime import step_generator


def collapse_index(w_t: Tensor, w: Tensor, mean: Tensor) -> float:
    """mean d(w_t, mean) / mean d(w, mean): 0 when every caption gives the mean face, 1 when codes lie as far
    from it as those of faces."""
    return (code_distance(w_t, mean).mean() / code_distance(w, mean).mean()).item()


def spread(w_t: Tensor, w: Tensor) -> float:
    """Standard deviation of the codes over captions, relative to that over faces."""
    return (w_t.std(0).mean() / w.std(0).mean()).item()


@torch.inference_mode()
def read_texts(
    text: Stream, clip: nn.Module, features: Tensor, tokens: Tensor | None, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """`read_text` in batches: codes (N, L, D) and hidden features (N, F).

    A stream that attends across its batch gets one caption at a time, as in the released inference.
    """
    parts = []
    batch = 1 if text.batch_as_sequence else batch
    for i in range(0, len(features), batch):
        words = None if tokens is None else tokens[i : i + batch]
        parts.append(read_text(text, clip, features[i : i + batch], words))
    codes, phi = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(phi)


@torch.inference_mode()
def code_effects(
    pair: tuple[Stream, Stream], cache: Cache, mean: Tensor, clip: nn.Module, words: bool
) -> dict[str, float]:
    """Collapse, spread and rank of a text and an image stream on the first caption of every test face.

    mean (1, L, D): of the training codes. rank: of the own image feature among all for the text feature.
    words: the text stream reads all tokens.
    """
    text, image = pair
    w_t, phi_t = read_texts(text, clip, cache.text[:, 0], cache.tokens[:, 0] if words else None)
    _, phi_i = read_texts(image, clip, cache.image, None)
    return {
        "collapse index": collapse_index(w_t, cache.codes, mean),
        "spread": spread(w_t, cache.codes),
        "rank": mean_rank(phi_t, phi_i),
        "norm ratio": (w_t.norm(dim=-1).mean() / cache.codes.norm(dim=-1).mean()).item(),
    }


def named_accuracy(seen: Tensor, captions: list[str], coarse: bool | None = None) -> float:
    """Share of the traits named by the captions that the judge sees, in [0, 1]. seen (N, 7). coarse: count
    only coarse (True) or only fine (False) traits."""
    hits = [
        seen[i, t].item() == value
        for i, caption in enumerate(captions)
        for t, value in mentioned(caption)
        if coarse is None or TRAITS[t].coarse == coarse
    ]
    return sum(hits) / len(hits)


@torch.inference_mode()
def caption_effects(
    text: Stream, faces: Faces, cache: Cache, mean: Tensor, constants: Constants, layers: int, seed: int
) -> dict[str, float]:
    """What the judge reads in G(w_t), as accuracy on the named traits: against the true codes, the mean face
    and the captions of other faces; with noise in the coarse layers; and for captions in wordings that the
    streams never trained on. The same on all seven traits, of which a caption leaves some open. Also the mean
    pixel difference of two draws. World only."""
    generator, judge = constants.generator, constants.judge
    captions, unseen = [own[0] for own in faces.captions], [own[0] for own in faces.unseen]
    w_t = text(cache.text[:, 0])[0]
    w_unseen = text(encode_captions(constants.clip, constants.tokenizer, unseen, w_t.device))[0]
    noise = torch.randn(2, len(w_t), generator.style_dim, generator=step_generator(seed, 0, 22)).to(w_t)
    w_z = [generator.mapping(z) for z in noise]
    made = generator.synthesis(w_t)
    first, second = (generator.synthesis(assemble(z, w_t, layers)) for z in w_z)
    still = [generator.synthesis(assemble(z, w_t, 0)) for z in w_z]
    mean_face = generator.synthesis(mean).expand(len(w_t), -1, -1, -1)
    seen, seen_noisy, seen_mean = read(judge, made), read(judge, first), read(judge, mean_face)
    values = faces.values.to(seen)
    return {
        "accuracy": named_accuracy(seen, captions),
        "shuffled captions": named_accuracy(seen.roll(1, 0), captions),
        "mean face": named_accuracy(seen_mean, captions),
        "true codes": named_accuracy(read(judge, generator.synthesis(cache.codes)), captions),
        "all traits": accuracy(seen, values),
        "all traits, shuffled captions": accuracy(seen.roll(1, 0), values),
        "all traits, mean face": accuracy(seen_mean, values),
        "fine": named_accuracy(seen, captions, coarse=False),
        "fine with noise": named_accuracy(seen_noisy, captions, coarse=False),
        "difference of draws": (first - second).abs().mean().item(),
        "difference without noise": (still[0] - still[1]).abs().max().item(),
        "unseen": named_accuracy(read(judge, generator.synthesis(w_unseen)), unseen),
        "unseen, shuffled": named_accuracy(read(judge, generator.synthesis(w_unseen)).roll(1, 0), unseen),
    }


@torch.inference_mode()
def caption_counts(text: Stream, faces: Faces, constants: Constants, seed: int) -> list[float]:
    """Accuracy on four traits of each face when 1, 2, 3, 4 captions of one trait each are given. World only.

    The same four traits count every time; which they are differs between faces.
    """
    device = constants.generator.input.input.device
    names = [trait.name for trait in TRAITS]
    order = torch.rand(len(faces), len(names), generator=step_generator(seed, 0, 23)).argsort(1)[:, :4]
    captions = [
        [describe(faces.values[i : i + 1], seed + i, traits=(names[t],))[0][0] for t in row]
        for i, row in enumerate(order.tolist())
    ]
    flat = encode_captions(constants.clip, constants.tokenizer, [c for own in captions for c in own], device)
    features = flat.view(len(faces), 4, -1)
    result = []
    for count in range(1, 5):
        joined = torch.cat([average_captions(own[:count]) for own in features])
        seen = read(constants.judge, constants.generator.synthesis(text(joined)[0])).cpu()
        result.append((seen == faces.values).gather(1, order).float().mean().item())
    return result


@torch.inference_mode()
def editing(text: Stream, cache: Cache, constants: Constants, count: int = 64) -> dict[str, list[float]]:
    """Faces edited with another face's caption at every degree from 0 to L: L1 to the source picture and
    cosine to the caption, means over `count` faces."""
    generator, w = constants.generator, cache.codes[:count]
    features = cache.text[:, 0].roll(-1, 0)[:count]
    w_t = text(features)[0]
    source = generator.synthesis(w)
    distance, match = [], []
    for degree in range(generator.n_latent + 1):
        picture = generator.synthesis(edit(w, w_t, degree))
        distance.append((picture - source).abs().mean().item())
        match.append(clip_score(image_features(constants.clip, picture), features) / 100)
    start = (generator.synthesis(w_t) - generator.synthesis(edit(w, w_t, 0))).abs().max().item()
    return {"L1": distance, "cosine": match, "first end": [start], "last end": [distance[-1]]}


@torch.inference_mode()
def kept_identity(
    w: Tensor, w_t: Tensor, generator: Generator, identity: nn.Module, count: int = 64, batch: int = 8
) -> dict[int, float]:
    """How much of a face its edits keep: degree -> mean cosine of the embeddings before and after.

    Faces w (N, L, D), the first `count`, edited with the next caption's code of w_t (N, L, D), at up to seven
    degrees from 0 to L. identity: IR-SE50, by its `embed`.
    """
    wanted, w = w_t.roll(-1, 0)[:count], w[:count]

    def embed(codes: Tensor) -> Tensor:
        return torch.cat([identity.embed(generator.synthesis(part)) for part in codes.split(batch)])

    source, last = embed(w), generator.n_latent
    degrees = sorted({*range(0, last, -(-last // 6)), last})
    return {
        degree: torch.cosine_similarity(embed(edit(w, wanted, degree)), source).mean().item()
        for degree in degrees
    }


@torch.inference_mode()
def timing(
    text: Stream, cache: Cache, constants: Constants, words: bool, repeats: int = 5
) -> dict[str, float]:
    """Milliseconds for one caption's feature to become one picture, mean and deviation over `repeats`."""
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        at = i % len(cache.text)
        tokens = cache.tokens[at, :1] if words else None
        codes = read_texts(text, constants.clip, cache.text[at, :1], tokens)[0]
        constants.generator.synthesis(codes).cpu()
        times.append(1000 * (time.perf_counter() - began))
    kept = torch.tensor(times[1:])  # the first one warms up
    return {"mean": kept.mean().item(), "deviation": kept.std().item()}
