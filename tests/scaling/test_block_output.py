"""Scaling of a block's output: x + τ f(x) and x + α f(x)."""

import copy

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.scaling import BLOCK_SCALINGS, ReZero, StableTau, create_block_scaling, scale_branch


def test_names_and_what_they_build():
    assert BLOCK_SCALINGS == ("none", "stable-tau", "rezero")
    assert create_block_scaling("none") is None
    assert isinstance(create_block_scaling("Stable_Tau"), StableTau)
    assert isinstance(create_block_scaling("rezero"), ReZero)


def test_none_is_the_branch_itself():
    branch = torch.randn(2, 3)
    assert scale_branch(None, branch) is branch


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4), (2, 5, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product_with_tau_in_the_dtype_of_the_branch(shape, dtype):
    branch = torch.randn(shape).to(dtype)
    scaled = scale_branch(create_block_scaling("stable-tau", 0.3), branch)
    assert scaled.dtype == dtype
    torch.testing.assert_close(scaled, (branch.double() * 0.3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rezero_starts_at_nothing_and_its_alpha_learns_in_float32(dtype):
    scaling, branch = create_block_scaling("rezero"), torch.randn(2, 5, 4).to(dtype)
    scaled = scale_branch(scaling, branch)
    assert torch.equal(scaled, torch.zeros_like(branch))
    (scaled.float() * 2).sum().backward()
    assert (scaling.alpha.shape, scaling.alpha.grad.dtype) == ((1,), torch.float32)
    torch.testing.assert_close(scaling.alpha.grad, 2 * branch.float().sum().reshape(1), rtol=0.02, atol=0.02)


def test_gradcheck_of_rezero():
    scaling = ReZero().double()
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda b, a: torch.func.functional_call(scaling, {"alpha": a}, b), (branch, alpha))
    torch.testing.assert_close(torch.func.functional_call(scaling, {"alpha": alpha}, branch), 0.7 * branch)


def test_copies_are_separate():
    scaling = ReZero()
    twin = copy.deepcopy(scaling)
    with torch.no_grad():
        twin.alpha.fill_(2)
    assert scaling.alpha.item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("re-zero",), r"block_scaling: got 're-zero'.*Did you mean 'rezero'"),
        ((None,), r"block_scaling: got None.*Known: none, rezero, stable-tau"),
        (("stable-tau", 0.0), r"block_tau: got 0.0, expected a finite number > 0"),
        (("stable-tau", float("nan")), r"block_tau: got nan"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        create_block_scaling(*arguments)
