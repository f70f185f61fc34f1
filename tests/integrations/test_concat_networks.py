"""Networks that concatenate by themselves, each in a way that is in use: patched, they equal hand-edited copies."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from scalelong_fast.integrations.patching import apply_scalelong, remove_scalelong, state_of

# Test files are no package; the compiler wants modules it can find.
_spec = importlib.util.spec_from_file_location(
    "networks_that_concatenate", Path(__file__).with_name("networks_that_concatenate.py")
)
sys.modules[_spec.name] = networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)
NETWORKS, Stack, edit_by_hand = networks.NETWORKS, networks.Stack, networks.edit_by_hand


def build(name):
    make, inputs, widths = NETWORKS[name]
    net, args = make(), inputs()
    return net.eval(), args, widths


def awake(net):
    """The patch of a network; every hidden unit of its gates is active, however small they are."""
    state = state_of(net)
    with torch.no_grad():
        for name, parameter in state.named_parameters():
            if name.endswith("down.bias"):
                # Layers that come later take in more.
                parameter.fill_({"encoders": 3.0, "decoders": 30.0}.get(name.split(".")[1], 10.0))
    return state


def gradients(net, args):
    """Output and gradients of every parameter, by name; the patch's apart from the prefix."""
    net.zero_grad()
    out = net(*args)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters()}


def hand_edited(net, state):
    """A copy of the network that scales its skips itself, with the coefficients of the patch."""
    stock = remove_scalelong(copy.deepcopy(net))
    return edit_by_hand(stock, copy.deepcopy(state.scaling))


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_and_kappa_one(name):
    net, args, widths = build(name)
    before, expected = {key: value.clone() for key, value in net.state_dict().items()}, net(*args)
    flags = [(module.training, dict(module.__dict__)) for module in net.modules()]
    generator = torch.get_rng_state()
    assert apply_scalelong(net, "cs", kappa=1.0, example_inputs=args) is net
    state = state_of(net)
    assert state.settings["adapter"] == "concat-consumer"
    assert [site.width for site in state.sites] == widths
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(net(*args), expected)
    remove_scalelong(net)
    for (training, attributes), module in zip(flags, net.modules(), strict=True):
        assert module.training == training
        assert module.__dict__ == attributes
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_constants_equal_the_hand_edited_copy(name):
    net, args, _ = build(name)
    unpatched = net(*args)
    apply_scalelong(net, "cs-reversed", kappa=0.5, example_inputs=args, fused=False)
    out = net(*args)
    assert torch.equal(out, hand_edited(net, state_of(net))(*args))
    assert not torch.allclose(out, unpatched)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gates_equal_the_hand_edited_copy(name, shared):
    net, args, _ = build(name)
    apply_scalelong(net, "ls", shared=shared, init="paper", example_inputs=args)
    state = awake(net)
    edited = hand_edited(net, state)
    out, grads = gradients(net, args)
    expected, wanted = gradients(edited, args)
    torch.testing.assert_close(out, expected)
    for key, grad in wanted.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5)
    gates = dict(state.scaling.named_parameters())
    by_hand = dict(edited.by_hand[0].named_parameters())
    for key, gate in gates.items():
        assert gate.grad.abs().max() > 0, key
        torch.testing.assert_close(gate.grad, by_hand[key].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", [True, False, "own"])
def test_checkpointed_gradients_equal_plain_ones(how):
    plain, recomputed = Stack(), Stack(how)
    recomputed.load_state_dict(plain.state_dict())
    args = NETWORKS["stack"][1]()
    apply_scalelong(plain, "ls", init="paper", example_inputs=args)
    apply_scalelong(recomputed, "ls", init="paper", example_inputs=args)
    state_of(recomputed).load_state_dict(state_of(plain).state_dict())
    args[0].requires_grad_()
    (out, grads), (expected, wanted) = gradients(recomputed, args), gradients(plain, args)
    assert torch.equal(out, expected)
    for key, grad in wanted.items():
        torch.testing.assert_close(grads[key], grad)


# Those that differ in the way that a hook reaches the concat.
@pytest.mark.parametrize("name", ["stack", "decoder loop", "recursive"])
def test_compiles_without_a_graph_break(name):
    net, args, _ = build(name)
    apply_scalelong(net, "ls", init="paper", example_inputs=args)
    expected = net(*args)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected)


@pytest.mark.parametrize("name", ["stack", "recursive"])
def test_a_copy_has_gates_of_its_own(name):
    net, args, _ = build(name)
    apply_scalelong(net, "ls", init="paper", example_inputs=args)
    expected = net(*args)
    double = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in state_of(net).parameters():
            parameter.zero_()
    assert torch.equal(double(*args), expected)
    assert not torch.equal(net(*args), expected)


def test_ten_steps_change_every_gate():
    net, args, _ = build("stack")
    apply_scalelong(net, "ls", example_inputs=args)
    before = [parameter.clone() for parameter in awake(net).parameters()]
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(10):
        optimiser.zero_grad()
        (net(*args) - args[0]).square().mean().backward()
        optimiser.step()
    after = list(state_of(net).parameters())
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net, args, _ = build("decoder loop")
    net.to(dtype)
    args = [arg.to(dtype) for arg in args]
    apply_scalelong(net, "ls", init="paper", example_inputs=tuple(args))
    state = awake(net)
    assert all(parameter.dtype is dtype for parameter in state.parameters())
    out = net(*args)
    assert out.dtype is dtype
    torch.testing.assert_close(out, hand_edited(net, state)(*args))


def test_autocast():
    net, args, _ = build("stack")
    apply_scalelong(net, "ls", init="paper", example_inputs=args)
    edited = hand_edited(net, awake(net))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = net(*args), edited(*args)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_exported():
    net, args, _ = build("decoder loop")
    apply_scalelong(net, "ls", init="paper", example_inputs=args)
    awake(net)
    exported = torch.export.export(net, args).module()
    torch.testing.assert_close(exported(*args), net(*args))


def test_keyword_inputs():
    net, args, widths = build("stack")
    named = dict(zip(("x", "t", "condition"), args, strict=True))
    apply_scalelong(net, "cs", example_inputs=named)
    assert [site.width for site in state_of(net).sites] == widths


def test_a_compiled_network_is_patched_as_it_is_written():
    net, args, widths = build("recursive")
    expected = net(*args)
    torch._dynamo.reset()
    net.compile(backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        apply_scalelong(net, "cs", kappa=0.5, example_inputs=args)
    assert [site.width for site in state_of(net).sites] == widths
    assert not torch.allclose(net(*args), expected)
