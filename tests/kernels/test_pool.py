"""``gap_rows`` and ``gap_columns``: means in fp32, whatever the size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalelong_fast.kernels.pool import gap_columns, gap_rows, parts_for

ROWS = [(1, 1), (7, 3), (33, 257), (2, 1000), (300, 16), (17, 31)]
COLUMNS = [(1, 1, 1), (2, 49, 33), (1, 300, 5), (3, 16, 64), (5, 7, 130)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def feature(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 1).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "shape"), [(gap_rows, s) for s in ROWS] + [(gap_columns, s) for s in COLUMNS])
def test_it_is_the_mean(device, assert_as_accurate, poisoned, function, shape, dtype):
    x = feature(shape, dtype, device)
    assert_as_accurate(function(x), x.mean(1, dtype=torch.float32), x.double().mean(1), factor=3.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 300), st.integers(0, 70), st.integers(0, 99))
def test_it_is_the_mean_for_any_size(batch, positions, count, seed):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test")
    x = feature((batch, positions), torch.float32, "cpu", seed)
    torch.testing.assert_close(gap_rows(x), x.mean(1), rtol=1e-5, atol=1e-6)
    x = feature((batch % 4, positions, count), torch.float32, "cpu", seed)
    torch.testing.assert_close(gap_columns(x), x.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [gap_rows, gap_columns])
def test_the_mean_of_nothing_is_nan(device, function):
    x = torch.empty((3, 0) if function is gap_rows else (3, 0, 5), device=device)
    out = function(x)
    assert out.shape == ((3,) if function is gap_rows else (3, 5))
    assert out.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("function", [gap_rows, gap_columns])
def test_nan_and_infinity_come_through_and_stay_where_they_are(device, function, value):
    x = feature((5, 40) if function is gap_rows else (2, 40, 20), torch.float32, device)
    x[1, 13] = value
    torch.testing.assert_close(function(x), x.mean(1), equal_nan=True)


def test_the_result_is_the_same_in_every_run(device):
    x = feature((1, 5000), torch.float32, device)
    assert torch.equal(gap_rows(x), gap_rows(x))


def test_sums_are_cut_until_a_gpu_is_full(monkeypatch):
    monkeypatch.setattr("scalelong_fast.kernels.pool.TARGET_PROGRAMS", 100)
    assert parts_for(1, 1) == 1
    assert parts_for(1, 1000) == 128
    assert parts_for(1, 50) == 32
    assert parts_for(60, 50) == 2
    assert parts_for(100, 50) == 1
    assert parts_for(1, 0) == 1
