"""Constant coefficients: their values, their direction and what they do to a skip."""

import math

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.scaling import create_scaling, scale_skip


def kappas(name, num_skips=4, **options):
    scaling = create_scaling(name, num_skips=num_skips, widths=3, **options)
    skip = torch.ones(1, 3, 2)
    with torch.no_grad():
        return [float(scaling.kappa(i, skip)) for i in range(1, num_skips + 1)]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("none", {}, [1, 1, 1, 1]),
        ("uniform", {}, [1 / math.sqrt(2)] * 4),
        ("uniform", {"kappa": 0.9}, [0.9] * 4),
        ("cs", {"kappa": 0.5}, [1, 0.5, 0.25, 0.125]),
        ("cs", {}, [1, 0.7, 0.49, 0.343]),
        ("cs-reversed", {"kappa": 0.5}, [0.0625, 0.125, 0.25, 0.5]),
        ("learnable", {}, [1, 1, 1, 1]),
        ("learnable", {"kappa": 0.5}, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_kappa_by_index_from_outermost_to_innermost(name, options, expected):
    assert kappas(name, **options) == pytest.approx(expected, rel=1e-12)


def test_cs_damps_the_innermost_skip_most_and_leaves_the_outermost_alone():
    scaling = create_scaling("cs", num_skips=4, widths=3, kappa=0.5)
    skip = torch.randn(2, 3, 5)
    assert scaling(skip, 1) is skip
    torch.testing.assert_close(scaling(skip, 4), skip / 8, rtol=0, atol=0)


def test_none_returns_the_very_same_object():
    scaling = create_scaling("none", num_skips=3, widths=4)
    skip = torch.randn(2, 4, 6)
    assert all(scaling(skip, i) is skip for i in (1, 2, 3))


@pytest.mark.parametrize("name", ["none", "uniform", "cs", "cs-reversed"])
def test_constants_have_neither_parameters_nor_buffers(name):
    scaling = create_scaling(name, num_skips=3, widths=4)
    assert scaling.state_dict() == {}
    assert list(scaling.parameters()) == []
    assert not scaling.uses_pooled


@pytest.mark.parametrize("name", ["uniform", "cs", "cs-reversed", "learnable"])
def test_kappa_above_one_warns(name):
    with pytest.warns(UserWarning, match=r"kappa = 1\.2 > 1 .*less stable"):
        create_scaling(name, num_skips=2, widths=4, kappa=1.2)


@pytest.mark.parametrize("name", ["none", "uniform", "cs", "cs-reversed", "learnable", "ls"])
@pytest.mark.parametrize("kappa", [0, -0.5, math.nan, math.inf, "0.5", True])
def test_kappa_that_is_no_positive_number_is_refused(name, kappa):
    with pytest.raises(UserError, match=r"kappa: got .*expected a finite number > 0"):
        create_scaling(name, num_skips=2, widths=4, kappa=kappa)


@pytest.mark.parametrize("name", ["none", "ls", "ls-individual"])
def test_kappa_without_effect_warns(name):
    with pytest.warns(UserWarning, match=f"kappa = 0.5 has no effect on scaling '{name}'"):
        create_scaling(name, num_skips=2, widths=4, kappa=0.5)


@pytest.mark.parametrize("name", ["none", "uniform", "cs", "cs-reversed", "learnable", "ls", "ls-individual"])
@pytest.mark.parametrize("i", [0, -1, 4])
def test_an_index_outside_1_to_n_is_refused(name, i):
    scaling = create_scaling(name, num_skips=3, widths=4)
    with pytest.raises(UserError, match=rf"i: got {i}"):
        scaling.kappa(i, torch.ones(1, 4, 2))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_scale_skip_broadcasts_kappa_over_the_features(shape):
    skip, kappa = torch.randn(2, 4, 3, 5), torch.rand(shape)
    expected = torch.stack([skip[b, n] * kappa.expand(2, 4)[b, n] for b in range(2) for n in range(4)])
    torch.testing.assert_close(scale_skip(skip, kappa), expected.view(2, 4, 3, 5), rtol=0, atol=0)


def test_constants_print_their_base():
    assert "num_skips=3, kappa=0.5" in repr(create_scaling("cs", num_skips=3, widths=1, kappa=0.5))
