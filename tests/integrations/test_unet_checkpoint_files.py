"""Loading published UNet weights from files."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from scalelong_fast.errors import UserError
from scalelong_fast.integrations import load_unet_checkpoint
from scalelong_fast.models import UNet, UNetConfig

SIZES = {"img_size": 8, "in_chans": 1, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
SIZES |= {"attention_resolutions": (4,), "num_groups": 4, "num_heads": 2, "reduction": 4, "num_classes": 5}


def build(scaling="none", **overrides):
    return UNet(UNetConfig(**(SIZES | {"scaling": scaling} | overrides)))


def published(**overrides):
    """Random weights by the openai names, contiguous as files have them."""
    state = build(**overrides).state_dict()
    return {key: torch.randn(value.shape) for key, value in state.items()}


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", ["64x64_diffusion.pt", "ema.pth", "model.safetensors"])
@pytest.mark.parametrize("as_path", [True, False])
def test_files_load_into_the_model_and_return_it(tmp_path, name, as_path):
    state = published()
    path = save(state, tmp_path / name)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_unet_checkpoint(model, path if as_path else str(path)) is model
    assert same(model.state_dict(), state)
    assert model.out[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_loaded_weights_give_the_same_outputs(tmp_path):
    trained = build()
    trained.load_state_dict(published())
    model = load_unet_checkpoint(build(), save(trained.state_dict(), tmp_path / "ema.pt"))
    x, timesteps, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 4])
    assert torch.equal(model(x, timesteps, y), trained(x, timesteps, y))


@pytest.mark.parametrize("scaling", ["none", "uniform", "cs", "cs-reversed"])
def test_coefficients_without_parameters_take_any_checkpoint(scaling):
    state = published()
    assert same(load_unet_checkpoint(build(scaling), state).state_dict(), state)


@pytest.mark.parametrize(
    ("scaling", "init", "mend"),
    [("ls", "paper", True), ("ls-individual", "paper", True), ("ls", "identity", False), ("learnable", "paper", False)],
)
def test_coefficients_with_parameters_keep_them_and_say_so(scaling, init, mend):
    state, model = published(), build(scaling, init=init)
    before = snapshot(model)
    with pytest.warns(UserWarning, match=rf"no parameters of the long skips.*'{scaling}' keep their values") as caught:
        load_unet_checkpoint(model, state)
    assert ('init="identity"' in str(caught[0].message)) == mend
    after = model.state_dict()
    gates = {key for key in before if key.startswith("scaling.")}
    assert gates
    for key in after:
        assert torch.equal(after[key], before[key] if key in gates else state[key]), key


@pytest.mark.parametrize("scaling", ["ls", "ls-individual", "learnable"])
def test_gates_of_the_file_are_loaded(scaling):
    state = published(scaling=scaling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_unet_checkpoint(build(scaling), state).state_dict(), state)


@pytest.mark.parametrize(
    ("file", "model", "problem"),
    [("ls", "none", "unexpected: scaling"), ("ls-individual", "ls", "missing.*unexpected")],
)
def test_gates_of_another_scaling_are_refused(file, model, problem):
    network = build(model)
    before = snapshot(network)
    with pytest.raises(UserError, match=rf"{problem}.*built with scaling '{model}'.*scaling of the checkpoint"):
        load_unet_checkpoint(network, published(scaling=file))
    assert same(network.state_dict(), before)


def test_gates_that_are_there_in_part_are_refused():
    state = published(scaling="ls-individual")
    del state["scaling.gates.2.up.bias"]
    with pytest.raises(UserError, match=r"missing: scaling\.gates\.2\.up\.bias"):
        load_unet_checkpoint(build("ls-individual"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(dtype):
    state = {key: value.to(dtype) for key, value in published().items()}
    model = load_unet_checkpoint(build(), state)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.out[2].weight, state["out.2.weight"].float())


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"learn_sigma": True}, r"of another shape: out\.2\.bias \(1,\) \(expected \(2,\)\)"),
        ({"model_channels": 16}, r"of another shape: .*\(expected "),
        (
            {"use_scale_shift_norm": True},
            r"of another shape: input_blocks\.1\.0\.emb_layers\.1\.bias \(8,\) \(expected",
        ),
        ({"num_classes": -1}, r"unexpected: label_emb\.weight"),
        ({"num_res_blocks": 2}, r"missing: input_blocks\.\d.*and \d+ more"),
        ({"resblock_updown": True}, r"missing: input_blocks\.2\.0\.emb_layers.*unexpected: input_blocks\.2\.0\.op"),
        ({"attention_resolutions": ()}, r"unexpected: input_blocks\.3\.1\.norm"),
    ],
    ids=str,
)
def test_another_shape_is_refused_and_leaves_the_model_alone(overrides, problem):
    model = build(**overrides)
    before = snapshot(model)
    with pytest.raises(UserError, match=rf"checkpoint: .*{problem}.*preset and overrides"):
        load_unet_checkpoint(model, published())
    assert same(model.state_dict(), before)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_never_run(tmp_path):
    path, loot = tmp_path / "trap.pt", tmp_path / "loot"
    torch.save(published() | {"out.2.bias": Trap(loot)}, path)
    with pytest.raises(UserError, match=r"path: could not read .*trap\.pt"):
        load_unet_checkpoint(build(), path)
    assert not loot.exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"path: got .*other\.pt', expected a file that holds a state dict"):
        load_unet_checkpoint(build(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="state dict"):
        load_unet_checkpoint(build(), published() | {"out.2.bias": [1.0]})
    with pytest.raises(UserError, match=r"path: could not read .*missing\.pt"):
        load_unet_checkpoint(build(), tmp_path / "missing.pt")
