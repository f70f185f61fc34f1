"""bf16 attention on CPUs: the explicit formula in float64 is the definition of correct."""

import pytest
import torch
from torch.nn import functional as F

from scalelong_fast.models import cpu_attention as module
from scalelong_fast.models.attention import Attention
from scalelong_fast.models.cpu_attention import cpu_attention

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


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("shape", [(3, 7, 2, 4), (1, 1, 1, 1), (5, 18, 4, 16)])
def test_equals_the_formula(shape):
    qkv = random_qkv(*shape)
    torch.testing.assert_close(cpu_attention(qkv, SCALE), reference(qkv))


@pytest.mark.usefixtures("chunk_bytes")
def test_gradient_is_right():
    assert torch.autograd.gradcheck(lambda qkv: cpu_attention(qkv, SCALE), random_qkv())


def test_batch_that_is_no_multiple_of_the_chunk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 2 * 7 * 7 * 8)  # two images of three
    qkv = random_qkv()
    torch.testing.assert_close(cpu_attention(qkv, SCALE), reference(qkv))
    assert torch.autograd.gradcheck(lambda qkv: cpu_attention(qkv, SCALE), qkv)


def test_empty_batch():
    assert cpu_attention(random_qkv(batch=0), SCALE).shape == (0, 7, 8)


def test_gradient_of_an_expanded_cotangent():
    qkv = random_qkv()
    (ours,) = torch.autograd.grad(cpu_attention(qkv, SCALE).sum(), qkv)
    (expected,) = torch.autograd.grad(reference(qkv).sum(), qkv)
    torch.testing.assert_close(ours, expected)


def test_registration():
    torch.library.opcheck(cpu_attention, (random_qkv(dtype=torch.float32), SCALE))


def test_errs_no_more_in_bf16_than_flash_attention():
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

    ours, theirs = errors(lambda x: cpu_attention(x, 0.25)), errors(flash)
    # Both round the weights of the softmax to bf16; ours also rounds the logits.
    assert ours[0] < 2 * theirs[0]
    assert ours[1] < 2 * theirs[1]


def test_attention_takes_it_for_bf16_on_a_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "scalelong_fast.models.attention.cpu_attention", lambda *args: calls.append(1) or cpu_attention(*args)
    )
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    attention(x)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert calls
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), atol=0.02, rtol=0.02)
