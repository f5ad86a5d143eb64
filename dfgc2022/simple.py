"""The plain people on which the claims were first tried out: ellipses with two eyes and a mouth.

Lengths are in units of a 64th of a frame. world.py draws its contest with them for `--world.people simple`;
the camera, the creators, the encoder and the raters are the same for both kinds of people.
"""

import cv2
import numpy as np


def simple_scenes(
    people: int, seed: int, keys: int, pixels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawn frames of `people` targets and of a donor in the place of each, both (n, keys, P, P, 3) float32
    in [0, 255], and the corners of each face (n, keys, 2, 2), which stand for its landmarks.

    A donor has the target's outline, background and motion, and its own skin, eyes, mouth and texture. Pure
    function of the arguments.
    """
    rng = np.random.default_rng((seed, 2))
    target, donor, corners = [], [], []
    for _ in range(people):
        own, other = _identity(rng), _identity(rng)
        other["axes"] = own["axes"]
        background = _background(rng, pixels)
        centre = rng.uniform(-2, 2, 2) + (32, 33)
        drift, opening = rng.uniform(-0.5, 0.5, 2) * 3, rng.uniform(0, 1, 2)
        for step in np.linspace(0, 1, keys):
            # Three frames between two drawn ones at the demo's gap, each moved by at most half a unit.
            place = centre + drift * step * (keys - 1)
            mouth = opening[0] + step * (opening[1] - opening[0])
            target.append(_face(own, background, place, mouth))
            donor.append(_face(other, background, place, mouth))
            reach = own["axes"] / (1, 1.1)
            corners.append((np.stack([place - reach, place + reach]) - 0.5) * pixels / 64)
    shape = (people, keys, pixels, pixels, 3)
    frames = (np.stack(found).astype(np.float32).reshape(shape) for found in (target, donor))
    return (*frames, np.stack(corners).reshape(people, keys, 2, 2))


def _identity(rng: np.random.Generator) -> dict[str, np.ndarray]:
    texture = rng.uniform(3, 7) * rng.standard_normal((8, 8))
    return {
        "skin": rng.uniform([150, 100, 80], [235, 185, 165]),
        "axes": rng.uniform([15, 20], [20, 26]),
        "eyes": rng.uniform([5, -9], [9, -4]),
        "mouth": rng.uniform([3, 7], [8, 13]),  # half its width, and how low it lies
        "texture": cv2.resize(texture, (64, 64), interpolation=cv2.INTER_CUBIC).astype(np.float32),
    }


def _background(rng: np.random.Generator, pixels: int) -> np.ndarray:
    colours, angle = rng.uniform(0, 255, (2, 3)), rng.uniform(0, 2 * np.pi)
    y, x = np.indices((pixels, pixels)) / pixels - 0.5
    share = (0.5 + x * np.cos(angle) + y * np.sin(angle)).clip(0, 1)[..., None]
    noise = cv2.resize(rng.normal(0, 12, (6, 6, 3)), (pixels, pixels), interpolation=cv2.INTER_CUBIC)
    return (colours[0] * (1 - share) + colours[1] * share + noise).clip(0, 255) * 0.7 + 40


def _face(
    who: dict[str, np.ndarray], background: np.ndarray, place: np.ndarray, opening: float
) -> np.ndarray:
    """A person before a background (P, P, 3): soft edge, shading, dark eyes, a mouth that opens."""
    pixels = len(background)
    y, x = (np.indices((pixels, pixels), dtype=np.float32) + 0.5) * (64 / pixels)
    x, y = x - place[0], y - place[1]
    distance = (x / who["axes"][0]) ** 2 + (y / who["axes"][1]) ** 2
    light = 1.05 - 0.2 * distance - 0.1 * x / who["axes"][0]
    at = np.float32(x + 31.5), np.float32(y + 31.5)  # it moves with the face
    texture = cv2.remap(who["texture"], *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    face = who["skin"] * light[..., None] + texture[..., None]
    eyes = sum(
        np.exp(-((x - side * who["eyes"][0]) ** 2 + (y - who["eyes"][1]) ** 2) / 4) for side in (-1, 1)
    )
    face = face * (1 - 0.75 * eyes[..., None])
    width, low = who["mouth"]
    mouth = np.exp(-((x / width) ** 4) - ((y - low) / (1 + 2 * opening)) ** 2)[..., None]
    face = face * (1 - mouth) + mouth * (110, 40, 45)
    weight = ((1 - distance) / 0.2 + 0.5).clip(0, 1)[..., None]
    return (background * (1 - weight) + face * weight).clip(0, 255)
