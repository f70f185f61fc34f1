"""Metrics of a run: JSON lines, TensorBoard, and the window of steps that a line averages over."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong_fast.training.files import write_atomically
from scalelong_fast.training.ranks import Ranks


class LossWindow:
    """Mean loss since the last log, and the first non-finite step, both on the device.

    Reading is the only place where the host waits. The state travels in checkpoints, so that the lines written after
    a resume equal those of an uninterrupted run.

    Args:
        device: where losses come from.
        ranks: the processes whose losses are averaged; this one alone by default.
    """

    def __init__(self, device: torch.device, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        # Sums: of this process since the last combine(), and of all processes before. A sum of float32 losses of any
        # usual number and size is exact in float64, so that it does not matter when they are combined.
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.shared = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.count = 0

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of ``step``, a 0-dim device tensor; queues work and returns."""
        self.total += loss
        self.count += 1
        newly_bad = (self.first_bad < 0) & ~torch.isfinite(loss)
        self.first_bad.masked_fill_(newly_bad, step)

    def combine(self) -> None:
        """Take in the other ranks' losses: mean and first non-finite step become those of all, the same on every rank.

        Queues work and returns. To be done before reading and before saving, it may be done at any other time as well.
        """
        ranks = self.ranks
        if ranks.several:
            self.shared += ranks.sum(self.total)
            self.total.zero_()
            never = torch.iinfo(torch.int64).max
            earliest = ranks.least(torch.where(self.first_bad < 0, never, self.first_bad))
            self.first_bad.copy_(torch.where(earliest == never, -1, earliest))

    def first_bad_step(self) -> int | None:
        """First step with a non-finite loss, or None (waits for the device)."""
        step = int(self.first_bad)
        return None if step < 0 else step

    def mean(self) -> float:
        """Mean loss of the window (waits for the device)."""
        return float(self.shared + self.total) / max(self.count * self.ranks.world, 1)

    def reset(self) -> None:
        self.total.zero_()
        self.shared.zero_()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.shared + self.total, "count": self.count, "world": self.ranks.world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.count = state["count"]
        kept = self.shared if self.ranks.several else self.total
        kept.copy_(state["total"])
        world = state.get("world", 1)  # earlier versions stored the mean over the processes
        if world != self.ranks.world:
            kept *= self.ranks.world / world


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a torn last line (the process was killed) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


#: What of a row is no curve over the steps.
_NOT_PLOTTED = {"step", "time", "batch_size", "partial"}


class SilentLog:
    """Stands in for :class:`MetricsLog` on ranks that write nothing."""

    def write(self, row: dict[str, Any]) -> None: ...
    def image(self, step: int, grid: Any) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and TensorBoard.

    Args:
        path: the JSON-lines file.
        step: rows after this step are cut, as are rows of windows that a finished shorter run had closed early.
        tensorboard: folder for event files, or None.
    """

    def __init__(self, path: Path, step: int, tensorboard: Path | None = None):
        rows = [row for row in read_metrics(path) if row["step"] <= step and not row.get("partial")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(path, lambda file: file.write(text.encode()))
        self.rows = rows
        self._file = open(path, "a")  # noqa: SIM115 - lives as long as the run
        self._writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is on its way to disk when this returns."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key in row.keys() - _NOT_PLOTTED:
                self._writer.add_scalar(key, row[key], row["step"])

    def image(self, step: int, grid: Any) -> None:
        """Add an (H, W, C) uint8 picture to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image("samples", grid, step, dataformats="HWC")

    def sync(self) -> None:
        """Force the rows to disk: a checkpoint must never be newer than its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            if self._writer is not None:
                self._writer.close()
