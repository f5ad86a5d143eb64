"""What the demo is asked to show, claim by claim, from the numbers of the experiments."""

from pin.protocol import Outcome
from shared.published import Claim

Table = dict[str, dict[str, Outcome]]


def check_claims(
    table: Table,
    quality: dict[str, dict[str, float]],
    shift: dict[str, float],
    adaptive: Table,
    other: Table,
) -> list[Claim]:
    """All claims that the experiments of this run allow.

    table: defence -> attack -> outcome. quality: ESN variant -> selection quality. shift: the premise's
    feature shifts. adaptive: attacks that know the defence. other: the second recogniser's rows.
    """

    def accuracy(defense: str, attack: str) -> float:
        return table[defense][attack].accuracy

    pin = "PIN sample"
    clean, attacked = accuracy("none", "clean"), accuracy("none", "PGD 8")
    claims = [
        Claim(
            "C1 the threat",
            "Without a defence the recogniser is good on clean faces and helpless under PGD at 8 grey "
            "levels.",
            {"clean": clean, "PGD 8": attacked},
            "clean >= 0.90, PGD 8 <= 0.10",
            clean >= 0.90 and attacked <= 0.10,
        )
    ]
    ours = {attack: accuracy(pin, attack) for attack in ("clean", "PGD 8", "FGSM 8", "MI-FGSM 8")}
    claims.append(
        Claim(
            "C2 unseen attacks",
            "PIN, trained on clean faces and Gaussian noise alone, keeps clean accuracy and withstands "
            "attacks.",
            ours,
            "clean within 0.05 of no defence, PGD 8 >= 0.65, FGSM 8 and MI-FGSM 8 >= 0.60",
            ours["clean"] >= clean - 0.05
            and ours["PGD 8"] >= 0.65
            and min(ours["FGSM 8"], ours["MI-FGSM 8"]) >= 0.60,
        )
    )
    rivals = {name: accuracy(name, "PGD 8") for name in ("random K", "all eigenfaces", "last K")}
    claims.append(
        Claim(
            "C3 the choice matters",
            "The chosen eigenfaces, and not projection as such, inactivate the perturbation.",
            {"PIN": ours["PGD 8"], **rivals},
            "PIN - random K >= 0.10 and PIN - all >= 0.35 at PGD 8; last K within 0.10 of chance",
            ours["PGD 8"] - rivals["random K"] >= 0.10
            and ours["PGD 8"] - rivals["all eigenfaces"] >= 0.35
            and abs(rivals["last K"] - 0.5) <= 0.10,
        )
    )
    q = quality["pin"]
    claims.append(
        Claim(
            "C4 the network learns the choice",
            "Training lowers the expected cost towards the oracle's bound: leading eigenfaces kept, late "
            "ones dropped.",
            {
                name: q[name]
                for name in ("cost", "oracle", "untrained", "p of the first 16", "p of the last half")
            },
            "oracle <= cost <= 0.2 x untrained; p of the first 16 > 0.9, of the last half < 0.3",
            q["oracle"] <= q["cost"] <= 0.2 * q["untrained"]
            and q["p of the first 16"] > 0.9
            and q["p of the last half"] < 0.3,
        )
    )
    claims.append(
        Claim(
            "C5 the premise",
            "A perturbation of equal length does less harm inside the leading 60 eigenfaces than outside "
            "them.",
            shift,
            "shift in top <= 0.7 x shift in rest, both > 2 x Gaussian noise's",
            shift["top"] <= 0.7 * shift["rest"] and min(shift["top"], shift["rest"]) > 2 * shift["noise"],
        )
    )
    if other:
        value = other[pin]["PGD 8"].accuracy
        claims.append(
            Claim(
                "C6 plug and play",
                "The same PIN protects a second recogniser without being trained again.",
                {"none": other["none"]["PGD 8"].accuracy, "PIN": value},
                "PIN at PGD 8 >= 0.60",
                value >= 0.60,
            )
        )
    if "official-lambda" in quality:
        kept, value = (
            quality["official-lambda"]["expected kept"],
            accuracy("PIN official-lambda, sample", "clean"),
        )
        claims.append(
            Claim(
                "C7 the official lambda",
                "With the configuration's lambda of 0.015 and a cost that is a mean over pixels, hardly "
                "any eigenface "
                "pays and clean accuracy falls.",
                {"kept": kept, "clean": value},
                "kept <= 8 and clean <= 0.80",
                kept <= 8 and value <= 0.80,
            )
        )
    four = adaptive["PIN sample, PGD 4, mask held constant"]["attacked"].accuracy
    eight = adaptive["PIN sample, PGD 8, mask held constant"]["attacked"].accuracy
    claims.append(
        Claim(
            "C8 honesty: the adaptive attacker",
            "An attacker who differentiates through the projection breaks PIN (a higher value would mean "
            "a weak attack).",
            {"PGD 4": four, "PGD 8": eight},
            "PGD 8 <= 0.35",
            eight <= 0.35,
        )
    )
    return claims


def compare_with_fixed(table: Table) -> dict[str, dict[str, float]]:
    """What choosing for each image is worth: ESN variant -> attack -> accuracy of its sampled masks minus
    that of as many leading eigenfaces, the same for every face."""
    gains = {}
    for name in table:
        if name.startswith("fixed top-K"):
            variant = name.removeprefix("fixed top-K of ") if " of " in name else "pin"
            ours = table["PIN sample" if variant == "pin" else f"PIN {variant}, sample"]
            gains[variant] = {attack: ours[attack].accuracy - table[name][attack].accuracy for attack in ours}
    return gains
