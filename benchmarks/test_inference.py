"""The sampling of ``python -m benchmarks inference`` under pytest-benchmark: a round is a whole sampling.

Kinds that compile are left out on a CPU, where compiling takes minutes.
"""

import pytest
import torch

from benchmarks.sampling import BATCHES, KINDS, SAMPLERS, SCALINGS, STEPS, build, models, sample
from scalelong_fast.training.hardware import autocast_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_GPU = DEVICE.type == "cuda"
_MODELS = [pytest.param(label, config, id=label.replace(", ", "_")) for label, config in models(DEVICE).items()]


@pytest.mark.parametrize("batch_size", BATCHES[DEVICE.type])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if _GPU or not kind.endswith("compile")])
@pytest.mark.parametrize(("label", "config"), _MODELS)
def test_sampling(benchmark, label, config, kind, scaling, sampler, batch_size):
    network = build(config, kind, scaling, DEVICE)
    benchmark.group = f"{label}, {scaling}, {sampler}, batch {batch_size}"
    benchmark.name = kind
    benchmark.extra_info.update(images=batch_size, steps=STEPS)
    options = {"sampler": sampler, "batch_size": batch_size, "steps": STEPS}
    options["autocast"] = autocast_dtype("auto", DEVICE) if _GPU else None
    benchmark.pedantic(sample, (network, config, DEVICE), options, rounds=3, iterations=1, warmup_rounds=1)
