"""Configuration, loop, checkpoints."""

from scalelong_fast.training.config import (
    DataConfig,
    DiffusionConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from scalelong_fast.training.generate import generate
from scalelong_fast.training.keeping import NonFiniteLossError
from scalelong_fast.training.loop import Trainer
from scalelong_fast.training.presets import PRESETS, get_preset, list_presets
from scalelong_fast.training.run import RunFolder
from scalelong_fast.training.watch import RankError

__all__ = [
    "PRESETS",
    "DataConfig",
    "DiffusionConfig",
    "NonFiniteLossError",
    "RankError",
    "RunConfig",
    "RunFolder",
    "SampleConfig",
    "TrainConfig",
    "Trainer",
    "generate",
    "get_preset",
    "list_presets",
]
