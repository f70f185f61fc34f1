"""Concats that go to functions: intercepted where the user says how many, and never where that could go wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching import apply_scalelong, remove_scalelong, state_of


class Recomputed(torch.autograd.Function):
    """Recomputation that gives gradients to the tensors it was handed, and to no others."""

    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run, ctx.tensors = run, tensors
        with torch.no_grad():
            return run(*tensors)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.tensors]
            out = ctx.run(*[tensor.view_as(tensor) for tensor in inputs])
        return None, *torch.autograd.grad(out, inputs, grad)


def recompute(how, run, *args):
    if how is None:
        return run(*args)
    return Recomputed.apply(run, *args) if how == "own" else checkpoint(run, *args, use_reentrant=how)


class Functional(nn.Module):
    """Two long skips whose concats go through an activation; a condition is concatenated first."""

    def __init__(self, how=None):
        super().__init__()
        self.how, self.extra = how, 0
        self.stem, self.down = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.middle, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.Upsample(scale_factor=2)
        self.merge2, self.merge1 = nn.Conv2d(16, 4, 3, 1, 1), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x, mask):
        x1 = self.stem(torch.cat([x, mask], 1))
        x2 = self.down(x1)
        x = self.up(self.middle(x2))
        for _ in range(self.extra):
            x = torch.cat([x, x], 1)[:, :8]
        x = recompute(self.how, lambda a, b: self.merge2(F.silu(torch.cat([a, b], 1))), x, x2)
        return self.merge1(F.silu(torch.cat([x1, self.up(x)], 1)))


def inputs():
    return torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)


def patched(scaling="ls", how=None, **options):
    net, args = Functional(how), inputs()
    apply_scalelong(net, scaling, example_inputs=args, expect=2, **options)
    return net, args


def by_hand(net, scaling, x, mask):
    x1 = net.stem(torch.cat([x, mask], 1))
    x2 = net.down(x1)
    x = net.merge2(F.silu(torch.cat([net.up(net.middle(x2)), scaling(x2, 2)], 1)))
    return net.merge1(F.silu(torch.cat([scaling(x1, 1), net.up(x)], 1)))


@pytest.mark.parametrize("scaling", ["cs", "ls"])
def test_equals_the_network_edited_by_hand(scaling, capsys):
    net, args = patched(scaling, init="paper")
    printed = capsys.readouterr().out
    assert "Functional: intercepting 2 of 3 concats" in printed
    assert printed.count("long skip") == 3  # "no long skip" once
    out = net(*args)
    torch.testing.assert_close(out, by_hand(net, state_of(net).scaling, *args), rtol=0, atol=0)
    out.sum().backward()
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    by_hand(net, state_of(net).scaling, *args).sum().backward()
    for got, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_another_number_than_expected_is_refused():
    net, args = Functional(), inputs()
    with pytest.raises(UserError, match="expect: got 3, but intercepted-concats found 2"):
        apply_scalelong(net, "cs", example_inputs=args, expect=3)
    assert state_of(net) is None


def test_without_expect_nothing_is_intercepted():
    with pytest.raises(UserError, match="Pass expect=2"):
        apply_scalelong(Functional(), "cs", example_inputs=inputs())


@pytest.mark.parametrize("how", [True, False, "own"])
def test_refused_under_activation_checkpointing(how):
    net, args = patched("cs", how=how)
    with pytest.raises(UserError, match="concat 2 of this forward runs under activation checkpointing"):
        net(*args)
    with torch.no_grad():  # nothing is recomputed
        net(*args)


def test_checkpointing_around_the_network_is_no_harm():
    net, args = patched("ls", init="paper")
    net(*args).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    checkpoint(net, *args, use_reentrant=False).sum().backward()
    for want, parameter in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_a_forward_that_concatenates_otherwise_is_refused():
    net, args = patched("cs")
    net.extra = 1
    with pytest.raises(UserError, match=r"is of .2, 8, 4, 4. and .2, 8, 4, 4.|3 when its long skips were found"):
        net(*args)
    net.extra = 0
    net(*args)


def test_a_compiled_network_is_refused():
    net, args = patched("cs")
    for how in ({}, {"fullgraph": True}):
        torch._dynamo.reset()
        with pytest.raises((UserError, torch._dynamo.exc.TorchDynamoException)):
            torch.compile(net, backend="eager", **how)(*args)
    with pytest.raises(UserError, match=r"torch\.export cannot follow"):
        torch.export.export(net, args)


def test_compiled_parts_run_eagerly():
    net, args = patched("cs")
    net.merge2.compile(backend="eager")
    assert torch.equal(net(*args), by_hand(net, state_of(net).scaling, *args))


def test_an_error_of_the_network_ends_the_interception():
    net, args = patched("cs")
    with pytest.raises(RuntimeError):
        net(args[0][:, :2], args[1])
    assert not torch._C._is_torch_function_mode_enabled()
    a = torch.ones(1, 4, 2, 2)
    assert torch.equal(torch.cat([a, a], 1), torch.ones(1, 8, 2, 2))
    assert torch.equal(net(*args), by_hand(net, state_of(net).scaling, *args))


def test_copies_and_removal():
    net, args = patched("ls", init="paper")
    expected = net(*args)
    double = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in state_of(net).parameters():
            parameter.fill_(1.0)
    assert torch.equal(double(*args), expected)
    assert not torch.equal(net(*args), expected)
    remove_scalelong(double)
    assert not double._forward_hooks
    assert not double._forward_pre_hooks
    assert torch.equal(double(*args), by_hand(double, lambda skip, i: skip, *args))


class Decoder(nn.Module):
    """A decoder block that is recomputed as a whole, its concat included."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.up = how, nn.Conv2d(12, 3, 3, 1, 1), nn.Upsample(scale_factor=2)

    def forward(self, x, encoded):
        return recompute(self.how, lambda a, b: self.conv(torch.cat([self.up(a), b], 1)), x, encoded)


class RecomputedDecoder(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.stem, self.down, self.decoder = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), Decoder(how)

    def forward(self, x):
        x = self.stem(x)
        return self.decoder(self.down(x), x)


@pytest.mark.parametrize("how", [True, False])
def test_hooks_inside_a_checkpoint_give_plain_gradients(how):
    x = torch.randn(2, 3, 8, 8)
    plain, recomputed = RecomputedDecoder(None), RecomputedDecoder(how)
    for net in (plain, recomputed):
        apply_scalelong(net, "ls", init="paper", example_inputs=(x,))
    recomputed.load_state_dict(plain.state_dict())
    for net in (plain, recomputed):
        net(x).sum().backward()
    for got, want in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_gates_inside_a_checkpoint_that_would_drop_their_gradients_are_refused():
    x = torch.randn(2, 3, 8, 8)
    net = RecomputedDecoder("own")
    apply_scalelong(net, "ls", example_inputs=(x,))
    with pytest.raises(UserError, match=r"'decoder\.conv' receives .* gives no gradient to gates"):
        net(x).sum().backward()
    remove_scalelong(net)
    apply_scalelong(net, "cs", example_inputs=(x,))
    net(x).sum().backward()
