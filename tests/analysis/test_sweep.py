"""The sweep: results kept at once, failures in their place, the same whatever the number of processes."""

import functools
import json
import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scalelong_fast.analysis.sweep import Failure, Job, require_all, run_jobs
from scalelong_fast.analysis.units import Units
from scalelong_fast.analysis.workers import Worker, default_workers, visible_gpus
from scalelong_fast.errors import UserError, check_range

#: Functions of modules that any process can import: what a job's computation has to be.
factorial, refuse = math.factorial, functools.partial(check_range, "kappa", -1, low=0)


def job(name, function, *args):
    return Job({"job": name}, name, functools.partial(function, *args))


def factorials(count=6):
    return [job(f"{n}!", factorial, n) for n in range(count)]


class TestOneProcess:
    def test_results_come_in_the_order_of_the_jobs(self):
        assert run_jobs(factorials(), workers=1) == [1, 1, 2, 6, 24, 120]

    def test_equal_keys_are_computed_once(self, tmp_path):
        calls = []
        jobs = [Job({"a": 1, "b": (2,)}, "", lambda: calls.append(1) or 7), Job({"b": [2], "a": 1}, "", lambda: 8)]
        assert run_jobs(jobs, workers=1) == [7, 7]
        assert len(calls) == 1

    def test_an_interruption_costs_the_job_under_way_alone(self, tmp_path):
        def interrupted():
            raise KeyboardInterrupt

        jobs, units = factorials(3), Units(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run_jobs([*jobs[:2], Job({"job": "2!"}, "2!", interrupted)], units, workers=1)
        assert len(list(tmp_path.iterdir())) == 2
        seen = []
        results = run_jobs(jobs, units, lambda done, total, what: seen.append((done, total, what)), workers=1)
        assert results == [1, 1, 2]
        assert seen == [(2, 3, "2!")]

    def test_a_refusal_stands_in_its_place_and_is_tried_again(self, tmp_path):
        results = run_jobs([job("bad", refuse), *factorials(2)], Units(tmp_path), workers=1)
        assert isinstance(results[0], Failure)
        assert results[0].message.startswith("kappa: got -1")
        assert results[1:] == [1, 1]
        assert run_jobs([job("bad", factorial, 4)], Units(tmp_path), workers=1) == [24]
        with pytest.raises(UserError, match=r"kappa: got -1.* the same command goes on from there"):
            require_all(results)
        assert require_all(results[1:]) == [1, 1]

    def test_a_defect_is_said_once_the_others_are_done(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"(?s)1 of 4 jobs broke down.*TypeError"):
            run_jobs([job("defect", factorial, "four"), *factorials(3)], Units(tmp_path), workers=1)
        assert len(list(tmp_path.iterdir())) == 3

    def test_jobs_compute_on_one_thread(self):
        before = torch.get_num_threads()
        assert run_jobs([job("threads", torch.get_num_threads)], workers=1) == [1]
        assert torch.get_num_threads() == before

    def test_no_worker_is_refused(self):
        with pytest.raises(UserError, match="--workers: got 0"):
            run_jobs(factorials(), workers=0)


def test_several_processes_and_an_interruption(tmp_path, monkeypatch):
    """One job kills its process, one is refused; the caller is interrupted during the last two."""
    pids, seen = [], []

    def followed(number):
        worker = Worker(number)
        pids.append(worker._process.pid)
        return worker

    def interrupt(*now):
        seen.append(now)
        if now[0] == 8:
            raise KeyboardInterrupt

    jobs = [
        job("killed", signal.raise_signal, signal.SIGKILL),
        job("refused", refuse),
        *factorials(4),
        job("threads", torch.get_num_threads),
        job("process", os.getpid),
    ]
    monkeypatch.setattr("scalelong_fast.analysis.sweep.Worker", followed)
    with pytest.raises(KeyboardInterrupt):
        sleeps = [job(f"sleep {n}", time.sleep, 600) for n in (1, 2)]
        run_jobs([*jobs, *sleeps], Units(tmp_path), interrupt, workers=2)
    assert seen[0] == (0, 10, "killed | refused")
    assert seen[-1][1:] == (10, "sleep 1 | sleep 2")
    assert len(pids) == 3  # one took the place of the process that was killed
    assert not any(_runs(pid) for pid in pids)
    # What is kept is not computed again, here or there; the two that failed are.
    assert len(list(tmp_path.iterdir())) == 6
    again = [job("killed", factorial, 5), job("refused", factorial, 3), *jobs[2:]]
    results = run_jobs(again, Units(tmp_path), workers=1)
    assert results[:7] == [120, 6, 1, 1, 2, 6, 1]
    assert results[7] in pids


def test_no_more_processes_take_the_place_of_dead_ones_than_jobs_wait(monkeypatch):
    started, ended = [], []

    class Dying:
        def __init__(self, number):
            self.number = number
            self.pipe, other = multiprocessing.Pipe()
            other.close()
            started.append(self)

        def give(self, compute):
            pass

        def take(self):
            return "died", "it ended"

        def end(self):
            ended.append(self)

    monkeypatch.setattr("scalelong_fast.analysis.sweep.Worker", Dying)
    assert run_jobs(factorials(3), workers=2) == [Failure(f"{n}!: it ended.") for n in range(3)]
    assert len(started) == 3
    assert sorted(map(id, ended)) == sorted(map(id, started))


SCRIPT = """
import functools, os, sys, time
from pathlib import Path
from scalelong_fast.analysis.sweep import Job, run_jobs
from scalelong_fast.analysis.units import Units

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    quick = [Job({"n": n}, str(n), os.getpid) for n in range(2)]
    slow = [Job({"slow": n}, f"slow {n}", functools.partial(time.sleep, 600)) for n in range(2)]
    run_jobs([*quick, *slow], Units(folder), workers=2)
"""


def test_processes_end_with_a_killed_parent_and_what_they_gave_is_kept(tmp_path):
    script, units = tmp_path / "script.py", tmp_path / "units"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), str(units)], cwd=Path(__file__).parents[2]) as parent:
        try:
            workers = _wait_for(lambda: _values(units) if len(list(units.glob("*.json"))) == 2 else None)
        finally:
            parent.kill()
    assert _wait_for(lambda: not any(_runs(pid) for pid in workers))


def _values(folder):
    return {json.loads(path.read_text())["value"] for path in folder.glob("*.json")}


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that nobody has waited for yet is no more than an entry in the system's table.
    return not Path(f"/proc/{pid}/stat").is_file() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def _wait_for(condition):
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def test_one_process_for_each_gpu_and_each_sees_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert default_workers() == 2
    worker = Worker(3)
    try:
        worker.give(functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES"))
        assert worker.take() == ("value", "7")
        worker.give(functools.partial(factorial, "four"))
        kind, trace = worker.take()
        assert kind == "broken"
        assert "TypeError" in trace
        worker.give(functools.partial(os._exit, 3))
        assert worker.take() == ("died", "its process ended with exit code 3")
        worker.give(functools.partial(factorial, 4))
        assert worker.take()[0] == "died"
        # What a process killed in the middle of its answer leaves in its pipe: a length, and less than so many bytes.
        worker.pipe.close()
        worker.pipe, other = multiprocessing.Pipe()
        os.write(other.fileno(), struct.pack("!i", 100) + b"half of it")
        other.close()
        assert worker.take() == ("died", "its process ended with exit code 3")
    finally:
        worker.end()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"


def test_without_gpus_one_process_for_each_core(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert default_workers() == 3
