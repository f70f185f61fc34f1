"""Learnable scaling (LS): shapes, formula, initialisation and parameter counts of the gates."""

import math

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.scaling import SEGate, create_scaling, global_average_pool


@pytest.mark.parametrize("name", ["ls", "ls-individual"])
@pytest.mark.parametrize("shape", [(2, 17, 6), (2, 8, 3, 5), (3, 8, 2, 3, 4)])
def test_kappa_per_channel_or_token_and_output_like_the_skip(name, shape):
    scaling = create_scaling(name, num_skips=3, widths=shape[1], reduction=4)
    skip = torch.randn(shape)
    kappa = scaling.kappa(2, skip)
    assert kappa.shape == shape[:2]
    assert ((kappa > 0) & (kappa < 1)).all()
    expected = torch.einsum("bn,bnk->bnk", kappa, skip.flatten(2)).view(shape)
    torch.testing.assert_close(scaling(skip, 2), expected)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (2, 5, 3, 4), (2, 5, 2, 3, 4)])
def test_pooling_averages_everything_but_batch_and_dim_1(shape):
    skip = torch.randn(shape)
    expected = torch.tensor([[float(skip[b, n].double().mean()) for n in range(5)] for b in range(2)])
    torch.testing.assert_close(global_average_pool(skip), expected)


def test_pooling_accumulates_low_precision_in_float32():
    skip = torch.randn(2, 5, 1000).bfloat16()
    pooled = global_average_pool(skip)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, skip.float().mean(-1))
    assert global_average_pool(skip.double()).dtype == torch.float64


@pytest.mark.parametrize(("width", "reduction", "hidden"), [(5, 16, 1), (16, 16, 1), (257, 16, 16), (257, 4, 64)])
def test_hidden_width_is_tokens_over_r_and_never_zero(width, reduction, hidden):
    gate = SEGate(width, reduction)
    assert gate.down.weight.shape == (hidden, width)
    assert gate.up.weight.shape == (width, hidden)
    assert gate(torch.randn(2, width)).shape == (2, width)


DIRECT = {
    "relu": lambda z: z.clamp(min=0),
    "elu": lambda z: torch.where(z > 0, z, z.exp() - 1),
    "mish": lambda z: z * torch.tanh(torch.log1p(z.exp())),
}


@pytest.mark.parametrize("activation", DIRECT)
def test_gate_is_sigma_up_psi_down(activation):
    gate = SEGate(9, reduction=3, activation=activation)
    pooled = torch.randn(4, 9)
    hidden = DIRECT[activation](pooled @ gate.down.weight.T + gate.down.bias)
    expected = 1 / (1 + torch.exp(-(hidden @ gate.up.weight.T + gate.up.bias)))
    torch.testing.assert_close(gate(pooled), expected)


@pytest.mark.parametrize("name", ["ls", "ls-individual"])
def test_pooled_skip_handed_over_replaces_the_pooling(name):
    scaling = create_scaling(name, num_skips=2, widths=6, reduction=2)
    skip, other = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    torch.testing.assert_close(scaling.kappa(1, skip, other.mean(-1)), scaling.kappa(1, other))
    assert scaling.uses_pooled


def test_identity_init_starts_at_sigma_6_for_any_input_and_still_learns():
    scaling = create_scaling("ls", num_skips=2, widths=12, reduction=2, init="identity")
    skip = 100 * torch.randn(3, 12, 4)
    torch.testing.assert_close(scaling.kappa(1, skip), torch.full((3, 12), 1 / (1 + math.exp(-6))))
    scaling(skip, 1).square().sum().backward()
    assert scaling.gate.up.bias.grad.abs().min() > 0
    assert scaling.gate.up.weight.grad.abs().sum() > 0


def test_paper_init_is_the_default_of_linear_layers():
    gate = SEGate(512, reduction=2)
    for layer in (gate.down, gate.up):
        bound = 1 / math.sqrt(layer.in_features)
        for values in (layer.weight, layer.bias):
            assert 0.97 * bound < values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # uniform, not normal
    assert gate(torch.randn(4, 512)).mean().item() == pytest.approx(0.5, abs=0.05)


def test_shared_gate_is_one_for_all_skips_and_individual_gates_are_one_each():
    one_gate = (40 * 10 + 10) + (10 * 40 + 40)
    counts = {
        name: sum(p.numel() for p in create_scaling(name, num_skips=5, widths=40, reduction=4).parameters())
        for name in ("ls", "ls-individual")
    }
    assert counts == {"ls": one_gate, "ls-individual": 5 * one_gate}


def test_shared_kappa_is_the_same_function_at_every_skip_and_individual_is_not():
    skip = torch.randn(2, 10, 4)
    shared = create_scaling("ls", num_skips=2, widths=10, reduction=2)
    individual = create_scaling("ls-individual", num_skips=2, widths=10, reduction=2)
    assert torch.equal(shared.kappa(1, skip), shared.kappa(2, skip))
    assert not torch.allclose(individual.kappa(1, skip), individual.kappa(2, skip))
    torch.testing.assert_close(individual.kappa(2, skip), individual.gates[1](skip.mean(-1)))


def test_individual_gates_may_have_widths_of_their_own():
    scaling = create_scaling("ls-individual", num_skips=3, widths=[4, 8, 16], reduction=4)
    for i, width in enumerate((4, 8, 16), start=1):
        assert scaling(torch.randn(2, width, 3, 3), i).shape == (2, width, 3, 3)


@pytest.mark.parametrize("name", ["ls", "ls-individual"])
def test_bad_widths_and_skips_are_refused(name):
    with pytest.raises(UserError, match=r"widths: got \[4, 4\], expected one width for each of the 3 skips"):
        create_scaling(name, num_skips=3, widths=[4, 4])
    with pytest.raises(UserError, match=r"width: got 0"):
        create_scaling(name, num_skips=1, widths=0)
    scaling = create_scaling(name, num_skips=2, widths=6)
    with pytest.raises(UserError, match=r"skip 2: got \(1, 7, 3\), expected 6 channels or tokens"):
        scaling(torch.randn(1, 7, 3), 2)


@pytest.mark.parametrize("name", ["ls", "ls-individual"])
def test_gates_run_where_only_shapes_are_known(name):
    with torch.device("meta"):
        scaling = create_scaling(name, num_skips=2, widths=6)
        assert scaling(torch.randn(2, 6, 4), 1).shape == (2, 6, 4)


def test_gates_print_their_options():
    assert "width=9, reduction=3, activation=mish, init=paper" in repr(SEGate(9, 3, "mish"))
