"""The entry points for pytest-benchmark: ``pytest benchmarks``."""

import torch

from benchmarks import sampling, test_inference, test_models, unet, uvit
from scalelong_fast.models import UViTConfig

TINY = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, reduction=4, attention="math")
CPU = torch.device("cpu")


def test_every_recipe_of_every_model_is_a_case():
    found = [(suite.command, name) for (suite, _, _), name in (case.values for case in test_models._parameters())]
    assert set(found) == {("uvit", name) for name in uvit.RECIPES} | {("unet", name) for name in unet.RECIPES}
    names = [case.id for case in test_models._parameters()]
    assert len(set(names)) == len(names)
    assert not any(" " in name for name in names)
    assert {case.values[0] for case in test_inference._MODELS} == set(sampling.models(test_inference.DEVICE))


def test_a_training_step_is_a_round(benchmark, monkeypatch):
    monkeypatch.setattr(test_models, "DEVICE", CPU)

    def bench_of(suite, label, config):
        return suite.bench(config, CPU, 2, False)

    test_models.test_model(benchmark, bench_of, (uvit.SUITE, "tiny", TINY), "ours_cs", "fwd")
    assert benchmark.group == "tiny, cs, fwd"
    assert benchmark.name == "ours_cs"
    assert benchmark.extra_info["images"] == 2
    assert benchmark.extra_info["flop"] == 2 * uvit.training_flop(TINY) // 3


def test_a_sampling_is_a_round(benchmark, monkeypatch):
    monkeypatch.setattr(test_inference, "DEVICE", CPU)
    monkeypatch.setattr(test_inference, "STEPS", 2)
    test_inference.test_sampling(benchmark, "tiny", TINY, "ours", "ls", "ddim", 1)
    assert benchmark.group == "tiny, ls, ddim, batch 1"
    assert benchmark.name == "ours"
    assert benchmark.extra_info["steps"] == 2
