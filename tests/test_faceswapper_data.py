"""FaceSwapper: the drawn world, pairing, landmark pictures, and every public layout in miniature."""

from pathlib import Path

import pytest
import torch

from faceswapper import datasets
from faceswapper.data import PERSON, DrawnFaces, Pairs, true_swap, unseen_pairs, world
from faceswapper.drawing import FACE_LABELS, draw_landmarks, face_mask, ibug_to_wflw, to_file
from shared import faces
from shared.io import write_image
from shared.runtime import UserError

SIZE = 32


# --- the drawn world ------------------------------------------------------------------------------------


def test_a_person_keeps_what_lies_inside_the_face():
    params, person = world(3, 4, seed=5)
    again, _ = world(3, 4, seed=5)
    assert torch.equal(params.attributes, again.attributes)
    for name in PERSON:
        column = params[name].view(3, 4)
        assert torch.equal(column, column[:, :1].expand(3, 4)), name
    assert person.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for name in ("yaw", "smile", "hair_darkness", "jaw", "mouth_width", "background_r"):
        assert len(params[name].view(3, 4)[0].unique()) == 4, f"{name} should change between pictures"


def test_the_true_swap_differs_from_the_target_inside_the_face_only():
    source, target = unseen_pairs(48, 4, seed=3, landmark_values="unit")
    truth = DrawnFaces(true_swap(source.params, target.params), source.person, 48)
    moved = (truth.points - target.points)[:, 60:96].norm(dim=2)
    assert moved.max() < 0.02 * 48, "eyes and mouth stay"
    change = (truth.images.float() - target.images.float()).abs().mean(1, keepdim=True)
    background = target.masks.bool()
    # ears and neck, which a swap keeps, take the skin of the drawn person with them; hair and backdrop do not
    hair_or_backdrop = torch.isin(target.labels, torch.tensor([0, 16, 17]))[:, None]
    assert change[hair_or_backdrop].mean() < 0.1 * change[~background].mean()


def test_sources_and_targets_are_other_people():
    source, target = unseen_pairs(SIZE, 5, seed=1, landmark_values="unit")
    assert not (source.person == target.person).any()
    assert sorted(source.person.tolist()) == sorted(target.person.tolist()) == [0, 1, 2, 3, 4]


def test_drawn_faces_agree_with_their_masks_and_landmarks():
    pictures = DrawnFaces(*world(2, 2, 0), SIZE)
    item = pictures.load(1)
    assert item["image"].shape == (3, SIZE, SIZE) and item["image"].min() >= -1
    inside = face_mask(pictures.labels[1])
    assert torch.equal(item["mask"][0], 1 - inside.float())
    nose = pictures.points[1, 57].round().long()
    assert inside[nose[1], nose[0]]
    ink = item["landmarks"].amin(0) < 0.9
    assert inside[ink].float().mean() > 0.8, "eyes and lips lie in the face"


def test_partner_is_any_other_picture():
    pairs = Pairs(DrawnFaces(*world(2, 3, 0), SIZE), seed=4)
    partners = [pairs.partner(2, draw) for draw in range(200)]
    assert set(partners) == {0, 1, 3, 4, 5}
    assert partners == [pairs.partner(2, draw) for draw in range(200)]
    item = pairs[(2, 7)]
    assert torch.equal(item["image_b"], pairs.pictures.load(pairs.partner(2, 7))["image"])
    assert torch.equal(item["mask_a"], pairs.pictures.load(2)["mask"])
    with pytest.raises(UserError, match="a pair needs two"):
        Pairs(DrawnFaces(*world(1, 1, 0), SIZE), seed=0)


# --- landmark pictures ----------------------------------------------------------------------------------


def face_points(size: int) -> torch.Tensor:
    return ibug_to_wflw(faces.draw(faces.sample(2, 0, worn=0), size).landmarks)


def test_landmark_picture_against_distances_to_every_segment():
    """The slow reference: for each pixel the distance to every segment, painted in the official order."""
    size = 40
    points = face_points(size)
    half = max(200 / 72 * size / 256, 1.0) / 2
    expected = torch.ones(3, size, size)
    curves = (
        (60, 68, (1.0, 0, 0)),
        (68, 76, (1.0, 0, 0)),
        (76, 88, (0, 128 / 255, 0)),
        (88, 96, (0, 0, 1.0)),
    )
    for first, last, colour in curves:
        line = points[0, first:last]
        for y in range(size):
            for x in range(size):
                at = torch.tensor([float(x), float(y)])
                distance = 1e9
                for a, b in zip(line, line[1:], strict=False):
                    t = float(((at - a) @ (b - a) / ((b - a) @ (b - a)).clamp_min(1e-8)).clamp(0, 1))
                    distance = min(distance, float((a + t * (b - a) - at).norm()))
                cover = min(max(half + 0.5 - distance, 0.0), 1.0)
                expected[:, y, x] += cover * (torch.tensor(colour) - expected[:, y, x])
    got = draw_landmarks(points, size)
    assert torch.allclose(got[0], expected, atol=1e-4)
    assert torch.allclose(draw_landmarks(points, size, "signed"), 2 * got - 1)
    assert torch.allclose(draw_landmarks(points[1:], size), got[1:], atol=1e-6), "depends on its batch"
    with pytest.raises(ValueError, match="98"):
        draw_landmarks(points[:, :68], size)


def test_open_polylines_and_official_colours():
    points = torch.full((1, 98, 2), 20.0)
    points[0, 60:68] = torch.tensor([[4.0 + 3 * i, 10.0] for i in range(8)])
    picture = draw_landmarks(points, 40)
    assert torch.allclose(picture[0, :, 10, 12], torch.tensor([1.0, 0, 0]))
    disk = to_file(picture)
    assert torch.allclose(disk[0, :, 10, 12], torch.tensor([1.0, 0.5, 0.5]))
    assert torch.allclose((disk - 0.5) / 0.5, picture)


def test_98_points_from_68():
    drawn = faces.draw(faces.sample(3, 1), 64).landmarks
    points = ibug_to_wflw(drawn)
    assert points.shape == (3, 98, 2)
    pairs = {
        0: 0,
        16: 8,
        32: 16,
        51: 27,
        54: 30,
        57: 33,
        60: 36,
        64: 39,
        68: 42,
        72: 45,
        76: 48,
        82: 54,
        95: 67,
    }
    for wflw, ibug in pairs.items():
        assert torch.allclose(points[:, wflw], drawn[:, ibug]), (wflw, ibug)
    assert torch.allclose(points[:, 62], drawn[:, 37:39].mean(1))
    assert (points[:, 38:42, 1] > points[:, 34:38, 1].amin(1, keepdim=True)).all(), (
        "lower brow below the upper"
    )


def test_face_mask_takes_the_face_and_leaves_hair_ears_and_neck():
    assert face_mask(torch.arange(19)).nonzero()[:, 0].tolist() == list(FACE_LABELS)
    names = {faces.BISENET_CLASSES[i] for i in range(19) if i not in FACE_LABELS}
    assert {"background", "hair", "hat", "neck", "l_ear", "r_ear", "cloth"} <= names


# --- public layouts -------------------------------------------------------------------------------------


def make_set(
    root: Path, pictures: str, stems: list[str], ending: str = ".jpg", parsing: bool = False
) -> None:
    """Pictures with sisters as the released data have them: white faces in masks, light landmark colours."""
    for i, stem in enumerate(stems):
        write_image(root / pictures / f"{stem}{ending}", torch.full((3, 20, 20), 0.1 * (i + 1)))
        mask = torch.zeros(1, 20, 20)
        mask[:, 5:15, 5:15] = 1
        folder = root / pictures
        write_image(Path(f"{folder}_mask_images") / f"{stem}.png", mask)
        lines = torch.ones(3, 20, 20)
        lines[:, 10, 10] = torch.tensor([1.0, 0.0, 0.0])
        write_image(Path(f"{folder}_lm_images") / f"{stem}.png", to_file(lines))
        if parsing:
            labels = torch.full((1, 20, 20), 17.0)
            labels[:, 5:15, 5:15] = 1
            write_image(Path(f"{folder}_parsing_images") / f"{stem}.png", labels / 255)


@pytest.mark.parametrize(
    ("data", "folder", "stems"),
    [
        ("celeba", "CelebA", ["000001", "000002"]),
        ("celeba", "img_align_celeba", ["000001", "000002"]),
        ("vggface2", "train", ["n000002/0001_01", "n000002/0002_01", "n000003/0001_01"]),
        ("celeba-hq", "CelebA-HQ-img", ["0", "2", "10"]),
        ("ffhq", "images1024x1024", ["00000/00000", "00000/00001"]),
        ("folder", "mine", ["a", "b"]),
    ],
)
def test_every_layout(tmp_path, data, folder, stems):
    make_set(tmp_path, folder, stems)
    root = tmp_path / folder if data == "folder" else tmp_path
    pictures = datasets.open_set(data, root, 20)
    assert pictures.names == stems and len(pictures) == len(stems)
    item = pictures.load(1)
    assert abs(item["image"].mean().item() - (2 * 0.2 - 1)) < 0.02
    assert item["mask"][0, 10, 10] == 0 and item["mask"][0, 0, 0] == 1, (
        "1 is background, the file is white in the face"
    )
    assert torch.allclose(item["landmarks"][:, 10, 10], torch.tensor([1.0, 0, 0]), atol=0.01)
    assert pictures.load(0)["image"].shape == (3, 20, 20)


def test_other_folder_names(tmp_path):
    make_set(tmp_path, "x", ["1", "2"])
    for old, new in (("x", "CelebA images"), ("x_lm_images", "landmark images"), ("x_mask_images", "masks")):
        (tmp_path / old).rename(tmp_path / new)
    pictures = datasets.open_set("celeba", tmp_path, 20, None, "landmark images", "masks")
    assert len(pictures) == 2
    with pytest.raises(UserError, match="no folder .*elsewhere"):
        datasets.open_set("celeba", tmp_path, 20, "elsewhere")


def test_celebamask_labels_replace_mask_files(tmp_path):
    make_set(tmp_path, "CelebA-HQ-img", ["0", "1"])
    for file in (tmp_path / "CelebA-HQ-img_mask_images").iterdir():
        file.unlink()
    (tmp_path / "CelebA-HQ-img_mask_images").rmdir()
    skin, hair = torch.zeros(1, 20, 20), torch.zeros(1, 20, 20)
    skin[:, 4:16] = 1
    hair[:, :8] = 1  # hair covers skin, it comes later in CelebAMask-HQ's order
    write_image(tmp_path / "CelebAMask-HQ-mask-anno/0/00001_skin.png", skin)
    write_image(tmp_path / "CelebAMask-HQ-mask-anno/0/00001_hair.png", hair)
    pictures = datasets.open_set("celeba-hq", tmp_path, 20)
    mask = pictures.load(1)["mask"][0]
    assert mask[:8].min() == 1 and mask[8:16].max() == 0 and mask[16:].min() == 1
    with pytest.raises(UserError, match="no part files 00000"):
        pictures.load(0)


def test_swap_list_of_faceforensics(tmp_path):
    make_set(tmp_path, "ff++", ["raw_000_0", "raw_003_0", "raw_003_1"], ".png", parsing=True)
    # a line without an end, a Windows line end, an ending of four letters, a blank line
    (tmp_path / "face_swap_list.txt").write_bytes(
        b"raw_003_0.png raw_000_0.png\r\n\nraw_000_0.jpeg\traw_003_1.png"
    )
    swaps = datasets.SwapList(tmp_path, 10)
    assert swaps.pairs == [("raw_003_0", "raw_000_0"), ("raw_000_0", "raw_003_1")]
    assert swaps.targets.names == ["raw_000_0", "raw_003_1"] and len(swaps.originals) == 3
    labels = swaps.targets.load(0)["parsing"]
    assert labels.shape == (1, 10, 10) and set(labels.unique().tolist()) == {1, 17}, (
        "no labels between labels"
    )
    assert datasets.video_of("raw_003_1") == "003" and datasets.video_of("someone") == "someone"
    videos = [datasets.video_of(stem) for stem in ("raw_a_01_3", "b/raw_c_01_3", "two_words_7")]
    assert videos == ["a_01", "c_01", "two_words_7"], "films of other names are told apart"


def test_two_pictures_of_one_name_are_said(tmp_path):
    make_set(tmp_path, "CelebA", ["1", "2"])
    write_image(tmp_path / "CelebA/2.png", torch.zeros(3, 20, 20))
    with pytest.raises(UserError, match=r"2\.jpg and 2\.png have the same name without the ending"):
        datasets.open_set("celeba", tmp_path, 20)


def test_sisters_lie_beside_a_linked_folder(tmp_path):
    make_set(tmp_path / "data", "CelebA", ["1", "2"])
    (tmp_path / "data/CelebA").rename(tmp_path / "elsewhere")
    (tmp_path / "data/CelebA").symlink_to(tmp_path / "elsewhere")
    assert len(datasets.open_set("celeba", tmp_path / "data", 20)) == 2


def test_messages_name_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="(?s)CelebA/.*prepare.py"):
        datasets.open_set("celeba", tmp_path, 20)
    make_set(tmp_path, "CelebA", ["1", "2", "3"])
    (tmp_path / "CelebA_lm_images/2.png").unlink()
    with pytest.raises(UserError, match="1 of 3 landmark pictures missing, first 2"):
        datasets.open_set("celeba", tmp_path, 20)
    for file in (tmp_path / "CelebA_mask_images").iterdir():
        file.unlink()
    make_set(tmp_path, "CelebA", ["1", "2", "3"])
    (tmp_path / "CelebA/2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2.jpg: not a readable image"):
        datasets.open_set("celeba", tmp_path, 20).load(1)
    (tmp_path / "list.txt").write_text("a b\none two three\n")
    with pytest.raises(UserError, match="line 2: expected"):
        datasets.read_swap_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no swap"):
        datasets.read_swap_list(tmp_path / "list.txt")
    with pytest.raises(UserError, match="no folder .*ff"):
        datasets.SwapList(tmp_path, 10)
