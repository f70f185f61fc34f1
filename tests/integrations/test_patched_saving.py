"""A patch survives being written and read: by save_scalelong, and by diffusers itself."""

import copy
import importlib
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

from scalelong_fast import apply_scalelong, load_scalelong, remove_scalelong, save_scalelong
from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching import pretrained
from scalelong_fast.integrations.patching.saving import GATES, SETTINGS

diffusers = pytest.importorskip("diffusers")
KEY = "scalelong_patch"


def unet(width=8, **options):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**{**settings, **options}).eval()


def patched(scaling="ls", **options):
    model = apply_scalelong(unet(), scaling, **options)
    for parameter in model.scalelong.parameters():
        nn.init.normal_(parameter)
    return model


def output(model):
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(sample.to(model.dtype), torch.tensor([1, 400])).sample


def assert_same_network(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(output(left), output(right))
    assert left.scalelong.settings == right.scalelong.settings


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"scaling": "cs", "kappa": 0.6}, {"scaling": "learnable"}])
def test_round_trip(tmp_path, options):
    model = patched(**options)
    assert save_scalelong(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    other = unet()
    assert load_scalelong(other, str(tmp_path / "new" / "folder")) is other
    assert_same_network(model, other)
    # And where the hooks are there already.
    again = apply_scalelong(unet(), **{"scaling": "ls", **options})
    assert_same_network(model, load_scalelong(again, tmp_path / "new" / "folder"))


def test_loading_keeps_device_and_dtype(tmp_path):
    save_scalelong(patched(), tmp_path)
    model = load_scalelong(unet().to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in model.scalelong.parameters()} == {torch.bfloat16}


def test_compiled_network(tmp_path):
    model = patched()
    save_scalelong(torch.compile(model, backend="eager"), tmp_path)
    assert_same_network(load_scalelong(unet(), tmp_path), model)


def refused(model, folder, *words):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_scalelong(model, folder)
    for word in words:
        assert word in str(error.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_networks_and_settings_are_refused(tmp_path):
    save_scalelong(patched(), tmp_path)
    refused(unet(width=16), tmp_path, "UNet2DModel", "up_blocks.0.resnets.0.norm1.weight: (64,), saved (32,)", "more")
    refused(nn.Linear(2, 2), tmp_path, "Linear", "up_blocks.1")
    refused(patched("cs"), tmp_path, "scaling: 'cs', saved 'ls-individual'", "remove_scalelong")
    refused(patched(shared=True), tmp_path, "scaling: 'ls', saved 'ls-individual'")
    with pytest.raises(UserError, match="not patched"):
        save_scalelong(unet(), tmp_path)


def test_wrapped_networks_are_refused_with_the_part_to_pass(tmp_path):
    with pytest.raises(UserError, match=r"Its part 'net' is: pass that"):
        save_scalelong(nn.ModuleDict({"net": patched()}), tmp_path)
    peft = pytest.importorskip("peft")
    model = patched()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv1"], modules_to_save=["scaling"]))
    with pytest.raises(UserError, match="merge_and_unload"):
        save_scalelong(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_how_it_is_computed_is_free(tmp_path):
    model = patched()
    save_scalelong(model, tmp_path)
    other = load_scalelong(apply_scalelong(unet(), fused=False, init="paper"), tmp_path)
    torch.testing.assert_close(output(model), output(other))


def test_damaged_folders(tmp_path):
    with pytest.raises(UserError, match=SETTINGS):
        load_scalelong(unet(), tmp_path / "none")
    save_scalelong(patched(), tmp_path)
    record = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**record, "format": 99}))
    refused(unet(), tmp_path, "99", "Update scalelong_fast")
    (tmp_path / SETTINGS).write_text(json.dumps({key: record[key] for key in ("format", "network")}))
    refused(unet(), tmp_path, "damaged", "shapes, patch")
    (tmp_path / SETTINGS).write_text("{")
    refused(unet(), tmp_path, "damaged")
    (tmp_path / SETTINGS).write_text(json.dumps(record))
    gates = (tmp_path / GATES).read_bytes()
    (tmp_path / GATES).write_bytes(gates[: len(gates) // 2])
    refused(unet(), tmp_path, "damaged")
    (tmp_path / GATES).unlink()
    refused(unet(), tmp_path, GATES)
    save_scalelong(patched(shared=True), tmp_path / "other")
    os.replace(tmp_path / "other" / GATES, tmp_path / GATES)
    refused(unet(), tmp_path, "is not of the save", SETTINGS)
    # Settings of the first such files do not say which gates they belong to.
    (tmp_path / SETTINGS).write_text(json.dumps({key: value for key, value in record.items() if key != "gates"}))
    refused(unet(), tmp_path, "missing in the file", "more")
    with pytest.raises(UserError, match="a file of that name"):
        save_scalelong(patched(), tmp_path / SETTINGS)


def test_saving_that_is_interrupted_between_the_files(tmp_path, monkeypatch):
    """Gates of the same shapes, but for another network or other settings, must not be taken for those of the old."""
    save_scalelong(patched(), tmp_path)
    other = patched(init="paper")
    nn.init.ones_(other.scalelong.scaling.gates[0].up.bias)
    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_scalelong(other, tmp_path)
    monkeypatch.undo()
    refused(unet(), tmp_path, "saving was interrupted")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


DAMAGES = {
    "no sites": (lambda record: record.pop("sites"), "no sites"),
    "no adapter": (lambda record: record.pop("adapter"), "no adapter"),
    "no scaling": (lambda record: record.pop("scaling"), "no scaling"),
    "a scaling": (lambda record: record.update(scaling="lz"), "scaling of the patch: got 'lz'"),
    "an adapter": (lambda record: record.update(adapter="other"), "adapter: got 'other'"),
    "empty sites": (lambda record: record.update(sites=[]), "expected 1 … N"),
    "a site": (lambda record: record["sites"][0].pop("module"), "sites are damaged"),
    "its extra": (lambda record: record["sites"][0]["extra"].clear(), "sites are damaged"),
    "not a dict": (None, "patch: got 3, expected a dict"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_patches(tmp_path, name):
    damage, said = DAMAGES[name]
    save_scalelong(patched(), tmp_path)
    stored = json.loads((tmp_path / SETTINGS).read_text())
    if damage is None:
        stored["patch"] = 3
    else:
        damage(stored["patch"])
    (tmp_path / SETTINGS).write_text(json.dumps(stored))
    model = unet()
    refused(model, tmp_path, said)
    assert not any(module._forward_pre_hooks for module in model.modules())


# What diffusers writes and reads.


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"scaling": "cs", "kappa": 0.6}])
@pytest.mark.parametrize(
    "loading", [{}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=["default", "in place", "device map"]
)
def test_from_pretrained(tmp_path, options, loading):
    model = patched(**options)
    model.save_pretrained(tmp_path)
    loaded, info = diffusers.UNet2DModel.from_pretrained(tmp_path, output_loading_info=True, **loading)
    assert not any(info.values())
    assert_same_network(model, loaded)
    assert loaded.config[KEY]["sites"] == model.config[KEY]["sites"]
    assert apply_scalelong(loaded, **{"scaling": "ls", **options}) is loaded


@pytest.mark.parametrize(
    "saving",
    [
        {"variant": "fp16"},
        {"safe_serialization": False},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "variant": "ema"},
    ],
    ids=str,
)
def test_forms_of_files(tmp_path, saving):
    model = patched()
    model.save_pretrained(tmp_path, **saving)
    if "max_shard_size" in saving:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    variant = {"variant": saving["variant"]} if "variant" in saving else {}
    assert_same_network(model, diffusers.UNet2DModel.from_pretrained(tmp_path, **variant))
    assert_same_network(model, diffusers.AutoModel.from_pretrained(str(tmp_path), **variant))


def test_other_dtype(tmp_path):
    patched().save_pretrained(tmp_path)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert output(loaded).isfinite().all()


def test_removal_restores_the_config(tmp_path):
    plain = unet()
    plain.save_pretrained(tmp_path / "plain")
    model = remove_scalelong(apply_scalelong(unet()))
    assert dict(model.config) == dict(unet().config)
    model.save_pretrained(tmp_path / "removed")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "removed" / name).read_bytes()
    # And of a model that was loaded with its patch.
    apply_scalelong(model).save_pretrained(tmp_path / "patched")
    loaded = remove_scalelong(diffusers.UNet2DModel.from_pretrained(tmp_path / "patched"))
    assert KEY not in loaded.config
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_from_config_patches():
    model = patched("cs", kappa=0.6)
    other = diffusers.UNet2DModel.from_config(model.config)
    assert other.scalelong.settings == model.scalelong.settings
    made, unused = diffusers.UNet2DModel.from_config(dict(model.config), return_unused_kwargs=True)
    assert made.scalelong.settings == model.scalelong.settings
    assert KEY not in unused


def test_config_of_another_structure_is_left_without():
    config = {**patched().config, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.warns(UserWarning, match="do not fit this UNet2DModel"):
        model = diffusers.UNet2DModel.from_config({**config, "block_out_channels": (8,)})
    assert KEY not in model.config
    assert not hasattr(model, "scalelong")


@pytest.mark.parametrize("damage", [lambda r: r.update(version=99), lambda r: r.pop("sites"), lambda r: r.clear()])
def test_patch_of_a_config_that_nobody_understands(tmp_path, damage):
    """The network without its scaling would be another one."""
    model = patched()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config[KEY])
    with pytest.raises(UserError, match=r"patch"):
        diffusers.UNet2DModel.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"patch"):
        diffusers.UNet2DModel.from_pretrained(tmp_path)


def test_loading_drops_compiled_code_and_says_so():
    """What was compiled around another network of the class would be reused for the loaded one, unscaled."""
    torch.compiler.reset()
    run = torch.compile(output, backend="eager")
    plain = unet()
    run(plain)
    config = patched("cs", kappa=0.3).config  # patching drops it too
    run(plain)
    with pytest.warns(UserWarning, match="was dropped"):
        model = diffusers.UNet2DModel.from_config(config).eval()
    torch.testing.assert_close(run(model), output(model))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusers.UNet2DModel.from_config(config)


def test_patterns_of_ones_own_come_back():
    name = pretrained._NOT_CAST
    model = unet()
    setattr(model, name, ["conv_in"])
    apply_scalelong(model)
    assert getattr(model, name) == ["conv_in", "^scalelong$"]
    assert vars(remove_scalelong(copy.deepcopy(model)))[name] == ["conv_in"]
    assert vars(remove_scalelong(model))[name] == ["conv_in"]


def test_a_config_is_for_from_config():
    """The entry has no leading underscore, with which diffusers would drop it unsaid where it is not known."""
    model = patched("cs")
    with pytest.raises(TypeError, match=KEY):
        diffusers.UNet2DModel(**model.config)
    assert diffusers.UNet2DModel.from_config(model.config).scalelong.settings == model.scalelong.settings


def test_file_without_gates(tmp_path):
    """As a process that did not know the patch would have saved it."""
    import safetensors.torch

    model = patched()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {k: v for k, v in safetensors.torch.load_file(path).items() if not k.startswith("scalelong.")}
    safetensors.torch.save_file(weights, path)
    for loading in ({}, {"low_cpu_mem_usage": False}):
        with pytest.warns(UserWarning, match="start anew"):
            loaded = diffusers.UNet2DModel.from_pretrained(tmp_path, **loading)
        fresh = apply_scalelong(unet())
        torch.testing.assert_close(output(loaded), output(fresh), rtol=1e-2, atol=1e-2)
        assert loaded.scalelong.scaling.gates[0].up.bias.tolist() == fresh.scalelong.scaling.gates[0].up.bias.tolist()
        assert not any(p.is_meta for p in loaded.parameters())


def test_in_a_process_that_imported_the_integrations_first(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    code = f"""
        import scalelong_fast.integrations, sys
        assert "diffusers" not in sys.modules
        from diffusers import UNet2DModel
        model = UNet2DModel.from_pretrained({str(tmp_path)!r})
        print(len(model.scalelong.sites), sum(p.detach().sum().item() for p in model.scalelong.parameters()))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    count, total = done.stdout.split()
    assert int(count) == len(model.scalelong.sites)
    assert float(total) == pytest.approx(sum(p.detach().sum().item() for p in model.scalelong.parameters()), rel=1e-5)


def test_watching_an_import(tmp_path, monkeypatch):
    """A package that cannot be imported at first, and then is of an unknown make."""
    (tmp_path / "unknown_models").mkdir()
    (tmp_path / "unknown_models" / "__init__.py").touch()
    path = tmp_path / "unknown_models" / "utils.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "_MODELS", "unknown_models.utils")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(diffusers.configuration_utils, "ConfigMixin", object)
    pretrained.follow_diffusers()
    pretrained.follow_diffusers()
    assert sum(isinstance(finder, pretrained._Watch) for finder in sys.meta_path) == 1
    path.write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("unknown_models.utils")
    path.write_text("mended = True  # and longer than before")
    importlib.invalidate_caches()
    with pytest.warns(UserWarning, match="not known"):
        assert importlib.import_module("unknown_models.utils").mended
    assert not any(isinstance(finder, pretrained._Watch) for finder in sys.meta_path)


def test_who_has_not_imported_us_is_told(tmp_path, monkeypatch):
    """diffusers as it is without us says it twice: of the config's entry, with what to do, and of the gates."""
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils import logging

    patched().save_pretrained(tmp_path)
    said = []
    for cls, name in ((ConfigMixin, "from_config"), (ModelMixin, "from_pretrained")):
        monkeypatch.setattr(cls, name, classmethod(getattr(cls, name).without_scalelong))
    for name in ("diffusers.configuration_utils", "diffusers.models.modeling_utils"):
        monkeypatch.setattr(logging.get_logger(name), "warning", said.append)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert not hasattr(loaded, "scalelong")
    assert len(said) == 2
    assert "import scalelong_fast.integrations before from_pretrained" in said[0]
    assert "not used when initializing UNet2DModel" in said[1]
    assert "scalelong.scaling.gates.0.down.weight" in said[1]
