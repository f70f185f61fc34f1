"""``--train.profile``: a table and a trace of so many steps."""

import json
import re

import pytest
import torch

from scalelong_fast.training.breakdown import PARTS
from scalelong_fast.training.profiling import ROWS, SETTLING_STEPS, StepProfile, summary


@pytest.fixture(scope="module")
def profiled(tiny, train, tmp_path_factory):
    """(run folder, what was said) of a run with three steps in its profile."""
    out = tmp_path_factory.mktemp("profiled") / "run"
    _, said = train(tiny({"train.steps": SETTLING_STEPS + 4, "train.profile": 3}), out)
    return out, said


def test_the_user_is_told_where_it_lies(profiled):
    out, said = profiled
    assert f"Profile of 3 steps: {out / 'profile' / 'summary.txt'}" in said
    assert str(out / "profile" / "trace.json") in said


def test_the_table_has_parts_and_operators(profiled):
    text = (profiled[0] / "profile" / "summary.txt").read_text()
    assert text.startswith("3 steps on cpu; times in milliseconds a step.")
    assert re.findall(rf"^  ({'|'.join(PARTS)}) +[\d.]+$", text, re.MULTILINE) == list(PARTS)
    rows = re.findall(r"^ *([\d.]+) +([\d.]+)% +([\d.]+)  (.+)$", text, re.MULTILINE)
    assert any(name in ("aten::addmm", "aten::mm", "aten::bmm") for *_, name in rows)
    assert sum(float(share) for _, share, *_ in rows) == pytest.approx(100, abs=3)
    own = [float(own) for own, *_ in rows[:ROWS]]
    assert own == sorted(own, reverse=True)
    calls = {name: float(calls) for *_, calls, name in rows}
    assert calls.get("aten::_fused_adamw_", 0) in (0, 2.0)  # two groups of parameters


def test_the_trace_can_be_opened(profiled):
    trace = json.loads((profiled[0] / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("gradients") == 3
    assert names.count("update") == 3


def test_without_it_there_is_no_folder(tiny, train, tmp_path):
    _, said = train(tiny({"train.steps": SETTLING_STEPS + 2}), tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()
    assert "Profile" not in said


def test_a_run_that_ends_early_leaves_what_there_is(tiny, train, tmp_path):
    _, said = train(tiny({"train.steps": SETTLING_STEPS + 1, "train.profile": 100}), tmp_path / "run")
    assert "Profile of 1 steps" in said
    assert (tmp_path / "run" / "profile" / "summary.txt").is_file()


def test_a_run_that_fails_leaves_no_profiler_behind(tmp_path):
    profile = StepProfile(5, tmp_path, torch.device("cpu"), lambda line: None)
    for _ in range(SETTLING_STEPS):
        profile.after_step()
    profile.close()
    profile.close()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not list(tmp_path.iterdir())  # it had seen no step


def begun(folder, wait):
    """A profile that has begun, of a device that ``wait`` waits for."""
    profile = StepProfile(5, folder, torch.device("cpu"), lambda line: None)
    for _ in range(SETTLING_STEPS):
        profile.after_step()
    profile._wait = wait
    return profile


def device_is_lost():
    raise RuntimeError("CUDA error: unspecified launch failure")


def test_the_profiler_stops_even_where_the_device_is_lost(tmp_path):
    profile = begun(tmp_path, device_is_lost)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        profile.close()
    assert not torch.autograd.profiler._is_profiler_enabled


def test_what_ended_the_run_is_what_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError), begun(tmp_path, device_is_lost):
        raise ZeroDivisionError
    assert not torch.autograd.profiler._is_profiler_enabled


def test_nothing_is_recorded_on_other_ranks(tmp_path):
    profile = StepProfile(0, tmp_path / "profile", torch.device("cpu"), lambda line: None)
    for _ in range(10):
        profile.after_step()
    profile.close()
    assert not (tmp_path / "profile").exists()


class Event:
    """A row of the profiler's averages."""

    def __init__(self, key, kind, cpu=0.0, device=0.0, count=1, is_user_annotation=False):
        self.is_user_annotation = is_user_annotation
        self.key, self.device_type, self.count = key, f"DeviceType.{kind}", count
        self.self_cpu_time_total = self.cpu_time_total = cpu
        self.self_device_time_total = device


def test_on_a_gpu_the_table_is_of_kernels():
    events = [
        Event("gradients", "CPU", cpu=8000.0),
        Event("gradients", "CUDA", device=9000.0),
        Event("aten::mm", "CPU", cpu=50.0, device=7000.0, count=4),
        Event("ampere_sgemm", "CUDA", device=7000.0, count=4),
        Event("add_kernel", "CUDA", device=1000.0, count=2),
        Event("Optimizer.step#AdamW.step", "CUDA", device=1000.0, is_user_annotation=True),
    ]
    text = summary(events, 2, torch.device("cuda", 0))
    assert "AdamW" not in text
    assert "aten::mm" not in text
    assert re.search(r"gradients +4\.000", text)
    assert re.search(r"3\.500 +87\.5% +2\.0  ampere_sgemm", text)
    assert re.search(r"0\.500 +12\.5% +1\.0  add_kernel", text)


def test_many_rows_are_cut_and_the_rest_added_up():
    events = [Event(f"op{number}", "CPU", cpu=1000.0) for number in range(ROWS + 5)]
    last = summary(events, 1, torch.device("cpu")).splitlines()[-1]
    assert last.split()[0] == "5.000"
    assert last.endswith("5 others")
