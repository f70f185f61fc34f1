"""One optimiser step: forward, backward, AdamW, EMA. No host-device synchronisation inside."""

import dataclasses
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._dynamo.exc
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from scalelong_fast.diffusion import NoiseSchedule
from scalelong_fast.errors import UserError
from scalelong_fast.training.batches import Draw
from scalelong_fast.training.breakdown import Breakdown
from scalelong_fast.training.compiling import choose_mode, compile_objective, make_eager
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.objective import DenoisingObjective
from scalelong_fast.training.optim import create_optimizer, learning_rate, optimizer_state
from scalelong_fast.training.parallel import Parallel, strategy
from scalelong_fast.training.posthoc_ema import PostHocEMA
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.recompute import set_recomputation
from scalelong_fast.training.seeds import seeded, step_seed
from scalelong_fast.training.shares import local

#: What torch.compile raises, at the first forward or the first backward.
_COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

#: Which of a step's streams of random numbers dropout draws from; the batch has the one without a number.
_DROPOUT = 1


class TrainStep:
    """The step as one callable; owns optimiser, EMA and gradient scaler of the model.

    Args:
        model: the network where :func:`~.parallel.place` put it.
        schedule: the noise process.
        config: the run.
        execution: device, precision, compiled or not.
        ranks: the processes that share the step; this one alone by default.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: RunConfig,
        execution: Execution,
        ranks: Ranks | None = None,
    ):
        self.model, self.config, self.ranks = model, config, ranks or Ranks()
        self.breakdown = Breakdown(execution.device)
        # Recomputation: changes the model in place, before anything looks at it.
        set_recomputation(model, config.train.recompute)
        objective = DenoisingObjective(model, schedule, execution.autocast)
        # Compilation: of the blocks in place, or of the whole objective.
        kind = strategy(config.train, self.ranks)
        mode = choose_mode(execution.mode, model, sharded=kind in ("fsdp", "hsdp"), several=kind != "none")
        self.execution = dataclasses.replace(execution, mode=mode)
        self._eager_loss_fn = objective
        loss_fn = compile_objective(objective, self.execution.mode)
        # Several processes: FSDP cuts the parameters up in place, so that optimiser and average come after it.
        self.parallel = Parallel(loss_fn, model, config.train, execution, self.ranks)
        self.loss_fn = self.parallel.loss_fn

        self.optimizer = create_optimizer(model, config.train)
        self.ema = EMA(model, config.train.ema_decay)
        self.posthoc = PostHocEMA(model, config.train.ema_profiles)
        self.scaler = torch.amp.GradScaler(execution.device.type, enabled=execution.autocast == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, step: int, draw: Draw) -> Tensor:
        """Take the update that follows ``step`` finished ones.

        Args:
            step: number of finished updates.
            draw: this process's part of the batch.

        Returns:
            Mean loss of that part, a 0-dim float32 device tensor.
        """
        rate = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.execution.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with self.breakdown.part("gradients"):
            loss = self._loss_and_gradients_even_if_not_compiled(step, draw)
            if self.execution.mode == "graphs":
                loss = loss.clone()  # it lies in the graphs' memory, which the next replay writes to
        with self.breakdown.part("update"):
            self._update()
            self.posthoc.update(step + 1)
        return loss

    def _loss_and_gradients_even_if_not_compiled(self, step: int, draw: Draw) -> Tensor:
        try:
            return self._loss_and_gradients(step, draw)
        except _COMPILE_ERRORS as error:
            # A compiler may be found and yet not work: no Python headers, no space for its cache.
            if not self.execution.compiled:
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if self.ranks.several:  # they would have to agree, in the middle of an exchange
                raise UserError(f"train.compile: torch.compile failed ({reason}). Set --train.compile off.") from error
            warnings.warn(f"torch.compile failed, going on eagerly: {reason}", stacklevel=2)
            make_eager(self.model)
            self.execution, self.loss_fn = dataclasses.replace(self.execution, mode="off"), self._eager_loss_fn
            self.optimizer.zero_grad(set_to_none=True)
            return self._loss_and_gradients(step, draw)

    def _loss_and_gradients(self, step: int, draw: Draw) -> Tensor:
        parts = draw.split(self.config.train.accumulate)
        total = None
        for micro, part in enumerate(parts):
            with self.parallel.micro_batch(last=micro + 1 == len(parts)), self._dropout_seeded(step, micro):
                loss = self.loss_fn(part.x0, part.noise, part.u, part.labels)
                if len(parts) > 1:
                    loss = loss / len(parts)
                self.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _update(self) -> None:
        """Clipping, AdamW and the average, from the gradients that are there."""
        if self.config.train.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.train.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()

    def _dropout_seeded(self, step: int, micro: int) -> AbstractContextManager[None]:
        """Make the dropout inside the model a function of (seed, step, rank, part), as everything random is."""
        if getattr(self.config.model, "dropout", 0.0) == 0:
            return nullcontext()
        alone = not self.ranks.several and self.config.train.accumulate == 1
        stream = (_DROPOUT,) if alone else (_DROPOUT, self.ranks.rank, micro)
        return seeded(self.execution.device, step_seed(self.config.train.seed, step, *stream))

    def state_dict(self) -> dict:
        """Model, averages, optimiser and scaler: all that the next step depends on; tensors are no copies.

        Every tensor has the name of its parameter. Those of FSDP are DTensors, of which each process has its share. The
        moments of an optimiser that has not taken a step yet are there as zeros, to be loaded into.
        """
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer)["state"],
            "scaler": self.scaler.state_dict(),
            **({"posthoc": self.posthoc.state_dict()} if self.posthoc.averages else {}),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned, here or on another number of processes."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.posthoc.load_state_dict(state.get("posthoc", {}))
        options = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        groups = optimizer_state(self.model, self.optimizer)["param_groups"]
        moments = {"state": state["optimizer"], "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizer, moments)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # the moments are the checkpoint's, weight decay and betas this run's
        if state["scaler"]:  # empty unless the checkpoint comes from a run in fp16
            self.scaler.load_state_dict(state["scaler"])

    def is_finite(self) -> bool:
        """Whether every parameter, average and moment is finite, on every process (waits for the device)."""
        averages = [self.ema, *self.posthoc.averages.values()]
        tensors = [*self.parameters, *(tensor for average in averages for tensor in average.state_dict().values())]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
        with torch.no_grad():
            shares = [share for tensor in tensors if (share := local(tensor)).numel() > 0]
            norms = torch._foreach_norm(shares, float("inf"))  # a sum of squares might overflow
        return not self.ranks.any(not torch.stack([n.double() for n in norms]).isfinite().all())
