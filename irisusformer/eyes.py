"""Procedural eyes with exact ground truth: the embedded data of the demo.

`draw_eye` paints a whole eye region at any size: an iris with fibres, crypts, collarette, furrows and a
limbal ring, pupil, sclera with vessels, caruncle, lids with crease, lashes that hang into the iris, corneal
reflections, glasses, off-axis gaze, in the looks of near-infrared and visible-light sensors. An identity
fixes what belongs to the person (iris texture, colours, lids), a second seed what belongs to the picture.
`draw_simple_eye` is the plain world of discs and parabolas in which effects are easiest to see.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from irisusformer.eye_parts import (
    draw_brow,
    draw_glasses,
    draw_lashes,
    draw_reflections,
    draw_sclera,
    draw_skin,
    strokes,
)
from irisusformer.iris import Identity, mix, paint_iris, smoothstep
from shared.runtime import UserError

Look = Literal["nir", "distance", "visible", "phone"]
LOOKS: tuple[Look, ...] = ("nir", "distance", "visible", "phone")


def require_looks(looks: tuple[Look, ...]) -> None:
    """UserError when there are none to draw eyes in."""
    if not looks:
        raise UserError(f"--looks: give at least one of {', '.join(LOOKS)}")


@dataclass(frozen=True)
class Eye:
    """One picture: `image` (H, W, 3) float32 in [0, 1] and masks (H, W) bool.

    `mask` is usable iris texture, `pupil` and `outer` are the filled regions inside the inner and the outer
    boundary as if nothing covered them, `opening` is what lies between the lids. Ellipses are (centre x,
    centre y, semi-axis a, semi-axis b, angle of a in radians), in pixels.
    """

    image: np.ndarray
    mask: np.ndarray
    pupil: np.ndarray
    outer: np.ndarray
    opening: np.ndarray
    pupil_ellipse: tuple[float, float, float, float, float]
    outer_ellipse: tuple[float, float, float, float, float]


def iris_plane(dx, dy, squash: float, direction: float):
    """Picture offsets from the iris centre -> coordinates in the iris's plane, turned along `direction`."""
    c, s = np.cos(direction), np.sin(direction)
    along, across = (dx * c + dy * s) / squash, dy * c - dx * s
    return along * c - across * s, along * s + across * c


def draw_eye(
    person: Identity,
    seed: int,
    height: int = 240,
    width: int = 320,
    look: Look = "visible",
    oversample: int = 2,
) -> Eye:
    """Picture number `seed` of one eye, height x width pixels, as a sensor of the given look sees it."""
    rng = np.random.default_rng([person.texture_seed, seed, LOOKS.index(look)])
    infrared = look in ("nir", "distance")
    H, W = height * oversample, width * oversample
    unit = min(H, W) * {"nir": 1.12, "distance": 0.72, "visible": 0.92, "phone": 0.80}[look]
    R = unit * rng.uniform(0.23, 0.33)  # iris radius, supersampled pixels
    cx, cy = W * (0.5 + rng.normal(0, 0.035)), H * (0.52 + rng.normal(0, 0.03))
    roll = rng.normal(0, 0.06)

    # eye coordinates: origin at the centre of the opening, unit = iris radius, y down, rolled
    X, Y = np.meshgrid(np.arange(W, dtype=np.float32) + 0.5 - cx, np.arange(H, dtype=np.float32) + 0.5 - cy)
    X, Y = (X * np.cos(roll) + Y * np.sin(roll)) / R, (Y * np.cos(roll) - X * np.sin(roll)) / R
    pixel = 1 / R  # width of a supersampled pixel in eye units

    def place(x, y):
        """Eye coordinates -> supersampled pixels."""
        x, y = np.asarray(x) * R, np.asarray(y) * R
        return cx + x * np.cos(roll) - y * np.sin(roll), cy + x * np.sin(roll) + y * np.cos(roll)

    # lids: arcs between the inner (left, by the nose) and the outer corner
    half = rng.uniform(2.35, 2.6)
    openness = person.opening * np.clip(rng.normal(1.0, 0.16), 0.55, 1.25)
    upper_peak, lower_peak = 1.02 * openness, 0.80 * min(openness, 1.1)

    def lid(x, peak, skew, power):
        t = np.clip((x + half) / (2 * half), 0, 1)
        arc = (4 * t * (1 - t)) ** power
        return person.tilt * x + peak * arc * (1 + skew * (t - 0.5))

    def upper_lid(x):
        return lid(x, -upper_peak, -0.35, 0.75)

    def lower_lid(x):
        return lid(x, lower_peak, 0.30, 0.85)

    # gaze turns the eyeball: the iris moves and its circle becomes an ellipse
    gaze_x, gaze_y = rng.normal(0, 0.22 if infrared else 0.30), rng.normal(0.02, 0.09)
    gaze = np.array([np.clip(gaze_x, -0.7, 0.7), np.clip(gaze_y, -0.25, 0.25)])
    ix, iy = 2.05 * np.sin(gaze)  # the eyeball is about 2.05 iris radii
    iy -= 0.08
    tilt_angle = float(np.hypot(*gaze))
    squash, direction = np.cos(tilt_angle), np.arctan2(gaze[1], gaze[0])
    px, py = iris_plane(X - ix, Y - iy, squash, direction)
    radius = np.hypot(px, py)  # 1 at the limbus
    pupil_size = np.clip(rng.normal(0.44 if infrared else 0.36, 0.08), 0.22, 0.65)
    ox, oy = person.pupil_offset
    pupil_r = np.hypot(px - ox, py - oy)
    light = rng.uniform(-0.5, 0.5)

    ball = draw_sclera(rng, person, infrared, X, Y, place, half, R)
    limbus_soft = rng.uniform(0.012, 0.055)  # the blurry outer boundary
    rows, columns = (np.flatnonzero((radius < 1.1).any(axis)) for axis in (1, 0))
    # the iris is painted in its own window
    near = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    iris = paint_iris(person, px[near], py[near], pupil_size, infrared, light)
    ball[near] = mix(iris, ball[near], smoothstep(1 - limbus_soft, 1 + limbus_soft, radius[near]))
    black = np.full(3, rng.uniform(0.015, 0.06), np.float32)
    ball = mix(ball, black, smoothstep(pupil_size + 0.02, pupil_size - 0.02, pupil_r))

    # shadow of the upper lid and its lashes on the ball
    up, low = upper_lid(X), lower_lid(X)
    below = Y - up
    ball *= (1 - rng.uniform(0.35, 0.6) * np.exp(-np.clip(below, 0, None) / 0.16))[..., None]
    ball *= (1 - 0.22 * np.exp(-np.clip(low - Y, 0, None) / 0.07))[..., None]

    # skin with pores, crease, lid rims and folds
    skin = draw_skin(rng, person, infrared, X, Y, up, low, half, R)
    opening = smoothstep(-pixel, pixel, Y - up) * smoothstep(-pixel, pixel, low - Y) * (np.abs(X) < half)
    picture = mix(skin, ball, opening)

    brow = draw_brow(rng, (H, W), place, -upper_peak - person.brow, half, R)
    picture = mix(picture, np.array([0.10, 0.075, 0.06]) if not infrared else np.full(3, 0.16), brow)
    lashes, lash_shade = draw_lashes(rng, person, (H, W), place, upper_lid, lower_lid, half, R)
    lash_colour = np.array([0.10, 0.10, 0.10]) if infrared else np.array([0.09, 0.065, 0.05])
    picture = picture * (1 - 0.30 * lash_shade)[..., None]
    picture = mix(picture, lash_colour, lashes)

    flare = draw_reflections(rng, look, (H, W), X, Y, ix, iy, R, pixel)
    picture = mix(picture, np.array([1.0, 1.0, 1.0]), flare)
    if rng.random() < 0.15:
        picture, cover = draw_glasses(rng, picture, X, Y, infrared)
        flare = np.maximum(flare, cover)

    picture = expose(rng, look, picture, X, Y)

    # ground truth on the supersampled grid, then both down to the sensor's pixels
    def down(x):
        return cv2.resize(x.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)

    layers = radius <= 1, pupil_r <= pupil_size, opening > 0.5, (lashes >= 0.5) | (flare >= 0.45)
    outer, pupil, between_lids, covered = (down(layer) >= 0.5 for layer in layers)

    image = sensor(rng, look, down(picture), min(height, width))

    def ellipse(a, sx, sy):
        x, y = place(sx, sy)
        k = 1 / oversample
        long = float(a * R * k)
        return float(x * k), float(y * k), long, long * float(squash), float(direction + roll + np.pi / 2)

    # the pupil's centre: its offset in the iris plane, foreshortened along the gaze
    u = (ox * np.cos(direction) + oy * np.sin(direction)) * squash
    v = oy * np.cos(direction) - ox * np.sin(direction)
    pupil_x = ix + u * np.cos(direction) - v * np.sin(direction)
    pupil_y = iy + u * np.sin(direction) + v * np.cos(direction)
    return Eye(
        image,
        outer & ~pupil & between_lids & ~covered,
        pupil,
        outer,
        between_lids,
        ellipse(pupil_size, pupil_x, pupil_y),
        ellipse(1.0, ix, iy),
    )


def expose(rng, look, picture, X, Y) -> np.ndarray:
    """Illumination, white balance and exposure."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 0.12 if look in ("nir", "distance") else 0.2)
    picture = picture * (1 + slope * (X * np.cos(angle) + Y * np.sin(angle)) / 1.5)[..., None]
    gain = rng.uniform(0.8, 1.15)
    if look in ("visible", "phone"):
        picture = picture * (gain * (1 + rng.normal(0, 0.03, 3)))
    else:
        picture = picture * gain
    return np.clip(picture, 0, 1).astype(np.float32)


def sensor(rng, look, image, side) -> np.ndarray:
    """Defocus, motion, grain; near-infrared sensors give one channel, repeated. (H, W, 3) in [0, 1]."""
    blur = (
        side / 240 * {"nir": 0.5, "distance": 1.0, "visible": 0.8, "phone": 0.9}[look] * rng.uniform(0.3, 1.6)
    )
    if blur > 0.15:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    if rng.random() < 0.2:  # motion
        length = max(2, int(side * rng.uniform(0.006, 0.02)))
        kernel = np.zeros((length, length), np.float32)
        cv2.line(kernel, (0, int(rng.integers(length))), (length - 1, int(rng.integers(length))), 1.0)
        image = cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    if look in ("nir", "distance"):
        image = np.repeat(image.mean(2, keepdims=True), 3, 2)
    sigma = {"nir": 0.012, "distance": 0.022, "visible": 0.018, "phone": 0.028}[look] * rng.uniform(0.5, 1.6)
    channels = 1 if look in ("nir", "distance") else 3
    grain = rng.normal(0, 1, (*image.shape[:2], channels)).astype(np.float32)
    if look == "phone":  # the phone's own denoising leaves coarse chroma grain
        grain = cv2.GaussianBlur(grain, (0, 0), 0.7) * 1.6
    return np.clip(image + sigma * grain * np.sqrt(0.3 + image), 0, 1).astype(np.float32)


def draw_simple_eye(seed: int, side: int = 64) -> Eye:
    """An eye of the simple world: discs, parabolas and noise, `side` x `side` pixels."""
    rng = np.random.default_rng([seed, 3])
    X, Y = np.meshgrid(*(np.arange(side, dtype=np.float32) + 0.5,) * 2)
    X, Y = X / side, Y / side
    pixel = 1 / side
    x, y = rng.uniform(0.42, 0.58, 2)
    radius, aspect = rng.uniform(0.20, 0.32), rng.uniform(0.88, 1.12)
    pupil_radius = radius * rng.uniform(0.3, 0.55)
    px, py = x + rng.normal(0, 0.01), y + rng.normal(0, 0.01)
    distance = np.hypot((X - x) / aspect, Y - y)
    pupil_distance = np.hypot((X - px) / aspect, Y - py)

    skin = rng.uniform([0.45, 0.30, 0.22], [0.90, 0.72, 0.62]).astype(np.float32)
    image = np.ones((side, side, 3), np.float32) * skin
    curve = ((X - x) / 0.55) ** 2
    up, low = y - rng.uniform(0.19, 0.36) * (1 - curve), y + rng.uniform(0.18, 0.34) * (1 - curve)
    opening = (up < Y) & (low > Y)
    eye = np.ones((side, side, 3), np.float32) * rng.uniform(0.75, 0.95)
    theta = np.arctan2(Y - y, X - x)
    waves = np.sin(rng.integers(8, 24) * theta + rng.uniform(0, 6)) * np.sin(distance * rng.uniform(60, 140))
    colour = rng.uniform([0.15, 0.12, 0.08], [0.55, 0.50, 0.55])
    soft = rng.uniform(0.005, 0.03)
    eye = mix(eye, colour * (1 + 0.25 * waves)[..., None], smoothstep(radius + soft, radius - soft, distance))
    eye = mix(eye, np.full(3, 0.04), smoothstep(pupil_radius + pixel, pupil_radius - pixel, pupil_distance))
    image = mix(image, eye, opening.astype(np.float32))

    lashes = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(0, 8)):
        x0 = x + rng.uniform(-0.25, 0.25)
        y0 = np.interp(x0, X[0], up[0])
        xs = np.array([x0, x0 + rng.normal(0, 0.05)]) * side
        ys = np.array([y0 - 0.02, y0 + rng.uniform(0.05, 0.17)]) * side
        strokes(lashes, xs, ys, np.ones(2), 1.0)
    lash = lashes.astype(np.float32) / 255
    image = mix(image, np.full(3, 0.05), lash)
    flare = np.zeros((side, side), bool)
    for _ in range(rng.integers(0, 3)):
        fx, fy = x + rng.normal(0, 0.08), y + rng.normal(0, 0.08)
        flare |= np.hypot(X - fx, Y - fy) < rng.uniform(0.015, 0.045)
    image[flare] = 1.0

    angle = rng.uniform(0, 2 * np.pi)
    gradient = 1 + rng.uniform(0, 0.35) * 2 * ((X - 0.5) * np.cos(angle) + (Y - 0.5) * np.sin(angle))
    image = image * gradient[..., None] + rng.normal(0, rng.uniform(0.01, 0.06), image.shape)
    outer, pupil = distance <= radius, pupil_distance <= pupil_radius
    mask = outer & ~pupil & opening & (lash < 0.5) & ~flare
    wide = 0.0 if aspect >= 1 else np.pi / 2
    axes = max(aspect, 1.0), min(aspect, 1.0)
    ellipses = [
        (cx * side, cy * side, r * axes[0] * side, r * axes[1] * side, wide)
        for cx, cy, r in ((px, py, pupil_radius), (x, y, radius))
    ]
    return Eye(np.clip(image, 0, 1).astype(np.float32), mask, pupil, outer, opening, *ellipses)
