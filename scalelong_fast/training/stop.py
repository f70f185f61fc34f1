"""Stopping a run in good order: signals, and the moment at which all processes stop."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scalelong_fast.training.ranks import Ranks

T = TypeVar("T")

#: Signals by which a scheduler takes a machine away: the run is to be started again.
TAKEN_AWAY = (signal.SIGTERM, signal.SIGUSR1)
#: Seconds within which a second Ctrl-C does not count: torchrun passes on the one that the terminal has sent already.
_ECHO = 2.0
#: Larger than any signal: rank 0 has done what the others waited for.
_DONE = 1 << 10


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C in a list instead of dying; a second Ctrl-C interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    first = 0.0
    echo = _ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handler(number: int, frame: Any) -> None:
        nonlocal first
        if number == signal.SIGINT and received and time.monotonic() - first >= echo:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (*TAKEN_AWAY, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, old in before.items():
            # None: a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if old is None else old)


class _GivenUpError(Exception):
    """A signal came while rank 0 worked and the others waited."""


class StopVote:
    """Agrees on the moment at which all processes stop.

    After a step, what a process has received is put to the vote without waiting for a device: over the network of the
    hosts, and the result read after the next step; by then it has long arrived. A run of one process stops at once.

    Args:
        received: signals of this process, collected by :func:`stop_signals`.
        ranks: the processes.
    """

    def __init__(self, received: list[int], ranks: Ranks):
        self.received, self.ranks = received, ranks
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self) -> int:
        """The signal to stop for after this step, 0 to go on; every process must ask after every step."""
        if not self.ranks.several:
            return self._mine()
        agreed = 0
        if self._vote is not None:
            flag, work = self._vote
            work.wait()
            agreed = int(flag)
        self._vote = self._cast(self._mine())
        return agreed

    def now(self, mine: int | None = None) -> int:
        """The signal to stop for, agreed on at once; every process must ask, and waits for the others.

        Args:
            mine: what this process votes for; default: what it has received.
        """
        mine = self._mine() if mine is None else mine
        if not self.ranks.several:
            return mine
        flag, work = self._cast(mine)
        work.wait()
        self.ranks.beat()
        return int(flag)

    def on_main(self, work: Callable[[Callable[[], None]], T]) -> tuple[int, T | None]:
        """Let rank 0 work for a long time while the others wait; given up when any of them has received a signal.

        Args:
            work: called on rank 0 with a function that it must call now and then.

        Returns:
            The signal it was given up for, the same on all ranks, or 0; and the work's result on rank 0.
        """
        agreed = 0
        if not self.ranks.is_main:
            while not agreed:
                agreed = self.now()
            return agreed % _DONE, None

        def tick() -> None:
            nonlocal agreed
            self.ranks.beat()
            agreed = self.now()
            if agreed:
                raise _GivenUpError

        try:
            result = work(tick)
        except _GivenUpError:
            return agreed, None
        self.now(_DONE)
        return 0, result

    def close(self) -> None:
        """Take part in the vote that is under way, so that nobody is left waiting."""
        if self._vote is not None:
            self._vote[1].wait()
            self._vote = None

    def _mine(self) -> int:
        # The larger number wins, here and among the processes: SIGTERM or SIGUSR1 over Ctrl-C.
        return max(self.received, default=0)

    def _cast(self, mine: int) -> "tuple[torch.Tensor, dist.Work]":
        flag = torch.tensor(mine, dtype=torch.int32)
        return flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True)
