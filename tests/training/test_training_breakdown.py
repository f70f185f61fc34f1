"""Seconds of the parts of a step, on the clock and by events, and what a row of metrics says."""

import time
import typing

import pytest
import torch
from torch._dynamo.utils import counters

from scalelong_fast.training import breakdown as module
from scalelong_fast.training.breakdown import PARTS, Breakdown
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.instruments import Instruments
from scalelong_fast.training.metrics import read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_parts_and_the_rest_add_up_to_the_step(clock):
    breakdown = Breakdown(CPU)
    for _ in range(2):
        for part, seconds in zip(PARTS, (1.0, 4.0, 2.0), strict=True):
            with breakdown.part(part):
                clock(seconds)
        clock(0.5)
    expected = {"data": 1.0, "gradients": 4.0, "update": 2.0, "other": 0.5, "step": 7.5}
    assert breakdown.read(2) == {f"seconds_{part}": pytest.approx(seconds) for part, seconds in expected.items()}


def test_reading_starts_afresh(clock):
    breakdown = Breakdown(CPU)
    with breakdown.part("data"):
        clock(3.0)
    breakdown.read(1)
    clock(1.0)
    assert breakdown.read(1) == {
        "seconds_step": 1.0,
        "seconds_data": 0.0,
        "seconds_gradients": 0.0,
        "seconds_update": 0.0,
        "seconds_other": 1.0,
    }


class FakeEvent:
    """A CUDA event on a device whose clock and progress the test holds."""

    device_time = 0.0
    made: typing.ClassVar = []

    def __init__(self, enable_timing):
        assert enable_timing
        FakeEvent.made.append(self)

    def record(self, stream):
        self.time = FakeEvent.device_time
        self.done = False

    def query(self):
        return self.done

    def elapsed_time(self, end):
        assert self.done
        assert end.done
        return (end.time - self.time) * 1000

    def synchronize(self):
        raise AssertionError("the host waited")


@pytest.fixture
def device(monkeypatch):
    """A GPU that is none."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", FakeEvent.synchronize)
    FakeEvent.made, FakeEvent.device_time = [], 0.0
    return torch.device("cuda", 0)


def test_on_a_gpu_events_are_read_when_they_have_passed(device):
    breakdown = Breakdown(device)
    with breakdown.part("gradients"):
        FakeEvent.device_time += 0.25
    assert breakdown.read(1)["seconds_gradients"] == 0.0  # still under way: nobody waits for it
    for event in FakeEvent.made:
        event.done = True
    assert breakdown.read(1)["seconds_gradients"] == pytest.approx(0.25)
    assert breakdown.read(1)["seconds_gradients"] == 0.0


def test_on_a_gpu_events_are_used_again(device):
    breakdown = Breakdown(device)
    for _ in range(50):
        for part in PARTS:
            with breakdown.part(part):
                FakeEvent.device_time += 0.001
            for event in FakeEvent.made:
                event.done = True
    assert len(FakeEvent.made) <= 6
    assert breakdown.read(50)["seconds_update"] == pytest.approx(0.001)


def test_parts_are_spans_of_the_profiler():
    breakdown = Breakdown(CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, breakdown.part("update"):
        torch.ones(3).sum()
    assert "update" in {event.key for event in profile.key_averages()}


def test_rows_of_metrics_say_where_the_time_went(tiny, train, tmp_path):
    start = time.perf_counter()
    train(tiny({"train.steps": 6, "train.tensorboard": True}), tmp_path / "run")
    wall = time.perf_counter() - start
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        parts = [row[f"seconds_{part}"] for part in (*PARTS, "other")]
        assert all(seconds >= 0 for seconds in parts)
        assert min(parts[:3]) > 0
        assert sum(parts) == pytest.approx(row["seconds_step"], rel=1e-6)
        assert row["images_per_second"] == pytest.approx(8 / row["seconds_step"], rel=0.05)
        assert row["memory"] > 50e6  # the process, with PyTorch in it
        assert "mfu" not in row  # nobody knows the peak rate of this CPU
    assert sum(row["seconds_step"] * 3 for row in rows) < wall


def test_the_curves_are_in_tensorboard(tiny, train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny({"train.steps": 3, "train.tensorboard": True}), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = {"loss", "lr", "images_per_second", "memory", *(f"seconds_{part}" for part in (*PARTS, "other", "step"))}
    assert set(events.Tags()["scalars"]) == expected


@pytest.mark.parametrize(("mode", "forgotten"), [("whole", 2), ("graphs", 1)])
def test_what_cuda_graphs_allocated_while_warming_up_counts(monkeypatch, tiny, tmp_path, mode, forgotten):
    resets = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z9000")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    gpu = torch.device("cuda", 0)
    config, execution = tiny({"model.attention": "math"}), Execution(gpu, torch.bfloat16, mode)
    with Instruments(config, execution, Breakdown(gpu), tmp_path, 1, print) as instruments:
        instruments.start(0)  # after the warm-up
    assert resets == [gpu] * forgotten


@pytest.mark.parametrize(("mode", "skips", "lines"), [("graphs", 2, 1), ("graphs", 0, 0), ("whole", 2, 0)])
def test_graphs_that_were_not_recorded_are_told(monkeypatch, tiny, tmp_path, mode, skips, lines):
    said = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z9000")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", skips)
    gpu = torch.device("cuda", 0)
    config, execution = tiny({"model.attention": "math"}), Execution(gpu, torch.bfloat16, mode)
    with Instruments(config, execution, Breakdown(gpu), tmp_path, 1, said.append) as instruments:
        instruments.start(0)
    assert len(said) == lines
    assert all("could not record 2 of the compiled graphs" in line for line in said)
