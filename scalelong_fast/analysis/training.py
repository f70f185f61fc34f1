"""Networks trained for an analysis, and watched while they are."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalelong_fast.data import TrainingSet, list_training_sets, open_training_set
from scalelong_fast.diffusion import NoiseSchedule, create_schedule
from scalelong_fast.errors import UserError, check_range, invalid, unknown_name
from scalelong_fast.models import UNet, UViT, UViTConfig, build_model
from scalelong_fast.scaling import resolve_scaling
from scalelong_fast.training import RunConfig, get_preset
from scalelong_fast.training.batches import BatchSource, Draw
from scalelong_fast.training.checks import check_data, check_model
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.step import TrainStep


class DivergedError(UserError):
    """A training became NaN or infinite.

    Attributes:
        step: at which that was seen.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Training:
    """How the networks of an analysis are trained.

    Attributes:
        preset: training preset that gives network, data and optimiser.
        scalings: of the long skips, one network each.
        kappa: base κ of ``cs`` and ``cs-reversed``; ``uniform`` has 1/√2.
        depth: of a U-ViT; None: the preset's. A UNet has none.
        steps, batch_size: of the training; the learning rate is the preset's, constant after a tenth of warm-up.
        seeds: one network of each scaling per seed.
        data: data set in the place of the preset's; None: the preset's.
        path: where the data lies; None: the preset's, or nowhere where ``data`` is given.
    """

    preset: str = "digits-uvit"
    scalings: tuple[str, ...] = ("none", "uniform", "cs", "ls")
    kappa: float = 0.7
    depth: int | None = 12
    steps: int = 600
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: str | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scalings", tuple(resolve_scaling(name) for name in self.scalings))
        for name in ("scalings", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise invalid(f"--{name}", values, "at least one, each once")
        check_range("--steps", self.steps, low=4, integer=True)
        check_range("--batch-size", self.batch_size, low=1, integer=True)
        check_range("--kappa", self.kappa, low=0, low_open=True)
        for seed in self.seeds:
            check_range("--seeds", seed, low=0, integer=True)
        if self.data is not None and self.data not in list_training_sets():
            raise unknown_name("--data", self.data, list_training_sets())
        if self.path is not None:  # kept results belong to the folder, wherever the command was run
            object.__setattr__(self, "path", Path(self.path).expanduser().resolve())
        self.config(self.scalings[0], self.seeds[0])  # whatever else does not fit

    @property
    def name(self) -> str:
        """The preset, with the data where they are not its own."""
        own = [self.data] if self.data is not None else []
        own += [self.path.name] if self.path is not None else []
        return f"{self.preset} on {' '.join(own)}" if own else self.preset

    def key(self) -> dict[str, Any]:
        """What the result of one network depends on, beside its scaling and seed; see :class:`Units`."""
        found = asdict(self)
        del found["scalings"], found["seeds"]
        for name in ("data", "path"):  # not named in results from before they could be given
            if found[name] is None:
                del found[name]
        return found

    def config(self, scaling: str, seed: int) -> RunConfig:
        """The run of one network; plain PyTorch, so that hooks see every block's feature."""
        base = get_preset(self.preset)
        changes: dict = {"scaling": scaling, "kappa": self.kappa if scaling.startswith("cs") else None, "fused": False}
        if isinstance(base.model, UViTConfig):
            changes["depth"] = self.depth or base.model.depth
        elif self.depth is not None:
            raise invalid("--depth", self.depth, f"none for {self.preset}, whose network is a UNet")
        data = base.data
        if self.data not in (None, data.name):
            data = dataclasses.replace(data, name=self.data, path=None)
        if self.path is not None:
            data = dataclasses.replace(data, path=self.path)
        train = dataclasses.replace(
            base.train,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            warmup_steps=self.steps // 10,
            decay_steps=0,
            compile="off",
            recompute="none",
            precision="auto-gpu",
        )
        return dataclasses.replace(base, model=dataclasses.replace(base.model, **changes), data=data, train=train)


@dataclass
class Watched:
    """What an observer sees after each step.

    Attributes:
        step: finished steps.
        model: the network.
        gradients: ‖∇‖ of every block's parameters at this step, float64; see :func:`watched_blocks`.
        probe: one batch with noise and times that no step of the training has.
        schedule: the noise process.
        average: the moving average of the weights; None of a network that is not being trained.
    """

    step: int
    model: UViT | UNet
    gradients: list[float]
    probe: Draw
    schedule: NoiseSchedule
    average: EMA | None = None

    def loss(self, extra: Tensor | None = None) -> float:
        """Loss on the probe, with ``extra`` added to x_t."""
        predicted = self.predict(extra)
        return (predicted - self.probe.noise).square().mean().item()

    @torch.no_grad()
    def predict(self, extra: Tensor | None = None) -> Tensor:
        """ε prediction on the probe, in eval mode and float32, with ``extra`` added to x_t."""
        t = self.schedule.times(self.probe.u)
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.schedule.alpha_sigma(t))
        x_t = alpha * self.probe.x0 + sigma * self.probe.noise
        training = self.model.training
        self.model.eval()
        try:
            x_t = x_t if extra is None else x_t + extra
            return self.model(x_t, self.schedule.model_timesteps(t), y=self.probe.labels).float()
        finally:
            self.model.train(training)


def watched_blocks(model: UViT | UNet) -> list[nn.Module]:
    """The decoder's blocks in the order in which they run, i = N … 1: what the long skips end in."""
    return list(model.out_blocks if isinstance(model, UViT) else model.output_blocks)


@dataclass
class Ready:
    """A training that can begin: the network, its steps, and the batch of any step."""

    model: UViT | UNet
    step: TrainStep
    source: BatchSource
    schedule: NoiseSchedule


def open_data(config: RunConfig) -> TrainingSet:
    """The data of a run, which fit its network.

    Raises:
        UserError: they cannot be opened, in the words of an analysis' options, or do not fit.
    """
    try:
        dataset = open_training_set(config.data, config.model, label_dropout=config.diffusion.label_dropout)
        check_data(dataset, config)
    except UserError as error:
        told = str(error).replace("--data.path", "--path").replace("--data.name", "--data")
        if told.startswith(("model", "--model.")):
            told += " In an analysis the network is that of --preset: take one that fits."
        raise UserError(told) from error
    return dataset


def set_up(config: RunConfig) -> Ready:
    """Build what one training needs as :class:`~scalelong_fast.training.Trainer` does, in memory.

    Close its ``source`` at the end.

    Raises:
        UserError: model and data do not fit.
    """
    check_model(config)
    dataset = open_data(config)
    execution = resolve_execution(config.train)
    diffusion = config.diffusion
    schedule = create_schedule(diffusion.schedule, beta_min=diffusion.beta_min, beta_max=diffusion.beta_max)
    schedule = schedule.to(execution.device)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(execution.device)
    step = TrainStep(model, schedule, config, execution)
    return Ready(model, step, BatchSource(dataset, config, execution.device, prefetch=0), schedule)


def train_watched(config: RunConfig, observe: Callable[[Watched], None], every: int = 1) -> UViT | UNet:
    """Train one network as :class:`~scalelong_fast.training.Trainer` does, in memory, and show it to ``observe``.

    Args:
        config: the run.
        observe: called before the first step, with no gradients, after every ``every``-th step and the last one.
        every: steps between calls.

    Raises:
        UserError: model and data do not fit.
        DivergedError: the loss or a gradient became NaN or infinite.
    """
    ready = set_up(config)
    model, train_step, source, schedule = ready.model, ready.step, ready.source, ready.schedule
    average = train_step.ema
    probe = source(config.train.steps)
    blocks = watched_blocks(model)
    gradients: list[float] = []

    def note_gradients(*_: object) -> None:
        # Before the update, which clears them.
        gradients[:] = [_norm(block) for block in blocks] if wanted else []

    train_step.optimizer.register_step_pre_hook(note_gradients)
    try:
        observe(Watched(0, model, [], probe, schedule, average))
        for step in range(config.train.steps):
            wanted = (step + 1) % every == 0 or step + 1 == config.train.steps
            loss = train_step(step, source(step))
            if not wanted:
                continue
            if not math.isfinite(loss.item()) or not all(map(math.isfinite, gradients)):
                raise DivergedError(
                    f"Training with scaling {config.model.scaling!r} and seed {config.train.seed} became NaN or "
                    f"infinite, seen at step {step + 1}. Take a preset with a smaller learning rate, another seed or a "
                    "larger batch.",
                    step + 1,
                )
            observe(Watched(step + 1, model, list(gradients), probe, schedule, average))
    finally:
        source.close()
    return model


def _norm(block: nn.Module) -> float:
    found = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(found)).double().norm().item() if found else 0.0
