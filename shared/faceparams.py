"""What a procedural face is made of: named identity and attribute columns, and how they are drawn at random.

All random numbers come from a counter-based hash of (seed, index, column), so that sample number i of a seed
is the
same whatever is drawn with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Identity: every column lies in [0, 1]; 0.5 is an average face.
IDENTITY = (
    *("masculinity", "face_width", "face_length", "forehead", "cheekbones", "jaw", "chin", "cheeks"),
    *(
        "eye_spacing",
        "eye_row",
        "eye_size",
        "eye_roundness",
        "eye_tilt",
        "eye_hue",
        "eye_lightness",
        "eyelid",
    ),
    *("brow_thickness", "brow_arch", "brow_height", "brow_length", "brow_tilt"),
    *("nose_length", "nose_width", "nose_bridge", "nose_tip"),
    *("mouth_row", "mouth_width", "upper_lip", "lower_lip", "cupid_bow", "lip_colour"),
    *("skin_tone", "undertone", "redness", "freckles"),
    *("mole1_x", "mole1_y", "mole1_size", "mole2_x", "mole2_y", "mole2_size"),
    *("hair_darkness", "hair_warmth", "hair_length", "hair_volume", "hair_curl", "fringe", "parting"),
    *("hairline", "widow_peak", "balding", "greying", "ear_size", "ear_angle"),
)

# Attributes: name -> (neutral value, lowest, highest), in the unit given.
ATTRIBUTES: dict[str, tuple[float, float, float]] = {
    "yaw": (0.0, -40.0, 40.0),  # degrees, positive: the face turns to the right of the picture
    "pitch": (0.0, -25.0, 25.0),  # degrees, positive: the face looks up
    "roll": (0.0, -45.0, 45.0),  # degrees, positive: clockwise in the picture
    "shift_x": (0.0, -1.0, 1.0),  # half heights of the picture, positive: right
    "shift_y": (0.0, -1.0, 1.0),  # positive: down
    "scale": (1.0, 0.3, 2.0),
    "smile": (0.0, -1.0, 1.0),  # -1 frown .. 1 smile
    "mouth_open": (0.0, 0.0, 1.0),
    "brow_raise": (0.0, -1.0, 1.0),
    "eye_open": (1.0, 0.0, 1.2),  # 0 closed
    "gaze_x": (0.0, -1.0, 1.0),  # positive: to the right of the picture
    "gaze_y": (0.0, -1.0, 1.0),  # positive: down
    "light_azimuth": (-25.0, -90.0, 90.0),  # degrees, positive: light comes from the right of the picture
    "light_elevation": (30.0, -30.0, 80.0),
    "light_strength": (0.6, 0.0, 1.0),  # share of directed light; the rest is ambient
    "light_warmth": (0.0, -1.0, 1.0),  # -1 bluish .. 1 orange
    "exposure": (1.0, 0.5, 1.5),
    "background_r": (0.62, 0.0, 1.0),
    "background_g": (0.68, 0.0, 1.0),
    "background_b": (0.74, 0.0, 1.0),
    "background2_r": (0.80, 0.0, 1.0),  # the other end of the background's gradient
    "background2_g": (0.83, 0.0, 1.0),
    "background2_b": (0.86, 0.0, 1.0),
    "background_angle": (90.0, 0.0, 360.0),  # direction of the gradient, degrees
    "background_pattern": (0.0, 0.0, 1.0),  # strength of a soft pattern of the second colour
    "glasses": (0.0, 0.0, 3.0),  # 0 none, 1 thin frame, 2 thick frame, 3 sunglasses
    "hat": (0.0, 0.0, 2.0),  # 0 none, 1 beanie, 2 hat with a brim
    "hat_r": (0.25, 0.0, 1.0),
    "hat_g": (0.30, 0.0, 1.0),
    "hat_b": (0.42, 0.0, 1.0),
    "beard": (0.0, 0.0, 1.0),  # none from about age 15 downwards, whatever is asked
    "moustache": (0.0, 0.0, 1.0),
    "lipstick": (0.0, 0.0, 1.0),
    "lipstick_hue": (0.3, 0.0, 1.0),  # 0 pink, 0.5 red, 1 plum
    "eye_shadow": (0.0, 0.0, 1.0),
    "eye_shadow_hue": (0.5, 0.0, 1.0),
    "blush": (0.0, 0.0, 1.0),
    "earrings": (0.0, 0.0, 1.0),  # 0 none; the larger, the bigger
    "necklace": (0.0, 0.0, 1.0),  # 0 none, otherwise worn
    "cloth_r": (0.28, 0.0, 1.0),
    "cloth_g": (0.34, 0.0, 1.0),
    "cloth_b": (0.46, 0.0, 1.0),
    "collar": (0.3, 0.0, 1.0),  # 0 round neck .. 1 deep V
    "noise": (0.0, 0.0, 0.2),  # standard deviation of the camera's noise on [0, 1]
    "blur": (0.0, 0.0, 0.02),  # Gaussian sigma as a share of the picture's height
}
ATTRIBUTE_NAMES = tuple(ATTRIBUTES)
AGE_RANGE = (1.0, 100.0)

_ID = {name: i for i, name in enumerate(IDENTITY)}
_AT = {name: i for i, name in enumerate(ATTRIBUTES)}
_INT64 = 1 << 64


def _signed(value: int) -> int:
    value %= _INT64
    return value - _INT64 if value >= _INT64 // 2 else value


def _mix(x: Tensor) -> Tensor:
    """Finaliser of a 64-bit counter-based generator (splitmix-like), on int64 with wrap-around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_keys(seed: int, indices: Tensor, stream: int = 0) -> Tensor:
    """One 64-bit key per index, a pure function of (seed, stream, index). indices (n,) int64 -> (n,)
    int64."""
    base = _mix(torch.tensor([_signed(seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03)]))
    return _mix(base + indices.to(torch.int64) * _signed(0xA24BAED4963EE407))


def uniform(keys: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1): (n,) int64 keys -> (n, columns) float32."""
    counter = torch.arange(1, columns + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(keys[:, None] + counter) >> 40  # the upper 24 bits, signed
    return (bits & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def _check_count(n: int, seed: int) -> None:
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"the number of faces must be an integer >= 0, got {n!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")


@dataclass(frozen=True)
class Params:
    """All that determines B faces.

    identity (B, len(IDENTITY)) in [0, 1]; attributes (B, len(ATTRIBUTES)) in the units of `ATTRIBUTES`;
    age (B,) years; seed (B,) int64, of the camera's noise. Columns are read by name: `params["yaw"]` is (B,).
    """

    identity: Tensor
    attributes: Tensor
    age: Tensor
    seed: Tensor

    def __post_init__(self) -> None:
        shapes = {"identity": (len(IDENTITY),), "attributes": (len(ATTRIBUTES),), "age": (), "seed": ()}
        count = self.identity.shape[0] if self.identity.dim() else 0
        for name, tail in shapes.items():
            if tuple(getattr(self, name).shape) != (count, *tail):
                wanted = ", ".join(str(n) for n in (count, *tail))
                raise ValueError(f"{name} must have shape ({wanted}), got {tuple(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return self.identity.shape[0]

    def __getitem__(self, key: str | int | slice | Tensor | Sequence[int]) -> Tensor | Params:
        """A column by its name, (B,); or the chosen faces as Params."""
        if isinstance(key, str):
            if key in ("age", "seed"):
                return getattr(self, key)
            if key in _ID:
                return self.identity[:, _ID[key]]
            if key in _AT:
                return self.attributes[:, _AT[key]]
            raise ValueError(f"no identity or attribute column is called {key!r}")
        if isinstance(key, int):
            key = slice(key, key + 1) if key != -1 else slice(-1, None)
        return Params(self.identity[key], self.attributes[key], self.age[key], self.seed[key])

    def replace(self, **columns: float | Tensor) -> Params:
        """The same faces with some columns set, e.g. `params.replace(yaw=20, glasses=1, age=ages)`."""
        parts = {
            "identity": self.identity.clone(),
            "attributes": self.attributes.clone(),
            "age": self.age.clone(),
            "seed": self.seed.clone(),
        }
        for name, value in columns.items():
            if name in ("age", "seed"):
                parts[name][:] = torch.as_tensor(value).to(parts[name])
            elif name in _ID:
                parts["identity"][:, _ID[name]] = torch.as_tensor(value).to(parts["identity"])
            elif name in _AT:
                parts["attributes"][:, _AT[name]] = torch.as_tensor(value).to(parts["attributes"])
            else:
                raise ValueError(f"no identity or attribute column is called {name!r}")
        return replace(self, **parts)

    def to(self, device: torch.device | str) -> Params:
        return Params(*(t.to(device) for t in (self.identity, self.attributes, self.age, self.seed)))

    @staticmethod
    def cat(parts: Sequence[Params]) -> Params:
        """Several batches as one."""
        columns = ("identity", "attributes", "age", "seed")
        return Params(*(torch.cat([getattr(part, name) for part in parts]) for name in columns))


def sample_identities(n: int, seed: int, start: int = 0) -> Tensor:
    """Random people number start .. start + n - 1 of a seed: (n, len(IDENTITY)), uniform in [0, 1)."""
    _check_count(n, seed)
    identity = uniform(hash_keys(seed, torch.arange(start, start + n), stream=1), len(IDENTITY))
    # most people have at most one visible mole and no freckles
    for name, share in (("mole1_size", 0.5), ("mole2_size", 0.25), ("freckles", 0.3)):
        column = identity[:, _ID[name]]
        identity[:, _ID[name]] = ((column - (1 - share)) / share).clamp(min=0)
    return identity


def neutral_attributes(n: int) -> Tensor:
    """Frontal, neutral face in even light on a plain background, nothing worn: (n, len(ATTRIBUTES))."""
    _check_count(n, 0)
    return torch.tensor([v[0] for v in ATTRIBUTES.values()]).expand(n, -1).clone()


def sample_ages(n: int, seed: int, low: float = 18.0, high: float = 75.0, start: int = 0) -> Tensor:
    """Ages in years, uniform in [low, high): (n,)."""
    _check_count(n, seed)
    if not AGE_RANGE[0] <= low <= high <= AGE_RANGE[1]:
        raise ValueError(
            f"ages must satisfy {AGE_RANGE[0]} <= low <= high <= {AGE_RANGE[1]}, got {low} and {high}"
        )
    keys = hash_keys(seed, torch.arange(start, start + n), stream=3)
    return low + (high - low) * uniform(keys, 1)[:, 0]


def sample_attributes(
    n: int,
    seed: int,
    start: int = 0,
    strength: float = 1.0,
    worn: float = 1.0,
    identity: Tensor | None = None,
) -> Tensor:
    """Random attributes of pictures number start .. start + n - 1: (n, len(ATTRIBUTES)).

    strength: scales pose, shift, expression, light, noise and blur (0: none of them varies).
    worn: scales the probability of glasses, hat, beard, make-up and jewellery (0: nothing worn).
    identity: (n, len(IDENTITY)); with it beards go to masculine and make-up mostly to feminine faces.
    """
    _check_count(n, seed)
    if strength < 0 or worn < 0:
        raise ValueError(f"strength and worn must be >= 0, got {strength} and {worn}")
    if identity is not None and tuple(identity.shape) != (n, len(IDENTITY)):
        raise ValueError(f"identity must have shape ({n}, {len(IDENTITY)}), got {tuple(identity.shape)}")
    names = (*ATTRIBUTES, "wears_beard", "wears_makeup", "wears_earrings", "wears_necklace")
    draws = uniform(hash_keys(seed, torch.arange(start, start + n), stream=2), len(names) + 1)
    u = {name: draws[:, i] for i, name in enumerate(names)}
    spread = {name: 2 * column - 1 for name, column in u.items()}  # uniform in [-1, 1)
    male = torch.full((n,), 0.5) if identity is None else identity[:, _ID["masculinity"]]
    beard = (u["wears_beard"] < 0.45 * worn * ((male - 0.45) * 4).clamp(0, 1)).float()
    makeup = (u["wears_makeup"] < worn * (0.6 * ((0.55 - male) * 4).clamp(0, 1))).float()
    earrings = (u["wears_earrings"] < worn * (0.06 + 0.4 * ((0.55 - male) * 4).clamp(0, 1))).float()
    if identity is None:
        beard = (u["wears_beard"] < 0.2 * worn).float()
        makeup = (u["wears_makeup"] < 0.25 * worn).float() * (1 - beard)
    values = {
        "yaw": 24 * strength * spread["yaw"],
        "pitch": 11 * strength * spread["pitch"],
        "roll": 7 * strength * spread["roll"],
        "shift_x": 0.05 * strength * spread["shift_x"],
        "shift_y": 0.04 * strength * spread["shift_y"],
        "scale": 1 + 0.06 * strength * spread["scale"],
        "smile": strength * (0.15 + 0.85 * spread["smile"]),
        "mouth_open": strength * ((u["mouth_open"] - 0.5) * 1.8).clamp(min=0),
        "brow_raise": 0.7 * strength * spread["brow_raise"],
        "eye_open": 1 - strength * (0.5 * u["eye_open"] ** 3 - 0.1 * u["gaze_y"]),
        "gaze_x": 0.7 * strength * spread["gaze_x"],
        "gaze_y": 0.5 * strength * spread["gaze_y"],
        "light_azimuth": 65 * strength * spread["light_azimuth"],
        "light_elevation": 30 + 30 * strength * spread["light_elevation"],
        "light_strength": 0.55 + 0.3 * strength * spread["light_strength"],
        "light_warmth": 0.7 * strength * spread["light_warmth"],
        "exposure": 1 + 0.14 * strength * spread["exposure"],
        "background_angle": 360 * u["background_angle"],
        "background_pattern": (u["background_pattern"] - 0.4).clamp(min=0) * 1.4,
        "glasses": ((u["glasses"] - 1 + 0.3 * worn).clamp(min=0) / max(0.3 * worn, 1e-6) * 3).ceil(),
        "hat": ((u["hat"] - 1 + 0.14 * worn).clamp(min=0) / max(0.14 * worn, 1e-6) * 2).ceil(),
        "beard": beard * (0.35 + 0.65 * u["beard"]),
        "moustache": beard * (0.3 + 0.7 * u["moustache"]),
        "lipstick": makeup * (0.4 + 0.6 * u["lipstick"]),
        "eye_shadow": makeup * (0.2 + 0.8 * u["eye_shadow"]),
        "blush": makeup * u["blush"],
        "earrings": earrings * (0.3 + 0.7 * u["earrings"]),
        "necklace": (u["wears_necklace"] < worn * 0.25).float(),
        "noise": 0.025 * strength * u["noise"],
        "blur": 0.008 * strength * u["blur"] ** 2,
    }
    for name in ("background", "background2", "hat", "cloth"):
        # one hue per object: grey level plus a moderate colour cast
        grey = 0.12 + 0.76 * u[f"{name}_r"]
        cast_a, cast_b = spread[f"{name}_g"], spread[f"{name}_b"]
        for channel, shift in (("r", cast_a), ("g", -0.35 * cast_a - 0.35 * cast_b), ("b", cast_b)):
            values[f"{name}_{channel}"] = (grey + 0.26 * shift).clamp(0.02, 0.98)
    columns = []
    for name, (_, low, high) in ATTRIBUTES.items():
        column = values.get(name, u[name] * (high - low) + low)
        columns.append(column.clamp(low, high))
    return torch.stack(columns, dim=1)


def make_params(
    identity: Tensor, attributes: Tensor | None = None, age: Tensor | float = 30.0, seed: int | Tensor = 0
) -> Params:
    """Params from an identity matrix (B, len(IDENTITY)).

    attributes: (B, len(ATTRIBUTES)), neutral when absent; age: (B,) or one number, years;
    seed: (B,) int64, or one number from which the faces' noise seeds are derived by their index in the batch.
    """
    n = identity.shape[0]
    if attributes is None:
        attributes = neutral_attributes(n).to(identity.device)
    age = torch.as_tensor(age, dtype=torch.float32, device=identity.device)
    if isinstance(seed, int):
        seed = hash_keys(seed, torch.arange(n), stream=4).to(identity.device)
    return Params(identity, attributes, age.expand(n).clone() if age.dim() == 0 else age, seed)


def sample(n: int, seed: int, start: int = 0, strength: float = 1.0, worn: float = 1.0) -> Params:
    """n random pictures of n random people of 18 to 75 years; number i is the same whatever n and start
    are."""
    identity = sample_identities(n, seed, start)
    attributes = sample_attributes(n, seed, start, strength, worn, identity)
    noise = hash_keys(seed, torch.arange(start, start + n), stream=4)
    return Params(identity, attributes, sample_ages(n, seed, start=start), noise)
