"""Plans: what fits, what is fastest, and what is said where nothing fits."""

import dataclasses
import functools
import re

import pytest

import scalelong_fast.planning.plan as module
from scalelong_fast.data import load_images
from scalelong_fast.errors import UserError
from scalelong_fast.planning import GPU, PlanRequest
from scalelong_fast.planning import make_plan as plan_of_a_model
from scalelong_fast.planning.gpus import GPUS
from scalelong_fast.planning.plan import IMAGES
from scalelong_fast.planning.tracing import trace
from scalelong_fast.training import get_preset
from scalelong_fast.training.presets import PRESETS

MODEL = "uvit_digits"

#: What is planned for, small for the sake of time.
SMALL = dataclasses.replace(get_preset("digits-uvit").model, depth=2)


def make_plan(request, **options):
    """A plan of the small network, whatever the request calls it."""
    return plan_of_a_model(request, SMALL, **options)


@pytest.fixture(autouse=True)
def traces_are_kept(monkeypatch):
    """No network is traced twice."""
    monkeypatch.setattr(module, "trace", _trace)


_trace = functools.cache(trace)


@pytest.fixture
def small_gpu(monkeypatch):
    """``small_gpu(gib)``: a GPU called ``small`` of so much memory, the only one that is known besides h200."""

    def add(gib):
        small = dataclasses.replace(GPUS["h200"], name="small", memory=gib)
        for name in [name for name in GPUS if name != "h200"]:
            monkeypatch.delitem(GPUS, name)
        monkeypatch.setitem(GPUS, "small", small)

    return add


class TestChoice:
    def test_the_fastest_that_fits_is_the_best(self):
        plan = make_plan(PlanRequest(MODEL, gpus=16, batch=1024))
        ways = {(option.parallel, option.recompute) for option in plan.options}
        assert ways == {(p, r) for p in ("ddp", "fsdp", "hsdp") for r in ("none", "selective", "block")}
        assert plan.best.time.total == min(option.time.total for option in plan.options if option.fits)
        assert plan.images_per_second == pytest.approx(1024 / plan.best.time.total)
        assert 0 < plan.mfu < 1

    def test_what_does_not_fit_is_not_taken(self, small_gpu):
        request = PlanRequest(MODEL, batch=65_536)
        roomy = make_plan(request)
        assert roomy.best.recompute == "none"
        sizes = {option.recompute: option.bytes for option in roomy.options}
        small_gpu((sizes["block"] + sizes["selective"]) / 2 / 2**30)
        tight = make_plan(dataclasses.replace(request, gpu="small"))
        assert tight.best.recompute == "block"
        assert {option.recompute: option.fits for option in tight.options} == {
            "none": False,
            "selective": False,
            "block": True,
        }

    def test_one_machine_has_no_hybrid_and_one_gpu_nothing_to_share(self):
        request = PlanRequest(MODEL, gpus=8, batch=64, recompute="none")
        assert [option.parallel for option in make_plan(request).options] == ["ddp", "fsdp"]
        request = dataclasses.replace(request, gpus=1)
        assert [option.parallel for option in make_plan(request).options] == ["none"]

    def test_a_way_that_is_asked_for_is_the_only_one(self):
        plan = make_plan(PlanRequest(MODEL, gpus=2, batch=64, parallel="fsdp", recompute="block"))
        assert [(option.parallel, option.recompute) for option in plan.options] == [("fsdp", "block")]

    def test_parts_take_less_memory_and_as_many_products(self):
        request = PlanRequest(MODEL, batch=4096, recompute="none")
        whole, parts = make_plan(request).best, make_plan(dataclasses.replace(request, accumulate=8)).best
        assert parts.memory["activations and work"] < whole.memory["activations and work"] / 4
        assert parts.time.forward >= whole.time.forward

    def test_progress_is_told(self):
        lines = []
        make_plan(PlanRequest(MODEL, batch=64), progress=lines.append)
        assert [line.split()[-1] for line in lines] == ["none", "selective", "block"]


class TestPresets:
    def test_batch_and_steps_are_the_presets(self):
        run = get_preset("digits-uvit")
        for name in ("uvit_digits", "digits-uvit"):
            plan = plan_of_a_model(PlanRequest(name, recompute="none"))
            assert (plan.request.batch, plan.request.steps) == (run.train.batch_size, run.train.steps)
            assert plan.days == pytest.approx(run.train.steps * plan.best.time.total / 86_400)

    def test_the_data_set_is_planned_for_where_it_lies_on_the_gpu(self):
        small = plan_of_a_model(PlanRequest("digits-uvit", recompute="none"))
        assert small.request.images == len(load_images("digits"))
        assert small.best.memory["data set"] == 1797 * (64 + 8)
        assert "data set" not in plan_of_a_model(PlanRequest("digits-uvit", images=10**9, recompute="none")).best.memory
        assert IMAGES.keys() <= {
            run.data.name if run.data.path is None else run.data.path.name for _, run in PRESETS.values()
        }

    def test_what_is_given_counts(self):
        plan = plan_of_a_model(PlanRequest("digits-uvit", batch=32, steps=7, recompute="none"))
        assert (plan.request.batch, plan.request.steps) == (32, 7)

    def test_another_network_needs_a_batch_and_has_no_days(self):
        config = dataclasses.replace(get_preset("digits-uvit").model, depth=2)
        with pytest.raises(UserError, match="--batch: got None"):
            plan_of_a_model(PlanRequest("mine"), config)
        plan = plan_of_a_model(PlanRequest("mine", batch=8, recompute="none"), config)
        assert plan.days is None
        assert plan.model == config


class TestNothingFits:
    def test_the_advice_fits(self, small_gpu):
        small_gpu(1.7)
        request = PlanRequest(MODEL, gpus=2, batch=65_536, gpu="small")
        with pytest.raises(UserError, match="fits in no way") as caught:
            make_plan(request)
        advice = re.search(r"--parallel (\w+) --recompute (\w+) --accumulate (\d+) would", str(caught.value))
        assert advice is not None, caught.value
        parallel, recompute, accumulate = advice.groups()
        better = dataclasses.replace(request, parallel=parallel, recompute=recompute, accumulate=int(accumulate))
        assert make_plan(better).best.fits

    def test_a_larger_gpu_is_named(self, small_gpu):
        small_gpu(1.0)  # less than the context alone
        with pytest.raises(UserError, match=r"A GPU with more memory would: --gpu h200\."):
            make_plan(PlanRequest(MODEL, batch=4, gpu="small"))


class TestBadRequests:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "uvit_digit"}, r"--model: got 'uvit_digit'.*Did you mean 'uvit_digits'"),
            ({"gpu": "h300"}, r"--gpu: got 'h300'.*'h200'"),
            ({"gpus": 12}, r"--gpus: got 12, expected a multiple of --gpus-per-node = 8.*Take 8 or 16"),
            ({"gpus": 3}, r"--batch: got 64, expected a multiple of 3.*Take 63 or 66"),
            ({"gpus": 2, "accumulate": 3}, r"--batch: got 64, expected a multiple of 6"),
            ({"gpus": 0}, r"--gpus: got 0"),
            ({"batch": -1}, r"--batch: got -1"),
            ({"steps": 0}, r"--steps: got 0"),
            ({"images": 0}, r"--images: got 0"),
            ({"accumulate": 0}, r"--accumulate: got 0"),
            ({"gpus_per_node": 0}, r"--gpus-per-node: got 0"),
            ({"parallel": "fdsp"}, r"--parallel: got 'fdsp'.*'fsdp'"),
            ({"recompute": "blocks"}, r"--recompute: got 'blocks'.*'block'"),
            ({"precision": "bf61"}, r"--precision: got 'bf61'"),
            ({"parallel": "fsdp"}, r"--parallel: got 'fsdp', expected none with one GPU"),
            ({"gpus": 2, "parallel": "none"}, r"--parallel: got 'none', expected ddp, fsdp or hsdp"),
        ],
    )
    def test_are_refused_with_the_mend(self, changes, message):
        with pytest.raises(UserError, match=message):
            plan_of_a_model(PlanRequest(**({"model": MODEL, "batch": 64} | changes)))


def test_gpus_are_not_asked_for(monkeypatch):
    import torch

    def refuse(*args, **kwargs):
        raise AssertionError("the planner asked for a GPU")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    plan = make_plan(PlanRequest(MODEL, batch=64, recompute="none"))
    assert isinstance(GPUS[plan.request.gpu], GPU)
