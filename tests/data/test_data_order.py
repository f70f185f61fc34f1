"""ShuffledOrder: each epoch a permutation, and every batch a function of its step alone."""

import numpy as np
import pytest
import torch

from scalelong_fast.data import ShuffledOrder
from scalelong_fast.errors import UserError


def stream(order: ShuffledOrder, samples: int) -> list[int]:
    steps = -(-samples // order.batch_size)
    return torch.cat([order.batch_indices(step) for step in range(steps)]).tolist()[:samples]


@pytest.mark.parametrize(("images", "batch"), [(12, 4), (10, 4), (7, 7), (5, 13), (1, 3), (9, 1)])
def test_every_epoch_visits_every_image_once(images, batch):
    samples = stream(ShuffledOrder(images, batch, seed=3), 4 * images)
    for epoch in range(4):
        assert sorted(samples[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_follows_the_documented_generator():
    samples = stream(ShuffledOrder(10, 4, seed=5), 20)
    for epoch in range(2):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, epoch])))
        assert samples[epoch * 10 : epoch * 10 + 10] == generator.permutation(10).tolist()


def test_batches_are_int64_on_the_cpu():
    batch = ShuffledOrder(10, 4, seed=0).batch_indices(0)
    assert batch.dtype == torch.int64
    assert batch.shape == (4,)
    assert batch.device.type == "cpu"


def test_batch_seven_is_the_same_when_asked_for_first():
    walked, jumped = ShuffledOrder(10, 4, seed=1), ShuffledOrder(10, 4, seed=1)
    batches = [walked.batch_indices(step) for step in range(8)]
    assert torch.equal(jumped.batch_indices(7), batches[7])
    for step in (2, 7, 0, 5):
        assert torch.equal(jumped.batch_indices(step), batches[step])


def test_seeds_and_epochs_differ():
    first = stream(ShuffledOrder(50, 10, seed=0), 100)
    second = stream(ShuffledOrder(50, 10, seed=1), 50)
    assert first[:50] != first[50:]
    assert first[:50] != second
    # (seed 0, epoch 1) and (seed 1, epoch 0) are different streams too.
    assert first[50:] != second


def test_a_straddling_batch_ends_one_epoch_and_begins_the_next():
    order = ShuffledOrder(6, 4, seed=2)
    batches = [order.batch_indices(step).tolist() for step in range(3)]
    assert sorted(batches[0] + batches[1][:2]) == list(range(6))
    assert sorted(batches[1][2:] + batches[2]) == list(range(6))


def test_changing_a_batch_does_not_change_the_order():
    order = ShuffledOrder(6, 6, seed=2)
    before = order.batch_indices(0).clone()
    order.batch_indices(0).zero_()
    assert torch.equal(order.batch_indices(0), before)


def test_at_most_two_permutations_are_kept():
    order = ShuffledOrder(6, 4, seed=2)
    for step in range(20):
        order.batch_indices(step)
        assert len(order._cache) <= 2


def test_each_permutation_is_drawn_once_in_a_run(monkeypatch):
    drawn = []
    original = np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda entropy: drawn.append(entropy) or original(entropy))
    stream(ShuffledOrder(6, 4, seed=2), 60)
    assert drawn == [[2, epoch] for epoch in range(10)]


def test_epoch_of_counts_the_first_image_of_the_batch():
    assert [ShuffledOrder(6, 4, seed=0).epoch_of(step) for step in range(6)] == [0, 0, 1, 2, 2, 3]
    assert [ShuffledOrder(2, 5, seed=0).epoch_of(step) for step in range(3)] == [0, 2, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "num_images: got 0"),
        ((4, 0, 0), "batch_size: got 0"),
        ((4, 2.0, 0), "batch_size: got 2.0"),
        ((4, 4, -1), "seed: got -1"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        ShuffledOrder(*arguments)


@pytest.mark.parametrize("method", ["batch_indices", "epoch_of"])
def test_refuses_a_negative_step(method):
    with pytest.raises(UserError, match="step: got -1"):
        getattr(ShuffledOrder(4, 4, 0), method)(-1)
