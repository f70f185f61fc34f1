"""Writing in a thread: told from a stall by what grows, and never given up by a process that is alone."""

import threading
from concurrent.futures import TimeoutError as NotYetError

import pytest

from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.writing import Pulse, Writing


class Beats(Ranks):
    """Notes the beats that would go to the other processes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noted = []

    def beat(self, reached=None):
        self.noted.append(reached)


def test_a_pulse_moves_with_stages_pieces_and_files_that_grow(tmp_path):
    pulse = Pulse()
    seen = [pulse.read()]
    pulse.tick()
    seen.append(pulse.read())
    pulse.passed(tmp_path / "later")  # not there yet
    seen.append(pulse.read())
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "file").write_bytes(b"12345")
    seen.append(pulse.read())
    pulse.passed()
    seen.append(pulse.read())
    assert len(set(seen)) == len(seen)
    assert pulse.read() == seen[-1]
    assert seen[3][2] == 5


def test_waiting_beats_while_files_grow_and_not_while_nothing_happens(tmp_path, monkeypatch):
    """The waits for a second are replaced by steps of the work, so that nothing here depends on time."""
    ranks, go, over = Beats(), threading.Event(), threading.Event()
    file = tmp_path / "file"
    file.touch()

    def work(pulse):
        pulse.passed(tmp_path)
        go.set()
        over.wait()

    writing = Writing(work, ranks)
    go.wait()
    result, polls = writing._future.result, []

    def poll(timeout):
        polls.append(None)
        if len(polls) in (2, 3):
            file.write_bytes(b"1" * len(polls))
        if len(polls) == 6:
            over.set()
            return result()
        raise TimeoutError

    monkeypatch.setattr(writing._future, "result", poll)
    monkeypatch.setattr("scalelong_fast.training.writing.NotYetError", TimeoutError)
    writing.wait()
    assert ranks.noted == [1, 1, 1]  # at first, and each time that the file had grown; then it stalled


def test_errors_come_up_where_it_is_waited_for():
    def work(pulse):
        raise OSError("stale file handle")

    with pytest.raises(OSError, match="stale file handle"):
        Writing(work, Ranks()).wait()


def test_work_that_ends_just_as_a_wait_runs_out_has_succeeded(monkeypatch):
    writing = Writing(lambda pulse: None, Ranks())
    writing._thread.join()
    result = writing._future.result

    def too_late(timeout=None):
        if timeout is not None:
            raise NotYetError
        return result()

    monkeypatch.setattr(writing._future, "result", too_late)
    writing.wait()


def test_a_limit_that_the_work_itself_ran_into_comes_up():
    def work(pulse):
        raise TimeoutError("the file server")

    with pytest.raises(TimeoutError, match="the file server"):
        Writing(work, Ranks()).wait()


@pytest.mark.parametrize(("world", "kept"), [(1, True), (2, False)])
def test_the_interpreter_waits_for_it_where_no_other_process_can_hang(world, kept):
    writing = Writing(lambda pulse: None, Ranks(world=world, control=object()))
    writing.wait()
    assert writing._thread.daemon is not kept
