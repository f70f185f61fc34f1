"""The LayerNorm kernels: rounding of the sum, tiles, poisoned memory, and the optional tensors."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from scalelong_fast.kernels.configs import launch_config, table_names
from scalelong_fast.kernels.layer_norm import MAX_WIDTH, layer_norm_backward, layer_norm_forward
from scalelong_fast.ops import layer_norm_gap as public
from scalelong_fast.ops.layer_norm_gap import MAX_WIDTH as LIMIT_OF_THE_OP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_the_op_and_the_kernel_agree_on_the_longest_row():
    assert public.__name__ == "layer_norm_gap"
    assert LIMIT_OF_THE_OP == MAX_WIDTH


@pytest.mark.parametrize("arch", table_names())
@pytest.mark.parametrize("kernel", ["layer_norm_forward", "layer_norm_backward"])
def test_every_width_has_a_configuration(arch, kernel):
    for width in range(1, MAX_WIDTH + 1, 97):
        config = launch_config(kernel, arch, "bfloat16", width)
        assert set(config.meta) == {"BLOCK_M"} | ({"PROGRAMS"} if kernel.endswith("backward") else set())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (9, 130), (300, 7), (2, 1024)])
def test_the_sum_is_rounded_as_pytorch_rounds_it(device, poisoned, dtype, branch_dtype, rows, width):
    if torch.promote_types(dtype, branch_dtype) != dtype:
        pytest.skip("the branch is never wider than the stream")
    x = draw(rows, width, dtype=dtype, device=device)
    branch = draw(rows, width, dtype=branch_dtype, device=device, seed=1)
    weight, bias = draw(width, device=device, seed=2), draw(width, device=device, seed=3)
    normed = layer_norm_forward(x, branch, weight, bias, 1e-5, dtype, torch.bfloat16)
    total = x + branch
    assert torch.equal(normed.total, total)
    assert torch.equal(normed.copy, total.bfloat16())
    torch.testing.assert_close(normed.mean, total.float().mean(-1), rtol=1e-5, atol=1e-6)
    expected = F.layer_norm(total.float(), (width,), weight, bias)
    torch.testing.assert_close(normed.out, expected.to(dtype))
    variance = total.double().var(-1, unbiased=False)
    torch.testing.assert_close(normed.rstd, (variance + 1e-5).rsqrt().float(), rtol=2e-5, atol=0.0)


def test_a_large_mean_does_not_spoil_the_variance(device):
    x = draw(6, 200, device=device) + 1000.0
    one, zero = torch.ones(200, device=device), torch.zeros(200, device=device)
    out = layer_norm_forward(x, None, one, zero, 1e-5, torch.float32).out
    exact = F.layer_norm(x.double(), (200,), eps=1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=2e-4)  # 1e-4 is the rounding of the mean itself


@pytest.mark.parametrize("absent", ["grad_mean", "grad_total", "grad_skip", "copy", "all"])
def test_gradients_may_be_absent(device, poisoned, absent):
    rows, width = 11, 40
    total = draw(rows, width, device=device)
    weight, bias = draw(width, device=device, seed=1), draw(width, device=device, seed=2)
    normed = layer_norm_forward(total, None, weight, bias, 1e-5, torch.float32)
    grads = {
        "grad_mean": draw(rows, device=device, seed=3),
        "grad_total": draw(rows, width, device=device, seed=4),
        "grad_skip": draw(rows, width, dtype=torch.bfloat16, device=device, seed=5),
    }
    given = {name: None if absent in (name, "all") else value for name, value in grads.items()}
    copy_dtype = None if absent in ("copy", "all") else torch.float16
    grad_out = draw(rows, width, device=device, seed=6)
    grad, copy, grad_weight, grad_bias = layer_norm_backward(
        grad_out, *given.values(), total, normed.mean, normed.rstd, weight, bias, copy_dtype
    )
    value, w, b = (t.clone().requires_grad_() for t in (total, weight, bias))
    outputs = [F.layer_norm(value, (width,), w, b)]
    outputs += [o for o, g in zip((value.mean(-1), value * 1, value * 1), given.values(), strict=True) if g is not None]
    cotangents = [grad_out, *(g.float() for g in given.values() if g is not None)]
    expected = torch.autograd.grad(outputs, [value, w, b], cotangents)
    for got, right in zip((grad, grad_weight, grad_bias), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert copy is None if copy_dtype is None else torch.equal(copy, grad.half())


def test_the_same_call_gives_the_same_bits(device):
    total, grad = draw(67, 50, device=device), draw(67, 50, device=device, seed=1)
    weight = draw(50, device=device, seed=2)
    normed = layer_norm_forward(total, None, weight, weight, 1e-5, torch.float32)
    first, second = (
        layer_norm_backward(grad, None, None, None, total, normed.mean, normed.rstd, weight, weight) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


def test_the_longest_row(device, poisoned):
    x, weight = draw(2, MAX_WIDTH, device=device), draw(MAX_WIDTH, device=device, seed=1)
    normed = layer_norm_forward(x, None, weight, weight, 1e-5, torch.float32)
    torch.testing.assert_close(normed.out, F.layer_norm(x, (MAX_WIDTH,), weight, weight), rtol=1e-5, atol=1e-5)
    grad, _, grad_weight, grad_bias = layer_norm_backward(
        x, None, None, None, x, normed.mean, normed.rstd, weight, weight
    )  # fmt: skip
    assert all(torch.isfinite(t).all() for t in (grad, grad_weight, grad_bias))
    torch.testing.assert_close(grad_bias, x.sum(0), rtol=1e-5, atol=1e-5)


def test_no_rows(device):
    x = torch.empty(0, 8, device=device)
    weight = torch.ones(8, device=device)
    normed = layer_norm_forward(x, x, weight, weight, 1e-5, torch.bfloat16, torch.float16)
    assert normed.out.shape == normed.copy.shape == (0, 8)
    _, _, grad_weight, grad_bias = layer_norm_backward(
        x, None, None, None, normed.total, normed.mean, normed.rstd, weight, weight
    )
    assert not grad_weight.any()
    assert not grad_bias.any()
