"""The procedural iris: who a person is, and the texture and shading of that person's iris."""

from dataclasses import dataclass

import cv2
import numpy as np


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, a cubic between; falling when low > high."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blend colour pictures a -> b (H, W, 3) with a weight (H, W)."""
    return (a + (b - a) * weight[..., None]).astype(np.float32)


def polar_noise(rng: np.random.Generator, theta: np.ndarray, r: np.ndarray, around: int, across: int):
    """Smooth noise in [-1, 1] over (angle, radius in 0..1), periodic in the angle."""
    grid = rng.uniform(-1, 1, (across + 2, around)).astype(np.float32)
    grid = np.concatenate([grid[:, -2:], grid, grid[:, :3]], 1)
    column = (theta / (2 * np.pi) % 1) * around + 2
    row = np.clip(r, 0, 1) * across
    return cv2.remap(grid, column.astype(np.float32), row.astype(np.float32), cv2.INTER_CUBIC)


# (outer zone, inner zone) of common iris colours, linear-looking sRGB
IRIS_COLOURS = (
    ((0.33, 0.47, 0.60), (0.62, 0.62, 0.55)),  # blue
    ((0.45, 0.52, 0.56), (0.60, 0.58, 0.50)),  # grey
    ((0.36, 0.44, 0.30), (0.58, 0.46, 0.24)),  # green
    ((0.42, 0.36, 0.20), (0.50, 0.32, 0.13)),  # hazel
    ((0.36, 0.22, 0.11), (0.42, 0.25, 0.11)),  # brown
    ((0.20, 0.12, 0.07), (0.24, 0.14, 0.07)),  # dark brown
)
SKINS = ((0.87, 0.70, 0.61), (0.80, 0.60, 0.49), (0.68, 0.48, 0.37), (0.50, 0.34, 0.25), (0.34, 0.22, 0.16))


@dataclass(frozen=True)
class Identity:
    """What stays the same between two pictures of one eye."""

    texture_seed: int
    outer_colour: np.ndarray
    inner_colour: np.ndarray
    skin: np.ndarray
    collarette: float
    fibres: int
    crypts: int
    furrows: int
    limbal_ring: float
    opening: float
    tilt: float
    crease: float
    lashes: int
    lash_length: float
    brow: float
    pupil_offset: np.ndarray


def identity(seed: int) -> Identity:
    """The person number `seed`."""
    rng = np.random.default_rng([seed, 1])
    colour = rng.integers(len(IRIS_COLOURS))
    outer, inner = (np.array(c) * rng.uniform(0.85, 1.15) for c in IRIS_COLOURS[colour])
    skin = np.array(SKINS[rng.integers(len(SKINS))]) * rng.uniform(0.92, 1.08)
    return Identity(
        texture_seed=int(rng.integers(2**31)),
        outer_colour=outer + rng.normal(0, 0.015, 3),
        inner_colour=inner + rng.normal(0, 0.015, 3),
        skin=skin + rng.normal(0, 0.012, 3),
        collarette=rng.uniform(0.28, 0.45),
        fibres=int(rng.integers(70, 120)),
        crypts=int(rng.integers(8, 26)),
        furrows=int(rng.integers(0, 5)),
        limbal_ring=rng.uniform(0.15, 0.6),
        opening=rng.uniform(0.80, 1.08),
        tilt=rng.uniform(-0.10, 0.04),
        crease=rng.uniform(0.28, 0.62),
        lashes=int(rng.integers(70, 150)),
        lash_length=rng.uniform(0.5, 0.95),
        brow=rng.uniform(1.0, 1.7),
        pupil_offset=rng.normal(0, 0.03, 2),
    )


def iris_texture(person: Identity, r: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour (H, W, 3) and relief (H, W), about zero mean, of the iris at polar (r in 0..1, theta)."""
    rng = np.random.default_rng(person.texture_seed)
    wander = polar_noise(rng, theta, r, 22, 5) * 0.05 + polar_noise(rng, theta, r, 60, 9) * 0.012
    bent = theta + wander
    fibres = 0.55 * polar_noise(rng, bent, r, person.fibres, 5)
    fibres += 0.45 * polar_noise(rng, bent, r, 2 * person.fibres, 8)
    fibres = np.sign(fibres) * np.abs(fibres) ** 0.8

    ragged = polar_noise(rng, theta, r * 0, 26, 1) * 0.05 + polar_noise(rng, theta, r * 0, 70, 1) * 0.02
    edge = r - person.collarette - ragged  # signed distance to the collarette
    ridge = np.exp(-((edge / 0.035) ** 2))
    ciliary = smoothstep(-0.03, 0.05, edge)
    relief = 0.42 * fibres * (0.55 + 0.45 * ciliary) + 0.30 * ridge

    for _ in range(person.crypts):  # openings between the fibres, most of them along the collarette
        angle, radius = rng.uniform(0, 2 * np.pi), person.collarette + abs(rng.normal(0.06, 0.09))
        length, width = rng.uniform(0.04, 0.13), rng.uniform(0.035, 0.10)
        turn = (bent - angle + np.pi) % (2 * np.pi) - np.pi
        shape = np.abs(turn / width) ** 1.6 + np.abs((r - radius) / length) ** 1.6
        relief -= rng.uniform(0.45, 0.9) * np.exp(-(shape**2))
        relief += 0.22 * np.exp(-(((shape - 1.25) / 0.35) ** 2))  # the bright rim of the opening
    for _ in range(person.furrows):  # concentric contraction furrows, each over a part of the circle
        radius, angle = rng.uniform(0.55, 0.88), rng.uniform(0, 2 * np.pi)
        turn = (theta - angle + np.pi) % (2 * np.pi) - np.pi
        arc = smoothstep(1.7, 0.8, np.abs(turn))
        off = r - radius - 0.02 * polar_noise(rng, theta, r * 0, 12, 1)
        relief -= 0.32 * arc * np.exp(-((off / 0.018) ** 2))
    relief += 0.20 * polar_noise(rng, theta, r, 9, 3)  # sectors of denser and thinner tissue

    blend = smoothstep(0.10, -0.06, edge + 0.04 * fibres)
    colour = person.outer_colour + (person.inner_colour - person.outer_colour) * blend[..., None]
    for _ in range(rng.integers(0, 4)):  # pigment spots
        angle, radius, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.9), rng.uniform(0.02, 0.06)
        far = (r * np.cos(theta) - radius * np.cos(angle)) ** 2 + (
            r * np.sin(theta) - radius * np.sin(angle)
        ) ** 2
        colour = mix(colour, np.array([0.24, 0.14, 0.06]), 0.6 * np.exp(-far / size**2))
    return colour, relief


def paint_iris(person, px, py, pupil_size, infrared, light) -> np.ndarray:
    """Shaded iris (H, W, 3) at coordinates of its own plane, in iris radii."""
    theta, radius = np.arctan2(py, px), np.hypot(px, py)
    ox, oy = person.pupil_offset
    inner = pupil_size + ox * np.cos(theta) + oy * np.sin(theta)  # the pupil's edge along the ray
    zone = np.clip((radius - inner) / (1 - inner), 0, 1)
    colour, relief = iris_texture(person, zone, theta)
    brightness = person.outer_colour.mean()
    if infrared:  # melanin is nearly transparent in the near infrared: grey irises of similar brightness
        grey = 0.40 + 0.16 * (brightness - 0.3) + 0.05 * (1 - smoothstep(0, 0.5, zone))
        colour = np.repeat(grey[..., None], 3, 2)
    contrast = 0.42 if infrared else 0.62 if brightness > 0.3 else 0.50
    shade = np.exp(contrast * relief)
    shade *= 1 - smoothstep(0.80, 1.0, radius) * person.limbal_ring * (0.6 if infrared else 1.0)
    shade *= 1 - 0.55 * np.exp(-((zone / 0.035) ** 2))  # pigment ruff at the pupil's edge
    shade *= 1 + 0.16 * (py * 0.5 - px * light) * radius  # light gathers opposite its source
    return colour * shade[..., None]
