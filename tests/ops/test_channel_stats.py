"""``channel_stats``: every plan gives the channels' mean and centred sum of squares, in every layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.errors import UserError
from scalelong_fast.ops import channel_stats, explain_plan, force_plan, list_plans
from scalelong_fast.ops.channel_stats import channel_stats_reference

PLANS = list_plans("channel_stats")
CASES = [
    ("planes", (2, 5, 1)),
    ("planes", (3, 17, 130)),
    ("planes", (2, 20, 7, 9)),
    ("planes", (2, 3, 3, 4, 5)),
    ("pixels", (2, 20, 7, 9)),
    ("pixels", (1, 33, 1, 1)),
    ("pixels", (2, 3, 3, 4, 5)),
]


def format_of(layout, dims):
    if layout != "pixels":
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def feature(case, dtype=torch.float32, device="cpu", seed=0, offset=0.5):
    layout, shape = case
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + offset
    return value.to(device, dtype).contiguous(memory_format=format_of(layout, len(shape))).requires_grad_()


def with_gradient(function, x):
    mean, m2 = function(x)
    grad = torch.randn(mean.shape, generator=torch.Generator().manual_seed(9)).to(mean)
    return [mean.detach(), m2, *torch.autograd.grad(mean, x, grad)]


def test_reference_has_the_gradient_of_its_definition():
    assert torch.autograd.gradcheck(lambda x: channel_stats_reference(x)[0], feature(CASES[3], torch.float64))


def test_reference_is_the_mean_and_the_sum_of_squares_about_it():
    x = feature(CASES[2], torch.float64)
    mean, m2 = channel_stats_reference(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(m2, 63 * x.detach().var((2, 3), correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(device, assert_as_accurate, poisoned, case, dtype):
    x = feature(case, dtype, device)
    with force_plan("triton"):
        actual = with_gradient(channel_stats, x)
    pytorch = with_gradient(channel_stats_reference, x)
    exact = with_gradient(channel_stats_reference, x.detach().double().requires_grad_())
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, dtype]
    for got, same_dtype, true in zip(actual, pytorch, exact, strict=True):
        assert_as_accurate(got, same_dtype, true, factor=4.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_a_large_mean_costs_no_digits_of_the_sum_of_squares(device, plan, layout):
    x = feature((layout, (2, 6, 13, 11)), device=device, offset=1000.0).detach()
    with force_plan(plan):
        _, m2 = channel_stats(x)
    # With Σx² − (Σx)²/P not a digit would be left of 4 · 143 beside 10^6 · 143.
    torch.testing.assert_close(m2.double(), channel_stats_reference(x.double())[1], rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["planes", "pixels"]), st.integers(0, 3), st.integers(1, 40), st.integers(1, 90))
def test_kernel_equals_the_reference_for_any_size(layout, batch, channels, extent):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    x = feature((layout, (batch, channels, extent, 2)))
    with force_plan("triton"):
        actual = with_gradient(channel_stats, x)
    for got, expected in zip(actual, with_gradient(channel_stats_reference, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]])
def test_nan_and_infinity_stay_in_their_channel(device, plan, value, case):
    x = feature(case, device=device).detach()
    x[1, 3, 2, 5] = value
    with force_plan(plan):
        mean, m2 = channel_stats(x)
    assert mean.isfinite().logical_not().nonzero().tolist() == [[1, 3]]
    assert m2.isfinite().logical_not().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[6]])
def test_slices_are_read_correctly(device, plan, case):
    x = feature(case, device=device).detach()
    part = torch.cat([x, x + 1, x], 1)[:, x.shape[1] : 2 * x.shape[1]].requires_grad_()
    with force_plan(plan):
        actual = with_gradient(channel_stats, part)
    for got, expected in zip(actual, with_gradient(channel_stats_reference, part), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_batch(device, plan):
    x = feature(("planes", (0, 5, 3, 3)), device=device)
    with force_plan(plan):
        mean, m2, grad = with_gradient(channel_stats, x)
    assert (mean.shape, m2.shape, grad.shape) == ((0, 5), (0, 5), (0, 5, 3, 3))


@pytest.mark.parametrize("plan", PLANS)
def test_the_sum_of_squares_has_no_gradient(device, plan):
    with force_plan(plan):
        mean, m2 = channel_stats(feature(CASES[4], device=device))
    assert mean.requires_grad
    assert not m2.requires_grad


@pytest.mark.parametrize("plan", PLANS)
def test_expanded_gradients_are_read_correctly(device, plan):
    x = feature(CASES[4], device=device)
    with force_plan(plan):
        (grad,) = torch.autograd.grad(channel_stats(x)[0].sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 63))


def test_the_gradient_of_the_mean_fills_no_memory(device):
    x = feature(CASES[4], device=device)
    with force_plan("triton"):
        (grad,) = torch.autograd.grad(channel_stats(x)[0].square().sum(), x)
    assert grad.untyped_storage().nbytes() == 4 * 2 * 20


def test_nothing_of_the_feature_is_kept(device):
    saved = []
    with (
        force_plan("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        channel_stats(feature(CASES[4], device=device))
    assert not saved


@pytest.mark.parametrize("case", [CASES[1], CASES[4]])
def test_the_op_is_well_behaved(device, case):
    args = (feature(case, device=device), case[0], "triton")
    torch.library.opcheck(torch.ops.scalelong_fast.channel_stats.default, args)


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_as_one_graph(device, plan):
    x = feature(CASES[4], device=device)

    def loss(x):
        mean, m2 = channel_stats(x)
        return (mean.square() * m2).sum()

    with force_plan(plan):
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, torch.autograd.grad(loss(x), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_for_any_size(device, plan):
    torch._dynamo.reset()
    compiled = torch.compile(channel_stats, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 9):
        x = feature(("planes", (2, 6, size, size + 1)), device=device)
        with force_plan(plan):
            actual = with_gradient(compiled, x)
        for got, expected in zip(actual, with_gradient(channel_stats_reference, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_leaves_the_feature_alone(device, plan):
    x = feature(CASES[4], device=device)
    with force_plan(plan), torch.autocast(device, torch.bfloat16):
        actual = with_gradient(channel_stats, x)
    for got, expected in zip(actual, with_gradient(channel_stats_reference, x), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_derivative_is_refused(device, plan):
    x = feature(CASES[4], device=device)
    with force_plan(plan):
        (first,) = torch.autograd.grad(channel_stats(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="channel_stats: got a second derivative"):
        torch.autograd.grad(first.sum(), x)


def test_float64_is_served_by_pytorch(device):
    x = feature(CASES[4], torch.float64, device)
    assert explain_plan(channel_stats, x).plan == "eager"
    assert [t.dtype for t in channel_stats(x)] == [torch.float64, torch.float64]
    with force_plan("triton"), pytest.raises(NotImplementedError, match="channel_stats not supported: float64"):
        channel_stats(x)


def test_no_products_of_matrices_are_counted(device):
    with force_plan("triton"), FlopCounterMode(display=False) as counter:
        channel_stats(feature(CASES[4], device=device))[0].sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x: got 'list', expected a torch.Tensor"),
        (torch.zeros(2, 3), r"x: got \(2, 3\), expected shape \(B, C, \*spatial\) with one to three"),
        (torch.zeros(1, 2, 3, 4, 5, 6), r"x: got \(1, 2, 3, 4, 5, 6\)"),
        (torch.zeros(2, 3, 0, 4), r"x: got \(2, 3, 0, 4\), expected a feature with at least one channel"),
        (torch.zeros(2, 0, 3, 4), r"x: got \(2, 0, 3, 4\), expected a feature with at least one channel"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), "x: got 'int64'"),
        (torch.zeros(2, 3, 4).to_sparse(), "x: got a tensor of layout sparse_coo"),
    ],
)
def test_wrong_arguments_are_named(x, message):
    with pytest.raises(UserError, match=message):
        channel_stats(x)
