"""Size and speed: detectors at their resolution, and the pipeline against a reference that reads every frame.

The reference does what the released scripts do: decode, detect and write a crop for every frame, faces in
batches of 32, read every tenth crop back, score one at a time. Both use the same detector and boxes; scores
are compared. The released scripts' face detector is MTCNN (pip install --no-deps facenet-pytorch); without it
the face detection costs next to nothing (a colour region) or nothing (a table), on both sides.
"""

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from dfgc2022.boxes import box_source, crop_face
from dfgc2022.losses import cross_entropy
from dfgc2022.model import OFFICIAL, detector
from dfgc2022.pipeline import NO_FACE, Scorer, Settings, score_videos
from dfgc2022.video import batched, read_frames, write_clips
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.faces import draw, sample
from shared.ranges import Count, Natural, Positive
from shared.runtime import parse, pick_device, run_main, seed_everything

GPU_BATCH = 24
"""The winner's batch on one GPU: 96 over four for ConvNeXt, 24 on one for Swin."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    detectors: tuple[str, ...] = (*OFFICIAL, "convnext_tiny")
    """Detectors to measure."""
    batch: Count | None = None
    """Batch of the detectors. None: 1 on the CPU, on a GPU the 24 images that each GPU of the winner had."""
    seconds: Positive = 3.0
    """Seconds per throughput measurement."""
    clips: Natural | None = None
    """10-second 720p clips for the pipeline, 0 to leave it out. None: 2 on the CPU, none on a GPU, because
    reading videos is the processor's work.
    """
    pipeline_detector: str = "convnext_micro"
    """Detector of the pipeline measurement; a small one, so that the pipeline is timed, not the network."""
    workers: Natural = 0
    """Processes that read videos in the pipeline."""
    device: str = "auto"
    """auto, cpu or cuda."""


def forms(device: torch.device) -> list[tuple[str, bool, torch.memory_format]]:
    """(label, bf16, layout) of each form of a detector to measure, the plain one first: on a GPU that of the
    released scripts, then that of train.py and predict.py.
    """
    if device.type == "cpu":
        return [("fp32", False, torch.channels_last)]
    return [("fp32", False, torch.contiguous_format), ("bf16, channels last", True, torch.channels_last)]


def passes(network: nn.Module, images: Tensor, bf16: bool) -> dict[str, Callable[[], None]]:
    """Inference, and forward and backward pass of a training step."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def logits() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return network(images)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        output = logits().float()
        # A single logit of fake beside a zero is the same loss on two.
        output = torch.cat([torch.zeros_like(output), output], 1) if output.shape[1] == 1 else output
        cross_entropy(output, labels).backward()

    return {"inference": torch.inference_mode()(logits), "training step": step}


def bench_detector(name: str, config: Config, device: torch.device) -> list[dict]:
    """A row for each pass in each form: size, cost, speed, peak memory, and the ratio to the plain form."""
    entry = detector(name)
    batch = config.batch or (GPU_BATCH if device.type == "cuda" else 1)
    with device:  # hundreds of millions of random weights are a matter of seconds on a processor
        network = entry.build()
    images = torch.rand(batch, 3, entry.size, entry.size, device=device)
    rows: list[dict] = []
    for kind in ("inference", "training step"):
        network.train(kind != "inference")
        macs = count_macs(passes(network, images[:1], bf16=False)[kind], training=True)
        plain = None
        for form, bf16, layout in forms(device):
            network.to(memory_format=layout)
            run = passes(network, images.contiguous(memory_format=layout), bf16)[kind]
            speed = throughput(run, batch, device, config.seconds)
            network.zero_grad(set_to_none=True)  # otherwise a step's memory would not count its gradients
            row = {
                "detector": f"{name}, {entry.size}",
                "pass": kind,
                "form": form,
                "batch": batch,
                "parameters": count_parameters(network),
                "gmacs": macs / 1e9,
                "per_second": speed,
                "peak_gb": peak_memory(run, device) / 1e9,
            }
            rows.append(row | ({"ratio": speed / plain} if plain else {}))
            plain = plain or speed
    return rows


def film_720p(path: Path, boxes: Path, seed: int, seconds: int = 10, fps: int = 30) -> None:
    """A 720p clip with one moving face and camera noise, and its boxes for every frame appended to a CSV
    file.
    """
    drawn = draw(sample(1, seed, worn=0.0), 360)
    face = drawn.image[0].permute(1, 2, 0).mul(255).byte().numpy()
    low, high = drawn.landmarks[0].min(0).values, drawn.landmarks[0].max(0).values
    rng = np.random.default_rng(seed)
    background = cv2.resize(
        rng.integers(70, 150, (9, 16, 3), np.uint8), (1280, 720), interpolation=cv2.INTER_CUBIC
    )
    frames = np.repeat(background[None], seconds * fps, 0)
    noise = [rng.normal(0, 2, background.shape).astype(np.int8) for _ in range(8)]
    with open(boxes, "a") as file:
        for index, frame in enumerate(frames):
            x, y = 300 + index, 150 + index // 4
            frame[y : y + 360, x : x + 360] = face
            cv2.add(frame, noise[index % 8], frame, dtype=cv2.CV_8U)
            corners = (x + low[0], y + low[1], x + high[0], y + high[1])
            file.write(
                f"{path.name},{index}," + ",".join(f"{float(value):.2f}" for value in corners) + ",0.99\n"
            )
    write_clips([path], [frames], crf=20, fps=fps)


def reference_path(videos: list[Path], scorer: Scorer, boxes: str, folder: Path) -> list[float]:
    """Video scores by the released scripts' procedure: every frame detected and written, one crop scored at
    a time.
    """
    source, size, scores = box_source(boxes), scorer.sizes[0], []
    for video in videos:
        out = folder / video.name
        out.mkdir(parents=True)
        for group in batched(read_frames(video)):
            indices, frames = [index for index, _ in group], [frame for _, frame in group]
            for index, frame, found in zip(indices, frames, source(video.name, indices, frames), strict=True):
                face = crop_face(frame, found[0]) if found else None
                if face is not None:
                    cv2.imwrite(str(out / f"{index:04d}.png"), cv2.cvtColor(face, cv2.COLOR_RGB2BGR))
        values = []
        for path in sorted(out.glob("*.png")):
            if int(path.stem) % 10 == 0:
                face = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
                resized = cv2.resize(face, (size, size), interpolation=cv2.INTER_LINEAR)
                values += [float(value[0]) for value in scorer({size: resized[None]}).values()]
        scores.append(float(np.mean(values)) if values else NO_FACE)
    return scores


def bench_pipeline(config: Config, clips: int, device: torch.device) -> list[dict]:
    """Rows: seconds per clip of both paths, with face boxes from MTCNN (where installed), from OpenCV's
    colour regions and from a table.
    """
    entry = detector(config.pipeline_detector)
    scorer = Scorer({"detector": (entry.build(), entry, entry.size)}, device, bf16=device.type == "cuda")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = folder / "boxes.csv"
        table.write_text("video,frame,x1,y1,x2,y2,probability\n")
        videos = [folder / f"clip{number}.mp4" for number in range(clips)]
        for number, video in enumerate(videos):
            film_720p(video, table, number)
        rows = []
        installed = ["mtcnn"] if importlib.util.find_spec("facenet_pytorch") else []
        for boxes in (*installed, "skin", str(table)):
            scorer({scorer.sizes[0]: np.zeros((8, scorer.sizes[0], scorer.sizes[0], 3), np.uint8)})  # warm-up
            start = time.perf_counter()
            reference = reference_path(videos, scorer, boxes, folder / "crops")
            middle = time.perf_counter()
            fast = score_videos(videos, scorer, Settings(boxes), workers=config.workers)
            end = time.perf_counter()
            shutil.rmtree(folder / "crops")
            gap = max(abs(a - b.score["detector"]) for a, b in zip(reference, fast, strict=True))
            rows.append(
                {
                    "pipeline": f"10 s 720p, {config.pipeline_detector}",
                    "boxes": "table" if boxes == str(table) else boxes,
                    "every frame [s/clip]": (middle - start) / clips,
                    "this pipeline [s/clip]": (end - middle) / clips,
                    "times faster": (middle - start) / (end - middle),
                    "largest score difference": gap,
                }
            )
    return rows


def main(config: Config) -> None:
    seed_everything(0)
    device = pick_device(config.device)
    clips = config.clips if config.clips is not None else 2 * (device.type == "cpu")
    rows = bench_pipeline(config, clips, device) if clips else []
    rows += [row for name in config.detectors for row in bench_detector(name, config, device)]
    print(report("dfgc2022", rows, device=device))


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
