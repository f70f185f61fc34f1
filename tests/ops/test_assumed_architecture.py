"""Plans as on a GPU that is not there, for tracing."""

import pytest
import torch

from scalelong_fast.ops import explain_plan
from scalelong_fast.ops.plans import resolve
from scalelong_fast.ops.problem import architecture, assume_architecture

NORM = ("layer_norm_gap", torch.zeros(2, 4, 8), torch.ones(8), torch.zeros(8), 1e-5)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_plans_are_those_of_its_table(arch):
    assert explain_plan(*NORM).plan == "native"
    with assume_architecture(arch):
        assert architecture(torch.device("cpu")) == arch
        assert explain_plan(*NORM).plan == "triton"
    assert explain_plan(*NORM).plan == "native"


def test_a_call_that_looks_like_one_before_gets_the_plan_of_its_architecture():
    def chosen():
        problem, plan = resolve(*NORM)
        return problem.arch, plan

    assert chosen() == chosen() == ("cpu", "native")
    with assume_architecture("sm_90"):
        assert chosen() == chosen() == ("sm_90", "triton")
    assert chosen() == ("cpu", "native")


def test_the_one_before_is_back_after_an_error():
    with assume_architecture("sm_90"):
        with pytest.raises(RuntimeError), assume_architecture("sm_80"):
            raise RuntimeError
        assert architecture(torch.device("cpu")) == "sm_90"
    assert architecture(torch.device("cpu")) == "cpu"
