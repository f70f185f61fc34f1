"""A warmed-up step is the step it was."""

import pytest
import torch

from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.warmup import needs_warm_up, warm_up

CPU = torch.device("cpu")


@pytest.fixture
def batches(tiny, toy_images):
    return BatchSource(toy_images, tiny(), CPU)


def run(train_step, batches, steps):
    return [train_step(step, batches(step)).clone() for step in steps]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("done", [0, 2], ids=["fresh", "resumed"])
def test_a_run_is_the_same_bit_for_bit_after_warming_up(tiny, make_step, batches, assert_same, autocast, done):
    config = tiny({"train.grad_clip": 1.0, "train.ema_profiles": (0.1,)})
    plain, warm = (make_step(config, Execution(CPU, autocast)) for _ in range(2))
    for train_step in (plain, warm):
        run(train_step, batches, range(done))
    warm_up(warm, batches(7))
    assert all(parameter.grad is None for parameter in warm.parameters)
    assert len(warm.optimizer.state) == (len(warm.parameters) if done else 0)
    assert_same(warm.state_dict(), plain.state_dict())
    assert_same(run(warm, batches, range(done, 5)), run(plain, batches, range(done, 5)))
    assert_same(warm.state_dict(), plain.state_dict())


def test_it_does_take_steps(tiny, make_step, batches):
    train_step = make_step(tiny())
    seen = []
    train_step.optimizer.register_step_post_hook(lambda *_: seen.append(len(train_step.optimizer.state)))
    warm_up(train_step, batches(0), steps=3)
    assert seen == [len(train_step.parameters)] * 3


def test_random_numbers_drawn_by_the_network_are_put_back(unet, make_step, toy_images):
    config = unet({"model.dropout": 0.5})
    train_step = make_step(config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    # A network whose dropout the step does not seed draws from the global generator.
    train_step._dropout_seeded = lambda *_: torch.enable_grad()
    warm_up(train_step, BatchSource(toy_images, config, CPU)(0))
    assert torch.equal(torch.rand(3), expected)


def test_a_failure_leaves_everything_as_it_was(tiny, make_step, batches, assert_same):
    plain, broken = make_step(tiny()), make_step(tiny())
    update = broken.posthoc.update

    def fail(step):
        raise RuntimeError("out of memory")

    broken.posthoc.update = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        warm_up(broken, batches(0))
    broken.posthoc.update = update
    assert_same(broken.state_dict(), plain.state_dict())
    assert torch.equal(broken(0, batches(0)), plain(0, batches(0)))


def test_only_a_compiled_step_on_a_gpu_is_warmed_up(tiny, make_step):
    assert not needs_warm_up(make_step(tiny()))
    assert not needs_warm_up(make_step(tiny(), Execution(CPU, None, "auto")))
