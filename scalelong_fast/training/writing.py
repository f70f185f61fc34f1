"""Slow writing in a thread, and whether it goes on."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path

import torch

from scalelong_fast.training.ranks import Ranks


class Pulse:
    """What a thread that writes says of its progress; another one reads it.

    Attributes:
        stage: how many stages of the work are done.
    """

    def __init__(self) -> None:
        self.stage = 0
        self._ticks = 0
        self._folder: Path | None = None

    def tick(self) -> None:
        """A piece of work is done."""
        self._ticks += 1

    def passed(self, folder: Path | None = None) -> None:
        """A stage is done; in the next one, files grow in ``folder``."""
        self.stage += 1
        self._folder = folder

    def read(self) -> tuple[int, int, int]:
        """Numbers of which one changes as long as the work goes on: stages, pieces, bytes of the files that grow."""
        return self.stage, self._ticks, self._size()

    def _size(self) -> int:
        folder, size = self._folder, 0
        if folder is None:
            return size
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    size += entry.stat().st_size
        except OSError:
            pass  # not there yet, or a file of it no longer
        return size


class Writing:
    """``work`` in a thread.

    Args:
        work: called with the pulse that it is to keep up.
        ranks: the processes. The interpreter waits for the thread before it ends, but not where other processes, which
            may hang, take part.
    """

    def __init__(self, work: Callable[[Pulse], None], ranks: Ranks):
        self.ranks, self.pulse = ranks, Pulse()
        self._future: Future[None] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def write() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a thread begins on the first one, where others have their memory
                self._future.set_result(work(self.pulse))
            except BaseException as error:  # handed over to wait()
                self._future.set_exception(error)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=ranks.world > 1)
        self._thread.start()

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Wait until the work is done, and tell the other processes of progress as long as there is any.

        Raises:
            Exception: what the work raised.
        """
        before, seen = self.ranks.reached, None
        with self.ranks.waiting_for(self._thread):
            while True:
                try:
                    return self._future.result(timeout=1.0)
                except NotYetError:
                    if self._future.done():  # at this very moment, or the work itself ran into a limit
                        return self._future.result()
                now = self.pulse.read()
                if now != seen:
                    self.ranks.beat(before + now[0])
                    seen = now
