"""What processes tell each other through the store, looked at in one process."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

import scalelong_fast.training.watch as watch_module
from scalelong_fast.errors import UserError
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.ranks import Ranks, connect
from scalelong_fast.training.watch import Sign, Watch
from scalelong_fast.training.writing import Writing


@pytest.fixture
def store():
    return dist.HashStore()


def test_processes_that_have_not_begun_are_not_waited_for(store):
    store.set_timeout(timedelta(days=1))
    watch = Watch(store, 1, 3, timeout=600.0)
    watch._say(Sign(5, 3, 1, "here"))
    assert watch._signs() == {0: Sign(where="its start"), 1: Sign(5, 3, 1, "here"), 2: Sign(where="its start")}


def test_a_store_that_does_not_answer_the_thread_does_not_hold_up_the_end(store, monkeypatch):
    """The machine of rank 0 is lost: calls that are under way hang until TCP gives up."""
    monkeypatch.setattr(watch_module, "_GRACE", 0.05)
    monkeypatch.setattr("atexit.register", lambda *args: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    watch = Watch(store, 1, 2, timeout=600.0)
    watch._thread = threading.Thread(target=lambda: None)
    watch._thread.start()
    watch._lock.acquire()
    with pytest.raises(watch_module.RankError, match="rank 0 died, and the meeting point of the processes with it"):
        watch.end_with(RuntimeError("connection reset by peer"))


def test_what_is_said_once_is_not_said_twice(store, monkeypatch, capsys):
    """Both threads find out at the same time that rank 0 is gone."""
    ended = []
    monkeypatch.setattr(watch_module, "_exit_now", ended.append)
    watch = Watch(store, 1, 2, timeout=600.0)
    watch._stopped.set()  # as end_with does first of all
    watch._end({"rank": 1}, 1, "rank 0 died")
    assert ended == []
    assert capsys.readouterr().err == ""


def test_where_a_process_stands_is_where_the_thread_stands_that_it_waits_for(store):
    ranks = Ranks(watch=Watch(store, 0, 1, timeout=600.0))
    begun, go = threading.Event(), threading.Event()
    writing = Writing(lambda pulse: begun.set() or go.wait(), Ranks())
    begun.wait()
    with ranks.waiting_for(writing._thread):
        where = ranks.watch._where()
    go.set()
    writing.wait()
    assert where.startswith("scalelong_fast/training/writing.py:")
    assert ranks.watch._where().startswith("scalelong_fast/training/watch.py:")  # where this thread asks


class TestConnect:
    @pytest.fixture
    def attempt(self, monkeypatch):
        """``attempt(n)``: torchrun's environment for one process; the store stays when it is started again."""
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**values, "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
            monkeypatch.setenv(name, str(value))
        yield lambda number: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        del server  # until now it has answered

    def test_a_restart_by_torchrun_does_not_hear_what_ended_the_run_before(self, attempt):
        train = TrainConfig(device="cpu", timeout=20.0)
        attempt(0)
        with connect(train) as ranks:
            ranks.watch._tell(1, "out of memory")
            assert ranks.watch._told() is not None
        attempt(1)
        with connect(train) as ranks:
            assert ranks.watch._told() is None
            assert ranks.gather("here") == ["here"]

    def test_processes_that_cannot_be_connected(self, attempt, monkeypatch):
        def unreachable(*args, **options):
            raise RuntimeError("connect: no route to host")

        monkeypatch.setattr(dist, "new_group", unreachable)
        expected = r"^RANK 0: .*no route to host.*GLOO_SOCKET_IFNAME"
        with pytest.raises(UserError, match=expected) as caught, connect(TrainConfig(device="cpu", timeout=20.0)):
            pytest.fail("not reached")
        assert isinstance(caught.value, watch_module.NotConnectedError)
        assert not dist.is_initialized()
        assert not [thread for thread in threading.enumerate() if thread.name == "watch"]

    def test_the_watch_looks_on_while_the_groups_are_formed(self, attempt, monkeypatch):
        seen, form = [], dist.new_group

        def looked_at(*args, **options):
            seen.extend(thread for thread in threading.enumerate() if thread.name == "watch")
            return form(*args, **options)

        monkeypatch.setattr(dist, "new_group", looked_at)
        with connect(TrainConfig(device="cpu", timeout=20.0)) as ranks:
            assert len(seen) == 2
            assert ranks.watch.advice == ""
