"""The one training loop: for every model and data set, resumable at any moment."""

import contextlib
import copy
import dataclasses
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.data import TrainingSet, open_training_set
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT, build_model
from scalelong_fast.training.allocator import keep_freed_memory
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.checks import (
    check_data,
    check_model,
    check_same_data,
    check_same_options,
    check_same_precision,
    check_same_run,
)
from scalelong_fast.training.config import RunConfig, to_dict
from scalelong_fast.training.files import write_json
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.instruments import Instruments
from scalelong_fast.training.keeping import Keeper
from scalelong_fast.training.metrics import LossWindow, MetricsLog, SilentLog
from scalelong_fast.training.optim import learning_rate
from scalelong_fast.training.outputs import Outputs
from scalelong_fast.training.parallel import check_batch, place
from scalelong_fast.training.posthoc_ema import snapshot_due
from scalelong_fast.training.posthoc_snapshots import Snapshots
from scalelong_fast.training.progress import TrainingProgress
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.run import RunFolder
from scalelong_fast.training.step import TrainStep
from scalelong_fast.training.stop import TAKEN_AWAY, StopVote, stop_signals
from scalelong_fast.training.warmup import needs_warm_up, warm_up

if TYPE_CHECKING:  # as in progress.py
    from rich.console import Console


#: How far a run is: so many numbers to a step, for its parts and for the stages of a checkpoint after it.
_MOMENTS = 100


class Trainer:
    """A run in a folder: starts it, or goes on where it stopped.

    Args:
        config: the run.
        out: its folder.
        name: shown in the loss curve's title.
        console: where messages and progress go.
        ranks: the processes of the run; this one alone by default. Rank 0 speaks and writes.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        name: str = "run",
        console: "Console | None" = None,
        ranks: Ranks | None = None,
    ):
        from rich.console import Console

        self.config, self.name, self.ranks = config, name, ranks or Ranks()
        self.console = console or Console()
        self.console.quiet = self.console.quiet or not self.ranks.is_main
        self.folder = RunFolder(out)
        self.checkpoints = CheckpointFolder(
            self.folder.checkpoints, config.train.keep_checkpoints, self.ranks, background=config.train.async_save
        )

    def say(self, message: str, style: str | None = None) -> None:
        self.console.print(message, style=style, highlight=False, soft_wrap=True, markup=False)

    def run(self) -> int:
        """Train to ``config.train.steps``; returns the step reached (fewer after SIGTERM or Ctrl-C).

        Raises:
            UserError: bad input, a full disk, a run of another model in the folder.
            NonFiniteLossError: the loss became NaN or infinite.
        """
        if self.ranks.is_main:
            self.folder.open_for_writing()
        self.ranks.barrier()
        try:
            with stop_signals() as received:
                self.vote = StopVote(received, self.ranks)
                return self._run()
        except UserError:
            self.folder.remove_if_untouched()
            raise
        except OSError as error:
            raise UserError(
                f"out: writing to {self.folder.path} failed ({error}). Checkpoints written before are untouched. Free "
                "some space or make the folder writable, then run the same command again to go on."
            ) from error
        finally:
            if self.ranks.world == 1:  # a checkpoint is not given up; of several processes, one may be gone
                with contextlib.suppress(UserError, OSError):
                    self.checkpoints.wait()
            self.folder.close()

    def _run(self) -> int:
        config = self.config
        check_same_options(self.ranks.gather(to_dict(config)))
        check_model(config)
        check_batch(config.train, self.ranks)
        with self.ranks.busy():
            dataset = self._open_data()
        check_data(dataset, config)
        facts = {"preset": self.name, "data_fingerprint": dataset.fingerprint()}
        check_same_data(self.ranks.gather(facts["data_fingerprint"]))
        device = self.ranks.device_name(config.train.device)
        execution = resolve_execution(dataclasses.replace(config.train, device=device))
        check_same_precision(self.ranks.gather(str(execution.autocast)))
        schedule = create_schedule(
            config.diffusion.schedule, beta_min=config.diffusion.beta_min, beta_max=config.diffusion.beta_max
        ).to(execution.device)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        whole = copy.deepcopy(model).eval().requires_grad_(False) if self.ranks.is_main else None
        self.model = place(model, config.train, execution.device, self.ranks)
        self.train_step = TrainStep(self.model, schedule, config, execution, self.ranks)
        self.outputs = Outputs(
            self.folder, config, dataset, self.train_step.ema, whole, execution.device, self.ranks, self.vote
        )
        self.window = LossWindow(execution.device, self.ranks)
        self.keeper = Keeper(self.folder, self.checkpoints, self.train_step, self.window, self.outputs, self.ranks)

        with self.ranks.busy():
            step = self._resume(facts)
        if self.ranks.is_main:
            if self.train_step.posthoc.averages:
                self._make_way_for_snapshots(step)
            self.folder.write_config(config, **facts)
            self.folder.requeue.unlink(missing_ok=True)
        if step >= config.train.steps:
            if not self.ranks.broadcast(self.ranks.is_main and self._is_complete(step)):
                self.keeper.save_average()  # a crash may have left the old one or none
                if not self._finish(step):
                    return step
            self.say(f"{self.folder.path} is finished: {step} steps of {config.train.steps}. Nothing to train.")
            return step
        for note in execution.notes:
            self.say(note)
        parameters = sum(p.numel() for p in self.model.parameters())
        kind = "U-ViT" if isinstance(self.model, UViT) else "UNet"
        self.say(
            f"{self.name}: {kind} of {parameters / 1e6:.2f}M parameters, {config.model.num_skips} long skips scaled by "
            f"{config.model.scaling!r}, {len(dataset)} images ({dataset.name}), "
            f"{self.train_step.execution.describe()}"
            f"{self.train_step.parallel.describe()}, in {self.folder.path}"
        )
        if execution.compiled:
            self.say("The first step compiles the model, which can take a minute.")
        with self.ranks.busy():
            batches = BatchSource(dataset, config, execution.device, self.ranks)
        tensorboard = self.folder.tensorboard if config.train.tensorboard else None
        log = MetricsLog(self.folder.metrics_file, step, tensorboard) if self.ranks.is_main else SilentLog()
        instruments = Instruments(
            config,
            self.train_step.execution,
            self.train_step.breakdown,
            self.folder.profile if self.ranks.is_main else None,
            self.ranks.world,
            self.say,
        )
        try:
            with instruments, keep_freed_memory(self.train_step.execution.device):
                reached = self._loop(step, batches, log, instruments)
            self.checkpoints.wait()
        finally:
            batches.close()
            log.close()
        if reached >= config.train.steps:
            self._finish(reached)
        return reached

    def _open_data(self) -> TrainingSet:
        """The data; rank 0 comes first, so that a download is made once."""
        data, model, dropout = self.config.data, self.config.model, self.config.diffusion.label_dropout
        if self.ranks.is_main:
            dataset = open_training_set(data, model, label_dropout=dropout, progress=True)
        self.ranks.barrier()
        if not self.ranks.is_main:
            dataset = open_training_set(data, model, label_dropout=dropout)
        return dataset

    def _loop(self, step: int, batches: BatchSource, log: "MetricsLog | SilentLog", instruments: Instruments) -> int:
        train, breakdown, start = self.config.train, self.train_step.breakdown, step
        stop = self.vote.now()
        if not stop and needs_warm_up(self.train_step):
            with self.ranks.busy():
                warm_up(self.train_step, batches(step))
            stop = self.vote.now()
        if stop:
            self._stopped(step, stop)
            return step
        instruments.start(step)
        with TrainingProgress(self.console, step, train.steps) as progress:
            while step < train.steps:
                self.ranks.beat(_MOMENTS * step)
                with breakdown.part("data"):
                    draw = batches(step)
                self.ranks.beat(_MOMENTS * step + 1)
                with self.ranks.busy() if step == start else contextlib.nullcontext():  # it may compile
                    loss = self.train_step(step, draw)
                instruments.profile.after_step()
                step += 1
                self.window.add(step, loss)
                progress.advance()
                last = step == train.steps
                stop = self.vote()
                if step % train.log_every == 0 or last:
                    partial = step % train.log_every != 0
                    self.window.combine()
                    row = {"step": step, "loss": self.window.mean(), "lr": learning_rate(step - 1, train)}
                    self.keeper.check_loss()
                    row |= instruments.measure(step)
                    row["batch_size"], row["time"] = train.batch_size, time.time()
                    if partial:
                        row["partial"] = True
                    else:
                        self.window.reset()
                    log.write(row)
                    progress.show(row)
                if train.sample_every and step % train.sample_every == 0 and not last:
                    _, grid = self.outputs.draw_grid()
                    if grid is not None:
                        log.image(step, grid)
                if train.ema_profiles and snapshot_due(step, train.ema_snapshot_every, train.steps):
                    self.keeper.check_state(step)
                    self.train_step.posthoc.store(Snapshots(self.folder.posthoc), step, self.ranks)
                if step % train.save_every == 0 or last or stop:
                    log.sync()
                    self.keeper.save(step)
                    if stop and not last:
                        self._stopped(step, stop)
                        break
            self.vote.close()
        return step

    def _stopped(self, step: int, number: int, missing: str = "") -> None:
        """Say that the run stops, once its last checkpoint is on disk; and leave a mark if it was not to."""
        self.checkpoints.wait()
        name = signal.Signals(number).name
        if number in TAKEN_AWAY and self.ranks.is_main:
            write_json(self.folder.requeue, {"step": step, "signal": name})
        if step == 0:
            self.say(f"{name}: stopped before the first step. Run the same command to begin.")
        else:
            self.say(f"{name}: saved step {step}{missing}. Run the same command to go on from there.")

    def _resume(self, facts: dict[str, Any]) -> int:
        self._sample_settings_changed = False
        if self.ranks.is_main:
            self.checkpoints.restore_names()
        self.ranks.barrier()
        self.checkpoints.check_readable()
        if not self.ranks.broadcast(self.checkpoints.steps()):
            return 0
        if self.ranks.is_main:
            old, old_facts = self.folder.read_config()
            check_same_run(self.folder.path, old, old_facts, self.config, facts["data_fingerprint"])
            self._sample_settings_changed = old.sample != self.config.sample
        latest = self.checkpoints.load_latest(lambda line: self.say(line, style="yellow"), self.keeper.state())
        assert latest is not None  # there are some, and load_latest raises if none can be read
        step, state = latest
        self.keeper.restore(state)
        if step < self.config.train.steps:
            self.say(f"Going on from step {step} of {self.config.train.steps} in {self.folder.path}.")
        return step

    def _make_way_for_snapshots(self, step: int) -> None:
        """Take away the snapshots that the run writes anew; but if it begins anew, all of them are kept elsewhere."""
        snapshots = Snapshots(self.folder.posthoc)
        aside = snapshots.set_aside() if step == 0 else None
        if aside is not None:
            self.say(f"There is no checkpoint, but snapshots of averages: they are kept in {aside}.", style="yellow")
        snapshots.discard_after(step)

    def _is_complete(self, step: int) -> bool:
        """Whether a finished run holds all it must."""
        return not self._sample_settings_changed and self.outputs.is_complete(self.checkpoints.file(step))

    def _finish(self, step: int) -> bool:
        """Write what a finished run must hold; returns whether no signal came in between."""
        stop = self.outputs.finish(f"{self.name}, scaling {self.config.model.scaling}")
        if stop:
            self._stopped(step, stop, ", the last one, but did not draw the samples")
            return False
        self.say(
            f"Done: {step} steps. Samples: {self.folder.sample_grid} · loss curve: {self.folder.loss_curve} · model: "
            f"{self.folder.ema}"
        )
        return True
