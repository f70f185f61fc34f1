"""Bytes that the kernels move, counted in the interpreter, against the model that the benchmarks' floors rest on."""

import json

import pytest
import torch

from benchmarks import environment, traffic
from benchmarks.compiled_traffic import worst_factors
from benchmarks.report_traffic import traffic_table
from benchmarks.traffic_counter import counting, pytorch_work
from scalelong_fast.errors import UserError
from scalelong_fast.ops import force_plan, list_plans, scale_concat

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1")
PAIRS = [
    (small, large, plan)
    for small, large in traffic.case_pairs()
    for plan in list_plans(large.op)
    # Of the two product plans one, and of the layouts one, for the time they take.
    if plan in traffic.PLANS and plan != "tma" and large.layout != "planes"
]
#: PyTorch's share of a plan that is kernels of ours: a bias' gradient, and buffers of ones and zeros.
EXPECTED_WORK = ("fill_", "zero_", "sum", "copy_")


@pytest.fixture(scope="module")
def compiled():
    """Factors of the compiled kernels."""
    return worst_factors()


@needs_interpreter
def test_the_counter_counts_unmasked_elements_once_and_as_often_as_they_are_asked_for():
    x, skip = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    with force_plan("triton"), counting() as launches:
        scale_concat(x, skip, 0.5)
    assert [launch.kernel for launch in launches] == ["scale_concat_kernel"]
    assert launches[0].written == launches[0].stores == 4 * 2 * 7 * 5
    assert launches[0].read == 4 * (2 * 7 * 5 + 1)  # and κ, one number with strides of 0
    assert launches[0].loads >= launches[0].read


@needs_interpreter
def test_a_copy_that_nobody_meant_would_be_seen():
    x = torch.randn(4, 6)
    with pytorch_work() as work:
        x.t().contiguous()
        torch.empty(3).view(3)
    assert work == ["copy_(24)"]


@needs_interpreter
@pytest.mark.parametrize(("small", "large", "plan"), PAIRS, ids=lambda value: str(value).replace(" ", ""))
def test_kernels_move_what_the_model_says_and_no_pass_more(small, large, plan, compiled):
    records = traffic.records_of(small, large, plan, compiled)
    assert {record["direction"] for record in records} >= {"fwd"}
    for record in records:
        # A pass more over a feature would be a fifth. A number per token is 2 % of rows as narrow as these; the gate's
        # backward, all of it numbers per token, reads the gradients of its hidden layer again for its weights'.
        highest = 1.05 if large.op != "se_gate" else 1.6
        assert 0.75 < record["growth"] <= highest, record
        assert record["compiled_growth"] is not None, "run: python -m benchmarks aot"
        assert record["growth"] <= record["compiled_growth"] <= highest, record
        features = torch.Size(large.shape).numel()
        for name in record["pytorch"]:
            work, elements = name.rstrip(")").split("(")
            assert work in EXPECTED_WORK
            assert int(elements) < features or "linear" in large.op  # there the bias' gradient reads dy
    assert sum(record["moved_bytes"] for record in records) > 0


@needs_interpreter
def test_bytes_of_compiled_code_are_those_of_the_interpreter_times_its_factors(compiled):
    pair = traffic.case_pairs()[0]
    twice = {**compiled, "se_weight_grad_kernel": {"loads": 1.0, "stores": 2.0}}
    record = traffic.records_of(*pair, "triton", twice)[1]
    (written,) = (written for kernel, _, written in record["kernels"] if kernel == "se_weight_grad_kernel")
    assert record["compiled_bytes"] == record["moved_bytes"] + written
    del twice["se_weight_grad_kernel"]
    forward, backward = traffic.records_of(*pair, "triton", twice)
    assert forward["compiled_bytes"] == forward["moved_bytes"]
    assert backward["compiled_bytes"] is None
    assert backward["compiled_growth"] is None


def test_the_result_file_is_of_these_kernels():
    result = json.loads(traffic.OUT.read_text(encoding="utf-8"))
    assert {record["op"] for record in result["records"]} == {
        large.name for _, large in traffic.case_pairs() if large.op != "scale_concat_conv1x1"
    }
    lines = traffic_table(result, environment.ROOT)
    assert len(lines) > 10


@needs_interpreter
def test_without_the_interpreter_counting_is_refused(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UserError, match="TRITON_INTERPRET: not set, expected 1"), counting():
        pass
