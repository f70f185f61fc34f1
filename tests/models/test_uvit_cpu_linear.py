"""bf16 Linear layers on CPUs, piece by piece: F.linear is the definition of correct."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalelong_fast.models import cpu_linear as module
from scalelong_fast.models.cpu_linear import cpu_linear, project


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture(params=[4, 1024], ids=["many pieces", "one piece"])
def _chunk_rows(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", request.param)


@pytest.mark.usefixtures("_chunk_rows")
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 5), (2, 3, 4, 5), (0, 7, 5)])
@pytest.mark.parametrize("out", [1, 3, 9])
def test_equals_linear(shape, out):
    x, weight = random(*shape), random(out, shape[-1])
    torch.testing.assert_close(cpu_linear(x, weight), F.linear(x, weight))
    if x.numel():
        assert torch.autograd.gradcheck(cpu_linear, (x, weight))


def test_pieces_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 10)
    for rows in range(60):
        covered = [row for piece in module._pieces(rows) for row in range(rows)[piece]]
        assert covered == list(range(rows))


def test_strided_arguments_and_an_expanded_cotangent():
    x, weight = random(6, 4, 5).transpose(0, 1), random(5, 3).t()
    ours = torch.autograd.grad(cpu_linear(x, weight).sum(), (x, weight))
    for got, expected in zip(ours, torch.autograd.grad(F.linear(x, weight).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("out", [3, 9])
def test_registration(out):
    torch.library.opcheck(cpu_linear, (random(3, 7, 5, dtype=torch.float32), random(out, 5, dtype=torch.float32)))


def test_errs_no_more_in_bf16_than_linear():
    x, weight = random(40, 64), random(48, 64)
    cotangent = torch.randn(40, 48, dtype=torch.float64)

    def error(function):
        low = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
        value = function(*low)
        got = [value, *torch.autograd.grad(value, low, cotangent.bfloat16())]
        wide = [t.detach().double().requires_grad_() for t in low]
        value = F.linear(*wide)
        exact = [value, *torch.autograd.grad(value, wide, cotangent.bfloat16().double())]
        return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]

    for ours, theirs in zip(error(cpu_linear), error(F.linear), strict=True):
        assert ours <= 1.05 * theirs


class TestProject:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        monkeypatch.setattr(module, "cpu_linear", lambda *args: calls.append(1) or cpu_linear(*args))
        monkeypatch.setattr(module, "LEAST_ROWS", 2)
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

    def test_few_rows_are_multiplied_at_once(self, calls, monkeypatch):
        monkeypatch.setattr(module, "LEAST_ROWS", 7)
        layer, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 7, 8).bfloat16()
        assert torch.equal(project(layer, x[0, :6]), layer(x[0, :6]))
        assert not calls
        project(layer, x[0])
        project(layer, x)
        assert len(calls) == 2

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
