"""``se_gate``: every plan gives the reference's κ and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans, se_gate
from scalelong_fast.ops.se_gate import se_gate_reference

ACTIVATIONS = ("relu", "elu", "mish")


def arguments(batch, width, hidden, dtype=torch.float32, parameter_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, width), (hidden, width), (hidden,), (width, hidden), (width,))
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[1] /= width**0.5
    dtypes = [dtype] + [parameter_dtype or dtype] * 4
    return [v.to(device, t).requires_grad_() for v, t in zip(values, dtypes, strict=True)]


def with_gradients(function, args, activation):
    kappa = function(*args, activation)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(kappa.shape, generator=generator, dtype=torch.float64).to(kappa)
    return [kappa.detach(), *torch.autograd.grad(kappa, args, grad)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_has_the_gradients_of_its_definition(activation):
    args = arguments(3, 10, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: se_gate_reference(*a, activation), args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("batch", "width", "hidden"), [(1, 1, 1), (3, 257, 16), (5, 33, 2), (17, 130, 33), (2, 20, 300)]
)
def test_kernel_equals_the_reference(device, assert_as_accurate, poisoned, batch, width, hidden, activation):
    args = arguments(batch, width, hidden, device=device)
    with force_plan("triton"):
        actual = with_gradients(se_gate, args, activation)
    pytorch = with_gradients(se_gate_reference, args, activation)
    exact = with_gradients(se_gate_reference, [a.detach().double().requires_grad_() for a in args], activation)
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None])
def test_kernel_takes_half_precision(device, assert_as_accurate, dtype, parameter_dtype):
    args = arguments(4, 50, 3, dtype, parameter_dtype, device)
    with force_plan("triton"):
        actual = with_gradients(se_gate, args, "elu")
    pytorch = with_gradients(se_gate_reference, args, "elu")
    exact = with_gradients(se_gate_reference, [a.detach().double().requires_grad_() for a in args], "elu")
    assert actual[0].dtype == torch.float32
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 20), st.integers(1, 300), st.integers(1, 40), st.sampled_from(ACTIVATIONS), st.integers(0, 99))
def test_kernel_equals_the_reference_for_any_size(batch, width, hidden, activation, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    args = arguments(batch, width, hidden, seed=seed)
    with force_plan("triton"):
        actual = with_gradients(se_gate, args, activation)
    for got, expected in zip(actual, with_gradients(se_gate_reference, args, activation), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_through(device, value, activation):
    args = arguments(3, 20, 4, device=device)
    with torch.no_grad():
        args[0][1, 7] = value
    with force_plan("triton"):
        actual = se_gate(*args, activation)
    torch.testing.assert_close(actual, se_gate_reference(*args, activation), equal_nan=True)


def test_arguments_may_be_strided_views(device):
    args = [a.detach() for a in arguments(6, 30, 5, device=device)]
    strided = [a.repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in args]
    with force_plan("triton"):
        actual = with_gradients(se_gate, strided, "relu")
    for got, expected in zip(actual, with_gradients(se_gate_reference, strided, "relu"), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_expanded_gradient_is_read_correctly(device):
    args = arguments(4, 30, 5, device=device)
    with force_plan("triton"):
        actual = torch.autograd.grad(se_gate(*args).sum(), args)
    for got, expected in zip(actual, torch.autograd.grad(se_gate_reference(*args).sum(), args), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_op_is_well_behaved(device):
    torch.library.opcheck(
        torch.ops.scalelong_fast.se_gate.default, (*arguments(3, 40, 4, device=device), "relu", "triton")
    )


@pytest.mark.parametrize("plan", list_plans("se_gate"))
def test_compiles_as_one_graph(device, plan):
    args = arguments(3, 40, 4, device=device)

    def loss(*a):
        return se_gate(*a).square().sum()

    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*args), args)
    for got, expected in zip(compiled, torch.autograd.grad(loss(*args), args), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", list_plans("se_gate"))
def test_autocast_leaves_it_in_float32(device, plan):
    args = arguments(3, 40, 4, device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        kappa = se_gate(*args)
    torch.testing.assert_close(kappa, se_gate_reference(*args))


@pytest.mark.parametrize("plan", list_plans("se_gate"))
def test_a_second_derivative_is_refused(device, plan):
    args = arguments(3, 40, 4, device=device)
    with force_plan(plan):
        (first,) = torch.autograd.grad(se_gate(*args).sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), args[0])


def test_flop_are_counted(device):
    args = arguments(3, 40, 4, device=device)
    with force_plan("triton"), FlopCounterMode(display=False) as counter:
        se_gate(*args).sum().backward()
    assert counter.get_total_flops() == 3 * 4 * 3 * 40 * 4


def test_a_hidden_width_that_does_not_fit_is_refused(device):
    args = arguments(1, 1, 1025, device=device)
    with (
        force_plan("triton"),
        pytest.raises(NotImplementedError, match=r"plan 'triton' of se_gate not supported: .*1025"),
    ):
        se_gate(*args)
    assert explain_plan("se_gate", *args).plan == "eager"


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 39), r"w_down: got \(4, 40\), expected shape \(H, 39\)"),
        (0, torch.zeros(3, 40, 1), "pooled"),
        (0, torch.zeros(3, 40, dtype=torch.int64), "pooled: got 'int64'"),
        (0, torch.zeros(3, 40).to_sparse(), "pooled: got a tensor of layout sparse_coo"),
        (1, torch.zeros(0, 40), r"max\(1, N // r\)"),
        (2, torch.zeros(5), r"b_down: got \(5,\), expected shape \(4,\)"),
        (3, torch.zeros(4, 40), r"w_up: got \(4, 40\), expected shape \(40, 4\)"),
        (4, torch.zeros(40, device="meta"), "b_up: got 'meta'"),
        (4, torch.zeros(40, dtype=torch.float16), "b_up: got 'float16'"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    args = arguments(3, 40, 4)
    args[position] = value
    with pytest.raises(UserError, match=message):
        se_gate(*args)


def test_an_unknown_activation_is_named():
    with pytest.raises(UserError, match="activation: got 'gelu'"):
        se_gate(*arguments(3, 40, 4), "gelu")
