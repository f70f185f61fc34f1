"""A model's training steps, recipe by recipe: built from equal weights, and checked against the plain model."""

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import model_check
from benchmarks.authors_recipe import AuthorsStep
from benchmarks.model_check import Built, Errors, Outcome
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.training.batches import Draw
from scalelong_fast.training.config import RunConfig, TrainConfig
from scalelong_fast.training.hardware import Execution, fp32_products, resolve_execution
from scalelong_fast.training.step import TrainStep

SEED = 0


class Recipe(Protocol):
    """A way to train one of the models."""

    @property
    def scaling(self) -> str:
        """Of the long skips."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile may be used."""


class StepBench:
    """Builds recipes of one model on one device, from equal weights.

    Args:
        config: the model.
        device: where.
        batch_size: images a step.
        compiled: whether recipes that compile do so here.
    """

    def __init__(self, config: Any, device: torch.device, batch_size: int, compiled: bool):
        self.config, self.device, self.batch_size, self.compiled = config, device, batch_size, compiled
        self._exact: dict[str, Outcome] = {}
        self._usual: dict[tuple[str, torch.dtype | None], Errors] = {}
        generator = torch.Generator().manual_seed(SEED)
        self.draws = [self._draw(generator) for _ in range(2)]
        self.schedule = create_schedule("vpsde").to(device)
        torch.manual_seed(SEED)

    def _draw(self, generator: torch.Generator) -> Draw:
        config, batch = self.config, self.batch_size
        shape = (batch, config.in_chans, config.img_size, config.img_size)
        x0, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
        labels = None
        if config.num_classes > 0:
            labels = torch.randint(config.num_classes, (batch,), generator=generator).to(self.device)
        u = torch.rand(batch, generator=generator)
        return Draw(x0.to(self.device), labels, noise.to(self.device), u.to(self.device))

    def execution(self, compiled: bool) -> Execution:
        """How a step is carried out here."""
        return resolve_execution(self._train(compiled))

    def _train(self, compiled: bool) -> TrainConfig:
        use = "on" if compiled and self.compiled else "off"
        return TrainConfig(batch_size=self.batch_size, device=str(self.device), compile=use)

    def model(self, recipe: Any) -> nn.Module:
        """The model of a recipe, on the device, with the weights that all have."""
        raise NotImplementedError

    def plain_model(self, scaling: str) -> nn.Module:
        """The model in plain PyTorch, to which every recipe of the same scaling is compared."""
        raise NotImplementedError

    def autocast(self, recipe: Any) -> torch.dtype | None:
        """The dtype that a recipe computes in here; None: float32."""
        return self.execution(recipe.compiled).autocast

    def build(self, recipe: Any) -> Built:
        """The recipe as functions."""
        return self._ours(self.model(recipe), self._train(recipe.compiled))

    def _ours(self, model: nn.Module, train: TrainConfig) -> Built:
        """A model in our training step."""
        execution = resolve_execution(train)
        step = TrainStep(model, self.schedule, RunConfig(model=model.config, train=train), execution)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            draw = self.draws[count % len(self.draws)]
            # Times and noise are drawn in every step, as the authors' step does.
            fresh = dataclasses.replace(draw, noise=torch.randn_like(draw.x0), u=torch.rand_like(draw.u))
            return step(count - 1, fresh)

        def loss() -> Tensor:
            return step.loss_fn(first.x0, first.noise, first.u, first.labels)

        return Built(take, loss, model, lambda: self._predict(model, execution.autocast))

    def _predict(self, network: nn.Module, autocast: torch.dtype | None) -> Tensor:
        """The noise that a network predicts from the first draw."""
        first = self.draws[0]
        times = self.schedule.times(first.u)
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self.schedule.alpha_sigma(times))
        noisy = alpha * first.x0 + sigma * first.noise
        with torch.autocast(self.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return network(noisy, self.schedule.model_timesteps(times), first.labels)

    def authors(self, model: nn.Module, recipe: Any, autocast: torch.dtype | None) -> Built:
        """A model in the authors' training step."""
        step = AuthorsStep(model, autocast, self.execution(recipe.compiled).compiled)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            draw = self.draws[count % len(self.draws)]
            return step(draw.x0, draw.labels)

        def loss() -> Tensor:
            return step.loss(first.x0, first.u, first.noise, first.labels).mean()

        return Built(take, loss, model, lambda: self._predict(step.network, autocast))

    def authors_autocast(self) -> torch.dtype | None:
        """The dtype of their recipe: fp16 on a GPU, as the published command has it; elsewhere that of ours."""
        own = self.execution(False).autocast
        return torch.float16 if own is not None and self.device.type == "cuda" else own

    def check(self, name: str, recipe: Any, built: Built) -> Errors:
        """Errors of a recipe against the plain model in float32.

        Raises:
            LossMismatchError: they are larger than its precision explains.
        """
        scaling, autocast = recipe.scaling, self.autocast(recipe)
        exact = self.exact(scaling)
        if (scaling, autocast) not in self._usual:
            self._usual[scaling, autocast] = model_check.errors(self._plain_outcome(scaling, autocast), exact)
        own = model_check.errors(model_check.outcome(built, autocast), exact)
        model_check.check(name, own, self._usual[scaling, autocast])
        return own

    def exact(self, scaling: str) -> Outcome:
        """What the plain model computes in float32."""
        if scaling not in self._exact:
            with fp32_products(self.device, tf32=False):
                self._exact[scaling] = self._plain_outcome(scaling, None)
        return self._exact[scaling]

    def _plain_outcome(self, scaling: str, autocast: torch.dtype | None) -> Outcome:
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        train = dataclasses.replace(self._train(False), precision=names[autocast])
        return model_check.outcome(self._ours(self.plain_model(scaling), train), autocast)
