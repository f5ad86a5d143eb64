"""FaceSwapper: drawn photos and a small swapper for the tests of its use."""

import functools

import numpy as np
import torch

from faceswapper.align import DEMO_FRAMING
from faceswapper.data import world
from faceswapper.detect import open_detector, open_landmarker, open_parser
from faceswapper.model import Generator, Size, initialise
from faceswapper.pipeline import Blending, Swapper
from shared import faces

SMALL = Size(img_size=64, channel_base=256, max_channels=8, id_dim=8)


@functools.cache
def drawn_people():
    """Four faces at 96 pixels, (4, 96, 96, 3) uint8, with their 68 landmarks."""
    params, _ = world(4, 1, 31)
    drawn = faces.draw(params.replace(yaw=0.0), 96)
    return drawn.image.mul(255).round().byte().permute(0, 2, 3, 1).numpy(), drawn.landmarks


def scene(chosen=(0,), places=((30, 20),), size=(160, 200)) -> np.ndarray:
    """Faces pasted on grey: (H, W, 3) uint8."""
    canvas = np.full((*size, 3), 128, np.uint8)
    for n, (x, y) in zip(chosen, places, strict=True):
        canvas[y : y + 96, x : x + 96] = drawn_people()[0][n]
    return canvas


def eyes_of(n: int, place=(30, 20)):
    """Centres of a pasted face's eyes."""
    points = drawn_people()[1][n] + torch.tensor(place)
    return tuple(tuple(points[a:b].mean(0).tolist()) for a, b in ((36, 42), (42, 48)))


def small_swapper(detector="finder", blending=None, **options) -> Swapper:
    """An untrained generator, always the same, with the built-in finder."""
    torch.manual_seed(0)
    plugs = open_detector(detector), open_landmarker(None), open_parser(None)
    net = initialise(Generator(SMALL, "direct"))
    return Swapper(net, *plugs, DEMO_FRAMING, blending or Blending(restore=False), **options)


def test_a_scene_shows_the_face_where_it_was_put():
    assert (scene()[20:116, 30:126] == drawn_people()[0][0]).all() and scene()[0, 0].tolist() == [128] * 3
    left, right = eyes_of(0)
    assert 30 < left[0] < right[0] < 126
