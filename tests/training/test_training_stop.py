"""Signals at any moment of a run of one process: nothing is lost, and the run can go on."""

import json
import os
import signal

import pytest

import scalelong_fast.training.loop as loop
import scalelong_fast.training.outputs as outputs
from scalelong_fast.training import RunFolder

FOUR = {"train.steps": 4, "train.save_every": 2}


def sends(function, *numbers, at=1):
    """``function``, which sends this process signals when it is called for the ``at``-th time."""
    calls = []

    def sending(*args, **options):
        calls.append(None)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **options)

    return sending


@pytest.fixture(scope="module")
def whole(tiny, train, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(tiny(FOUR), out)
    return out


def marks(out):
    file = RunFolder(out).requeue
    return json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_while_the_data_are_opened(tiny, train, tmp_path, monkeypatch, number):
    monkeypatch.setattr(loop, "open_training_set", sends(loop.open_training_set, number))
    reached, said = train(tiny(FOUR), tmp_path / "run")
    assert reached == 0
    name = signal.Signals(number).name
    assert f"{name}: stopped before the first step. Run the same command to begin." in said
    assert marks(tmp_path / "run") == (None if number == signal.SIGINT else {"step": 0, "signal": name})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_while_the_step_is_compiled(tiny, train, tmp_path, monkeypatch):
    train(tiny({**FOUR, "train.steps": 2}), tmp_path)
    monkeypatch.setattr(loop, "needs_warm_up", lambda step: True)
    monkeypatch.setattr(loop, "warm_up", sends(loop.warm_up, signal.SIGTERM))
    reached, said = train(tiny(FOUR), tmp_path)
    assert reached == 2
    assert "SIGTERM: saved step 2. Run the same command to go on from there." in said
    assert marks(tmp_path) == {"step": 2, "signal": "SIGTERM"}
    monkeypatch.undo()
    assert train(tiny(FOUR), tmp_path)[0] == 4
    assert marks(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_the_last_samples_are_drawn(tiny, train, tmp_path, monkeypatch, whole, last_state, assert_same, number):
    config, out = tiny({**FOUR, "sample.steps": 3}), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "generate", sends(outputs.generate, number))
        drawn = []
        patch.setattr(outputs, "save_png", lambda *args: drawn.append(args))
        reached, said = train(config, out)
    assert reached == 4
    assert not drawn
    name = signal.Signals(number).name
    assert f"{name}: saved step 4, the last one, but did not draw the samples. Run the same command" in said
    assert "Done" not in said
    assert marks(out) == ({"step": 4, "signal": name} if number == signal.SIGTERM else None)
    assert_same(last_state(out), last_state(whole))
    assert (out / "ema" / "model.safetensors").read_bytes() == (whole / "ema" / "model.safetensors").read_bytes()

    reached, said = train(config, out)
    assert "Done: 4 steps." in said
    assert (out / "samples.png").exists()
    assert marks(out) is None


def test_while_samples_are_drawn_on_the_way(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "generate", sends(outputs.generate, signal.SIGTERM))
    reached, said = train(tiny({**FOUR, "train.sample_every": 2, "train.save_every": 100}), tmp_path)
    assert reached == 3  # the step under way, as ever
    assert "SIGTERM: saved step 3." in said
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_and_then_a_scheduler(tiny, train, tmp_path, monkeypatch, second):
    call = loop.BatchSource.__call__
    monkeypatch.setattr(loop.BatchSource, "__call__", sends(call, signal.SIGINT, second, at=2))
    reached, said = train(tiny(FOUR), tmp_path)
    assert reached == 2
    assert marks(tmp_path) == {"step": 2, "signal": signal.Signals(second).name}
    assert f"{signal.Signals(second).name}: saved step 2." in said


def test_the_handlers_are_those_of_before_once_a_run_has_ended(tiny, train, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    train(tiny({"train.steps": 1}), tmp_path)
    assert [signal.getsignal(number) for number in numbers] == before
