"""FaceSwapper in use: alignment, photos, bad input."""

import copy
import math
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from test_faceswapper_scenes import SMALL, eyes_of, scene, small_swapper
from torch.nn import functional as F

from faceswapper import predict as predicting
from faceswapper.align import (
    DEMO_FRAMING,
    Face,
    Framing,
    Steady,
    box_of_eyes,
    crop_matrix,
    crop_side,
    cut,
    paste,
    to_tensor,
)
from faceswapper.blocks import fold
from faceswapper.detect import finder_points, whole_picture
from faceswapper.model import Generator
from faceswapper.photo import Photo, read_photo
from faceswapper.pipeline import Blending, Swapper, profile
from faceswapper.predict import Networks
from faceswapper.trials import Trial
from shared.io import image_grid
from shared.runtime import UserError


@pytest.fixture(scope="module")
def swapper():
    return small_swapper()


@pytest.fixture(scope="module")
def source(swapper):
    return swapper.source([Photo("a.png", scene((1,)))])


# --- alignment --------------------------------------------------------------------------------------


def test_eyes_come_to_lie_where_the_framing_says():
    face = Face(box_of_eyes((60, 50), (80, 60)), ((60, 50), (80, 60)))
    matrix = crop_matrix(face, 100, Framing(0.25, 0.4))
    places = [matrix @ (*eye, 1) for eye in face.eyes]
    np.testing.assert_allclose(places, [(37, 39.5), (62, 39.5)], atol=1e-6)
    assert crop_side(matrix, 100) == pytest.approx(np.hypot(20, 10) / 0.25)
    with pytest.raises(ValueError, match="same place"):
        crop_matrix(Face(face.box, ((5, 5), (5, 5))), 100)


def test_a_box_gives_the_upright_square_enlarged_by_1_4():
    matrix = crop_matrix(Face((10, 20, 60, 120), None), 70)
    # side 140 around (35, 70): from (-35, 0); pixel centres
    np.testing.assert_allclose(matrix @ (-35 - 0.5 + 1, 0.5, 1), (0, 0), atol=1e-6)
    np.testing.assert_allclose(matrix @ (105 - 1.5, 140 - 1.5, 1), (69, 69), atol=1e-6)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    face = whole_picture([picture], ["x"])[0][0]
    np.testing.assert_array_equal(cut(picture, crop_matrix(face, 64), 64), picture)
    with pytest.raises(ValueError, match="empty"):
        crop_matrix(Face((5, 5, 5, 5), None), 8)


def test_cut_and_paste_are_inverse_and_leave_the_rest_bit_for_bit():
    photo = cv2.GaussianBlur(scene(), (9, 9), 0)
    eyes = eyes_of(0)
    for size in (128, 24):  # enlarged, and shrunk with averaging
        matrix = crop_matrix(Face(box_of_eyes(*eyes), eyes), size, DEMO_FRAMING)
        crop = cut(photo, matrix, size)
        alpha = np.zeros((size, size), np.float32)
        alpha[size // 4 : -size // 4, size // 4 : -size // 4] = 1
        out = paste(photo, crop, alpha, matrix)
        difference = np.abs(out.astype(int) - photo)
        assert difference.max() < (8 if size == 128 else 60) and difference.mean() < 0.5
        assert (paste(photo, 255 - crop, 0 * alpha, matrix) == photo).all()
        changed = (paste(photo, 255 - crop, alpha, matrix) != photo).any(-1)
        assert changed.any() and not changed[:15].any() and not changed[:, :30].any()


def test_pasting_outside_the_photo_changes_nothing():
    photo = np.zeros((20, 20, 3), np.uint8)
    matrix = np.array([[1.0, 0, 100], [0, 1.0, 100]])
    assert (paste(photo, np.full((8, 8, 3), 255, np.uint8), np.ones((8, 8)), matrix) == 0).all()


def test_steadying_follows_jumps_and_averages_trembling():
    steady = Steady()

    def at(x: float) -> Face:
        return Face((0, 0, 1, 1), ((x, 0.0), (x + 40, 0.0)))

    steady(at(0))
    trembled = steady(at(1)).eyes[0][0]
    assert 0 < trembled < 0.6
    assert steady(at(100)).eyes[0][0] == 100
    assert steady(None) is None and steady(at(3)).eyes[0][0] == 3


# --- photos -----------------------------------------------------------------------------------------


def swap_one(swapper, source, photo, **options):
    face = swapper.choose(swapper.detector([photo.seen], [photo.name])[0], "largest")
    return swapper.photos([photo], [face], source, **options)[0]


def test_a_swap_changes_the_face_and_nothing_else(swapper, source):
    photo = Photo("t.png", scene())
    result = swap_one(swapper, source, photo)
    changed = (result.photo != photo.rgb).any(-1)
    assert result.face is not None and 500 < changed.sum() < 96 * 96
    assert not changed[:20].any() and not changed[:, :30].any() and not changed[130:].any()
    assert result.remark is None


def test_strength_and_the_progressive_strip(swapper, source):
    photo = Photo("t.png", scene())
    whole, none = (swap_one(swapper, source, photo, strength=s).photo for s in (1.0, 0.0))
    assert (whole != none).any()
    face = swapper.detector([photo.seen], ["t"])[0][0]
    crops = swapper.describe(
        torch.from_numpy(swapper.aligned(photo.seen, face)[0]).permute(2, 0, 1)[None] / 255
    )
    strip = swapper.progressive(crops, source, 3)
    assert strip.shape == (3, 3, 64, 64)
    for step, strength in ((0, 0.0), (1, 0.5), (2, 1.0)):
        swap, weight = swapper.swap(crops, source, strength)
        wanted = torch.lerp(crops.picture / 2 + 0.5, swap, weight)
        torch.testing.assert_close(strip[step], wanted[0], atol=1e-4, rtol=1e-4)


def test_the_strip_begins_with_the_target_and_ends_with_the_source(tmp_path, swapper, source, monkeypatch):
    """The target itself: what has its own identity is a reconstruction."""
    photo, drawn = Photo("t.png", scene()), {}
    monkeypatch.setattr(
        predicting, "image_grid", lambda x, **how: drawn.update(how, tiles=x) or image_grid(x, **how)
    )
    result = swap_one(swapper, source, photo)
    predicting.write_strip(swapper, photo, result, source, 3, tmp_path / "s", "by a test")
    assert drawn["column_labels"] == ["target", "0.00", "0.50", "1.00", "source"]
    for tile, of in ((drawn["tiles"][0], scene()), (drawn["tiles"][-1], scene((1,)))):
        crop = swapper.aligned(of, swapper.detector([of], ["x"])[0][0])[0]
        torch.testing.assert_close(tile, to_tensor([crop])[0], atol=1e-6, rtol=0)
    assert helpers.is_marked(tmp_path / "s_strip.png")
    with Image.open(tmp_path / "s_strip.gif") as animation:
        assert animation.n_frames == 6, "target and three swaps, and two on the way back"


def test_an_ablation_sees_what_it_saw_in_training(swapper, source):
    """White landmark pictures; no mask, while the blend keeps the parsing's."""
    face = swapper.detector([scene()], ["t"])[0][0]
    crop = torch.from_numpy(swapper.aligned(scene(), face)[0]).permute(2, 0, 1)[None] / 255
    crops = swapper.describe(crop)
    plugs = (swapper.generator, swapper.detector, swapper.landmarker, swapper.parser, DEMO_FRAMING)
    for variant, given in (
        ("no-landmarks", crops._replace(landmarks=torch.ones_like(crops.landmarks))),
        ("no-mask", crops._replace(mask=torch.zeros_like(crops.mask))),
    ):
        trial = Trial(f"{variant}-0", variant, 0, 1)
        ablated = Swapper(*plugs, Blending(restore=False), restrict=trial.restrict)
        swap, weight = ablated.swap(crops, source)
        plain, plain_weight = swapper.swap(crops, source)
        assert torch.equal(weight, plain_weight) and not torch.allclose(swap, plain)
        torch.testing.assert_close(swap, swapper.swap(given, source)[0])
        strip = ablated.progressive(crops, source, 2)
        wanted = torch.lerp(crops.picture / 2 + 0.5, swap, weight)[0]
        torch.testing.assert_close(strip[1], wanted, atol=1e-4, rtol=1e-4)


def test_codes_of_masked_sources(swapper):
    plugs = (swapper.detector, swapper.landmarker, swapper.parser, DEMO_FRAMING, Blending(restore=False))
    masked = Swapper(Generator(SMALL, "direct", mask_source=True), *plugs)
    masked.generator.load_state_dict(swapper.generator.state_dict())
    fold(masked.generator)
    photo = Photo("a.png", scene((1,)))
    face = masked.detector([photo.seen], ["a"])[0][0]
    crops = masked.describe(
        torch.from_numpy(masked.aligned(photo.seen, face)[0]).permute(2, 0, 1)[None] / 255
    )
    source, wanted = (
        masked.source([photo]),
        masked.generator.id_encoder.code(crops.picture * (1 - crops.mask)),
    )
    torch.testing.assert_close(source.code, wanted)
    # one's own identity: every strength gives the same
    for strength in (0.0, 0.5):
        torch.testing.assert_close(masked.swap(crops, source, strength), masked.swap(crops, source))
    strip = masked.progressive(crops, source, 2)
    torch.testing.assert_close(strip[0], strip[1], atol=1e-5, rtol=1e-4)


def test_levels_are_the_side_pictures_and_the_swap(swapper, source, monkeypatch):
    face = swapper.detector([scene()], ["t"])[0][0]
    crop = torch.from_numpy(swapper.aligned(scene(), face)[0]).permute(2, 0, 1)[None] / 255
    crops = swapper.describe(crop)
    levels = swapper.levels(crops, source)
    assert [tuple(level.shape) for level in levels] == [(3, 32, 32), (3, 64, 64), (3, 64, 64)]
    torch.testing.assert_close(levels[-1], swapper.swap(crops, source)[0][0], atol=1e-5, rtol=1e-4)
    # In double precision: the official pass takes two pictures at once, and rounds sums otherwise than one's.
    g = copy.deepcopy(swapper.generator).double()
    monkeypatch.setattr(swapper, "generator", g)
    crops = crops._replace(**{k: x.double() for k, x in crops._asdict().items() if x.is_floating_point()})
    mine = crops.picture, crops.landmarks, crops.mask
    sides = g(mine[0], mine[0], mine[1], mine[1], mine[2], mine[2])[4]  # one's own identity
    own = swapper.levels(crops, source._replace(code=g.id_encoder.code(crops.picture)))
    for level, side in zip(own, sides, strict=False):
        torch.testing.assert_close(level, (side[0].float() / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=1e-6)


def test_several_sources_mix_by_their_weights(swapper):
    a, b = (Photo(f"{n}.png", scene((n,))) for n in (1, 2))
    code_a, code_b = (swapper.source([p]).code for p in (a, b))
    mixed = swapper.source([a, b], mix=(3.0, 1.0)).code
    torch.testing.assert_close(mixed, 0.75 * code_a + 0.25 * code_b, atol=1e-5, rtol=1e-4)
    for mix in ((1.0,), (0.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 1.0)):
        with pytest.raises(UserError, match="give 2 weights"):
            swapper.source([a, b], mix=mix)


def test_parts_can_stay_and_colours_follow(swapper, source):
    photo = Photo("t.png", scene())
    face = swapper.detector([photo.seen], ["t"])[0][0]
    crop = torch.from_numpy(swapper.aligned(photo.seen, face)[0]).permute(2, 0, 1)[None] / 255
    crops = swapper.describe(crop)
    plain = swapper.swap(crops, source)
    args = (swapper.generator, swapper.detector, swapper.landmarker, swapper.parser, DEMO_FRAMING)
    keeping = Swapper(*args, Blending(restore=False, keep=("nose",))).swap(crops, source)
    nose = (crops.labels == 10)[:, None]
    assert nose.sum() > 20 and keeping[1][nose].max() == 0 and plain[1][nose].mean() > 0.5
    half = Swapper(*args, Blending(restore=False, keep=("nose",), keep_share=0.5)).swap(crops, source)
    middle = -F.max_pool2d(-nose.float(), 5, 1, 2) > 0  # away from the soft rim
    assert middle.any() and (half[1][middle] - 0.5).abs().max() < 1e-5
    colouring = Swapper(*args, Blending(restore=False, colour=True))
    coloured, weight = colouring.swap(crops, source)
    assert not torch.equal(coloured, plain[0])
    strip = colouring.progressive(crops, source, 2)
    torch.testing.assert_close(
        strip[1], torch.lerp(crops.picture / 2 + 0.5, coloured, weight)[0], atol=1e-4, rtol=1e-4
    )
    restoring = Swapper(*args, Blending(restore=True)).swap(crops, source)
    assert torch.equal(restoring[0], plain[0]) and (restoring[1] <= plain[1] + 1e-6).all()


def test_bad_photos_are_defined(swapper, source):
    empty = Photo("e.png", scene((), ()))
    assert swap_one(swapper, source, empty).remark.startswith("shows no face")
    with pytest.raises(UserError, match="e.png: the source shows no face"):
        swapper.source([empty])
    tiny = Swapper(
        swapper.generator, swapper.detector, swapper.landmarker, swapper.parser, DEMO_FRAMING, least=300
    )
    refused = swap_one(tiny, source, Photo("t.png", scene()))
    assert "smaller than 300" in refused.remark and (refused.photo == scene()).all()
    with pytest.raises(UserError, match="smaller than 300"):
        tiny.source([Photo("t.png", scene())])
    # a grey picture stays grey
    grey = np.repeat(scene().mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    result = swap_one(swapper, source, Photo("g.png", grey))
    assert result.face is not None and (result.photo == result.photo[..., :1]).all()
    assert (result.photo != grey).any()


def test_files_with_transparency_rotation_and_depth(tmp_path):
    rgba = np.dstack((scene(), np.full((160, 200), 255, np.uint8)))
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert photo.alpha is not None and (photo.seen[:10] == 255).all() and (photo.rgb[:10] == 128).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(scene()).save(tmp_path / "b.jpg", exif=exif)
    assert read_photo(tmp_path / "b.jpg").rgb.shape == (200, 160, 3)
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "c.png")
    assert (read_photo(tmp_path / "c.png").rgb == 255).all()
    Image.fromarray(scene()).convert("L").save(tmp_path / "d.png")
    assert read_photo(tmp_path / "d.png").grey
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(UserError, match="e.png: not a readable picture"):
        read_photo(tmp_path / "e.png")
    with pytest.raises(UserError, match="no such picture"):
        read_photo(tmp_path / "f.png")


def test_a_profile_is_noticed():
    points = torch.zeros(3, 98, 2)
    points[:, 60:68] = torch.tensor([40.0, 50.0])
    points[:, 68:76] = torch.tensor([80.0, 50.0])
    points[:, 54] = torch.tensor([[60.0, 75.0], [83.0, 75.0], [43.0, 75.0]])
    assert profile(points).tolist() == [False, True, True]


def test_a_profile_is_swapped_with_a_warning(swapper, source, monkeypatch):
    photo = Photo("t.png", scene())

    def from_the_side(crops):
        points = finder_points(crops).clone()
        points[:, 54] = points[:, 68:76].mean(1)  # the nose tip beside the right eye
        return points

    monkeypatch.setattr(swapper, "landmarker", from_the_side)
    result = swap_one(swapper, source, photo)
    assert result.remark == "a profile: the result is doubtful"
    assert result.face is not None and (result.photo != photo.rgb).any()


def test_the_released_generator_brings_its_landmarks_along(monkeypatch):
    """faceswapper.ckpt holds FAN too; its crops are the paper's, not the demo's."""
    taken = []
    monkeypatch.setattr(predicting, "load_official", lambda name, path: Generator(SMALL).eval())
    monkeypatch.setattr(predicting, "open_landmarker", lambda path, device: taken.append(path))
    released = Path("faceswapper.ckpt")
    for held, given, wanted in (
        ("fan", None, released), ("fan", Path("wing.ckpt"), Path("wing.ckpt")), ("generator", None, None),
    ):  # fmt: skip
        monkeypatch.setattr(predicting, "states_of", lambda path, held=held: {held: {}})
        networks = Networks(weights=released, landmarker=given, device="cpu")
        opened = predicting.open_swapper(networks, Blending(), 48)
        assert taken.pop() == wanted
        assert opened.framing == Framing() and opened.landmark_values == "unit"
