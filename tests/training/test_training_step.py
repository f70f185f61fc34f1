"""One optimiser step: it learns, clips, restores exactly, and is the same compiled."""

import dataclasses

import pytest
import torch

from scalelong_fast.data import load_images
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.hardware import Execution

CPU = torch.device("cpu")


@pytest.fixture
def batches(tiny, toy_images):
    return BatchSource(toy_images, tiny(), CPU)


def weights(step):
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def test_the_loss_falls(tiny, make_step):
    config = tiny({"train.lr": 1e-2, "train.batch_size": 32, "train.decay_steps": 0})
    train_step, batches = make_step(config), BatchSource(load_images("digits"), config, CPU)
    losses = [float(train_step(step, batches(step))) for step in range(80)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_returns_a_detached_float32_scalar(tiny, make_step, batches):
    loss = make_step(tiny())(0, batches(0))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert not loss.requires_grad


def test_takes_the_learning_rate_of_the_step(tiny, make_step, batches):
    train_step = make_step(tiny({"train.lr": 3e-3, "train.warmup_steps": 3}))
    for step, expected in enumerate([1e-3, 2e-3, 3e-3]):
        train_step(step, batches(step))
        assert [group["lr"] for group in train_step.optimizer.param_groups] == pytest.approx([expected, expected])


def test_the_average_follows_the_weights(tiny, make_step, batches):
    config = tiny({"train.ema_decay": 0.75})
    train_step = make_step(config)
    before = {name: p.detach().clone() for name, p in train_step.model.named_parameters()}
    train_step(0, batches(0))
    for name, parameter in train_step.model.named_parameters():
        expected = 0.75 * before[name] + 0.25 * parameter.detach()
        torch.testing.assert_close(train_step.ema.state_dict()[name], expected)


def gradients_seen_by_the_optimizer(train_step, step, draw):
    seen = []
    handle = train_step.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.detach().clone().flatten() for p in train_step.parameters)
    )
    train_step(step, draw)
    handle.remove()
    return torch.cat(seen)


def test_clips_the_gradient_norm(tiny, make_step, batches):
    free = gradients_seen_by_the_optimizer(make_step(tiny()), 0, batches(0))
    limit = 0.1 * float(free.norm())
    clipped = gradients_seen_by_the_optimizer(make_step(tiny({"train.grad_clip": limit})), 0, batches(0))
    torch.testing.assert_close(clipped, 0.1 * free, rtol=1e-4, atol=1e-8)
    loose = make_step(tiny({"train.grad_clip": 10 * float(free.norm())}))
    assert torch.equal(gradients_seen_by_the_optimizer(loose, 0, batches(0)), free)


def test_gradients_do_not_add_up_over_steps(tiny, make_step, batches):
    train_step = make_step(tiny())
    train_step(0, batches(0))
    assert all(p.grad is None for p in train_step.parameters)


def test_a_restored_step_goes_on_identically(tiny, make_step, batches, assert_same):
    straight, first, second = make_step(tiny()), make_step(tiny()), make_step(tiny({"train.seed": 7}))
    for step in range(3):
        straight(step, batches(step))
        first(step, batches(step))
    assert not torch.equal(weights(first), weights(second))
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        assert torch.equal(straight(step, batches(step)), second(step, batches(step)))
    assert_same(second.state_dict(), straight.state_dict())


def test_looking_at_the_state_of_a_fresh_step_changes_no_update(tiny, make_step, batches):
    seen, unseen = (make_step(tiny({"train.betas": (0.9, 0.95)})) for _ in range(2))
    state = seen.state_dict()["optimizer"]
    assert all(float(moments["step"]) == 0 and not moments["exp_avg"].any() for moments in state.values())
    for step in range(2):
        assert torch.equal(seen(step, batches(step)), unseen(step, batches(step)))
        assert torch.equal(weights(seen), weights(unseen))


def test_a_restored_step_keeps_the_decay_and_betas_it_was_configured_with(tiny, make_step, batches):
    old = make_step(tiny({"train.weight_decay": 0.1}))
    old(0, batches(0))
    new = make_step(tiny({"train.weight_decay": 0.5, "train.betas": (0.5, 0.6)}))
    new.load_state_dict(old.state_dict())
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.5, 0.0]
    assert {group["betas"] for group in new.optimizer.param_groups} == {(0.5, 0.6)}


def test_a_run_may_go_on_in_another_precision(tiny, make_step, batches):
    plain, scaled = Execution(CPU, None), Execution(CPU, torch.float16)
    single, half = make_step(tiny(), plain), make_step(tiny(), scaled)
    single(0, batches(0))
    half.load_state_dict(single.state_dict())
    assert torch.equal(weights(half), weights(single))
    single.load_state_dict(half.state_dict())


class TestIsFinite:
    def test_a_healthy_step(self, tiny, make_step, batches):
        train_step = make_step(tiny())
        assert train_step.is_finite()
        train_step(0, batches(0))
        assert train_step.is_finite()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("place", ["parameter", "average", "moment"])
    def test_one_bad_number_anywhere_is_seen(self, tiny, make_step, batches, place, value):
        train_step = make_step(tiny())
        train_step(0, batches(0))
        tensor = {
            "parameter": train_step.parameters[-1],
            "average": list(train_step.ema.state_dict().values())[-1],
            "moment": train_step.optimizer.state[train_step.parameters[-1]]["exp_avg_sq"],
        }[place]
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        assert not train_step.is_finite()

    def test_large_numbers_are_finite(self, tiny, make_step):
        train_step = make_step(tiny())
        with torch.no_grad():
            train_step.parameters[0].fill_(1e30)  # its norm overflows float32, the numbers do not
        assert train_step.is_finite()


def test_a_compiled_step_gives_the_eager_losses(tiny, make_step, batches):
    config = tiny()
    eager, compiled = make_step(config), make_step(config, Execution(CPU, None, "auto"))
    for step in range(3):
        draw = batches(step)
        torch.testing.assert_close(compiled(step, draw), eager(step, draw), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-3, atol=1e-4)


def test_bf16_autocast_keeps_weights_and_loss_in_float32(tiny, make_step, batches):
    config = tiny()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    train_step = make_step(config)
    loss = train_step(0, batches(0))
    assert loss.dtype == torch.float32
    assert {p.dtype for p in train_step.parameters} == {torch.float32}
    reference = make_step(tiny())(0, batches(0))
    assert loss != reference
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=0)


class _Replayed(torch.autograd.Function):
    """A loss that lies where that of the next call will lie, as CUDA graphs return it."""

    place = torch.zeros(())

    @staticmethod
    def forward(ctx, loss):
        return _Replayed.place.copy_(loss).detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_losses_of_cuda_graphs_can_be_kept(tiny, make_step, batches, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: _Replayed.apply(function(*args)))
    replayed, eager = make_step(tiny(), Execution(CPU, None, "graphs")), make_step(tiny())
    kept = [replayed(step, batches(step)) for step in range(3)]
    assert kept == [eager(step, batches(step)) for step in range(3)]


class _Uncompilable:
    """Stands in for a compiled loss whose compiler fails, in the forward or in the backward."""

    def __init__(self, eager, where):
        self.eager, self.where = eager, where

    def __call__(self, *args):
        if self.where == "forward":
            raise torch._dynamo.exc.TorchDynamoException("no Python.h")
        return _FailingBackward.apply(self.eager(*args))


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch._dynamo.exc.TorchDynamoException("no space left")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_goes_on_eagerly_where_compiling_fails(tiny, make_step, batches, monkeypatch, where):
    monkeypatch.setattr(torch, "compile", lambda function, **_: _Uncompilable(function, where))
    config = tiny()
    broken, eager = make_step(config, Execution(CPU, None, "auto")), make_step(config)
    with pytest.warns(UserWarning, match="torch.compile failed, going on eagerly: no"):
        loss = broken(0, batches(0))
    assert loss == eager(0, batches(0))
    assert broken(1, batches(1)) == eager(1, batches(1))
    assert torch.equal(weights(broken), weights(eager))
    assert broken.execution.describe() == "cpu, fp32, eager"


def test_an_error_of_an_eager_step_is_not_swallowed(tiny, make_step, batches):
    step = make_step(tiny())
    step.loss_fn = _Uncompilable(step.loss_fn, "forward")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        step(0, batches(0))
