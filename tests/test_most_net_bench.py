"""MOST-Net: the benchmark compares like with like, and the metrics keep their distance from the loops."""

from dataclasses import replace

import torch

from most_net import bench
from most_net.model import TINY
from most_net.train import PRESETS
from shared.runtime import start

CPU = torch.device("cpu")
BRIEF = bench.Config("cpu", seconds=1e-3)


def test_metrics_are_ten_times_as_fast_as_their_loops_and_equal(monkeypatch):
    monkeypatch.setattr(bench, "HEIGHT", 100)
    monkeypatch.setattr(bench, "WIDTH", 80)
    fsim, scoot, nlda = bench.metric_rows(BRIEF, CPU)
    for row in (fsim, scoot):
        assert row["difference"] < 1e-6 and row["times the literal form"] > 10
    assert nlda["what"] == "NLDA, 338 people, 20 partitions" and nlda["seconds"] < 60


def test_the_step_is_set_beside_its_literal_form_in_each_precision(monkeypatch):
    accelerator, arch = start(replace(PRESETS["demo"], device="cpu")), replace(TINY, base=4, slots=8)
    step = "training step 32x32, batch 1"
    ours, plain = bench.step_rows(BRIEF, accelerator, arch, 32, 1, bf16=False)
    assert (ours["what"], plain["what"]) == (f"{step}, fp32", f"{step}, literal form")
    assert ours["times the literal form"] == ours["per_second"] / plain["per_second"]
    assert ours["gmacs"] < plain["gmacs"]  # nothing is computed twice
    # A CPU without bf16 arithmetic would take long over it.
    monkeypatch.setattr(
        bench, "in_turn", lambda steps, *rest: dict(zip(steps, (0.25, 1.0, 0.5), strict=True))
    )
    monkeypatch.setattr(bench, "count_macs", lambda *arguments, **options: 1e9)
    monkeypatch.setattr(bench, "peak_memory", lambda *arguments: 0)
    rows = bench.step_rows(BRIEF, accelerator, arch, 32, 1, bf16=True)
    assert [row["what"] for row in rows[1:]] == [f"{step}, literal form", f"{step}, literal form, bf16"]
    assert (rows[0]["times the literal form"], rows[0]["times it in bf16"]) == (4, 2)
