"""``scale_concat_linear``: every plan gives the reference's output and gradients."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans, scale_concat_linear
from scalelong_fast.ops.problem import Problem
from scalelong_fast.ops.scale_concat_linear import (
    concat_gemm,
    pointer_obstacle,
    scale_concat_linear_reference,
    tma_obstacle,
    two_gemm,
)
from scalelong_fast.ops.tables import candidates

PLANS = list_plans("scale_concat_linear")
TRITON_PLANS = ("tma", "pointer", "tma_cublas", "pointer_cublas")
POINTER_PLANS = ("pointer", "pointer_cublas")
KAPPAS = {"scalar": lambda b, n: (), "tokens": lambda b, n: (n,), "full": lambda b, n: (b, n)}


def arguments(
    batch, tokens, d_x, d_s, d_out, dtype=torch.float32, parameter_dtype=None, device="cpu", kappa="full", seed=0
):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, d_x), (batch, tokens, d_s), KAPPAS[kappa](batch, tokens), (d_out, d_x + d_s), (d_out,))
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[2] = values[2].sigmoid()
    values[3] /= (d_x + d_s) ** 0.5
    parameter_dtype = parameter_dtype or dtype
    dtypes = (dtype, dtype, parameter_dtype, dtype, parameter_dtype)
    return [v.to(device, t).requires_grad_() for v, t in zip(values, dtypes, strict=True)]


def with_gradients(function, args, wanted=None):
    out = function(*args)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out)  # the same in every dtype
    wanted = [a for a in args if isinstance(a, torch.Tensor)] if wanted is None else wanted
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def doubled(args):
    return [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def check(plan, args, assert_as_accurate, factor=2.0):
    with force_plan(plan):
        actual = with_gradients(scale_concat_linear, args)
    pytorch = with_gradients(scale_concat_linear_reference, args)
    exact = with_gradients(scale_concat_linear_reference, doubled(args))
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        if got.numel() < 16:  # PyTorch's error on a few values is a matter of luck
            torch.testing.assert_close(got, true.to(got.dtype), rtol=1e-4, atol=1e-4)
        else:
            assert_as_accurate(got, same_dtype, true, factor)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("function", [scale_concat_linear_reference, two_gemm, concat_gemm])
def test_reference_has_the_gradients_of_its_definition(function, kappa):
    args = arguments(2, 3, 4, 5, 3, torch.float64, kappa=kappa)
    torch.testing.assert_close(function(*args), scale_concat_linear_reference(*args))
    assert torch.autograd.gradcheck(function, args)


@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 17, 33, 47, 20), (3, 65, 64, 64, 64), (1, 15, 7, 100, 36)])
def test_kernels_equal_the_reference(device, assert_as_accurate, poisoned, plan, kappa, size):
    check(plan, arguments(*size, device=device, kappa=kappa), assert_as_accurate, factor=4.0)


@pytest.mark.parametrize("plan", TRITON_PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None])
@pytest.mark.parametrize("size", [(2, 33, 40, 72, 56), (3, 7, 64, 32, 16)])
def test_kernels_take_half_precision(device, assert_as_accurate, poisoned, plan, dtype, parameter_dtype, size):
    check(plan, arguments(*size, dtype, parameter_dtype, device), assert_as_accurate)


@pytest.mark.parametrize("plan", ["two_gemm", "concat_gemm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_of_pytorch_equal_the_reference(assert_as_accurate, plan, dtype):
    check(plan, arguments(2, 33, 40, 72, 56, dtype, torch.float32), assert_as_accurate)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(0, 4), st.integers(0, 40), *[st.integers(1, 70)] * 3),
    st.sampled_from(POINTER_PLANS),
    st.sampled_from(list(KAPPAS)),
    st.integers(0, 99),
)
def test_kernels_equal_the_reference_for_any_size(size, plan, kappa, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    args = arguments(*size, kappa=kappa, seed=seed)
    with force_plan(plan):
        actual = with_gradients(scale_concat_linear, args)
    for got, expected in zip(actual, with_gradients(scale_concat_linear_reference, args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", POINTER_PLANS)
def test_bias_and_kappa_may_be_constants(device, plan):
    x, skip, _, weight, bias = arguments(2, 9, 8, 16, 8, device=device)
    for args in ([x, skip, 0.25, weight], [x, skip, 0.25, weight, bias.detach()]):
        wanted = [x, skip, weight]
        with force_plan(plan):
            actual = with_gradients(scale_concat_linear, args, wanted)
        for got, expected in zip(actual, with_gradients(scale_concat_linear_reference, args, wanted), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 2], [1, 3, 4]])
def test_only_some_gradients_may_be_wanted(device, plan, wanted):
    args = [a.detach() for a in arguments(2, 9, 8, 16, 8, device=device)]
    leaves = [args[i].requires_grad_() for i in wanted]
    with force_plan(plan):
        actual = with_gradients(scale_concat_linear, args, leaves)
    for got, expected in zip(actual, with_gradients(scale_concat_linear_reference, args, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through(device, plan, value):
    args = arguments(2, 9, 40, 40, 24, device=device)
    with torch.no_grad():
        args[0][1, 7, 3] = value
        args[1][0, 2, 5] = value
        args[2][1, 1] = value
    with force_plan(plan):
        actual = with_gradients(scale_concat_linear, args)
    for got, expected in zip(actual, with_gradients(scale_concat_linear_reference, args), strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got[got.isfinite()], expected[got.isfinite()])


@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_arguments_may_be_strided_views(device, assert_as_accurate, plan):
    args = [a.detach() for a in arguments(2, 9, 16, 24, 8, torch.float16, device=device)]
    strided = [a.repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in args]
    check(plan, strided, assert_as_accurate)


@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_an_expanded_gradient_is_read_correctly(device, plan):
    args = arguments(2, 9, 16, 24, 8, torch.float16, device=device)
    with force_plan(plan):
        actual = torch.autograd.grad(scale_concat_linear(*args).sum(), args)
    for got, expected in zip(
        actual, torch.autograd.grad(scale_concat_linear_reference(*args).sum(), args), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (3, 0)])
def test_an_empty_batch_gives_zero_gradients(device, poisoned, plan, batch, tokens):
    args = arguments(batch, tokens, 8, 16, 24, torch.bfloat16, device=device)
    with force_plan(plan):
        out, *grads = with_gradients(scale_concat_linear, args)
    assert out.shape == (batch, tokens, 24)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(grads, args, strict=True))


@pytest.mark.parametrize("plan", ["pointer", "tma_cublas"])
def test_the_op_is_well_behaved(device, plan):
    args = arguments(2, 9, 8, 16, 8, torch.float16 if plan.startswith("tma") else torch.float32, device=device)
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if plan.startswith("tma") else {}
    op = torch.ops.scalelong_fast.scale_concat_linear.default
    torch.library.opcheck(op, (*args, plan), **tolerances)
    shared = args[2].detach()[0, 0].expand(2, 9)
    torch.library.opcheck(op, (args[0], args[1], shared, args[3].detach(), None, plan), **tolerances)


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_as_one_graph(device, plan):
    args = arguments(2, 9, 8, 16, 8, torch.float16, torch.float32, device, kappa="tokens")

    def loss(*a):
        return scale_concat_linear(*a).float().square().sum()

    backend = "inductor" if plan == "pointer_cublas" else "aot_eager"
    torch._dynamo.reset()
    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), args)
        eager = torch.autograd.grad(loss(*args), args)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_activations_may_be_checkpointed(device, plan):
    args = arguments(2, 9, 8, 16, 8, torch.float16, device=device)

    def function(*a):
        return scale_concat_linear(*a).float()

    with force_plan(plan):
        out = checkpoint(function, *args, use_reentrant=False)
        actual = torch.autograd.grad(out.sum(), args)
        for got, expected in zip(actual, torch.autograd.grad(function(*args).sum(), args), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_casts_the_features_and_the_weight(device, assert_as_accurate, plan):
    args = arguments(2, 9, 8, 16, 8, device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        actual = scale_concat_linear(*args)
        assert explain_plan("scale_concat_linear", *args).plan == plan
        torch.autograd.grad(actual.float().sum(), args)
    assert actual.dtype == torch.bfloat16
    cast = [a.bfloat16() if i in (0, 1, 3) else a for i, a in enumerate(args)]
    assert_as_accurate(actual, scale_concat_linear_reference(*cast), scale_concat_linear_reference(*doubled(cast)))


def test_autocast_lets_the_features_differ(device):
    args = arguments(2, 9, 8, 16, 8, device=device)
    args[1] = args[1].detach().bfloat16()
    with force_plan("pointer"), torch.autocast(device, torch.bfloat16):
        assert scale_concat_linear(*args).dtype == torch.bfloat16


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_derivative_is_refused(device, plan):
    args = arguments(1, 3, 8, 8, 8, torch.float16, device=device)
    with force_plan(plan):
        (first,) = torch.autograd.grad(scale_concat_linear(*args).sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), args[3])


@pytest.mark.parametrize("plan", POINTER_PLANS)
def test_flop_are_counted(device, plan):
    args = arguments(2, 9, 8, 16, 24, device=device)
    with force_plan(plan), FlopCounterMode(display=False) as counter:
        scale_concat_linear(*args).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 9) * 24 * 24


def test_double_precision_is_served_by_pytorch():
    args = arguments(2, 9, 8, 16, 8, torch.float64)
    assert explain_plan("scale_concat_linear", *args).plan in ("eager", "two_gemm", "concat_gemm")
    with force_plan("pointer"), pytest.raises(NotImplementedError, match="float64"):
        scale_concat_linear(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"arch": "sm_80"}, "sm_90"),
        ({"arch": "gfx942"}, "sm_90"),
        ({"widths": (512, 509, 512), "aligned": False}, r"multiples of 8.*\(512, 509, 512\)"),
        ({"rows": 2**31}, "2147483648 rows"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_obstacles_to_descriptors_are_named(change, message):
    facts = {"arch": "sm_90", "dtype": torch.bfloat16, "rows": 4096, "widths": (512, 512, 512)}
    pytest.importorskip("triton")
    assert tma_obstacle(Problem("scale_concat_linear", **facts)) is None
    obstacle = tma_obstacle(Problem("scale_concat_linear", **{**facts, **change}))
    assert re.search(message, obstacle)
    if "arch" in change:
        assert pointer_obstacle(Problem("scale_concat_linear", **{**facts, **change})) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_odd_widths_are_left_to_pytorch(arch):
    """Rows that start anywhere are loaded element by element, which no table expects to win."""
    facts = {"arch": arch, "dtype": torch.bfloat16, "rows": 32896, "widths": (509, 512, 512)}
    proposed = [plan for plan, _ in candidates("scale_concat_linear", Problem("", aligned=False, **facts))]
    assert proposed
    assert not set(proposed) & set(TRITON_PLANS)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 9), r"x: got \(2, 9\), expected shape \(B, L, D_x\)"),
        (0, torch.zeros(2, 9, 8, dtype=torch.int64), "x: got 'int64'"),
        (1, torch.zeros(2, 8, 16), r"skip: got \(2, 8, 16\), expected shape \(2, 9, D_s\)"),
        (1, torch.zeros(2, 9, 16, dtype=torch.float16), "skip: got 'float16', expected float32, the dtype of x"),
        (1, torch.zeros(2, 9, 16, device="meta"), "skip: got 'meta'"),
        (1, torch.zeros(2, 9, 16).to_sparse(), "skip: got a tensor of layout sparse_coo"),
        (2, torch.zeros(2, 8), r"kappa: got \(2, 8\)"),
        (2, True, "kappa: got True"),
        (2, torch.zeros(2, 9, dtype=torch.int64), "kappa: got 'int64'"),
        (3, torch.zeros(8, 23), r"weight: got \(8, 23\), expected shape \(D_out, 8 \+ 16\)"),
        (3, torch.zeros(8, 24, dtype=torch.bfloat16), "weight: got 'bfloat16'"),
        (4, torch.zeros(9), r"bias: got \(9,\), expected shape \(8,\)"),
        (4, torch.zeros(8, dtype=torch.float16), "bias: got 'float16'"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    args = arguments(2, 9, 8, 16, 8)
    args[position] = value
    with pytest.raises(UserError, match=message):
        scale_concat_linear(*args)


@pytest.mark.parametrize("plan", ["tma", "pointer", "tma_cublas", "pointer_cublas"])
def test_a_long_skip_that_is_not_scaled_takes_no_extra_pass(device, plan, monkeypatch):
    from scalelong_fast.kernels import dgrad

    passes = []
    monkeypatch.setattr(
        dgrad, "skip_rows_kernel", type("Spy", (), {"__getitem__": lambda _, grid: passes.append(grid)})()
    )
    generator = torch.Generator().manual_seed(0)
    x, skip, weight = (
        torch.randn(s, generator=generator).to(device, torch.float16).requires_grad_()
        for s in ((2, 9, 32), (2, 9, 32), (32, 64))
    )
    with force_plan(plan):
        actual = torch.autograd.grad(scale_concat_linear(x, skip, 1.0, weight).sum(), (x, skip, weight))
    assert not passes
    with force_plan("eager"):
        expected = torch.autograd.grad(scale_concat_linear(x, skip, 1.0, weight).sum(), (x, skip, weight))
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
