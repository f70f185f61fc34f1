"""The κ's: coefficients of the long skip connections (ScaleLong §4)."""

from scalelong_fast.scaling.base import LongSkipScaling, scale_skip
from scalelong_fast.scaling.constant import CS, NoScaling, ReversedCS, UniformScaling
from scalelong_fast.scaling.factory import SCALINGS, create_scaling, list_scalings, resolve_scaling
from scalelong_fast.scaling.free import FreeScaling
from scalelong_fast.scaling.gates import CALIBRATIONS, SEGate, global_average_pool
from scalelong_fast.scaling.learnable import IndividualLS, LearnableScaling, SharedLS
from scalelong_fast.scaling.width_adapters import AdaptedGate, WidthAdapter

__all__ = [
    "CALIBRATIONS",
    "CS",
    "SCALINGS",
    "AdaptedGate",
    "FreeScaling",
    "IndividualLS",
    "LearnableScaling",
    "LongSkipScaling",
    "NoScaling",
    "ReversedCS",
    "SEGate",
    "SharedLS",
    "UniformScaling",
    "WidthAdapter",
    "create_scaling",
    "global_average_pool",
    "list_scalings",
    "resolve_scaling",
    "scale_skip",
]
