"""FaceSwapper: metrics against closed forms, baselines, claims, the FaceForensics++ protocol in miniature."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from faceswapper import baselines, faceforensics, protocol
from faceswapper.claims import judge
from faceswapper.data import DrawnFaces, world
from faceswapper.drawing import to_file
from faceswapper.eval import Config as EvalConfig
from faceswapper.eval import main as evaluate
from faceswapper.faceforensics import FaceForensicsConfig, as_metrics, measure_swaps
from faceswapper.landmarks import FAN
from faceswapper.model import Generator, Size, initialise
from faceswapper.trials import Trial
from shared.io import read_image, write_image
from shared.metrics import fid
from shared.onnxfile import write_onnx
from shared.published import load_published
from shared.runtime import REPOSITORY, UserError

SIZE = 32


@pytest.fixture(scope="module")
def pictures() -> DrawnFaces:
    return DrawnFaces(*world(4, 1, 7), SIZE)


# --- metrics --------------------------------------------------------------------------------------------


def test_id_retrieval_counts_frames_of_the_source_video():
    gallery = torch.eye(4)
    videos = ["a", "a", "b", "c"]
    swaps = torch.tensor([[0.1, 0.9, 0, 0], [0, 0.2, 0.9, 0], [0.9, 0, 0, 0.1]])
    assert protocol.id_retrieval(swaps, gallery, videos, ["a", "b", "c"]) == pytest.approx(200 / 3)
    assert protocol.id_retrieval(10 * swaps, 3 * gallery, videos, ["a", "b", "a"]) == pytest.approx(100)
    with pytest.raises(ValueError, match="no original frame of video d"):
        protocol.id_retrieval(swaps, gallery, videos, ["a", "b", "d"])


def rotated(points: torch.Tensor, degrees: float, scale: float, shift: float) -> torch.Tensor:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return scale * points @ turn.T + shift


def test_procrustes_finds_the_angle_and_nothing_else(pictures):
    points = pictures.points
    for degrees in (0.0, 5.0, -20.0):
        moved = rotated(points, degrees, 1.7, 3.0)
        assert protocol.procrustes_angle(moved, points).tolist() == pytest.approx(
            [abs(degrees)] * 4, abs=0.02
        )
        assert protocol.procrustes_residual(moved, points).max() < 2e-3
    smile = points.clone()
    smile[:, 76:88, 0] += 2 * (smile[:, 76:88, 0] - smile[:, 76:88, 0].mean(1, keepdim=True)).sign()
    assert protocol.procrustes_residual(smile, points).min() > 0.01


def test_openings_are_shares_of_the_eye_distance():
    points = torch.zeros(1, 98, 2)
    points[0, 60:68] = torch.tensor([[0, 0], [1, -1], [2, -1], [3, -1], [4, 0], [3, 1], [2, 1], [1, 1.0]])
    points[0, 68:76] = points[0, 60:68] * torch.tensor([1.0, 0.5]) + torch.tensor([10.0, 0])
    points[0, 88:96] = points[0, 60:68] + torch.tensor([5.0, 9])
    points[0, 76], points[0, 82] = torch.tensor([4.0, 9]), torch.tensor([9.0, 9])
    assert protocol.openings(points)[0].tolist() == pytest.approx([0.2, 0.1, 0.2, 0.5])
    assert protocol.expression_proxy(points, points) == 0


def test_region_metrics_by_hand():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    a[..., :2] = 0.5
    region = torch.zeros(1, 1, 4, 4)
    region[..., :1] = 1
    step = 2 / 255  # pictures are measured as 8-bit
    assert protocol.region_l1(a, b, region) == pytest.approx(0.5, abs=step)
    assert protocol.region_l1(a, b, torch.ones(1, 1, 4, 4)) == pytest.approx(0.25, abs=step)
    assert protocol.region_psnr(a, b, region) == pytest.approx(-20 * math.log10(0.25), abs=0.2)
    assert protocol.region_l1(a, b, 1 - region) == pytest.approx(0.5 / 3, abs=step)


def test_a_copy_of_the_target_is_perfect_in_everything_but_identity(pictures):
    batch = pictures.batch(slice(None))
    row = protocol.picture_metrics(batch["image"], batch["image"], batch["mask"])
    assert row["background L1"] == 0 and row["SSIM to target"] == pytest.approx(1)
    assert row["PSNR to target"] == float("inf")


def test_vector_error_is_the_mean_distance():
    a, b = torch.tensor([[3.0, 4.0], [0, 0]]), torch.zeros(2, 2)
    assert protocol.vector_error(a, b) == pytest.approx(2.5)


# --- baselines ------------------------------------------------------------------------------------------


def test_alignment_brings_eyes_and_mouth_onto_the_target():
    """A picture whose pixels are their own coordinates shows where the warp reads."""
    size = 40
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.stack((x, y, 0 * x))[None]
    here, there = torch.zeros(1, 98, 2), torch.zeros(1, 98, 2)
    for r, a, b in zip(
        baselines.ANCHORS, ((10, 12), (25, 10), (18, 30)), ((14, 16), (28, 18), (20, 31)), strict=True
    ):
        here[0, r.start : r.stop] = torch.tensor(a, dtype=torch.float32)
        there[0, r.start : r.stop] = torch.tensor(b, dtype=torch.float32)
    warped = baselines.align(picture, here, there)
    for (u, v), (wx, wy) in (((14, 16), (10, 12)), ((28, 18), (25, 10)), ((20, 31), (18, 30))):
        got = (warped[0, :2, v, u] + 1) / 2 * (size - 1)
        assert got.tolist() == pytest.approx([wx, wy], abs=0.05)
    same = baselines.align(picture, here, here)
    assert torch.allclose(same, picture, atol=1e-4)


def test_every_baseline_keeps_the_background(pictures):
    batch = pictures.batch(slice(None))
    source, target, mask = batch["image"].roll(1, 0), batch["image"], batch["mask"]
    out = baselines.untrained(
        source, target, mask, source.mean(0), pictures.points.roll(1, 0), pictures.points
    )
    assert set(out) == {
        "copy target",
        "paste",
        "paste, aligned",
        "paste, colours matched",
        "paste, Poisson",
        "mean face",
    }
    for name, swap in out.items():
        limit = 0.03 if "Poisson" in name else 1e-5
        assert ((swap - target) * mask).abs().mean() < limit, name
    face = 1 - mask
    assert torch.allclose(out["paste"] * face, source * face, atol=1e-5)
    assert ((out["paste, Poisson"] - target) * face).abs().mean() > 0.02
    assert set(baselines.untrained(source, target, mask, source.mean(0))) == set(out) - {"paste, aligned"}


def test_matched_colours_have_the_targets_moments(pictures):
    batch = pictures.batch(slice(None))
    source, target, mask = 0.3 * batch["image"].roll(1, 0), 0.3 * batch["image"], batch["mask"]
    got = baselines.match_colours(source, target, mask)
    for i in range(len(got)):
        face = mask[i, 0] < 0.5
        assert torch.allclose(got[i][:, face].mean(1), target[i][:, face].mean(1), atol=1e-3)
        assert torch.allclose(
            got[i][:, face].std(1, correction=0), target[i][:, face].std(1, correction=0), atol=1e-2
        )


def test_poisson_survives_masks_that_reach_the_border_or_are_empty():
    source, target = torch.rand(2, 3, 24, 24) * 2 - 1, torch.zeros(2, 3, 24, 24)
    mask = torch.ones(2, 1, 24, 24)
    mask[0] = 0
    out = baselines.poisson(source, target, mask)
    assert torch.isfinite(out).all() and torch.equal(out[1], target[1])


# --- claims ---------------------------------------------------------------------------------------------


def row(**changes: float) -> dict[str, float]:
    base = {"cos source": 0.7, "cos target": 0.1, "face L1": 0.2, "position": 1.0, "pose": 3.0}
    return base | {"expression": 0.1, "background L1": 0.1} | changes


def good() -> dict[str, dict[str, float]]:
    return {
        "copy target": row(**{"cos source": 0.05, "cos target": 1.0, "face L1": 0.3, "position": 0.0}),
        "paste": row(**{"face L1": 0.31, "position": 5.0, "pose": 9.0, "expression": 0.5}),
        "paste, Poisson": row(**{"cos source": 0.3, "face L1": 0.28}),
        "mean face": row(**{"cos source": 0.0, "face L1": 0.25}),
        "full": row(),
        "no-identity-loss": row(**{"cos source": 0.05}),
        "no-landmarks": row(position=1.3),
        "no-attribute-losses": row(**{"background L1": 0.3}),
        "no-mask": row(**{"background L1": 0.4}),
    }


def test_claims_hold_on_numbers_that_meet_them():
    found = judge(good())
    assert [claim.id for claim in found] == [f"C{i + 1}" for i in range(8)]
    assert all(claim.holds for claim in found)


@pytest.mark.parametrize(
    ("method", "changes", "claim"),
    [
        ("full", {"cos source": 0.5}, 0),
        ("full", {"cos target": 0.4}, 0),
        ("no-identity-loss", {"cos source": 0.3}, 1),
        ("full", {"face L1": 0.27}, 2),
        ("full", {"position": 2.6}, 3),
        ("full", {"pose": 9.5}, 4),
        ("no-landmarks", {"position": 1.1}, 5),
        ("no-attribute-losses", {"background L1": 0.12}, 6),
        ("no-mask", {"background L1": 0.3}, 6),
        ("full", {"face L1": 0.26}, 7),
    ],
)
def test_a_claim_fails_when_its_number_does(method, changes, claim):
    scores = good()
    scores[method] = scores[method] | changes
    assert not judge(scores)[claim].holds


def test_nothing_is_claimed_without_the_method():
    assert judge({"copy target": row()}) == []


# --- FaceForensics++ ------------------------------------------------------------------------------------


class Grid(nn.Module):
    """A small recogniser: mean colours of a 2x2 grid."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory) -> str:
    """`Grid` as a file."""
    path = tmp_path_factory.mktemp("onnx") / "r.onnx"
    torch.onnx.export(
        Grid(),
        (torch.zeros(2, 3, 16, 16),),
        path,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
        dynamo=False,
    )
    return path


def make_faceforensics(root, pictures: DrawnFaces) -> list[str]:
    names = [f"raw_{video:03d}_{frame}" for video in (0, 1) for frame in (0, 1)]
    for i, name in enumerate(names):
        item = pictures.load(i)
        write_image(root / f"ff++/{name}.png", item["image"] / 2 + 0.5)
        write_image(root / f"ff++_lm_images/{name}.png", to_file(item["landmarks"]))
        write_image(root / f"ff++_mask_images/{name}.png", 1 - item["mask"])
    (root / "face_swap_list.txt").write_text(
        "raw_000_0.png raw_001_0.png\nraw_001_1.png raw_000_1.png\nraw_000_1.png raw_001_1.png"
    )
    return names


def test_the_protocol_on_a_miniature(tmp_path, pictures, recogniser):
    make_faceforensics(tmp_path / "data", pictures)
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    config = FaceForensicsConfig(
        tmp_path / "data", recogniser=recogniser, pose=recogniser, batch_size=2
    )  # three pairs in batches of two: none is lost, none is made twice
    metrics, extra = measure_swaps(config, generator, tmp_path / "out")
    files = sorted(f.name for f in (tmp_path / "out/swapped_result_single").iterdir())
    assert files == [
        "raw_000_0_FS_raw_001_0.png",
        "raw_000_1_FS_raw_001_1.png",
        "raw_001_1_FS_raw_000_1.png",
    ]
    rows = extra["methods"]
    assert extra["pairs"] == 3 and rows["copy target"]["background L1"] == 0
    assert rows["copy target"]["pose error"] == 0 and rows["paste"]["pose error"] > 0
    assert rows["copy target"]["ID retrieval"] == 0, "the target's own frame is nearest"
    assert rows["copy target"]["cos target"] == pytest.approx(1, abs=1e-5)
    assert "expression error" not in rows["FaceSwapper"] and "FID" not in rows["FaceSwapper"]
    retrieval = [m for m in metrics if m.metric == "ID retrieval"]
    assert retrieval and not any(m.comparable for m in retrieval), "three swaps are not the protocol"
    # the file holds what the generator makes
    swap = read_image(tmp_path / "out/swapped_result_single/raw_000_0_FS_raw_001_0.png")
    beside = read_image(tmp_path / "out/swapped_result_all/raw_000_0_FS_raw_001_0.png")
    assert beside.shape == (3, SIZE, 3 * SIZE) and torch.equal(beside[..., 2 * SIZE :], swap)
    source, target = (DrawnFilesItem(tmp_path / "data", name) for name in ("raw_000_0", "raw_001_0"))
    with torch.inference_mode():
        again = generator.swap(source.image, target.image, target.landmarks, target.mask)[0]
    assert torch.allclose(swap, (again / 2 + 0.5).clamp(0, 1), atol=1 / 255)


def test_failed_detections_are_counted(tmp_path, pictures, monkeypatch, capsys):
    """Of the files as they were prepared, and of every method by the detector that is given."""
    make_faceforensics(tmp_path / "data", pictures)
    white, black = torch.ones(3, SIZE, SIZE), torch.zeros(1, SIZE, SIZE)
    write_image(tmp_path / "data/ff++_lm_images/raw_001_0.png", white)
    write_image(tmp_path / "data/ff++_mask_images/raw_000_1.png", black)
    targets = [as_bytes(read_image(tmp_path / f"data/ff++/raw_{name}.png")) for name in ("001_0", "000_1")]
    asked = []

    def detector(photos, names):
        asked.extend(names)
        return [[] if any((photo == target).all() for target in targets) else ["face"] for photo in photos]

    monkeypatch.setattr(faceforensics, "open_detector", lambda choice, device: detector)
    config = FaceForensicsConfig(tmp_path / "data", detector="finder", batch_size=2)
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    metrics, extra = measure_swaps(config, generator, tmp_path / "out")
    assert extra["targets without a face"] == 2
    assert "mask or landmark picture: 2 of 3" in capsys.readouterr().out
    counts = {m.method: m.value for m in metrics if m.metric == "failed detections"}
    assert counts["copy target"] == 2 and counts["FaceSwapper"] == 0
    swaps = ["raw_000_0_FS_raw_001_0.png", "raw_001_1_FS_raw_000_1.png", "raw_000_1_FS_raw_001_1.png"]
    assert asked[:2] == swaps[:2] and asked[-1] == swaps[2]


def as_bytes(picture):
    return picture.mul(255).round().byte().permute(1, 2, 0).numpy()


class DrawnFilesItem:
    """A picture read from its files by hand."""

    def __init__(self, root, name):
        self.image = read_image(root / f"ff++/{name}.png")[None] * 2 - 1
        self.landmarks = read_image(root / f"ff++_lm_images/{name}.png")[None] * 2 - 1
        self.mask = 1 - read_image(root / f"ff++_mask_images/{name}.png", "L")[None]


def test_a_number_of_the_whole_protocol_stands_beside_the_published_one():
    rows = {"FaceSwapper": {"ID retrieval": 94.0, "background L1": 0.1}}
    whole = {m.metric: m for m in as_metrics(rows, 10_000, "FaceForensics++")}
    assert whole["ID retrieval"].comparable and whole["ID retrieval"].value == pytest.approx(0.94)
    assert not whole["background L1"].comparable
    published = load_published("faceswapper")["rows"]
    keys = ("table", "setting", "dataset", "metric", "method")
    beside = [r for r in published if all(r[k] == getattr(whole["ID retrieval"], k) for k in keys)]
    assert [r["value"] for r in beside] == [0.9448]
    assert not as_metrics(rows, 9_999, "FaceForensics++")[0].comparable
    assert not as_metrics(rows, 10_000, "mine")[0].comparable


def test_the_released_generator_needs_the_frames():
    with pytest.raises(UserError, match="--official .* --faceforensics"):
        evaluate(EvalConfig(official=Path("faceswapper.ckpt")))


class Colours(nn.Module):
    """Stands for Inception: mean colours of pictures in [0, 1]."""

    def forward(self, x):
        assert x.min() >= 0 and x.max() <= 1
        return x.mean((2, 3))


def test_fid_and_kid_of_every_method_look_at_the_swaps_of_the_list_alone(tmp_path, pictures, monkeypatch):
    """Swaps of another list may lie in the folder."""
    make_faceforensics(tmp_path / "data", pictures)
    write_image(tmp_path / "out/swapped_result_single/old_FS_older.png", torch.zeros(3, SIZE, SIZE))
    seen = []

    def watch(real, made):
        seen.append((torch.cat(real), torch.cat(made)))
        return fid(real, made)

    monkeypatch.setattr(faceforensics, "InceptionFeatures", lambda path: Colours())
    monkeypatch.setattr(faceforensics, "fid", watch)
    config = FaceForensicsConfig(tmp_path / "data", fid_weights=tmp_path, batch_size=2)
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    rows = measure_swaps(config, generator, tmp_path / "out")[1]["methods"]
    assert {len(real) for real, _ in seen} == {4} and {len(made) for _, made in seen} == {3}
    assert len(seen) == len(rows) == 6 and all({"FID", "KID"} <= row.keys() for row in rows.values())
    names = ("raw_000_0_FS_raw_001_0", "raw_001_1_FS_raw_000_1", "raw_000_1_FS_raw_001_1")
    files = [read_image(tmp_path / f"out/swapped_result_single/{name}.png") for name in names]
    torch.testing.assert_close(seen[0][1], torch.stack(files).mean((2, 3)), atol=1e-6, rtol=0)
    assert rows["copy target"]["FID"] < rows["FaceSwapper"]["FID"]
    again = measure_swaps(config, generator, tmp_path / "out")[1]["methods"]
    assert again["paste"]["KID"] == rows["paste"]["KID"]


def test_ablations_are_measured_with_what_they_saw_in_training(tmp_path, pictures):
    make_faceforensics(tmp_path / "data", pictures)
    config = FaceForensicsConfig(tmp_path / "data", baselines=False)
    torch.manual_seed(0)
    generator = initialise(Generator(Size(SIZE, 128, 8, 8), "direct")).eval()
    blind = Trial("no-landmarks-0", "no-landmarks", 0, 1)
    full = Trial("full-0", "full", 0, 1)
    rows = measure_swaps(config, generator, tmp_path / "a", full, {blind.name: (generator, blind)})[1]
    found = rows["methods"]
    assert (
        list(found) == ["FaceSwapper", "no-landmarks-0"] and found["FaceSwapper"] != found["no-landmarks-0"]
    )
    alone = measure_swaps(config, generator, tmp_path / "b", blind)[1]["methods"]
    assert alone == {"no-landmarks-0": found["no-landmarks-0"]}, "an ablation alone is not the method"
    for file in (tmp_path / "data/ff++_lm_images").iterdir():
        write_image(file, torch.ones(3, SIZE, SIZE))
    white = measure_swaps(config, generator, tmp_path / "a", full)[1]["methods"]["FaceSwapper"]
    assert white == found["no-landmarks-0"]


def test_folders_of_other_names(tmp_path, pictures):
    """The official README prints names that its code does not use."""
    make_faceforensics(tmp_path, pictures)
    for old, new in (("lm", "landmark"), ("mask", "mask")):
        (tmp_path / f"ff++_{old}_images").rename(tmp_path / f"ff++ {new} images")
    named = {"landmarks_folder": "ff++ landmark images", "masks_folder": "ff++ mask images"}
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    config = FaceForensicsConfig(tmp_path, baselines=False, **named)
    assert measure_swaps(config, generator, tmp_path / "out")[1]["pairs"] == 3
    config = FaceForensicsConfig(tmp_path, baselines=False, parsing_folder="ff++ labels", **named)
    with pytest.raises(UserError, match="no folder .*ff.. labels with parsings"):
        measure_swaps(config, generator, tmp_path / "out")


def test_the_official_post_processing_of_the_protocol(tmp_path, pictures):
    names = make_faceforensics(tmp_path / "data", pictures)
    for i, name in enumerate(names):
        write_image(tmp_path / f"data/ff++_parsing_images/{name}.png", pictures.labels[i][None].float() / 255)
    torch.manual_seed(0)
    torch.save({"state_dict": FAN().state_dict()}, tmp_path / "wing.ckpt")
    options = {"fan_weights": tmp_path / "wing.ckpt", "post": True, "batch_size": 2}
    config = FaceForensicsConfig(tmp_path / "data", baselines=False, **options)
    rows = measure_swaps(config, Generator(Size(SIZE, 128, 8, 8), "direct").eval(), tmp_path / "out")[1]
    proxies = {"pose proxy (Procrustes angle)", "shape proxy (Procrustes residual)"}
    assert proxies <= rows["methods"]["FaceSwapper, post-processed"].keys()
    name = "raw_000_0_FS_raw_001_0.png"
    folders = [tmp_path / f"out/swapped_result_{folder}" for folder in ("single", "afterps", "all")]
    swap, after, beside = (read_image(folder / name) for folder in folders)
    target = read_image(tmp_path / "data/ff++/raw_001_0.png")
    assert torch.equal(beside[..., -SIZE:], after) and beside.shape[-1] == 4 * SIZE
    hair = pictures.labels[2] == 17
    assert hair.any() and (after - target)[:, hair].abs().mean() < 0.5 * (swap - target)[:, hair].abs().mean()
    assert not torch.allclose(after, target, atol=0.05), "the swap is used where there is no hair"


def test_numbers_do_not_depend_on_the_batch(tmp_path, pictures):
    make_faceforensics(tmp_path / "data", pictures)
    generator = Generator(Size(SIZE, 128, 8, 8), "direct").eval()
    single, whole = (
        measure_swaps(FaceForensicsConfig(tmp_path / "data", batch_size=n), generator, tmp_path)[1]["methods"]
        for n in (1, 3)
    )
    assert whole["paste"] == pytest.approx(single["paste"], rel=1e-4)
    assert whole["FaceSwapper"] == pytest.approx(single["FaceSwapper"], rel=1e-4)


def test_networks_see_the_pictures_of_the_files(tmp_path, pictures, monkeypatch):
    make_faceforensics(tmp_path / "data", pictures)
    seen = []

    class Watching:
        def __init__(self, path):
            pass

        def __call__(self, x):
            seen.append(x)
            return x.flatten(1)

    monkeypatch.setattr(faceforensics, "OnnxNetwork", Watching)
    config = FaceForensicsConfig(tmp_path / "data", pose=tmp_path, batch_size=3, baselines=False)
    measure_swaps(config, Generator(Size(SIZE, 128, 8, 8), "direct").eval(), tmp_path / "out")
    file = read_image(tmp_path / "out/swapped_result_single/raw_000_0_FS_raw_001_0.png")
    torch.testing.assert_close(seen[0][0] / 2 + 0.5, file, atol=1e-6, rtol=0)


def test_published_rows_say_where_they_come_from():
    rows = json.loads((REPOSITORY / "faceswapper/published.json").read_text())["rows"]
    own = [r for r in rows if r["method"] == "FaceSwapper"]
    assert [r["value"] for r in own] == [0.9448]
    assert all(r["source"].startswith("[") for r in rows)
    assert all(r["setting"] == "context" for r in rows if r["method"] != "FaceSwapper")


def test_networks_of_other_proportions_and_of_a_fixed_batch(tmp_path):
    """As CosFace's 112x96, which sees the middle of the crop, exported for two pictures at a time."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 40, 40, generator=rng) * 2 - 1
    for (height, width), middle in (((16, 12), x[..., 5:35]), ((12, 16), x[..., 5:35, :])):
        write_onnx(Grid(), (torch.zeros(2, 3, height, width),), tmp_path / "f.onnx", ["x"], ["y"])
        wanted = Grid()(nn.functional.interpolate(middle, (height, width), mode="bilinear", antialias=True))
        torch.testing.assert_close(protocol.OnnxNetwork(tmp_path / "f.onnx")(x), wanted)
    write_onnx(nn.Flatten(), (torch.zeros(1, 16, 16, 3),), tmp_path / "last.onnx", ["x"], ["y"])
    with pytest.raises(UserError, match=r"last.onnx: its input has shape \[1, 16, 16, 3\], expected"):
        protocol.OnnxNetwork(tmp_path / "last.onnx")


def test_messages_of_plugged_in_networks(tmp_path, pictures, recogniser):
    with pytest.raises(UserError, match="gone.onnx: no such file"):
        protocol.OnnxNetwork(tmp_path / "gone.onnx")
    (tmp_path / "odd.onnx").write_bytes(b"odd")
    with pytest.raises(UserError, match="not an ONNX network"):
        protocol.OnnxNetwork(tmp_path / "odd.onnx")
    network = protocol.OnnxNetwork(recogniser)
    assert network(torch.zeros(3, 3, 40, 40)).shape == (3, 12)
    make_faceforensics(tmp_path, pictures)
    with pytest.raises(UserError, match="--post needs"):
        measure_swaps(FaceForensicsConfig(tmp_path, post=True), Generator(Size(SIZE, 128, 8, 8)), tmp_path)
