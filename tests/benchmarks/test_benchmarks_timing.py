"""Timing: statistics, order of the visits, machine description."""

import json
import time
import weakref

import pytest
import torch

from benchmarks import environment
from benchmarks.code import running_code
from benchmarks.timing import (
    MIN_ROUNDS,
    Summary,
    check_seconds,
    described,
    interleave,
    rotate,
    round_speed_up,
    speed_up,
    summarize,
    survivors,
)
from scalelong_fast.errors import UserError

CPU = torch.device("cpu")


class FakeClock:
    """A clock that only the steps move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, seconds):
        def take():
            self.now += seconds

        return take


def test_percentiles():
    assert summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Summary(median=3.5, p20=2.0, p80=5.0)


def test_speed_ups():
    reference, times = [2.0, 4.0, 30.0], [1.0, 1.0, 10.0]
    assert speed_up(reference, times) == 4.0
    assert round_speed_up(reference, times) == 3.0


def test_rounds_must_match():
    with pytest.raises(ValueError, match="zip"):
        round_speed_up([1.0], [1.0, 2.0])


def test_each_round_visits_each_variant_and_reports_seconds_per_step():
    clock, visits = FakeClock(), []
    variants = {name: clock.step(seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = interleave(variants, rounds=4, steps=5, tick=visits.append, clock=clock)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    assert visits == [*"abc", *"bca", *"cab", *"abc"]
    assert clock.now == 4 * (5 + 1) * 7.0, "one untimed step a visit"


def test_no_round_begins_after_the_deadline_but_for_the_first_few():
    late = time.perf_counter() - 1.0
    times = interleave({"a": lambda: None, "b": lambda: None}, rounds=9, steps=1, deadline=late)
    assert {name: len(values) for name, values in times.items()} == {"a": MIN_ROUNDS, "b": MIN_ROUNDS}
    assert len(rotate({"a": lambda: 1.0}, rounds=2, deadline=late)["a"]) == 2
    assert len(rotate({"a": lambda: 1.0}, rounds=9, deadline=late + 100.0)["a"]) == 9


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_budget_is_a_number(seconds):
    check_seconds(0.0)
    check_seconds(float("inf"))
    with pytest.raises(UserError, match="--seconds"):
        check_seconds(seconds)


def test_the_device_is_waited_for_before_the_clock_is_read():
    events = []
    interleave(
        {"a": lambda: events.append("step")},
        rounds=1,
        steps=2,
        wait=lambda: events.append("wait"),
        clock=lambda: events.append("clock") or 0.0,
    )
    assert events == ["step", "wait", "clock", "step", "step", "wait", "clock"]


def test_environment_names_machine_and_versions_and_nobody():
    where = environment.describe(CPU)
    assert where["machine"].startswith("cpu-")
    assert where["machine"] == environment.slug(where["machine"])
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert where["cores"] >= 1
    assert set(where) == {
        *("machine", "device", "cpu_model", "cpu_capability", "cores", "threads", "system"),
        *("python", "torch", "cuda", "scalelong_fast", "date"),
    }
    assert str(environment.ROOT) not in json.dumps(where)


def test_slug():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert environment.slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"


def test_ceilings_are_positive():
    limits = environment.ceilings(CPU, seconds=0.01)
    assert limits["copy_gb_s"] > 0
    assert set(limits["matmul_tflop_s"]) == {"fp32", "bf16"}
    assert all(value > 0 for value in limits["matmul_tflop_s"].values())


def test_source_hash_is_that_of_the_bytes_in_order(tmp_path):
    import hashlib

    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert environment.source_hash(["a", "b"], tmp_path) == hashlib.sha256(b"onetwo").hexdigest()[:12]
    assert environment.source_hash(["b", "a"], tmp_path) == hashlib.sha256(b"twoone").hexdigest()[:12]
    assert environment.source_hash(["a", "missing"], tmp_path) is None


def test_a_comment_changes_no_hash_of_a_python_file_but_its_code_does(tmp_path):
    source = tmp_path / "a.py"
    source.write_text('"""Doc."""\n\n\ndef f(x):\n    # why\n    return x + 1  # more\n')
    first = environment.source_hash(["a.py"], tmp_path)
    source.write_text('def f(x):\n    """Other.\n\n    Doc.\n    """\n    return x + 1\n')
    assert environment.source_hash(["a.py"], tmp_path) == first
    source.write_text("def f(x):\n    return x + 2\n")
    assert environment.source_hash(["a.py"], tmp_path) != first


def test_running_code_keeps_what_strings_hold():
    text = 'x = """é # no comment\n\n  two  \n"""  # a comment\ny = f"{x!r:>{3}} # kept"\n'
    assert running_code(text) == 'x = """é # no comment\n\n  two  \n"""\ny = f"{x!r:>{3}} # kept"\n'


class Held:
    """Something that a failed call holds."""


def test_a_call_that_fails_is_left_out_and_the_others_are_measured_anew():
    held, told, entered = [], [], []

    def call(name):
        thing = Held()
        if name == "b" and len(held) > 0:
            held.append(weakref.ref(thing))
            raise torch.OutOfMemoryError("no room\nsecond line")
        held.append(weakref.ref(thing))
        return 1.0

    def failed(name, error):
        told.append(described(name, error))
        return ["c"]

    def measure(left):
        entered.append([thing() for thing in held])
        return rotate(left, rounds=3)

    calls = {name: lambda name=name: call(name) for name in "abcd"}
    assert survivors(measure, calls, failed) == {"a": [1.0] * 3, "d": [1.0] * 3}
    assert told == ["b: OutOfMemoryError: no room"]
    assert len(entered) == 2
    assert set(entered[1]) == {None}, "what the failed call held is free before the others are measured"


def test_where_every_call_fails_nothing_is_measured():
    told = []

    def failed(name, error):
        told.append(name)
        return ()

    calls = dict.fromkeys("ab", lambda: 1 / 0)
    assert survivors(lambda left: rotate(left, rounds=1), calls, failed) == {}
    assert told == ["a", "b"]


def test_what_measuring_itself_raises_is_no_failed_call():
    with pytest.raises(KeyError):
        survivors(lambda left: {}["missing"], {"a": lambda: 1.0}, lambda *_: ())
