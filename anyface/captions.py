"""Captions from CelebA's forty attributes, for pictures that have no captions of their own.

The idea (attributes grouped by the verb they take, random subsets, subjects and verbs) is that of the caption
script of Multi-Modal CelebA-HQ; the grammar is our own, and empty groups are left out of the sentence.
"""

from pathlib import Path

import numpy as np

from shared.io import read_utf8
from shared.runtime import UserError

NOUNS = {
    "5_o_Clock_Shadow": ("a five o'clock shadow", "stubble"),
    "Arched_Eyebrows": ("arched eyebrows", "curved brows"),
    "Bags_Under_Eyes": ("bags under the eyes", "tired eyes"),
    "Bald": ("a bald head", "no hair on the head"),
    "Bangs": ("bangs", "a fringe"),
    "Big_Lips": ("big lips", "full lips"),
    "Big_Nose": ("a big nose", "a large nose"),
    "Black_Hair": ("black hair", "dark hair"),
    "Blond_Hair": ("blond hair", "fair hair"),
    "Brown_Hair": ("brown hair", "chestnut hair"),
    "Bushy_Eyebrows": ("bushy eyebrows", "thick brows"),
    "Double_Chin": ("a double chin",),
    "Goatee": ("a goatee", "a small beard on the chin"),
    "Gray_Hair": ("gray hair", "silver hair"),
    "High_Cheekbones": ("high cheekbones",),
    "Mouth_Slightly_Open": ("a slightly open mouth", "parted lips"),
    "Mustache": ("a mustache", "a moustache"),
    "Narrow_Eyes": ("narrow eyes", "small eyes"),
    "No_Beard": ("no beard", "a shaven chin"),
    "Oval_Face": ("an oval face",),
    "Pale_Skin": ("pale skin", "a pale face"),
    "Pointy_Nose": ("a pointy nose", "a pointed nose"),
    "Receding_Hairline": ("a receding hairline", "thinning hair"),
    "Rosy_Cheeks": ("rosy cheeks", "red cheeks"),
    "Sideburns": ("sideburns",),
    "Straight_Hair": ("straight hair",),
    "Wavy_Hair": ("wavy hair", "curly hair"),
}
WORN = {
    "Eyeglasses": ("glasses", "eyeglasses"),
    "Heavy_Makeup": ("heavy makeup", "a lot of makeup"),
    "Wearing_Earrings": ("earrings",),
    "Wearing_Hat": ("a hat",),
    "Wearing_Lipstick": ("lipstick",),
    "Wearing_Necklace": ("a necklace",),
    "Wearing_Necktie": ("a necktie", "a tie"),
}
STATES = {
    "Attractive": ("attractive", "good-looking"),
    "Chubby": ("chubby", "round-faced"),
    "Smiling": ("smiling", "cheerful"),
    "Young": ("young", "youthful"),
}
UNUSED = ("Blurry", "Male")
"""Blurry speaks of the photograph; Male chooses the subject."""

VERBS = {"has": ("has", "has got"), "wears": ("wears", "is wearing"), "is": ("is", "looks", "appears to be")}


def read_attributes(path: Path) -> dict[str, set[str]]:
    """CelebAMask-HQ-attribute-anno.txt -> file stem -> the names of the attributes that are 1.

    Line 1 the count, line 2 forty names, then `0.jpg -1 1 ...`. UserError names a line that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such attribute file")
    lines = read_utf8(path, "an attribute file").splitlines()
    if len(lines) < 3:
        raise UserError(f"{path}: expected a count, a line of names and a line for each picture")
    names = lines[1].split()
    unknown = set(names) - set(NOUNS) - set(WORN) - set(STATES) - set(UNUSED)
    if unknown:
        raise UserError(f"{path}: unknown attribute {sorted(unknown)[0]}")
    result = {}
    for number, line in enumerate(lines[2:], start=3):
        if not line.strip():
            continue
        stem, *flags = line.split()
        if len(flags) != len(names) or not set(flags) <= {"1", "-1"}:
            raise UserError(f"{path}, line {number}: expected a file name and {len(names)} values 1 or -1")
        result[Path(stem).stem] = {name for name, flag in zip(names, flags, strict=True) if flag == "1"}
    return result


def celeba_captions(attributes: set[str], count: int, seed: int) -> list[str]:
    """`count` sentences that state random attributes of the set. A pure function of its arguments."""
    rng = np.random.default_rng(seed)
    return [_sentence(attributes, rng) for _ in range(count)]


def _sentence(attributes: set[str], rng: np.random.Generator) -> str:
    male = "Male" in attributes
    subject = ("the person", "he" if male else "she", "this man" if male else "this woman")[rng.integers(3)]
    clauses = []
    for group, table in (("is", STATES), ("has", NOUNS), ("wears", WORN)):
        present = [name for name in table if name in attributes]
        if present:
            chosen = rng.permutation(len(present))[: rng.integers(1, min(4, len(present)) + 1)]
            wordings = [table[present[i]] for i in chosen]
            verb = VERBS[group][rng.integers(len(VERBS[group]))]
            clauses.append(f"{verb} {_list([w[rng.integers(len(w))] for w in wordings])}")
    if not clauses:
        return f"{subject} has a plain face."
    order = rng.permutation(len(clauses))
    return f"{subject} {_list([clauses[i] for i in order])}."


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
