"""The calibration ``ie``: a scale and a shift per channel or token, then σ."""

import math

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.scaling import IEGate, create_scaling


def randomised(scaling):
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.normal_()
    return scaling


@pytest.mark.parametrize("name", ["ls", "ls-individual"])
@pytest.mark.parametrize("shape", [(2, 7, 6), (3, 7, 2, 5)])
def test_kappa_is_sigma_of_a_line_through_each_mean(name, shape):
    scaling = randomised(create_scaling(name, num_skips=2, widths=7, calibration="ie"))
    skip, gate = torch.randn(shape), scaling.gate_of(2)
    assert isinstance(gate, IEGate)
    expected = torch.empty(shape[:2])
    for b in range(shape[0]):
        for n in range(7):
            z = gate.weight[n].item() * skip[b, n].double().mean().item() + gate.bias[n].item()
            expected[b, n] = 1 / (1 + math.exp(-z))
    torch.testing.assert_close(scaling.kappa(2, skip), expected)


def test_two_parameters_per_channel_and_none_of_the_se_gate():
    for name, count in (("ls", 18), ("ls-individual", 54)):
        scaling = create_scaling(name, num_skips=3, widths=9, calibration="ie")
        assert sum(parameter.numel() for parameter in scaling.parameters()) == count


@pytest.mark.parametrize(("init", "start"), [("paper", -1.0), ("identity", 6.0)])
def test_starts_at_one_value_for_every_input_and_learns(init, start):
    scaling = create_scaling("ls", num_skips=1, widths=5, calibration="ie", init=init)
    kappa = scaling.kappa(1, 50 * torch.randn(2, 5, 4))
    torch.testing.assert_close(kappa, torch.full((2, 5), 1 / (1 + math.exp(-start))))
    kappa.square().sum().backward()
    assert scaling.gate.weight.grad.abs().min() > 0
    assert scaling.gate.bias.grad.abs().min() > 0


@pytest.mark.parametrize("widths", [5, [5, 7]], ids=["one width", "two widths"])
def test_gradcheck(widths):
    scaling = randomised(create_scaling("ls", num_skips=2, widths=widths, calibration="ie", activation="elu")).double()
    skip = torch.randn(2, scaling.widths[1], 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in scaling.named_parameters()]

    def scaled(skip, *values):
        return torch.func.functional_call(scaling, dict(zip(names, values, strict=True)), (skip, 2))

    torch.autograd.gradcheck(scaled, (skip, *(p.detach().requires_grad_() for p in scaling.parameters())))


def test_between_the_adapters_where_widths_differ_it_comes_without_its_sigma():
    scaling = randomised(create_scaling("ls", num_skips=2, widths=[4, 6], calibration="ie"))
    pooled = torch.randn(3, 6)
    inner = scaling.gate.weight * scaling.encoders["6"](pooled) + scaling.gate.bias
    torch.testing.assert_close(scaling.kappa(2, pooled), torch.sigmoid(scaling.decoders["6"](inner)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kappa_is_float32_for_half_precision_skips_and_under_autocast(dtype):
    scaling = randomised(create_scaling("ls", num_skips=1, widths=5, calibration="ie"))
    skip = torch.randn(2, 5, 8).to(dtype)
    expected = scaling.kappa(1, skip.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scaling.kappa(1, skip), expected)
    assert scaling(skip, 1).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "ei"}, r"calibration: got 'ei'.*Known: ie, se"),
        ({"calibration": "ie", "init": "zero"}, r"init: got 'zero'"),
        ({"calibration": "ie", "reduction": 0}, r"reduction: got 0"),
        ({"calibration": "ie", "activation": "gelu"}, r"activation: got 'gelu'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_scaling("ls", num_skips=1, widths=4, **options)
    with pytest.raises(UserError, match="width: got 0"):
        create_scaling("ls", num_skips=1, widths=0, calibration="ie")
