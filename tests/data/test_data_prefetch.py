"""Reading ahead changes nothing but when; errors arrive where they belong."""

import threading
import time

import pytest
import torch

from scalelong_fast.data.prefetch import Prefetcher
from scalelong_fast.data.training_set import HostBatch
from scalelong_fast.errors import UserError

CPU = torch.device("cpu")


class Reader:
    """Batches that hold their step; notes what was read, and in which thread."""

    def __init__(self, fails_at=None, error=None):
        self.steps, self.threads, self.fails_at, self.error = [], set(), fails_at, error

    def __call__(self, step):
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise self.error
        return HostBatch(images=torch.full((2, 1, 1, 1), step, dtype=torch.uint8))


def value(batch):
    return int(batch.images[0])


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_step_gets_its_batch(depth):
    prefetch = Prefetcher(Reader(), CPU, depth)
    assert [value(prefetch(step)) for step in range(20)] == list(range(20))
    prefetch.close()


def test_it_reads_ahead_in_one_other_thread_and_each_step_once():
    reader = Reader()
    prefetch = Prefetcher(reader, CPU, depth=2)
    prefetch(0)
    wait_for(lambda: len(reader.steps) == 3)
    prefetch(1)
    wait_for(lambda: len(reader.steps) == 4)
    prefetch.close()
    assert reader.steps == [0, 1, 2, 3]
    assert len(reader.threads) == 1
    assert threading.current_thread().name not in reader.threads


def test_without_depth_the_callers_thread_reads():
    reader = Reader()
    prefetch = Prefetcher(reader, CPU, depth=0)
    prefetch(4)
    assert reader.steps == [4]
    assert reader.threads == {threading.current_thread().name}
    prefetch.close()


def test_any_other_step_may_be_asked_for():
    prefetch = Prefetcher(Reader(), CPU, depth=2)
    assert [value(prefetch(step)) for step in (5, 6, 2, 3, 100, 8, 8, 9)] == [5, 6, 2, 3, 100, 8, 8, 9]
    prefetch.close()


def test_an_error_is_raised_for_the_step_that_needs_it():
    prefetch = Prefetcher(Reader(fails_at=2, error=UserError("shard-00007 is missing")), CPU, depth=3)
    assert [value(prefetch(step)) for step in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="shard-00007 is missing"):
        prefetch(2)
    assert value(prefetch(3)) == 3
    prefetch.close()


def test_a_disk_that_fails_names_the_step():
    prefetch = Prefetcher(Reader(fails_at=1, error=OSError(5, "Input/output error")), CPU, depth=1)
    prefetch(0)
    with pytest.raises(UserError, match=r"samples of step 1 failed .*Input/output error.*Checkpoints are untouched"):
        prefetch(1)
    prefetch.close()


def test_closing_ends_the_thread():
    before = set(threading.enumerate())  # other tests may have left theirs waiting
    prefetch = Prefetcher(Reader(), CPU, depth=2)
    prefetch(0)
    assert any(thread.name.startswith("prefetch") for thread in set(threading.enumerate()) - before)
    prefetch.close()
    wait_for(lambda: set(threading.enumerate()) <= before)


def test_a_depth_below_0_is_refused():
    with pytest.raises(UserError, match="depth"):
        Prefetcher(Reader(), CPU, depth=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_arrive_whole_on_a_gpu_that_is_busy():
    device = torch.device("cuda")

    def read(step):
        return HostBatch(images=torch.full((64, 3, 64, 64), step % 256, dtype=torch.uint8))

    prefetch = Prefetcher(read, device, depth=2)
    work = torch.randn(2048, 2048, device=device)
    sums = []
    for step in range(100):
        batch = prefetch(step)
        assert batch.images.device.type == "cuda"
        work = (work @ work).tanh()
        sums.append((batch.images.float() - step % 256).abs().sum())
        del batch
    assert torch.stack(sums).sum() == 0
    prefetch.close()
