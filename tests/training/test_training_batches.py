"""The batch of a step: a function of (seed, step) alone."""

import math

import pytest
import torch

import scalelong_fast.training.batches as batches_module
from scalelong_fast.data import to_unit_range
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.ranks import Ranks

CPU = torch.device("cpu")


def fields(draw):
    return [draw.x0, draw.labels, draw.noise, draw.u]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(fields(a), fields(b), strict=True))


@pytest.fixture
def source(tiny, toy_images):
    def build(overrides=None):
        return BatchSource(toy_images, tiny({"train.batch_size": 32, "data.flip": True, **(overrides or {})}), CPU)

    return build


def test_shapes_and_dtypes(source):
    draw = source()(0)
    assert draw.x0.shape == draw.noise.shape == (32, 1, 8, 8)
    assert draw.labels.shape == draw.u.shape == (32,)
    assert [tensor.dtype for tensor in fields(draw)] == [torch.float32, torch.int64, torch.float32, torch.float32]


def test_the_same_step_gives_the_same_draw_in_any_order(source):
    forwards, backwards = source(), source()
    there = [forwards(step) for step in range(5)]
    back = [backwards(step) for step in reversed(range(5))][::-1]
    assert all(same(a, b) for a, b in zip(there, back, strict=True))


def test_global_random_state_is_neither_used_nor_touched(source):
    torch.manual_seed(1)
    first = source()(3)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(first, source()(3))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_and_seeds_differ_in_everything(source):
    base = source()(0)
    for other in (source()(1), source({"train.seed": 1})(0)):
        assert not any(torch.equal(x, y) for x, y in zip(fields(base), fields(other), strict=True))


def test_an_epoch_holds_every_image_once(source, toy_images):
    draws = [source({"data.flip": False, "train.batch_size": 97})(step) for step in range(2)]
    expected = to_unit_range(toy_images.images)[:, 0, 0, 0].sort().values
    for draw in draws:
        assert torch.equal(draw.x0[:, 0, 0, 0].sort().values, expected)


def test_without_flips_the_images_are_those_of_the_order(source, toy_images):
    batches = source({"data.flip": False})
    indices = batches.order.batch_indices(4)
    assert torch.equal(batches(4).x0, to_unit_range(toy_images.images[indices]))


def test_flips_half_of_the_images(source, toy_images):
    batches, flipped, total = source(), 0, 0
    for step in range(30):
        x0, plain = batches(step).x0, to_unit_range(toy_images.images[batches.order.batch_indices(step)])
        mirrored = (x0 == plain.flip(-1)).flatten(1).all(1)
        assert torch.equal(mirrored, ~(x0 == plain).flatten(1).all(1))
        flipped, total = flipped + int(mirrored.sum()), total + len(x0)
    assert abs(flipped - total / 2) < 4 * math.sqrt(total / 4)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_drops_the_wanted_share_of_labels_to_the_null_label(source, toy_images, share):
    batches, dropped, total = source({"diffusion.label_dropout": share}), 0, 0
    for step in range(60):
        labels = batches(step).labels
        true = toy_images.labels[batches.order.batch_indices(step)]
        null = labels == 10
        assert torch.equal(labels[~null], true[~null])
        dropped, total = dropped + int(null.sum()), total + len(labels)
    assert abs(dropped - share * total) < 4 * math.sqrt(total * share * (1 - share))


def test_without_dropout_the_labels_are_the_true_ones(source, toy_images):
    batches = source({"diffusion.label_dropout": 0.0, "model.num_classes": 10, "sample.guidance": 1.0})
    assert torch.equal(batches(2).labels, toy_images.labels[batches.order.batch_indices(2)])


def test_an_unconditional_model_gets_no_labels(source):
    overrides = {"model.num_classes": -1, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0}
    assert source(overrides)(0).labels is None


def test_times_are_stratified(source):
    strata = (source()(0).u * 32).floor().long()
    assert torch.equal(strata.sort().values, torch.arange(32))


def test_compat_draws_the_times_independently(source):
    batches = source({"train.compat": True})
    assert batches(0).u.min() >= 0
    assert batches(0).u.max() < 1
    # 32 independent draws fill all 32 strata with probability 32!/32^32 < 1e-12.
    assert len((batches(0).u * 32).floor().unique()) < 32
    pooled = torch.cat([batches(step).u for step in range(60)])
    assert abs(float(pooled.mean()) - 0.5) < 4 / math.sqrt(12 * len(pooled))


def test_a_data_set_too_large_for_the_device_gives_the_same_draws(source, monkeypatch):
    resident = source()
    assert resident.resident
    monkeypatch.setattr(batches_module, "DEVICE_RESIDENT_BYTES", 0)
    streamed = source()
    assert not streamed.resident
    assert all(same(resident(step), streamed(step)) for step in range(4))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_several_processes_draw_the_parts_of_the_same_batch(tiny, toy_images, source, world, parts):
    config = tiny({"train.batch_size": 32, "data.flip": True, "diffusion.label_dropout": 0.3})
    whole = source({"diffusion.label_dropout": 0.3})
    shares = [BatchSource(toy_images, config, CPU, Ranks(rank=rank, world=world)) for rank in range(world)]
    for step in (0, 5):
        pieces = [piece for share in shares for piece in share(step).split(parts)]
        assert len(pieces) == world * parts
        joined = [torch.cat(tensors) for tensors in zip(*map(fields, pieces), strict=True)]
        assert all(torch.equal(x, y) for x, y in zip(joined, fields(whole(step)), strict=True))


def test_a_draw_without_labels_can_be_split(source):
    overrides = {"model.num_classes": -1, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0}
    pieces = source(overrides)(0).split(2)
    assert [piece.labels for piece in pieces] == [None, None]
    assert [len(piece.u) for piece in pieces] == [16, 16]


def test_of_the_noise_of_all_only_the_part_is_kept(tiny, toy_images):
    config = tiny({"train.batch_size": 8})
    alone, part = (BatchSource(toy_images, config, CPU, Ranks(rank=world - 1, world=world))(0) for world in (1, 4))
    assert torch.equal(part.noise, alone.noise[6:])
    assert part.noise.untyped_storage().nbytes() == part.noise.nbytes
