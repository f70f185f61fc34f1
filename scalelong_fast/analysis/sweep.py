"""Many independent jobs, shared out over processes, whose results are kept as soon as they are there."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.units import MISSING, Units
from scalelong_fast.analysis.workers import Worker, default_workers, one_thread, outcome
from scalelong_fast.errors import UserError, check_range


@dataclass(frozen=True)
class Job:
    """One result to compute.

    Attributes:
        key: everything that the result depends on, JSON-ready; jobs of equal keys are computed once.
        label: what progress calls it.
        compute: gives the result, JSON-ready. Picklable: a function of a module, or a ``functools.partial`` of one.
    """

    key: dict[str, Any]
    label: str
    compute: Callable[[], Any]


@dataclass(frozen=True)
class Failure:
    """Stands for the result of a job that has none.

    Attributes:
        message: why: that of a :class:`UserError`, or how the job's process was ended.
    """

    message: str


def run_jobs(
    jobs: Sequence[Job], units: Units | None = None, progress: Progress = silent, workers: int | None = None
) -> list[Any]:
    """The result of each job, or its :class:`Failure`.

    Every result is kept in ``units`` at once. Whatever ends this, only the jobs under way are lost, and the same call
    goes on from there. Results do not depend on the number of workers: a job computes on one thread in any case.

    Args:
        jobs: in the order in which they are begun.
        units: keeps the results; a failure is not kept, so that it is tried again next time.
        progress: told when a job begins or ends; jobs already kept count as done.
        workers: processes; 1: the jobs run in this one. Default: one for each GPU, or for each core. With several the
            caller's own module must be importable without starting the work again (``if __name__ == "__main__":``).

    Raises:
        RuntimeError: a job broke down with an exception that is no :class:`UserError`, a defect; after all others.
    """
    units, found = units or Units(), {}
    pending: dict[str, Job] = {}
    names = [json.dumps(json_ready(job.key), sort_keys=True) for job in jobs]
    for name, job in zip(names, jobs, strict=True):
        if name in pending or name in found:
            continue
        value = units.find(job.key)
        if value is MISSING:
            pending[name] = job
        else:
            found[name] = value
    workers = default_workers() if workers is None else workers
    check_range("--workers", workers, low=1, integer=True)
    broken: list[str] = []
    sweep = _Sweep(found, units, progress, broken)
    if min(workers, len(pending)) > 1:
        sweep.share_out(pending, min(workers, len(pending)))
    else:
        sweep.go_through(pending)
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(jobs)} jobs broke down, the first of them so:\n{broken[0]}")
    return [found[name] for name in names]


def require_all(results: Sequence[Any]) -> list[Any]:
    """``results`` of :func:`run_jobs` where an analysis can do without none of them.

    Raises:
        UserError: one is a :class:`Failure`.
    """
    for result in results:
        if isinstance(result, Failure):
            raise UserError(f"{result.message} What was computed is kept: the same command goes on from there.")
    return list(results)


@dataclass
class _Sweep:
    """Results so far, by name of their job."""

    found: dict[str, Any]
    units: Units
    progress: Progress
    broken: list[str]

    def go_through(self, pending: dict[str, Job]) -> None:
        """Compute the jobs here, one after the other."""
        total = len(self.found) + len(pending)
        for name, job in pending.items():
            self.progress(len(self.found), total, job.label)
            with one_thread():
                self._note(name, job, *outcome(job.compute))

    def share_out(self, pending: dict[str, Job], count: int) -> None:
        """Compute the jobs in ``count`` processes."""
        waiting, total = deque(pending.items()), len(self.found) + len(pending)
        running: dict[Worker, tuple[str, Job]] = {}
        idle: list[Worker] = []
        try:
            for number in range(count):
                idle.append(Worker(number))
            while waiting or running:
                while waiting and idle:
                    worker = idle.pop()
                    running[worker] = waiting.popleft()
                    worker.give(running[worker][1].compute)
                self.progress(len(self.found), total, _describe([job.label for _, job in running.values()]))
                pipes = {worker.pipe: worker for worker in running}
                for pipe in connection.wait(list(pipes)):
                    worker = pipes[pipe]
                    name, job = running.pop(worker)
                    kind, answer = worker.take()
                    self._note(name, job, kind, answer)
                    if kind == "died":
                        worker.end()
                        if len(idle) >= len(waiting):  # enough processes are left
                            continue
                        worker = Worker(worker.number)
                    idle.append(worker)
        finally:
            for worker in [*idle, *running]:
                worker.end()

    def _note(self, name: str, job: Job, kind: str, answer: Any) -> None:
        """Take note of how a job ended: an :func:`outcome`, or that its process died."""
        if kind == "value":
            self.units.keep(job.key, answer)
            self.found[name] = answer
            return
        self.found[name] = Failure(f"{job.label}: {answer}." if kind == "died" else answer)
        if kind == "broken":
            self.broken.append(answer)


def _describe(labels: list[str]) -> str:
    return " | ".join(labels) if len(labels) <= 2 else f"{labels[-1]} and {len(labels) - 1} more"
