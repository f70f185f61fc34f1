"""Norms of x_t and the κ of §4.1."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalelong_fast.analysis.kappa_range import PAPER_RANGE, solve_kappa, suggest_range, sum_of_squares
from scalelong_fast.analysis.noise import NoiseSettings, analyze_kappa_range, analyze_noise, measure_norms
from scalelong_fast.analysis.samples import draw_clean, open_samples
from scalelong_fast.data import load_images
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError
from scalelong_fast.scaling import CS

SMALL = NoiseSettings(times=4, samples=50)


def test_norms_are_those_of_the_process():
    norms = measure_norms(SMALL)
    assert norms.m == 64
    assert norms.times.tolist() == [0, 333, 666, 999]
    assert norms.inputs.shape == norms.ratios.shape == (4, 50)
    # Written out once more, from the same numbers.
    generator, dataset = torch.Generator().manual_seed(0), load_images("digits")
    squares = create_schedule("vpsde").grid_alphas_cumprod()
    for number, step in enumerate(norms.times.tolist()):
        x0 = draw_clean(dataset, 50, generator).double()
        noise = torch.randn(50, 64, generator=generator, dtype=torch.float64).view_as(x0)
        x_t = math.sqrt(squares[step]) * x0 + math.sqrt(1 - squares[step]) * noise
        expected = (x_t**2).sum((1, 2, 3))
        torch.testing.assert_close(norms.inputs[number], expected / 64)
        torch.testing.assert_close(norms.ratios[number], (noise**2).sum((1, 2, 3)) / expected)


def test_at_the_end_the_input_is_the_noise():
    norms = measure_norms(SMALL)
    torch.testing.assert_close(norms.ratios[-1], torch.ones(50, dtype=torch.float64), atol=0.05, rtol=0)
    assert norms.inputs[-1].mean().item() == pytest.approx(1, abs=0.1)


def test_samples_are_what_the_network_sees(generator):
    dataset = open_samples("digits")
    x0 = draw_clean(dataset, 20, generator)
    assert (x0.shape, x0.dtype) == ((20, 1, 8, 8), torch.float32)
    assert -1 <= x0.min() < x0.max() <= 1


def test_finding_names_the_figure_and_has_every_time():
    finding = analyze_noise(SMALL)
    assert "Fig. 3a, b" in finding.sentence
    assert [row["time"] for row in finding.data["by_time"]] == [0, 333, 666, 999]
    ratio = finding.data["ratio"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] <= ratio["max"]
    assert analyze_noise(SMALL).data == finding.data


@given(kappa=st.floats(0.01, 0.99), count=st.integers(2, 40))
def test_solving_gives_back_the_kappa(kappa, count):
    total = sum_of_squares(kappa, count)
    assert total == pytest.approx(sum(k**2 for k in CS(count, kappa).kappas))
    assert solve_kappa(total, count) == pytest.approx(kappa, abs=1e-5)


@pytest.mark.parametrize(("total", "kappa"), [(0.5, 0.0), (1.0, 0.0), (6.0, 1.0), (9.0, 1.0)])
def test_beyond_what_cs_reaches(total, kappa):
    assert solve_kappa(total, 6) == kappa


@pytest.mark.parametrize(
    ("low", "high", "overlap", "words"),
    [
        (1.05, 1.2, None, "It lies below the paper's 0.5 to 0.95"),
        (5.7, 5.9, None, "It lies above the paper's 0.5 to 0.95"),
        (1.5, 3.0, "whole", "It lies inside the paper's 0.5 to 0.95"),
        (1.1, 1.9, 0.5, "Of the paper's 0.5 to 0.95 it shares 0.50 to"),
        (0.9, 8.0, 0.5, "since κ_1 = 1; Σκ_i² cannot reach 8.00 with 6 skips"),
    ],
)
def test_the_range_is_compared_with_the_papers(low, high, overlap, words):
    found = suggest_range(low, high, 6)
    assert words in found.describe("digits", 0.95)
    if overlap is None:
        assert found.overlap is None
    elif overlap == "whole":
        assert found.overlap == (found.low, found.high)
        assert PAPER_RANGE[0] <= found.low < found.high <= PAPER_RANGE[1]
    else:
        assert found.overlap[0] == overlap


def test_suggested_range_comes_from_the_measured_ratios():
    finding = analyze_kappa_range(6, SMALL)
    ratio = finding.data["ratio"]
    assert (finding.data["low_sum"], finding.data["high_sum"]) == (ratio["mean"], ratio["high"])
    assert sum_of_squares(finding.data["low"], 6) == pytest.approx(ratio["mean"])
    assert sum_of_squares(finding.data["high"], 6) == pytest.approx(ratio["high"])
    assert "§4.1" in finding.sentence


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analyze_noise(NoiseSettings(dataset="digit")), r"DATASET: got 'digit'.*Did you mean 'digits'"),
        (
            lambda: analyze_noise(NoiseSettings(dataset="packed")),
            "--path: got None, expected the folder of a packed set",
        ),
        (lambda: NoiseSettings(upper=1.2), "--upper: got 1.2"),
        (lambda: NoiseSettings(samples=1), "--samples: got 1"),
        (lambda: analyze_kappa_range(1), "--skips: got 1"),
        (lambda: analyze_noise(NoiseSettings(schedule="linear")), "schedule: got 'linear'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
