"""Deferred long skips: every reader sees what multiply and cat would have given it, values and gradients."""

import copy
import functools
import os
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching import deferred as deferred_module
from scalelong_fast.integrations.patching.deferred import always_defer, defer_skip
from scalelong_fast.integrations.patching.promise import Deferred
from scalelong_fast.ops import force_plan
from scalelong_fast.ops.problem import assume_architecture
from scalelong_fast.scaling import scale_skip

X, SKIP, OUT = 8, 4, 5


class Layers(nn.Module):
    """What may follow a concat of images."""

    def __init__(self, dims=2):
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.norm = nn.GroupNorm(2, X + SKIP)
        self.conv = convolution(X + SKIP, OUT, 3, padding=1)
        self.one = convolution(X + SKIP, OUT, 1)
        self.residual = convolution(X + SKIP, X + SKIP, 3, padding=1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def block(self, c):
        return self.conv(F.silu(self.norm(c))) + self.one(c)


def features(dims=2, channels_last=False, kappa="gate"):
    generator = torch.Generator().manual_seed(1)
    space = (6, 4, 3)[:dims]
    x = torch.randn(2, X, *space, generator=generator)
    skip = torch.randn(2, SKIP, *space, generator=generator)
    if channels_last:
        x, skip = (t.contiguous(memory_format=torch.channels_last) for t in (x, skip))
    gate = {"gate": torch.rand(2, SKIP, generator=generator), "free": torch.tensor(0.6), "constant": None}[kappa]
    tensors = [t.requires_grad_() for t in (x, skip, gate) if t is not None]
    return tensors, 0.7 if gate is None else tensors[2]


def compare(read, *, dims=2, channels_last=False, kappa="gate", skip_first=False, tolerance=1e-5, layers=None):
    """``read(layers, concat)`` of a deferred concat against that of a plain one."""
    results = []
    for lazy in (False, True):
        torch.manual_seed(0)
        module = Layers(dims) if layers is None else copy.deepcopy(layers)
        tensors, coefficient = features(dims, channels_last, kappa)
        x, skip = tensors[:2]
        with always_defer():
            scaled = defer_skip(skip, coefficient) if lazy else scale_skip(skip, coefficient)
            concat = torch.cat([scaled, x] if skip_first else [x, scaled], dim=1)
            assert isinstance(concat, Deferred) == lazy
            out = read(module, concat)
            assert not isinstance(out, Deferred) or out.promise is not concat
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
        results.append((out.detach(), [t.grad for t in (*tensors, *module.parameters())]))
    (out, grads), (lazy_out, lazy_grads) = results
    assert out.dtype == lazy_out.dtype
    assert out.stride() == lazy_out.stride()
    torch.testing.assert_close(lazy_out, out, rtol=tolerance, atol=tolerance)
    for grad, lazy_grad in zip(grads, lazy_grads, strict=True):
        assert (grad is None) == (lazy_grad is None)
        if grad is not None:
            torch.testing.assert_close(lazy_grad, grad, rtol=10 * tolerance, atol=10 * tolerance)
    return results[0]


class Exponential(torch.autograd.Function):
    """Reads its input where functions of PyTorch cannot be seen."""

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t.exp()

    @staticmethod
    def backward(ctx, grad):
        (t,) = ctx.saved_tensors
        return grad * t.exp()


def in_place_view(layers, c):
    c[:, :3].mul_(2)
    return layers.block(c)


def set_items(layers, c):
    c[:, 1] = 0
    return layers.block(c)


def in_place_norm(layers, c):
    h = layers.norm(c)
    h += 1
    return F.silu(h)


def in_place_silu(layers, c):
    h = layers.norm(c)
    F.silu(h, inplace=True)
    return h * 1


def offloaded(layers, c):
    """Memory of the norm's parameters is swapped once it was called, which bumps no version."""
    kept = {parameter: parameter.data for parameter in layers.norm.parameters()}
    h = layers.norm(c)
    for parameter in kept:
        parameter.data = torch.full_like(parameter, 100.0)
    out = F.silu(h)
    for parameter, data in kept.items():
        parameter.data = data
    return out


def hooked(layers, c):
    c.register_hook(lambda grad: grad * 3)
    return layers.block(c)


def hooked_norm(layers, c):
    layers.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layers.norm.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))
    return layers.block(c)


def on_cpu(layers, c):
    with torch.autograd.graph.save_on_cpu():
        return layers.block(c)


def selective(layers, c):
    """Checkpointing that counts calls: one that is made once only would shift all that follow."""
    saved = [torch.ops.aten.mul.Tensor, torch.ops.aten.cat.default, torch.ops.aten.convolution.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)

    def block(c):
        return layers.block(c * 2) + layers.block(c * c)

    return checkpoint(block, c, use_reentrant=False, context_fn=contexts)


def twice(layers, c):
    return layers.block(c) + layers.block(c)


READERS = {
    "norm and silu": lambda layers, c: F.silu(layers.norm(c)),
    "norm": lambda layers, c: layers.norm(c) * 2,
    "residual block": lambda layers, c: layers.block(c),
    "identity shortcut": lambda layers, c: c + layers.residual(F.silu(layers.norm(c))),
    "convolution": lambda layers, c: layers.conv(c) + layers.one(c),
    "shortcut first": lambda layers, c: layers.one(c) + layers.conv(F.silu(layers.norm(c))),
    "twice": twice,
    "another activation": lambda layers, c: F.gelu(layers.norm(c)),
    "cast": lambda layers, c: F.silu(layers.norm(c.double().float())),
    "cat with itself": lambda layers, c: torch.cat([c, c], dim=1),
    "chunks": lambda layers, c: c.chunk(2, dim=1)[0] * c.chunk(2, dim=1)[1],
    "in place": lambda layers, c: c.relu_() * 2,
    "in-place view": in_place_view,
    "setitem": set_items,
    "in place on the norm": in_place_norm,
    "in-place silu": in_place_silu,
    "offloaded norm": offloaded,
    "hook on the concat": hooked,
    "hooks on the norm": hooked_norm,
    "custom function": lambda layers, c: Exponential.apply(c),
    "checkpoint": lambda layers, c: checkpoint(layers.block, c, use_reentrant=False),
    "reentrant checkpoint": lambda layers, c: checkpoint(layers.block, c, use_reentrant=True),
    "checkpoint after a norm": lambda layers, c: checkpoint(F.silu, layers.norm(c), use_reentrant=False) + c,
    "reentrant after a norm": lambda layers, c: checkpoint(F.silu, layers.norm(c), use_reentrant=True) + c,
    "selective checkpoint": selective,
    "saved on the CPU": on_cpu,
    "vmap": lambda layers, c: torch.vmap(lambda t: t * 2)(c),
    "scripted": lambda layers, c: torch.jit.script(nn.Sequential(layers.norm, nn.SiLU(), layers.conv))(c),
    "instance norm": lambda layers, c: F.instance_norm(c),
}


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_reader(reader, channels_last, skip_first):
    compare(READERS[reader], channels_last=channels_last, skip_first=skip_first)


@pytest.mark.parametrize("kappa", ["gate", "free", "constant"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions_and_coefficients(dims, kappa):
    compare(READERS["residual block"], dims=dims, kappa=kappa)
    compare(READERS["convolution"], dims=dims, kappa=kappa)


def counting(name, op, count):
    def spy(*args, **kwargs):
        count[name] = count.get(name, 0) + 1
        return op(*args, **kwargs)

    return spy


@pytest.fixture
def calls(monkeypatch):
    """Counts of the ops that deferred tensors call."""
    count = {}
    for name in ("scale_concat", "scale_concat_group_norm", "scale_concat_linear"):
        monkeypatch.setattr(deferred_module, name, counting(name, getattr(deferred_module, name), count))
    return count


def lazy_concat(**options):
    (x, skip, *_), kappa = features(**options)
    with always_defer():
        return torch.cat([x, defer_skip(skip, kappa)], dim=1)


def test_residual_block_takes_one_fused_op(calls):
    layers = Layers()
    with always_defer():
        layers.block(lazy_concat()).sum().backward()
    assert calls == {"scale_concat_group_norm": 1}


def test_concat_is_made_once(calls):
    layers, c = Layers(), lazy_concat()
    with always_defer():
        (layers.conv(c) + layers.one(c)).sum().backward()
        Exponential.apply(c)
    assert calls == {"scale_concat": 1}


def test_facts_do_not_compute(calls):
    c = lazy_concat()
    assert c.shape == (2, X + SKIP, 6, 4)
    assert c.dtype == torch.float32
    assert c.requires_grad
    assert c.dim() == 4
    assert len(c) == 2
    assert c.size(1) == X + SKIP
    assert c.is_contiguous()
    assert c.device.type == "cpu"
    assert not c.is_cuda
    assert calls == {}


@pytest.mark.parametrize(
    "concatenate",
    [
        lambda x, s: torch.cat((x, s), -3),
        lambda x, s: torch.cat([x, s], axis=1),
        lambda x, s: torch.concat([x, s], dim=1),
        lambda x, s: torch.concatenate((s, x), 1),
    ],
)
def test_forms_of_cat(concatenate):
    (x, skip, _), kappa = features()
    with always_defer():
        lazy = concatenate(x, defer_skip(skip, kappa))
    assert isinstance(lazy, Deferred)
    assert torch.equal(lazy * 1, concatenate(x, scale_skip(skip, kappa)))


@pytest.mark.parametrize(
    "concatenate",
    [
        lambda x, s: torch.cat([x, s, x], 1),
        lambda x, s: torch.cat([x[:, :SKIP], s], 0),
        lambda x, s: torch.cat([x[:, :SKIP], s], 2),
        lambda x, s: torch.cat([x.double(), s], 1),
        lambda x, s: torch.cat([x.contiguous(memory_format=torch.channels_last), s], 1),
        lambda x, s: torch.cat([x[:, ::2], s], 1),
        lambda x, s: torch.cat([s, s], 1),
        lambda x, s: torch.hstack([x, s]),
        lambda x, s: torch.cat([x, s + 0], 1),
        lambda x, s: F.interpolate(s, scale_factor=2.0),
    ],
)
def test_others_are_computed_at_once(concatenate):
    (x, skip, gate), kappa = features()
    with always_defer():
        out = concatenate(x, defer_skip(skip, kappa))
    assert type(out) is torch.Tensor
    expected = concatenate(x, scale_skip(skip, kappa))
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    grads = torch.autograd.grad(out.square().sum(), (skip, gate))
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (skip, gate)), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_cat_with_out():
    (x, skip, _), kappa = features()
    with always_defer(), torch.no_grad():
        out = torch.empty(2, X + SKIP, 6, 4)
        assert torch.cat([x, defer_skip(skip, kappa)], 1, out=out) is out
    assert torch.equal(out, torch.cat([x, scale_skip(skip, kappa)], 1))


@pytest.mark.parametrize("needs_skip", [False, True])
def test_nothing_is_kept_that_no_gradient_needs(needs_skip):
    """A reader that saves nothing leaves x, the concat and, for a constant κ, the skip free to go."""
    (x, skip, *_), kappa = features(kappa="gate" if needs_skip else "constant")
    x, skip = x * 1, skip * 1
    with always_defer():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
    out = c.sum()
    kept = [StorageWeakRef(t.untyped_storage()) for t in (x, c.value, skip)]
    del x, skip, c
    assert [ref.expired() for ref in kept] == [True, True, not needs_skip]
    out.backward()


def test_a_fused_reader_leaves_no_promise_behind():
    layers, c = Layers(), lazy_concat()
    promise = weakref.ref(c.promise)
    with always_defer():
        out = layers.block(c)
    del c
    assert promise() is None
    out.sum().backward()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_the_table_decides(calls):
    """An op whose plan is PyTorch's gains nothing over the concat."""
    layers = Layers()
    expected = layers.block(lazy_concat())
    calls.clear()
    torch.testing.assert_close(layers.block(lazy_concat()), expected, rtol=1e-4, atol=1e-5)
    assert calls == {"scale_concat": 1}
    calls.clear()
    with assume_architecture("sm_90"):
        torch.testing.assert_close(layers.block(lazy_concat()), expected, rtol=1e-4, atol=1e-5)
    assert calls == {"scale_concat_group_norm": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_large_skips_on_a_gpu(autocast, calls):
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.GroupNorm(32, 256), "conv": nn.Conv2d(256, 8, 3), "one": nn.Conv2d(256, 8, 3)})
    block.cuda()
    dtype = torch.bfloat16 if autocast else torch.float32
    x, skip = (torch.randn(32, 128, 64, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    kappa = torch.rand(32, 128, device="cuda").requires_grad_()
    assert type(defer_skip(skip[:1], kappa[:1])) is torch.Tensor
    results = []
    for scaled in (scale_skip(skip, kappa), defer_skip(skip, kappa)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            concat = torch.cat([x, scaled], dim=1)
            normed = F.silu(block["norm"](concat))
            out = block["conv"](normed) + block["one"](concat)
        results.append((normed, out, *torch.autograd.grad(out.float().square().mean(), (x, skip, kappa))))
    assert isinstance(scaled, Deferred)
    assert calls == {"scale_concat_group_norm": 1}
    tolerance = 2e-2 if autocast else 1e-3
    for plain, fused in zip(*results, strict=True):
        assert plain.dtype == fused.dtype
        assert (plain - fused).float().norm() <= tolerance * plain.float().norm()


def test_not_under_forward_differentiation():
    (x, skip, _), kappa = features()
    with always_defer(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(skip, torch.ones_like(skip))
        out = torch.cat([x, defer_skip(dual, kappa)], 1)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent[:, X:], kappa.detach()[:, :, None, None].expand_as(skip))


def test_kappa_one_is_the_skip_itself():
    (_, skip, _), _ = features()
    with always_defer():
        assert defer_skip(skip, 1.0) is skip


def test_not_on_a_cpu_unless_told():
    (_, skip, _), kappa = features()
    assert type(defer_skip(skip, kappa)) is torch.Tensor


TOKENS = {
    "last": lambda x, s: torch.cat([x, s], -1),
    "dim 2": lambda x, s: torch.cat([x, s], 2),
    "skip first": lambda x, s: torch.cat([s, x], -1),
}


@pytest.mark.parametrize("how", TOKENS)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(how, per_token, dtype, calls):
    linear = nn.Linear(10, 7).to(dtype)
    results = []
    for lazy in (False, True):
        generator = torch.Generator().manual_seed(3)
        x, skip = (torch.randn(2, 5, d, generator=generator).to(dtype).requires_grad_() for d in (6, 4))
        kappa = torch.rand(2, 5, generator=generator).requires_grad_() if per_token else 0.7
        with always_defer():
            concat = TOKENS[how](x, defer_skip(skip, kappa) if lazy else scale_skip(skip, kappa))
            out = linear(concat)
        tensors = [x, skip, *linear.parameters(), *([kappa] if per_token else [])]
        results.append((out, torch.autograd.grad(out.square().sum(), tensors)))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance * 10)
    assert calls == ({"scale_concat": 1} if how == "skip first" else {"scale_concat_linear": 1})


def test_autocast():
    def cast(layers, c):
        with torch.autocast("cpu", torch.bfloat16):
            return layers.block(c)

    def cast_all(layers, c):
        with torch.autocast("cpu", torch.bfloat16):
            return layers.conv(layers.norm(layers.residual(c.bfloat16())))

    compare(cast, tolerance=1e-2)
    compare(cast_all, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_under_autocast(dtype):
    linear = nn.Linear(10, 7, dtype=dtype)
    x, skip, kappa = torch.randn(2, 5, 6), torch.randn(2, 5, 4), torch.rand(2, 5)
    with always_defer(), torch.autocast("cpu", torch.bfloat16):
        out = linear(torch.cat([x, defer_skip(skip, kappa)], -1))
        expected = linear(torch.cat([x, scale_skip(skip, kappa)], -1))
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    tensors, kappa = features()
    x, skip = (t.detach().to(dtype) for t in tensors[:2])
    layers = Layers().to(dtype)
    with always_defer():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
        out = layers.block(c)
        expected = layers.block(torch.cat([x, scale_skip(skip, kappa)], 1))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_without_gradients():
    layers = Layers()
    (x, skip, _), kappa = features()
    expected = layers.block(torch.cat([x, scale_skip(skip, kappa)], 1))
    with always_defer(), torch.no_grad():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
        assert isinstance(c, Deferred)
        assert not c.requires_grad
        torch.testing.assert_close(layers.block(c), expected)
    # A concat made without gradients is a constant, for whoever reads it with them too.
    with always_defer(), torch.no_grad():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
    with always_defer():
        F.silu(layers.norm(c)).sum().backward()
    assert x.grad is None
    assert skip.grad is None
    assert layers.norm.weight.grad is not None


def test_inference_mode():
    layers = Layers()
    (x, skip, _), kappa = features()
    expected = layers.block(torch.cat([x, scale_skip(skip, kappa)], 1))
    with always_defer(), torch.inference_mode():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
        assert type(c) is torch.Tensor
        torch.testing.assert_close(layers.block(c), expected)
    c = lazy_concat()
    with always_defer(), torch.inference_mode():
        torch.testing.assert_close(layers.block(c), expected)
    torch.testing.assert_close(layers.block(c), expected)


def test_copies_and_memory():
    expected = torch.cat([(f := features())[0][0], scale_skip(f[0][1], f[1])], 1).detach()
    with torch.no_grad():
        c = lazy_concat()
        assert torch.equal(copy.deepcopy(c), expected)
        assert type(copy.deepcopy(c)) is torch.Tensor
        assert torch.equal(torch.from_numpy(lazy_concat().numpy()), expected)
        assert lazy_concat().data_ptr() != 0
        assert "tensor(" in repr(lazy_concat())
    assert torch.equal(lazy_concat().data, expected)
    assert torch.equal(lazy_concat().detach(), expected)
    with pytest.raises(RuntimeError, match="leaves"):
        copy.deepcopy(lazy_concat())


def test_feature_changed_before_it_is_read():
    (x, skip, _), kappa = features()
    with always_defer():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(UserError, match=r"fused=False"):
            Layers().norm(c)


@pytest.mark.parametrize("what", ["swapped", "freed"])
def test_memory_taken_before_it_is_read(what):
    (x, skip, _), kappa = features()
    with always_defer():
        c = torch.cat([x, defer_skip(skip, kappa)], 1)
        if what == "swapped":
            x.data = torch.zeros_like(x)
        else:
            x.untyped_storage().resize_(0)
        with pytest.raises(UserError, match=r"fused=False"):
            Layers().norm(c)


def test_shape_changed_in_place():
    with pytest.raises(UserError, match=r"aten.unsqueeze_.*fused=False"):
        lazy_concat().unsqueeze_(0)


def test_second_backward():
    (x, skip, gate), kappa = features()
    with always_defer():
        out = Exponential.apply(torch.cat([x, defer_skip(skip, kappa)], 1)).sum()
    first = torch.autograd.grad(out, (x, skip, gate), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, (x, skip, gate)), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)
    with always_defer():
        out = torch.cat([x, defer_skip(skip, kappa)], 1).exp().sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out, gate, create_graph=True)


def test_custom_op():
    @torch.library.custom_op("scalelong_tests::twice", mutates_args=())
    def twice_op(t: torch.Tensor) -> torch.Tensor:
        return t * 2

    twice_op.register_autograd(lambda ctx, grad: grad * 2)
    compare(lambda layers, c: torch.ops.scalelong_tests.twice(c))


class Wrapped(torch.Tensor):
    """Stands for weights of another kind: quantised, sharded."""


def test_weights_of_other_kinds(calls):
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(10, 7))
    wrapped = nn.Linear(10, 7)
    wrapped.weight = nn.Parameter(wrapped.weight.detach().as_subclass(Wrapped))
    x, skip, kappa = torch.randn(2, 5, 6), torch.randn(2, 5, 4), torch.rand(2, 5)
    plain = torch.cat([x, scale_skip(skip, kappa)], -1)
    for layer in (normed, wrapped):
        with always_defer():
            out = layer(torch.cat([x, defer_skip(skip, kappa)], -1))
        torch.testing.assert_close(out, layer(plain), rtol=1e-5, atol=1e-5)
    assert calls == {"scale_concat_linear": 1, "scale_concat": 1}


def test_lora_layer(calls):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(10, 7))
    network = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x, skip, kappa = torch.randn(2, 5, 6), torch.randn(2, 5, 4), torch.rand(2, 5)
    with always_defer():
        out = network(torch.cat([x, defer_skip(skip, kappa)], -1))
    torch.testing.assert_close(out, network(torch.cat([x, scale_skip(skip, kappa)], -1)), rtol=1e-5, atol=1e-5)
    assert calls == {"scale_concat_linear": 2}, "its own weight and the adapter's"


def test_compiled_reader_is_handed_a_plain_tensor():
    block = Layers()
    (_, skip, _), kappa = features()
    with always_defer():
        assert isinstance(defer_skip(skip, kappa, block), Deferred)
        block.conv.compile(backend="eager")
        assert type(defer_skip(skip, kappa, block)) is torch.Tensor


def test_deferred_reaches_a_compiled_function():
    layers = Layers()
    compiled = torch.compile(layers.block, backend="eager")
    c = lazy_concat()
    with always_defer():
        out = compiled(c)
    torch.testing.assert_close(out, layers.block(lazy_concat()))


def test_note_says_what_became_of_it():
    notes = []
    layers = Layers()
    (x, skip, _), kappa = features()
    with always_defer():
        for read in (layers.block, layers.norm, layers.conv):
            c = torch.cat([x, defer_skip(skip, kappa, note=notes.append)], 1)
            read(c).sum()
        defer_skip(skip, kappa, note=notes.append).sum()
    assert notes == [
        "scale_concat_group_norm, with the SiLU",
        "scale_concat_group_norm",
        "scale_concat",
        "multiply",
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_kernels(calls):
    """The plan that a GPU takes, through Triton's interpreter."""

    def block(layers, c):
        with force_plan("triton"):
            return layers.block(c)

    compare(block, tolerance=1e-4)
    compare(block, channels_last=True, skip_first=True, tolerance=1e-4)
    assert calls == {"scale_concat_group_norm": 2}
