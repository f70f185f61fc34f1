"""Dropout inside the model: what it drops is a function of (seed, step), like everything else."""

import copy
import dataclasses
import functools

import pytest
import torch

from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.seeds import seeded, step_seed

CPU = torch.device("cpu")


@pytest.fixture
def dropping(unet):
    return unet({"model.dropout": 0.1})


@pytest.fixture
def batches(unet, toy_images):
    return BatchSource(toy_images, unet(), CPU)


def awake(train_step):
    """Give every parameter a value: the outputs of a fresh network are zero, whatever is dropped."""
    with torch.no_grad():
        for parameter in train_step.model.parameters():
            parameter.fill_(0.05).add_(torch.arange(parameter.numel()).view_as(parameter) % 7, alpha=0.01)
    return train_step


def losses_of(make_step, config, batches, steps=(0, 1, 2), disturb=lambda: None):
    """Losses of some steps, always from the same weights."""
    train_step = awake(make_step(config))
    losses = []
    for step in steps:
        disturb()
        losses.append(float(train_step(step, batches(step))))
    return losses


def test_is_there_in_training(make_step, unet, dropping, batches):
    assert losses_of(make_step, dropping, batches) != losses_of(make_step, unet(), batches)


def test_does_not_depend_on_the_global_generator(make_step, dropping, batches):
    plain = losses_of(make_step, dropping, batches)
    assert losses_of(make_step, dropping, batches, disturb=lambda: torch.rand(7)) == plain


def test_leaves_the_global_generator_as_it_was(make_step, dropping, batches):
    train_step, draw = make_step(dropping), batches(0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_step(0, draw)
    assert torch.equal(torch.get_rng_state(), before)


def test_differs_from_step_to_step_and_from_seed_to_seed(make_step, unet, batches):
    draw = batches(0)
    seen = {
        losses_of(make_step, unet({"model.dropout": 0.1, "train.seed": seed}), lambda _: draw, steps=(step,))[0]
        for seed, step in ((0, 0), (0, 1), (1, 0))
    }
    assert len(seen) == 3


def test_does_not_change_what_is_drawn_for_the_batch(dropping, unet, toy_images):
    with_dropout, without = (BatchSource(toy_images, config, CPU)(3) for config in (dropping, unet()))
    for field in dataclasses.fields(with_dropout):
        assert torch.equal(getattr(with_dropout, field.name), getattr(without, field.name))


def test_streams_of_a_step_have_seeds_of_their_own():
    seeds = {step_seed(seed, step, *stream) for seed in (0, 1) for step in (0, 1) for stream in ((), (1,), (2,))}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_generator_comes_back_even_from_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(CPU, 3):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointed_blocks_drop_the_same_again(make_step, unet, batches):
    options = {"model.dropout": 0.1}
    plain = losses_of(make_step, unet(options), batches)
    assert losses_of(make_step, unet({**options, "model.use_checkpoint": True}), batches) == plain


def test_the_step_is_one_graph(make_step, dropping, batches, monkeypatch):
    # Without a compiler, which takes long: what matters is that nothing breaks the graph.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train_step, draw = awake(make_step(dropping, Execution(CPU, None, "auto"))), batches(0)
    state = copy.deepcopy(train_step.state_dict())
    first = train_step(1, draw)
    assert train_step.execution.compiled
    train_step.load_state_dict(state)
    torch.rand(7)
    assert torch.equal(train_step(1, draw), first)
    train_step.load_state_dict(state)
    assert not torch.equal(train_step(2, draw), first)
