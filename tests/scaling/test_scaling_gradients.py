"""Exact gradients (float64), and the dtypes that scaled skips and coefficients have."""

import pytest
import torch
from torch.func import functional_call

from scalelong_fast.scaling import create_scaling

CASES = [
    ("none", {}),
    ("uniform", {}),
    ("cs", {"kappa": 0.6}),
    ("cs-reversed", {"kappa": 0.6}),
    ("learnable", {"kappa": 0.6}),
    ("ls", {"activation": "relu"}),
    ("ls", {"activation": "elu"}),
    ("ls", {"activation": "mish"}),
    ("ls", {"init": "identity"}),
    ("ls-individual", {}),
]
GATES = ("ls", "ls-individual")


def make(name, **options):
    return create_scaling(name, num_skips=3, widths=5, **({"reduction": 2} | options if name in GATES else options))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("i", [1, 3])
def test_gradcheck_of_skip_and_every_parameter(name, options, i):
    scaling = make(name, **options).double()
    names = [key for key, _ in scaling.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in scaling.parameters()]
    skip = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def run(skip, *values):
        # The factor keeps `none`, which returns its input, a proper function of it.
        return 2 * functional_call(scaling, dict(zip(names, values, strict=True)), (skip, i))

    assert torch.autograd.gradcheck(run, (skip, *values))


@pytest.mark.parametrize("name", GATES)
def test_gradcheck_where_the_producer_pooled(name):
    scaling = make(name).double()
    skip = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    pooled = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, p: scaling(s, 2, p), (skip, pooled))


def test_each_free_coefficient_learns_from_its_own_skip():
    scaling = make("learnable")
    skip = torch.randn(2, 5, 3)
    scaling(skip, 2).sum().backward()
    expected = torch.tensor([0.0, float(skip.sum()), 0.0])
    torch.testing.assert_close(scaling.kappas.grad, expected)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_skips_keep_their_dtype_and_are_rounded_once(name, options, dtype):
    scaling, skip = make(name, **options), torch.randn(2, 5, 64).to(dtype)
    scaled = scaling(skip, 3)
    assert scaled.dtype == dtype
    kappa = scaling.kappa(3, skip)
    if isinstance(kappa, torch.Tensor):
        assert kappa.dtype == torch.float32
        kappa = kappa[..., None] if kappa.dim() else kappa
    torch.testing.assert_close(scaled, (skip.float() * kappa).to(dtype), rtol=0, atol=0)


def test_free_coefficients_get_float32_gradients_from_bfloat16_skips():
    scaling, skip = make("learnable"), torch.randn(4, 5, 500).bfloat16()
    scaling(skip, 1).float().sum().backward()
    torch.testing.assert_close(scaling.kappas.grad[0], skip.float().sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", GATES)
def test_kappa_is_computed_in_float32_under_autocast(name):
    scaling, skip = make(name), torch.randn(2, 5, 64).bfloat16()
    expected = scaling.kappa(2, skip)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kappa = scaling.kappa(2, skip)
        assert scaling(skip, 2).dtype == torch.bfloat16
    assert kappa.dtype == torch.float32
    assert torch.equal(kappa, expected)


@pytest.mark.parametrize("name", [*GATES, "learnable"])
def test_a_model_cast_to_bfloat16_still_scales(name):
    scaling, skip = make(name).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    assert scaling(skip, 1).dtype == torch.bfloat16
