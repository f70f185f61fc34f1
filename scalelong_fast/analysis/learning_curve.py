"""How fast a network learns: loss and distance of the averaged weights, through training."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from scalelong_fast.analysis.training import DivergedError, Watched, open_data, train_watched
from scalelong_fast.diffusion import NoiseSchedule, diffusion_loss
from scalelong_fast.evaluation.drawing import NotFiniteError
from scalelong_fast.models import build_model
from scalelong_fast.training import RunConfig
from scalelong_fast.training.batches import BatchSource, Draw
from scalelong_fast.training.hardware import resolve_execution

#: Seed of the probe's images, noise and times, whatever the seed of the network.
PROBE_SEED = 20_231


def draw_probe(config: RunConfig, size: int) -> Draw:
    """A batch of ``size`` images, or as many as there are, with noise and times: equal for all runs on equal data."""
    dataset = open_data(config)
    train = dataclasses.replace(config.train, seed=PROBE_SEED, batch_size=min(size, len(dataset)))
    execution = resolve_execution(config.train)
    source = BatchSource(dataset, dataclasses.replace(config, train=train), execution.device, prefetch=0)
    try:
        return source(0)
    finally:
        source.close()


@torch.no_grad()
def probe_loss(model: nn.Module, schedule: NoiseSchedule, probe: Draw) -> float:
    """Loss of ``model``, in eval mode and float32, on the probe."""
    return diffusion_loss(model, schedule, probe.x0, probe.noise, probe.u, probe.labels).item()


def learning_curve(
    config: RunConfig,
    every: int,
    probe_size: int,
    sample_every: int = 0,
    distance: Callable[[nn.Module], float] | None = None,
) -> dict[str, list[float]]:
    """Train one network and measure its averaged weights from time to time.

    Args:
        config: the run; the decay of its average says how far the average lags behind.
        every: steps between looks at the loss.
        probe_size: images of the probe, which is the same for all networks.
        sample_every: steps between looks at the samples.
        distance: of a network's samples from the data; None: not looked at.

    Returns:
        ``steps`` and ``losses``, from step 0; ``sampled`` and ``distances``, from ``sample_every`` or, without
        ``distance``, empty. The last step is in both.

    Raises:
        UserError: model and data do not fit.
        DivergedError: the training, or a sample of the network, became NaN or infinite.
    """
    probe = draw_probe(config, probe_size)
    averaged: list[nn.Module] = []
    found: dict[str, list[float]] = {"steps": [], "losses": [], "sampled": [], "distances": []}

    def observe(watched: Watched) -> None:
        assert watched.average is not None
        if not averaged:
            averaged.append(build_model(config.model).to(probe.x0.device).eval())
        model = watched.average.copy_to(averaged[0])
        last = watched.step == config.train.steps
        if watched.step % every == 0 or last:
            found["steps"].append(watched.step)
            found["losses"].append(probe_loss(model, watched.schedule, probe))
        if distance is not None and watched.step and (watched.step % sample_every == 0 or last):
            found["sampled"].append(watched.step)
            try:
                found["distances"].append(distance(model))
            except NotFiniteError as error:
                raise DivergedError(str(error), watched.step) from error

    train_watched(config, observe, every)
    return found


def steps_to(level: float, steps: Sequence[float], values: Sequence[float]) -> float | None:
    """The step at which a curve is first at ``level`` or below, on straight lines between recordings; None: nowhere.

    Args:
        level: to reach.
        steps: of the recordings, growing.
        values: recorded.
    """
    reached = next((place for place, value in enumerate(values) if value <= level), None)
    if not reached:  # nowhere, or from the start
        return None if reached is None else float(steps[0])
    above, below = values[reached - 1], values[reached]
    share = (above - level) / (above - below)
    return steps[reached - 1] + share * (steps[reached] - steps[reached - 1])
