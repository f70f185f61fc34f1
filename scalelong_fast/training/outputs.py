"""What a run leaves beside its checkpoints: the averaged model, the grid of samples, the loss curve."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalelong_fast.data import TrainingSet
from scalelong_fast.errors import UserError
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.figures import image_grid, save_loss_curve, save_png
from scalelong_fast.training.generate import generate
from scalelong_fast.training.metrics import read_metrics
from scalelong_fast.training.preview import needs_preview, preview
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.run import RunFolder
from scalelong_fast.training.stop import StopVote
from scalelong_fast.training.writing import Pulse


class Outputs:
    """Writes them. Averages may lie on several processes, so that every one must call what draws on them.

    Args:
        folder: the run folder.
        config: the run.
        dataset: what is trained on.
        ema: the averages.
        model: a model on the CPU to put them in; None on ranks that write nothing. It belongs to :meth:`write_average`
            from one :meth:`gather_average` to the next.
        device: where samples are drawn.
        ranks: the processes.
        vote: whether they are to stop.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        dataset: TrainingSet,
        ema: EMA,
        model: nn.Module | None,
        device: torch.device,
        ranks: Ranks,
        vote: StopVote,
    ):
        self.folder, self.config, self.dataset = folder, config, dataset
        self.ema, self.model, self.device = ema, model, device
        self.ranks, self.vote = ranks, vote

    def gather_average(self) -> None:
        """Bring the averaged model together on rank 0; every rank must call it."""
        self.ema.copy_to(self.model)

    def write_average(self, pulse: Pulse) -> None:
        """Write what was gathered; on rank 0 alone, in any thread."""
        assert self.model is not None
        pulse.passed(self.folder.staging(self.folder.ema))
        self.folder.save_ema(self.model)

    def draw_grid(self) -> tuple[int, Any]:
        """Draw and save the grid of samples; every rank must call it, and the others wait for rank 0.

        Returns:
            The signal for which it was given up, or 0; and the grid, on rank 0.
        """
        # A copy: the model on the CPU may be on its way to disk, and the device has other things to hold meanwhile.
        model = None if self.model is None else copy.deepcopy(self.model).to(self.device)
        self.ema.copy_to(model)

        def draw(tick: Callable[[], None]) -> Any:
            assert model is not None
            grid = image_grid(self._images(model, tick), columns=self.config.sample.grid)
            save_png(self.folder.sample_grid, grid)
            return grid

        return self.vote.on_main(draw)

    def _images(self, model: nn.Module, tick: Callable[[], None]) -> Any:
        config = self.config

        def progress(done: int, total: int) -> None:
            tick()

        if needs_preview(self.dataset, config):
            return preview(model, config, self.dataset, progress)
        per_label = config.sample.grid if config.num_labels else config.sample.grid**2
        labels = range(min(config.num_labels, 10)) if config.num_labels else None
        seed = config.train.seed
        return generate(model, config, labels=labels, num_per_label=per_label, seed=seed, progress=progress)[0]

    def is_complete(self, checkpoint: Path) -> bool:
        """Whether all is there and newer than ``checkpoint``; the sample grid is what :meth:`finish` writes last."""
        grid, curve = self.folder.sample_grid, self.folder.loss_curve
        if not (grid.is_file() and curve.is_file()) or grid.stat().st_mtime < checkpoint.stat().st_mtime:
            return False
        try:
            self.folder.load_ema()
        except UserError:
            return False
        return True

    def finish(self, title: str) -> int:
        """Write what a finished run must hold besides the averaged model; every rank must call it.

        Args:
            title: of the loss curve.

        Returns:
            The signal for which the samples were given up, or 0.
        """
        if self.ranks.is_main:
            save_loss_curve(self.folder.loss_curve, read_metrics(self.folder.metrics_file), title)
        return self.draw_grid()[0]
