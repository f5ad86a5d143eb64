"""Facts about a procedural face, and captions that state some of them in free, varied wording."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from shared.faceparams import Params, hash_keys
from shared.facestyle import hair_lengths

COLOURS = {
    "black": (0.08, 0.08, 0.08),
    "white": (0.93, 0.93, 0.93),
    "grey": (0.50, 0.50, 0.50),
    "red": (0.65, 0.18, 0.18),
    "orange": (0.80, 0.50, 0.22),
    "yellow": (0.85, 0.80, 0.35),
    "green": (0.25, 0.55, 0.28),
    "blue": (0.25, 0.38, 0.68),
    "purple": (0.50, 0.28, 0.60),
    "pink": (0.85, 0.55, 0.65),
    "brown": (0.42, 0.28, 0.18),
}


@dataclass(frozen=True)
class Caption:
    """A sentence or two about one face, and the facts (category -> value) that it states."""

    text: str
    facts: dict[str, str]


def colour_name(rgb: tuple[float, float, float]) -> str:
    """Nearest of the basic colour names to a displayed colour."""
    grey = sum(rgb) / 3
    if max(rgb) - min(rgb) < 0.10:
        return "black" if grey < 0.22 else "white" if grey > 0.80 else "grey"
    chromatic = {k: v for k, v in COLOURS.items() if k not in ("black", "white", "grey")}
    return min(chromatic, key=lambda name: _hue_distance(chromatic[name], rgb))


def _hue_distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    mean_a, mean_b = sum(a) / 3, sum(b) / 3
    span_a, span_b = max(a) - min(a), max(b) - min(b)
    hue = sum(((x - mean_a) / span_a - (y - mean_b) / span_b) ** 2 for x, y in zip(a, b, strict=True))
    return hue + 1.2 * (mean_a - mean_b) ** 2


def facts(params: Params) -> list[dict[str, str]]:
    """What is plainly true of each face: category -> value; a category in doubt (between two values) is left
    out."""
    rows = {name: params[name].tolist() for name in _COLUMNS}
    rows["age"] = params.age.tolist()
    for name, values in hair_lengths(params).items():
        rows[name] = values.tolist()
    keys = tuple(rows)
    return [_facts({key: rows[key][i] for key in keys}) for i in range(len(params))]


_COLUMNS = (
    *("masculinity", "face_width", "face_length", "eye_size", "brow_thickness", "nose_width", "nose_length"),
    *(
        "upper_lip",
        "lower_lip",
        "skin_tone",
        "freckles",
        "hair_darkness",
        "hair_warmth",
        "hair_curl",
        "eye_hue",
    ),
    *(
        "mole1_size",
        "yaw",
        "smile",
        "mouth_open",
        "eye_open",
        "glasses",
        "hat",
        "beard",
        "moustache",
        "lipstick",
    ),
    *("earrings", "necklace", "eye_shadow", "background_r", "background_g", "background_b", "background2_r"),
    *("background2_g", "background2_b", "cloth_r", "cloth_g", "cloth_b", "hat_r", "hat_g", "hat_b"),
)


def _band(value: float, *bands: tuple[float, float, str]) -> str | None:
    return next((name for low, high, name in bands if low <= value < high), None)


def _facts(p: dict[str, float]) -> dict[str, str]:
    age, covered = p["age"], round(p["hat"]) > 0
    found: dict[str, str | None] = {}
    found["sex"] = _band(p["masculinity"], (0, 0.42, "female"), (0.58, 1.01, "male")) if age >= 5 else None
    found["age"] = _band(
        age,
        (0, 12, "child"),
        (13, 18, "teenager"),
        (20, 34, "young"),
        (40, 56, "middle-aged"),
        (63, 200, "old"),
    )
    if p["bald"] > 0.75:
        found["hair"] = "bald"
    elif p["bald"] < 0.35:
        dark = p["hair_darkness"]
        if p["grey"] > 0.75:
            found["hair"] = "grey"
        elif p["grey"] < 0.3:
            if p["red"] > 0.8 and 0.1 < dark < 0.75:
                found["hair"] = "red"
            elif p["red"] < 0.2:
                found["hair"] = _band(dark, (0, 0.30, "blond"), (0.42, 0.72, "brown"), (0.84, 1.01, "black"))
        found["hair_length"] = _band(
            p["length"], (0, 0.24, "short"), (0.34, 0.52, "medium"), (0.62, 9, "long")
        )
        found["hair_texture"] = _band(p["hair_curl"], (0, 0.5, "straight"), (0.85, 1.01, "curly"))
        if p["fringe_seen"] > 0.8 and not covered:
            found["fringe"] = "fringe"
    found["skin"] = _band(p["skin_tone"], (0, 0.30, "light"), (0.40, 0.62, "medium"), (0.75, 1.01, "dark"))
    if round(p["glasses"]) < 3 and p["eye_open"] > 0.4:
        hue = p["eye_hue"]
        found["eyes"] = _band(
            hue, (0, 0.28, "brown"), (0.54, 0.66, "green"), (0.74, 0.90, "blue"), (0.95, 1.01, "grey")
        )
        found["eye_size"] = _band(p["eye_size"], (0, 0.12, "small"), (0.88, 1.01, "large"))
    if round(p["glasses"]) < 2:
        found["brows"] = _band(p["brow_thickness"], (0, 0.2, "thin"), (0.8, 1.01, "thick"))
    found["face"] = _band(p["face_width"] - p["face_length"], (-1.0, -0.45, "narrow"), (0.45, 1.01, "round"))
    found["nose"] = _band(p["nose_width"] + p["nose_length"], (0, 0.55, "small"), (1.45, 2.01, "big"))
    found["lips"] = (
        _band(p["upper_lip"] + p["lower_lip"], (0, 0.55, "thin"), (1.4, 2.01, "full")) if age < 55 else None
    )
    found["freckles"] = "freckles" if p["freckles"] > 0.4 and p["skin_tone"] < 0.5 else None
    found["expression"] = _band(
        p["smile"], (-1.01, -0.45, "frowning"), (-0.1, 0.15, "neutral"), (0.45, 1.01, "smiling")
    )
    found["mouth"] = _band(p["mouth_open"], (0, 0.02, "closed"), (0.35, 1.01, "open"))
    found["gaze"] = "closed" if p["eye_open"] < 0.12 and round(p["glasses"]) < 3 else None
    found["pose"] = _band(p["yaw"], (-90, -12, "left"), (-4, 4, "front"), (12, 90, "right"))
    found["glasses"] = ("none", "thin", "thick", "sunglasses")[round(p["glasses"])]
    found["hat"] = ("none", "beanie", "brimmed")[round(p["hat"])]
    grown = age >= 20
    found["beard"] = "beard" if p["beard"] > 0.4 and grown else "none" if p["beard"] == 0 else None
    found["moustache"] = "moustache" if p["moustache"] > 0.4 and grown else None
    found["lipstick"] = "lipstick" if p["lipstick"] > 0.5 else None
    found["eye_shadow"] = "eye shadow" if p["eye_shadow"] > 0.5 and round(p["glasses"]) < 3 else None
    found["earrings"] = "earrings" if p["earrings"] > 0.3 and p["length"] < 0.2 else None
    found["necklace"] = "necklace" if p["necklace"] > 0.5 else None
    mean = tuple((p[f"background_{c}"] + p[f"background2_{c}"]) / 2 for c in "rgb")
    ends = [colour_name(tuple(p[f"{n}_{c}"] for c in "rgb")) for n in ("background", "background2")]
    found["background"] = colour_name(mean) if ends[0] == ends[1] else None
    found["clothes"] = colour_name(tuple(p[f"cloth_{c}"] for c in "rgb"))
    if covered:
        found["hat_colour"] = colour_name(tuple(p[f"hat_{c}"] for c in "rgb"))
    return {key: value for key, value in found.items() if value is not None}


# Wording: for each category and value, phrases after "has", after "is", or after "wears".
HAS = {
    ("hair", "blond"): ("blond hair", "fair hair", "golden hair", "blonde hair"),
    ("hair", "brown"): ("brown hair", "chestnut hair", "brunette hair"),
    ("hair", "black"): ("black hair", "very dark hair", "jet-black hair"),
    ("hair", "red"): ("red hair", "ginger hair", "auburn hair"),
    ("hair", "grey"): ("grey hair", "silver hair", "hair that has gone grey"),
    ("hair", "bald"): ("hardly any hair left", "a bald head", "almost no hair on top"),
    ("hair_length", "short"): ("short hair", "a short haircut", "hair cut short"),
    ("hair_length", "medium"): ("chin-length hair", "hair of medium length", "a bob"),
    ("hair_length", "long"): ("long hair", "hair down to the shoulders", "long flowing hair"),
    ("hair_texture", "straight"): ("straight hair", "smooth straight hair"),
    ("hair_texture", "curly"): ("curly hair", "curls", "a head full of curls"),
    ("fringe", "fringe"): ("a fringe", "bangs", "a fringe over the forehead"),
    ("skin", "light"): ("fair skin", "a pale complexion", "light skin"),
    ("skin", "medium"): ("tanned skin", "an olive complexion", "medium brown skin"),
    ("skin", "dark"): ("dark skin", "a dark complexion", "deep brown skin"),
    ("eyes", "brown"): ("brown eyes", "dark eyes"),
    ("eyes", "green"): ("green eyes", "eyes of a green tint"),
    ("eyes", "blue"): ("blue eyes", "bright blue eyes"),
    ("eyes", "grey"): ("grey eyes", "pale grey eyes"),
    ("eye_size", "small"): ("small eyes", "rather small eyes"),
    ("eye_size", "large"): ("big eyes", "large eyes"),
    ("brows", "thin"): ("thin eyebrows", "fine brows"),
    ("brows", "thick"): ("bushy eyebrows", "thick brows", "strong eyebrows"),
    ("face", "narrow"): ("a long face", "a narrow face", "a slim face"),
    ("face", "round"): ("a round face", "a broad face", "a wide face"),
    ("nose", "small"): ("a small nose", "a little nose"),
    ("nose", "big"): ("a big nose", "a large nose"),
    ("lips", "thin"): ("thin lips", "narrow lips"),
    ("lips", "full"): ("full lips", "plump lips"),
    ("freckles", "freckles"): ("freckles", "freckled cheeks", "a sprinkle of freckles"),
    ("beard", "beard"): ("a beard", "a grown beard", "facial hair"),
    ("moustache", "moustache"): ("a moustache", "a mustache"),
    ("mouth", "open"): ("an open mouth", "the mouth wide open", "parted lips"),
    ("gaze", "closed"): ("closed eyes", "both eyes shut"),
}
IS = {
    ("expression", "smiling"): ("smiling", "grinning", "in a good mood", "all smiles"),
    ("expression", "frowning"): ("frowning", "looking grumpy", "in a bad mood"),
    ("expression", "neutral"): ("looking calm", "keeping a straight face"),
    ("pose", "left"): ("turned to the left", "facing left"),
    ("pose", "right"): ("turned to the right", "facing right"),
    ("pose", "front"): ("looking straight ahead", "facing the camera"),
    ("glasses", "none"): ("without glasses",),
    ("beard", "none"): ("clean-shaven", "beardless"),
}
WEARS = {
    ("glasses", "thin"): ("glasses", "thin-rimmed glasses", "spectacles"),
    ("glasses", "thick"): ("glasses", "thick glasses", "heavy-rimmed spectacles"),
    ("glasses", "sunglasses"): ("sunglasses", "dark glasses", "shades"),
    ("hat", "beanie"): ("a beanie", "a knitted cap", "a woollen hat"),
    ("hat", "brimmed"): ("a hat", "a hat with a brim", "a brimmed hat"),
    ("lipstick", "lipstick"): ("lipstick", "painted lips"),
    ("eye_shadow", "eye shadow"): ("eye shadow", "eye make-up"),
    ("earrings", "earrings"): ("earrings", "ear-rings"),
    ("necklace", "necklace"): ("a necklace", "a chain round the neck"),
}
PLACES = ("in front of a {} background", "before a {} wall", "against {}", "with something {} behind")
CLOTHES = ("a {} top", "{} clothes", "a {} shirt", "something {}")
_NOUNS = {
    ("child", "female"): ("girl", "little girl"),
    ("child", "male"): ("boy", "little boy"),
    ("child", None): ("child", "kid"),
    ("teenager", "female"): ("teenage girl", "girl in her teens"),
    ("teenager", "male"): ("teenage boy", "boy in his teens"),
    ("teenager", None): ("teenager", "adolescent"),
    ("young", "female"): ("young woman", "young lady"),
    ("young", "male"): ("young man", "young guy"),
    ("young", None): ("young person", "young adult"),
    ("middle-aged", "female"): ("middle-aged woman", "woman in middle age"),
    ("middle-aged", "male"): ("middle-aged man", "man in middle age"),
    ("middle-aged", None): ("middle-aged person", "person in middle age"),
    ("old", "female"): ("old woman", "elderly lady"),
    ("old", "male"): ("old man", "elderly gentleman"),
    ("old", None): ("old person", "elderly person"),
    (None, "female"): ("woman", "lady"),
    (None, "male"): ("man", "guy"),
    (None, None): ("person", "someone"),
}


def captions(params: Params, seed: int, least: int = 1, most: int = 5) -> list[Caption]:
    """One caption per face stating between `least` and `most` random facts (fewer where fewer are plain).

    The wording is a function of (seed, the face's own seed); other seeds give other captions of the same
    face.
    """
    if not 0 <= least <= most:
        raise ValueError(f"captions need 0 <= least <= most, got {least} and {most}")
    keys = torch.cat(
        [hash_keys(seed, params.seed[i : i + 1].cpu(), stream=5) for i in range(len(params))] or [params.seed]
    )
    return [
        _caption(found, random.Random(key), least, most)
        for found, key in zip(facts(params), keys.tolist(), strict=True)
    ]


def _article(noun: str) -> str:
    return noun if noun == "someone" else ("an " if noun[0] in "aeiou" else "a ") + noun


def _join(parts: list[str], rng: random.Random) -> str:
    if len(parts) < 2:
        return "".join(parts)
    link = rng.choice((" and ", " and ", ", and ", ", also ")) if len(parts) > 2 else " and "
    return ", ".join(parts[:-1]) + link + parts[-1]


def _caption(found: dict[str, str], rng: random.Random, least: int, most: int) -> Caption:
    known = [(k, v) for k, v in found.items() if _sayable(k, v)]
    count = min(rng.randint(least, most), len(known))
    told = dict(rng.sample(known, count))
    if "hat" in told and "hat_colour" in found and rng.random() < 0.5:
        told["hat_colour"] = found["hat_colour"]
    has = [rng.choice(HAS[item]) for item in told.items() if item in HAS]
    states = [rng.choice(IS[item]) for item in told.items() if item in IS]
    wears = [_worn(item, told, rng) for item in told.items() if item in WEARS]
    if "clothes" in told:
        wears.append(rng.choice(CLOTHES).format(told["clothes"]))
    place = rng.choice(PLACES).format(told["background"]) if "background" in told else ""
    for words in (has, states, wears):
        rng.shuffle(words)
    sex = told.get("sex")
    noun = rng.choice(_NOUNS[told.get("age"), sex])
    pronoun = {"female": "she", "male": "he", None: "they"}[sex]
    text = rng.choice((_list_style, _sentence_style, _note_style))(
        noun, pronoun, has, states, wears, place, rng
    )
    return Caption(text, told)


def _sayable(key: str, value: str) -> bool:
    item = (key, value)
    return item in HAS or item in IS or item in WEARS or key in ("sex", "age", "background", "clothes")


def _worn(item: tuple[str, str], told: dict[str, str], rng: random.Random) -> str:
    words = rng.choice(WEARS[item])
    if item[0] == "hat" and "hat_colour" in told and words.startswith("a "):
        colour = told["hat_colour"]
        words = ("an " if colour[0] in "aeiou" else "a ") + colour + words[1:]
    return words.replace("a orange", "an orange")


def _list_style(noun, pronoun, has, states, wears, place, rng) -> str:
    """One noun phrase: "a young woman with ..., wearing ..."."""
    parts = [_article(noun)]
    if has:
        parts.append("with " + _join(has, rng))
    if wears:
        parts.append(
            rng.choice(("wearing ", "in ", "dressed in ") if not has else ("wearing ",)) + _join(wears, rng)
        )
    if states:
        parts.append(_join(states, rng))
    if place:
        parts.append(place)
    lead = rng.choice(("", "", "a picture of ", "the face of ", "a portrait of ", "photo: "))
    return _finish(lead + ", ".join(parts), rng)


def _sentence_style(noun, pronoun, has, states, wears, place, rng) -> str:
    """Full sentences: "This man has ... He is ..."."""
    are, have, wear = ("are", "have", "wear") if pronoun == "they" else ("is", "has", "wears")
    clauses = []
    if has:
        clauses.append(f"{rng.choice((have, have, 'show' if have == 'have' else 'shows'))} {_join(has, rng)}")
    if states:
        clauses.append(f"{are} {_join(states, rng)}")
    if wears:
        clauses.append(f"{rng.choice((wear, f'{are} wearing'))} {_join(wears, rng)}")
    if place:
        clauses.append(f"{are} seen {place}")
    rng.shuffle(clauses)
    subject = _article(noun) if noun == "someone" else rng.choice(("this ", "the ")) + noun
    if not clauses:
        return _finish(f"{subject} looks at us", rng)
    first = clauses[0]
    if pronoun == "they":
        words = {"are": "is", "have": "has", "wear": "wears", "show": "shows"}
        head, _, tail = first.partition(" ")
        first = f"{words[head]} {tail}"
    text = f"{subject} {first}"
    for clause in clauses[1:]:
        text += rng.choice((f". {pronoun.capitalize()} {clause}", f"; {pronoun} {clause}"))
    return _finish(text, rng)


def _note_style(noun, pronoun, has, states, wears, place, rng) -> str:
    """Notes as a witness would give them: "man, grey hair, glasses"."""
    parts = [*has, *wears, *states]
    rng.shuffle(parts)
    if place:
        parts.append(place)
    return _finish(", ".join([noun, *parts]), rng)


def _finish(text: str, rng: random.Random) -> str:
    text = text[0].upper() + text[1:] if rng.random() < 0.7 else text
    return text + rng.choice((".", ".", "", "!" if rng.random() < 0.1 else ""))
