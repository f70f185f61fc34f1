"""The κ's: coefficients of the long skip connections (ScaleLong §4), and the baselines that scale blocks instead."""

from scalelong_fast.scaling.base import LongSkipScaling, scale_skip
from scalelong_fast.scaling.block_output import (
    BLOCK_SCALINGS,
    ReZero,
    StableTau,
    create_block_scaling,
    resolve_block_scaling,
    scale_branch,
)
from scalelong_fast.scaling.constant import CS, NoScaling, ReversedCS, UniformScaling
from scalelong_fast.scaling.factory import SCALINGS, create_scaling, list_scalings, resolve_scaling
from scalelong_fast.scaling.free import FreeScaling
from scalelong_fast.scaling.gates import CALIBRATIONS, IEGate, SEGate, check_calibration, global_average_pool
from scalelong_fast.scaling.learnable import IndividualLS, LearnableScaling, SharedLS
from scalelong_fast.scaling.width_adapters import AdaptedGate, WidthAdapter

__all__ = [
    "BLOCK_SCALINGS",
    "CALIBRATIONS",
    "CS",
    "SCALINGS",
    "AdaptedGate",
    "FreeScaling",
    "IEGate",
    "IndividualLS",
    "LearnableScaling",
    "LongSkipScaling",
    "NoScaling",
    "ReZero",
    "ReversedCS",
    "SEGate",
    "SharedLS",
    "StableTau",
    "UniformScaling",
    "WidthAdapter",
    "check_calibration",
    "create_block_scaling",
    "create_scaling",
    "global_average_pool",
    "list_scalings",
    "resolve_block_scaling",
    "resolve_scaling",
    "scale_branch",
    "scale_skip",
]
