"""Recomputing activations saves memory, costs what it should and changes no gradient."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.models import UViTConfig, build_model
from scalelong_fast.models.recomputing import KEPT, _kept_ops
from scalelong_fast.training import TrainConfig
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.blocks import repeated_blocks
from scalelong_fast.training.flops import count_flops
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.recompute import set_recomputation

CPU = torch.device("cpu")
HOW = ("none", "block", "selective")


def awake(train_step):
    """With no layer that starts at zero: what comes after one has no gradient at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in train_step.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    return train_step


def gradients(train_step, draw):
    seen = []
    train_step.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(parameter.grad.clone() for parameter in train_step.parameters)
    )
    return [train_step(0, draw), *seen]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("preset", ["digits-uvit", "digits-unet"])
def test_gradients_are_the_same_bit_for_bit(tiny, make_step, toy_images, assert_same, preset, fused, autocast):
    overrides = {"model.fused": fused} | ({"model.dropout": 0.3} if preset == "digits-unet" else {})
    draw = BatchSource(toy_images, tiny(overrides, preset), CPU)(0)
    found = [
        gradients(awake(make_step(tiny(overrides | {"train.recompute": how}, preset), Execution(CPU, autocast))), draw)
        for how in HOW
    ]
    assert any(gradient.any() for gradient in found[0][1:])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("preset", ["digits-uvit", "digits-unet"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_blocks_take_a_forward_more_and_selection_no_product_more(tiny, preset, fused):
    config = dataclasses.replace(tiny(preset=preset).model, fused=fused)
    flops = {}
    for how in HOW:
        model = build_model(config)
        set_recomputation(model, how)
        flops[how] = count_flops(model)
    assert flops["selective"] == flops["none"]
    assert 1.2 * flops["none"] < flops["block"] < 1.34 * flops["none"]


def kept(model, batch):
    """Bytes of what the graph holds on to between forward and backward, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live = {}

    def pack(tensor):
        live[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*batch)
    del out
    return sum(t.untyped_storage().nbytes() for pointer, t in live.items() if pointer not in parameters)


def test_of_a_block_little_is_kept():
    model = build_model(UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=2))
    batch = torch.randn(4, 1, 8, 8), torch.zeros(4)
    before = kept(model, batch)
    set_recomputation(model, "block")
    assert kept(model, batch) < 0.25 * before


@pytest.mark.parametrize(("mode", "how"), [("block", "selective"), ("whole", "block"), ("whole", "selective")])
def test_works_in_a_compiled_step(tiny, make_step, toy_images, monkeypatch, how, mode):
    torch._dynamo.reset()
    # The graphs of forward and backward as AOTAutograd makes them, without generating code.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    config = tiny({"train.recompute": how})
    draw = BatchSource(toy_images, config, CPU)(0)
    eager = gradients(awake(make_step(config)), draw)
    compiled = make_step(config, Execution(CPU, None, mode))
    for got, expected in zip(gradients(awake(compiled), draw), eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert compiled.execution.compiled
    torch._dynamo.reset()


def test_every_op_that_is_kept_exists():
    assert len(_kept_ops()) == sum(map(len, KEPT.values()))


@pytest.mark.parametrize(
    ("preset", "dropout", "training", "kept"),
    [
        ("digits-uvit", 0, True, False),
        ("digits-unet", 0, True, False),
        ("digits-unet", 0.1, False, False),
        ("digits-unet", 0.1, True, True),
    ],
)
def test_random_numbers_are_kept_only_where_some_are_drawn(tiny, monkeypatch, preset, dropout, training, kept):
    read = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or state())
    model = build_model(tiny({"model.dropout": dropout} if dropout else {}, preset).model).train(training)
    set_recomputation(model, "block")
    model(torch.randn(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert bool(read) == kept


def test_says_which_names_there_are():
    with pytest.raises(UserError, match=r"train\.recompute: got 'blocks'.*Did you mean 'block'"):
        TrainConfig(recompute="blocks")


def test_none_leaves_the_models_own_setting():
    model = build_model(UViTConfig(embed_dim=16, depth=2, num_heads=2, use_checkpoint=True))
    set_recomputation(model, "none")
    assert all(block.use_checkpoint is True for block in repeated_blocks(model))


def test_copies_of_the_model_keep_it():
    model = build_model(UViTConfig(embed_dim=16, depth=2, num_heads=2))
    set_recomputation(model, "selective")
    assert {block.use_checkpoint for block in repeated_blocks(copy.deepcopy(model))} == {"selective"}


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"train\.recompute: got 'block', expected none"):
        set_recomputation(nn.Linear(2, 2), "block")
