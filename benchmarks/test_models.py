"""The training steps of ``python -m benchmarks models`` under pytest-benchmark.

A GPU is waited for in every call. Recipes that compile are left out on a CPU, where compiling takes minutes.
"""

import pytest
import torch

from benchmarks.models import SUITES
from benchmarks.step_calls import DIRECTIONS, calls_of
from benchmarks.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parameters():
    return [
        pytest.param((suite, label, config), name, id=f"{label.replace(', ', '_')}-{name}")
        for suite in SUITES
        for label, config in suite.models(DEVICE).items()
        for name in suite.recipes
    ]


@pytest.fixture(scope="module")
def build():
    """Recipes of the model that was asked for last; those of all would not fit."""
    last = {}

    def bench_of(suite, label, config):
        if label not in last:
            last.clear()
            torch.compiler.reset()
            batch_size = suite.batch_size(label, DEVICE)
            last[label] = suite.bench(config, DEVICE, batch_size, DEVICE.type == "cuda")
        return last[label]

    return bench_of


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("model", "name"), _parameters())
def test_model(benchmark, build, model, name, direction):
    suite, label, config = model
    bench, recipe = build(*model), suite.recipes[name]
    if not suite.able(bench, recipe):
        pytest.skip("here the same as another recipe, or there is none for this model")
    call = calls_of(bench.build(recipe), (direction,))[direction]
    benchmark.group = f"{label}, {recipe.scaling}, {direction}"
    benchmark.name = name
    benchmark.extra_info.update(images=bench.batch_size, flop=suite.flop(config, direction) * bench.batch_size)

    def step():
        call()
        synchronize(DEVICE)

    benchmark.pedantic(step, rounds=8, iterations=1, warmup_rounds=3)
