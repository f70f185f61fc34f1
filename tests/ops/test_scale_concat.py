"""``scale_concat``: every plan gives the reference's concat and gradients, in the layout of its inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans, scale_concat
from scalelong_fast.ops.scale_concat import scale_concat_reference

PLANS = list_plans("scale_concat")
KAPPAS = ("float", "scalar", "shared", "each")

# (layout, shape of x, shape of skip)
CASES = [
    ("rows", (2, 1, 1), (2, 1, 1)),
    ("rows", (3, 17, 40), (3, 17, 33)),
    ("rows", (2, 130, 64), (2, 130, 64)),
    ("planes", (2, 3, 50), (2, 5, 50)),
    ("planes", (2, 5, 7, 9), (2, 20, 7, 9)),
    ("planes", (3, 33, 4, 4), (3, 17, 4, 4)),
    ("planes", (2, 4, 3, 4, 5), (2, 3, 3, 4, 5)),
    ("pixels", (2, 5, 7, 9), (2, 20, 7, 9)),
    ("pixels", (3, 32, 4, 4), (3, 48, 4, 4)),
    ("pixels", (2, 4, 3, 4, 5), (2, 3, 3, 4, 5)),
]


def format_of(layout, dims):
    if layout != "pixels":
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def random(shape, dtype, device, seed, layout="rows"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).contiguous(memory_format=format_of(layout, len(shape)))


def arguments(case, dtype=torch.float32, device="cpu", kappa="each", kappa_dtype=None, seed=0):
    layout, x_shape, skip_shape = case
    shapes = {"scalar": (), "shared": skip_shape[1:2], "each": skip_shape[:2]}
    args = [random(x_shape, dtype, device, seed, layout), random(skip_shape, dtype, device, seed + 1, layout)]
    args.append(0.7 if kappa == "float" else random(shapes[kappa], kappa_dtype or dtype, device, seed + 2))
    return [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def dim_of(case):
    return -1 if case[0] == "rows" else 1


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


def double(args):
    return [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def with_gradients(function, args, **kwargs):
    out = function(*args, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grad = torch.empty_like(out).copy_(grad.to(out))
    return [out.detach(), *torch.autograd.grad(out, leaves(args), grad)]


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("case", [("rows", (2, 3, 4), (2, 3, 2)), ("pixels", (2, 2, 3, 2), (2, 3, 3, 2))])
def test_reference_has_the_gradients_of_its_definition(case, kappa):
    args = arguments(case, torch.float64, kappa=kappa)

    def function(*tensors):
        return scale_concat_reference(*tensors, *args[len(tensors) :], dim=dim_of(case))

    assert torch.autograd.gradcheck(function, leaves(args))


def test_reference_is_the_equation():
    x, skip, kappa = arguments(("planes", (2, 3, 4, 4), (2, 5, 4, 4)))
    expected = torch.cat([x, kappa[:, :, None, None] * skip], 1)
    torch.testing.assert_close(scale_concat_reference(x, skip, kappa), expected)


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(device, assert_as_accurate, poisoned, case, skip_first):
    args = arguments(case, device=device)
    kwargs = {"dim": dim_of(case), "skip_first": skip_first}
    with force_plan("triton"):
        actual = with_gradients(scale_concat, args, **kwargs)
    pytorch = with_gradients(scale_concat_reference, args, **kwargs)
    exact = with_gradients(scale_concat_reference, double(args), **kwargs)
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=4.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]])
def test_kappa_comes_in_every_form(device, assert_as_accurate, poisoned, case, kappa, plan):
    args = arguments(case, torch.bfloat16, device, kappa, torch.float32)
    with force_plan(plan):
        actual = with_gradients(scale_concat, args, dim=dim_of(case))
    pytorch = with_gradients(scale_concat_reference, args, dim=dim_of(case))
    exact = with_gradients(scale_concat_reference, double(args), dim=dim_of(case))
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=4.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("dtype", "kappa_dtype"), [(torch.float16, None), (torch.float16, torch.float32), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]])
def test_half_precision(device, assert_as_accurate, case, dtype, kappa_dtype, plan):
    args = arguments(case, dtype, device, kappa_dtype=kappa_dtype)
    with force_plan(plan):
        actual = with_gradients(scale_concat, args, dim=dim_of(case))
    pytorch = with_gradients(scale_concat_reference, args, dim=dim_of(case))
    exact = with_gradients(scale_concat_reference, double(args), dim=dim_of(case))
    assert actual[0].dtype == dtype
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true)


def test_the_product_is_rounded_once(device):
    args = [a.detach() for a in arguments(CASES[1], torch.bfloat16, device, kappa_dtype=torch.float32)]
    expected = (args[1].double() * args[2].double()[:, :, None]).float().bfloat16()
    for plan in PLANS:
        with force_plan(plan):
            assert torch.equal(scale_concat(*args, dim=-1)[..., 40:], expected)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["rows", "planes", "pixels"]),
    st.integers(0, 4),
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
    st.integers(1, 70),
    st.sampled_from(KAPPAS),
    st.booleans(),
)
def test_kernel_equals_the_reference_for_any_size(layout, batch, widths, extent, kappa, skip_first):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    shapes = [(batch, extent, w) if layout == "rows" else (batch, w, extent, 2) for w in widths]
    args = arguments((layout, *shapes), kappa=kappa)
    kwargs = {"dim": -1 if layout == "rows" else 1, "skip_first": skip_first}
    with force_plan("triton"):
        actual = with_gradients(scale_concat, args, **kwargs)
    for got, expected in zip(actual, with_gradients(scale_concat_reference, args, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3, 4, 4), (0, 5, 4, 4)),
        ((2, 0, 4, 4), (2, 5, 4, 4)),
        ((2, 3, 4, 4), (2, 0, 4, 4)),
        ((2, 3, 0, 4), (2, 5, 0, 4)),
    ],
)
def test_empty_features(device, poisoned, shapes, plan):
    args = arguments(("planes", *shapes), device=device)
    with force_plan(plan):
        actual = with_gradients(scale_concat, args)
    for got, expected in zip(actual, with_gradients(scale_concat_reference, args), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_layout_is_that_of_cat(device, case, plan):
    x, skip, kappa = arguments(case, device=device)
    with force_plan(plan):
        out = scale_concat(x, skip, kappa, dim=dim_of(case))
    expected = torch.cat([x, skip], dim_of(case))
    assert out.stride() == expected.stride()
    grads = torch.autograd.grad(out.square().sum(), [x, skip])
    assert grads[1].is_contiguous(memory_format=format_of(case[0], x.dim()))


def as_pixels(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("x_shape", "skip_shape"),
    [((2, 8, 1, 1), (2, 5, 1, 1)), ((2, 1, 4, 3), (2, 1, 4, 3)), ((2, 1, 1, 1), (2, 1, 1, 1))],
)
@pytest.mark.parametrize("pixels", [False, True])
def test_layout_where_strides_fit_both(device, x_shape, skip_shape, pixels, plan):
    x, skip, kappa = arguments(("pixels" if pixels else "planes", x_shape, skip_shape), device=device)
    if pixels:  # contiguous() sees nothing to do
        x, skip = (
            torch.empty_like(t, memory_format=torch.channels_last).copy_(t).detach().requires_grad_() for t in (x, skip)
        )
    with force_plan(plan):
        actual = with_gradients(scale_concat, [x, skip, kappa])
        out = scale_concat(x, skip, kappa)
    expected = torch.cat([x, skip], 1)
    for format in (torch.contiguous_format, torch.channels_last):
        assert out.is_contiguous(memory_format=format) == expected.is_contiguous(memory_format=format)
    for got, expected in zip(actual, with_gradients(scale_concat_reference, [x, skip, kappa]), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_layout_where_x_and_skip_differ(device, plan):
    x, skip, kappa = (a.detach() for a in arguments(("planes", (2, 5, 3, 4), (2, 6, 3, 4)), device=device))
    expected = scale_concat_reference(x, skip, kappa)
    one = x[:, :1]
    one_expected = scale_concat_reference(one, skip, kappa)
    with force_plan(plan):
        assert torch.equal(scale_concat(x, as_pixels(skip), kappa), expected)
        assert scale_concat(x, as_pixels(skip), kappa).is_contiguous()
        assert torch.equal(scale_concat(as_pixels(x), skip, kappa), expected)
        assert scale_concat(as_pixels(x), skip, kappa).is_contiguous(memory_format=torch.channels_last)
        # One channel has no layout of its own: the skip's decides.
        out = scale_concat(one.contiguous(), as_pixels(skip), kappa)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, one_expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]])
def test_arguments_may_be_strided_views(device, case, plan):
    x, skip, kappa = (a.detach() for a in arguments(case, device=device))
    wide = [torch.cat([t, t], 1) for t in (x, skip)]
    x, skip = (w.narrow(1, t.shape[1], t.shape[1]).requires_grad_() for w, t in zip(wide, (x, skip), strict=True))
    kappa = kappa.t().contiguous().t().requires_grad_()
    args = [x, skip, kappa]
    with force_plan(plan):
        actual = with_gradients(scale_concat, args, dim=dim_of(case))
    for got, expected in zip(actual, with_gradients(scale_concat_reference, args, dim=dim_of(case)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]])
def test_gradients_may_have_any_strides(device, case, plan):
    args = arguments(case, device=device)

    def gradients(function):
        out = function(*args, dim=dim_of(case))
        transposed = random(out.shape[::-1], torch.float32, device, 5).permute(*range(out.dim() - 1, -1, -1))
        # The first is expanded from one number.
        return [g for grad in (torch.ones_like(out[:1, :1]).mean().expand_as(out), transposed)
                for g in torch.autograd.grad(out, args, grad, retain_graph=True)]  # fmt: skip

    with force_plan(plan):
        actual = gradients(scale_concat)
    for got, expected in zip(actual, gradients(scale_concat_reference), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]])
def test_nan_and_infinity_stay_where_they_are(device, case, value):
    args = arguments(case, device=device)
    with torch.no_grad():
        args[0][1, 2, 3] = value
        args[1][1, 3, 2] = value
        args[2][0, 1] = value
    with force_plan("triton"):
        actual = with_gradients(scale_concat, args, dim=dim_of(case))
    for got, expected in zip(actual, with_gradients(scale_concat_reference, args, dim=dim_of(case)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_of_some_inputs_only(device, wanted, plan):
    args = [a.detach() for a in arguments(CASES[4], device=device)]
    inputs = [args[i].requires_grad_() for i in wanted]
    with force_plan(plan):
        actual = torch.autograd.grad(scale_concat(*args).square().sum(), inputs)
    expected = torch.autograd.grad(scale_concat_reference(*args).square().sum(), inputs)
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true)


def test_a_constant_kappa_keeps_no_skip(device):
    x, skip, _ = arguments(CASES[1], device=device)
    saved = []
    with (
        force_plan("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()), lambda t: t),
    ):
        scale_concat(x, skip, 0.5, dim=-1)
    assert sum(saved) < 16


def test_kappa_is_not_copied(device, monkeypatch):
    seen = []
    from scalelong_fast.kernels import concat

    launch = concat.scale_concat_forward
    monkeypatch.setattr(concat, "scale_concat_forward", lambda x, s, k, *a: (seen.append(k), launch(x, s, k, *a))[1])
    x, skip, kappa = arguments(CASES[4], device=device, kappa="shared")
    with force_plan("triton"):
        scale_concat(x, skip, kappa)
    assert seen[0].data_ptr() == kappa.data_ptr()
    assert seen[0].stride() == (0, 1)


@pytest.mark.parametrize(("case", "kappa"), [(CASES[1], "each"), (CASES[8], "each"), (CASES[4], "float")])
def test_the_op_is_well_behaved(device, case, kappa):
    x, skip, gate = arguments(case, device=device, kappa="each")
    gate = gate.detach() if kappa == "float" else gate
    torch.library.opcheck(
        torch.ops.scalelong_fast.scale_concat.default, (x, skip, gate, case[0], True, "triton")
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kappa", ["float", "shared"])
def test_compiles_as_one_graph(device, plan, kappa, backend):
    if backend == "inductor" and (plan, kappa) != ("triton", "shared"):
        pytest.skip("slow; once is enough")
    args = arguments(CASES[7], device=device, kappa=kappa)

    def loss(*a):
        return scale_concat(*a).square().sum()

    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), leaves(args))
    for got, expected in zip(compiled, torch.autograd.grad(loss(*args), leaves(args)), strict=True):
        torch.testing.assert_close(got, expected)


def test_compiles_for_any_size(device):
    compiled = torch.compile(
        lambda x, s, k: scale_concat(x, s, k, dim=-1), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for length in (5, 9):
        args = arguments(("rows", (2, length, 20), (2, length, 12)), device=device)
        with force_plan("triton"):
            torch.testing.assert_close(compiled(*args), scale_concat_reference(*args, dim=-1))


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_casts_the_features_alone(device, plan):
    x, skip, kappa = arguments(CASES[4], device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        out = scale_concat(x, skip.detach().bfloat16(), kappa)
    assert torch.equal(out, scale_concat_reference(x.bfloat16(), skip.bfloat16(), kappa))
    grad = torch.autograd.grad(out.float().square().sum(), [x, kappa])
    assert [g.dtype for g in grad] == [torch.float32, torch.float32]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kappa", ["float", "each"])
def test_a_second_derivative_is_refused(device, plan, kappa):
    args = arguments(CASES[1], device=device, kappa=kappa)
    with force_plan(plan):
        first = torch.autograd.grad(scale_concat(*args, dim=-1).square().sum(), args[:2], create_graph=True)
    for grad in first:
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(grad.sum(), args[0], retain_graph=True)


@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_gives_the_same_gradients(device, plan):
    args = arguments(CASES[4], device=device)
    with force_plan(plan):
        expected = torch.autograd.grad(scale_concat(*args).square().sum(), args)
        out = torch.utils.checkpoint.checkpoint(scale_concat, *args, use_reentrant=False)
        actual = torch.autograd.grad(out.square().sum(), args)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_no_products_of_matrices_are_counted(device):
    args = arguments(CASES[4], device=device)
    with force_plan("triton"), FlopCounterMode(display=False) as counter:
        scale_concat(*args).sum().backward()
    assert counter.get_total_flops() == 0


def test_float64_is_served_by_pytorch(device):
    args = arguments(CASES[4], torch.float64, device)
    assert explain_plan("scale_concat", *args).plan == "eager"
    with force_plan("triton"), pytest.raises(NotImplementedError, match="float64"):
        scale_concat(*args)


def test_an_explanation_names_plan_and_reason():
    text = str(explain_plan(scale_concat, *arguments(CASES[1]), dim=-1))
    assert text.startswith("scale_concat: plan 'eager'")


X = (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x", "skip", "kappa", "kwargs", "message"),
    [
        (X, (2, 3, 4, 5), 1.0, {}, r"skip: got \(2, 3, 4, 5\), expected the shape of x \(2, 3, 4, 4\) in every"),
        (X, (3, 3, 4, 4), 1.0, {}, "skip: got"),
        (X, (2, 3, 16), 1.0, {}, "skip: got"),
        ((2, 3), (2, 3), 1.0, {}, "x: got .*one to three spatial"),
        (X, X, 1.0, {"dim": -1}, r"x: got .*expected shape \(B, L, D\)"),
        (X, X, 1.0, {"dim": 0}, "dim: got 0"),
        (X, torch.zeros(X, dtype=torch.float16), 1.0, {}, "skip: got 'float16', expected float32, the dtype of x"),
        (torch.zeros(X, dtype=torch.int32), X, 1.0, {}, "x: got 'int32'"),
        (X, torch.zeros(X).to_sparse(), 1.0, {}, "skip: got a tensor of layout sparse_coo"),
        (X, torch.zeros(X, device="meta"), 1.0, {}, "skip: got 'meta'"),
        (X, X, float("nan"), {}, "kappa: got nan"),
        (X, X, torch.zeros(2), {}, r"kappa: got \(2,\), expected a 0-dim tensor, shape \(3,\) or \(2, 3\)"),
        (X, X, torch.ones(3, dtype=torch.int64), {}, "kappa: got 'int64'"),
        (X, X, torch.ones(3, dtype=torch.float16), {}, "kappa: got 'float16'"),
        (X, "skip", 1.0, {}, "skip: got 'str'"),
    ],
)
def test_wrong_arguments_are_named(x, skip, kappa, kwargs, message):
    x, skip = (torch.zeros(a) if isinstance(a, tuple) else a for a in (x, skip))
    with pytest.raises(UserError, match=message):
        scale_concat(x, skip, kappa, **kwargs)
