"""What a correct build must show on drawn faces, each with the margin that was set before measuring."""

from mdrnets.baselines import CLASSICAL
from mdrnets.protocol import mean
from shared.published import Claim

FULL_OVER_NONE, DISENTANGLED_OVER_SHARED = 0.4, 0.3
"""Margins in dB of PSNR over the corrupted pixels."""
NOT_WORSE = 0.05
"""dB by which a term that is expected to do nothing or a little may be lower."""


def make_claims(
    data: str,
    psnr: dict[str, float],
    tampering: dict[str, float] | None,
    repaired: dict[str, float] | None,
    gaps: dict[str, dict[str, float]],
) -> list[Claim]:
    """Claims for which the run has what they compare.

    data: what the pictures are. psnr: method -> hole PSNR in dB, mean over pictures, bins and seeds.
    tampering: `interventions` of the disentangled network. repaired: `repair` of the one with `ema` writes.
    gaps: `similarity_gaps` by variant, or nothing where psi was not at hand.
    """
    claims: list[Claim] = []

    def claim(text: str, measured: dict[str, float], margin: str, holds: bool) -> None:
        claims.append(Claim("", f"{data}: {text}", measured, margin, holds))

    def compare(text: str, better: str, worse: str, by: float) -> None:
        if better in psnr and worse in psnr:
            gain = psnr[better] - psnr[worse]
            measured = {better: psnr[better], worse: psnr[worse], "difference": gain}
            claim(text, measured, f"difference >= {by:g} dB of hole PSNR", gain >= by)

    compare("Refinement with both modules beats refinement with none.", "full", "none", FULL_OVER_NONE)
    text = "Memory split by facial part beats a shared memory of as many slots."
    compare(text, "disentangled", "shared", DISENTANGLED_OVER_SHARED)
    order = [name for name in ("coarse", "none", "disentangled", "full") if name in psnr]
    if len(order) == 4:
        rising = all(psnr[a] < psnr[b] for a, b in zip(order, order[1:], strict=False))
        text = "Each step helps: coarse, refined, with disentangled memory, with MREM."
        claim(text, {name: psnr[name] for name in order}, "rising", rising)
    text = "The memory uses the parsing better than a network that gets it as extra input channels."
    compare(text, "full", "concat", 0.0)
    text = "The gain is not one of capacity: a block more instead of memory does not reach it."
    compare(text, "full", "deeper", FULL_OVER_NONE)
    if {"full", "full+inco2"} <= psnr.keys() & gaps.keys():
        text = "InCo2 does not cost fidelity and narrows the gaps that it speaks of, or leaves them."
        names = {"full": "full", "full+inco2": "with InCo2"}
        measured = {f"{short}, {k}": v for name, short in names.items() for k, v in gaps[name].items()}
        measured["difference"] = psnr["full+inco2"] - psnr["full"]
        narrower = all(gaps["full+inco2"][k] <= 1.01 * gaps["full"][k] for k in gaps["full"])
        margin = f"difference >= -{NOT_WORSE:g} dB, no gap more than 1 % wider"
        claim(text, measured, margin, narrower and measured["difference"] >= -NOT_WORSE)
    fillers = {name: psnr[name] for name in CLASSICAL if name in psnr}
    if "full" in psnr and fillers:
        best = max(fillers, key=fillers.get)
        measured = {"full": psnr["full"], f"best of them ({best})": fillers[best]}
        text = "The method beats mean colour and OpenCV's two fillers."
        claim(text, measured, "higher hole PSNR", psnr["full"] > fillers[best])
    compare("The method beats a plain U-Net that was trained for as many steps.", "full", "unet", 0.0)
    if tampering is not None:
        text = "Each block speaks for its own part: tampering shows inside the part, slots have no order."
        margin = "inside/elsewhere >= 5, rotation cost >= 0.5 dB, permutation change < 0.001"
        holds = tampering["inside/elsewhere"] >= 5 and tampering["rotation cost"] >= 0.5
        claim(text, tampering, margin, holds and tampering["permutation change"] < 1e-3)
    if repaired is not None:
        text = "Written memory repairs: what is read is closer to the undamaged feature than the query is."
        claim(text, repaired, "cos(r, q*) > cos(q, q*)", repaired["cos(r, q*)"] > repaired["cos(q, q*)"])
    return claims


def copy_claim(errors: dict[str, float]) -> Claim:
    """errors: hole L1 in % of the copy task "without MREM" and "with MREM"."""
    text = "copy task: MREM reads a hidden square's colour from its visible twin far away."
    holds = errors["with MREM"] <= 0.8 * errors["without MREM"]
    return Claim("", text, errors, "hole L1 with MREM <= 0.8 of that without", holds)


def mean_over(results: dict[str, dict[int, dict[str, dict[str, float]]]], metric: str) -> dict[str, float]:
    """method -> seed -> bin -> metric -> value, to method -> mean over seeds and bins."""
    return {
        method: mean([row[metric] for bins in seeds.values() for row in bins.values()])
        for method, seeds in results.items()
    }
