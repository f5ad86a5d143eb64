"""Biphasic face ageing in use: alignment and paste-back, ages, parts, files, messages, augmentation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from biphasic_age import augment, continuous
from biphasic_age.ages import AgeScale
from biphasic_age.align import (
    Similarity,
    find_eyes,
    guided,
    mean_eyes,
    paste,
    similarity,
    soft_square,
    to_pixels,
    warp,
)
from biphasic_age.layouts import CLASSES
from biphasic_age.model import SIZES, Generator, Switches
from biphasic_age.stages import Trained
from biphasic_age.translate import Ager, locate, read_layout, strength_map, translate
from shared import faces
from shared.io import read_photo
from shared.runtime import REPOSITORY, UserError

SIZE = 32
SCALE = AgeScale((30.0, 40.0, 50.0), (24.0, 35.0, 45.0, 60.0), 18.0, 70.0)


def face(size: int = SIZE, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A drawn frontal face (3, S, S) in [0, 1] and its labels (S, S)."""
    identity = faces.sample_identities(1, seed)
    params = faces.make_params(identity, faces.neutral_attributes(1), torch.tensor([40.0]))
    drawn = faces.draw(params, size)
    return drawn.image[0], faces.to_bisenet(drawn.semantics[0]).long()


class TruthParser(nn.Module):
    """Knows the colours that `paint` gives the classes; what is between colours, at edges, is background."""

    colours = torch.rand(19, 3, generator=torch.Generator().manual_seed(0))

    @classmethod
    def paint(cls, labels: torch.Tensor) -> torch.Tensor:
        return cls.colours[labels].movedim(-1, 0)

    def labels(self, image: torch.Tensor) -> torch.Tensor:
        pixels = (image / 2 + 0.5).movedim(1, -1).flatten(1, 2)
        distance, nearest = torch.cdist(pixels, self.colours[None]).min(-1)
        return torch.where(distance < 0.05, nearest, 0).view(image.shape[0], *image.shape[2:])


def make_ager(switches: Switches = Switches(), eyes=None, size: int = SIZE) -> Ager:  # noqa: B008
    torch.manual_seed(0)
    net = Generator(SIZES["unit"], output="residual", switches=switches)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.15)
    config = SimpleNamespace(image_size=size)
    trained = Trained(net.eval(), SCALE, eyes, None, config, "faces", REPOSITORY / "run")
    return Ager(trained, TruthParser(), torch.device("cpu"))


# --- alignment ----------------------------------------------------------------------------------------


def test_eyes_are_found_left_first_and_averaged_as_shares():
    labels = torch.zeros(2, 10, 20, dtype=torch.long)
    labels[:, 3:5, 4:6] = CLASSES.index("r_eye")  # on the left of the picture, whatever the label says
    labels[:, 3:5, 12:14] = CLASSES.index("l_eye")
    assert find_eyes(labels[0]) == ((4.5, 3.5), (12.5, 3.5))
    labels[1] = 0
    assert find_eyes(labels[1]) is None
    assert mean_eyes(labels) == ((5 / 20, 4 / 10), (13 / 20, 4 / 10))
    assert mean_eyes(labels[1:]) is None


def test_similarity_moves_the_eyes_and_its_inverse_moves_them_back():
    source, target = ((10.0, 12.0), (30.0, 8.0)), ((3.0, 5.0), (9.0, 5.0))
    move = similarity(source, target)
    for s, t in zip(source, target, strict=True):
        assert move.a * complex(*s) + move.b == pytest.approx(complex(*t))
        back = move.inverse()
        assert back.a * complex(*t) + back.b == pytest.approx(complex(*s))
    with pytest.raises(ValueError, match="same place"):
        similarity(((1.0, 1.0), (1.0, 1.0)), target)


def test_warp_by_whole_pixels_is_a_shift_and_by_a_quarter_turn_a_rotation():
    image = torch.rand(3, 8, 8)
    moved = warp(image, Similarity(1 + 0j, 2 + 1j), (8, 8))
    assert torch.allclose(moved[:, 1:, 2:], image[:, :-1, :-2], atol=1e-5)
    turned = warp(image, Similarity(1j, 7 + 0j), (8, 8))  # (x, y) -> (7 - y, x)
    assert torch.allclose(turned, image.rot90(-1, (1, 2)), atol=1e-5)


def test_warp_to_a_smaller_picture_averages():
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    small = warp(stripes, Similarity(complex(0.25), complex(0.25 * 0.5 - 0.5, 0.25 * 0.5 - 0.5)), (16, 16))
    assert (small[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.1


def test_paste_without_change_is_the_photo_and_touches_the_square_alone():
    photo = torch.rand(3, 60, 80)
    move = Similarity(complex(0.5), complex(-5, -3))  # crop of 16 pixels: 32 of the photo, from (10, 6) on
    crop = warp(photo, move, (16, 16))
    assert torch.equal(paste(photo, crop, crop, move), photo)
    changed = paste(photo, crop, (crop + 0.3).clamp(0, 1), move)
    difference = (changed - photo).abs().amax(0)
    inside = torch.zeros(60, 80, dtype=torch.bool)
    inside[5:40, 9:44] = True
    assert difference[~inside].max() == 0 and difference[18:26, 22:30].mean() > 0.1


def test_an_enlarged_change_follows_the_edges_of_the_photo():
    """The change of a coarse crop on one side of an edge stays there; only enlarged it does not."""
    photo = torch.full((3, 64, 64), 0.2)
    photo[..., 29:] = 0.8  # an edge between pixels of the crop, of which each is four of the photo's
    move = Similarity(complex(0.25), complex(0.25 * 0.5 - 0.5, 0.25 * 0.5 - 0.5))
    crop = warp(photo, move, (16, 16))
    after = crop + 0.2 * (crop < 0.5)
    change = (paste(photo, crop, after, move) - photo)[0, 32]
    plain = warp(after - crop, move.inverse(), (64, 64), padding="zeros")[0, 32]
    assert change[28] - change[29] > 2 * (plain[28] - plain[29]) > 0


def test_soft_square_is_one_inside_and_nearly_nothing_at_the_rim():
    square = soft_square(50)[0]
    assert square[10:40, 10:40].min() == 1 and square[0].max() < 0.05


def test_guided_filter_follows_the_edges_of_its_guide():
    guide = (torch.arange(32) >= 16).float().expand(1, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(guide[None], 9, 1, 4, count_include_pad=False)[0]
    sharper = guided(guide, blurred, radius=4)
    step = sharper[0, 16, 16] - sharper[0, 16, 15]
    assert step > 3 * (blurred[0, 16, 16] - blurred[0, 16, 15])
    flat = guided(guide, torch.full((1, 32, 32), 0.4), radius=3)
    assert torch.allclose(flat, torch.full_like(flat, 0.4), atol=1e-4)


# --- translation --------------------------------------------------------------------------------------


def test_a_photo_is_aligned_translated_and_pasted_at_full_size():
    _, labels = face(192)
    photo = TruthParser.paint(labels)
    eyes = (0.36, 0.45), (0.64, 0.45)
    ager = make_ager(eyes=eyes, size=64)
    aged = translate(ager, photo, [25.0, 60.0], "photo.png")
    assert aged.crop.shape == (3, 64, 64) and aged.layout.shape == (64, 64)
    assert [p.shape for p in aged.photos] == [(3, 192, 192)] * 2
    assert not torch.equal(aged.crops[0], aged.crops[1])
    assert not aged.warnings
    move, _ = locate(ager, photo, "photo.png")
    for eye, wanted in zip(find_eyes(labels), to_pixels(eyes, 64), strict=True):
        moved = move.a * complex(*eye) + move.b
        assert (moved.real, moved.imag) == pytest.approx(wanted, abs=1.0)


def test_aligned_pictures_are_only_resized():
    _, labels = face()
    photo = TruthParser.paint(labels)
    aged = translate(make_ager(), photo, [50.0], aligned=True)
    assert torch.allclose(aged.crop, photo, atol=1e-5)
    with_layout = translate(make_ager(), photo, [50.0], layout=labels)
    assert torch.equal(with_layout.layout, labels)
    wide = translate(make_ager(), torch.cat((photo, photo[..., :8]), 2), [50.0], aligned=True)
    assert wide.photos[0].shape == (3, 32, 40)


def test_ages_between_the_groups_change_gradually():
    _, labels = face()
    ages = [35.0, 36.0, 38.0, 41.0, 45.0]
    crops = translate(make_ager(), TruthParser.paint(labels), ages, aligned=True).crops
    distances = [(crop - crops[0]).abs().mean().item() for crop in crops]
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] < 0.4 * distances[-1]


def test_ages_beyond_the_outermost_means_are_said():
    _, labels = face()
    ager = make_ager()
    low, high = ager.trained.scale.means[0], ager.trained.scale.means[-1]
    inside = translate(ager, TruthParser.paint(labels), [low, high], aligned=True)
    beyond = translate(ager, TruthParser.paint(labels), [low, high, ager.trained.scale.high], aligned=True)
    assert torch.equal(beyond.crops[2], inside.crops[1])
    oldest = ager.trained.scale.high
    said = f"picture: for {oldest:g} the face is shown at {high:.0f}, the outermost age learnt"
    assert beyond.warnings == [*inside.warnings, said]


def test_parts_of_strength_zero_keep_their_maps():
    """With all strengths 0 every age gives the picture at the input's own age; hair alone changes hair."""
    _, labels = face(seed=2)
    photo, ager = TruthParser.paint(labels), make_ager()
    none = dict.fromkeys(("skin", "hair", "brows", "eyes", "mouth", "rest"), 0.0)
    young, old = translate(ager, photo, [20.0, 65.0], aligned=True, strengths=none).crops
    assert torch.allclose(young, old, atol=1e-6)
    whole = translate(ager, photo, [20.0, 65.0], aligned=True).crops
    hair = translate(ager, photo, [20.0, 65.0], aligned=True, strengths={**none, "hair": 1.0}).crops
    is_hair = labels == CLASSES.index("hair")
    difference = (hair[1] - hair[0]).abs().mean(0)
    far = ~nn.functional.max_pool2d(is_hair[None].float(), 9, 1, 4)[0].bool()
    everything = (whole[1] - whole[0]).abs().mean(0)
    assert difference[is_hair].mean() > 1.5 * difference[far].mean()
    assert difference[far].mean() < 0.7 * everything[far].mean()


def test_strength_map_names_parts():
    labels = torch.tensor([[[CLASSES.index("hair"), CLASSES.index("nose"), 0]]])
    assert strength_map(labels, {"hair": 0.5, "skin": 0.0}).flatten().tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(UserError, match="--strength beard: unknown part; there are skin, hair"):
        strength_map(labels, {"beard": 1.0})


def test_strengths_need_constraintnet():
    _, labels = face()
    ager = make_ager(Switches(constraint=False))
    with pytest.raises(UserError, match="needs ConstraintNet"):
        translate(ager, TruthParser.paint(labels), [50.0], aligned=True, strengths={"hair": 0.0})


def test_noise_is_off_unless_a_seed_is_given():
    _, labels = face()
    photo, ager = TruthParser.paint(labels), make_ager()
    outputs = [
        translate(ager, photo, [50.0], aligned=True, seed=seed).crops[0] for seed in (None, None, 1, 1, 2)
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[2], outputs[4])


def test_no_face_no_eyes_no_hair_no_parser_and_ages_out_of_range_are_said():
    ager = make_ager(eyes=((0.3, 0.4), (0.7, 0.4)))
    street = TruthParser.paint(torch.zeros(40, 40, dtype=torch.long))
    with pytest.raises(UserError, match="street.png: the parser found no face"):
        translate(ager, street, [50.0], "street.png")
    bald = torch.zeros(SIZE, SIZE, dtype=torch.long)
    bald[8:28, 8:24] = CLASSES.index("skin")
    aged = translate(ager, TruthParser.paint(bald), [50.0], "bald.png")
    assert any("eyes were not found" in w for w in aged.warnings)
    assert any("almost no hair" in w for w in aged.warnings)
    with pytest.raises(UserError, match="age 90 .*18 to 70"):
        translate(ager, street, [90.0])
    blind = Ager(ager.trained, None, ager.device)
    with pytest.raises(UserError, match="--parser-weights"):
        translate(blind, street, [50.0], aligned=True)


def test_grey_and_transparent_pictures_are_read_with_a_remark(tmp_path):
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.png"
    Image.fromarray(np.full((8, 9), 128, np.uint8)).save(grey)
    pixels = np.zeros((8, 9, 4), np.uint8)
    pixels[:, 4:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(clear)
    image, remarks = read_photo(grey)
    assert image.shape == (3, 8, 9) and "grey picture" in remarks[0]
    image, remarks = read_photo(clear)
    assert image[:, 0, 0].tolist() == [1, 1, 1] and image[:, 0, 8].tolist() == [1, 0, 0]
    assert "shown on white" in remarks[0]


def test_layout_files_are_checked(tmp_path):
    path = tmp_path / "layout.png"
    Image.fromarray(np.full((8, 8), 17, np.uint8)).save(path)
    assert (read_layout(path, (16, 16)) == 17).all()
    assert (read_layout(path, (8, 8), "celebamask") == CLASSES.index("neck")).all()
    with pytest.raises(UserError, match="8x8 and the picture 20x16"):
        read_layout(path, (16, 20))
    Image.fromarray(np.full((8, 8), 40, np.uint8)).save(path)
    with pytest.raises(UserError, match="holds the value 40"):
        read_layout(path, (8, 8))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match="8-bit label map"):
        read_layout(path, (8, 8))
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="layout.png: not a readable"):
        read_layout(path, (8, 8))


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
        with Image.open(tmp_path / "phone.png") as opened:
            wanted = np.asarray(ImageOps.exif_transpose(opened))
        image, remarks = read_photo(tmp_path / "phone.png")
        assert (image.mul(255).round().byte().permute(1, 2, 0).numpy() == wanted).all() and not remarks


# --- augmentation and continuous ages -----------------------------------------------------------------------


def test_augmentation_keeps_the_youngest_group_and_copies_to_all_others(tmp_path):
    known = augment.Faces(
        torch.rand(5, 3, 16, 16),
        torch.zeros(5, 16, 16, dtype=torch.uint8),
        torch.tensor([0, 2, 3, 3, 0]),
        torch.tensor([7, 7, 9, 9, 7]),
        [f"person {k}" for k in range(10)],
    )
    young = augment.youngest(known)
    assert young.names == ["person 7", "person 9"]
    assert young.groups.tolist() == [0, 3, 3, 0] and young.people.tolist() == [0, 1, 1, 0]
    copies = augment.aged_copies(make_ager().trained, young, torch.device("cpu"))
    assert young.joined(copies).people.tolist() == [0, 1, 1, 0, *copies.people.tolist()]
    assert copies.groups.tolist() == [1, 2, 3, 0, 1, 2, 0, 1, 2, 1, 2, 3]
    assert copies.people.tolist() == [0] * 3 + [1] * 6 + [0] * 3
    assert copies.images.shape == (12, 3, 16, 16)
    augment.write_copies(tmp_path, copies, make_ager().trained)
    lines = (tmp_path / "list.csv").read_text().splitlines()
    assert lines[1] == "000000.png,35.0,person 7" and lines[4].endswith(",person 9")


def test_cross_age_pairs_are_those_far_enough_apart():
    class Perfect:
        def embed(self, x):
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()

    people, groups = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 3, 0, 1, 3])
    images = people.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    asked = augment.Faces(images, torch.zeros(5, 2, 2), groups, people, ["a", "b", "c"])
    result = augment.cross_age(Perfect(), asked, torch.device("cpu"))
    assert result == {"tar": 1.0, "auc": 1.0, "genuine_pairs": 1, "impostor_pairs": 5}
    with pytest.raises(UserError, match="no person has pictures 2 age groups apart"):
        augment.cross_age(Perfect(), asked.chosen(torch.tensor([2, 3, 4])), torch.device("cpu"))


def test_rising_measures_order_and_slope():
    ages = torch.tensor([20.0, 30.0, 40.0])
    seen = torch.tensor([[25.0, 30.0, 35.0], [30.0, 28.0, 32.0]])
    result = continuous.rising(seen, ages)
    assert result["spearman"] == pytest.approx((1.0 + 0.5) / 2)
    assert result["rising"] == pytest.approx(3 / 4)
    assert result["slope"] == pytest.approx((0.5 + 0.1) / 2)
    assert continuous.rising(torch.full((1, 3), 40.0), ages)["spearman"] == 0


def test_sweep_asks_for_mixtures_between_the_groups():
    trained = make_ager().trained
    image, layout = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.uint8)
    made = continuous.sweep(trained.net, SCALE, image, layout, torch.tensor([24.0, 29.5, 35.0]))
    assert made.shape == (2, 3, 3, 16, 16)
    with torch.no_grad():
        ends = [trained.net(image, layout, torch.tensor([k, k]), 0) for k in (0, 1)]
    assert torch.allclose(made[:, 0], ends[0], atol=1e-5) and torch.allclose(made[:, 2], ends[1], atol=1e-5)
