"""Saving and loading with save_pretrained and from_pretrained."""

import dataclasses
import importlib.util
import json
import sys

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT, hub


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("unconditional", {"scaling": "none"}),
        ("unconditional", {"scaling": "cs", "kappa": 0.55}),
        ("unconditional", {"scaling": "learnable", "kappa": 0.8}),
        ("class", {"scaling": "ls", "reduction": 2, "activation": "mish", "init": "identity"}),
        ("class", {"scaling": "ls-individual", "attention": "math", "conv": False, "residual_dtype": "bf16"}),
        ("text", {"mlp_time_embed": True, "qkv_bias": True, "qk_scale": 0.3, "mlp_ratio": 2.5, "use_checkpoint": True}),
        ("unconditional", {"skip": False}),
    ],
)
def test_round_trip(tiny, batch_for, tmp_path, kind, overrides):
    config = tiny(kind, **overrides)
    model, batch = UViT(config).eval(), batch_for(config)
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path)
    assert loaded.config == config
    assert type(loaded.scaling) is type(model.scaling)
    assert torch.equal(loaded(*batch), model(*batch))


def test_the_folder_holds_safetensors_and_a_readable_config(tiny, tmp_path):
    config = tiny("class", scaling="cs", kappa=0.6)
    UViT(config).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(config)


def test_a_config_of_ones_own_replaces_the_stored_one(tiny, batch_for, tmp_path):
    config = tiny(attention="sdpa")
    UViT(config).save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path, config=dataclasses.replace(config, attention="math"))
    assert {block.attn.backend for block in loaded.in_blocks} == {"math"}


def test_a_stored_config_that_does_not_fit_is_refused(tiny, tmp_path):
    UViT(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": 5}))
    with pytest.raises(UserError, match="depth: got 5, expected an even number"):
        UViT.from_pretrained(tmp_path)


def test_without_huggingface_hub_models_build_and_saving_tells_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("hub_without_huggingface", hub.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Model(torch.nn.Module, module.HubMixin, library_name="scalelong_fast", tags=["diffusion"]):
        pass

    with pytest.raises(UserError, match=r'save_pretrained needs .*pip install "scalelong_fast\[train\]"'):
        Model().save_pretrained("anywhere")
    with pytest.raises(UserError, match=r'from_pretrained needs .*pip install "scalelong_fast\[train\]"'):
        Model.from_pretrained("anywhere")
