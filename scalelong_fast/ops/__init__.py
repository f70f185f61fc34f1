"""Differentiable ops on long skip connections: reference, CPU path and Triton kernels behind one function each."""

from scalelong_fast.ops.add_layer_norm_gap import add_layer_norm_gap
from scalelong_fast.ops.channel_stats import channel_stats
from scalelong_fast.ops.group_norm_gap import group_norm_gap
from scalelong_fast.ops.layer_norm_gap import layer_norm_gap
from scalelong_fast.ops.ls_scale_concat import ls_scale_concat
from scalelong_fast.ops.ls_skip_linear import ls_skip_linear
from scalelong_fast.ops.plans import PlanChoice, explain_plan, force_plan, list_plans
from scalelong_fast.ops.scale_concat import scale_concat
from scalelong_fast.ops.scale_concat_conv1x1 import reads_concat, scale_concat_conv1x1
from scalelong_fast.ops.scale_concat_group_norm import scale_concat_group_norm
from scalelong_fast.ops.scale_concat_linear import scale_concat_linear
from scalelong_fast.ops.se_gate import se_gate
from scalelong_fast.ops.tuning import Tuning, tune

__all__ = [
    "PlanChoice",
    "Tuning",
    "add_layer_norm_gap",
    "channel_stats",
    "explain_plan",
    "force_plan",
    "group_norm_gap",
    "layer_norm_gap",
    "list_plans",
    "ls_scale_concat",
    "ls_skip_linear",
    "reads_concat",
    "scale_concat",
    "scale_concat_conv1x1",
    "scale_concat_group_norm",
    "scale_concat_linear",
    "se_gate",
    "tune",
]
