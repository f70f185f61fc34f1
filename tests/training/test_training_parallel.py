"""FSDP's hooks, mixed precision and DTensors in a run of one process; more of them: test_ranks_curves.py."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from scalelong_fast.data import load_images
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.models import build_model
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.ranks import Ranks, connect
from scalelong_fast.training.shares import local
from scalelong_fast.training.step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def build(config, ranks):
    torch.manual_seed(0)
    model, schedule = build_model(config.model), create_schedule("vpsde")
    return TrainStep(model, schedule, config, resolve_execution(config.train), ranks)


def losses(step, config, digits, ranks, steps=4):
    batches = BatchSource(digits, config, CPU, ranks)
    return [float(step(number, batches(number))) for number in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "fused"), [("digits-uvit", False), ("digits-uvit", True), ("digits-unet", False)])
def test_fsdp_computes_what_the_whole_model_computes(tiny, alone, digits, preset, fused, precision):
    settings = {"model.fused": fused, "train.precision": precision, "train.grad_clip": 0.5, "train.parallel": "fsdp"}
    config = tiny(settings, preset)
    expected = losses(build(config, Ranks()), config, digits, Ranks())
    with connect(config.train) as ranks:
        step = build(config, ranks)
        assert all(isinstance(parameter, DTensor) for parameter in step.model.parameters())
        found = losses(step, config, digits, ranks)
    # In bf16 the norms' parameters are rounded as well, to 2^-9 of their values; the loss is a mean of many.
    assert found == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize(("from_kind", "to_kind"), [("fsdp", "ddp"), ("ddp", "fsdp"), ("hsdp", "fsdp")])
def test_a_state_moves_between_the_ways_to_share(tiny, alone, digits, tmp_path, from_kind, to_kind):
    from scalelong_fast.training.checkpoint import CheckpointFolder

    with connect(tiny().train) as ranks:
        kinds = [tiny({"train.parallel": kind}) for kind in (from_kind, to_kind)]
        first, second = (build(config, ranks) for config in kinds)
        losses(first, kinds[0], digits, ranks)
        folder = CheckpointFolder(tmp_path, ranks=ranks, background=True)
        folder.save(4, first.state_dict())
        folder.wait()
        step, state = folder.load_latest(pytest.fail, second.state_dict())
        second.load_state_dict(state)
        assert step == 4
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(local(a), local(b))
            for key, value in first.optimizer.state[a].items():
                assert torch.equal(local(value), local(second.optimizer.state[b][key])), key
        averages = (step.ema.state_dict() for step in (first, second))
        for a, b in zip(*(found.values() for found in averages), strict=True):
            assert torch.equal(local(a), local(b))
