"""One optimiser step: draw, forward, backward, AdamW, EMA. No host-device synchronisation inside."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch._dynamo.exc
from torch import Tensor, nn

from scalelong_fast.data import ImageDataset, ShuffledOrder, to_unit_range
from scalelong_fast.diffusion import NoiseSchedule, diffusion_loss, stratified_uniform
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.optim import create_optimizer, learning_rate

#: What torch.compile raises, at the first forward or the first backward.
_COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

#: Data sets up to this size live on the device.
DEVICE_RESIDENT_BYTES = 4 << 30

#: Which of a step's streams of random numbers dropout draws from; the batch has the one without a number.
_DROPOUT = 1


def step_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of a step's random numbers: a function of the run's seed, the step and the stream, in [0, 2^63)."""
    word = np.random.SeedSequence([seed, step], spawn_key=stream).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed PyTorch's global generator of ``device`` inside, and leave it as it was.

    Dropout draws from that one: it takes no generator. Its state lives on the host, so that nothing waits.
    """
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass
class Draw:
    """Everything random about one step."""

    x0: Tensor  # (B, C, H, W) float32 in [-1, 1]
    labels: Tensor | None  # (B,) int64, the null label where dropped
    noise: Tensor  # like x0
    u: Tensor  # (B,) float32, uniforms that the schedule maps to times


class BatchSource:
    """Draws the batch of any step from (seed, step) alone: nothing to save, nothing to restore."""

    def __init__(self, dataset: ImageDataset, config: RunConfig, device: torch.device):
        self.config, self.device = config, device
        self.order = ShuffledOrder(len(dataset), config.train.batch_size, config.train.seed)
        self.resident = dataset.images.nbytes <= DEVICE_RESIDENT_BYTES
        self.images = dataset.images.to(device) if self.resident else dataset.images
        self.labels = dataset.labels if config.model.num_classes > 0 else None
        if self.labels is not None and self.resident:
            self.labels = self.labels.to(device)
        self.generator = torch.Generator(device)

    def __call__(self, step: int) -> Draw:
        """The batch of the step that follows ``step`` finished ones."""
        config = self.config
        self.generator.manual_seed(step_seed(config.train.seed, step))
        indices = self.order.batch_indices(step)
        if self.resident:
            indices = self._upload(indices)
        images = self.images[indices]
        labels = None if self.labels is None else self.labels[indices]
        if not self.resident:
            images = self._upload(images)
            labels = None if labels is None else self._upload(labels)

        size = images.shape[0]
        flip = self._uniform(size) < 0.5 if config.data.flip else None
        x0 = to_unit_range(images, flip)
        if labels is not None and config.null_label is not None:
            dropped = self._uniform(size) < config.diffusion.label_dropout
            labels = labels.masked_fill(dropped, config.null_label)
        if config.train.compat:
            u = self._uniform(size)
        else:
            u = stratified_uniform(size, generator=self.generator, device=self.device)
        noise = torch.randn(x0.shape, generator=self.generator, device=self.device)
        return Draw(x0, labels, noise, u)

    def _uniform(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.device)

    def _upload(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class TrainStep:
    """The step as one callable; owns optimiser, EMA and gradient scaler of the model.

    Args:
        model: the network, already on ``execution.device``.
        schedule: the noise process.
        config: the run.
        execution: device, precision, compiled or not.
    """

    def __init__(self, model: nn.Module, schedule: NoiseSchedule, config: RunConfig, execution: Execution):
        self.model, self.config, self.execution = model, config, execution
        self.optimizer = create_optimizer(model, config.train)
        self.ema = EMA(model, config.train.ema_decay)
        self.scaler = torch.amp.GradScaler(execution.device.type, enabled=execution.autocast == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

        def loss_fn(x0: Tensor, noise: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
            device, dtype = execution.device.type, execution.autocast
            with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                return diffusion_loss(model, schedule, x0, noise, u, labels)

        self.compiled = execution.compile
        self._eager_loss_fn = loss_fn
        self.loss_fn = torch.compile(loss_fn, fullgraph=True, dynamic=False) if execution.compile else loss_fn

    def __call__(self, step: int, draw: Draw) -> Tensor:
        """Take the update that follows ``step`` finished ones; returns the loss, a 0-dim float32 device tensor."""
        rate = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = self._loss_and_gradients(step, draw)
        except _COMPILE_ERRORS as error:
            # A compiler may be found and yet not work: no Python headers, no space for its cache.
            if not self.compiled:
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"torch.compile failed, going on eagerly: {reason}", stacklevel=2)
            self.compiled, self.loss_fn = False, self._eager_loss_fn
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss_and_gradients(step, draw)
        if self.config.train.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.train.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return loss.detach()

    def _loss_and_gradients(self, step: int, draw: Draw) -> Tensor:
        with self._dropout_seeded(step):
            loss = self.loss_fn(draw.x0, draw.noise, draw.u, draw.labels)
            self.scaler.scale(loss).backward()
        return loss

    def _dropout_seeded(self, step: int) -> AbstractContextManager[None]:
        """Make the dropout inside the model a function of (seed, step), as everything random is."""
        if getattr(self.config.model, "dropout", 0.0) == 0:
            return nullcontext()
        return seeded(self.execution.device, step_seed(self.config.train.seed, step, _DROPOUT))

    def state_dict(self) -> dict:
        """Model, EMA, optimiser and scaler: all that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        options = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # the moments are the checkpoint's, weight decay and betas this run's
        if state["scaler"]:  # empty unless the checkpoint comes from a run in fp16
            self.scaler.load_state_dict(state["scaler"])

    def is_finite(self) -> bool:
        """Whether every parameter, average and moment is finite (waits for the device)."""
        tensors = [*self.parameters, *self.ema.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
        with torch.no_grad():
            norms = torch._foreach_norm([t.detach() for t in tensors], float("inf"))  # a sum of squares might overflow
        return bool(torch.stack([n.double() for n in norms]).isfinite().all())
