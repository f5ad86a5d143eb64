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
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from dfgc2022.boxes import box_source, crop_face
from dfgc2022.losses import cross_entropy
from dfgc2022.model import OFFICIAL, detector
from dfgc2022.pipeline import NO_FACE, Scorer, Settings, score_videos
from dfgc2022.video import batched, read_frames, write_clips
from shared.bench import count_macs, count_parameters, peak_memory, report, throughput
from shared.faces import draw, sample
from shared.published import format_table
from shared.runtime import parse, pick_device, run_main, seed_everything


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    detectors: tuple[str, ...] = (*OFFICIAL, "convnext_tiny")
    """Detectors to measure."""
    batch: int | None = None
    """Batch of the detectors. None: 1 on the CPU, 32 on a GPU."""
    seconds: float = 3.0
    """Seconds per throughput measurement."""
    clips: int = 2
    """10-second 720p clips for the pipeline."""
    pipeline_detector: str = "convnext_micro"
    """Detector of the pipeline measurement; a small one, so that the pipeline is timed, not the network."""
    workers: int = 0
    """Processes that read videos in the pipeline."""
    device: str = "auto"
    """auto, cpu or cuda."""


def bench_detector(name: str, config: Config, device: torch.device) -> dict:
    """One row: parameters, MACs, inference and training-step throughput, peak memory of a training step."""
    entry, gpu = detector(name), device.type == "cuda"
    batch = config.batch or (32 if gpu else 1)
    network = entry.build().to(device, memory_format=torch.channels_last)
    images = torch.rand(batch, 3, entry.size, entry.size, device=device).to(memory_format=torch.channels_last)
    logits = network.eval()(images[:1])
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            network(images)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            output = network(images)
            # A single logit of fake beside a zero is the same loss on two.
            output = output if logits.shape[1] > 1 else torch.cat([torch.zeros_like(output), output], 1)
            loss = cross_entropy(output, labels)
        loss.backward()

    row = {
        "detector": name,
        "side": entry.size,
        "parameters [M]": count_parameters(network) / 1e6,
        "GMAC": count_macs(network, images[:1]) / 1e9,
        "batch": batch,
        "precision": "bf16" if gpu else "fp32",
        "inference [img/s]": throughput(infer, batch, device, config.seconds),
    }
    network.train()
    row["training step [img/s]"] = throughput(step, batch, device, config.seconds)
    row["step memory [GB]"] = peak_memory(step, device) / 1e9
    return row


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


def bench_pipeline(config: Config, device: torch.device) -> list[dict]:
    """Rows: seconds per clip of both paths, with face boxes from MTCNN (where installed), from OpenCV's
    colour regions and from a table.
    """
    entry = detector(config.pipeline_detector)
    scorer = Scorer({"detector": (entry.build(), entry, entry.size)}, device, bf16=device.type == "cuda")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = folder / "boxes.csv"
        table.write_text("video,frame,x1,y1,x2,y2,probability\n")
        videos = [folder / f"clip{number}.mp4" for number in range(config.clips)]
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
                    "every frame [s/clip]": (middle - start) / config.clips,
                    "this pipeline [s/clip]": (end - middle) / config.clips,
                    "times faster": (middle - start) / (end - middle),
                    "largest score difference": gap,
                }
            )
    return rows


def main(config: Config) -> None:
    seed_everything(0)
    device = pick_device(config.device)
    rows = bench_pipeline(config, device)
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    detectors = [bench_detector(name, config, device) for name in config.detectors]
    print(report("dfgc2022", [*detectors, *rows]))


if __name__ == "__main__":
    run_main(lambda: main(parse(Config, __doc__)))
