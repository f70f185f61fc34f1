"""Lemma 3.2 and Theorems 3.1 and 3.3, and how well Σκ² explains the norms."""

import math

import pytest
import torch

from scalelong_fast.analysis.bounds import SCALES, BoundsSettings, check_bounds, check_lemma_3_2, measure
from scalelong_fast.analysis.statistics import band, fit_line
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError


@pytest.mark.parametrize("schedule", ["vpsde", "ddpm", "cosine"])
def test_lemma_3_2_holds_within_one_percent(schedule):
    rows = check_lemma_3_2(BoundsSettings(widths=(16, 48), samples=200, schedule=schedule))
    squares = create_schedule(schedule).grid_alphas_cumprod()
    for row, m in zip(rows, (16, 48), strict=True):
        assert row["expected"] == pytest.approx(m * (1 - 2 / 3 * squares.mean().item()))
        assert row["relative_error"] < 0.01
        assert row["relative_error"] < 4 * row["standard_error"]
        assert 0 < row["standard_error"] < 0.01


@pytest.mark.parametrize(("init", "gain"), [("paper", 2.0), ("norm-keeping", 1.0)])
def test_norms_and_gradients_agree_with_their_exact_expectations(init, gain):
    settings = BoundsSettings(trials=600)
    for row in measure(2, 12, init, settings):
        assert abs(row.norm - row.predicted_norm) < 4 * row.norm_error
        # The gradient of b_1's last matrix is the residual times what that matrix reads, so that the ratio is the
        # squared norm of the latter: that of h_0 but for the matrix's own gain.
        assert row.gradient == pytest.approx(row.predicted_norm / gain, rel=0.25)
        assert row.gradient == row.gradients_by_level[0]
        assert len(row.gradients_by_level) == 2


def test_the_constant_of_the_gradients_grows_towards_the_inside():
    # There, the residual meets the matrices that made it a second time, on the way back.
    row = measure(3, 12, "norm-keeping", BoundsSettings(trials=300))[0]
    assert (row.scaling, row.kappa) == ("uniform", 1.0)
    constants = [gradient / (5 - i) for i, gradient in enumerate(row.gradients_by_level, start=1)]
    assert constants[0] < constants[1] < constants[2]


def test_norms_concentrate_as_the_width_grows():
    spreads = [measure(1, m, "norm-keeping", BoundsSettings(trials=200))[0].spread for m in (4, 12, 36)]
    assert spreads[0] > 1.4 * spreads[1] > 1.9 * spreads[2]


def test_the_sum_of_squares_explains_all_with_a_gain_of_one_and_not_with_the_papers():
    finding = check_bounds(BoundsSettings(skips=(6,), widths=(24,), trials=150, samples=100))
    by_init = {row["init"]: row for row in finding.data["explained"]}
    assert by_init["norm-keeping"]["predicted_norm_r2"] == pytest.approx(1)
    assert by_init["norm-keeping"]["norm_r2"] > 0.95
    assert by_init["paper"]["predicted_norm_r2"] < 0.8
    assert by_init["paper"]["norm_r2"] < 0.85
    assert by_init["paper"]["predicted_norm_r2_uniform"] == pytest.approx(1)
    assert "Lemma 3.2" in finding.sentence
    assert "Theorem 3.1" in finding.sentence
    assert len(finding.data["measurements"]) == 2 * 16


def test_same_seed_same_numbers():
    settings = BoundsSettings(skips=(2,), widths=(8,), trials=3, samples=10)
    assert check_bounds(settings).data == check_bounds(settings).data


def test_scales_and_refusals():
    assert SCALES["smoke"].trials < SCALES["digits"].trials
    for change, message in (
        ({"skips": ()}, r"--skips: got \(\)"),
        ({"widths": (0,)}, "--widths: got 0"),
        ({"trials": 1}, "--trials: got 1"),
        ({"seed": -1}, "--seed: got -1"),
    ):
        with pytest.raises(UserError, match=message):
            BoundsSettings(**change)


def test_band_is_students_interval():
    found = band([1.0, 2.0, 4.0])
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (found.mean, found.count) == (pytest.approx(7 / 3), 3)
    assert (found.low, found.high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))
    assert band([1.0, 1.1, 0.9]).overlaps(band([1.15, 1.05, 1.1]))
    assert not band([1.0, 1.1, 0.9]).overlaps(band([3.0, 3.1, 2.9]))
    assert band([1.0]).overlaps(band([3.0, 3.1, 2.9]))


def test_line_and_what_it_explains():
    x = torch.linspace(0, 1, 5).tolist()
    line = fit_line(x, [2 * v + 1 for v in x])
    assert (line.slope, line.offset, line.r2) == (pytest.approx(2), pytest.approx(1), pytest.approx(1))
    assert fit_line([0, 1, 2, 3], [1, -1, -1, 1]).r2 == pytest.approx(0)
    assert math.isnan(fit_line([0, 1], [5, 5]).r2)
