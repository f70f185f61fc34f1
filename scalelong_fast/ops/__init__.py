"""Differentiable ops on long skip connections: reference, CPU path and Triton kernels behind one function each."""

from scalelong_fast.ops.plans import PlanChoice, explain_plan, force_plan, list_plans
from scalelong_fast.ops.se_gate import se_gate

__all__ = ["PlanChoice", "explain_plan", "force_plan", "list_plans", "se_gate"]
