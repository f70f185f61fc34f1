"""Theorem 3.4: the rigorous bound is never violated, the paper's can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalelong_fast.analysis.lipschitz import LipschitzSettings, analyze_lipschitz
from scalelong_fast.analysis.matrix_unet import MatrixUNet, apply_block
from scalelong_fast.analysis.robust_bound import (
    block_lipschitz,
    check_bound,
    composition_norm,
    lipschitz_bound,
    paper_bound,
)
from scalelong_fast.errors import UserError


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kappas=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5),
    width=st.integers(1, 12),
    block_depth=st.integers(1, 3),
    init=st.sampled_from(["paper", "norm-keeping"]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_the_rigorous_bound_is_never_violated(seed, kappas, width, block_depth, init, scale):
    generator = torch.Generator().manual_seed(seed)
    net = MatrixUNet(kappas, width, block_depth, init, generator=generator)
    x = scale * torch.randn(1, 8, width, generator=generator, dtype=torch.float64)
    check = check_bound(net, x, generator)
    assert check.measured <= check.rigorous * (1 + 1e-9)
    assert check.largest_composition <= check.largest_product * (1 + 1e-9)


def test_bounds_by_hand():
    kappas, encoders, decoders, middle = (1.0, 0.5), (2.0, 3.0), (5.0, 7.0), 11.0
    f_1 = 7 * 3 * (0.5 + 11)
    assert lipschitz_bound(kappas, encoders, decoders, middle) == 5 * 2 * (1.0 + f_1)
    assert paper_bound(kappas, (2.0, 3.0), middle) == 1.0 * 3 + 0.5 * 9 + 9 * 11


def test_a_linear_network_reaches_its_own_norm(generator):
    net = MatrixUNet([1.0, 0.5], 5, 1, generator=generator)
    with torch.no_grad():
        jacobian = net(torch.eye(5, dtype=torch.float64)[None])[0].T
    check = check_bound(net, torch.randn(1, 4, 5, generator=generator, dtype=torch.float64), generator)
    assert check.measured == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-3)


def test_the_papers_bound_can_be_violated_where_blocks_cancel(generator):
    # b ∘ a = 0, and yet b ∘ f ∘ a is not: the path through f_1 is not bounded by ‖b ∘ a‖.
    net = MatrixUNet([1.0], 2, 1, generator=generator)
    with torch.no_grad():
        net.weights.zero_()
        net.weights[0, 0, 0, 0, 0] = 1  # a = e1 e1ᵀ
        net.weights[0, 1, 0, 1, 0] = 1  # f = e2 e1ᵀ
        net.weights[0, 2, 0, 0, 1] = 1  # b = e1 e2ᵀ
    check = check_bound(net, torch.ones(1, 1, 2, dtype=torch.float64), generator)
    assert check.measured == pytest.approx(1)
    assert check.paper == pytest.approx(0)
    assert check.paper_is_violated
    assert check.rigorous == pytest.approx(2)


@pytest.mark.parametrize("block_depth", [1, 2, 3])
def test_power_iteration_finds_the_norm_of_the_jacobian(generator, block_depth):
    net = MatrixUNet([1.0], 6, block_depth, generator=generator)
    x = torch.randn(1, 5, 6, generator=generator, dtype=torch.float64)

    def composed(v):
        return apply_block(net.decoder(1), apply_block(net.encoder(1), v[None, None]))[0, 0]

    found = composition_norm(net.encoder(1), net.decoder(1), x, steps=400)
    for b in range(5):
        jacobian = torch.autograd.functional.jacobian(composed, x[0, b])
        assert found[0, b].item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-4)


def test_lipschitz_constant_of_a_block_is_the_product_of_spectral_norms(generator):
    net = MatrixUNet([1.0], 4, 3, generator=generator)
    expected = 1.0
    for matrix in net.middle[0]:
        expected *= torch.linalg.svdvals(matrix)[0].item()
    assert block_lipschitz(net.middle).item() == pytest.approx(expected)


def test_through_training_on_digits():
    finding = analyze_lipschitz(LipschitzSettings(skips=1, steps=6, checks=3, inputs=2, batch_size=16, seeds=(0,)))
    rows = finding.data["rows"]
    assert [row["step"] for row in rows[:4]] == [0, 2, 4, 6]
    assert len(rows) == 3 * 4
    assert finding.data["violations"]["rigorous"] == []
    assert all(row["measured"] <= row["rigorous"] for row in rows)
    for scaling in ("none", "uniform", "cs"):
        losses = [row["loss"] for row in rows if row["scaling"] == scaling and row["seed"] == 0]
        assert losses[0] is None
        assert losses[-1] < losses[1]
    assert "always held" in finding.sentence
    assert "Theorem 3.4" in finding.sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalings": ("ls",)}, "--scalings: got 'ls', expected constant scalings"),
        ({"scalings": ("learnable",)}, "--scalings: got 'learnable', expected constant"),
        ({"scalings": ()}, r"--scalings: got \(\)"),
        ({"checks": 501}, "--checks: got 501"),
        ({"init": "kaiming"}, "--init: got 'kaiming'"),
        ({"kappa": 0.0}, "kappa: got 0.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        LipschitzSettings(**change)
