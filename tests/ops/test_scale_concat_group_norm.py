"""``scale_concat_group_norm``: every plan gives the reference's norm, concat and gradients, in the inputs' layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import (
    channel_stats,
    explain_plan,
    force_plan,
    list_plans,
    scale_concat,
    scale_concat_group_norm,
)
from scalelong_fast.ops.scale_concat_group_norm import scale_concat_group_norm_reference

PLANS = list_plans("scale_concat_group_norm")
KAPPAS = ("float", "scalar", "shared", "each")

# (layout, shape of x, shape of skip, groups)
CASES = [
    ("planes", (2, 6, 19), (2, 10, 19), 4),  # a group holds channels of both
    ("planes", (2, 8, 5, 7), (2, 4, 5, 7), 3),  # none does
    ("planes", (2, 5, 3, 3), (2, 7, 3, 3), 2),
    ("planes", (2, 4, 2, 3, 3), (2, 6, 2, 3, 3), 1),
    ("pixels", (2, 10, 3, 6), (2, 18, 3, 6), 4),
    ("pixels", (2, 5, 3, 3), (2, 4, 3, 3), 9),  # groups of one channel
    ("pixels", (3, 9, 1, 1), (3, 3, 1, 1), 2),
    ("pixels", (2, 4, 2, 3, 3), (2, 6, 2, 3, 3), 5),
]
STRADDLING, PIXELS = CASES[0], CASES[4]


def format_of(layout, dims):
    if layout != "pixels":
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def draw(shape, dtype, device, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(device, dtype)


def arguments(case, dtype=torch.float32, device="cpu", *, kappa="each", parameter_dtype=None, each=False, seed=0):
    """x, skip, κ, groups, weight, bias; ``parameter_dtype`` is of κ too, ``each``: every sample its own weight."""
    layout, x_shape, skip_shape, groups = case
    x, skip = (
        (draw(shape, dtype, device, seed + i) * (2 - i) + 0.5).contiguous(memory_format=format_of(layout, len(shape)))
        for i, shape in enumerate((x_shape, skip_shape))
    )
    parameter_dtype = parameter_dtype or dtype
    if kappa == "float":
        gate = 0.7
    else:
        shape = {"scalar": (), "shared": skip_shape[1:2], "each": skip_shape[:2]}[kappa]
        gate = draw(shape, parameter_dtype, device, seed + 2)
    channels = x_shape[1] + skip_shape[1]
    size = (x_shape[0], channels) if each else (channels,)
    weight, bias = (draw(size, parameter_dtype, device, seed + 3 + i) + 1 - i for i in (0, 1))
    args = [x, skip, gate, groups, weight, bias]
    return [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def detached(args):
    return [a.detach() if isinstance(a, torch.Tensor) else a for a in args]


def exactly(args):
    return [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def with_gradients(function, args, *, dtype=None, **options):
    """Outputs and gradients; those that come in are rounded to ``dtype``."""
    outputs = as_tuple(function(*args, **options))
    grads = [draw(o.shape, torch.float64, "cpu", 9 + i).to(dtype or o.dtype).to(o) for i, o in enumerate(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves(args), grads)]


def assert_plan_is_as_accurate(plan, args, assert_as_accurate, factor=4.0, stats=None, **options):
    with force_plan(plan):
        actual = with_gradients(scale_concat_group_norm, args, stats=stats, **options)
    pytorch = with_gradients(scale_concat_group_norm_reference, args, **options)
    exact = with_gradients(scale_concat_group_norm_reference, exactly(args), dtype=pytorch[0].dtype, **options)
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=factor)
    return actual


def assert_equals_the_reference(plan, args, **options):
    with force_plan(plan):
        actual = with_gradients(scale_concat_group_norm, args, **options)
    expected = with_gradients(scale_concat_group_norm_reference, args, **options)
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


def stats_of(args):
    return tuple(tuple(t.detach() for t in channel_stats(feature)) for feature in args[:2])


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kappa", ["scalar", "each"])
@pytest.mark.parametrize(
    "case", [("planes", (2, 3, 5), (2, 5, 5), 2), ("pixels", (2, 2, 3, 2), (2, 4, 3, 2), 3)]
)  # fmt: skip
def test_reference_has_the_gradients_of_its_definition(case, kappa, each, activation):
    args = arguments(case, torch.float64, kappa=kappa, each=each)
    stats = stats_of(args)

    def function(x, skip, kappa, weight, bias):
        return scale_concat_group_norm_reference(
            x, skip, kappa, case[3], weight, bias, 1e-3, activation, True, stats, skip_first=each
        )

    assert torch.autograd.gradcheck(function, leaves(args))


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("case", [STRADDLING, PIXELS])
def test_reference_is_pytorchs_norm_of_the_scaled_concat(case, skip_first):
    x, skip, kappa, groups, weight, bias = arguments(case)
    out, concat = scale_concat_group_norm_reference(
        x, skip, kappa, groups, weight, bias, 1e-3, return_concat=True, skip_first=skip_first
    )
    scaled = kappa.reshape(*kappa.shape, *[1] * (x.dim() - 2)) * skip
    expected = torch.cat([scaled, x] if skip_first else [x, scaled], 1)
    torch.testing.assert_close(concat, expected)
    torch.testing.assert_close(out, F.silu(F.group_norm(expected, groups, weight, bias, 1e-3)))


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(device, assert_as_accurate, poisoned, case):
    args = arguments(case, device=device)
    # Either order in either layout.
    options = {"return_concat": True, "skip_first": CASES.index(case) % 2 == 1}
    assert_plan_is_as_accurate("triton", args, assert_as_accurate, **options)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("case", [STRADDLING, PIXELS])
def test_every_sample_may_have_its_own_weight(device, assert_as_accurate, poisoned, case, activation):
    args = arguments(case, device=device, each=True)
    assert_plan_is_as_accurate("triton", args, assert_as_accurate, activation=activation, eps=0.1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kappa", ["float", "scalar", "shared"])
@pytest.mark.parametrize("case", [PIXELS])
def test_kappa_comes_in_every_form(device, case, kappa, plan):
    args = arguments(case, torch.bfloat16, device, kappa=kappa, parameter_dtype=torch.float32)
    each = list(args)
    each[2] = torch.as_tensor(args[2], device=device).detach().expand(case[2][:2]).clone().requires_grad_()
    with force_plan(plan):
        out, *actual = with_gradients(scale_concat_group_norm, args)
        expected_out, *expected = with_gradients(scale_concat_group_norm, each)
    assert torch.equal(out, expected_out)
    of_kappa = expected.pop(2)
    if kappa != "float":
        torch.testing.assert_close(actual.pop(2), of_kappa.sum_to_size(args[2].shape))
    for got, true in zip(actual, expected, strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(torch.float16, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("case", [CASES[1], PIXELS])
def test_half_precision(device, assert_as_accurate, poisoned, case, dtype, parameter_dtype, plan):
    args = arguments(case, dtype, device, parameter_dtype=parameter_dtype)
    actual = assert_plan_is_as_accurate(plan, args, assert_as_accurate, factor=2.0)
    assert [t.dtype for t in actual[:3]] == [dtype] * 3


@pytest.mark.parametrize("given", [(True, True), (False, True)])
@pytest.mark.parametrize("case", [PIXELS])
def test_given_statistics_change_nothing(device, case, given):
    args = arguments(case, device=device)
    with force_plan("triton"):
        # Differentiable ones, as producers hand them on: no gradient may go through them.
        stats = tuple(channel_stats(t) if known else None for t, known in zip(args[:2], given, strict=True))
        actual = with_gradients(scale_concat_group_norm, args, stats=stats)
        expected = with_gradients(scale_concat_group_norm, args)
    for got, true in zip(actual, expected, strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_are_never_differentiated(device, plan):
    args = arguments(PIXELS, device=device)
    stats = tuple((mean.detach().requires_grad_(), m2.detach()) for mean, m2 in stats_of(args))
    with force_plan(plan):
        out = scale_concat_group_norm(*args, stats=stats)
    grads = torch.autograd.grad(out.square().sum(), [mean for mean, _ in stats], allow_unused=True)
    assert grads == (None, None)


def test_given_statistics_are_not_computed_again(device, monkeypatch):
    from scalelong_fast.kernels import channel_stats as kernels

    seen = []
    launch = kernels.channel_stats_forward
    monkeypatch.setattr(kernels, "channel_stats_forward", lambda t, *a: seen.append(t.shape[1]) or launch(t, *a))
    args = arguments(PIXELS, device=device)
    of_x, of_skip = stats_of(args)
    with force_plan("triton"):
        for stats in ((of_x, of_skip), (None, of_skip), None):
            scale_concat_group_norm(*args, stats=stats)
            seen.append("next")
    assert seen == ["next", 10, "next", 10, 18, "next"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (5,), (1, 4)])
def test_gradients_of_some_inputs_only(device, wanted, plan):
    args = detached(arguments(PIXELS, device=device))
    inputs = [args[i].requires_grad_() for i in wanted]

    def loss(function):
        out, concat = function(*args, return_concat=True)
        return out.square().sum() + concat.sin().sum()

    with force_plan(plan):
        actual = torch.autograd.grad(loss(scale_concat_group_norm), inputs)
    for got, true in zip(actual, torch.autograd.grad(loss(scale_concat_group_norm_reference), inputs), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("kappa", "skip_first"), [("float", False), ("each", True)])
@pytest.mark.parametrize("use", [0, 1])
def test_outputs_may_go_unused(device, plan, use, kappa, skip_first):
    args = arguments(PIXELS, device=device, kappa=kappa)

    def gradients(function):
        out = function(*args, return_concat=True, skip_first=skip_first)[use]
        return torch.autograd.grad(out.sin().sum(), leaves(args), allow_unused=True)

    with force_plan(plan):
        actual = gradients(scale_concat_group_norm)
    for got, true in zip(actual, gradients(scale_concat_group_norm_reference), strict=True):
        assert (got is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_the_concat_is_scale_concats(device, plan):
    args = arguments(PIXELS, torch.bfloat16, device, parameter_dtype=torch.float32)
    with force_plan(plan):
        _, concat = scale_concat_group_norm(*args, return_concat=True)
    assert torch.equal(concat, scale_concat(*args[:3]))


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["planes", "pixels"]),
    st.integers(0, 2),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from(KAPPAS),
    st.booleans(),
    st.booleans(),
)
def test_kernel_equals_the_reference_for_any_size(layout, batch, width_x, width, extent, pick, kappa, each, first):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    divisors = [n for n in range(1, width_x + width + 1) if (width_x + width) % n == 0]
    case = (layout, (batch, width_x, extent, 2), (batch, width, extent, 2), divisors[pick % len(divisors)])
    args = arguments(case, kappa=kappa, each=each)
    assert_equals_the_reference("triton", args, return_concat=each, skip_first=first, eps=1e-2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [CASES[1], *CASES[4:]])
def test_the_layout_is_that_of_the_inputs(device, plan, case):
    args = arguments(case, device=device)
    with force_plan(plan):
        outputs = scale_concat_group_norm(*args, return_concat=True)
    expected = torch.cat(args[:2], 1)
    assert [t.stride() for t in outputs] == [expected.stride()] * 2
    grads = torch.autograd.grad(outputs[0].square().sum(), args[:2])
    for grad in grads if plan == "triton" else ():  # PyTorch hands on slices of the concat's
        assert grad.is_contiguous(memory_format=format_of(case[0], grad.dim()))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("x_shape", "skip_shape"),
    [((2, 8, 1, 1), (2, 4, 1, 1)), ((2, 1, 4, 3), (2, 1, 4, 3)), ((2, 1, 4, 3), (2, 5, 4, 3))],
)
@pytest.mark.parametrize("pixels", [False, True])
def test_layout_where_strides_fit_both(device, x_shape, skip_shape, pixels, plan):
    args = arguments(("planes", x_shape, skip_shape, 2), device=device)
    if pixels:  # contiguous() sees nothing to do
        args[:2] = (
            torch.empty_like(t, memory_format=torch.channels_last).copy_(t).detach().requires_grad_() for t in args[:2]
        )
    assert_equals_the_reference(plan, args, return_concat=True)
    with force_plan(plan):
        out = scale_concat_group_norm(*args)
    expected = torch.cat(args[:2], 1)
    for format in (torch.contiguous_format, torch.channels_last):
        assert out.is_contiguous(memory_format=format) == expected.is_contiguous(memory_format=format)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [STRADDLING, PIXELS, CASES[7]])
def test_arguments_may_be_strided_views(device, case, plan):
    x, skip, kappa, groups, weight, bias = detached(arguments(case, device=device, each=True))
    x, skip = (torch.cat([t, t + 1, t], 1)[:, t.shape[1] : 2 * t.shape[1]] for t in (x, skip))
    args = [x, skip, kappa.t().contiguous().t(), groups, weight.t().contiguous().t(), bias[:1].expand_as(bias)]
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    assert_equals_the_reference(plan, args)
    with force_plan(plan):
        out = scale_concat_group_norm(*args)
    assert out.is_contiguous(memory_format=format_of(case[0], x.dim()))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [STRADDLING, PIXELS])
def test_gradients_may_have_any_strides(device, case, plan):
    args = arguments(case, device=device)

    def gradients(function):
        outputs = function(*args, return_concat=True)
        shape = outputs[0].shape
        one = torch.ones((), device=device).expand(shape)  # one number, with strides of 0
        backwards = draw(shape[::-1], torch.float32, device, 5).permute(*range(len(shape) - 1, -1, -1))
        return [grad for grads in ((one, backwards), (backwards, one))
                for grad in torch.autograd.grad(outputs, leaves(args), grads, retain_graph=True)]  # fmt: skip

    with force_plan(plan):
        actual = gradients(scale_concat_group_norm)
    for got, true in zip(actual, gradients(scale_concat_group_norm_reference), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("case", [("planes", (0, 3, 4, 4), (0, 5, 4, 4), 2), ("pixels", (0, 3, 4, 4), (0, 5, 4, 4), 2)])
def test_an_empty_batch(device, poisoned, case, each, plan):
    args = arguments(case, device=device, each=each)
    assert_equals_the_reference(plan, args, return_concat=True)
    with force_plan(plan):
        out, concat, *grads = with_gradients(scale_concat_group_norm, args, return_concat=True)
    assert out.shape == concat.shape == (0, 8, 4, 4)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("half", "value"), [(0, float("nan")), (1, float("inf"))])
@pytest.mark.parametrize("case", [CASES[1], PIXELS])
def test_nan_and_infinity_stay_in_their_group(device, case, half, value, plan):
    args = detached(arguments(case, device=device))
    clean = scale_concat_group_norm_reference(*args)
    args[half][1, 2, 2, 4] = value
    with force_plan(plan):
        out, concat = scale_concat_group_norm(*args, return_concat=True)
    channel = half * case[1][1] + 2
    width = out.shape[1] // case[3]
    group = slice(channel // width * width, channel // width * width + width)
    assert out[1, group].isnan().any()
    assert concat.isfinite().logical_not().nonzero().tolist() == [[1, channel, 2, 4]]
    out[1, group] = clean[1, group]
    torch.testing.assert_close(out, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("return_concat", [False, True])
def test_the_backward_keeps_the_features_and_small_things(device, return_concat):
    args = arguments(("pixels", (2, 8, 12, 12), (2, 16, 12, 12), 4), device=device)
    stats = stats_of(args)
    saved = {}
    with (
        force_plan("triton"),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ),
    ):
        outputs = as_tuple(scale_concat_group_norm(*args, return_concat=return_concat, stats=stats))
    x, skip = args[:2]
    assert {x.data_ptr(), skip.data_ptr()} <= saved.keys()
    assert not {t.data_ptr() for t in outputs} & saved.keys()
    channels, groups = 24, 4
    small = 4 * (2 * 2 * channels + 2 * 16 + 2 * 2 * groups + 2 * channels)
    assert sum(saved.values()) <= x.untyped_storage().nbytes() + skip.untyped_storage().nbytes() + small


def test_a_memo_of_calls_keeps_no_statistics_alive(device):
    import gc
    import weakref

    args = arguments(PIXELS, device=device)
    stats = stats_of(args)
    scale_concat_group_norm(*args, stats=stats)
    mean = weakref.ref(stats[0][0])
    del stats
    gc.collect()
    assert mean() is None


@pytest.mark.parametrize(("case", "kappa", "return_concat"), [
    (("planes", (2, 3, 5), (2, 5, 5), 2), "each", False), (("pixels", (2, 3, 2, 3), (2, 5, 2, 3), 2), "float", True)
])  # fmt: skip
def test_the_op_is_well_behaved(device, case, kappa, return_concat):
    x, skip, gate, groups, weight, bias = arguments(case, device=device)
    gate = gate.detach() if kappa == "float" else gate
    of_x, of_skip = stats_of([x, skip])
    args = (x, skip, gate, *of_x, *of_skip, groups, weight, bias, 1e-5, "silu", case[0], True, return_concat, "triton")
    torch.library.opcheck(torch.ops.scalelong_fast.scale_concat_group_norm.default, args)


@pytest.mark.parametrize(
    ("plan", "stats", "backend"),
    [
        ("triton", False, "inductor"),
        ("triton", True, "aot_eager"),
        ("cat_buffer", False, "aot_eager"),
        ("eager", False, "aot_eager"),
    ],
)
def test_compiles_as_one_graph(device, plan, stats, backend):
    args = arguments(PIXELS, device=device)
    given = stats_of(args) if stats else None

    def loss(x, skip, kappa, weight, bias):
        out, concat = scale_concat_group_norm(
            x, skip, kappa, args[3], weight, bias, return_concat=True, stats=given, skip_first=stats
        )
        return (out * out.detach().cos()).sum() + concat.sin().sum()

    with force_plan(plan):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)(*leaves(args))
        actual = torch.autograd.grad(compiled, leaves(args))
    for got, true in zip(actual, torch.autograd.grad(loss(*leaves(args)), leaves(args)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("use", [0, 1])
def test_compiled_outputs_may_go_unused(device, plan, use):
    args = arguments(PIXELS, device=device)

    def loss(x, skip):
        return scale_concat_group_norm(x, skip, *args[2:], return_concat=True)[use].sin().sum()

    with force_plan(plan):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args[:2])
        actual = torch.autograd.grad(compiled, args[:2])
    for got, true in zip(actual, torch.autograd.grad(loss(*args[:2]), args[:2]), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


def test_compiles_for_any_size(device):
    torch._dynamo.reset()
    compiled = torch.compile(scale_concat_group_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 9):
        case = ("planes", (2, 6, size, size + 1), (2, 10, size, size + 1), 4)
        args = arguments(case, device=device)
        with force_plan("triton"):
            actual = with_gradients(compiled, args)
        for got, true in zip(actual, with_gradients(scale_concat_group_norm_reference, args), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_casts_the_features_alone(device, plan):
    args = arguments(PIXELS, device=device)
    stats = stats_of(args)
    mixed = [args[0], args[1].detach().bfloat16(), *args[2:]]
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        out, concat = scale_concat_group_norm(*mixed, return_concat=True, stats=stats)
    expected = scale_concat_group_norm_reference(args[0].bfloat16(), mixed[1], *args[2:], return_concat=True)
    assert torch.equal(concat, expected[1])
    torch.testing.assert_close(out, expected[0], rtol=0.02, atol=0.02)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), [args[0], args[2], args[4], args[5]])
    assert [g.dtype for g in grads] == [torch.float32] * 4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("output", [0, 1])
def test_a_second_derivative_is_refused(device, plan, output):
    args = arguments(PIXELS, device=device)
    with force_plan(plan):
        value = scale_concat_group_norm(*args, return_concat=True)[output].square().sum()
        first = torch.autograd.grad(value, args[:3], create_graph=True)
    for grad in first:
        with pytest.raises(NotImplementedError, match="scale_concat_group_norm: got a second derivative"):
            torch.autograd.grad(grad.sum(), args[0], retain_graph=True)


def test_float64_is_served_by_pytorch(device):
    args = arguments(PIXELS, torch.float64, device)
    assert explain_plan("scale_concat_group_norm", *args).plan == "eager"
    assert scale_concat_group_norm(*args).dtype == torch.float64
    with force_plan("triton"), pytest.raises(NotImplementedError, match="float64"):
        scale_concat_group_norm(*args)


def test_no_products_of_matrices_are_counted(device):
    with force_plan("triton"), FlopCounterMode(display=False) as counter:
        scale_concat_group_norm(*arguments(PIXELS, device=device)).sum().backward()
    assert counter.get_total_flops() == 0


X, S = (2, 8, 4, 4), (2, 16, 4, 4)
PAIR = (torch.zeros(2, 8), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x: got \(2, 8\), expected shape \(B, C, \*spatial\) with one to three spatial"),
        ({"x": torch.zeros(1, 1, 1, 1, 1, 1)}, "x: got .*one to three spatial"),
        ({"x": torch.zeros(X, dtype=torch.int32)}, "x: got 'int32'"),
        ({"skip": torch.zeros(2, 16, 4, 5)}, r"skip: got \(2, 16, 4, 5\), expected the shape of x \(2, 8, 4, 4\)"),
        ({"skip": torch.zeros(2, 16, 16)}, "skip: got"),
        ({"skip": torch.zeros(S, dtype=torch.float16)}, "skip: got 'float16', expected float32, the dtype of x"),
        ({"skip": torch.zeros(S).to(memory_format=torch.channels_last)},
         "skip: got 'memory format channels_last', expected contiguous, the memory format of x"),
        ({"x": torch.zeros(X).to(memory_format=torch.channels_last)},
         "skip: got 'memory format contiguous', expected channels_last, the memory format of x"),
        ({"x": torch.zeros(2, 8, 0, 4), "skip": torch.zeros(2, 16, 0, 4)}, r"x: got \(2, 8, 0, 4\), expected a fea"),
        ({"skip": torch.zeros(2, 0, 4, 4)}, r"skip: got \(2, 0, 4, 4\), expected a feature with at least one channel"),
        ({"kappa": torch.zeros(8)}, r"kappa: got \(8,\), expected a 0-dim tensor, shape \(16,\) or \(2, 16\)"),
        ({"kappa": float("nan")}, "kappa: got nan"),
        ({"num_groups": 32}, r"num_groups: got 32, expected a divisor of the 24 channels \(8 of x and 16 of skip\)\. "
                             r"Pick one of 1, 2, 3, 4, 6, 8, 12, 24\."),
        ({"num_groups": -4}, "num_groups: got -4, expected a whole number >= 1"),
        ({"weight": torch.zeros(8)}, r"weight: got \(8,\), expected shape \(24,\), or \(2, 24\)"),
        ({"bias": torch.zeros(24, dtype=torch.float64)}, "bias: got 'float64', expected float32"),
        ({"eps": 0}, "eps: got 0, expected a finite number > 0"),
        ({"eps": None}, "eps: got None"),
        ({"activation": "relu"}, "activation: got 'relu', which is not known"),
        ({"stats": PAIR}, r"stats of x: got 'Tensor', expected None or a pair \(mean, m2\)"),
        ({"stats": (PAIR,)}, "stats: got 'tuple of 1', expected None or a pair: for x and for skip"),
        ({"stats": torch.zeros(2, 8)}, "stats: got 'Tensor'"),
        ({"stats": ((*PAIR, PAIR[0]), None)}, "stats of x: got 'tuple of 3'"),
        ({"stats": (None, PAIR)}, r"mean in the stats of skip: got \(2, 8\), expected shape \(2, 16\)"),
        ({"stats": ((PAIR[0], PAIR[0].double()), None)}, "m2 in the stats of x: got 'float64', expected float32"),
        ({"stats": ((PAIR[0], None), None)}, "m2 in the stats of x: got 'NoneType', expected a torch.Tensor"),
        ({"stats": ((PAIR[0].to("meta"), PAIR[1]), None)}, "mean in the stats of x: got 'meta'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "x": torch.zeros(X), "skip": torch.zeros(S), "kappa": 0.5, "num_groups": 8, "weight": torch.ones(24),
        "bias": torch.zeros(24),
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        scale_concat_group_norm(**{**arguments, **change})
