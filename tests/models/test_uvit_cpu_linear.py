"""bf16 Linear layers on CPUs, the weight in oneDNN's layout: F.linear is the definition of correct."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalelong_fast.models import cpu_linear as module
from scalelong_fast.models.cpu_linear import cpu_linear, project


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 5), (5,), (2, 3, 4, 5), (0, 7, 5)])
@pytest.mark.parametrize("out", [1, 3, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_linear(shape, out, with_bias):
    x, weight, bias = random(*shape), random(out, shape[-1]), random(out) if with_bias else None
    torch.testing.assert_close(cpu_linear(x, weight, bias), F.linear(x, weight, bias))
    if x.numel():
        assert torch.autograd.gradcheck(cpu_linear, (x, weight, bias))


def test_strided_arguments_and_an_expanded_cotangent():
    x, weight = random(6, 4, 5).transpose(0, 1), random(5, 3).t()
    ours = torch.autograd.grad(cpu_linear(x, weight).sum(), (x, weight))
    for got, expected in zip(ours, torch.autograd.grad(F.linear(x, weight).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("out", "dtype"), [(3, torch.bfloat16), (9, torch.float32)])
def test_registration(out, dtype):
    arguments = random(3, 7, 5, dtype=dtype), random(out, 5, dtype=dtype)
    torch.library.opcheck(cpu_linear, arguments)
    torch.library.opcheck(cpu_linear, (*arguments, random(out, dtype=dtype)))


def bf16_errors(function, *wide, cotangent):
    """Relative errors of the value and of every gradient of ``function`` in bf16, against F.linear in float64."""
    low = [t.detach().bfloat16().requires_grad_() for t in wide]  # strides stay
    value = function(*low)
    got = [value, *torch.autograd.grad(value, low, cotangent.bfloat16())]
    exact = [t.detach().double().requires_grad_() for t in low]
    value = F.linear(*exact)
    expected = [value, *torch.autograd.grad(value, exact, cotangent.bfloat16().double())]
    return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]


@pytest.mark.parametrize("sizes", [(40, 64, 48), (257, 33, 130)])
def test_errs_no_more_in_bf16_than_linear(sizes):
    rows, width, out = sizes
    tensors, cotangent = (random(rows, width), random(out, width), random(out)), torch.randn(rows, out).double()
    ours, theirs = (bf16_errors(function, *tensors, cotangent=cotangent) for function in (cpu_linear, F.linear))
    for our, their in zip(ours, theirs, strict=True):
        assert our <= 1.05 * their


def test_bf16_of_any_strides_and_sizes():
    for rows, width, out in ((1, 1, 1), (1, 5, 3), (7, 5, 9), (21, 3, 1), (6, 20, 4)):
        tensors = random(width, rows).t(), random(width, out).t(), random(out)
        cotangent = torch.randn(out, rows, dtype=torch.float64).t()
        assert max(bf16_errors(cpu_linear, *tensors, cotangent=cotangent)) < 2**-7


def test_bf16_without_rows():
    x, weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in ((0, 7, 5), (3, 5), (3,)))
    out = cpu_linear(x, weight, bias)
    assert out.shape == (0, 7, 3)
    for gradient in torch.autograd.grad(out.sum(), (weight, bias)):
        assert not gradient.any()


def test_bf16_where_onednn_has_none(monkeypatch):
    monkeypatch.setattr(module, "_onednn_has_bf16", lambda: False)
    tensors, cotangent = (random(40, 64), random(48, 64), random(48)), torch.randn(40, 48, dtype=torch.float64)
    assert max(bf16_errors(cpu_linear, *tensors, cotangent=cotangent)) < 2**-7


class TestProject:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        monkeypatch.setattr(module, "cpu_linear", lambda *args: calls.append(1) or cpu_linear(*args))
        return calls

    @pytest.mark.parametrize("bias", [True, False])
    def test_serves_bf16_autocast(self, calls, bias):
        layer, x = nn.Linear(8, 6, bias=bias), torch.randn(2, 3, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = project(layer, x), layer(x)
        assert calls
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        out.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())

    def test_serves_a_bf16_model(self, calls):
        layer = nn.Linear(8, 6).bfloat16()
        assert project(layer, torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
        assert calls

    def test_leaves_everything_else_to_the_layer(self, calls):
        layer, x = nn.Linear(8, 6), torch.randn(2, 8)
        assert torch.equal(project(layer, x), layer(x))
        with torch.autocast("cpu", torch.float16):
            assert project(layer, x).dtype == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert project(layer.double(), x.double()).dtype == torch.float64
        assert not calls

    def test_a_hook_on_the_layer_runs(self, calls):
        layer = nn.Linear(8, 6)
        layer.register_forward_hook(lambda module, args, out: out + 1)
        x = torch.randn(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(project(layer, x), layer(x))
        assert not calls
