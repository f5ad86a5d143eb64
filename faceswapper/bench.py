"""Size, cost, speed and memory at the paper's resolution, beside the official arithmetic in the same run.

The official form (`literal.py`): fp32, a picture at a time, the generator run with gradient for the
discriminator's step and again for its own, gradients for frozen networks; a swap computes both directions; a
video is handled frame by frame. Whole steps are compared with their optimisers and averages.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import imageio_ffmpeg
import numpy as np
import torch

from faceswapper import fusion, literal
from faceswapper.align import DEMO_FRAMING, paste, to_arrays, to_tensor
from faceswapper.data import world
from faceswapper.detect import open_detector, open_landmarker, open_parser
from faceswapper.losses import (
    Batch,
    Weights,
    discriminator_fake,
    discriminator_real,
    generator_terms,
    swap_both,
)
from faceswapper.model import Discriminator, Generator, Size, initialise
from faceswapper.photo import Photo
from faceswapper.pipeline import Blending, Swapper
from faceswapper.recognizer import IRSE50, Recogniser
from faceswapper.video import VideoReader, VideoWriter
from shared.bench import count_macs, count_parameters, in_turn, peak_memory, report
from shared.faces import draw
from shared.loop import follow
from shared.ranges import Count, Positive
from shared.runtime import parse, pick_device, run_main

WANTED = {"training step": (1.5, 0.8), "video": (3.0, None)}
"""At least so many times the speed, at most so much of the memory of the official form."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long."""

    img_size: int = 256
    """Side of the pictures in pixels."""
    channel_base: int = 2**14
    """Width of the networks; see `model.Size`."""
    batch_size: Count | None = None
    """Pairs per training step; default 1 on the CPU and 8 (the paper's) on a GPU."""
    frames: Count = 8
    """Frames of the video, of 640x480 pixels."""
    seconds: Positive = 1.0
    """Shortest time that the speed of a network is measured for; at least three calls are made."""
    repeats: Count | None = None
    """Times that whole steps and whole videos are measured, which take seconds to minutes on a CPU; the
    median counts. Default 2 on the CPU and 5 on a GPU."""
    parts: tuple[Literal["networks", "training", "video"], ...] = ("networks", "training", "video")
    """What to measure."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


class Players:
    """Both forms' networks, with equal weights, and their steps."""

    def __init__(self, size: Size, pairs: int, device: torch.device):
        self.device, self.gpu = device, device.type == "cuda"
        torch.manual_seed(0)
        self.g = initialise(Generator(size)).to(device)
        self.d = initialise(Discriminator(size)).to(device)
        self.recogniser = IRSE50().eval().to(device)
        self.average = copy.deepcopy(self.g).requires_grad_(False)
        self.weights, self.pairs = Weights(), pairs
        shapes = [(2 * pairs, c, size.img_size, size.img_size) for c in (3, 3, 1)]
        self.batch = Batch(*(torch.rand(shape, device=device) for shape in shapes))

    def channels_last(self) -> "Players":
        """On a GPU the fast form's order in memory, as in train.py."""
        if self.gpu:
            for network in (self.g, self.d, self.average, self.recogniser):
                network.to(memory_format=torch.channels_last)
        return self

    def autocast(self) -> torch.autocast:
        """The fast form's precision: bf16 on a GPU."""
        return torch.autocast("cuda" if self.gpu else "cpu", torch.bfloat16, enabled=self.gpu)

    def fast(self):
        """The step of train.py."""
        self.channels_last()
        g, d, batch, weights = self.g, self.d, self.batch, self.weights
        embed = Recogniser(self.recogniser)
        fused = {"betas": (0.0, 0.99), "weight_decay": 1e-4, "fused": self.device.type != "meta"}
        g_opt, d_opt = (torch.optim.Adam(net.parameters(), 1e-4, **fused) for net in (g, d))

        def step() -> None:
            with self.autocast():
                swaps = swap_both(g, batch)
                d.requires_grad_(True)
                real = sum(discriminator_real(d, batch, weights).values())
            d_opt.zero_grad(set_to_none=True)
            real.backward()
            with self.autocast():
                fake = discriminator_fake(d, batch, swaps)["d_fake"]
            fake.backward()
            d_opt.step()
            d.requires_grad_(False)
            with self.autocast():
                terms = generator_terms(g, d, embed, batch, swaps, weights)
            del swaps
            g_opt.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            g_opt.step()
            follow(self.average, g, 0.999)

        return step

    def official(self):
        """The official step; in it the recogniser's parameters collect gradients too."""
        self.recogniser.requires_grad_(True)
        self.d.requires_grad_(True)
        plain = {"betas": (0.0, 0.99), "weight_decay": 1e-4, "foreach": False, "fused": False}
        g_opt, d_opt = (torch.optim.Adam(net.parameters(), 1e-4, **plain) for net in (self.g, self.d))

        def step() -> None:
            halves = [half for x in self.batch for half in x.detach().chunk(2)]
            batch = tuple(half.clone() for half in halves)
            literal.train_step(
                self.g, self.d, self.average, self.recogniser, batch, g_opt, d_opt, self.weights
            )

        return step


def step_macs(size: Size) -> dict[str, int]:
    """Multiply-accumulates of one pair's training step, forward and backward, counted without computing."""
    counts = {}
    for form in ("fast", "official"):
        with torch.device("meta"):
            players = Players(size, 1, torch.device("meta"))
        counts[form] = count_macs(getattr(players, form)(), training=True)
    return counts


def networks(size: Size, device: torch.device, seconds: float, pairs: int) -> list[dict]:
    """Parameters, cost and speed of the networks and of one swap, batch 1; on a GPU, which one picture does
    not fill, also of the swaps of a training batch at once. Both forms of a network are called in turn."""
    players, plain = Players(size, 1, device).channels_last(), Players(size, 1, device)
    g, d, plain_g, plain_d = (net.eval() for net in (players.g, players.d, plain.g, plain.d))
    (a, b), (lm_a, lm_b), (mask_a, mask_b) = (x.chunk(2) for x in players.batch)
    with torch.no_grad():
        code = g.id_encoder.code(a)
    small = torch.rand(1, 3, 112, 112, device=device)
    calls = {
        ("identity encoder", "fast"): (g.id_encoder, lambda: g.id_encoder.code(a)),
        ("identity encoder", "official"): (
            g.id_encoder,
            lambda: literal.identity_encoder(plain_g.id_encoder, a),
        ),
        ("discriminator", "fast"): (d, lambda: d(a, lm_a)),
        ("discriminator", "official"): (d, lambda: literal.discriminator(plain_d, a, lm_a)),
        ("recogniser", "fast"): (players.recogniser, lambda: players.recogniser.embed(small)),
        ("one swap", "fast"): (g, lambda: g.swap(a, b, lm_b, mask_b)),
        ("one swap, code known", "fast"): (g, lambda: g.swap(a, b, lm_b, mask_b, code)),
        ("one swap", "official"): (
            g,
            lambda: literal.generator(plain_g, a, b, lm_a, lm_b, mask_a, mask_b),
        ),
    }
    if players.gpu:
        many = Players(size, pairs, device).batch
        calls["swaps at once", "fast"] = (g, lambda: g.swap(many.picture.flip(0), *many))
    rows, forms = [], {}
    for what, form in calls:
        forms.setdefault(what, []).append(form)
    for what, named in forms.items():
        batch = 2 * pairs if what == "swaps at once" else 1
        runs = {
            form: partial(_inferred, calls[what, form][1], device, players.gpu and form == "fast")
            for form in named
        }
        times = in_turn(runs, device, seconds)
        for form, run in runs.items():
            row = {"what": what, "form": form, "batch": batch}
            row["parameters"] = count_parameters(calls[what, form][0])
            row["gmacs"] = count_macs(run) / 1e9 / batch
            row["per_second"] = batch / times[form]
            row["peak_mib"] = peak_memory(run, device) / 2**20
            rows.append(row)
    return rows


def _inferred(call: Callable[[], object], device: torch.device, reduced: bool) -> object:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=reduced):
        return call()


def training(size: Size, pairs: int, device: torch.device, repeats: int) -> list[dict]:
    """Whole training steps."""
    macs, steps, rows = step_macs(size), {}, []
    for form in ("fast", "official"):
        steps[form] = getattr(Players(size, pairs, device), form)()
    times = in_turn(steps, device, rounds=repeats)
    for form, step in steps.items():
        row = {"what": "training step", "form": form, "batch": pairs, "gmacs": macs[form] / 1e9}
        row |= {"per_second": pairs / times[form], "peak_mib": peak_memory(step, device) / 2**20}
        rows.append(row)
    return rows


class FrameByFrame:
    """A video as the official code would do it: one frame at a time, both directions, official fusion."""

    def __init__(self, swapper: Swapper, generator: Generator, source: Photo):
        self.swapper, self.generator = swapper, generator
        face = swapper.choose(swapper.detector([source.seen], [source.name])[0], "largest")
        self.crops = swapper.describe(to_tensor([swapper.aligned(source.seen, face)[0]], swapper.device))

    @torch.inference_mode()
    def frame(self, frame: np.ndarray) -> np.ndarray:
        """One frame with the source's face."""
        swapper, a = self.swapper, self.crops
        face = swapper.choose(swapper.detector([frame], ["frame"])[0], "largest")
        crop, matrix = swapper.aligned(frame, face)
        b = swapper.describe(to_tensor([crop], swapper.device))
        made = literal.generator(
            self.generator, a.picture, b.picture, a.landmarks, b.landmarks, a.mask, b.mask
        ).x_ba
        foreheads = [fusion.forehead(c.points, c.mask) for c in (a, b)]
        keep = fusion.soft_erosion(fusion.keep_map(b.labels, *foreheads), whole_batch=True)
        swap = to_arrays((made / 2 + 0.5).clamp(0, 1))[0]
        return paste(frame, swap, keep[0, 0].cpu().numpy(), matrix)


def a_video(path: Path, frames: int) -> tuple[Path, Photo]:
    """A drawn face that moves through 640x480 pixels, and a photo of another one."""
    params, _ = world(2, 1, 0)
    pictures = to_arrays(draw(params.replace(yaw=0.0), 256).image)
    canvas = np.full((480, 640, 3), 110, np.uint8)
    with VideoWriter(path, (640, 480), 25.0, "drawn", None) as writer:
        for k in range(frames):
            frame = canvas.copy()
            frame[100:356, 150 + 4 * k : 406 + 4 * k] = pictures[0]
            writer.write(frame)
    return path, Photo("source", pictures[1])


def video(size: Size, frames: int, device: torch.device, repeats: int) -> list[dict]:
    """Frames per second from file to file, batched and frame by frame."""
    generator = initialise(Generator(size)).to(device)
    plugs = open_detector("finder", device), open_landmarker(None, device), open_parser(None, device)
    plain = copy.deepcopy(generator).eval()
    swapper = Swapper(generator, *plugs, DEMO_FRAMING, Blending())
    with tempfile.TemporaryDirectory() as folder:
        path, photo = a_video(Path(folder) / "video.mp4", frames)

        def batched() -> None:
            reader = VideoReader(path)
            results = swapper.video(reader, swapper.source([photo]))
            with VideoWriter(path.with_name("a.mp4"), reader.size, reader.rate, "bench", path) as writer:
                for result in results:
                    writer.write(result.photo)

        def singly() -> None:
            reader, one = VideoReader(path), FrameByFrame(swapper, plain, photo)
            with VideoWriter(path.with_name("b.mp4"), reader.size, reader.rate, "bench", path) as writer:
                for frame in reader:
                    writer.write(one.frame(frame))

        times = in_turn({"fast": batched, "official": singly}, device, rounds=repeats)
        return [
            {"what": "video", "form": form, "batch": batch, "per_second": frames / times[form]}
            for form, batch in (("fast", min(16, frames)), ("official", 1))
        ]


def compare(rows: list[dict]) -> list[dict]:
    """The fast forms against the official ones: one row each, with what was asked for."""
    found, ratios = {(row["what"], row["form"]): row for row in rows}, []
    for (what, form), fast in found.items():
        plain = found.get((what, "official"))
        if form != "fast" or plain is None:
            continue
        row = {"what": what, "speed": fast["per_second"] / plain["per_second"]}
        if "peak_mib" in fast:
            row["memory"] = fast["peak_mib"] / plain["peak_mib"]
        if "gmacs" in fast:
            row["cost"] = fast["gmacs"] / plain["gmacs"]
        speed, memory = WANTED.get(what, (None, None))
        if speed is not None:
            row["reached"] = row["speed"] >= speed and (memory is None or row["memory"] <= memory)
        ratios.append(row)
    return ratios


def main(config: BenchConfig) -> list[dict]:
    """Measure and print; bench.json keeps the numbers. Returns the comparison."""
    device = pick_device(config.device)
    size = Size(config.img_size, config.channel_base)
    gpu = device.type == "cuda"
    pairs, repeats = config.batch_size or (8 if gpu else 1), config.repeats or (5 if gpu else 2)
    rows: list[dict] = []
    if "networks" in config.parts:
        rows += networks(size, device, config.seconds, pairs)
    if "training" in config.parts:
        rows += training(size, pairs, device, repeats)
    if "video" in config.parts:
        try:
            imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            print(f"video: not measured, {error}")
        else:
            rows += video(size, config.frames, device, repeats)
    ratios = compare(rows)
    report("faceswapper", rows, device=device)
    for row in ratios:
        said = [f"{row['speed']:.2f} x the speed"]
        said += [f"{row[k]:.2f} x the {k}" for k in ("memory", "cost") if k in row]
        asked = ""
        if "reached" in row:
            speed, memory = WANTED[row["what"]]
            asked = f" (asked: at least {speed} x the speed" + (
                f", at most {memory} x the memory" if memory else ""
            )
            asked += "; reached)" if row["reached"] else "; NOT reached)"
        print(f"{row['what']}: {', '.join(said)} of the official form{asked}")
    if not gpu:
        print("GPU: not measured here; the same command measures it where there is one")
    return ratios


if __name__ == "__main__":
    run_main(lambda: main(parse(BenchConfig, __doc__)))
