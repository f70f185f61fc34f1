"""Ending a run of several processes in good order when one of them failed, died or hangs."""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from scalelong_fast.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]

#: Key of the store under which the first process that ends the run says so.
_END = "watch/end"
#: Key under which it is counted how many processes know of it.
_KNOWN = "watch/known"
#: Seconds that a process has to end by itself once another one has ended the run.
_GRACE = 5.0


class RankError(RuntimeError):
    """Another process of the run died or hangs; the message says which and where."""


class NotConnectedError(UserError):
    """Processes that have met cannot talk to each other; perhaps since one has died meanwhile."""


@dataclass
class Sign:
    """What a process says of itself.

    Attributes:
        tick: grows as long as the process lives.
        beats: grows as long as it makes progress.
        reached: how far it has come in what all processes do alike.
        where: what it is at.
    """

    tick: int = 0
    beats: int = 0
    reached: int = 0
    where: str = ""


class Watch:
    """A thread in every process that tells the others of its progress, and looks at theirs.

    Ends the process, with one message for the whole run, when no process has made progress for ``timeout`` seconds or
    when another one has ended the run and this one does not get away by itself: it may be waiting for that one.

    Args:
        store: where the processes leave their signs; used by this thread alone.
        rank, world: this process among the others.
        timeout: in seconds.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.interval = min(1.0, timeout / 10)
        self.beats, self.reached, self.busy = 0, 0, False
        #: What to look at, to be said with the message; and the thread that the main one waits for.
        self.advice, self.follows = "", None
        self._gone: list[int] = []  # who will not be heard of again
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._lock, self._speaking = threading.Lock(), threading.Lock()

    def start(self) -> None:
        self._say(Sign())
        self._thread.start()

    def stop(self) -> None:
        """The work is done."""
        self._stopped.set()
        self._thread.join()

    def beat(self, reached: int | None = None) -> None:
        """The main thread made progress; ``reached`` says how far, in what all processes do alike."""
        self.beats += 1
        self.reached = self.reached if reached is None else reached

    def end_with(self, error: BaseException) -> None:
        """The main thread failed: tell the others, or find out that they are why.

        Raises:
            RankError: the error is the consequence of another process's death.
            SystemExit: another process has said why the run ends; nothing more is to be said here.
        """
        if threading.current_thread() is threading.main_thread():
            # torchrun sends it as soon as one process has died; the run is ending, and there is something to be said.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with self._speaking:  # for ever, if the thread is ending the process
            self._stopped.set()
        self._thread.join(timeout=_GRACE)
        try:
            told = self._told() if _may_come_from_others(error) else None
            if _may_come_from_others(error) and told is None:
                time.sleep(3 * self.interval)  # the one that failed may not have said so yet
                told = self._told()
            if told is None and _may_come_from_others(error):
                dead = self._gone = self._dead()
                if dead:
                    error, cause = RankError(f"{_ranks(dead)} died (no sign of life any more). {_ADVICE}"), error
                    error.__cause__ = cause
            code = _code_of(error)
            if told is None:
                told = self._tell(code, str(error))
        except (RuntimeError, ValueError) as gone:  # the store is in rank 0's process, or in its torchrun
            told = {"rank": -1 if _may_come_from_others(error) else self.rank, "code": 1}
            if self.rank == 1 and _may_come_from_others(error):
                error = RankError(f"rank 0 died, and the meeting point of the processes with it. {_ADVICE}")
                error.__cause__, told = gone, {"rank": 1, "code": 1}
            code = _code_of(error)
        mine = told["rank"] == self.rank
        self._see_off()
        code = code if mine else int(told["code"])
        # What is still waiting for the others, in threads of C++, would keep the interpreter from ending.
        atexit.register(_exit_now, code)
        if not mine:
            raise SystemExit(code)
        raise error

    def _run(self) -> None:
        tick, beats, since = 0, -1, time.monotonic()
        before: dict[int, Sign] = {}
        while not self._stopped.wait(self.interval):
            tick += 1
            self.beats += self.busy
            try:
                self._say(Sign(tick, self.beats, self.reached, self._where()))
                told = self._told()
                now = time.monotonic()
                if told is not None:
                    self._end(told, int(told["code"]))
                if self.beats != beats:
                    beats, since, before = self.beats, now, {}
                elif now - since > self.timeout:
                    signs = self._signs()
                    if any(r in before and before[r].beats != sign.beats for r, sign in signs.items()):
                        before, since = {}, now - self.timeout / 2  # others do go on: it is they who are waited for
                    elif before and now - since > self.timeout + 2 * self.interval:
                        message = self._describe(before, signs)
                        self._end(self._tell(1, message), 1, message)
                    before = before or signs
            except (RuntimeError, ValueError):
                message = f"rank 0 died, and the meeting point of the processes with it. {_ADVICE}"
                self._end({"rank": 1}, 1, message)

    def _describe(self, before: dict[int, Sign], signs: dict[int, Sign]) -> str:
        advice = f"{self.advice} {_ADVICE}" if self.advice else _ADVICE
        dead = [r for r, sign in signs.items() if r in before and sign.tick == before[r].tick and r != self.rank]
        if dead:
            self._gone = dead
            return f"{_ranks(dead)} died or cannot be reached. {advice}"
        # The one that hangs is behind the others, or stands where no other does.
        places: dict[tuple[int, str], list[int]] = {}
        for rank, sign in signs.items():
            places.setdefault((sign.reached, sign.where), []).append(rank)
        least = min(reached for reached, _ in places)
        behind = {place: ranks for place, ranks in places.items() if place[0] == least}
        place, ranks = min(behind.items(), key=lambda item: len(item[1]))
        others = "; ".join(f"{_ranks(found)} at {at}" for (_, at), found in places.items() if found != ranks)
        return (
            f"no progress for {self.timeout:g} s (train.timeout). Probably waited for: {_ranks(ranks)} at {place[1]}"
            f"{f' ({others})' if others else ''}. {advice}"
        )

    def _end(self, told: dict[str, Any], code: int, message: str = "") -> None:
        """End the process: with its message, or once the main thread has had the time to get away by itself."""
        if not message or told["rank"] != self.rank:
            self._stopped.wait(_GRACE)
        with self._speaking:
            if self._stopped.is_set():
                return  # the main thread has found out as well, and says what there is to be said
            if message and told["rank"] == self.rank:
                print(f"scalelong-fast: error: {message}", file=sys.stderr, flush=True)
            self._see_off()
            _exit_now(code)

    def _see_off(self) -> None:
        """Say that this process knows that the run has ended; rank 0, which may keep the store, waits for them."""
        there = self.world - len(self._gone)
        try:
            with self._locked():
                known = self.store.add(_KNOWN, 1)
            # Those that wait for this one take their own time to get away first (:meth:`_end`).
            end = time.monotonic() + 2 * _GRACE + 3 * self.interval
            while self.rank == 0 and known < there and time.monotonic() < end:
                time.sleep(0.05)
                with self._locked():
                    known = self.store.add(_KNOWN, 0)
        except (RuntimeError, ValueError):
            pass  # nobody is there to be told

    def _where(self) -> str:
        """Where the main thread, or the one it waits for, stands: the innermost line of this package."""
        frame: FrameType | None = sys._current_frames().get(self.follows or self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE):
                return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "code outside scalelong_fast"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The store for one thread at a time.

        Raises:
            RuntimeError: the other thread got no answer from it for long; a machine that is lost does not say so.
        """
        if not self._lock.acquire(timeout=_GRACE):
            raise RuntimeError("the meeting point of the processes does not answer")
        try:
            yield
        finally:
            self._lock.release()

    def _say(self, sign: Sign) -> None:
        with self._locked():
            self.store.set(f"watch/{self.rank}", json.dumps(astuple(sign)))

    def _signs(self) -> dict[int, Sign]:
        keys = [f"watch/{rank}" for rank in range(self.world)]
        with self._locked():
            # Some may not have begun; to ask for what is not there would be to wait for it.
            begun = list(range(self.world))
            if not self.store.check(keys):
                begun = [rank for rank in begun if self.store.check([keys[rank]])]
            values = self.store.multi_get([keys[rank] for rank in begun])
        signs = {rank: Sign(where="its start") for rank in range(self.world)}
        return signs | {rank: Sign(*json.loads(value)) for rank, value in zip(begun, values, strict=True)}

    def _dead(self) -> list[int]:
        """The processes of which no sign comes any more."""
        before = self._signs()
        time.sleep(3 * self.interval)
        after = self._signs()
        return [rank for rank in after if after[rank].tick == before[rank].tick and rank != self.rank]

    def _told(self) -> dict[str, Any] | None:
        """What the process that ended the run said."""
        with self._locked():
            return json.loads(self.store.get(_END)) if self.store.check([_END]) else None

    def _tell(self, code: int, message: str) -> dict[str, Any]:
        """Say why the run ends, unless another one has; returns what counts."""
        mine = json.dumps({"rank": self.rank, "code": code, "message": message})
        with self._locked():
            return json.loads(self.store.compare_set(_END, "", mine))


_ADVICE = "Checkpoints written before are untouched. Run the same command again to go on from the last one."


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _may_come_from_others(error: BaseException) -> bool:
    """Whether a lost connection looks like this: torch.distributed raises plain RuntimeErrors of many texts."""
    return type(error) is RuntimeError or isinstance(error, (dist.DistError, NotConnectedError))


def _code_of(error: BaseException) -> int:
    if isinstance(error, UserError):
        return 2
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
