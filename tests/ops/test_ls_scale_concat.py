"""``ls_scale_concat``: every plan gives the reference's concat, κ and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans, ls_scale_concat, scale_concat, se_gate
from scalelong_fast.ops.ls_scale_concat import ls_scale_concat_reference

ACTIVATIONS = ("relu", "elu", "mish")
KERNELS = ("two_launch", "single_launch")

# (layout, shape of x, shape of skip, H)
CASES = [
    ("rows", (2, 1, 1), (2, 1, 1), 1),
    ("rows", (3, 17, 40), (3, 17, 33), 9),
    ("rows", (2, 70, 64), (2, 70, 64), 4),
    ("planes", (2, 3, 50), (2, 5, 50), 3),
    ("planes", (2, 5, 7, 9), (2, 20, 7, 9), 8),
    ("planes", (3, 33, 4, 4), (3, 17, 4, 4), 1),
    ("planes", (2, 4, 3, 4, 5), (2, 3, 3, 4, 5), 17),
    ("pixels", (2, 5, 7, 9), (2, 20, 7, 9), 11),
    ("pixels", (3, 32, 4, 4), (3, 48, 4, 4), 3),
    ("pixels", (2, 4, 3, 4, 5), (2, 3, 3, 4, 5), 2),
]
ONE_OF_EACH = [CASES[1], CASES[4], CASES[7]]


@pytest.fixture
def plans(device):
    """Plans that run on the device."""
    return [p for p in list_plans("ls_scale_concat") if device == "cuda" or p != "cooperative"]


@pytest.fixture
def forms(plans, request):
    """``plans`` that differ: where pooled is given the kernels are one and the same."""
    pooled = request.node.callspec.params["pooled"]
    return [p for p in plans if not (pooled and p in ("single_launch", "cooperative"))]


def format_of(layout, dims):
    if layout != "pixels":
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def arguments(case, dtype=torch.float32, parameter_dtype=None, device="cpu", pooled=False, seed=0):
    """(tensors, keyword arguments); the tensors end with pooled where that is wanted."""
    layout, x_shape, skip_shape, hidden = case
    count = skip_shape[1]
    generator = torch.Generator().manual_seed(seed)
    shapes = [x_shape, skip_shape, (hidden, count), (hidden,), (count, hidden), (count,)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[1] += 0.5
    values[2] /= count**0.5
    dtypes = [dtype] * 2 + [parameter_dtype or dtype] * 4
    if pooled:
        values.append(values[1].flatten(2).mean(2))
        dtypes.append(torch.promote_types(dtype, torch.float32))
    values = [v.to(device, t) for v, t in zip(values, dtypes, strict=True)]
    for i in range(2):
        values[i] = values[i].contiguous(memory_format=format_of(layout, len(x_shape)))
    return [v.requires_grad_() for v in values], {"dim": -1 if layout == "rows" else 1}


def apply(function, args, **kwargs):
    return function(*args[:6], pooled=args[6] if len(args) > 6 else None, **kwargs)


def double(args):
    return [a.detach().double().requires_grad_() for a in args]


def with_gradients(function, args, **kwargs):
    outputs = apply(function, args, **kwargs)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, args, grads)]


def assert_all_as_accurate(check, actual, pytorch, exact, factor=2.0):
    """Each result as accurate as PyTorch's; the gradients of the gate's parameters are judged together.

    One of them alone may be a single sum of terms that cancel, which PyTorch hits exactly by luck.
    """

    def grouped(results):
        return [*results[:4], torch.cat([g.flatten() for g in results[4:8]]), *results[8:]]

    for got, same_dtype, true in zip(grouped(actual), grouped(pytorch), grouped(exact), strict=True):
        check(got, same_dtype, true, factor=factor)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("case", [("rows", (2, 3, 4), (2, 3, 2), 2), ("pixels", (2, 2, 3, 2), (2, 3, 3, 2), 2)])
def test_reference_has_the_gradients_of_its_definition(case, pooled, activation):
    args, kwargs = arguments(case, torch.float64, pooled=pooled)
    assert torch.autograd.gradcheck(
        lambda *a: apply(ls_scale_concat_reference, a, activation=activation, **kwargs), args
    )


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_reference_is_its_parts(case):
    args, kwargs = arguments(case)
    out, kappa = apply(ls_scale_concat_reference, args, **kwargs)
    expected = se_gate(args[1].flatten(2).mean(2), *args[2:])
    torch.testing.assert_close(kappa, expected)
    torch.testing.assert_close(out, scale_concat(*args[:2], expected, **kwargs))


@pytest.mark.parametrize("plan", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(device, assert_as_accurate, poisoned, case, plan):
    args, kwargs = arguments(case, device=device)
    with force_plan(plan):
        actual = with_gradients(ls_scale_concat, args, **kwargs)
    pytorch = with_gradients(ls_scale_concat_reference, args, **kwargs)
    exact = with_gradients(ls_scale_concat_reference, double(args), **kwargs)
    assert_all_as_accurate(assert_as_accurate, actual, pytorch, exact, factor=3.0)


@pytest.mark.parametrize(("activation", "skip_first"), [("elu", True), ("mish", False)])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_every_option(device, assert_as_accurate, poisoned, forms, case, pooled, activation, skip_first):
    args, kwargs = arguments(case, device=device, pooled=pooled)
    kwargs |= {"activation": activation, "skip_first": skip_first}
    pytorch = with_gradients(ls_scale_concat_reference, args, **kwargs)
    exact = with_gradients(ls_scale_concat_reference, double(args), **kwargs)
    for plan in forms:
        with force_plan(plan):
            actual = with_gradients(ls_scale_concat, args, **kwargs)
        assert_all_as_accurate(assert_as_accurate, actual, pytorch, exact, factor=3.0)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "pooled"),
    [(torch.float16, None, False), (torch.bfloat16, torch.float32, True), (torch.bfloat16, None, False)],
)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_half_precision(device, assert_as_accurate, forms, case, dtype, parameter_dtype, pooled):
    args, kwargs = arguments(case, dtype, parameter_dtype, device, pooled)
    pytorch = with_gradients(ls_scale_concat_reference, args, **kwargs)
    exact = with_gradients(ls_scale_concat_reference, double(args), **kwargs)
    for plan in forms:
        with force_plan(plan):
            actual = with_gradients(ls_scale_concat, args, **kwargs)
        assert [actual[0].dtype, actual[1].dtype] == [dtype, torch.float32]
        assert_all_as_accurate(assert_as_accurate, actual, pytorch, exact)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_the_cooperative_kernel_equals_the_reference(device, poisoned, case):
    # In the interpreter every sample has one program, which waits for itself alone.
    from scalelong_fast.kernels.ls_concat import ls_concat_forward

    args, kwargs = arguments(case, device=device)
    args = [a.detach() for a in args]
    out, kappa, gap, hidden = ls_concat_forward(*args, None, "elu", case[0], False, "cooperative")
    expected = ls_scale_concat_reference(*args, activation="elu", **kwargs)
    torch.testing.assert_close((out, kappa), expected)
    mean = args[1].flatten(2).mean(2)
    torch.testing.assert_close(gap, mean)
    torch.testing.assert_close(hidden, torch.nn.functional.linear(mean, args[2], args[3]))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["rows", "planes", "pixels"]),
    st.integers(0, 4),
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
    st.integers(1, 60),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(KERNELS),
)
def test_kernel_equals_the_reference_for_any_size(layout, batch, widths, extent, hidden, pooled, plan):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    shapes = [(batch, extent, w) if layout == "rows" else (batch, w, extent, 2) for w in widths]
    args, kwargs = arguments((layout, *shapes, hidden), pooled=pooled)
    with force_plan(plan):
        actual = with_gradients(ls_scale_concat, args, **kwargs)
    for got, expected in zip(actual, with_gradients(ls_scale_concat_reference, args, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(device, forms, poisoned, used, pooled):
    args, kwargs = arguments(CASES[1], device=device, pooled=pooled)
    kwargs["skip_first"] = pooled

    def gradients(function):
        outputs = apply(function, args, **kwargs)
        return torch.autograd.grad(outputs[used].square().sum(), args, allow_unused=True, materialize_grads=True)

    expected = gradients(ls_scale_concat_reference)
    for plan in forms:
        with force_plan(plan):
            for got, true in zip(gradients(ls_scale_concat), expected, strict=True):
                torch.testing.assert_close(got, true)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 5), (6,)])
def test_gradients_of_some_inputs_only(device, plans, wanted):
    args = [a.detach() for a in arguments(CASES[4], device=device, pooled=True)[0]]
    inputs = [args[i].requires_grad_() for i in wanted]
    expected = torch.autograd.grad(apply(ls_scale_concat_reference, args)[0].square().sum(), inputs)
    for plan in plans:
        with force_plan(plan):
            actual = torch.autograd.grad(apply(ls_scale_concat, args)[0].square().sum(), inputs)
        for got, true in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("case", CASES[1:])
def test_layout_is_that_of_cat(device, plans, case):
    args, kwargs = arguments(case, device=device)
    args = [a.detach() for a in args]
    expected = torch.cat(args[:2], kwargs["dim"])
    for plan in plans:
        with force_plan(plan):
            out, _ = ls_scale_concat(*args, **kwargs)
        assert out.stride() == expected.stride()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_the_gradient_has_the_layout_of_the_skip(device, case):
    args, kwargs = arguments(case, device=device)
    with force_plan("two_launch"):
        out, _ = ls_scale_concat(*args, **kwargs)
    (grad,) = torch.autograd.grad(out.square().sum(), args[1])
    assert grad.is_contiguous(memory_format=format_of(case[0], grad.dim()))


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]])
def test_arguments_may_be_strided_views(device, plans, case):
    args, kwargs = arguments(case, device=device, pooled=True)
    args = [a.detach() for a in args]
    strided = [torch.cat([a, a], 1).narrow(1, a.shape[1], a.shape[1]) for a in args[:2]]
    strided += [a.repeat_interleave(2, -1)[..., ::2] for a in args[2:]]
    strided = [a.requires_grad_() for a in strided]
    expected = {count: with_gradients(ls_scale_concat_reference, strided[:count], **kwargs) for count in (6, 7)}
    for plan in plans:
        count = 6 if plan == "single_launch" else 7
        with force_plan(plan):
            actual = with_gradients(ls_scale_concat, strided[:count], **kwargs)
        for got, true in zip(actual, expected[count], strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_expanded_gradients_are_read_correctly(device, plans, case):
    args, kwargs = arguments(case, device=device)

    def gradients(function):
        out, kappa = function(*args, **kwargs)
        return torch.autograd.grad(out.sum() + kappa.sum(), args)

    expected = gradients(ls_scale_concat_reference)
    for plan in plans:
        with force_plan(plan):
            for got, true in zip(gradients(ls_scale_concat), expected, strict=True):
                torch.testing.assert_close(got, true)


@pytest.mark.parametrize("plan", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]])
def test_nan_and_infinity_come_through(device, case, value, plan):
    args, kwargs = arguments(case, device=device)
    with torch.no_grad():
        args[0][0, 2, 3] = value
        args[1][1, 3, 2] = value
    with force_plan(plan):
        actual = ls_scale_concat(*args, **kwargs)
    expected = ls_scale_concat_reference(*args, **kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("pooled", [False, True])
def test_an_empty_batch(device, plans, poisoned, pooled):
    for layout, *shapes in (("rows", (0, 5, 4), (0, 5, 6)), ("pixels", (0, 5, 4, 3), (0, 6, 4, 3))):
        args, kwargs = arguments((layout, *shapes, 2), device=device, pooled=pooled)
        expected = with_gradients(ls_scale_concat_reference, args, **kwargs)
        for plan in plans:
            with force_plan(plan):
                actual = with_gradients(ls_scale_concat, args, **kwargs)
            for got, true in zip(actual, expected, strict=True):
                torch.testing.assert_close(got, true)


@pytest.mark.parametrize(
    ("case", "pooled", "plan"), [(CASES[1], False, "single_launch"), (CASES[8], True, "two_launch")]
)
def test_the_op_is_well_behaved(device, case, pooled, plan):
    args, _ = arguments(case, device=device, pooled=pooled)
    given = args[6] if pooled else None
    torch.library.opcheck(
        torch.ops.scalelong_fast.ls_scale_concat.default, (*args[:6], given, "mish", case[0], True, plan)
    )


@pytest.mark.parametrize(
    ("backend", "plan", "pooled"),
    [("inductor", "two_launch", False), ("aot_eager", "two_launch", True)]
    + [("aot_eager", plan, False) for plan in list_plans("ls_scale_concat")],
)
def test_compiles_as_one_graph(device, plans, plan, pooled, backend):
    if plan not in plans:
        pytest.skip("needs a GPU")
    args, kwargs = arguments(CASES[7], device=device, pooled=pooled)

    def loss(*a):
        out, kappa = apply(ls_scale_concat, a, **kwargs)
        return out.square().sum() + kappa.sum()

    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), args)
    for got, expected in zip(compiled, torch.autograd.grad(loss(*args), args), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_casts_the_features_alone(device, plans):
    args, kwargs = arguments(CASES[4], device=device, pooled=True)
    expected = apply(ls_scale_concat_reference, [a.bfloat16() for a in args[:2]] + args[2:], **kwargs)
    for plan in plans:
        with force_plan(plan), torch.autocast(device, torch.bfloat16):
            out, kappa = apply(ls_scale_concat, args, **kwargs)
        assert [out.dtype, kappa.dtype] == [torch.bfloat16, torch.float32]
        torch.testing.assert_close((out, kappa), expected)
        grads = torch.autograd.grad(out.float().square().sum(), args)
        assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("output", [0, 1])
def test_a_second_derivative_is_refused(device, plans, output):
    args, kwargs = arguments(CASES[1], device=device)
    for plan in plans:
        with force_plan(plan):
            outputs = ls_scale_concat(*args, **kwargs)
            first = torch.autograd.grad(outputs[output].square().sum(), args[1], create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(first.sum(), args[1])


def test_checkpointing_gives_the_same_gradients(device, plans):
    args, _ = arguments(CASES[4], device=device)
    for plan in plans:
        with force_plan(plan):
            expected = torch.autograd.grad(ls_scale_concat(*args)[0].square().sum(), args)
            out, _ = torch.utils.checkpoint.checkpoint(ls_scale_concat, *args, use_reentrant=False)
            actual = torch.autograd.grad(out.square().sum(), args)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_flop_of_the_gate_are_counted(device):
    args, kwargs = arguments(CASES[1], device=device)
    with force_plan("two_launch"), FlopCounterMode(display=False) as counter:
        out, _ = ls_scale_concat(*args, **kwargs)
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 4 * 3 * 17 * 9


def test_plans_that_cannot_run_say_why(device):
    args, kwargs = arguments(("rows", (1, 1, 2), (1, 1, 2), 1025), device=device)
    with (
        force_plan("two_launch"),
        pytest.raises(NotImplementedError, match=r"of ls_scale_concat not supported: .*1025"),
    ):
        ls_scale_concat(*args, **kwargs)
    if device == "cpu":
        with force_plan("cooperative"), pytest.raises(NotImplementedError, match="one after the other"):
            ls_scale_concat(*args, **kwargs)
    assert explain_plan(ls_scale_concat, *args, **kwargs).plan == "eager"


def test_float64_is_served_by_pytorch(device):
    args, kwargs = arguments(CASES[1], torch.float64, device=device)
    assert explain_plan(ls_scale_concat, *args, **kwargs).plan == "eager"
    out, kappa = ls_scale_concat(*args, **kwargs)
    assert out.dtype == kappa.dtype == torch.float64


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 17), "x: got .*expected shape"),
        (1, torch.zeros(3, 16, 33), r"skip: got \(3, 16, 33\), expected the shape of x"),
        (1, torch.zeros(3, 17, 0), "skip: got .*something to pool"),
        (2, torch.zeros(2, 16), r"w_down: got \(2, 16\), expected shape \(H, 17\)"),
        (2, torch.zeros(0, 17), r"max\(1, N // r\)"),
        (3, torch.zeros(3), r"b_down: got \(3,\), expected shape \(9,\)"),
        (4, torch.zeros(9, 17), r"w_up: got \(9, 17\), expected shape \(17, 9\)"),
        (5, torch.zeros(17, dtype=torch.float16), "b_up: got 'float16'"),
        (6, torch.zeros(3, 16), r"pooled: got \(3, 16\), expected shape \(3, 17\)"),
        (6, torch.zeros(3, 17, dtype=torch.bfloat16), "pooled: got 'bfloat16'"),
        (6, torch.zeros(3, 17, device="meta"), "pooled: got 'meta'"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    args, kwargs = arguments(CASES[1], pooled=True)
    args[position] = value
    with pytest.raises(UserError, match=message):
        apply(ls_scale_concat, args, **kwargs)


def test_an_unknown_activation_is_named():
    args, kwargs = arguments(CASES[1])
    with pytest.raises(UserError, match="activation: got 'gelu'"):
        ls_scale_concat(*args, activation="gelu", **kwargs)
