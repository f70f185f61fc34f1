"""``add_layer_norm_gap``: the sum under two handles, its norm and mean, and four gradients joined in one."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalelong_fast.errors import UserError
from scalelong_fast.ops import add_layer_norm_gap, explain_plan, force_plan, list_plans
from scalelong_fast.ops.add_layer_norm_gap import add_layer_norm_gap_reference

PLANS = list_plans("add_layer_norm_gap")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
USES = [use for n in range(1, 5) for use in itertools.combinations(range(4), n)]


def draw(shape, dtype, device, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(device, dtype)


def arguments(shape, dtype=FP32, branch_dtype=None, parameter_dtype=None, device="cpu", seed=0):
    x = draw(shape, dtype, device, seed) * 2 + 0.5
    branch = draw(shape, branch_dtype or dtype, device, seed + 1)
    weight, bias = (draw(shape[-1:], parameter_dtype or dtype, device, seed + i) for i in (2, 3))
    return [t.requires_grad_() for t in (x, branch, weight, bias)]


def cotangent(output, i):
    return draw(output.shape, torch.float64, "cpu", 9 + i).to(output)


def with_gradients(function, args, use=(0, 1, 2, 3), **options):
    outputs = function(*args, **options)
    used = [outputs[i] for i in use]
    grads = [cotangent(o, i) for i, o in zip(use, used, strict=True)]
    gradients = torch.autograd.grad(used, args, grads, allow_unused=True)
    return [*(o.detach() for o in outputs), *gradients]


def exactly(args, outputs, shown):
    """The op in float64, at the sum and with the output gradients that the given outputs' dtypes round to."""
    wide = [a.detach().double().requires_grad_() for a in args]
    rounding = (shown[2] - (wide[0] + wide[1])).detach()  # the statistics are those of the stored sum
    out, mean, total, skip = add_layer_norm_gap_reference(wide[0] + rounding, *wide[1:])
    grads = [cotangent(o, i).double() for i, o in enumerate(outputs)]
    return [
        *(t.detach() for t in (out, mean, total, skip)),
        *torch.autograd.grad([out, mean, total, skip], wide, grads),
    ]


def skip_native_on_a_gpu(plan, device):
    if plan == "native" and device == "cuda":
        pytest.skip("a CPU's plan")


def test_reference_has_the_gradients_of_its_definition():
    assert torch.autograd.gradcheck(add_layer_norm_gap_reference, arguments((2, 3, 10), torch.float64))


@pytest.mark.parametrize("plan", ["triton", "native"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17, 33), (2, 5, 130), (7, 256), (1, 3, 2, 19)])
def test_plans_equal_the_reference(device, assert_as_accurate, poisoned, plan, shape):
    skip_native_on_a_gpu(plan, device)
    args = arguments(shape, device=device)
    with force_plan(plan):
        actual = with_gradients(add_layer_norm_gap, args)
    pytorch = with_gradients(add_layer_norm_gap_reference, args)
    exact = exactly(args, pytorch[:4], pytorch)
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=3.0)


@pytest.mark.parametrize("plan", ["triton", "native"])
@pytest.mark.parametrize(
    ("dtype", "branch_dtype", "parameter_dtype", "out_dtype", "skip_dtype"),
    [
        (BF16, BF16, FP32, None, None),
        (BF16, BF16, BF16, None, None),
        (FP16, FP16, FP16, None, None),
        (FP16, FP16, FP32, FP32, None),
        (FP32, BF16, FP32, BF16, None),  # a float32 stream under autocast
        (FP32, BF16, FP32, BF16, BF16),
        (FP32, FP16, FP32, FP16, BF16),
        (FP32, FP32, FP32, None, FP16),
        (BF16, BF16, FP32, FP32, BF16),
    ],
)
def test_dtypes(device, assert_as_accurate, plan, dtype, branch_dtype, parameter_dtype, out_dtype, skip_dtype):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 21, 50), dtype, branch_dtype, parameter_dtype, device)
    options = {"out_dtype": out_dtype, "skip_dtype": skip_dtype}
    with force_plan(plan):
        actual = with_gradients(add_layer_norm_gap, args, **options)
    pytorch = with_gradients(add_layer_norm_gap_reference, args, **options)
    assert torch.equal(actual[2], pytorch[2])
    assert torch.equal(actual[3], pytorch[3])
    exact = exactly(args, pytorch[:4], pytorch)
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=3.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
@pytest.mark.parametrize("use", USES)
def test_any_outputs_may_go_unused(device, plan, skip_dtype, use):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 5, 20), device=device)
    with force_plan(plan):
        actual = with_gradients(add_layer_norm_gap, args, use, skip_dtype=skip_dtype)
    expected = with_gradients(add_layer_norm_gap_reference, args, use, skip_dtype=skip_dtype)
    for got, right in zip(actual, expected, strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_both_handles_hold_one_sum(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 5, 20), device=device)
    with force_plan(plan):
        _, _, total, skip = add_layer_norm_gap(*args)
    assert skip.data_ptr() == total.data_ptr()
    assert skip is not total


@pytest.mark.parametrize("plan", ["triton", "native"])
def test_residual_and_skip_gradients_arrive_apart(device, monkeypatch, plan):
    """Were the second handle made outside, autograd would add the two before the op saw them: one pass more."""
    skip_native_on_a_gpu(plan, device)
    module = importlib.import_module("scalelong_fast.ops.add_layer_norm_gap")
    name = "_backward" if plan == "triton" else "native_backward"
    seen = []

    def spy(*grads):
        seen.append(grads[2:4])
        return before(*grads)

    before = getattr(module, name)
    if plan == "triton":
        monkeypatch.setattr(module, "call", lambda op, *args: spy(*args) if op is before else op(*args))
    else:
        monkeypatch.setattr(module, name, spy)
    args = arguments((3, 5, 20), device=device)
    with force_plan(plan):
        out, _, total, skip = add_layer_norm_gap(*args)
        (out.sum() + (2.0 * total).sum() + (3.0 * skip).sum()).backward()
    ((grad_total, grad_skip),) = seen
    assert (grad_total == 2.0).all()
    assert (grad_skip == 3.0).all()


@pytest.mark.parametrize("plan", ["triton", "native"])
def test_x_and_branch_of_one_dtype_share_their_gradient(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 5, 20), device=device)
    with force_plan(plan):
        out, *_ = add_layer_norm_gap(*args)
    grad_x, grad_branch = torch.autograd.grad(out.square().sum(), args[:2])
    assert grad_x.data_ptr() == grad_branch.data_ptr()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 300), st.sampled_from(["triton", "native"]), st.integers(0, 99))
def test_plans_equal_the_reference_for_any_size(rows, width, plan, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    args = arguments((rows, width), seed=seed)
    with force_plan(plan):
        actual = with_gradients(add_layer_norm_gap, args)
    for got, expected in zip(actual, with_gradients(add_layer_norm_gap_reference, args), strict=True):
        # A row of a few nearly equal numbers has 1/σ up to 316: its gradient cancels.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 if width < 4 else 1e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(device, plan, position, value):
    skip_native_on_a_gpu(plan, device)
    args = arguments((3, 4, 20), device=device)
    with torch.no_grad():
        args[position][1, 2, 7] = value
    with force_plan(plan):
        out, mean, total, _ = add_layer_norm_gap(*args)
    assert total.isfinite().logical_not().sum() == 1
    assert mean.isfinite().logical_not().sum() == 1
    assert out.isnan().sum() == 20
    assert out[1, 2].isnan().all()


@pytest.mark.parametrize("plan", PLANS)
def test_arguments_may_be_strided_views(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = [a.detach() for a in arguments((2, 6, 30), device=device)]
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[1] = args[1].mT.contiguous().mT
    args[2] = args[2].repeat_interleave(2)[::2]
    args = [a.requires_grad_() for a in args]
    with force_plan(plan):
        actual = with_gradients(add_layer_norm_gap, args)
    for got, expected in zip(actual, with_gradients(add_layer_norm_gap_reference, args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
def test_expanded_gradients_are_read_correctly(device, plan, skip_dtype):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 6, 30), device=device)

    def loss(function):
        return sum(factor * t.sum() for factor, t in enumerate(function(*args, skip_dtype=skip_dtype), 1))

    with force_plan(plan):
        actual = torch.autograd.grad(loss(add_layer_norm_gap), args)
    for got, expected in zip(actual, torch.autograd.grad(loss(add_layer_norm_gap_reference), args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
def test_an_empty_batch(device, plan, skip_dtype):
    skip_native_on_a_gpu(plan, device)
    args = arguments((0, 6, 30), device=device)
    with force_plan(plan):
        results = with_gradients(add_layer_norm_gap, args, skip_dtype=skip_dtype)
    assert [tuple(t.shape) for t in results[:6]] == [(0, 6, 30), (0, 6), *[(0, 6, 30)] * 4]
    assert not results[6].any()
    assert not results[7].any()


@pytest.mark.parametrize(
    ("branch_dtype", "skip_dtype"), [(FP32, None), pytest.param(BF16, BF16, id="narrower-branch-and-skip")]
)
def test_the_op_is_well_behaved(device, branch_dtype, skip_dtype):
    args = (*arguments((2, 5, 40), branch_dtype=branch_dtype, parameter_dtype=FP32, device=device), 1e-5)
    torch.library.opcheck(torch.ops.scalelong_fast.add_layer_norm_gap.default, (*args, FP32, skip_dtype, "triton"))


def several(*args, **options):
    out, mean, total, skip = add_layer_norm_gap(*args, **options)
    return out.sin().sum() + mean.square().sum() + (total * skip).float().sum()


@pytest.mark.parametrize(
    ("plan", "backend"),
    [*itertools.product(PLANS, ["aot_eager"]), ("triton", "inductor"), ("native", "inductor")],
)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
def test_compiles_as_one_graph(device, plan, backend, skip_dtype):
    skip_native_on_a_gpu(plan, device)
    if backend == "inductor" and skip_dtype is not None:
        pytest.skip("aot_eager is enough")
    args = arguments((2, 5, 40), branch_dtype=skip_dtype, parameter_dtype=FP32, device=device)
    torch._dynamo.reset()
    with force_plan(plan):
        compiled = torch.compile(several, fullgraph=True, backend=backend)
        actual = torch.autograd.grad(compiled(*args, skip_dtype=skip_dtype), args)
        expected = torch.autograd.grad(several(*args, skip_dtype=skip_dtype), args)
    for got, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("use", [(0,), (1,), (2, 3), (0, 2)])
def test_compiled_outputs_may_go_unused(device, plan, use):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)

    def loss(*a):
        outputs = add_layer_norm_gap(*a)
        return sum((i + 1) * outputs[i].sin().sum() for i in use)

    torch._dynamo.reset()
    with force_plan(plan):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args)
        actual = torch.autograd.grad(compiled, args[:2])
    torch.testing.assert_close(actual, torch.autograd.grad(loss(*args), args[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_a_stack_of_blocks_trains_compiled_for_any_batch(device, plan):
    """As in the U-ViT: the stream runs through, and the skip comes back with its mean."""
    skip_native_on_a_gpu(plan, device)

    def stack(x, weight, bias):
        branch, skips = x.sin(), []
        for _ in range(2):
            y, mean, x, skip = add_layer_norm_gap(x, branch, weight, bias)
            skips.append((skip, mean))
            branch = torch.tanh(y)
        for skip, mean in reversed(skips):
            x = x + skip * mean.sigmoid().unsqueeze(-1)
        return x.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x, _, weight, bias = arguments((batch, 5, 40), device=device)
        with force_plan(plan):
            actual = torch.autograd.grad(compiled(x, weight, bias), [x, weight, bias])
        with force_plan("eager"):
            expected = torch.autograd.grad(stack(x, weight, bias), [x, weight, bias])
        for got, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_leaves_the_stream_alone(device, plan):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)
    with force_plan(plan), torch.autocast(device, BF16):
        actual = with_gradients(add_layer_norm_gap, args)
    for got, expected in zip(actual, with_gradients(add_layer_norm_gap_reference, args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
def test_checkpointing_gives_the_same_gradients(device, plan, skip_dtype):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)

    def checkpointed(*a, **options):
        return torch.utils.checkpoint.checkpoint(add_layer_norm_gap, *a, use_reentrant=False, **options)

    with force_plan(plan):
        actual = with_gradients(checkpointed, args, skip_dtype=skip_dtype)
        expected = with_gradients(add_layer_norm_gap, args, skip_dtype=skip_dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("skip_dtype", [None, BF16])
@pytest.mark.parametrize("output", range(4))
def test_a_second_derivative_is_refused(device, plan, skip_dtype, output):
    skip_native_on_a_gpu(plan, device)
    args = arguments((2, 5, 40), device=device)
    with force_plan(plan):
        value = add_layer_norm_gap(*args, skip_dtype=skip_dtype)[output].square().sum()
        (first,) = torch.autograd.grad(value, args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="add_layer_norm_gap: got a second derivative"):
        torch.autograd.grad(first.sum(), args[0])


def test_no_gradient_is_wanted(device):
    args = [a.detach() for a in arguments((2, 5, 40), device=device)]
    for plan in PLANS:
        skip_native_on_a_gpu(plan, device)
        with force_plan(plan), torch.inference_mode():
            actual = add_layer_norm_gap(*args)
        for got, expected in zip(actual, add_layer_norm_gap_reference(*args), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_float64_is_served_by_pytorch(device):
    args = arguments((2, 5, 40), torch.float64, device=device)
    assert explain_plan(add_layer_norm_gap, *args).plan in ("native", "eager")
    assert torch.autograd.gradcheck(lambda *a: add_layer_norm_gap(*a), arguments((2, 3, 6), torch.float64))
    with force_plan("triton"), pytest.raises(NotImplementedError, match="add_layer_norm_gap not supported: float64"):
        add_layer_norm_gap(*args)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(40), r"x: got \(40,\), expected shape \(\.\.\., D\)"),
        (1, None, "branch: got 'NoneType', expected a torch.Tensor"),
        (1, torch.zeros(3, 40), r"branch: got \(3, 40\), expected shape \(2, 40\)"),
        (1, torch.zeros(2, 40, dtype=torch.float64), "branch: got 'float64', expected float32, the dtype of x"),
        (1, torch.zeros(2, 40, dtype=torch.int64), "branch: got 'int64'"),
        (1, torch.zeros(2, 40, device="meta"), "branch: got 'meta'"),
        (2, torch.zeros(39), r"weight: got \(39,\), expected shape \(40,\)"),
        (3, torch.zeros(40, dtype=torch.float16), "bias: got 'float16', expected float32"),
        (4, -1.0, r"eps: got -1.0"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    args = [*arguments((2, 40)), 1e-5]
    args[position] = value
    with pytest.raises(UserError, match=message):
        add_layer_norm_gap(*args)


def test_bf16_and_fp16_do_not_mix():
    with pytest.raises(UserError, match="branch: got 'float16', expected bfloat16"):
        add_layer_norm_gap(*arguments((2, 40), BF16, FP16))


@pytest.mark.parametrize("skip_dtype", [torch.float64, torch.int8, "bfloat16"])
def test_a_wrong_skip_dtype_is_named(skip_dtype):
    with pytest.raises(UserError, match="skip_dtype: got"):
        add_layer_norm_gap(*arguments((2, 40)), skip_dtype=skip_dtype)
    with pytest.raises(UserError, match=r"skip_dtype: got torch\.float32"):
        add_layer_norm_gap(*arguments((2, 40), BF16), skip_dtype=FP32)
