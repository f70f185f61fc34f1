"""``ls_skip_linear``: every plan gives the reference's output, κ and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans, ls_skip_linear
from scalelong_fast.ops.ls_skip_linear import ls_skip_linear_reference

PLANS = list_plans("ls_skip_linear")
TRITON_PLANS = ("tma", "pointer", "tma_cublas", "pointer_cublas")
POINTER_PLANS = ("pointer", "pointer_cublas")
POOLED = pytest.mark.parametrize("pooled", [False, True])


class Call:
    """Arguments of one call, ``pooled`` among the tensors where it is given."""

    def __init__(
        self,
        size,
        hidden=3,
        dtype=torch.float32,
        parameter_dtype=None,
        device="cpu",
        *,
        pooled=False,
        activation="relu",
        seed=0,
    ):
        batch, tokens, d_x, d_s, d_out = size
        generator = torch.Generator().manual_seed(seed)
        gate = ((hidden, tokens), (hidden,), (tokens, hidden), (tokens,))
        shapes = ((batch, tokens, d_x), (batch, tokens, d_s), *gate, (d_out, d_x + d_s), (d_out,), (batch, tokens))
        values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        values[1] += 0.5
        values[6] /= (d_x + d_s) ** 0.5
        parameters = parameter_dtype or dtype
        dtypes = (dtype, dtype, *[parameters] * 4, dtype, parameters, parameters)
        self.tensors = [v.to(device, t).requires_grad_() for v, t in zip(values, dtypes, strict=True)]
        if not pooled:
            self.tensors.pop()
        self.activation = activation

    def run(self, function, tensors=None):
        *args, last = self.tensors if tensors is None else tensors
        if len(self.tensors) == 9:
            return function(*args, pooled=last, activation=self.activation)
        return function(*args, last, activation=self.activation)

    def with_gradients(self, function, tensors=None, outputs=(0, 1)):
        tensors = self.tensors if tensors is None else tensors
        results = self.run(function, tensors)
        generator = torch.Generator().manual_seed(1)
        # Representable in bfloat16, and so the same in every dtype.
        grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r) for r in results]
        chosen = [results[i] for i in outputs]
        return [r.detach() for r in results] + list(
            torch.autograd.grad(chosen, tensors, [grads[i] for i in outputs], allow_unused=True)
        )

    def exactly(self, **kwargs):
        doubled = [t.detach().double().requires_grad_() for t in self.tensors]
        return self.with_gradients(ls_skip_linear_reference, doubled, **kwargs)


GATE = slice(4, 8)  # the gate's gradients among the results


def check(plan, call, assert_as_accurate, factor=2.0):
    with force_plan(plan):
        actual = call.with_gradients(ls_skip_linear)
    pytorch = call.with_gradients(ls_skip_linear_reference)
    exact = call.exactly()
    # The gate's gradients hang on a few numbers, one for each sample and hidden unit, on which PyTorch's error is a
    # matter of luck: they are judged together, each in units of its own size.
    sizes = [true.square().mean().sqrt().clamp_min(1e-30) for true in exact[GATE]]
    for results in (actual, pytorch, exact):
        joined = [(r.double() / size).flatten() for r, size in zip(results[GATE], sizes, strict=True)]
        results[GATE] = [torch.cat(joined).to(torch.float32 if results is not exact else torch.float64)]
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor)


@POOLED
@pytest.mark.parametrize("plan", ["two_gemm", "concat_gemm", "eager"])
@pytest.mark.parametrize("activation", ["relu", "elu", "mish"])
def test_plans_of_pytorch_have_the_gradients_of_their_definition(plan, activation, pooled):
    call = Call((2, 3, 4, 5, 3), 2, torch.float64, pooled=pooled, activation=activation)

    def function(*tensors):
        with force_plan(plan):
            return call.run(ls_skip_linear, tensors)

    torch.testing.assert_close(function(*call.tensors), call.run(ls_skip_linear_reference))
    assert torch.autograd.gradcheck(function, call.tensors)


@POOLED
@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize(
    ("size", "hidden", "activation"),
    [((5, 17, 33, 47, 20), 3, "elu"), ((2, 40, 64, 64, 64), 4, "mish"), ((3, 65, 8, 31, 33), 2, "relu")],
)
def test_kernels_equal_the_reference(device, assert_as_accurate, poisoned, plan, size, hidden, activation, pooled):
    call = Call(size, hidden, device=device, pooled=pooled, activation=activation)
    check(plan, call, assert_as_accurate, factor=4.0)


@POOLED
@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 1, 40, 1), (1, 16, 40, 1, 3)])
def test_kernels_equal_the_reference_at_the_edge(device, poisoned, plan, size, pooled):
    call = Call(size, 1, device=device, pooled=pooled, activation="elu")
    with force_plan(plan):
        actual = call.with_gradients(ls_skip_linear)
    for got, expected in zip(actual, call.with_gradients(ls_skip_linear_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@POOLED
@pytest.mark.parametrize("plan", TRITON_PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_take_half_precision(device, assert_as_accurate, poisoned, plan, dtype, pooled):
    # With pooled given the parameters are narrow as well.
    call = Call((2, 33, 40, 72, 56), 2, dtype, None if pooled else torch.float32, device, pooled=pooled)
    check(plan, call, assert_as_accurate)


@POOLED
@pytest.mark.parametrize("plan", ["two_gemm", "concat_gemm", "eager"])
def test_plans_of_pytorch_take_half_precision(device, assert_as_accurate, plan, pooled):
    call = Call((2, 33, 40, 72, 56), 2, torch.bfloat16, torch.float32, device, pooled=pooled)
    check(plan, call, assert_as_accurate)


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(0, 4), st.integers(1, 40), *[st.integers(1, 70)] * 3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(POINTER_PLANS),
    st.integers(0, 99),
)
def test_kernels_equal_the_reference_for_any_size(size, hidden, pooled, plan, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    call = Call(size, hidden, pooled=pooled, activation="elu", seed=seed)
    with force_plan(plan):
        actual = call.with_gradients(ls_skip_linear)
    for got, expected in zip(actual, call.with_gradients(ls_skip_linear_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@POOLED
@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("outputs", [(0,), (1,)])
def test_either_output_may_go_unused(device, plan, outputs, pooled):
    call = Call((2, 9, 8, 16, 8), device=device, pooled=pooled, activation="elu")
    with force_plan(plan):
        actual = call.with_gradients(ls_skip_linear, outputs=outputs)
    expected = call.with_gradients(ls_skip_linear_reference, outputs=outputs)
    for got, right in zip(actual, expected, strict=True):
        if right is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("wanted", [[1], [6], [7], [0, 2], [3, 4, 5], [8]])
def test_only_some_gradients_may_be_wanted(device, plan, wanted):
    call = Call((2, 9, 8, 16, 8), device=device, pooled=8 in wanted, activation="elu")
    call.tensors = [t.detach() for t in call.tensors]
    leaves = [call.tensors[i].requires_grad_() for i in wanted]
    with force_plan(plan):
        actual = torch.autograd.grad(call.run(ls_skip_linear)[0].sum(), leaves)
    expected = torch.autograd.grad(call.run(ls_skip_linear_reference)[0].sum(), leaves)
    for got, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", POINTER_PLANS)
def test_the_bias_may_be_absent(device, plan):
    tensors = Call((2, 9, 8, 16, 8), device=device).tensors[:7]
    with force_plan(plan):
        actual = torch.autograd.grad(ls_skip_linear(*tensors)[0].sum(), tensors)
    for got, expected in zip(
        actual, torch.autograd.grad(ls_skip_linear_reference(*tensors)[0].sum(), tensors), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@POOLED
@pytest.mark.parametrize("plan", POINTER_PLANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through(device, plan, value, pooled):
    call = Call((3, 9, 8, 16, 8), device=device, pooled=pooled)
    with torch.no_grad():
        call.tensors[0][2, 3, 1] = value
        call.tensors[1][1, 7, 3] = value
    with force_plan(plan):
        actual = call.run(ls_skip_linear)
    for got, expected in zip(actual, call.run(ls_skip_linear_reference), strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got[got.isfinite()], expected[got.isfinite()])


@POOLED
@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_arguments_may_be_strided_views(device, assert_as_accurate, plan, pooled):
    call = Call((2, 9, 16, 24, 8), dtype=torch.float16, device=device, pooled=pooled)
    call.tensors = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in call.tensors]
    check(plan, call, assert_as_accurate)


@POOLED
@pytest.mark.parametrize("plan", POINTER_PLANS)
def test_expanded_gradients_are_read_correctly(device, plan, pooled):
    call = Call((2, 9, 16, 24, 8), device=device, pooled=pooled, activation="elu")

    def grads(function):
        out, kappa = call.run(function)
        return torch.autograd.grad(out.sum() + kappa.sum(), call.tensors)

    with force_plan(plan):
        actual = grads(ls_skip_linear)
    for got, expected in zip(actual, grads(ls_skip_linear_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@POOLED
@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_batch_gives_zero_gradients(device, poisoned, plan, pooled):
    call = Call((0, 5, 8, 16, 24), dtype=torch.bfloat16, device=device, pooled=pooled)
    with force_plan(plan):
        out, kappa, *grads = call.with_gradients(ls_skip_linear)
    assert (out.shape, kappa.shape) == ((0, 5, 24), (0, 5))
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, call.tensors, strict=True))


@POOLED
def test_the_op_is_well_behaved(device, pooled):
    call = Call((2, 9, 8, 16, 8), device=device, pooled=pooled, activation="elu")
    tensors = call.tensors if pooled else [*call.tensors, None]
    op = torch.ops.scalelong_fast.ls_skip_linear.default
    torch.library.opcheck(op, (*tensors, "elu", "pointer_cublas"))


@POOLED
@pytest.mark.parametrize("plan", PLANS)
def test_compiles_as_one_graph(device, plan, pooled):
    if pooled and plan not in ("pointer", "concat_gemm"):
        pytest.skip("covered by these two")
    call = Call((2, 9, 8, 16, 8), 3, torch.float16, torch.float32, device, pooled=pooled, activation="elu")

    def loss(*tensors):
        out, kappa = call.run(ls_skip_linear, tensors)
        return out.float().square().sum() + kappa.square().sum()

    backend = "inductor" if plan == "pointer" and pooled else "aot_eager"
    torch._dynamo.reset()
    with force_plan(plan):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)(*call.tensors)
        actual = torch.autograd.grad(compiled, call.tensors)
        eager = torch.autograd.grad(loss(*call.tensors), call.tensors)
    for got, expected in zip(actual, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


@POOLED
@pytest.mark.parametrize("plan", PLANS)
def test_activations_may_be_checkpointed(device, plan, pooled):
    call = Call((2, 9, 8, 16, 8), dtype=torch.float16, device=device, pooled=pooled, activation="elu")

    def grads(function):
        out, kappa = function(*call.tensors)
        return torch.autograd.grad(out.float().sum() + kappa.sum(), call.tensors)

    def function(*tensors):
        return call.run(ls_skip_linear, tensors)

    with force_plan(plan):
        actual = grads(lambda *tensors: checkpoint(function, *tensors, use_reentrant=False))
        for got, expected in zip(actual, grads(function), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_casts_the_features_and_the_weight(device, assert_as_accurate, plan):
    call = Call((2, 9, 8, 16, 8), device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        out, kappa = call.run(ls_skip_linear)
        torch.autograd.grad(out.float().sum() + kappa.sum(), call.tensors)
    assert (out.dtype, kappa.dtype) == (torch.bfloat16, torch.float32)
    cast = [t.bfloat16() if i in (0, 1, 6) else t for i, t in enumerate(call.tensors)]
    exact = [t.detach().double() for t in cast]
    for got, pytorch, true in zip(
        (out, kappa), call.run(ls_skip_linear_reference, cast), call.run(ls_skip_linear_reference, exact), strict=True
    ):
        assert_as_accurate(got, pytorch, true)


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_derivative_is_refused(device, plan):
    call = Call((1, 3, 8, 8, 8), 1, torch.float16, device=device)
    with force_plan(plan):
        (first,) = torch.autograd.grad(call.run(ls_skip_linear)[0].sum(), call.tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), call.tensors[6])


@pytest.mark.parametrize("plan", POINTER_PLANS)
def test_flop_are_counted(device, plan):
    call = Call((2, 9, 8, 16, 24), 3, device=device)
    with force_plan(plan), FlopCounterMode(display=False) as counter:
        call.run(ls_skip_linear)[0].sum().backward()
    assert counter.get_total_flops() == 3 * (2 * (2 * 9) * 24 * 24 + 4 * 2 * 9 * 3)


def test_a_hidden_width_that_does_not_fit_is_refused(device):
    call = Call((1, 2, 8, 8, 8), 1025, device=device)
    with force_plan("pointer"), pytest.raises(NotImplementedError, match="1025"):
        call.run(ls_skip_linear)
    assert explain_plan("ls_skip_linear", *call.tensors).plan in ("eager", "two_gemm", "concat_gemm")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 9), r"x: got \(2, 9\), expected shape \(B, L, D_x\)"),
        (1, torch.zeros(1, 9, 16), r"skip: got \(1, 9, 16\), expected shape \(2, 9, D_s\)"),
        (2, torch.zeros(3, 8), r"w_down: got \(3, 8\), expected shape \(H, 9\)"),
        (2, torch.zeros(0, 9), r"max\(1, N // r\)"),
        (2, None, "w_down: got 'NoneType'"),
        (4, torch.zeros(3, 9), r"w_up: got \(3, 9\), expected shape \(9, 3\)"),
        (5, torch.zeros(9, dtype=torch.float16), "b_up: got 'float16'"),
        (6, torch.zeros(8, 23), r"weight: got \(8, 23\)"),
        (7, torch.zeros(7), r"bias: got \(7,\), expected shape \(8,\)"),
        (8, torch.zeros(2, 8), r"pooled: got \(2, 8\), expected shape \(2, 9\)"),
        (8, torch.zeros(2, 9, dtype=torch.int32), "pooled: got 'int32'"),
        (8, torch.zeros(2, 9, dtype=torch.float64), "pooled: got 'float64'"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    call = Call((2, 9, 8, 16, 8), pooled=True)
    call.tensors[position] = value
    with pytest.raises(UserError, match=message):
        call.run(ls_skip_linear)


def test_an_unknown_activation_is_named():
    with pytest.raises(UserError, match="activation: got 'gelu'"):
        Call((2, 9, 8, 16, 8), activation="gelu").run(ls_skip_linear)
