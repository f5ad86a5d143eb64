"""What the method claims, tested on procedural faces."""

from statistics import mean

from shared.published import Claim

Scores = dict[str, dict[str, float]]


def by_variant(
    scores: Scores, metric: str, everything: int | None = None
) -> dict[tuple[str, int], list[float]]:
    """(variant, pairs) -> the metric of every seed, from names such as most-8-0.

    everything: what `all` stands for in a name; None leaves such names out.
    """
    table: dict[tuple[str, int], list[float]] = {}
    for name, row in scores.items():
        variant, *rest = name.rsplit("-", 2)
        if everything is not None and rest[:1] == ["all"]:
            rest[0] = str(everything)
        if len(rest) == 2 and all(part.isdigit() for part in rest):
            table.setdefault((variant, int(rest[0])), []).append(row[metric])
    return table


def judge(
    pairs: tuple[int, ...], scores: Scores, memories: dict[str, dict[str, float]], artists: dict[str, float]
) -> list[Claim]:
    """The claims that the trained networks allow to test.

    pairs: numbers of training pairs, first the one that the claims are about. scores: method -> metric ->
    value; memories: trial -> what `mechanism.measure` found; artists: what `artists.measure_artists` found,
    or nothing.
    """
    few, many = pairs[0], max(pairs)
    ssim, l1 = ({key: mean(v) for key, v in by_variant(scores, m).items()} for m in ("SSIM", "L1"))
    claims = []

    def claim(text: str, measured: dict[str, float], margin: str, holds: bool) -> None:
        claims.append(Claim(f"C{len(claims) + 1}", text, measured, margin, bool(holds)))

    none, memory, most = (ssim.get((variant, few)) for variant in ("none", "memory", "most"))
    if none and most:
        claim(
            f"With {few} training pairs the memory with MR loss beats the network without one (SSIM).",
            {"none": none, "most": most, "gain": most - none},
            "gain >= 0.005 in the mean over seeds",
            most - none >= 0.005,
        )
        saved = 1 - l1["most", few] / l1["none", few]
        claim(
            f"With {few} training pairs it also lowers the L1 error.",
            {"none": l1["none", few], "most": l1["most", few], "lower by": saved},
            "lower by >= 5 %",
            saved >= 0.05,
        )
    if none and most and memory:
        claim(
            "Both parts help: none < memory < memory with MR loss (SSIM).",
            {"none": none, "memory": memory, "most": most},
            "in that order in the mean over seeds",
            none < memory < most,
        )
    # A run that has not ended may lack the networks of many pairs.
    if many != few and none and most and {("most", many), ("none", many)} <= ssim.keys():
        late = ssim["most", many] - ssim["none", many]
        claim(
            f"The gain belongs to limited data: it is smaller with {many} pairs.",
            {f"gain at {few}": most - none, f"gain at {many}": late},
            f"gain at {few} > gain at {many}",
            most - none > late,
        )
    simple = {
        name: row["SSIM"] for name, row in scores.items() if name.startswith(("grey", "dodge", "neigh"))
    }
    unet = ssim.get(("unet", few))
    if most and simple:
        simple |= {"pix2pix": unet} if unet else {}
        claim(
            "The method beats grey photo, dodge sketch, neighbour patches and the pix2pix U-Net (SSIM).",
            {"most": most, **simple},
            "most above each of them",
            most > max(simple.values()),
        )
    claims += [
        Claim(f"C{len(claims) + 1 + i}", *rest) for i, rest in enumerate(_memory(memories, ssim, few, most))
    ]
    if artists:
        claim(
            "One network, a memory per artist: each draws most like its own artist.",
            {k: v for k, v in artists.items() if k.startswith("own")},
            "every artist's sketches are matched best from the own memory (1 = yes)",
            all(v == 1 for k, v in artists.items() if k.startswith("own")),
        )
        before, after = artists["new artist, best old memory"], artists["new artist, taught"]
        claim(
            "A memory written from 8 pairs, without a gradient, draws more like a new artist (SSIM).",
            {"best of the old memories": before, "taught": after},
            "taught above the best old memory",
            after > before,
        )
    return claims


def _memory(
    memories: dict[str, dict[str, float]], ssim: dict, few: int, most: float | None
) -> list[tuple[str, dict[str, float], str, bool]]:
    """Claims about how the memory works, from the `most` and `static` networks of the fewest pairs."""

    def average(variant: str, key: str) -> float | None:
        rows = [row[key] for name, row in memories.items() if name.startswith(f"{variant}-{few}-")]
        return mean(rows) if rows else None

    rows = []
    cosine, static = average("most", "cosine"), average("static", "cosine")
    if cosine is None:
        return rows
    measured = {"dynamic": cosine} | ({"writing stopped after 5 steps": static} if static else {})
    rows.append(
        (
            "The relation endures: on unseen photos the memory answers with the true feature (cosine).",
            measured,
            "dynamic >= 0.95" + (", static lower by 0.2" if static else ""),
            cosine >= 0.95 and (static is None or cosine - static >= 0.2),
        )
    )
    permuted, zero, whole = (average("most", key) for key in ("ssim_permuted", "ssim_zero", "ssim"))
    rows.append(
        (
            "The sketch comes from the memory: permuting or emptying the values destroys it (SSIM).",
            {"as is": whole, "permuted": permuted, "zero": zero},
            "both lower by >= 0.1",
            whole - max(permuted, zero) >= 0.1,
        )
    )
    used, pure = average("most", "slots_used"), average("most", "purity")
    rows.append(
        (
            "Without any label the slots are all in use and specialise on parts of the face.",
            {"slots used (perplexity, of 64)": used, "purity": pure},
            "perplexity >= 32, purity >= 0.7",
            used >= 32 and pure >= 0.7,
        )
    )
    wrong = ssim.get(("mispaired", few))
    if wrong and most:
        rows.append(
            (
                "The pairing is the supervision: writing other people's sketches costs SSIM.",
                {"paired": most, "mispaired": wrong, "cost": most - wrong},
                "cost >= 0.005",
                most - wrong >= 0.005,
            )
        )
    return rows
