"""Differentiable ops on long skip connections: reference, CPU path and Triton kernels behind one function each."""

from scalelong_fast.ops.add_layer_norm_gap import add_layer_norm_gap
from scalelong_fast.ops.layer_norm_gap import layer_norm_gap
from scalelong_fast.ops.ls_scale_concat import ls_scale_concat
from scalelong_fast.ops.ls_skip_linear import ls_skip_linear
from scalelong_fast.ops.plans import PlanChoice, explain_plan, force_plan, list_plans
from scalelong_fast.ops.scale_concat import scale_concat
from scalelong_fast.ops.scale_concat_linear import scale_concat_linear
from scalelong_fast.ops.se_gate import se_gate
from scalelong_fast.ops.tuning import Tuning, tune

__all__ = [
    "PlanChoice",
    "Tuning",
    "add_layer_norm_gap",
    "explain_plan",
    "force_plan",
    "layer_norm_gap",
    "list_plans",
    "ls_scale_concat",
    "ls_skip_linear",
    "scale_concat",
    "scale_concat_linear",
    "se_gate",
    "tune",
]
