"""The simple world: flat faces of ellipses and an artist who works by rules.

A face is a two-colour background, a striped hair ellipse, a shaded skin ellipse, brows, eyes, nose and mouth.
Colours, light and the stripes of the hair never reach the sketch, so that a network that has seen few pairs
is tempted to copy them.
"""

import torch
from torch import Tensor

PARTS = ("background", "skin", "hair", "brows", "eyes", "nose", "mouth")
BACKGROUND, SKIN, HAIR, BROWS, EYES, NOSE, MOUTH = range(len(PARTS))
HAIR_COLOURS = ((0.10, 0.08, 0.07), (0.35, 0.20, 0.10), (0.80, 0.62, 0.30), (0.55, 0.18, 0.08))
SKIN_COLOURS = ((0.95, 0.80, 0.70), (0.85, 0.65, 0.50), (0.62, 0.43, 0.30), (0.40, 0.27, 0.19))
EYE_COLOURS = ((0.25, 0.45, 0.70), (0.30, 0.55, 0.30), (0.40, 0.25, 0.12), (0.12, 0.10, 0.10))
LIP_COLOURS = ((0.75, 0.30, 0.30), (0.85, 0.45, 0.45), (0.55, 0.15, 0.25))
WHITE_OF_EYE, PUPIL, OPENING = (0.95, 0.95, 0.95), (0.05, 0.05, 0.05), (0.25, 0.05, 0.05)


def draw_simple(n: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """n faces at size x size: images (n, 3, size, size) in [0, 1] and parts (n, size, size), see `PARTS`.

    Face i is the same whatever n is.
    """
    rows = [torch.rand(64, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(n)]
    u = iter(torch.stack(rows).T[..., None, None])  # columns of (n, 1, 1)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(u)

    def choice(colours: tuple[tuple[float, ...], ...]) -> Tensor:
        table = torch.tensor(colours)
        number = (next(u)[:, 0, 0] * len(table)).long().clamp(max=len(table) - 1)
        colour = table[number]  # (n, 3)
        jitter = torch.stack([between(-0.035, 0.035)[:, 0, 0] for _ in range(3)], 1)
        return (colour + jitter)[..., None, None]

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    scale = between(0.9, 1.1)
    x, y = (x - between(-0.16, 0.16)) / scale, (y - between(-0.16, 0.16)) / scale

    def ellipse(cx: Tensor | float, cy: Tensor | float, rx: Tensor | float, ry: Tensor | float) -> Tensor:
        return ((x - cx) / rx).square() + ((y - cy) / ry).square() < 1

    def colour() -> Tensor:
        return torch.stack([between(0.1, 0.95)[:, 0, 0] for _ in range(3)], 1)[..., None, None]

    share = ((axis + 1) / 2).expand(size, size)
    image = colour() * (1 - share) + colour() * share  # (n, 3, size, size)
    parts = torch.zeros(n, size, size, dtype=torch.uint8)

    def paint(mask: Tensor, colour: Tensor, part: int) -> None:
        nonlocal image, parts
        image = torch.where(mask[:, None], colour, image)
        parts = torch.where(mask, part, parts)

    angle, frequency = (next(u) * 4).floor() * torch.pi / 4, torch.where(next(u) < 0.5, 12.0, 20.0)
    stripes = 1 + 0.25 * torch.sin(frequency * (x * angle.cos() + y * angle.sin()))
    hair = choice(HAIR_COLOURS)
    hair_y, hair_rx, hair_ry = between(-0.25, -0.12), between(0.55, 0.72), between(0.62, 0.80)
    paint(ellipse(0, hair_y, hair_rx, hair_ry), hair * stripes[:, None], HAIR)
    face_x, face_y = between(0.40, 0.52), between(0.56, 0.68)
    shading = 1 + between(-0.25, 0.25) * x / 0.5
    paint(ellipse(0, 0.08, face_x, face_y), choice(SKIN_COLOURS) * shading[:, None], SKIN)
    eye_x, eye_y = between(0.17, 0.24), between(-0.12, 0.0)
    brow_y, brow_thick = eye_y - between(0.13, 0.2), between(0.025, 0.05)
    iris, white = choice(EYE_COLOURS), torch.tensor(WHITE_OF_EYE)[:, None, None]
    pupil, opening = (torch.tensor(colour)[:, None, None] for colour in (PUPIL, OPENING))
    width, height = between(0.09, 0.13), between(0.05, 0.08)
    for side in (-1, 1):
        paint(ellipse(side * eye_x, brow_y, 0.13, brow_thick), hair, BROWS)
        paint(ellipse(side * eye_x, eye_y, width, height), white, EYES)
        paint(ellipse(side * eye_x, eye_y, height, height), iris, EYES)
        paint(ellipse(side * eye_x, eye_y, height / 2, height / 2), pupil, EYES)
    nose_y, nose_x = between(0.2, 0.28), between(0.06, 0.11)
    wedge = (y > eye_y) & (y < nose_y) & (x.abs() < nose_x * (y - eye_y) / (nose_y - eye_y))
    darker = choice(SKIN_COLOURS[1:2])
    paint(wedge, 0.5 * image + 0.35 * darker, NOSE)
    mouth_y, mouth_x, mouth_h = between(0.40, 0.48), between(0.15, 0.24), between(0.05, 0.09)
    paint(ellipse(0, mouth_y, mouth_x, mouth_h), choice(LIP_COLOURS), MOUTH)
    paint(ellipse(0, mouth_y, mouth_x * 0.7, mouth_h * between(0.1, 0.6)), opening, MOUTH)
    return image.clamp(0, 1), parts


def draw_by_rules(image: Tensor, parts: Tensor) -> Tensor:
    """The artist by rules: (B, 3, H, W) in [0, 1], parts (B, H, W) of `PARTS` -> sketch (B, 1, H, W).

    White paper; hair in diagonal strokes of period 6, lips in horizontal, the nose in faint vertical ones;
    one light tone for all skin; the eyes by thresholded luminance; dark brows and dark borders between parts.
    """
    y, x = torch.meshgrid(*(torch.arange(n, device=image.device) for n in parts.shape[-2:]), indexing="ij")
    luminance = (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    flat = torch.ones_like(luminance)
    tones = [
        flat,
        0.88 * flat,
        torch.where((x + y) % 6 < 3, 0.35, 0.65).expand_as(flat),
        0.25 * flat,
        torch.where(luminance > 0.45, 0.95, 0.2),
        torch.where(x % 6 < 2, 0.75, 0.88).expand_as(flat),
        torch.where(y % 4 < 2, 0.45, 0.75).expand_as(flat),
    ]
    sketch = torch.stack(tones, 1).gather(1, parts.long()[:, None])[:, 0]
    right = torch.cat([parts[..., 1:], parts[..., -1:]], -1)
    below = torch.cat([parts[..., 1:, :], parts[..., -1:, :]], -2)
    return torch.where((right != parts) | (below != parts), 0.15, sketch)[:, None]
