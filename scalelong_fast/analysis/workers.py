"""Processes that compute independent jobs, each with one core or one GPU to itself."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any

import torch

from scalelong_fast.errors import UserError

#: Spawned, not forked: a fork would inherit locks of threads that it does not have, and no CUDA.
_SPAWN = multiprocessing.get_context("spawn")


def default_workers() -> int:
    """One process for each GPU; without any, for each core that this process may use."""
    if gpus := visible_gpus():
        return len(gpus)
    usable = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(usable(0)) if usable else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` calls each of the GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(torch.cuda.device_count())] if named is None else named.split(",")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: sums are then the same however many processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def outcome(compute: Callable[[], Any]) -> tuple[str, Any]:
    """How a computation ended: ``value`` and its result, ``refused`` and the message of a :class:`UserError`, or
    ``broken`` and the traceback of another exception."""
    try:
        return "value", compute()
    except UserError as error:
        return "refused", str(error)
    except Exception:
        return "broken", traceback.format_exc()


class Worker:
    """A process that computes what it is given, one after the other.

    Attributes:
        number: its number; of several GPUs it sees the one of that number, counted round.
        pipe: ready to be read when a job is done, or the process has died.
    """

    def __init__(self, number: int):
        self.number = number
        self.pipe, other = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(other,), daemon=True)
        gpus = visible_gpus()
        # The process inherits them: CUDA and the BLAS libraries read them once, early.
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        with _environment(OMP_NUM_THREADS="1", **gpu), _interrupts_blocked():
            self._process.start()
        other.close()  # so that the pipe ends with the process

    def give(self, compute: Callable[[], Any]) -> None:
        """Start a job; ``compute`` must be picklable: a function of a module, or a ``functools.partial`` of one."""
        with suppress(ConnectionError):  # it has died already, as take() will say
            self.pipe.send(compute)

    def take(self) -> tuple[str, Any]:
        """Wait for the job.

        Returns:
            Its :func:`outcome`, or ``died`` and how the process ended.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of its answer
            self._process.join()
            return "died", _ending(self._process.exitcode)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; one that starts inside never hears of it, and the parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where the process ignores it once it is up
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _serve(pipe: connection.Connection) -> None:
    """Compute what comes through the pipe; the body of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(outcome(lambda job=job: pickle.loads(job)()))


def _follow_parent() -> None:
    """End this process when the parent has, even where that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
