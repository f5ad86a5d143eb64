"""shared/: batches, images, metrics, published tables, benchmark counters, report."""

import json
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torchvision.models import alexnet

from shared import bench, io, metrics, published, report, runtime
from shared.records import read_json, write_tensors
from shared.runtime import StepBatches, UserError

# --- runtime --------------------------------------------------------------------------------------


def test_batches_are_shuffled_epochs_that_run_into_each_other():
    batches = list(StepBatches(10, 4, seed=3, steps=5))
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn != [index for batch in StepBatches(10, 4, seed=4, steps=5) for index in batch]


def test_batches_resume_and_shard():
    whole = list(StepBatches(7, 4, seed=0, steps=9, draws=True))
    assert list(StepBatches(7, 4, seed=0, steps=9, start_step=6, draws=True)) == whole[6:]
    assert [draw for batch in whole for _, draw in batch] == list(range(36))
    ranks = [list(StepBatches(7, 4, seed=0, steps=9, rank=rank, world=2, draws=True)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    ranks = [list(StepBatches(7, 8, seed=0, steps=9, rank=r, world=2, draws=True, roles=2)) for r in (0, 1)]
    halves = [a[:2] + b[:2] + a[2:] + b[2:] for a, b in zip(*ranks, strict=True)]
    assert halves == list(StepBatches(7, 8, seed=0, steps=9, draws=True))
    with pytest.raises(UserError, match="a batch of 3 does not divide over 2 processes"):
        StepBatches(7, 3, seed=0, steps=1, world=2)


def test_step_generator_depends_on_its_numbers_alone():
    def draw(*numbers):
        return torch.rand(3, generator=runtime.step_generator(*numbers)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*numbers)) for numbers in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def test_missing_and_unknown_devices_are_user_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device().type == runtime.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        runtime.pick_device("cuda")
    with pytest.raises(UserError, match="--device gpu: give auto, cpu or cuda"):
        runtime.pick_device("gpu")


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_are_read(tmp_path, mode):
    path = tmp_path / ("é x.tif" if mode == "CMYK" else "é x.png")
    Image.fromarray(np.full((5, 7, 3), 200, np.uint8)).convert(mode).save(path)
    image = io.read_image(path)
    assert image.shape == (3, 5, 7) and image.dtype == torch.float32
    assert io.read_image(path, "L").shape == (1, 5, 7)
    if mode in ("RGB", "L", "RGBA"):
        assert torch.allclose(image, torch.full_like(image, 200 / 255))


def test_sixteen_bit_images_keep_their_scale(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert io.read_image(tmp_path / "deep.png").mean().item() == pytest.approx(40000 / 65535, abs=0.003)


def test_floating_point_images_are_refused_not_blackened(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff: holds floating-point numbers"):
        io.read_image(tmp_path / "float.tiff")


def test_damaged_and_missing_images_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    io.write_image(whole, torch.rand(3, 40, 40))
    content = whole.read_bytes()
    for name, damaged in [("cut.png", content[:700]), ("empty.png", b""), ("text.png", b"hello")]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            io.read_image(tmp_path / name)
    with pytest.raises(UserError, match="absent.png: no such image"):
        io.read_image(tmp_path / "absent.png")


def test_files_are_found_by_their_endings(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "below/c.png", "x.NPY", ".x.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    names = [path.name for path in io.find_images(tmp_path)]
    assert names == ["a.jpg", "b.PNG", "c.png"]
    assert [path.name for path in io.find_images(tmp_path, subfolders=False)] == ["a.jpg", "b.PNG"]
    assert [path.name for path in io.find_images(tmp_path, endings=(".npy",))] == ["x.NPY"]


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "liste.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "Zoë\n".encode())
        assert io.read_utf8(path, "a list") == "Zoë\n"
    path.write_bytes("Zoë".encode("latin-1"))
    for broken in (path, tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match=f"{broken.name}: not readable as a list in UTF-8"):
            io.read_utf8(broken, "a list")


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    path, wide = tmp_path / "new" / "codes.safetensors", torch.arange(6.0).view(2, 3).requires_grad_()
    write_tensors(path, {"codes": wide.T}, {"names": "a\nb"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"names": "a\nb"} and torch.equal(file.get_tensor("codes"), wide.T)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": wide, "b": wide})
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_json_of_another_form_is_named(tmp_path):
    path = tmp_path / "list.json"
    path.write_bytes(b'\xef\xbb\xbf{"names": ["a", "b"]}')
    assert read_json(path, "names") == {"names": ["a", "b"]}
    assert read_json(path, "names", lambda found: found["names"][1]) == "b"
    contents = (b"", b'{"names": [', b"\xff\xfe", b"[1]", b"1", b"{}", b'{"names": []}', b"[" * 10**5)
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="list.json: not readable as names .*[)]; ask for it again$"):
            read_json(path, "names", lambda found: found["names"][1], "ask for it again")
    with pytest.raises(UserError, match="gone.json: not readable as names .*No such file"):
        read_json(tmp_path / "gone.json", "names")


def test_inputs_are_kept(tmp_path):
    io.keep_inputs([tmp_path / "a.png"], [tmp_path / "b.png"])
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link.a.png would be overwritten by a result: give another --out"):
        io.keep_inputs([tmp_path / "b.png", tmp_path / "link" / "a.png"], [tmp_path / "a.png"])


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_photo_is_turned_upright(tmp_path, ending):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left
    Image.fromarray(pixels).save(tmp_path / f"phone.{ending}", exif=exif)
    image = io.read_image(tmp_path / f"phone.{ending}", "L")[0]
    assert image.shape == (24, 16)
    assert image[:8, 8:].mean() > 0.95 and image[8:].mean() < 0.05


def test_written_pictures_say_that_they_are_synthetic(tmp_path):
    image = torch.rand(3, 8, 8)
    io.write_image(tmp_path / "a.png", image, synthetic="test model")
    io.write_image(tmp_path / "a.jpg", image, synthetic="test model")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
        assert "test model" in picture.text["Description"]
    with Image.open(tmp_path / "a.jpg") as picture:
        assert b"trainedAlgorithmicMedia" in picture.info["comment"]
    assert (io.read_image(tmp_path / "a.png") - image).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(UserError, match=".png or .jpg"):
        io.write_image(tmp_path / "a.gif", image)


def test_grid_puts_tiles_row_by_row():
    tiles = [torch.full((1, 4, 4), value) for value in (0.0, 0.2, 0.4)]
    sheet = io.image_grid(tiles, columns=2, gap=1)
    assert sheet.shape == (3, 9, 9)
    assert (
        sheet[0, 0, 0] == 0 and sheet[0, 0, 5] == pytest.approx(0.2) and sheet[0, 5, 0] == pytest.approx(0.4)
    )
    assert sheet[:, 5:, 5:].min() == 1  # the empty place is white
    labelled = io.image_grid(tiles, columns=2, row_labels=["one", "two"], column_labels=["a", "b"], scale=8)
    assert labelled.shape[1] > 66 and labelled.shape[2] > 66


# --- metrics --------------------------------------------------------------------------------------


def test_psnr_and_ssim_closed_forms():
    image = torch.rand(2, 3, 32, 32) * 0.5
    assert metrics.psnr(image + 0.1, image) == pytest.approx(20, abs=1e-3)  # -10 log10(0.1^2)
    assert metrics.ssim(image, image) == pytest.approx(1)
    # Two constant images: only the luminance term is left.
    a, b, c1 = 0.2, 0.6, 0.01**2
    flat = metrics.ssim(torch.full((1, 1, 32, 32), a), torch.full((1, 1, 32, 32), b))
    assert flat == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)


class Pixels(nn.Module):
    """The first pixels of an image as its features."""

    num_features = 6

    def forward(self, images):
        return images.flatten(1)[:, :6]


def test_fid_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(400, 3, 4, 4, generator=generator)
    fake = torch.rand(400, 3, 4, 4, generator=generator) ** 2
    x, y = (Pixels()(images).double().numpy() for images in (real, fake))
    cx, cy = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(cx)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cy @ root)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * cross
    assert metrics.fid(real.split(64), fake.split(50), Pixels()) == pytest.approx(expected, rel=1e-4)
    assert metrics.fid([real], [real], Pixels()) == pytest.approx(0, abs=1e-6)
    ready = [[Pixels()(part) for part in images.split(64)] for images in (real, fake)]
    assert metrics.fid(iter(ready[0]), iter(ready[1])) == pytest.approx(expected, rel=1e-4)


def test_kid_is_about_zero_for_one_distribution_and_not_for_two():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 300, 3, 4, 4, generator=generator)
    same, _ = metrics.kid([a], [b], Pixels(), subsets=20, size=100)
    other, _ = metrics.kid([a], [b**2], Pixels(), subsets=20, size=100)
    assert abs(same) < 0.02 < other
    torch.manual_seed(1)
    of_images = metrics.kid([a], [b**2], Pixels(), subsets=20, size=100)
    torch.manual_seed(1)
    ready = (Pixels()(x).split(64) for x in (a, b**2))
    assert metrics.kid(*ready, subsets=20, size=100) == pytest.approx(of_images)


def test_lpips_reads_torchvision_weights_and_matches_its_definition(tmp_path):
    torch.manual_seed(0)
    backbone = alexnet(weights=None).eval()
    torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
    network = metrics.perceptual_network("alex", tmp_path / "alexnet.pth")
    x, y = torch.rand(2, 2, 3, 64, 64)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    distance = torch.zeros(2)
    a, b = ((image * 2 - 1 - shift) / scale for image in (x, y))
    with torch.no_grad():
        for index, layer in enumerate(backbone.features):
            a, b = layer(a), layer(b)
            if index in (1, 4, 7, 9, 11):
                head = network.lins[(1, 4, 7, 9, 11).index(index)].model[-1].weight[0]
                unit = [feature / feature.norm(dim=1, keepdim=True) for feature in (a, b)]
                distance += ((unit[0] - unit[1]) ** 2 * head).sum(1).mean((1, 2))
    assert metrics.lpips(x, y, network) == pytest.approx(distance.mean().item(), rel=1e-4)
    assert metrics.lpips(x, x, network) == 0
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torchvision's alex weights"):
        metrics.perceptual_network("alex", tmp_path / "other.pth")


def test_verification_metrics_against_slow_references():
    rng = np.random.default_rng(0)
    labels = np.r_[np.ones(60), np.zeros(90)].astype(int)
    scores = np.round(rng.normal(labels * 1.2, 1), 1)  # rounded: ties
    positive, negative = scores[labels == 1], scores[labels == 0]
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert metrics.auc(scores, labels) == pytest.approx(np.mean(pairs))
    accuracies = {t: np.mean((scores >= t) == labels) for t in scores}
    accuracy, threshold = metrics.best_threshold_accuracy(scores, labels)
    assert accuracy == pytest.approx(max(accuracies.values())) == accuracies[threshold]
    allowed = [np.mean(positive >= t) for t in scores if np.mean(negative >= t) <= 0.1]
    assert metrics.tar_at_far(scores, labels, 0.1) == pytest.approx(max(allowed))
    with pytest.raises(ValueError, match="genuine and impostor"):
        metrics.auc(scores, np.ones(150))


def test_equal_error_rate_known_values():
    assert metrics.eer(np.array([0.9, 0.8, 0.2, 0.1]), np.array([1, 1, 0, 0])) == 0
    assert metrics.eer(np.array([0.1, 0.2, 0.8, 0.9]), np.array([1, 1, 0, 0])) == 1
    assert metrics.eer(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 0, 1])) == 0.5
    scores = np.r_[np.linspace(0, 1, 1001) + 0.5, np.linspace(0, 1, 1001)]
    assert metrics.eer(scores, np.r_[np.ones(1001), np.zeros(1001)]) == pytest.approx(0.25, abs=2e-3)


# --- published and measured -----------------------------------------------------------------------

ROW = {"table": "T1", "setting": "s", "dataset": "d", "metric": "m", "method": "ours", "value": 42.5}


def measured(comparable):
    return published.Metric("T1", "s", "m", "%", 41.0, "d", comparable)


def test_published_numbers_stand_only_beside_comparable_ones(capsys):
    table = {"note": "a note", "rows": [ROW]}
    published.print_metrics([measured(False)], table)
    alone = capsys.readouterr().out
    assert "42.5" not in alone and "41" in alone and "1 published or context rows" in alone
    published.print_metrics([measured(True)], table)
    beside = capsys.readouterr().out
    assert re.search(r"41\s+42.5", beside) and "context rows" not in beside


def test_claims_are_printed_as_they_came_out(capsys):
    claims = [
        published.Claim("C1", "better", {"a": 2.0, "b": 1.0}, "a - b >= 1", True),
        published.Claim("C2", "faster", {"a": float("nan")}, "a > 0", False),
    ]
    published.print_claims(claims)
    text = capsys.readouterr().out
    assert "C1: holds" in text and "C2: DOES NOT HOLD" in text and "claims: 1 of 2 hold" in text


def test_a_result_computed_on_the_cpu_names_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for device, gpu in (("auto", "a GPU"), ("cuda", "a GPU"), ("cpu", None)):
        assert published.environment(runtime.RunConfig(device=device), 1.0)["gpu"] == gpu
        assert published.environment(runtime.RunConfig(device="cuda"), 1.0, device)["gpu"] == gpu


def test_a_run_of_a_gpu_may_be_evaluated_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert published.environment(runtime.RunConfig(device="cuda"), 1.0)["gpu"] is None


def test_results_are_strict_json(tmp_path):
    claim = published.Claim("C1", "x", {"a": float("nan"), "b": np.float32(1.5)}, "", np.bool_(True))
    published.write_results(tmp_path, [claim], [measured(False)], {"seed": 0}, {"more": torch.ones(2)})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["claims"][0]["measured"] == {"a": None, "b": 1.5}
    assert results["claims"][0]["holds"] is True
    assert results["metrics"][0]["value"] == 41 and results["more"] == [1, 1]


# --- benchmark counters ---------------------------------------------------------------------------


def test_counters_closed_forms():
    convolution = nn.Conv2d(3, 8, 5, padding=2)
    assert bench.count_parameters(convolution) == 3 * 8 * 25 + 8
    assert bench.count_macs(convolution, torch.rand(2, 3, 16, 16)) == 2 * 16 * 16 * 3 * 8 * 25
    query = torch.rand(1, 2, 10, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert bench.count_macs(attention, query, query, query) == 2 * (10 * 10 * 4) * 2


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_training_step_costs_three_forward_passes(kind, groups):
    net = nn.Sequential(
        kind(8, 8, 3, padding=1), kind(8, 16, 3, stride=2, groups=groups), nn.Conv2d(16, 4, 1)
    )
    x = torch.rand(2, 8, 10, 10, requires_grad=True)
    forward = bench.count_macs(net, x)
    assert bench.count_macs(lambda: net(x).sum().backward(), training=True) == 3 * forward
    with torch.inference_mode():
        assert bench.count_macs(net, x.detach()) == forward


def test_a_gradient_inside_a_step_is_counted_too():
    net = nn.Linear(6, 5)
    x = torch.rand(4, 6, requires_grad=True)

    def penalty() -> None:
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()

    forward = 4 * 6 * 5
    # y, the slope W'y; from it to W and to y, and from y to W and to x
    assert bench.count_macs(penalty, training=True) == 6 * forward


def test_peak_memory_sees_what_is_alive_at_once():
    def one_after_another():
        for _ in range(5):
            torch.zeros(250_000)

    def all_at_once():
        return [torch.zeros(250_000) for _ in range(5)]

    assert 1e6 <= bench.peak_memory(one_after_another) < 1.6e6
    assert 5e6 <= bench.peak_memory(all_at_once) < 5.6e6


def test_throughput_counts_items():
    assert bench.throughput(lambda: sum(range(1000)), items=10, seconds=0.01) > 10


# --- report ---------------------------------------------------------------------------------------


def test_forms_are_timed_in_turn():
    order = []
    calls = {
        name: lambda name=name: (order.append(name), time.sleep(0.002 * len(name))) for name in ("a", "bbbb")
    }
    times = bench.in_turn(calls, rounds=2)
    assert order == ["a", "bbbb"] * 3
    assert 0.002 <= times["a"] < times["bbbb"] < 0.1


def test_share_of_peak_is_arithmetic_done_over_arithmetic_possible(tmp_path, capsys):
    side = 512
    a, b = torch.rand(side, side), torch.rand(side, side)
    product = {"what": "product", "gmacs": side**3 / 1e9}
    product["per_second"] = bench.throughput(lambda: torch.mm(a, b), 1, seconds=0.2)
    rows = [product, {"what": "sleep", "per_second": 10.0}]
    written = json.loads(bench.report("paper", rows, tmp_path).read_text())
    assert written["machine"].endswith("CPU threads") and written["machine"] in capsys.readouterr().out
    assert written["rows"][0]["share_of_peak"] == pytest.approx(
        side**3 * product["per_second"] / written["peak"]
    )
    assert 0.05 < written["rows"][0]["share_of_peak"] < 3
    assert "share_of_peak" not in written["rows"][1]
    assert json.loads(bench.report("paper", rows[1:], tmp_path).read_text())["peak"] is None


def test_curves_of_a_log_that_is_absent_or_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    assert report.curves(log) == []
    log.write_text('{"step": 1, "a/loss": 3}\n{"step": 2, "a/loss": 2}\n{"step": 3, "a/lo')
    assert report.curves(log) == [("loss", {"a": ([1, 2], [3, 2])})]
    log.write_text('{"step": 1, "a/clients": 8}\n{"step": 2, "a/clients": 8}\n')
    assert report.curves(log) == []  # what never changes


def test_benchmark_rows_of_two_kinds_are_two_tables(tmp_path, capsys):
    rows = [{"pipeline": "p", "times": 4.0}, {"detector": "d", "speed": 2.0}, {"detector": "e", "memory": 3}]
    written = json.loads(bench.report("paper", rows, tmp_path).read_text())
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pipeline", "times"] in said and ["detector", "speed", "memory"] in said
    assert written["rows"] == rows


def test_a_report_names_results_that_are_damaged(tmp_path):
    (tmp_path / "results.json").write_text('{"claims": []')
    with pytest.raises(UserError, match="results.json: not readable as results"):
        report.describe_run(tmp_path)


def test_report_is_one_page_that_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_RUNS", str(tmp_path / "runs"))
    paper = next(name for name in report.PAPERS if (runtime.REPOSITORY / name / "train.py").is_file())
    run = tmp_path / "runs" / paper / "demo-0"
    (run / "samples").mkdir(parents=True)
    lines = [{"step": step, "first/loss": 1 / step, "second/loss": 2 / step} for step in (1, 2, 3)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    io.write_image(run / "samples" / "a_picture.png", torch.rand(3, 900, 900))
    claims = [published.Claim("C1", "a <claim>", {"x": 1.0}, "x > 2", False)]
    environment = {"command": "python eval.py", "seed": 0, "seconds": 12.0, "gpu": None, "cores": 2}
    environment |= {"torch": "2", "python": "3", "processor": "Some CPU (model 1)"}
    training = {**environment, "command": "python train.py demo --lr 1", "gpu": "Some GPU"}
    (run / "config.json").write_text(json.dumps({"paper": paper, "config": {}, "training": training}))
    published.write_results(run, claims, [measured(False)], environment)
    page = report.write_report(tmp_path / "index.html").read_text()
    shown = " ".join(page.split())  # both commands, each with its machine
    assert "Trained by <code>python train.py demo --lr 1</code> on Some GPU, torch 2" in shown
    assert (
        f"<code>python eval.py</code> in <code>{paper}/</code>, seed 0, 12 s on 2 CPU cores (Some CPU"
        in shown
    )
    assert '<td class="name">Some GPU</td>' in page
    assert "a &lt;claim&gt;" in page and "does not hold" in page and "a picture" in page and "0 / 1" in page
    assert "not comparable" in page
    assert page.index("<h3>Measured") < page.index("<h3>Pictures")  # numbers do not stand below the sheets
    assert f'<a href="#{paper}">' in page[page.index("<nav>") : page.index("</nav>")]
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert sum(address.startswith("data:image/svg") for address in addresses) == 1
    assert sum(address.startswith("data:image/jpeg") for address in addresses) == 1  # large: reduced
