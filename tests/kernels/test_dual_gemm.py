"""The products of the long skip as kernels: forward, gradients at the features, gradient at the weight."""

import pytest
import torch

from scalelong_fast.kernels.configs import LaunchConfig
from scalelong_fast.ops.problem import interpreting

if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from scalelong_fast.kernels import gemm
from scalelong_fast.kernels import wgrad as wgrad_module
from scalelong_fast.kernels.dgrad import dgrad, skip_rows
from scalelong_fast.kernels.dual_gemm import dual_gemm
from scalelong_fast.kernels.wgrad import wgrad

FORMS = pytest.mark.parametrize("tma", [False, True])
# (B, L, D_x, D_s, D_out); the interpreter's tiles are 32 wide.
SIZES = [
    (1, 1, 8, 8, 8),
    (2, 17, 64, 64, 64),
    (3, 33, 40, 72, 56),
    (1, 100, 96, 32, 104),
]
ODD_SIZES = [(1, 1, 1, 1, 1), (2, 15, 33, 7, 50), (5, 3, 1, 65, 31)]


class Case:
    """Inputs, and what the kernels should make of them in float64."""

    def __init__(self, size, dtype=torch.float16, device="cpu", kappa="full", seed=0):
        batch, tokens, d_x, d_s, d_out = size
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        self.x, self.skip, self.grad = draw(batch, tokens, d_x), draw(batch, tokens, d_s), draw(batch, tokens, d_out)
        self.weight = draw(d_out, d_x + d_s, scale=(d_x + d_s) ** -0.5)
        self.bias = draw(d_out).float()
        shape = {"full": (batch, tokens), "tokens": (tokens,), "scalar": ()}[kappa]
        self.kappa = torch.rand(shape, generator=generator).to(device).expand(batch, tokens)

    def exact(self):
        x, skip, kappa, weight, bias, grad = (
            t.detach().double() for t in (self.x, self.skip, self.kappa, self.weight, self.bias, self.grad)
        )
        features = torch.cat([x, kappa[..., None] * skip], -1)
        product = grad @ weight
        half = product[..., x.shape[2] :]
        return {
            "out": features @ weight.T + bias,
            "grad_x": product[..., : x.shape[2]],
            "product_skip": half,
            "grad_skip": kappa[..., None] * half,
            "grad_kappa": (half * skip).sum(-1),
            "scaled_skip": kappa[..., None] * skip,
            "grad_weight": grad.flatten(0, 1).T @ features.flatten(0, 1),
        }


@pytest.fixture
def close():
    """One rounding to the result's dtype, and fp32 sums before that."""

    def check(actual, exact):
        error = (actual.double() - exact).square().mean().sqrt()
        size = exact.square().mean().sqrt().clamp_min(1e-30)
        assert actual.shape == exact.shape
        assert error / size <= 0.5 * torch.finfo(actual.dtype).eps + 1e-6

    return check


@FORMS
@pytest.mark.parametrize("kappa", ["full", "tokens", "scalar"])
@pytest.mark.parametrize("size", SIZES)
def test_forward(device, poisoned, close, size, kappa, tma):
    case = Case(size, device=device, kappa=kappa)
    close(dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=tma), case.exact()["out"])


@FORMS
@pytest.mark.parametrize("size", SIZES)
def test_gradients_at_the_features(device, poisoned, close, size, tma):
    case = Case(size, device=device)
    exact = case.exact()
    grad_x, grad_skip, partial = dgrad(
        case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=tma
    )
    close(grad_x, exact["grad_x"])
    close(grad_skip, exact["grad_skip"])
    assert partial.dtype == torch.float32
    close(partial.sum(0), exact["grad_kappa"])


@FORMS
def test_the_skip_half_may_stay_unscaled(device, poisoned, close, tma):
    case = Case(SIZES[2], device=device)
    _, half, partial = dgrad(case.grad, case.skip, case.kappa, case.weight, kappa_grad=False, scale=False, tma=tma)
    close(half, case.exact()["product_skip"])
    assert partial is None


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pointers_take_any_width(device, poisoned, close, size, dtype):
    case = Case(size, dtype, device)
    exact = case.exact()
    close(dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=False), exact["out"])
    grad_x, grad_skip, partial = dgrad(
        case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=False
    )
    close(grad_x, exact["grad_x"])
    close(grad_skip, exact["grad_skip"])
    close(partial.sum(0), exact["grad_kappa"])


@pytest.mark.parametrize("programs", [1, 40, 400])
@pytest.mark.parametrize("size", [(2, 140, 40, 72, 56), *ODD_SIZES])
def test_gradient_at_the_weight(device, poisoned, close, monkeypatch, size, programs):
    monkeypatch.setattr(wgrad_module, "processors", lambda tensor: programs)
    case = Case(size, torch.float32, device)
    close(wgrad(case.grad, case.x, case.skip, case.kappa), case.exact()["grad_weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_at_the_weight_in_half_precision(device, poisoned, assert_as_accurate, dtype):
    case = Case((3, 100, 40, 72, 56), dtype, device)
    features = torch.cat([case.x, (case.kappa[..., None] * case.skip).to(dtype)], -1)
    pytorch = case.grad.flatten(0, 1).T @ features.flatten(0, 1)
    assert_as_accurate(wgrad(case.grad, case.x, case.skip, case.kappa), pytorch, case.exact()["grad_weight"])


@pytest.mark.parametrize("grad_skip", [False, True])
@pytest.mark.parametrize("scaled_skip", [False, True])
@pytest.mark.parametrize("kappa_grad", [False, True])
@pytest.mark.parametrize("gap", [False, True])
def test_rows_make_what_is_asked_for(device, poisoned, close, grad_skip, scaled_skip, kappa_grad, gap):
    case = Case((3, 11, 8, 70, 8), torch.float32, device)
    exact = case.exact()
    product = (case.grad @ case.weight)[..., 8:].contiguous()
    before = product.clone()
    grad_gap = torch.randn(3, 11, device=device) if gap else None
    scaled, partial = skip_rows(
        product, case.skip, case.kappa, grad_gap=grad_gap,
        grad_skip=grad_skip, scaled_skip=scaled_skip, kappa_grad=kappa_grad,
    )  # fmt: skip
    if grad_skip:
        close(product, exact["grad_skip"] + (grad_gap.double()[..., None] / 70 if gap else 0.0))
    else:
        assert torch.equal(product, before)
    if scaled_skip:
        close(scaled, exact["scaled_skip"])
    if kappa_grad:
        close(partial.sum(0), exact["grad_kappa"])
    assert (scaled is not None) == scaled_skip
    assert (partial is not None) == kappa_grad


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_stay_in_their_row_and_half(device, tma, value):
    """Tails of a tile reach over a row's end, into the other half of the weight and past the last row."""
    case = Case((1, 35, 40, 40, 40), device=device)
    case.x[0, 34, 39] = value
    case.weight[:, 0] = 0.0
    out = dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=tma)
    assert out[0, :34].isfinite().all()
    assert not out[0, 34].isfinite().any()

    case = Case((1, 35, 40, 40, 40), device=device)
    case.weight[3, 40] = value  # the skip's first column
    case.grad[0, 7, 3] = 0.0
    grad_x, grad_skip, partial = dgrad(
        case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=tma
    )
    assert grad_x.isfinite().all()
    assert not grad_skip[..., 0].isfinite().any()
    assert grad_skip[..., 1:].isfinite().all()
    assert not partial.sum(0).isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_stay_in_their_column_of_the_weight(device, value):
    case = Case((1, 35, 40, 40, 40), device=device)
    case.x[0, 34, 39] = value
    case.skip[0, 0, 1] = value
    grad_weight = wgrad(case.grad, case.x, case.skip, case.kappa)
    finite = grad_weight.isfinite()
    assert not finite[:, [39, 41]].any()
    assert finite[:, :39].all()
    assert finite[:, 42:].all()
    assert finite[:, 40].all()


def test_descriptors_take_tensors_that_start_anywhere(device, close):
    case = Case(SIZES[2], device=device)

    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for name in ("x", "skip", "weight", "grad"):
        setattr(case, name, shifted(getattr(case, name)))
        assert getattr(case, name).data_ptr() % 16
    exact = case.exact()
    close(dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=True), exact["out"])
    grad_x, grad_skip, _ = dgrad(case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=True)
    close(grad_x, exact["grad_x"])
    close(grad_skip, exact["grad_skip"])


@pytest.mark.parametrize(("tma", "chunks"), [(False, 1), (True, 1), (True, 2)])  # chunks are of descriptors alone
def test_any_order_and_number_of_programs(device, poisoned, close, monkeypatch, tma, chunks):
    """More bands, programs and chunks than the tables ask for."""
    case = Case((1, 200, 64, 40, 136), device=device)
    exact = case.exact()
    meta = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 3}
    if tma:
        meta["CHUNKS"] = chunks

    for name in ("dual_gemm", "dgrad"):
        module = f"scalelong_fast.kernels.{name}"
        monkeypatch.setattr(f"{module}.config_for", lambda *args: LaunchConfig(meta, 4, 2))
        monkeypatch.setattr(f"{module}.processors", lambda tensor: 5)
    close(dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=tma), exact["out"])
    grad_x, grad_skip, partial = dgrad(
        case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=tma
    )
    assert partial.shape[0] == 2
    close(grad_x, exact["grad_x"])
    close(grad_skip, exact["grad_skip"])
    close(partial.sum(0), exact["grad_kappa"])


@FORMS
@pytest.mark.parametrize("size", [(0, 7, 8, 16, 24), (3, 0, 8, 16, 24)])
def test_nothing_comes_of_an_empty_batch(device, poisoned, size, tma):
    case = Case(size, device=device)
    assert dual_gemm(case.x, case.skip, case.kappa, case.weight, case.bias, tma=tma).shape == (*size[:2], 24)
    grad_x, grad_skip, partial = dgrad(
        case.grad, case.skip, case.kappa, case.weight, kappa_grad=True, scale=True, tma=tma
    )
    assert (grad_x.shape, grad_skip.shape, partial.shape[1:]) == (case.x.shape, case.skip.shape, size[:2])
    assert torch.equal(wgrad(case.grad, case.x, case.skip, case.kappa), torch.zeros_like(case.weight))
    assert skip_rows(case.skip, case.skip, case.kappa, scaled_skip=True)[0].shape == case.skip.shape


def test_single_precision_follows_the_setting_of_pytorch():
    tensor, setting = torch.zeros(1), torch.backends.cuda.matmul
    before = setting.allow_tf32
    try:
        setting.allow_tf32 = False
        assert gemm.precision_of(tensor) == "ieee"
        setting.allow_tf32 = True
        assert gemm.precision_of(tensor) == "tf32"
        assert gemm.precision_of(tensor.half()) == "ieee"
    finally:
        setting.allow_tf32 = before
