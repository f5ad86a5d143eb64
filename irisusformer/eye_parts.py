"""What surrounds the procedural iris: vessels, skin, lashes, brow, reflections and glasses."""

import cv2
import numpy as np

from irisusformer.iris import mix, smoothstep

SHIFT = 4  # sub-pixel bits of OpenCV's drawing functions


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise in [-1, 1] with features of `cell` pixels."""
    rows, columns = (max(2, int(np.ceil(side / cell)) + 1) for side in shape)
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def strokes(canvas: np.ndarray, x: np.ndarray, y: np.ndarray, thick: np.ndarray, value: float) -> None:
    """Draw one antialiased curve through pixel coordinates with a thickness per segment."""
    points = np.stack([x, y], -1) * 2**SHIFT
    points = points.round().astype(np.int32)
    for i in range(len(points) - 1):
        pen = max(1, int(round(thick[i])))
        strength = value * min(1.0, float(thick[i]))  # thinner than a pixel: fainter
        a, b = tuple(map(int, points[i])), tuple(map(int, points[i + 1]))
        cv2.line(canvas, a, b, int(255 * strength), pen, cv2.LINE_AA, SHIFT)


def draw_veins(rng, person, shape, place, half, R) -> np.ndarray:
    """Branching vessels from both corners towards the iris, opacity (H, W)."""
    own = np.random.default_rng([person.texture_seed, 2])  # vessels belong to the person
    canvas = np.zeros(shape, np.uint8)
    amount = rng.uniform(0.4, 1.0)
    for side in (-1, 1):
        for _ in range(own.integers(7, 14)):
            x, y = side * half * own.uniform(0.75, 1.0), own.uniform(-0.55, 0.55)
            heading, length = own.normal(0, 0.35), own.uniform(0.5, 1.25)
            t = np.linspace(0, 1, 14)
            bend = np.cumsum(own.normal(0, 0.055, 14))
            xs = x - side * length * t
            ys = y * (1 - 0.2 * t) + heading * t * 0.5 + bend
            thick = R * own.uniform(0.006, 0.020) * (1.15 - t)
            strokes(canvas, *place(xs, ys), thick, amount * own.uniform(0.5, 1.0))
            if own.random() < 0.7:  # a branch
                k = own.integers(4, 10)
                s = np.linspace(0, 1, 8)
                bx = xs[k] - side * 0.4 * s
                by = ys[k] + own.choice([-1, 1]) * 0.22 * s + np.cumsum(own.normal(0, 0.03, 8))
                strokes(canvas, *place(bx, by), thick[k] * 0.7 * (1.1 - s), amount * 0.6)
    return cv2.GaussianBlur(canvas, (0, 0), max(0.4, R * 0.006)).astype(np.float32) / 255


def draw_sclera(rng, person, infrared, X, Y, place, half, R) -> np.ndarray:
    """The white of the eye (H, W, 3): a shaded ball, warm and veined towards the corners."""
    shape = X.shape
    far = np.clip(np.hypot(X / 2.5, Y / 1.9), 0, 1.3)
    white = np.array([0.62, 0.62, 0.62] if infrared else [0.83, 0.79, 0.75], np.float32)
    sclera = np.ones((*shape, 3), np.float32) * white
    sclera *= (1.03 - 0.50 * far**2)[..., None]
    sclera *= (1 + 0.02 * noise(rng, shape, R * 0.5))[..., None]
    if not infrared:
        sclera = mix(sclera, sclera * np.array([1.0, 0.80, 0.76]), smoothstep(0.45, 1.1, far) * 0.8)
    veins = draw_veins(rng, person, shape, place, half, R) * (0.5 if infrared else 1.0)
    sclera = mix(sclera, np.array([0.42, 0.42, 0.42] if infrared else [0.70, 0.24, 0.20]), veins * 0.5)
    caruncle = np.exp(-(((X + half * 0.97) / 0.30) ** 2) - ((Y - person.tilt * X) / 0.22) ** 2)
    pink = np.array([0.52, 0.52, 0.52] if infrared else [0.78, 0.47, 0.42])
    return mix(sclera, pink * (1 + 0.10 * noise(rng, shape, R * 0.08))[..., None], 0.9 * caruncle)


def draw_skin(rng, person, infrared, X, Y, up, low, half, R) -> np.ndarray:
    """Skin of both lids and around: folds, rims, pores (H, W, 3)."""
    shape = X.shape
    base = np.array([0.64, 0.64, 0.64]) * (0.85 + 0.3 * person.skin.mean()) if infrared else person.skin
    shade = 1 + 0.05 * noise(rng, shape, R * 1.2) + 0.03 * noise(rng, shape, R * 0.25)
    pores = noise(rng, shape, max(2.0, R * 0.035)) * 0.5 + noise(rng, shape, max(1.5, R * 0.018)) * 0.5
    shade += (0.03 if infrared else 0.05) * pores
    grooves = noise(rng, shape, max(2.0, R * 0.07)) + 0.6 * noise(rng, shape, max(2.0, R * 0.03))
    shade -= (0.04 if infrared else 0.06) * np.exp(-((grooves / 0.16) ** 2))  # the net of lines of real skin
    above, under = up - Y, Y - low  # distances into the skin, positive on it
    crease_y = person.crease * (1 - 0.25 * (X / half) ** 2) + 0.02 * noise(rng, shape, R * 0.8)
    fold = above - crease_y
    near = smoothstep(half * 1.12, half * 0.8, np.abs(X))  # folds run out beyond the corners
    shade -= near * 0.30 * np.exp(-((fold / 0.045) ** 2))
    shade -= near * 0.15 * np.exp(-np.abs(fold) / 0.25) * (fold > 0)
    shade += (
        near * 0.12 * np.exp(-(((above - crease_y * 0.5) / (0.3 * person.crease)) ** 2))
    )  # the lid's bulge
    shade += 0.07 * smoothstep(0.6, 1.6, above)
    shade -= 0.14 * np.exp(-(((under - 0.42) / 0.16) ** 2)) * smoothstep(half * 1.1, 0.4, np.abs(X))  # bag
    for _ in range(rng.integers(2, 6)):  # fine wrinkles under the eye
        y0, slope, x0 = rng.uniform(0.15, 1.0), rng.normal(0, 0.06), rng.uniform(-1.5, 1.5)
        line = under - y0 - slope * X + 0.03 * noise(rng, shape, R * 0.6)
        shade -= 0.07 * np.exp(-((line / 0.022) ** 2)) * np.exp(-(((X - x0) / 0.9) ** 2))
    shade -= 0.20 * np.exp(-(((X + half * 1.12) / 0.45) ** 2) - ((Y - 0.1) / 0.7) ** 2)  # hollow by the nose
    skin = base * shade[..., None]
    if not infrared:
        red = np.exp(-np.abs(above) / 0.22) * (above > 0) + np.exp(-np.abs(under) / 0.18) * (under > 0)
        skin = mix(skin, skin * np.array([0.96, 0.80, 0.77]), np.clip(red, 0, 1) * 0.7)
    rim = np.exp(-(((under - 0.035) / 0.03) ** 2)) * (np.abs(X) < half)  # wet margin of the lower lid
    skin = mix(skin, base * np.array([1.12, 1.02, 1.0]), 0.45 * rim)
    line = np.exp(-np.abs(above) / 0.04) * (above > 0) * (np.abs(X) < half)  # roots of the upper lashes
    return np.clip(skin * (1 - 0.55 * line)[..., None], 0, 1)


def draw_lashes(rng, person, shape, place, upper_lid, lower_lid, half, R) -> tuple[np.ndarray, np.ndarray]:
    """Opacity (H, W) of the lashes and of their soft shadow."""
    canvas = np.zeros(shape, np.uint8)
    droop = np.clip(rng.normal(-0.25, 0.45), -0.9, 0.8)  # below 0 curled up over the lid, above 0 hanging
    t = np.linspace(0, 1, 9)
    clumps = rng.uniform(-0.93, 1.0, person.lashes // 3)  # tips of neighbours lean together
    for _ in range(person.lashes):
        x = half * np.clip(rng.uniform(-0.95, 1.0), -0.9, 0.985)
        y = upper_lid(x) - rng.uniform(-0.015, 0.025)
        lean = half * clumps[np.abs(clumps * half - x).argmin()] - x
        fan = 0.55 * x / half + 0.6 * np.clip(lean, -0.15, 0.15) + rng.normal(0, 0.08)
        length = person.lash_length * rng.uniform(0.6, 1.1) * (0.78 + 0.22 * x / half)
        rise = droop + rng.normal(0, 0.15)
        # a quadratic Bezier curve: leaves the rim forwards and downwards, then bends to its tip
        bend_x, bend_y, tip_x, tip_y = 0.35 * fan, 0.30 + 0.2 * max(rise, 0), fan, 0.12 + 0.85 * rise
        xs = x + length * (2 * t * (1 - t) * bend_x + t**2 * tip_x)
        ys = y + length * (2 * t * (1 - t) * bend_y + t**2 * tip_y)
        strokes(canvas, *place(xs, ys), R * rng.uniform(0.018, 0.030) * (1.12 - t), 0.95)
    for _ in range(person.lashes // 2):
        x = half * rng.uniform(-0.6, 0.97)
        y = lower_lid(x) + 0.05
        length, fan = person.lash_length * rng.uniform(0.22, 0.45), 0.6 * x / half + rng.normal(0, 0.15)
        xs, ys = x + length * fan * t, y + length * (0.95 * t - 0.25 * t**2)
        strokes(canvas, *place(xs, ys), R * rng.uniform(0.009, 0.016) * (1.1 - t), 0.7)
    shade = cv2.GaussianBlur(canvas, (0, 0), max(0.6, R * 0.07))
    return canvas.astype(np.float32) / 255, shade.astype(np.float32) / 255


def draw_brow(rng, shape, place, y0, half, R) -> np.ndarray:
    """Opacity (H, W) of the eyebrow, where it is inside the picture."""
    canvas = np.zeros(shape, np.uint8)
    t = np.linspace(0, 1, 5)
    for x in rng.uniform(-1.05, 1.25, 420) * half:
        along = x / half
        thick = 0.34 * (1 - 0.35 * max(along, 0) ** 2)
        y = y0 - 0.35 * np.cos(along * 1.3) + rng.uniform(-0.5, 0.5) * thick
        length, turn = (
            rng.uniform(0.25, 0.5),
            np.clip(-1.1 + 1.2 * (along + 0.9), -1.2, 0.35) + rng.normal(0, 0.15),
        )
        xs, ys = x + length * t * np.cos(turn), y + length * (t * np.sin(turn) + 0.2 * t**2)
        strokes(canvas, *place(xs, ys), R * rng.uniform(0.012, 0.022) * (1.1 - t), rng.uniform(0.5, 0.9))
    return canvas.astype(np.float32) / 255


def draw_reflections(rng, look, shape, X, Y, ix, iy, R, pixel) -> np.ndarray:
    """Opacity (H, W) of the corneal reflections of lamps, windows and flashes."""
    flare = np.zeros(shape, np.float32)
    place_x, place_y = ix * 0.8 + rng.normal(0, 0.12), iy * 0.8 + rng.normal(-0.05, 0.10)
    if look in ("nir", "distance"):  # one or two rows of diodes
        count, gap = int(rng.integers(1, 4)), rng.uniform(0.16, 0.32)
        for k in range(count):
            x, y = place_x + (k - (count - 1) / 2) * gap, place_y + rng.normal(0, 0.01)
            size = rng.uniform(0.045, 0.085)
            flare = np.maximum(flare, smoothstep(1 + 2 * pixel / size, 0.75, np.hypot(X - x, Y - y) / size))
        return flare
    if rng.random() < 0.6:  # a window with a cross-bar, bent by the cornea
        w, h = rng.uniform(0.14, 0.30), rng.uniform(0.16, 0.34)
        x, y = (X - place_x - 0.25 * rng.choice([-1, 1])) / w, (Y - place_y + 0.25) / h
        x = x + 0.18 * y**2 + 0.15 * y
        pane = smoothstep(1.0, 0.82, np.abs(x)) * smoothstep(1.0, 0.82, np.abs(y))
        bars = smoothstep(0.05, 0.13, np.abs(x)) * smoothstep(0.04, 0.11, np.abs(y - 0.1))
        flare = np.maximum(flare, rng.uniform(0.55, 0.95) * pane * (0.35 + 0.65 * bars))
    for _ in range(rng.integers(1, 3)):  # lamps or the flash
        x, y, size = place_x + rng.normal(0, 0.2), place_y + rng.normal(0, 0.15), rng.uniform(0.04, 0.11)
        spot = np.hypot((X - x) / rng.uniform(0.8, 1.3), Y - y) / size
        flare = np.maximum(flare, smoothstep(1 + 2 * pixel / size, 0.7, spot))
        flare = np.maximum(flare, 0.25 * np.exp(-(spot**2) / 6))
    return flare


def draw_glasses(rng, picture, X, Y, infrared) -> tuple[np.ndarray, np.ndarray]:
    """Lens reflections and, now and then, the frame; returns the picture and the cover (H, W)."""
    cover = np.zeros(X.shape, np.float32)
    for _ in range(rng.integers(1, 4)):
        x, y, angle = rng.uniform(-2, 2), rng.uniform(-1.2, 1.2), rng.uniform(-0.5, 0.5)
        a, b = rng.uniform(0.10, 0.45), rng.uniform(0.06, 0.25)
        u = (X - x) * np.cos(angle) + (Y - y) * np.sin(angle)
        v = (Y - y) * np.cos(angle) - (X - x) * np.sin(angle)
        spot = (np.abs(u / a) ** 3 + np.abs((v - 0.3 * u**2) / b) ** 3) ** (1 / 3)
        cover = np.maximum(cover, rng.uniform(0.5, 1.0) * smoothstep(1.1, 0.75, spot))
    tint = np.array([1.0, 1.0, 1.0]) if infrared else np.array([0.90, 0.97, 1.0])
    picture = mix(picture, tint, cover)
    haze = 0.10 * smoothstep(-2.5, 2.5, X * rng.choice([-1, 1]) + Y)  # faint reflection of the surroundings
    picture = mix(picture, tint, haze)
    edge = rng.uniform(1.15, 1.8)
    frame = np.abs(Y - edge - 0.06 * X**2)
    opaque = smoothstep(0.17, 0.14, frame)
    picture = mix(picture, np.array([0.07, 0.06, 0.06]), opaque)
    gleam = np.exp(-(((Y - edge - 0.06 * X**2 + 0.08) / 0.03) ** 2))
    return mix(picture, np.array([0.75, 0.75, 0.78]), 0.5 * gleam), np.maximum(cover, opaque)
