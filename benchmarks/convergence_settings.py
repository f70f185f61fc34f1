"""What ``python -m benchmarks convergence`` trains."""

import argparse
import dataclasses

import torch

from scalelong_fast.analysis import Training
from scalelong_fast.analysis.convergence import SCALES, ConvergenceSettings
from scalelong_fast.errors import invalid
from scalelong_fast.models import UViTConfig
from scalelong_fast.training import DataConfig, RunConfig
from scalelong_fast.training.hardware import resolve_device

#: Looks at the loss in a training of another number of steps than the default.
LOOKS = 20


@dataclasses.dataclass(frozen=True)
class Settings(ConvergenceSettings):
    """Those of the analysis, on the device of the benchmark, and on other data where ``data`` says so."""

    data: DataConfig | None = None
    device: str = "auto"

    def config(self, scaling: str, seed: int) -> RunConfig:
        """The run of one network."""
        config = super().config(scaling, seed)
        train = dataclasses.replace(config.train, device=self.device)
        return dataclasses.replace(config, train=train, data=self.data or config.data)


def default_settings(device: torch.device) -> Settings:
    """Digits on a CPU; on a GPU the published U-ViT-S/2 on made-up images."""
    if device.type == "cpu":
        training = Training(depth=None, steps=300, batch_size=64, seeds=(0, 1, 2))
        return Settings(training, every=15, sample_every=15, extractor="none")
    training = Training("cifar10-uvit", depth=None, steps=600, batch_size=128, seeds=(0, 1, 2))
    return Settings(training, every=20, sample_every=20, extractor="none", data=DataConfig(name="synthetic"))


def chosen_settings(options: argparse.Namespace, settings: Settings) -> Settings:
    """``settings`` with what the command line says instead.

    Raises:
        UserError: options that do not fit together, or a network other than a U-ViT.
    """
    if options.scale is not None:
        names = [field.name for field in dataclasses.fields(ConvergenceSettings)]
        settings = Settings(**{name: getattr(SCALES[options.scale], name) for name in names})
    changes = {name: value for name in ("preset", "steps", "seeds") if (value := getattr(options, name)) is not None}
    looks = {}
    if options.steps is not None:
        every = max(1, options.steps // LOOKS)
        looks = {"every": every, "sample_every": every}
    training = dataclasses.replace(settings.training, **changes)
    # Called auto where it is the same, the trainings are those that the analysis keeps.
    device = "auto" if _is_auto(options.device) else options.device
    settings = dataclasses.replace(settings, training=training, device=device, **looks)
    if options.data is not None:
        settings = dataclasses.replace(settings, data=DataConfig(name=options.data, path=options.path))
    elif options.path is not None:
        raise invalid("--path", str(options.path), "none without --data", "Give --data packed or --data folder too.")
    if not isinstance(settings.config("none", settings.training.seeds[0]).model, UViTConfig):
        raise invalid("--preset", settings.training.preset, "a preset of a U-ViT, whose recipes are timed")
    return settings


def _is_auto(name: str) -> bool:
    named, auto = resolve_device(name, "--device"), resolve_device("auto")
    return (named.type, named.index or 0) == (auto.type, auto.index or 0)
