"""The matrix UNet of Eq. 3, against the recursion written out."""

import math

import pytest
import torch

from scalelong_fast.analysis.matrix_unet import MatrixUNet, apply_block, expected_squared_norms
from scalelong_fast.analysis.schedules import kappa_schedules
from scalelong_fast.errors import UserError


def by_hand(net, trial, x):
    """f_0(x) for one input ``(m,)`` of one network, by Eq. 3 as it stands."""

    def block(matrices, v):
        for number, matrix in enumerate(matrices):
            v = matrix @ (v.clamp(min=0) if number else v)
        return v

    def f(i, v):
        if i == net.num_skips:
            return block(net.middle[trial], v)
        inner = block(net.encoder(i + 1)[trial], v)
        return block(net.decoder(i + 1)[trial], net.kappas[i] * inner + f(i + 1, inner))

    return f(0, x)


@pytest.mark.parametrize("block_depth", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_output_is_equation_3(generator, block_depth, count):
    kappas = [0.9 - 0.15 * i for i in range(count)]
    net = MatrixUNet(kappas, 6, block_depth, trials=2, generator=generator)
    x = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    h = net.features(x)
    assert len(h) == count + 1
    assert torch.equal(h[0], net(x))
    for trial in range(2):
        for b in range(3):
            torch.testing.assert_close(net(x)[trial, b], by_hand(net, trial, x[trial, b]))
    torch.testing.assert_close(
        h[-1][0, 0],
        by_hand(MatrixUNetOfMiddle(net), 0, encoded(net, x)[0, 0]),
        msg="h_N is f_N of what the encoder made",
    )


def encoded(net, x):
    for i in range(1, net.num_skips + 1):
        x = apply_block(net.encoder(i), x)
    return x


class MatrixUNetOfMiddle:
    """What is left of a network without its skips."""

    def __init__(self, net):
        self.num_skips, self.kappas, self.middle = 0, (), net.middle


@pytest.mark.parametrize(("init", "gain"), [("paper", 2.0), ("norm-keeping", 1.0)])
@pytest.mark.parametrize("block_depth", [1, 2])
def test_gain_of_a_block_is_that_of_its_initialisation(generator, init, gain, block_depth):
    net = MatrixUNet([1.0], 24, block_depth, init, trials=300, generator=generator)
    x = torch.randn(300, 1, 24, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ratios = apply_block(net.encoder(1), x).square().sum(2) / x.square().sum(2)
    assert ratios.mean().item() == pytest.approx(gain, abs=4 * ratios.std().item() / 300**0.5)


@pytest.mark.parametrize(("init", "gain"), [("paper", 2.0), ("norm-keeping", 1.0)])
@pytest.mark.parametrize("kappas", [(1.0, 0.5, 0.25), (0.2, 0.5, 0.9)])
def test_expected_norm_of_every_feature(generator, init, gain, kappas):
    trials = 1000
    net = MatrixUNet(kappas, 12, 2, init, trials=trials, generator=generator)
    x = torch.randn(trials, 1, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        features = net.features(x)
    for h, expected in zip(features, expected_squared_norms(kappas, gain), strict=True):
        ratios = h.square().sum(2) / x.square().sum(2)
        assert ratios.mean().item() == pytest.approx(expected, abs=4 * ratios.std().item() / trials**0.5)


def test_with_a_gain_of_one_the_expected_norm_is_theorem_3_1():
    for count in (1, 3, 7):
        for schedule in kappa_schedules(count):
            norms = expected_squared_norms(schedule.kappas, 1.0)
            for i, norm in enumerate(norms):
                assert math.isclose(norm, 1 + schedule.squares_from(i + 1))


def test_schedules_are_those_of_the_scalings():
    schedules = {schedule.label: schedule.kappas for schedule in kappa_schedules(3)}
    assert schedules["uniform 0.5"] == (0.5, 0.5, 0.5)
    assert schedules["cs 0.5"] == (1.0, 0.5, 0.25)
    assert schedules["cs-reversed 0.5"] == (0.125, 0.25, 0.5)
    assert len(schedules) == 16


def test_bad_values_are_refused(generator):
    with pytest.raises(UserError, match=r"init: got 'norm'.*Known: norm-keeping, paper"):
        MatrixUNet([1.0], 4, init="norm", generator=generator)
    with pytest.raises(UserError, match="kappas: got 0"):
        MatrixUNet([], 4, generator=generator)
    with pytest.raises(UserError, match="width: got 0"):
        MatrixUNet([1.0], 0, generator=generator)
