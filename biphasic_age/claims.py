"""What a correct build must show, each with the margin that was set before measuring."""

from collections.abc import Mapping

from biphasic_age.scene import GROUPS
from shared.published import Claim

Numbers = Mapping[str, Mapping[str, float]]
"""method -> metric -> mean over seeds."""


def scene_claims(numbers: Numbers) -> list[Claim]:
    """Claims on the two-head scene for which the run has what they compare. numbers must have `copy`."""
    claims: list[Claim] = []

    def claim(text: str, measured: dict[str, float], margin: str, holds: bool) -> None:
        claims.append(Claim("", f"two-head scene: {text}", measured, margin, bool(holds)))

    full, copied = numbers.get("full"), numbers["copy"]
    if full is None:
        return claims
    gain = full["true PSNR"] - copied["true PSNR"]
    text = "The translation comes closer to the true aged picture than the unchanged input."
    measured = {"full": full["true PSNR"], "copy": copied["true PSNR"], "difference": gain}
    claim(text, measured, "difference >= 1.2 dB", gain >= 1.2)
    text = "Self-driven generation gives the input back."
    claim(text, {"full": full["self PSNR"]}, "self PSNR >= 32 dB", full["self PSNR"] >= 32)
    text = "A judge that training never used sees the target age."
    claim(text, {"age accuracy": full["age accuracy"]}, ">= 0.9", full["age accuracy"] >= 0.9)
    if "no-layout" in numbers:
        ratio, without = full["change/leak"], numbers["no-layout"]["change/leak"]
        text = "The layout keeps the change on the right person and parts."
        measured = {"full change/leak": ratio, "no-layout": without, "ratio": ratio / without}
        margin = "full >= 6 and >= 1.7 times that without layout"
        claim(text, measured, margin, ratio >= 6 and ratio >= 1.7 * without)
    if "no-self" in numbers:
        loss = full["self PSNR"] - numbers["no-self"]["self PSNR"]
        text = "The self-driven strategy is what keeps reconstruction faithful."
        claim(text, {"dB lost without it": loss}, ">= 5 dB", loss >= 5)
    for direction, inputs in (("older", "youngest"), ("younger", "oldest")):
        measured, rises = {}, True
        for sign in ("hair", "wrinkles"):
            values = [full[f"{sign} {direction} {target}"] for target in range(GROUPS)]
            measured |= {f"{sign} at age {target}": value for target, value in enumerate(values)}
            rises = rises and all(a < b for a, b in zip(values, values[1:], strict=False))
        text = f"Grey hair and wrinkles, read without a network, rise with the target age ({inputs} inputs)."
        claim(text, measured, "both rise from each age to the next", rises)
    return claims


def face_claims(data: str, numbers: Numbers, real: Mapping[str, float]) -> list[Claim]:
    """Claims on faces for which the run has what they compare.

    numbers must have `copy`; real: `TAR`, the judge's true accept rate on real pairs.
    """
    claims: list[Claim] = []

    def claim(text: str, measured: dict[str, float], margin: str, holds: bool) -> None:
        claims.append(Claim("", f"{data}: {text}", measured, margin, bool(holds)))

    full, copied = numbers.get("full"), numbers["copy"]
    if full is None:
        return claims
    for direction in ("older", "younger"):
        key = f"age error {direction}"
        if key not in full:
            continue
        text = f"Faces made {direction} are of the target ages to a judge that training never used."
        measured = {"full": full[key], "unchanged input": copied[key], "rising": full[f"rising {direction}"]}
        holds = full[key] <= copied[key] / 2 and full[f"rising {direction}"] >= 0.8
        claim(text, measured, "error <= half of the input's; ages rise in >= 0.8 of the faces", holds)
    text = "They are still the same person to an identity judge that training never used."
    measured = {"verified": full["verification rate"], "real pairs of one person": real["TAR"]}
    claim(text, measured, "verification rate >= 0.9", full["verification rate"] >= 0.9)
    if "true PSNR" in full:
        gain = full["true PSNR"] - copied["true PSNR"]
        text = "They come closer to the same people drawn at the target age than the unchanged input."
        measured = {"full": full["true PSNR"], "copy": copied["true PSNR"], "difference": gain}
        claim(text, measured, "difference >= 0.5 dB", gain >= 0.5)
    if "no-layout" in numbers:
        ratio, without = full["change/leak"], numbers["no-layout"]["change/leak"]
        text = "The layout keeps the change on skin and hair."
        measured = {"full change/leak": ratio, "no-layout": without}
        claim(text, measured, "larger than without layout", ratio > without)
    if "plain" in numbers:
        plain = numbers["plain"]
        keys = ("change/leak", "verification rate", "true PSNR")
        measured = {f"{name} {key}": row[key] for key in keys if key in full
                    for name, row in (("full", full), ("plain", plain))}  # fmt: skip
        text = "Guided by the layout it changes less of what should stay than a network on whole images."
        claim(text, measured, "larger change/leak", full["change/leak"] > plain["change/leak"])
    if "prototypes" in numbers:
        errors = {
            name: sum(numbers[name][f"age error {d}"] for d in ("older", "younger")) / 2
            for name in ("full", "prototypes")
            if all(f"age error {d}" in numbers[name] for d in ("older", "younger"))
        }
        if len(errors) == 2:
            text = "Its ages are nearer to the targets than those of facial prototypes."
            claim(text, errors, "smaller age error", errors["full"] < errors["prototypes"])
    return claims
