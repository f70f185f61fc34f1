"""``channel_stats_forward``: mean and M2 of every channel, however large the mean, in both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from scalelong_fast.kernels import channel_stats
from scalelong_fast.kernels.channel_stats import channel_stats_forward
from scalelong_fast.kernels.layouts import in_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (layout, shape): small and long planes, one position, one channel, channels beyond a tile, 1 to 3 spatial dimensions.
CASES = [
    ("planes", (2, 5, 7, 9)),
    ("planes", (3, 33, 4, 4)),
    ("planes", (1, 2, 300)),
    ("planes", (2, 17, 1, 1)),
    ("planes", (1, 1, 3, 5, 7)),
    ("pixels", (2, 5, 7, 9)),
    ("pixels", (1, 33, 17, 5)),
    ("pixels", (2, 17, 1, 1)),
    ("pixels", (3, 1, 6, 5)),
    ("pixels", (1, 4, 3, 5, 7)),
]


def feature(shape, layout, dtype=torch.float32, device="cpu", mean=1.0, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return in_layout(values.to(device, dtype), layout)


def moments(x):
    """Mean and M2 by PyTorch, in the dtype of x."""
    x = x.flatten(2)
    return x.mean(2), x.var(2, unbiased=False) * x.shape[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_they_are_mean_and_m2(device, assert_as_accurate, poisoned, layout, shape, dtype):
    x = feature(shape, layout, dtype, device)
    stats = channel_stats_forward(x, layout)
    for got, pytorch, exact in zip(stats, moments(x.float()), moments(x.double()), strict=True):
        assert got.is_contiguous()
        assert_as_accurate(got, pytorch, exact, factor=3.0)


@pytest.mark.parametrize(("layout", "shape"), [case for case in CASES if case[1][2:] != (1, 1)])
def test_a_large_mean_does_not_spoil_m2(device, layout, shape):
    x = feature(shape, layout, device=device, mean=100.0)
    batch, channels, *_ = shape
    positions = x[0, 0].numel()
    exact = moments(x.double())[1]
    # The variance that PyTorch's GroupNorm divides by, each channel a group.
    rstd = torch.native_group_norm(x.contiguous(), None, None, batch, channels, positions, channels, 0.0)[2]
    pytorch = positions / rstd.double().square()
    error = (channel_stats_forward(x, layout).m2 - exact).norm() / exact.norm()
    assert error <= max(2 * (pytorch - exact).norm() / exact.norm(), 2e-7)
    assert error < 2e-6  # Σ x² − (Σ x)² / P is off by 1e-3


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_the_shift_is_not_taken_from_an_outlier(device, layout):
    """The corner of an image, where a convolution sees padding, may be unlike all the rest."""
    x = feature((1, 3, 20, 20), layout, device=device)
    x[:, :, 0, 0] = 1000.0
    x[:, 1, 0, 0] = -3e4
    exact = moments(x.double())[1]
    torch.testing.assert_close(channel_stats_forward(x, layout).m2.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize(
    ("shape", "first", "rest"),
    [
        ((1, 3, 32, 32), 1000.0, 0.0),
        ((1, 3, 32, 32), 0.0, 1000.0),
        ((1, 3, 32, 32), -3e4, 10.0),
        ((2, 17, 40, 27), 1000.0, 0.0),
    ],
)
def test_a_first_tile_unlike_the_rest_costs_no_digits(device, layout, shape, first, rest):
    """As accurate as the variance by which PyTorch's GroupNorm divides, each channel a group."""
    x = feature(shape, "planes", device=device, mean=rest)
    x.flatten(2)[:, :, :16] += first - rest
    batch, channels, *_ = shape
    positions = x[0, 0].numel()
    exact = moments(x.double())
    _, mean, rstd = torch.native_group_norm(x, None, None, batch, channels, positions, channels, 0.0)
    pytorch = mean, positions / rstd.double().square()
    stats = channel_stats_forward(in_layout(x, layout), layout)
    for got, same, true in zip(stats, pytorch, exact, strict=True):
        error = (got - true).norm() / true.norm()
        assert error <= max(2 * (same - true).norm() / true.norm(), 2e-7)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["planes", "pixels"]), st.integers(0, 4), st.integers(0, 40), st.integers(1, 30), st.integers(1, 9)
)
def test_they_are_mean_and_m2_for_any_size(layout, batch, channels, height, width):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    x = feature((batch, channels, height, width), layout)
    mean, m2 = channel_stats_forward(x, layout)
    expected_mean, expected_m2 = moments(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2, expected_m2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [31, 32, 33, 97, 130, 150, 161])
def test_parts_are_joined_whatever_the_last_holds(device, assert_as_accurate, poisoned, monkeypatch, positions):
    """Up to four parts; the last one may hold a few positions or none."""
    calls = []
    cut = channel_stats.parts_for

    def parts_for(programs, steps):
        calls.append(cut(programs, steps))
        return calls[-1]

    monkeypatch.setattr("scalelong_fast.kernels.pool.TARGET_PROGRAMS", 8)
    monkeypatch.setattr(channel_stats, "parts_for", parts_for)
    x = feature((1, 3, positions), "planes", device=device)
    stats = channel_stats_forward(x, "planes")
    for got, pytorch, exact in zip(stats, moments(x), moments(x.double()), strict=True):
        assert_as_accurate(got, pytorch, exact, factor=3.0)
    if device == "cpu":
        steps = -(-positions // 32)
        assert calls == [1 if steps == 1 else 2 if steps < 4 else 4]


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 13, 119])
def test_nan_and_infinity_come_through_and_stay_in_their_channel(device, layout, value, at):
    x = feature((2, 5, 120, 1), layout, device=device)
    expected = channel_stats_forward(x, layout)
    x[1, 2, at] = value
    stats = channel_stats_forward(x, layout)
    torch.testing.assert_close(stats.mean[1, 2], torch.tensor(value, device=device), equal_nan=True)
    assert stats.m2[1, 2].isnan()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 2] = False
    for got, before in zip(stats, expected, strict=True):
        assert torch.equal(got[others], before[others])


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_constant_channels_have_no_deviations(device, layout):
    x = in_layout(torch.tensor([0.0, 1.0, -3e4, 7.1], device=device).view(1, 4, 1, 1).repeat(2, 1, 9, 11), layout)
    mean, m2 = channel_stats_forward(x, layout)
    torch.testing.assert_close(mean, x[:, :, 0, 0], rtol=3e-7, atol=0.0)
    assert (m2 >= 0).all()
    # Rounding of the mean at most: an ulp of it at each of the 99 positions.
    assert (m2 <= 99 * (1.2e-7 * mean).square()).all()


def test_without_positions_samples_or_channels(device):
    mean, m2 = channel_stats_forward(torch.empty(2, 3, 0, 4, device=device), "planes")
    assert mean.shape == m2.shape == (2, 3)
    assert mean.isnan().all()  # as PyTorch's mean of nothing
    assert not m2.any()
    for shape in [(0, 3, 4, 4), (2, 0, 4, 4)]:
        assert channel_stats_forward(torch.empty(shape, device=device), "planes").mean.shape == shape[:2]


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_the_same_call_gives_the_same_bits(device, layout):
    x = feature((1, 20, 31, 17), layout, device=device)
    first, second = (channel_stats_forward(x, layout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_results_do_not_share_memory(device):
    """A custom op may not return two tensors of one storage."""
    for shape in [(4, 20, 3, 3), (1, 2, 30, 30), (1, 2, 0, 3), (0, 2, 3, 3)]:
        mean, m2 = channel_stats_forward(torch.randn(shape, device=device), "planes")
        assert mean.untyped_storage()._cdata != m2.untyped_storage()._cdata
