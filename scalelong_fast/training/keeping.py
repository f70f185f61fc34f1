"""What a run keeps: checkpoints and averaged models, and of those only sound ones."""

import warnings
from typing import Any

from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.metrics import LossWindow
from scalelong_fast.training.outputs import Outputs
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.run import RunFolder
from scalelong_fast.training.step import TrainStep
from scalelong_fast.training.writing import Pulse


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message says when, what is safe and what to try."""


class Keeper:
    """Saves the state of a run, and refuses to save a broken one; every process must call every method.

    Args:
        folder: the run folder.
        checkpoints: in it.
        train_step, window: the state.
        outputs: the averaged model.
        ranks: the processes.
    """

    def __init__(
        self,
        folder: RunFolder,
        checkpoints: CheckpointFolder,
        train_step: TrainStep,
        window: LossWindow,
        outputs: Outputs,
        ranks: Ranks,
    ):
        self.folder, self.checkpoints, self.train_step = folder, checkpoints, train_step
        self.window, self.outputs, self.ranks = window, outputs, ranks

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds; tensors are no copies."""
        return {"train": self.train_step.state_dict(), "window": self.window.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.train_step.load_state_dict(state["train"])
        self.window.load_state_dict(state["window"])

    def save(self, step: int) -> None:
        """Save a checkpoint and the averaged model.

        Where the save before this one failed in the background, this one is waited for: a disk that was full for a
        while costs a checkpoint and no more.

        Raises:
            NonFiniteLossError: the state is broken; nothing was saved.
            UserError, OSError: it could not be written.
        """
        self.check_state(step)
        failed = None
        try:
            self.checkpoints.wait()  # the average before this one may be on its way to disk
        except (UserError, OSError) as error:  # all processes are told of it
            failed = error
        self.outputs.gather_average()
        self.checkpoints.save(step, self.state(), then=self.outputs.write_average)
        if failed is not None:
            self.checkpoints.wait()
            if self.ranks.is_main:
                warnings.warn(
                    f"the save before that of step {step} failed ({failed}); this one is written", stacklevel=2
                )

    def save_average(self) -> None:
        """Write the averaged model alone."""
        self.outputs.gather_average()
        if self.ranks.is_main:
            with self.ranks.busy():
                self.outputs.write_average(Pulse())

    def check_loss(self) -> None:
        """Raise :class:`NonFiniteLossError` if a loss of the window was NaN or infinite (waits for the device)."""
        bad = self.window.first_bad_step()
        if bad is None:
            return
        self.checkpoints.wait()
        good = self.checkpoints.steps()
        safe = f"The last good checkpoint is step {good[-1]}" if good else "There was no checkpoint yet"
        raise NonFiniteLossError(
            f"The loss became NaN or infinite at step {bad}. {safe} in {self.folder.path}; nothing was saved since. "
            "Try a smaller --train.lr, a longer --train.warmup-steps, --train.grad-clip 1, --train.precision fp32 or "
            "a smaller --model.kappa."
        )

    def check_state(self, step: int) -> None:
        """Raise :class:`NonFiniteLossError` if loss or state are not finite after ``step`` (waits for the device)."""
        self.window.combine()
        self.check_loss()
        if not self.train_step.is_finite():
            self.window.first_bad.fill_(step)  # the gradient overflowed although the loss had not
            self.check_loss()
