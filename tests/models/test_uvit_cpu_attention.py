"""bf16 attention on CPUs: the explicit formula in float64 is the definition of correct."""

import pytest
import torch
from torch.nn import functional as F

from scalelong_fast.models import cpu_attention as module
from scalelong_fast.models.attention import Attention
from scalelong_fast.models.cpu_attention import kept_attention, recomputed_attention

SCALE = 0.3


def reference(qkv, scale=SCALE):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = ((q @ k.mT) * scale).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def random_qkv(batch=3, length=7, heads=2, width=4, dtype=torch.float64):
    return torch.randn(batch, length, 3, heads, width, dtype=dtype, requires_grad=True)


@pytest.fixture(params=[1, 2 << 20], ids=["image by image", "all at once"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", request.param)


@pytest.fixture(params=[recomputed_attention, kept_attention], ids=["made anew", "kept"])
def attention(request):
    return request.param


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("shape", [(3, 7, 2, 4), (1, 1, 1, 1), (5, 18, 4, 16)])
def test_equals_the_formula(attention, shape):
    qkv = random_qkv(*shape)
    torch.testing.assert_close(attention(qkv, SCALE), reference(qkv))


@pytest.mark.usefixtures("chunk_bytes")
def test_gradient_is_right(attention):
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, SCALE), random_qkv())


def test_batch_that_is_no_multiple_of_the_chunk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 2 * 7 * 7 * 8)  # two images of three
    qkv = random_qkv()
    torch.testing.assert_close(recomputed_attention(qkv, SCALE), reference(qkv))
    assert torch.autograd.gradcheck(lambda qkv: recomputed_attention(qkv, SCALE), qkv)


def test_empty_batch(attention):
    assert attention(random_qkv(batch=0), SCALE).shape == (0, 7, 8)


def test_gradient_of_an_expanded_cotangent(attention):
    qkv = random_qkv()
    (ours,) = torch.autograd.grad(attention(qkv, SCALE).sum(), qkv)
    (expected,) = torch.autograd.grad(reference(qkv).sum(), qkv)
    torch.testing.assert_close(ours, expected)


def test_registration():
    torch.library.opcheck(recomputed_attention, (random_qkv(dtype=torch.float32), SCALE))


def test_errs_no_more_in_bf16_than_flash_attention(attention):
    qkv = random_qkv(4, 65, 4, 16, torch.float64)
    low = qkv.detach().bfloat16().requires_grad_()
    cotangent = torch.randn(4, 65, 64, dtype=torch.float64)
    exact = reference(low.detach().double().requires_grad_(), 0.25)

    def errors(function):
        value = function(low)
        (grad,) = torch.autograd.grad(value, low, cotangent.bfloat16())
        leaf = low.detach().double().requires_grad_()
        (exact_grad,) = torch.autograd.grad(reference(leaf, 0.25), leaf, cotangent.bfloat16().double())
        return (value.double() - exact).norm() / exact.norm(), (grad.double() - exact_grad).norm() / exact_grad.norm()

    def flash(x):
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2)

    ours, theirs = errors(lambda x: attention(x, 0.25)), errors(flash)
    # Both round the weights of the softmax to bf16; ours also rounds the logits.
    assert ours[0] < 2 * theirs[0]
    assert ours[1] < 2 * theirs[1]


class TestAttention:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        for name in ("recomputed_attention", "kept_attention"):
            function = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
            )
        return calls

    def test_bf16_on_a_cpu_is_served(self, calls):
        attention, x = Attention(16, 2), torch.randn(2, 5, 16)
        attention(x)
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(x)
        assert calls == ["kept_attention"]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), attention(x), atol=0.02, rtol=0.02)

    @torch.autocast("cpu", torch.bfloat16)
    def test_weights_are_kept_only_for_a_backward(self, calls):
        with torch.no_grad():
            Attention(16, 2)(torch.randn(2, 5, 16))
        Attention(16, 2).requires_grad_(False)(torch.randn(2, 5, 16))
        assert calls == ["recomputed_attention"] * 2

    @torch.autocast("cpu", torch.bfloat16)
    def test_many_weights_are_made_anew(self, calls, monkeypatch):
        monkeypatch.setattr(module, "KEPT_BYTES", 2 * 2 * 5 * 5 * 2)  # two images of two heads
        for batch in (2, 3):
            Attention(16, 2)(torch.randn(batch, 5, 16)).sum().backward()
        assert calls == ["kept_attention", "recomputed_attention"]
