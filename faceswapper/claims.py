"""What face swapping by this method must show on drawn faces, with margins that were set beforehand.

The margins are those that held in a trial in a smaller, simpler world of ellipses (section 10 of the spec).
They are asked of the demo's faces, C1, C2, ..., and of the simple world as it is here, S1, S2, ...; they are
not adjusted to either.
"""

from faceswapper.data import World
from shared.published import Claim

Scores = dict[str, dict[str, float]]
"""method -> metric -> value. Methods: baselines by their names, generators by variant: full, no-mask, ..."""


def judge(scores: Scores, world: World = "faces") -> list[Claim]:
    """The claims that the methods which are there allow to test. The trial had no margin for pose, expression
    and the best baseline: they are claimed of the faces alone."""
    simple = world == "simple"
    claims: list[Claim] = []

    def claim(text: str, measured: dict[str, float], margin: str, holds: bool) -> None:
        number = f"{'S' if simple else 'C'}{len(claims) + 1}"
        if simple:
            text = f"Simple world: {text[0].lower()}{text[1:]}"
        claims.append(Claim(number, text, measured, margin, bool(holds)))

    def get(method: str, metric: str) -> float | None:
        return scores.get(method, {}).get(metric)

    if "full" not in scores:
        return claims
    full, target, paste = scores["full"], scores["copy target"], scores["paste"]
    placed = "Eyes, nose and mouth stay where the target has them (position error, % of the picture's side)."
    if simple:
        placed = "The face stays where the target has it (position error, share of the range of shifts)."
    claim(
        "The identity moves to the source, for unseen people, by a recogniser that training never used.",
        {"cos to source": full["cos source"], "cos to target": full["cos target"]},
        "cos to source > 0.55 and > cos to target + 0.4",
        full["cos source"] > 0.55 and full["cos source"] > full["cos target"] + 0.4,
    )
    without = get("no-identity-loss", "cos source")
    if without is not None:
        claim(
            "The identity loss moves it: without, the result does not resemble the source.",
            {"with": full["cos source"], "without": without},
            "without < 0.25, with > without + 0.3",
            without < 0.25 and full["cos source"] > without + 0.3,
        )
    claim(
        "The face is the true swap's more than the target's or a pasted source's (L1 inside the face).",
        {name: scores[name]["face L1"] for name in ("full", "copy target", "paste")},
        "full < copy target - 0.02 and full < paste - 0.05",
        full["face L1"] < target["face L1"] - 0.02 and full["face L1"] < paste["face L1"] - 0.05,
    )
    claim(
        placed,
        {name: scores[name]["position"] for name in ("full", "paste")},
        "full < paste / 2",
        full["position"] < paste["position"] / 2,
    )
    if not simple:
        claim(
            "Pose and expression stay the target's better than with a pasted source.",
            {
                f"{what}, {name}": scores[name][what]
                for what in ("pose", "expression")
                for name in ("full", "paste")
            },
            "both errors of full below paste's",
            all(full[what] < paste[what] for what in ("pose", "expression")),
        )
    blind = get("no-landmarks", "position")
    if blind is not None:
        claim(
            "The landmark picture is what places them: without it the position error rises.",
            {"with": full["position"], "without": blind},
            "without > 1.2 x with",
            blind > 1.2 * full["position"],
        )
    loose, open_ = (get(v, "background L1") for v in ("no-attribute-losses", "no-mask"))
    if loose is not None and open_ is not None:
        mine = full["background L1"]
        claim(
            "Mask and attribute losses keep the background (L1 outside the face).",
            {"full": mine, "no attribute losses": loose, "no mask": open_},
            "full < 0.75 x no attribute losses, no attribute losses < 0.9 x no mask",
            mine < 0.75 * loose and loose < 0.9 * open_,
        )
    if simple:
        return claims
    blended = {name: row for name, row in scores.items() if name.startswith(("paste", "mean face"))}
    nearest = min(blended, key=lambda name: blended[name]["face L1"])
    poisson = scores["paste, Poisson"]
    claim(
        "It swaps better than blending: more of the source than a Poisson paste, and closer to the true "
        "swap than any untrained baseline.",
        {
            "cos to source": full["cos source"],
            "Poisson": poisson["cos source"],
            "face L1": full["face L1"],
            f"best baseline ({nearest})": blended[nearest]["face L1"],
        },
        "cos to source above Poisson's, face L1 below every baseline's",
        full["cos source"] > poisson["cos source"] and full["face L1"] < blended[nearest]["face L1"],
    )
    return claims
