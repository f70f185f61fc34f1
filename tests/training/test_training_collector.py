"""The garbage collector runs when it is told to, and is afterwards as it was."""

import gc

import pytest

from scalelong_fast.training.collector import QuietCollector


@pytest.fixture(autouse=True)
def _as_before():
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


class Knot:
    """Garbage that only a collector finds."""

    def __init__(self, gone):
        self.itself, self.gone = self, gone

    def __del__(self):
        self.gone.append(1)


def test_garbage_waits_until_it_is_asked_for():
    gone = []
    with QuietCollector() as collector:
        assert not gc.isenabled()
        Knot(gone)
        heap = [[] for _ in range(100_000)]  # many times what would have set it off
        assert heap
        assert not gone
        collector.collect()
        assert gone


def test_what_was_there_before_is_not_looked_at():
    with QuietCollector():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_is_as_before_even_after_an_exception(enabled):
    if not enabled:
        gc.disable()
    with pytest.raises(KeyError), QuietCollector():
        raise KeyError
    assert gc.isenabled() is enabled
    assert gc.get_freeze_count() == 0


def test_objects_that_somebody_else_froze_stay_frozen():
    gc.freeze()
    count = gc.get_freeze_count()
    with QuietCollector():
        pass
    assert gc.get_freeze_count() == pytest.approx(count, abs=1000)
    assert gc.get_freeze_count() > 0


def test_a_failed_run_leaves_it_on(tiny, train, tmp_path, monkeypatch):
    from scalelong_fast.training.step import TrainStep

    def fail(self, step, draw):
        assert not gc.isenabled()
        raise RuntimeError("the step failed")

    monkeypatch.setattr(TrainStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="the step failed"):
        train(tiny(), tmp_path / "run")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
