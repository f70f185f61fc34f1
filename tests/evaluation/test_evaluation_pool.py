"""The features that are kept: of all images or of a bounded number, whatever the batches."""

import pytest
import torch

from scalelong_fast.evaluation import measure_dataset, pool
from scalelong_fast.evaluation.pool import FeaturePool, bounded, choose_kept
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.training.ranks import Ranks


@pytest.fixture
def few(monkeypatch):
    """Of 20 images at most."""
    monkeypatch.setattr(pool, "KEPT", 20)


def test_all_of_a_small_set(few):
    assert choose_kept(20).tolist() == list(range(20))
    assert choose_kept(0).tolist() == []


def test_some_of_a_large_set_the_same_each_time_and_spread_over_it(few):
    chosen = choose_kept(10_000)
    assert len(chosen.unique()) == 20
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, choose_kept(10_000))
    assert chosen.min() < 2_500
    assert chosen.max() > 7_500


@pytest.mark.parametrize("total", [15, 20, 50])
@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_a_pool_does_not_depend_on_the_batches(few, total, batch_size):
    features = torch.randn(total, 3)
    collected = FeaturePool(total)
    for indices in own_batches(total, batch_size, Ranks()):
        collected.add(indices, features[indices])
    assert torch.equal(collected.gather(Ranks()), features[collected.images])
    assert torch.equal(bounded(features), features[collected.images])


def test_the_moments_are_those_of_all_images(few, digits, extractor):
    reference = measure_dataset(digits, extractor, keep=True)
    assert reference.moments.count == 1797
    assert torch.equal(reference.kept, choose_kept(1797))
    torch.testing.assert_close(reference.features, extractor(digits.images)[reference.kept])
