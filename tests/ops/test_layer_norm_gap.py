"""``layer_norm_gap``: every plan gives the reference's norm, mean and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, layer_norm_gap, list_plans
from scalelong_fast.ops.layer_norm_gap import layer_norm_gap_reference

PLANS = list_plans("layer_norm_gap")
SHAPES = [(1, 1), (3, 17, 33), (2, 5, 130), (7, 256), (1, 3, 2, 19)]


def draw(shape, dtype, device, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(device, dtype)


def arguments(shape, dtype=torch.float32, parameter_dtype=None, device="cpu", seed=0):
    parameter_dtype = parameter_dtype or dtype
    x = draw(shape, dtype, device, seed) * 2 + 0.5
    weight, bias = (draw(shape[-1:], parameter_dtype, device, seed + i) for i in (1, 2))
    return [t.requires_grad_() for t in (x, weight, bias)]


def with_gradients(function, args, use=(0, 1), **options):
    outputs = function(*args, **options)
    used = [outputs[i] for i in use]
    grads = [draw(o.shape, torch.float64, "cpu", 9 + i).to(o) for i, o in zip(use, used, strict=True)]
    # The weight has no part in the mean.
    gradients = torch.autograd.grad(used, args, grads, allow_unused=True)
    return [*(o.detach() for o in outputs), *gradients]


def skip_native_on_a_gpu(plan, device):
    if plan == "native" and device == "cuda":
        pytest.skip("a CPU's plan")


def exactly(args):
    return [a.detach().double().requires_grad_() for a in args]


def test_reference_has_the_gradients_of_its_definition():
    assert torch.autograd.gradcheck(layer_norm_gap_reference, arguments((2, 3, 10), torch.float64))


def test_reference_is_pytorchs_norm_and_mean():
    x, weight, bias = arguments((2, 3, 10))
    out, mean = layer_norm_gap_reference(x, weight, bias, 1e-3)
    torch.testing.assert_close(out, F.layer_norm(x, (10,), weight, bias, 1e-3))
    torch.testing.assert_close(mean, x.mean(-1))


@pytest.mark.parametrize("plan", ["triton", "native"])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_equal_the_reference(device, assert_as_accurate, poisoned, plan, shape):
    skip_native_on_a_gpu(plan, device)
    args = arguments(shape, device=device)
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, args)
    pytorch = with_gradients(layer_norm_gap_reference, args)
    exact = with_gradients(layer_norm_gap_reference, exactly(args))
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=3.0)


@pytest.mark.parametrize("plan", ["triton", "native"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_plans_take_half_precision(device, assert_as_accurate, plan, dtype, parameter_dtype, out_dtype):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 41, 50), dtype, parameter_dtype, device)
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, args, out_dtype=out_dtype)
    pytorch = with_gradients(layer_norm_gap_reference, args, out_dtype=out_dtype)
    exact = with_gradients(layer_norm_gap_reference, exactly(args))
    assert actual[0].dtype == (out_dtype or dtype)
    assert actual[1].dtype == torch.float32
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true)


@pytest.mark.parametrize("plan", ["triton", "native"])
def test_a_float32_stream_may_give_a_narrower_norm(device, assert_as_accurate, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 17, 50), device=device)
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, args, out_dtype=torch.bfloat16)
    pytorch = with_gradients(layer_norm_gap_reference, args, out_dtype=torch.bfloat16)
    exact = with_gradients(layer_norm_gap_reference, exactly(args))
    # The gradient at a bf16 output is itself bf16: against that both are compared.
    grad = draw(actual[0].shape, torch.float64, "cpu", 9).to(device, torch.bfloat16).double()
    rounded = exactly(args)
    out, mean = layer_norm_gap_reference(*rounded)
    grad_mean = draw(mean.shape, torch.float64, "cpu", 10).to(device).float().double()
    exact[2:] = torch.autograd.grad([out, mean], rounded, [grad, grad_mean])
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=3.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("use", [(0,), (1,), (0, 1)])
def test_outputs_may_go_unused(device, plan, use):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 9, 20), device=device)
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, args, use)
    expected = with_gradients(layer_norm_gap_reference, args, use)
    for got, right in zip(actual, expected, strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_weight_gradients_of_many_bf16_rows_are_summed_in_float32():
    args = arguments((8192, 8), torch.bfloat16)
    exact = with_gradients(layer_norm_gap_reference, exactly(args))
    for got, true in zip(with_gradients(layer_norm_gap, args)[3:], exact[3:], strict=True):
        torch.testing.assert_close(got.double(), true, rtol=0.01, atol=1.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 300), st.sampled_from(["triton", "native"]), st.integers(0, 99))
def test_plans_equal_the_reference_for_any_size(rows, width, plan, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    args = arguments((rows, width), seed=seed)
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, args)
    for got, expected in zip(actual, with_gradients(layer_norm_gap_reference, args), strict=True):
        # A row of a few nearly equal numbers has 1/σ up to 316: its gradient cancels.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 if width < 4 else 1e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(device, plan, value):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 4, 20), device=device)
    with torch.no_grad():
        args[0][1, 2, 7] = value
    with force_plan(plan):
        out, mean = (t.detach() for t in layer_norm_gap(*args))
    expected = layer_norm_gap_reference(*args)
    if plan == "native":  # the running mean of PyTorch's kernel makes a NaN of an infinity
        assert torch.equal(mean.isfinite(), expected[1].isfinite())
        mean[1, 2] = expected[1][1, 2]
    torch.testing.assert_close(mean, expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(out.nan_to_num(7.0), expected[0].nan_to_num(7.0), rtol=1e-5, atol=1e-5)
    assert out.isnan().sum() == 20


@pytest.mark.parametrize("plan", PLANS)
def test_arguments_may_be_strided_views(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = [a.detach() for a in arguments((2, 6, 30), device=device)]
    strided = [a.repeat_interleave(2, -1)[..., ::2] for a in args]
    strided[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    strided = [a.requires_grad_() for a in strided]
    with force_plan(plan):
        actual = with_gradients(layer_norm_gap, strided)
    for got, expected in zip(actual, with_gradients(layer_norm_gap_reference, strided), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_expanded_gradients_are_read_correctly(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 6, 30), device=device)

    def loss(function):
        out, mean = function(*args)
        return out.sum() + 3.0 * mean.sum()

    with force_plan(plan):
        actual = torch.autograd.grad(loss(layer_norm_gap), args)
    for got, expected in zip(actual, torch.autograd.grad(loss(layer_norm_gap_reference), args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_batch(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((0, 6, 30), device=device)
    with force_plan(plan):
        out, mean, grad_x, grad_weight, grad_bias = with_gradients(layer_norm_gap, args)
    assert (out.shape, mean.shape, grad_x.shape) == ((0, 6, 30), (0, 6), (0, 6, 30))
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_well_behaved(device, out_dtype):
    args = (*arguments((2, 5, 40), device=device), 1e-5, out_dtype, "triton")
    torch.library.opcheck(torch.ops.scalelong_fast.layer_norm_gap.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("plan", PLANS)
def test_compiles_as_one_graph(device, plan, backend):
    skip_native_on_a_gpu(plan, device)
    if (plan, backend) == ("eager", "inductor"):
        pytest.skip("plain PyTorch: aot_eager is enough")
    args = arguments((2, 5, 40), device=device)

    def loss(*a):
        out, mean = layer_norm_gap(*a)
        return (out * out.detach().cos()).sum() + mean.square().sum()

    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), args)
    for got, expected in zip(compiled, torch.autograd.grad(loss(*args), args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_for_any_batch(device, plan):
    skip_native_on_a_gpu(plan, device)
    torch._dynamo.reset()
    compiled = torch.compile(layer_norm_gap, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        args = arguments((batch, 5, 40), device=device)
        with force_plan(plan):
            actual = with_gradients(compiled, args)
        for got, expected in zip(actual, with_gradients(layer_norm_gap_reference, args), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("use", [(0,), (1,)])
def test_compiled_outputs_may_go_unused(device, plan, use):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)

    def loss(*a):
        return layer_norm_gap(*a)[use[0]].sin().sum()

    with force_plan(plan):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args)
        actual = torch.autograd.grad(compiled, args[:1])
    torch.testing.assert_close(actual, torch.autograd.grad(loss(*args), args[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_leaves_the_stream_alone(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        actual = with_gradients(layer_norm_gap, args)
    for got, expected in zip(actual, with_gradients(layer_norm_gap_reference, args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_gives_the_same_gradients(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)

    def checkpointed(*a):
        return torch.utils.checkpoint.checkpoint(layer_norm_gap, *a, use_reentrant=False)

    with force_plan(plan):
        for got, expected in zip(with_gradients(checkpointed, args), with_gradients(layer_norm_gap, args), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("output", [0, 1])
def test_a_second_derivative_is_refused(device, plan, output):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)
    with force_plan(plan):
        value = layer_norm_gap(*args)[output].square().sum()
        (first,) = torch.autograd.grad(value, args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), args[0])


def test_float64_is_served_by_pytorch(device):
    args = arguments((2, 5, 40), torch.float64, device=device)
    assert explain_plan(layer_norm_gap, *args).plan in ("native", "eager")
    out, mean = layer_norm_gap(*args)
    assert out.dtype == mean.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *a: layer_norm_gap(*a), args)
    with force_plan("triton"), pytest.raises(NotImplementedError, match="layer_norm_gap not supported: float64"):
        layer_norm_gap(*args)


def test_norms_count_no_flop(device):
    args = arguments((2, 5, 40), device=device)
    with force_plan("triton"), FlopCounterMode(display=False) as counter:
        layer_norm_gap(*args)[0].sum().backward()
    assert counter.get_total_flops() == 0


def test_a_row_that_does_not_fit_is_refused(device):
    args = arguments((1, 8193), device=device)
    with force_plan("triton"), pytest.raises(NotImplementedError, match="a row of 8193 elements"):
        layer_norm_gap(*args)
    layer_norm_gap(*args)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(40), r"x: got \(40,\), expected shape \(\.\.\., D\)"),
        (0, torch.zeros(2, 0), "x: got"),
        (0, torch.zeros(2, 40, dtype=torch.int32), "x: got 'int32'"),
        (0, [1.0], "x: got 'list', expected a torch.Tensor"),
        (0, torch.zeros(2, 40).to_sparse(), "x: got a tensor of layout sparse_coo"),
        (1, torch.zeros(39), r"weight: got \(39,\), expected shape \(40,\)"),
        (1, torch.zeros(40, dtype=torch.float16), "weight: got 'float16', expected float32"),
        (2, torch.zeros(1, 40), r"bias: got \(1, 40\), expected shape \(40,\)"),
        (2, torch.zeros(40, device="meta"), "bias: got 'meta'"),
        (3, -1.0, r"eps: got -1.0"),
        (3, "small", r"eps: got 'small'"),
        (3, float("nan"), r"eps: got nan"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    args = [*arguments((2, 40)), 1e-5]
    args[position] = value
    with pytest.raises(UserError, match=message):
        layer_norm_gap(*args)


@pytest.mark.parametrize("dtype", [torch.int32, "bfloat16", torch.float64])
def test_a_wrong_out_dtype_is_named(dtype):
    with pytest.raises(UserError, match="out_dtype: got"):
        layer_norm_gap(*arguments((2, 40)), out_dtype=dtype)
