"""Looking at the coefficients of a forward."""

import copy

import pytest
import torch

from scalelong_fast.scaling import create_scaling

NAMES = ["none", "uniform", "cs", "cs-reversed", "ls", "ls-individual", "learnable"]


def make(name):
    return create_scaling(name, num_skips=2, widths=4)


@pytest.mark.parametrize("name", NAMES)
def test_recording_gives_the_kappas_that_were_applied(name):
    scaling, skip = make(name), torch.rand(3, 4, 5) + 1
    with scaling.recording() as kappas:
        scaled = {i: scaling(skip, i) for i in (2, 1)}
    assert sorted(kappas) == [1, 2]
    for i, kappa in kappas.items():
        assert kappa.shape == ((3, 4) if name.startswith("ls") else ())
        assert not kappa.requires_grad
        torch.testing.assert_close((scaled[i] / skip).mean(-1), kappa.expand(3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_outside_the_block(name):
    scaling, skip = make(name), torch.randn(3, 4, 5)
    before = copy.copy(vars(scaling))
    with scaling.recording() as kappas:
        scaling(skip, 1)
    first = dict(kappas)
    scaling(skip, 2)
    scaling(2 * skip, 1)
    assert vars(scaling) == before
    assert kappas.keys() == {1}
    assert kappas[1] is first[1]


def test_recording_ends_where_the_block_raises():
    scaling, skip = make("ls"), torch.randn(1, 4, 5)
    with pytest.raises(RuntimeError, match="stop"), scaling.recording() as kappas:
        raise RuntimeError("stop")
    scaling(skip, 1)
    assert kappas == {}


def test_the_last_forward_wins():
    scaling = make("ls")
    with scaling.recording() as kappas:
        scaling(torch.randn(1, 4, 5), 1)
        last = torch.randn(2, 4, 5)
        scaling(last, 1)
    assert torch.equal(kappas[1], scaling.kappa(1, last))


def test_recorded_free_coefficients_do_not_follow_later_training():
    scaling = make("learnable")
    with scaling.recording() as kappas:
        scaling(torch.randn(1, 4, 5), 1)
    with torch.no_grad():
        scaling.kappas.add_(1)
    assert kappas[1].item() == 1.0
