"""From masks to iris geometry: boundary ellipses, Daugman's rubber sheet, and a quality score."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Ellipse:
    """Centre (x, y), semi-axes a and b along and across `angle` (radians), all in pixels."""

    x: float
    y: float
    a: float
    b: float
    angle: float

    def points(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the boundary in the directions `theta` as seen from the centre."""
        local = theta - self.angle
        radius = 1 / np.hypot(np.cos(local) / self.a, np.sin(local) / self.b)
        return self.x + radius * np.cos(theta), self.y + radius * np.sin(theta)

    def level(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """1 on the boundary, less inside, proportional to the distance from the centre."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        dx, dy = x - self.x, y - self.y
        return np.hypot((dx * c + dy * s) / self.a, (dy * c - dx * s) / self.b)

    def scaled(self, factor: float) -> "Ellipse":
        """The ellipse in a picture enlarged by `factor`."""
        return Ellipse(self.x * factor, self.y * factor, self.a * factor, self.b * factor, self.angle)


def least_squares(x: np.ndarray, y: np.ndarray) -> Ellipse | None:
    """Ellipse through points (at least 5) by OpenCV's direct fit; None where they form none."""
    if len(x) < 5:
        return None
    (cx, cy), (width, height), degrees = cv2.fitEllipseDirect(np.stack([x, y], 1).astype(np.float32))
    if not (np.isfinite([cx, cy, width, height]).all() and min(width, height) > 1):
        return None
    return Ellipse(cx, cy, width / 2, height / 2, np.radians(degrees))


def robust_ellipse(
    x: np.ndarray, y: np.ndarray, limbus: Ellipse | None = None, trials: int = 300
) -> Ellipse | None:
    """Ellipse of a boundary of which lids, lashes and lights hide a part; None where the points form none.

    Hidden parts cut chords into the limbus, so the true one runs through many points and leaves the others
    inside; they bulge the pupil, so the true one leaves the others outside. RANSAC over six points each
    (seeded: the same points give the same ellipse) counts points within 3 % of the boundary, or 1.5 pixels
    where that is more, subtracts those on the wrong side, and prefers what is round: half an outline also
    lies on many a long ellipse. Then a fit to the points within 3 % or a pixel of the winner. With `limbus`
    the pupil inside it is sought.
    """
    rng = np.random.default_rng(0)
    wrong_side = 1.0 if limbus is None else -1.0
    extent = max(np.ptp(x), np.ptp(y)) if len(x) else 0.0

    def plausible(e: Ellipse) -> bool:
        small, large = sorted((e.a, e.b))
        if small / large < 0.58:  # an eye turned by more than about 55 degrees
            return False
        if limbus is None:
            return large < 0.9 * extent
        return 0.12 * limbus.a < small and large < 0.8 * limbus.a and limbus.level(e.x, e.y) < 0.3

    def tolerance(e: Ellipse, pixels: float) -> float:
        return max(0.03, pixels / np.sqrt(e.a * e.b))

    best, best_score = None, 0.0
    for _ in range(trials if len(x) >= 12 else 0):
        pick = rng.choice(len(x), 6, replace=False)
        ellipse = least_squares(x[pick], y[pick])
        if ellipse is None or not plausible(ellipse):
            continue
        off = ellipse.level(x, y) - 1
        near = tolerance(ellipse, 1.5)
        score = (np.abs(off) < near).sum() - 2.0 * (wrong_side * off > near + 0.01).sum()
        score *= min(ellipse.a, ellipse.b) / max(ellipse.a, ellipse.b)
        if score > best_score:
            best, best_score = ellipse, score
    if best is None:
        whole = least_squares(x, y)
        return whole if whole is not None and plausible(whole) else None
    for _ in range(3):
        near = np.abs(best.level(x, y) - 1) < tolerance(best, 1.0)
        refined = least_squares(x[near], y[near])
        if refined is None or not plausible(refined):
            break
        best = refined
    return best


def largest_part(region: np.ndarray) -> np.ndarray:
    """The largest connected part of a bool region (H, W)."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count < 2:
        return np.zeros_like(region, bool)
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def outline(region: np.ndarray, hull: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates along the outer contour of a region (H, W), without the picture's border.

    With `hull`, only contour points within 1.5 pixels of the convex hull: notches of lashes and lights go.
    """
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return np.empty(0), np.empty(0)
    contour = max(contours, key=cv2.contourArea)
    if hull:
        around = cv2.convexHull(contour)
        distance = [cv2.pointPolygonTest(around, (float(x), float(y)), True) for x, y in contour[:, 0]]
        contour = contour[np.abs(distance) < 1.5]
    x, y = contour[:, 0, 0].astype(float), contour[:, 0, 1].astype(float)
    height, width = region.shape
    free = (x > 0) & (y > 0) & (x < width - 1) & (y < height - 1)
    return x[free] + 0.5, y[free] + 0.5


def fit_boundaries(
    mask: np.ndarray, pupil: np.ndarray | None = None, outer: np.ndarray | None = None
) -> tuple[Ellipse | None, Ellipse | None]:
    """Pupil and limbus ellipses from the iris mask (H, W) bool, or from the boundary heads' regions.

    Without `outer`, the limbus is fitted to the convex outline of the mask's largest part; without `pupil`,
    the pupil to the mask's edges well inside the limbus. None for a boundary that cannot be found.
    """
    outer_region = largest_part(mask if outer is None else outer)
    limbus = robust_ellipse(*outline(outer_region, hull=outer is None))
    if limbus is None:
        return None, None
    if pupil is not None:
        return robust_ellipse(*outline(largest_part(pupil))), limbus
    edge = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~mask
    y, x = (side + 0.5 for side in np.nonzero(edge))
    within = limbus.level(x, y) < 0.8
    return robust_ellipse(x[within], y[within], limbus), limbus


def rubber_sheet(
    image: np.ndarray,
    mask: np.ndarray,
    uncertainty: np.ndarray,
    pupil: Ellipse,
    limbus: Ellipse,
    height: int = 64,
    width: int = 512,
) -> dict[str, np.ndarray]:
    """Daugman's normalisation: the ring between two ellipses unrolled, pupil on top, angles left to right.

    Column j looks in the direction 2 pi j / width (0 to the right, growing downwards), row i at (i + 0.5) /
    height of the way from pupil to limbus. Returns `image` (height, width[, 3]) float32, `mask` bool and
    `reliability` float32 = (1 - uncertainty) inside the mask, 0 outside.
    """
    theta = 2 * np.pi * np.arange(width) / width
    r = ((np.arange(height) + 0.5) / height)[:, None]
    (px, py), (lx, ly) = pupil.points(theta), limbus.points(theta)
    x = ((1 - r) * px + r * lx - 0.5).astype(np.float32)
    y = ((1 - r) * py + r * ly - 0.5).astype(np.float32)

    def sample(source: np.ndarray, how: int) -> np.ndarray:
        return cv2.remap(source, x, y, how, borderMode=cv2.BORDER_CONSTANT, borderValue=0)

    usable = sample(mask.astype(np.uint8), cv2.INTER_NEAREST).astype(bool)
    certain = sample((1 - uncertainty).astype(np.float32), cv2.INTER_LINEAR)
    polar = sample(image.astype(np.float32), cv2.INTER_LINEAR)
    return {"image": polar, "mask": usable, "reliability": np.where(usable, certain, 0).astype(np.float32)}


def quality(mask: np.ndarray, uncertainty: np.ndarray, polar_mask: np.ndarray | None) -> dict[str, float]:
    """`score` = 1 - mean uncertainty inside the mask (0 without iris); `usable` share of the iris ring."""
    score = 1 - float(uncertainty[mask].mean()) if mask.any() else 0.0
    return {"score": score, "usable": 0.0 if polar_mask is None else float(polar_mask.mean())}
