"""SkipConcat: the concat with its long skip scaled, in the place of torch.cat."""

import copy

import pytest
import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.skip_concat import SkipConcat
from scalelong_fast.scaling import create_scaling, global_average_pool, scale_skip

WIDTH = 6  # of every skip below, in the concatenated dimension
TOKENS = 9
#: Shape of x by the name of the layout; the skip has WIDTH in the concatenated dimension.
SHAPES = {"1-D": (2, 4, 7), "2-D": (2, 4, 3, 5), "3-D": (2, 4, 2, 3, 2), "tokens": (2, TOKENS, 4)}


def features(layout, dtype=torch.float32):
    """x, skip and the dimension that is concatenated."""
    shape, dim = SHAPES[layout], -1 if layout == "tokens" else 1
    skip_shape = list(shape)
    skip_shape[dim] = WIDTH
    make = {"dtype": dtype, "requires_grad": True}
    return torch.randn(shape, **make), torch.randn(skip_shape, **make), dim


def width_of(layout):
    return TOKENS if layout == "tokens" else WIDTH


def by_hand(x, skip, kappa, dim, skip_first):
    scaled = scale_skip(skip, kappa)
    return torch.cat([scaled, x] if skip_first else [x, scaled], dim)


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("layout", SHAPES)
def test_constant_equals_the_concat_written_by_hand(layout, skip_first):
    x, skip, dim = features(layout)
    merge = SkipConcat("cs", kappa=0.7, i=3, dim=dim, skip_first=skip_first)
    assert torch.equal(merge(x, skip), by_hand(x, skip, 0.7**2, dim, skip_first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", [SkipConcat("none"), SkipConcat("cs", i=1), SkipConcat("uniform", kappa=1.0)])
def test_kappa_one_is_torch_cat(merge, dtype):
    x, skip, _ = features("2-D", dtype)
    assert torch.equal(merge(x, skip), torch.cat([x, skip], 1))


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("name", ["ls", "ls-individual"])
@pytest.mark.parametrize("layout", SHAPES)
def test_gate_equals_the_concat_written_by_hand(layout, name, skip_first):
    x, skip, dim = features(layout)
    merge = SkipConcat(name, width=width_of(layout), reduction=2, dim=dim, skip_first=skip_first)
    out = merge(x, skip)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    inputs = [x, skip, *merge.parameters()]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    gate = merge.scaling.gate_of(1)
    expected = by_hand(x, skip, gate(global_average_pool(skip)), dim, skip_first)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert got.abs().max() > 0


def test_a_free_scalar_learns():
    x, skip, _ = features("2-D")
    merge = SkipConcat("learnable", kappa=0.5)
    out = merge(x, skip)
    assert torch.equal(out, by_hand(x, skip, 0.5, 1, False))
    out[:, 4:].sum().backward()
    torch.testing.assert_close(merge.scaling.kappas.grad, skip.detach().sum().reshape(1))


def test_reversed_cs_counts_from_the_innermost():
    x, skip, _ = features("2-D")
    merge = SkipConcat("cs-reversed", kappa=0.5, i=2, num_skips=3)
    assert torch.equal(merge(x, skip), by_hand(x, skip, 0.5**2, 1, False))


def test_several_share_one_gate():
    scaling = create_scaling("ls", num_skips=2, widths=WIDTH, reduction=2)
    net = nn.ModuleList(SkipConcat(scaling, i=i) for i in (2, 1))
    assert len(list(net.parameters())) == 4
    x, skip, _ = features("2-D")
    with scaling.recording() as recorded:
        net[0](x, skip)
        net[1](x, 2 * skip)
    assert set(recorded) == {1, 2}
    assert not torch.equal(recorded[1], recorded[2])
    double = copy.deepcopy(net)
    assert double[0].scaling is double[1].scaling
    assert double[0].scaling is not scaling


def test_a_wrapped_gate_is_called():
    x, skip, _ = features("2-D")
    merge = SkipConcat("ls", width=WIDTH)
    merge.scaling.gate.register_forward_hook(lambda module, args, output: torch.full_like(output, 0.25))
    assert torch.equal(merge(x, skip), by_hand(x, skip, 0.25, 1, False))


def test_a_hooked_scaling_is_called():
    x, skip, _ = features("2-D")
    merge = SkipConcat("cs", i=2)
    merge.scaling.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(merge(x, skip), by_hand(x, skip, 0.0, 1, False))


@pytest.mark.parametrize("merge", [SkipConcat("cs", i=2), SkipConcat("ls", width=WIDTH), SkipConcat("learnable")])
def test_compiles_without_a_graph_break(merge):
    x, skip, _ = features("2-D")
    compiled = torch.compile(merge, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, skip), merge(x, skip))


def test_state_dict_round_trip():
    x, skip, _ = features("2-D")
    first, second = SkipConcat("ls", width=WIDTH), SkipConcat("ls", width=WIDTH)
    assert not torch.equal(first(x, skip), second(x, skip))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x, skip), second(x, skip))
    assert not SkipConcat("cs", i=2).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    x, skip, _ = features("2-D", dtype)
    merge = SkipConcat("ls", width=WIDTH).to(dtype)
    assert merge(x, skip).dtype is dtype
    if dtype is torch.bfloat16:
        with torch.autocast("cpu", dtype):
            out = SkipConcat("ls", width=WIDTH)(x.float(), skip)
        assert out.dtype is dtype


def test_channels_last_stays():
    x, skip, _ = features("2-D")
    x, skip = (t.contiguous(memory_format=torch.channels_last) for t in (x, skip))
    out = SkipConcat("cs", i=2)(x, skip)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipConcat("ls"), "width: missing"),
        (lambda: SkipConcat("cs"), "i: missing"),
        (lambda: SkipConcat("cs", i=0), "i: got 0"),
        (lambda: SkipConcat("cs", i=3, num_skips=2), r"i: got 3, expected a whole number in \[1, 2\]"),
        (lambda: SkipConcat("cs-reversed", i=1), "num_skips: missing"),
        (lambda: SkipConcat("sc", i=1), "Did you mean 'ls' or 'cs'"),
        (lambda: SkipConcat("uniform", dim=0), "dim: got 0"),
        (lambda: SkipConcat("uniform", skip_first=1), "skip_first: got 1"),
        (lambda: SkipConcat("uniform", kappa=-1.0), "kappa: got -1.0"),
        (lambda: SkipConcat("ls", width=0), "width: got 0"),
        (lambda: SkipConcat(create_scaling("cs", num_skips=2, widths=1)), "i: missing, and a shared scaling"),
        (lambda: SkipConcat(3), "scaling: got 3"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_features_that_do_not_fit_are_refused():
    x, skip, _ = features("2-D")
    with pytest.raises(UserError, match=r"skip 1: got \(2, 6, 3, 5\), expected 5 channels"):
        SkipConcat("ls", width=5)(x, skip)
    with pytest.raises(UserError, match="Crop, pad or resize"):
        SkipConcat("uniform")(x, skip[..., :-1])
