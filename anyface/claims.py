"""What a correct build must show in the simple world, each with the margin that was set before measuring."""

from shared.published import Claim

Effects = dict[str, dict[int, dict[str, float]]]
"""variant -> seed -> measured number by name."""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def code_claims(effects: Effects) -> list[Claim]:
    """Claims about codes, from the variants that the run has. Of several seeds each must hold for itself."""
    claims = []

    def compare(text: str, name: str, with_: str, without: str, margin: str, holds) -> None:
        if with_ in effects and without in effects:
            pairs = {
                seed: (effects[with_][seed][name], effects[without][seed][name]) for seed in effects[with_]
            }
            measured = {}
            for seed, (a, b) in pairs.items():
                suffix = f", seed {seed}" if len(pairs) > 1 else ""
                measured |= {f"{with_}{suffix}": a, f"{without}{suffix}": b}
            claims.append(Claim("", text, measured, margin, all(holds(a, b) for a, b in pairs.values())))

    compare(
        "The diverse triplet loss keeps codes from collapsing to the mean face; MSE does not.",
        "collapse index", "full", "no-dt", "full >= 5 x no-dt", lambda a, b: a >= 5 * b,
    )  # fmt: skip
    compare(
        "Captions give codes that differ: spread over captions, relative to that over faces.",
        "spread", "full", "no-dt", "full >= 2 x no-dt", lambda a, b: a >= 2 * b,
    )  # fmt: skip
    compare(
        "Cross modal distillation aligns the streams: mean rank of a face's own image feature.",
        "rank", "full", "no-cmd", "full < 0.8 x no-cmd", lambda a, b: a < 0.8 * b,
    )  # fmt: skip
    return claims


def picture_claims(
    seen: dict[str, float],
    precision: float,
    editing: dict[str, list[float]],
    counts: list[float],
    chance_precision: float = 0.1,
) -> list[Claim]:
    """Claims about pictures of the full method, means over seeds.

    seen: of `caption_effects`; precision: R-precision, top 10 of 100, in [0, 1]; editing: of `editing`;
    counts: of `caption_counts`; chance_precision: what R-precision is by chance, 0.1 from 100 captions on.
    """
    chance = max(seen["shuffled captions"], seen["mean face"])
    blind = max(seen["all traits, shuffled captions"], seen["all traits, mean face"])
    lost = seen["fine"] - seen["fine with noise"]
    distance, cosine = editing["L1"], editing["cosine"]
    steps = list(zip(distance, distance[1:], strict=False))
    falling = all(b <= a * 1.02 for a, b in steps)
    rise = max((b / a - 1 for a, b in steps if a), default=0.0)  # a is 0 where a degree gives the source
    ends = max(editing["first end"][0], editing["last end"][0])
    unseen_chance = max(seen["unseen, shuffled"], seen["mean face"])
    return [
        Claim(
            "",
            "Pictures show what captions name: the judge's accuracy on the named traits, and on all seven.",
            {k: seen[k] for k in ("accuracy", "shuffled captions", "mean face", "true codes")}
            | {k: seen[k] for k in seen if k.startswith("all traits")},
            "each >= 0.55 and >= 0.1 above shuffled captions and mean face",
            all(
                a >= 0.55 and a >= b + 0.1
                for a, b in ((seen["accuracy"], chance), (seen["all traits"], blind))
            ),
        ),
        Claim(
            "",
            "Pictures are recognised by their captions: CLIP R-precision, top 10 of 100.",
            {"R-precision": precision, "chance": chance_precision},
            "R-precision >= 0.25",
            precision >= 0.25 and precision > chance_precision,
        ),
        Claim(
            "",
            "One caption gives many faces: noise in the coarse layers changes the face, not its fine traits.",
            {"difference of two draws": seen["difference of draws"], "fine traits lost": lost}
            | {"without noise": seen["difference without noise"]},
            "difference > 0.05 of a range of 2, lost < 0.05, exactly 0 without noise",
            seen["difference of draws"] > 0.05 and lost < 0.05 and seen["difference without noise"] == 0,
        ),
        Claim(
            "",
            "Editing is continuous: the higher the degree, the more of the source stays.",
            {"L1, degree 0": distance[0], "L1, half": distance[len(distance) // 2], "L1, last": distance[-1]}
            | {
                "largest rise by a degree": rise,
                "cosine to the text, degree 0": cosine[0],
                "cosine, last": cosine[-1],
                "error at the ends": ends,
            },
            "L1 never rises by more than 2 %, ends exact, cosine higher at degree 0 than at the last",
            falling and ends == 0 and cosine[0] > cosine[-1],
        ),
        Claim(
            "",
            "Any number of captions: four captions of one trait each say more than one.",
            {f"{i} captions": value for i, value in enumerate(counts, start=1)},
            "4 captions >= 1 caption + 0.1",
            counts[3] >= counts[0] + 0.1,
        ),
        Claim(
            "",
            "Free style: captions in wordings that the streams never trained on are understood.",
            {"unseen wordings": seen["unseen"], "seen wordings": seen["accuracy"]}
            | {"unseen, shuffled": seen["unseen, shuffled"], "mean face": seen["mean face"]},
            ">= 0.1 above shuffled captions and mean face",
            seen["unseen"] >= unseen_chance + 0.1,
        ),
    ]
