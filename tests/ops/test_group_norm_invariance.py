"""What a GroupNorm leaves of κ: a group of skip channels only does not feel one κ for all of them, but for eps."""

import pytest
import torch

from scalelong_fast.ops import scale_concat_group_norm

CHANNELS, GROUPS = 8, 4
WIDTH = 2 * CHANNELS // GROUPS  # channels of a group; the last two groups hold channels of the skip alone
EPS = 1e-5


def features(x_channels=CHANNELS):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, x_channels, 6, 6), (2, 2 * CHANNELS - x_channels, 6, 6)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def groups_that_change(kappa, other, x_channels=CHANNELS, eps=EPS):
    """Which groups of the normalised concat differ by more than a thousandth between two κ's."""
    x, skip = features(x_channels)
    weight, bias = torch.ones(2 * CHANNELS).double(), torch.zeros(2 * CHANNELS).double()
    first, second = (scale_concat_group_norm(x, skip, k, GROUPS, weight, bias, eps, "none") for k in (kappa, other))
    change = (first - second).abs().unflatten(1, (GROUPS, WIDTH)).amax((0, 2, 3, 4))
    return (change > 1e-3).tolist()


def test_a_constant_kappa_is_not_felt_by_groups_of_skip_channels():
    assert groups_that_change(0.7, 0.3) == [False] * 4


def test_it_is_felt_by_a_group_that_holds_channels_of_both():
    # Six channels of x: the second group holds two of x and two of the skip.
    assert groups_that_change(0.7, 0.3, x_channels=6) == [False, True, False, False]


def test_a_kappa_of_each_channel_is_felt():
    # As LS gives it: within a group the channels' proportions change.
    gate = torch.linspace(0.2, 0.9, CHANNELS).double()
    assert groups_that_change(gate, gate.flip(0)) == [False, False, True, True]


def test_a_kappa_so_small_that_its_square_is_beside_eps_is_felt():
    # κ_i = κ^(i−1) gets there in a deep network: 0.5^11 squared is 2e-7.
    assert groups_that_change(0.5, 0.5**11) == [False, False, True, True]
    assert groups_that_change(0.5, 0.5**11, eps=1e-12) == [False] * 4


@pytest.mark.parametrize("x_channels", [8, 6])
def test_the_gradient_of_a_constant_kappa_is_that_of_the_groups_that_feel_it(x_channels):
    x, skip = features(x_channels)
    kappa = torch.full((2 * CHANNELS - x_channels,), 0.7).double().requires_grad_()
    weight, bias = torch.ones(2 * CHANNELS).double(), torch.zeros(2 * CHANNELS).double()
    out = scale_concat_group_norm(x, skip, kappa, GROUPS, weight, bias, 1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), kappa)
    # Moving the κ's of a group together changes nothing: their gradients cancel, though none of them is zero.
    of_group = grad[-2 * WIDTH :].unflatten(0, (2, WIDTH)).sum(1)
    assert (of_group.abs() < 1e-6).all()
    assert (grad.abs() > 1e-3).all()
    # Only the channels of a straddling group are left with a sum.
    assert bool(grad.sum().abs() > 1e-3) == (x_channels == 6)
